"""Who waits for a folder, and until when."""

import fcntl
import threading
from pathlib import Path

import pytest

from medseg.io.lock import in_turn


def test_the_second_begins_when_the_first_has_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, order, lock = threading.Event(), [], fcntl.flock

    def flock(*words: int) -> None:
        if threading.current_thread() is second:
            asked.set()
        lock(*words)

    def work() -> None:
        with in_turn(tmp_path):
            order.append("second begins")

    monkeypatch.setattr(fcntl, "flock", flock)
    second = threading.Thread(target=work)
    with in_turn(tmp_path):
        second.start()
        assert asked.wait(60)
        order.append("first ends")
    second.join(60)
    assert order == ["first ends", "second begins"]


def test_an_error_ends_the_turn(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), in_turn(tmp_path):
        raise KeyboardInterrupt
    with in_turn(tmp_path):
        pass


def test_a_file_system_without_locks_gives_no_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*words: int) -> None:
        raise OSError("no locks")

    monkeypatch.setattr(fcntl, "flock", flock)
    with in_turn(tmp_path):
        (tmp_path / "scores.csv").touch()
    assert [file.name for file in tmp_path.iterdir()] == ["scores.csv"]
