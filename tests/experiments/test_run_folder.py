"""A run folder is nobody else's, holds its record, and keeps the test set locked."""

import json
import os
import shlex
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from monai.bundle import ConfigWorkflow

from medseg.errors import ConfigError, DatasetError
from medseg.experiments import latest_run, new_run, record_run, unlock_split


def test_runs_are_numbered_and_never_overwritten(tmp_path: Path):
    first = new_run(tmp_path, "unet")
    (first / "metrics.csv").write_text("kept")
    second = new_run(tmp_path, "unet")
    assert [first.name, second.name] == ["00", "01"]
    assert list(second.iterdir()) == []
    assert (first / "metrics.csv").read_text() == "kept"
    assert new_run(tmp_path, "other").name == "00"
    # the number of a run that was removed from the middle is not given out again
    first.joinpath("metrics.csv").unlink()
    first.rmdir()
    assert new_run(tmp_path, "unet").name == "02"


@given(numbers=st.sets(st.integers(0, 130), max_size=5), others=st.sets(st.sampled_from(["notes", "x1", ".00"])))
def test_the_next_run_comes_after_the_last_one(tmp_path_factory: pytest.TempPathFactory, numbers, others):
    root = tmp_path_factory.mktemp("runs")
    for name in [f"{number:02d}" for number in numbers] + sorted(others):
        (root / "unet" / name).mkdir(parents=True)
    assert int(new_run(root, "unet").name) == max(numbers, default=-1) + 1


def test_runs_started_at_once_get_a_folder_each(tmp_path: Path):
    with ThreadPoolExecutor(8) as pool:
        folders = list(pool.map(lambda _: new_run(tmp_path, "unet"), range(24)))
    assert sorted(folder.name for folder in folders) == [f"{number:02d}" for number in range(24)]


def test_the_record_says_what_the_run_was(tmp_path: Path, write_dataset):
    dataset = write_dataset(tmp_path / "dataset")
    run = new_run(tmp_path, "unet")
    record_run(run, dataset.root, seed=11, channel_names=["CT"], labels={"background": 0})
    record = json.loads((run / "run.json").read_text())
    assert record["seed"] == 11
    assert record["dataset_sha256"] == dataset.dataset_hash()
    assert record["labels"] == {"background": 0}
    assert record["channel_names"] == ["CT"]
    assert record["versions"]["torch"] == version("torch")
    assert record["versions"]["medseg"] == version("medseg")
    assert shlex.split(record["command"]) == sys.orig_argv
    assert record["test_set_scored"] == []
    assert not (run / "config.yaml").exists()  # no workflow runs, so there is no config to keep
    # no account and no computer
    for word in (os.uname().nodename, str(Path.home())):
        assert word not in json.dumps(record["machine"])


def test_the_record_of_another_dataset_differs(tmp_path: Path, write_dataset):
    hashes = []
    for number, patients in enumerate((("P0", "P1"), ("P0", "P2"))):
        dataset = write_dataset(tmp_path / f"dataset{number}", patients=patients)
        run = new_run(tmp_path, "unet")
        record_run(run, dataset.root, seed=0)
        hashes.append(json.loads((run / "run.json").read_text())["dataset_sha256"])
    assert hashes[0] != hashes[1]


def test_the_config_is_kept_with_its_overrides(tmp_path: Path, write_dataset):
    dataset = write_dataset(tmp_path / "dataset")
    config = {
        "imports": ["$import medseg"],
        "learning_rate": 0.1,
        "steps": {"sizes": [1, 2]},
        "network": {"_target_": "torch.nn.Identity"},
        "trainer": {"rate": "@learning_rate", "sizes": "@steps#sizes", "network": "@network", "folder": "@run_dir"},
        "run_dir": "$medseg.experiments.new_run(@output_dir, 'unet')",
        "output_dir": str(tmp_path),
        "initialize": [f"$medseg.experiments.record_run(@run_dir, dataset_dir={str(dataset.root)!r}, seed=3)"],
    }
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(config))
    (tmp_path / "metadata.json").write_text('{"version": "1"}')
    workflow = ConfigWorkflow(str(tmp_path / "train.yaml"), **{"learning_rate": 0.7, "steps#sizes": [3]})
    workflow.initialize()
    kept = yaml.safe_load((tmp_path / "unet/00/config.yaml").read_text())
    trainer = {"rate": 0.7, "sizes": [3], "network": "@network", "folder": "@run_dir"}  # values, but not code
    assert kept == config | {"learning_rate": 0.7, "steps": {"sizes": [3]}, "trainer": trainer}


