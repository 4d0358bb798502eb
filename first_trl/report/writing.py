"""The report: every arm on every test set in numbers, pictures, words and one self-contained page.

It measures predictions that others made, and knows no model. `metrics.json` is written for programs, `table.md` and
`summary.md` for a README and the model card, `index.html` for people: pictures inside it, no request to anywhere,
every text escaped. Each file appears whole or not at all; an earlier report's pictures without successor are removed.

A set's figures are those of the whole vocabulary; the same answers restricted to the declared choices stand under
"choices". What `predict` states, the choices where there are any, is "view": the verdict and the first tables read it.
"""

import base64
import json
import re
from collections.abc import Collection, Set
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from ..constants import ARMS, FOCUS, POST_HOC
from ..errors import FirstTrlError
from ..files import write_atomically
from ..metrics import compare, expected_calibration_error, percent, reliability_bins, risk_coverage_curve
from ..redaction import visible
from ..student import DEFAULT_TARGET, SLACK, mean_selective, selective, threshold_for_accuracy
from . import figures
from .verdict import VIEWS, measured, order_arms, shipped, trained_arms, verdict

SCHEMA_VERSION = 2
# The risk of fewer answered examples is too noisy to draw.
MIN_ANSWERED = 20
COLUMNS = ("Accuracy", "ECE (95 % interval)", "NLL", "Brier", "AURC", "Trust score", "Sure: right (answered)")
DIFFERENCES = ("accuracy", "nll", "brier", "aurc", "ece_debiased")


def write_report(
    folder: str | Path,
    predictions: dict[str, dict[str, Any]],
    calibration: dict | None,
    provenance: dict,
    out_of_domain: Set[str] = frozenset(),
    num_bins: int = 10,
    bootstrap: int = 1000,
    seed: int = 0,
    *,
    validation: dict[str, Any] | None = None,
    target_accuracy: float = DEFAULT_TARGET,
    test_curves: dict[str, dict[str, list[dict]]] | None = None,
    training: dict[str, list[dict]] | None = None,
    **notes: dict,
) -> dict:
    """Measure, draw and write; returns what `metrics.json` holds.

    Args:
        folder: the report's folder; its other files and folders are left alone.
        predictions: {arm: {test set: as `evaluation.predictions`}}, the same examples in the same order in every arm;
            a list of those for an arm that was trained from several seeds.
        calibration: the content of the teacher's `calibration.json`, or None.
        provenance: where it comes from, shown on the page only: plain data.
        out_of_domain: names of the test sets that the students were not trained for.
        num_bins, bootstrap, seed: as in `metrics.compare`.
        validation: {arm: as one test set's}, for the thresholds of `target_accuracy` and the choice of a student.
        test_curves: {method: {test set: [{"value", "ece"}, ...]}}, the teacher's error against the value on test sets.
        training: {arm: the trainer's `log_history`}, from which the losses are drawn.
        **notes: "omitted", "outside", as `evaluation.Collected`; "closing", {student: the temperature that it
            carries}; "controls", {student that carries none: the one fitted here}; "lost", {set: its rows that were
            dropped or cut, as `data.rows.UsableRows.lost`}.

    Raises:
        ValueError: no predictions, arms with different numbers of examples, or what `metrics` refuses.
    """
    if not any(predictions.values()):
        raise FirstTrlError("there are no predictions to report on; evaluate at least one arm on one test set.")
    predictions = {arm: predictions[arm] for arm in order_arms(predictions)}
    metrics = (
        measure(predictions, calibration, out_of_domain, num_bins, bootstrap, seed, notes.get("controls", ())) | notes
    )
    for arm, values in (validation or {}).items():
        add_selective(metrics["arms"][arm], values, predictions[arm], target_accuracy)
    metrics["selection"] = _selection(metrics, validation or {})
    students = trained_arms(metrics["arms"])
    metrics["summary"] = verdict(metrics)
    metrics["verdicts"] = {arm: verdict(metrics, arm) for arm in students}  # a model card repeats its student's
    pictures = draw(metrics, predictions, calibration, num_bins, test_curves or {}, training or {})
    files = {f"{name}.png": png for name, png in pictures["files"].items()}
    files["metrics.json"] = json.dumps(metrics, indent=1, allow_nan=False).encode()
    files["table.md"] = table_markdown(metrics).encode()
    files["summary.md"] = summary_markdown(metrics["summary"]).encode()
    files["index.html"] = page(metrics, pictures, provenance).encode()
    folder = Path(folder)
    for name, content in files.items():
        write_atomically(folder / name, content)
    for old in folder.glob("*.png"):
        if old.name not in files:
            old.unlink()
    return metrics


# Figures


