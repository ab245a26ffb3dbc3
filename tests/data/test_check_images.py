"""Whether images can be what they are called, and lie on each other: planted faults, and real images without any."""

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter, shift

from medseg.data.alignment import find_shift
from medseg.data.plausibility import implausible_hu, implausible_suv, labels_in_air
from medseg.io import find_series, read_image, read_series
from medseg.io.channel_names import is_ct, is_pet


@pytest.fixture(scope="module")
def thorax() -> NDArray[np.float32]:
    """A made-up CT: air, a body with fat, muscle and bone, two lungs."""
    rng = np.random.default_rng(0)
    x, y, _ = np.meshgrid(*(np.linspace(-1, 1, n) for n in (64, 64, 20)), indexing="ij")
    ct = np.full(x.shape, -1000.0)
    ct[x**2 + y**2 < 0.7] = -100
    ct[x**2 + y**2 < 0.55] = 50
    for side in (-0.35, 0.35):
        ct[(x - side) ** 2 + y**2 < 0.07] = -850
    ct[x**2 + (y + 0.5) ** 2 < 0.01] = 700
    return (np.rint(ct) + np.rint(rng.normal(0, 12, ct.shape))).astype(np.float32)


def padded(ct: NDArray[np.float32], value: float) -> NDArray[np.float32]:
    return np.pad(ct, ((8, 8), (8, 8), (0, 0)), constant_values=value)


@pytest.mark.parametrize(
    "right",
    [
        lambda ct: ct,
        lambda ct: padded(ct, -3024),
        lambda ct: padded(ct, -2000),
        lambda ct: np.maximum(ct, -1024),
        lambda ct: ct[28:36, 20:26, 5:9],  # muscle and no air
        lambda ct: ct[15:27, 26:38],  # lung, with some muscle around
        lambda ct: np.minimum(padded(ct, -1024), 3071),
    ],
    ids=["whole", "padded with -3024", "padded with -2000", "cut at -1024", "muscle", "lung", "cut at 3071"],
)
def test_hounsfield_units_are_believed(thorax, right):
    assert list(implausible_hu(right(thorax))) == []


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda ct: ct + 1024, "dense value is 1075, where tissue has 0 to 80 HU: is 1024 added?"),
        (lambda ct: np.maximum(ct + 1000, 0), "is 1024 added?"),
        (lambda ct: padded(ct + 1024, -2000), "is 1024 added?"),
        (lambda ct: padded(ct, -2000) + 1024, "is 1024 added?"),
        (lambda ct: ct - 3000, "of the values are below -1500"),
        (lambda ct: ct + 8192, "no value is below 0"),
        (lambda ct: padded(ct, -1024) - 1024, "hardly a value where fat, water and soft tissue lie"),
        (lambda ct: (ct + 1024) / 4096, "too narrow for Hounsfield units: were they normalized?"),
        (lambda ct: (ct - ct.mean()) / ct.std(), "were they normalized?"),
        (lambda ct: np.rint(np.clip((ct + 160) / 400, 0, 1) * 255), "8-bit picture"),
        (lambda ct: np.clip(ct, -160, 240), "of the values are exactly 240, the highest: were they clipped?"),
        (lambda ct: np.clip(ct, -160, 3071), "of the values are exactly -160, the lowest: were they clipped?"),
        (lambda ct: np.where(ct < 0, ct + 65536, ct), "were signed numbers read as unsigned?"),
        (lambda ct: ct * 0.7, "the air around the patient lies at -695, -1000 HU expected"),
    ],
    ids=[
        "1024",
        "1000",
        "1024 and padding",
        "1024 on padding",
        "-3000",
        "8192",
        "twice",
        "0-1",
        "z",
        "8 bit",
        "window",
        "clipped below",
        "unsigned",
        "slope",
    ],
)
def test_what_is_not_in_hounsfield_units_is_said_with_its_numbers(thorax, wrong, words):
    (what,) = implausible_hu(wrong(thorax).astype(np.float32))
    assert words in what


