"""The recipe prostatex: on a small tree in the original layout, and on the real patient."""

import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd
import pydicom
import pytest
import SimpleITK as sitk
from click.testing import CliRunner
from PIL import Image
from scipy.spatial.transform import Rotation

from data_prep.build import BuildResult, build_dataset
from data_prep.cli import main
from data_prep.recipes.prostatex import FINDINGS, IMAGES, ProstateXOptions, ProstateXRecipe
from medseg.data import DatasetFolder
from medseg.errors import ConfigError, DatasetError

#: Sequence -> series number, description, shape, spacing, and the voxel that is the finding.
SERIES: Mapping[str, tuple[int, str, tuple[int, int, int], tuple[float, float, float], tuple[int, int, int]]] = {
    "T2": (4, "t2_tse_tra", (60, 56, 7), (0.5, 0.5, 3.0), (33, 24, 3)),
    "ADC": (7, "ep2d_diff_tra_DYNDIST_ADC", (20, 24, 7), (2.0, 2.0, 3.0), (9, 13, 3)),
    "DWI": (8, "ep2d_diff_tra_DYNDISTCALC_BVAL", (24, 18, 6), (1.5, 1.8, 3.6), (8, 10, 4)),
}
#: Position of the finding, DICOM (LPS) mm.
POS = np.array([11.25, 32.5, -38.5])
WriteSeries = Callable[..., list[Path]]


class Tree:
    """A source in the original layout: the two tables, and a folder of series per patient and visit."""

    def __init__(self, root: Path, write_series: WriteSeries) -> None:
        self.root, self._write = root, write_series
        self.findings: list[dict[str, str]] = []
        self.images: list[dict[str, str]] = []
        self.affines: dict[str, np.ndarray] = {}
        self.voxels: dict[str, np.ndarray] = {}

    def patient(
        self,
        patient: str,
        significant: str = "TRUE",
        *,
        visit: str = "07-07-2011",
        prefix: str = "{}.000000-",
        **options: Any,
    ) -> Path:
        """Write three series with a bright voxel at the finding, and its rows."""
        folder = self.root / "dicom" / patient / visit
        rng = np.random.default_rng(int(patient[-4:]))
        for name, (number, description, shape, spacing, index) in SERIES.items():
            affine = np.eye(4)
            affine[:3, :3] = Rotation.from_euler("x", 18, degrees=True).as_matrix() @ np.diag(spacing)
            affine[:3, 3] = POS - affine[:3, :3] @ index
            voxels = rng.integers(20, 60, shape)
            voxels[index] = 900
            self.affines[name], self.voxels[name] = affine, voxels
            where = folder / f"{prefix.format(number)}{description.replace('_', '')}-12345"
            self._write(
                where, voxels, affine, patient=patient, number=number, description=description, study=visit, **options
            )
            ijk = np.rint(np.array(index) + 0.5 + 1e-6).astype(int)  # of a center, either neighbor is right
            self.images.append(
                {
                    "ProxID": patient,
                    "Name": f"{description}0",
                    "fid": "1",
                    "pos": " ".join(map(str, POS)),
                    "ijk": " ".join(map(str, ijk)),
                    "DCMSerDescr": description,
                    "DCMSerNum": str(number),
                }
            )
        self.finding(patient, significant)
        return folder

    def finding(self, patient: str, significant: str = "TRUE", fid: str = "1", pos: np.ndarray = POS) -> None:
        row = {"ProxID": patient, "fid": fid, "pos": " ".join(map(str, pos)), "zone": "PZ", "ClinSig": significant}
        self.findings.append(row)

    def build(self, out: Path, **options: Any) -> BuildResult:
        (self.root / "csv").mkdir(exist_ok=True)
        pd.DataFrame(self.findings).to_csv(self.root / "csv" / FINDINGS, index=False)
        pd.DataFrame(self.images).to_csv(self.root / "csv" / IMAGES, index=False)
        recipe = ProstateXRecipe(ProstateXOptions(**({"pixels": 41} | options)))
        return build_dataset(recipe, self.root, out, jobs=1, report=False)


