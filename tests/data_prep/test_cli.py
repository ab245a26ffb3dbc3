"""The command: one line per error, statuses, and a quick --help."""

import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from data_prep.cli import main
from medseg.command_line import Group
from medseg.errors import DatasetError


def run(*words: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "data_prep", *words], capture_output=True, text=True, cwd=cwd)


def test_bad_input_is_one_line_and_status_1(tmp_path: Path) -> None:
    result = run("inspect", str(tmp_path))
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr.startswith(f"error: {tmp_path}: no image found")
    assert result.stderr.count("\n") == 1


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    for words in (["--debug", "inspect", str(tmp_path)], ["inspect", str(tmp_path), "--debug"]):
        result = run(*words)
        assert result.returncode == 1
        assert "Traceback" in result.stderr
        assert "ReadError" in result.stderr


@pytest.mark.parametrize(
    "words",
    [
        ["inspekt"],
        ["inspect"],
        ["inspect", ".", "--json", "--csv"],
        ["inspect", ".", "--out", "list.csv"],
        ["phantom", "out", "--patients", "0"],
        ["phantom", "out", "--patients", "many"],
        ["phantom", "out", "--image-size", "4"],
    ],
)
def test_bad_usage_is_status_2(words: list[str], tmp_path: Path) -> None:
    with CliRunner().isolated_filesystem(tmp_path):
        result = CliRunner().invoke(main, words)
        assert result.exit_code == 2
        assert "Traceback" not in result.output
        assert not any(Path.cwd().iterdir())


def test_phantom_refuses_a_folder_in_use(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    result = CliRunner().invoke(main, ["phantom", str(tmp_path), "--patients", "1"])
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_phantom_writes_a_cohort(tmp_path: Path) -> None:
    words = ["phantom", str(tmp_path / "out"), "--patients", "2", "--image-size", "32", "--slices", "8", "--seed", "3"]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "PHANTOM-001",
        "PHANTOM-002",
        "clinical.csv",
        "phantom.json",
    ]


@pytest.fixture
def failing() -> click.Group:
    @click.group(cls=Group)
    def group() -> None:
        pass

    @group.group()
    def inner() -> None:
        pass

    @inner.command()
    def dataset() -> None:
        raise DatasetError("cases.csv:\n  two\n  lines")

    @inner.command()
    def full() -> None:
        raise OSError(28, "No space left on device", "slices.h5")

    @inner.command()
    def stop() -> None:
        raise KeyboardInterrupt

    @inner.command()
    def bug() -> None:
        raise ZeroDivisionError

    return group


@pytest.mark.parametrize(
    ("command", "line"),
    [("dataset", "error: cases.csv: two lines\n"), ("full", "error: slices.h5: No space left on device\n")],
)
def test_foreseen_errors_of_a_nested_group_are_one_line(failing: click.Group, command: str, line: str) -> None:
    result = CliRunner().invoke(failing, ["inner", command])
    assert (result.exit_code, result.stdout, result.stderr) == (1, "", line)
    result = CliRunner().invoke(failing, ["inner", command, "--debug"])
    assert isinstance(result.exception, DatasetError | OSError)


def test_interrupt_ends_quietly(failing: click.Group) -> None:
    result = CliRunner().invoke(failing, ["inner", "stop"])
    assert (result.exit_code, result.stdout) == (1, "")
    assert "Traceback" not in result.stderr


def test_bug_of_ours_keeps_its_traceback(failing: click.Group) -> None:
    assert isinstance(CliRunner().invoke(failing, ["inner", "bug"]).exception, ZeroDivisionError)


def test_help_names_every_command() -> None:
    output = CliRunner().invoke(main, ["--help"]).output
    for command in ("build", "check", "fetch", "inspect", "phantom", "png", "recipes", "slices", "split"):
        assert f"  {command} " in output


@pytest.mark.parametrize(
    "words",
    [
        *(["--help"], ["inspect", "--help"], ["phantom", "--help"], ["build", "--help"], ["png", "--help"]),
        *(["build", "drive", "--help"], ["fetch", "--help"], ["recipes"]),
    ],
)
def test_help_imports_nothing_heavy(words: list[str]) -> None:
    code = (
        "import sys\nfrom data_prep.cli import main\n"
        f"try:\n    main({words!r})\nexcept SystemExit as stop:\n    assert not stop.code\n"
        "print('heavy:', *{name.split('.')[0] for name in sys.modules} & "
        "{'torch', 'monai', 'SimpleITK', 'itk', 'matplotlib', 'pandas', 'scipy', 'skimage', 'nibabel', 'pydicom'})"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "heavy:"
