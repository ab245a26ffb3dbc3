from .counts import Counts as Counts
from .counts import confusion_counts as confusion_counts
from .intervals import Interval as Interval
from .intervals import bootstrap_interval as bootstrap_interval
from .intervals import paired_bootstrap_difference as paired_bootstrap_difference
from .outliers import outliers as outliers
from .pooled import pooled_tversky as pooled_tversky
from .rows import case_scores as case_scores
from .rows import slice_scores as slice_scores
from .scores import dice as dice
from .scores import f_beta as f_beta
from .scores import ppv as ppv
from .scores import sensitivity as sensitivity
from .scores import specificity as specificity

__all__ = [
    "Counts",
    "Interval",
    "bootstrap_interval",
    "case_scores",
    "confusion_counts",
    "dice",
    "f_beta",
    "outliers",
    "paired_bootstrap_difference",
    "pooled_tversky",
    "ppv",
    "sensitivity",
    "slice_scores",
    "specificity",
]
