from .archive import open_archive as open_archive
from .decode import decode_store as decode_store
from .encode import encode_store as encode_store
from .ingest import ingest as ingest
from .reading import read_series as read_series, scan as scan
from .volume import Geometry as Geometry, Volume as Volume, Window as Window
from .workflows import (
    DecodeJob as DecodeJob,
    EvaluationJob as EvaluationJob,
    InterpolateJob as InterpolateJob,
    RefinerJob as RefinerJob,
    RegressionJob as RegressionJob,
    RplhrJob as RplhrJob,
    evaluate_rplhr as evaluate_rplhr,
    evaluate_run as evaluate_run,
    interpolate_study as interpolate_study,
    sample_store as sample_store,
    train_refiner as train_refiner,
    train_regression as train_regression,
    write_report as write_report,
)