@pytest.fixture
def tree(tmp_path: Path, write_series: WriteSeries) -> Tree:
    return Tree(tmp_path / "source", write_series)


def rows(out: Path) -> dict[str, dict[str, str]]:
    table = pd.read_csv(out / "cases.csv", dtype=str, keep_default_na=False)
    return {row["case"]: row for row in table.to_dict("records")}


def channel(out: Path, case: str, number: int) -> tuple[np.ndarray, np.ndarray]:
    image = nib.load(out / "imagesTr" / f"{case}_{number:04d}.nii.gz")
    return np.asarray(image.dataobj), image.affine


def test_the_finding_is_the_middle_of_three_aligned_channels(tree: Tree, tmp_path: Path) -> None:
    tree.patient("ProstateX-0000")
    tree.patient("ProstateX-0001", "FALSE", prefix="{}-")
    result = tree.build(tmp_path / "out")
    assert result.failed == []
    assert "2 exported + 0 errors = 2 findings" in result.notes
    dataset = DatasetFolder(tmp_path / "out")
    assert dataset.channel_names == ["T2", "DWI", "ADC"]
    assert dataset.classes == {"insignificant": 0, "significant": 1}
    ras = POS * [-1, -1, 1]
    affines = []
    for number, name in enumerate(dataset.channel_names):
        voxels, affine = channel(tmp_path / "out", "ProstateX-0000_1", number)
        assert voxels.shape == (41, 41, 1)
        assert np.unravel_index(voxels.argmax(), voxels.shape) == (20, 20, 0), name
        np.testing.assert_allclose((affine @ [20, 20, 0, 1])[:3], ras, atol=1e-4)
        affines.append(affine)
    np.testing.assert_array_equal(affines[0], affines[1])
    np.testing.assert_array_equal(affines[0], affines[2])
    entries = {entry["case"]: entry for entry in dataset.datalist("all")}
    assert {case: entry["label"] for case, entry in entries.items()} == {"ProstateX-0000_1": 1, "ProstateX-0001_1": 0}
    entry = entries["ProstateX-0000_1"]
    assert (entry["patient"], entry["lesion"], entry["position"]) == ("ProstateX-0000", "1", "-11.25 -32.5 -38.5")
    assert rows(tmp_path / "out")["ProstateX-0000_1"]["disagreements"] == ""


def test_each_series_is_z_scored_over_all_its_voxels(tree: Tree, tmp_path: Path) -> None:
    tree.patient("ProstateX-0001")
    tree.build(tmp_path / "scored")
    tree.build(tmp_path / "stored", z_score=False)
    for number, name in enumerate(("T2", "DWI", "ADC")):
        stored, _ = channel(tmp_path / "stored", "ProstateX-0001_1", number)
        scored, _ = channel(tmp_path / "scored", "ProstateX-0001_1", number)
        assert stored.max() == pytest.approx(900, rel=1e-4)
        mean, deviation = tree.voxels[name].mean(), tree.voxels[name].std()
        inside = stored != 0  # beyond the image both have 0
        np.testing.assert_allclose(scored[inside], (stored[inside] - mean) / deviation, rtol=1e-3, atol=2e-3)


def test_the_red_dot_is_on_the_finding(tree: Tree, tmp_path: Path) -> None:
    tree.patient("ProstateX-0000")
    tree.build(tmp_path / "out")
    picture = np.asarray(Image.open(tmp_path / "out" / "attachments" / "ProstateX-0000_1_position.png"), int)
    red = (picture[..., 0] > 200) & (picture[..., 1] < 60) & (picture[..., 2] < 60)
    left = 0
    for name in ("T2", "DWI", "ADC"):
        _, _, shape, spacing, index = SERIES[name]
        width = round(400 * shape[0] * spacing[0] / (shape[1] * spacing[1]))
        y, x = (where.mean() for where in np.nonzero(red[:, left : left + width]))
        assert (x, y) == pytest.approx(
            ((index[0] + 0.5) / shape[0] * width, (index[1] + 0.5) / shape[1] * 400), abs=1.5
        ), name
        left += width


