from .inputs import COMPOSED as COMPOSED
from .network import Refiner as Refiner, RefinerConfig as RefinerConfig
from .patches import (
    PatchSettings as PatchSettings,
    RefinerCase as RefinerCase,
    RefinerPatches as RefinerPatches,
    cut_patch as cut_patch,
    held_out_operator as held_out_operator,
    positions as positions,
)
from .refiner import (
    FILE_NAME as FILE_NAME,
    RefinerCard as RefinerCard,
    RefinerFile as RefinerFile,
    misfit as misfit,
    refine as refine,
    save_refiner as save_refiner,
)
from .regression import (
    check_same_split as check_same_split,
    regression_facts as regression_facts,
    training_pairs as training_pairs,
    training_recipe as training_recipe,
)