def test_what_is_not_in_suv_is_said_with_its_numbers():
    suv = np.random.default_rng(0).gamma(0.5, 1, (40, 40, 40)).astype(np.float32)
    suv[:2, :2, :2] = 160  # a full bladder
    assert list(implausible_suv(suv)) == []
    for wrong, words in (
        (suv * 5000, "are they Bq/ml?"),
        (suv / 5000, "no value is above 0.032"),
        ((suv - suv.min()) / (suv.max() - suv.min()), "were they normalized?"),
        (suv - 1, "uptake is not negative"),
    ):
        (what,) = implausible_suv(wrong)
        assert words in what


@pytest.mark.parametrize("up", [2, 0])
def test_a_label_in_the_air_around_the_body(thorax, up):
    ct = np.where((thorax < -700) & (thorax > -920), thorax - 150, thorax)  # lungs as light as air
    lungs = np.where(ct - thorax < 0, 1, 0).astype(np.uint8)
    body = np.where(ct > -300, 1, 0).astype(np.uint8)
    away = np.zeros_like(body)
    away[:6, :6] = 1
    affine = np.diag([1.0, 1, 3, 1])
    if up == 0:
        ct, lungs, body, away = (np.moveaxis(array, 2, 0) for array in (ct, lungs, body, away))
        affine = affine[:, [2, 0, 1, 3]]
    assert lungs.any()
    assert list(labels_in_air(ct, lungs, {1: "lung"}, affine)) == []
    assert list(labels_in_air(ct, body, {1: "body"}, affine)) == []
    ((name, share),) = labels_in_air(ct, away, {1: "tumor"}, affine)
    assert (name, share) == ("tumor", 1.0)


def test_names_of_channels():
    assert [name for name in ("CT", "ct_low", "PET", "PET/CT", "ACT", "T2", "SUV", "ADC") if is_ct(name)] == [
        "CT",
        "ct_low",
    ]
    assert [name for name in ("CT", "PET", "pet-suv", "SUVbw", "carpet", "PT") if is_pet(name)] == [
        *("PET", "pet-suv", "SUVbw", "PT"),
    ]


@pytest.fixture(scope="module")
def organs() -> NDArray[np.float32]:
    rng = np.random.default_rng(0)
    image = gaussian_filter(rng.standard_normal((64, 64, 24)), (4, 4, 2)).astype(np.float32)
    return image / image.std()


@pytest.mark.parametrize("other", [lambda v: -v, np.square, np.exp, lambda v: (v > 0).astype(np.float32)])
def test_channels_that_lie_on_each_other_are_believed(organs, other):
    assert find_shift(organs, other(organs), (3, 3, 4)) is None


@pytest.mark.parametrize("mm", [(0, 12, 0), (-9, -9, 0), (0, 0, 12), (21, 0, 0)])
def test_a_shift_is_found_with_its_length_and_direction(organs, mm):
    spacing = np.array([3.0, 3, 4])
    moved = shift(np.square(organs), np.array(mm) / spacing, order=1, mode="nearest")
    found = find_shift(organs, moved, spacing)
    np.testing.assert_allclose(found.mm, mm, atol=4.1)
    assert found.after > 1.3 * found.before
    assert found.length >= 8


def test_what_cannot_be_judged_is_believed(organs):
    rng = np.random.default_rng(1)
    for _ in range(3):  # what two images have in common by chance grows by chance when one is shifted
        other = gaussian_filter(rng.standard_normal(organs.shape), 2).astype(np.float32)
        assert find_shift(organs, other, (3, 3, 4)) is None
    assert find_shift(organs, np.ones_like(organs), (3, 3, 4)) is None
    small = organs[:20, :20]
    assert find_shift(small, np.roll(small, 5, axis=0), (3, 3, 4)) is None  # too small
    one = organs[..., :1]
    assert find_shift(one, np.roll(one, 9, axis=0), (3, 3, 4)) is None  # a slice


