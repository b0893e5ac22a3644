from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from diffusion.training.failures import non_finite, stop_signals


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Ctrl-C as Python has it: a shell that starts a process in the background makes it ignore SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_a_signal_is_remembered_and_a_second_one_acts() -> None:
    with stop_signals() as received:
        os.kill(os.getpid(), signal.SIGTERM)
        assert received == [signal.SIGTERM]
        signal.raise_signal(signal.SIGINT)
        assert received == [signal.SIGTERM, signal.SIGINT], "the first of a kind only asks"
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_handlers_are_put_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with stop_signals():
        assert signal.getsignal(signal.SIGTERM) is not before
    assert signal.getsignal(signal.SIGTERM) is before


def test_outside_the_main_thread_nothing_is_installed() -> None:
    found: list[bool] = []

    def worker() -> None:
        before = signal.getsignal(signal.SIGTERM)
        with stop_signals() as received:
            found.append(received == [] and signal.getsignal(signal.SIGTERM) is before)

    thread = threading.Thread(target=worker)
    thread.start()
    thread.join()
    assert found == [True]


def test_the_message_goes_from_sample_to_gradient_to_other_ranks() -> None:
    module = nn.Linear(2, 1)
    losses = {"loss": torch.tensor([1.0, torch.nan]), "ms_ssim": torch.tensor([0.1, 0.2])}
    assert "step 7: loss of study bb is" in str(non_finite(7, [(["aa", "bb"], losses)], module))
    fine = {"loss": torch.tensor([1.0])}
    module.weight.grad = torch.tensor([[0.0, torch.inf]])
    assert "the gradient of weight, from studies aa, cc," in str(
        non_finite(7, [(["cc"], fine), (["aa"], fine)], module)
    )
    module.weight.grad = None
    assert "another rank" in str(non_finite(7, [(["cc"], fine)], module))
