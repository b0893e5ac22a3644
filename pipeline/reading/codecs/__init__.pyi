from .decode import (
    LOSSY_SYNTAXES as LOSSY_SYNTAXES,
    NATIVE as NATIVE,
    PixelError as PixelError,
    SampleFormat as SampleFormat,
    encapsulated_frame as encapsulated_frame,
    native_frame as native_frame,
    refused_syntax as refused_syntax,
)
