"""Ensembles, flips, chosen thresholds and cleaned masks, as options of the bundles: the same in every workflow."""

import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from monai.bundle import ConfigParser
from monai.inferers import SimpleInferer, SliceInferer
from monai.transforms import Activations, KeepLargestConnectedComponent

from medseg.data import write_slices
from medseg.engines import CheckedWorkflow, load_checkpoint, save_checkpoint, show_error
from medseg.experiments import run_bundle
from medseg.transforms import DenseCRF

LARGEST = {"_target_": "KeepLargestConnectedComponentd", "keys": "pred"}


@pytest.fixture
def run_dir(trained, tmp_path: Path) -> Path:
    """A copy of a run, with a second checkpoint that is another network."""
    copy = Path(shutil.copytree(trained.run_dir, tmp_path / "runs/tiny/00"))
    weights = torch.load(copy / "model_best.pt", weights_only=True)["model"]
    torch.manual_seed(1)
    changed = {k: v + 0.1 * torch.randn_like(v) if v.is_floating_point() else v for k, v in weights.items()}
    changed |= {k: v for k, v in weights.items() if "running" in k}
    torch.save({"model": changed}, copy / "other.pt")
    return copy


def workflow(bundle, run_dir: Path, *names: str, **more) -> CheckedWorkflow:
    return CheckedWorkflow(
        bundle.files(*names),
        workflow_type="infer",
        **bundle.training(run_dir.parent.parent, run_dir=str(run_dir), **more),
    )


def run(flow: CheckedWorkflow) -> CheckedWorkflow:
    flow.initialize()
    flow.run()
    flow.finalize()
    return flow


def network_of(bundle, checkpoint: Path) -> torch.nn.Module:
    config = ConfigParser.load_config_file(bundle.files("inference.yaml")[0])
    network = ConfigParser(config | {"network_channels": bundle.channels}).get_parsed_content("network_def")
    load_checkpoint(checkpoint, network)
    return network.eval()


@torch.no_grad()
def test_an_evaluation_of_two_checkpoints_and_flips_has_the_mean_of_their_probabilities(trained, run_dir: Path):
    files = [run_dir / "model_best.pt", run_dir / "other.pt"]
    flow = workflow(
        trained.bundle, run_dir, "train.yaml", "evaluate.yaml", checkpoint=[str(f) for f in files], flips=[1]
    )
    flow.initialize()
    image = flow.dataset[0]["image"][None]
    sees = SliceInferer(roi_size=(-1, -1), spatial_dim=2) if trained.bundle.name.startswith("head") else SimpleInferer()
    activation = Activations(sigmoid=True) if trained.bundle.name.startswith("head") else Activations(softmax=True)
    expected = 0
    for file in files:
        network = network_of(trained.bundle, file)
        straight, mirrored = sees(image, network), sees(image.flip(3), network).flip(3)
        expected = expected + activation(straight[0]) / 4 + activation(mirrored[0]) / 4
    predictor = flow.parser.get_parsed_content("predictor").eval()
    found = activation(flow.inferer(image, predictor)[0])
    assert (expected.amax() - expected.amin()) > 0.01
    torch.testing.assert_close(torch.as_tensor(found), torch.as_tensor(expected), rtol=1e-4, atol=1e-5)
    flow.run()
    assert len(pd.read_csv(run_dir / "scores.csv"))


@torch.no_grad()
def speckled(bundle, run_dir: Path) -> dict:
    """Overrides with which the network that was not trained leaves many pieces."""
    if not bundle.name.startswith("head"):
        return {}
    flow = workflow(bundle, run_dir, "train.yaml", "evaluate.yaml")
    flow.initialize()
    p = network_of(bundle, run_dir / "other.pt")(flow.dataset[0]["image"][None, ..., 6]).sigmoid()
    return {"threshold": float(p.quantile(0.8))}


def test_an_evaluation_scores_the_mask_that_is_cleaned_as_a_whole(trained, run_dir: Path):
    more = {"checkpoint": str(run_dir / "other.pt"), **speckled(trained.bundle, run_dir)}
    tables, truths = [], []
    for clean in ([], [LARGEST]):
        flow = run(workflow(trained.bundle, run_dir, "train.yaml", "evaluate.yaml", clean=clean, **more))
        (case,) = flow.parser.get_parsed_content("evaluator").state.output
        assert np.array_equal(case["pred"].affine, case["image"].affine)  # a `clean` may ask for mm³
        assert len(np.unique(case["image"].affine)) > 2
        tables.append(pd.read_csv(run_dir / "scores.csv"))
        truths.append({p.stem: np.load(p)["label"] for p in (run_dir / "pictures").iterdir()})
    raw, cleaned = (t[t["level"] == "case"].set_index(["case", "label"]) for t in tables)
    assert ((cleaned["tp"] + cleaned["fp"]) <= (raw["tp"] + raw["fp"])).all()
    assert (cleaned["tp"] + cleaned["fp"]).sum() < (raw["tp"] + raw["fp"]).sum()
    slices = tables[1][tables[1]["level"] == "slice"].groupby(["case", "label"])[["tp", "fp"]].sum()
    assert (slices == cleaned[["tp", "fp"]].loc[slices.index]).all(axis=None)
    assert truths[0].keys() == truths[1].keys()


