from .checkpoint import (
    CheckpointFolder as CheckpointFolder,
    check_tensors as check_tensors,
    gather as gather,
    load_on_first as load_on_first,
    restore as restore,
    validation_of as validation_of,
)
from .ema import PowerEma as PowerEma
from .run_card import RUN_CARD as RUN_CARD, RunCard as RunCard, pin_snapshot as pin_snapshot, reopen as reopen
from .sharding import full_tensor as full_tensor, is_fsdp as is_fsdp
from .training_log import LOG as LOG, Journal as Journal, read_log as read_log
