from .architecture import (
    Blocks as Blocks,
    Downsample as Downsample,
    KlAutoencoder as KlAutoencoder,
    ResBlock as ResBlock,
    Upsample as Upsample,
    VaeArchitecture as VaeArchitecture,
)
from .finetune import PRESETS as PRESETS, Perceptual as Perceptual, random_crops as random_crops, train_vae as train_vae
from .sliding_window import (
    SlidingVae as SlidingVae,
    Tiling as Tiling,
    as_encoded as as_encoded,
    parse_tiling as parse_tiling,
)
from .vae import (
    Decoder as Decoder,
    Encoder as Encoder,
    Vae as Vae,
    decoder_on_shapes as decoder_on_shapes,
    load_decoder as load_decoder,
    load_vae as load_vae,
)
from .weights import VaeWeights as VaeWeights
