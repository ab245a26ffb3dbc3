"""Fetching public datasets, from a server of our own that cuts, lies and changes its mind."""

import hashlib
import io
import json
import shutil
import tarfile
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import data_prep.fetch
from data_prep.catalog import catalog
from data_prep.cli import main
from data_prep.fetch import Download, fetch_dataset, parts_of
from data_prep.recipes import RECIPES, recipe_class
from medseg.errors import ConfigError, DatasetError
from medseg.io.lock import only_one

CONTENT = np.random.default_rng(0).bytes(300_000)


class Server(ThreadingHTTPServer):
    """Serves ``files``; how badly is said by the other attributes."""

    daemon_threads = True
    url = ""

    def behave(self) -> None:
        self.files: dict[str, bytes] = {"/a.nii.gz": CONTENT}
        self.etag: str | None = '"one"'
        self.ranges = True
        self.cuts: list[int] = []  # how many bytes each answer may have before the connection ends
        self.answers: list[int] = []  # statuses to give before anything else
        self.redirects: dict[str, str] = {}
        self.chunked = False
        self.seen: list[tuple[str, str | None]] = []


class Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        server, asked = self.server, self.headers.get("Range")
        server.seen.append((self.path, asked))
        self.close_connection = True
        path = self.path.partition("?")[0]
        if server.answers:
            return self.answer(server.answers.pop(0))
        if path in server.redirects:
            return self.answer(302, Location=server.redirects[path])
        if path not in server.files:
            return self.answer(404)
        body = server.files[path]
        headers = {"ETag": server.etag} if server.etag else {}
        start, status = 0, 200
        if asked and server.ranges and self.headers.get("If-Range") in (None, server.etag):
            start, status = int(asked.removeprefix("bytes=").rstrip("-")), 206
            if start >= len(body):
                return self.answer(416, **{"Content-Range": f"bytes */{len(body)}"})
            headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
        part = body[start:]
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if server.chunked:
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            self.wfile.write(b"%x\r\n%s\r\n0\r\n\r\n" % (len(part), part))
            return None
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        self.wfile.write(part[: server.cuts.pop(0)] if server.cuts else part)
        return None

    def answer(self, status: int, **headers: str) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": "0"}.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    with Server(("127.0.0.1", 0), Handler) as running:
        running.behave()
        running.url = f"http://127.0.0.1:{running.server_address[1]}"
        thread = threading.Thread(target=running.serve_forever, args=(0.01,))
        thread.start()
        monkeypatch.setattr(data_prep.fetch, "PAUSE", 0)
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
            monkeypatch.delenv(name, raising=False)
        yield running
        running.shutdown()
        thread.join()


@pytest.fixture
def offer(monkeypatch: pytest.MonkeyPatch, server: Server) -> Any:
    """Let the dataset ``kits19`` be one file of the server."""

    def of(path: str = "/a.nii.gz", **known: Any) -> None:
        download = Download(server.url + path, path.strip("/").partition("?")[0], **known)
        monkeypatch.setitem(data_prep.fetch.SOURCES, "kits19", lambda: {"a": [download]})

    return of


def md5(content: bytes) -> str:
    return hashlib.md5(content).hexdigest()


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_a_file_comes_whole_is_recorded_and_not_fetched_again(server: Server, offer: Any, tmp_path: Path) -> None:
    offer()
    sha256 = hashlib.sha256(CONTENT).hexdigest()
    (line,) = fetch_dataset("kits19", tmp_path, ["a"])
    assert line == f"a.nii.gz: 300,000 bytes, no published hash; SHA-256 {sha256} recorded"
    assert (tmp_path / "a.nii.gz").read_bytes() == CONTENT
    assert names(tmp_path) == ["a.nii.gz", "fetched.json"]
    record = json.loads((tmp_path / "fetched.json").read_text())["a.nii.gz"]
    assert (record["sha256"], record["bytes"], record["verified"]) == (sha256, 300_000, False)
    assert fetch_dataset("kits19", tmp_path, ["a"]) == ["a.nii.gz: there already"]
    assert len(server.seen) == 1
    (tmp_path / "a.nii.gz").unlink()  # recorded but gone
    fetch_dataset("kits19", tmp_path, ["a"])
    assert (tmp_path / "a.nii.gz").read_bytes() == CONTENT


