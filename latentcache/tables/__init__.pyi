from .key_codes import positions as positions
from .key_index import COLUMNS as COLUMNS, KeyIndex as KeyIndex, RowFinder as RowFinder
from .schema import (
    KINDS as KINDS,
    SCHEMAS as SCHEMAS,
    Kind as Kind,
    from_table as from_table,
    matrix as matrix,
    timings_table as timings_table,
    to_table as to_table,
)
from .snapshots import (
    DROPPED as DROPPED,
    Fragment as Fragment,
    Keep as Keep,
    Snapshot as Snapshot,
    check_version as check_version,
    distinct as distinct,
    drop_snapshot as drop_snapshot,
    extend as extend,
    has_snapshot as has_snapshot,
    load_snapshot as load_snapshot,
    read_fragment as read_fragment,
    read_table as read_table,
    snapshot_numbers as snapshot_numbers,
    snapshot_path as snapshot_path,
    unique_rows as unique_rows,
    without_latents as without_latents,
    write_fragment as write_fragment,
)
