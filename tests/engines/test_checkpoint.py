"""Checkpoints are whole, and what is none is refused in one line."""

import pytest
import torch
import yaml
from ignite.engine import Engine
from monai.bundle import ConfigWorkflow
from monai.data import DataLoader

from medseg.engines import Checkpoints, load_checkpoint, load_ensemble, save_checkpoint, segmentation_trainer
from medseg.errors import CheckpointError, ConfigError, own_error


def network(seed=0, width=3):
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Conv2d(1, width, 3), torch.nn.BatchNorm2d(width))


def test_weights_and_values_come_back(tmp_path):
    saved, other = network(1), network(2)
    save_checkpoint(tmp_path / "a.pt", {"model": saved}, iteration=7, score=0.5)
    content = load_checkpoint(tmp_path / "a.pt", other)
    assert (content["iteration"], content["score"]) == (7, 0.5)
    assert all(torch.equal(a, b) for a, b in zip(saved.state_dict().values(), other.state_dict().values(), strict=True))


def test_a_bare_state_dict_is_taken(tmp_path):
    torch.save(network(1).state_dict(), tmp_path / "a.pt")
    other = network(2)
    load_checkpoint(tmp_path / "a.pt", other)
    assert torch.equal(other[0].weight, network(1)[0].weight)


class Malicious:
    def __reduce__(self):
        return (print, ("executed",))


def bad_files(folder):
    (folder / "text.pt").write_text("not a checkpoint")
    (folder / "empty.pt").write_bytes(b"")
    save_checkpoint(folder / "whole.pt", {"model": network()})
    (folder / "cut.pt").write_bytes((folder / "whole.pt").read_bytes()[:500])
    torch.save({"model": network().state_dict(), "extra": Malicious()}, folder / "code.pt")
    torch.save([1, 2], folder / "list.pt")
    save_checkpoint(folder / "other.pt", {"model": network(width=4)})
    save_checkpoint(folder / "optimizer.pt", {}, iteration=1)
    return ["text", "empty", "cut", "code", "list", "other", "optimizer", "absent"]


def test_what_is_no_checkpoint_is_refused_in_one_line_and_changes_nothing(tmp_path, capsys):
    for name in bad_files(tmp_path):
        target = network(5)
        with pytest.raises(CheckpointError) as caught:
            load_checkpoint(tmp_path / f"{name}.pt", target)
        assert f"{name}.pt" in str(caught.value)
        assert "\n" not in str(caught.value)
        assert torch.equal(target[0].weight, network(5)[0].weight)
    assert "executed" not in capsys.readouterr().out


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    save_checkpoint(tmp_path / "a.pt", {"model": network(1)})
    before = (tmp_path / "a.pt").read_bytes()

    def broken(content, file):
        file.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", broken)
    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(tmp_path / "a.pt", {"model": network(2)})
    assert (tmp_path / "a.pt").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.pt"]


def test_one_checkpoint_is_the_network_and_a_list_is_an_ensemble_of_copies(tmp_path):
    for seed in (1, 2):
        save_checkpoint(tmp_path / f"{seed}.pt", {"model": network(seed)})
    target = network(3).eval()
    image = torch.randn(2, 1, 8, 8)
    assert load_ensemble(tmp_path / "1.pt", target, "sigmoid") is target
    alone = target(image)
    assert torch.equal(alone, network(1).eval()(image))

    both = load_ensemble([tmp_path / "1.pt", str(tmp_path / "2.pt")], target, "sigmoid").eval()
    expected = (alone.sigmoid() + network(2).eval()(image).sigmoid()) / 2
    torch.testing.assert_close(both(image).sigmoid(), expected)
    assert torch.equal(target(image), alone)
    vote = load_ensemble([tmp_path / "1.pt", tmp_path / "2.pt"], target, "softmax", mode="vote", weights=[2, 1])
    assert (vote.mode, vote.weights) == ("vote", [2, 1])


def test_a_list_that_is_no_ensemble_is_refused(tmp_path):
    save_checkpoint(tmp_path / "1.pt", {"model": network(1)})
    with pytest.raises(ConfigError, match="found 0, expected one or more"):
        load_ensemble([], network(), "sigmoid")
    with pytest.raises(ConfigError, match="expected each file once"):
        load_ensemble([tmp_path / "1.pt", tmp_path / ".." / tmp_path.name / "1.pt"], network(), "sigmoid")
    with pytest.raises(CheckpointError, match=r"2\.pt: no such file"):
        load_ensemble([tmp_path / "1.pt", tmp_path / "2.pt"], network(), "sigmoid")


