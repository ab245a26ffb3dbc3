"""Building: the same bytes whatever happened on the way, and nothing half-written."""

import errno
import fcntl
import hashlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pydicom
import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from data_prep.build import BuildResult, build_dataset
from data_prep.cli import main
from data_prep.fingerprint import sha256
from data_prep.identity import KeyFile, identifying_words, mask, safe_name, words_of
from data_prep.recipes import recipe_class
from data_prep.recipes.folder import FolderOptions, FolderRecipe
from medseg.data import DatasetFolder, make_splits
from medseg.errors import ConfigError, DatasetError
from medseg.io.workers import WorkerDied, Workers

KEY = "ab" * 32
#: What a file name may be, which need not be UTF-8: then it has surrogates in it.
ANY_TEXT = st.text(st.characters(exclude_categories=()), max_size=400)


def write_source(root: Path, n_cases: int = 4, shape: Sequence[int] = (6, 5, 4)) -> Path:
    rng = np.random.default_rng(1)
    for folder in ("images", "labels"):
        (root / folder).mkdir(parents=True)
    for number in range(n_cases):
        label = np.zeros(shape, np.uint8)
        label[1:3, 1:3, 1:3] = 1 + number % 2
        nib.save(nib.Nifti1Image(rng.normal(size=shape).astype(np.float32), np.eye(4)), root / f"images/s{number}.nii")
        nib.save(nib.Nifti1Image(label, np.eye(4)), root / f"labels/s{number}.nii")
    return root


def build(source: Path, out: Path, options: FolderOptions | None = None, **given: Any) -> BuildResult:
    return build_dataset(FolderRecipe(options), source, out, **{"jobs": 1, "report": False, **given})


def run(*words: object) -> Result:
    return CliRunner().invoke(main, ["build", *map(str, words)])


def tree(root: Path) -> dict[str, str]:
    return {
        path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in root.rglob("*")
        if path.is_file()
    }


@pytest.fixture
def key(tmp_path: Path) -> Path:
    path = tmp_path / "shared.key"
    path.write_text(KEY)
    return path


def test_the_same_key_gives_the_same_bytes_and_another_key_other_names(tmp_path: Path, key: Path) -> None:
    source = write_source(tmp_path / "source")
    build(source, tmp_path / "a", key=key, report=True)
    build(source, tmp_path / "b" / "deeper", key=key, report=True)
    build(source, tmp_path / "c")
    assert tree(tmp_path / "a") == tree(tmp_path / "b" / "deeper")
    assert {"report.html", "dataset.json", "cases.csv", "manifest.json"} < set(tree(tmp_path / "a"))
    assert not set(DatasetFolder(tmp_path / "a").cases["case"]) & set(DatasetFolder(tmp_path / "c").cases["case"])
    assert (tmp_path / "c.key").stat().st_mode & 0o777 == 0o600
    # The key of one dataset serves another, and the key file alone tells who is who.
    build(source, tmp_path / "d", key=tmp_path / "c.key")
    assert tree(tmp_path / "c") | {"report.html": ""} == tree(tmp_path / "d") | {"report.html": ""}
    known = json.loads((tmp_path / "c.key").read_text())
    assert sorted(known["patients"].values()) == ["s0", "s1", "s2", "s3"]
    assert known["sources"]["1"] == "images/s0.nii"
    written = b"".join(path.read_bytes() for path in (tmp_path / "c").rglob("*.*") if path.is_file())
    assert not any(word in written for word in (b"images/s", b"labels/s", str(tmp_path).encode()))


def test_parallel_equals_serial(tmp_path: Path, key: Path) -> None:
    source = write_source(tmp_path / "source")
    build(source, tmp_path / "serial", key=key, jobs=1)
    result = build(source, tmp_path / "parallel", key=key, jobs=2)
    assert len(result.built) == 4
    assert tree(tmp_path / "serial") == tree(tmp_path / "parallel")


