"""Inspect lists what is there and what is wrong, and never says who it is."""

import base64
import csv
import html
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from click.testing import CliRunner
from PIL import Image

from data_prep.cli import main
from data_prep.inspect import _Words, inspect_folder, masked_identifier
from data_prep.phantom import write_cohort
from medseg.errors import ReadError

HOSTILE = "../../../etc/[red]Nordmann^Kari\\\x1b[31m"


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("inspect") / "cohort"
    write_cohort(out, patients=2, seed=0, image_size=32, slices=10)
    return out


@pytest.fixture
def copy(cohort: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(cohort, tmp_path / "heap"))


def change(folder: Path, **values: object) -> None:
    for path in folder.rglob("*.dcm"):
        ds = pydicom.dcmread(path)
        for keyword, value in values.items():
            if value is None:
                delattr(ds, keyword)
            else:
                setattr(ds, keyword, value)
        ds.save_as(path)


def test_rows_tell_what_the_phantom_wrote(cohort: Path) -> None:
    rows = inspect_folder(cohort)
    assert [(row.patient, row.identifier, row.study, row.modality) for row in rows] == [
        (number, f"PH…0{number}", number, modality) for number in (1, 2) for modality in ("CT", "PT", "RTSTRUCT")
    ]
    ct, pet, rt = rows[:3]
    files = len(list((cohort / "PHANTOM-001" / "CT").iterdir()))
    assert (ct.size, ct.spacing, ct.files) == ((32, 32, files), (6.0, 6.0, 12.0), files)
    assert pet.spacing == (12.0, 12.0, 16.0)
    assert (rt.size, rt.spacing, rt.files) == ((), (), 1)
    assert ct.description == "CT head neck contrast"
    assert not any(row.problems for row in rows)


@pytest.mark.parametrize("form", [[], ["--json"], ["--csv"]])
def test_nothing_printed_tells_who_it_is(copy: Path, form: list[str]) -> None:
    change(
        copy / "PHANTOM-001",
        PatientName="Nordmann^Kari",
        PatientID="12057 033117",
        PatientBirthDate="19700512",
        AccessionNumber="ACC55501",
        SeriesDescription="NORDMANN neck 12057 033117",
        PatientWeight=None,
    )
    (copy / "PHANTOM-001").rename(copy / "Nordmann_Kari_12057 033117")
    (copy / "PHANTOM-002").rename(copy / "PHANTOM-002 ACC55501")
    nib.save(nib.Nifti1Image(np.zeros((3, 4, 5), np.uint8), np.diag([1, 2, 3, 1])), copy / "kari_nordmann.nii.gz")
    result = CliRunner().invoke(main, ["inspect", str(copy), "--no-cache", *form])
    assert result.exit_code == 0, result.output
    shown = result.output.casefold()
    for secret in ("nordmann", "kari", "12057", "033117", "19700512", "phantom-00", "not a person"):
        assert secret not in shown.replace(str(copy).casefold(), "")
    assert str(copy) not in result.output
    assert "neck" in result.output
    assert "PatientWeight" in result.output


@pytest.mark.filterwarnings("ignore:Found unknown escape sequence")
def test_hostile_identifiers_do_not_reach_the_terminal(copy: Path) -> None:
    for path in (copy / "PHANTOM-001").rglob("*.dcm"):
        ds = pydicom.dcmread(path)
        ds.PatientID = HOSTILE.replace("\\", "")
        ds.PatientName = "[red]Nordmann^Kari"
        ds.SeriesDescription = "[bold]neck[/bold]\x1b[2J\r\nof [red]Nordmann"
        ds.save_as(path)
    for form in ([], ["--json"], ["--csv"]):
        output = CliRunner().invoke(main, ["inspect", str(copy), "--no-cache", *form]).output
        assert "\x1b" not in output
        assert "\r" not in output
        assert "Nordmann" not in output
        assert "etc" not in output
        assert "[bold]neck[/bold]" in output  # as text, not as markup


