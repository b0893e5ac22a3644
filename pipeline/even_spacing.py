"""Series whose slices are unevenly spaced, sampled at even positions: on request only, since it makes slices up.

Such a series (a scout-guided protocol with a coarser end, a gantry-tilted head in two steps) is catalogued and set
aside. On request it is read as if it had been scanned evenly: as many slices as its commonest spacing fits into its
extent, first and last where they were, linear interpolation in between, along a sheared lattice too.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from pipeline.geometry import Geometry
from pipeline.resample import resample_z
from pipeline.series import ScannedSeries
from pipeline.stack import THIN_BELOW_MM
from pipeline.volume import Volume

UNEVEN_FLAG = "variable-spacing"
RESAMPLED_FLAG = "resampled-along-z"


def even_geometry(geometry: Geometry) -> Geometry:
    """The lattice between the same first and last position whose spacing is nearest to the median one."""
    z = np.asarray(geometry.z_mm)
    count = max(1, round(float((z[-1] - z[0]) / np.median(np.diff(z)))))
    return geometry.with_z(list(np.linspace(z[0], z[-1], count + 1)))


def on_even_positions(volume: Volume) -> Volume:
    """A volume on `even_geometry`: float32 HU, flagged, each slice under the UID of the nearest measured one."""
    own, even = volume.geometry, even_geometry(volume.geometry)
    z, wanted = np.asarray(own.z_mm), np.asarray(even.z_mm)
    uids = volume.header.sop_instance_uids
    nearest = np.abs(wanted[:, None] - z[None, :]).argmin(axis=1)
    header = replace(volume.header, sop_instance_uids=tuple(uids[i] for i in nearest) if uids else ())
    hu = resample_z(volume.hu, z, wanted)
    return replace(volume, hu=hu, geometry=even, header=header, flags=(*volume.flags, RESAMPLED_FLAG))


def as_requested(one: ScannedSeries) -> ScannedSeries:
    """A scanned series that was set aside for its spacing, as what it is once sampled evenly; others as they are."""
    geometry = one.geometry
    if one.status != "ok" or geometry is None or UNEVEN_FLAG not in one.flags:
        return one
    even = even_geometry(geometry)
    thick = max(even.spacing_mm_zyx[0], even.thickness_mm) >= THIN_BELOW_MM
    return replace(
        one, geometry=even, role_hint="thick" if thick else "thin", reason="", flags=(*one.flags, RESAMPLED_FLAG)
    )
