"""No byte that data_prep writes or prints tells who a patient is, but for the key."""

import base64
import gzip
import html
import os
import re
import shutil
import subprocess
import sys
import unicodedata
from pathlib import Path
from urllib.parse import quote

import h5py
import nibabel as nib
import numpy as np
import pydicom
import pytest
from pydicom.dataelem import DataElement

from data_prep.phantom import write_cohort

#: What is planted, as it may turn up: names, numbers, dates, a hospital.
PLANTED = (
    *("Mustermann", "Erika", "Musterfrau", "SECRET-471108151", "47110815", "19620812", "1962-08-12", "12.08.1962"),
    *("20190305", "99887766", "Radiumklinikken", "Haukeland", "0305_visit", "Hülsmeyer", "Review-Er", "D5-OTHER"),
)
TAGS = {
    "PatientName": "Mustermann^Erika",
    "PatientBirthName": "Musterfrau",
    "PatientBirthDate": "19620812",
    "OtherPatientIDs": "ID471108151",
    "AccessionNumber": "ACC99887766",
    "StudyDescription": "SECRET-471108151 at Haukeland",
    "SeriesDescription": "head of Mustermann 12.08.1962",
    "InstitutionName": "Radiumklinikken",
    "ReferringPhysicianName": "Musterfrau^Doctor",
    "PatientComments": "Erika was born 1962-08-12",
    "OtherPatientNames": ["Hülsmeyer^E", "Musterfrau"],
}


@pytest.fixture
def sandbox(tmp_path: Path) -> Path:
    """A home of its own: whatever a command writes anywhere but in the source lies below it."""
    for name in ("home", "temporary", "work"):
        (tmp_path / "sandbox" / name).mkdir(parents=True)
    return tmp_path / "sandbox"


def call(sandbox: Path, *words: object) -> subprocess.CompletedProcess[str]:
    """Type a data_prep command in the sandbox; its output is kept there as a file too, to be searched like the rest."""
    home, temporary = sandbox / "home", sandbox / "temporary"
    known = {name: value for name, value in os.environ.items() if not name.startswith("XDG_")}
    environment = known | {"HOME": str(home), "TMPDIR": str(temporary), "COLUMNS": "500"}
    command = [sys.executable, "-m", "data_prep", *map(str, words)]
    done = subprocess.run(command, cwd=sandbox / "work", env=environment, capture_output=True, text=True, timeout=300)
    number = len(list(sandbox.glob("*.log")))
    (sandbox / f"{number}.log").write_text(done.stdout + done.stderr)
    return done


def contents(path: Path) -> bytes:
    """Everything that a file says, unpacked."""
    data = path.read_bytes()
    if path.name.endswith(".gz"):
        data += gzip.decompress(data)
    if path.suffix == ".h5":
        with h5py.File(path) as file:
            found: list[bytes] = []
            file.visititems(lambda name, item: found.append(f"{name} {dict(item.attrs)}".encode()))
            data += b"".join(found) + str(dict(file.attrs)).encode()
    if path.suffix == ".html":  # pictures are searched for text as well, and must not be mistaken for it
        for picture in re.findall(rb"data:[\w/+;-]+base64,([A-Za-z0-9+/=]+)", data):
            data = data.replace(picture, base64.b64decode(picture))
    return data


def spelled(word: str) -> set[bytes]:
    """A word as a file may hold it."""
    forms = {word, unicodedata.normalize("NFD", word), html.escape(word), quote(word), ascii(word)[1:-1]}
    forms |= {word.encode("ascii", "xmlcharrefreplace").decode(), word.replace("ü", "&uuml;")}
    return {form.encode() for form in forms} | {word.encode(code) for code in ("latin-1", "utf-16-le", "utf-16-be")}


