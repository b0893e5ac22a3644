from .geometry import Geometry as Geometry, geometry_of as geometry_of
from .in_plane_grid import (
    beyond_mm as beyond_mm,
    common_slices as common_slices,
    grid_difference as grid_difference,
    grid_offset_pixels as grid_offset_pixels,
    onto_field as onto_field,
)
from .nifti_layout import NiftiLayout as NiftiLayout
from .resample import (
    RESAMPLED_FLAG as RESAMPLED_FLAG,
    UNEVEN_FLAG as UNEVEN_FLAG,
    ZMethod as ZMethod,
    even_geometry as even_geometry,
    interpolated as interpolated,
    interpolated_onto as interpolated_onto,
    on_even_positions as on_even_positions,
    resample_z as resample_z,
    row_blocks as row_blocks,
    z_weights as z_weights,
)
from .simulated_thick import SIMULATED_FLAG as SIMULATED_FLAG, SimulatedThick as SimulatedThick
from .volume import SeriesPointer as SeriesPointer, SourceHeader as SourceHeader, Volume as Volume
from .window import (
    BLEND_SLOPE as BLEND_SLOPE,
    NAMED_WINDOWS as NAMED_WINDOWS,
    Window as Window,
    blend_at_edges as blend_at_edges,
)