def children_of(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_killed_build_ends_as_if_it_had_never_stopped(tmp_path: Path, key: Path) -> None:
    source = write_source(tmp_path / "source", n_cases=9, shape=(60, 60, 60))
    build(source, tmp_path / "whole", key=key)
    out = tmp_path / "killed"
    (tmp_path / "held").mkdir()
    (tmp_path / "held" / "sitecustomize.py").write_text(
        "import signal\nfrom medseg.io.workers import Workers\neach = Workers.each\n"
        "def held(*given, **named):\n"
        "    making = given[1].__name__ == 'make_case'\n"
        "    for number, result in enumerate(each(*given, **named)):\n"
        "        if making and number == 3:\n"
        "            signal.pause()  # so that it is killed at work, however slow this test is\n"
        "        yield result\n"
        "Workers.each = held\n"
    )
    words = [sys.executable, "-m", "data_prep", "build", "folder", str(source), str(out)]
    process = subprocess.Popen(
        [*words, "--key", str(key), "--jobs", "2", "--no-report"],
        env=os.environ | {"PYTHONPATH": str(tmp_path / "held")},
    )
    while process.poll() is None and len(list(out.glob(".build/[!.]*.json"))) < 3:
        time.sleep(0.002)
    workers = children_of(process.pid)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = len(list(out.glob(".build/[!.]*.json")))
    assert 3 <= done < 9  # it was killed at work
    with pytest.raises(DatasetError, match="unfinished"):
        DatasetFolder(out)
    patience = time.monotonic() + 30
    while any(map(alive, workers)) and time.monotonic() < patience:
        time.sleep(0.05)
    assert not any(map(alive, workers))  # nobody goes on writing into the folder
    (out / "imagesTr" / ".tmp-0123456789abcdef.nii.gz").write_bytes(b"half a file")
    result = build(source, out, key=key)
    assert len(result.kept) == done
    assert len(result.built) == 9 - done
    assert tree(out) == tree(tmp_path / "whole")
    assert {path.name for path in out.iterdir()} == {path.name for path in (tmp_path / "whole").iterdir()}


def test_a_full_disk_stops_the_build_which_goes_on_later(
    tmp_path: Path, key: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import medseg.io

    source = write_source(tmp_path / "source")
    build(source, tmp_path / "whole", key=key)
    write, room = medseg.io.write_nifti, [5]

    def write_while_there_is_room(*given: Any) -> None:
        room[0] -= 1
        if room[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(*given)

    with monkeypatch.context() as patch:
        patch.setattr(medseg.io, "write_nifti", write_while_there_is_room)
        with pytest.raises(OSError, match="make room and run the same command again"):
            build(source, tmp_path / "out", key=key)
    result = build(source, tmp_path / "out", key=key)
    assert (len(result.kept), len(result.built)) == (2, 2)
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


def test_only_what_changed_is_made_again(tmp_path: Path) -> None:
    source, out = write_source(tmp_path / "source"), tmp_path / "out"
    build(source, out, keep_identifiers=True)
    first = tree(out)
    assert build(source, out, keep_identifiers=True).kept == ["s0", "s1", "s2", "s3"]
    assert tree(out) == first

    times = {path: path.stat().st_mtime_ns for path in out.rglob("*.nii.gz")}
    nib.save(nib.Nifti1Image(np.ones((6, 5, 4), np.float32), np.eye(4)), source / "images/s1.nii")
    assert build(source, out, keep_identifiers=True).built == ["s1"]
    changed = {path.name for path, written in times.items() if path.stat().st_mtime_ns != written}
    assert changed == {"s1_0000.nii.gz", "s1.nii.gz"}

    (out / "labelsTr" / "s2.nii.gz").unlink()
    (out / "imagesTr" / "s3_0000.nii.gz").write_bytes(b"damaged")
    assert build(source, out, keep_identifiers=True).built == ["s2", "s3"]

    (source / "images/s0.nii").unlink()
    (source / "labels/s0.nii").unlink()
    result = build(source, out, keep_identifiers=True)
    assert (result.built, result.removed) == ([], ["s0"])
    assert not list(out.rglob("s0*"))
    assert list(DatasetFolder(out).cases["case"]) == ["s1", "s2", "s3"]

    options = FolderOptions(spacing=(2.0, 2.0, 2.0))
    assert build(source, out, options, keep_identifiers=True).built == ["s1", "s2", "s3"]
    # What a build over and over again ends in is what one build makes.
    build(source, tmp_path / "fresh", options, keep_identifiers=True)
    assert tree(out) == tree(tmp_path / "fresh")


def test_cases_under_a_split_do_not_change_unnoticed(tmp_path: Path) -> None:
    source, out = write_source(tmp_path / "source", n_cases=6), tmp_path / "out"
    nib.save(nib.Nifti1Image(np.zeros((2, 2, 2), np.uint8), np.eye(4)), source / "labels/s5.nii")  # fails
    assert len(build(source, out).failed) == 1
    dataset = DatasetFolder(out)
    dataset.write_split(make_splits(dataset.cases, seed=0))
    before = tree(out)
    result = build(source, out)
    assert (len(result.kept), len(result.built), len(result.failed)) == (5, 0, 1)
    assert tree(out) == before  # nnU-Net's list without the test cases too
    nib.save(nib.Nifti1Image(np.ones((6, 5, 4), np.float32), np.eye(4)), source / "images/s1.nii")
    with pytest.raises(DatasetError, match=r"1 case\(s\) would change .* splits.json and splits_final.json come from"):
        build(source, out)
    assert tree(out) == before


def test_one_bad_case_never_ends_the_others(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source")
    content = (source / "images/s2.nii").read_bytes()
    (source / "images/s2.nii").write_bytes(content[: len(content) // 2])
    result = run("folder", source, tmp_path / "out", "--jobs", 1, "--no-report")
    assert result.exit_code == 1
    assert "Traceback" not in result.output
    failed = [line for line in result.stderr.splitlines() if line.startswith("failed: ")]
    assert len(failed) == 1
    assert "source 3: cut short" in failed[0]
    assert "s2" not in failed[0]
    assert "the names of the numbered sources stand in out.key" in result.stderr
    kept = run("folder", source, tmp_path / "kept", "--jobs", 1, "--no-report", "--keep-identifiers")
    assert "failed: s2: images/s2.nii: cut short" in kept.stderr
    assert str(tmp_path) not in failed[0]
    assert "3 built, 1 failed" in result.stdout
    dataset = DatasetFolder(tmp_path / "out")
    assert len(dataset.datalist("all")) == 3
    (failure,) = dataset.manifest["failed"]
    assert failure["what"].startswith("source 3: cut short")
    assert failure["sources"] == [3, 7]
    # Mended, it is built, and the dataset is the same as if it had never been broken.
    (source / "images/s2.nii").write_bytes(content)
    assert run("folder", source, tmp_path / "out", "--jobs", 1, "--no-report").exit_code == 0
    build(source, tmp_path / "straight", key=tmp_path / "out.key")
    assert tree(tmp_path / "out") == tree(tmp_path / "straight")


def test_a_defect_met_by_one_case_is_that_cases_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_source(tmp_path / "source")
    make = FolderRecipe.make

    def make_or_break(self: FolderRecipe, case: Any, plan: Any) -> Any:
        if case.name == "s1":
            raise ZeroDivisionError("in a library")
        return make(self, case, plan)

    monkeypatch.setattr(FolderRecipe, "make", make_or_break)
    result = run("folder", source, tmp_path / "out", "--jobs", 1, "--no-report")
    assert result.exit_code == 1
    assert "unexpected ZeroDivisionError: in a library" in result.stderr
    assert "Traceback" not in result.stderr
    assert "3 built, 1 failed" in result.stdout
    debug = run("folder", source, tmp_path / "out2", "--jobs", 1, "--no-report", "--debug")
    assert re.search(r"in make_or_break\n +raise ZeroDivisionError", debug.stderr)


def test_a_build_of_nothing_leaves_nothing(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source", n_cases=1)
    (source / "images/s0.nii").write_text("no image")
    for words, message in (
        (("folder", source, tmp_path / "out"), "none of the 1 case(s) could be built"),
        (("folder", tmp_path / "nowhere", tmp_path / "out"), "no such folder"),
        (("folder", source / "images", tmp_path / "out"), "no images/ and labels/ or imagesTr/ and labelsTr/"),
        (("folder", source, source / "out"), "lies inside SOURCE"),
        (("folder", source, tmp_path), "lies inside OUT"),
        (("petct", source, tmp_path / "out", "--roi", "GTV"), "nothing for the recipe petct"),
        (("folder", source, tmp_path / "out", "--label", "a=b"), "--label: 'a=b' given, NAME=VALUE expected"),
        (("folder", source, tmp_path / "out", "--key", tmp_path / "no.key"), "no such key file"),
        (("folder", source, tmp_path / "out", "--key", source / "images/s0.nii"), "not a key file"),
        (("folder", source, tmp_path / "out", "--stratum-column", "x"), "go together"),
    ):
        result = run(*words, "--jobs", 1)
        assert result.exit_code == 1, words
        assert message in result.stderr, words
        assert result.stderr.startswith("error: "), words
        assert len(result.stderr.splitlines()) == 1, words
        assert sorted(path.name for path in tmp_path.iterdir()) == ["source"], words


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    source, out = write_source(tmp_path / "source"), tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("precious")
    with pytest.raises(DatasetError, match="neither empty nor a dataset"):
        build(source, out)
    assert [path.name for path in out.iterdir()] == ["thesis.txt"]
    build(source, tmp_path / "other")
    manifest = tmp_path / "other" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"recipe": "folder"', '"recipe": "petct"'))
    with pytest.raises(DatasetError, match="built by the recipe petct, not folder"):
        build(source, tmp_path / "other")
    (tmp_path / "file").write_text("")
    with pytest.raises(DatasetError, match="a file"):
        build(source, tmp_path / "file")


def test_one_build_at_a_time(tmp_path: Path) -> None:
    source, out = write_source(tmp_path / "source"), tmp_path / "out"
    out.mkdir()
    descriptor = os.open(out, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with pytest.raises(DatasetError, match="another build is at work"):
        build(source, out)
    os.close(descriptor)
    build(source, out)


def test_a_build_that_comes_second_leaves_the_folder_of_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = write_source(tmp_path / "source"), tmp_path / "out"
    select, held = FolderRecipe.select, []

    def select_while_another_begins(self: FolderRecipe, source: Path) -> Any:
        out.mkdir()
        held.append(os.open(out, os.O_RDONLY))
        fcntl.flock(held[0], fcntl.LOCK_EX)
        return select(self, source)

    monkeypatch.setattr(FolderRecipe, "select", select_while_another_begins)
    with pytest.raises(DatasetError, match="another build is at work"):
        build(source, out)
    assert out.is_dir()  # though it is empty yet
    os.close(held[0])


def test_another_key_than_the_datasets_own_is_refused(tmp_path: Path, key: Path) -> None:
    source, out, apart = write_source(tmp_path / "source"), tmp_path / "out", tmp_path / "apart.key"
    build(source, out)
    before = tree(out)
    with pytest.raises(DatasetError, match="another key than that of"):
        build(source, out, key=key)
    (tmp_path / "out.key").rename(apart)  # as the help advises
    with pytest.raises(
        DatasetError, match=r"out\.key: no such file, but out was built with it: put it back or give it"
    ):
        build(source, out)
    assert tree(out) == before
    assert not (tmp_path / "out.key").exists()
    assert len(build(source, out, key=apart).kept) == 4


def test_names_that_are_no_text_are_cases_as_others(tmp_path: Path) -> None:
    source, out = write_source(tmp_path / "source", n_cases=2), tmp_path / "out"
    name = os.fsdecode(b"M\xfcller  J.nii")
    for folder in ("images", "labels"):
        (source / folder / "s1.nii").rename(source / folder / name)
    assert len(build(source, out).built) == 2
    known = json.loads((tmp_path / "out.key").read_text(encoding="utf-8"))
    assert f"images/{name}" in known["sources"].values()
    assert len(build(source, out).kept) == 2
    (source / "images" / name).write_bytes((source / "images" / name).read_bytes()[:400])
    (failure,) = build(source, out).failed
    assert failure.what.startswith("source 1: cut short")
    (failure,) = build(source, tmp_path / "kept", keep_identifiers=True).failed
    assert re.fullmatch(r"M_ller__J-[0-9a-f]{8} \(M ller J\)", failure.case)
    assert failure.what.startswith("images/M ller J.nii: cut short")
    (source / "labels" / name).rename(source / "labels" / "M\x1b[31m.nii")  # which would steer a terminal
    result = build(source, tmp_path / "kept", keep_identifiers=True)
    assert [problem.case for problem in result.unpaired] == ["images/M ller J.nii", "labels/M [31m.nii"]


def test_a_folder_among_the_files_of_the_cases_is_no_obstacle(tmp_path: Path) -> None:
    source, out = write_source(tmp_path / "source"), tmp_path / "out"
    build(source, out)
    (out / "imagesTr" / "own").mkdir()
    (out / "imagesTr" / "s9_0000.nii.gz").touch()
    assert len(build(source, out).kept) == 4
    assert len(DatasetFolder(out).datalist("all")) == 4
    assert sorted(path.name for path in (out / "imagesTr").iterdir() if "_0000" not in path.name) == ["own"]


def test_looking_through_the_source_says_how_far_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, select = write_source(tmp_path / "source"), FolderRecipe.select

    def select_slowly(self: FolderRecipe, source: Path) -> Any:
        assert self.progress is not None
        self.progress(5)
        return select(self, source)

    monkeypatch.setattr(FolderRecipe, "select", select_slowly)
    console = Console(file=io.StringIO(), force_terminal=True)
    build(source, tmp_path / "out", console=console)
    assert "5/8" in console.file.getvalue()  # type: ignore[attr-defined]
    build(source, tmp_path / "quiet")


def test_an_error_while_looking_names_nothing_in_the_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_source(tmp_path / "source")
    for error in (
        PermissionError(errno.EACCES, "Permission denied", str(source / "Doe Jane")),
        DatasetError(f"{source}/Doe Jane/table.csv: not a table"),
    ):

        def fail(self: FolderRecipe, source: Path, error: Exception = error) -> Any:
            raise error

        monkeypatch.setattr(FolderRecipe, "select", fail)
        result = run("folder", source, tmp_path / "out", "--debug")
        assert isinstance(result.exception, DatasetError)
        assert str(result.exception).startswith("a file of SOURCE: ")
        assert result.exception.__suppress_context__
        kept = run("folder", source, tmp_path / "out", "--keep-identifiers")
        assert f"{source}/Doe Jane" in kept.stderr


def test_strata_come_from_clinical_tables(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source")
    table = tmp_path / "clinical.csv"
    table.write_text("id;stage\ns0;II\ns1;NA\n s2 ;IV\n")
    more = tmp_path / "more.csv"
    more.write_text("id,age\ns0,50\n")
    given: dict[str, Any] = {"clinical": [table, more], "id_column": "id", "keep_identifiers": True}
    result = build(source, tmp_path / "out", stratum_column="stage", **given)
    assert list(DatasetFolder(tmp_path / "out").cases["stratum"]) == ["II", "NA", "IV", "unknown"]
    assert any("1 patient" in note and "unknown" in note for note in result.notes)
    with pytest.raises(ConfigError, match=r"'stag'.*nearest: stage"):
        build(source, tmp_path / "out", stratum_column="stag", **given)
    with pytest.raises(ConfigError, match="no column 'patient'"):
        build(source, tmp_path / "out", stratum_column="stage", **given | {"id_column": "patient"})
    more.write_text("id,stage\ns0,III\n")
    with pytest.raises(DatasetError, match="'II' and 'III'"):
        build(source, tmp_path / "out", stratum_column="stage", **given)


def test_names_that_would_meet_are_refused(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source", n_cases=1)
    for folder in ("images", "labels"):
        (source / folder / "S0.nii").write_bytes((source / folder / "s0.nii").read_bytes())
    with pytest.raises(DatasetError, match="would both be called"):
        build(source, tmp_path / "out", keep_identifiers=True)
    assert len(build(source, tmp_path / "pseudonyms").built) == 2


def test_a_dying_worker_costs_its_case_only(tmp_path: Path) -> None:
    flag = tmp_path / "died once"
    once = f"__import__('os')._exit(9) if not __import__('os').path.exists({str(flag)!r}) " + (
        f"and __import__('os').mkdir({str(flag)!r}) is None else 'alive'"
    )
    tasks = [(str(n), (f"{n} * {n}",)) for n in range(5)]
    with Workers(2) as workers:
        results = dict(workers.each(eval, [*tasks, ("once", (once,))]))
        assert results == {"0": 0, "1": 1, "2": 4, "3": 9, "4": 16, "once": "alive"}
        results = dict(workers.each(eval, [("always", ("__import__('os')._exit(9)",)), *tasks]))
    assert isinstance(results.pop("always"), WorkerDied)
    assert results == {"0": 0, "1": 1, "2": 4, "3": 9, "4": 16}


def test_the_command_names_its_recipes() -> None:
    listed = run("--help")
    assert listed.exit_code == 0
    assert "folder " in listed.output
    assert "petct " in listed.output
    wrong = run("pet-ct", "a", "b")
    assert wrong.exit_code == 2
    assert "nearest: petct" in wrong.stderr
    with pytest.raises(ConfigError, match="nearest: folder"):
        recipe_class("foldr")


@given(ANY_TEXT)
def test_a_kept_identifier_cannot_leave_its_folder(identifier: str) -> None:
    name = safe_name(identifier)
    assert 0 < len(name) < 80
    assert name[0] not in ".-"  # neither hidden nor an option of a command
    assert set(name) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-")
    assert (Path("/out") / f"{name}.nii.gz").resolve().parent == Path("/out")
    assert name not in (".", "..")


@given(ANY_TEXT, ANY_TEXT)
def test_two_identifiers_keep_two_names(one: str, two: str) -> None:
    assert (safe_name(one) == safe_name(two)) == (one == two)
    key = KeyFile(Path("x"), bytes(32))
    assert (key.pseudonym(one) == key.pseudonym(two)) == (one == two)


def test_a_message_is_one_line_without_paths_and_names() -> None:
    files = {Path("/data/Doe John/ct/1.dcm"): "source 1", Path("/data/Doe John/ct/10.dcm"): "source 2"}
    message = "/data/Doe John/ct/10.dcm:\nDOE in \x1b[31mroom 17, the edge, A123; /data/Doe John/ct: 2 series"
    assert mask(message, files, {"Doe", "Ed", "John", "A12"}) == (
        "source 2: [masked] in [31mroom 17, the edge, A123; the folder of source 1: 2 series"
    )
    assert mask("no case PAT0077x here", {}, {"pat0077"}) == "no case [masked]x here"
    odd = Path("/data/Doe  Jane/visit\n1/a\tb.nii")  # as it is, not as the message shows it
    assert mask(f"{odd}: cut short; /data/Doe  Jane: empty", {odd: "source 1"}, root=Path("/data")) == (
        "source 1: cut short; the folder of source 1: empty"
    )
    assert mask("/data/Roe/7.nii: no file; see /data", {odd: "source 1"}, root=Path("/data")) == (
        "a file of SOURCE: no file; see SOURCE"
    )


def test_all_that_a_header_says_of_a_person_is_masked() -> None:
    header = pydicom.Dataset()
    header.PatientName = "Hülsmeyer^Jörg=山田^太郎"
    header.OtherPatientNames = ["Strauß^J", "Roe"]
    header.PatientID, header.OtherPatientIDs = "A-17", ["B-4711", "C/08154"]
    header.PatientBirthDate, header.StudyDate = "19620812", "20190305"
    header.OtherPatientIDsSequence = pydicom.Sequence([pydicom.Dataset()])
    header.OtherPatientIDsSequence[0].PatientID = "D-99"
    header.add_new("ReviewerName", "PN", "Moe^Mary")
    header["PatientBirthDate"]._value = "12.08.1962 or so"  # no date, but what the file says
    header.StudyInstanceUID, header.SOPClassUID = "1.2.3", "1.2.840.10008.5.1.4.1.1.2"
    words = identifying_words(header)
    shown = (
        "ROI Hülsmeyer, HU\u0308LSMEYER, Hulsmeyer, LN_Huelsmeyer, 太郎, Strauss, Strauß, Roe, Moe, A-17, "
        "4711, 08154, D-99, 20190305, 2019-03-05, 5.3.19, 05/03/2019, 12.08.1962 or so, 1.2.3"
    )
    assert set(re.split(", ", mask(shown, {}, words))) == {"ROI [masked]", "LN_[masked]", "[masked]"}
    kept = "CT of 512 slices at 1.5 mm, class 1.2.840.10008.5.1.4.1.1.2"
    assert mask(kept, {}, words) == kept


def test_what_else_lies_in_the_source_is_counted(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source")
    assert build(source, tmp_path / "first").notes == []
    (source / "more").mkdir()
    for name in ("scans.zip", "more/notes.txt", ".DS_Store"):
        (source / name).touch()
    (source / "images" / "s9.nii").write_bytes(b"named as unpaired")
    result = build(source, tmp_path / "out")
    assert result.notes == ["2 other file(s) of SOURCE are part of no case"]
    assert len(result.unpaired) == 1


def test_a_pipe_in_the_source_does_not_hold_the_build_up(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source")
    os.mkfifo(source / "images" / "pipe.mhd")
    os.mkfifo(source / "labels" / "pipe.nii")
    result = build(source, tmp_path / "out")
    assert (len(result.built), result.unpaired, result.failed) == (4, [], [])
    with pytest.raises(OSError, match="not a regular file"):
        sha256(source / "images" / "pipe.mhd")


def test_a_header_without_preamble_tells_who_the_patient_is_as_well(tmp_path: Path) -> None:
    header = pydicom.Dataset()
    header.SOPClassUID, header.PatientName = "1.2.840.10008.5.1.4.1.1.2", "Doe^Jane"
    header.save_as(tmp_path / "bare", implicit_vr=True, little_endian=True)
    assert {"Doe", "Jane"} <= words_of(tmp_path / "bare")
    (tmp_path / "none").write_text("Doe^Jane")
    assert words_of(tmp_path / "none") == set()
