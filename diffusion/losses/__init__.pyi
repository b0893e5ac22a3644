from .image_losses import Decoder as Decoder, ImageLosses as ImageLosses
from .vgg import load_vgg19 as load_vgg19, perceptual_distance as perceptual_distance