def test_every_failed_finding_is_named_with_its_reason(tree: Tree, tmp_path: Path) -> None:
    good = tree.patient("ProstateX-0000")
    missing = tree.patient("ProstateX-0001")
    shutil.rmtree(next(missing.glob("7*")))
    gap = tree.patient("ProstateX-0002")
    next(gap.glob("4*/1-004.dcm")).unlink()
    tree.patient("ProstateX-0003")
    tree.findings[-1]["pos"] = tree.images[-1]["pos"] = tree.images[-2]["pos"] = tree.images[-3]["pos"] = (
        "11.25 32.5 999"
    )
    tree.finding("ProstateX-0004")
    tree.findings.append(tree.findings[0])
    tree.patient("ProstateX-0005", "maybe")
    shutil.rmtree(tree.patient("ProstateX-0006"))
    tree.patient("ProstateX-0007")
    tree.images[-1]["DCMSerDescr"] = tree.images[-2]["DCMSerDescr"] = "ep2d"
    assert good.exists()
    result = tree.build(tmp_path / "out")
    assert result.built == ["ProstateX-0000_1"]
    why = {problem.case: problem.what for problem in result.failed}
    assert why["ProstateX-0001_1"] == "ADC: series 7 is missing"
    assert re.match(r"T2: series 4: .*1 slice missing: a gap of 6.00 mm", why["ProstateX-0002_1"])
    assert re.search(r"T2: series 4: pos lies outside \(index .* of 60x56x7\)", why["ProstateX-0003_1"])
    assert "no row with its ProxID, fid and pos" in why["ProstateX-0004_1"]
    assert why["ProstateX-0000_1-2"] == "the table of findings lists it again"
    assert "TRUE or FALSE expected" in why["ProstateX-0005_1"]
    assert "no DICOM of this patient" in why["ProstateX-0006_1"]
    assert "names no series with BVAL" in why["ProstateX-0007_1"]
    assert "names no series with ADC" in why["ProstateX-0007_1"]
    assert "1 exported + 8 errors = 9 findings" in result.notes


def test_a_finding_listed_twice_with_two_answers_is_not_built(tree: Tree, tmp_path: Path) -> None:
    tree.patient("ProstateX-0000")
    tree.patient("ProstateX-0001", "TRUE")
    tree.finding("ProstateX-0001", "FALSE")
    result = tree.build(tmp_path / "out")
    assert result.built == ["ProstateX-0000_1"]
    assert [problem.case for problem in result.failed] == ["ProstateX-0001_1", "ProstateX-0001_1-2"]
    assert {problem.what for problem in result.failed} == {"the table of findings lists it with both TRUE and FALSE"}


def test_the_header_decides_and_the_folder_is_only_compared(tree: Tree, tmp_path: Path) -> None:
    folder = tree.patient("ProstateX-0000")
    (wrong,) = folder.glob("4.000000-*")
    wrong.rename(folder / "5.000000-t2tsetra-12345")
    tree.images[0]["ijk"] = "40 25 4"
    for path in folder.glob("8*/*.dcm"):
        ds = pydicom.dcmread(path)
        ds.SeriesDescription = "another"
        ds.InstanceNumber = ds.InstanceNumber + 10
        ds.save_as(path)
    tree.build(tmp_path / "out")
    row = rows(tmp_path / "out")["ProstateX-0000_1"]
    assert row["series_T2"] == "4"
    assert row["disagreements"].split("; ") == [
        "T2: the folder's prefix is 5, SeriesNumber in the header 4",
        "T2: ijk 40 25 4, pos gives 33.50 24.50 3.50 from the corner, before rounding",
        "DWI: the header calls it another, the table ep2d_diff_tra_DYNDISTCALC_BVAL",
        "DWI: the slice has InstanceNumber 15, it is number 5 upward and 2 downward",
    ]
    voxels, _ = channel(tmp_path / "out", "ProstateX-0000_1", 0)
    assert voxels.argmax() == voxels.size // 2


