"""The GPU benchmark runs where there is torch and numpy and nothing else of ours."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[2]
BARE = """
import os, runpy, sys
own = {"zarr", "pyarrow", "obstore", "yaml", "psutil", "safetensors", "google_crc32c", "monai", "pydicom", "scipy",
       "tensorboard", "dask", "ray", "rich", "typer"}
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in own:
            raise ModuleNotFoundError(f"{name} is not on a bare GPU machine")
sys.meta_path.insert(0, Refuse())
import torch
torch.set_num_threads(1)
sys.argv[:] = sys.argv[1:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_it_runs_to_its_end_on_torch_and_numpy_alone(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for number in range(4):
        thin = rng.standard_normal((4, 9, 16, 16)).astype(np.float16)
        np.save(tmp_path / f"thin-{number:04d}.npy", thin)
        np.save(tmp_path / f"condition-{number:04d}.npy", thin * np.float16(0.5))
    script = ROOT / "infra" / "bench" / "unet_gpu.py"
    options = ["--quick", "--latents", str(tmp_path), "--held-out", "1", "--seconds", "1"]
    done = subprocess.run(
        [sys.executable, "-c", BARE, str(script), *options],
        capture_output=True,
        text=True,
        timeout=300,
        env={"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert {(row["batch"], row["variant"]) for row in result["rows"]} == {(1, "eager"), (2, "eager")}
    assert all(row["step_s"] > 0 and 0 < row["mfu"] < 2 and 0 <= row["data_wait"] < 1 for row in result["rows"])
    assert (result["learned"]["training_pairs"], result["learned"]["held_out_pairs"]) == (3, 1)
    assert np.isfinite(result["learned"]["held_out_gain_db"])
