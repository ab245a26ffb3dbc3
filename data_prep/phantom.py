"""A made-up head-and-neck PET/CT cohort, written as the DICOM files of a real one.

The anatomy is made of ellipsoids and tubes whose sizes, places and values are drawn anew for each patient. A tumor is
bright on PET and a few HU above muscle on CT. Brain, glands, tonsils, brown fat, tense muscle, infected teeth and
inflamed tissue are as bright on PET, and CT tells them apart: by bone around them, by fat or water in them, by their
place. CT has look-alikes of its own: lymph nodes and lymphoid tissue that are cold on PET.

Coordinates are DICOM's: x to the patient's left, y to the back, z to the head, in mm. Arrays have the axes x, y, z.
"""

import datetime
import json
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import (
    UID,
    CTImageStorage,
    ExplicitVRLittleEndian,
    PositronEmissionTomographyImageStorage,
    RTStructureSetStorage,
    generate_uid,
)
from scipy import ndimage
from skimage.measure import find_contours

from medseg.errors import DatasetError
from medseg.io import atomic_write_text
from medseg.io.lock import only_one

Array = np.ndarray
Vector = Sequence[float] | np.ndarray
Box = tuple[slice, slice, slice]
Knots = Sequence[tuple[float, float, float, float, float]]

FIELD_OF_VIEW = 192.0
HEIGHT = 120.0
F18_HALF_LIFE = 6586.2
PET_FWHM = 6.0
ARGUMENTS = "phantom.json"
CLINICAL = "clinical.csv"
_VERSION = 1

# A tube is a row of ellipses: z, center x, center y, radius x, radius y. z = 0 is the level of the tonsils.
_BODY: Knots = [
    (-90, 0, 16, 84, 62),
    (-65, 0, 16, 66, 58),
    (-50, 0, 15, 60, 56),
    (-32, 0, 13, 58, 57),
    (-18, 0, 3, 63, 69),
    (0, 0, -3, 67, 77),
    (25, 0, 1, 70, 82),
    (45, 0, 3, 71, 84),
    (90, 0, 5, 70, 84),
]
_AIRWAY: Knots = [
    (-90, 0, -18, 8, 8),
    (-52, 0, -20, 8, 9),
    (-43, 0, -21, 4, 9),
    (-34, 0, -15, 7, 7),
    (-20, 0, -8, 10, 6),
    (2, 0, 1, 11, 6),
    (20, 0, 2, 13, 7),
    (32, 0, 0, 9, 8),
]
_SPINE: Knots = [(-90, 0, 24, 14, 10), (-20, 0, 24, 13, 10), (30, 0, 26, 12, 10)]
_CANAL: Knots = [(-90, 0, 42, 10, 8), (-20, 0, 42, 10, 8), (40, 0, 44, 12, 10)]
_SITES = {
    "tonsil": ((15, -4, 2), (3, 3, 7)),
    "tongue base": ((7, -17, -7), (4, 3, 4)),
    "hypopharynx": ((12, -6, -32), (3, 3, 5)),
    "larynx": ((8, -18, -43), (3, 3, 4)),
    "nasopharynx": ((8, 5, 22), (4, 2, 4)),
    "oral tongue": ((13, -38, 1), (4, 6, 4)),
}
_DIAMETERS = {"T1": (15, 20), "T2": (22, 36), "T3": (38, 46), "T4": (46, 54)}


@dataclass(frozen=True)
class Grid:
    """A grid of voxels along x, y and z: the center of its first voxel and the spacing in mm, and its shape."""

    origin: tuple[float, float, float]
    spacing: tuple[float, float, float]
    shape: tuple[int, int, int]


@dataclass(frozen=True)
class Patient:
    """One made-up patient: images with the axes x, y, z, and the truth.

    Attributes:
        number: running number in the cohort, from 1.
        seed: seed of the cohort.
        sex: ``"M"`` or ``"F"``.
        age: in years.
        weight: in kg.
        stage: T stage of the tumor, ``"T1"`` to ``"T4"``, by its diameter.
        ct: CT in Hounsfield units on `ct_grid`.
        pet: PET in SUVbw on `pet_grid`.
        structures: for each outlined structure (``"GTV"``, ``"LN_1"``, …) a level function on `ct_grid`: about the
            signed distance to the surface in mm, negative inside.
    """

    number: int
    seed: int
    sex: str
    age: int
    weight: float
    stage: str
    ct: Array
    ct_grid: Grid
    pet: Array
    pet_grid: Grid
    structures: dict[str, Array] = field(repr=False)

    @property
    def identifier(self) -> str:
        """The PatientID."""
        return f"PHANTOM-{self.number:03d}"


