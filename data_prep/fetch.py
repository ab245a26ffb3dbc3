"""`data_prep fetch`: public datasets whose license and host allow it, going on where a download stopped."""

import contextlib
import difflib
import email.message
import errno
import hashlib
import http.client
import json
import os
import shutil
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from medseg.errors import ConfigError, DatasetError
from medseg.io import atomic_write_text
from medseg.io.lock import only_one
from medseg.io.text import one_line
from medseg.version import __version__

if TYPE_CHECKING:
    from rich.console import Console

#: Tries without a new byte before a download is given up, seconds to wait after the first, and for an answer.
TRIES, PAUSE, TIMEOUT = 5, 2.0, 60.0
#: What was downloaded to a folder, and its hashes.
RECORD = "fetched.json"
_CHUNK = 1 << 20
#: Answers of a server that may be better the next time.
_PASSING = {408, 425, 429, 500, 502, 503, 504}

#: The images of KiTS19 where its repository downloads them from, and its labels, each at one commit.
_KITS19_IMAGES = (
    "https://huggingface.co/datasets/neheller/KiTS-Challenge-Imaging/resolve/"
    "65f1f295873a326230153c7e1de0c7dba10f0b29/images"
)
_KITS19_LABELS = "https://raw.githubusercontent.com/neheller/kits19/456b293435b25303bbc7995f094f83a0afdff0eb/data"


@dataclass(frozen=True)
class Download:
    """A file to download.

    Attributes:
        url: where it is.
        path: where it goes, below DEST.
        md5: as published; empty where none was, so that its SHA-256 can only be recorded.
        unpack: whether it is an archive to be unpacked, and removed then.
    """

    url: str
    path: str
    md5: str = ""
    unpack: bool = False


def _decathlon() -> dict[str, list[Download]]:
    from monai.apps import DecathlonDataset

    tasks = DecathlonDataset.resource.items()
    return {task: [Download(url, f"{task}.tar", DecathlonDataset.md5[task], unpack=True)] for task, url in tasks}


def _kits19() -> dict[str, list[Download]]:
    return {
        case: [
            Download(f"{_KITS19_LABELS}/kits.json", "kits.json"),
            Download(f"{_KITS19_LABELS}/{case}/segmentation.nii.gz", f"{case}/segmentation.nii.gz"),
            Download(f"{_KITS19_IMAGES}/{case}.nii.gz", f"{case}/imaging.nii.gz"),
        ]
        for case in (f"case_{number:05d}" for number in range(210))
    }


#: Downloads of each dataset by part, for the recipe of the same name.
SOURCES: dict[str, Callable[[], dict[str, list[Download]]]] = {"decathlon": _decathlon, "kits19": _kits19}


def fetch_dataset(
    name: str, dest: str | Path, parts: Sequence[str] = (), *, console: "Console | None" = None
) -> list[str]:
    """Download parts of a public dataset.

    A download that was interrupted goes on where it stopped, if the server can say that the file is still the same.
    What has a published hash is compared with it; the SHA-256 of everything is recorded in ``DEST/fetched.json``, and
    what is recorded there is not downloaded again.

    Args:
        name: of a recipe.
        dest: a folder; it is made.
        parts: which of them (``Task04_Hippocampus``, ``case_00000``).
        console: where progress goes; nowhere by default.

    Returns:
        a line per file on what became of it.

    Raises:
        ConfigError: no such dataset or part, or one that has to be downloaded by hand.
        DatasetError: a file that does not come, does not fit on the disk, or is not what was published.
    """
    available = parts_of(name)
    for part in parts:
        if part not in available:
            near = difflib.get_close_matches(part, available, n=1)
            hint = f" (nearest: {near[0]})" if near else ""
            raise ConfigError(f"{name}: no part {part!r}; it has {_shortened(list(available))}{hint}")
    if not parts:
        listed = _shortened(list(available))
        raise ConfigError(f"{name}: has {len(available)} parts ({listed}); name some by --only, or --all")
    dest = Path(dest)
    dest.mkdir(parents=True, exist_ok=True)
    wanted = list(dict.fromkeys(item for part in parts for item in available[part]))
    with only_one(dest, "fetch"), _bar(console, len(wanted)) as advance:
        return [_fetch(item, dest, advance) for item in wanted]


