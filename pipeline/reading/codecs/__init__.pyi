from .decode import (
    LOSSY_SYNTAXES as LOSSY_SYNTAXES,
    NATIVE as NATIVE,
    READABLE as READABLE,
    PixelError as PixelError,
    SampleFormat as SampleFormat,
    encapsulated_frame as encapsulated_frame,
    exceeds_declared as exceeds_declared,
    native_frame as native_frame,
    refused_syntax as refused_syntax,
)
