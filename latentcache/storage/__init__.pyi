from .atomic import (
    atomic_folder as atomic_folder,
    refuse_existing as refuse_existing,
    sync_file as sync_file,
    write_text as write_text,
    written_aside as written_aside,
)
from .base import TEMPORARY as TEMPORARY, Buffer as Buffer, Entry as Entry, Location as Location
from .local import FileSystem as FileSystem, LocalLocation as LocalLocation
from .open import open_location as open_location
