from .case_picture import alignment_picture as alignment_picture
from .dataset import dataset_report as dataset_report
from .figures import case_dice_plot as case_dice_plot
from .figures import dice_histogram as dice_histogram
from .figures import distribution_plot as distribution_plot
from .figures import patient_box_plot as patient_box_plot
from .figures import slice_pictures as slice_pictures
from .figures import training_curves as training_curves
from .run import run_report as run_report
from .runs import Pictures as Pictures
from .runs import Run as Run
from .runs import read_pictures as read_pictures
from .runs import read_run as read_run
from .tables import Summary as Summary
from .tables import patient_scores as patient_scores
from .tables import summarize as summarize

__all__ = [
    "Pictures",
    "Run",
    "Summary",
    "alignment_picture",
    "case_dice_plot",
    "dataset_report",
    "dice_histogram",
    "distribution_plot",
    "patient_box_plot",
    "patient_scores",
    "read_pictures",
    "read_run",
    "run_report",
    "slice_pictures",
    "summarize",
    "training_curves",
]
