"""The state folder: the queue in SQLite, the folders of images and results, and a summary of both.

In: events of the service. Out: what survives a kill at any instant.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
