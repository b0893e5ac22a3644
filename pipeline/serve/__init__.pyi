from .config import (
    DestinationConfig as DestinationConfig,
    LimitsConfig as LimitsConfig,
    ListenConfig as ListenConfig,
    PeerConfig as PeerConfig,
    TimingConfig as TimingConfig,
    read_config as read_config,
)
from .contract import InterpolateRequest as InterpolateRequest, InterpolateResult as InterpolateResult
from .interpolation import interpolation as interpolation
from .service import Service as Service
from .state import (
    Folders as Folders,
    Queue as Queue,
    read_status as read_status,
    state_folder as state_folder,
    status_text as status_text,
)
