"""The recipe knee, on phantoms written as the MHD files of its work."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from click.testing import CliRunner
from monai.transforms import Compose, LoadImaged, Orientationd

from data_prep.build import BuildResult, build_dataset
from data_prep.cli import main
from data_prep.recipes.knee import KneeOptions, KneeRecipe
from medseg.data import DatasetFolder, check_dataset
from medseg.errors import ConfigError
from medseg.io import Reader
from medseg.transforms import CropToJointCenterd, PadAndStrideSlicesd, ResizeSlicesd

BONES = ("femur", "tibia", "fibula")
#: Columns: where the axes of the array run, in DICOM's left, posterior, superior.
LEFT_DOWN_BACK = np.array([[1, 0, 0], [0, 0, 1], [0, -1, 0]], float)
LEFT_DOWN_FRONT = LEFT_DOWN_BACK * [1, 1, -1]


def write(path: Path, voxels: Any, spacing: Any, direction: np.ndarray = LEFT_DOWN_BACK) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    voxels = np.asarray(voxels)
    image = sitk.GetImageFromArray(voxels.swapaxes(0, 2), isVector=voxels.ndim > 3)
    image.SetSpacing([float(step) for step in spacing])
    image.SetDirection(direction.ravel().tolist())
    image.SetOrigin((-70, -45, 80))
    sitk.WriteImage(image, path)


def write_knee(folder: Path, name: str, knee: Any, bones: tuple[str, ...] = BONES, suffix: str = ".mhd") -> None:
    write(folder / f"{name}{suffix}", knee.image, knee.spacing)
    for bone in bones:
        write(folder / f"{name}_{bone}{suffix}", getattr(knee, bone), knee.spacing)


@pytest.fixture(scope="module")
def knees(make_knee: Callable[..., Any]) -> dict[str, Any]:
    return {
        "epi": make_knee(slices=41, thickness_mm=2.4, shift_mm=(8, -10), tilt=5),
        "jopp": make_knee(size=128, shift_mm=(-6, 5), seed=1),
        "fat": make_knee(size=128, fat_saturated=True, seed=2),
    }


def build(source: Path, out: Path, **options: Any) -> BuildResult:
    return build_dataset(KneeRecipe(KneeOptions(**options)), source, out, jobs=1, keep_identifiers=True, report=False)


def voxels(path: Path) -> np.ndarray:
    return np.asarray(nib.load(path).dataobj)


def sampled(source: Path, at: nib.Nifti1Image) -> np.ndarray:
    """Values of a source, by SimpleITK, at the places of a dataset's voxels; nearest, 0 outside."""
    grid = sitk.GetImageFromArray(np.zeros(at.shape[::-1], np.uint8))
    lps = np.diag([-1, -1, 1]) @ at.affine[:3]
    spacing = np.linalg.norm(lps[:, :3], axis=0)
    grid.SetSpacing(spacing.tolist())
    grid.SetOrigin(lps[:, 3].tolist())
    grid.SetDirection((lps[:, :3] / spacing).ravel().tolist())
    nearest = sitk.Resample(sitk.ReadImage(source), grid, sitk.Transform(), sitk.sitkNearestNeighbor)
    return sitk.GetArrayFromImage(nearest).T


def test_two_cohorts_become_one_shape(tmp_path: Path, knees: dict[str, Any]) -> None:
    source = tmp_path / "source"
    write_knee(source / "epi", "MUELLER1", knees["epi"])
    write_knee(source / "jopp", "SCHMIDT2", knees["jopp"], suffix=".mha")
    write(source / "maas" / "LEHMANN3.mhd", knees["jopp"].image, knees["jopp"].spacing)
    write(source / ".Trash" / "WEBER5.mhd", knees["jopp"].image, knees["jopp"].spacing)  # hidden: not looked at
    write(source / "epi" / "KRAUSE4_tibia.mhd", knees["epi"].tibia, knees["epi"].spacing)
    result = CliRunner().invoke(main, ["build", "knee", str(source), str(tmp_path / "out"), "--jobs", "1"])
    assert result.exit_code == 0, result.output
    unpaired = [line for line in result.stderr.splitlines() if line.startswith("unpaired")]
    assert sorted(line.split(": ")[-1] for line in unpaired) == ["image without maps", "map without an image"]
    dataset = DatasetFolder(tmp_path / "out")
    assert dataset.channel_names == ["MRI"]
    assert dataset.labels == {"background": 0, "bone": 1}
    assert set(dataset.cases["shape"]) == {"224x224x24"}
    assert sorted(dataset.cases["spacing"]) == ["0.535714x0.535714x4", "0.535714x0.535714x4.8"]
    assert [problem for problem in check_dataset(tmp_path / "out") if problem.severity != "warning"] == []
    # Nobody's name is in anything that was written or printed, but in the key file.
    for path in [file for file in (tmp_path / "out").rglob("*") if file.is_file()]:
        content = path.read_bytes()
        content += nib.load(path).header.structarr.tobytes() if path.name.endswith(".nii.gz") else b""
        for name in (b"MUELLER", b"SCHMIDT", b"LEHMANN", b"KRAUSE"):
            assert name not in content + path.name.encode() + result.output.encode()
    assert "MUELLER1" in (tmp_path / "out.key").read_text()


