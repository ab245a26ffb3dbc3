"""`data_prep check`: what would spoil a training."""

from pathlib import Path

from rich.console import Console

from data_prep.progress import progress_bar
from medseg.data import DatasetFolder, check_dataset


def show_problems(dataset: Path, *, workers: int | None = None) -> bool:
    """Check a dataset and print a line per problem: the case, what is wrong, what to do.

    Returns:
        whether nothing wrong was found.
    """
    with progress_bar("check") as progress:
        problems = check_dataset(dataset, progress=progress, workers=workers)
    console = Console(soft_wrap=True, highlight=False, markup=False)
    for problem in problems:
        console.print(f"{problem.case}: {problem.what}; {problem.advice}")
    n_cases = len(DatasetFolder(dataset).cases)
    found = f"{len(problems)} problem(s) found" if problems else "nothing wrong found"
    console.print(f"{n_cases} cases: {found}")
    return not problems
