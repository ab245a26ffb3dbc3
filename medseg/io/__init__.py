"""Images and masks in and out: one reader for every format, DICOM by geometry."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
