"""A build that is killed, or whose workers are: it ends in the same bytes, and says what happened."""

import contextlib
import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from medseg.data import DatasetFolder
from medseg.io.workers import WorkerDied, Workers, how_it_ended

HERE = Path(__file__).parent


@pytest.fixture
def light(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module light_recipe, importable by its workers too."""
    monkeypatch.syspath_prepend(HERE)
    import light_recipe

    return light_recipe


@pytest.fixture
def key(tmp_path: Path) -> Path:
    path = tmp_path / "shared.key"
    path.write_text("ab" * 32)
    return path


def tree(root: Path) -> dict[str, str]:
    return {
        path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in root.rglob("*")
        if path.is_file()
    }


def start(source: Path, out: Path, key: Path, hold: int = -1) -> "subprocess.Popen[str]":
    """A build in another process, which prints how many cases it has made, and waits for ever after ``hold``."""
    words = [sys.executable, str(HERE / "light_recipe.py"), str(source), str(out), str(key), str(hold)]
    where = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        words, start_new_session=True, env={**os.environ, "PYTHONPATH": where}, stdout=subprocess.PIPE, text=True
    )


def finish(process: "subprocess.Popen[str]") -> None:
    assert process.communicate()[0]
    assert process.returncode == 0


def kill_often(light: Any, tmp_path: Path, key: Path, kills: int, n_cases: int) -> None:
    """Kill builds at random moments, now the whole group, now the parent alone, and finish each dataset.

    Every second build is held after a random number of cases, so the kill meets it at work however slow the machine
    is. The others are killed a moment after a random case, the last one included, while they go on.
    """
    source, whole, out = light.write_source(tmp_path / "source", n_cases), tmp_path / "whole", tmp_path / "out"
    finish(start(source, whole, key))
    light.build_light(source, tmp_path / "serial", 1, key=key)
    assert tree(whole) == tree(tmp_path / "serial")
    rng = random.Random(7)
    left = n_cases
    for number in range(kills):
        held = number % 2 == 0
        moment = rng.randrange(left) if held else rng.randint(0, left)
        process = start(source, out, key, moment if held else -1)
        assert process.stdout is not None
        while line := process.stdout.readline():
            if int(line) == moment:
                break
        time.sleep(rng.uniform(0, 0.1))
        with contextlib.suppress(ProcessLookupError):  # one that was not held was quicker
            if number % 4 < 2:
                process.kill()
            else:
                os.killpg(process.pid, signal.SIGKILL)
        process.stdout.close()
        process.wait()
        if held:
            assert process.returncode == -signal.SIGKILL
            assert (out / ".build").is_dir()
        left = max(1, n_cases - len(list(out.glob(".build/[!.]*.json"))))
        if number % 3 == 2 or number == kills - 1:
            finish(start(source, out, key))
            assert tree(out) == tree(whole)
            assert {path.name for path in out.iterdir()} == {path.name for path in whole.iterdir()}
            shutil.rmtree(out)
            left = n_cases


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="kills process groups")
def test_builds_killed_at_random_end_in_the_same_bytes(light: Any, tmp_path: Path, key: Path) -> None:
    kill_often(light, tmp_path, key, kills=4, n_cases=60)


@pytest.mark.long
def test_twenty_kills_at_random_end_in_the_same_bytes(light: Any, tmp_path: Path, key: Path) -> None:
    kill_often(light, tmp_path, key, kills=20, n_cases=300)


def test_a_killed_worker_is_said_and_its_case_is_made_alone(light: Any, tmp_path: Path, key: Path) -> None:
    source = light.write_source(tmp_path / "source", 6, "")
    straight = light.build_light(source, tmp_path / "straight", 1, key=key)
    (source / "p002" / "a").write_text(f"kill SIGKILL\n{tmp_path / 'killed once'}")
    (source / "p003" / "a").write_text("kill SIGKILL\n")
    (source / "p004" / "a").write_text("kill SIGSEGV\n")
    (source / "p005" / "a").write_text("memory\n")
    result = light.build_light(source, tmp_path / "out", 2, key=key)
    names = straight.built
    failed = {problem.case: problem.what for problem in result.failed}
    by_source = {problem.sources: problem.what for problem in result.failed}
    killed = "was killed by the system (SIGKILL), most likely for using too much memory"
    assert by_source == {
        (4,): f"its worker process {killed}; retried once alone: again",
        (5,): "its worker process crashed in a library (SIGSEGV); retried once alone: again",
        (6,): "its worker process had not enough memory; retried once alone: again",
    }
    assert sorted(result.built) == sorted(set(names) - set(failed))
    (note,) = result.notes
    assert note.split(": ", 1)[1] == f"its worker process {killed}; alone, it went well"
    assert note.split(":")[0] in result.built
    dataset = DatasetFolder(tmp_path / "out")
    assert len(dataset.datalist("all")) == 3
    assert "SIGSEGV" in str(dataset.manifest["failed"])
    # Mended, the dataset is as if nothing had ever died.
    for number in (2, 3, 4, 5):
        (source / f"p{number:03d}" / "a").write_text(str(number))
    light.build_light(source, tmp_path / "out", 2, key=key)
    assert tree(tmp_path / "out") == tree(tmp_path / "straight")


def test_too_little_memory_in_this_process_fails_the_case_only(light: Any, tmp_path: Path) -> None:
    def take(size: int) -> int:
        return len(bytearray(size))

    with Workers(1) as workers:
        results = dict(workers.each(take, [("much", (1 << 62,)), ("little", (1,))]))
    assert isinstance(results["much"], WorkerDied)
    assert str(results["much"]) == "not enough memory"
    assert results["little"] == 1


def test_what_a_function_raises_is_raised_and_the_workers_can_go_on() -> None:
    with Workers(2) as workers:
        with pytest.raises(ZeroDivisionError):
            list(workers.each(eval, [("a", ("1",)), ("b", ("1 / 0",)), ("c", ("__import__('time').sleep(60)",))]))
        error = "type('Odd', (LookupError,), {'__reduce__': lambda self: 1 / 0})"
        with pytest.raises(RuntimeError, match="LookupError"):  # one that does not survive pickling
            list(workers.each(exec, [("a", (f"raise {error}('LookupError')",))]))
        assert dict(workers.each(eval, [(n, (str(n),)) for n in range(9)], ahead=2)) == {n: n for n in range(9)}


def test_common_arguments_come_first_and_hold_for_one_round() -> None:
    with Workers(2) as workers:
        tasks = [(n, (n,)) for n in range(5)]
        assert dict(workers.each(pow, tasks, common=(2,))) == {n: 2**n for n in range(5)}
        assert dict(workers.each(pow, tasks, common=(3,))) == {n: 3**n for n in range(5)}


def test_large_tasks_and_results_do_not_block_each_other() -> None:
    large = bytes(3_000_000)
    with Workers(2) as workers:
        results = dict(workers.each(bytes.__add__, [(n, (large, large)) for n in range(8)], ahead=6))
    assert {len(result) for result in results.values()} == {6_000_000}


def test_tasks_that_wait_behind_a_dying_worker_are_not_lost() -> None:
    die = "__import__('os')._exit(3)"
    tasks = [(n, (die if n % 5 == 0 else str(n),)) for n in range(20)]
    with Workers(2) as workers:
        results = dict(workers.each(eval, tasks, ahead=6))
    dead = {n for n, result in results.items() if isinstance(result, WorkerDied)}
    assert dead == {0, 5, 10, 15}
    assert {n: result for n, result in results.items() if n not in dead} == {n: n for n in range(20) if n % 5}
    assert workers.retried == {}


def test_no_more_tasks_are_taken_than_there_are_workers() -> None:
    taken, most = 0, 0

    def tasks() -> Any:
        nonlocal taken
        for number in range(20):
            taken += 1
            yield number, (str(number),)

    with Workers(2) as workers:
        for count, _ in enumerate(workers.each(eval, tasks()), start=1):
            most = max(most, taken - count)
    assert most <= 2


def test_the_end_of_a_worker_in_words() -> None:
    assert how_it_ended(-9) == "was killed by the system (SIGKILL), most likely for using too much memory"
    assert how_it_ended(-signal.SIGBUS) == "crashed in a library (SIGBUS)"
    assert how_it_ended(-signal.SIGTERM) == "was killed (SIGTERM)"
    assert how_it_ended(3) == "ended by itself (status 3)"
    assert how_it_ended(-1000) == "was killed (signal 1000)"
