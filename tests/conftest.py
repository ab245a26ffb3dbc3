"""Fixtures that every test may use."""

import logging
import os
import runpy
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from monai.data import MetaTensor

from medseg.data.folder import DatasetFolder, write_case, write_index

# No test asks how long something takes; and the same commit gives the same result.
settings.register_profile(
    "medseg",
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.differing_executors],
)
settings.load_profile("medseg")

LABELS = {"background": 0, "tumor": 1, "node": 2}


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Small tensors gain nothing from several threads, and lose much where other processes want the cores."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def cache_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The headers that a test reads do not go into the cache of whoever runs the tests."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def log_handlers_stay() -> Iterator[None]:
    """A bundle's logging.conf gives the root logger handlers, on streams that are gone when the test is."""
    root = logging.getLogger()
    before = root.handlers[:]
    yield
    root.handlers[:] = before


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder of real clinical data, unpacked."""
    folder = os.environ.get("MEDSEG_TEST_DATA")
    if not folder:
        pytest.skip("MEDSEG_TEST_DATA is not set: tests on real data need the unpacked data folder")
    return Path(folder)


@pytest.fixture(scope="session")
def write_dataset() -> Callable[..., DatasetFolder]:
    """Write a dataset of noise with two labels; its cases c00, c01, … belong to the patients given."""

    def write(
        root: Path,
        patients: Sequence[str] = ("P0", "P1", "P2", "P3", "P4", "P5"),
        shapes: Sequence[tuple[int, int, int]] = ((12, 10, 5),),
        channels: Sequence[str] = ("CT", "PET"),
    ) -> DatasetFolder:
        rng = np.random.default_rng(7)
        affine = np.diag([2.0, 1.5, 3.0, 1.0])
        affine[:3, 3] = -10, -20, -30
        rows = []
        for number, patient in enumerate(patients):
            shape = shapes[number % len(shapes)]
            image = np.stack(
                [np.round(rng.normal(30, 40, shape)) if c == "CT" else rng.gamma(1, 2, shape) for c in channels]
            )
            label = np.zeros((1, *shape), np.uint8)
            label[0, 4:7, 4:7, 1 + number % 2 : 4] = 1
            label[0, 7:8, 4:6, 2] = 2
            measured = write_case(
                root,
                f"c{number:02d}",
                MetaTensor(torch.from_numpy(image.astype(np.float32)), affine=torch.from_numpy(affine)),
                MetaTensor(torch.from_numpy(label), affine=torch.from_numpy(affine)),
                LABELS,
            )
            rows.append({"patient": patient, "stratum": "I" if number % 2 else "II", **measured})
        write_index(root, name="small", channel_names=channels, labels=LABELS, rows=rows, manifest={"recipe": "test"})
        return DatasetFolder(root)

    return write


@pytest.fixture(scope="session")
def make_knee() -> Callable[..., Any]:
    """Make a coronal knee MR with maps of its bones: see knee_phantom.py."""
    return runpy.run_path(str(Path(__file__).with_name("knee_phantom.py")))["make_knee"]  # type: ignore[no-any-return]