def test_a_cut_connection_goes_on_where_it_stopped(server: Server, offer: Any, tmp_path: Path) -> None:
    offer(md5=md5(CONTENT))
    server.cuts = [100_000, 50_000]
    (line,) = fetch_dataset("kits19", tmp_path, ["a"])
    assert line == "a.nii.gz: 300,000 bytes, MD5 as published"
    assert (tmp_path / "a.nii.gz").read_bytes() == CONTENT
    assert [asked for _, asked in server.seen] == [None, "bytes=100000-", "bytes=150000-"]


def test_a_later_run_goes_on_too(server: Server, offer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    offer()
    monkeypatch.setattr(data_prep.fetch, "TRIES", 1)
    server.cuts = [120_000]
    with pytest.raises(DatasetError, match=r"ended after 120,000 of 300,000 bytes .* run the same command again"):
        fetch_dataset("kits19", tmp_path, ["a"])
    assert names(tmp_path) == ["a.nii.gz.part", "a.nii.gz.part.json"]
    fetch_dataset("kits19", tmp_path, ["a"])
    assert server.seen[-1] == ("/a.nii.gz", "bytes=120000-")
    assert (tmp_path / "a.nii.gz").read_bytes() == CONTENT
    assert names(tmp_path) == ["a.nii.gz", "fetched.json"]


@pytest.mark.parametrize("change", ["etag", "no ranges", "weak", "shorter"])
def test_what_may_be_another_file_is_begun_anew(
    server: Server, offer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    offer()
    monkeypatch.setattr(data_prep.fetch, "TRIES", 2)
    if change == "weak":
        server.etag = 'W/"one"'
    server.cuts = [120_000, 0, 0]
    with pytest.raises(DatasetError):
        fetch_dataset("kits19", tmp_path, ["a"])
    server.cuts = []
    other = CONTENT[::-1]
    if change == "etag":
        server.files["/a.nii.gz"], server.etag = other, '"two"'
    elif change == "no ranges":
        server.files["/a.nii.gz"], server.ranges = other, False
    elif change == "weak":
        server.files["/a.nii.gz"] = other
    else:
        server.files["/a.nii.gz"] = other = other[:1000]  # with the same ETag: a server that errs
    fetch_dataset("kits19", tmp_path, ["a"])
    assert (tmp_path / "a.nii.gz").read_bytes() == other


def test_all_had_come_but_the_end_of_the_run(server: Server, offer: Any, tmp_path: Path) -> None:
    offer()
    (tmp_path / "a.nii.gz.part").write_bytes(CONTENT)
    about = {"url": f"{server.url}/a.nii.gz", "validator": '"one"'}
    (tmp_path / "a.nii.gz.part.json").write_text(json.dumps(about))
    fetch_dataset("kits19", tmp_path, ["a"])
    assert (tmp_path / "a.nii.gz").read_bytes() == CONTENT
    assert len(server.seen) == 1


def test_a_spoiled_beginning_gets_one_fresh_try_and_a_wrong_file_none(
    server: Server, offer: Any, tmp_path: Path
) -> None:
    offer(md5=md5(CONTENT))
    (tmp_path / "a.nii.gz.part").write_bytes(b"x" * 1000)
    about = {"url": f"{server.url}/a.nii.gz", "validator": '"one"'}
    (tmp_path / "a.nii.gz.part.json").write_text(json.dumps(about))
    fetch_dataset("kits19", tmp_path, ["a"])
    assert (tmp_path / "a.nii.gz").read_bytes() == CONTENT
    assert [asked for _, asked in server.seen] == ["bytes=1000-", None]

    offer(md5=md5(b"something else"))
    with pytest.raises(DatasetError, match=f"MD5 {md5(CONTENT)} downloaded, expected {md5(b'something else')}"):
        fetch_dataset("kits19", tmp_path / "other", ["a"])
    assert names(tmp_path / "other") == []


def test_a_server_in_trouble_is_asked_again_and_a_missing_file_is_not(
    server: Server, offer: Any, tmp_path: Path
) -> None:
    offer()
    server.answers = [503, 429, 500]
    fetch_dataset("kits19", tmp_path, ["a"])
    assert len(server.seen) == 4
    server.answers = [503] * 5
    with pytest.raises(DatasetError, match=r"503 Service Unavailable \(5 tries\)"):
        fetch_dataset("kits19", tmp_path / "b", ["a"])
    server.seen.clear()
    offer("/moved.nii.gz?signature=secret")
    with pytest.raises(DatasetError, match="the server answers 404 Not Found") as caught:
        fetch_dataset("kits19", tmp_path / "c", ["a"])
    assert "secret" not in str(caught.value)
    assert len(server.seen) == 1


def test_a_length_that_is_not_told_is_no_trouble(server: Server, offer: Any, tmp_path: Path) -> None:
    offer()
    server.chunked = True
    fetch_dataset("kits19", tmp_path, ["a"])
    assert (tmp_path / "a.nii.gz").read_bytes() == CONTENT


@pytest.mark.parametrize("where", ["file:///etc/passwd", "ftp://127.0.0.1/x", "data:,x"])
def test_a_server_sends_on_to_the_web_only(server: Server, offer: Any, tmp_path: Path, where: str) -> None:
    offer("/old.nii.gz")
    server.redirects["/old.nii.gz"] = "/a.nii.gz"
    fetch_dataset("kits19", tmp_path, ["a"])
    assert (tmp_path / "old.nii.gz").read_bytes() == CONTENT
    server.redirects["/old.nii.gz"] = where
    with pytest.raises(DatasetError, match=r"sent on to .* refused"):
        fetch_dataset("kits19", tmp_path / "b", ["a"])
    assert names(tmp_path / "b") == []


def test_a_disk_without_room_is_told_before(
    server: Server, offer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offer()
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=299_999))
    with pytest.raises(DatasetError, match=r"needs 0.0 GB, 0.0 GB are free: make room"):
        fetch_dataset("kits19", tmp_path, ["a"])
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=300_000))
    fetch_dataset("kits19", tmp_path, ["a"])


