from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st

from diffusion.config import DataConfig
from diffusion.data import Batch, PairStream, ProcessShare, align_depth, key_of, make_store, stage
from diffusion.data.pairs import whole_latents_inside
from diffusion.data.synthetic_store import ENCODING, smooth
from diffusion.networks import build_unet
from diffusion.objectives import build_objective
from latentcache import CorruptLatentError, InputError, LatentStore
from latentcache.tables import extend, to_table

WINDOWS = DataConfig(window=4, windows_per_volume=3, batch_size=2, readers=0)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> LatentStore:
    return make_store(tmp_path_factory.mktemp("store") / "s", depths=(12, 9, 12))


def batches(stream: PairStream, steps: int) -> list[Batch]:
    return [batch for step in islice(iter(stream), steps) for batch in step.batches]


def same(a: list[Batch], b: list[Batch]) -> bool:
    def equal(x: Any, y: Any) -> bool:
        if isinstance(x, torch.Tensor):
            return torch.equal(x, y)
        if isinstance(x, list) and isinstance(x[0], torch.Tensor):
            return all(map(torch.equal, x, y))
        return bool(x == y)

    return len(a) == len(b) and all(equal(x[k], y[k]) for x, y in zip(a, b, strict=True) for k in x)


def test_a_batch_has_the_contracts_form(store: LatentStore) -> None:
    batch = batches(PairStream(store, WINDOWS, samples_per_step=2), 1)[0]
    contract = "thin thick condition mask study_key category num_thin_slices num_thick_slices z_mm"
    assert set(contract.split()) <= set(batch)
    assert batch["thin"].shape == batch["condition"].shape == (2, 4, 4, 16, 16)
    assert batch["mask"].shape == (2, 1, 4, 16, 16)
    assert batch["z_mm"].shape == (2, 4)
    assert batch["thin"].dtype == torch.float32
    assert torch.allclose(batch["z_mm"].diff(dim=1), torch.tensor(4.0, dtype=torch.float64))
    assert batch["category"][0] in ("APE", "non-APE")


def test_latents_are_whitened_by_the_training_splits_moments(store: LatentStore) -> None:
    whole = DataConfig(depth_bucket=1, readers=0)
    thin = [b["thin"] for b in batches(PairStream(store, whole), 3)]
    values = torch.cat([t.permute(1, 0, 2, 3, 4).reshape(4, -1) for t in thin], dim=1)
    assert torch.allclose(values.mean(1), torch.zeros(4), atol=1e-3)
    assert torch.allclose(values.std(1), torch.ones(4), atol=2e-3)


def test_window_equals_the_same_place_of_the_whole(store: LatentStore) -> None:
    stream = PairStream(store, WINDOWS, samples_per_step=2)
    for batch in batches(stream, 4):
        for i, pair_key in enumerate(batch["pair_key"]):
            planned = next(p for p in stream.pairs if p.pair_key == pair_key)
            whole = np.asarray(store.read(planned.thin), np.float32)
            start = round((float(batch["z_mm"][i, 0]) - planned.thin.z0_mm) / planned.thin.dz_mm)
            whitened = (whole - stream.mean[:, None, None, None]) / stream.std[:, None, None, None]
            assert np.array_equal(batch["thin"][i].numpy(), whitened[:, start : start + 4])


def test_latent_alignment_goes_by_position_and_reads_only_what_it_needs(store: LatentStore) -> None:
    stream = PairStream(store, replace(WINDOWS, alignment="latent"), samples_per_step=2)
    for batch in batches(stream, 3):
        for i, pair_key in enumerate(batch["pair_key"]):
            record = next(p for p in stream.pairs if p.pair_key == pair_key).condition
            whole = (np.asarray(store.read(record), np.float32) - stream.mean[:, None, None, None]) / stream.std[
                :, None, None, None
            ]
            z_from = record.z0_mm + record.dz_mm * np.arange(record.shape[1])
            expected = align_depth(torch.from_numpy(whole), z_from, batch["z_mm"][i].numpy())
            assert torch.allclose(batch["condition"][i], expected, atol=1e-6)
            assert batch["thick"][i].shape[1] <= 3


