"""Inspect lists what is there and what is wrong, and never says who it is."""

import csv
import io
import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
from click.testing import CliRunner

from data_prep.cli import main
from data_prep.inspect import inspect_folder, masked_identifier
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
    result = CliRunner().invoke(main, ["inspect", str(copy), *form])
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
        output = CliRunner().invoke(main, ["inspect", str(copy), *form]).output
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
    content = json.loads(runner.invoke(main, ["inspect", str(copy), "--json"]).output)
    table = list(csv.DictReader(io.StringIO(runner.invoke(main, ["inspect", str(copy), "--csv"]).output)))
    assert (content["patients"], content["studies"], len(content["series"])) == (2, 2, 7)
    assert len(table) == 7
    for row, series in zip(table, content["series"], strict=True):
        assert row["size"] == "x".join(map(str, series["size"]))
        assert row["problems"] == " | ".join(series["problems"])
        assert row["files"] == str(series["files"])


def test_csv_does_not_become_a_formula(copy: Path) -> None:
    change(copy / "PHANTOM-001" / "CT", SeriesDescription="=HYPERLINK(1)")
    output = CliRunner().invoke(main, ["inspect", str(copy), "--csv"]).output
    assert ",'=HYPERLINK(1)," in output


def test_out_writes_the_file(cohort: Path, tmp_path: Path) -> None:
    for form in ("--json", "--csv"):
        result = CliRunner().invoke(main, ["inspect", str(cohort), form, "--out", str(tmp_path / "list")])
        assert (result.exit_code, result.output) == (0, "")
        text = (tmp_path / "list").read_text()
        assert text == CliRunner().invoke(main, ["inspect", str(cohort), form]).output


def test_other_formats_are_listed(tmp_path: Path) -> None:
    nib.save(nib.Nifti1Image(np.zeros((3, 4, 5), np.uint8), np.diag([1, 2, 3, 1])), tmp_path / "label.nii.gz")
    (row,) = inspect_folder(tmp_path)
    assert (row.patient, row.study, row.kind, row.description) == (None, None, "nifti", "label.nii.gz")
    assert (row.size, row.spacing) == ((3, 4, 5), (1.0, 2.0, 3.0))


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
