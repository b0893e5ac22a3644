"""The service's models: loaded at its start, and the one that ships where no rule names another."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pydicom
import pytest

from latentcache import InputError
from pipeline.identity import PrivateStore
from pipeline.serve import InterpolateRequest, interpolation
from pipeline.writing import read_provenance
from tests.support.serve_site import a_study, config


def test_without_a_model_the_shipped_one_is_used(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    image = np.full((6, 16, 16), -1000, np.int16)  # air around a body
    image[:, 4:12, 4:12] = 40
    for number, data in enumerate(a_study(1, n=6, image=image).files()):
        (source / f"{number}.dcm").write_bytes(data)
    PrivateStore.open(str(tmp_path), create=True)
    settings = config(tmp_path / "state")
    assert settings.model == settings.rules[0].model == ""
    done = interpolation(settings)(InterpolateRequest(source, out, tmp_path))
    assert done.n_slices > 20
    first = min((out / done.folders[0]).glob("*.dcm"))
    assert read_provenance(pydicom.dcmread(first))["sampling"]["model"] == "default"


def test_a_wrong_model_fails_the_start(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nowhere"):
        interpolation(replace(config(tmp_path), model="nowhere"))
