"""The report of runs: one HTML file, whole, escaped, honest about what is missing."""

import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest

from medseg.errors import ConfigError, DatasetError, ReadError
from medseg.report import read_pictures, read_run, run_report

MakeRun = Callable[..., Path]
VOID = {"meta", "img", "br", "hr", "link", "input"}


class Page(HTMLParser):
    """Checks that tags are balanced; keeps addresses, the text of cells by row, and the text."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.tags: list[str] = []
        self.rows: list[list[str]] = []
        self.words = ""
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]
        assert not [name for name, _ in attrs if name.startswith("on")]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data.strip() + " "
        self.words += data

    def row(self, first: str) -> list[str]:
        return next([cell.strip() for cell in row] for row in self.rows if row and row[0].strip() == first)


def read(path: Path) -> Page:
    return Page(path.read_text(encoding="utf-8"))


def test_a_comparison_is_whole_and_needs_nothing_else(make_run: MakeRun, tmp_path: Path) -> None:
    runs = {
        "PET/CT": make_run("petct", patients=("P1", "P2", "P3")),
        "CT only": make_run("ct", patients=("P1", "P2", "P3"), channels=("CT",), error=5.0, seed=1),
    }
    out = run_report(runs, tmp_path / "report.html", title="Does PET help?")
    assert out == tmp_path / "report.html"
    page = read(out)
    assert page.addresses
    assert all(address.startswith(("data:image/", "#")) for address in page.addresses)
    assert "@import" not in out.read_text()
    assert "url(" not in out.read_text()
    for text in ("Does PET help?", "Not for clinical use", "Paired differences", "Best patient", "Median patient"):
        assert text in page.words
    # Curves, histogram, box plot, cases, and three patients as each of two runs sees them.
    assert page.tags.count("img") == 4 + 6
    assert page.row("network") == [
        "network",
        "medseg.networks.UNet {spatial_dims: 2, in_channels: 2}",
        "medseg.networks.UNet {spatial_dims: 2, in_channels: 1}",
    ]
    assert page.row("dataset hash")[1:] == ["6d1f6d1f6d1f6d1f"] * 2


def test_known_numbers_are_in_the_table(tmp_path: Path, write: Callable[..., None]) -> None:
    rows = []
    for patient, dice in (("a", 0.2), ("b", 0.4), ("c", 0.9)):
        base = {"split": "test", "case": patient, "patient": patient, "label": "gtv"}
        rows.append(
            base | {"level": "slice", "slice": 3, "dice": dice, "truth_empty": False, "pred_empty": dice == 0.2}
        )
        for slice_, false in ((4, 0), (5, 10 if patient == "a" else 0)):
            empty = {
                "level": "slice",
                "slice": slice_,
                "dice": float(false == 0),
                "fp": false,
                "specificity": 1 - false / 100,
            }
            rows.append(base | empty | {"truth_empty": True, "pred_empty": false == 0})
    write(tmp_path / "run" / "00", rows)
    page = read(run_report([tmp_path / "run" / "00"], tmp_path / "out.html"))
    assert page.row("Dice")[1] == "0.500 (0.400) ± 0.361 [0.200, 0.900]"
    assert page.row("Slices")[1] == "3 of 3 patients"
    assert page.row("Missed")[1] == "1 (33.3%)"
    assert page.row("False alarms")[1] == "1 (16.7%)"
    assert page.row("Predicted pixels per false alarm, mean")[1] == "10.0"
    assert page.row("Specificity")[1].startswith("0.983 (1.000) ± 0.041")
    assert page.row("a") == ["a", "1", "1", "0.200", "0.200", "–", "1 of 2"]
    order = [row[0].strip() for row in page.rows if row[0].strip() in ("a", "b", "c")]
    assert order == ["a", "b", "c"]
    assert "of 3 patients, 3 cases" not in page.words
    assert "3 patients, 3 cases, 9 slices" in page.words


def test_several_labels_without_slices(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run("hippo", channels=("MR",), labels=("anterior", "posterior"), slices=False)
    page = read(run_report([run], tmp_path / "out.html"))
    assert page.row("Measure") == ["Measure", "anterior", "posterior", "mean of labels"]
    assert "Slices with a label" not in page.words
    cases = pd.read_csv(run / "scores.csv")
    means = cases.groupby("label")["dice"].mean()
    for cell, value in zip(page.row("Dice")[1:], [means["anterior"], means["posterior"], means.mean()], strict=True):
        assert cell.startswith(f"{value:.3f} (")
    assert page.row("Hausdorff 95 (mm)")
    assert "hippo/00" in page.words


def test_the_same_run_gives_the_same_bytes(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run(patients=["P01", "P02"], iterations=30)
    first = run_report([run], tmp_path / "a.html").read_bytes()
    assert run_report([run], tmp_path / "b.html").read_bytes() == first


def test_names_are_text_whatever_they_hold(make_run: MakeRun, tmp_path: Path) -> None:
    nasty = ["<script>alert(1)</script>", '"><img src=https://evil.example/x>', "$\\frac{1}$ & {{ 7*7 }}", "P4"]
    run = make_run("x", patients=["P1", "P2", "P3", "P4"], labels=("<b>gtv</b>",), iterations=20)
    scores = pd.read_csv(run / "scores.csv")
    names = dict(zip(["P1", "P2", "P3", "P4"], nasty, strict=True))
    scores["patient"] = scores["patient"].map(names)
    scores.to_csv(run / "scores.csv", index=False)
    for path in (run / "pictures").glob("*.npz"):
        arrays = dict(np.load(path))
        arrays["patient"] = np.array(names[str(arrays["patient"])])
        arrays["channel_names"] = np.array(["$\\bad{$", "<i>PET"])
        np.savez(path, **arrays)
    record = json.loads((run / "run.json").read_text())
    record["</table><script>"] = "<script>"
    (run / "run.json").write_text(json.dumps(record))
    html = run_report({"<u>run</u> $x$": run}, tmp_path / "out.html").read_text()
    page = Page(html)
    assert page.tags.count("script") == 1
    assert not {"b", "i", "u"} & set(page.tags)
    assert all(address.startswith(("data:image/", "#")) for address in page.addresses)
    assert "49" not in page.row(nasty[2])[0]
    assert page.row(nasty[0])


def test_bold_is_a_difference_whose_interval_leaves_out_zero(tmp_path: Path, write: Callable[..., None]) -> None:
    base = {"split": "test", "level": "case", "label": "gtv", "truth_empty": False, "pred_empty": False}
    scores = {"one": {"a": (0.9, 0.5), "b": (0.8, 0.7)}, "two": {"a": (0.7, 0.6), "b": (0.7, 0.6)}}
    for name, patients in scores.items():
        rows = [base | {"case": p, "patient": p, "dice": d, "ppv": v} for p, (d, v) in patients.items()]
        write(tmp_path / name, rows)
    html = run_report([tmp_path / "one", tmp_path / "two"], tmp_path / "out.html").read_text()
    bold = dict(re.findall(r'class="(n|n better)">(\[.*?\])<', html, re.DOTALL)[::-1])
    assert {v: k for k, v in bold.items()} == {"[+0.100, +0.200]": "n better", "[−0.100, +0.100]": "n"}


def test_what_is_missing_is_said(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run(iterations=20)
    for name in ("metrics.csv", "config.yaml", "run.json"):
        (run / name).unlink()
    for path in (run / "pictures").iterdir():
        path.unlink()
    page = read(run_report([run], tmp_path / "out.html"))
    for name in ("run.json", "metrics.csv", "config.yaml"):
        assert f"petct/00: {name} is absent" in page.words
    assert "pictures holds none" in page.words
    assert "No run has numbers of its training" in page.words


def test_a_run_that_is_not_scored_yet_shows_its_curves(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run(iterations=20)
    (run / "scores.csv").unlink()
    page = read(run_report([run], tmp_path / "out.html"))
    assert "has not been scored" in page.words
    assert page.tags.count("img") == 1


def test_damaged_pictures_are_named_and_left_out(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run(iterations=20, patients=["P01", "P02"])
    whole = (run / "pictures" / "P01a.npz").read_bytes()
    (run / "pictures" / "P01a.npz").write_bytes(whole[: len(whole) // 2])
    page = read(run_report([run], tmp_path / "out.html"))
    assert "pictures/P01a.npz cannot be read" in page.words
    assert "Only patient: P02" in page.words


def test_pictures_whose_arrays_do_not_fit_are_named(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run(iterations=20, patients=["P01", "P02"])
    arrays = dict(np.load(run / "pictures" / "P01a.npz"))
    np.savez(run / "pictures" / "P01a.npz", **(arrays | {"label": arrays["label"][:, :-1]}))
    with pytest.raises(ReadError, match="do not fit together"):
        read_pictures(run / "pictures" / "P01a.npz")
    page = read(run_report([run], tmp_path / "out.html"))
    assert "the pictures of case P01a are damaged" in page.words


@pytest.mark.parametrize("made", [False, True])
def test_a_folder_that_is_no_run(tmp_path: Path, made: bool) -> None:
    folder = tmp_path / "empty"
    if made:
        folder.mkdir()
    with pytest.raises(DatasetError, match="empty: not ") as caught:
        run_report([folder], tmp_path / "out.html")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out.html").exists()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["test,case,a,a,,gtv,high,False,False"], "column dice holds 'high', expected a number"),
        (["test,case,a,a,,gtv,0.5,False,no"], "column pred_empty holds 'no', expected True or False"),
        (["test,case,a,a,,gtv,0.5,False"], "column pred_empty holds '', expected True or False"),
        (["test,case,a,b,a,,gtv,0.5,False,False"], "more fields than the first line names"),
        (["test,slice,a,a,3,gtv,0.5,False,False"] * 2, "case a, slice 3, label gtv comes twice in the split test"),
    ],
)
def test_scores_that_are_none(tmp_path: Path, rows: list[str], message: str) -> None:
    head = "split,level,case,patient,slice,label,dice,truth_empty,pred_empty"
    (tmp_path / "scores.csv").write_text("\n".join([head, *rows, ""]))
    with pytest.raises(DatasetError, match=message) as caught:
        read_run(tmp_path)
    assert "\n" not in str(caught.value)


def test_scores_without_a_column(tmp_path: Path) -> None:
    (tmp_path / "scores.csv").write_text("split,level,case\ntest,case,a\n")
    with pytest.raises(DatasetError, match="no column patient, slice, label, dice, truth_empty, pred_empty"):
        read_run(tmp_path)


@pytest.mark.parametrize(
    ("tail", "said"),
    [
        (b"21,1,train,loss,0.5\r\n22,1,train,loss,0.0", "ends within a line"),
        (b"21,1,train,loss,0.5\r\n22,1,tr", "ends within a line"),
        (b"21,1,train,loss,0.5\r\n22,1,train,loss,nan\r\n23,1,train,loss,inf\r\n", "2 of 4, are not drawn"),
    ],
)
def test_a_training_that_was_killed_or_diverged_says_so(tmp_path: Path, tail: bytes, said: str) -> None:
    (tmp_path / "metrics.csv").write_bytes(b"iteration,epoch,phase,name,value\n20,1,train,loss,0.6\r\n" + tail)
    run = read_run(tmp_path)
    assert run.metrics is not None
    assert list(run.metrics["value"].dropna()) == [0.6, 0.5]
    assert [line for line in run.missing if said in line]


@pytest.mark.parametrize("content", ["", "iteration,epoch,phase,name,value\n", "iteration,epo"])
def test_a_training_killed_at_its_start_has_no_curves(tmp_path: Path, content: str) -> None:
    (tmp_path / "metrics.csv").write_text(content)
    page = read(run_report([tmp_path], tmp_path / "out.html"))
    assert "metrics.csv holds no row" in page.words
    assert "No run has numbers of its training" in page.words


@pytest.mark.parametrize("out", [".", "absent/out.html"])
def test_a_place_that_cannot_take_the_report(make_run: MakeRun, tmp_path: Path, out: str) -> None:
    with pytest.raises(ConfigError, match="out: "):
        run_report([make_run(iterations=20)], tmp_path / out)


def test_scores_without_rows_are_no_scores(tmp_path: Path, write: Callable[..., None]) -> None:
    write(tmp_path / "r", [])
    page = read(run_report([tmp_path / "r"], tmp_path / "out.html"))
    assert "scores.csv holds no row" in page.words


def test_runs_of_different_labels_say_so(tmp_path: Path, write: Callable[..., None]) -> None:
    base = {"split": "test", "level": "case", "case": "a", "patient": "a", "truth_empty": False, "pred_empty": False}
    both = [base | {"label": "x", "dice": 0.8}, base | {"label": "y", "dice": 0.2}]
    write(tmp_path / "both", both)
    write(tmp_path / "one", both[:1])
    words = read(run_report([tmp_path / "both", tmp_path / "one"], tmp_path / "out.html")).words
    assert "scored on different labels (both: x, y; one: x)" in words


def test_patients_of_runs_with_and_without_slices_are_told_by_cases(tmp_path: Path, write: Callable[..., None]) -> None:
    base = {"split": "test", "case": "c", "patient": "P", "label": "gtv", "truth_empty": False, "pred_empty": False}
    case = base | {"level": "case", "dice": 0.75}
    write(tmp_path / "cases", [case])
    write(tmp_path / "slices", [case, base | {"level": "slice", "slice": 0, "dice": 0.25}])
    page = read(run_report([tmp_path / "slices", tmp_path / "cases"], tmp_path / "out.html"))
    assert page.row("P") == ["P", "1", "1", "0.750", "0.750", "–", "0.750", "0.750", "–"]
    assert "Cases with a label" in page.words


def test_the_case_that_made_a_patient_the_worst_is_shown(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run(iterations=20, patients=["P01", "P02", "P03"])
    scores = pd.read_csv(run / "scores.csv")
    # The second patient is a second case of the first, and the worse of both.
    scores.loc[scores["patient"] == "P02", "patient"] = "P01"
    empty = scores["truth_empty"]
    scores.loc[~empty, "dice"] = scores["case"].map({"P01a": 0.6, "P02a": 0.1, "P03a": 0.9})[~empty]
    scores.to_csv(run / "scores.csv", index=False)
    page = read(run_report([run], tmp_path / "out.html"))
    assert "Worst patient: P01" in page.words
    assert "case P02a, the worst of 2" in page.words
    assert "case P03a:" in page.words


@pytest.mark.parametrize("content", ["", "{", "[1]"])
def test_a_record_that_is_none(tmp_path: Path, content: str) -> None:
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(ReadError, match=r"run\.json: ") as caught:
        read_run(tmp_path)
    assert "\n" not in str(caught.value)


def test_splits_are_not_mixed(tmp_path: Path, write: Callable[..., None]) -> None:
    base = {"level": "case", "label": "gtv", "truth_empty": False, "pred_empty": False}
    rows = [base | {"split": s, "case": s + p, "patient": s + p, "dice": d} for s, p, d in
            (("val", "1", 0.9), ("val", "2", 0.9), ("test", "1", 0.1), ("test", "2", 0.3))]  # fmt: skip
    write(tmp_path / "both", rows)
    write(tmp_path / "val", rows[:2])
    assert read(run_report([tmp_path / "both"], tmp_path / "o.html")).row("Dice")[1].startswith("0.200 (")
    assert read(run_report([tmp_path / "both"], tmp_path / "o.html", split="val")).row("Dice")[1].startswith("0.900 (")
    both = read(run_report([tmp_path / "val", tmp_path / "both"], tmp_path / "o.html"))
    assert [cell[:5] for cell in both.row("Dice")[1:]] == ["0.900", "0.900"]
    with pytest.raises(DatasetError, match="'test' is not scored in every run"):
        run_report([tmp_path / "val", tmp_path / "both"], tmp_path / "o.html", split="test")


def test_runs_that_cannot_be_compared_say_so(tmp_path: Path, write: Callable[..., None]) -> None:
    base = {"split": "test", "level": "case", "label": "gtv", "dice": 0.5, "truth_empty": False, "pred_empty": False}
    for name in ("a", "b"):
        write(tmp_path / name, [base | {"case": name, "patient": name}])
        (tmp_path / name / "run.json").write_text(json.dumps({"dataset_sha256": name * 8, "test_set_scored": []}))
    words = read(run_report([tmp_path / "a", tmp_path / "b"], tmp_path / "out.html")).words
    assert "made with different datasets" in words
    assert "scored on different cases" in words


def test_every_look_at_the_test_set_is_told(tmp_path: Path, write: Callable[..., None]) -> None:
    base = {"split": "test", "level": "case", "label": "gtv", "dice": 0.5, "truth_empty": False, "pred_empty": False}
    write(tmp_path / "a", [base | {"case": "a", "patient": "a"}])
    looks = [{"when": "2026-01-01", "command": "one"}, {"when": "2026-01-02", "command": "two"}]
    (tmp_path / "a" / "run.json").write_text(json.dumps({"command": "train", "test_set_scored": looks}))
    page = read(run_report([tmp_path / "a"], tmp_path / "out.html"))
    assert page.row("test set scored") == ["test set scored", "2 times"]
    assert page.row("command") == ["command", "train"]


def test_patients_that_look_like_numbers_or_nothing_keep_their_names(
    tmp_path: Path, write: Callable[..., None]
) -> None:
    base = {"split": "test", "level": "case", "label": "1", "truth_empty": False, "pred_empty": False}
    write(tmp_path / "r", [base | {"case": n, "patient": n, "dice": d} for n, d in (("007", 0.5), ("NA", 0.6))])
    page = read(run_report([tmp_path / "r"], tmp_path / "out.html"))
    assert re.fullmatch("007", page.row("007")[0])
    assert page.row("NA")[3] == "0.600"


@pytest.mark.parametrize("codes", ["RAS", "LAS", "LPS", "RPI", "ARS", "PLS", "ASL", "PIR", "SAL", "RSA", "LIP", "SLP"])
def test_pictures_stand_as_a_radiologist_sees_them(make_run: MakeRun, codes: str) -> None:
    run = make_run(iterations=20, patients=["P01"])
    path = run / "pictures" / "P01a.npz"
    # One voxel at the right, in front and above the middle, of a volume of 3 x 5 x 7 voxels, 1 x 2 x 4 mm each.
    volume = np.zeros((3, 5, 7), np.uint8)
    volume[2, 4, 6] = 1
    turn = nib.orientations.ornt_transform(nib.orientations.axcodes2ornt("RAS"), nib.orientations.axcodes2ornt(codes))
    stored = np.moveaxis(nib.orientations.apply_orientation(volume, turn), -1, 0)
    sizes = {"R": 1.0, "L": 1.0, "A": 2.0, "P": 2.0, "S": 4.0, "I": 4.0}
    spacing = [sizes[code] for code in codes[:2]]
    arrays = dict(np.load(path)) | {"image": stored[None], "label": stored, "pred": stored}
    np.savez(
        path,
        **arrays
        | {"slices": range(len(stored)), "spacing": spacing, "channel_names": ["MR"]}
        | {"axcodes": list(codes)},
    )
    shown = read_pictures(path)
    edges = {"S": ("R", "A"), "I": ("R", "A"), "A": ("R", "S"), "P": ("R", "S"), "L": ("A", "S"), "R": ("A", "S")}
    assert shown.edges == edges[codes[2]]
    assert shown.spacing == tuple(sizes[edge] for edge in shown.edges)
    (place,) = np.argwhere(shown.label)
    assert tuple(place[1:]) == (0, 0)  # from left to right, from top to bottom
    np.testing.assert_array_equal(shown.pred, shown.label)
    np.testing.assert_array_equal(shown.image[0], shown.label)


def test_pictures_without_directions_stay_as_stored(make_run: MakeRun) -> None:
    path = make_run(iterations=20, patients=["P01"]) / "pictures" / "P01a.npz"
    shown = read_pictures(path)
    assert shown.edges is None
    np.testing.assert_array_equal(shown.label, np.load(path)["label"])
