"""The recipe brain_mri: any kind of picture, copies in one group, crops around a position; and the real pictures."""

from collections import Counter
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from scipy import ndimage

from data_prep.build import BuildResult, build_dataset
from data_prep.cli import main
from data_prep.copies import groups_of_copies
from data_prep.recipes.brain_mri import BrainMriOptions, BrainMriRecipe, read_gray
from medseg.data import DatasetFolder
from medseg.errors import ConfigError, DatasetError


def brain(seed: int, size: tuple[int, int] = (120, 140)) -> np.ndarray:
    """A picture [rows, columns] with the texture and the outline of a head, uint8."""
    rng = np.random.default_rng(seed)
    texture = ndimage.gaussian_filter(rng.normal(size=(64, 64)), 2)
    texture = np.asarray(Image.fromarray(texture.astype(np.float32)).resize(size[::-1], Image.Resampling.BICUBIC))
    y, x = np.mgrid[-1 : 1 : size[0] * 1j, -1 : 1 : size[1] * 1j]
    head = x**2 / 0.6 + y**2 / 0.8 < 1
    return np.where(head, np.clip(120 + 60 * texture / texture.std(), 30, 255), 4).astype(np.uint8)


def save(source: Path, name: str, pixels: np.ndarray, mode: str | None = None, **options: Any) -> Path:
    path = source / name
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(pixels)
    (picture.convert(mode) if mode else picture).save(path, **options)
    return path


def build(source: Path, out: Path, **options: Any) -> BuildResult:
    return build_dataset(BrainMriRecipe(BrainMriOptions(**options)), source, out, jobs=1, report=False)


def pixels(out: Path, case: str) -> np.ndarray:
    return np.asarray(nib.load(out / "imagesTr" / f"{case}_0000.nii.gz").dataobj)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    source = tmp_path / "source"
    save(source, "yes/Y1.jpg", brain(1))
    save(source, "yes/Y2.png", brain(2, (90, 60)))
    save(source, "no/1 no.jpeg", brain(3))
    save(source, "no/no.jpg", brain(4))
    return source


def test_modes_and_wrong_suffixes_become_the_same_gray(tmp_path: Path) -> None:
    gray = brain(0)
    expected = gray.T.astype(np.float32)
    files = [
        save(tmp_path, "gray.png", gray),
        save(tmp_path, "color.png", gray, "RGB"),
        save(tmp_path, "png.jpg", gray, "RGBA", format="PNG"),
        save(tmp_path, "palette.jpg", gray, "P", format="PNG"),
    ]
    assert [Image.open(file).mode for file in files] == ["L", "RGB", "RGBA", "P"]
    for file in files:
        np.testing.assert_allclose(read_gray(file), expected, atol=1e-4)
    color = np.zeros((2, 3, 3), np.uint8)
    color[0, 2] = (100, 200, 50)
    assert read_gray(save(tmp_path, "c.png", color))[2, 0] == pytest.approx(0.299 * 100 + 0.587 * 200 + 0.114 * 50)
    half = np.dstack([gray, gray, gray, np.full_like(gray, 51)])
    np.testing.assert_allclose(read_gray(save(tmp_path, "half.png", half)), expected * 0.2, rtol=1e-5)


def test_whole_pictures_fill_one_size_without_distortion(source: Path, tmp_path: Path) -> None:
    result = build(source, tmp_path / "out", size=64)
    assert result.built == ["no_1_no", "no_no", "yes_Y1", "yes_Y2"]
    dataset = DatasetFolder(tmp_path / "out")
    assert dataset.classes == {"no_tumor": 0, "tumor": 1}
    assert [entry["label"] for entry in dataset.datalist("all")] == [0, 0, 1, 1]
    assert {tuple(pixels(tmp_path / "out", case).shape) for case in result.built} == {(64, 64, 1)}
    tall = pixels(tmp_path / "out", "yes_Y2")[..., 0]  # 90 rows, 60 columns: 64 and 43
    assert (tall[:10] == 0).all()
    assert (tall[-10:] == 0).all()
    assert (tall[11:53].max(axis=1) > 0).all()
    middle = np.asarray(Image.fromarray(brain(2, (90, 60))).resize((43, 64), Image.Resampling.BOX)).T
    assert np.corrcoef(tall[10:53].ravel(), middle.ravel().astype(float))[0, 1] > 0.97


