"""The cache of headers is right or not used: never a crash, never a stale or a half-written row."""

import dataclasses
import logging
import os
import signal
import sqlite3
import stat
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from medseg.errors import ConfigError
from medseg.io import find_series, header_cache, write_nifti
from medseg.io.dicom_header import Instance, Plane, quiet, read_instance
from medseg.io.header_cache import FileState, Header, HeaderCache, default_cache, pack, unpack

OLD = 1_600_000_000 * 10**9
STATE = FileState(b"/a", 10, OLD)
HEADER = Header('{"a":1}', '{"b":[1.5]}')

finite = st.floats(allow_nan=False)
vectors = st.none() | st.lists(finite, min_size=1, max_size=6).map(tuple)
values = st.text() | st.integers(-(2**60), 2**60) | finite | st.lists(finite | st.text(), max_size=3).map(tuple)
planes = st.builds(Plane, vectors, vectors, vectors, st.none() | finite)
instances = st.builds(
    Instance,
    path=st.just(Path("x")),
    planes=st.lists(planes, max_size=3).map(tuple),
    tags=st.dictionaries(st.text(), st.text(), max_size=3),
    number=st.none() | st.integers(),
    rows=st.integers(0, 9),
    columns=st.integers(0, 9),
    dataset=st.none(),
    **{f.name: st.text() for f in dataclasses.fields(Instance) if f.type in (str, "str")},
)


@given(instances, st.lists(st.tuples(st.text(), values), max_size=4).map(tuple))
def test_what_is_packed_comes_back_the_same(instance, traits):
    if instance.planes and "traits" in {f.name for f in dataclasses.fields(Plane)}:
        instance.planes = (dataclasses.replace(instance.planes[0], traits=traits), *instance.planes[1:])
    assert repr(unpack(pack(instance), instance.path)) == repr(instance)


def test_a_million_equal_frames_are_written_once():
    plane = Plane(None, None, None, 1.0)
    instance = Instance(**{f.name: "" for f in dataclasses.fields(Instance)} | {"planes": (plane,) * 1_000_000})
    header = pack(instance)
    assert len(header.own) < 200
    assert unpack(header, Path("x")).planes == instance.planes


@pytest.mark.realdata
def test_every_real_header_comes_back_the_same(data):
    seen = 0
    with quiet():
        for path in sorted((data / "dicom").rglob("*.dcm")):
            try:
                instance = read_instance(path, force=True)
            except Exception:  # damaged ones are another test's
                continue
            assert repr(unpack(pack(instance), path)) == repr(instance)
            seen += 1
    assert seen > 100


def test_a_row_is_found_by_path_size_and_time_only(tmp_path):
    with HeaderCache(tmp_path / "c") as cache:
        cache.put({STATE: HEADER})
    with HeaderCache(tmp_path / "c") as cache:
        assert cache.get([STATE]) == {b"/a": HEADER}
        for other in (STATE._replace(path=b"/b"), STATE._replace(size=11), STATE._replace(changed=OLD + 1)):
            assert cache.get([other]) == {}
        assert cache.get([]) == {}


def test_a_row_of_another_reader_is_ignored_and_replaced(tmp_path, monkeypatch):
    with HeaderCache(tmp_path / "c") as cache:
        cache.put({STATE: HEADER})
    monkeypatch.setattr(header_cache, "reader_version", lambda: "newer")
    newer = Header("{}", "{}")
    with HeaderCache(tmp_path / "c") as cache:
        assert cache.get([STATE]) == {}
        cache.put({STATE: newer})
    with HeaderCache(tmp_path / "c") as cache:
        assert cache.get([STATE]) == {b"/a": newer}


def test_the_reader_version_follows_the_code(tmp_path, monkeypatch):
    before = header_cache.reader_version()
    (tmp_path / "dicom_header.py").write_text("another way to read")
    monkeypatch.setattr(header_cache, "__file__", str(tmp_path / "header_cache.py"))
    header_cache.reader_version.cache_clear()
    try:
        assert header_cache.reader_version() != before
    finally:
        header_cache.reader_version.cache_clear()


def test_a_file_changed_just_now_is_not_kept(tmp_path):
    with HeaderCache(tmp_path / "c") as cache:
        cache.put({STATE._replace(changed=time.time_ns()): HEADER})
    with sqlite3.connect(tmp_path / "c") as database:
        assert database.execute("SELECT count(*) FROM headers").fetchone() == (0,)


def test_only_the_owner_may_read_it(tmp_path):
    (tmp_path / "open").touch(mode=0o644)
    for path in (tmp_path / "new" / "c", tmp_path / "open"):
        with HeaderCache(path) as cache:
            cache.put({STATE: HEADER})
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o700


@pytest.mark.parametrize("damage", ["text", "cut", "pages", "no table"])
def test_a_damaged_cache_is_set_aside_with_one_line(tmp_path, damage, caplog):
    path = tmp_path / "c"
    with HeaderCache(path) as cache:
        cache.put({STATE._replace(path=b"/%d" % i): HEADER for i in range(3000)})
    content = path.read_bytes()
    if damage == "text":
        path.write_text("not a database at all, " * 100)
    elif damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "pages":
        path.write_bytes(content[:4096] + b"\xff" * (len(content) - 4096))
    else:
        with sqlite3.connect(path) as database:
            database.execute("DROP TABLE headers")
            database.execute("CREATE TABLE headers (something)")
    with caplog.at_level(logging.WARNING), HeaderCache(path) as cache:
        assert cache.get([STATE._replace(path=b"/%d" % i) for i in range(0, 3000, 10)]) == {}
        cache.put({STATE: HEADER})
    assert len(caplog.messages) == 1
    assert "damaged" in caplog.messages[0]
    assert "\n" not in caplog.messages[0]
    assert (tmp_path / "c.damaged").exists()
    with HeaderCache(path) as cache:
        assert cache.get([STATE]) == {b"/a": HEADER}


