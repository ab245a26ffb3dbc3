"""What would spoil a training, found before it starts."""

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping

import numpy as np
import pandas as pd

from medseg.data.check_case import CaseFiles, Finding, Look, check_case
from medseg.data.check_parts import check_balance, check_lists, check_slice_stores, members, read_splits
from medseg.data.duplicates import near_duplicates
from medseg.data.folder import FILE_ENDING, DatasetFolder
from medseg.data.problem import ERROR, WARNING, Problem
from medseg.io.threads import in_order
from medseg.metrics import outliers

#: What few of the cases have is worth a look: at most this share of them.
FEW = 0.1
#: Beyond how many interquartile ranges a spacing, a shape or a volume is odd (Tukey's "far out").
FAR_OUT = 3.0


def check_dataset(
    root: str | os.PathLike[str],
    progress: Callable[[int, int], None] | None = None,
    workers: int | None = None,
    look: Look | None = None,
) -> list[Problem]:
    """Read every file of a dataset and list what is wrong with it, and what a person should look at.

    Errors are: files missing, unreadable or belonging to no case; channels or labels on another grid than the first
    channel (shape, affine); values that are not finite; constant channels; label values and classes that
    ``dataset.json`` does not name; shape, spacing and pixel hashes other than in ``cases.csv``; different patients with
    the same pixels, or with nearly the same image in different parts; patients in two parts of a split;
    cases in no part; ``dataset.json`` and ``splits_final.json`` that do not follow ``cases.csv`` and
    ``splits.json``; slice stores that are damaged or older than the split or the images.

    Warnings are: labels without foreground; CT that cannot be in Hounsfield units and PET that cannot be in SUV; a
    label in the air around the body; channels that lie better on each other when one is shifted; a lesion's position
    outside of its image; spacings, shapes, orientations and label volumes unlike those of the other cases, and labels
    that touch the edge of the image or are absent in few cases only; two channels of a case or two cases of a patient
    with the same pixels; different patients with nearly the same image, or its mirror image; parts that lack a class or
    label, or differ from the others by more than chance. The how-to "Check a dataset" gives every threshold and its
    reason.

    Args:
        root: the dataset folder.
        progress: called with (cases done, cases in all).
        workers: threads that read cases; default: one per core.
        look: called with every case whose files were read and lie on one grid, in the thread that read it, so that
            they need not be read again: its row of cases.csv, the channels [x, y, z], the label [x, y, z] (None of a
            classification) and the affine.

    Returns:
        the problems, worst first: errors before warnings, and of each the cases with most of them first; an empty list
        when nothing was found.

    Raises:
        DatasetError: the folder is no dataset, or its dataset.json or cases.csv cannot be read.
    """
    folder = DatasetFolder(root)
    workers = workers or len(os.sched_getaffinity(0))
    attachments, problems = _attachments(folder)
    jobs = [
        CaseFiles(
            case=str(row["case"]),
            images=tuple(folder.image_paths(str(row["case"]))),
            label=None if folder.classes else folder.label_path(str(row["case"])),
            attachments=tuple(folder.root / name for name in attachments.get(str(row["case"]), ())),
            channels=tuple(folder.channel_names),
            labels={value: name for name, value in folder.labels.items()},
            row={str(key): value for key, value in row.items()},
        )
        for row in folder.cases.to_dict("records")
    ]
    findings = []
    for finding in in_order(lambda files: check_case(files, look), jobs, workers):
        findings.append(finding)
        if progress:
            progress(len(findings), len(jobs))

    problems += [problem for finding in findings for problem in finding.problems]
    problems += _stray_files(folder)
    splits, split_problems = read_splits(folder)
    problems += split_problems
    problems += _duplicates(folder, findings, members(splits), workers)
    problems += _unlike_the_others(folder, findings)
    unknown = list(_unknown_classes(folder))
    problems += unknown
    sound = splits if not split_problems else None
    if not unknown:
        problems += check_lists(folder, sound)
    if sound is not None:
        problems += check_slice_stores(folder, sound)
        labels = [name for name, value in folder.labels.items() if value]
        categories = [column for column in ("class", "stratum") if column in folder.cases]
        problems += check_balance(folder.cases, members(sound), labels, categories)
    count = Counter((problem.severity, problem.case) for problem in problems)
    return sorted(problems, key=lambda found: (found.severity != ERROR, -count[found.severity, found.case], found))


