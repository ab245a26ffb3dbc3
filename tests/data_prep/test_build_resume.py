"""What makes a case be made again, and nothing else does."""

import dataclasses
import enum
import gzip
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep import build as build_module
from data_prep import fingerprint as fingerprint_module
from data_prep.build import BuildResult, build_dataset
from data_prep.fingerprint import describe_case, fingerprint, hash_files
from data_prep.recipes import recipe_class
from data_prep.recipes.base import Case
from data_prep.recipes.folder import FolderRecipe
from medseg.errors import DatasetError

HERE = Path(__file__).parent


@pytest.fixture
def light(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module light_recipe."""
    monkeypatch.syspath_prepend(HERE)
    import light_recipe

    return light_recipe


def build(light: Any, source: Path, out: Path, **options: Any) -> BuildResult:
    recipe = light.LightRecipe(light.LightOptions(**options))
    return build_dataset(recipe, source, out, jobs=1, report=False, keep_identifiers=True)


def tree(root: Path) -> dict[str, str]:
    return {
        path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in root.rglob("*")
        if path.is_file()
    }


def test_only_a_change_of_content_makes_a_case_again(light: Any, tmp_path: Path) -> None:
    source, out = light.write_source(tmp_path / "source", 4, "first, second"), tmp_path / "out"
    assert len(build(light, source, out).built) == 4
    before = tree(out)

    for path in source.rglob("a"):
        os.utime(path, ns=(1, 1))
    assert build(light, source, out).built == []
    assert tree(out) == before

    content = (source / "p001" / "a").read_bytes()
    (source / "p001" / "a").write_bytes(content[:-2] + b"x" + content[-1:])  # one byte
    assert build(light, source, out).built == ["p001"]
    (source / "p001" / "a").write_bytes(content)
    assert build(light, source, out).built == ["p001"]
    assert tree(out) == before

    (source / "p002" / "b").write_bytes(b"one more file")
    assert build(light, source, out).built == ["p002"]
    (source / "p002" / "b").unlink()
    assert build(light, source, out).built == ["p002"]
    assert tree(out) == before

    (source / "p003" / "a").rename(source / "p003" / "c")  # a recipe may read names
    assert build(light, source, out).built == ["p003"]
    (source / "p003" / "c").rename(source / "p003" / "a")
    build(light, source, out)
    assert tree(out) == before

    moved = (tmp_path / "moved").resolve()
    source.rename(moved)  # but not where the source lies
    assert build(light, moved, out).built == []


MHD = "ObjectType = Image\nNDims = 3\nDimSize = 4 4 4\nElementType = MET_UCHAR\nElementSpacing = 1 1 1\n"
NRRD = "NRRD0004\ntype: uchar\ndimension: 3\nspace: left-posterior-superior\nsizes: 4 4 4\nencoding: {}\n"
NRRD += "space directions: (1,0,0) (0,1,0) (0,0,1)\nspace origin: (0,0,0)\nkinds: domain domain domain\n"
DESCRIBED = "name: x\nchannels: {A: 'images/{patient}.SUFFIX'}\nlabel: {masks: {a: 'labels/{patient}.nii'}}\n"


@pytest.mark.parametrize(
    ("header", "text", "data"),
    [
        ("p.mhd", MHD + "ElementDataFile = other.raw\n", "other.raw"),
        ("p.mhd", MHD + "ElementDataFile = p.dat\n", "p.dat"),
        ("p.mha", MHD + "ElementDataFile = voxels/q.bin\n", "voxels/q.bin"),
        ("p.nhdr", NRRD.format("gzip") + "data file: p.raw.gz\n", "p.raw.gz"),
        ("p.nhdr", NRRD.format("raw") + "datafile: q.raw\r\n", "q.raw"),
        ("p.hdr", "", "p.img"),
    ],
    ids=["mhd", "dat", "mha", "nhdr", "datafile", "hdr"],
)
def test_voxels_behind_a_header_count(tmp_path: Path, header: str, text: str, data: str) -> None:
    source = tmp_path / "source"
    for folder in ("images", "labels"):
        (source / folder).mkdir(parents=True)
    nib.save(nib.Nifti1Image(np.ones((4, 4, 4), np.uint8), np.diag([-1.0, -1, 1, 1])), source / "labels" / "p.nii")
    (source / "images" / data).parent.mkdir(exist_ok=True)

    def write(value: int) -> None:
        if header == "p.hdr":
            image = nib.Nifti1Pair(np.full((4, 4, 4), value, np.uint8), np.diag([-1.0, -1, 1, 1]))
            nib.save(image, source / "images" / header)
            return
        content = bytes([value]) * 64
        (source / "images" / header).write_text(text, newline="")
        (source / "images" / data).write_bytes(gzip.compress(content) if data.endswith("gz") else content)

    recipe = tmp_path / "x.yaml"
    recipe.write_text(DESCRIBED.replace("SUFFIX", header.partition(".")[2]))
    for number, cls in enumerate((FolderRecipe, recipe_class(str(recipe)))):
        write(1)
        result = build_dataset(cls(), source, tmp_path / f"{number}", jobs=1, report=False)
        assert (len(result.built), result.unpaired) == (1, [])
        write(2)
        result = build_dataset(cls(), source, tmp_path / f"{number}", jobs=1, report=False)
        assert len(result.built) == 1


def test_an_option_or_a_version_makes_all_again(light: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = light.write_source(tmp_path / "source", 3, "x"), tmp_path / "out"
    build(light, source, out)
    assert len(build(light, source, out, offset=2.0).built) == 3
    assert build(light, source, out, offset=2.0).built == []
    for library in ("torch", "SimpleITK", "zlib", "medseg"):
        other = fingerprint_module.versions() | {library: "0.0"}
        with monkeypatch.context() as patch:
            patch.setattr(build_module, "versions", lambda other=other: other)
            assert len(build(light, source, out, offset=2.0).built) == 3, library
            assert json.loads((out / "manifest.json").read_text())["versions"][library] == "0.0"
    assert len(build(light, source, out, offset=2.0).built) == 3


def test_a_survey_that_reads_an_option_is_done_again(light: Any, tmp_path: Path) -> None:
    source = light.write_source(tmp_path / "source", 3, "x")
    build(light, source, tmp_path / "out")
    build(light, source, tmp_path / "out", base=5)
    build(light, source, tmp_path / "fresh", base=5)
    assert tree(tmp_path / "out") == tree(tmp_path / "fresh")
    assert str(ord("x") + 5) in (tmp_path / "out" / "dataset.json").read_text()


def test_surveys_of_cases_that_hold_are_kept(light: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = light.write_source(tmp_path / "source", 3, "x"), tmp_path / "out"
    build(light, source, out)
    seen = []
    survey = light.LightRecipe.survey
    monkeypatch.setattr(light.LightRecipe, "survey", lambda self, case: seen.append(case.name) or survey(self, case))
    (source / "p001" / "a").write_text("x another")
    build(light, source, out)
    assert seen == ["p001"]


def test_what_a_recipe_knows_of_a_case_counts(light: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = light.write_source(tmp_path / "source", 3, "x"), tmp_path / "out"
    select, target = light.LightRecipe.select, {"p001": "benign"}

    def select_with_table(self: Any, source: Path) -> Any:
        found = select(self, source)
        cases = [dataclasses.replace(case, detail={"target": target.get(case.name)}) for case in found.cases]
        return dataclasses.replace(found, cases=cases)

    monkeypatch.setattr(light.LightRecipe, "select", select_with_table)
    build(light, source, out)
    assert build(light, source, out).built == []
    target["p001"] = "malignant"  # in a table, say
    assert build(light, source, out).built == ["p001"]


def test_a_fingerprint_of_secret_names_is_keyed(light: Any, tmp_path: Path) -> None:
    source = light.write_source(tmp_path / "source", 1, "x")
    found = []
    for number in range(2):
        build_dataset(light.LightRecipe(), source, tmp_path / f"{number}", jobs=1, report=False)
        cases = json.loads((tmp_path / f"{number}" / "manifest.json").read_text())["cases"]
        found += [record[key] for record in cases.values() for key in ("basis", "fingerprint")]
    assert len(set(found)) == 4


class Color(enum.StrEnum):
    RED = "red"


@dataclasses.dataclass(frozen=True)
class Detail:
    path: Path
    values: dict[tuple[int, int], Any]


def test_a_detail_is_told_by_its_content(tmp_path: Path) -> None:
    def described(root: Path, **change: Any) -> str:
        values = {(1, 2): np.arange(3), (0, 0): {"b", "a", root / "x"}, (3, 3): [b"\x01", Color.RED, np.float32(0.5)]}
        detail = Detail(root / "table.csv", values | change.pop("values", {}))
        case = Case("n", "p", {"CT": (root / "1.dcm", root / "2.dcm")}, detail=detail)
        hashes = {root / "1.dcm": "a", root / "2.dcm": "b"} | change.pop("hashes", {})
        return fingerprint(b"", describe_case(dataclasses.replace(case, **change), root, hashes))

    here = described(tmp_path)
    assert here == described(Path("/elsewhere"))
    assert here != described(tmp_path, name="m")
    assert here != described(tmp_path, patient="m")
    assert here != described(tmp_path, detail=None)
    assert here != described(tmp_path, values={(1, 2): np.arange(4)})
    assert here != described(tmp_path, hashes={tmp_path / "2.dcm": "c"})
    assert here != described(tmp_path, sources={"CT": (tmp_path / "2.dcm", tmp_path / "1.dcm")})
    with pytest.raises(DatasetError, match=r"Case\.detail cannot be compared .*: object found"):
        described(tmp_path, detail=[object()])


@given(st.lists(st.binary(max_size=50), max_size=30), st.integers(1, 4))
def test_files_are_hashed_in_order_whoever_hashes_them(tmp_path_factory: Any, contents: list[bytes], n: int) -> None:
    folder = tmp_path_factory.mktemp("files")
    files = []
    for number, content in enumerate(contents):
        files.append(folder / str(number))
        files[-1].write_bytes(content)
    absent = folder / "absent"
    found = list(hash_files([*files, absent], n))
    assert [file for file, _ in found] == [*files, absent]
    assert [digest for _, digest in found[:-1]] == [hashlib.sha256(content).hexdigest() for content in contents]
    assert isinstance(found[-1][1], FileNotFoundError)
