from .acquisition import ThickSlices as ThickSlices, informed as informed, told_tensor as told_tensor
from .blocks import DepthAttention as DepthAttention, ResidualBlock as ResidualBlock
from .config import MODEL_PRESETS as MODEL_PRESETS, UNetConfig as UNetConfig, model_preset as model_preset
from .fused_norm import assume_fused as assume_fused
from .memory_format import (
    channels_last as channels_last,
    contiguous_weights as contiguous_weights,
    for_generation as for_generation,
)
from .unet import Stage as Stage, UNet as UNet, build_unet as build_unet, parameter_count as parameter_count
