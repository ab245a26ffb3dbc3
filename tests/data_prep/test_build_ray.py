"""The same cases on a Ray cluster: the same bytes, and a word on every node that was lost."""

import dataclasses
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from data_prep.build import build_dataset
from data_prep.cli import main
from data_prep.cluster import RayWorkers, _listing, _Site
from data_prep.fingerprint import versions
from data_prep.recipes.folder import FolderRecipe
from medseg.data import DatasetFolder
from medseg.errors import ConfigError, DatasetError

HERE = Path(__file__).parent
#: In the name of every file of the source; it shall stand in no log.
SECRET = "Mustermann"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    for number in range(8):
        (tmp_path / "source" / f"{SECRET}{number}").mkdir(parents=True)
        (tmp_path / "source" / f"{SECRET}{number}" / f"{SECRET}.bin").write_text(str(number))
    return tmp_path / "source"


def tree(root: Path) -> dict[str, str]:
    return {
        path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in root.rglob("*")
        if path.is_file()
    }


def test_a_cluster_that_loses_its_nodes(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(HERE)
    from light_recipe import LightRecipe

    (tmp_path / "control").mkdir()
    key = tmp_path / "shared.key"
    key.write_text("ab" * 32)
    program = [sys.executable, "-c", "import on_a_cluster; on_a_cluster.main()"]
    where = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": where, "CONTROL": str(tmp_path / "control")}
    words = [*program, str(source), str(tmp_path), str(key)]
    done = subprocess.run(words, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = done.stdout.splitlines()  # Ray says nothing there
    said = json.loads(line)
    build_dataset(LightRecipe(), source, tmp_path / "local", jobs=1, key=key, report=False)

    # One of two nodes was killed half-way.
    assert said["one_lost"]["built"] == 8
    assert said["one_lost"]["failed"] == []
    (note,) = said["one_lost"]["notes"]
    case, what = note.split(": ", 1)
    assert what == "its node of the Ray cluster was lost; on another, it went well"
    assert case in set(DatasetFolder(tmp_path / "one_lost").cases["case"])
    assert tree(tmp_path / "one_lost") == tree(tmp_path / "local")

    # The last node was killed half-way: no waiting for ever, and the build goes on here.
    assert "no node with a CPU is left; start one and run the same command again" in said["none_left"]["error"]
    with pytest.raises(DatasetError, match="unfinished"):
        DatasetFolder(tmp_path / "none_left")
    result = build_dataset(LightRecipe(), source, tmp_path / "none_left", jobs=1, key=key, report=False)
    assert len(result.kept) >= 2
    assert tree(tmp_path / "none_left") == tree(tmp_path / "local")

    # A recipe prints the name of a case; libraries do so in their warnings.
    logs = Path(said["session"]) / "logs"
    assert any(logs.iterdir())
    assert not [path for path in logs.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()]
    assert SECRET not in done.stderr


def test_without_ray_it_says_how_to_get_it(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    result = CliRunner().invoke(main, ["build", "folder", str(source), str(tmp_path / "out"), "--ray", "auto"])
    assert result.exit_code == 1
    assert result.stderr == "error: --ray needs Ray, which is not installed: pip install medseg[ray]\n"
    assert not (tmp_path / "out").exists()


def test_jobs_and_ray_exclude_each_other(tmp_path: Path, source: Path) -> None:
    words = ["build", "folder", str(source), str(tmp_path / "out"), "--ray", "auto", "--jobs", "2"]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 2
    assert "exclude each other" in result.stderr
    with pytest.raises(ConfigError, match="exclude each other"):
        build_dataset(FolderRecipe(), source, tmp_path / "out", ray="auto", jobs=2)


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("127.0.0.1:1", "no Ray cluster answers"),
        ("ray://127.0.0.1:1", "no Ray cluster answers"),
        ("cluster", "auto, local, HOST:PORT or ray://HOST:PORT expected"),
        ("127.0.0.1:99999", "no Ray cluster answers"),
    ],
)
def test_an_address_where_nobody_listens_is_refused_at_once(tmp_path: Path, address: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RayWorkers(address, tmp_path, tmp_path)


def test_a_node_must_see_the_same_files_and_have_the_same_versions(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    out.mkdir()
    (source / "a").touch()
    (out / ".tmp-token").write_text("token")
    site = _Site(source, out, _listing(source), "token", versions())
    assert site.problem() == ""
    assert [path.name for path in out.iterdir()] == [".tmp-token"]

    def problem(**change: Any) -> str:
        return dataclasses.replace(site, **change).problem()

    wanted = versions() | {"torch": "1.0"}
    assert "expected torch 1.0 as here; install the same versions" in problem(versions=wanted)
    assert "does not see the same files in SOURCE" in problem(source=tmp_path / "elsewhere")
    assert "does not see the same files in SOURCE" in problem(source=out)
    assert "cannot write to the same OUT" in problem(out=tmp_path / "elsewhere")
    (out / ".tmp-token").write_text("another folder of this name")
    assert "cannot write to the same OUT" in site.problem()
