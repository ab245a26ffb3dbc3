"""The masks of an inference."""

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from ignite.engine import Engine
from monai.data import DataLoader, Dataset, MetaTensor
from monai.transforms import AsDiscreted

from medseg.engines import SaveMasks, segmentation_evaluator
from medseg.errors import DatasetError

AFFINE = np.diag([2.0, 2.0, 3.0, 1.0])


def infer(images: list[torch.Tensor], folder: Path) -> None:
    items = [{"image": MetaTensor(image, affine=AFFINE), "case": f"c{number}"} for number, image in enumerate(images)]
    segmentation_evaluator(
        "cpu",
        DataLoader(Dataset(items), batch_size=1),
        torch.nn.Identity(),
        postprocessing=AsDiscreted("pred", threshold=0.5),
        val_handlers=[SaveMasks(folder)],
    ).run()


def test_a_mask_has_the_name_the_grid_and_the_volume_of_its_case(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    image = torch.zeros(1, 4, 5, 6)
    image[0, 1, 2, 3:5] = 1
    infer([image, 1 - image], tmp_path / "masks")
    first, second = (nib.load(tmp_path / "masks" / name) for name in ("c0.nii.gz", "c1.nii.gz"))
    np.testing.assert_array_equal(np.asarray(first.dataobj), image[0])
    np.testing.assert_array_equal(np.asarray(second.dataobj), 1 - image[0])
    np.testing.assert_array_equal(first.affine, AFFINE)
    assert first.get_data_dtype() == np.uint8
    assert "c1.nii.gz: 1.4 ml" in capsys.readouterr().out  # 118 voxels of 12 mm³


def test_no_mask_is_made_of_nan(tmp_path: Path) -> None:
    image = torch.zeros(1, 4, 5, 6)
    image[0, 1, 2, 3] = torch.nan
    with pytest.raises(DatasetError, match="case c1: 1 of the network's 120 logits are NaN"):
        infer([torch.zeros(1, 4, 5, 6), image], tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["c0.nii.gz"]


def test_what_is_no_mask_of_bytes_is_refused_and_a_picture_is_no_volume(tmp_path: Path) -> None:
    handler, labels = SaveMasks(tmp_path), torch.zeros(1, 4, 5)
    labels[0, 1, 2] = 200
    evaluator = Engine(lambda engine, batch: None)
    for case, mask in (("picture", labels), ("many", 2 * labels)):
        evaluator.state.batch = [{"case": case}]
        evaluator.state.output = [{"pred": MetaTensor(mask, affine=np.eye(4))}]
        if case == "many":
            with pytest.raises(ValueError, match="400"):
                handler.save(evaluator)
        else:
            handler.save(evaluator)
    assert [path.name for path in tmp_path.iterdir()] == ["picture.nii.gz"]
    assert nib.load(tmp_path / "picture.nii.gz").shape == (4, 5, 1)
