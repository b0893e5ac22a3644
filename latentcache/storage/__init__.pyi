from .atomic import (
    atomic_folder as atomic_folder,
    refuse_existing as refuse_existing,
    write_text as write_text,
    written_aside as written_aside,
)
from .base import TEMPORARY as TEMPORARY, Buffer as Buffer, Entry as Entry, Location as Location
from .local import (
    FILE_SCHEME as FILE_SCHEME,
    FileSystem as FileSystem,
    LocalLocation as LocalLocation,
    local_path as local_path,
)
from .open import open_location as open_location
from .planted_links import (
    SUPERUSER as SUPERUSER,
    fresh_draft as fresh_draft,
    is_foreign as is_foreign,
    refuse_planted as refuse_planted,
)
from .safe_yaml import YAML_BYTES as YAML_BYTES, parse_yaml as parse_yaml
from .system_calls import (
    BINARY as BINARY,
    READ_FLAGS as READ_FLAGS,
    bytes_at as bytes_at,
    lock_alone as lock_alone,
    process_is_gone as process_is_gone,
    read_at as read_at,
    sync_file as sync_file,
    sync_folder as sync_folder,
    user_number as user_number,
)
