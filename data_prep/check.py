"""`data_prep check`: what would spoil a training, and what a person should look at."""

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from data_prep.progress import progress_bar
from medseg.data import DatasetFolder, Problem, check_dataset

#: How many findings of one kind the terminal shows.
SHOWN = 20


def show_problems(dataset: Path, *, workers: int | None = None, report: bool = False, as_json: bool = False) -> bool:
    """Check a dataset and print a line per finding, the worst first: the case, what is wrong, what to do.

    Args:
        dataset: the dataset.
        workers: threads that read cases; default: one per core.
        report: write report.html anew, with the findings in it.
        as_json: print all findings as a JSON list of objects instead.

    Returns:
        whether there is no error; warnings do not count.
    """
    problems = write_report(dataset, workers=workers) if report else _check(dataset, workers)
    console = Console(soft_wrap=True, highlight=False, markup=False)
    if as_json:
        console.print(json.dumps([asdict(problem) for problem in problems], indent=1, ensure_ascii=False))
    else:
        _print(problems, console)
        n_cases = len(DatasetFolder(dataset).cases)
        kinds = [_count(problems, severity) for severity in ("error", "warning")]
        found = ", ".join(kind for kind in kinds if kind) or "nothing wrong found"
        console.print(f"{n_cases} cases: {found}")
    return not any(problem.severity == "error" for problem in problems)


def write_report(dataset: Path, *, workers: int | None = None, show: bool = True) -> list[Problem]:
    """Check a dataset and write its report.html, in which every finding stands with the picture of its case.

    Args:
        dataset: the dataset.
        workers: threads; default: one per core.
        show: show the progress.

    Returns:
        the findings.
    """
    from medseg.report import dataset_report
    from medseg.report.case_picture import draw_case, jpeg

    channels = DatasetFolder(dataset).channel_names
    pictures: dict[str, bytes] = {}

    def draw(row: Mapping[str, Any], images: Any, label: Any, affine: Any) -> None:
        pictures[row["case"]] = jpeg(draw_case(images, label, affine, channels, position=row.get("position", "")))

    problems = _check(dataset, workers, show, draw)
    with progress_bar("report", show=show) as progress:
        dataset_report(dataset, problems, pictures=pictures, workers=workers, progress=progress)
    return problems


def _check(
    dataset: Path, workers: int | None, show: bool = True, look: Callable[..., None] | None = None
) -> list[Problem]:
    with progress_bar("check", show=show) as progress:
        return check_dataset(dataset, progress=progress, workers=workers, look=look)


def _print(problems: Sequence[Problem], console: Console) -> None:
    shown: dict[tuple[str, str], int] = defaultdict(int)
    for problem in problems:
        kind = problem.severity, problem.topic
        shown[kind] += 1
        if shown[kind] <= SHOWN:
            mark = "" if problem.severity == "error" else "warning: "
            console.print(f"{mark}{problem.case}: {problem.what}; {problem.advice}")
    for (severity, topic), number in shown.items():
        if number > SHOWN:
            console.print(f"… {number - SHOWN} more {severity}(s) about {topic}; --json lists all, --report shows them")


def _count(problems: Sequence[Problem], severity: str) -> str:
    topics = Counter(problem.topic for problem in problems if problem.severity == severity)
    if not topics:
        return ""
    return f"{sum(topics.values())} {severity}(s) ({', '.join(f'{topic} {n}' for topic, n in topics.most_common())})"
