"""Parts of a dataset by patient: train, val and test, or folds and test."""

import difflib
import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from medseg.errors import DatasetError, LeakageError

Splits = dict[str, Any]

#: What a column with published parts may call each of them.
PART_NAMES = {"train": "train", "training": "train", "val": "val", "validation": "val", "test": "test"}


def make_splits(
    cases: pd.DataFrame,
    *,
    seed: int,
    fractions: Sequence[float] = (0.7, 0.1, 0.2),
    folds: int | None = None,
    test_fraction: float = 0.0,
    stratify: str | None = None,
    column: str | None = None,
) -> Splits:
    """Split cases by patient into train, val and test, or into folds and test.

    A patient is never divided, however many cases belong to it. The number of patients of every part is its share of
    all patients to within one (no part with a share is left empty), and within these numbers every stratum is divided
    as nearly by the shares as whole patients allow. Which patient goes where depends only on the set of patients,
    their strata and the seed: not on the order of the rows, not on the number of cases of a patient, and, since the
    patients are shuffled by SHA-256, not on the version of a random number generator.

    Args:
        cases: a row per case with the columns ``case`` and ``patient``, as in ``cases.csv``.
        seed: another seed gives another split.
        fractions: shares of train, val and test; they add up to 1, and test may be 0.
        folds: make this many folds instead: each is once the val part, and the others are its train part.
        test_fraction: share of the patients that ``folds`` leaves out of all folds.
        stratify: column with the stratum of a case (a tumor stage, a hospital); an empty value is a stratum too.
        column: column with the part that was published for a case (train or training, val or validation, test). It is
            kept: val and test are those of the column. Where it has no val, its training part is divided, into train
            and val in the proportion of the first two fractions, or into ``folds``.

    Returns:
        the content of ``splits.json``, which is ``seed``, ``stratify``, ``column`` where it was given, ``folds`` and
        ``test``, a list of cases. An entry of ``folds`` is ``{"train": [case, ...], "val": [case, ...]}``; it is the
        only one when ``folds`` is not given.

    Raises:
        DatasetError: too few patients, a column that is not there, a patient of two strata or without a name, a case
            listed twice, shares that do not add up, a part of another name.
        LeakageError: the column has a patient in two parts.

    Example:
        >>> cases = pd.DataFrame({"case": [f"c{i}" for i in range(10)], "patient": [f"p{i}" for i in range(10)]})
        >>> splits = make_splits(cases, seed=0)
        >>> [len(splits["folds"][0]["train"]), len(splits["folds"][0]["val"]), len(splits["test"])]
        [7, 1, 2]
        >>> len(make_splits(cases, seed=0, folds=5)["folds"])
        5
        >>> published = cases.assign(official_part=["training"] * 8 + ["test"] * 2)
        >>> splits = make_splits(published, seed=0, column="official_part")
        >>> [len(splits["folds"][0]["train"]), len(splits["folds"][0]["val"]), splits["test"]]
        [7, 1, ['c8', 'c9']]
    """
    if column is not None:
        return _published(cases, column, seed=seed, fractions=fractions, folds=folds, stratify=stratify)
    if folds is None:
        shares = _checked_fractions(fractions)
    else:
        if folds < 2:
            raise DatasetError(f"folds: {folds} given, at least 2 expected")
        if not 0 <= test_fraction < 1:
            raise DatasetError(f"test_fraction: {test_fraction:g} given, a share from 0 to below 1 expected")
        shares = np.array([(1 - test_fraction) / folds] * folds + [test_fraction])
    strata = _strata(cases, stratify)
    needed = int(np.count_nonzero(shares))
    n_patients = sum(len(patients) for patients in strata.values())
    if n_patients < needed:
        raise DatasetError(
            f"cases: {n_patients} patient(s) cannot fill {needed} parts; add patients or ask for fewer parts"
        )

    counts = _allocate([len(patients) for patients in strata.values()], shares, seed)
    part_of: dict[str, int] = {}
    for (stratum, patients), row in zip(strata.items(), counts, strict=True):
        shuffled = sorted(patients, key=lambda patient: (_draw(seed, stratum, patient), patient))
        part_of.update(zip(shuffled, np.repeat(np.arange(len(shares)), row).tolist(), strict=True))

    parts: list[list[str]] = [[] for _ in shares]
    for case, patient in zip(cases["case"].astype(str), cases["patient"].astype(str), strict=True):
        parts[part_of[patient]].append(case)
    for part in parts:
        part.sort()
    test = parts.pop()
    if folds is None:
        fold_list = [{"train": parts[0], "val": parts[1]}]
    else:
        fold_list = [
            {"train": sorted(case for other in parts if other is not val for case in other), "val": val}
            for val in parts
        ]
    return {"seed": seed, "stratify": stratify, "folds": fold_list, "test": test}


