"""The report: every arm on every test set in numbers, pictures, words and one self-contained page.

It measures predictions that others made, and knows no model. `metrics.json` is written for programs, `table.md` and
`summary.md` for a README and the model card, `index.html` for people: pictures inside it, no request to anywhere,
every text escaped. What they say stands in the templates beside this file. Each file appears whole or not at all, one
after the other; an earlier report's pictures without successor are removed.

A set's figures are those of the whole vocabulary; the same answers restricted to the declared choices stand under
"choices". What `predict` states, the choices where there are any, is "view": the verdict and the first tables read it.
"""

import base64
import json
import re
from collections.abc import Collection, Set
from functools import partial
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
MIN_ANSWERED = 20  # the risk of fewer answered examples is too noisy to draw
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
        num_bins, bootstrap, seed: as in `metrics.compare`.
        validation: {arm: as one test set's}, for the thresholds and the choice of a student.
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
    metrics = measure(predictions, calibration, out_of_domain, num_bins, bootstrap, seed, notes.get("controls", ()))
    metrics |= notes
    for arm, values in (validation or {}).items():
        add_selective(metrics["arms"][arm], values, predictions[arm])
    metrics["selection"] = _selection(metrics, validation or {})
    metrics["summary"] = verdict(metrics)
    # a model card repeats its student's
    metrics["verdicts"] = {arm: verdict(metrics, arm) for arm in trained_arms(metrics["arms"])}
    pictures = draw(metrics, predictions, test_curves or {}, training or {})
    files = {f"{name}.png": png for name, png in pictures.items()}
    files["metrics.json"] = json.dumps(metrics, indent=1, allow_nan=False).encode()
    for name, text in pages(metrics, pictures, provenance).items():
        files[name] = text.encode()
    for name, content in files.items():
        write_atomically(Path(folder) / name, content)
    for old in Path(folder).glob("*.png"):
        if old.name not in files:
            old.unlink()
    return metrics


# Figures


def by_seed(predictions: dict | list[dict], prefix: str = "") -> list[Any]:
    """What `metrics.compare` reads of an arm's answers to a set, one dict for each seed.

    Over the whole vocabulary, or with "choice_" among the choices; empty where not all have those.
    """
    seeds = [predictions] if isinstance(predictions, dict) else predictions
    if any(f"{prefix}confidence" not in one for one in seeds):
        return []
    names = {name: prefix + name for name in ("confidence", "correct", "label_log_prob")} | {"example": "example"}
    return [{name: one[key] for name, key in names.items() if key in one} for one in seeds]


def _pooled(seeds: list[dict], name: str) -> np.ndarray:
    return np.concatenate([np.asarray(one[name], dtype=float) for one in seeds])


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
    every = [values for sets in predictions.values() for values in sets.values()]
    view = "tokens" if any("example" in one for values in every for one in by_seed(values)) else "vocabulary"
    view = "choices" if all(by_seed(values, "choice_") for values in every) else view
    arms: dict[str, dict] = {arm: {} for arm in predictions}
    references = {"teacher", *(shipped(arm, predictions, controls) for arm in trained_arms(predictions))}
    differences: dict[str, dict] = {}
    for name in names:
        for prefix in ("", "choice_"):
            seen = {arm: by_seed(sets[name], prefix) for arm, sets in predictions.items() if name in sets}
            seen = {arm: seeds for arm, seeds in seen.items() if seeds}
            summaries, pairs = compare(seen, num_bins, bootstrap, seed) if seen else ({}, {})
            for arm, summary in summaries.items():
                summary["mean_confidence"] = float(_pooled(seen[arm], "confidence").mean())
                if prefix:
                    arms[arm][name]["choices"] = summary
                else:
                    arms[arm][name] = summary
            if (view == "choices") == bool(prefix):
                differences[name] = {
                    arm: {
                        other: {metric: pair[metric] for metric in DIFFERENCES if metric in pair}
                        for other, pair in others.items()
                    }
                    for arm, others in pairs.items()
                    if arm in references
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


def add_selective(sets: dict[str, dict], validation, predictions: dict) -> None:
    """Add "selective" to an arm's sets, and to their view restricted to the choices.

    "threshold" is the lowest confidence that reached the target on validation (None if none did), "coverage" the share
    of a test set that it answers, "accuracy" that of the answered (None if nothing is answered). Of several seeds,
    each has a threshold of its own; the figures are their means, and "seeds" has each.
    """
    for prefix in ("", "choice_"):
        thresholds = [
            threshold_for_accuracy(one["confidence"], one["correct"], DEFAULT_TARGET, SLACK)
            for one in by_seed(validation, prefix)
        ]
        for name, summary in sets.items() if thresholds else ():
            done = [
                {"threshold": threshold, **selective(one["confidence"], one["correct"], threshold)}
                for threshold, one in zip(thresholds, by_seed(predictions[name], prefix), strict=True)
            ]
            place = summary["choices"] if prefix else summary
            place["selective"] = {"target_accuracy": DEFAULT_TARGET, **mean_selective(done)}


def _selection(metrics: dict, validation: dict) -> dict:
    """{"nll": {student: NLL on validation as shipped}, "best": the student with the lowest, or None}."""
    prefix, nll = "choice_" if metrics["view"] == "choices" else "", {}
    for arm in trained_arms(validation):
        seeds = by_seed(validation[shipped(arm, validation, metrics.get("controls", ()))], prefix)
        mean = np.mean([-np.mean(one.get("label_log_prob", np.nan)) for one in seeds])
        if np.isfinite(mean):
            nll[arm] = float(mean)
    return {"nll": nll, "best": min(nll, key=lambda arm: nll[arm]) if nll else None}


# Pictures


def _label(arm: str) -> str:
    name = arm.removesuffix(POST_HOC).replace("_", " ").replace("/seed-", ", seed ")
    return name + (", one temperature" if arm.endswith(POST_HOC) else "")


def _file_name(name: str) -> str:
    return re.sub(r"[^\w.-]+", "-", name)


def _set_title(metrics: dict, name: str) -> str:
    size = next(sets[name]["num_examples"] for sets in metrics["arms"].values() if name in sets)
    return f"{name}, {'out of' if name in metrics['out_of_domain'] else 'in'} domain, {size:,} examples"


def draw(metrics: dict, predictions: dict, test_curves: dict, training: dict) -> dict[str, bytes]:
    """All pictures as PNG, by the name of their file."""
    prefix = "choice_" if metrics["view"] == "choices" else ""
    points = {
        arm: {name: (found["ece"], found["accuracy"]) for name in sets if (found := measured(metrics, arm, name))}
        for arm, sets in metrics["arms"].items()
    }
    titles = {name: _set_title(metrics, name) for name in metrics["differences"]}
    drawn = {"overview": figures.overview_figure(points, titles, _label)}
    for name, title in titles.items():
        diagrams, curves = [], {}
        for arm, sets in predictions.items():
            if name not in sets:
                continue
            seeds, values = by_seed(sets[name], prefix), measured(metrics, arm, name)
            confidence, correct = _pooled(seeds, "confidence"), _pooled(seeds, "correct")
            if len(seeds) > 1:
                values = {**values, "ece": expected_calibration_error(confidence, correct, metrics["num_bins"])}
                title = f"{titles[name]}, seeds pooled"
            bins = reliability_bins(confidence, correct, metrics["num_bins"])
            numbers = {"ece": values["ece"], "accuracy": values["accuracy"], "confidence": values["mean_confidence"]}
            diagrams.append({"title": _label(arm), "bins": bins, **numbers})
            if not arm.endswith(POST_HOC):  # one temperature hardly reorders: its curve lies on that of the arm
                curve = risk_coverage_curve(confidence, correct)
                enough = curve.coverage * len(correct) >= min(MIN_ANSWERED, len(correct))
                curves[_label(arm)] = curve.coverage[enough], curve.risk[enough]
        drawn[f"reliability_{_file_name(name)}"] = figures.reliability_figure(diagrams, title)
        drawn[f"risk_coverage_{_file_name(name)}"] = figures.risk_coverage_figure(curves, title, _label(FOCUS))
    families = (metrics["calibration"] or {}).get("families", {})
    if families := {method: family for method, family in families.items() if family["value"] is not None}:
        drawn["calibration"] = figures.calibration_figure(families, test_curves)
    losses: dict[str, dict] = {}
    for arm, history in training.items():
        for name, key in (("training", "loss"), ("validation", "eval_loss")):
            if steps := [(entry["step"], entry[key]) for entry in history if key in entry]:
                losses.setdefault(_label(arm), {})[name] = steps
    if losses:
        drawn["training"] = figures.training_figure(losses)
    return {name: figures.to_png(figure) for name, figure in drawn.items()}


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
        accuracy, ece = percent(values["accuracy"]), percent(values["ece"])
        if "ece" in values["ci"]:
            low, high = values["ci"]["ece"]
            ece += f" ({100 * low:.1f} to {100 * high:.1f})"
        if "seeds" in values:
            accuracy += f" ± {100 * values['seeds']['accuracy']['spread']:.1f}"
            ece += f" ± {100 * values['seeds']['ece']['spread']:.1f}"
        nll, *others = ("-" if values[key] is None else f"{values[key]:.3f}" for key in ("nll", "brier", "aurc"))
        nll = "infinite" if values["num_impossible_labels"] else nll
        cells = [accuracy, ece, nll, *others, percent(values["trust_score"]), _sure(values.get("selective"))]
        result.append({"arm": arm, "cells": cells})
    return result


def _sure(selective: dict | None) -> str:
    """Accuracy above the threshold that was fitted on validation, and the share of the examples that lies there."""
    if selective is None:
        return "-"
    if selective["threshold"] is None:
        return "never sure"
    right = "-" if selective["accuracy"] is None else percent(selective["accuracy"])
    return f"{right} ({percent(selective['coverage'])})"


def _code(text: str) -> Markup:
    """Names between backticks as <code>, everything escaped."""
    return Markup(re.sub(r"`([^`]*)`", r"<code>\1</code>", str(escape(text))))


def _picture(png: bytes) -> Markup:
    """The attributes of an <img>: its content, and its size in CSS pixels, 96 to the inch where the PNG has 150."""
    width, height = (round(int.from_bytes(png[start : start + 4], "big") * 96 / 150) for start in (16, 20))
    content = base64.b64encode(png).decode()
    return Markup(f'src="data:image/png;base64,{content}" width="{width}" height="{height}"')


def pages(metrics: dict, pictures: dict[str, bytes], provenance: dict) -> dict[str, str]:
    """{file name: text} of `index.html`, one page that needs nothing but itself, `table.md` and `summary.md`."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=lambda name: name == "report.html",
        undefined=StrictUndefined,
        finalize=lambda value: visible(value) if type(value) is str else value,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"code": _code, "picture": _picture, "percent": percent}
    environment.filters["json"] = partial(json.dumps, indent=2, ensure_ascii=False, default=str)
    view, said = "choices" if metrics["view"] == "choices" else None, metrics["summary"]
    sets = [
        {
            "name": name,
            "file": _file_name(name),
            "title": _set_title(metrics, name),
            "rows": rows(metrics, name, view),
            "other_rows": rows(metrics, name, None if view else "choices"),
            "sentences": [sentence for sentence in said if sentence["set"] == name],
        }
        for name in metrics["differences"]
    ]
    content = {
        "metrics": metrics,
        "view": VIEWS[metrics["view"]],
        "pictures": pictures,
        "sets": sets,
        "headline": [sentence["text"] for sentence in said if sentence["kind"] == "headline"],
        "general": [sentence for sentence in said if sentence["set"] is None and sentence["kind"] != "headline"],
        "columns": COLUMNS,
        "target": DEFAULT_TARGET,
        "best": shipped(metrics["selection"]["best"] or FOCUS, metrics["arms"], metrics.get("controls", ())),
        "arms": ARMS,
        "provenance": provenance,
    }
    templates = {"index.html": "report.html", "table.md": "table.md.jinja", "summary.md": "summary.md.jinja"}
    return {name: environment.get_template(template).render(content) for name, template in templates.items()}
