"""Thick series for studies that have thin ones alone: drawn, marked, and computed only when they are read."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from pipeline.forward_model import draw_thick
from pipeline.identity import Keys
from pipeline.reading import ScannedSeries
from pipeline.volume import SIMULATED_FLAG


def simulated_beside(
    found: Iterable[tuple[ScannedSeries, str]], keys: Keys, thickness_mm: float
) -> list[tuple[ScannedSeries, str]]:
    """A simulated thick series, with its archive, for every sound thin one of a study that has no thick one.

    Args:
        found: Series with the archive that each came from.
        keys: Seeds the draws, so that the same archive gives the same series under the same secret.
    """
    found = list(found)
    served = {one.study_uid for one, _ in found if one.role_hint == "thick" and one.status == "ok"}
    made = []
    for one, url in found:
        if one.role_hint != "thin" or one.status != "ok" or one.geometry is None or one.study_uid in served:
            continue
        drawn = draw_thick(one.geometry, thickness_mm, keys.series(one.series_uid, one.discriminator))
        if drawn is None:
            continue
        thick = replace(
            one,
            geometry=drawn.geometry(one.geometry),
            role_hint="thick",
            discriminator=f"{one.discriminator}|{SIMULATED_FLAG} {thickness_mm:g}",
            flags=(*one.flags, SIMULATED_FLAG),
            simulated=drawn.to_json(),
        )
        made.append((thick, url))
    return made