def check_splits(splits: Mapping[str, Any], cases: pd.DataFrame, *, name: str = "splits.json") -> None:
    """Check that splits name every case once per fold and no patient in two parts.

    Args:
        splits: the content of ``splits.json``, as :func:`make_splits` returns it.
        cases: a row per case with the columns ``case`` and ``patient``.
        name: what the messages call the splits.

    Raises:
        LeakageError: a patient stands in two parts of a fold.
        DatasetError: the form is not that of ``splits.json``; a part is empty; a case is unknown, missing or twice.

    Example:
        >>> cases = pd.DataFrame({"case": ["a1", "a2", "b"], "patient": ["A", "A", "B"]})
        >>> check_splits({"seed": 0, "stratify": None, "folds": [{"train": ["a1"], "val": ["a2", "b"]}], "test": []},
        ...              cases)
        Traceback (most recent call last):
        medseg.errors.LeakageError: splits.json: patient A is in train (case a1) and in val (case a2) of fold 0; ...
    """
    for error in find_split_errors(splits, cases, name=name):
        raise error


def find_split_errors(
    splits: Mapping[str, Any], cases: pd.DataFrame, *, name: str = "splits.json"
) -> Iterator[DatasetError]:
    """Give every error that :func:`check_splits` could raise, one for each patient or case that is wrong.

    Yields:
        :class:`~medseg.errors.LeakageError` for a patient in two parts,
        :class:`~medseg.errors.DatasetError` for anything else.

    Example:
        >>> cases = pd.DataFrame({"case": ["a", "b"], "patient": ["A", "B"]})
        >>> [str(error) for error in find_split_errors({"folds": [{"train": ["a"], "val": []}], "test": []}, cases)]
        ['splits.json: the val part of fold 0 is empty; run `data_prep split` again',
         'splits.json: case b is in no part of fold 0; run `data_prep split` again']
    """
    patient_of = dict(zip(cases["case"].astype(str), cases["patient"].astype(str).str.strip(), strict=True))
    try:
        folds = _parts_per_fold(splits, name)
    except DatasetError as error:
        yield error
        return
    for fold, parts in enumerate(folds):
        seen: dict[str, tuple[str, str]] = {}
        listed: set[str] = set()
        leaks: set[str] = set()
        for part, members in parts.items():
            if not members and part != "test":
                yield DatasetError(f"{name}: the {part} part of fold {fold} is empty; run `data_prep split` again")
            for case in members:
                if case not in patient_of:
                    near = difflib.get_close_matches(case, patient_of, n=1)
                    hint = f" (nearest: {near[0]})" if near else ""
                    yield DatasetError(f"{name}: case {case} in {part} of fold {fold} is not in cases.csv{hint}")
                    continue
                patient = patient_of[case]
                other, other_case = seen.setdefault(patient, (part, case))
                if other != part and patient not in leaks:
                    leaks.add(patient)
                    yield LeakageError(
                        f"{name}: patient {patient} is in {other} (case {other_case}) and in {part} (case {case}) "
                        f"of fold {fold}; a patient may be in one part only: run `data_prep split` again"
                    )
                elif case in listed:
                    yield DatasetError(f"{name}: case {case} is listed twice in {part} of fold {fold}; list it once")
                listed.add(case)
        for case in sorted(set(patient_of) - listed):
            yield DatasetError(f"{name}: case {case} is in no part of fold {fold}; run `data_prep split` again")


def split_table(splits: Mapping[str, Any], cases: pd.DataFrame) -> pd.DataFrame:
    """Count patients, cases and, where the split is stratified, the patients of every stratum in each part.

    Returns:
        a row per part (``train``, ``val``, ``test``, or ``fold 0``, ``fold 1``, … by their val parts, and
        ``test``) with the columns ``part``, ``patients``, ``cases`` and one column per stratum.

    Example:
        >>> cases = pd.DataFrame({"case": list("abcd"), "patient": list("ABCD"), "stage": ["I", "II", "I", "II"]})
        >>> split_table(make_splits(cases, seed=1, folds=2, stratify="stage"), cases)
             part  patients  cases  I  II
        0  fold 0         2      2  1   1
        1  fold 1         2      2  1   1
        2    test         0      0  0   0
    """
    folds = splits["folds"]
    parts = dict(folds[0]) if len(folds) == 1 else {f"fold {i}": fold["val"] for i, fold in enumerate(folds)}
    parts["test"] = splits["test"]
    column = splits.get("stratify")
    strata = sorted(set(_stratum_values(cases, column))) if column else []
    by_case = cases.assign(case=cases["case"].astype(str)).set_index("case")
    rows = []
    for part, members in parts.items():
        rows_of_part = by_case.loc[members].drop_duplicates("patient")
        row: dict[str, Any] = {"part": part, "patients": len(rows_of_part), "cases": len(members)}
        if column:
            values = list(_stratum_values(rows_of_part, column))
            row.update({stratum or "(empty)": values.count(stratum) for stratum in strata})
        rows.append(row)
    return pd.DataFrame(rows)