def test_an_inference_cleans_the_mask_that_it_writes(trained, run_dir: Path, tmp_path: Path):
    masks, more = [], speckled(trained.bundle, run_dir)
    for name, options in (("raw", []), ("clean", ["--clean", json.dumps([LARGEST])])):
        words = [
            part
            for key, value in trained.bundle.predicting(tmp_path / name, run_dir / "other.pt", **more).items()
            for part in (f"--{key}", str(value))
        ]
        run_bundle(trained.bundle.name, "inference", [*words, *options])
        masks.append({p.name: np.asarray(nib.load(p).dataobj) for p in (tmp_path / name).iterdir()})
    assert masks[0].keys() == masks[1].keys()
    for name, mask in masks[0].items():
        expected = KeepLargestConnectedComponent()(torch.from_numpy(mask.astype(np.float32))[None])[0]
        np.testing.assert_array_equal(masks[1][name], expected.numpy())
        assert 0 < expected.count_nonzero() < np.count_nonzero(mask)


def choose(petct, run_dir: Path, **more) -> dict:
    run(workflow(petct, run_dir, "train.yaml", "evaluate.yaml", "choose_threshold.yaml", **more))
    return json.loads((run_dir / "threshold.json").read_text())


def untrained(bundle, folder: Path) -> Path:
    """Make a run folder as a training leaves it, with a network that was not trained."""
    folder.mkdir(parents=True)
    (folder / "run.json").write_text('{"test_set_scored": []}')
    config = ConfigParser.load_config_file(bundle.files("inference.yaml")[0])
    torch.manual_seed(0)
    network = ConfigParser(config | {"network_channels": bundle.channels}).get_parsed_content("network_def")
    save_checkpoint(folder / "model_best.pt", {"model": network})
    return folder


@pytest.fixture
def petct_run(petct, tmp_path: Path) -> Path:
    return untrained(petct, tmp_path / "runs/tiny/00")


def test_an_evaluation_scores_what_an_inference_writes(hippocampus, tmp_path: Path):
    run_dir = untrained(hippocampus, tmp_path / "runs/tiny/00")
    run(workflow(hippocampus, run_dir, "train.yaml", "evaluate.yaml"))
    images = {"dataset_dir": str(hippocampus.dataset / "imagesTr")}
    words = hippocampus.predicting(tmp_path / "masks", run_dir / "model_best.pt", **images)
    run(CheckedWorkflow(hippocampus.files("inference.yaml"), workflow_type="infer", **words))
    pictures = list((run_dir / "pictures").iterdir())
    assert pictures
    for file in pictures:
        scored = np.load(file)
        written, image = (
            np.asarray(nib.load(folder / f"{file.stem}_0000.nii.gz").dataobj)[..., scored["slices"]].transpose(2, 0, 1)
            for folder in (tmp_path / "masks", hippocampus.dataset / "imagesTr")
        )
        np.testing.assert_array_equal(scored["pred"], written)
        assert len(np.unique(written)) > 1
        assert np.corrcoef(scored["image"][0].ravel(), image.ravel())[0, 1] > 0.999


def test_a_chosen_threshold_scores_in_the_evaluation_what_the_choice_said(petct, petct_run: Path):
    content = choose(petct, petct_run)
    splits = json.loads((petct.dataset / "splits.json").read_text())
    assert content["cases"] == sorted(splits["folds"][0]["val"])
    assert content["value"] >= content["value_at_0.5"]
    assert content["threshold"] != 0.5
    curve = dict(map(tuple, content["curve"]))
    means = {}
    for threshold in ("chosen", 0.5, str(petct_run / "threshold.json")):
        run(workflow(petct, petct_run, "train.yaml", "evaluate.yaml", threshold=threshold))
        scores = pd.read_csv(petct_run / "scores.csv")
        means[threshold] = scores[scores["level"] == "case"]["dice"].mean()
    assert means["chosen"] == pytest.approx(content["value"], abs=1e-9)
    assert means[0.5] == pytest.approx(curve[0.5], abs=1e-9)
    assert means["chosen"] == means[str(petct_run / "threshold.json")]


