"""Compressed frames to stored pixel values: JPEG, JPEG-LS, JPEG 2000, RLE and raw.

In: the bytes of one frame and its header. Out: an integer array; truncated streams are refused.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
