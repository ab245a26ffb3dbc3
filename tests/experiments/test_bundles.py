"""The bundles are found, listed and copied, and their overrides read as a shell gives them."""

import shutil
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from medseg.cli import main
from medseg.errors import ConfigError
from medseg.experiments import bundle_path, bundle_table, copy_bundle, run_bundle

NAME = "hippocampus_mr_segmentation"


@pytest.fixture
def printing(tmp_path: Path) -> Path:
    """A bundle whose training prints what it was given."""
    configs = tmp_path / "printing/configs"
    configs.mkdir(parents=True)
    (configs / "metadata.json").write_text('{"version": "1"}')
    config = {
        "bundle_root": ".",
        "rate": 0.1,
        "sizes": [1, 2],
        "nested": {"value": 1},
        "initialize": ["$print('initialize')"],
        "run": ["$print(repr([@bundle_root, @rate, @sizes, @nested#value]))"],
        "finalize": ["$print('finalize')"],
    }
    (configs / "train.yaml").write_text(yaml.safe_dump(config))
    return configs.parent


def test_a_bundle_is_found_by_name_and_by_folder(tmp_path: Path):
    root = bundle_path(NAME)
    assert (root / "configs/train.yaml").is_file()
    mine = Path(shutil.copytree(root, tmp_path / "mine"))
    assert bundle_path(mine) == mine
    assert bundle_path(str(mine)) == mine


@pytest.mark.parametrize("name", ["hipocampus", "hippocampus_mr", "nothing like it"])
def test_an_unknown_bundle_is_answered_with_the_nearest(name: str):
    with pytest.raises(ConfigError, match=f"bundle: {name} is neither .*{NAME}"):
        bundle_path(name)


def test_the_table_says_what_metadata_says():
    for info in bundle_table():
        metadata = yaml.safe_load((info.path / "configs/metadata.json").read_text())
        assert (info.version, info.task) == (metadata["version"], metadata["task"])
        assert info.path.name == info.name


def test_a_bundle_is_copied_whole_and_never_over_another(tmp_path: Path):
    copy = copy_bundle(NAME, tmp_path)
    files = {p.relative_to(copy): p.read_bytes() for p in copy.rglob("*") if p.is_file()}
    source = bundle_path(NAME)
    assert copy == tmp_path / NAME
    assert files == {
        p.relative_to(source): p.read_bytes() for p in source.rglob("*") if p.is_file() and "__pycache__" not in p.parts
    }
    (copy / "configs/train.yaml").write_text("mine")
    with pytest.raises(ConfigError, match="is there already"):
        copy_bundle(NAME, tmp_path)
    assert (copy / "configs/train.yaml").read_text() == "mine"


def test_the_command_lists_and_copies(tmp_path: Path):
    listed = CliRunner().invoke(main, ["bundles"]).stdout
    assert NAME in listed
    assert "head_neck_petct_segmentation" in listed
    assert "head_neck" not in CliRunner().invoke(main, ["bundles", NAME]).stdout.replace(str(bundle_path(NAME)), "")
    done = CliRunner().invoke(main, ["bundles", NAME, "--copy", str(tmp_path / "new")])
    assert done.exit_code == 0
    assert (tmp_path / "new" / NAME / "configs/train.yaml").is_file()
    assert CliRunner().invoke(main, ["bundles", "--copy", str(tmp_path)]).exit_code == 2


def test_a_misspelt_name_is_no_empty_list():
    done = CliRunner().invoke(main, ["bundles", "hippocampus"])
    assert done.exit_code == 1
    assert NAME in done.stderr


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], [0.1, [1, 2], 1]),
        (["--rate", "0.5", "--sizes", "[3, 4]"], [0.5, [3, 4], 1]),
        (["--rate=0.5", "--nested#value=[a, 'b=c']"], [0.5, [1, 2], ["a", "b=c"]]),
        (["--rate", "-1", "--nested#value", "False"], [-1, [1, 2], False]),
        (["--rate", "1", "--rate", "2"], [2, [1, 2], 1]),
        (["--nested#value", "@rate"], [0.1, [1, 2], 0.1]),
        (["--nested#value", "{a: 1}"], [0.1, [1, 2], {"a": 1}]),
        (["--nested#value", "1e-3", "--sizes", "[2E5, 1_a]"], [0.1, [2e5, "1_a"], 0.001]),
        (["--nested#value", "2024-05-17"], [0.1, [1, 2], "2024-05-17"]),
        (["--nested#value", "$(lambda x: x + 1)(@rate)"], [0.1, [1, 2], 1.1]),
    ],
)
def test_overrides_are_read_as_the_shell_gives_them(printing: Path, words, expected, capsys):
    run_bundle(printing, "train", words)
    lines = capsys.readouterr().out.splitlines()
    assert lines[-3:] == ["initialize", repr([str(printing), *expected]), "finalize"]


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_a_number_is_a_number_however_python_writes_it(value: float):
    from medseg.experiments.bundles import _overrides

    found = _overrides(["--rate", repr(value)])["rate"]
    assert isinstance(found, float)
    assert found == value


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["rate", "1"], "override rate: expected pairs of --ID VALUE"),
        (["--rate"], "override --rate: expected pairs of --ID VALUE"),
        (["--rate", "1", "2"], "override 2: expected pairs"),
        (["--sizes", "[1, 2"], "override --sizes: .* is not YAML"),
        (["--rat", "1"], "override --rat: no such key.*--rate"),
        (["--nasted#value", "1"], "override --nasted#value: no such key.*--nested#value"),
    ],
)
def test_overrides_that_are_none_are_refused(printing: Path, words, message: str, capsys):
    with pytest.raises(ConfigError, match=message):
        run_bundle(printing, "train", words)
    assert "initialize" not in capsys.readouterr().out


def test_an_unknown_workflow_and_a_missing_file_are_refused(printing: Path):
    with pytest.raises(ConfigError, match="workflow: found 'trian', expected one of train, "):
        run_bundle(printing, "trian")
    with pytest.raises(ConfigError, match=r"inference\.yaml"):
        run_bundle(printing, "inference")
    (printing / "configs/inference.yaml").write_text("run: [1, 2")
    with pytest.raises(ConfigError, match=r"inference\.yaml: not YAML or JSON"):
        run_bundle(printing, "inference")
