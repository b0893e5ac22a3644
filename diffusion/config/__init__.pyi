from .load import (
    PRESETS as PRESETS,
    check as check,
    check_precision as check_precision,
    load_config as load_config,
)
from .schema import (
    BudgetConfig as BudgetConfig,
    DataConfig as DataConfig,
    LossConfig as LossConfig,
    OptimiserConfig as OptimiserConfig,
    ParallelConfig as ParallelConfig,
    TrainConfig as TrainConfig,
    ValidationConfig as ValidationConfig,
    from_dict as from_dict,
    to_dict as to_dict,
)