def parts_of(name: str) -> dict[str, list[Download]]:
    """The downloads of a dataset by part.

    Raises:
        ConfigError: there is no such dataset, or it has to be downloaded by hand; the message says how.
    """
    from data_prep.recipes import recipe_class

    if name not in SOURCES:
        origin = recipe_class(name).origin
        if origin is None:
            raise ConfigError(f"{name}: reads your own data, nothing to fetch; expected {' or '.join(SOURCES)}")
        raise ConfigError(
            f"{name}: cannot be fetched: {origin.by_hand or 'download it by hand'} "
            f"({origin.address}; license: {origin.license})"
        )
    return SOURCES[name]()


def show_fetched(name: str, dest: Path, parts: Sequence[str], every: bool) -> None:
    """Fetch for the command line: terms and progress on stderr, what was done on stdout."""
    import click
    from rich.console import Console

    from data_prep.recipes import recipe_class

    available = parts_of(name)
    origin = recipe_class(name).origin
    assert origin is not None
    click.echo(f"{name}: {origin.address}; license: {origin.license}; cite {origin.citation}", err=True)
    try:
        lines = fetch_dataset(name, dest, list(available) if every else parts, console=Console(stderr=True))
    except KeyboardInterrupt:
        click.echo("interrupted; run the same command again to go on", err=True)
        raise SystemExit(130) from None
    for line in lines:
        click.echo(line)


def show_parts() -> None:
    """Print what can be fetched, and how the rest is had."""
    import click

    from data_prep.recipes import RECIPES, recipe_class

    for name in RECIPES:
        origin = recipe_class(name).origin
        if name in SOURCES:
            click.echo(f"{name}: {_shortened(list(parts_of(name)), 12)}")
        elif origin is not None:
            click.echo(f"{name}: by hand: {origin.by_hand or 'download it'} ({origin.address})")


# One file


def _fetch(item: Download, dest: Path, advance: Callable[[int, int | None, str], None]) -> str:
    """Download, check, record and unpack a file, unless that was done before."""
    target = dest / item.path
    result = dest / item.path.removesuffix(".tar") if item.unpack else target
    record = _read_record(dest)
    if item.path in record and result.exists():
        advance(0, None, "")
        return f"{item.path}: there already"
    if result.exists() and item.unpack:
        raise DatasetError(f"{result}: there already, but not recorded in {RECORD}: move it away, or use it as it is")
    target.parent.mkdir(parents=True, exist_ok=True)
    part, about = (target.with_name(f"{target.name}{suffix}") for suffix in (".part", ".part.json"))
    for last in (False, True):
        resumed = part.exists() and part.stat().st_size > 0
        size = _transfer(item, part, about, dest, lambda done, total: advance(done, total, item.path))
        md5, sha256 = _digests(part)
        if not item.md5 or md5 == item.md5:
            break
        part.unlink()
        about.unlink(missing_ok=True)
        if last or not resumed:  # one that went on may have been spoiled before; it is given one fresh try
            raise DatasetError(
                f"{item.path}: MD5 {md5} downloaded, expected {item.md5}: the file at {_shown(item.url)} is not the "
                "published one, or was damaged on its way; removed, try again"
            )
    with part.open("rb+") as file:
        os.fsync(file.fileno())
    part.replace(target)
    about.unlink(missing_ok=True)
    if item.unpack:
        _unpack(target, dest)
    record = _read_record(dest) | {
        item.path: {"url": item.url, "bytes": size, "sha256": sha256, "md5": md5, "verified": bool(item.md5)}
    }
    atomic_write_text(dest / RECORD, json.dumps(record, indent=1) + "\n")
    if item.unpack:
        target.unlink()
    known = "MD5 as published" if item.md5 else f"no published hash; SHA-256 {sha256} recorded"
    return f"{item.path}: {size:,} bytes, {known}"


