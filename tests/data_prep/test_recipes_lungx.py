"""The recipe lungx: the real spreadsheets in every layout, and small CTs in the original layout."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import openpyxl
import pandas as pd
import pytest

from data_prep.build import BuildResult, build_dataset
from data_prep.recipes.lungx import AIR, LungXOptions, LungXRecipe, Nodule, read_sheet
from medseg.data import DatasetFolder
from medseg.errors import ConfigError, DatasetError

HEADER = ["Scan Number", "Nodule Number", "Nodule Center x Position", "Nodule Center y Position*"]
HEADER += ["Nodule Center Image", "Final Diagnosis"]
FOOTNOTE = "*specified in pixels, where position (1,1) corresponds to the upper-leftmost pixel in an image"
SHAPE = (128, 120, 9)
#: LPS; rows and columns of another spacing.
AFFINE = np.array([[0.7, 0, 0, -45.0], [0, 0.8, 0, -160.0], [0, 0, 2.5, -300.0], [0, 0, 0, 1]])
WriteSeries = Callable[..., list[Path]]


def sheet(path: Path, *rows: list[Any]) -> Path:
    """A spreadsheet as the challenge gave it out: with an empty row and a footnote below."""
    path.parent.mkdir(parents=True, exist_ok=True)
    book = openpyxl.Workbook()
    for row in (HEADER, *rows, [], [FOOTNOTE], [], ["All images are in DICOM format."]):
        book.active.append(row)
    book.create_sheet("Sheet1")
    book.save(path)
    return path


@pytest.fixture
def scan(tmp_path: Path, write_series: WriteSeries) -> Callable[..., np.ndarray]:
    """Write a CT of noise with bright voxels at (x, y, image), all counted from 1 and the images downward."""

    def write(patient: str, *nodules: tuple[int, int, int], downward: bool = True, folder: str = "CT") -> np.ndarray:
        voxels = np.random.default_rng(len(patient)).integers(-900, -700, SHAPE)
        for x, y, image in nodules:
            voxels[x - 1, y - 1, SHAPE[2] - image if downward else image - 1] = 1500
        numbers = range(SHAPE[2], 0, -1) if downward else range(1, SHAPE[2] + 1)
        where = tmp_path / "source" / patient / "01-01-2006-NA-6667" / folder
        write_series(where, voxels, AFFINE, patient=patient, modality="CT", instances=list(numbers))
        return voxels

    return write


def build(source: Path, out: Path, **options: Any) -> BuildResult:
    return build_dataset(LungXRecipe(LungXOptions(**options)), source, out, jobs=1, report=False)


def voxels(out: Path, case: str) -> tuple[np.ndarray, np.ndarray]:
    image = nib.load(out / "imagesTr" / f"{case}_0000.nii.gz")
    return np.asarray(image.dataobj), image.affine


@pytest.mark.parametrize("downward", [True, False])
def test_the_nodule_is_the_middle_pixel_in_hounsfield_units(
    scan: Callable[..., np.ndarray], tmp_path: Path, downward: bool
) -> None:
    source = tmp_path / "source"
    whole = scan("LUNGx-CT001", (50, 71, 3), (64, 60, 7), downward=downward)
    rows = [["LUNGx-CT001", 1, 50, 71, 3, "Primary lung cancer "], ["LUNGx-CT001", 2, 64, 60, 7, "Benign nodule"]]
    sheet(source / "TestSet_NoduleData_PublicRelease_wTruth.xlsx", *rows)
    result = build(source, tmp_path / "out")
    assert (result.failed, result.unpaired) == ([], [])
    assert result.notes[0] == "2 nodules of 1 scans in 1 spreadsheet(s): 1 malignant, 1 benign, 0 suspicious"
    dataset = DatasetFolder(tmp_path / "out")
    entries = dataset.datalist("all")
    assert [(entry["case"], entry["label"], entry["lesion"]) for entry in entries] == [
        ("LUNGx-CT001_1", 1, "1"),
        ("LUNGx-CT001_2", 0, "2"),
    ]
    for case, (x, y, image) in (("LUNGx-CT001_1", (50, 71, 3)), ("LUNGx-CT001_2", (64, 60, 7))):
        crop, affine = voxels(tmp_path / "out", case)
        assert crop.shape == (33, 31, 1)  # a sixth of 128 and 120, one and a half times as large, odd
        assert crop[16, 15, 0] == 1500
        k = SHAPE[2] - image if downward else image - 1
        np.testing.assert_array_equal(crop[..., 0], whole[x - 17 : x + 16, y - 16 : y + 15, k])
        np.testing.assert_allclose(
            (affine @ [16, 15, 0, 1])[:3], (AFFINE @ [x - 1, y - 1, k, 1])[:3] * [-1, -1, 1], atol=1e-4
        )
        position = next(entry["position"] for entry in entries if entry["case"] == case)
        np.testing.assert_allclose(np.array(position.split(), float), (affine @ [16, 15, 0, 1])[:3], atol=1e-4)
        assert (tmp_path / "out" / "attachments" / f"{case}_position.png").is_file()


def test_a_nodule_at_the_border_stays_in_the_middle(scan: Callable[..., np.ndarray], tmp_path: Path) -> None:
    scan("CT-Training-BE001", (2, 119, 1))
    sheet(tmp_path / "source" / "sheet.xlsx", ["CT-Training-be001", 1, 2, 119, 1, "benign"])
    result = build(tmp_path / "source", tmp_path / "out", enlarge=1.0)
    crop, _ = voxels(tmp_path / "out", "CT-Training-BE001_1")
    assert crop.shape == (21, 21, 1)
    assert crop[10, 10, 0] == 1500
    assert (crop[:9] == AIR).all()
    assert (crop[:, 12:] == AIR).all()
    outside = float(DatasetFolder(tmp_path / "out").cases["outside"].iloc[0])
    assert outside == pytest.approx(1 - 12 * 12 / 21**2, abs=1e-3)
    assert result.notes[-1].startswith("1 crop(s) reach beyond the slice")


def test_what_is_neither_class_is_left_out_by_its_row(scan: Callable[..., np.ndarray], tmp_path: Path) -> None:
    scan("LUNGx-CT054", (50, 50, 1), (60, 60, 2))
    rows = [["LUNGx-CT054", 1, 50, 50, 1, "Primary lung cancer"]]
    rows += [["LUNGx-CT054", 2, 60, 60, 2, "Suspicious malignant nodule"]]
    sheet(tmp_path / "source" / "test.xlsx", *rows)
    result = build(tmp_path / "source", tmp_path / "out")
    assert result.built == ["LUNGx-CT054_1"]
    assert [(problem.case, problem.what) for problem in result.unpaired] == [
        ("test.xlsx", "row 3: Suspicious malignant nodule: neither class, left out")
    ]


def test_every_nodule_that_cannot_be_cropped_says_why(
    scan: Callable[..., np.ndarray], tmp_path: Path, write_series: WriteSeries
) -> None:
    source = tmp_path / "source"
    scan("LUNGx-CT001", (50, 50, 1))
    scan("LUNGx-CT002", (50, 50, 1))
    next((source / "LUNGx-CT002").rglob("1-004.dcm")).unlink()
    numbers = [4, 9, 1, 2, 3, 5, 6, 7, 8]
    noise = np.random.default_rng(0).integers(0, 9, SHAPE)
    write_series(source / "mixed", noise, AFFINE, patient="LUNGx-CT003", modality="CT", instances=numbers)
    scan("LUNGx-CT004", (50, 50, 1), folder="one")
    scan("LUNGx-CT004", (50, 50, 1), folder="two")
    rows = [[f"LUNGx-CT00{n}", 1, 50, 50, 1, "Benign nodule"] for n in (1, 2, 3, 4, 5)]
    rows += [["LUNGx-CT001", 2, 50, 50, 10, "Benign nodule"], ["LUNGx-CT001", 3, 129, 50, 1, "Benign nodule"]]
    rows += [["LUNGx-CT001", 4, 50, 50, 2, "Benign nodule"]]
    sheet(source / "a.xlsx", *rows)
    sheet(source / "b.xlsx", ["LUNGx-CT001", 4, 50, 51, 2, "Benign nodule"])
    result = build(source, tmp_path / "out")
    assert result.built == ["LUNGx-CT001_1"]
    why = {problem.case: problem.what for problem in result.failed}
    assert why["LUNGx-CT001_2"] == "no image 10: InstanceNumber is 1 to 9 in 9 files"
    assert why["LUNGx-CT001_3"] == "the pixel 128 49 is not in the image of 128 × 120 pixels (X × Y, from 0)"
    assert why["LUNGx-CT001_4"] == (
        "the spreadsheets disagree: (50, 50) on image 2, benign or (50, 51) on image 2, benign; leave the right one"
    )
    assert "1 slice missing" in why["LUNGx-CT002_1"]
    assert "counts neither from the one end nor from the other" in why["LUNGx-CT003_1"]
    assert why["LUNGx-CT004_1"] == "2 CT series have an image 1: leave one in the source"
    assert why["LUNGX-CT005_1"] == "no CT of this scan (PatientID) in the source"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('Scan Number,"Nodule Center x,y Position*",Nodule Center Image,Diagnosis\na,"12,34",5,malignant\n', (12, 34)),
        ("Scan Number,Diagnosis,nodule_x,nodule_y,nodule_z,diag_bin\na,malignant,12.0,34.0,5.0,1\n", (12, 34)),
        ("No.,PID,LD,PD,Z,X,Y,malignancy,Final Diagnosis\n1,a,9,8,5,12,34,1,\n", (12, 34)),
    ],
)
def test_layouts(tmp_path: Path, text: str, expected: tuple[int, int]) -> None:
    path = tmp_path / "sheet.csv"
    path.write_text(text)
    assert read_sheet(path) == ([Nodule("A", 1, *expected, 5, "malignant")], [])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("a,benign,12.5,34,5,0", "row 2: position '12.5,34' on image '5': whole numbers expected"),
        ("a,benign,12,34,,0", "row 2: position '12,34' on image '': whole numbers expected"),
        ("a,unclear,12,34,5,0", "row 2: diagnosis 'unclear': benign, malignant"),
        ("a,,12,34,5,2", "row 2: diagnosis ''"),
        ("a,benign,inf,34,5,0", "row 2: position 'inf,34' on image '5': whole numbers expected"),
        ("a,benign,,,,0", "row 2: position ',' on image '': whole numbers expected"),
        (",benign,12,34,5,0", "row 2: a nodule without scan"),
    ],
)
def test_a_row_that_cannot_be_understood_is_named(tmp_path: Path, row: str, message: str) -> None:
    path = tmp_path / "sheet.csv"
    path.write_text(f"Scan Number,Diagnosis,nodule_x,nodule_y,nodule_z,diag_bin\n{row}\n")
    with pytest.raises(DatasetError, match=message):
        read_sheet(path)


def test_other_tables_are_no_spreadsheets_of_nodules(tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    pd.DataFrame({"a": [1]}).to_csv(tmp_path / "s" / "other.csv", index=False)
    with pytest.raises(DatasetError, match="no spreadsheet"):
        build(tmp_path / "s", tmp_path / "out")
    (tmp_path / "s" / "broken.xlsx").write_text("no zip")
    with pytest.raises(DatasetError, match=r"broken.xlsx: not a spreadsheet"):
        build(tmp_path / "s", tmp_path / "out")
    with pytest.raises(ConfigError, match="--enlarge"):
        LungXOptions(enlarge=0.5)


def test_what_lies_beside_the_spreadsheet_is_named(scan: Callable[..., np.ndarray], tmp_path: Path) -> None:
    source = tmp_path / "source"
    for patient in ("LUNGx-CT001", "Doe"):
        scan(patient, (50, 50, 1))
    row = "LUNGx-CT001,12,34,5,benign"
    titles = "Scan Number,X,Y,Nodule Center Image,Diagnosis"
    (source / "good.csv").write_text(f"{titles}\r\n{row}\r\n{FOOTNOTE.replace(',', '')}\r\n", "utf-8-sig", newline="")
    (source / "~$good.xlsx").write_bytes(b"a lock of Excel")
    (source / "old.xls").write_bytes(b"\xd0\xcf\x11\xe0")
    (source / "titled.csv").write_text(f"The test set,,,,\n{titles}\n{row}\n")
    (source / "german.csv").write_text(f"{titles}\n{row}\n".replace(",", ";"))
    (source / "metadata.csv").write_text("Downloaded today\na,b,c\n")
    (source / "broken.dcm").write_text("no DICOM")
    result = build(source, tmp_path / "out")
    assert result.built == ["LUNGx-CT001_1"]
    assert {problem.case: problem.what.split(":")[0] for problem in result.unpaired} == {
        "broken.dcm": "not DICOM",
        "german.csv": "no nodule in it",
        "metadata.csv": "not a spreadsheet (ParserError)",
        "old.xls": "a spreadsheet of old Excel, which is not read",
        "titled.csv": "no nodule in it",
        "~$good.xlsx": "not a spreadsheet (ValueError)",
    }
    assert "1 patient(s) with CT have no nodule in the spreadsheets" in result.notes


@pytest.mark.realdata
def test_the_real_spreadsheets_in_all_layouts(data: Path) -> None:
    def of(*names: str) -> dict[tuple[str, int], Nodule]:
        rows = [row for name in names for row in read_sheet(data / "lung_sheets" / name)[0]]
        return {(row.scan, row.number): row for row in rows}

    calibration, test = "CalibrationSet_NoduleData.xlsx", "TestSet_NoduleData_PublicRelease_wTruth.xlsx"
    original = of(f"original/{calibration}", f"original/{test}")
    edited = of(f"edited/{calibration}", "edited/TestSet_NoduleData.xlsx")
    assert of("edited/train_data.csv", "edited/test_data.csv") == edited
    everything = of("LUNGx.csv")
    # The counts of the thesis: 39 malignant, 42 benign, and two that are neither.
    assert Counter(row.diagnosis for row in everything.values()) == {"malignant": 39, "benign": 42, "suspicious": 2}
    assert Counter(row.diagnosis for row in original.values()) == {"malignant": 35, "benign": 35}
    assert set(original) == set(edited) <= set(everything)
    assert all(everything[key] == row for key, row in edited.items())
    # Four of the positions given out first were wrong; the later lists agree on others.
    differing = {
        key: (row.x, row.y, edited[key].x, edited[key].y) for key, row in original.items() if row != edited[key]
    }
    assert differing == {
        ("CT-TRAINING-BE001", 1): (405, 259, 405, 296),
        ("LUNGX-CT031", 1): (130, 120, 130, 230),
        ("LUNGX-CT032", 1): (329, 341, 392, 341),
        ("LUNGX-CT055", 1): (223, 192, 223, 193),
    }


@pytest.mark.realdata
def test_real_spreadsheets_that_disagree_fail_those_nodules_only(data: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "sheets").symlink_to(data / "lung_sheets")
    selection = LungXRecipe().select(source)
    assert len(selection.cases) == 81
    assert selection.notes == ["83 nodules of 70 scans in 7 spreadsheet(s): 39 malignant, 42 benign, 2 suspicious"]
    disagreeing = [case.name for case in selection.cases if "the spreadsheets disagree" in case.problem]
    assert disagreeing == ["CT-TRAINING-BE001_1", "LUNGX-CT031_1", "LUNGX-CT032_1", "LUNGX-CT055_1"]
    assert {case.problem for case in selection.cases if case.name not in disagreeing} == {
        "no CT of this scan (PatientID) in the source"
    }
    assert [item.why for item in selection.unpaired] == [
        "row 76: Suspicious malignant nodule: neither class, left out",
        "row 79: Suspicious malignant nodule: neither class, left out",
    ]
