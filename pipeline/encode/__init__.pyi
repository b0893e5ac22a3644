from .plan import missing_latents as missing_latents
from .source_check import check_sources as check_sources, retire_foreign as retire_foreign
from .store import (
    EncodeSettings as EncodeSettings,
    EncodeSummary as EncodeSummary,
    encode_store as encode_store,
    parse_roles as parse_roles,
    together as together,
)
from .task import PAD_MULTIPLE_ZYX as PAD_MULTIPLE_ZYX, EncodeTask as EncodeTask
