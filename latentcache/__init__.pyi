from .device_memory import held_by_others as held_by_others
from .errors import (
    CorruptLatentError as CorruptLatentError,
    CtpipeError as CtpipeError,
    InputError as InputError,
    NonFiniteError as NonFiniteError,
    StoreError as StoreError,
    StoreExistsError as StoreExistsError,
    missing_extra as missing_extra,
    no_ray_cluster as no_ray_cluster,
)
from .host_memory import free_host_bytes as free_host_bytes, peak_bytes as peak_bytes
from .lease import Lease as Lease
from .moments import ROW as ROW, Moments as Moments, merge_all as merge_all, moments_of as moments_of
from .numerics import (
    TRITON_SWITCH as TRITON_SWITCH,
    check_bf16_convolutions as check_bf16_convolutions,
    compute_dtype as compute_dtype,
    device_kind as device_kind,
    dtype_for_latents as dtype_for_latents,
    full_float32 as full_float32,
    linear_neighbours as linear_neighbours,
    triton_agrees as triton_agrees,
)
from .queries import pairs_where as pairs_where, series_where as series_where
from .records import (
    ACROSS_FIELDS as ACROSS_FIELDS,
    COMPRESSION as COMPRESSION,
    FORMAT_VERSION as FORMAT_VERSION,
    LATENT_CHANNELS as LATENT_CHANNELS,
    LATENT_ROLES as LATENT_ROLES,
    PAIR_ROLES as PAIR_ROLES,
    SIMULATED as SIMULATED,
    Encoding as Encoding,
    LatentGrid as LatentGrid,
    LatentMeta as LatentMeta,
    LatentRecord as LatentRecord,
    LatentRole as LatentRole,
    PairRecord as PairRecord,
    SeriesRecord as SeriesRecord,
    SeriesRole as SeriesRole,
    Split as Split,
    mirror_axes as mirror_axes,
    valid_latents as valid_latents,
)
from .shard import METADATA as METADATA, SHARD as SHARD, Layout as Layout, restore_latent as restore_latent
from .store import (
    STORE as STORE,
    LatentStore as LatentStore,
    open_on_worker as open_on_worker,
    store_of_worker as store_of_worker,
)
from .writer import Writer as Writer
