"""The bundles from a clean shell: training, evaluation, inference, and what bad input ends in."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from monai.bundle import ConfigParser
from monai.bundle import run as monai_bundle_run
from scipy import ndimage

from data_prep.resample import Grid, resample
from medseg.engines import CheckedWorkflow, save_checkpoint, show_error
from medseg.experiments import run_bundle
from medseg.io import find_series, match_series, read_image, read_series


def network_of(bundle, **overrides: Any) -> torch.nn.Module:
    """The network of the bundle's inference."""
    config = ConfigParser.load_config_file(bundle.files("inference.yaml")[0])
    network = ConfigParser(config | {"network_channels": bundle.channels} | overrides).get_parsed_content("network_def")
    assert isinstance(network, torch.nn.Module)
    return network


def threshold_network(bundle, channel: int, threshold: float, classes: int) -> torch.nn.Module:
    """A network whose weights were set by hand: the last class where one input channel exceeds a threshold.

    The channel is handed through the first layers and the last ones; everything else is zero.
    """
    network = network_of(bundle).eval()
    with torch.no_grad():
        for name, weights in network.named_parameters():
            weights.zero_()
            if "norm" in name.lower() or ".N." in name:
                weights.fill_(1.0 if name.endswith("weight") else 0.0)
        first, *_ = network.encoder
        convolutions = (torch.nn.Conv2d, torch.nn.Conv3d)
        path = [m for part in (first, network.decoder[-1].blocks, network.head) for m in part.modules()]
        layers = [m for m in path if isinstance(m, convolutions)]
        for number, layer in enumerate(layers):
            center = tuple(size // 2 for size in layer.kernel_size)
            layer.weight[(0, channel if number == 0 else 0, *center)] = 1
            if layer.in_channels == 2 * layer.out_channels:  # streams join: the deeper one is zero, whichever it is
                layer.weight[(0, layer.out_channels, *center)] = 1
        layers[-1].weight.zero_()
        layers[-1].weight[(classes - 1, 0, *center)] = 100
        layers[-1].bias[classes - 1] = -100 * threshold
    return network


def check_run_folder(run_dir: Path, bundle) -> pd.DataFrame:
    assert {file.name for file in run_dir.iterdir()} >= {
        "config.yaml",
        "events",
        "metrics.csv",
        "model_best.pt",
        "model_last.pt",
        "run.json",
    }
    config = yaml.safe_load((run_dir / "config.yaml").read_text())
    assert config["dataset_dir"] == str(bundle.dataset)
    assert config["network_channels"] == bundle.channels
    assert config["max_epochs"] == 1
    log = pd.read_csv(run_dir / "metrics.csv")
    assert {"loss", "learning_rate", "val_dice"} <= set(log["name"])
    assert np.isfinite(log["value"]).all()
    return log


def test_training_leaves_one_run_folder_with_its_record(trained):
    check_run_folder(trained.run_dir, trained.bundle)
    assert trained.run_dir.name == "00"
    record = json.loads((trained.run_dir / "run.json").read_text())
    assert "monai.bundle run --config_file" in record["command"]
    assert record["labels"]["background"] == 0
    assert record["test_set_scored"] == []
    # weights_only: nothing in a checkpoint of ours is run
    assert "model" in torch.load(trained.run_dir / "model_best.pt", weights_only=True)


def evaluate(bundle, run_dir: Path, **more: Any) -> CheckedWorkflow:
    workflow = CheckedWorkflow(
        bundle.files("train.yaml", "evaluate.yaml"),
        workflow_type="infer",
        **bundle.training(run_dir.parent.parent, run_dir=str(run_dir), **more),
    )
    workflow.initialize()
    workflow.run()
    workflow.finalize()
    return workflow


def test_evaluation_scores_every_slice_and_every_case_of_the_split(trained, shell, tmp_path: Path):
    bundle = trained.bundle
    run_dir = Path(shutil.copytree(trained.run_dir, tmp_path / "runs/tiny/00"))
    done = shell(
        tmp_path,
        "monai.bundle",
        "run",
        "--config_file",
        str(bundle.files("train.yaml", "evaluate.yaml")),
        **bundle.training(tmp_path / "runs", run_dir=run_dir),
    )
    assert done.returncode == 0, done.stderr
    assert [p.name for p in run_dir.parent.iterdir()] == ["00"]  # an evaluation makes no run
    scores = pd.read_csv(run_dir / "scores.csv")
    splits = json.loads((bundle.dataset / "splits.json").read_text())
    assert set(scores["split"]) == {"val"}
    cases = scores[scores["level"] == "case"]
    assert set(cases["case"]) == set(splits["folds"][0]["val"])
    table = pd.read_csv(bundle.dataset / "cases.csv").set_index("case")
    for (case, _), slices in scores[scores["level"] == "slice"].groupby(["case", "label"]):
        voxels = np.prod([int(n) for n in table["shape"][case].split("x")])
        counted = slices[["tp", "fp", "tn", "fn"]].sum().sum()
        assert counted == voxels  # of the image itself, though the MR network sees it padded
    assert {p.stem for p in (run_dir / "pictures").iterdir()} == set(cases["case"])
    assert json.loads((run_dir / "run.json").read_text())["test_set_scored"] == []


def test_the_test_set_is_scored_only_where_that_is_said_and_then_recorded(trained, capsys, tmp_path: Path):
    bundle = trained.bundle
    run_dir = Path(shutil.copytree(trained.run_dir, tmp_path / "runs/tiny/00"))
    (run_dir / "scores.csv").unlink(missing_ok=True)
    with pytest.raises(Exception) as caught:  # noqa: PT011 (MONAI wraps it; show_error finds ours)
        evaluate(bundle, run_dir, split="test")
    assert last_line(caught.value, capsys).startswith("error: split: the test set is locked")
    assert not (run_dir / "scores.csv").exists()

    evaluate(bundle, run_dir, split="test", unlock_test_set=True)
    scores = pd.read_csv(run_dir / "scores.csv")
    splits = json.loads((bundle.dataset / "splits.json").read_text())
    assert set(scores["case"]) == set(splits["test"])
    (entry,) = json.loads((run_dir / "run.json").read_text())["test_set_scored"]
    assert entry["when"].startswith("20")
    assert entry["command"]


def test_a_pet_threshold_in_the_network_comes_back_on_the_grid_of_the_ct(petct, shell, tmp_path: Path):
    """Window, channels, resampling there and back, the mask's type and grid, from DICOM: one known answer for all."""
    suv = 4.0
    save_checkpoint(tmp_path / "model.pt", {"model": threshold_network(petct, channel=1, threshold=suv, classes=1)})
    done = shell(
        tmp_path,
        "monai.bundle",
        "run",
        "--config_file",
        *petct.files("inference.yaml"),
        **petct.predicting(tmp_path / "masks", tmp_path / "model.pt"),
    )
    assert done.returncode == 0, done.stderr
    (file,) = (tmp_path / "masks").iterdir()
    mask = nib.load(file)
    assert mask.get_data_dtype() == np.uint8
    assert "PHANTOM" not in file.name  # a file name tells nobody's identifier

    (study,) = match_series(find_series(petct.images))
    ct, pet = read_series(study.series["CT"]), read_series(study.series["PT"])
    assert mask.shape == tuple(ct.shape[1:])
    np.testing.assert_allclose(mask.affine, np.asarray(ct.affine), atol=1e-4)
    found = np.asarray(mask.dataobj)
    assert set(np.unique(found)) == {0, 1}
    truth = np.asarray(resample(pet, Grid.of(ct), "linear"))[0] > suv
    assert truth.sum() > 50
    around = np.ones((3, 3, 3))
    assert not (found.astype(bool) & ~ndimage.binary_dilation(truth, around)).any()
    assert not (ndimage.binary_erosion(truth, around) & ~found.astype(bool)).any()
    assert (found.astype(bool) ^ truth).sum() < 0.3 * truth.sum()


def test_inference_prepares_a_study_as_data_prep_does(petct, tmp_path: Path):
    save_checkpoint(tmp_path / "model.pt", {"model": network_of(petct)})
    workflow = CheckedWorkflow(
        petct.files("inference.yaml"),
        workflow_type="infer",
        **petct.predicting(tmp_path, tmp_path / "model.pt", windows=[{"center": 0, "width": 4000}]),
    )
    workflow.initialize()
    image = workflow.dataset[0]["image"]
    ct, pet = (read_image(petct.dataset / f"imagesTr/PHANTOM-002_{channel}.nii.gz") for channel in ("0000", "0001"))
    np.testing.assert_allclose(np.asarray(image.affine), np.asarray(ct.affine), atol=1e-3)
    assert image.shape[1:] == ct.shape[1:]
    np.testing.assert_allclose(np.asarray(image[0]), np.asarray(ct[0]) / 4000 + 0.5, atol=1e-3)
    np.testing.assert_allclose(np.asarray(image[1]), np.asarray(pet[0]), atol=1e-3)


def test_an_intensity_threshold_in_the_network_comes_back_on_the_grid_of_each_image(
    hippocampus, tmp_path: Path, capsys
):
    """Normalization, padding and its inversion, the class map, for images of two sizes: known exactly."""
    save_checkpoint(tmp_path / "model.pt", {"model": threshold_network(hippocampus, 0, 0.5, classes=3)})
    words = [
        part
        for key, value in hippocampus.predicting(tmp_path / "masks", tmp_path / "model.pt").items()
        for part in (f"--{key}", str(value))
    ]
    run_bundle("hippocampus_mr_segmentation", "inference", words)
    names = sorted(p.name for p in hippocampus.images.iterdir())
    assert sorted(p.name for p in (tmp_path / "masks").iterdir()) == names
    for name in names:
        image, mask = read_image(hippocampus.images / name), nib.load(tmp_path / "masks" / name)
        assert mask.get_data_dtype() == np.uint8
        np.testing.assert_allclose(mask.affine, np.asarray(image.affine), atol=1e-5)
        values = np.asarray(image[0])
        expected = 2 * ((values - values.mean()) / values.std() > 0.5)
        assert mask.shape == expected.shape
        # a voxel that rounding puts on the other side is one of thousands
        assert (np.asarray(mask.dataobj) != expected).sum() <= 2


def last_line(error: BaseException, capsys: pytest.CaptureFixture[str]) -> str:
    """What the process would end with: the hook that the bundle set, on the error that would have reached it."""
    capsys.readouterr()
    show_error(type(error), error, None)
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    return lines[0]


def spoil(case: str, bundle, trained_run: Path, tmp_path: Path) -> tuple[list[str], dict[str, Any], str]:
    """Config files, overrides and the start of the line for one kind of bad input."""
    runs = tmp_path / "runs"
    text = tmp_path / "notes.txt"
    text.write_text("no checkpoint\n")
    training = bundle.training(runs)
    predicting = bundle.predicting(tmp_path / "masks", text)
    dataset = tmp_path / "dataset"
    train, inference = bundle.files("train.yaml"), bundle.files("inference.yaml")
    if case == "no checkpoint":
        return inference, predicting, f"error: {text}: found 14 bytes that are no checkpoint"
    if case == "absent checkpoint":
        return inference, predicting | {"checkpoint": str(tmp_path / "a.pt")}, f"error: {tmp_path / 'a.pt'}: no such"
    if case == "checkpoint of another network":
        odd = predicting | {"checkpoint": str(trained_run / "model_best.pt"), "network_channels": [3, 4, 4, 4]}
        if bundle.name.startswith("head"):
            odd["network_channels"] = [3, 4]
        return inference, odd, f"error: {trained_run / 'model_best.pt'}: the weights are of another network"
    if case == "no images":
        (tmp_path / "empty").mkdir()
        return (
            inference,
            predicting | {"dataset_dir": str(tmp_path / "empty"), "checkpoint": str(trained_run / "model_best.pt")},
            f"error: {tmp_path / 'empty'}: found ",
        )
    if case == "no dataset":
        return train, training | {"dataset_dir": str(tmp_path)}, f"error: {tmp_path}: no dataset.json in it"
    if case == "no run to score":
        both = bundle.files("train.yaml", "evaluate.yaml")
        weights = str(trained_run / "model_best.pt")
        return both, training | {"run_dir": str(runs), "checkpoint": weights}, f"error: run_dir: {runs} has no run.json"
    if case == "no splits":
        shutil.copytree(bundle.dataset, dataset)
        (dataset / "splits.json").unlink()
        (dataset / "slices.h5").unlink(missing_ok=True)
        missing = "slices.h5" if bundle.name.startswith("head") else "splits.json"
        return train, training | {"dataset_dir": str(dataset)}, f"error: {dataset / missing}: "
    if case == "top level":
        return train, training | {"max_epoch": 3}, "error: override --max_epoch: no such key"
    if case == "leaf":
        return (
            train,
            training | {"train#trainer#max_epoch": 3},
            "error: override --train#trainer#max_epoch: no such key",
        )
    raise AssertionError(case)


CASES = [
    "no checkpoint",
    "absent checkpoint",
    "checkpoint of another network",
    "no images",
    "no dataset",
    "no run to score",
    "no splits",
    "top level",
    "leaf",
]


@pytest.mark.filterwarnings("ignore:parsing config_file")
@pytest.mark.parametrize("case", CASES)
def test_bad_input_ends_in_one_line_and_leaves_nothing(case: str, trained, tmp_path: Path, capsys):
    files, overrides, line = spoil(case, trained.bundle, trained.run_dir, tmp_path)
    with pytest.raises(Exception) as caught:  # noqa: PT011 (MONAI wraps it; show_error finds ours)
        monai_bundle_run(config_file=files, **overrides)
    assert last_line(caught.value, capsys).startswith(line)
    assert not (tmp_path / "runs").exists()
    assert not (tmp_path / "masks").exists()


@pytest.mark.filterwarnings("ignore:parsing config_file")
@pytest.mark.parametrize("workflow", ["inference", "evaluate"])
def test_windows_other_than_those_of_the_training_are_refused(workflow, petct, tmp_path: Path, capsys):
    """The network would take such images, and its masks and scores would be wrong."""
    checkpoint = tmp_path / "model.pt"
    save_checkpoint(checkpoint, {"model": network_of(petct)})
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"windows": [{"center": 60, "width": 100}]}))
    files, overrides = petct.files("inference.yaml"), petct.predicting(tmp_path / "masks", checkpoint)
    if workflow == "evaluate":
        files = petct.files("train.yaml", "evaluate.yaml")
        overrides = petct.training(tmp_path, run_dir=str(tmp_path), checkpoint=str(checkpoint))
    with pytest.raises(Exception) as caught:  # noqa: PT011 (MONAI wraps it; show_error finds ours)
        monai_bundle_run(config_file=files, **overrides)
    assert last_line(caught.value, capsys).startswith("error: windows: found [{'center': 70, 'width': 200}], but ")