@pytest.mark.parametrize("direction", [LEFT_DOWN_BACK, LEFT_DOWN_FRONT], ids=["back", "front"])
def test_voxels_lie_where_they_lay_and_masks_are_not_interpolated_along_z(
    tmp_path: Path, knees: dict[str, Any], direction: np.ndarray
) -> None:
    knee = knees["epi"]
    folder = tmp_path / "source"
    for name in ("image", *BONES):
        write(folder / f"a{'' if name == 'image' else '_' + name}.mhd", getattr(knee, name), knee.spacing, direction)
    build(folder, tmp_path / "out", bones="three")
    dataset = DatasetFolder(tmp_path / "out")
    assert dataset.labels == {"background": 0, "femur": 1, "tibia": 2, "fibula": 3}
    label, image = nib.load(dataset.label_path("a")), nib.load(dataset.image_paths("a")[0])
    assert nib.aff2axcodes(label.affine) == ("L", "I", "P")
    np.testing.assert_array_equal(label.affine, image.affine)
    truth = np.zeros(label.shape, np.uint8)
    for number, bone in ((3, "fibula"), (2, "tibia"), (1, "femur")):
        truth[sampled(folder / f"a_{bone}.mhd", label) > 0] = number
    assert np.count_nonzero(truth != voxels(dataset.label_path("a"))) / np.count_nonzero(truth) < 0.002
    # 41 slices: every second from the first on, then three empty ones.
    assert [z for z in range(24) if not voxels(dataset.image_paths("a")[0])[..., z].any()] == [21, 22, 23]
    row = dataset.cases.iloc[0]
    assert (row["source_slices"], row["shape"], row["spacing"]) == (41, "224x224x24", "0.535714x0.535714x4.8")
    smooth = sampled(folder / "a.mhd", image)
    assert np.corrcoef(smooth.ravel(), image.get_fdata().ravel())[0, 1] > 0.97
    # The middle of the crop is the joint.
    assert row["joint_off_mm"] < 4
    assert row["joint_clarity"] > 4
    assert 0.8 < row["label_in_crop"] <= 1
    middle = (label.affine @ [111.5, 111.5, 0, 1])[[0, 2]]
    lps = np.array([-70, -45, 80]) + direction @ (np.array([*knee.center, 0]) * knee.spacing)
    np.testing.assert_allclose(middle, [-lps[0], lps[2]], atol=3)


