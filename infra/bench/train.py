"""The trainer: cached latents against a VAE in the loop, and whether data keeps up, on this device.

    python infra/bench/train.py [--quick] [--parts epoch,width,count,wait] [--no-s3]

`epoch`  The trainer itself, once on cached latents and once with thin and thick encoded inside the loop: tiny U-Net
         and tiny VAE, equal batches and settings. Volumes lie in memory, which flatters the loop.
`width`  The same ratio at the real widths, 16 slices of 512x512, our VAE and MONAI's class in the loop.
`count`  The same ratio in floating point operations at 512x512x300, for every way that the loop may encode.
`wait`   A consumer that takes a batch every 100 ms: the share of its time spent waiting, from a local store and from S3
         (`rclone serve s3` on loopback), latents of 4x75x128x128.

See train_in_loop.py for `width` and `count`; gpu.py measures `medium` on a GPU. A part that is not asked for keeps its
place in the results. Prints a table, then one JSON object, which is also kept in infra/bench/results/.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import train_in_loop

from diffusion.config import DataConfig, load_config
from diffusion.data import PairStream, Step, make_store
from diffusion.networks import build_unet, model_preset, parameter_count
from diffusion.objectives import build_objective
from diffusion.training import LoopConfig, Trainer, World, default_device, latent_loss
from latentcache import LatentStore
from pipeline.vae import load_vae

CONSUMER_S = 0.1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default="epoch,width,count,wait", help="comma separated")
    parser.add_argument("--quick", action="store_true", help="few steps, small latents: under 60 s on 2 cores")
    parser.add_argument("--steps", type=int, default=12, help="steps timed for each of cached and in-loop")
    parser.add_argument("--side", type=int, default=64, help="in-plane pixels of the volumes encoded in the loop")
    parser.add_argument("--depth", type=int, default=64, help="their slices")
    parser.add_argument("--batches", type=int, default=60, help="batches that the waiting consumer takes")
    parser.add_argument("--no-s3", action="store_true", help="leave out the S3 server")
    options = parser.parse_args()
    if options.quick:
        options.steps, options.batches, options.parts = 3, 15, options.parts.replace("width,", "")
    device = default_device()
    kept = Path(__file__).parent / "results" / f"train-{device.type}.json"
    result: dict[str, Any] = json.loads(kept.read_text()) if kept.exists() and not options.quick else {}
    result |= {
        "bench": "train",
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()} cpu",
        "torch": torch.__version__,
        "quick": options.quick,
        "medium_parameters": parameter_count(model_preset("medium")),
    }
    parts = options.parts.split(",")
    with tempfile.TemporaryDirectory() as scratch:
        if "epoch" in parts:
            result |= cached_against_in_loop(Path(scratch) / "epoch", device, options)
        if "width" in parts:
            result |= train_in_loop.full_width(device)
        if "count" in parts:
            result |= train_in_loop.full_size_by_counting()
        if "wait" in parts:
            result |= waiting(Path(scratch) / "wait", options)
    for name, value in result.items():
        print(f"{name:44s} {value}")
    if not options.quick:
        kept.parent.mkdir(exist_ok=True)
        kept.write_text(json.dumps(result, indent=1, sort_keys=True) + "\n")
    print(json.dumps(result, sort_keys=True))


class EncodingStream:
    """The cached stream's steps, but each latent is encoded anew from a volume: the loop that the cache replaces."""

    def __init__(self, cached: PairStream, vae: Any, volume_zyx: tuple[int, int, int]) -> None:
        self.cached, self.vae = cached, vae
        self.volume = np.random.default_rng(0).uniform(-1, 1, volume_zyx).astype(np.float32)

    def __len__(self) -> int:
        return len(self.cached)

    def state_dict(self) -> dict[str, int]:
        return self.cached.state_dict()

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.cached.load_state_dict(state)

    def __iter__(self) -> Iterator[Step]:
        for step in self.cached:
            yield replace(step, batches=map(self._encoded, step.batches))

    def _encoded(self, batch: dict[str, Any]) -> dict[str, Any]:
        for name in ("thin", "condition"):
            latents = [self.vae.encode(self.volume) for _ in batch["study_key"]]
            assert latents[0].shape == batch[name].shape[1:], (latents[0].shape, batch[name].shape)
        return batch


