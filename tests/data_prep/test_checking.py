"""Tables as recipes read them: a row is taken as it is, or refused by its line."""

from pathlib import Path

import pytest

from data_prep.recipes.checking import read_table
from medseg.errors import DatasetError


def test_rows_by_title_and_line(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_text('id;age;\n"A;1"; 40 ;\n;;;\nB\n', encoding="utf-8")
    assert read_table(path, ("id", "age")) == [
        {"id": "A;1", "age": "40", "": "", "line": "2"},
        {"id": "B", "age": "", "": "", "line": "4"},
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("id,age\nA,1,5\n", "line 2: 3 cells, 2 expected as there are titles"),  # 1,5 years? the rest would be shifted
        ("id,age,age\nA,1,2\n", "2 columns 'age'; it has id, age, age"),
        ("id\nA\n", "no column 'age'; it has id"),
        ("", "no column 'id'; it has none"),
        ('id,age\n"A,1\n', "not a CSV file in UTF-8"),
    ],
)
def test_a_table_that_could_be_misread_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "table.csv"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DatasetError) as caught:
        read_table(path, ("id", "age"))
    assert message in str(caught.value)
