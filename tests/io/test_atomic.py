import os
import signal
import subprocess
import sys
import time

import pytest

from medseg.io import atomic_path, atomic_write_bytes, atomic_write_text


def test_a_file_is_written_and_nothing_else_is_left(tmp_path):
    atomic_write_bytes(tmp_path / "a.bin", b"\0\1")
    atomic_write_text(tmp_path / "b.txt", "µ\n")
    assert (tmp_path / "a.bin").read_bytes() == b"\0\1"
    assert (tmp_path / "b.txt").read_bytes() == "µ\n".encode()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.bin", "b.txt"]


def test_the_temporary_name_keeps_the_suffixes_and_lies_in_the_same_folder(tmp_path):
    with atomic_path(tmp_path / "case.nii.gz") as temporary:
        assert temporary.name.endswith(".nii.gz")
        assert temporary.parent == tmp_path
        temporary.touch()


def test_an_error_leaves_the_old_file_and_no_temporary_one(tmp_path):
    path = tmp_path / "scores.csv"
    path.write_text("old")

    def fail():
        with atomic_path(path) as temporary:
            temporary.write_text("half")
            raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        fail()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_killed_process_leaves_the_old_file(tmp_path):
    path = tmp_path / "volume.bin"
    path.write_bytes(b"old")
    code = (
        "import sys, time\nfrom medseg.io import atomic_path\n"
        "with atomic_path(sys.argv[1]) as t:\n"
        "    t.write_bytes(b'half')\n    print('ready', flush=True)\n    time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE) as child:
        assert child.stdout.readline() == b"ready\n"
        time.sleep(0.05)
        os.kill(child.pid, signal.SIGKILL)
    assert path.read_bytes() == b"old"
