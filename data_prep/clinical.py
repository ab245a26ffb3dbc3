"""Clinical tables: a row per patient, from which a stratum is taken."""

import difflib
from collections.abc import Sequence
from pathlib import Path

from medseg.errors import ConfigError, DatasetError

#: Stratum of a patient of whom the tables say nothing.
UNKNOWN = "unknown"


def read_strata(paths: Sequence[Path], id_column: str, stratum_column: str | None) -> dict[str, str] | None:
    """Stratum by patient identifier, from clinical tables."""
    if stratum_column is None or not paths:
        if stratum_column is not None or paths:
            raise ConfigError("--clinical FILE and --stratum-column NAME go together: give both or neither")
        return None
    import pandas as pd  # not before: a build without tables starts its workers sooner

    strata: dict[str, str] = {}
    found: set[str] = set()
    for path in paths:
        try:
            table = pd.read_csv(path, dtype=str, keep_default_na=False, sep=None, engine="python", encoding="utf-8-sig")
        except FileNotFoundError:
            raise ConfigError(f"--clinical: {path}: no such file") from None
        except (ValueError, UnicodeDecodeError, pd.errors.ParserError) as error:
            raise DatasetError(f"{path}: not a CSV table ({type(error).__name__})") from None
        found |= set(table.columns)
        if id_column not in table:
            near = difflib.get_close_matches(id_column, table.columns, n=1)
            hint = f" (nearest: {near[0]})" if near else ""
            raise ConfigError(
                f"--id-column: {path} has no column {id_column!r}{hint}; it has {', '.join(map(str, table.columns))}"
            )
        if stratum_column not in table:
            continue
        for patient, stratum in zip(table[id_column].str.strip(), table[stratum_column].str.strip(), strict=True):
            if strata.setdefault(patient, stratum or UNKNOWN) != (stratum or UNKNOWN):
                raise DatasetError(
                    f"{path}: a patient has {strata[patient]!r} and {stratum!r} in the column {stratum_column}; "
                    "expected one value per patient"
                )
    if stratum_column not in found:
        near = difflib.get_close_matches(stratum_column, found, n=1)
        hint = f" (nearest: {near[0]})" if near else ""
        raise ConfigError(f"--stratum-column: no column {stratum_column!r}{hint}; there are {', '.join(sorted(found))}")
    return strata
