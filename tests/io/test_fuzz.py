"""Damaged files give errors of medseg, or a result; never a crash, a hang, a memory blow-up, or files elsewhere."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HARNESS = Path(__file__).with_name("fuzzing.py")


def fuzz(*arguments: object) -> None:
    command = [sys.executable, HARNESS, "run", *arguments]
    ended = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout[-8000:] + ended.stderr[-8000:]
    counts = dict(part.split()[::-1] for part in ended.stdout.splitlines()[-1].split(", "))
    # Mutants of which none can be read any more, or all, would prove nothing.
    assert min(int(counts["read"]), int(counts["refused"])) > 0.1 * (int(counts["read"]) + int(counts["refused"]))


def test_some_hundred_damaged_files(tmp_path):
    fuzz("--count", 400, "--data", "", "--keep", tmp_path)


@pytest.mark.long
def test_ten_thousand_damaged_files(tmp_path):
    fuzz("--first", 10_000, "--count", 10_000, "--data", os.environ.get("MEDSEG_TEST_DATA", ""), "--keep", tmp_path)
