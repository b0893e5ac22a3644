from .config import TrainConfig as TrainConfig, load_config as load_config
from .networks import build_unet as build_unet
from .objectives import build_objective as build_objective
from .sampling import Interpolator as Interpolator
from .training import train as train
