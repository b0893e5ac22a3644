from .database import Database as Database
from .folders import GIB as GIB, Folders as Folders, remove_path as remove_path, write_durably as write_durably
from .queue import Claim as Claim, Delivery as Delivery, Made as Made, Queue as Queue, Stored as Stored
from .status import read_status as read_status, state_folder as state_folder, status_text as status_text
