from .run_page import write_report as write_report
from .store_page import write_store_report as write_store_report
from .tables import split_name as split_name
