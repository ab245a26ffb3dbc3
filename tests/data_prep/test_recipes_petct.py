"""The recipe petct on made-up patients whose truth is known."""

import copy
import errno
import gzip
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from click.testing import CliRunner, Result

from data_prep.build import BuildResult, build_dataset
from data_prep.cli import main
from data_prep.phantom import Patient, simulate_patient, write_cohort, write_patient
from data_prep.recipes.petct import AIR, PetCtOptions, PetCtRecipe, body_center
from medseg.data import DatasetFolder
from medseg.errors import ConfigError, DatasetError, GeometryError
from medseg.io import read_image

SIZE = {"image_size": 48, "slices": 16}
FIRST, SECOND, THIRD = "PHANTOM-001", "PHANTOM-002", "PHANTOM-003"


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("phantom") / "cohort"
    write_cohort(out, patients=3, seed=5, **SIZE)
    return out


@pytest.fixture
def source(cohort: Path, tmp_path: Path) -> Path:
    """A copy of the cohort that a test may spoil."""
    return Path(shutil.copytree(cohort, tmp_path / "source"))


@pytest.fixture(scope="module")
def patients() -> list[Patient]:
    return [simulate_patient(number, seed=5, **SIZE) for number in (1, 2, 3)]


def build(source: Path, out: Path, *, keep_identifiers: bool = True, **options: Any) -> BuildResult:
    recipe = PetCtRecipe(PetCtOptions(**({"roi": ("GTV", "LN_*")} | options)))
    return build_dataset(recipe, source, out, jobs=1, keep_identifiers=keep_identifiers, report=False)


def run(*words: object) -> Result:
    return CliRunner().invoke(main, ["build", "petct", *map(str, words), "--jobs", "1", "--no-report"])


def voxels(path: Path) -> np.ndarray:
    return np.asarray(nib.load(path).dataobj)


def edit(files: Iterator[Path], **values: Any) -> None:
    for path in files:
        ds = pydicom.dcmread(path)
        for keyword, value in values.items():
            if value is None:
                delattr(ds, keyword)
            else:
                setattr(ds, keyword, value)
        ds.save_as(path)


def structure_set(source: Path, patient: str) -> Path:
    (path,) = (source / patient / "RTSTRUCT").glob("*")
    return path


def test_channels_and_label_are_the_truth_of_the_phantom(cohort: Path, tmp_path: Path, patients: list[Patient]) -> None:
    result = build(cohort, tmp_path / "out")
    assert (result.failed, result.unpaired) == ([], [])
    dataset = DatasetFolder(tmp_path / "out")
    assert dataset.info["channel_names"] == {"0": "CT", "1": "PET"}
    assert dataset.labels == {"background": 0, "tumor": 1}
    for patient, case in zip(patients, (FIRST, SECOND, THIRD), strict=True):
        ct, pet = (nib.load(path) for path in dataset.image_paths(case))
        label = nib.load(dataset.label_path(case))
        np.testing.assert_array_equal(ct.affine, pet.affine)
        np.testing.assert_array_equal(ct.affine, label.affine)
        np.testing.assert_allclose(ct.affine[:2, 3], -np.array(patient.ct_grid.origin[:2]), atol=1e-3)
        np.testing.assert_allclose(np.asarray(ct.dataobj), patient.ct, atol=0.51)
        truth = np.any([level < 0 for level in patient.structures.values()], axis=0)
        filled = np.asarray(label.dataobj) == 1
        overlap = 2 * (truth & filled).sum() / (truth.sum() + filled.sum())
        assert overlap > 0.95
        volume = dataset.cases.set_index("case").loc[case, "volume_ml_tumor"]
        assert volume == pytest.approx(truth.sum() * np.prod(patient.ct_grid.spacing) / 1000, rel=0.05)
        # The tumor is hot in SUVbw: bright on PET, and on the scale of the truth.
        assert np.asarray(pet.dataobj).max() == pytest.approx(patient.pet.max(), rel=0.3)
        assert np.asarray(pet.dataobj)[truth].mean() > 2 * np.median(np.asarray(pet.dataobj)[patient.ct > -300])


def test_pet_and_ct_are_resampled_as_simpleitk_does(cohort: Path, tmp_path: Path) -> None:
    build(cohort, tmp_path / "out", spacing=(5.0, 6.0, 7.0))
    dataset = DatasetFolder(tmp_path / "out")
    assert set(dataset.cases["spacing"]) == {"5x6x7"}
    paths = dataset.image_paths(FIRST)
    for folder, path, atol in (("CT", paths[0], 0.02), ("PT", paths[1], 1e-3)):
        image = read_image(cohort / FIRST / folder)
        nib.save(nib.Nifti1Image(np.asarray(image)[0], np.asarray(image.affine)), tmp_path / "own.nii")
        reference = sitk.ReadImage(str(path))
        theirs = sitk.Resample(
            sitk.ReadImage(str(tmp_path / "own.nii")), reference, sitk.Transform(), sitk.sitkLinear, np.nan
        )
        theirs = sitk.GetArrayFromImage(theirs).T
        known = np.isfinite(theirs)
        assert known.mean() > 0.9
        np.testing.assert_allclose(voxels(path)[known], theirs[known], atol=atol)


