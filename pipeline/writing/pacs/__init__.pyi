from .checkpoint import hold_reactor as hold_reactor
from .cstore import CStore as CStore
from .send import (
    Destination as Destination,
    SendSummary as SendSummary,
    send_folder as send_folder,
    series_files as series_files,
)
from .stow_rs import StowRs as StowRs