def cached_against_in_loop(folder: Path, device: torch.device, options: Any) -> dict[str, Any]:
    """Seconds of a step, and of an epoch of 250 patients, fed either way."""
    depth, side = options.depth // 4, options.side // 4
    store = make_store(folder, splits=("train",) * 4, depths=(depth,), side=side)
    config, _ = load_config(
        "tiny", None, ["window=null", f"depth_bucket={depth}", "batch_size=1", "samples_per_step=1"]
    )
    cached = PairStream(store, config.data, in_plane_multiple=config.model.in_plane_multiple)
    vae = load_vae("tiny", device)
    seconds = {}
    for name, stream in (("cached", cached), ("in_loop", EncodingStream(cached, vae, (4 * depth, 4 * side, 4 * side)))):
        torch.manual_seed(0)
        loss = latent_loss(build_objective("bridge"), device)
        loop = LoopConfig(config.optimiser, config.validation, config.budget, config.parallel)
        trainer = Trainer(build_unet(config.model).to(device), loss, stream, loop, folder, world=World(device=device))
        steps = iter(stream)
        trainer.training_step(next(steps))
        begin = time.perf_counter()
        for step in islice(steps, options.steps):
            trainer.training_step(step)
        seconds[name] = (time.perf_counter() - begin) / options.steps
    return {
        "epoch_threads": torch.get_num_threads(),
        "epoch_volume_zyx": [4 * depth, 4 * side, 4 * side],
        "epoch_cached_step_s": round(seconds["cached"], 4),
        "epoch_in_loop_step_s": round(seconds["in_loop"], 4),
        "epoch_cached_250_s": round(250 * seconds["cached"], 1),
        "epoch_in_loop_250_s": round(250 * seconds["in_loop"], 1),
        "epoch_cached_vs_inloop": round(seconds["in_loop"] / seconds["cached"], 2),
        "epoch_of": "tiny U-Net and tiny VAE",
    }


def waiting(folder: Path, options: Any) -> dict[str, Any]:
    """Share of a consumer's time spent waiting when it takes a batch every 100 ms."""
    depth, side = (75, 32) if options.quick else (75, 128)
    local = make_store(folder / "local", splits=("train",) * 4, depths=(depth,), side=side)
    result = {"wait_latent": [4, depth, side, side], "wait_local": round(wait_fraction(local, options.batches), 5)}
    if options.no_s3:
        return result
    with s3_copy(folder / "local", folder / "s3") as remote:
        result["wait_s3"] = round(wait_fraction(remote, options.batches), 5)
    return result


def wait_fraction(store: LatentStore, batches: int) -> float:
    """Waiting over the whole time, the first batch (nothing is read ahead yet) left out."""
    data = DataConfig(window=24, windows_per_volume=64, batch_size=2, readers=2, read_ahead=6)
    stream = PairStream(store, data, samples_per_step=2)
    steps = iter(stream)
    next(next(steps).batches)
    waited, begin = 0.0, time.perf_counter()
    for step in islice(steps, batches):
        asked = time.perf_counter()
        for _ in step.batches:
            waited += time.perf_counter() - asked
            time.sleep(CONSUMER_S)
            asked = time.perf_counter()
    return waited / (time.perf_counter() - begin)


@contextmanager
def s3_copy(source: Path, root: Path) -> Iterator[LatentStore]:
    """The same store behind a real S3 server on loopback."""
    from tests.support.s3_server import serve

    with serve(root) as server:
        os.environ.update(server.environment | {"AWS_ENDPOINT_URL": f"http://{server.direct}"})
        shutil.copytree(source, root / "bucket" / "store")
        yield LatentStore.open("s3://bucket/store")


if __name__ == "__main__":
    main()