def _published(
    cases: pd.DataFrame,
    column: str,
    *,
    seed: int,
    fractions: Sequence[float],
    folds: int | None,
    stratify: str | None,
) -> Splits:
    """The split that a column holds; its training part is divided where it has no val part."""
    _strata(cases, None)  # a row per case
    names = _values(cases, column, "with published parts")
    rows: dict[str, list[int]] = {"train": [], "val": [], "test": []}
    part_of: dict[str, str] = {}
    for row, (case, patient, name) in enumerate(zip(cases["case"], cases["patient"].astype(str), names, strict=True)):
        part = PART_NAMES.get(name.strip().lower())
        if part is None:
            raise DatasetError(
                f"cases: case {case} has {name!r} in the column {column!r}; {', '.join(PART_NAMES)} expected"
            )
        if part_of.setdefault(patient, part) != part:
            raise LeakageError(
                f"cases: the column {column!r} has patient {patient} in {part_of[patient]} and in {part}; a patient "
                "may be in one part only"
            )
        rows[part].append(row)
    listed = {part: sorted(cases["case"].iloc[numbers].astype(str)) for part, numbers in rows.items()}
    if not listed["train"]:
        raise DatasetError(f"cases: no case is in train, by the column {column!r}; expected some")
    if listed["val"] and folds is not None:
        raise DatasetError(f"cases: the column {column!r} has a val part: leave folds out")
    if listed["val"]:
        fold_list = [{"train": listed["train"], "val": listed["val"]}]
    else:
        train, val, _ = _checked_fractions(fractions)
        shares = (train / (train + val), val / (train + val), 0.0)
        training = cases.iloc[rows["train"]]
        fold_list = make_splits(training, seed=seed, fractions=shares, folds=folds, stratify=stratify)["folds"]
    return {"seed": seed, "stratify": stratify, "column": column, "folds": fold_list, "test": listed["test"]}


def _checked_fractions(fractions: Sequence[float]) -> NDArray[np.float64]:
    shares = np.array(fractions, dtype=np.float64)
    given = " ".join(f"{share:g}" for share in shares)
    if shares.shape != (3,) or not np.isfinite(shares).all() or (shares < 0).any() or (shares[:2] == 0).any():
        raise DatasetError(f"fractions: {given} given, three shares for train, val and test expected (test may be 0)")
    if not math.isclose(shares.sum(), 1, abs_tol=1e-6):
        raise DatasetError(f"fractions: {given} add up to {shares.sum():g}, 1 expected")
    return shares / shares.sum()


def _stratum_values(cases: pd.DataFrame, column: str) -> pd.Series:
    return _values(cases, column, "to stratify by")


def _values(cases: pd.DataFrame, column: str, purpose: str) -> pd.Series:
    """A column as text, empty where it says nothing."""
    if column not in cases.columns:
        near = difflib.get_close_matches(column, list(cases.columns), n=3, cutoff=0.4) or list(cases.columns)
        raise DatasetError(f"cases: no column {column!r} {purpose}; nearest: {', '.join(map(str, near))}")
    values = cases[column]
    return values.astype(object).where(values.notna(), "").astype(str)


