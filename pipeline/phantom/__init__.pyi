from .dicom import patient_zip as patient_zip
from .emphysema import Emphysema as Emphysema, with_emphysema as with_emphysema
from .patient import (
    PhantomPatient as PhantomPatient,
    PhantomSettings as PhantomSettings,
    make_patient as make_patient,
    write_dataset as write_dataset,
)
from .planting import Site as Site, choose_sites as choose_sites, nodule as nodule
from .trees import Segment as Segment
