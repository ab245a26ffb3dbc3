"""The report of one run, or of several side by side, as one HTML file."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ..errors import ConfigError, DatasetError, ReadError
from ..io.atomic import atomic_write_text
from ..io.channel_names import is_pet
from .figures import (
    PREDICTION_COLOR,
    TRUTH_COLOR,
    case_dice_plot,
    dice_histogram,
    patient_box_plot,
    slice_pictures,
    training_curves,
)
from .page import embed, environment, number
from .runs import MEASURES, Run, model_facts, read_pictures, read_runs
from .tables import (
    MEAN_OF_LABELS,
    TITLES,
    Summary,
    choose_patients,
    differences,
    labels_of,
    part,
    patient_level,
    patient_scores,
    summarize,
    with_mean_of_labels,
)

SLICE_MEASURES = MEASURES[:5]
FACTS = {
    "command": "command",
    "seed": "seed",
    "dataset_sha256": "dataset hash",
    "versions.medseg": "medseg version",
}
NOTE_PRESENT = (
    "Mean (median) ± standard deviation; below it the 95 % interval of the mean, bootstrap with patients resampled. "
    "Only {what} whose true mask is not empty count here; those with an empty one are in a table of their own, because "
    "there Dice, sensitivity and PPV say nothing about the outline. Missed: nothing was predicted; Dice, F-beta, "
    "sensitivity and surface Dice are then 0, PPV and Hausdorff distance undefined. What is undefined is left out and "
    "counted; a mean of labels is undefined where one of them is."
)
NOTE_EMPTY = (
    "Only {what} whose true mask is empty. A false alarm is any prediction in it. Specificity: mean (median) ± "
    "standard deviation, below it the 95 % interval. Dice is not averaged here: by convention it is 1 without and 0 "
    "with a false alarm, which their share says already."
)


def run_report(
    runs: Sequence[Path] | Mapping[str, Path], out: Path, title: str | None = None, split: str | None = None
) -> Path:
    """Write the report of one run, or of several compared, as one HTML file that needs no other.

    The first run is the reference: patients are ranked by it, and differences are the first minus each of the others.
    A part that a run lacks (curves, scores, pictures) is said in the report.

    Args:
        runs: run folders, or run folders by the name to show.
        out: the HTML file to write.
        title: heading; the names of the runs by default.
        split: the split whose scores are shown; by default one that all scored runs have, test before val before train.

    Returns:
        ``out``.

    Raises:
        ConfigError: ``out`` is a folder, or in one that is absent.
        DatasetError: a folder is no run, a table lacks a column, or the runs have no split in common.
        ReadError: a file of a run cannot be read.
    """
    out = Path(out)
    if out.is_dir() or not out.parent.is_dir():
        raise ConfigError(f"out: {out} is a folder, or in a folder that is absent; expected a file that can be written")
    found = read_runs(runs)
    scored = {run.name: run.scores for run in found if run.scores is not None and len(run.scores)}
    split = _choose_split(scored, split)
    names = [run.name for run in found]
    level = patient_level(list(scored.values()), split) if split else "slice"
    patients = {name: patient_scores(scores, split, level) for name, scores in scored.items()} if split else {}
    pictures, picture_note = _pictures(found, scored, patients, split, level)
    facts, warnings = _facts(found, scored, split)
    histograms, boxes, strips = _distributions(scored, patients, split)
    curves = {run.name: run.metrics for run in found if run.metrics is not None}
    page = environment().get_template("run.html")
    html = page.render(
        title=title or " and ".join(names),
        summary=_summary_line(scored, split),
        warnings=warnings,
        absent=[f"{run.name}: {line}" for run in found for line in run.missing],
        runs=names,
        facts=facts,
        details=_comparison([run.facts for run in found]),
        configs=[(run.name, run.config) for run in found if run.config],
        split=split or "",
        tables=_score_tables(names, scored, split) if split else [],
        differences=_difference_rows(scored, split) if split else [],
        curves=embed(training_curves(curves)) if curves else "",
        histograms=histograms,
        boxes=boxes,
        strips=strips,
        pictures=pictures,
        picture_note=picture_note,
        truth_color=TRUTH_COLOR,
        prediction_color=PREDICTION_COLOR,
        **_patient_table(names, patients, level),
    )
    atomic_write_text(out, html)
    return out


def _choose_split(scored: Mapping[str, pd.DataFrame], split: str | None) -> str | None:
    if not scored:
        return None
    common = set.intersection(*(set(scores["split"]) for scores in scored.values()))
    told = "; ".join(f"{name} has {', '.join(sorted(set(scores['split'])))}" for name, scores in scored.items())
    if split is not None and split not in common:
        raise DatasetError(f"split {split!r} is not scored in every run: {told}")
    if not common:
        raise DatasetError(f"the runs have no split in common: {told}; score them on the same split")
    return split if split is not None else min(common, key=lambda name: (name != "test", name != "val", name))


def _summary_line(scored: Mapping[str, pd.DataFrame], split: str | None) -> str:
    if split is None:
        return "Not scored yet."
    rows = pd.concat([scores[scores["split"] == split] for scores in scored.values()])
    slices = rows[rows["level"] == "slice"]
    counts = [f"{rows['patient'].nunique()} patients", f"{rows['case'].nunique()} cases"]
    if len(slices):
        counts.append(f"{len(slices.drop_duplicates(['case', 'slice']))} slices")
    return f"Scored on the split “{split}”: {', '.join(counts)}."


def _facts(
    runs: Sequence[Run], scored: Mapping[str, pd.DataFrame], split: str | None
) -> tuple[list[dict[str, Any]], list[str]]:
    """What a reader wants to know first, and what makes a comparison doubtful."""
    columns = []
    for run in runs:
        column: dict[str, str] = {}
        scores = scored.get(run.name)
        if scores is not None:
            rows = scores[scores["split"] == split]
            column["patients scored"] = str(rows["patient"].nunique())
            column["splits scored"] = ", ".join(sorted(set(scores["split"])))
        for key, value in run.facts.items():
            if key in FACTS:
                column[FACTS[key]] = value
        looks = sum(key.startswith("test_set_scored.") and key.endswith(".when") for key in run.facts)
        if looks:
            column["test set scored"] = "once" if looks == 1 else f"{looks} times"
        columns.append(column | model_facts(run.config))
    warnings = []
    if len({column["dataset hash"] for column in columns if "dataset hash" in column}) > 1:
        warnings.append("The runs were made with different datasets (see the hashes): their scores are not comparable.")
    cases = {frozenset(scores.loc[scores["split"] == split, "case"]) for scores in scored.values()}
    if len(cases) > 1:
        warnings.append("The runs were scored on different cases: compare the paired differences, not the means.")
    labels = {name: sorted(set(scores.loc[scores["split"] == split, "label"])) for name, scores in scored.items()}
    if len(set(map(tuple, labels.values()))) > 1:
        told = "; ".join(f"{name}: {', '.join(found)}" for name, found in labels.items())
        warnings.append(
            f"The runs were scored on different labels ({told}): compare the rows of one label and the paired "
            "differences, not the means of labels, of patients or of slices."
        )
    return _comparison(columns), warnings


def _comparison(columns: Sequence[Mapping[str, str]]) -> list[dict[str, Any]]:
    rows = []
    for name in dict.fromkeys(key for column in columns for key in column):
        cells = [column.get(name, "–") for column in columns]
        rows.append({"name": name, "cells": cells, "differs": len(set(cells)) > 1})
    return rows


def _score_tables(names: Sequence[str], scored: Mapping[str, pd.DataFrame], split: str) -> list[dict[str, Any]]:
    tables = []
    for level, what, measures in (("slice", "slices", SLICE_MEASURES), ("case", "cases", MEASURES)):
        present = {
            name: with_mean_of_labels(part(scores, split, level, empty=False)) for name, scores in scored.items()
        }
        empty = {name: part(scores, split, level, empty=True) for name, scores in scored.items()}
        for rows, describe, note, title in (
            (present, _present_rows, NOTE_PRESENT, f"{what.capitalize()} with a label"),
            (empty, _empty_rows, NOTE_EMPTY, f"{what.capitalize()} without a label"),
        ):
            labels = labels_of(list(rows.values()))
            if not labels:
                continue
            single = len(names) == 1
            heads = labels if single else list(names)
            groups = []
            for label in [""] if single else labels:
                columns = [
                    _of_label(rows.get(names[0]), head) if single else _of_label(rows.get(head), label)
                    for head in heads
                ]
                groups.append({"title": label if len(labels) > 1 else "", "rows": describe(columns, what, measures)})
            suffix = f": {labels[0]}" if len(labels) == 1 and labels[0] and not single else ""
            tables.append({"title": title + suffix, "heads": heads, "groups": groups, "note": note.format(what=what)})
    return tables


def _of_label(rows: pd.DataFrame | None, label: str) -> pd.DataFrame | None:
    return None if rows is None else rows[rows["label"] == label]


def _present_rows(columns: Sequence[pd.DataFrame | None], what: str, measures: Sequence[str]) -> list[dict[str, Any]]:
    counts = [
        _cell() if rows is None else _cell(f"{len(rows)}", f"of {rows['patient'].nunique()} patients")
        for rows in columns
    ]
    missed = [_cell() if rows is None else _cell(_share(int(rows["pred_empty"].sum()), len(rows))) for rows in columns]
    found = [{"title": what.capitalize(), "cells": counts}, {"title": "Missed", "cells": missed}]
    for measure in measures:
        cells = [
            _cell() if rows is None else _summary_cell(summarize(rows[measure], list(rows["patient"])), measure)
            for rows in columns
        ]
        if any(cell["text"] != "–" for cell in cells):
            found.append({"title": TITLES[measure], "cells": cells})
    return found


def _empty_rows(columns: Sequence[pd.DataFrame | None], what: str, measures: Sequence[str]) -> list[dict[str, Any]]:
    counts: list[dict[str, str]] = []
    alarms: list[dict[str, str]] = []
    pixels: list[dict[str, str]] = []
    specificity: list[dict[str, str]] = []
    for rows in columns:
        if rows is None:
            for cells in (counts, alarms, pixels, specificity):
                cells.append(_cell())
            continue
        alarmed = rows[~rows["pred_empty"]]
        counts.append(_cell(f"{len(rows)}", f"of {rows['patient'].nunique()} patients"))
        alarms.append(_cell(_share(len(alarmed), len(rows))))
        pixels.append(_cell(number(float(alarmed["fp"].mean()), 1) if len(alarmed) else "–"))
        specificity.append(_summary_cell(summarize(rows["specificity"], list(rows["patient"])), "specificity"))
    unit = "pixels" if what == "slices" else "voxels"
    return [
        {"title": what.capitalize(), "cells": counts},
        {"title": "False alarms", "cells": alarms},
        {"title": f"Predicted {unit} per false alarm, mean", "cells": pixels},
        {"title": "Specificity", "cells": specificity},
    ]


def _summary_cell(summary: Summary, measure: str) -> dict[str, str]:
    if not summary.n:
        return _cell("–", f"{summary.undefined} undefined" if summary.undefined else "")
    digits = 2 if measure == "hd95_mm" else 3
    text = f"{number(summary.mean, digits)} ({number(summary.median, digits)}) ± {number(summary.sd, digits)}"
    small = (
        f"[{number(summary.low, digits)}, {number(summary.high, digits)}]"
        if np.isfinite(summary.low)
        else "one patient: no interval"
    )
    return _cell(text, small + (f", {summary.undefined} undefined" if summary.undefined else ""))


def _cell(text: str = "–", small: str = "") -> dict[str, str]:
    return {"text": text, "small": small}


def _share(count: int, total: int) -> str:
    return f"{count} ({count / total:.1%})" if total else "–"


def _difference_rows(scored: Mapping[str, pd.DataFrame], split: str) -> list[dict[str, Any]]:
    rows = []
    reference, *others = scored.items()
    for other in others:
        for row in differences(reference, other, split):
            digits = 2 if row.measure == "hd95_mm" else 3
            # Not named clear: a template would take the method of the dictionary for it.
            without_zero = row.low > 0 or row.high < 0
            interval = (
                f"[{row.low:+.{digits}f}, {row.high:+.{digits}f}]".replace("-", "−") if np.isfinite(row.low) else "–"
            )
            rows.append(
                vars(row)
                | {"title": TITLES[row.measure], "without_zero": without_zero, "interval": interval}
                | {"mean_text": f"{row.mean:+.{digits}f}".replace("-", "−"), "wins": " : ".join(map(str, row.wins))}
            )
    return rows


def _distributions(
    scored: Mapping[str, pd.DataFrame], patients: Mapping[str, pd.DataFrame], split: str | None
) -> tuple[list[tuple[str, str]], str, str]:
    """Histograms and box plots of the slices; points of the cases."""
    if split is None:
        return [], "", ""
    cases = {name: part(scores, split, "case", empty=False) for name, scores in scored.items()}
    dice = {name: _grouped(rows, "label") for name, rows in cases.items() if len(rows)}
    light = sum(map(len, cases.values())) <= 500
    strips = embed(case_dice_plot(dice), vector=light) if dice else ""
    slices = {name: with_mean_of_labels(part(scores, split, "slice", empty=False)) for name, scores in scored.items()}
    slices = {name: rows for name, rows in slices.items() if len(rows)}
    if not slices:
        return [], "", strips
    histograms = []
    labels = labels_of(list(slices.values()))
    for label in labels:
        if label != MEAN_OF_LABELS:
            values = {name: rows.loc[rows["label"] == label, "dice"] for name, rows in slices.items()}
            histograms.append((label if len(labels) > 1 else "", embed(dice_histogram(values), vector=True)))
    whole = {name: rows[rows["label"] == labels_of([rows])[-1]] for name, rows in slices.items()}
    order = [patient for name in slices for patient in patients[name].dropna(subset=["mean"])["patient"]]
    ylabel = "Dice per slice" if len(labels) == 1 else "Dice per slice,\nmean of labels"
    figure = patient_box_plot(
        {name: _grouped(rows, "patient") for name, rows in whole.items()}, list(dict.fromkeys(order)), ylabel
    )
    return histograms, embed(figure, vector=len(set(order)) <= 60), strips


def _grouped(rows: pd.DataFrame, column: str) -> dict[str, "np.ndarray[Any, Any]"]:
    return {str(name): group["dice"].to_numpy() for name, group in rows.groupby(column, sort=False)}


def _pictures(
    runs: Sequence[Run],
    scored: Mapping[str, pd.DataFrame],
    patients: Mapping[str, pd.DataFrame],
    split: str | None,
    level: str,
) -> tuple[list[dict[str, Any]], str]:
    """Best, median and worst patient of the first run that has scores and pictures, as each run sees them."""
    reference = next((run for run in runs if run.name in patients and run.pictures), None)
    if reference is None or split is None:
        return [], ""
    scores = scored[reference.name]
    owner = dict(zip(scores["case"], scores["patient"], strict=True))
    # The cases from worst to best: each is taken for a patient of its own.
    cases = patient_scores(scores.assign(patient=scores["case"]), split, level).dropna(subset=["mean"])["patient"]
    pictured = {case: owner[case] for case in cases if case in reference.pictures}
    without = len({owner[case] for case in cases} - set(pictured.values()))
    loaded, broken = [], []
    for what, patient in choose_patients(patients[reference.name], pictured):
        own = [case for case in pictured if pictured[case] == patient]
        case = {"Best": own[-1], "Worst": own[0]}.get(what, own[(len(own) - 1) // 2])
        which = f"{case}, the {what.lower()} of {len(own)}" if len(own) > 1 else case
        for run in runs:
            if case in run.pictures:
                try:
                    loaded.append((what, patient, which, run, read_pictures(run.pictures[case])))
                except ReadError:
                    broken.append(f"{run.name}: the pictures of case {case} are damaged.")
    # One PET scale for all pictures: hot is hot in every one.
    pet = [
        float(np.percentile(p.image[c], 99.9))
        for *_, p in loaded
        for c, name in enumerate(p.channel_names)
        if is_pet(name)
    ]
    top = max(pet, default=0.0)
    notes = []
    if any(not is_pet(name) for *_, p in loaded for name in p.channel_names):
        notes.append(
            "Channels as the model saw them: a window (CT) from 0 to 1, any other from its 1st to its 99th percentile."
        )
    if pet:
        notes.append(
            f"PET from 0 to {top:.1f} (99.9th percentile of what is pictured) in all pictures, square-root gray scale."
        )
    if any(p.edges for *_, p in loaded):
        notes.append("Letters: the patient's right (R), front (A) and head (S).")
    notes.append(f"Ranked by {reference.name}.")
    if without:
        notes.append(f"Passed over, because they have no pictures there: {without} of the patients.")
    sections: dict[str, dict[str, Any]] = {}
    for what, patient, which, run, shown in loaded:
        limits = {name: (0.0, top) for name in shown.channel_names if is_pet(name)}
        image = embed(slice_pictures(shown, run.labels, limits))
        text = f"{run.name}, case {which}{_patient_dice(patients.get(run.name), patient)}"
        sections.setdefault(what, {"what": what, "patient": patient, "images": []})["images"].append((image, text))
    return list(sections.values()), " ".join(notes + broken)


def _patient_dice(table: pd.DataFrame | None, patient: str) -> str:
    rows = table[table["patient"] == patient] if table is not None else None
    if rows is None or not len(rows) or not np.isfinite(rows["mean"].iloc[0]):
        return ""
    mean, sd = float(rows["mean"].iloc[0]), float(rows["sd"].iloc[0])
    return f": Dice of the patient {mean:.2f}" + (f" ± {sd:.2f} (mean ± SD)" if np.isfinite(sd) else "")


def _patient_table(names: Sequence[str], patients: Mapping[str, pd.DataFrame], level: str) -> dict[str, Any]:
    tables = {name: table.set_index("patient") for name, table in patients.items()}
    labels = list(dict.fromkeys(str(c) for table in tables.values() for c in table if str(c).startswith("mean_")))
    alarms = any(table["empty"].sum() for table in tables.values())
    columns = ["Mean", "Median", "SD", *(label.removeprefix("mean_") for label in labels)] + ["False alarms"] * alarms
    rows = []
    for patient in dict.fromkeys(patient for table in tables.values() for patient in table.index):
        cells, about = [], None
        for name in names:
            table = tables.get(name)
            row = table.loc[patient] if table is not None and patient in table.index else None
            about = row if about is None else about
            values = [
                float("nan") if row is None or c not in row else float(row[c])
                for c in ("mean", "median", "sd", *labels)
            ]
            cells += [number(value) for value in values]
            if alarms:
                cells.append("–" if row is None else f"{row['false_alarms']:.0f} of {row['empty']:.0f}")
        rows.append(
            {"patient": patient, "cells": cells}
            | {key: 0 if about is None else int(about[key]) for key in ("cases", "n")}
        )
    what = "slices" if level == "slice" else "cases"
    note = f"Dice of each patient's {what} with a label"
    note += ", mean of the labels present, and each label's own mean." if labels else "."
    note += f" False alarms: {what} without a label in which something was predicted." if alarms else ""
    unit = f"{what.capitalize()} with a label"
    return {"patients": rows, "patient_columns": columns, "patient_note": note, "patient_unit": unit}
