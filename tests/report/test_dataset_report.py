"""The report in a dataset's folder: pictures lie right, the worst cases come first, nothing private is in it."""

import base64
import hashlib
import io
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nibabel.orientations import axcodes2ornt, inv_ornt_aff, ornt_transform
from numpy.typing import NDArray
from PIL import Image

from medseg.errors import DatasetError, GeometryError, ReadError
from medseg.metrics import outliers
from medseg.report import alignment_picture, dataset_report
from medseg.report.case_picture import LABEL_COLORS

COLORS = [tuple(int(color[i : i + 2], 16) for i in (1, 3, 5)) for color in LABEL_COLORS]


def save(array: NDArray[np.generic], affine: NDArray[np.float64], path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, affine), path)
    return path


def marked(picture: Image.Image, label: int = 1) -> NDArray[np.bool_]:
    return np.all(np.asarray(picture) == COLORS[label - 1], axis=-1)


@pytest.fixture
def make_dataset(tmp_path: Path) -> Callable[..., Path]:
    def make(volumes: dict[str, float], name: str = "ds", spacing: str = "1x1x3") -> Path:
        root = tmp_path / "private place" / name
        rng = np.random.default_rng(0)
        rows = []
        for number, (case, volume) in enumerate(volumes.items()):
            label = np.zeros((24, 20, 6), np.uint8)
            if volume:
                label[8:14, 6:12, 2 + number % 3] = 1
            affine = np.diag([1.0, 1.0, 3.0, 1.0])
            for channel, image in enumerate((1000.0 * label - 50, 8.0 * label)):
                noisy = (image + rng.standard_normal(label.shape)).astype(np.float32)
                save(noisy, affine, root / "imagesTr" / f"{case}_{channel:04d}.nii.gz")
            save(label, affine, root / "labelsTr" / f"{case}.nii.gz")
            row = {"case": case, "patient": f"p{number}", "stratum": "T1" if number % 2 else "T2", "shape": "24x20x6"}
            rows.append(row | {"spacing": spacing, "volume_ml_gtv": volume, "image_sha256": "0", "label_sha256": "0"})
        pd.DataFrame(rows).to_csv(root / "cases.csv", index=False)
        info = {"name": "petct", "channel_names": {"0": "CT", "1": "PET"}, "labels": {"background": 0, "gtv": 1}}
        (root / "dataset.json").write_text(json.dumps(info))
        manifest = {
            "recipe": "petct",
            "options": {"spacing": [1, 1, 3], "label": []},
            "versions": {"medseg": "0.1.0"},
            "failed": [{"case": "case_9", "sources": [4, 5], "what": "no injected dose <b>", "fingerprint": "f"}],
            "unpaired": [{"sources": [7], "what": "image without a label"}],
        }
        (root / "manifest.json").write_text(json.dumps(manifest))
        return root

    return make


def order(html: str) -> list[str]:
    return re.findall(r"<tr><th>(case_\w+)</th>", html)


VOLUMES = {"case_a": 10.0, "case_b": 11.0, "case_c": 0.0, "case_d": 9.0, "case_e": 10.5, "case_f": 400.0, "case_g": 9.5}


@dataclass(frozen=True)
class Found:
    """What medseg.data.Problem is; this floor does not know it."""

    case: str
    what: str
    advice: str = "look"
    topic: str = "HU"
    severity: str = "warning"


FOUND = [
    Found("case_f", "no air <b>", topic="HU", severity="error"),
    Found("splits.json", "val has no case with label gtv", topic="balance"),
    Found("case_e", "one thing"),
    Found("case_g", "one thing"),
    Found("case_g", "another", topic="alignment"),
]