def test_pet_that_cannot_be_read_in_suv_is_a_problem(copy: Path) -> None:
    change(copy / "PHANTOM-001" / "PT", PatientWeight=None)
    for path in (copy / "PHANTOM-002" / "PT").iterdir():
        ds = pydicom.dcmread(path)
        del ds.RadiopharmaceuticalInformationSequence[0].RadionuclideTotalDose
        ds.save_as(path)
    first, second = (row for row in inspect_folder(copy) if row.modality == "PT")
    assert "PatientWeight" in first.problems[0]
    assert "RadionuclideTotalDose" in second.problems[0]
    assert str(copy) not in first.problems[0]


def test_missing_slice_and_text_named_dcm_are_problems(copy: Path) -> None:
    slices = sorted((copy / "PHANTOM-001" / "CT").iterdir(), key=lambda p: float(pydicom.dcmread(p).SliceLocation))
    slices[4].unlink()
    (copy / "notes.dcm").write_text("call the ward")
    rows = inspect_folder(copy)
    ct = next(row for row in rows if row.modality == "CT" and row.patient == 1)
    assert "missing" in ct.problems[0]
    text = next(row for row in rows if row.patient is None)
    assert text.problems[0].startswith("notes.dcm: ")
    assert text.folder == "."


def test_study_sent_twice_under_new_identifiers_is_named(copy: Path) -> None:
    twin = Path(shutil.copytree(copy / "PHANTOM-001", copy / "again"))
    for path in twin.rglob("*.dcm"):
        ds = pydicom.dcmread(path)
        for keyword in ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID"):
            setattr(ds, keyword, getattr(ds, keyword)[:-4] + "7777")
        ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID
        ds.save_as(path)
    rows = [row for row in inspect_folder(copy) if row.patient == 1 and row.size]
    assert len(rows) == 4
    copies = [row for row in rows if row.problems]
    assert {row.modality for row in copies} == {"CT", "PT"}
    assert {row.study for row in copies} == {max(row.study or 0 for row in rows)}
    assert all("copy of study" in row.problems[0] for row in copies)


def test_json_and_csv_hold_the_same(copy: Path) -> None:
    (copy / "notes.dcm").write_text("call the ward")
    runner = CliRunner()
    content = json.loads(runner.invoke(main, ["inspect", str(copy), "--no-cache", "--json"]).output)
    table = list(csv.DictReader(io.StringIO(runner.invoke(main, ["inspect", str(copy), "--no-cache", "--csv"]).output)))
    assert (content["patients"], content["studies"], len(content["series"])) == (2, 2, 7)
    assert len(table) == 7
    for row, series in zip(table, content["series"], strict=True):
        assert row["size"] == "x".join(map(str, series["size"]))
        assert row["problems"] == " | ".join(series["problems"])
        assert row["files"] == str(series["files"])
        assert row["notes"] == " | ".join(series["notes"])


def test_csv_does_not_become_a_formula(copy: Path) -> None:
    change(copy / "PHANTOM-001" / "CT", SeriesDescription="=HYPERLINK(1)")
    output = CliRunner().invoke(main, ["inspect", str(copy), "--no-cache", "--csv"]).output
    assert ",'=HYPERLINK(1)," in output


def test_out_writes_the_file(cohort: Path, tmp_path: Path) -> None:
    for form in ("--json", "--csv"):
        result = CliRunner().invoke(main, ["inspect", str(cohort), "--no-cache", form, "--out", str(tmp_path / "list")])
        assert (result.exit_code, result.output) == (0, "")
        text = (tmp_path / "list").read_text()
        assert text == CliRunner().invoke(main, ["inspect", str(cohort), "--no-cache", form]).output


def test_other_formats_are_listed(tmp_path: Path) -> None:
    nib.save(nib.Nifti1Image(np.zeros((3, 4, 5), np.uint8), np.diag([1, 2, 3, 1])), tmp_path / "label.nii.gz")
    (row,) = inspect_folder(tmp_path)
    assert (row.patient, row.study, row.kind, row.description) == (None, None, "nifti", "label.nii.gz")
    assert (row.size, row.spacing) == ((3, 4, 5), (1.0, 2.0, 3.0))


def page_of(root: Path, tmp_path: Path, *more: str) -> str:
    """The page that the command writes; what the template itself says is left out."""
    out = tmp_path / "page.html"
    result = CliRunner().invoke(main, ["inspect", str(root), "--no-cache", "--html", str(out), *more])
    assert (result.exit_code, result.output) == (0, "")
    return out.read_text()


