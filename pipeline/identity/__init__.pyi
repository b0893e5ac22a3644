from .erase import forget as forget
from .keys import (
    TELLING as TELLING,
    Keys as Keys,
    identities_conflict as identities_conflict,
    is_placeholder_id as is_placeholder_id,
)
from .private_store import PrivateStore as PrivateStore, one_of as one_of
from .private_tables import (
    UNUSABLE as UNUSABLE,
    ArchiveRow as ArchiveRow,
    QuarantineRow as QuarantineRow,
    SeriesRow as SeriesRow,
    archive_row as archive_row,
    forgotten_archive as forgotten_archive,
)
from .whois import whois as whois
