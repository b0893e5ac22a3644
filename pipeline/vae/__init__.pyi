from .architecture import (
    Blocks as Blocks,
    Downsample as Downsample,
    KlAutoencoder as KlAutoencoder,
    ResBlock as ResBlock,
    Upsample as Upsample,
    VaeArchitecture as VaeArchitecture,
)
from .finetune import (
    PRESETS as PRESETS,
    CropSource as CropSource,
    Perceptual as Perceptual,
    VaeInTraining as VaeInTraining,
    VaeTrainConfig as VaeTrainConfig,
    reconstruction_losses as reconstruction_losses,
    save_weights as save_weights,
)
from .sliding_window import (
    Tiling as Tiling,
    parse_tiling as parse_tiling,
)
from .vae import (
    Autoencoder as Autoencoder,
    SlidingVae as SlidingVae,
    Vae as Vae,
    as_encoded as as_encoded,
    check_same_vae as check_same_vae,
    decoder_on_shapes as decoder_on_shapes,
    load_decoder as load_decoder,
    load_vae as load_vae,
    own_decoder as own_decoder,
)
from .weights import (
    VaeWeights as VaeWeights,
    encoder_metadata as encoder_metadata,
    load_weights as load_weights,
    tuned_decoder as tuned_decoder,
)
