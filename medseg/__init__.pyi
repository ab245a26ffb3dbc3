from . import data as data
from . import engines as engines
from . import errors as errors
from . import experiments as experiments
from . import inference as inference
from . import io as io
from . import losses as losses
from . import metrics as metrics
from . import networks as networks
from . import report as report
from . import transforms as transforms
from .version import __version__ as __version__

__all__ = [
    "__version__",
    "data",
    "engines",
    "errors",
    "experiments",
    "inference",
    "io",
    "losses",
    "metrics",
    "networks",
    "report",
    "transforms",
]
