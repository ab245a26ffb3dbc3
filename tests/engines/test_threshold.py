"""The threshold is chosen by the validation cases alone, and is read where it was chosen for."""

import json

import numpy as np
import pytest
import torch
from ignite.engine import Engine
from monai.transforms import AsDiscrete, Lambdad, MedianSmoothd

from medseg import metrics
from medseg.data import DatasetFolder
from medseg.data.folder import write_case, write_index
from medseg.engines import ChooseThreshold, read_threshold, save_checkpoint
from medseg.errors import CheckpointError, ConfigError, DatasetError
from medseg.transforms import DenseCRFd

CASES = ["a", "b", "c", "d", "e", "f"]
SHAPE = (1, 8, 6)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    from monai.data import MetaTensor

    root = tmp_path_factory.mktemp("dataset") / "dataset"
    labels = {"background": 0, "tumor": 1}
    rows = []
    for case in CASES:
        image = MetaTensor(torch.rand(1, 4, 4, 4), affine=torch.eye(4))
        label = MetaTensor(torch.zeros(1, 4, 4, 4, dtype=torch.uint8), affine=torch.eye(4))
        label[0, 1, 1, 1] = 1
        rows.append({"patient": case, "stratum": "", **write_case(root, case, image, label, labels)})
    write_index(root, name="dots", channel_names=["MRI"], labels=labels, rows=rows, manifest={})
    DatasetFolder(root).write_split({"folds": [{"train": ["a", "b"], "val": ["c", "d", "e"]}], "test": ["f"]})
    return root


@pytest.fixture
def run_dir(tmp_path):
    save_checkpoint(tmp_path / "model_best.pt", {"model": torch.nn.Linear(1, 1)})
    return tmp_path


def slices(seed=0, count=4):
    """Probabilities that are too low, in slices of three cases; the third one has no truth."""
    generator = torch.Generator().manual_seed(seed)
    items = []
    for case in ("c", "d", "e"):
        for _ in range(count):
            label = (torch.rand(SHAPE, generator=generator) < (0.0 if case == "e" else 0.3)).float()
            pred = (0.35 * label + 0.4 * torch.rand(SHAPE, generator=generator)).clamp(0, 1)
            items.append((case, pred, label))
    return items


def run(handler, items, batch=5):
    """Run a handler on batches, as an evaluator that has decollated them."""

    def step(engine, chunk):
        engine.state.batch = [{"case": case} for case, _, _ in chunk]
        return [{"pred": pred, "label": label} for _, pred, label in chunk]

    engine = Engine(step)
    handler.attach(engine)
    engine.run([items[i : i + batch] for i in range(0, len(items), batch)])


def brute(items, threshold, beta=1.0):
    scores = []
    for case in sorted({case for case, _, _ in items}):
        pred = torch.stack([AsDiscrete(threshold=threshold)(p) for c, p, _ in items if c == case])
        label = torch.stack([truth for c, _, truth in items if c == case])
        counts = metrics.confusion_counts(pred.flatten()[None, None].bool(), label.flatten()[None, None].bool())
        scores.append(float(metrics.f_beta(counts, beta)))
    return float(np.mean(scores))


@pytest.mark.parametrize("beta", [1.0, 2.0])
def test_it_is_the_best_of_all_thresholds_tried_one_by_one(dataset, run_dir, capsys, beta):
    items = slices()
    run(ChooseThreshold(run_dir, dataset, run_dir / "model_best.pt", beta=beta), items)
    content = json.loads((run_dir / "threshold.json").read_text())
    assert len(content["curve"]) == 199
    for threshold, score in content["curve"]:
        assert score == pytest.approx(brute(items, threshold, beta), abs=1e-12)
    scores = dict(map(tuple, content["curve"]))
    assert content["value"] == max(scores.values()) == scores[content["threshold"]]
    assert content["value_at_0.5"] == scores[0.5] < content["value"]
    assert content["threshold"] < 0.5
    assert content["cases"] == ["c", "d", "e"]
    assert "without truth" in content["empty"]
    assert f"threshold {content['threshold']}" in capsys.readouterr().out


def test_batches_and_the_order_of_slices_are_nothing(dataset, run_dir):
    texts = []
    for items, batch in ((slices(), 5), (slices()[::-1], 1)):
        run(ChooseThreshold(run_dir, dataset, run_dir / "model_best.pt"), items, batch)
        texts.append((run_dir / "threshold.json").read_text())
    assert texts[0] == texts[1]


def test_a_threshold_on_the_grid_takes_its_own_probability(dataset, run_dir):
    """p >= threshold is yes, as in AsDiscrete; so 0.3 separates 0.3 from 0.2999, and no threshold above does."""
    label = torch.zeros(SHAPE)
    label[0, :4] = 1
    pred = torch.where(label > 0, torch.tensor(0.3), torch.tensor(0.2999))
    run(ChooseThreshold(run_dir, dataset, run_dir / "model_best.pt"), [("c", pred, label)])
    content = json.loads((run_dir / "threshold.json").read_text())
    assert content["threshold"] == 0.3
    assert content["value"] == 1.0
    assert torch.equal(AsDiscrete(threshold=0.3)(pred), label)


