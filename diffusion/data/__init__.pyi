from .batches import Batch as Batch, widen as widen
from .epoch_plan import plan_epoch as plan_epoch
from .pairs import (
    choose_encode_key as choose_encode_key,
    condition_role as condition_role,
    only_refiner as only_refiner,
)
from .prefetch import prefetch as prefetch
from .stream import PairStream as PairStream, ProcessShare as ProcessShare, Step as Step
from .synthetic_store import key_of as key_of, make_store as make_store, series as series, stage as stage
from .z_alignment import align_depth as align_depth, same_extent as same_extent