def measure(
    predictions: dict,
    calibration: dict | None,
    out_of_domain: Set[str],
    num_bins: int,
    bootstrap: int,
    seed: int,
    controls: Collection[str] = (),
) -> dict:
    """The body of `metrics.json`: per arm and set as `metrics.summarize`, and the paired differences of the view."""
    names = list(dict.fromkeys(name for sets in predictions.values() for name in sets))
    names.sort(key=lambda name: name in out_of_domain)  # stable: in domain first
    every = [one for sets in predictions.values() for values in sets.values() for one in by_seed(values)]
    view = "tokens" if any("example" in one for one in every) else "vocabulary"
    view = "choices" if all("choice_confidence" in one for one in every) else view
    arms: dict[str, dict] = {arm: {} for arm in predictions}
    references = ["teacher", *(shipped(arm, predictions, controls) for arm in trained_arms(predictions))]
    differences: dict[str, dict] = {}
    for name in names:
        answered = {arm: sets[name] for arm, sets in predictions.items() if name in sets}
        found = {}
        for prefix in ("", "choice_"):
            seen: dict[str, list[Any]] = {
                arm: [_view(one, prefix) for one in by_seed(values)] for arm, values in answered.items()
            }
            seen = {arm: values for arm, values in seen.items() if all(values)}
            found[prefix] = compare(seen, num_bins, bootstrap, seed) if seen else ({}, {})
            for arm, summary in found[prefix][0].items():
                confidence = np.concatenate([np.asarray(one["confidence"], dtype=float) for one in seen[arm]])
                summary["mean_confidence"] = float(confidence.mean())
                if prefix:
                    arms[arm][name]["choices"] = summary
                else:
                    arms[arm][name] = summary
        pairs = found["choice_" if view == "choices" else ""][1]
        differences[name] = {
            arm: {
                other: {metric: pair[metric] for metric in DIFFERENCES if metric in pair}
                for other, pair in pairs[arm].items()
            }
            for arm in references
            if arm in pairs
        }
    return {
        "schema_version": SCHEMA_VERSION,
        "view": view,
        "arms": arms,
        "differences": differences,
        "out_of_domain": [name for name in names if name in out_of_domain],
        "num_bins": num_bins,
        "bootstrap": bootstrap,
        "calibration": calibration,
    }


def by_seed(predictions: dict | list[dict]) -> list[dict]:
    """What the students of an arm predict, one dict for each seed."""
    return [predictions] if isinstance(predictions, dict) else predictions


def _view(predictions: dict, prefix: str) -> dict | None:
    """What `metrics.compare` reads, over the whole vocabulary or with "choice_" among the choices; None without."""
    if f"{prefix}confidence" not in predictions:
        return None
    names = ("confidence", "correct", "label_log_prob")
    found = {name: predictions[prefix + name] for name in names if prefix + name in predictions}
    return found | ({"example": predictions["example"]} if "example" in predictions else {})


def add_selective(sets: dict[str, dict], validation, predictions: dict, target_accuracy: float) -> None:
    """Add "selective" to an arm's sets, and to their view restricted to the choices.

    "threshold" is the lowest confidence that reached the target on validation (None if none did), "coverage" the share
    of a test set that it answers, "accuracy" that of the answered (None if nothing is answered). Of several seeds,
    each has a threshold of its own; the figures are their means, and "seeds" has each.
    """
    for prefix in ("", "choice_"):
        fitted_on: list[Any] = [_view(one, prefix) for one in by_seed(validation)]
        if not all(fitted_on):
            continue
        thresholds = [
            threshold_for_accuracy(one["confidence"], one["correct"], target_accuracy, SLACK) for one in fitted_on
        ]
        for name, summary in sets.items():
            seen: list[Any] = [_view(one, prefix) for one in by_seed(predictions[name])]
            done = [
                {"threshold": threshold, **selective(one["confidence"], one["correct"], threshold)}
                for threshold, one in zip(thresholds, seen, strict=True)
            ]
            result = {"target_accuracy": target_accuracy, **mean_selective(done)}
            (summary["choices"] if prefix else summary)["selective"] = result


def _selection(metrics: dict, validation: dict) -> dict:
    """{"nll": {student: NLL on validation as shipped}, "best": the student with the lowest, or None}."""
    name = "choice_label_log_prob" if metrics["view"] == "choices" else "label_log_prob"
    nll, controls = {}, metrics.get("controls", ())
    for arm in trained_arms(validation):
        values = [
            np.asarray(one.get(name, [np.nan])) for one in by_seed(validation[shipped(arm, validation, controls)])
        ]
        mean = float(np.mean([-one.mean() for one in values]))
        if np.isfinite(mean):
            nll[arm] = mean
    return {"nll": nll, "best": min(nll, key=lambda arm: nll[arm]) if nll else None}