def test_of_thresholds_as_good_the_one_nearest_to_a_half_is_taken(dataset, run_dir):
    label = torch.zeros(SHAPE)
    label[0, :4] = 1
    for low, high, expected in ((0.1, 0.9, 0.5), (0.1, 0.4, 0.4), (0.601, 0.9, 0.605)):
        run(ChooseThreshold(run_dir, dataset, run_dir / "model_best.pt"), [("c", label * (high - low) + low, label)])
        assert json.loads((run_dir / "threshold.json").read_text())["threshold"] == expected


@pytest.mark.parametrize("split", ["test", "train", "all"])
def test_another_split_is_refused(dataset, run_dir, split):
    with pytest.raises(ConfigError, match=f"split: found '{split}', expected val"):
        ChooseThreshold(run_dir, dataset, run_dir / "model_best.pt", split=split)


@pytest.mark.parametrize("case", ["a", "f", "stranger"])
def test_a_case_of_another_part_is_refused_whatever_the_split_is_called(dataset, run_dir, case):
    items = [*slices(), (case, torch.rand(SHAPE), torch.ones(SHAPE))]
    with pytest.raises(DatasetError, match=f"case {case}: is not of the validation set"):
        run(ChooseThreshold(run_dir, dataset, run_dir / "model_best.pt"), items)
    assert not (run_dir / "threshold.json").exists()


@pytest.mark.parametrize(
    ("pred", "label", "error", "line"),
    [
        (torch.randn(SHAPE) * 9, torch.ones(SHAPE), ConfigError, "expected probabilities"),
        (torch.full(SHAPE, torch.nan), torch.ones(SHAPE), ConfigError, "expected probabilities"),
        (torch.full((3, 8, 6), 1 / 3), torch.ones(SHAPE), ConfigError, "a softmax have no threshold"),
        (torch.rand(SHAPE), torch.zeros(SHAPE), DatasetError, "no voxel of truth"),
    ],
    ids=["logits", "nan", "softmax", "no truth"],
)
def test_what_gives_no_threshold_is_refused(dataset, run_dir, pred, label, error, line):
    with pytest.raises(error, match=line):
        run(ChooseThreshold(run_dir, dataset, run_dir / "model_best.pt"), [("c", pred, label)])
    assert not (run_dir / "threshold.json").exists()


def test_it_is_read_for_the_prediction_that_it_was_chosen_for(dataset, run_dir, tmp_path):
    best = run_dir / "model_best.pt"
    run(ChooseThreshold(run_dir, dataset, best, flips=[0], mode="mean"), slices())
    value = json.loads((run_dir / "threshold.json").read_text())["threshold"]
    assert read_threshold("chosen", best, flips=[0], mode="mean") == value
    moved = tmp_path / "elsewhere.pt"  # the content counts, not the name
    moved.write_bytes(best.read_bytes())
    assert read_threshold(str(run_dir / "threshold.json"), [moved], flips=(0,), mode="mean") == value
    with pytest.raises(ConfigError, match="chosen for another flips"):
        read_threshold("chosen", best, flips=[], mode="mean")
    save_checkpoint(tmp_path / "other.pt", {"model": torch.nn.Linear(2, 1)})
    for other in (tmp_path / "other.pt", [best, tmp_path / "other.pt"]):
        with pytest.raises(ConfigError, match="chosen for another checkpoint"):
            read_threshold(str(run_dir / "threshold.json"), other, flips=[0], mode="mean")


def test_a_refinement_is_compared_by_its_arguments(dataset, run_dir):
    def crf(**options):
        return [DenseCRFd("pred", **{"appearance_intensity": [0.1, 1.0], **options})]

    best = run_dir / "model_best.pt"
    run(ChooseThreshold(run_dir, dataset, best, refine=crf()), slices())
    assert 0 < read_threshold("chosen", best, refine=crf()) < 1
    others = [
        [],
        crf() * 2,
        crf(appearance_intensity=[0.1, 2.0]),
        crf(iterations=4),
        crf(image_key="ct"),
        [MedianSmoothd("pred", radius=1)],
    ]
    for other in others:
        with pytest.raises(ConfigError, match="chosen for another refine"):
            read_threshold("chosen", best, refine=other)
    with pytest.raises(ConfigError, match="refine: found a function, which a later prediction cannot be compared with"):
        ChooseThreshold(run_dir, dataset, best, refine=[Lambdad("pred", lambda p: p**2)])


def test_numbers_pass_and_the_rest_is_refused(run_dir):
    best = run_dir / "model_best.pt"
    assert [read_threshold(t, "absent.pt") for t in (0, 0.25, 1)] == [0.0, 0.25, 1.0]
    for odd in (-0.1, 1.5, float("nan")):
        with pytest.raises(ConfigError, match="expected a number from 0 to 1"):
            read_threshold(odd, best)
    with pytest.raises(ConfigError, match=r"threshold\.json: no such file"):
        read_threshold("chosen", best)
    for text in ("{}", "[1]", "no json", '{"threshold": 0.4, "prediction": null}'):
        (run_dir / "threshold.json").write_text(text)
        with pytest.raises(ConfigError, match="not a threshold that was chosen"):
            read_threshold("chosen", best)
    (run_dir / "threshold.json").write_text('{"threshold": 0.4, "prediction": {"checkpoint": []}}')
    with pytest.raises(CheckpointError, match=r"absent\.pt: no such file"):
        read_threshold("chosen", run_dir / "absent.pt")
