"""Write the masks of an inference."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from ignite.engine import Engine, Events
from monai.engines import IterationEvents
from monai.utils import CommonKeys

from medseg.engines.answers import refuse_nan
from medseg.io import write_nifti


class SaveMasks:
    """Write each predicted mask as `OUTPUT_DIR/CASE.nii.gz`, uint8, on the grid that postprocessing left it on.

    Args:
        output_dir: the folder, made where it is absent. A file of the same name is replaced, whole.

    Raises:
        DatasetError: while it runs, where the network's answer is NaN, which a threshold would make background of.
    """

    def __init__(self, output_dir: Path | str) -> None:
        self.output_dir = Path(output_dir)

    def attach(self, evaluator: Engine) -> None:
        """Write after each batch."""
        evaluator.add_event_handler(IterationEvents.FORWARD_COMPLETED, refuse_nan)
        evaluator.add_event_handler(Events.ITERATION_COMPLETED, self.save)

    def save(self, evaluator: Engine) -> None:
        """Write the masks of one batch, and say where they are and how large."""
        self.output_dir.mkdir(parents=True, exist_ok=True)
        for item, output in zip(evaluator.state.batch, evaluator.state.output, strict=True):
            mask = output[CommonKeys.PRED]
            path = self.output_dir / f"{item['case']}.nii.gz"
            write_nifti(mask, path, dtype=np.uint8)
            voxel = abs(np.linalg.det(np.asarray(mask.affine)[:3, :3]))
            milliliters = int(mask.round().count_nonzero()) * voxel / 1000
            print(f"{path}: {milliliters:.1f} ml")
