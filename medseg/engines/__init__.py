"""Trainers and evaluators over MONAI and Ignite, and the parts they are built from."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