def leaks(sandbox: Path, source: Path, words: tuple[str, ...] = PLANTED) -> list[str]:
    found = []
    uids = {str(pydicom.dcmread(path).StudyInstanceUID) for path in source.rglob("*.dcm") if path.stat().st_size > 4096}
    for path in sorted(path for path in sandbox.rglob("*") if path.is_file() and path.suffix != ".key"):
        text = path.relative_to(sandbox).as_posix().encode() + b"\n" + contents(path)
        # The source was named on the command line, so its own folder may be repeated.
        text = text.replace(str(source).encode(), b"")
        found += [
            f"{word} in {path.relative_to(sandbox)}"
            for word in (*words, *uids)
            if any(form in text for form in spelled(word))
        ]
    return found


def spoil(source: Path) -> None:
    """Plant identifiers in headers, paths and a spreadsheet; let some cases fail, so that errors speak of them."""
    patients = sorted(path for path in source.iterdir() if path.is_dir())
    for number, folder in enumerate(patients):
        for path in folder.rglob("*.dcm"):
            header = pydicom.dcmread(path)
            for keyword, value in TAGS.items():
                setattr(header, keyword, value)
            header.SpecificCharacterSet = "ISO_IR 192" if number else "ISO_IR 100"
            header.PatientID = f"SECRET-47110815{number}"
            header.StudyDate = "20190305"
            header.OtherPatientIDsSequence = [pydicom.Dataset()]
            header.OtherPatientIDsSequence[0].PatientID = "D5-OTHER"
            header.add(DataElement("PatientBirthTime", "TM", "12.08.1962", validation_mode=pydicom.config.IGNORE))
            if number == 2 and header.Modality == "PT":
                header.PatientWeight = None
            header.save_as(path)
        folder.rename(source / f"Mustermann Erika 19620812 47110815{number} Radiumklinikken")
    structure = next((source / "Mustermann Erika 19620812 471108151 Radiumklinikken" / "RTSTRUCT").glob("*"))
    header = pydicom.dcmread(structure)
    header.ReviewerName = "Review-Er"
    header.StructureSetROISequence[-1].ROIName = "LN_Mustermann Review-Er D5-OTHER " + unicodedata.normalize(
        "NFD", "Hülsmeyer"
    )
    header.save_as(structure)
    damaged = sorted((source / "Mustermann Erika 19620812 471108150 Radiumklinikken" / "CT").glob("*"))[3]
    damaged.write_bytes(damaged.read_bytes()[:3000])
    (source / "Mustermann notes 99887766.txt").write_text("Erika")