def test_copies_are_one_patient_whatever_was_done_to_them(source: Path, tmp_path: Path) -> None:
    one = brain(1)
    save(source, "yes/Y1.png", one)  # the same stem as Y1.jpg
    save(source, "yes/small.png", np.asarray(Image.fromarray(one).resize((70, 60), Image.Resampling.BICUBIC)))
    save(source, "yes/mirrored.jpg", one[:, ::-1], quality=40)
    save(source, "yes/wide.png", np.pad(np.clip(one * 0.7 + 10, 0, 255).astype(np.uint8), 25, constant_values=12))
    save(source, "yes/cut.png", one[8:-5, 10:-4])
    result = build(source, tmp_path / "out", size=16)
    patients = dict(zip(*(DatasetFolder(tmp_path / "out").cases[name] for name in ("case", "patient")), strict=True))
    copies = {"yes_Y1_jpg", "yes_Y1_png", "yes_small", "yes_mirrored", "yes_wide", "yes_cut"}
    assert {case for case, patient in patients.items() if patient == patients["yes_Y1_jpg"]} == copies
    assert len(set(patients.values())) == 4
    assert result.notes[0].startswith("9 pictures in 4 groups: 1 groups are of copies, 6 pictures in all")
    words = ["split", str(tmp_path / "out"), "--seed", "3", "--folds", "2", "--stratify", "class"]
    assert CliRunner().invoke(main, words).exit_code == 0
    for fold in range(2):
        parts = [{e["case"] for e in DatasetFolder(tmp_path / "out").datalist(part, fold)} for part in ("train", "val")]
        assert any(copies <= part for part in parts)


def test_different_pictures_are_no_copies() -> None:
    pictures = [brain(seed).T.astype(np.float32) for seed in range(12)]
    assert groups_of_copies(pictures) == list(range(12))
    blank = np.zeros((20, 20), np.float32)
    assert groups_of_copies([pictures[0], blank, pictures[0] * 3 + 1])[2] == 0


def test_a_copy_in_the_other_class_is_left_out(source: Path, tmp_path: Path) -> None:
    save(source, "no/again.png", brain(1))
    result = build(source, tmp_path / "out")
    assert result.built == ["no_1_no", "no_no", "yes_Y2"]
    assert {problem.case: problem.what for problem in result.failed} == dict.fromkeys(
        ("no_again", "yes_Y1"), "copies of it lie in both folders (1 in no/, 1 in yes/): one is wrong"
    )


def test_annotations_crop_around_the_position(source: Path, tmp_path: Path) -> None:
    rows = [
        "PatientID,Nodule Center Position,fid,Diagnosis",
        'Y1,"(100, 30)",1,Malignant',
        'Y2.png,"2, 88",1,malignant',
    ]
    rows += ['no,"70 60",1,benign', '1 no,"70, 60",1,malignant', 'gone,"1, 2",1,benign']
    (source / "marks.csv").write_text("\n".join(rows))
    result = build(source, tmp_path / "out", annotations="marks.csv", enlarge=1.0)
    assert result.built == ["no_no", "yes_Y1"]
    why = {problem.case: problem.what for problem in result.failed}
    assert why["no_1_no"] == "the annotations say tumor, its folder no_tumor: which is right?"
    assert "the crop around (2, 88) is black" in why["yes_Y2"]
    assert [(problem.case, problem.what) for problem in result.unpaired] == [
        ("marks.csv", "1 row(s) name no picture of the source")
    ]
    whole = read_gray(source / "yes" / "Y1.jpg")  # 140 columns, 120 rows
    crop = pixels(tmp_path / "out", "yes_Y1")
    assert crop.shape == (35, 35, 1)
    np.testing.assert_array_equal(crop[..., 0], whole[83:118, 13:48])
    entry = next(entry for entry in DatasetFolder(tmp_path / "out").datalist("all") if entry["case"] == "yes_Y1")
    assert (entry["lesion"], entry["position"]) == ("1", "100 30 0")
    affine = nib.load(entry["image"][0]).affine
    np.testing.assert_array_equal(affine @ [17, 17, 0, 1], [100, 30, 0, 1])
    assert (tmp_path / "out" / "attachments" / "yes_Y1_position.png").is_file()


