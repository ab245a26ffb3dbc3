"""The version of medseg."""

__version__ = "0.1.0"
