from .run_page import write_report as write_report
from .store_page import write_store_report as write_store_report
from .study_page import StudyPage as StudyPage, write_study_page as write_study_page
from .tables import split_name as split_name
