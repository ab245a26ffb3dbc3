"""The tables of the documentation say what medseg makes of every file of the real data; here they are made again."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.realdata

ROOT = Path(__file__).parents[2]
TABLES = ROOT / "docs" / "explanation" / "agreement"


def test_every_file_is_read_or_refused_as_the_tables_say(data):
    command = [sys.executable, str(ROOT / "benchmarks" / "agreement" / "run.py"), str(data), str(TABLES), "--check"]
    made = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert made.returncode == 0, made.stdout + made.stderr


def test_each_difference_from_a_reference_is_one_that_is_explained():
    page = (TABLES.parent / "agreement.md").read_text(encoding="utf-8")
    different = {
        row["name"]
        for path in TABLES.glob("*.csv")
        for row in csv.DictReader(path.open(encoding="utf-8"))
        if row["result"] == "read" and row["agreement"] not in ("", "equal") and row["what"] != "RTSTRUCT"
    }
    assert different
    assert {name for name in different if f"`{name}`" not in page} == set()
