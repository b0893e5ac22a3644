"""What the shipped model cannot do, in pictures: things planted in a synthetic chest, cut along z.

    python infra/bench/failure_cases.py [--model default] [--out infra/docs/images/failure-cases.png]

Planted, one a row: a vessel of 1.5 mm that runs from one thick slice to the next, a fracture of 1 mm across a bone, a
nodule of 3 mm between two slices, a metal rod beyond the scale, and plain lung for the look of its noise. Columns: the
truth (1 mm), cubic interpolation, the model made consistent, and the model told a slice profile 2 mm too wide. Thick
slices are 5 mm. Prints for every row the RMS error in HU around what was planted, and the share of its contrast that is
left, then one JSON object, kept in infra/bench/results/failure_cases.json.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from pipeline.forward_model import SliceProfile, ThickMeasurement, enforce_data_consistency, slice_operator
from pipeline.phantom import PhantomSettings, make_patient
from pipeline.refiner import PretrainedModel, load_pretrained, thin_slices
from pipeline.volume import Volume, interpolated

ROOT = Path(__file__).resolve().parents[2]
SIZE, SLICES, PIXEL_MM, THICK_MM, NOISE_HU = 128, 75, 1.5, 5.0, 10.0
BOX = SliceProfile("box", THICK_MM)
HALF_WIDTH, HALF_HEIGHT, ZOOM = 20, 20, 4
"""Of the pictures: pixels either side, thin slices either side, magnification."""
COLUMNS = ("truth", "cubic", "model", "model, profile 2 mm too wide")


@dataclass(frozen=True)
class Planted:
    """What a row shows: ``plant`` changes HU (z, y, x) in place and returns where; window is (low, high) HU."""

    name: str
    window: tuple[float, float]
    plant: Callable[[NDArray[np.float32], tuple[int, int, int]], NDArray[np.bool_]]
    tissue: tuple[float, float]
    prepare: Callable[[NDArray[np.float32], tuple[int, int, int]], None] | None = None


def at(hu: NDArray[np.float32], centre: tuple[int, int, int]) -> tuple[NDArray[Any], ...]:
    """Millimetres from a voxel along z, y, x."""
    z, y, x = np.ogrid[: hu.shape[0], : hu.shape[1], : hu.shape[2]]
    return z - centre[0], PIXEL_MM * (y - centre[1]), PIXEL_MM * (x - centre[2])


def vessel(hu: NDArray[np.float32], centre: tuple[int, int, int]) -> NDArray[np.bool_]:
    """Runs at 45 degrees to the slices."""
    z, y, x = at(hu, centre)
    where = (np.abs(z - x) / np.sqrt(2) < 1.1) & (np.abs(y) < 1.2) & (np.abs(z) < 12)
    hu[where] = 50
    return np.asarray(where)


def fracture(hu: NDArray[np.float32], centre: tuple[int, int, int]) -> NDArray[np.bool_]:
    """A gap of 1 mm, parallel to the slices, in a column of bone."""
    z, y, x = at(hu, centre)
    where = (np.hypot(y, x) < 10) & (np.abs(z) < 0.6)
    hu[where] = 50
    return np.asarray(where)


def bone(hu: NDArray[np.float32], centre: tuple[int, int, int]) -> None:
    """A column to break."""
    z, y, x = at(hu, centre)
    hu[(np.hypot(y, x) < 10) & (np.abs(z) < 18)] = 700


def nodule(hu: NDArray[np.float32], centre: tuple[int, int, int]) -> NDArray[np.bool_]:
    """A ball of 3 mm."""
    z, y, x = at(hu, centre)
    where = np.sqrt(z**2 + y**2 + x**2) <= 1.6
    hu[where] = 40
    return np.asarray(where)


def metal(hu: NDArray[np.float32], centre: tuple[int, int, int]) -> NDArray[np.bool_]:
    """A rod of 6 mm, 8000 HU, which CT stores as 3071."""
    z, y, x = at(hu, centre)
    where = (np.hypot(z, y) < 3) & (np.abs(x) < 20)
    hu[where] = 3071
    return np.asarray(where)


def nothing(hu: NDArray[np.float32], centre: tuple[int, int, int]) -> NDArray[np.bool_]:
    """Lung as it is."""
    z, y, x = at(hu, centre)
    return np.asarray((np.abs(z) < 10) & (np.abs(y) < 10) & (np.abs(x) < 10))


ROWS = (
    Planted("vessel of 1.5 mm", (-1000, 200), vessel, (-950, -700)),
    Planted("fracture of 1 mm", (-300, 1000), fracture, (-50, 100), bone),
    Planted("nodule of 3 mm", (-1000, 200), nodule, (-950, -700)),
    Planted("metal rod", (-1000, 3071), metal, (-50, 100)),
    Planted("noise of lung", (-950, -750), nothing, (-950, -700)),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="default")
    parser.add_argument("--out", type=Path, default=ROOT / "infra" / "docs" / "images" / "failure-cases.png")
    parser.add_argument("--quick", action="store_true", help="one row, nothing kept: shows that it runs")
    options = parser.parse_args()
    model = load_pretrained(options.model)
    settings = PhantomSettings(field_of_view_mm=PIXEL_MM * SIZE, thin_spacing_mm=1.0, thin_sigma_hu=NOISE_HU)
    chest = make_patient(70_007, SIZE, SLICES, "non-APE", settings).thin
    found, pictures = {}, []
    for row in ROWS[: 1 if options.quick else None]:
        found[row.name], picture = shown(row, chest, model)
        pictures.append(picture)
        print(f"{row.name:<18}" + "  ".join(f"{way} {figures}" for way, figures in found[row.name].items()))
    result = {"bench": "failure_cases", "model_sha256": model.sha256, "rows": found}
    if not options.quick:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        sheet(pictures).save(options.out, optimize=True)
        out = Path(__file__).parent / "results" / "failure_cases.json"
        out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


def shown(row: Planted, chest: Volume, model: PretrainedModel) -> tuple[dict[str, dict[str, float]], NDArray[np.uint8]]:
    """Figures by way, and the row's pictures side by side."""
    hu = np.asarray(chest.hu, np.float32).copy()
    centre = place(hu, row.tissue)
    if row.prepare:
        row.prepare(hu, centre)
    before = hu.copy()
    where = row.plant(hu, centre)
    truth = Volume(np.clip(np.rint(hu), -1024, 3071).astype(np.int16), chest.geometry)
    z = np.asarray(truth.geometry.z_mm)
    thick_z = np.arange(z[0] + THICK_MM / 2, z[-1] - THICK_MM / 2 + 0.1, THICK_MM)
    operator = slice_operator(BOX, thick_z, z)
    thick_hu = np.rint(operator.apply(truth.hu)).astype(np.int16)
    thick = Volume(thick_hu, truth.geometry.with_z(list(thick_z), THICK_MM))
    wrong = SliceProfile("box", THICK_MM + 2)

    def by_model(profile: SliceProfile) -> NDArray[np.float32]:
        return consistent(thin_slices(model, thick, truth.geometry, profile), thick, truth, profile)

    cubic = np.asarray(interpolated(thick, truth.geometry, "cubic"), np.float32)
    answers = dict(zip(COLUMNS[1:], (cubic, by_model(BOX), by_model(wrong)), strict=True))
    contrast = hu - before
    near = tuple(slice(max(0, c - 10), c + 11) for c in centre)
    figures = {}
    for name, answer in answers.items():
        error = (answer - hu)[near]
        figures[name] = {"rms_hu": round(float(np.sqrt(np.mean(error**2))), 1)}
        if np.abs(contrast[where]).mean() > 1:
            left = np.sum((answer - before)[where] * contrast[where]) / np.sum(contrast[where] ** 2)
            figures[name]["contrast_left"] = round(float(left), 2)
    return figures, np.concatenate([cut(image, centre, row.window) for image in (hu, *answers.values())], axis=1)


