from .capabilities import formats as formats, models as models
from .compare import compare_runs as compare_runs
from .decoding import DecodeJob as DecodeJob, decode as decode
from .demo import claim_folder as claim_folder, demo_figures as demo_figures
from .doctor import REMEDIES as REMEDIES, Finding as Finding, examine as examine
from .encoding import EncodeJob as EncodeJob, encode as encode
from .evaluate import EvaluationJob as EvaluationJob, evaluate_run as evaluate_run
from .ingesting import IngestJob as IngestJob, ingest_dataset as ingest_dataset
from .interpolation import (
    Interpolated as Interpolated,
    InterpolateJob as InterpolateJob,
    InterpolateSettings as InterpolateSettings,
    LoadedModel as LoadedModel,
    Sampling as Sampling,
    ThickStudy as ThickStudy,
    choose_thick as choose_thick,
    condition_latent as condition_latent,
    encoding_of as encoding_of,
    estimate_seconds as estimate_seconds,
    generate_series as generate_series,
    interpolate_shipped as interpolate_shipped,
    interpolate_study as interpolate_study,
    interpolate_with as interpolate_with,
    learnt_spacing as learnt_spacing,
    load_model as load_model,
    read_thick as read_thick,
    run_interpolation as run_interpolation,
)
from .job_progress import JobProgress as JobProgress, OnProgress as OnProgress
from .report import (
    write_dataset_report as write_dataset_report,
    write_report as write_report,
    write_run_report as write_run_report,
)
from .rplhr import RplhrJob as RplhrJob, evaluate_rplhr as evaluate_rplhr
from .sample import (
    SampleJob as SampleJob,
    Spread as Spread,
    own_refiner as own_refiner,
    refiner_of as refiner_of,
    sample_pairs as sample_pairs,
    sample_store as sample_store,
    sampling_facts as sampling_facts,
    start_of as start_of,
)
from .training import (
    RefinerJob as RefinerJob,
    RefinerSource as RefinerSource,
    RegressionJob as RegressionJob,
    Sampled as Sampled,
    TrainedVae as TrainedVae,
    VaeTrainingJob as VaeTrainingJob,
    configuration as configuration,
    describe as describe,
    held_out_figures as held_out_figures,
    run_training as run_training,
    run_vae_training as run_vae_training,
    train_refiner as train_refiner,
    train_regression as train_regression,
)
from .verification import VerifyJob as VerifyJob, verify as verify