def test_the_last_line_of_the_process_is_ours_and_it_exits_1(petct, shell, tmp_path: Path):
    files, overrides, line = spoil("no checkpoint", petct, tmp_path, tmp_path)
    done = shell(tmp_path, "monai.bundle", "run", "--config_file", *files, **overrides)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith(line), done.stderr
    assert "Traceback" not in done.stderr


def test_medseg_run_names_a_wrong_parent_too(petct, shell: Callable, tmp_path: Path):
    overrides = petct.training(tmp_path / "runs", **{"trian#trainer#max_epochs": 3})
    done = shell(tmp_path, "medseg", "run", "head_neck_petct_segmentation", "train", **overrides)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: override --trian#trainer#max_epochs: no such key")
    assert "--train#trainer#max_epochs" in last
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["no_such_bundle", "train"], "error: bundle: no_such_bundle is neither"),
        (["head_neck_petct_segmentation", "tran"], "error: workflow: found 'tran', expected one of train"),
        (["head_neck_petct_segmentation", "train", "--seed"], "error: override --seed: expected pairs"),
        (["head_neck_petct_segmentation", "train", "max_epochs=3"], "error: override max_epochs=3: expected pairs"),
    ],
)
def test_medseg_run_refuses_in_one_line(words: list[str], line: str):
    from click.testing import CliRunner

    from medseg.cli import main

    result = CliRunner().invoke(main, ["run", *words])
    assert result.exit_code == 1
    assert result.stderr.strip().splitlines()[-1].startswith(line)