def _attachments(folder: DatasetFolder) -> tuple[dict[str, list[str]], list[Problem]]:
    """Further files of each case, as paths relative to the dataset, and those that belong to none."""
    names = {str(case) for case in folder.cases["case"]}
    recorded = folder.manifest.get("cases") if (folder.root / "manifest.json").is_file() else None
    recorded = recorded if isinstance(recorded, dict) else {}
    attached: dict[str, list[str]] = {}
    owner: dict[str, str] = {}
    for case in sorted(names & set(recorded)):
        files = recorded[case].get("files") if isinstance(recorded[case], dict) else None
        files = files if isinstance(files, dict) else {}
        attached[case] = sorted(name for name in files if name.startswith("attachments/"))
        owner.update(dict.fromkeys(attached[case], case))
    problems = []
    for path in sorted((folder.root / "attachments").glob("*")):
        name = f"attachments/{path.name}"
        cases = [path.name[:end] for end, letter in enumerate(path.name) if letter == "_" and path.name[:end] in names]
        if name in owner:
            continue
        if cases and not recorded:  # a dataset that data_prep did not build keeps no record of its files
            attached.setdefault(cases[-1], []).append(name)
        else:
            problems.append(_stray(name))
    return attached, problems


def _stray(name: str) -> Problem:
    if name.rpartition("/")[2].startswith(".tmp-"):
        return Problem(name, "the rest of an interrupted run", "delete it", "files")
    advice = "delete it" if name.endswith(FILE_ENDING) else "move it elsewhere"
    return Problem(name, "belongs to no case of cases.csv", advice, "files")


def _stray_files(folder: DatasetFolder) -> Iterator[Problem]:
    names = [str(case) for case in folder.cases["case"]]
    expected = {path for case in names for path in folder.image_paths(case)}
    if not folder.classes:
        expected |= {folder.label_path(case) for case in names}
    for place in ("imagesTr", "labelsTr"):
        for path in sorted((folder.root / place).glob("*")):
            if path not in expected:
                yield _stray(f"{place}/{path.name}")


def _unknown_classes(folder: DatasetFolder) -> Iterator[Problem]:
    if not folder.classes:
        return
    expected = f"one of {', '.join(folder.classes)} expected"
    if "class" not in folder.cases:
        yield Problem(
            "cases.csv", "no column class, though dataset.json has classes", "build the dataset again", "class"
        )
        return
    for case, name in zip(folder.cases["case"], folder.cases["class"], strict=True):
        if name not in folder.classes:
            advice = "correct cases.csv, or build the dataset again"
            yield Problem(str(case), f"class: {name!r} found, {expected}", advice, "class")
    counts = folder.cases["class"].value_counts()
    for name in folder.classes:
        if name not in counts:
            yield Problem("cases.csv", f"no case of class {name}", "is the source complete?", "class", WARNING)


def _duplicates(
    folder: DatasetFolder, findings: list[Finding], parts: Mapping[str, list[str]], workers: int
) -> Iterator[Problem]:
    """Cases with the same voxels, and cases of different patients that show nearly the same image."""
    patient_of = dict(zip(folder.cases["case"], folder.cases["patient"], strict=True))
    parts_of: dict[str, set[str]] = {}
    for part, chosen in parts.items():
        for case in chosen:
            parts_of.setdefault(case, set()).add(part)

    def apart(one: str, other: str) -> str:
        differing = parts_of.get(one, set()) ^ parts_of.get(other, set())
        return f", and the two stand in different parts ({', '.join(sorted(differing))})" if differing else ""

    first: dict[str, str] = {}
    same: set[frozenset[str]] = set()
    findings = sorted(findings, key=lambda finding: finding.case)
    for finding in findings:
        twins: dict[str, list[str]] = {}
        for name, digest in finding.hashes.items():
            twin = first.setdefault(digest, finding.case)
            if twin != finding.case:
                twins.setdefault(twin, []).append(name)
        for twin, names in twins.items():
            same.add(frozenset((twin, finding.case)))
            channels = "image" if len(names) == len(folder.channel_names) else f"channel {', '.join(names)}"
            severity = ERROR
            if patient_of[twin] == patient_of[finding.case]:
                whose, advice = f"of the same patient {patient_of[twin]}", "leave one of them out, or it counts twice"
                severity = WARNING  # two parts cannot share it: a patient is in one
            else:
                whose = f"of another patient ({patient_of[finding.case]} here, {patient_of[twin]} there)"
                advice = "find out whose image it is, or leave one of them out"
            what = f"{channels}: the same voxels as case {twin} {whose}{apart(twin, finding.case)}"
            yield Problem(finding.case, what, advice, "duplicate", severity)

    signed = [(finding.case, finding.signature) for finding in findings if finding.signature is not None]
    owners = [str(patient_of[case]) for case, _ in signed]
    for one, other, correlation, mirrored in near_duplicates([signature for _, signature in signed], owners, workers):
        twin, case = signed[one][0], signed[other][0]
        if frozenset((twin, case)) not in same:
            where, how = apart(twin, case), ", mirrored" if mirrored else ""
            yield Problem(
                case,
                f"image: nearly that of case {twin} of another patient{how} (correlation {correlation:.2f}; "
                f"{owners[other]} here, {owners[one]} there){where}",
                "compare the two in report.html; if they are of one person, give them one patient and split again",
                "duplicate",
                ERROR if where else WARNING,
            )