def test_only_latents_wholly_inside_the_overlap_are_used(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s", splits=("train",), depths=(12,))
    pair = store.pairs()[0]
    writer = LatentStore.open(tmp_path / "s")
    writer.append_catalog([], [replace(pair, overlap_mm=(5.0, 37.0))])
    planned = PairStream(LatentStore.open(tmp_path / "s"), DataConfig(depth_bucket=1)).pairs[0]
    # Latent j spans 4j - 0.5 .. 4j + 3.5 mm: 2 begins at 7.5, 8 ends at 35.5, 9 would end at 39.5.
    assert (planned.first, planned.depth) == (2, 7)


@given(st.floats(-50, 50), st.floats(0.5, 20), st.floats(-100, 100), st.floats(0, 200), st.integers(1, 30))
def test_latents_inside_by_definition(z0: float, dz: float, low: float, length: float, n: int) -> None:
    one = (np.array([v]) for v in (z0, dz, n, (low, low + length)))
    first, count = (int(found[0]) for found in whole_latents_inside(*one))
    slack = 2e-3
    for j in range(n):
        begin, end = z0 + (j - 0.5) * dz, z0 + (j + 0.5) * dz
        if first <= j < first + count:
            assert begin >= low - slack
            assert end <= low + length + slack
        else:
            assert begin < low + slack or end > low + length - slack


@pytest.mark.parametrize("readers", [1, 3])
def test_readers_do_not_change_the_order(store: LatentStore, readers: int) -> None:
    reference = batches(PairStream(store, WINDOWS, samples_per_step=4, seed=7), 9)
    assert same(reference, batches(PairStream(store, replace(WINDOWS, readers=readers), samples_per_step=4, seed=7), 9))


def test_ranks_together_see_what_one_process_sees(store: LatentStore) -> None:
    one = PairStream(store, WINDOWS, samples_per_step=4, seed=1)
    two = [PairStream(store, WINDOWS, samples_per_step=4, seed=1, share=ProcessShare(r, 2)) for r in (0, 1)]
    for whole, *parts in zip(*(islice(iter(s), 8) for s in (one, *two)), strict=True):

        def drawn(step: Any) -> Iterator[tuple[int, bytes]]:
            for batch in step.batches:
                for i, seed in enumerate(batch["noise_seed"]):
                    if batch["weight"][i] > 0:
                        yield seed, batch["thin"][i].numpy().tobytes()

        assert sorted(drawn(whole)) == sorted(x for part in parts for x in drawn(part))


@pytest.mark.parametrize("stop", [0, 1, 2, 3, 5])
def test_state_resumes_at_the_next_step(store: LatentStore, stop: int) -> None:
    undisturbed = batches(PairStream(store, WINDOWS, samples_per_step=4, seed=2), 8)
    first = PairStream(store, replace(WINDOWS, readers=2), samples_per_step=4, seed=2)
    head = batches(first, stop)
    second = PairStream(store, replace(WINDOWS, readers=2), samples_per_step=4, seed=2)
    second.load_state_dict(first.state_dict())
    assert same(undisturbed, head + batches(second, 8 - stop))


def test_whole_volumes_are_bucketed_by_depth(store: LatentStore) -> None:
    stream = PairStream(store, DataConfig(depth_bucket=4, batch_size=2, readers=0), samples_per_step=2)
    depths = [tuple(b["thin"].shape[2:]) for b in batches(stream, len(stream))]
    assert sorted(depths) == [(8, 16, 16), (12, 16, 16)]


def test_a_samples_loss_does_not_depend_on_its_batch_mates(store: LatentStore) -> None:
    from diffusion.networks import UNetConfig

    torch.manual_seed(0)
    net = build_unet(UNetConfig(16, (1, 2), 1, (1,), 2, 32, 4)).eval()
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    objective = build_objective("epsilon")
    stream = PairStream(store, replace(WINDOWS, batch_size=4), samples_per_step=4)
    batch = batches(stream, 1)[0]

    def losses(rows: list[int]) -> torch.Tensor:
        noise = [torch.Generator().manual_seed(batch["noise_seed"][i]) for i in rows]
        with torch.no_grad():
            terms = objective.loss(net, batch["thin"][rows], batch["condition"][rows], batch["mask"][rows], noise)
        return terms.per_sample

    together = losses([0, 1, 2, 3])
    for i in range(4):
        assert torch.allclose(losses([i]), together[i : i + 1], rtol=1e-4)
    assert torch.allclose(losses([3, 1]), together[[3, 1]], rtol=1e-4)


def test_a_growing_store_does_not_change_a_pinned_stream(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s", splits=("train", "train"))
    pinned = LatentStore.open(tmp_path / "s", snapshot=store.snapshot)
    before = batches(PairStream(pinned, WINDOWS, samples_per_step=2), 3)
    other = LatentStore.open(tmp_path / "s")
    pair = replace(other.pairs()[0], pair_key=key_of(9, 99))
    other.append_catalog([], [pair])
    with other.writer() as writer:
        rng = np.random.default_rng(5)
        key = other.encode_keys()[0]
        writer.commit([stage(other, key, pair.pair_key, "thick_on_thin", smooth(rng, 12, 16), 48)])
    again = LatentStore.open(tmp_path / "s", snapshot=store.snapshot)
    assert same(before, batches(PairStream(again, WINDOWS, samples_per_step=2), 3))
    assert len(PairStream(LatentStore.open(tmp_path / "s"), WINDOWS).pairs) == 3


@pytest.mark.parametrize("readers", [0, 2])
def test_a_flipped_bit_raises_with_the_series_key_instead_of_training(tmp_path: Path, readers: int) -> None:
    store = make_store(tmp_path / "s", splits=("train",))
    record = store.records(role="thin")[0]
    file = max((p for p in (tmp_path / "s" / record.path).rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    damaged = bytearray(file.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    file.chmod(0o644)
    file.write_bytes(damaged)
    stream = PairStream(store, DataConfig(depth_bucket=1, readers=readers))
    with pytest.raises(CorruptLatentError, match=record.key):
        batches(stream, 1)


def test_mixed_encode_keys_are_refused_until_one_is_chosen(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s", splits=("train",))
    lung = store.register_encoding(replace(ENCODING, window_center=-600.0))
    with store.writer() as writer:
        writer.commit([stage(store, lung, key_of(3, 0), "thin", smooth(np.random.default_rng(1), 12, 16), 48)])
    with pytest.raises(InputError, match="2 encode keys"):
        PairStream(store, WINDOWS)
    assert len(PairStream(store, replace(WINDOWS, encode_key=ENCODING.encode_key)).pairs) == 1
    with pytest.raises(InputError, match="encode key nonsense"):
        PairStream(store, replace(WINDOWS, encode_key="nonsense"))


@pytest.mark.parametrize(
    ("role", "shape", "said"),
    [("thin", (6, 12, 16, 16), "6 channels"), ("thick_on_thin", (4, 12, 16, 20), "one grid")],
)
def test_latents_that_cannot_be_one_sample_are_refused(
    tmp_path: Path, role: str, shape: tuple[int, ...], said: str
) -> None:
    """Such rows can only come from another program: the store refuses them at write."""
    store = make_store(tmp_path / "s", splits=("train",))
    rows = [replace(row, shape=shape) if row.role == role else row for row in store.records()]
    with store.writer() as writer:
        writer.retire(store.manifest_table())
        writer.replace(lambda base: extend(store.location, base, {"manifest": to_table("manifest", rows)}))
    key = next(row.key for row in rows if row.role == "thin")
    with pytest.raises(InputError, match=said) as caught:
        PairStream(LatentStore.open(tmp_path / "s"), WINDOWS)
    assert key in str(caught.value)


def test_an_epochs_steps_are_counted_without_planning_it(store: LatentStore) -> None:
    for per_step in (1, 2, 4, 7):
        stream = PairStream(store, WINDOWS, samples_per_step=per_step)
        assert len(stream) == next(iter(stream)).steps_in_epoch


def test_pairs_without_latents_are_counted_not_guessed(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s", splits=("train", "train", "train"))
    pairs = store.pairs()
    store.append_catalog([], [replace(pairs[0], pair_key=key_of(8, 0)), replace(pairs[1], status="quarantined")])
    stream = PairStream(store, WINDOWS)
    assert len(stream.pairs) == 2
    assert stream.left_out == {"no thick_on_thin latent yet": 1, "quarantined": 1}


def test_a_store_without_latents_says_what_to_run(tmp_path: Path) -> None:
    store = LatentStore.create(tmp_path / "s", secret_fingerprint="f" * 16)
    with pytest.raises(InputError, match="ctpipe encode STORE"):
        PairStream(store, WINDOWS)


def test_a_crop_is_kept_to_the_networks_step(store: LatentStore) -> None:
    stream = PairStream(store, replace(WINDOWS, crop=12), samples_per_step=2, in_plane_multiple=8)
    assert batches(stream, 1)[0]["thin"].shape[-2:] == (8, 8)
    with pytest.raises(InputError, match="at least 32 x 32"):
        PairStream(store, WINDOWS, in_plane_multiple=32)