class _Canvas:
    """CT and PET of one patient while they are painted, in canonical coordinates bent to the patient's shape."""

    def __init__(self, grid: Grid, center: Array, rng: np.random.Generator) -> None:
        self.grid = grid
        self.edge = grid.spacing[0]
        self.scale = rng.uniform((0.94, 0.94, 0.95), (1.05, 1.03, 1.06))
        self.center = center
        angle = rng.normal(0, 0.06)
        bend = rng.normal(0, 2.5, 2)
        phase = rng.uniform(0, 2 * np.pi, 2)
        axes = [np.arange(n) * s + o for o, s, n in zip(grid.origin, grid.spacing, grid.shape, strict=True)]
        x, y, z = (a - c for a, c in zip(axes, center, strict=True))
        z = z / self.scale[2]
        x = x[:, None, None] - bend[0] * np.sin(2 * np.pi * z / 150 + phase[0])
        y = y[None, :, None] - bend[1] * np.sin(2 * np.pi * z / 150 + phase[1])
        self.x = ((np.cos(angle) * x + np.sin(angle) * y) / self.scale[0]).astype(np.float32)
        self.y = ((np.cos(angle) * y - np.sin(angle) * x) / self.scale[1]).astype(np.float32)
        self.z = z.astype(np.float32)[None, None, :]
        self.hu = np.full(grid.shape, -1000, np.float32)
        self.suv = np.zeros(grid.shape, np.float32)
        self.bone = np.full(grid.shape, 100, np.float32)
        self.whole: Box = (slice(None), slice(None), slice(None))

    def box(self, center: Vector, radius: float) -> Box:
        """The part of the grid that holds a sphere, with room for the patient's bend and turn."""
        middle = np.asarray(center) * self.scale + self.center
        reach = radius * self.scale + (18, 18, 4)
        low = np.floor((middle - reach - self.grid.origin) / self.grid.spacing).astype(int)
        high = np.ceil((middle + reach - self.grid.origin) / self.grid.spacing).astype(int) + 1
        low, high = np.clip(low, 0, self.grid.shape), np.clip(high, 0, self.grid.shape)
        return (slice(low[0], high[0]), slice(low[1], high[1]), slice(low[2], high[2]))

    def at(self, box: Box) -> tuple[Array, Array, Array]:
        return self.x[box], self.y[box], self.z[:, :, box[2]]

    def ellipsoid(self, center: Vector, radii: Vector) -> tuple[Box, Array]:
        box = self.box(center, max(radii))
        x, y, z = (v - np.float32(c) for v, c in zip(self.at(box), center, strict=True))
        a, b, c = (np.float32(r) for r in radii)
        unit = np.sqrt((x / a) ** 2 + (y / b) ** 2 + (z / c) ** 2)
        slope = np.sqrt((x / a**2) ** 2 + (y / b**2) ** 2 + (z / c**2) ** 2) + np.float32(1e-3)
        return box, unit * (unit - 1) / slope

    def tube(
        self, knots: Knots, low: float, high: float, grow: float = 0.0, mirror: int = 1, cap: bool = True
    ) -> tuple[Box, Array]:
        table = np.asarray(knots, np.float32).T
        heights = self.z[0, 0]
        inside = np.flatnonzero((heights >= low - 8) & (heights <= high + 8))
        box: Box = (slice(None), slice(None), slice(inside[0], inside[-1] + 1) if inside.size else slice(0, 0))
        x, y, z = self.at(box)
        cx, cy, rx, ry = (np.interp(z, table[0], row).astype(np.float32) for row in table[1:])
        x, y, rx, ry = x - mirror * cx, y - cy, rx + np.float32(grow), ry + np.float32(grow)
        unit = np.sqrt((x / rx) ** 2 + (y / ry) ** 2)
        slope = np.sqrt((x / rx**2) ** 2 + (y / ry**2) ** 2) + np.float32(1e-3)
        level = unit * (unit - 1) / slope
        return box, np.maximum(level, np.maximum(low - z, z - high)) if cap else level

    def lump(self, center: Vector, radii: Vector, rng: np.random.Generator) -> Array:
        """Level function on the whole grid of a turned ellipsoid with a bumpy surface."""
        turn = np.linalg.qr(rng.normal(size=(3, 3)))[0].astype(np.float32)
        waves = rng.normal(0, 1.8, (4, 3)).astype(np.float32)
        phases = rng.uniform(0, 2 * np.pi, 4).astype(np.float32)
        box = self.box(center, 1.5 * max(radii))
        x, y, z = (v - np.float32(c) for v, c in zip(self.at(box), center, strict=True))
        u, v, w = ((row[0] * x + row[1] * y + row[2] * z) / np.float32(r) for row, r in zip(turn, radii, strict=True))
        length = np.sqrt(u**2 + v**2 + w**2) + np.float32(1e-3)
        bumps = sum(np.cos((k[0] * u + k[1] * v + k[2] * w) / length + p) for k, p in zip(waves, phases, strict=True))
        level = np.full(self.grid.shape, 100, np.float32)
        level[box] = (length - 1 - np.float32(0.06) * bumps) * np.float32(np.mean(radii))
        return level

    def paint(self, shape: tuple[Box, Array], hu: Any = None, suv: Any = None, bone: bool = False) -> None:
        """Blend values into a shape; at its edge by the part of the voxel that it fills."""
        box, level = shape
        weight = np.clip(np.float32(0.5) - level / np.float32(self.edge), 0, 1)
        for image, value in ((self.hu, hu), (self.suv, suv)):
            if value is not None:
                image[box] += weight * (np.asarray(value, np.float32) - image[box])
        if bone:
            self.bone[box] = np.minimum(self.bone[box], level)


def _horseshoe(c: _Canvas, outer: tuple[Box, Array], inner: tuple[Box, Array], back: float) -> tuple[Box, Array]:
    """What lies between two tubes, in front of a plane."""
    return outer[0], np.maximum(np.maximum(outer[1], -inner[1]), c.at(outer[0])[1] - np.float32(back))


def _smooth_noise(rng: np.random.Generator, shape: Sequence[int], sigma: Vector) -> Array:
    """Gaussian noise of unit variance, blurred."""
    noise = ndimage.gaussian_filter(rng.standard_normal(shape, dtype=np.float32), sigma, mode="wrap", truncate=3)
    return noise / noise.std()


