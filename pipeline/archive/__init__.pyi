from .directory_entries import is_nifti as is_nifti, nested_archive as nested_archive
from .discover import (
    DEFAULT_CATEGORIES as DEFAULT_CATEGORIES,
    UNLABELLED as UNLABELLED,
    FoundArchive as FoundArchive,
    stream_archives as stream_archives,
)
from .joined_source import JoinedSource as JoinedSource
from .source import (
    UNREADABLE_FILE as UNREADABLE_FILE,
    Scratch as Scratch,
    Source as Source,
    open_archive as open_archive,
)
from .zip_directory import Limits as Limits, StorageError as StorageError
