"""A recipe that costs almost nothing, for programs that build over and over: run by test_build_kills.py and others."""

import os
import signal
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_prep import build
from data_prep.recipes.base import Case, Plan, Recipe, Sample, Selection, option
from medseg.io.workers import Workers

SHAPE = (16, 16, 8)


class Image(np.ndarray):
    """An array with an affine, where a MetaTensor would cost seconds of import."""

    affine = np.eye(4)


@dataclass(frozen=True)
class LightOptions:
    """Options of the recipe ``light``."""

    offset: float = option("--offset", 0.0, "Added to the image.")
    base: int = option("--base", 0, "Added to what the survey says.")


class LightRecipe(Recipe):
    """Every folder of SOURCE is a case; the bytes of its files make the voxels. A file's content may be an order."""

    name = "light"
    summary = "Noise from bytes."
    needs = "folders"
    Options = LightOptions

    def select(self, source: Path) -> Selection:
        """A case per folder."""
        folders = sorted(path for path in source.iterdir() if path.is_dir())
        return Selection([Case(p.name, p.name, {"part": tuple(sorted(p.iterdir()))}) for p in folders])

    def survey(self, case: Case) -> Any:
        """The first byte of the case, and an option."""
        return {"least": case.files[0].read_bytes()[0] + self.options.base}

    def plan(self, surveys: Mapping[str, Any]) -> Plan:
        """One channel; the least of all surveys goes into its name."""
        least = min(survey["least"] for survey in surveys.values())
        return Plan((f"noise{least}",), {"background": 0, "tumor": 1})

    def make(self, case: Case, plan: Plan) -> Sample:
        """Obey, or make noise."""
        content = b"".join(file.read_bytes() for file in case.files)
        order, _, rest = content.partition(b"\n")
        _obey(order.decode(errors="ignore"), Path(rest.decode(errors="ignore").strip()))
        rng = np.random.default_rng(list(content))
        image = rng.normal(self.options.offset, 1, (1, *SHAPE)).astype(np.float32).view(Image)
        return Sample(image, np.ones((1, *SHAPE), np.uint8).view(Image))  # type: ignore[arg-type]


def _obey(order: str, flag: Path) -> None:
    """Die by a signal (once, where the second line names a flag to leave), take memory, or wait."""
    if order.startswith("kill ") and not flag.is_file():
        if flag != Path():
            flag.touch()
        os.kill(os.getpid(), signal.Signals[order.split()[1]])
    elif order == "memory":
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (1 << 30, resource.RLIM_INFINITY))
        np.ones(1 << 28)
    elif order == "wait":
        time.sleep(0.02)


def write_source(root: Path, n_cases: int, content: str = "wait\n\n") -> Path:
    """A source of so many cases."""
    for number in range(n_cases):
        (root / f"p{number:03d}").mkdir(parents=True)
        (root / f"p{number:03d}" / "a").write_text(f"{content}{number}")
    return root


def build_light(source: Path, out: Path, jobs: int, hold: int | None = None, **given: Any) -> build.BuildResult:
    """Build with workers that import nothing; ``hold`` stops it for ever once so many cases are made."""
    start = build._workers
    build._workers = lambda jobs, ray, source, out: Workers(jobs) if hold is None else TellingWorkers(jobs, hold)
    try:
        return build.build_dataset(LightRecipe(), source, out, jobs=jobs, report=False, **given)
    finally:
        build._workers = start


class TellingWorkers(Workers):
    """Workers that print a line for every case made, and after the last of ``hold`` of them wait to be killed."""

    def __init__(self, jobs: int, hold: int) -> None:
        super().__init__(jobs)
        self.hold = hold

    def each(self, function: Any, tasks: Any, **given: Any) -> Any:
        """As ever, but told."""
        making = function is build.make_case
        if making:
            self._tell(0)
        for number, result in enumerate(super().each(function, tasks, **given), start=1):
            yield result
            if making:
                self._tell(number)

    def _tell(self, number: int) -> None:
        print(number, flush=True)
        if number == self.hold:
            signal.pause()


if __name__ == "__main__":
    import light_recipe  # workers know the recipe by this name

    source, out, key, hold = sys.argv[1:]
    light_recipe.build_light(Path(source), Path(out), 2, hold=int(hold), key=Path(key))
