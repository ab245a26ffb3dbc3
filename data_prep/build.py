"""From a source to a dataset, by a recipe: in parallel, going on where it stopped, without identifiers."""

import contextlib
import dataclasses
import errno
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_prep.clinical import UNKNOWN, read_strata
from data_prep.fingerprint import below, describe_case, fingerprint, hash_files, versions
from data_prep.identity import KeyFile, mask, safe_name
from data_prep.making import DISK_FULL, WORK, Failure, as_failure, make_case, survey_case, what_it_says
from data_prep.recipes.base import Case, Plan, Recipe, Selection, Unpaired
from medseg.errors import ConfigError, DatasetError, MedsegError
from medseg.io.lock import only_one
from medseg.io.text import one_line
from medseg.io.workers import WorkerDied, Workers

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

    from data_prep.cluster import RayWorkers

#: Where the files of the cases are.
FOLDERS = ("imagesTr", "labelsTr", "attachments")
#: Files made from a finished dataset, which another set of cases makes false.
DERIVED = ("splits.json", "splits_final.json", "slices.h5")


@dataclass(frozen=True)
class Problem:
    """One line about what was not built: a failed case, or files without a partner."""

    case: str
    what: str
    sources: tuple[int, ...] = ()
    trace: str = field(default="", repr=False)


@dataclass
class BuildResult:
    """What a build did.

    Attributes:
        out: the dataset.
        built: cases made now.
        kept: cases that were there already and still hold.
        removed: cases that the source has no more.
        failed: cases that could not be made, with the reason; names as the terminal may show them.
        unpaired: files that found no partner.
        notes: what a person should know besides.
    """

    out: Path
    built: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    failed: list[Problem] = field(default_factory=list)
    unpaired: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def build_dataset(
    recipe: Recipe,
    source: str | Path,
    out: str | Path,
    *,
    jobs: int | None = None,
    ray: str | None = None,
    key: str | Path | None = None,
    keep_identifiers: bool | None = None,
    clinical: Sequence[str | Path] = (),
    id_column: str = "patient_id",
    stratum_column: str | None = None,
    report: bool = True,
    console: "Console | None" = None,
) -> BuildResult:
    """Build a dataset, or go on with one.

    A case is made again when its sources, the recipe's options or the version of a library that matters changed; a case
    that the source has no more disappears. A build that was killed ends, when it is run again, byte for byte as if it
    had never stopped. One bad case never ends the others.

    Args:
        recipe: what to select and what to make.
        source: the folder with the raw data.
        out: the dataset; an empty or new folder, or one that this recipe built.
        jobs: how many cases at once, each in a process of its own (1: in this one); by default a process per core.
        ray: the address of a Ray cluster whose nodes make the cases instead of processes here (``auto``,
            ``ray://HOST:10001``, ``HOST:6379``, or ``local``); they see the source and ``out`` by the same paths.
        key: the key file of another dataset, to give its patients the same pseudonyms. Without it a key is made, and
            kept beside the dataset (``OUT.key``).
        keep_identifiers: name cases and patients as the source does, for public data only; by default as the recipe
            says (``Recipe.public``).
        clinical: CSV files with a row per patient.
        id_column: their column with the patient's identifier, as in the source.
        stratum_column: their column that becomes ``stratum`` in cases.csv.
        report: write report.html.
        console: where progress goes; nowhere by default.

    Returns:
        what was built and what was not.

    Raises:
        DatasetError: nothing to build, nothing could be built, OUT holds something else, or the cases of a dataset that
            is split already would change.
        ConfigError: options that do not fit the source, or a Ray cluster that cannot be used.
        OSError: the disk is full; what was built stays, and the same build goes on from there.
    """
    source, out = Path(source).absolute(), Path(out).absolute()
    if ray is not None and jobs is not None:
        raise ConfigError("--jobs and --ray exclude each other: a Ray cluster works on as many cases as it has CPUs")
    jobs = jobs or len(os.sched_getaffinity(0))
    keep_identifiers = recipe.public if keep_identifiers is None else keep_identifiers
    if not source.is_dir():
        raise DatasetError(f"{source}: no such folder; give the folder with the raw data")
    if out.resolve() == source.resolve() or source.resolve() in out.resolve().parents:
        raise ConfigError(f"OUT {out} lies inside SOURCE {source}; choose a folder elsewhere")
    if out.resolve() in source.resolve().parents:
        raise ConfigError(f"SOURCE {source} lies inside OUT {out}; choose another OUT")
    _check_is_ours(out, recipe.name)
    strata = read_strata([Path(path) for path in clinical], id_column, stratum_column)
    new = not out.exists()
    recipe.jobs = jobs
    try:
        with _workers(jobs, ray, source, out) as workers:
            selection = _select(recipe, source, console, keep_identifiers)
            out.mkdir(parents=True, exist_ok=True)
            with only_one(out, "build"), _tidy(out, new):
                build = _Build(recipe, source, out, selection, workers, keep_identifiers, console, key)
                build.strata, build.clinical = strata, [Path(path).absolute() for path in clinical]
                return build.run(report)
    except OSError as error:
        if error.errno in DISK_FULL:
            todo = "make it writable" if error.errno == errno.EROFS else "make room"
            message = f"{os.strerror(error.errno)}; {todo} and run the same command again"
            raise OSError(error.errno, message, str(out)) from error
        raise