def pictures_of(page: str) -> dict[str, Image.Image | str]:
    """The picture of each row by its description, or what stands in its place."""
    found: dict[str, Image.Image | str] = {}
    for row in re.findall(r"<tr(?: class=\"broken\")?><td class=\"picture\">.*?</tr>", page, re.DOTALL):
        cells = re.findall(r"<td.*?>(.*?)</td>", row, re.DOTALL)
        uri = re.search(r'src="data:image/jpeg;base64,([^"]*)"', cells[0])
        description = html.unescape(cells[5])
        reason = html.unescape(re.sub("<.*?>", "", cells[0]))
        found[description] = Image.open(io.BytesIO(base64.b64decode(uri[1]))) if uri else reason
    return found


def test_the_page_shows_every_series_and_needs_nothing_else(cohort: Path, tmp_path: Path) -> None:
    page = page_of(cohort, tmp_path)
    assert page.count('<td class="picture">') == 6
    assert page.count("<img ") == page.count('loading="lazy" decoding="async"') == 4
    assert set(re.findall(r'(?:src|href)="([a-z]+:[a-z/]*)', page)) == {"data:image/jpeg"}
    assert "http://" not in page
    assert "https://" not in page
    assert "2 patients, 2 studies, 6 series; 0 series have problems" in page
    assert page == page_of(cohort, tmp_path, "--jobs", "2"), "the same tree, the same bytes"


def test_nothing_in_the_page_tells_who_it_is(copy: Path, tmp_path: Path) -> None:
    change(
        copy / "PHANTOM-001",
        PatientName="Nordmann^Kari",
        PatientID="12057 033117",
        PatientBirthDate="19700512",
        SeriesDescription="<b>NORDMANN</b> neck 12057 033117",
        PatientWeight=None,
    )
    (copy / "PHANTOM-001").rename(copy / "Nordmann_Kari_12057 033117")
    for number, path in enumerate((copy / "PHANTOM-002").rglob("*.dcm")):  # no picture: the reason names the file
        ds = pydicom.dcmread(path)
        ds.BitsStored = 99
        ds.StudyDate = "20200229"
        ds.save_as(path)
        path.rename(path.with_name(f"PHANTOM-002_{number}_CT.{ds.SOPInstanceUID}.dcm"))
    page = page_of(copy, tmp_path)
    assert "no picture: " in page
    texts = re.sub(r"base64,[^\"]*", "", page)
    for secret in ("nordmann", "kari", "12057", "033117", "19700512", "20200229", "phantom-00", str(tmp_path), "<b>"):
        assert secret not in texts.casefold()
    headers = [pydicom.dcmread(path) for path in copy.rglob("*.dcm")]
    for keyword in ("StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID", "SOPInstanceUID", "StudyDate"):
        assert not [ds for ds in headers if keyword in ds and str(ds[keyword].value) in texts], keyword


