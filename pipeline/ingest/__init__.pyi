from .ingest import (
    IngestOptions as IngestOptions,
    check_secret as check_secret,
    ingest as ingest,
    open_stores as open_stores,
)
from .overrides import read_overrides as read_overrides
from .summary import IngestSummary as IngestSummary
