from .compose import (
    ComposeSettings as ComposeSettings,
    compose as compose,
    parse_detail as parse_detail,
    restore as restore,
)
from .samples import (
    DerivedSeries as DerivedSeries,
    WriteSettings as WriteSettings,
    average_samples as average_samples,
    parse_answer as parse_answer,
    write_derived as write_derived,
)
from .store import (
    decode_store as decode_store,
    note_certificates as note_certificates,
    only_encoding as only_encoding,
    window_of as window_of,
)
from .task import DecodeSettings as DecodeSettings, decoded_hu as decoded_hu
