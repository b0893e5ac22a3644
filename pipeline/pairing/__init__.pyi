from .candidates import ON_REQUEST as ON_REQUEST, override_pair as override_pair
from .pixel_check import prove_pair as prove_pair
from .splits import PatientSplits as PatientSplits, patient_table as patient_table
from .study_pairs import BETTER_MATCH as BETTER_MATCH, pair_studies as pair_studies