def test_nothing_of_a_petct_cohort_tells_who_it_is(sandbox: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    write_cohort(source, patients=5, seed=5, image_size=48, slices=12)
    (source / "clinical.csv").unlink()
    spoil(source)
    table = source / "Mustermann 19620812.csv"
    table.write_text("patient_id,stage\n" + "".join(f"SECRET-47110815{n},T{n % 2}\n" for n in range(4)))
    call(sandbox, "inspect", source, "--no-cache", "--html", "page.html")
    words = ("build", "petct", source, "out", "--roi", "GTV", "--roi", "LN*", "--jobs", 2)
    clinical = ("--clinical", table, "--stratum-column", "stage")
    done = call(sandbox, "--debug", *words, *clinical)
    assert done.returncode == 1, done.stderr
    assert "3 built" in done.stdout
    assert "PatientWeight" in done.stderr
    assert "Warning" not in done.stderr  # pydicom's quote the header
    assert call(sandbox, "split", "out", "--fractions", 0.34, 0.33, 0.33).returncode == 0
    assert call(sandbox, "slices", "out").returncode == 0
    call(sandbox, "check", "out")
    for wrong in (("--roi", "Nobody*"), ("--roi", "GTV", "--crop", 1, 1, 1)):  # errors that end a build
        assert call(sandbox, *words[:3], "other", *wrong).returncode == 1
    assert leaks(sandbox, source) == []
    known = (sandbox / "work" / "out.key").read_text()
    assert "SECRET-471108151" in known
    assert "Mustermann Erika 19620812 471108151 Radiumklinikken/CT/" in known
    assert (sandbox / "work" / "out.key").stat().st_mode & 0o777 == 0o600


def test_nothing_of_ready_files_tells_who_it_is(sandbox: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    for folder in ("images", "labels"):
        (source / folder).mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number in range(4):
        name = f"Mustermann_Erika_47110815{number}_19620812_0305_visit.nii.gz"
        label = np.zeros((12, 12, 8), np.uint8)
        label[3:7, 3:8, 2:6] = 1
        header = nib.Nifti1Header()
        header["descrip"] = b"Mustermann 19620812"
        header["db_name"] = b"SECRET-471108151"
        image = nib.Nifti1Image(rng.normal(size=label.shape).astype(np.float32), np.eye(4), header)
        nib.save(image, source / "images" / name)
        nib.save(nib.Nifti1Image(label, np.eye(4), header), source / "labels" / name)
    images = sorted((source / "images").iterdir())
    images[0].write_bytes(images[0].read_bytes()[:200])
    spaced = "Mustermann  Erika\n19620812.nii.gz"  # which no message shows as it is
    (source / "images" / spaced).write_bytes(images[0].read_bytes())
    shutil.copy(source / "labels" / images[1].name, source / "labels" / spaced)
    shutil.copy(images[1], source / "images" / "Mustermann_alone.nii.gz")
    done = call(sandbox, "--debug", "build", "folder", source, "out", "--jobs", 2, "--clinical", "x.csv")
    assert done.returncode == 1
    done = call(sandbox, "--debug", "build", "folder", source, "out", "--jobs", 2)
    assert done.returncode == 1, done.stderr
    assert "3 built, 2 failed, 1 unpaired" in done.stdout
    # The second time two of the labels have vanished and one is no mask any more.
    (source / "labels" / images[1].name).unlink()
    nib.save(nib.Nifti1Image(np.full((12, 12, 8), 0.5, np.float32), np.eye(4)), source / "labels" / images[2].name)
    done = call(sandbox, "build", "folder", source, "out", "--jobs", 2, "--patient-pattern", r"_(\d{9})_")
    done = call(sandbox, "build", "folder", source, "out", "--jobs", 2, "--patient-pattern", r"(x)")
    assert done.returncode == 1
    call(sandbox, "check", "out")
    assert leaks(sandbox, source, (*PLANTED, "alone")) == []


DESCRIPTION = """
name: described
channels: {T1: "{patient}/T1_*.nii.gz"}
label: {masks: {lesion: "{patient}/mask.nii.gz"}}
"""


def test_nothing_of_a_recipe_of_ones_own_tells_who_it_is(sandbox: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    rng = np.random.default_rng(0)
    for number in range(4):
        folder = source / f"Mustermann Erika 47110815{number}"
        folder.mkdir(parents=True)
        mask = np.zeros((8, 8, 8), np.uint8)
        mask[2:5, 2:5, 2:5] = 1
        image = nib.Nifti1Image(rng.normal(size=mask.shape).astype(np.float32), np.eye(4))
        nib.save(image, folder / "T1_19620812_Radiumklinikken.nii.gz")
        nib.save(nib.Nifti1Image(mask * (1 + 0.5 * (number == 1)), np.eye(4)), folder / "mask.nii.gz")
    (source / "Mustermann Erika 471108152" / "mask.nii.gz").unlink()
    damaged = next((source / "Mustermann Erika 471108153").glob("T1*"))
    damaged.write_bytes(damaged.read_bytes()[:300])
    (sandbox / "work" / "own.yaml").write_text(DESCRIPTION)
    done = call(sandbox, "--debug", "build", "own.yaml", source, "out", "--jobs", 2)
    assert "1 built, 2 failed, 1 unpaired" in done.stdout, done.stderr
    assert leaks(sandbox, source) == []