def _transfer(item: Download, part: Path, about: Path, dest: Path, advance: Callable[[int, int | None], None]) -> int:
    """Download to ``part``, again and again while something comes; its size in the end."""
    tries = 0
    while True:
        before = part.stat().st_size if part.exists() else 0
        wait = PAUSE * 2**tries
        try:
            return _attempt(item, part, about, dest, advance)
        except urllib.error.HTTPError as error:
            why = f"{error.code} {http.client.responses.get(error.code, '')}".strip()
            if 300 <= error.code < 400:
                raise DatasetError(f"{_shown(item.url)}: sent on to what is no page of the web, refused") from None
            if error.code not in _PASSING:
                raise DatasetError(f"{_shown(item.url)}: the server answers {why}: was it moved?") from None
            wait = max(wait, min(_seconds(error.headers.get("Retry-After")), 300))
        except (OSError, http.client.HTTPException) as error:
            number = getattr(error, "errno", None)
            if number in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
                raise
            why = str(getattr(error, "reason", None) or error) or type(error).__name__
        tries = 1 if part.exists() and part.stat().st_size > before else tries + 1
        if tries >= TRIES:
            raise DatasetError(
                f"{_shown(item.url)}: {one_line(why)[:300]} ({TRIES} tries); what came is kept, run the same command "
                "again to go on"
            )
        time.sleep(wait)


def _attempt(item: Download, part: Path, about: Path, dest: Path, advance: Callable[[int, int | None], None]) -> int:
    """One request: for the rest where that is sure to be of the same file, else for all of it."""
    known = _read_json(about)
    done = part.stat().st_size if part.exists() else 0
    validator = known.get("validator", "")
    if known.get("url") != item.url or not (validator or item.md5):
        done = 0
    headers = {"User-Agent": f"medseg/{__version__}", "Accept-Encoding": "identity"}
    if done:
        headers["Range"] = f"bytes={done}-"
        if validator:
            headers["If-Range"] = validator
    try:
        response = _open(item.url, headers)
    except urllib.error.HTTPError as error:
        if error.code != http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            raise
        if done and _length(error.headers) == done:
            return done  # all of it had come
        part.unlink(missing_ok=True)
        raise ConnectionError("the file is another than the one begun") from None
    with response:
        start, total = _range(response, done)
        if start != done:
            done = 0
        _check_room(dest, item, done, total)
        if not done:
            part.unlink(missing_ok=True)  # before what is known of it changes: a kill in between must not mix two files
        about.write_text(json.dumps({"url": item.url, "validator": _validator(response.headers)}), encoding="utf-8")
        with part.open("ab" if done else "wb") as file:
            advance(done, total)
            while chunk := response.read(_CHUNK):
                file.write(chunk)
                done += len(chunk)
                advance(done, total)
    if total is not None and done != total:
        raise ConnectionError(f"the connection ended after {done:,} of {total:,} bytes")
    return done


