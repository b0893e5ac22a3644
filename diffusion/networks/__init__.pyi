from .config import MODEL_PRESETS as MODEL_PRESETS, UNetConfig as UNetConfig, model_preset as model_preset
from .memory_format import (
    channels_last as channels_last,
    contiguous_weights as contiguous_weights,
    for_generation as for_generation,
)
from .unet import Stage as Stage, UNet as UNet, build_unet as build_unet, parameter_count as parameter_count