def test_a_new_image_is_prepared_by_the_same_transforms_and_its_mask_brought_back(
    tmp_path: Path, knees: dict[str, Any]
) -> None:
    knee = knees["epi"]
    write(tmp_path / "s" / "a.mhd", knee.image, knee.spacing, LEFT_DOWN_FRONT)
    for bone in BONES:
        write(tmp_path / "s" / f"a_{bone}.mhd", getattr(knee, bone), knee.spacing, LEFT_DOWN_FRONT)
    build(tmp_path / "s", tmp_path / "out")
    dataset = DatasetFolder(tmp_path / "out")
    chain = Compose(
        [
            LoadImaged(["image", "femur"], reader=Reader, ensure_channel_first=True),
            Orientationd(["image", "femur"], "LIP", labels=(("L", "R"), ("P", "A"), ("I", "S"))),
            CropToJointCenterd(["image", "femur"], source_key="image", size_mm=120),
            ResizeSlicesd(["image", "femur"], (224, 224), ["linear", "nearest"]),
            PadAndStrideSlicesd(["image", "femur"], 24),
        ]
    )
    made = chain({"image": tmp_path / "s" / "a.mhd", "femur": tmp_path / "s" / "a_femur.mhd"})
    stored = nib.load(dataset.image_paths("a")[0])
    np.testing.assert_allclose(made["image"][0], stored.get_fdata(), rtol=1e-5)
    np.testing.assert_allclose(made["image"].affine, stored.affine, atol=1e-4)
    back = Compose(chain.transforms[1:]).inverse(made)["femur"]
    truth = sitk.ReadImage(tmp_path / "s" / "a_femur.mhd")
    assert tuple(back.shape[1:]) == truth.GetSize()
    np.testing.assert_allclose(back.affine[:3, 3], np.array(truth.GetOrigin()) * [-1, -1, 1], atol=1e-4)
    # What the crop kept of the femur comes back; a slice that was left out has the mask of its neighbor.
    found, there = np.asarray(back[0]) > 0, sitk.GetArrayFromImage(truth).T > 0
    assert 2 * np.count_nonzero(found & there) / (np.count_nonzero(found) + np.count_nonzero(there)) > 0.85


def test_merged_and_single_bones_and_the_overlap_rule(tmp_path: Path, knees: dict[str, Any]) -> None:
    knee = knees["jopp"]
    source = tmp_path / "source"
    write(source / "a.mhd", knee.image, knee.spacing)
    both = knee.femur.copy()
    both[:, 60:] |= knee.tibia[:, 60:]  # the femur's map reaches into the tibia
    for bone, mask in (("Femur", both), ("TIBIA", knee.tibia), ("fibula", knee.fibula)):
        write(source / f"a_{bone}.mhd", mask, knee.spacing)
    labels = {}
    for bones in ("merged", "three", *BONES):
        build(source, tmp_path / bones, bones=bones, joint_center="middle")
        dataset = DatasetFolder(tmp_path / bones)
        labels[bones] = voxels(dataset.label_path("a"))
        assert max(dataset.labels.values()) == labels[bones].max()
        assert ("overlap_ml" in dataset.cases) == (bones == "three")
    np.testing.assert_array_equal(labels["merged"], labels["three"] > 0)
    np.testing.assert_array_equal(labels["three"] == 1, labels["femur"])  # the first named has the voxel
    np.testing.assert_array_equal(labels["three"] == 2, (labels["tibia"] > 0) & (labels["femur"] == 0))
    overlap = np.count_nonzero(both.astype(int) + knee.tibia + knee.fibula > 1) * np.prod(knee.spacing) / 1000
    assert DatasetFolder(tmp_path / "three").cases["overlap_ml"][0] == pytest.approx(overlap, rel=1e-4)
    assert DatasetFolder(tmp_path / "fibula").labels == {"background": 0, "fibula": 1}
    # A fibula that is not in view has an empty map.
    write(source / "a_fibula.mhd", np.zeros_like(knee.fibula), knee.spacing)
    assert build(source, tmp_path / "fibula", bones="fibula", joint_center="middle").built == ["a"]
    assert not voxels(DatasetFolder(tmp_path / "fibula").label_path("a")).any()


def test_maps_in_one_file_and_in_another_folder(tmp_path: Path, knees: dict[str, Any]) -> None:
    knee = knees["jopp"]
    channels = np.stack([getattr(knee, bone) * 255 for bone in BONES], axis=-1)
    values = knee.fibula * 3
    values[knee.tibia > 0] = 2
    values[knee.femur > 0] = 1
    found = []
    for kind, maps in (("channels", channels), ("values", values)):
        source = tmp_path / kind
        write(source / "images" / "a.mhd", knee.image, knee.spacing)
        write(source / "maps" / "a_seg.mhd", maps, knee.spacing)
        write(source / "maps" / "b_seg.mhd", maps, knee.spacing)
        result = build(source, tmp_path / f"{kind}_out", maps="../maps/{name}_seg", bones="three")
        assert result.built == ["images_a"]
        (lone,) = result.unpaired
        assert (lone.case, lone.what) == ("maps/b_seg.mhd", "map without an image")
        found.append(voxels(DatasetFolder(tmp_path / f"{kind}_out").label_path("images_a")))
    write_knee(tmp_path / "files" / "images", "a", knee)
    build(tmp_path / "files", tmp_path / "files_out", bones="three")
    for label in found:
        np.testing.assert_array_equal(label, voxels(DatasetFolder(tmp_path / "files_out").label_path("images_a")))


