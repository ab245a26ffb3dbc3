"""The report of runs: one HTML file, whole, escaped, honest about what is missing."""

import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from medseg.errors import DatasetError, ReadError
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
    # Curves, histogram, box plot, and three patients as each of two runs sees them.
    assert page.tags.count("img") == 3 + 6
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
    assert "No run has a metrics.csv" in page.words


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
    ("content", "message"),
    [
        ("split,level,case\ntest,case,a\n", "no column patient, label, dice"),
        (
            "split,level,case,patient,label,dice\ntest,case,a,a,gtv,high\n",
            "column dice holds 'high', expected a number",
        ),
    ],
)
def test_scores_that_are_none(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "scores.csv").write_text(content)
    with pytest.raises(DatasetError, match=message):
        read_run(tmp_path)


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


def test_pictures_stand_as_a_radiologist_sees_them(make_run: MakeRun) -> None:
    run = make_run(iterations=20, patients=["P01"])
    path = run / "pictures" / "P01a.npz"
    stored = read_pictures(path)
    arrays = dict(np.load(path))
    np.savez(path, **arrays, axcodes=np.array(["R", "A", "S"]))
    turned = read_pictures(path)
    np.testing.assert_array_equal(turned.label, stored.label[:, ::-1, ::-1])
    np.testing.assert_array_equal(turned.image, stored.image[:, :, ::-1, ::-1])
    np.savez(path, **arrays, axcodes=np.array(["L", "P", "S"]))
    np.testing.assert_array_equal(read_pictures(path).pred, stored.pred)
