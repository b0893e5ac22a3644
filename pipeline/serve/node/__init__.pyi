from .commitment import Commitment as Commitment
from .guarded_server import GuardedServer as GuardedServer
from .intake import Intake as Intake, Taken as Taken, Verdict as Verdict
from .receiver import Receiver as Receiver, client_tls as client_tls, server_tls as server_tls