def test_an_unclear_joint_is_refused_unless_the_masks_tell(tmp_path: Path, knees: dict[str, Any]) -> None:
    write_knee(tmp_path / "source", "fat", knees["fat"])
    write_knee(tmp_path / "source", "fine", knees["jopp"])
    result = build(tmp_path / "source", tmp_path / "image")
    assert result.built == ["fine"]
    assert result.failed[0].case == "fat"
    assert "no joint found" in result.failed[0].what
    assert "--joint-center" in result.failed[0].what
    result = build(tmp_path / "source", tmp_path / "mask", joint_center="mask")
    assert result.built == ["fat", "fine"]
    assert "no joint was found in the image alone of 1 cases, such as fat" in result.notes
    label = voxels(DatasetFolder(tmp_path / "mask").label_path("fat"))
    assert 60 < np.median(np.nonzero(label)[1]) < 160


def test_a_joint_found_elsewhere_than_the_maps_have_it_is_noted(tmp_path: Path, knees: dict[str, Any]) -> None:
    knee = knees["jopp"]
    write(tmp_path / "s" / "a.mhd", knee.image, knee.spacing)
    for bone in BONES:  # maps of another image: 25 mm lower
        lower = np.pad(getattr(knee, bone), ((0, 0), (20, 0), (0, 0)))[:, :-20]
        write(tmp_path / "s" / f"a_{bone}.mhd", lower, knee.spacing)
    result = build(tmp_path / "s", tmp_path / "out")
    assert any("more than 10 mm from that of the maps in 1 of 1 cases" in note for note in result.notes)
    assert DatasetFolder(tmp_path / "out").cases["joint_off_mm"][0] == pytest.approx(25, abs=3)


def test_the_crop_and_the_size_are_options(tmp_path: Path, knees: dict[str, Any]) -> None:
    write_knee(tmp_path / "s", "a", knees["jopp"])
    result = build(tmp_path / "s", tmp_path / "out", crop_mm=70, size=70, slices=30)
    row = DatasetFolder(tmp_path / "out").cases.iloc[0]
    assert (row["shape"], row["spacing"]) == ("70x70x30", "1x1x4")
    assert row["label_in_crop"] < 0.9
    assert any(f"the crop keeps {row['label_in_crop']:.0%} of the maps or more" in note for note in result.notes)


def test_visits_of_one_patient_stay_together(tmp_path: Path, knees: dict[str, Any]) -> None:
    for visit in ("p1_2014", "p1_2015"):
        write_knee(tmp_path / "s", visit, knees["jopp"], bones=("femur", "tibia"))
    write_knee(tmp_path / "s", "other", knees["jopp"], bones=("femur", "tibia"))
    chosen = {"bones": "femur", "joint_center": "middle"}
    result = build(tmp_path / "s", tmp_path / "out", patient_pattern="(p[0-9]+)_[0-9]+$", **chosen)
    assert [problem.what for problem in result.failed] == [
        "--patient-pattern '(p[0-9]+)_[0-9]+$' does not fit its path"
    ]
    cases = DatasetFolder(tmp_path / "out").cases
    assert list(cases["case"]) == ["p1_2014", "p1_2015"]
    assert set(cases["patient"]) == {"p1"}


def spoil_swap(folder: Path, knee: Any) -> None:
    write(folder / "a_femur.mhd", knee.tibia, knee.spacing)
    write(folder / "a_tibia.mhd", knee.femur, knee.spacing)


def spoil_header(folder: Path, line: str, replacement: str) -> None:
    for path in folder.glob("*.mhd"):
        text = path.read_text()
        start = text.index(line)
        path.write_text(text[:start] + replacement + text[text.index("\n", start) :].removeprefix("\n"))


