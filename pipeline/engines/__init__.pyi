from .contract import (
    EngineName as EngineName,
    EngineOptions as EngineOptions,
    Outcome as Outcome,
    Stage as Stage,
    timed as timed,
)
from .cost_model import SOURCES as SOURCES, Rates as Rates, cost as cost, measured as measured, override as override
from .devices import resolve_device as resolve_device, resolve_gpus as resolve_gpus
from .group_commit import GroupCommit as GroupCommit, StagedLatents as StagedLatents
from .job_log import note as note
from .progress import STAGES as STAGES, Progress as Progress, read_progress as read_progress, watched as watched
from .ray_cluster import dashboard_of as dashboard_of
from .run import StageTotals as StageTotals, run_stage as run_stage, stream as stream
from .workers import check_seen as check_seen, mark as mark, pin as pin