def consistent(hu: NDArray[np.float32], thick: Volume, truth: Volume, profile: SliceProfile) -> NDArray[np.float32]:
    """Made to average to the thick slices under the profile that is believed."""
    enforce_data_consistency(
        hu, ThickMeasurement.of(thick, truth.geometry.z_mm, profile, NOISE_HU / 2), floor_hu=-1024.0
    )
    return hu


def place(hu: NDArray[np.float32], tissue: tuple[float, float]) -> tuple[int, int, int]:
    """The voxel of the middle slices around which most is of that tissue; between two thick slices."""
    from scipy.ndimage import uniform_filter

    z = SLICES // 2 + 2
    share = uniform_filter(((hu >= tissue[0]) & (hu <= tissue[1])).astype(np.float32), 15)[z]
    y, x = np.unravel_index(int(share[24:-24, 24:-24].argmax()), share[24:-24, 24:-24].shape)
    return z, int(y) + 24, int(x) + 24


def cut(hu: NDArray[np.float32], centre: tuple[int, int, int], window: tuple[float, float]) -> NDArray[np.uint8]:
    """A coronal cut around a voxel, head up, pixels and slices to scale."""
    z, y, x = centre
    part = hu[z - HALF_HEIGHT : z + HALF_HEIGHT, y, x - HALF_WIDTH : x + HALF_WIDTH][::-1]
    grey = np.clip((part - window[0]) / (window[1] - window[0]), 0, 1) * 255
    size = round(2 * HALF_WIDTH * PIXEL_MM * ZOOM), 2 * HALF_HEIGHT * ZOOM
    return np.asarray(Image.fromarray(grey.astype(np.uint8)).resize(size, Image.Resampling.NEAREST))


def sheet(rows: list[NDArray[np.uint8]]) -> Image.Image:
    """All rows under one another, named."""
    height, width = rows[0].shape
    margin, left = 18, 130
    out = Image.new("L", (left + width, margin + len(rows) * height), 255)
    draw = ImageDraw.Draw(out)
    for number, name in enumerate(COLUMNS):
        draw.text((left + number * width // len(COLUMNS) + 4, 3), name, fill=0)
    for number, row in enumerate(rows):
        out.paste(Image.fromarray(row), (left, margin + number * height))
        draw.text((4, margin + number * height + height // 2), ROWS[number].name, fill=0)
    return out


if __name__ == "__main__":
    main()
