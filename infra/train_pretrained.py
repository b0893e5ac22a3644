"""The recipe of the shipped refiner: genuine thin CT and phantoms, thick slices simulated in every size.

    python infra/train_pretrained.py DATA --work FIRST --out first.safetensors --name fast --steps 1450
    python infra/train_pretrained.py DATA --work RUN --out pipeline/refiner/weights/refiner_default.safetensors \\
        --start first.safetensors --width 64 --head 32 --seed 2 --steps 7000

The model card has all commands and what they reached.

DATA is a folder of NIfTI volumes; those of a name in pretrained_sources.json are taken, where their licence and credit
stand. They never enter the project. The same command again takes up where RUN stopped; --steps may differ then, since
the rate is constant until the last fifth of them. Held-out volumes are never trained on and choose nothing but what a
person decides by them; weights are the exponential moving average at the last step, as float16.

What makes it learn: cells about as wide as thick slices are apart; contrasts, not levels, as the network's input; a
last layer that starts fitted; patches weighted against how much the linear estimate misses there, lest bone be all.

bfloat16 where the processor has it: its weight gradients are wrong at a depth of 2 (decision 0011), which no patch has.
Denormals are flushed to zero before the first computation: without it a step takes five times as long after a while.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import logging
import time
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pretrained_data import (
    PIXEL_MM,
    THICKNESS_MM,
    THIN_MM,
    Patch,
    PatchSize,
    Scan,
    ScanDrawing,
    Source,
    cut,
    draw_scan,
    phantom_source,
    read_source,
)
from safetensors.torch import save_file
from torch import Tensor

from pipeline.forward_model import SliceProfile
from pipeline.refiner import (
    DEGREE,
    RESIDUAL_UNIT,
    NetworkConfig,
    PretrainedNetwork,
    as_cells,
    load_pretrained,
    native_bfloat16,
    to_unit,
)

log = logging.getLogger("train_pretrained")

SOURCES = Path(__file__).with_name("pretrained_sources.json")
HELD_OUT_PHANTOM = 900_001
KEEP_EVERY, LOOK_EVERY = 50, 200
"""Steps between checkpoints, and between looks at held-out volumes."""
LEAST_DEPTH = 3
"""Slices of a patch, thick or thin: at a depth of 2 bfloat16 weight gradients are garbage."""


@dataclass(frozen=True)
class Recipe:
    """What decides the weights beside the data, and apart from how long it runs."""

    width: int = 32
    blocks: int = 4
    head: int = 16
    seed: int = 0
    batch: int = 8
    learning_rate: float = 1e-3
    warmup_steps: int = 40
    cool_down: float = 0.2  # last share of the steps, over which the rate falls to zero
    second_moment: float = 0.99
    clip_norm: float = 0.5
    ema_steps: float = 80.0
    phantoms: int = 10
    phantom_share: float = 0.35
    evenness: float = 0.5  # a patch's weight is its linear estimate's error to minus this power
    start: str = ""  # name or path of the model that it grows from
    start_patches: int = 100
    start_ridge: float = 1e-3
    cells: int = 16
    thick: int = 7
    thin: int = 24

    @property
    def network(self) -> NetworkConfig:
        return NetworkConfig(self.width, self.blocks, self.head)

    @property
    def drawing(self) -> ScanDrawing:
        return ScanDrawing(size=PatchSize(self.cells, self.thick, self.thin))


@dataclass
class State:
    """What a checkpoint holds."""

    network: PretrainedNetwork
    average: PretrainedNetwork
    optimiser: torch.optim.Optimizer
    step: int = 0
    cpu_seconds: float = 0.0


def sources_of(data: Path, work: Path, recipe: Recipe) -> tuple[list[Source], list[Source]]:
    """Genuine volumes of known licence, and phantoms; what takes long to make is kept in ``work``."""
    known = json.loads(SOURCES.read_text())
    genuine = [
        kept(work, path.name.removesuffix(".nii.gz"), path)
        for path in sorted(data.glob("*.nii.gz"))
        if path.name.removesuffix(".nii.gz") in known
    ]
    phantoms = [kept(work, f"phantom-{k}", None) for k in range(recipe.phantoms)]
    if not genuine and not phantoms:
        raise SystemExit(f"no volume of {', '.join(known)} in {data}")
    return genuine, phantoms


def kept(work: Path, name: str, path: Path | None) -> Source:
    """A source by name from ``work``, read or made where it is not there yet."""
    file = work / "sources" / f"{name}.npz"
    if not file.exists():
        made = read_source(path) if path else phantom_source(int(name.rpartition("-")[2]))
        file.parent.mkdir(parents=True, exist_ok=True)
        np.savez(file, hu=made.hu, spacing=np.asarray(made.spacing), sha256=made.sha256)
    with np.load(file) as held:
        z, y, x = (float(v) for v in held["spacing"])
        return Source(name, held["hu"], (z, y, x), str(held["sha256"]))


def tensors(patch: Patch) -> dict[str, Tensor]:
    """A patch as the network takes it: unit scale, one batch axis."""
    images = {name: to_unit(getattr(patch, name))[None] for name in ("thick", "linear", "target")}
    facts = {name: getattr(patch, name) for name in ("facts", "thin_facts", "below", "between")}
    return {name: torch.from_numpy(array)[None] for name, array in (images | facts).items()}


def forward(network: PretrainedNetwork, given: dict[str, Tensor], fold: int, half: bool) -> Tensor:
    """Refined thin slices of a patch."""
    with torch.autocast(given["thick"].device.type, torch.bfloat16, enabled=half):
        features = network.encode(given["thick"], given["facts"], fold)
        return network.decode(features, given["linear"], given["thin_facts"], given["below"], given["between"], fold)


def drawn(genuine: Sequence[Source], phantoms: Sequence[Source], recipe: Recipe, step: int, number: int) -> Patch:
    """Patch ``number`` of a step: the same for the same seed, whenever it is asked for."""
    for attempt in range(100):
        rng = np.random.default_rng([recipe.seed, step + 1, number, attempt])
        pool = phantoms if not genuine or (phantoms and rng.random() < recipe.phantom_share) else genuine
        source = pool[int(rng.integers(len(pool)))]
        patch = cut(source, draw_scan(source, recipe.drawing, rng), recipe.drawing.size, rng)
        if min(len(patch.thick), len(patch.target)) >= LEAST_DEPTH:
            return patch
    raise SystemExit("volumes too short to be cut")


@torch.no_grad()
def grow(network: PretrainedNetwork, small: PretrainedNetwork, seed: int = 0) -> None:
    """Start a larger network as the same function as a smaller one (Chen et al. 2016, Net2Net).

    Each channel of the smaller becomes several equal ones, whose outgoing weights are drawn shares of its own, so that
    they learn apart from then on; further blocks add nothing at first.
    """
    ours, theirs = network.config, small.config
    if ours.width % theirs.width or ours.head % theirs.head or ours.blocks < theirs.blocks:
        raise SystemExit(f"a start of {theirs} for a network of {ours}: widths must be multiples, blocks no fewer")
    random = torch.Generator().manual_seed(seed)

    def wider(
        to: torch.nn.Conv3d, of: torch.nn.Conv3d, into: int = 1, out: int = 1, first: int | None = None, groups: int = 1
    ) -> None:
        """Inputs (the ``first`` of them) ``into`` times, outputs, each of ``groups`` by itself, ``out`` times."""
        count = of.in_channels if first is None else first
        shares = torch.rand(into, 1, count, 1, 1, 1, generator=random) + 0.5
        shares = shares / shares.sum(0)
        weight = torch.cat([*(of.weight[:, :count].cpu() * share for share in shares), of.weight[:, count:].cpu()], 1)
        to.weight.copy_(torch.cat([part.repeat(out, 1, 1, 1, 1) for part in weight.chunk(groups)]))
        to.bias.copy_(torch.cat([part.repeat(out) for part in of.bias.chunk(groups)]))  # type: ignore[union-attr]

    width, head = ours.width // theirs.width, ours.head // theirs.head
    wider(network.enter, small.enter, out=width)
    for block, old in zip(network.blocks, small.blocks, strict=False):
        wider(block.conv1, old.conv1, width, width)  # type: ignore[arg-type]
        wider(block.conv2, old.conv2, width, width)  # type: ignore[arg-type]
    for block in list(network.blocks)[theirs.blocks :]:
        block.conv2.weight.zero_()  # type: ignore[union-attr,operator]
        block.conv2.bias.zero_()  # type: ignore[union-attr,operator]
    wider(network.mix, small.mix, width, head, groups=2 * (DEGREE + 1))
    wider(network.head, small.head, head, head, first=theirs.head)
    wider(network.leave, small.leave, head)


@torch.no_grad()
def start_last_layer(
    network: PretrainedNetwork, recipe: Recipe, sources: tuple[Sequence[Source], Sequence[Source]], half: bool
) -> None:
    """Fit the last layer by ridge regression on the features that random weights give.

    From zero it would follow noise at first: the linear estimate leaves nothing that is linear, so that gradients point
    nowhere, and in some runs all features died within 200 steps. A fitted last layer tells every other at once which
    way is better.
    """
    device = next(network.parameters()).device
    leave = network.leave
    size = leave.in_channels * 27
    gram, product = torch.zeros(size, size, device=device), torch.zeros(size, leave.out_channels, device=device)
    for number in range(recipe.start_patches):
        patch = drawn(*sources, recipe, -1, number)
        given = {name: t.to(device) for name, t in tensors(patch).items()}
        places = {name: given[name] for name in ("linear", "thin_facts", "below", "between")}
        with torch.autocast(given["thick"].device.type, torch.bfloat16, enabled=half):
            read = network.at_thin(
                network.encode(given["thick"], given["facts"], patch.fold), **places, fold=patch.fold
            )
        wanted = as_cells(given["target"] - given["linear"], patch.fold)[0].flatten(1) / RESIDUAL_UNIT
        weight = (float(wanted.square().mean()) + 0.1) ** -recipe.evenness
        padded = torch.nn.functional.pad(read[0].float(), (1, 1, 1, 1, 1, 1))
        # Channels, then taps along z, y, x, as a convolution's weights are laid out.
        seen = torch.stack(
            [
                padded[:, z : z + read.shape[2], y : y + read.shape[3], x : x + read.shape[4]].flatten(1)
                for z, y, x in itertools.product(range(3), repeat=3)
            ],
            1,
        ).flatten(0, 1)
        gram += weight * (seen @ seen.T)
        product += weight * (seen @ wanted.T)
    ridge = recipe.start_ridge * float(gram.diagonal().mean())
    found = torch.linalg.solve(gram + ridge * torch.eye(size, device=device), product)
    leave.weight.copy_(found.T.reshape(leave.weight.shape))


def rate(recipe: Recipe, step: int, steps: int) -> float:
    """Learning rate: warmed up, constant, falling to zero over the last share."""
    left = (steps - step) / max(1.0, recipe.cool_down * steps)
    return recipe.learning_rate * min(1.0, (step + 1) / recipe.warmup_steps, left)


def train_step(
    state: State, recipe: Recipe, sources: tuple[Sequence[Source], Sequence[Source]], steps: int, half: bool
) -> dict[str, float]:
    """One step; errors in squared unit scale, of the linear estimate and of the network."""
    device = next(state.network.parameters()).device
    state.network.train()
    for group in state.optimiser.param_groups:
        group["lr"] = rate(recipe, state.step, steps)
    before = after = 0.0
    for number in range(recipe.batch):
        patch = drawn(*sources, recipe, state.step, number)
        given = {name: t.to(device) for name, t in tensors(patch).items()}
        refined = forward(state.network, given, patch.fold, half)
        error = (refined - given["target"]).square().mean()
        linear = float((given["linear"] - given["target"]).square().mean())
        weight = (linear / RESIDUAL_UNIT**2 + 0.1) ** -recipe.evenness / (recipe.batch * RESIDUAL_UNIT**2)
        (error * weight).backward()  # type: ignore[no-untyped-call]
        before, after = before + linear, after + float(error.detach())
    norm = float(torch.nn.utils.clip_grad_norm_(state.network.parameters(), recipe.clip_norm))
    if not np.isfinite(norm):
        raise SystemExit(f"gradient of norm {norm} in step {state.step}")
    state.optimiser.step()
    state.optimiser.zero_grad()
    state.step += 1
    blend(state.average, state.network, 1 - min(1 - 1 / recipe.ema_steps, state.step / (state.step + 10)))
    return {"linear": before / recipe.batch, "refined": after / recipe.batch, "norm": norm}


@torch.no_grad()
def blend(average: torch.nn.Module, network: torch.nn.Module, share: float) -> None:
    """Move the average towards the network by ``share``."""
    for kept_one, new in zip(average.parameters(), network.parameters(), strict=True):
        kept_one.lerp_(new, share)


def held_out_patches(sources: Sequence[Source], seed: int = 0) -> Iterator[tuple[str, Patch]]:
    """Large patches of held-out volumes under fixed scans, the blurred box that training never draws among them."""
    box, blurred, soft = SliceProfile("box", 5.0), SliceProfile("box", 5.0, blur_mm=3.0), SliceProfile("gaussian", 4.0)
    scans = (
        Scan(1.5, 1.5, (0.0, 0.0), box, 5.0, 0.0, box),
        Scan(1.5, 1.5, (0.0, 0.0), blurred, 5.0, 1 / 3, blurred),
        Scan(1.0, 1.0, (0.0, 0.0), box, 5.0, 0.5, box),
        Scan(0.8, 1.0, (1.0, 1.0), soft, 3.5, 0.2, soft),
    )
    for source in sources:
        for number, scan in enumerate(scans):
            for place in range(2):
                rng = np.random.default_rng([seed, number, place])
                yield source.name, cut(source, scan, PatchSize(28, 10, 40), rng)


@torch.no_grad()
def held_out_gain(network: PretrainedNetwork, patches: Sequence[tuple[str, Patch]], half: bool) -> dict[str, float]:
    """PSNR over [-1000, 1000] HU above the linear estimate, dB, by volume."""
    device = next(network.parameters()).device
    errors: dict[str, list[tuple[float, float]]] = {}
    for name, patch in patches:
        given = {key: t.to(device) for key, t in tensors(patch).items()}
        target, linear, refined = (
            t.clamp(-1, 1) for t in (given["target"], given["linear"], forward(network, given, patch.fold, half))
        )
        pair = float((linear - target).square().mean()), float((refined - target).square().mean())
        errors.setdefault(name, []).append(pair)
    return {name: round(float(10 * np.log10(np.mean([b / a for b, a in found]))), 3) for name, found in errors.items()}


def begin(recipe: Recipe, work: Path, device: str) -> State:
    """The state in ``work``, or a new one.

    Raises:
        SystemExit: The state there was trained by another recipe.
    """
    torch.manual_seed(recipe.seed)
    network = PretrainedNetwork(recipe.network).channels_last().to(device)
    betas = (0.9, recipe.second_moment)
    optimiser = torch.optim.AdamW(network.parameters(), lr=recipe.learning_rate, betas=betas, weight_decay=0.0)
    state = State(network, deepcopy(network).requires_grad_(False), optimiser)
    file = work / "checkpoint.pt"
    if file.exists():
        held = torch.load(file, map_location=device, weights_only=True)
        if asdict(Recipe()) | held["recipe"] != asdict(recipe):
            raise SystemExit(f"{work} holds another recipe: {held['recipe']}; give another --work")
        state.network.load_state_dict(held["network"])
        state.average.load_state_dict(held["average"])
        state.optimiser.load_state_dict(held["optimiser"])
        state.step, state.cpu_seconds = held["step"], held["cpu_seconds"]
    return state


def keep(state: State, recipe: Recipe, work: Path) -> None:
    """Write the checkpoint, aside and renamed."""
    aside = work / "checkpoint.partial"
    torch.save(
        {
            "recipe": asdict(recipe),
            "network": state.network.state_dict(),
            "average": state.average.state_dict(),
            "optimiser": state.optimiser.state_dict(),
            "step": state.step,
            "cpu_seconds": state.cpu_seconds,
        },
        aside,
    )
    aside.replace(work / "checkpoint.pt")


def export(state: State, recipe: Recipe, out: Path, name: str, facts: dict[str, Any]) -> None:
    """Averaged weights as float16 safetensors, and the card beside them."""
    out.parent.mkdir(parents=True, exist_ok=True)
    save_file({k: t.detach().cpu().half().contiguous() for k, t in state.average.state_dict().items()}, out)
    out.chmod(0o644)  # safetensors writes for its owner alone, and a wheel keeps modes
    card = {
        "name": name,
        "weights_sha256": hashlib.sha256(out.read_bytes()).hexdigest(),
        "weights_bytes": out.stat().st_size,
        "parameters": sum(p.numel() for p in state.network.parameters()),
        "network": asdict(recipe.network),
        "trained_for": {
            "thickness_mm": THICKNESS_MM,
            "spacing_mm": [0.6 * THICKNESS_MM[0], THICKNESS_MM[1]],
            "pixel_mm": PIXEL_MM,
            "thin_spacing_mm": THIN_MM,
        },
        "recipe": asdict(recipe) | {"steps": state.step, "cpu_seconds": round(state.cpu_seconds)},
        **facts,
    }
    out.with_suffix(".json").write_text(json.dumps(card, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder of NIfTI volumes named in pretrained_sources.json")
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoint, log and prepared volumes")
    parser.add_argument("--out", type=Path, required=True, help="the .safetensors file to write")
    parser.add_argument("--name", default="default")
    parser.add_argument("--steps", type=int, default=8000)
    parser.add_argument("--stop-after", type=float, default=float("inf"), help="wall seconds, to be taken up later")
    parser.add_argument("--export-only", action="store_true", help="write what the checkpoint holds; train nothing")
    parser.add_argument("--hold-out", default="vhf_head", help="volumes that are not trained on, by comma")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    for key, value in asdict(Recipe()).items():
        parser.add_argument(f"--{key.replace('_', '-')}", type=type(value), default=value)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    torch.set_flush_denormal(True)  # before torch's pool of threads is made, which keeps what it was made with
    torch.set_num_threads(options.threads)
    train(options, Recipe(**{key: getattr(options, key) for key in asdict(Recipe())}))


def train(options: argparse.Namespace, recipe: Recipe) -> None:
    """Train until ``steps``, with checkpoints and lines in the log."""
    options.work.mkdir(parents=True, exist_ok=True)
    genuine, phantoms = sources_of(options.data, options.work, recipe)
    aside = [name for name in options.hold_out.split(",") if name]
    held = [s for s in genuine if s.name in aside] + [kept(options.work, f"phantom-{HELD_OUT_PHANTOM}", None)]
    genuine = [s for s in genuine if s.name not in aside]
    patches = list(held_out_patches(held))
    half = native_bfloat16(options.device)
    state = begin(recipe, options.work, options.device)
    if state.step == 0 and recipe.start:
        grow(state.network, load_pretrained(recipe.start).network(), recipe.seed)
        state.average.load_state_dict(state.network.state_dict())
    elif state.step == 0 and not options.export_only:
        start_last_layer(state.network, recipe, (genuine, phantoms), half)
        state.average.load_state_dict(state.network.state_dict())
        log.info("with its last layer fitted: %s", held_out_gain(state.network, patches, half))
    log.info(
        "%d parameters, step %d, %s",
        sum(p.numel() for p in state.network.parameters()),
        state.step,
        [s.name for s in genuine],
    )
    began, errors = time.monotonic(), []
    clock = time.process_time() - state.cpu_seconds
    gains: dict[str, float] = {}
    if options.export_only:
        gains = held_out_gain(state.average, patches, half)
    while state.step < options.steps and not options.export_only:
        errors.append(train_step(state, recipe, (genuine, phantoms), options.steps, half))
        state.cpu_seconds = time.process_time() - clock
        over = time.monotonic() - began > options.stop_after
        last = state.step == options.steps or over
        if state.step % KEEP_EVERY == 0 or last:
            keep(state, recipe, options.work)
            gains = held_out_gain(state.average, patches, half) if state.step % LOOK_EVERY == 0 or last else gains
            linear, refined, norm = (float(np.mean([e[k] for e in errors])) for k in ("linear", "refined", "norm"))
            line: dict[str, Any] = {"step": state.step, "cpu_seconds": round(state.cpu_seconds), "norm": round(norm, 3)}
            line |= {"gain_db": round(10 * float(np.log10(linear / refined)), 3), "held_out_db": gains}
            with (options.work / "log.jsonl").open("a") as out:
                out.write(json.dumps(line) + "\n")
            log.info("%s", line)
            errors.clear()
        if over:
            break
    known = json.loads(SOURCES.read_text())
    facts = {
        "data": [{"name": s.name, "sha256": s.sha256, **known[s.name]} for s in genuine],
        "held_out": {"volumes": [s.name for s in held], "gain_over_linear_estimate_db": gains},
    }
    export(state, recipe, options.out, options.name, facts)


if __name__ == "__main__":
    main()