def test_worst_first_and_flagged(make_dataset: Callable[..., Path]) -> None:
    root = make_dataset(VOLUMES)
    out = dataset_report(root, FOUND)
    assert out == root / "report.html"
    html = out.read_text()
    assert order(html) == ["case_f", "case_g", "case_e", "case_c", "case_d", "case_a", "case_b"]
    row = html[html.index("<tr><th>case_f") : html.index("<tr><th>case_g")]
    found = '<span class="flag error">HU</span>no air &lt;b&gt;<small>look</small>'
    assert f'<td data-value="-1000"><p class="found">{found}</p></td>' in row
    general = html[html.index("Of the dataset as a whole") : html.index("Not built</h2>")]
    assert "val has no case with label gtv" in general
    assert "one thing" not in general
    assert "<tr><th>Flagged cases</th><td>3</td></tr>" in html
    assert html.count("data:image/jpeg;base64,") == 7
    assert html.count('loading="lazy"') >= 7


def test_what_was_not_checked_is_not_said_to_be_right(make_dataset: Callable[..., Path]) -> None:
    root = make_dataset(VOLUMES)
    assert "The dataset was not checked" in dataset_report(root).read_text()
    html = dataset_report(root, []).read_text()
    assert "not checked" not in html
    assert "Nothing wrong was found." in html


def test_failures_of_the_build_are_told(make_dataset: Callable[..., Path]) -> None:
    html = dataset_report(make_dataset(VOLUMES)).read_text()
    assert "<td>case_9</td><td>4, 5</td><td>no injected dose &lt;b&gt;</td>" in html
    assert "<td>7</td><td>image without a label</td>" in html


def test_nothing_private_is_in_it_and_nothing_is_fetched(make_dataset: Callable[..., Path], tmp_path: Path) -> None:
    html = dataset_report(make_dataset(VOLUMES)).read_text()
    assert "private place" not in html
    assert str(tmp_path) not in html
    addresses = re.findall(r'(?:src|href)="([^"]*)"', html)
    assert addresses
    assert all(address.startswith(("data:image/", "#")) for address in addresses)


def test_the_same_dataset_gives_the_same_bytes(make_dataset: Callable[..., Path]) -> None:
    first = dataset_report(make_dataset(VOLUMES)).read_bytes()
    root = make_dataset(VOLUMES, name="elsewhere")
    assert dataset_report(root).read_bytes() == first
    assert dataset_report(root).read_bytes() == first  # the first report changes nothing
    assert dataset_report(root, workers=3).read_bytes() == first
    assert dataset_report(root, FOUND).read_bytes() == dataset_report(root, FOUND, workers=1).read_bytes()
    assert not [path for path in root.iterdir() if path.name.startswith(".")]


def test_parts_and_strata(make_dataset: Callable[..., Path]) -> None:
    root = make_dataset(VOLUMES)
    names = list(VOLUMES)
    fold = {"train": names[:4], "val": names[4:5]}
    (root / "splits.json").write_text(json.dumps({"folds": [fold], "test": names[5:]}))
    html = dataset_report(root).read_text()
    table = re.sub(r"<[^>]+>", " ", html[html.index("Patients by stratum") : html.index("Not built</h2>")])
    rows = [row.split() for row in table.splitlines() if row.split()[:1] in (["T1"], ["T2"], ["all"])]
    assert rows == [["T2", "4", "2", "1", "1"], ["T1", "3", "2", "0", "1"], ["all", "7", "4", "1", "2"]]
    (root / "splits.json").write_text(json.dumps({"folds": [fold, fold], "test": names[5:]}))
    assert "<td>val 0, val 1</td>" in dataset_report(root).read_text()