def _select(recipe: Recipe, source: Path, console: "Console | None", keep_identifiers: bool) -> Selection:
    """What the recipe finds in the source, which is something."""
    try:
        with _progress(console) as progress:
            task = progress.add_task("looking through the source", total=None)
            total = 0 if progress.disable else sum(len(names) for _, _, names in os.walk(source))
            recipe.progress = lambda seen: progress.update(task, completed=seen, total=max(seen, total))
            selection = recipe.select(source)
    except (MedsegError, OSError) as error:
        said = what_it_says(error)
        if keep_identifiers or f"{source}/" not in said:
            raise
        raise DatasetError(mask(said, {}, root=source)) from None
    finally:
        recipe.progress = None  # workers, who get the recipe, have none
    if not selection.cases:
        why = [mask(item.why, dict.fromkeys(item.files, "a file"), root=source) for item in selection.unpaired]
        reasons = "; ".join(f"{count} x {reason}" for reason, count in Counter(why).most_common(3))
        raise DatasetError(
            f"{source}: nothing for the recipe {recipe.name} in it{f' ({reasons})' if reasons else ''}: expected "
            f"{recipe.needs}; `data_prep inspect` shows what is there"
        )
    return selection


def _workers(jobs: int, ray: str | None, source: Path, out: Path) -> "Workers | RayWorkers":
    if ray is None:
        return Workers(jobs, imports=("monai.data",))
    from data_prep.cluster import RayWorkers

    return RayWorkers(ray, source, out)


