from .balance import balancing_factors as balancing_factors
from .balance import lesion_variants as lesion_variants
from .balance import oversample as oversample
from .blocks import BlockDataset as BlockDataset
from .blocks import block_starts as block_starts
from .cache import ContentCacheDataset as ContentCacheDataset
from .check import check_dataset as check_dataset
from .folder import DatasetFolder as DatasetFolder
from .folder import datalist as datalist
from .folder import pixel_hash as pixel_hash
from .loading import SeededDataset as SeededDataset
from .loading import SeededLoader as SeededLoader
from .loading import SeededSampler as SeededSampler
from .loading import seeded as seeded
from .problem import Problem as Problem
from .slices import SliceDataset as SliceDataset
from .slices import write_slices as write_slices
from .splits import check_splits as check_splits
from .splits import find_split_errors as find_split_errors
from .splits import make_splits as make_splits
from .splits import split_table as split_table
from .statistics import balanced_class_weights as balanced_class_weights
from .statistics import check_statistics as check_statistics
from .statistics import training_statistics as training_statistics
from .studies import image_datalist as image_datalist
from .studies import study_datalist as study_datalist

__all__ = [
    "BlockDataset",
    "ContentCacheDataset",
    "DatasetFolder",
    "Problem",
    "SeededDataset",
    "SeededLoader",
    "SeededSampler",
    "SliceDataset",
    "balanced_class_weights",
    "balancing_factors",
    "block_starts",
    "check_dataset",
    "check_splits",
    "check_statistics",
    "datalist",
    "find_split_errors",
    "image_datalist",
    "lesion_variants",
    "make_splits",
    "oversample",
    "pixel_hash",
    "seeded",
    "split_table",
    "study_datalist",
    "training_statistics",
    "write_slices",
]