def test_damaged_rows_are_read_again(tmp_path):
    image = tmp_path / "tree" / "a.nii"
    image.parent.mkdir()
    write_nifti((np.zeros((2, 3, 4), np.uint8), np.eye(4)), image)
    os.utime(image, ns=(OLD, OLD))
    (before,) = find_series(image.parent, cache=tmp_path / "c")
    for common, own in (("file", "{"), ("file", "{}"), ("file", "[]"), ("{}", "{}"), ("?", "?"), ("[]", "[]")):
        with sqlite3.connect(tmp_path / "c") as database:
            assert database.execute("UPDATE headers SET common = ?, own = ?", (common, own)).rowcount == 1
        database.close()
        assert find_series(image.parent, cache=tmp_path / "c") == [before]


def test_a_database_of_something_else_is_refused(tmp_path):
    path = tmp_path / "runs.db"
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE runs (id INTEGER)")
    before = path.read_bytes()
    with pytest.raises(ConfigError, match=r"runs\.db: a database of something else"):
        HeaderCache(path)
    assert path.read_bytes() == before


def test_without_a_place_for_the_cache_everything_is_read(tmp_path, caplog):
    write_nifti((np.zeros((2, 3, 4), np.uint8), np.eye(4)), tmp_path / "a.nii")
    (tmp_path / "file").touch()
    for cache in (tmp_path / "file" / "c", tmp_path):
        caplog.clear()
        assert len(find_series(tmp_path, cache=cache)) == 1
        assert len(caplog.messages) == 1
        assert "cannot be used" in caplog.messages[0]


def test_a_process_killed_while_it_writes_leaves_a_usable_cache(tmp_path):
    path = tmp_path / "c"
    with HeaderCache(path) as cache:
        cache.put({STATE: HEADER})
    script = textwrap.dedent(f"""
        import os, signal
        from medseg.io.header_cache import FileState, Header, HeaderCache, reader_version
        cache = HeaderCache({str(path)!r})
        cache._database.execute("PRAGMA cache_size = 1")  # so that pages reach the file before the commit
        cache._database.execute("BEGIN IMMEDIATE")
        cache._database.executemany(
            "INSERT OR REPLACE INTO headers VALUES (?, 1, {OLD}, ?, 'x', 'half written' || hex(zeroblob(200)))",
            [(b"/%d" % i, reader_version()) for i in range(5000)] + [(b"/a", reader_version())],
        )
        os.kill(os.getpid(), signal.SIGKILL)
    """)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert (tmp_path / "c-journal").exists(), "the kill came in the middle"
    assert stat.S_IMODE((tmp_path / "c-journal").stat().st_mode) == 0o600
    with HeaderCache(path) as cache:
        assert cache.get([STATE, *(FileState(b"/%d" % i, 1, OLD) for i in range(100))]) == {b"/a": HEADER}


def test_while_another_process_writes_nothing_waits_and_nothing_is_lost(tmp_path, monkeypatch, caplog):
    path = tmp_path / "c"
    monkeypatch.setattr(header_cache, "_WAIT_S", 0.01)
    HeaderCache(path).close()
    other = sqlite3.connect(path, isolation_level=None)
    with HeaderCache(path) as cache:
        other.execute("BEGIN EXCLUSIVE")
        assert cache.get([STATE]) == {}
        cache.put({STATE: HEADER})
        cache._flush()
        other.execute("ROLLBACK")
        cache.put({STATE._replace(path=b"/b"): HEADER})
    other.close()
    assert caplog.messages == []
    with HeaderCache(path) as cache:
        assert set(cache.get([STATE, STATE._replace(path=b"/b")])) == {b"/b"}


def test_two_processes_share_a_cache(tmp_path):
    for i in range(300):
        path = tmp_path / "tree" / f"{i % 7}" / f"{i}.nii"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_nifti((np.zeros((2, 3, 4), np.uint8), np.eye(4)), path)
        os.utime(path, ns=(OLD, OLD))
    code = (
        "import sys; from medseg.io import find_series; "
        "print([len(find_series(sys.argv[1], cache=sys.argv[2])) for _ in range(5)])"
    )
    words = [sys.executable, "-c", code, str(tmp_path / "tree"), str(tmp_path / "c")]
    both = [subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for process in both:
        out, err = process.communicate(timeout=120)
        assert (out, err) == ("[300, 300, 300, 300, 300]\n", "")
    with sqlite3.connect(tmp_path / "c") as database:
        assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        assert database.execute("SELECT count(*) FROM headers").fetchone() == (300,)


def test_where_the_default_cache_lies(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    for value, expected in (
        ("/somewhere", "/somewhere/medseg/headers.sqlite"),
        ("", "/home/someone/.cache/medseg/headers.sqlite"),
        ("relative", "/home/someone/.cache/medseg/headers.sqlite"),
    ):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert default_cache() == Path(expected)
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache() == Path("/home/someone/.cache/medseg/headers.sqlite")
