from .hierarchy_reader import Imported as Imported, import_zarr as import_zarr
from .hierarchy_writer import CODECS as CODECS, Exported as Exported, export_zarr as export_zarr
