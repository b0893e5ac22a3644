from .executor import SlabExecutor as SlabExecutor
from .layers import Field as Field, Stored as Stored, Stream as Stream, as_image as as_image
from .memory_plan import (
    Plan as Plan,
    free_bytes as free_bytes,
    make_plan as make_plan,
    rehearse as rehearse,
    share_gib as share_gib,
)
