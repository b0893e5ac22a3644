"""Objectives and samplers: epsilon, v, flow and bridge.

In: a model and clean latents. Out: a loss per sample; or samples.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
