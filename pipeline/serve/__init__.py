"""A service between PACS: studies in by C-STORE or a watched folder, thin series out; one result per study.

In: a YAML file of rules, received studies. Out: sent series, a queue in SQLite, health and metrics endpoints.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
