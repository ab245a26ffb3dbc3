"""What a worker does with one case: look at it, or make and write it. What goes wrong becomes an answer."""

import contextlib
import errno
import json
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.fingerprint import sha256
from data_prep.recipes.base import Case, Plan, Recipe
from medseg.errors import DatasetError, MedsegError
from medseg.io import atomic_write_bytes, atomic_write_text
from medseg.io.atomic import flushed_later
from medseg.io.workers import WorkerDied

#: Where the records of finished cases lie while a build is under way (medseg.data.folder.UNFINISHED).
WORK = ".build"
#: A disk that takes no more; what is on it already stays.
DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}


@dataclass(frozen=True)
class Failure:
    """A case that went wrong: one line, where what was not foreseen happened, the error of a disk that is full."""

    message: str
    trace: str = ""
    disk: int = 0


def survey_case(recipe: Recipe, case: Case) -> Any:
    """What the recipe says of a case before any is made, or a :class:`Failure`."""
    with _as_answer() as caught:
        return json.loads(json.dumps(recipe.survey(case)))  # as the next build will read it
    return caught[0]


def make_case(recipe: Recipe, plan: Plan, out: Path, name: str, case: Case, about: Mapping[str, Any]) -> Any:
    """Make and write one case, and then its record; the answer is the record, or a :class:`Failure`.

    Args:
        recipe: which makes it.
        plan: what all cases have in common.
        out: the dataset.
        name: of the case there.
        case: what is to be made.
        about: what the record shall say besides.
    """
    from medseg.data.folder import attachment_name, image_names, label_name, write_case

    # The build flushes the files of all cases at once, before it writes what describes them.
    with _as_answer() as caught, flushed_later():
        sample = recipe.make(case, plan)
        files = image_names(name, len(sample.image))
        if plan.classes:
            if sample.label is not None or sample.target not in plan.classes:
                raise DatasetError(f"class {sample.target!r} found, one of {', '.join(plan.classes)} expected")
            row = write_case(out, name, sample.image) | {"class": sample.target}
        else:
            row = write_case(out, name, sample.image, sample.label, plan.labels)
            files.append(label_name(name))
        for attached, content in sample.attachments.items():
            files.append(attachment_name(name, attached))
            (out / files[-1]).parent.mkdir(exist_ok=True)
            atomic_write_bytes(out / files[-1], content)
        record = {**about, "row": row | sample.columns, "files": {file: sha256(out / file) for file in files}}
        atomic_write_text(out / WORK / f"{name}.json", json.dumps(record))
        return record
    return caught[0]


@contextlib.contextmanager
def _as_answer() -> Iterator[list[Failure]]:
    """Turn what goes wrong with one case into an answer, so that the others go on.

    A lack of memory is left to the workers, which give the case another chance alone.
    """
    caught: list[Failure] = []
    try:
        yield caught
    except MedsegError as error:
        caught.append(Failure(str(error)))
    except MemoryError:
        raise
    except OSError as error:
        if error.errno == errno.ENOMEM:
            raise MemoryError from error
        caught.append(Failure(what_it_says(error), disk=error.errno if error.errno in DISK_FULL else 0))
    except Exception as error:  # a defect of ours or of a library, met by one case of many
        if _is_refused_memory(error):
            raise MemoryError from error
        # Lines of code only: what the errors say may tell who the patient is.
        trace = "".join(traceback.format_tb(error.__traceback__))
        caught.append(Failure(f"unexpected {type(error).__name__}: {error}", trace))


def what_it_says(error: Exception) -> str:
    """The message of an error; of one of the system, its file and reason."""
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    return str(error)


def _is_refused_memory(error: Exception) -> bool:
    """Whether torch or ITK were refused memory; both say so in words only."""
    text = str(error).lower()
    return isinstance(error, RuntimeError) and ("can't allocate memory" in text or "failed to allocate" in text)


def as_failure(answer: "Failure | WorkerDied") -> Failure:
    """What a worker could not answer itself."""
    return Failure(str(answer)) if isinstance(answer, WorkerDied) else answer
