from .loading import SeededDataset as SeededDataset
from .loading import SeededLoader as SeededLoader
from .loading import SeededSampler as SeededSampler
from .loading import seeded as seeded
from .splits import check_splits as check_splits
from .splits import make_splits as make_splits
from .splits import split_table as split_table

__all__ = [
    "SeededDataset",
    "SeededLoader",
    "SeededSampler",
    "check_splits",
    "make_splits",
    "seeded",
    "split_table",
]
