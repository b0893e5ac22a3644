from .ct_image import (
    FileOptions as FileOptions,
    WrittenSeries as WrittenSeries,
    is_written_series as is_written_series,
    write_ct_series as write_ct_series,
)
from .dataset import IMPLEMENTATION_UID as IMPLEMENTATION_UID, implementation_version as implementation_version
from .enhanced_ct import check_enhanced as check_enhanced, write_enhanced_ct as write_enhanced_ct
from .nifti import write_nifti as write_nifti
from .parametric_map import write_parametric_map as write_parametric_map
from .pixel_data import TRANSFER_SYNTAXES as TRANSFER_SYNTAXES, transfer_syntax_uid as transfer_syntax_uid
from .provenance import (
    ALGORITHM as ALGORITHM,
    PRIVATE_CREATOR as PRIVATE_CREATOR,
    Provenance as Provenance,
    kinds_of_file as kinds_of_file,
    read_provenance as read_provenance,
)
from .series_identity import SeriesIdentity as SeriesIdentity
