from .interpolate import (
    InterpolateSettings as InterpolateSettings,
    LoadedModel as LoadedModel,
    condition_latent as condition_latent,
    encoding_of as encoding_of,
    estimate_seconds as estimate_seconds,
    generate_series as generate_series,
    interpolate_study as interpolate_study,
    interpolate_with as interpolate_with,
    learnt_spacing as learnt_spacing,
    load_model as load_model,
    run_interpolation as run_interpolation,
    told_of as told_of,
)
from .job import Interpolated as Interpolated, InterpolateJob as InterpolateJob, Sampling as Sampling
from .shipped import interpolate_shipped as interpolate_shipped
from .thick_study import ThickStudy as ThickStudy, choose_thick as choose_thick, read_thick as read_thick
