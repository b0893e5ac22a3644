from .case import failed as failed
from .fabrication import Intervals as Intervals, auc as auc
from .held_out import (
    HeldOutImages as HeldOutImages,
    detail_of_draws as detail_of_draws,
    texture_of_pairs as texture_of_pairs,
)
from .methods import CaseWork as CaseWork, EvaluationSettings as EvaluationSettings
from .results import (
    case_of as case_of,
    count_of as count_of,
    finish as finish,
    load_metrics as load_metrics,
    log_test_use as log_test_use,
    number as number,
    simulated_note as simulated_note,
    summary_text as summary_text,
    values as values,
)
from .rplhr import evaluate_dataset as evaluate_dataset, find_cases as find_cases
from .run import (
    SCORES_VERSION as SCORES_VERSION,
    ScoreSpread as ScoreSpread,
    evaluate_pairs as evaluate_pairs,
    load_views as load_views,
)
from .vae_reconstruction import (
    as_dict as as_dict,
    check as check,
    plot as plot,
    sample_series as sample_series,
    summarise as summarise,
    table as table,
)
from .views import (
    ALARM_STEP as ALARM_STEP,
    CODE_KNOTS as CODE_KNOTS,
    CODE_KNOTS_HU as CODE_KNOTS_HU,
    SPREAD_STEP_HU as SPREAD_STEP_HU,
    CaseView as CaseView,
    label as label,
    ordered as ordered,
    view_stride as view_stride,
)
