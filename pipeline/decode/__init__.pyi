from .compose import (
    ComposeSettings as ComposeSettings,
    base_volume as base_volume,
    compose as compose,
    finish as finish,
    parse_detail as parse_detail,
    restore as restore,
)
from .samples import (
    DerivedSeries as DerivedSeries,
    DerivedVolume as DerivedVolume,
    WriteSettings as WriteSettings,
    average_samples as average_samples,
    parse_answer as parse_answer,
    textured as textured,
    write_derived as write_derived,
)
from .store import (
    DecodeSummary as DecodeSummary,
    VaeSettings as VaeSettings,
    decode_store as decode_store,
    note_certificates as note_certificates,
)
from .task import (
    DecodeSelection as DecodeSelection,
    DecodeSettings as DecodeSettings,
    condition_of as condition_of,
    decoded_hu as decoded_hu,
)