def test_pictures_are_of_the_middle_slice_and_upright(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    volume = np.zeros((40, 30, 9), np.float32)
    volume[:, :, 4] = 50
    volume[:10, :, 4] = 100  # one end of the first axis
    volume[:, :5, 4] = 0  # one end of the second
    for name, affine in (
        ("ras.nii.gz", np.diag([2.0, 2.0, 5.0, 1.0])),
        ("lps.nii", np.diag([-2.0, -2.0, 5.0, 1.0])),
        ("turned.nii", np.array([[0, 2.0, 0, 0], [2.0, 0, 0, 0], [0, 0, 5, 0], [0, 0, 0, 1]])),
    ):
        nib.save(nib.Nifti1Image(volume, affine), tree / name)
    nib.save(nib.Nifti1Pair(volume, np.diag([-2.0, -2.0, 5.0, 1.0])), tree / "pair.hdr")
    image = sitk.GetImageFromArray(volume.transpose(2, 1, 0))
    image.SetSpacing((2.0, 2.0, 5.0))
    for name in ("lps.mha", "lps.mhd", "lps.nrrd"):
        sitk.WriteImage(image, tree / name)
    Image.fromarray(volume[:, :, 4].astype(np.uint8).T).save(tree / "flat.png")
    (tree / "notes.dcm").write_text("call the ward")
    pictures = pictures_of(page_of(tree, tmp_path))
    assert pictures.pop("notes.dcm") == "–"
    levels = {name: np.asarray(picture, int) for name, picture in pictures.items() if not isinstance(picture, str)}
    assert len(levels) == 8
    shapes = {name: array.shape for name, array in levels.items()}
    assert shapes.pop("turned.nii") == (96, 72)
    assert set(shapes.values()) == {(72, 96)}
    # Pictures run from the patient's right to left and from front to back; RAS runs the other way.
    start, middle, end = slice(4, 8), slice(30, 40), slice(-8, -4)
    for name, array in levels.items():
        if name == "turned.nii":  # the first axis runs to the front, the second to the right
            bright, gray, dark = array[end, middle], array[start, middle], array[middle, end]
        elif name == "ras.nii.gz":
            bright, gray, dark = array[middle, end], array[middle, start], array[end, middle]
        else:
            bright, gray, dark = array[middle, start], array[middle, end], array[start, middle]
        assert bright.mean() > gray.mean() + 30 > dark.mean() + 60, name


def test_a_dicom_series_costs_one_file(copy: Path, tmp_path: Path) -> None:
    """All but the header and the middle file are cut to their headers: the picture is there."""
    files = sorted(
        (copy / "PHANTOM-001" / "CT").iterdir(), key=lambda path: pydicom.dcmread(path).ImagePositionPatient[2]
    )
    for path in files[: len(files) // 2] + files[len(files) // 2 + 1 :]:
        ds = pydicom.dcmread(path)
        del ds.PixelData
        ds.save_as(path)
    pictures = pictures_of(page_of(copy / "PHANTOM-001" / "CT", tmp_path))
    (picture,) = pictures.values()
    assert isinstance(picture, Image.Image)
    assert picture.size == (96, 96)


def write_slice(path: Path, values: np.ndarray, **tags: object) -> None:
    """A DICOM slice with the given stored values, and tags on top."""
    ds = pydicom.Dataset()
    ds.file_meta = pydicom.dataset.FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID = "1.2.840.10008.5.1.4.1.1.2"
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID = pydicom.uid.generate_uid()
    ds.SeriesInstanceUID, ds.StudyInstanceUID = pydicom.uid.generate_uid(), pydicom.uid.generate_uid()
    ds.PatientID, ds.Modality, ds.SeriesDescription = "one", "CT", path.stem
    ds.Rows, ds.Columns = values.shape[-2:]
    if values.ndim == 3:
        ds.NumberOfFrames = len(values)
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 16, 15, 1
    ds.ImagePositionPatient, ds.ImageOrientationPatient, ds.PixelSpacing = [0, 0, 0], [1, 0, 0, 0, 1, 0], [1, 1]
    ds.PixelData = values.astype("<i2").tobytes()
    for keyword, value in tags.items():
        setattr(ds, keyword, value)
    pydicom.dcmwrite(path, ds, enforce_file_format=True)


def test_dicom_is_shown_through_its_window(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    ramp = np.tile(np.linspace(-1000, 1000, 96), (96, 1))
    write_slice(tree / "lung.dcm", ramp, WindowCenter=-600, WindowWidth=400)
    write_slice(tree / "plain.dcm", ramp)
    write_slice(tree / "pet.dcm", ramp, Modality="PT")
    write_slice(tree / "mr.dcm", ramp, Modality="MR")
    write_slice(tree / "frames.dcm", np.stack([ramp * 0 - 1000, ramp, ramp * 0 + 1000]))
    write_slice(tree / "burned.dcm", ramp, BurnedInAnnotation="YES")
    pictures = pictures_of(page_of(tree, tmp_path))
    assert pictures.pop("burned") == "no picture: text is burned into it"
    rows = {name: np.asarray(picture, int)[48] for name, picture in pictures.items() if not isinstance(picture, str)}
    middle = {name: int(np.abs(row - 127).argmin()) for name, row in rows.items()}
    hu = np.linspace(-1000, 1000, 96)
    assert abs(hu[middle["lung"]] + 600) < 30
    for name in ("plain", "frames"):
        assert abs(hu[middle[name]] - 40) < 30, "the window of soft tissue"
    assert rows["pet"][2] > 240 > 15 > rows["pet"][-3]
    assert rows["mr"][2] < 15 < 240 < rows["mr"][-3]


def test_a_page_over_a_dicomdir_or_a_file(cohort: Path, tmp_path: Path) -> None:
    (path, *_) = (cohort / "PHANTOM-001" / "CT").iterdir()
    page = page_of(path, tmp_path)
    assert page.count("<img ") == 1
    assert str(tmp_path) not in page
    assert "PHANTOM" not in page


def test_the_cache_is_used_by_default_and_can_be_turned_off(
    cohort: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cache = tmp_path / "medseg" / "headers.sqlite"
    run = CliRunner().invoke
    plain = run(main, ["inspect", str(cohort), "--json", "--no-cache"])
    assert not cache.exists()
    first = run(main, ["inspect", str(cohort), "--json"])
    assert cache.stat().st_mode & 0o777 == 0o600
    assert first.output == plain.output == run(main, ["inspect", str(cohort), "--json"]).output
    named = tmp_path / "named"
    assert run(main, ["inspect", str(cohort), "--json", "--cache", str(named)]).output == plain.output
    assert named.exists()
    assert run(main, ["inspect", str(cohort), "--no-cache", "--cache", str(named)]).exit_code == 2
    named.write_text("no database")
    result = run(main, ["inspect", str(cohort), "--json", "--cache", str(named)])
    assert (result.exit_code, result.stdout) == (0, plain.output)


def test_interrupted_the_command_ends_quietly(tmp_path: Path) -> None:
    """A pipe named as an image would be waited for; here the walk itself is slow."""
    for number in range(1000):
        nib.save(nib.Nifti1Image(np.zeros((3, 4, 5), np.uint8), np.eye(4)), tmp_path / f"{number}.nii")
    (tmp_path / "slow").mkdir()
    (tmp_path / "slow" / "sitecustomize.py").write_text(
        "import os, time\nfrom medseg.io import series\nread = series._read_header\n"
        "def slow(path):\n"
        "    open(os.environ['STARTED'], 'w').close()\n"
        "    time.sleep(0.01)\n"
        "    return read(path)\n"
        "series._read_header = slow\n"
    )
    started = tmp_path / ".started"
    process = subprocess.Popen(
        [sys.executable, "-m", "data_prep", "inspect", str(tmp_path), "--no-cache", "--jobs", "2"],
        env=os.environ | {"PYTHONPATH": str(tmp_path / "slow"), "STARTED": str(started)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # Where the tests run in the background of a shell, SIGINT is ignored, which children inherit.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while not started.exists() and process.poll() is None:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode in (1, 130)
    assert out == ""
    assert "Traceback" not in err


def test_words_are_found_wherever_they_stand() -> None:
    words = ["Doe", "A-17", "12057 033117", "x", "  ", "1.2.840.1", "ß"]
    for text in (
        "doe",
        "of DOE_1",
        "scan a-17b",
        "12057 033117",
        "1.2.840.17",
        "nothing",
        "",
        "STRASSE x",
        "Dominique",
    ):
        expected = {word for word in words if len(word.strip()) > 1 and word.casefold() in text.casefold()}
        assert set(_Words(words).in_text(text)) == expected


def test_nothing_to_list_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ReadError, match="no image found"):
        inspect_folder(tmp_path)
    with pytest.raises(ReadError, match="no such"):
        inspect_folder(tmp_path / "absent")


@pytest.mark.parametrize(
    ("identifier", "shown"),
    [
        ("PHANTOM-001", "PH…01"),
        ("  PHANTOM-001 ", "PH…01"),
        ("1234567", "…"),
        ("DOE^JOHN", "…"),
        ("Nordmann", "…"),
        ("../../etc/1", "…"),
        ("", "…"),
    ],
)
def test_masked_identifier(identifier: str, shown: str) -> None:
    assert masked_identifier(identifier) == shown


@pytest.mark.realdata
def test_real_folders_are_listed_without_a_crash(data: Path) -> None:
    for folder in ("dicom", "odd"):
        rows = inspect_folder(data / folder)
        assert len(rows) > 50
        assert any(row.problems for row in rows)
        assert not any(str(data) in text for row in rows for text in (*row.problems, row.folder))