def _paint_anatomy(c: _Canvas, rng: np.random.Generator) -> float:
    """Paint normal tissue; returns the HU of muscle."""
    muscle, fat = rng.normal(56, 4), rng.normal(-98, 5)
    tense, cold = 1.0, rng.uniform(0.7, 1.1)
    body = c.tube(_BODY, -200, 200)
    c.paint(body, 25, 0.5)
    c.paint((body[0], body[1] + 2.5), fat, 0.3)
    swollen = rng.uniform(0.85, 1.2)

    def soft(shape: tuple[Box, Array], hu: float = muscle, suv: float = 1.0) -> None:
        c.paint(shape, hu + rng.normal(0, 4), suv * cold * tense)

    # Face and skull base: soft tissue around the cavities.
    soft(c.ellipsoid((0, -38, 28), (46, 36, 30)))
    soft(c.ellipsoid((0, 10, 25), (58, 48, 16)))
    for side in (-1, 1):
        soft(c.tube([(-90, 26, 58, 26, 17), (-20, 23, 57, 22, 19), (25, 24, 58, 22, 14)], -200, 24, swollen, side))
        soft(c.tube([(-90, 16, 36, 14, 12), (25, 20, 40, 14, 14)], -200, 24, 0, side))
        soft(c.tube([(-90, 9, 9, 8, 5), (20, 9, 11, 8, 5)], -200, 20, 0, side))
        soft(c.ellipsoid((side * 55, -20, 4), (8 * swollen, 17, 24)))
        soft(c.ellipsoid((side * 36, -16, 14), (8, 15, 17)))
        # The sternocleidomastoid, in some patients tense and hot on one side or both.
        hot = rng.uniform(3, 7) if rng.random() < 0.2 else 1.0
        scm: Knots = [(-90, 34, -22, 9, 13), (-40, 45, 2, 8, 15), (20, 52, 26, 7, 13)]
        c.paint(c.tube(scm, -200, 20, swollen, side), muscle + rng.normal(0, 4), hot * cold)
    # Tongue, floor of the mouth, wall of the throat and of the larynx.
    soft(c.ellipsoid((0, -34, 0), (27, 30, 19)), suv=rng.uniform(1.2, 3))
    soft(c.ellipsoid((0, -38, -16), (24, 24, 10)))
    soft(c.tube(_AIRWAY, -60, 30, 9))
    soft(c.tube([(-60, 0, -22, 13, 15), (-30, 0, -20, 17, 16)], -60, -28))

    _paint_bones(c, rng)
    for side in (-1, 1):
        wobble = rng.normal(0, 2, 3)
        fatty = rng.uniform(-45, 0)
        c.paint(c.ellipsoid(np.add((side * 56, 9, 4), wobble), (10, 16, 22)), fatty, rng.uniform(1.5, 5.5))
        c.paint(c.ellipsoid(np.add((side * 31, -21, -19), wobble), (9, 13, 11)), fatty + 25, rng.uniform(1.8, 6))
        c.paint(c.tube([(-90, 22, -6, 4, 4), (-20, 26, 4, 4, 4), (30, 25, 6, 3, 3)], -200, 34, 0, side), 165, 1.7)
        c.paint(c.tube([(-90, 30, -4, 6, 5), (-20, 33, 11, 5, 5), (30, 30, 14, 4, 4)], -200, 34, 0, side), 145, 1.7)
        c.paint(c.ellipsoid((side * 15, -14, -60), (7, 9, 15)), 130, rng.uniform(1.2, 4.5))
    lymphoid = rng.uniform(2, 6)
    for side in (-1, 1):
        size = rng.uniform(0.7, 1.15)
        c.paint(
            c.ellipsoid((side * 16, -3, 2), (6 * size, 8 * size, 10 * size)),
            muscle + 4,
            lymphoid * rng.uniform(0.85, 1.15),
        )
    c.paint(c.ellipsoid((0, -11, -10), (13, 4, 6)), muscle + 3, rng.uniform(1.5, 4.5))
    # Air.
    c.paint(c.tube(_AIRWAY, -200, 32), -990, 0.05)
    for side in (-1, 1):
        c.paint(c.ellipsoid((side * 7, -48, 32), (5, 28, 15)), -850, 0.2)
        c.paint(c.ellipsoid((side * 9, -48, 26), (2.5, 22, 4)), 40, 1.2)
        c.paint(c.ellipsoid((side * 29, -50, 33), (13, 16, 14)), -950, 0.1)
    c.paint(c.ellipsoid((0, -50, 13), (20, 18, rng.uniform(1.5, 4))), -900, 0.1)
    return float(muscle)


def _paint_bones(c: _Canvas, rng: np.random.Generator) -> None:
    skull = ((0, 11, 84), (67, 77, 66))
    shell = c.ellipsoid(*skull)
    brain = (shell[0], shell[1] + np.float32(rng.uniform(5, 7)))
    c.paint(shell, 900, 0.6, bone=True)
    c.paint((shell[0], np.abs(shell[1] + 3) - 1), 420, 1.0)
    uptake = rng.uniform(5.5, 11)
    folds = _smooth_noise(rng, brain[1].shape, 5 / np.asarray(c.grid.spacing))
    c.paint(brain, 36, uptake * (1 + 0.2 * folds))
    c.bone[brain[0]] = np.minimum(c.bone[brain[0]], brain[1])
    for side in (-1, 1):  # petrous bone
        c.paint(c.ellipsoid((side * 42, 14, 36), (20, 11, 9)), 800, 0.6, bone=True)
        c.paint(c.ellipsoid((side * 52, 24, 28), (9, 12, 14)), 450, 0.6, bone=True)
        c.paint(c.ellipsoid((side * 29, -50, 33), (15, 18, 16)), 500, 0.7, bone=True)
    # Vertebrae with their disks, and the arch around the spinal canal.
    heights = c.z + np.float32(rng.uniform(0, 16))
    arch = c.tube(_CANAL, -200, 34, 6)
    spinous = c.tube([(-90, 0, 56, 3, 12), (30, 0, 56, 3, 11)], -200, 24)
    body = c.tube(_SPINE, -200, 34)
    for shape, dense, spongy in ((arch, 700, 300), (body, 550, 220)):
        gap = np.abs((heights[:, :, shape[0][2]] % 16) - 8) - 6
        bony = (shape[0], np.maximum(shape[1], gap))
        c.paint(shape, 85, 1.0)
        c.paint(bony, dense, 1.1, bone=True)
        c.paint((bony[0], bony[1] + 2.5), spongy, 1.5)
    gap = np.abs((heights[:, :, spinous[0][2]] % 16) - 8) - 4
    c.paint((spinous[0], np.maximum(spinous[1], gap)), 450, 1.0, bone=True)
    c.paint(c.tube(_CANAL, -200, 32), 15, 0.8)
    c.paint(c.tube(_CANAL, -200, 36, -4), 40, 2.2)
    # Jaw: a horseshoe and its two branches; upper jaw; teeth.
    for low, high, dense in ((-20, 1, 1000), (17, 26, 650)):
        outer = c.tube([(low, 0, -38, 47, 38), (high, 0, -38, 45, 36)], low, high)
        arc = _horseshoe(c, outer, c.tube([(low, 0, -34, 38, 33), (high, 0, -34, 36, 31)], low, high, cap=False), -22)
        c.paint(arc, dense, 0.7, bone=True)
        c.paint((arc[0], arc[1] + 3), 300, 1.2)
    for side in (-1, 1):
        c.paint(c.ellipsoid((side * 45, -14, 10), (4.5, 11, 28)), 850, 0.7, bone=True)
    for height in (4.5, 13.0):
        for angle in np.linspace(-1.15, 1.15, 14):
            if rng.random() < 0.85:
                place = (42 * np.sin(angle), -36 - 35 * np.cos(angle), height)
                c.paint(c.ellipsoid(place, (3.2, 3.2, 5)), rng.uniform(1500, 2300), 0.5, bone=True)
    # Hyoid and the cartilage of the larynx.
    for knots, low, high, dense in (
        ([(-30, 0, -24, 20, 15), (-20, 0, -24, 20, 15)], -27, -22, 420),
        ([(-56, 0, -18, 15, 19), (-34, 0, -18, 18, 21)], -54, -35, 170),
    ):
        arc = _horseshoe(c, c.tube(knots, low, high), c.tube(knots, low, high, -3, cap=False), -16)
        c.paint(arc, dense, 0.8, bone=dense > 300)