class _Build:
    """One run of a build; its methods are the steps, in order."""

    def __init__(
        self,
        recipe: Recipe,
        source: Path,
        out: Path,
        selection: Selection,
        workers: "Workers | RayWorkers",
        keep_identifiers: bool,
        console: "Console | None",
        key: str | Path | None,
    ) -> None:
        self.recipe, self.source, self.out, self.selection = recipe, source, out, selection
        self.workers, self.keep_identifiers, self.console = workers, keep_identifiers, console
        self.key_path = out.with_name(out.name + ".key")
        self.key_is_new = not self.key_path.exists()
        self.key = KeyFile.open(self.key_path, Path(key) if key is not None else None)
        if self.key_is_new and key is None and not keep_identifiers and _has_pseudonyms(out):
            raise DatasetError(
                f"{self.key_path}: no such file, but {out.name} was built with it: put it back or give it by --key; "
                "another key would rename every patient"
            )
        self.strata: dict[str, str] | None = None
        self.clinical: list[Path] = []
        self.result = BuildResult(out, notes=list(selection.notes))

    def run(self, report: bool) -> BuildResult:
        self._name_cases()
        old = _records(self.out)
        self.workers.start(len(set(self.cases) - set(old)))
        import medseg.data.folder  # noqa: F401  # pandas: now, while the workers import, not when all wait for the end

        self._hash_sources(old)
        plan, surveys = self._plan(old)
        todo, records = self._compare(old, plan, surveys)
        before = _content(self.out / "manifest.json") + _content(self.out / "cases.csv")
        removed = sorted(set(old) - set(self.cases)) if (self.out / "manifest.json").exists() else []
        todo = self._spare_derived(todo, removed)
        unfinished = (self.out / WORK).exists()
        if todo or removed or unfinished or not before:
            (self.out / WORK).mkdir(exist_ok=True)
            (self.out / "report.html").unlink(missing_ok=True)
        self._write_key()
        self._make(todo, plan, surveys, records)
        if not records:
            self._undo()
            raise DatasetError(self._nothing_built())
        self._finish(plan, records)
        self._say_what_was_retried()
        self.result.kept = sorted(set(records) - set(self.result.built))
        self.result.removed = removed
        changed = before != _content(self.out / "manifest.json") + _content(self.out / "cases.csv")
        if report and (changed or not (self.out / "report.html").exists()):
            self._report()
        return self.result

    # Names and numbers

    def _name_cases(self) -> None:
        """Give every case and patient its name, and every source its number."""
        name = safe_name if self.keep_identifiers else self.key.pseudonym
        self.cases: dict[str, Case] = {}
        self.patients: dict[str, str] = {}
        taken: dict[str, str] = {}
        identifiers: dict[str, str] = {}
        for case in sorted(self.selection.cases, key=lambda case: (case.patient, case.name)):
            patient = name(case.patient)
            own = patient if case.name == case.patient else name(case.name)
            if own != patient and not self.keep_identifiers:
                own = f"{patient}_{own[:8]}"
            for identifier, shown, kind in ((case.patient, patient, "patient"), (case.name, own, "case")):
                holder = taken.setdefault(f"{kind} {shown.casefold()}", identifier)
                if holder != identifier or (kind == "case" and shown in self.cases):
                    raise DatasetError(f"two {kind}s of the source would both be called {shown}; rename one of them")
            self.cases[own], self.patients[own] = case, patient
            identifiers[patient] = case.patient
        self.patient_names = identifiers
        files = {file for case in self.selection.cases for file in case.files}
        files |= {file for unpaired in self.selection.unpaired for file in unpaired.files}
        relative = {file: below(file, self.source) for file in files}
        ordered = sorted(files, key=lambda file: relative[file]) + self.clinical
        self.numbers = {file: number for number, file in enumerate(ordered, 1)}
        self.relative = relative | {file: str(file) for file in self.clinical}
        from medseg.io.series import walk  # which reads DICOM: not before the workers start

        if others := sum(file not in self.numbers for file in walk(self.source)):
            self.result.notes.append(f"{others} other file(s) of SOURCE are part of no case")

    def _numbers_of(self, files: Iterable[Path]) -> tuple[int, ...]:
        return tuple(sorted(self.numbers[file] for file in files))

    def _write_key(self) -> None:
        self.key.write(
            patients=dict(sorted(self.patient_names.items())),
            cases={name: case.name for name, case in sorted(self.cases.items())},
            sources={str(number): self.relative[file] for file, number in self.numbers.items()},
        )

    # What has to be done

    def _hash_sources(self, old: Mapping[str, Any]) -> None:
        """SHA-256 of every source, and of every file of the cases that are there already."""
        expected = [self.out / name for record in old.values() for name in record.get("files", {})]
        self.hashes: dict[Path, str] = {}
        self.unreadable: dict[Path, str] = {}
        with _progress(self.console) as progress:
            task = progress.add_task("comparing with the sources", total=len(self.numbers) + len(expected))
            for file, digest in hash_files([*self.numbers, *expected], self.recipe.jobs):
                if isinstance(digest, OSError):
                    self.unreadable[file] = digest.strerror or str(digest)
                else:
                    self.hashes[file] = digest
                progress.advance(task)

    def _plan(self, old: Mapping[str, Any]) -> tuple[Plan, dict[str, Any]]:
        """Survey the cases that are new or changed, and settle what all have in common."""
        self.broken: dict[str, Failure] = {}
        for name, case in self.cases.items():
            missing = [file for file in case.files if file in self.unreadable]
            if missing:
                self.broken[name] = Failure(f"{missing[0]}: {self.unreadable[missing[0]]}")
            elif case.problem:
                self.broken[name] = Failure(case.problem)
        key = b"" if self.keep_identifiers else self.key.key
        whole = [self.recipe.name, self.recipe.describe(), versions()]
        self.bases = {
            name: fingerprint(key, whole, describe_case(case, self.source, self.hashes))
            for name, case in self.cases.items()
        }
        surveys: dict[str, Any] = {}
        todo = []
        for name, case in self.cases.items():
            record = old.get(name, {})
            if name in self.broken:
                continue
            if record.get("basis") == self.bases[name] and "survey" in record:
                surveys[name] = record["survey"]
            elif type(self.recipe).survey is Recipe.survey:
                surveys[name] = None
            else:
                todo.append((name, (case,)))
        with _progress(self.console) as progress:
            task = progress.add_task("surveying the cases", total=len(todo), visible=bool(todo))
            for name, answer in self.workers.each(survey_case, todo, common=(self.recipe,)):
                if isinstance(answer, Failure | WorkerDied):
                    self.broken[name] = as_failure(answer)
                else:
                    surveys[name] = answer
                progress.advance(task)
        if not surveys:
            self._undo()
            raise DatasetError(self._nothing_built())
        return self.recipe.plan(dict(sorted(surveys.items()))), surveys

    def _compare(
        self, old: Mapping[str, Any], plan: Plan, surveys: Mapping[str, Any]
    ) -> tuple[list[str], dict[str, Any]]:
        """Which cases have to be made, and the records of those that hold."""
        records: dict[str, Any] = {}
        common = dataclasses.asdict(plan)
        self.fingerprints = {name: fingerprint(b"", base, common) for name, base in self.bases.items()}
        for name in surveys:
            record = old.get(name, {})
            if record.get("fingerprint") == self.fingerprints[name] and all(
                self.hashes.get(self.out / file) == digest for file, digest in record["files"].items()
            ):
                records[name] = record
        return [name for name in surveys if name not in records and name not in self.broken], records

    def _spare_derived(self, todo: list[str], removed: list[str]) -> list[str]:
        """Refuse to change the cases under a split; leave those that failed before as they are then."""
        derived = [name for name in DERIVED if (self.out / name).exists()]
        if not derived:
            return todo
        manifest = json.loads(_content(self.out / "manifest.json") or b"{}")
        failed = {entry["case"]: entry for entry in manifest.get("failed", [])}
        again = [name for name in todo if failed.get(name, {}).get("fingerprint") == self.fingerprints[name]]
        changed = sorted({*todo, *removed} - set(again))
        if changed:
            raise DatasetError(
                f"{self.out}: {len(changed)} case(s) would change or disappear (the first is {changed[0]}), but "
                f"{' and '.join(derived)} come from the present ones; remove them first, or build into another folder"
            )
        for name in again:
            self.broken[name] = Failure(failed[name]["what"])
        return []

    # Making

    def _make(self, todo: list[str], plan: Plan, surveys: Mapping[str, Any], records: dict[str, Any]) -> None:
        tasks = (
            (
                name,
                (
                    name,
                    self.cases[name],
                    {"basis": self.bases[name], "fingerprint": self.fingerprints[name], "survey": surveys[name]},
                ),
            )
            for name in todo
        )
        with _progress(self.console) as progress:
            task = progress.add_task("building", total=len(self.cases), completed=len(self.cases) - len(todo))
            with contextlib.closing(
                self.workers.each(make_case, tasks, common=(self.recipe, plan, self.out))
            ) as answers:
                for name, answer in answers:
                    if isinstance(answer, Failure | WorkerDied):
                        failure = as_failure(answer)
                        if failure.disk:
                            raise OSError(failure.disk, os.strerror(failure.disk))
                        self.broken[name] = failure
                    else:
                        records[name] = answer
                        self.result.built.append(name)
                    progress.advance(task)
        self.result.built.sort()

    def _finish(self, plan: Plan, records: dict[str, Any]) -> None:
        """Write what describes the dataset, and remove what does not belong to it."""
        from medseg.data.folder import write_index

        os.sync()  # the files of the cases, which were not flushed one by one
        for record, case in ((records[name], self.cases[name]) for name in records):
            record["sources"] = list(self._numbers_of(case.files))
        strata = {name: self._stratum(name) for name in records}
        nameless = {self.patients[name] for name, stratum in strata.items() if stratum == UNKNOWN}
        if nameless:
            self.result.notes.append(
                f"{len(nameless)} patient(s) have no value in the clinical tables: their stratum is {UNKNOWN!r}"
            )
        failed = self._failures()
        unpaired = [
            (self._numbers_of(item.files), self._why(item), [self.relative[file] for file in item.files])
            for item in self.selection.unpaired
        ]
        manifest = {
            "recipe": self.recipe.name,
            "options": self.recipe.describe(),
            "identifiers": "kept" if self.keep_identifiers else "pseudonyms",
            "versions": versions(),
            "labels_remapped": plan.remapped,
            "failed": [
                {"case": name, "sources": problem.sources, "what": what, "fingerprint": self.fingerprints[name]}
                for name, problem, what in failed
            ],
            "unpaired": [{"sources": numbers, "what": why} for numbers, why, _ in unpaired],
            "cases": {name: records[name] for name in sorted(records)},
            "sources": {str(number): self.hashes.get(file, "unreadable") for file, number in self.numbers.items()},
        }
        rows = [
            records[name]["row"] | {"case": name, "patient": self.patients[name], "stratum": strata[name]}
            for name in sorted(records)
        ]
        splits = _content(self.out / "splits.json")
        write_index(
            self.out,
            name=self.recipe.name,
            channel_names=plan.channel_names,
            labels=plan.labels,
            classes=plan.classes,
            rows=rows,
            manifest=manifest,
            splits=json.loads(splits) if splits else None,
        )
        belongs = {file for record in records.values() for file in record["files"]}
        for folder in FOLDERS:
            for path in (self.out / folder).glob("*"):
                if f"{folder}/{path.name}" not in belongs and (path.is_symlink() or not path.is_dir()):
                    path.unlink()
        shutil.rmtree(self.out / WORK, ignore_errors=True)
        self.result.notes += self.recipe.audit({row["case"]: row for row in rows})
        self.result.failed = [problem for _, problem, _ in failed]
        self.result.unpaired = [
            Problem(one_line(", ".join(names)) if self.keep_identifiers else _sources(numbers), why, numbers)
            for numbers, why, names in unpaired
        ]

    def _say_what_was_retried(self) -> None:
        self.result.notes += [f"{self._shown(name)}: {what}" for name, what in sorted(self.workers.retried.items())]

    def _shown(self, name: str) -> str:
        """A case as the terminal shows it: where identifiers are kept, with the source's own name of it."""
        own = one_line(self.cases[name].name)
        return f"{name} ({own})" if self.keep_identifiers and own != name else name

    def _stratum(self, name: str) -> str:
        if self.strata is None:
            return ""
        return self.strata.get(self.cases[name].patient.strip(), UNKNOWN)

    def _failures(self) -> list[tuple[str, Problem, str]]:
        """Every failed case: its name, what the terminal may show, and its line in the manifest."""
        failures = []
        for name, failure in sorted(self.broken.items()):
            case = self.cases[name]
            numbered = {file: f"source {self.numbers[file]}" for file in case.files}
            hidden = mask(failure.message, numbered, self._words(case), root=self.source)
            label, shown = name, hidden
            if self.keep_identifiers:
                shown = one_line(failure.message).replace(f"{one_line(self.source)}/", "")
                label = self._shown(name)
            failures.append((name, Problem(label, shown, self._numbers_of(case.files), failure.trace), hidden))
        return failures

    def _why(self, item: Unpaired) -> str:
        return mask(item.why, {file: f"source {self.numbers[file]}" for file in item.files}, root=self.source)

    def _words(self, case: Case) -> set[str]:
        with contextlib.suppress(Exception):  # a header that cannot be read holds no words to mask
            return self.recipe.identifiers(case)
        return {case.patient, case.name}

    def _nothing_built(self) -> str:
        failures = self._failures()
        first = f"the first is {failures[0][1].case}: {failures[0][1].what}" if failures else ""
        return f"{self.out.name}: none of the {len(self.cases)} case(s) could be built; {first}"

    def _undo(self) -> None:
        """Leave nothing of a build that made nothing."""
        if not (self.out / "dataset.json").exists():
            for folder in (WORK, *FOLDERS):
                shutil.rmtree(self.out / folder, ignore_errors=True)
            if self.key_is_new:
                self.key_path.unlink(missing_ok=True)

    def _report(self) -> None:
        from data_prep.check import write_report

        write_report(self.out, workers=self.recipe.jobs, show=self.console is not None)