def _unlike_the_others(folder: DatasetFolder, findings: list[Finding]) -> Iterator[Problem]:
    """Cases whose spacing, shape, orientation or label volumes are far from those of the other cases."""
    table = folder.cases
    look = "look at it; resample, reorient or leave it out, unless it is right"
    for column, log in (("spacing", False), ("shape", True)):
        if column not in table:
            continue
        axes = table[column].astype(str).str.split("x", expand=True).apply(pd.to_numeric, errors="coerce")
        odd = np.any([outliers(values, log, FAR_OUT) for _, values in axes.items()], axis=0)
        usual = "x".join(f"{value:g}" for value in axes.median())
        for case, found in table.loc[odd, ["case", column]].itertuples(index=False):
            yield Problem(str(case), f"{column}: {found}, {usual} in the median case", look, "outlier", WARNING)

    axes_of = {finding.case: finding.axes for finding in findings if finding.axes}
    counts = Counter(axes_of.values())
    for case, found in axes_of.items():
        if counts[found] <= FEW * len(axes_of):
            usual, number = counts.most_common(1)[0]
            what = f"orientation: {found}, {usual} in {number} of {len(axes_of)} cases"
            yield Problem(case, what, look, "outlier", WARNING)

    at_edge = {finding.case: finding.at_edge for finding in findings}
    labels = [name for name, value in folder.labels.items() if value and f"volume_ml_{name}" in table]
    volumes = table[[f"volume_ml_{label}" for label in labels]].apply(pd.to_numeric, errors="coerce")
    labelled = table[(volumes > 0).any(axis=1)]  # the others are told to have no foreground
    for label in labels:
        yield from _odd_labels(labelled, label, at_edge)


def _odd_labels(table: pd.DataFrame, label: str, at_edge: Mapping[str, tuple[str, ...]]) -> Iterator[Problem]:
    volumes = pd.to_numeric(table[f"volume_ml_{label}"], errors="coerce")
    empty = volumes == 0
    odd = outliers(volumes, log=True, reach=FAR_OUT)
    median = float(volumes[volumes > 0].median()) if (volumes > 0).any() else float("nan")
    look = "look at the delineation, unless it is right"
    touching = table["case"].map(lambda case: label in at_edge.get(str(case), ()))
    for case, volume, is_empty, is_odd, touches in zip(table["case"], volumes, empty, odd, touching, strict=True):
        name = str(case)
        if is_empty and empty.sum() <= max(FEW * len(table), 1) and len(table) >= 5:
            what = f"label {label}: absent, present in {len(table) - empty.sum()} of {len(table)} cases"
            yield Problem(name, what, look, "outlier", WARNING)
        elif is_odd:
            what = f"label {label}: {volume:.3g} ml, {median:.3g} ml in the median case"
            yield Problem(name, what, look, "outlier", WARNING)
        if touches and touching.sum() <= FEW * len(table):
            what = f"label {label}: touches the edge of the image, as in {touching.sum()} of {len(table)} cases"
            yield Problem(name, what, "was the image cut too short?", "outlier", WARNING)
