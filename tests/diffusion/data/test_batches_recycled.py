from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch

from diffusion.data.batches import Recycled


def test_memory_is_used_again_once_the_last_view_is_gone() -> None:
    pool = Recycled(keep=2)
    tensor = pool.empty((4, 8))
    place, view = tensor.data_ptr(), tensor[1].numpy()
    del tensor
    assert pool.empty((4, 8)).data_ptr() != place, "a view still shows it"
    del view
    assert place in {pool.empty((4, 8)).data_ptr() for _ in range(2)}


def test_what_is_in_use_is_never_lent_twice() -> None:
    pool = Recycled(keep=4)

    def fill_and_look(value: int) -> bool:
        tensor = pool.empty((64, 64))
        tensor.fill_(value)
        return bool((tensor == value).all()) and tensor.dtype == torch.float32

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(fill_and_look, range(400)))


def test_memory_of_another_size_is_not_taken_for_it() -> None:
    pool = Recycled(keep=2)
    del_me = pool.empty((1000,))
    place = del_me.data_ptr()
    del del_me
    small = pool.empty((10,))
    assert small.data_ptr() != place, "ten numbers must not hold the memory of a thousand"
    assert pool.empty((700,)).data_ptr() == place


def test_no_more_is_kept_than_was_asked_for() -> None:
    pool = Recycled(keep=1)
    tensors = [pool.empty((100,)) for _ in range(3)]
    places = {t.data_ptr() for t in tensors}
    tensors.clear()
    first, second = pool.empty((100,)), pool.empty((100,))
    assert first.data_ptr() in places
    assert len(pool._free) == 0
    assert first.data_ptr() != second.data_ptr()
