from .diff import diff as diff
from .erase import Forgotten as Forgotten, forget_patient as forget_patient, keys_of_patient as keys_of_patient
from .gc import collect as collect
from .migrate import migrate as migrate
from .pins import pin as pin, pinned_snapshots as pinned_snapshots
from .staleness import (
    pair_digest as pair_digest,
    pair_digests as pair_digests,
    refined_digest as refined_digest,
    refiner_of_digest as refiner_of_digest,
    sources as sources,
    stale_rows as stale_rows,
    unlike as unlike,
)
from .statistics import summarise as summarise
from .status import status as status
from .verify import damaged_latents as damaged_latents, verify as verify