def _throat(rng: np.random.Generator) -> Array:
    """A place where such tumors grow."""
    middle, spread = _SITES[str(rng.choice(sorted(_SITES)))]
    return rng.normal(middle, spread) * (rng.choice((-1, 1)), 1, 1)


def _paint_distractors(c: _Canvas, muscle: float, rng: np.random.Generator) -> None:
    """Paint what is hot on PET without being a tumor, and what looks like a tumor on CT without being hot."""
    # CT: cold lymph nodes beside the vessels, lymphoid tissue at the throat.
    for _ in range(rng.integers(3, 8)):
        side = rng.choice((-1, 1))
        place = (side * rng.uniform(36, 46), rng.uniform(2, 24), rng.uniform(-52, 6))
        c.paint(c.ellipsoid(place, rng.uniform(4, 10.5, 3)), muscle + rng.uniform(0, 22), rng.uniform(0.8, 1.8))
    for _ in range(rng.integers(2, 6)):
        level = c.lump(_throat(rng), rng.uniform(6, 19, 3), rng)
        c.paint((c.whole, np.maximum(level, -c.bone)), muscle + rng.uniform(6, 20), rng.uniform(0.9, 1.8))
    # PET: brown fat is hot only where CT shows fat.
    if rng.random() < 0.55:
        for side in (-1, 1):
            for height in rng.uniform(-62, -30, 3):
                box, level = c.ellipsoid(
                    (side * rng.uniform(40, 52), rng.uniform(18, 36), height), rng.uniform(6, 12, 3)
                )
                fat = np.clip((-50 - c.hu[box]) / 25, 0, 1) * (c.hu[box] > -250)
                c.paint((box, level), None, c.suv[box] + fat * rng.uniform(4, 12))
    if rng.random() < 0.5:  # an infected tooth
        angle = rng.uniform(-1.1, 1.1)
        c.paint(c.ellipsoid((42 * np.sin(angle), -36 - 35 * np.cos(angle), 1), (7, 7, 8)), None, rng.uniform(5, 12))
    if rng.random() < 0.4:  # the muscles of the voice
        hot = rng.uniform(3, 7)
        for side in (-1, 1):
            c.paint(c.ellipsoid((side * 8, -19, -43), (3.5, 8, 4)), None, hot)
    if rng.random() < 0.3:  # chewing
        hot = rng.uniform(3, 6)
        for side in (-1, 1):
            c.paint(c.ellipsoid((side * 55, -20, 4), (7, 16, 23)), None, hot * rng.uniform(0.7, 1.2))
    for _ in range(rng.integers(1, 4)):  # inflamed tissue: swollen with water, darker than muscle on CT
        level = np.maximum(c.lump(_throat(rng), rng.uniform(6, 12, 3), rng), -c.bone)
        c.paint((c.whole, level), muscle - rng.uniform(35, 50), rng.uniform(4, 12))
    for _ in range(rng.integers(0, 4)):  # reactive node with fat at its hilum
        side = rng.choice((-1, 1))
        place = (side * rng.uniform(36, 46), rng.uniform(2, 24), rng.uniform(-50, 4))
        c.paint(c.ellipsoid(place, rng.uniform(5, 9, 3)), rng.uniform(-60, -15), rng.uniform(4, 10))


