"""Architectures, assembled from shared blocks."""

import lazy_loader

from . import batch_renorm  # noqa: F401 (it tells MONAI's factory of norm="BATCH_RENORM")

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