def test_classes_in_order_with_their_overlap(cohort: Path, tmp_path: Path, patients: list[Patient]) -> None:
    build(cohort, tmp_path / "a", roi=(), roi_class=("all=*", "node=LN_*"))
    # An ROI belongs to the class that names it first, so nothing is left for the nodes.
    assert (DatasetFolder(tmp_path / "a").cases["volume_ml_node"] == 0).all()
    build(cohort, tmp_path / "b", roi=(), roi_class=("node=LN_*", "tumor=GTV"))
    dataset = DatasetFolder(tmp_path / "b")
    assert dataset.labels == {"background": 0, "node": 1, "tumor": 2}
    assert "overlap_ml" in dataset.cases
    for patient, case in zip(patients, (FIRST, SECOND, THIRD), strict=True):
        truth = patient.structures["GTV"] < 0
        filled = voxels(dataset.label_path(case)) == 2
        assert 2 * (truth & filled).sum() / (truth.sum() + filled.sum()) > 0.95


def test_where_outlines_overlap_the_first_class_wins_and_the_volume_is_told(source: Path, tmp_path: Path) -> None:
    path = structure_set(source, FIRST)
    ds = pydicom.dcmread(path)
    # A second ROI with the contours of the first: all of it overlaps.
    roi, contours = ds.StructureSetROISequence[0], ds.ROIContourSequence[0]
    assert roi.ROINumber == contours.ReferencedROINumber
    again, outline = copy.deepcopy(roi), copy.deepcopy(contours)
    again.ROINumber = outline.ReferencedROINumber = 99
    again.ROIName = "second opinion"
    ds.StructureSetROISequence.append(again)
    ds.ROIContourSequence.append(outline)
    ds.save_as(path)
    name = roi.ROIName
    for order in ((f"a={name}", "b=second*"), ("b=second*", f"a={name}")):
        out = tmp_path / order[0][0]
        build(source, out, roi=(), roi_class=order)
        row = DatasetFolder(out).cases.set_index("case").loc[FIRST]
        first, second = order[0][0], order[1][0]
        assert row[f"volume_ml_{first}"] > 0
        assert row[f"volume_ml_{second}"] == 0
        assert row["overlap_ml"] == pytest.approx(row[f"volume_ml_{first}"], rel=1e-5)


def test_a_crop_on_the_label_is_centered_and_one_on_the_body_does_not_know_the_label(
    cohort: Path, tmp_path: Path
) -> None:
    whole, body, node, label = (tmp_path / name for name in ("whole", "body", "node", "label"))
    build(cohort, whole, spacing=(4.0, 4.0, 4.0))
    crop: dict[str, Any] = {"spacing": (4.0, 4.0, 4.0), "crop": (120.0, 120.0, 80.0)}
    build(cohort, body, **crop)
    build(cohort, node, **crop | {"roi": ("GTV",)})
    build(cohort, label, **crop | {"crop_center": "label"})
    for case in (FIRST, SECOND, THIRD):
        images = {out: nib.load(DatasetFolder(out).image_paths(case)[0]) for out in (whole, body, node, label)}
        assert images[body].shape == images[label].shape == (30, 30, 20)
        np.testing.assert_array_equal(images[body].affine, images[node].affine)
        # Each crop is a piece of the whole: the same voxels at the same place.
        steps = np.linalg.inv(images[whole].affine) @ images[body].affine
        np.testing.assert_allclose(steps[:3, :3], np.eye(3), atol=1e-5)
        np.testing.assert_allclose(steps[:3, 3], np.rint(steps[:3, 3]), atol=1e-3)
        mask = voxels(DatasetFolder(label).label_path(case)) > 0
        center = np.array([where.mean() for where in np.nonzero(mask)])
        assert np.abs(center - (np.array(mask.shape) - 1) / 2).max() <= 1.5
    kept = DatasetFolder(body).cases["label_in_crop"]
    assert ((kept > 0.3) & (kept <= 1)).all()