def _paint_tumors(c: _Canvas, body: Array, muscle: float, stage: str, rng: np.random.Generator) -> dict[str, Array]:
    """Paint the tumor and its nodes; returns their level functions."""
    free = np.minimum(c.bone, -4 - body)
    radius = rng.uniform(*_DIAMETERS[stage]) / 2
    for _ in range(20):  # a place where bone and skin leave it most of its size
        place = _throat(rng)
        lump = c.lump(place, radius * rng.uniform(0.85, 1.18, 3), rng)
        if (free[lump < 0] > 0).mean() > 0.85:
            break
    side = np.sign(place[0])
    lumps = {"GTV": lump}
    taken = [(place, radius)]
    for number in range(1, rng.choice(4, p=(0.25, 0.3, 0.25, 0.2)) + 1):
        for _ in range(20):  # a place clear of the others
            near = side if rng.random() < 0.75 else -side
            spot = np.array((near * rng.uniform(36, 45), rng.uniform(2, 24), rng.uniform(-48, 6)))
            size = rng.uniform(7, 13)
            if all(np.linalg.norm(spot - other) > 1.3 * (size + r) for other, r in taken):
                taken.append((spot, size))
                lumps[f"LN_{number}"] = c.lump(spot, size * rng.uniform(0.8, 1.2, 3), rng)
                break
    enhancement = rng.uniform(6, 18)
    uptake = float(np.clip(np.exp(rng.normal(np.log(7.5), 0.4)), 4.5, 17))
    mottle = _smooth_noise(rng, c.grid.shape, 5 / np.asarray(c.grid.spacing))
    structures = {}
    for name, lump in lumps.items():
        level = np.maximum(lump, -free)
        strength = uptake if name == "GTV" else max(4.0, uptake * rng.uniform(0.55, 1.0))
        core: Array = np.zeros(1, np.float32)
        if lump.min() < -10 and rng.random() < 0.4:  # a dead core takes up little
            core = np.clip((-lump - 0.55 * radius) / 4, 0, 1) * 0.6
        c.paint(
            (c.whole, level),
            muscle + enhancement + 3 * mottle - 20 * core,
            strength * (1 + 0.15 * mottle) * (1 - core),
        )
        structures[name] = level
    return structures


def _streaks(c: _Canvas, rng: np.random.Generator) -> None:
    """Streaks from metal in teeth, in the slices of the teeth."""
    height = rng.uniform(3, 14)
    strength = np.exp(-(((c.z - height) / 6) ** 2))
    near = np.flatnonzero(strength[0, 0] > 0.02)
    if not near.size:
        return
    box: Box = (slice(None), slice(None), slice(near[0], near[-1] + 1))
    for _ in range(rng.integers(1, 3)):
        angle = rng.uniform(-1.1, 1.1)
        x, y = c.x[box] - 42 * np.sin(angle), c.y[box] + 36 + 35 * np.cos(angle)
        turn, distance = np.arctan2(y, x), np.hypot(x, y)
        rays = sum(np.cos(n * turn + rng.uniform(0, 6.28)) for n in (5, 9, 14))
        inside = np.clip((c.hu[box] + 300) / 200, 0, 1)
        c.hu[box] += rng.uniform(25, 60) * rays * np.exp(-distance / 45) * inside * strength[:, :, box[2]]


