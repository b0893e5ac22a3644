from .decoder_metric import channel_power as channel_power
from .image_losses import DecodedPart as DecodedPart, Decoder as Decoder, ImageLosses as ImageLosses
from .ms_ssim import ms_ssim as ms_ssim
from .vgg import VGG19Features as VGG19Features, load_vgg19 as load_vgg19, perceptual_distance as perceptual_distance
