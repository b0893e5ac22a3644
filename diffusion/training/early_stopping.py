"""The best validation of a run, and when to give up waiting for a better one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from diffusion.config import ValidationConfig
from latentcache import InputError


class Best:
    """Figure that ``best`` and early stopping look at.

    ``value`` is the metric's best so far, none before the first validation; ``waited`` counts the validations since.
    """

    def __init__(self, settings: ValidationConfig) -> None:
        # Whoever has no more than a loss to offer leaves the choice open.
        self.settings = replace(settings, metric="val_loss") if settings.metric == "auto" else settings
        self.value: float | None = None
        self.waited = 0

    def take(self, figures: Mapping[str, float]) -> bool:
        """Look at a validation's figures; whether they are the best so far.

        Raises:
            InputError: The metric is none of the figures.
        """
        name = self.settings.metric
        if name not in figures:
            raise InputError(
                f"validation.metric = {name}",
                expected=f"a figure that this validation gives: {', '.join(sorted(figures))}",
                remedy="Choose one with --set validation.metric=NAME, or switch image validation on.",
            )
        found = figures[name]
        # NaN is never better: an undefined figure must not become the checkpoint that is kept.
        better = found == found and (self.value is None or self._improves(found, self.value))
        self.value = found if better else self.value
        self.waited = 0 if better else self.waited + 1
        return better

    @property
    def given_up(self) -> bool:
        """Whether the patience is used up."""
        return 0 < self.settings.patience <= self.waited

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.value, "bad_validations": self.waited, "metric": self.settings.metric}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if state.get("metric", self.settings.metric) != self.settings.metric:
            return  # figures of unlike metrics do not compare: the next validation is the first of this one
        self.value, self.waited = state["best"], int(state["bad_validations"])

    def _improves(self, found: float, best: float) -> bool:
        mode = self.settings.mode
        if mode == "auto":
            mode = "min" if self.settings.metric.endswith(("loss", "_rms_hu")) else "max"
        return found < best if mode == "min" else found > best