def tar(path: Path, members: dict[str, bytes | str]) -> bytes:
    """An archive; a member given as a text is a link to it."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        for name, value in members.items():
            member = tarfile.TarInfo(name)
            if isinstance(value, str):
                member.type, member.linkname = tarfile.SYMTYPE, value
                archive.addfile(member)
            else:
                member.size = len(value)
                archive.addfile(member, io.BytesIO(value))
    return content.getvalue()


def test_an_archive_is_unpacked_and_removed(server: Server, offer: Any, tmp_path: Path) -> None:
    members: dict[str, bytes | str] = {"Task/dataset.json": b"{}", "._Task": b"x", "Task/imagesTr/a.nii.gz": CONTENT}
    server.files["/Task.tar"] = tar(tmp_path, members)
    offer("/Task.tar", unpack=True, md5=md5(server.files["/Task.tar"]))
    fetch_dataset("kits19", tmp_path, ["a"])
    assert names(tmp_path) == ["Task/dataset.json", "Task/imagesTr/a.nii.gz", "fetched.json"]
    assert fetch_dataset("kits19", tmp_path, ["a"]) == ["Task.tar: there already"]
    (tmp_path / "fetched.json").unlink()
    with pytest.raises(DatasetError, match=r"Task: there already, but not recorded in fetched.json"):
        fetch_dataset("kits19", tmp_path, ["a"])


@pytest.mark.parametrize(
    "members",
    [
        {"Task/a": b"", "../outside": b"x"},
        {"Task/a": b"", "/tmp/outside": b"x"},
        {"Task/a": b"", "Task/link": "/etc", "Task/link/outside": b"x"},
        {"Task/a": b"", "Task/link": "../.."},
        {"Other/a": b""},
        {},
    ],
    ids=["parent", "absolute", "through a link", "link", "another folder", "empty"],
)
def test_an_archive_cannot_write_elsewhere(server: Server, offer: Any, tmp_path: Path, members: dict[str, Any]) -> None:
    dest = tmp_path / "inner" / "dest"
    server.files["/Task.tar"] = tar(tmp_path, members)
    offer("/Task.tar", unpack=True)
    with pytest.raises(DatasetError) as caught:
        fetch_dataset("kits19", dest, ["a"])
    assert "\n" not in str(caught.value)
    assert names(tmp_path) == ["inner/dest/Task.tar"]
    assert not Path("/tmp/outside").exists()


def test_a_damaged_archive_is_named(server: Server, offer: Any, tmp_path: Path) -> None:
    server.files["/Task.tar"] = tar(tmp_path, {"Task/a": CONTENT})[:2000]
    offer("/Task.tar", unpack=True)
    with pytest.raises(DatasetError, match=r"Task.tar: cannot be unpacked"):
        fetch_dataset("kits19", tmp_path, ["a"])
    assert names(tmp_path) == ["Task.tar"]


def test_two_fetches_do_not_write_into_one_folder(server: Server, offer: Any, tmp_path: Path) -> None:
    offer()
    with only_one(tmp_path, "fetch"), pytest.raises(DatasetError, match="another fetch is at work"):
        fetch_dataset("kits19", tmp_path, ["a"])


def test_the_command(server: Server, offer: Any, tmp_path: Path) -> None:
    offer()
    run = CliRunner()
    done = run.invoke(main, ["fetch", "kits19", str(tmp_path), "--all"])
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith("a.nii.gz: 300,000 bytes")
    origin = recipe_class("kits19").origin
    assert origin is not None
    assert done.stderr == f"kits19: {origin.address}; license: {origin.license}; cite {origin.citation}\n"
    for words, message in (
        (["kits19", str(tmp_path)], "kits19: has 1 parts (a); name some by --only, or --all"),
        (["kits19", str(tmp_path), "--only", "b"], "kits19: no part 'b'; it has a"),
        (["drive", str(tmp_path), "--all"], "register at the address"),
        (["folder", str(tmp_path), "--all"], "reads your own data"),
        (["kits91", str(tmp_path), "--all"], "(nearest: kits19)"),
    ):
        result = run.invoke(main, ["fetch", *words])
        assert result.exit_code == 1
        assert message in result.stderr.splitlines()[-1]
        assert result.stderr.splitlines()[-1].startswith("error: ")
    for words in ([], ["kits19"], ["kits19", "x", "--all", "--only", "a"]):
        assert run.invoke(main, ["fetch", *words]).exit_code == 2
    listed = run.invoke(main, ["fetch", "--list"])
    assert listed.exit_code == 0
    assert "decathlon: Task01_BrainTumour, " in listed.stdout
    assert "drive: by hand: register" in listed.stdout


def test_the_published_hashes_are_monais() -> None:
    from monai.apps import DecathlonDataset

    parts = parts_of("decathlon")
    assert {part: items[0].md5 for part, items in parts.items()} == DecathlonDataset.md5
    assert {part: items[0].url for part, items in parts.items()} == DecathlonDataset.resource
    with pytest.raises(ConfigError, match=r"no part 'Task4_Hippocampus'; .*nearest: Task04_Hippocampus"):
        fetch_dataset("decathlon", "nowhere", ["Task4_Hippocampus"])
    assert not Path("nowhere").exists()


def test_every_download_is_below_dest_and_over_https() -> None:
    for name in data_prep.fetch.SOURCES:
        for items in parts_of(name).values():
            for item in items:
                assert item.url.startswith("https://")
                assert not Path(item.path).is_absolute()
                assert ".." not in item.path.split("/")


def test_the_catalog_says_of_every_public_recipe_how_it_is_had() -> None:
    rows = {row["name"]: row for row in catalog()}
    assert list(rows) == list(RECIPES)
    for name, row in rows.items():
        assert row["makes"] in ("segmentation", "classification")
        assert row["summary"]
        assert bool(row["address"]) == row["public"]
        if row["public"]:
            assert row["license"]
            assert row["citation"]
            assert row["fetch"] or row["by_hand"], f"{name}: neither fetched nor told how to get it"
    assert {name for name, row in rows.items() if row["fetch"]} == {"decathlon", "kits19"}
    classifications = {name for name, row in rows.items() if row["makes"] == "classification"}
    assert classifications == {"prostatex", "lungx", "brain_mri"}
    done = CliRunner().invoke(main, ["recipes", "--json"])
    assert json.loads(done.stdout) == list(rows.values())
    table = CliRunner().invoke(main, ["recipes"]).stdout
    for name in RECIPES:
        assert f" {name} " in table