SPOILT: dict[str, tuple[Callable[[Path, Any], object], str]] = {
    "a bone missing": (
        lambda s, k: (s / "a_fibula.mhd").unlink(),
        "no map of the fibula; a bone that is not in view has an empty map",
    ),
    "names swapped": (spoil_swap, "the femur lies below the tibia"),
    "no spacing": (lambda s, k: spoil_header(s, "ElementSpacing", ""), "no ElementSpacing"),
    "no orientation": (
        lambda s, k: spoil_header(s, "TransformMatrix", "TransformMatrix = 1 0 0 0 1 0 0 0 1\n"),
        r"axial .* coronal ones",
    ),
    "MHA too": (lambda s, k: write(s / "a.mha", k.image, k.spacing), "both an MHD and an MHA file of the image"),
    "no voxels": (lambda s, k: (s / "a_femur.raw").unlink(), "a_femur"),
    "other shape": (lambda s, k: write(s / "a_femur.mhd", k.femur[:, :, 1:], k.spacing), "the femur has the shape"),
    "interpolated": (lambda s, k: write(s / "a_femur.mhd", np.float32(k.femur * 0.5), k.spacing), "whole number"),
    "empty": (lambda s, k: [write(s / f"a_{b}.mhd", k.femur * 0, k.spacing) for b in BONES], "nowhere"),
}


@pytest.mark.parametrize("what", SPOILT)
def test_what_is_wrong_with_a_case_is_said(tmp_path: Path, knees: dict[str, Any], what: str) -> None:
    spoil, message = SPOILT[what]
    write_knee(tmp_path / "s" / "1", "a", knees["jopp"])
    spoil(tmp_path / "s" / "1", knees["jopp"])
    write_knee(tmp_path / "s" / "2", "a", knees["jopp"])
    result = build(tmp_path / "s", tmp_path / "out")
    assert result.built == ["2_a"]
    (failed,) = result.failed
    assert failed.case == "1_a"
    assert re.search(message, failed.what), failed.what


@pytest.mark.parametrize("what", ["no voxels", "a bone missing", "interpolated"])
def test_a_failure_tells_nobody_s_name(tmp_path: Path, knees: dict[str, Any], what: str) -> None:
    write_knee(tmp_path / "s" / "WEBERS", "MUELLER1", knees["jopp"])
    write_knee(tmp_path / "t", "a", knees["jopp"])
    SPOILT[what][0](tmp_path / "t", knees["jopp"])
    for path in (tmp_path / "t").iterdir():
        name = path.name.replace("a", "SCHMIDT-2", 1)
        if path.suffix == ".mhd":
            path.write_text(path.read_text().replace(f"= {path.stem}.", f"= {Path(name).stem}."))
        (tmp_path / "s" / "KELLER").mkdir(exist_ok=True)
        path.rename(tmp_path / "s" / "KELLER" / name)
    result = CliRunner().invoke(main, ["build", "knee", str(tmp_path / "s"), str(tmp_path / "out"), "--jobs", "1"])
    assert result.exit_code == 1, result.output
    assert "1 built, 1 failed" in result.stdout
    texts = [file.read_text() for file in (tmp_path / "out").iterdir() if file.suffix in (".json", ".csv", ".html")]
    written = "".join([result.output, *texts])
    for name in ("MUELLER", "SCHMIDT", "WEBER", "KELLER"):
        assert name not in written


def test_the_bias_field_can_be_corrected(tmp_path: Path, knees: dict[str, Any]) -> None:
    write_knee(tmp_path / "s", "a", knees["jopp"])
    variation = []
    for n4 in (False, True):
        build(tmp_path / "s", tmp_path / str(n4), n4=n4, bones="femur", size=56, slices=12)
        dataset = DatasetFolder(tmp_path / str(n4))
        femur = voxels(dataset.image_paths("a")[0])[voxels(dataset.label_path("a")) > 0]
        variation.append(femur.std() / femur.mean())
    assert variation[1] < 0.95 * variation[0]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"maps": "{name}"}, "--maps"),
        ({"maps": "./{name}"}, "--maps"),
        ({"maps": "labels"}, "--maps"),
        ({"bones": "patella"}, "--bones: 'patella' given, merged, three, femur, tibia or fibula"),
        ({"joint_center": "auto"}, "--joint-center: 'auto' given, image, mask or middle"),
        ({"crop_mm": 0}, "--crop-mm: 0 given"),
        ({"slices": -3}, "--slices: -3 given"),
        ({"patient_pattern": "p.+"}, "has no group"),
        ({"patient_pattern": "("}, "is no pattern"),
    ],
)
def test_options_that_mean_nothing_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        KneeOptions(**given)
