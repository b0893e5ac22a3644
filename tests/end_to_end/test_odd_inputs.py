"""Every odd archive ends as it should: the right volumes, or a reason; never a crash, never a wrong volume."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from latentcache import InputError
from pipeline.archive import open_archive
from pipeline.reading import pointer_of, read_series, scan
from tests.support.odd_cases import CASES, OddCase


@pytest.mark.parametrize("odd", CASES, ids=lambda odd: odd.name)
def test_odd_input(odd: OddCase, tmp_path: Path) -> None:
    path = odd.make(tmp_path / "odd.zip")
    told: list[str] = []
    volumes = []
    try:
        result = scan(open_archive(path))
    except InputError as error:
        told.append(str(error))
    else:
        told += [reason for _, reason in result.problems]
        for one in result.series:
            told += [one.reason, *one.flags]
            if one.status == "ok" and one.geometry is not None and len(one.pointer_members) >= 3:
                try:
                    volume = read_series(pointer_of(one))
                except InputError as error:
                    told.append(str(error))
                else:
                    volumes.append(volume.hu)
                    assert volume.geometry.spacing_mm_zyx[0] == pytest.approx(odd.spacing_mm, rel=1e-3)
                    told += volume.flags
    assert odd.why in " | ".join(told)
    assert len(volumes) == len(odd.volumes), told
    for expected in odd.volumes:
        assert any(v.shape == expected.shape and np.array_equal(v, expected) for v in volumes), told


def test_there_are_enough_cases() -> None:
    assert len({odd.name for odd in CASES}) == len(CASES) >= 30
