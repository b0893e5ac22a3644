from .config import MODEL_PRESETS as MODEL_PRESETS, UNetConfig as UNetConfig, model_preset as model_preset
from .unet import Stage as Stage, UNet as UNet, build_unet as build_unet, parameter_count as parameter_count