def test_a_crop_beyond_the_image_is_air_without_activity(cohort: Path, tmp_path: Path) -> None:
    build(cohort, tmp_path / "out", crop=(400.0, 400.0, 400.0))
    dataset = DatasetFolder(tmp_path / "out")
    ct, pet = (voxels(path) for path in dataset.image_paths(FIRST))
    assert (ct[0, 0] == AIR).all()
    assert (pet[0, 0] == 0).all()
    assert (dataset.cases["label_in_crop"] == 1).all()
    result = run(cohort, tmp_path / "tiny", "--roi", "GTV", "--crop", 4, 4, 4)
    assert result.exit_code == 1
    assert "no voxel of the label is left" in result.stderr


def test_the_body_is_found_without_table_and_refused_without_body() -> None:
    ct = np.full((60, 60, 20), -1000, np.float32)
    ct[20:40, 10:30] = 30
    ct[5:55, 50:51] = 200  # a thin table
    np.testing.assert_allclose(body_center(ct, np.array([4.0, 4.0, 4.0])), (29.5, 19.5, 9.5), atol=0.5)
    np.testing.assert_allclose(body_center(ct, np.array([2.0, 2.0, 4.0])), (29.5, 19.5, 9.5), atol=1.0)
    with pytest.raises(GeometryError, match="no body"):
        body_center(ct * 0 - 1000, np.array([4.0, 4.0, 4.0]))


def test_pet_without_weight_fails_by_name_and_the_others_are_built(source: Path, tmp_path: Path) -> None:
    edit((source / SECOND / "PT").glob("*"), PatientWeight=None)
    result = run(source, tmp_path / "out", "--roi", "GTV", "--keep-identifiers")
    assert result.exit_code == 1
    failed = [line for line in result.stderr.splitlines() if line.startswith("failed")]
    assert len(failed) == 1
    assert failed[0].startswith(f"failed: {SECOND}: ")
    assert "PatientWeight" in failed[0]
    assert "Traceback" not in result.output
    assert "2 built, 1 failed" in result.stdout
    assert list(DatasetFolder(tmp_path / "out").cases["case"]) == [FIRST, THIRD]


def test_a_structure_set_of_another_study_or_patient_is_not_used(source: Path, tmp_path: Path) -> None:
    edit(iter([structure_set(source, FIRST)]), StudyInstanceUID="1.2.3.4")
    edit(iter([structure_set(source, SECOND)]), PatientID="SOMEBODY ELSE")
    result = build(source, tmp_path / "out", roi=("GTV",))
    what = {problem.case: problem.what for problem in result.failed}
    assert "its study has no structure set" in what[FIRST]
    assert "belongs to another patient" in what[SECOND]
    assert [problem.what for problem in result.unpaired] == ["series of a study that are in no case (1 RTSTRUCT)"]
    assert result.built == [THIRD]


