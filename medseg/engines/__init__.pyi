from .checkpoint import Checkpoints as Checkpoints
from .checkpoint import load_checkpoint as load_checkpoint
from .checkpoint import load_ensemble as load_ensemble
from .checkpoint import load_statistics as load_statistics
from .checkpoint import save_checkpoint as save_checkpoint
from .evaluator import segmentation_evaluator as segmentation_evaluator
from .inferers import AutocastInferer as AutocastInferer
from .inferers import has_fast_bfloat16 as has_fast_bfloat16
from .key_metrics import MeanScore as MeanScore
from .key_metrics import PooledScore as PooledScore
from .learning_rate_range import LearningRateRange as LearningRateRange
from .learning_rate_range import learning_rate_range as learning_rate_range
from .logs import ImageLog as ImageLog
from .logs import MetricsLog as MetricsLog
from .logs import TerminalProgress as TerminalProgress
from .masks import SaveMasks as SaveMasks
from .overrides import CheckedWorkflow as CheckedWorkflow
from .overrides import check_config_overrides as check_config_overrides
from .overrides import check_overrides as check_overrides
from .overrides import running_workflow as running_workflow
from .overrides import show_error as show_error
from .schedules import time_decay as time_decay
from .scores import Scores as Scores
from .threshold import ChooseThreshold as ChooseThreshold
from .threshold import read_threshold as read_threshold
from .trainer import segmentation_trainer as segmentation_trainer
from .weight_decay import kernel_weight_decay as kernel_weight_decay

__all__ = [
    "AutocastInferer",
    "CheckedWorkflow",
    "Checkpoints",
    "ChooseThreshold",
    "ImageLog",
    "LearningRateRange",
    "MeanScore",
    "MetricsLog",
    "PooledScore",
    "SaveMasks",
    "Scores",
    "TerminalProgress",
    "check_config_overrides",
    "check_overrides",
    "has_fast_bfloat16",
    "kernel_weight_decay",
    "learning_rate_range",
    "load_checkpoint",
    "load_ensemble",
    "load_statistics",
    "read_threshold",
    "running_workflow",
    "save_checkpoint",
    "segmentation_evaluator",
    "segmentation_trainer",
    "show_error",
    "time_decay",
]
