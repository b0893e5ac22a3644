from .compare import compare_runs as compare_runs
from .decoding import DecodeJob as DecodeJob, decode as decode
from .doctor import REMEDIES as REMEDIES, Finding as Finding, examine as examine
from .evaluate import EvaluationJob as EvaluationJob, evaluate_run as evaluate_run
from .interpolate import (
    InterpolateSettings as InterpolateSettings,
    LoadedModel as LoadedModel,
    condition_latent as condition_latent,
    encoding_of as encoding_of,
    estimate_seconds as estimate_seconds,
    generate_series as generate_series,
    interpolate_study as interpolate_study,
    interpolate_with as interpolate_with,
    latent_positions as latent_positions,
    learnt_spacing as learnt_spacing,
    load_model as load_model,
    run_interpolation as run_interpolation,
)
from .interpolate_job import Interpolated as Interpolated, InterpolateJob as InterpolateJob, Sampling as Sampling
from .interpolate_shipped import interpolate_shipped as interpolate_shipped
from .job_progress import JobProgress as JobProgress, OnProgress as OnProgress
from .refiner_cases import RefinerSource as RefinerSource, Sampled as Sampled, held_out_figures as held_out_figures
from .refiner_training import RefinerJob as RefinerJob, train_refiner as train_refiner
from .regression_training import RegressionJob as RegressionJob, train_regression as train_regression
from .report import (
    write_dataset_report as write_dataset_report,
    write_report as write_report,
    write_run_report as write_run_report,
)
from .rplhr import RplhrJob as RplhrJob, evaluate_rplhr as evaluate_rplhr
from .sample import (
    SampleJob as SampleJob,
    Spread as Spread,
    load_codec as load_codec,
    own_refiner as own_refiner,
    refiner_of as refiner_of,
    sample_pairs as sample_pairs,
    sample_store as sample_store,
    sampling_facts as sampling_facts,
    start_of as start_of,
)
from .thick_study import ThickStudy as ThickStudy, choose_thick as choose_thick, read_thick as read_thick
from .train import configuration as configuration, describe as describe, run_training as run_training
from .train_vae import TrainedVae as TrainedVae, VaeTrainingJob as VaeTrainingJob, run_vae_training as run_vae_training
