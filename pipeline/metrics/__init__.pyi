from .fabrication_alarm import (
    LEAST_SPREAD_HU as LEAST_SPREAD_HU,
    OtherSamples as OtherSamples,
    alarm_map as alarm_map,
    residual_map as residual_map,
    score_at as score_at,
)
from .intensity import (
    TISSUE_CLASSES_HU as TISSUE_CLASSES_HU,
    bias_by_tissue as bias_by_tissue,
    mean_absolute_error as mean_absolute_error,
    psnr as psnr,
    require_finite as require_finite,
)
from .lung_density import LAA_THRESHOLD_HU as LAA_THRESHOLD_HU, lung_density as lung_density, lung_mask as lung_mask
from .noise import (
    noise_power_spectrum as noise_power_spectrum,
    noise_texture as noise_texture,
    slice_inconsistency as slice_inconsistency,
)
from .null_space import (
    null_part as null_part,
    null_space_figures as null_space_figures,
)
from .patient_statistics import by_patient as by_patient, interval as interval, paired_difference as paired_difference
from .perceptual import FeaturesOf as FeaturesOf, perceptual_distance as perceptual_distance
from .sharpness import (
    Edges as Edges,
    find_edges as find_edges,
    modulation_transfer as modulation_transfer,
    sharpness as sharpness,
)
from .similarity import (
    Similarity as Similarity,
    ms_ssim as ms_ssim,
    similarities as similarities,
    ssim as ssim,
    ssim_3d as ssim_3d,
)
from .texture import (
    DetailPower as DetailPower,
    Texture as Texture,
    TexturePower as TexturePower,
    drawn_texture as drawn_texture,
    enlarged_detail as enlarged_detail,
    lacking as lacking,
)
from .volumetry import (
    MARGIN_MM as MARGIN_MM,
    Structure as Structure,
    holds as holds,
    measurable as measurable,
    volume_errors as volume_errors,
)