def _strata(cases: pd.DataFrame, column: str | None) -> dict[str, list[str]]:
    """Patients of every stratum; the strata are sorted."""
    for needed in ("case", "patient"):
        if needed not in cases.columns:
            raise DatasetError(f"cases: the column {needed!r} is missing")
    twice = cases["case"][cases["case"].duplicated()]
    if len(twice):
        raise DatasetError(f"cases: case {twice.iloc[0]} is listed twice; a case has one row")
    patients = _values(cases, "patient", "with patients")
    for case, patient in zip(cases["case"], patients, strict=True):
        if not patient or patient != patient.strip():  # one patient by two names would be in two parts
            raise DatasetError(f"cases: case {case} has the patient {patient!r}; a name, no space around it, expected")
    stratum_of: dict[str, str] = {}
    for patient, stratum in zip(patients, _stratum_values(cases, column) if column else [""] * len(cases), strict=True):
        if stratum_of.setdefault(patient, stratum) != stratum:
            found = " and ".join(sorted({repr(stratum_of[patient]), repr(stratum)}))
            raise DatasetError(
                f"cases: patient {patient} has {found} in the column {column!r}; "
                "a patient has one stratum: correct cases.csv or choose another column"
            )
    strata: dict[str, list[str]] = {stratum: [] for stratum in sorted(set(stratum_of.values()))}
    for patient, stratum in stratum_of.items():
        strata[stratum].append(patient)
    if column and list(strata) == [""]:
        raise DatasetError(f"cases: the column {column!r} is empty, so there is nothing to stratify by")
    if len(strata) == len(stratum_of) > 2:
        raise DatasetError(
            f"cases: the column {column!r} has another value for each of the {len(stratum_of)} patients; "
            "stratify by a column with a few categories"
        )
    return strata


def _totals(n: int, shares: NDArray[np.float64]) -> NDArray[np.int64]:
    """Divide n patients by shares, largest remainder first, and leave no part with a share empty."""
    quotas = n * shares
    totals = np.floor(quotas + 1e-9).astype(np.int64)
    remainders = quotas - totals
    totals[np.argsort(-remainders, kind="stable")[: n - totals.sum()]] += 1
    for part in np.flatnonzero((totals == 0) & (shares > 0)):
        totals[np.argmax(totals)] -= 1
        totals[part] = 1
    return totals


def _allocate(sizes: Sequence[int], shares: NDArray[np.float64], seed: int) -> NDArray[np.int64]:
    """Divide the patients of each stratum among the parts: an integer table [stratum, part].

    Rows add up to the sizes of the strata, columns to the totals of the parts, and the sum of squared differences to
    size × share is least. The squares are written as unit steps of increasing cost, which makes this a
    transportation problem: its linear program has a whole-numbered solution. Ties are broken by the seed.
    """
    from scipy.optimize import linprog  # a third of a second, which only a split need wait for

    totals = _totals(sum(sizes), shares)
    steps = [
        (s, p, k) for s, size in enumerate(sizes) for p, total in enumerate(totals) for k in range(min(size, total))
    ]
    # Going from k to k + 1 patients changes the square (k - target)² by 2 (k - target) + 1.
    costs = [2 * (k - sizes[s] * shares[p]) + 1 + 1e-4 * _draw(seed, s, p) for s, p, k in steps]
    strata, parts, _ = np.array(steps).T
    equations = np.concatenate(
        [strata == np.arange(len(sizes))[:, None], parts == np.arange(len(shares))[:, None]]
    ).astype(np.float64)
    solution = linprog(costs, A_eq=equations, b_eq=np.concatenate([sizes, totals]), bounds=(0, 1), method="highs-ds").x
    table = np.zeros((len(sizes), len(shares)), dtype=np.int64)
    np.add.at(table, (strata, parts), np.rint(solution).astype(np.int64))
    return table


def _draw(seed: int, *words: object) -> float:
    """A number from 0 to below 1 that depends on the seed and the words alone."""
    digest = hashlib.sha256("\0".join(map(str, (seed, *words))).encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def _parts_per_fold(splits: Mapping[str, Any], name: str) -> list[dict[str, list[str]]]:
    """The train, val and test lists of every fold, once the form is right."""
    form = f"{name}: expected folds (a list of train and val lists of cases) and test (a list of cases)"
    if not isinstance(splits, Mapping) or not isinstance(splits.get("folds"), list) or not splits["folds"]:
        raise DatasetError(f"{form}, found no folds; run `data_prep split` again")
    folds = []
    for number, fold in enumerate(splits["folds"]):
        parts = {**fold, "test": splits.get("test")} if isinstance(fold, Mapping) else {}
        if set(parts) != {"train", "val", "test"}:
            raise DatasetError(f"{form}, found {', '.join(map(str, parts)) or fold!r} in fold {number}")
        for part, members in parts.items():
            if not isinstance(members, list) or not all(isinstance(case, str) for case in members):
                raise DatasetError(f"{form}, found something else under {part} in fold {number}")
        folds.append({part: list(parts[part]) for part in ("train", "val", "test")})
    return folds
