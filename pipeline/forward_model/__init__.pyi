from .certificate import certificate as certificate
from .data_consistency import (
    ProjectionFigures as ProjectionFigures,
    enforce_data_consistency as enforce_data_consistency,
    residual_rms as residual_rms,
)
from .fit import (
    OperatorCheck as OperatorCheck,
    ProtocolFit as ProtocolFit,
    Protocols as Protocols,
    check_operator as check_operator,
    fit_pair as fit_pair,
    fit_profile as fit_profile,
)
from .simulation import draw_thick as draw_thick, thick_under as thick_under
from .slice_profile import (
    SliceOperator as SliceOperator,
    SliceProfile as SliceProfile,
    default_profile as default_profile,
    slice_operator as slice_operator,
)
from .thick_measurement import (
    ThickMeasurement as ThickMeasurement,
    measurement_noise as measurement_noise,
    stated_profile as stated_profile,
)
from .upsampling import BASELINES as BASELINES, apply as apply, weights as weights
