"""A made-up coronal knee MR with its bone maps: what the tests have in place of patients.

It has what makes finding the joint hard: growth plates (dark sheets parallel to the joint, 2 cm above and below it),
dark cortex, menisci, red marrow darker than the epiphyses, bright fat under the skin and behind the patella, the
fall-off of a surface coil, noise, a knee that is tilted, small, and off the center of the image.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage


@dataclass(frozen=True)
class Knee:
    """A phantom: ``image`` and maps are [left, inferior, posterior], ``spacing`` in mm along these.

    ``center`` is the true middle of the joint space as an index of the first two axes.
    """

    image: NDArray[np.float32]
    femur: NDArray[np.uint8]
    tibia: NDArray[np.uint8]
    fibula: NDArray[np.uint8]
    spacing: tuple[float, float, float]
    center: tuple[float, float]


def make_knee(
    size: int = 160,
    slices: int = 24,
    *,
    field_mm: float = 160.0,
    thickness_mm: float = 4.0,
    shift_mm: tuple[float, float] = (0.0, 0.0),
    tilt: float = 0.0,
    scale: float = 1.0,
    physis_mm: float = 2.0,
    space_mm: float = 6.0,
    noise: float = 0.05,
    coil: float = 0.4,
    fat_saturated: bool = False,
    seed: int = 0,
) -> Knee:
    """Make a right knee.

    Args:
        size: rows and columns.
        slices: how many.
        field_mm: edge of the square field of view.
        thickness_mm: distance of slices.
        shift_mm: of the joint off the middle of the image: to the left of the patient, and downward.
        tilt: degrees in the plane.
        scale: size of the knee; 1 is an adult's of 74 mm across the tibial plateau.
        physis_mm: thickness of the growth plates; 0 for closed ones.
        space_mm: between the marrow of the two bones at the joint, cortex included.
        noise: standard deviation, where marrow is about 0.9.
        coil: how much of the signal is lost 80 mm from the middle of the image.
        fat_saturated: marrow and fat dark, cartilage bright, as in a PD image with fat saturation.
        seed: of noise and small irregularities.
    """
    rng = np.random.default_rng(seed)
    step = field_mm / size
    index = [np.arange(n, dtype=np.float32) for n in (size, size, slices)]
    left = ((index[0] - (size - 1) / 2) * step - shift_mm[0])[:, None, None]
    down = ((index[1] - (size - 1) / 2) * step - shift_mm[1])[None, :, None]
    back = ((index[2] - (slices - 1) / 2) * thickness_mm)[None, None, :]
    angle = np.deg2rad(tilt)
    # The knee's own axes in mm: u to the patient's left (medial in a right knee), v upward, w forward.
    u = (left * np.cos(angle) + down * np.sin(angle)) / scale
    v = (left * np.sin(angle) - down * np.cos(angle)) / scale
    w = -back / scale
    half = space_mm / scale / 2

    def ellipsoid(center: tuple[float, ...], radii: tuple[float, ...]) -> NDArray[np.bool_]:
        return sum(((a - c) / r) ** 2 for a, c, r in zip((u, v, w), center, radii, strict=True)) < 1

    def column(width: NDArray, depth: NDArray, middle: float = 0.0) -> NDArray[np.bool_]:
        return (np.abs(u) / width) ** 2.6 + (np.abs(w - middle) / depth) ** 2.6 < 1

    flare = np.exp(-((np.clip(v - 24, 0, None) / 20) ** 2))
    shaft = column(14 + 24 * flare, 14 + 13 * flare, -3) & (v > 20)
    condyles = ellipsoid((-20, half + 21, -6), (19.5, 21, 29)) | ellipsoid((20, half + 21, -6), (19, 21, 28))
    femur = (shaft | condyles) & ~((np.abs(u) < 6) & (v < 17) & (w < 8))
    flare = np.exp(-((np.clip(-v - 14, 0, None) / 22) ** 2))
    plateau = -half + 0.8 * np.cos(u / 9) - 0.02 * u
    tibia = column(15 + 22 * flare, 13 + 11 * flare, -4) & (v < plateau)
    fibula = ((u + 34) ** 2 + (w + 16) ** 2 < (6 + 3.5 * np.exp(-(((v + 22) / 8) ** 2))) ** 2) & (v < -15)
    fibula &= ~tibia
    patella = ellipsoid((0, 30, 38), (20, 19, 10))

    limb_radius = 56 - 5 * np.exp(-((v / 25) ** 2))
    radius = np.sqrt(u**2 + (0.95 * w) ** 2)
    limb = radius < limb_radius
    image = np.zeros(femur.shape, np.float32)
    fat, muscle, cartilage, cortex, red = (0.1, 0.45, 0.9, 0.03, 0.15) if fat_saturated else (0.95, 0.4, 0.5, 0.06, 0.7)
    image[limb] = fat
    image[(radius < limb_radius - 8) & limb] = muscle
    image[(radius < limb_radius - 8) & (np.abs(v) < 22) & (w > 12)] = 0.9 * fat  # behind the patella
    image[(np.abs(v) < 20) & (radius < limb_radius - 8) & (w <= 12)] = 0.5 * (fat + muscle)
    between = (v < half + 10) & (v > -half - 2) & (np.abs(u) < 39) & (w < 24) & (w > -32)
    image[between & (np.abs(u) < 39)] = cartilage
    wedge = (np.abs(u) > 22) & (np.abs(u) < 39) & (np.abs(v) < 0.6 + 0.16 * (np.abs(u) - 22))
    image[wedge & between] = cortex  # menisci
    image[(np.abs(u) < 8) & (v < 18) & (v > -half) & (w < 8) & (w > -25)] = 0.6 * muscle  # cruciate ligaments
    lump = ndimage.gaussian_filter(rng.normal(size=femur.shape).astype(np.float32), (3 / step, 3 / step, 1))
    lump /= lump.std()
    thick = max(1, round(1.2 * scale / step))
    plus = ndimage.generate_binary_structure(2, 1)[..., None]
    for bone, plate, wave in (
        (femur, half + 24, 2.5),
        (tibia, -half - 15, 1.2),
        (fibula, -30.0, 0.0),
        (patella, 99, 0),
    ):
        where = v - (plate + wave * np.cos(u / 7))
        shaft_side = where > 0 if plate > 0 else where < 0
        marrow = np.where(shaft_side, red, fat) * (1 + 0.05 * lump)
        image[bone] = marrow[bone]
        image[bone & ~ndimage.binary_erosion(bone, plus, thick)] = cortex
        if physis_mm:
            image[bone & (np.abs(where) < physis_mm / scale / 2)] = cortex * 3
    image = ndimage.gaussian_filter(image, (0.3 / step, 0.3 / step, 0))
    far = np.hypot(*[(along - size / 2) * step for along in np.meshgrid(index[0], index[1])])[..., None]
    image *= 1 - coil * (far / 80) ** 2 * 0.5 - coil * 0.5 * np.clip(far / 80, 0, 1)
    noises = rng.normal(0, noise, (2, *image.shape))
    image = np.hypot(image + noises[0], noises[1]) * 900
    center = ((size - 1) / 2 + shift_mm[0] / step, (size - 1) / 2 + shift_mm[1] / step)
    maps = [np.ascontiguousarray(bone, np.uint8) for bone in (femur, tibia, fibula)]
    return Knee(image.astype(np.float32), *maps, (step, step, thickness_mm), center)