def test_a_broken_case_is_named_and_the_others_are_shown(make_dataset: Callable[..., Path]) -> None:
    root = make_dataset(VOLUMES)
    path = root / "imagesTr" / "case_a_0001.nii.gz"
    path.write_bytes(path.read_bytes()[:200])
    (root / "imagesTr" / "case_b_0000.nii.gz").unlink()
    save(np.zeros((24, 20, 5), np.uint8), np.diag([1.0, 1, 3, 1]), root / "labelsTr" / "case_d.nii.gz")
    (root / "labelsTr" / "case_e.nii.gz").unlink()
    html = dataset_report(root).read_text()
    assert re.search(r"case_a_0001\.nii\.gz: cut short", html)
    assert "image absent" in html
    assert "image 24x20x6 and label 24x20x5 differ in shape" in html
    assert "no label file" in html
    assert html.count("data:image/jpeg;base64,") == 4


def test_hostile_names_are_text_and_no_paths(make_dataset: Callable[..., Path]) -> None:
    root = make_dataset({"case_a": 1.0})
    cases = pd.read_csv(root / "cases.csv")
    cases["case"], cases["patient"], cases["stratum"] = "../../<script>x</script>", "$\\frac{$", "<b>"
    cases.to_csv(root / "cases.csv", index=False)
    html = dataset_report(root).read_text()
    assert "<script>x" not in html
    assert "<b>" not in html
    assert "no file name" in html


@pytest.mark.parametrize("name", ["dataset.json", "cases.csv"])
def test_a_folder_that_is_no_dataset(make_dataset: Callable[..., Path], name: str) -> None:
    root = make_dataset({"case_a": 1.0})
    (root / name).unlink()
    with pytest.raises(DatasetError, match=f"{name}: absent"):
        dataset_report(root)
    assert not (root / "report.html").exists()


def test_damaged_json_is_named(make_dataset: Callable[..., Path]) -> None:
    root = make_dataset({"case_a": 1.0})
    (root / "manifest.json").write_text("{")
    with pytest.raises(ReadError, match=r"manifest\.json: not valid JSON"):
        dataset_report(root)


@pytest.mark.parametrize("key", ["channel_names", "labels", "classes"])
def test_names_that_are_a_list_are_refused(make_dataset: Callable[..., Path], key: str) -> None:
    root = make_dataset({"case_a": 1.0})
    info = json.loads((root / "dataset.json").read_text())
    (root / "dataset.json").write_text(json.dumps(info | {key: ["CT"]}))
    with pytest.raises(DatasetError, match=f"{key} is a list, names and values expected"):
        dataset_report(root)


def test_a_channel_with_the_word_ct_is_shown_in_its_window(tmp_path: Path) -> None:
    ct = np.full((10, 10, 3), -2000, np.float32)
    ct[5:] = 40
    path = save(ct, np.diag([-1.0, -1.0, 2.0, 1.0]), tmp_path / "0.nii.gz")
    for name, gray in (("low-dose CT", 127), ("T1", 255)):
        assert abs(int(np.asarray(alignment_picture([path], None, [name], height=100))[50, 90, 0]) - gray) <= 1


