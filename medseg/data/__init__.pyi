from .check import Problem as Problem
from .check import check_dataset as check_dataset
from .folder import DatasetFolder as DatasetFolder
from .folder import datalist as datalist
from .folder import pixel_hash as pixel_hash
from .loading import SeededDataset as SeededDataset
from .loading import SeededLoader as SeededLoader
from .loading import SeededSampler as SeededSampler
from .loading import seeded as seeded
from .slices import SliceDataset as SliceDataset
from .slices import write_slices as write_slices
from .splits import check_splits as check_splits
from .splits import find_split_errors as find_split_errors
from .splits import make_splits as make_splits
from .splits import split_table as split_table
from .studies import image_datalist as image_datalist
from .studies import study_datalist as study_datalist

__all__ = [
    "DatasetFolder",
    "Problem",
    "SeededDataset",
    "SeededLoader",
    "SeededSampler",
    "SliceDataset",
    "check_dataset",
    "check_splits",
    "datalist",
    "find_split_errors",
    "image_datalist",
    "make_splits",
    "pixel_hash",
    "seeded",
    "split_table",
    "study_datalist",
    "write_slices",
]