def test_what_is_no_dataset_is_not_recorded(tmp_path: Path):
    with pytest.raises(DatasetError, match=r"no dataset\.json in it"):
        record_run(new_run(tmp_path, "unet"), tmp_path, seed=0)
    assert list((tmp_path / "unet/00").iterdir()) == []


def test_a_name_that_is_a_number_is_a_name(tmp_path: Path):
    assert new_run(tmp_path, 17) == latest_run(tmp_path, 17) == tmp_path / "17/00"


def test_a_folder_that_has_a_record_is_refused_and_keeps_it(run_dir: Path, write_dataset, tmp_path: Path):
    before = (run_dir / "run.json").read_bytes()
    with pytest.raises(ConfigError, match="holds a run already, expected a new folder"):
        record_run(run_dir, tmp_path / "dataset", seed=1)
    assert (run_dir / "run.json").read_bytes() == before
    with pytest.raises(ConfigError, match="absent is no folder, expected an empty one"):
        record_run(tmp_path / "absent", tmp_path / "dataset", seed=1)


@pytest.fixture
def run_dir(tmp_path: Path, write_dataset) -> Path:
    run = new_run(tmp_path, "unet")
    record_run(run, write_dataset(tmp_path / "dataset").root, seed=0)
    return run


def scored(run_dir: Path) -> list:
    return json.loads((run_dir / "run.json").read_text())["test_set_scored"]


@pytest.mark.parametrize("split", ["train", "val"])
def test_train_and_val_are_open(run_dir: Path, split: str):
    before = (run_dir / "run.json").read_bytes()
    assert unlock_split(run_dir, split) == split
    assert unlock_split(run_dir, split, unlock_test_set=True) == split
    assert (run_dir / "run.json").read_bytes() == before


@pytest.mark.parametrize("word", [False, "False", "no", 0, "yes", 1, None])
def test_the_test_set_stays_locked_without_the_word(run_dir: Path, word):
    with pytest.raises(ConfigError, match=r"the test set is locked.*--unlock_test_set True"):
        unlock_split(run_dir, "test", word)
    assert scored(run_dir) == []


def test_each_look_at_the_test_set_is_recorded(run_dir: Path, monkeypatch: pytest.MonkeyPatch):
    record = json.loads((run_dir / "run.json").read_text())
    for looks in (1, 2):
        monkeypatch.setattr("sys.orig_argv", ["python", "-m", "monai.bundle", "look", f"number {looks}"])
        assert unlock_split(run_dir, "test", True) == "test"
        assert len(scored(run_dir)) == looks
    assert [entry["command"] for entry in scored(run_dir)] == [
        "python -m monai.bundle look 'number 1'",
        "python -m monai.bundle look 'number 2'",
    ]
    assert all(entry["when"].endswith("+00:00") for entry in scored(run_dir))
    after = json.loads((run_dir / "run.json").read_text())
    assert after | {"test_set_scored": []} == record  # nothing else changed


def test_a_look_that_was_recorded_meanwhile_stays_on_record(run_dir: Path, monkeypatch: pytest.MonkeyPatch):
    @contextmanager
    def in_turn(folder: Path):
        record = json.loads((folder / "run.json").read_text())
        (folder / "run.json").write_text(json.dumps(record | {"test_set_scored": [{"when": "", "command": "other"}]}))
        yield

    monkeypatch.setattr("medseg.experiments.run_folder.in_turn", in_turn)
    unlock_split(run_dir, "test", True)
    assert [entry["command"] == "other" for entry in scored(run_dir)] == [True, False]


def test_other_splits_and_other_folders_are_refused(run_dir: Path, tmp_path: Path):
    with pytest.raises(ConfigError, match="split: found 'tset', expected train, val or test"):
        unlock_split(run_dir, "tset", True)
    with pytest.raises(ConfigError, match=r"has no run\.json"):
        unlock_split(tmp_path, "val")