def _check_is_ours(out: Path, recipe: str) -> None:
    """Refuse to write into a folder that holds something else."""
    if not out.exists():
        return
    if not out.is_dir():
        raise DatasetError(f"{out}: a file; give a folder for the dataset")
    names = {path.name for path in out.iterdir()}
    if not names or (WORK in names and "manifest.json" not in names):
        return
    try:
        other = json.loads((out / "manifest.json").read_text(encoding="utf-8"))["recipe"]
    except (OSError, ValueError, KeyError, TypeError):
        raise DatasetError(f"{out}: neither empty nor a dataset that data_prep built; choose another folder") from None
    if other != recipe:
        raise DatasetError(f"{out}: built by the recipe {other}, not {recipe}; choose another folder")


@contextlib.contextmanager
def _tidy(out: Path, new: bool) -> Iterator[None]:
    """Remove what killed processes left half-written: before there is a full disk, and once it is full.

    A new folder goes when nothing was built in it.
    """
    try:
        _sweep(out)
        yield
    finally:
        _sweep(out)
        if new:
            with contextlib.suppress(OSError):
                out.rmdir()


def _sweep(out: Path) -> None:
    for folder in (".", WORK, *FOLDERS):
        for path in (out / folder).glob(".tmp-*"):
            with contextlib.suppress(OSError):
                path.unlink()