class Cells(HTMLParser):
    """Cells of every row of the last table, and tags that are not closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.rows: list[int] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag not in {"meta", "img", "input", "link", "br"}:
            self.open.append(tag)
        if tag == "table":
            self.rows = []
        elif tag == "tr":
            self.rows.append(0)
        elif tag in {"td", "th"}:
            self.rows[-1] += 1

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_every_row_has_as_many_cells_as_the_heading(make_dataset: Callable[..., Path]) -> None:
    root = make_dataset(VOLUMES)
    fold = {"train": list(VOLUMES)[:4], "val": list(VOLUMES)[4:5]}
    (root / "splits.json").write_text(json.dumps({"folds": [fold], "test": list(VOLUMES)[5:]}))
    page = Cells()
    page.feed(dataset_report(root, FOUND).read_text())
    assert page.open == []
    assert page.rows == [9] * 8  # case, pictures, findings, patient, stratum, part, shape, spacing, gtv


@pytest.fixture
def lesions(make_dataset: Callable[..., Path]) -> Path:
    """A classification: no labels, a class per case, positions, and further files."""
    root = make_dataset(VOLUMES)
    for path in (root / "labelsTr").iterdir():
        path.unlink()
    info = json.loads((root / "dataset.json").read_text())
    del info["labels"]
    (root / "dataset.json").write_text(json.dumps(info | {"classes": {"benign": 0, "malignant": 1}}))
    cases = pd.read_csv(root / "cases.csv").drop(columns=["volume_ml_gtv", "label_sha256"])
    cases["class"], cases["lesion"], cases["position"] = ["benign"] * 4 + ["malignant"] * 3, "1", "4 5 6"
    cases.to_csv(root / "cases.csv", index=False)
    (root / "attachments").mkdir()
    Image.new("RGB", (1200, 400), (0, 200, 0)).save(root / "attachments" / "case_a_position.png")
    (root / "attachments" / "case_b_T1_to_FLAIR.tfm").write_text("transform")
    (root / "attachments" / "case_d_position.png").write_bytes(b"no picture")
    return root


def pictures_of(html: str, case: str) -> list[Image.Image]:
    row = html[html.index(f"<tr><th>{case}<") :]
    found = re.findall(r"data:image/jpeg;base64,([A-Za-z0-9+/=]+)", row[: row.index("</tr>")])
    return [Image.open(io.BytesIO(base64.b64decode(content))).convert("RGB") for content in found]


def test_a_classification_with_its_positions_and_attachments(lesions: Path) -> None:
    html = dataset_report(lesions, []).read_text()
    assert "no label file" not in html
    assert "<th>Classes</th><td>benign: 4 cases, malignant: 3 cases</td>" in html
    assert html.count("<td>malignant</td>") == 3
    own, attached = pictures_of(html, "case_a")
    assert attached.size == (450, 150)
    assert attached.getpixel((225, 75))[1] > 150
    red = np.asarray(own).astype(int)
    assert np.count_nonzero((red[..., 0] > 200) & (red[..., 1] < 80)) > 2 * 10  # a dot in both channels
    assert "<small>case_b_T1_to_FLAIR.tfm</small>" in html
    assert "case_d_position.png cannot be read" in html


def test_the_dot_is_where_the_position_is(tmp_path: Path) -> None:
    affine = np.array([[-2.0, 0, 0, 30], [0, -2, 0, 20], [0, 0, 5, -10], [0, 0, 0, 1]])  # stored as DICOM is
    path = save(np.zeros((30, 20, 5), np.float32), affine, tmp_path / "i.nii.gz")
    position = affine @ [12, 4, 3, 1]
    text = " ".join(map(str, position[:3]))
    picture = np.asarray(alignment_picture([path], None, ["MR"], height=200, position=text))
    rows, columns = np.nonzero(np.all(picture == (255, 0, 0), axis=-1))
    assert picture.shape == (200, 300, 3)
    assert abs(columns.mean() - 125) < 1  # the middle of pixel 12, of 10 pixels each
    assert abs(rows.mean() - 45) < 1
    turned = nib.orientations.apply_orientation(np.zeros((30, 20, 5), np.float32), [[1, -1], [2, 1], [0, 1]])
    other = affine @ inv_ornt_aff(np.array([[1, -1], [2, 1], [0, 1]]), (30, 20, 5))
    again = save(turned, other, tmp_path / "j.nii.gz")
    same = np.asarray(alignment_picture([again], None, ["MR"], height=200, position=text))
    np.testing.assert_array_equal(same, picture)


def test_the_slice_through_the_position_is_shown(tmp_path: Path) -> None:
    image = np.zeros((8, 8, 5), np.float32)
    image[:4, :, 1] = 1
    path = save(image, np.diag([-1.0, -1.0, 4.0, 1.0]), tmp_path / "i.nii.gz")
    picture = np.asarray(alignment_picture([path], None, ["MR"], height=80, position="-6 -6 4"))
    assert picture[40, 10].tolist() == [255] * 3
    outside = np.asarray(alignment_picture([path], None, ["MR"], height=80, position="-6 -6 400"))
    assert not np.all(outside == (255, 0, 0), axis=-1).any()


def test_the_picture_is_the_slice_with_the_largest_label(tmp_path: Path) -> None:
    label = np.zeros((30, 30, 9), np.uint8)
    label[10:12, 10:12, 2] = 1
    label[5:20, 10:25, 6] = 1
    image = np.broadcast_to(np.arange(9.0), label.shape).astype(np.float32)
    affine = np.diag([-1.0, -1.0, 4.0, 1.0])  # stored as DICOM is: left, posterior
    paths = save(image, affine, tmp_path / "i.nii.gz"), save(label, affine, tmp_path / "l.nii.gz")
    edge = marked(alignment_picture([paths[0]], paths[1], ["MR"], height=150))
    assert edge.shape == (150, 150)
    rows, columns = np.nonzero(edge)
    # Five pixels for a voxel: columns are the first axis, rows the second.
    assert (columns.min(), columns.max(), rows.min(), rows.max()) == (25, 99, 50, 124)
    assert not edge[60:110, 35:90].any()  # an outline, not an area


def test_without_a_label_the_middle_slice_is_shown(tmp_path: Path) -> None:
    image = np.zeros((8, 8, 5), np.float32)
    image[:4, :, 2] = 1
    path = save(image, np.diag([-1.0, -1.0, 4.0, 1.0]), tmp_path / "i.nii.gz")
    picture = np.asarray(alignment_picture([path], None, ["MR"], height=80))
    assert picture[40, 10].tolist() == [255] * 3
    assert picture[40, 70].tolist() == [0] * 3


def test_channels_stand_side_by_side_on_their_windows(tmp_path: Path) -> None:
    ct = np.full((10, 10, 3), -160, np.float32)
    ct[5:] = 40
    pet = np.zeros((10, 10, 3), np.float32)
    pet[:, 5:] = 7
    affine = np.diag([-1.0, -1.0, 2.0, 1.0])
    paths = [save(ct, affine, tmp_path / "0.nii.gz"), save(pet, affine, tmp_path / "1.nii.gz")]
    picture = np.asarray(alignment_picture(paths, None, ["CT", "PET"], height=100))
    assert picture.shape == (100, 203, 3)
    assert picture[50, 10, 0] == 0
    assert abs(int(picture[50, 90, 0]) - 127) <= 1  # 40 HU is the middle of the window
    assert picture[10, 150, 0] == 0
    assert picture[90, 150, 0] == 255


@given(st.permutations(["LR", "PA", "SI"]), st.tuples(*[st.integers(0, 1)] * 3))
@settings(max_examples=12, deadline=None)
def test_the_picture_does_not_depend_on_how_voxels_are_stored(
    tmp_path_factory: pytest.TempPathFactory, axes: list[str], ends: tuple[int, int, int]
) -> None:
    folder = tmp_path_factory.mktemp("stored")
    rng = np.random.default_rng(0)
    image, label = rng.random((12, 16, 7)).astype(np.float32), np.zeros((12, 16, 7), np.uint8)
    label[2:5, 3:10, 4] = 1
    affine = np.diag([-1.0, -1.5, 3.0, 1.0])
    codes = [axis[end] for axis, end in zip(axes, ends, strict=True)]
    turn = ornt_transform(axcodes2ornt(("L", "P", "S")), axcodes2ornt(codes))
    paths, turned = [], []
    for name, array in (("i", image), ("l", label)):
        paths.append(save(array, affine, folder / f"{name}.nii.gz"))
        other = nib.orientations.apply_orientation(array, turn)
        turned.append(save(other, affine @ inv_ornt_aff(turn, array.shape), folder / f"{name}2.nii.gz"))
    straight = np.asarray(alignment_picture([paths[0]], paths[1], ["MR"]))
    np.testing.assert_array_equal(straight, np.asarray(alignment_picture([turned[0]], turned[1], ["MR"])))


def test_left_is_right_and_front_is_up(tmp_path: Path) -> None:
    image = np.zeros((10, 10, 3), np.float32)
    image[:5, 5:] = 1  # in RAS: the left front of the patient
    path = save(image, np.diag([1.0, 1.0, 3.0, 1.0]), tmp_path / "i.nii.gz")
    picture = np.asarray(alignment_picture([path], None, ["MR"], height=100))[..., 0]
    assert picture[20, 80] == 255
    assert max(picture[20, 20], picture[80, 20], picture[80, 80]) == 0


def test_a_photograph_stays_as_it_is(tmp_path: Path) -> None:
    photo = np.zeros((20, 10, 1), np.float32)
    photo[:10, :5] = 1  # the upper left quarter: x from the left, y from the top
    path = save(photo, np.eye(4), tmp_path / "i.nii.gz")
    picture = np.asarray(alignment_picture([path], None, ["red"], height=100))[..., 0]
    assert picture.shape == (100, 200)
    assert picture[20, 50] == 255
    assert picture[80, 50] == 0
    assert picture[20, 150] == 0


def test_pixels_are_as_long_as_in_the_patient(tmp_path: Path) -> None:
    path = save(np.ones((20, 10, 4), np.float32), np.diag([1.0, 2.0, 5.0, 1.0]), tmp_path / "i.nii.gz")
    assert alignment_picture([path], None, ["MR"], height=60).size == (60, 60)


def test_another_grid_is_refused(tmp_path: Path) -> None:
    image = save(np.ones((5, 5, 5), np.float32), np.eye(4), tmp_path / "i.nii.gz")
    shifted = np.eye(4)
    shifted[0, 3] = 2
    label = save(np.ones((5, 5, 5), np.uint8), shifted, tmp_path / "l.nii.gz")
    with pytest.raises(GeometryError, match="image and label differ in affine"):
        alignment_picture([image], label, ["MR"])


@pytest.mark.parametrize(
    ("values", "log", "expected"),
    [
        ([1.0, 2.0, 3.0, 100.0], False, [0, 0, 0, 0]),  # four are too few to say
        ([1.0, 1.0, 1.0, 1.0, 1.005], False, [0, 0, 0, 0, 0]),  # within 1 %
        ([1.0, 1.0, 1.0, 1.0, 1.5, np.nan], False, [0, 0, 0, 0, 1, 0]),
        ([1.0, 2.0, 4.0, 8.0, 16.0, 32.0], True, [0, 0, 0, 0, 0, 0]),
        ([10.0, 11.0, 10.0, 11.0, 10.0, 0.0, 0.1], True, [0, 0, 0, 0, 0, 0, 1]),
    ],
)
def test_outliers(values: list[float], log: bool, expected: list[int]) -> None:
    assert outliers(values, log).astype(int).tolist() == expected


@pytest.mark.realdata
def test_real_hippocampi_have_outlines_on_them(data: Path) -> None:
    image = sorted((data / "hippocampus" / "images").glob("*.nii.gz"))[0]
    label = data / "hippocampus" / "labels" / image.name
    picture = alignment_picture([image], label, ["MR"])
    assert marked(picture, 1).any() or marked(picture, 2).any()
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    again = io.BytesIO()
    alignment_picture([image], label, ["MR"]).save(again, format="PNG")
    assert hashlib.sha256(buffer.getvalue()).digest() == hashlib.sha256(again.getvalue()).digest()


def test_pictures_in_the_page_can_be_opened(make_dataset: Callable[..., Path]) -> None:
    html = dataset_report(make_dataset({"case_a": 1.0})).read_text()
    (content,) = re.findall(r"data:image/jpeg;base64,([A-Za-z0-9+/=]+)", html)
    picture = Image.open(io.BytesIO(base64.b64decode(content)))
    assert picture.height == 150