# Pictures


def _label(arm: str) -> str:
    return arm.removesuffix(POST_HOC).replace("_", " ").replace("/seed-", ", seed ") + (
        ", one temperature" if arm.endswith(POST_HOC) else ""
    )


def _file_name(name: str) -> str:
    return re.sub(r"[^\w.-]+", "-", name)


def _set_title(metrics: dict, name: str) -> str:
    size = next(sets[name]["num_examples"] for sets in metrics["arms"].values() if name in sets)
    return f"{name}, {'out of' if name in metrics['out_of_domain'] else 'in'} domain, {size:,} examples"


def draw(
    metrics: dict, predictions: dict, calibration: dict | None, num_bins: int, test_curves: dict, training: dict
) -> dict:
    """All pictures as PNG: "files" {name: png} for the folder, "panels" {set: {arm: png}} for the page's layout."""
    prefix = "choice_" if metrics["view"] == "choices" else ""
    points = {
        arm: {name: (found["ece"], found["accuracy"]) for name in sets if (found := measured(metrics, arm, name))}
        for arm, sets in metrics["arms"].items()
    }
    titles = {name: _set_title(metrics, name) for name in metrics["differences"]}
    files = {"overview": figures.to_png(figures.overview_figure(points, titles, _label))}
    panels: dict[str, dict] = {}
    for name, title in titles.items():
        diagrams, curves = {}, {}
        for arm, sets in predictions.items():
            if name not in sets:
                continue
            seeds: list[Any] = [_view(one, prefix) for one in by_seed(sets[name])]
            confidence, correct = (
                np.concatenate([np.asarray(one[key]) for one in seeds]) for key in ("confidence", "correct")
            )
            values: Any = measured(metrics, arm, name)
            diagrams[arm] = {
                "title": _label(arm),
                "bins": reliability_bins(confidence, correct, num_bins),
                "ece": expected_calibration_error(confidence, correct, num_bins) if len(seeds) > 1 else values["ece"],
                "accuracy": values["accuracy"],
                "confidence": values["mean_confidence"],
            }
            curve = risk_coverage_curve(confidence, correct)
            drawn = curve.coverage * len(correct) >= min(MIN_ANSWERED, len(correct))
            if not arm.endswith(POST_HOC):  # one temperature hardly reorders: its curve lies on that of the arm
                curves[_label(arm)] = curve.coverage[drawn], curve.risk[drawn]
        if any(isinstance(sets.get(name), list) for sets in predictions.values()):
            title += ", seeds pooled"
        drawn_figure = figures.reliability_figure(list(diagrams.values()), title)
        files[f"reliability_{_file_name(name)}"] = figures.to_png(drawn_figure)
        drawn_figure = figures.risk_coverage_figure(curves, title, _label(FOCUS))
        files[f"risk_coverage_{_file_name(name)}"] = figures.to_png(drawn_figure)
        panels[name] = {
            arm: figures.to_png(figures.reliability_figure([one], legend=False)) for arm, one in diagrams.items()
        }
    families = (calibration or {}).get("families", {})
    families = {method: family for method, family in families.items() if family["value"] is not None}
    if families:
        files["calibration"] = figures.to_png(figures.calibration_figure(families, test_curves))
    losses = {_label(arm): lines for arm, history in training.items() if any((lines := _losses(history)).values())}
    if losses:
        files["training"] = figures.to_png(figures.training_figure(losses))
    return {"files": files, "panels": panels}


def _losses(history: list[dict]) -> dict[str, list[tuple[float, float]]]:
    """The points of a trainer's `log_history` that hold a loss."""
    return {
        name: [(entry["step"], entry[key]) for entry in history if key in entry]
        for name, key in (("training", "loss"), ("validation", "eval_loss"))
    }


# Tables and pages


def rows(metrics: dict, name: str, view: str | None = None) -> list[dict]:
    """A set's table as text: one dict per arm with "arm" and "cells" in the order of `COLUMNS`.

    Args:
        view: "choices", or None for the whole vocabulary.
    """
    result = []
    for arm, sets in metrics["arms"].items():
        values = sets.get(name) if view is None else sets.get(name, {}).get(view)
        if values is None:
            continue
        accuracy, ece, spread = percent(values["accuracy"]), percent(values["ece"]), values.get("seeds")
        if "ece" in values["ci"]:
            low, high = values["ci"]["ece"]
            ece += f" ({100 * low:.1f} to {100 * high:.1f})"
        if spread is not None:
            accuracy += f" ± {100 * spread['accuracy']['spread']:.1f}"
            ece += f" ± {100 * spread['ece']['spread']:.1f}"
        nll = "infinite" if values["num_impossible_labels"] else _number(values["nll"])
        cells = [accuracy, ece, nll, _number(values["brier"]), _number(values["aurc"])]
        result.append({"arm": arm, "cells": [*cells, percent(values["trust_score"]), _sure(values.get("selective"))]})
    return result


