from .header import Header as Header, parse_header as parse_header
from .nifti import NiftiSeries as NiftiSeries, read_nifti as read_nifti
from .series import (
    AIR_HU as AIR_HU,
    NIFTI_FLAG as NIFTI_FLAG,
    ScannedSeries as ScannedSeries,
    as_requested as as_requested,
    pointer_of as pointer_of,
    scan as scan,
)
from .volume_reader import check_series as check_series, read_scanned as read_scanned, read_series as read_series
