"""Builds onto disks that fill up, within a mount namespace of its own: run by test_build_disk.py as a program."""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from click.testing import CliRunner, Result

from data_prep.cli import main

#: Bytes left on the disk when a build begins; where it fills up differs.
ROOMS = (0, 5_000, 20_000, 30_000, 45_000, 55_000, 62_000, 66_000, 70_000, 74_000, 78_000, 82_000)


def tree(root: Path) -> dict[str, str]:
    """Hash of every file, without the report."""
    return {
        path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in root.rglob("*")
        if path.is_file() and path.name != "report.html"
    }


def build(source: Path, out: Path, key: Path, *words: str) -> Result:
    """The command itself."""
    return CliRunner().invoke(main, ["build", "folder", str(source), str(out), "--key", str(key), *words])


def fill_up(disk: Path, room: int) -> Path:
    """Leave so much room on a disk."""
    ballast = disk / "ballast"
    with ballast.open("wb") as file:
        left = os.statvfs(disk)
        os.posix_fallocate(file.fileno(), 0, max(left.f_bavail * left.f_bsize - room, 1))
    return ballast


def run(source: Path, key: Path, disk: Path, folder: Path) -> None:
    """A build for every room, the same again once there is room; then a report without room, and two workers."""
    assert build(source, folder / "whole", key, "--jobs", "1").exit_code == 0
    whole = tree(folder / "whole")
    stopped = 0
    cases = [(room, ("--jobs", "1", "--no-report")) for room in ROOMS]
    cases += [(100_000, ("--jobs", "1")), (50_000, ("--jobs", "2", "--no-report"))]
    for room, words in cases:
        out = disk / "out"
        ballast = fill_up(disk, room)
        result = build(source, out, key, *words)
        if result.exit_code:
            stopped += 1
            assert result.exit_code == 1, result.output
            assert result.stdout == "", result.stdout
            line = f"error: {out}: No space left on device; make room and run the same command again\n"
            assert result.stderr == line, result.stderr
            assert not list(disk.rglob(".tmp-*")), "half-written files take the room"
        ballast.unlink()
        again = build(source, out, key, *words)
        assert again.exit_code == 0, again.output
        assert tree(out) == whole, room
        assert (out / "report.html").exists() == ("--no-report" not in words)
        if room == 50_000:
            assert result.exit_code
            assert "unchanged" in again.stdout, again.stdout  # what was built before has stayed
        shutil.rmtree(out)
        (disk / "out.key").unlink()
    assert stopped >= len(cases) - 3, stopped
    assert build(source, disk / "out", key, "--jobs", "1", "--no-report").exit_code == 0
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    (source / "images" / "s0.nii").write_bytes((source / "images" / "s1.nii").read_bytes())
    result = build(source, disk / "out", key, "--jobs", "1", "--no-report")
    assert result.stderr == (
        f"error: {disk / 'out'}: Read-only file system; make it writable and run the same command again\n"
    ), result.stderr


if __name__ == "__main__":
    mounted = Path(sys.argv[3])
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(mounted)], check=True)
    with tempfile.TemporaryDirectory() as scratch:
        run(Path(sys.argv[1]), Path(sys.argv[2]), mounted, Path(scratch))
    print("done")