def _sure(selective: dict | None) -> str:
    """Accuracy above the threshold that was fitted on validation, and the share of the examples that lies there."""
    if selective is None:
        return "-"
    if selective["threshold"] is None:
        return "never sure"
    right = "-" if selective["accuracy"] is None else percent(selective["accuracy"])
    return f"{right} ({percent(selective['coverage'])})"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def table_markdown(metrics: dict) -> str:
    """`table.md`: what is measured, then for each test set a table of the report's view, and one of the other."""
    parts = [f"Measured: {VIEWS[metrics['view']]}.\n"]
    order = ("choices", None) if metrics["view"] == "choices" else (None, "choices")
    for view in order:
        suffix = ", restricted to the choices" if view else ", over the whole vocabulary"
        for name in metrics["differences"]:
            if lines := rows(metrics, name, view):
                parts.append(f"### {_set_title(metrics, name)}{suffix}\n")
                parts += [_markdown_row(["Arm", *COLUMNS]), "| --- |" + " ---: |" * len(COLUMNS)]
                parts += [_markdown_row([f"`{line['arm']}`", *line["cells"]]) for line in lines]
                parts.append("")
    return "\n".join(parts)


def _markdown_row(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def summary_markdown(sentences: list[dict]) -> str:
    """`summary.md`: the three answers, one list per test set, and what holds for all of them."""
    lines = [sentence["text"] + "\n" for sentence in sentences if sentence["kind"] == "headline"]
    marks = {"win": "**better:** ", "loss": "**worse:** ", "noise": "**noise:** ", "warning": "**warning:** "}
    for name in dict.fromkeys(sentence["set"] for sentence in sentences if sentence["set"] is not None):
        lines.append(f"**{name}**\n")
        lines += [f"- {marks.get(s['kind'], '')}{s['text']}" for s in sentences if s["set"] == name]
        lines.append("")
    general = [s for s in sentences if s["set"] is None and s["kind"] != "headline"]
    lines += [f"- {marks.get(s['kind'], '')}{s['text']}" for s in general]
    return "\n".join(lines) + "\n"


def _code(text: str) -> Markup:
    """Names between backticks as <code>, everything escaped."""
    return Markup(re.sub(r"`([^`]*)`", r"<code>\1</code>", str(escape(text))))


def _size(png: bytes) -> tuple[int, int]:
    """Width and height of a picture in CSS pixels: 96 to the inch, where the PNG has 150, fine on dense screens."""
    width, height = (round(int.from_bytes(png[start : start + 4], "big") * 96 / 150) for start in (16, 20))
    return width, height


def page(metrics: dict, pictures: dict, provenance: dict) -> str:
    """`index.html`: one page that needs nothing but itself."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=lambda value: visible(value) if type(value) is str else value,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["code"] = _code
    environment.filters["data_uri"] = lambda png: Markup("data:image/png;base64,") + base64.b64encode(png).decode()
    environment.filters["size"] = _size
    environment.filters["percent"] = percent
    view = "choices" if metrics["view"] == "choices" else None
    sets = [
        {
            "name": name,
            "file": _file_name(name),
            "title": _set_title(metrics, name),
            "rows": rows(metrics, name, view),
            "vocabulary": rows(metrics, name) if view else [],
            "measured": {arm: found for arm in metrics["arms"] if (found := measured(metrics, arm, name))},
            "sentences": [sentence for sentence in metrics["summary"] if sentence["set"] == name],
        }
        for name in metrics["differences"]
    ]
    return environment.get_template("report.html").render(
        metrics=metrics,
        view=VIEWS[metrics["view"]],
        pictures=pictures["files"],
        panels=pictures["panels"],
        sets=sets,
        headline=[s["text"] for s in metrics["summary"] if s["kind"] == "headline"],
        general=[s for s in metrics["summary"] if s["set"] is None and s["kind"] != "headline"],
        columns=COLUMNS,
        target=DEFAULT_TARGET,
        best=shipped(metrics["selection"]["best"] or FOCUS, metrics["arms"], metrics.get("controls", ())),
        arms=ARMS,
        label=_label,
        plain={key: value for key, value in provenance.items() if not isinstance(value, dict | list)},
        nested={
            key: json.dumps(value, indent=2, ensure_ascii=False, default=str)
            for key, value in provenance.items()
            if isinstance(value, dict | list)
        },
    )