@pytest.mark.realdata
@pytest.mark.parametrize(
    "name",
    [
        "mhd/gate_ct/patient-2mm.mhd",
        "mhd/gate_ct/patient-4mm.mhd",
        "mhd/gate_ct/ex10_phantom.mhd",
        "mhd/elastix/Testing/Data/3DCT_lung_baseline_small.mha",
        "ct_organs/example_ct.nii.gz",
        "ct_organs/example_ct_sm.nii.gz",
    ],
)
def test_real_ct_is_believed_until_it_is_changed(data: Path, name: str):
    ct = read_image(data / name).numpy()[0].astype(np.float32)
    assert list(implausible_hu(ct)) == []
    for wrong in (ct + 1024, ct + 1000, ct + 8192, (ct + 1024) / 4096, np.clip(ct, -160, 240)):
        assert len(list(implausible_hu(wrong))) == 1


@pytest.mark.realdata
def test_real_organs_are_not_in_the_air_until_they_are_moved(data: Path):
    image, label = (read_image(data / "ct_organs" / name) for name in ("example_ct_sm.nii.gz", "example_seg.nii.gz"))
    ct, mask = image.numpy()[0].astype(np.float32), label.numpy()[0].astype(np.uint8)
    names = {int(value): str(value) for value in np.unique(mask) if value}
    assert len(names) > 20
    affine = np.asarray(image.affine)
    assert list(labels_in_air(ct, mask, names, affine)) == []
    assert len(list(labels_in_air(ct, np.roll(mask, 50, axis=1), names, affine))) > 5


def resampled(moving, fixed, mm=(0.0, 0.0, 0.0)):
    import SimpleITK as sitk

    image = sitk.Resample(moving, fixed, sitk.TranslationTransform(3, list(mm)), sitk.sitkLinear, 0.0, sitk.sitkFloat32)
    return sitk.GetArrayFromImage(image).T


@pytest.mark.realdata
@pytest.mark.parametrize("channel", ["T1W", "T2W"])
def test_real_brain_sequences_lie_on_each_other_until_one_is_moved(data: Path, channel: str):
    import SimpleITK as sitk

    fixed, moving = (
        sitk.ReadImage(str(data / "mr_registration" / f"study1_{name}.nii.gz")) for name in ("FLAIR", channel)
    )
    flair = sitk.GetArrayFromImage(fixed).T.astype(np.float32)
    assert find_shift(flair, resampled(moving, fixed), fixed.GetSpacing()) is None
    for axis in range(3):
        mm = np.eye(3)[axis] * 15
        found = find_shift(flair, resampled(moving, fixed, mm), fixed.GetSpacing())
        np.testing.assert_allclose(found.mm, -mm, atol=5)


@pytest.mark.realdata
def test_real_prostate_sequences_lie_on_each_other_until_one_is_moved(data: Path):
    import SimpleITK as sitk

    def load(number: int):
        series = next(
            found
            for found in find_series(data / "prostate" / "dicom")
            if found.modality == "MR" and found.number == number
        )
        image = read_series(series)
        volume = sitk.GetImageFromArray(image.numpy()[0].T)
        affine = np.diag([-1, -1, 1, 1]) @ np.asarray(image.affine)
        spacing = np.linalg.norm(affine[:3, :3], axis=0)
        volume.SetSpacing(spacing.tolist())
        volume.SetOrigin(affine[:3, 3].tolist())
        volume.SetDirection((affine[:3, :3] / spacing).ravel().tolist())
        return volume

    t2 = load(4)
    array = sitk.GetArrayFromImage(t2).T
    for number in (3, 7, 8):  # T2 sagittal, ADC, calculated b-value
        moving = load(number)
        assert find_shift(array, resampled(moving, t2), t2.GetSpacing()) is None
        assert find_shift(array, resampled(moving, t2, (0, 15, 0)), t2.GetSpacing()) is not None
