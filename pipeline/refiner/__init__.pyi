from .inputs import COMPOSED as COMPOSED, neighbours as neighbours
from .network import DEGREE as DEGREE, Refiner as Refiner, RefinerConfig as RefinerConfig
from .patches import (
    PatchSettings as PatchSettings,
    RefinerCase as RefinerCase,
    RefinerPatches as RefinerPatches,
    cut_patch as cut_patch,
    held_out_operator as held_out_operator,
    positions as positions,
)
from .pretrained import (
    DEFAULT as DEFAULT,
    PretrainedCard as PretrainedCard,
    PretrainedModel as PretrainedModel,
    RunSettings as RunSettings,
    flushed as flushed,
    load_pretrained as load_pretrained,
    native_bfloat16 as native_bfloat16,
    outside as outside,
    shipped_models as shipped_models,
    thin_slices as thin_slices,
)
from .pretrained_input import (
    HU_RANGE as HU_RANGE,
    facts_of as facts_of,
    linear_weights as linear_weights,
    to_unit as to_unit,
)
from .pretrained_network import (
    RESIDUAL_UNIT as RESIDUAL_UNIT,
    NetworkConfig as NetworkConfig,
    PretrainedNetwork as PretrainedNetwork,
    as_cells as as_cells,
    fold_of as fold_of,
)
from .refiner import (
    FILE_NAME as FILE_NAME,
    START_NAME as START_NAME,
    RefinerCard as RefinerCard,
    RefinerFile as RefinerFile,
    check_window as check_window,
    misfit as misfit,
    refine as refine,
    refined_volume as refined_volume,
    save_refiner as save_refiner,
    start_refiner as start_refiner,
)
from .regression import (
    check_same_split as check_same_split,
    regression_facts as regression_facts,
    training_pairs as training_pairs,
    training_recipe as training_recipe,
)