def test_slices_numbered_downward_are_found_by_their_position(tree: Tree, tmp_path: Path) -> None:
    folder = tree.patient("ProstateX-0000")
    for path in folder.glob("*/*.dcm"):
        ds = pydicom.dcmread(path)
        ds.InstanceNumber = len(list(path.parent.iterdir())) + 1 - ds.InstanceNumber
        ds.save_as(path)
    result = tree.build(tmp_path / "out")
    row = rows(tmp_path / "out")["ProstateX-0000_1"]
    assert (row["instance_T2"], row["instance_DWI"], row["disagreements"]) == ("4", "2", "")
    assert all(channel(tmp_path / "out", "ProstateX-0000_1", n)[0].argmax() == 41 * 41 // 2 for n in range(3))
    assert any(note.startswith("InstanceNumber = k of ijk + 1") for note in result.notes)


def test_of_repeated_series_the_nearest_slices_win_and_the_rest_is_named(
    tree: Tree, tmp_path: Path, write_series: WriteSeries
) -> None:
    folder = tree.patient("ProstateX-0000")
    first = tree.images[0]
    # A repeat of T2 on the same grid, acquired next to DWI and ADC, and one whose slices lie 1 mm off.
    shifted = tree.affines["T2"].copy()
    shifted[:3, 3] += tree.affines["T2"][:3, 2] / 3
    for number, affine in ((6, tree.affines["T2"]), (9, shifted)):
        write_series(
            folder / f"{number}-again",
            tree.voxels["T2"],
            affine,
            patient="ProstateX-0000",
            number=number,
            description="t2_tse_tra",
            study="07-07-2011",
        )
        tree.images.append(first | {"DCMSerNum": str(number)})
    result = tree.build(tmp_path / "out")
    row = rows(tmp_path / "out")["ProstateX-0000_1"]
    assert (row["series_T2"], row["alternatives"]) == ("6", "T2: 4, 9")
    assert float(row["off_plane_mm_T2"]) == pytest.approx(0, abs=1e-6)
    assert any("1 finding(s) of which further series" in note for note in result.notes)


def test_a_second_fid_of_the_same_number_has_a_name_of_its_own(tree: Tree, tmp_path: Path) -> None:
    tree.patient("ProstateX-0005")
    other = POS + tree.affines["T2"][:3, 0] * 4
    tree.finding("ProstateX-0005", "FALSE", pos=other)
    tree.images += [row | {"pos": " ".join(map(str, other))} for row in list(tree.images)]
    tree.build(tmp_path / "out")
    found = rows(tmp_path / "out")
    assert {case: row["class"] for case, row in found.items()} == {
        "ProstateX-0005_1": "significant",
        "ProstateX-0005_1-2": "insignificant",
    }
    assert {row["patient"] for row in found.values()} == {"ProstateX-0005"}
    for number, at in (("_1", 20), ("_1-2", 16)):
        voxels, _ = channel(tmp_path / "out", f"ProstateX-0005{number}", 0)
        assert np.unravel_index(voxels.argmax(), voxels.shape) == (at, 20, 0)


def test_a_finding_at_the_border_stays_in_the_middle_and_the_padding_is_told(tree: Tree, tmp_path: Path) -> None:
    tree.patient("ProstateX-0000")
    result = tree.build(tmp_path / "out", pixels=201)
    row = rows(tmp_path / "out")["ProstateX-0000_1"]
    voxels, _ = channel(tmp_path / "out", "ProstateX-0000_1", 0)
    assert voxels.argmax() == 201 * 201 // 2
    assert float(row["outside_T2"]) == pytest.approx(1 - 60 * 56 / 201**2, abs=1e-4)
    assert any(note.startswith("1 patch(es) reach beyond an image") for note in result.notes)


def test_what_is_no_training_table_is_refused(tree: Tree, tmp_path: Path) -> None:
    tree.patient("ProstateX-0000")
    tree.build(tmp_path / "out")
    table = pd.read_csv(tree.root / "csv" / FINDINGS).drop(columns="ClinSig")
    table.to_csv(tree.root / "csv" / FINDINGS, index=False)
    with pytest.raises(DatasetError, match=r"no column 'ClinSig'.* the challenge's test set has none"):
        build_dataset(ProstateXRecipe(), tree.root, tmp_path / "other", jobs=1)
    shutil.copy(tree.root / "csv" / IMAGES, tree.root)
    table.assign(ClinSig="TRUE").to_csv(tree.root / "csv" / FINDINGS, index=False)
    with pytest.raises(DatasetError, match=rf"2 files {IMAGES} in it"):
        build_dataset(ProstateXRecipe(), tree.root, tmp_path / "other", jobs=1)
    for options in ({"pixels": 200}, {"spacing": 0.0}):
        with pytest.raises(ConfigError, match="expected"):
            ProstateXOptions(**options)


def test_tables_as_spreadsheets_write_them_and_what_lies_beside(
    tree: Tree, tmp_path: Path, write_series: WriteSeries
) -> None:
    tree.patient("ProstateX-0000")
    tree.patient("ProstateX-0001")
    tree.images[0]["ijk"], tree.images[3]["ijk"] = "a b c", "34.0 24 4.0"
    tree.patient("ProstateX-0002")
    tree.findings[-1]["pos"] = tree.images[-1]["pos"] = "inf 0 0"
    (tree.root / "csv").mkdir()
    (tree.root / "csv" / f"._{FINDINGS}").write_bytes(b"macOS")
    (tree.root / "broken.dcm").write_text("no DICOM")
    folder = tree.root / "stranger"
    write_series(folder, np.zeros((4, 4, 2), int), np.eye(4), patient="Doe", number=4, description="t2_tse_tra")
    tree.build(tmp_path / "first")
    for name in (FINDINGS, IMAGES):  # semicolons, a byte order mark, TRUE as pandas writes it, an empty and a short row
        table = pd.read_csv(tree.root / "csv" / name, dtype=str).replace({"TRUE": "True"}).assign(further="x")
        content = table.to_csv(index=False, sep=";", lineterminator="\r\n")
        (tree.root / "csv" / name).write_text(f"\ufeff{content};;;\r\n", encoding="utf-8", newline="")
    recipe = ProstateXRecipe(ProstateXOptions(pixels=41))
    result = build_dataset(recipe, tree.root, tmp_path / "out", jobs=1, report=False)
    assert result.built == ["ProstateX-0000_1", "ProstateX-0001_1"]
    assert [problem.what for problem in result.failed] == ["pos 'inf 0 0': three numbers expected"]
    assert [problem.case for problem in result.unpaired] == ["broken.dcm"]
    assert "1 patient(s) with DICOM images have no finding" in result.notes
    assert "2 exported + 1 errors = 3 findings" in result.notes
    found = rows(tmp_path / "out")
    assert found["ProstateX-0000_1"]["disagreements"].startswith("T2: ijk a b c, pos gives 33.50 24.50 3.50")
    assert found == rows(tmp_path / "first")


def test_a_dataset_of_findings_is_split_by_patient_and_class(tree: Tree, tmp_path: Path) -> None:
    for number in range(10):
        tree.patient(f"ProstateX-{number:04d}", "TRUE" if number % 2 else "FALSE")
        if number % 2:  # a patient may have findings of both classes
            other = POS + tree.affines["T2"][:3, 0] * 4
            tree.finding(f"ProstateX-{number:04d}", "FALSE", "2", other)
            tree.images += [row | {"fid": "2", "pos": " ".join(map(str, other))} for row in tree.images[-3:]]
    tree.build(tmp_path / "out", pixels=3)
    words = ["split", str(tmp_path / "out"), "--seed", "1", "--fractions", "0.6", "0.2", "0.2"]
    result = CliRunner().invoke(main, [*words, "--stratify", "patient_class"])
    assert result.exit_code == 0, result.output
    dataset = DatasetFolder(tmp_path / "out")
    parts = {part: dataset.datalist(part) for part in ("train", "val", "test")}
    assert {part: len(entries) for part, entries in parts.items()} == {"train": 9, "val": 3, "test": 3}
    assert {part: sum(entry["label"] for entry in entries) for part, entries in parts.items()} == {
        "train": 3,
        "val": 1,
        "test": 1,
    }
    info = json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert sorted(entry["case"] for entry in info["training"]) == sorted(entry["case"] for entry in parts["train"])
    assert info["training"][0]["label"] in (0, 1)


@pytest.fixture(scope="module")
def real(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[BuildResult, Path]:
    root = tmp_path_factory.mktemp("prostatex")
    source = root / "source"
    source.mkdir()
    for name in ("csv", "dicom"):
        (source / name).symlink_to(data / "prostate" / name)
    result = build_dataset(ProstateXRecipe(ProstateXOptions(z_score=False)), source, root / "out", jobs=1, report=False)
    return result, root / "out"


@pytest.mark.realdata
def test_the_real_tables_join_and_every_finding_is_accounted_for(real: tuple[BuildResult, Path]) -> None:
    result, out = real
    assert result.built == ["ProstateX-0000_1"]
    assert len(result.failed) == 329
    assert {problem.what for problem in result.failed} == {"no DICOM of this patient (PatientID) in the source"}
    others = [note for note in result.notes if "part of no case" in note]
    assert len(others) == 1  # other series, and the tables
    assert [note for note in result.notes if note not in others][:3] == [
        "330 findings of 204 patients, 330 of them joined with the 3869 rows of images on ProxID, fid and pos",
        "3 fid(s) occur twice in a patient: the second case is called PATIENT_FID-2",
        "1 exported + 329 errors = 330 findings",
    ]
    row = rows(out)["ProstateX-0000_1"]
    assert (row["class"], row["zone"], row["position"]) == ("significant", "PZ", "-25.7457 -31.8707 -38.511")
    assert [row[f"series_{name}"] for name in ("T2", "DWI", "ADC")] == ["4", "8", "7"]
    assert [row[f"ijk_{name}"] for name in ("T2", "DWI", "ADC")] == ["167 224 9", "36 72 9", "36 72 9"]
    # 19 slices, numbered downward: the slice is the 9th upward.
    assert [row[f"instance_{name}"] for name in ("T2", "DWI", "ADC")] == ["11", "11", "11"]
    assert row["disagreements"] == ""


@pytest.mark.realdata
def test_real_patches_are_those_of_another_tools_images(real: tuple[BuildResult, Path], data: Path) -> None:
    _, out = real
    for number, name in enumerate(("t2w", "hbv", "adc")):
        patch, affine = channel(out, "ProstateX-0000_1", number)
        other = sitk.ReadImage(str(next((data / "prostate" / "expected" / "ProstateX-0000").glob(f"*_{name}.mha"))))
        other = sitk.Cast(other, sitk.sitkFloat32)
        index = other.TransformPhysicalPointToContinuousIndex((25.7457, 31.8707, -38.511))
        assert index[2] == pytest.approx(8.498, abs=1e-3)
        k = round(index[2])
        lps = np.diag([-1, -1, 1, 1]) @ affine
        plane = other[:, :, k]
        plane.SetOrigin((0, 0))
        plane.SetSpacing((1, 1))
        plane.SetDirection((1, 0, 0, 1))
        grid = sitk.Image(201, 201, sitk.sitkFloat32)
        corner, right, down = (
            other.TransformPhysicalPointToContinuousIndex([float(v) for v in (lps @ [*at, 0, 1])[:3]])
            for at in ((0, 0), (1, 0), (0, 1))
        )
        grid.SetOrigin(corner[:2])
        grid.SetSpacing((right[0] - corner[0], down[1] - corner[1]))
        expected = sitk.GetArrayFromImage(sitk.Resample(plane, grid, sitk.Transform(), sitk.sitkBSpline)).T
        inner = (slice(3, -3), slice(3, -3))
        difference = np.abs(patch[..., 0] - expected)[inner]
        assert difference.max() < 0.01 * patch.std(), name
        assert patch.std() > 0


@pytest.mark.realdata
def test_ijk_is_the_rounded_position_from_the_corner_neither_0_nor_1_based(data: Path) -> None:
    """The evidence for the docs: all 3,869 rows; and where the lesions were marked, on the centers of the slices."""
    table = pd.read_csv(data / "prostate" / "csv" / IMAGES, dtype=str)
    matrices = np.stack([np.array(text.split(","), float).reshape(4, 4) for text in table["WorldMatrix"]])
    pos = np.stack([np.array([*text.split(), "1"], float) for text in table["pos"]])
    ijk = np.stack([np.array(text.split(), int) for text in table["ijk"]])
    index = np.einsum("nij,nj->ni", np.linalg.inv(matrices), pos)[:, :3]
    assert np.abs(index - ijk).max() <= 0.5 + 1e-3
    transverse = (table["DCMSerDescr"].str.contains("t2") & table["DCMSerDescr"].str.contains("tra")).to_numpy()
    from_zero = np.rint(index - 0.5).astype(int)
    differences = pd.Series((ijk - from_zero)[transverse, 2]).value_counts().to_dict()
    assert differences == {0: 173, 1: 242}
    # Voxel centers lie at n + 0.5: there 4 of 5 lesions were marked.
    assert np.mean(np.abs(index[transverse, 2] % 1 - 0.5) < 0.1) > 0.75
    # The origin of WorldMatrix is half a voxel before the first center of the DICOM series.
    (first,) = (data / "prostate" / "dicom").rglob("4.000000-*/1-19.dcm")
    ds = pydicom.dcmread(first, stop_before_pixels=True)
    matrix = matrices[((table["ProxID"] == "ProstateX-0000") & (table["DCMSerNum"] == "4")).to_numpy()][0]
    np.testing.assert_allclose((matrix @ [0.5, 0.5, 0.5, 1])[:3], ds.ImagePositionPatient, atol=1e-3)


@pytest.mark.realdata
def test_the_missing_slice_fails_its_finding_by_name(data: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "dicom").mkdir(parents=True)
    (source / "csv").symlink_to(data / "prostate" / "csv")
    for folder in (data / "prostate" / "dicom" / "ProstateX-0000" / "07-07-2011").iterdir():
        if not folder.name.startswith("8."):
            (source / "dicom" / folder.name).symlink_to(folder)
    (source / "missing_slice").symlink_to(data / "prostate" / "missing_slice")
    table = pd.read_csv(data / "prostate" / "csv" / FINDINGS, dtype=str)
    recipe = ProstateXRecipe()
    with pytest.raises(DatasetError, match=rf"none of the {len(table)} case\(s\) could be built"):
        build_dataset(recipe, source, tmp_path / "out", jobs=1, report=False)
    (case,) = (case for case in recipe.select(source).cases if case.patient == "ProstateX-0000")
    assert "DWI: series 8: " in case.problem
    assert "1 slice missing: a gap of 6.00 mm where the others are 3.00 mm" in case.problem
