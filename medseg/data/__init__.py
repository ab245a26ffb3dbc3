"""From a dataset on disk to torch: the dataset format, splits, slice store, samplers."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
