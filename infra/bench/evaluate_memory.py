"""Peak memory of scoring full-size cases: the real scoring path, one case after the other.

    python infra/bench/evaluate_memory.py --shape 300 512 512 --cases 2

Every case makes a thick and a thin series in memory (as reading does), then every classical method and two stand-ins of
the size of decoded volumes (VAE round trip and the composed model), each scored with every figure and dropped, as
``pipeline.evaluate_store`` does. The decoder's own memory is bounded by ``--memory-gib`` and measured by
``infra/bench/vae.py``; it is not part of this figure. The peak is of the whole process, so a case that left something
behind would show in the next.
"""

from __future__ import annotations

import argparse
import json
import resource
import time

import numpy as np

from pipeline.baselines import BASELINES, apply, weights
from pipeline.compose import compose
from pipeline.evaluate import Case, score_method
from pipeline.geometry import Geometry
from pipeline.hu import Window
from pipeline.slice_profile import SliceProfile, slice_operator
from pipeline.volume import Volume


def peak_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def made(shape: tuple[int, int, int], seed: int) -> tuple[Volume, Volume]:
    """A body with noise, (thick, thin), int16."""
    depth, rows, columns = shape
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:rows, :columns]
    body = ((y - rows / 2) / (0.4 * rows)) ** 2 + ((x - columns / 2) / (0.45 * columns)) ** 2 < 1
    lung = ((y - rows / 2) / (0.2 * rows)) ** 2 + ((x - columns / 2) / (0.3 * columns)) ** 2 < 1
    thin = np.empty(shape, np.int16)
    for k in range(depth):
        dome = lung & (np.hypot(y - rows / 2, x - columns / 2) / rows < 0.25 * k / depth)
        thin[k] = np.where(dome, -850, np.where(body, 40, -1000)) + rng.normal(0, 15, (rows, columns))
    affine = ((0.0, 0.0, 0.7, 0.0), (0.0, 0.7, 0.0, 0.0), (1.0, 0.0, 0.0, 0.0), (0.0, 0.0, 0.0, 1.0))
    fine = Geometry(shape, affine, tuple(float(k) for k in range(depth)), 1.0)
    coarse = fine.with_z(2.0 + 5.0 * np.arange(depth // 5), 5.0)
    operator = slice_operator(SliceProfile("box", 5.0), np.array(coarse.z_mm), np.array(fine.z_mm))
    flat = np.empty(coarse.shape_zyx, np.int16)
    for row in range(0, rows, 32):
        flat[:, row : row + 32] = np.rint(operator.apply(thin[:, row : row + 32]))
    return Volume(flat, coarse), Volume(thin, fine)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=3, default=(300, 512, 512))
    parser.add_argument("--cases", type=int, default=2)
    args = parser.parse_args()
    window = Window(0.0, 2000.0)
    profile = SliceProfile("box", 5.0)
    for number in range(args.cases):
        start = time.perf_counter()
        thick, thin = made(tuple(args.shape), number)
        thick_z, thin_z = np.array(thick.geometry.z_mm), np.array(thin.geometry.z_mm)
        case = Case(thin.hu, thin.geometry, thick.geometry.z_mm, slice_operator(profile, thick_z, thin_z))
        figures = {}
        for method in BASELINES:
            volume = apply(weights(method, thick_z, thin_z, profile), thick.hu)
            figures[method] = score_method(volume, case, window)["psnr_db"]
            del volume
        condition = apply(weights("linear", thick_z, thin_z, profile), thick.hu)
        figures["condition_round_trip"] = score_method(condition, case, window, whole_range=False)["psnr_db"]
        model, _ = compose(condition + np.float32(1), window, thick, thin.geometry, condition_hu=condition)
        del condition
        figures["model"] = score_method(model, case, window)["psnr_db"]
        del model
        line = {"case": number, "seconds": round(time.perf_counter() - start, 1), "peak_gib": round(peak_gib(), 2)}
        print(json.dumps({**line, "psnr_db": {k: v and round(v, 2) for k, v in figures.items()}}), flush=True)


if __name__ == "__main__":
    main()
