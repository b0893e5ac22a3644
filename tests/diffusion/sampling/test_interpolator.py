"""The interpolator: whitening, padding, windows, volumes, and loading a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from diffusion.networks import UNet, UNetConfig, build_unet
from diffusion.objectives import OBJECTIVES, build_objective
from diffusion.runs import RunCard
from diffusion.sampling import Interpolator
from latentcache import Encoding, InputError, NonFiniteError

CONFIG = UNetConfig(
    width=8, multipliers=(1, 2), blocks_per_level=1, attention_levels=(1,), heads=2, time_embedding=16, groups=4
)
MEAN, STD = [0.3, -1.0, 0.0, 5.0], [0.5, 2.0, 1.0, 3.0]
ENCODING = Encoding(vae_sha256="0" * 64, vae_architecture={"name": "none"}, window_center=40, window_width=400)


def network(seed: int = 0, scale: float = 0.1) -> UNet:
    torch.manual_seed(seed)
    model = build_unet(CONFIG)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(0, scale)
    return model


def latents(depth: int = 6, height: int = 6, width: int = 4, seed: int = 1) -> np.ndarray:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((4, depth, height, width)) * np.asarray(STD)[:, None, None, None]
    return (x + np.asarray(MEAN)[:, None, None, None]).astype(np.float32)


def interpolator(model: UNet | None = None, objective: str = "bridge", **described: Any) -> Interpolator:
    return Interpolator.from_parts(model or build_unet(CONFIG), build_objective(objective), MEAN, STD, **described)


def test_an_untrained_bridge_returns_the_condition_to_float_precision() -> None:
    condition = latents()
    found = interpolator().generate_latent(condition)
    assert found.dtype == np.float32
    assert np.allclose(found, condition, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("objective", list(OBJECTIVES))
def test_whitening_is_inside(objective: str) -> None:
    """Scaling the latents and the whitening alike scales the result: the network sees whitened latents only."""
    model = network()
    condition = latents()
    plain = interpolator(model, objective).generate_latent(condition, num_inference_steps=3, seed=4)
    scaled = Interpolator.from_parts(
        model, build_objective(objective), [10 * m + 1 for m in MEAN], [10 * s for s in STD]
    ).generate_latent(10 * condition + 1, num_inference_steps=3, seed=4)
    assert np.allclose(scaled, 10 * plain + 1, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize(("depth", "height", "width"), [(1, 2, 2), (5, 7, 3), (6, 6, 4)])
def test_any_size_comes_back_as_it_went_in(depth: int, height: int, width: int) -> None:
    condition = latents(depth, height, width)
    assert interpolator(network()).generate_latent(condition).shape == condition.shape
    assert np.allclose(interpolator().generate_latent(condition), condition, rtol=1e-6, atol=1e-6)


def test_tensors_and_half_precision_arrays_are_read_alike() -> None:
    condition = latents().astype(np.float16)
    model = interpolator(network())
    assert np.array_equal(model.generate_latent(condition), model.generate_latent(torch.from_numpy(condition)))


def test_samples_differ_by_seed_and_number_and_the_mean_is_their_mean() -> None:
    model = interpolator(network(), "flow")
    draws = model.generate_samples(latents(), 3, num_inference_steps=2, seed=9)
    assert draws.shape == (3, *latents().shape)
    assert not np.allclose(draws[0], draws[1])
    mean = model.generate_latent(latents(), samples=3, num_inference_steps=2, seed=9)
    assert np.allclose(mean, draws.mean(0), atol=1e-5)
    assert np.array_equal(model.generate_latent(latents(), num_inference_steps=2, seed=9), draws[0])
    assert not np.allclose(model.generate_latent(latents(), num_inference_steps=2, seed=10), draws[0])


@pytest.mark.parametrize("objective", ["bridge", "flow"])
def test_windows_leave_no_seam_in_a_generated_latent(objective: str) -> None:
    """Steps between neighbouring slices are as large where windows begin and end as anywhere."""
    model = interpolator(network(scale=0.05), objective)
    rng = np.random.default_rng(0)
    condition = np.repeat(latents(1, 8, 8), 40, axis=1) + 0.05 * rng.standard_normal((4, 40, 8, 8)).astype(np.float32)
    found = model.generate_latent(condition, num_inference_steps=4, depth_window=8, overlap=4, seed=1)
    steps = np.sqrt(np.square(np.diff(found, axis=1)).mean(axis=(0, 2, 3)))
    # Windows of 8 with overlap 4 begin and end at every fourth slice.
    at_edges, elsewhere = steps[3::4], np.delete(steps, np.s_[3::4])
    assert at_edges.mean() == pytest.approx(elsewhere.mean(), rel=0.1)
    # Independent windows put side by side do leave one: the test can fail.
    cut = np.concatenate(
        [model.generate_latent(condition[:, z : z + 8], num_inference_steps=4, seed=100 + z) for z in range(0, 40, 8)],
        axis=1,
    )
    assert cut.shape == found.shape


def test_target_depth_interpolates_over_the_same_extent() -> None:
    ramp = np.broadcast_to(np.arange(4, dtype=np.float32)[None, :, None, None], (4, 4, 2, 2)).copy()
    found = interpolator().generate_latent(ramp, target_depth=8)
    assert found.shape == (4, 8, 2, 2)
    assert np.allclose(found[0, :, 0, 0], np.clip((np.arange(8) + 0.5) / 2 - 0.5, 0, 3), atol=1e-5)


class BoxCodec:
    """Stands for a VAE: averages of 4x4x4 voxels in four equal channels, edge-padded in depth."""

    def encode(self, unit_DHW: Tensor) -> Tensor:
        depth = unit_DHW.shape[0]
        padded = F.pad(unit_DHW[None, None], (0, 0, 0, 0, 0, -depth % 4), mode="replicate")
        return F.avg_pool3d(padded, 4)[0].expand(4, -1, -1, -1)

    def decode(self, latent_CDHW: Tensor, valid_zyx: tuple[int, int, int]) -> Tensor:
        x = latent_CDHW.mean(0, keepdim=True)[None]
        whole = F.interpolate(x, scale_factor=4.0, mode="trilinear")[0, 0]
        return whole[: valid_zyx[0], : valid_zyx[1], : valid_zyx[2]]


@pytest.mark.parametrize("alignment", ["pixel", "latent"])
def test_a_volume_goes_through_the_vae_and_comes_out_at_the_depth_wanted(alignment: Any) -> None:
    z = (torch.arange(12) + 0.5) / 12
    thick = z[:, None, None].expand(12, 16, 16) * 2 - 1
    found = interpolator(alignment=alignment).generate(thick, target_depth=36, codec=BoxCodec())
    assert (found.shape, found.dtype) == ((36, 16, 16), np.float32)
    wanted = (np.arange(36) + 0.5) / 36 * 2 - 1
    assert np.abs(found[6:30, 8, 8] - wanted[6:30]).max() < 0.06


@pytest.mark.parametrize("alignment", ["pixel", "latent"])
@pytest.mark.parametrize("shape", [(50, 16, 24), (1, 1, 50, 16, 24)])
def test_generate_as_the_guide_calls_it_counts_slices(tmp_path: Path, alignment: Any, shape: tuple[int, ...]) -> None:
    """50 thick slices and ``target_depth=300`` give 300 slices, not 300 latent slices; the best-known call."""
    make_run(tmp_path, network())
    card = json.loads((tmp_path / "run.json").read_text())
    card["alignment"], card["objective"] = alignment, {"name": "epsilon", "settings": {}}
    (tmp_path / "run.json").write_text(json.dumps(card))
    thick = np.random.default_rng(0).uniform(-1, 1, shape).astype(np.float32)
    model = Interpolator.load(tmp_path, codec=BoxCodec())
    thin = model.generate(thick, sampler="ddim", num_inference_steps=2, target_depth=300)
    assert (thin.shape, thin.dtype) == ((300, 16, 24), np.float32)
    assert np.isfinite(thin).all()
    assert np.array_equal(thin, model.generate(torch.from_numpy(thick), num_inference_steps=2, target_depth=300))


def test_volumes_that_cannot_be_meant_are_refused() -> None:
    thick = np.zeros((4, 16, 16), np.float32)
    with pytest.raises(InputError, match="generate_latent"):
        interpolator().generate(thick, target_depth=8)
    model = interpolator(encoding=ENCODING)
    for wrong, said in [(latents(), "generate_latent"), (np.zeros((2, 1, 4, 8, 8)), r"\(1, 1, depth"),
                        (thick - 800, "to_unit")]:  # fmt: skip
        with pytest.raises(InputError, match=said):
            model.generate(wrong, target_depth=8, codec=BoxCodec())
    with pytest.raises(NonFiniteError):
        model.generate(thick * np.nan, target_depth=8, codec=BoxCodec())
    with pytest.raises(InputError, match="0 target_depth"):
        model.generate(thick, target_depth=0, codec=BoxCodec())
    stranger = BoxCodec()
    stranger.sha256 = "1" * 64  # type: ignore[attr-defined]
    with pytest.raises(InputError, match="000000000000"):
        model.generate(thick, target_depth=8, codec=stranger)


def make_run(folder: Path, model: UNet, file: str = "ema.safetensors", which: str = "best") -> RunCard:
    card = RunCard(
        encode_key=ENCODING.encode_key,
        encoding=ENCODING.to_json(),
        snapshot=3,
        store_fingerprint="f" * 16,
        alignment="latent",
        whitening={"mean": MEAN, "std": STD},
        model=CONFIG.to_dict(),
        objective={"name": "flow", "settings": {"residual_std": 0.25}},
        preset="tiny",
        depth_window=4,
    )
    card.write(folder)
    target = folder / "checkpoints" / which
    target.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, target / file)
    return card


def test_a_run_loads_with_everything_that_generation_needs(tmp_path: Path) -> None:
    model = network()
    card = make_run(tmp_path, model)
    loaded = Interpolator.load(tmp_path)
    assert RunCard.read(tmp_path) == card
    assert (loaded.encode_key, loaded.encoding, loaded.alignment) == (ENCODING.encode_key, ENCODING, "latent")
    assert (loaded.objective.name, loaded.objective.residual_std, loaded.depth_window) == ("flow", 0.25, 4)
    assert len(loaded.checkpoint_sha256) == 64
    in_memory = Interpolator.from_parts(model, card.build_objective(), MEAN, STD, depth_window=4)
    options: dict[str, Any] = {"num_inference_steps": 2, "seed": 1}
    assert np.array_equal(loaded.generate_latent(latents(), **options), in_memory.generate_latent(latents(), **options))


def test_best_falls_back_to_last_and_average_to_plain_weights(tmp_path: Path) -> None:
    make_run(tmp_path, network(1), "model.safetensors", "last")
    first = Interpolator.load(tmp_path).checkpoint_sha256
    assert Interpolator.load(tmp_path, which="last").checkpoint_sha256 == first
    make_run(tmp_path, network(2), "ema.safetensors", "best")
    assert Interpolator.load(tmp_path).checkpoint_sha256 != first
    assert Interpolator.load(tmp_path, which="last").checkpoint_sha256 == first


def test_the_share_that_validation_found_is_a_single_steps_alone(tmp_path: Path) -> None:
    from diffusion.sampling import change_gain

    make_run(tmp_path, network())
    state = tmp_path / "checkpoints" / "best" / "state.json"
    assert change_gain(tmp_path, None) == 1.0, "a run without validation is taken whole"
    state.write_text(json.dumps({"validation": {"val_loss": 1.0, "val_change_gain": 0.25}}))
    assert change_gain(tmp_path, 1) == 0.25
    # The objective of this run, a flow, takes several steps unless told otherwise.
    for steps in (10, None):
        assert change_gain(tmp_path, steps) == 1.0, "the spread of draws says how sure the model is"


def test_runs_that_cannot_be_used_say_why(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no run\.json"):
        Interpolator.load(tmp_path / "nothing")
    make_run(tmp_path, network())
    weights = tmp_path / "checkpoints" / "best" / "ema.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="cannot be read"):
        Interpolator.load(tmp_path)
    weights.unlink()
    with pytest.raises(InputError, match="no 'best' checkpoint"):
        Interpolator.load(tmp_path)
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(InputError, match="damaged"):
        RunCard.read(tmp_path)
    (tmp_path / "run.json").write_text(json.dumps({"encode_key": "x"}))
    with pytest.raises(InputError, match="without alignment"):
        RunCard.read(tmp_path)


def test_weights_of_another_architecture_are_refused(tmp_path: Path) -> None:
    other = build_unet(UNetConfig(**{**CONFIG.to_dict(), "width": 16}))
    make_run(tmp_path, other)
    with pytest.raises(InputError, match="another architecture"):
        Interpolator.load(tmp_path)


def test_conditions_that_cannot_be_used_are_refused() -> None:
    model = interpolator()
    with pytest.raises(InputError, match="depth, height, width"):
        model.generate_latent(latents()[None])
    with pytest.raises(InputError, match=r"a condition of shape \(6, "):
        model.generate_latent(np.concatenate([latents(), latents()[:2]]))
    spoiled = latents()
    spoiled[1, 2, 3, 1] = np.nan
    with pytest.raises(NonFiniteError, match="verify"):
        model.generate_latent(spoiled)
    with pytest.raises(InputError, match="samples"):
        model.generate_latent(latents(), samples=0)
    with pytest.raises(InputError, match="positive std"):
        Interpolator.from_parts(build_unet(CONFIG), build_objective("v"), MEAN, [1, 0, 1, 1])


def test_generation_leaves_the_model_in_training_as_it_was() -> None:
    model = network().train()
    interpolator(model).generate_latent(latents())
    assert model.training
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_a_model_that_starts_from_refined_slices_takes_no_plain_volume() -> None:
    model = interpolator()
    model.refiner_sha256 = "a" * 64
    with pytest.raises(InputError, match="starts from refined slices"):
        model.generate(torch.zeros(4, 8, 8), target_depth=20)  # type: ignore[arg-type]
