from .bundles import BundleInfo as BundleInfo
from .bundles import bundle_path as bundle_path
from .bundles import bundle_table as bundle_table
from .bundles import copy_bundle as copy_bundle
from .bundles import run_bundle as run_bundle
from .learning_rate import bundle_learning_rate_range as bundle_learning_rate_range
from .run_folder import latest_run as latest_run
from .run_folder import new_run as new_run
from .run_folder import record_run as record_run
from .run_folder import unlock_split as unlock_split

__all__ = [
    "BundleInfo",
    "bundle_learning_rate_range",
    "bundle_path",
    "bundle_table",
    "copy_bundle",
    "latest_run",
    "new_run",
    "record_run",
    "run_bundle",
    "unlock_split",
]
