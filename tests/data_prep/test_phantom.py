"""The phantom is real DICOM, the same for the same seed, and no toy."""

import csv
import hashlib
import json
import math
from datetime import datetime
from pathlib import Path

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from scipy import ndimage
from shapely.geometry import Polygon
from skimage.measure import find_contours

from data_prep.phantom import Grid, Patient, outlines, simulate_patient, write_cohort, write_patient
from medseg.errors import DatasetError
from medseg.io import find_series, match_series, read_image, read_rtstruct
from medseg.io.lock import only_one

TINY = {"image_size": 32, "slices": 10}


def hashes(root: Path) -> dict[str, str]:
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("phantom") / "cohort"
    write_cohort(out, patients=3, seed=5, **TINY)
    return out


@pytest.fixture(scope="module")
def patient() -> Patient:
    return simulate_patient(3, seed=0)


@pytest.fixture(scope="module")
def study(patient: Patient, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of one patient of full size."""
    folder = tmp_path_factory.mktemp("study") / "one"
    write_patient(patient, folder)
    return folder


def by_position(folder: Path) -> list[pydicom.FileDataset]:
    return sorted(
        (pydicom.dcmread(path) for path in folder.iterdir()), key=lambda ds: float(ds.ImagePositionPatient[2])
    )


def test_ct_holds_the_simulated_hounsfield_units(patient: Patient, study: Path) -> None:
    slices = by_position(study / "CT")
    assert len(slices) == patient.ct.shape[2]
    for k, ds in enumerate(slices):
        values = ds.pixel_array * float(ds.RescaleSlope) + float(ds.RescaleIntercept)
        np.testing.assert_array_equal(values.T, patient.ct[:, :, k])
    assert [float(v) for v in slices[0].ImagePositionPatient] == pytest.approx(patient.ct_grid.origin, abs=0.01)


@pytest.mark.parametrize("modality", ["CT", "PT"])
def test_simpleitk_reads_the_series_on_the_same_grid(patient: Patient, study: Path, modality: str) -> None:
    files = sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(study / modality))
    image = sitk.ReadImage(files)
    grid, values = (patient.ct_grid, patient.ct) if modality == "CT" else (patient.pet_grid, patient.pet)
    assert image.GetSize() == grid.shape == values.shape
    assert image.GetSpacing() == pytest.approx(grid.spacing, rel=1e-4)
    assert image.GetOrigin() == pytest.approx(grid.origin, abs=0.01)
    if modality == "CT":
        np.testing.assert_array_equal(sitk.GetArrayFromImage(image).T, values)


def test_suv_worked_out_by_hand_from_the_tags(patient: Patient, study: Path) -> None:
    slices = by_position(study / "PT")
    assert len({ds.RescaleSlope for ds in slices}) > 1
    k = len(slices) // 4  # of the second bed position, which has a later AcquisitionTime
    ds = slices[k]
    assert ds.AcquisitionTime > ds.SeriesTime
    assert (ds.Units, ds.DecayCorrection) == ("BQML", "START")
    drug = ds.RadiopharmaceuticalInformationSequence[0]
    injected = datetime.strptime(drug.RadiopharmaceuticalStartDateTime, "%Y%m%d%H%M%S")
    start = datetime.strptime(ds.SeriesDate + ds.SeriesTime, "%Y%m%d%H%M%S")
    left = float(drug.RadionuclideTotalDose) * math.exp(-math.log(2) * (start - injected).total_seconds() / 6586.2)
    row, column = np.unravel_index(int(ds.pixel_array.argmax()), ds.pixel_array.shape)
    becquerel = int(ds.pixel_array[row, column]) * float(ds.RescaleSlope)
    suv = becquerel * float(ds.PatientWeight) * 1000 / left
    assert suv == pytest.approx(patient.pet[column, row, k], rel=1e-4)


def test_library_reads_back_ct_and_suv(patient: Patient, study: Path) -> None:
    ct, pet = read_image(study / "CT"), read_image(study / "PT")
    assert ct.meta["modality"] == "CT"
    for image, values in ((ct, patient.ct), (pet, patient.pet)):
        assert image.shape == (1, *values.shape)
        found = np.sort(image.numpy().ravel())
        np.testing.assert_allclose(found, np.sort(values.ravel()), rtol=1e-3, atol=1e-3)


def test_library_masks_agree_with_the_truth(patient: Patient, study: Path) -> None:
    ct = read_image(study / "CT")
    masks = read_rtstruct(study / "RTSTRUCT" / "IM0001.dcm", ct)
    assert list(masks) == list(patient.structures)
    for name, mask in masks.items():
        # The library stores voxels in the order of the file's rows and columns, ascending in position, as here.
        truth = patient.structures[name] < 0
        found = mask.numpy()[0] > 0
        assert 2 * (truth & found).sum() / (truth.sum() + found.sum()) > 0.999


def test_neither_names_nor_numbers_follow_the_position(study: Path) -> None:
    for modality in ("CT", "PT"):
        slices = by_position(study / modality)
        numbers = [int(ds.InstanceNumber) for ds in slices]
        names = [Path(str(ds.filename)).name for ds in slices]
        count = len(slices)
        assert sorted(numbers) == list(range(1, count + 1))
        assert sorted(names) == [f"IM{n:04d}.dcm" for n in range(1, count + 1)]
        assert not np.all(np.diff(numbers) > 0)
        assert not np.all(np.diff(numbers) < 0)
        assert names not in (sorted(names), sorted(names, reverse=True))


def test_pet_is_coarser_and_covers_the_ct(patient: Patient) -> None:
    ct, pet = patient.ct_grid, patient.pet_grid
    assert all(p > c for p, c in zip(pet.spacing, ct.spacing, strict=True))
    for axis in range(3):
        assert pet.origin[axis] <= ct.origin[axis]
        last_pet = pet.origin[axis] + (pet.shape[axis] - 1) * pet.spacing[axis]
        last_ct = ct.origin[axis] + (ct.shape[axis] - 1) * ct.spacing[axis]
        assert last_pet >= last_ct


def test_structure_set_refers_to_its_ct(study: Path) -> None:
    ct = {ds.SOPInstanceUID: ds for ds in by_position(study / "CT")}
    rt = pydicom.dcmread(study / "RTSTRUCT" / "IM0001.dcm")
    one = next(iter(ct.values()))
    assert rt.StudyInstanceUID == one.StudyInstanceUID
    assert rt.SeriesInstanceUID != one.SeriesInstanceUID
    frame = rt.ReferencedFrameOfReferenceSequence[0]
    assert frame.FrameOfReferenceUID == one.FrameOfReferenceUID
    series = frame.RTReferencedStudySequence[0].RTReferencedSeriesSequence[0]
    assert series.SeriesInstanceUID == one.SeriesInstanceUID
    assert {item.ReferencedSOPInstanceUID for item in series.ContourImageSequence} == set(ct)
    names = [roi.ROIName for roi in rt.StructureSetROISequence]
    assert names[0] == "GTV"
    assert all(name.startswith("LN_") for name in names[1:])
    for contours in rt.ROIContourSequence:
        for contour in contours.ContourSequence:
            height = float(ct[contour.ContourImageSequence[0].ReferencedSOPInstanceUID].ImagePositionPatient[2])
            np.testing.assert_allclose([float(z) for z in contour.ContourData[2::3]], height, atol=0.01)
            assert len(contour.ContourData) == 3 * int(contour.NumberOfContourPoints)


def test_headers_are_complete_and_of_nobody(cohort: Path) -> None:
    classes = {
        "CT": "1.2.840.10008.5.1.4.1.1.2",
        "PT": "1.2.840.10008.5.1.4.1.1.128",
        "RTSTRUCT": "1.2.840.10008.5.1.4.1.1.481.3",
    }
    uids = []
    for path in cohort.rglob("*.dcm"):
        ds = pydicom.dcmread(path)
        assert ds.SOPClassUID == ds.file_meta.MediaStorageSOPClassUID == classes[ds.Modality]
        assert ds.SOPInstanceUID == ds.file_meta.MediaStorageSOPInstanceUID
        assert ds.SOPInstanceUID.is_valid
        assert ds.PatientID == path.relative_to(cohort).parts[0]
        assert "Not A Person" in str(ds.PatientName)
        assert ds.PatientSex in "MF"
        assert ds.AdditionalPatientHistory[:-1] == "Stage: T"
        uids.append(ds.SOPInstanceUID)
    assert len(uids) == len(set(uids))
    studies = match_series(find_series(cohort), ("CT", "PT"))
    assert len(studies) == 3
    assert all(len(study.structures) == 1 and not study.problems for study in studies)


def test_clinical_table_agrees_with_the_headers(cohort: Path) -> None:
    rows = list(csv.DictReader((cohort / "clinical.csv").open()))
    assert [row["patient_id"] for row in rows] == ["PHANTOM-001", "PHANTOM-002", "PHANTOM-003"]
    for row in rows:
        ds = pydicom.dcmread(next((cohort / row["patient_id"] / "CT").iterdir()))
        assert (ds.PatientSex, ds.PatientAge) == (row["sex"], f"{int(row['age']):03d}Y")
        assert float(ds.PatientWeight) == float(row["weight"])
        assert ds.AdditionalPatientHistory == f"Stage: {row['stage']}"


def test_area_of_outlines_of_a_ball_is_that_of_its_circles() -> None:
    grid = Grid((-40.0, -44.0, -30.0), (2.0, 2.0, 3.0), (40, 44, 21))
    x, y, z = (o + s * np.arange(n) for o, s, n in zip(grid.origin, grid.spacing, grid.shape, strict=True))
    level = np.sqrt((x[:, None, None] - 3.3) ** 2 + (y[:, None] + 1.7) ** 2 + z**2) - 20
    found = {k: Polygon(points[:, :2]) for k, points in outlines(level, grid)}
    assert sorted(found) == [k for k in range(21) if abs(z[k]) < 20]
    for k, polygon in found.items():
        # Chords from one grid line to the next lose the share (1.1 mm / radius)**2 of the area of the circle.
        radius = np.sqrt(400 - z[k] ** 2)
        assert polygon.area == pytest.approx(np.pi * radius**2, rel=1.5 / radius**2)
        assert (polygon.centroid.x, polygon.centroid.y) == pytest.approx((3.3, -1.7), abs=0.05)


def test_outlines_of_a_ring_are_two_and_close_at_the_border() -> None:
    x, y, _ = np.ogrid[-10:11, -10:11, -1:2]
    radius = np.sqrt(x**2 + y**2 + np.zeros((1, 1, 3)))
    ring = np.abs(radius - 5) - 2.0
    grid = Grid((0.0, 0.0, 0.0), (1.0, 1.0, 1.0), (21, 21, 3))
    assert [k for k, _ in outlines(ring, grid)] == [0, 0, 1, 1, 2, 2]
    cut = radius[10:] - 5  # a half disk at the first column
    areas = [Polygon(points[:, :2]).area for _, points in outlines(cut, grid)]
    assert len(areas) == 3
    assert areas[0] == pytest.approx(np.pi * 25 / 2, rel=0.06)


def test_contours_enclose_the_volume_of_the_truth(patient: Patient, study: Path) -> None:
    rt = pydicom.dcmread(study / "RTSTRUCT" / "IM0001.dcm")
    names = {roi.ROINumber: roi.ROIName for roi in rt.StructureSetROISequence}
    for contours in rt.ROIContourSequence:
        level = patient.structures[names[contours.ReferencedROINumber]]
        area = sum(
            Polygon(np.reshape([float(v) for v in c.ContourData], (-1, 3))[:, :2]).area
            for c in contours.ContourSequence
        )
        # The truth on a grid four times finer in the plane.
        fine = ndimage.zoom(level, (4, 4, 1), order=1, grid_mode=True, mode="nearest")
        assert area == pytest.approx((fine < 0).sum() * 2.0 * 2.0 / 16, rel=0.03)


def test_same_seed_same_bytes_another_seed_other_bytes(cohort: Path, tmp_path: Path) -> None:
    write_cohort(tmp_path / "again", patients=3, seed=5, **TINY)
    assert hashes(tmp_path / "again") == hashes(cohort)
    write_cohort(tmp_path / "other", patients=1, seed=6, **TINY)
    images = {name: value for name, value in hashes(tmp_path / "other").items() if name.endswith(".dcm")}
    assert not set(images.values()) & set(hashes(cohort).values())


def test_stopped_cohort_is_continued_to_the_same_bytes(cohort: Path, tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def stop(done: int, total: int) -> None:
        if done == 2:
            raise Stop

    out = tmp_path / "cohort"
    with pytest.raises(Stop):
        write_cohort(out, patients=3, seed=5, **TINY, progress=stop)
    (out / ".PHANTOM-003.x").mkdir()
    (out / ".PHANTOM-003.x" / "half").write_text("")
    before = (out / "PHANTOM-001" / "CT" / "IM0001.dcm").stat().st_mtime_ns
    write_cohort(out, patients=3, seed=5, **TINY)
    assert hashes(out) == hashes(cohort)
    assert (out / "PHANTOM-001" / "CT" / "IM0001.dcm").stat().st_mtime_ns == before


def test_refuses_a_folder_with_something_else(cohort: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(DatasetError, match="not empty and holds no phantom"):
        write_cohort(tmp_path, patients=1, seed=5, **TINY)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    before = hashes(cohort)
    with pytest.raises(DatasetError, match="other arguments"):
        write_cohort(cohort, patients=3, seed=6, **TINY)
    with pytest.raises(DatasetError, match="a file"):
        write_cohort(tmp_path / "thesis.txt", patients=1)
    assert hashes(cohort) == before


def test_arguments_are_kept_beside_the_cohort(cohort: Path) -> None:
    assert json.loads((cohort / "phantom.json").read_text()) == {
        "version": 1,
        "patients": 3,
        "seed": 5,
        "image_size": 32,
        "slices": 10,
    }


def test_patient_does_not_depend_on_the_size_of_the_cohort(cohort: Path, tmp_path: Path) -> None:
    write_cohort(tmp_path / "one", patients=1, seed=5, **TINY)
    assert hashes(tmp_path / "one" / "PHANTOM-001") == hashes(cohort / "PHANTOM-001")


@pytest.fixture(scope="module")
def simulated() -> list[Patient]:
    return [simulate_patient(number, seed=0) for number in range(1, 13)]


def pet_on_ct(patient: Patient) -> np.ndarray:
    ct, pet = patient.ct_grid, patient.pet_grid
    return ndimage.affine_transform(
        patient.pet,
        np.divide(ct.spacing, pet.spacing),
        np.subtract(ct.origin, pet.origin) / pet.spacing,
        ct.shape,
        order=1,
        mode="nearest",
    )


def target(patient: Patient) -> np.ndarray:
    return np.any([level < 0 for level in patient.structures.values()], axis=0)


@pytest.mark.parametrize(("part", "limit"), [("whole", 0.45), ("slices with tumor", 0.68)])
def test_no_threshold_on_pet_solves_the_task(simulated: list[Patient], part: str, limit: float) -> None:
    thresholds = np.arange(1.5, 12, 0.5)
    dice = []
    for patient in simulated:
        truth, suv = target(patient), pet_on_ct(patient)
        keep = truth.any((0, 1)) if part == "slices with tumor" else slice(None)
        truth, suv = truth[:, :, keep], suv[:, :, keep]
        dice.append([2 * (truth & (suv > t)).sum() / (truth.sum() + (suv > t).sum()) for t in thresholds])
    best = np.mean(dice, axis=0).max()
    assert 0.05 < best < limit


def test_tumor_is_bright_on_pet_and_barely_visible_on_ct(simulated: list[Patient]) -> None:
    contrast, glow = [], []
    for patient in simulated:
        level, others = patient.structures["GTV"], target(patient)
        muscle = (level > 3) & (level < 12) & ~others & (patient.ct > 20) & (patient.ct < 100)
        inside = level < -2
        contrast.append((patient.ct[inside].mean() - patient.ct[muscle].mean()) / patient.ct[muscle].std())
        glow.append(np.percentile(pet_on_ct(patient)[inside], 90))
    assert 0.3 < np.mean(contrast) < 1.3
    assert min(glow) > 2.5
    assert np.median(glow) > 5


def test_hot_normal_tissue_is_told_apart_by_ct(simulated: list[Patient]) -> None:
    """Brain lies inside bone: the largest hot region in a slice without tumor is ringed by it."""
    for patient in simulated[:4]:
        k = patient.ct.shape[2] - 1
        suv, ct = pet_on_ct(patient)[:, :, k], patient.ct[:, :, k]
        outline = max(find_contours(suv, suv.max() / 3), key=len)
        grown = Polygon(outline).buffer(3)
        x, y = (np.clip(np.round(v).astype(int), 0, 95) for v in grown.exterior.xy)
        bone = ndimage.maximum_filter(ct, 5)
        assert (bone[x, y] > 400).mean() > 0.9


def test_patients_differ(simulated: list[Patient]) -> None:
    assert {patient.stage for patient in simulated} == {"T1", "T2", "T3", "T4"}
    volumes = [(patient.structures["GTV"] < 0).sum() * 0.012 for patient in simulated]
    assert min(volumes) < 5
    assert max(volumes) > 25
    assert len({len(patient.structures) for patient in simulated}) >= 3
    order = {"T1": 1, "T2": 2, "T3": 3, "T4": 4}
    assert np.corrcoef([order[p.stage] for p in simulated], volumes)[0, 1] > 0.7
    positive = [target(patient).any((0, 1)).mean() for patient in simulated]
    assert 0.15 < np.mean(positive) < 0.5


def test_two_at_once_do_not_remove_what_the_other_writes(tmp_path: Path) -> None:
    with only_one(tmp_path, "phantom"), pytest.raises(DatasetError, match="another phantom is at work"):
        write_cohort(tmp_path, patients=1, image_size=32, slices=8)