def _records(out: Path) -> dict[str, Any]:
    """What is known of the cases that were made before, by this build or an earlier one."""
    records: dict[str, Any] = {}
    with contextlib.suppress(OSError, ValueError):
        records |= json.loads((out / "manifest.json").read_text(encoding="utf-8")).get("cases", {})
    for path in sorted((out / WORK).glob("[!.]*.json")):
        with contextlib.suppress(OSError, ValueError):
            records[path.stem] = json.loads(path.read_text(encoding="utf-8"))
    return records


def _has_pseudonyms(out: Path) -> bool:
    with contextlib.suppress(OSError, ValueError, AttributeError):
        manifest = json.loads((out / "manifest.json").read_text(encoding="utf-8"))
        return bool(manifest.get("cases")) and manifest.get("identifiers") == "pseudonyms"
    return False


def _content(path: Path) -> bytes:
    return path.read_bytes() if path.is_file() else b""


def _sources(numbers: Sequence[int]) -> str:
    if len(numbers) == 1:
        return f"source {numbers[0]}"
    consecutive = list(numbers) == list(range(numbers[0], numbers[-1] + 1))
    return f"sources {numbers[0]}-{numbers[-1]}" if consecutive else f"{len(numbers)} sources from {numbers[0]} on"


@contextlib.contextmanager
def _progress(console: "Console | None") -> "Iterator[Progress]":
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(
        *columns,
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        speed_estimate_period=3600,  # one case may take minutes
        disable=console is None or not console.is_terminal,
        transient=True,
    ) as progress:
        yield progress