def test_a_folder_that_cannot_be_opened_is_named(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (source / "locked").mkdir()
    opened = os.scandir

    def scandir(path: Any) -> Any:
        if str(path).endswith("locked"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return opened(path)

    monkeypatch.setattr(os, "scandir", scandir)
    result = build(source, tmp_path / "out", roi=("GTV",))
    assert result.failed == []
    assert [(problem.case, problem.what) for problem in result.unpaired] == [
        ("locked", "the folder cannot be opened (Permission denied): what lies in it was not looked at")
    ]


def test_several_structure_sets_are_joined_only_when_asked(source: Path, tmp_path: Path) -> None:
    other = source / FIRST / "RTSTRUCT" / "second.dcm"
    shutil.copy(structure_set(source, FIRST), other)
    edit(iter([other]), SOPInstanceUID="1.2.3.1", SeriesInstanceUID="1.2.3.2")
    result = build(source, tmp_path / "one")
    assert "2 structure sets hold ROIs" in result.failed[0].what
    assert "--structure-sets union" in result.failed[0].what
    assert build(source, tmp_path / "union", structure_sets="union").failed == []
    other.unlink()
    build(source, tmp_path / "alone")
    columns = ["case", "label_sha256"]
    assert DatasetFolder(tmp_path / "union").cases[columns].equals(DatasetFolder(tmp_path / "alone").cases[columns])


def test_a_pattern_that_fits_nothing_is_answered_with_what_is_there(cohort: Path, tmp_path: Path) -> None:
    for options, message in (
        ({"roi": ()}, "--roi PATTERN or --roi-class CLASS=PATTERN is missing; the source has the ROIs GTV, LN_1"),
        ({"roi": ("GTV", "GVT")}, "'GVT' fits no ROI of the source .nearest: GTV; there are GTV, LN_1"),
        ({"roi": ("gtv",)}, "'gtv' fits no ROI"),
        ({"roi": ("GTV",), "roi_class": ("a=LN*",)}, "exclude each other"),
        ({"roi": (), "roi_class": ("background=LN*",)}, "not background"),
        ({"crop_center": "tumor"}, "body or label expected"),
        ({"spacing": (1.0, -1.0, 1.0)}, "positive mm expected"),
    ):
        with pytest.raises(ConfigError, match=message):
            build(cohort, tmp_path / "out", **options)
        assert not (tmp_path / "out").exists()
    with pytest.raises(DatasetError, match="nothing for the recipe petct in it"):
        build(cohort / FIRST / "CT", tmp_path / "out")


def test_a_second_study_is_a_case_of_the_same_patient(source: Path, tmp_path: Path) -> None:
    again = simulate_patient(9, seed=5, **SIZE)
    write_patient(again, source / "again")
    edit((source / "again").rglob("*.dcm"), PatientID=FIRST)
    for keep in (True, False):
        build(source, tmp_path / str(keep), keep_identifiers=keep)
        cases = DatasetFolder(tmp_path / str(keep)).cases
        assert sorted(cases["patient"].value_counts()) == [1, 1, 2]
        assert cases["case"].is_unique


def test_no_identifier_reaches_a_file_or_the_terminal(source: Path, tmp_path: Path) -> None:
    planted = {
        "PatientName": "Mustermann^Erika",
        "PatientID": "SECRET-4711",
        "PatientBirthDate": "19620812",
        "AccessionNumber": "ACC998877",
        "SeriesDescription": "head of Mustermann SECRET-4711",
        "InstitutionName": "Radiumklinikken",
    }
    folder = source / "Mustermann Erika 19620812"
    (source / FIRST).rename(folder)
    edit(folder.rglob("*.dcm"), **planted)
    ds = pydicom.dcmread(path := next((folder / "RTSTRUCT").glob("*")))
    ds.StructureSetROISequence[-1].ROIName = "LN_Mustermann"
    ds.save_as(path)
    # One patient fails, so that errors speak of her too.
    second = source / "Erika M"
    shutil.copytree(folder, second)
    for kind in ("CT", "PT", "RTSTRUCT"):
        edit(
            (second / kind).glob("*"),
            PatientID="SECRET-4712",
            StudyInstanceUID="1.2.99",
            SeriesInstanceUID=f"1.2.{len(kind)}",
        )
    edit((second / "CT").glob("*"), SeriesInstanceUID="1.2.5")
    edit((second / "PT").glob("*"), PatientWeight=None)
    table = tmp_path / "Mustermann.csv"
    table.write_text("patient_id,stage\nSECRET-4711,T1\nSECRET-4712,T2\n")
    out = tmp_path / "out"
    result = run(
        *(source, out, "--roi", "GTV", "--roi", "LN*", "--clinical", table, "--stratum-column", "stage"),
    )
    assert result.exit_code == 1
    assert "PatientWeight" in result.stderr
    assert "3 built, 1 failed" in result.stdout
    written = [(path.relative_to(out).as_posix().encode() + path.read_bytes()) for path in out.rglob("*.*")]
    written += [gzip.decompress(path.read_bytes()) for path in out.rglob("*.gz")]
    text = b"\n".join(written).lower() + result.output.lower().replace(str(tmp_path).lower(), "").encode()
    studies = {str(pydicom.dcmread(path).StudyInstanceUID) for path in source.rglob("*.dcm")}
    for word in ("Mustermann", "Erika", "4711", "4712", "19620812", "998877", "Radiumk", "PHANTOM-", *studies):
        assert word.lower().encode() not in text, word
    known = Path(f"{out}.key").read_text()
    assert "SECRET-4711" in known
    assert "Mustermann Erika 19620812/CT/" in known
    strata = dict(DatasetFolder(out).cases[["patient", "stratum"]].itertuples(index=False))
    assert sorted(strata.values()) == ["T1", "unknown", "unknown"]


@pytest.mark.filterwarnings("ignore:The value length")
@pytest.mark.parametrize("identifier", ["../../etc/x", "/etc/passwd", "x" * 300, "a\nb\tc", "..", "CON:|?*"])
def test_a_hostile_patient_id_writes_nothing_outside(source: Path, tmp_path: Path, identifier: str) -> None:
    edit((source / FIRST).rglob("*.dcm"), PatientID=identifier)
    for other in (SECOND, THIRD):
        shutil.rmtree(source / other)
    before = set(tmp_path.parent.rglob("*"))
    for keep in (True, False):
        out = tmp_path / "a" / "b" / f"out{keep}"
        result = build(source, out, keep_identifiers=keep)
        assert len(result.built) == 1
        assert {path.parent.name for path in out.rglob("*.gz")} == {"imagesTr", "labelsTr"}
        assert len(list(out.rglob("*.gz"))) == 3
        assert all(len(path.name) < 100 for path in out.rglob("*.gz"))
    written = {path for path in tmp_path.parent.rglob("*") if path not in before}
    assert all(path == tmp_path / "a" or path.is_relative_to(tmp_path / "a" / "b") for path in written)
    assert not Path("/etc/x").exists()