CONFIG = {
    "windows": [{"center": 70, "width": 200}],
    "flips": [],
    "folder": "a",
    "select": ["$print(@windows, @folder)"],
    "preprocessing": "$@select",
    "predictor": "$medseg.engines.load_ensemble(@checkpoint, @network, 'sigmoid')",
    "initialize": ["@predictor"],
    "run": [],
    "imports": ["$import medseg"],
}


@pytest.mark.parametrize("many", [False, True])
def test_images_that_come_otherwise_than_in_the_training_are_refused(many, tmp_path, capsys):
    save_checkpoint(tmp_path / "a.pt", {"model": network(1)})
    other = {"windows": [{"center": 60, "width": 200}]}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    (tmp_path / "metadata.json").write_text("{}")

    def initialize(overrides):
        file = str(tmp_path / "a.pt")
        config = CONFIG | {"checkpoint": [file] if many else file, "network": network(2)} | overrides
        (tmp_path / "predict.yaml").write_text("{}")
        workflow = ConfigWorkflow(str(tmp_path / "predict.yaml"), str(tmp_path / "metadata.json"), logging_file=False)
        workflow.parser.set(config)
        workflow.initialize()

    initialize({"folder": "b", "flips": [0]})  # a path, and what the images do not depend on, may differ
    initialize({"windows": ({"center": 70.0, "width": 200},)})
    with pytest.raises(RuntimeError) as caught:
        initialize(other)
    assert str(own_error(caught.value)).startswith(f"windows: found {other['windows']}, but {tmp_path / 'a.pt'} was")
    (tmp_path / "config.yaml").write_text("- of another program")
    initialize(other)
    (tmp_path / "config.yaml").unlink()
    initialize(other)


def train(tmp_path, iterations, snapshots, lr_scheduler=None, model=None):
    """A trainer that changes its model by one at each iteration."""
    model = model or network(1)

    def step(engine, batch):
        model[0].bias.data.add_(1)
        if lr_scheduler is not None:
            lr_scheduler.step()

    trainer = Engine(step)
    parts = {"model": model} | ({} if lr_scheduler is None else {"lr_scheduler": lr_scheduler})
    Checkpoints(tmp_path, trainer, parts, snapshots, statistics={"mean": [1.0]}).attach(None)
    trainer.run(range(iterations), max_epochs=1)


def snapshots_in(folder):
    return sorted(int(file.stem.rpartition("_")[2]) for file in folder.glob("model_snapshot_*.pt"))


def test_snapshots_are_kept_at_the_iterations_that_are_given(tmp_path):
    train(tmp_path, 6, [2, 5])
    assert snapshots_in(tmp_path) == [2, 5]
    for iteration in (2, 5):
        taken = network(2)
        content = load_checkpoint(tmp_path / f"model_snapshot_{iteration}.pt", taken)
        torch.testing.assert_close(taken[0].bias, network(1)[0].bias + iteration)
        assert content["iteration"] == iteration
        assert content["statistics"] == {"mean": [1.0]}
        assert set(content) == {"model", "statistics", "iteration", "epoch"}


def test_snapshots_at_restarts_are_the_ends_of_the_cycles(tmp_path):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], 0.1)
    optimizer.step()
    schedule = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, T_0=3, T_mult=2)
    train(tmp_path, 12, "restarts", schedule)
    assert snapshots_in(tmp_path) == [3, 9]  # cycles of 3 and 6; the third one is not at its end


def test_without_snapshots_there_are_none(tmp_path):
    train(tmp_path, 3, ())
    assert [file.name for file in tmp_path.iterdir()] == ["model_last.pt"]


@pytest.mark.parametrize("snapshots", ["restarts", "every"])
def test_snapshots_at_restarts_need_restarts(tmp_path, snapshots):
    with pytest.raises(ConfigError, match=f"snapshots: found '{snapshots}' with NoneType"):
        train(tmp_path, 1, snapshots)


def test_a_trainer_keeps_snapshots_of_the_averaged_model(tmp_path):
    torch.manual_seed(0)
    model = torch.nn.Conv2d(1, 1, 3, padding=1)
    items = [{"image": torch.randn(1, 6, 6), "label": torch.ones(1, 6, 6)} for _ in range(4)]
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, T_0=2)
    segmentation_trainer(
        "cpu",
        3,
        DataLoader(items, batch_size=2),
        model,
        optimizer,
        torch.nn.BCEWithLogitsLoss(),
        tmp_path,
        lr_scheduler=schedule,
        ema_momentum=0.5,
        snapshots="restarts",
    ).run()
    assert snapshots_in(tmp_path) == [2, 4, 6]
    last = torch.load(tmp_path / "model_last.pt", weights_only=True)
    snapshot = torch.load(tmp_path / "model_snapshot_6.pt", weights_only=True)
    assert torch.equal(snapshot["model"]["weight"], last["model"]["weight"])
    assert not torch.equal(snapshot["model"]["weight"], last["trained_model"]["weight"])