def simulate_patient(number: int, *, seed: int = 0, image_size: int = 96, slices: int = 40) -> Patient:
    """Draw one patient; the same number and arguments give the same patient, whatever the size of the cohort.

    Args:
        number: running number of the patient, from 1.
        seed: seed of the cohort.
        image_size: rows and columns of a CT slice; the field of view is always 192 mm.
        slices: CT slices over 120 mm of height; a patient has a few more or fewer.

    Returns:
        The images and the truth.

    Example:
        >>> patient = simulate_patient(1, seed=0, image_size=32, slices=10)
        >>> patient.identifier, patient.ct.shape[:2], "GTV" in patient.structures
        ('PHANTOM-001', (32, 32), True)
    """
    rng = np.random.default_rng([seed, number])
    sex = str(rng.choice(["M", "F"], p=(0.7, 0.3)))
    age = int(rng.integers(42, 81))
    weight = round(float(np.clip(rng.normal(80 if sex == "M" else 66, 10), 45, 120)), 1)
    stage = str(rng.choice(list(_DIAMETERS), p=(0.15, 0.35, 0.3, 0.2)))

    spacing, thickness = FIELD_OF_VIEW / image_size, HEIGHT / slices
    count = round(slices * rng.uniform(0.92, 1.12))
    corner = np.round(
        [-spacing * (image_size - 1) / 2, -200 - spacing * (image_size - 1) / 2, rng.uniform(-900, -300)], 2
    )
    ct_grid = Grid(tuple(corner.tolist()), (spacing, spacing, thickness), (image_size, image_size, count))
    # The anatomy is painted on the CT grid with a margin, from which the PET grid is sampled.
    margin = np.array((max(4, image_size // 24), max(4, image_size // 24), 3))
    grid = Grid(
        tuple((corner - margin * ct_grid.spacing).tolist()),
        ct_grid.spacing,
        tuple((margin * 2 + ct_grid.shape).tolist()),
    )
    # The scan reaches from the root of the neck to the lower brain: its middle lies below the tonsils.
    middle = corner + (np.asarray(ct_grid.shape) - 1) / 2 * ct_grid.spacing
    center = middle + rng.normal((0, 0, 14), (2.5, 2, 3))
    canvas = _Canvas(grid, center, rng)
    muscle = _paint_anatomy(canvas, rng)
    _paint_distractors(canvas, muscle, rng)
    body = canvas.tube(_BODY, -200, 200)[1]
    structures = _paint_tumors(canvas, body, muscle, stage, rng)

    inner = tuple(slice(m, m + n) for m, n in zip(margin, ct_grid.shape, strict=True))
    pet, pet_grid = _scan_pet(canvas, ct_grid, rng)
    if rng.random() < 0.35:
        _streaks(canvas, rng)
    ct = _scan_ct(canvas, rng)[inner]
    outlined = {name: np.ascontiguousarray(level[inner]) for name, level in structures.items()}
    # A node between two slices of a coarse grid is in no slice, so nobody would have outlined it.
    outlined = {name: level for name, level in outlined.items() if name == "GTV" or (level < 0).sum() > 1}
    return Patient(number, seed, sex, age, weight, stage, ct, ct_grid, pet, pet_grid, outlined)


def _scan_ct(c: _Canvas, rng: np.random.Generator) -> Array:
    tissue = np.clip((c.hu + 200) / 150, 0, 1)
    texture = _smooth_noise(rng, c.grid.shape, 4.0 / np.asarray(c.grid.spacing))
    grain = _smooth_noise(rng, c.grid.shape, (0.6, 0.6, 0.0))
    hu = ndimage.gaussian_filter(c.hu, (0.35, 0.35, 0), truncate=3)
    hu += rng.uniform(6, 10) * texture * tissue + rng.uniform(9, 16) * grain
    return np.round(np.clip(hu, -1024, 3071))


def _scan_pet(c: _Canvas, ct_grid: Grid, rng: np.random.Generator) -> tuple[Array, Grid]:
    """Blur by the point spread of the scanner, sample on a coarser grid that covers the CT, add noise."""
    sigma = PET_FWHM / np.sqrt(8 * np.log(2)) / np.asarray(c.grid.spacing)
    blurred = ndimage.gaussian_filter(c.suv, sigma, truncate=3)
    spacing = np.array((2.0, 2.0, 4 / 3)) * ct_grid.spacing
    count = np.ceil(np.add(ct_grid.shape, (4, 4, 3)) * ct_grid.spacing / spacing).astype(int)
    middle = np.asarray(ct_grid.origin) + (np.asarray(ct_grid.shape) - 1) / 2 * ct_grid.spacing
    spacing = np.round(spacing, 4)
    origin = np.round(middle - (count - 1) / 2 * spacing + rng.uniform(-0.5, 0.5, 3), 2)
    suv = ndimage.affine_transform(
        blurred,
        spacing / c.grid.spacing,
        (origin - c.grid.origin) / c.grid.spacing,
        tuple(count),
        order=1,
        mode="nearest",
    )
    noise = _smooth_noise(rng, suv.shape, (0.7, 0.7, 0.5))
    suv = suv + rng.uniform(0.07, 0.16) * noise * np.sqrt(suv + 0.1)
    return np.maximum(suv, 0), Grid(tuple(origin.tolist()), tuple(spacing.tolist()), tuple(count.tolist()))


def outlines(level: Array, grid: Grid) -> list[tuple[int, Array]]:
    """Polygons where a level function crosses zero, slice by slice, finer than a pixel.

    Args:
        level: level function on `grid`, negative inside.
        grid: its grid.

    Returns:
        For each polygon the index of its slice and its corners [n, 3] in mm, not closed by a repeated corner.

    Example:
        >>> x, y, z = np.ogrid[-10:11, -10:11, -1:2]
        >>> polygons = outlines(np.sqrt(x**2 + y**2 + 0.0 * z) - 5, Grid((0, 0, 0), (1, 1, 3), (21, 21, 3)))
        >>> [k for k, corners in polygons], polygons[0][1].shape[1]
        ([0, 1, 2], 3)
    """
    polygons = []
    for k in np.flatnonzero((level < 0).any((0, 1))):
        # The margin closes a polygon that would run off the image.
        plane = np.pad(level[:, :, k], 1, constant_values=max(1.0, float(level[:, :, k].max())))
        for line in find_contours(plane, 0.0):
            corners = line[:-1] - 1
            if len(corners) < 3:
                continue
            points = np.empty((len(corners), 3))
            points[:, :2] = corners * grid.spacing[:2] + grid.origin[:2]
            points[:, 2] = grid.origin[2] + k * grid.spacing[2]
            polygons.append((int(k), points))
    return polygons


class _Study:
    """Writes the DICOM files of a patient."""

    def __init__(self, patient: Patient, folder: Path) -> None:
        self.patient = patient
        self.folder = folder
        self.rng = np.random.default_rng([patient.seed, patient.number, 1])
        self.day = datetime.datetime(2020, 1, 6, 9) + datetime.timedelta(
            days=patient.number, minutes=int(self.rng.integers(240))
        )
        self.study_uid = self.uid("study")
        self.frame_uid = self.uid("frame")

    def uid(self, *what: object) -> UID:
        grid = self.patient.ct_grid
        key = ("medseg phantom", _VERSION, self.patient.seed, self.patient.number, grid, *what)
        return generate_uid(entropy_srcs=[repr(key)])

    def header(
        self, sop_class: UID, modality: str, number: int, description: str, moment: datetime.datetime
    ) -> Dataset:
        p, ds = self.patient, Dataset()
        ds.file_meta = FileMetaDataset()
        ds.file_meta.MediaStorageSOPClassUID = sop_class
        ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        ds.SpecificCharacterSet = "ISO_IR 100"
        ds.SOPClassUID = sop_class
        ds.StudyDate = self.day.strftime("%Y%m%d")
        ds.StudyTime = self.day.strftime("%H%M%S")
        ds.SeriesDate = moment.strftime("%Y%m%d")
        ds.SeriesTime = moment.strftime("%H%M%S")
        ds.AccessionNumber = ""
        ds.Modality = modality
        ds.Manufacturer = "medseg"
        ds.ManufacturerModelName = "phantom"
        ds.ReferringPhysicianName = ""
        ds.StudyDescription = "PET/CT head and neck (made up)"
        ds.SeriesDescription = description
        ds.PatientName = f"Phantom^Not A Person {p.number:03d}"
        ds.PatientID = p.identifier
        ds.PatientBirthDate = ""
        ds.PatientSex = p.sex
        ds.PatientAge = f"{p.age:03d}Y"
        ds.PatientWeight = str(p.weight)
        ds.AdditionalPatientHistory = f"Stage: {p.stage}"
        ds.StudyInstanceUID = self.study_uid
        ds.SeriesInstanceUID = self.uid(modality)
        ds.StudyID = str(p.number)
        ds.SeriesNumber = str(number)
        ds.FrameOfReferenceUID = self.frame_uid
        ds.PositionReferenceIndicator = ""
        return ds

    def write_images(
        self, ds: Dataset, grid: Grid, pixels: Callable[[Dataset, int], Array], bits: int, signed: bool
    ) -> list[UID]:
        """Write a series, a file per slice; returns the SOP instance UIDs in the order of position.

        As in real archives neither the names of the files nor the instance numbers follow the position.
        """
        folder = self.folder / ds.Modality
        folder.mkdir()
        ds.SamplesPerPixel = 1
        ds.PhotometricInterpretation = "MONOCHROME2"
        ds.Rows, ds.Columns = grid.shape[1], grid.shape[0]
        ds.PixelSpacing = [f"{grid.spacing[1]:.6g}", f"{grid.spacing[0]:.6g}"]
        ds.SliceThickness = f"{grid.spacing[2]:.6g}"
        ds.ImageOrientationPatient = ["1", "0", "0", "0", "1", "0"]
        ds.PatientPosition = "HFS"
        ds.BodyPartExamined = "HEADNECK"
        ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, bits, bits - 1, int(signed)
        names = self.rng.permutation(grid.shape[2]) + 1
        instances = self.rng.permutation(grid.shape[2]) + 1
        uids = [self.uid(ds.Modality, k) for k in range(grid.shape[2])]
        for k, (name, instance) in enumerate(zip(names, instances, strict=True)):
            uid = uids[k]
            height = grid.origin[2] + k * grid.spacing[2]
            ds.SOPInstanceUID = uid
            ds.file_meta.MediaStorageSOPInstanceUID = uid
            ds.InstanceNumber = str(instance)
            ds.ImagePositionPatient = [f"{v:.6g}" for v in (*grid.origin[:2], height)]
            ds.SliceLocation = f"{height:.6g}"
            ds.PixelData = np.ascontiguousarray(pixels(ds, k).T).astype("<i2" if signed else "<u2").tobytes()
            ds["PixelData"].VR = "OW"
            ds.save_as(folder / f"IM{name:04d}.dcm", enforce_file_format=True)
        return uids

    def write_ct(self) -> list[UID]:
        p = self.patient
        ds = self.header(CTImageStorage, "CT", 2, "CT head neck contrast", self.day)
        ds.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
        ds.AcquisitionDate, ds.AcquisitionTime = ds.SeriesDate, ds.SeriesTime
        ds.ContentDate, ds.ContentTime = ds.SeriesDate, ds.SeriesTime
        ds.AcquisitionNumber = "1"
        ds.KVP = "120"
        ds.ContrastBolusAgent = "iodine"
        ds.RescaleIntercept, ds.RescaleSlope, ds.RescaleType = "-1024", "1", "HU"
        ds.WindowCenter, ds.WindowWidth = "60", "350"
        return self.write_images(ds, p.ct_grid, lambda _, k: p.ct[:, :, k] + 1024, bits=12, signed=False)

    def write_pet(self) -> None:
        p, grid = self.patient, self.patient.pet_grid
        injected = self.day - datetime.timedelta(minutes=int(self.rng.integers(50, 70)))
        start = self.day + datetime.timedelta(minutes=5)
        dose = float(np.round(p.weight * self.rng.uniform(3.5, 4.5))) * 1e6
        left = dose * 2 ** (-(start - injected).total_seconds() / F18_HALF_LIFE)
        ds = self.header(PositronEmissionTomographyImageStorage, "PT", 3, "PET FDG head neck AC", start)
        ds.ImageType = ["ORIGINAL", "PRIMARY"]
        ds.SeriesType = ["STATIC", "IMAGE"]
        ds.Units = "BQML"
        ds.CountsSource = "EMISSION"
        ds.CorrectedImage = ["DECY", "ATTN", "SCAT", "DTIM", "RAN", "NORM"]
        ds.DecayCorrection = "START"
        ds.AttenuationCorrectionMethod = "CT"
        ds.CollimatorType = "NONE"
        ds.NumberOfSlices = grid.shape[2]
        ds.RescaleIntercept = "0"
        ds.ActualFrameDuration = "150000"
        drug = Dataset()
        drug.Radiopharmaceutical = "FDG"
        drug.RadiopharmaceuticalStartTime = injected.strftime("%H%M%S")
        drug.RadiopharmaceuticalStartDateTime = injected.strftime("%Y%m%d%H%M%S")
        drug.RadionuclideTotalDose = f"{dose:.0f}"
        drug.RadionuclideHalfLife = str(F18_HALF_LIFE)
        drug.RadionuclidePositronFraction = "0.967"
        drug.RadionuclideCodeSequence = [_code("C-111A1", "SRT", "^18^Fluorine")]
        ds.RadiopharmaceuticalInformationSequence = [drug]
        ds.PatientOrientationCodeSequence = [_code("F-10450", "SRT", "recumbent")]
        ds.PatientOrientationCodeSequence[0].PatientOrientationModifierCodeSequence = [
            _code("F-10340", "SRT", "supine")
        ]
        ds.PatientGantryRelationshipCodeSequence = [_code("F-10470", "SRT", "headfirst")]

        def pixels(ds: Dataset, k: int) -> Array:
            # Two bed positions, the upper one first. Decay is corrected to the start of the series for both.
            bed = int(k < grid.shape[2] // 2)
            moment = start + datetime.timedelta(seconds=150 * bed)
            ds.AcquisitionDate, ds.AcquisitionTime = moment.strftime("%Y%m%d"), moment.strftime("%H%M%S")
            ds.ContentDate, ds.ContentTime = ds.AcquisitionDate, ds.AcquisitionTime
            ds.FrameReferenceTime = str(150000 * bed + 74000)
            ds.DecayFactor = f"{2 ** ((150 * bed + 74) / F18_HALF_LIFE):.6g}"
            ds.ImageIndex = grid.shape[2] - k
            activity = p.pet[:, :, k] * (left / (1000 * p.weight))
            ds.RescaleSlope = f"{max(float(activity.max()), 1.0) / 32767:.8g}"
            return np.clip(np.round(activity / float(ds.RescaleSlope)), 0, 32767)

        self.write_images(ds, grid, pixels, bits=16, signed=True)

    def write_structures(self, ct_uids: list[UID]) -> None:
        p, folder = self.patient, self.folder / "RTSTRUCT"
        folder.mkdir()
        ds = self.header(RTStructureSetStorage, "RTSTRUCT", 4, "Delineation", self.day + datetime.timedelta(days=1))
        ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = self.uid("RTSTRUCT", 0)
        ds.InstanceNumber = "1"
        ds.StructureSetLabel = "GTV and nodes"
        ds.StructureSetDate, ds.StructureSetTime = ds.SeriesDate, ds.SeriesTime
        ds.ApprovalStatus = "UNAPPROVED"
        series = Dataset()
        series.SeriesInstanceUID = self.uid("CT")
        series.ContourImageSequence = [_reference(uid) for uid in ct_uids]
        study = Dataset()
        study.ReferencedSOPClassUID = "1.2.840.10008.3.1.2.3.1"
        study.ReferencedSOPInstanceUID = self.study_uid
        study.RTReferencedSeriesSequence = [series]
        frame = Dataset()
        frame.FrameOfReferenceUID = self.frame_uid
        frame.RTReferencedStudySequence = [study]
        ds.ReferencedFrameOfReferenceSequence = [frame]
        ds.StructureSetROISequence, ds.ROIContourSequence, ds.RTROIObservationsSequence = [], [], []
        for number, (name, level) in enumerate(p.structures.items(), start=1):
            roi = Dataset()
            roi.ROINumber = str(number)
            roi.ReferencedFrameOfReferenceUID = self.frame_uid
            roi.ROIName = name
            roi.ROIGenerationAlgorithm = "MANUAL"
            ds.StructureSetROISequence.append(roi)
            contours = Dataset()
            contours.ReferencedROINumber = str(number)
            contours.ROIDisplayColor = ["255", "0", "0"] if name == "GTV" else ["255", "255", "0"]
            contours.ContourSequence = []
            for k, points in outlines(level, p.ct_grid):
                contour = Dataset()
                contour.ContourImageSequence = [_reference(ct_uids[k])]
                contour.ContourGeometricType = "CLOSED_PLANAR"
                contour.NumberOfContourPoints = str(len(points))
                contour.ContourData = "\\".join(f"{v:.3f}" for v in points.ravel())
                contours.ContourSequence.append(contour)
            ds.ROIContourSequence.append(contours)
            observation = Dataset()
            observation.ObservationNumber = str(number)
            observation.ReferencedROINumber = str(number)
            observation.RTROIInterpretedType = "GTV"
            observation.ROIInterpreter = ""
            ds.RTROIObservationsSequence.append(observation)
        ds.save_as(folder / "IM0001.dcm", enforce_file_format=True)


def _code(value: str, scheme: str, meaning: str) -> Dataset:
    code = Dataset()
    code.CodeValue, code.CodingSchemeDesignator, code.CodeMeaning = value, scheme, meaning
    return code


def _reference(uid: str) -> Dataset:
    item = Dataset()
    item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = CTImageStorage, uid
    return item


def write_patient(patient: Patient, folder: Path) -> None:
    """Write the CT, the PET and the RTSTRUCT of a patient into a new folder; a killed run leaves no half of it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        study = _Study(patient, draft)
        uids = study.write_ct()
        study.write_pet()
        study.write_structures(uids)
        draft.chmod(0o755)
        draft.rename(folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def write_cohort(
    out: Path,
    *,
    patients: int = 24,
    seed: int = 0,
    image_size: int = 96,
    slices: int = 40,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write a cohort: a folder per patient, `clinical.csv` (patient_id, stage, sex, age, weight) and `phantom.json`.

    The same arguments write the same bytes. A run that was stopped is continued by the same call.

    Args:
        out: the folder; made when it is not there.
        patients: how many patients.
        seed: seed of the cohort.
        image_size: rows and columns of a CT slice; the field of view is always 192 mm.
        slices: CT slices over 120 mm of height; a patient has a few more or fewer.
        progress: called with how many patients are done, and of how many.

    Raises:
        DatasetError: `out` holds something else, or a phantom of other arguments, or another process writes it.
    """
    arguments = {"version": _VERSION, "patients": patients, "seed": seed, "image_size": image_size, "slices": slices}
    text = json.dumps(arguments, indent=2) + "\n"
    if out.is_file():
        raise DatasetError(f"{out.name}: a file, where the phantom needs a folder; name another one")
    if out.is_dir() and any(out.iterdir()):
        found = out / ARGUMENTS
        if not found.is_file():
            raise DatasetError(
                f"{out.name}: the folder is not empty and holds no phantom; name an empty or a new folder"
            )
        if found.read_text() != text:
            raise DatasetError(
                f"{out.name}: the folder holds a phantom of other arguments ({ARGUMENTS}); name a new folder"
            )
    out.mkdir(parents=True, exist_ok=True)
    atomic_write_text(out / ARGUMENTS, text)
    with only_one(out, "phantom"):
        for draft in out.glob(".PHANTOM-*"):  # left by a killed run
            shutil.rmtree(draft)
        rows = ["patient_id,stage,sex,age,weight"]
        for number in range(1, patients + 1):
            patient = simulate_patient(number, seed=seed, image_size=image_size, slices=slices)
            rows.append(f"{patient.identifier},{patient.stage},{patient.sex},{patient.age},{patient.weight}")
            if not (out / patient.identifier).exists():
                write_patient(patient, out / patient.identifier)
            if progress is not None:
                progress(number, patients)
        atomic_write_text(out / CLINICAL, "\n".join(rows) + "\n")