class _Redirects(urllib.request.HTTPRedirectHandler):
    """To other pages of the web only, and never from an encrypted one to one that is not."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        scheme = urllib.parse.urlsplit(newurl).scheme
        if scheme != "https" and scheme != req.type:
            raise DatasetError(f"{_shown(req.full_url)}: sent on to {scheme or 'nowhere'}, which is refused")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _open(url: str, headers: dict[str, str]) -> Any:
    if urllib.parse.urlsplit(url).scheme not in ("http", "https"):
        raise DatasetError(f"{_shown(url)}: expected an address that begins with https")
    opener = urllib.request.build_opener(_Redirects())
    return opener.open(urllib.request.Request(url, headers=headers), timeout=TIMEOUT)


def _range(response: Any, asked: int) -> tuple[int, int | None]:
    """Where the answer begins, and how long the whole file is."""
    if response.status == http.HTTPStatus.PARTIAL_CONTENT:
        given = response.headers.get("Content-Range", "").removeprefix("bytes ").partition("-")[0]
        if given != str(asked):
            raise http.client.HTTPException(f"bytes from {asked} asked for, from {given or 'nowhere'} given")
        return asked, _length(response.headers)
    length = response.headers.get("Content-Length", "")
    return 0, int(length) if length.isdigit() else None


def _length(headers: email.message.Message) -> int | None:
    """Of the whole file, by the header of a part of it."""
    total = str(headers.get("Content-Range", "")).rpartition("/")[2]
    return int(total) if total.isdigit() else None


def _validator(headers: email.message.Message) -> str:
    """What tells this version of the file from another; a weak tag does not."""
    tag = str(headers.get("ETag", ""))
    return tag if tag.startswith('"') else str(headers.get("Last-Modified", ""))


def _check_room(dest: Path, item: Download, done: int, total: int | None) -> None:
    free = shutil.disk_usage(dest).free
    needed = (total or 0) * (2 if item.unpack else 1) - done
    if needed > free:
        raise DatasetError(
            f"{dest}: {item.path} needs {needed / 1e9:.1f} GB{' with what it unpacks to' if item.unpack else ''}, "
            f"{free / 1e9:.1f} GB are free: make room, or choose another folder"
        )


def _digests(path: Path) -> tuple[str, str]:
    md5, sha256 = hashlib.md5(usedforsecurity=False), hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            md5.update(chunk)
            sha256.update(chunk)
    return md5.hexdigest(), sha256.hexdigest()


def _unpack(archive: Path, dest: Path) -> None:
    """Unpack beside, and put into place when that has ended well; members that lead elsewhere are refused."""
    import logging
    import tarfile

    from monai.apps.utils import extractall

    logging.getLogger("monai.apps").setLevel(logging.WARNING)
    beside = dest / f".unpacking-{archive.name}"
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir()
    try:
        extractall(archive, beside, file_type="tar", has_base=False)
        expected = archive.name.removesuffix(".tar")
        found = sorted(path.name for path in beside.iterdir() if not path.name.startswith("."))
        if found != [expected]:
            raise DatasetError(f"{archive}: holds {_shortened(found) or 'nothing'}, expected the folder {expected}")
        (beside / expected).replace(dest / expected)
    except (ValueError, tarfile.TarError, EOFError) as error:
        raise DatasetError(f"{archive}: cannot be unpacked: {one_line(error)[:300]}") from None
    finally:
        shutil.rmtree(beside, ignore_errors=True)


# Odds and ends


@contextlib.contextmanager
def _bar(console: "Console | None", n_files: int) -> Iterator[Callable[[int, int | None, str], None]]:
    """Show bytes, speed and time left of the file at work."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    hidden = console is None or not console.is_terminal
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=hidden, transient=True) as progress:
        task = progress.add_task(f"{n_files} file(s)", total=None)
        yield lambda done, total, name: progress.update(task, completed=done, total=total, description=name)


def _read_record(dest: Path) -> dict[str, Any]:
    return _read_json(dest / RECORD)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _seconds(text: str | None) -> float:
    return float(text) if text is not None and text.isdigit() else 0.0


def _shown(url: str) -> str:
    """An address without what may be secret in it: user, password, signature."""
    parts = urllib.parse.urlsplit(url)
    host = f"{parts.hostname or ''}{f':{parts.port}' if parts.port else ''}"
    return urllib.parse.urlunsplit((parts.scheme, host, parts.path, "", ""))


def _shortened(names: Sequence[str], most: int = 6) -> str:
    return ", ".join(names) if len(names) <= most else f"{', '.join(names[: most - 2])}, … {names[-1]}"
