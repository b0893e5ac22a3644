"""Training configurations: schema, presets, YAML, overrides, and the predecessor's keys.

In: a preset, a file, `--set key=value`. Out: a checked `TrainConfig`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
