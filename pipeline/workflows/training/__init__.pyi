from .refiner import RefinerJob as RefinerJob, train_refiner as train_refiner
from .refiner_cases import RefinerSource as RefinerSource, Sampled as Sampled, held_out_figures as held_out_figures
from .regression import RegressionJob as RegressionJob, train_regression as train_regression
from .train import configuration as configuration, describe as describe, run_training as run_training
from .vae import TrainedVae as TrainedVae, VaeTrainingJob as VaeTrainingJob, run_vae_training as run_vae_training
