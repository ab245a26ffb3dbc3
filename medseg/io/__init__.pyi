from .atomic import atomic_path as atomic_path
from .atomic import atomic_write_bytes as atomic_write_bytes
from .atomic import atomic_write_text as atomic_write_text
from .image import read_image as read_image
from .image import read_series as read_series
from .image import read_volumes as read_volumes
from .labels import read_label as read_label
from .nifti import write_nifti as write_nifti
from .reader import Reader as Reader
from .rtstruct import RoiSummary as RoiSummary
from .rtstruct import list_rois as list_rois
from .rtstruct import read_rtstruct as read_rtstruct
from .seg import read_seg as read_seg
from .series import Series as Series
from .series import Study as Study
from .series import find_series as find_series
from .series import match_series as match_series
from .suv import suv_factor as suv_factor

__all__ = [
    "Reader",
    "RoiSummary",
    "Series",
    "Study",
    "atomic_path",
    "atomic_write_bytes",
    "atomic_write_text",
    "find_series",
    "list_rois",
    "match_series",
    "read_image",
    "read_label",
    "read_rtstruct",
    "read_seg",
    "read_series",
    "read_volumes",
    "suv_factor",
    "write_nifti",
]