def test_of_two_pictures_of_one_stem_the_annotations_must_say_which(source: Path, tmp_path: Path) -> None:
    save(source, "yes/Y1.png", brain(7))
    titles = "PatientID,Nodule Center Position,Diagnosis\n"
    (source / "marks.csv").write_text(f'{titles}Y1.png,"70, 60",malignant\n')
    result = build(source, tmp_path / "out", annotations="marks.csv")
    assert result.built == ["yes_Y1_png"]
    assert {problem.what for problem in result.failed} == {"the annotations do not name it"}
    (source / "marks.csv").write_text(f'{titles}Y1,"70, 60",malignant\n')
    with pytest.raises(DatasetError, match="line 2: 'Y1' may be several pictures: expected yes_Y1_jpg or yes_Y1_png"):
        build(source, tmp_path / "other", annotations="marks.csv")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("PatientID,Diagnosis\nY1,benign\n", "no column 'Nodule Center Position'"),
        ('PatientID,Nodule Center Position,Diagnosis\nY1,"1",benign\n', "line 2: '1' and 'benign' found"),
        ('PatientID,Nodule Center Position,Diagnosis\nY1,"1,2",maybe\n', "line 2: '1,2' and 'maybe' found"),
        (
            'PatientID,Nodule Center Position,Diagnosis\nY1,"1,2",yes\ny1.jpg,"1,2",yes\n',
            "line 3: .* each picture once",
        ),
    ],
)
def test_annotations_that_cannot_be_understood(source: Path, tmp_path: Path, content: str, message: str) -> None:
    (source / "marks.csv").write_text(content)
    with pytest.raises(DatasetError, match=message):
        build(source, tmp_path / "out", annotations="marks.csv")


def test_what_is_no_source(source: Path, tmp_path: Path) -> None:
    (source / "no" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    result = build(source, tmp_path / "out")
    assert [problem.case for problem in result.failed] == ["no_broken"]
    with pytest.raises(DatasetError, match="no folder no/"):
        build(source / "yes", tmp_path / "other")
    for options in ({"size": 0}, {"enlarge": 0.5}):
        with pytest.raises(ConfigError, match="expected"):
            BrainMriOptions(**options)


def test_what_lies_beside_the_pictures_is_named(source: Path, tmp_path: Path) -> None:
    save(source, "yes/more/Y3.jpg", brain(5))
    for name in ("yes/Y4.webp", "yes/Thumbs.db", "no/no.zip", "no/._no.jpg"):
        (source / name).write_bytes(b"other")
    rows = "PatientID;Nodule Center Position;Diagnosis\r\nY1.JPG;100, 60;malignant\r\n;;\r\n"
    (source / "marks.csv").write_text(rows, "utf-8-sig", newline="")
    result = build(source, tmp_path / "out", annotations="marks.csv")
    assert result.built == ["yes_Y1"]
    assert len(result.failed) == 3  # the annotations do not name them
    assert {problem.case: problem.what[:10] for problem in result.unpaired} == {
        "no/no.zip": "no picture",
        "yes/Thumbs.db": "no picture",
        "yes/Y4.webp": "no picture",
        "yes/more/Y3.jpg": "in the fol",
    }
    with pytest.raises(DatasetError, match=r"gone.csv: No such file or directory: expected a CSV file"):
        build(source, tmp_path / "other", annotations="gone.csv")


@pytest.mark.realdata
def test_real_copies_are_found_and_no_others(data: Path) -> None:
    """Pairs looked at by eye: crops, other contrasts and arrows among the copies, and the likest of all other pairs."""
    folder = data / "brain_mri"
    groups = [
        *(
            ["yes/Y61.jpg", "yes/Y71.JPG", "yes/Y161.JPG"],
            ["yes/Y112.JPG", "yes/Y146.JPG"],
            ["yes/Y113.JPG", "yes/Y59.JPG"],
        ),
        *(["yes/Y156.JPG", "yes/Y60.jpg"], ["yes/Y195.JPG", "yes/Y26.jpg"], ["no/2 no.jpeg", "no/47 no.jpg"]),
        *(
            ["yes/Y255.JPG", "yes/Y30.jpg"],
            ["no/12 no.jpg", "no/no 90.jpg"],
            ["yes/Y92.png", "yes/Y20.jpg"],
            ["yes/Y92.jpg"],
        ),
        *(
            ["no/no 97.jpg"],
            ["yes/Y27.jpg"],
            ["no/no 99.jpg"],
            ["no/no.jpg"],
            ["yes/Y11.jpg"],
            ["no/no 8.jpg"],
            ["yes/Y32.jpg"],
        ),
    ]
    names = [name for group in groups for name in group]
    found = groups_of_copies([read_gray(folder / name) for name in names])
    assert found == [names.index(group[0]) for group in groups for _ in group]


@pytest.mark.realdata
@pytest.mark.long
def test_the_real_pictures(data: Path, tmp_path: Path) -> None:
    result = build(data / "brain_mri", tmp_path / "out", size=64)
    assert result.failed == []
    assert result.notes[0].startswith("253 pictures in 200 groups: 37 groups are of copies, 90 pictures in all")
    cases = DatasetFolder(tmp_path / "out").cases
    assert Counter(cases["class"]) == {"tumor": 155, "no_tumor": 98}
    assert cases["patient"].nunique() == 200
