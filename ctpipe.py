"""ctpipe: thick-slice CT archives to trustworthy thin slices.

The public names of the project; each is imported when it is first used and documented where it is defined::

    from ctpipe import Interpolator, interpolate_study, open_archive, read_series, scan

    done = interpolate_study("thick.zip", "OUT", model="RUN", spacing_mm=1.0)
    print(done.folder, done.figures["rms_after_hu"])
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffusion import (
        Interpolator as Interpolator,
        TrainConfig as TrainConfig,
        build_objective as build_objective,
        load_config as load_config,
        train as train,
    )
    from latentcache import (
        Encoding as Encoding,
        InputError as InputError,
        LatentGrid as LatentGrid,
        LatentStore as LatentStore,
    )
    from pipeline import (
        DecodeJob as DecodeJob,
        EvaluationJob as EvaluationJob,
        Geometry as Geometry,
        InterpolateJob as InterpolateJob,
        RefinerJob as RefinerJob,
        RegressionJob as RegressionJob,
        Volume as Volume,
        Window as Window,
        decode_store as decode_store,
        encode_store as encode_store,
        evaluate_run as evaluate_run,
        ingest as ingest,
        interpolate_study as interpolate_study,
        open_archive as open_archive,
        read_series as read_series,
        sample_store as sample_store,
        scan as scan,
        train_refiner as train_refiner,
        train_regression as train_regression,
        write_report as write_report,
    )
    from pipeline.forward_model import (
        SliceProfile as SliceProfile,
        enforce_data_consistency as enforce_data_consistency,
        residual_rms as residual_rms,
        slice_operator as slice_operator,
    )
    from pipeline.metrics import (
        modulation_transfer as modulation_transfer,
        ms_ssim as ms_ssim,
        noise_power_spectrum as noise_power_spectrum,
        psnr as psnr,
        ssim as ssim,
        ssim_3d as ssim_3d,
    )
    from pipeline.vae import Autoencoder as Autoencoder, load_vae as load_vae
    from pipeline.writing import (
        Provenance as Provenance,
        write_ct_series as write_ct_series,
        write_enhanced_ct as write_enhanced_ct,
    )

HOMES = {
    "diffusion": ("Interpolator", "TrainConfig", "build_objective", "load_config", "train"),
    "latentcache": ("Encoding", "InputError", "LatentGrid", "LatentStore"),
    "pipeline": (
        "DecodeJob",
        "EvaluationJob",
        "Geometry",
        "InterpolateJob",
        "RefinerJob",
        "RegressionJob",
        "Volume",
        "Window",
        "decode_store",
        "encode_store",
        "evaluate_run",
        "ingest",
        "interpolate_study",
        "open_archive",
        "read_series",
        "sample_store",
        "scan",
        "train_refiner",
        "train_regression",
        "write_report",
    ),
    "pipeline.forward_model": ("SliceProfile", "enforce_data_consistency", "residual_rms", "slice_operator"),
    "pipeline.metrics": ("modulation_transfer", "ms_ssim", "noise_power_spectrum", "psnr", "ssim", "ssim_3d"),
    "pipeline.vae": ("Autoencoder", "load_vae"),
    "pipeline.writing": ("Provenance", "write_ct_series", "write_enhanced_ct"),
}
"""Where each public name comes from."""

_HOME = {name: home for home, names in HOMES.items() for name in names}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"ctpipe has no {name!r}; it has {', '.join(__all__)}")
    found = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return list(__all__)
