"""Keyed pseudonyms, and the private part of a store that can undo them.

In: UIDs and patient ids. Out: HMAC keys; `whois` answers a key from PRIVATE, `forget` removes a patient everywhere.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
