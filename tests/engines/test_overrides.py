"""A mistyped override is named, with the nearest right one."""

import subprocess
import sys

import pytest
import yaml
from monai.bundle import ConfigWorkflow

from medseg.engines import CheckedWorkflow, check_config_overrides, running_workflow
from medseg.errors import ConfigError

CONFIG = {
    "imports": ["$import medseg"],
    "learning_rate": 0.1,
    "network_def": {"_target_": "torch.nn.Conv2d", "in_channels": 1, "out_channels": 2, "kernel_size": 3},
    "train": {"trainer": {"max_epochs": 2}, "steps": [{"size": 1}]},
    "initialize": ["$medseg.engines.check_overrides()"],
    "run": ["$print('learning rate', @learning_rate, @network_def.bias is not None)"],
}


@pytest.fixture
def config(tmp_path):
    (tmp_path / "metadata.json").write_text("{}")
    file = tmp_path / "train.yaml"
    file.write_text(yaml.safe_dump(CONFIG))
    return file


@pytest.mark.parametrize(
    ("override", "nearest"),
    [
        ("learning_rat", "learning_rate"),
        ("train#trainer#max_epoch", "train#trainer#max_epochs"),
        ("train::trainer::max_epoch", "train#trainer#max_epochs"),
        ("trian#trainer#max_epochs", "train#trainer#max_epochs"),
        ("train#steps#1#size", "train#steps#0#size"),
        ("network_def#kernel", "network_def#kernel_size"),
        ("max_epochs", "train#trainer#max_epochs"),
    ],
)
def test_a_mistyped_override_is_named_with_the_nearest_right_one(config, override, nearest):
    with pytest.raises(ConfigError, match=f"--{override.replace('::', '#')}: no such key.*--{nearest}"):
        check_config_overrides(str(config), {override: 1})


@pytest.mark.parametrize(
    "overrides",
    [
        {"learning_rate": 1},
        {"train#trainer#max_epochs": 1},
        {"train::trainer::max_epochs": 1},
        {"train#steps#0#size": 1},
        {"network_def#bias": False},  # an argument of the class that the file leaves at its default
        {"rate": 0.2, "learning_rate": "$@rate * 2"},  # a new id that another override refers to
        {"rate": 0.2, "train": {"trainer": {"max_epochs": "@rate"}}},
    ],
)
def test_a_right_override_passes(config, overrides):
    check_config_overrides(str(config), overrides)


def test_a_reference_to_a_longer_name_is_none(config):
    with pytest.raises(ConfigError, match="--learning: no such key"):
        check_config_overrides(str(config), {"learning": 1, "train#trainer#max_epochs": "$int(@learning_rate)"})


def test_the_checked_workflow_names_a_wrong_parent_before_it_parses(config):
    with pytest.raises(ConfigError, match="--trian#trainer#max_epochs"):
        CheckedWorkflow(str(config), **{"trian#trainer#max_epochs": 1})
    workflow = CheckedWorkflow(str(config), **{"train#trainer#max_epochs": 7})
    workflow.initialize()
    assert workflow.parser["train#trainer#max_epochs"] == 7


def bundle_run(config, *words):
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "monai.bundle", "run", "--config_file", str(config), *words],
        capture_output=True,
        text=True,
    )


def test_under_monai_bundle_run_the_last_line_is_ours(config):
    done = bundle_run(config, "--learning_rat", "3")
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("error: override --learning_rat: no such key")
    assert "Traceback" not in done.stderr


def test_under_monai_bundle_run_a_misspelt_leaf_is_named_and_a_right_one_taken(config):
    assert "error: override --train#trainer#max_epoch:" in bundle_run(config, "--train#trainer#max_epoch", "3").stderr
    done = bundle_run(config, "--learning_rate", "3", "--network_def#bias", "False")
    assert done.returncode == 0, done.stderr
    assert "learning rate 3 False" in done.stdout


def test_outside_of_a_workflow_there_is_none():
    assert running_workflow() is None


def test_a_workflow_made_by_hand_initializes(config):
    workflow = ConfigWorkflow(str(config), workflow_type=None)
    workflow.initialize()