def refusal(capsys, flow: CheckedWorkflow) -> str:
    with pytest.raises(Exception) as caught:  # noqa: PT011 (MONAI wraps it; show_error finds ours)
        run(flow)
    capsys.readouterr()
    show_error(type(caught.value), caught.value, None)
    return capsys.readouterr().err


def test_no_threshold_is_chosen_on_the_test_set_unlocked_or_not(petct, petct_run: Path, capsys):
    names = ("train.yaml", "evaluate.yaml", "choose_threshold.yaml")
    for more in ({}, {"unlock_test_set": True}):
        line = refusal(capsys, workflow(petct, petct_run, *names, split="test", **more))
        assert line.startswith("error: split: found 'test', expected val")
    assert json.loads((petct_run / "run.json").read_text()) == {"test_set_scored": []}
    assert not (petct_run / "threshold.json").exists()


def test_a_chosen_threshold_is_refused_for_other_flips_and_where_none_was_chosen(petct, petct_run: Path, capsys):
    evaluate = ("train.yaml", "evaluate.yaml")
    assert "no such file; choose a threshold" in refusal(
        capsys, workflow(petct, petct_run, *evaluate, threshold="chosen")
    )
    choose(petct, petct_run, flips=[0])
    line = refusal(capsys, workflow(petct, petct_run, *evaluate, threshold="chosen"))
    assert "chosen for another flips" in line
    run(workflow(petct, petct_run, *evaluate, threshold="chosen", flips=[0]))


CRF = {"_target_": "medseg.transforms.DenseCRFd", "keys": "pred", "appearance_intensity": [0.2, 2.0]}


@torch.no_grad()
def test_an_evaluation_refines_the_volume_as_an_inference_does(petct, petct_run: Path):
    names = ("train.yaml", "evaluate.yaml")
    flow = workflow(petct, petct_run, *names)
    flow.initialize()
    network = network_of(petct, petct_run / "model_best.pt")
    refined = {}
    for item in flow.dataset:
        image = item["image"].as_tensor()
        slices = torch.stack([network(image[None, ..., i]).sigmoid()[0] for i in range(image.shape[-1])], -1)
        refined[item["case"]] = DenseCRF([0.2, 2.0], spacing=petct.inference["spacing"])(slices, image)
    threshold = float(torch.cat([p.flatten() for p in refined.values()]).quantile(0.8))
    run(workflow(petct, petct_run, *names, refine=[CRF], threshold=threshold))
    scores = pd.read_csv(petct_run / "scores.csv").query("level == 'case'").set_index("case")
    found = scores[["tp", "fp"]].sum(axis=1).to_dict()
    assert sum(found.values()) > 0
    assert found == pytest.approx({case: int((p >= threshold).sum()) for case, p in refined.items()}, abs=2)


def test_an_evaluation_takes_the_cases_of_the_fold_trained_on(petct, petct_run: Path, tmp_path: Path):
    dataset = Path(shutil.copytree(petct.dataset, tmp_path / "dataset"))
    splits = json.loads((dataset / "splits.json").read_text())
    (first,) = splits["folds"]
    second = {"train": [*first["train"][1:], *first["val"]], "val": first["train"][:1]}
    (dataset / "splits.json").write_text(json.dumps(splits | {"folds": [first, second]}))
    write_slices(dataset, fold=1)
    content = choose(petct, petct_run, dataset_dir=str(dataset))
    assert content["cases"] == second["val"]
    run(workflow(petct, petct_run, "train.yaml", "evaluate.yaml", dataset_dir=str(dataset), threshold="chosen"))
    assert set(pd.read_csv(petct_run / "scores.csv")["case"]) == set(second["val"])


def test_an_inference_takes_the_chosen_threshold_and_a_crf(petct, petct_run: Path, tmp_path: Path, capsys):
    choose(petct, petct_run, refine=[CRF])

    def inference(**crf) -> CheckedWorkflow:
        words = petct.predicting(
            tmp_path / "masks", petct_run / "model_best.pt", threshold="chosen", refine=[CRF | crf]
        )
        return CheckedWorkflow(petct.files("inference.yaml"), workflow_type="infer", **words)

    assert "chosen for another refine" in refusal(capsys, inference(appearance_intensity=[0.2, 1.0]))
    run(inference())
    (file,) = (tmp_path / "masks").iterdir()
    assert set(np.unique(np.asarray(nib.load(file).dataobj))) <= {0, 1}
