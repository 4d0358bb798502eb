"""The report: every arm on every test set in numbers, pictures, words and one self-contained page.

It measures predictions that others made, and knows no model. `metrics.json` is written for programs, `table.md` and
`summary.md` for a README, `index.html` for people: pictures inside it, no request to anywhere, every text escaped.
Each file appears whole or not at all; pictures of an earlier report that have no successor are removed.

Views are never mixed: a set's numbers are those of the whole vocabulary, and the same answers restricted to the
declared choices stand under "choices".
"""

import base64
import json
import os
import re
from collections.abc import Set
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from ..data.rows import describe_lost
from ..metrics import compare, expected_calibration_error, reliability_bins, risk_coverage_curve
from ..student import DEFAULT_TARGET, fit_threshold, mean_selective, selective
from .figures import calibration_figure, reliability_figure, risk_coverage_figure, to_png, training_figure
from .verdict import FOCUS, order_arms, percent, verdict

SCHEMA_VERSION = 1
# The risk of fewer answered examples is too noisy to draw.
MIN_ANSWERED = 20
COLUMNS = ("Accuracy", "ECE (95 % interval)", "Trust score", "NLL", "Brier", "AUROC", "Sure: right (answered)")


def write_report(
    folder: str | Path,
    predictions: dict[str, dict[str, dict[str, np.ndarray]]],
    calibration: dict | None,
    provenance: dict,
    out_of_domain: Set[str] = frozenset(),
    num_bins: int = 10,
    bootstrap: int = 1000,
    seed: int = 0,
    *,
    validation: dict[str, dict[str, np.ndarray]] | None = None,
    target_accuracy: float = DEFAULT_TARGET,
    test_curves: dict[str, dict[str, list[dict]]] | None = None,
    training: dict[str, list[dict]] | None = None,
    omitted: dict[str, str] | None = None,
    lost: dict[str, dict] | None = None,
) -> dict:
    """Measure, draw and write; returns what `metrics.json` holds.

    Args:
        folder: the report's folder; its other files and folders are left alone.
        predictions: {arm: {test set: {"confidence", "correct", "label_log_prob"}}}, (n,) each, the same examples
            in the same order in every arm; optionally also "choice_confidence" and "choice_correct". A list of those
            for an arm that was trained from several seeds: its figures are means, "seeds" has each and their spread.
        calibration: the content of `calibration.json`, or None.
        provenance: where it comes from, shown on the page only: plain data.
        out_of_domain: names of the test sets that the students were not trained for.
        num_bins, bootstrap, seed: as in `metrics.compare`.
        validation: {arm: as one test set's}, from which the confidence threshold for `target_accuracy` is fitted.
        test_curves: {method: {test set: [{"value", "ece"}, ...]}}, the teacher's error against the value on test sets.
        training: {arm: the trainer's `log_history`}, from which the losses are drawn.
        omitted: {arm that should be among the predictions: why it could not be measured}.
        lost: {set: its rows that were dropped or cut, as `first_trl.data.rows.UsableRows.lost`}.

    Raises:
        ValueError: no predictions, arms with different numbers of examples, or what `metrics` refuses.
    """
    if not any(predictions.values()):
        raise ValueError("there are no predictions to report on; evaluate at least one arm on one test set.")
    predictions = {arm: predictions[arm] for arm in order_arms(predictions)}
    metrics = measure(predictions, calibration, out_of_domain, num_bins, bootstrap, seed)
    for arm, values in (validation or {}).items():
        add_selective(metrics["arms"][arm], values, predictions[arm], target_accuracy)
    metrics["omitted"] = omitted or {}
    metrics["lost"] = lost or {}
    known = {name for sets in metrics["arms"].values() for name in sets}
    metrics["summary"] = verdict(metrics) + [
        {"kind": "warning", "set": name if name in known else None, "text": f"{line}."}
        for name, rows in metrics["lost"].items()
        if (line := describe_lost(name, rows))
    ]
    pictures = draw(metrics, predictions, calibration, num_bins, test_curves or {}, training or {})
    files = {f"{name}.png": png for name, png in pictures["files"].items()}
    files["metrics.json"] = json.dumps(metrics, indent=1, allow_nan=False).encode()
    files["table.md"] = table_markdown(metrics).encode()
    files["summary.md"] = summary_markdown(metrics["summary"]).encode()
    files["index.html"] = page(metrics, pictures, provenance).encode()
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        _replace(folder / name, content)
    for old in folder.glob("*.png"):
        if old.name not in files:
            old.unlink()
    return metrics


def _replace(path: Path, content: bytes) -> None:
    """Write a file so that a reader sees the old one or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def measure(
    predictions: dict, calibration: dict | None, out_of_domain: Set[str], num_bins: int, bootstrap: int, seed: int
) -> dict:
    """The body of `metrics.json`: per arm and set as `metrics.summarize`, and the focus minus every other arm."""
    names = list(dict.fromkeys(name for sets in predictions.values() for name in sets))
    names.sort(key=lambda name: name in out_of_domain)  # stable: in domain first
    arms: dict[str, dict] = {arm: {} for arm in predictions}
    differences: dict[str, dict] = {}
    for name in names:
        answered = {arm: sets[name] for arm, sets in predictions.items() if name in sets}
        reference = FOCUS if FOCUS in answered else next(iter(answered))
        summaries, differences[name] = compare(answered, reference, num_bins, bootstrap, seed)
        restricted = {
            arm: [
                {"confidence": one["choice_confidence"], "correct": one["choice_correct"]} for one in by_seed(values)
            ]
            for arm, values in answered.items()
            if _view(by_seed(values)[0], "choice_")
        }
        choices = compare(restricted, next(iter(restricted)), num_bins, bootstrap, seed)[0] if restricted else {}
        for arm, summary in summaries.items():
            summary["mean_confidence"] = float(_pooled(answered[arm])[0].astype(np.float64).mean())
            if arm in choices:
                summary["choices"] = choices[arm]
            arms[arm][name] = summary
        if reference != FOCUS:
            differences[name] = {}
    return {
        "schema_version": SCHEMA_VERSION,
        "arms": arms,
        "differences": differences,
        "out_of_domain": [name for name in names if name in out_of_domain],
        "num_bins": num_bins,
        "bootstrap": bootstrap,
        "calibration": calibration,
    }


def add_selective(sets: dict[str, dict], validation, predictions: dict, target_accuracy: float) -> None:
    """Add "selective" to an arm's sets, and to their view restricted to the choices.

    "threshold" is the lowest confidence that reached the target on validation (None if none did), "coverage" the share
    of a test set that it answers, "accuracy" that of the answered (None if nothing is answered). Of several seeds,
    each has a threshold of its own; the figures are their means, and "seeds" has each.
    """
    for view in ("", "choice_"):
        fitted_on: list[Any] = [_view(one, view) for one in by_seed(validation)]
        if not all(fitted_on):
            continue
        thresholds = [fit_threshold(values, correct, target_accuracy) for values, correct in fitted_on]
        for name, summary in sets.items():
            seen: list[Any] = [_view(one, view) for one in by_seed(predictions[name])]
            done = [
                {"threshold": threshold, **selective(values, correct, threshold)}
                for threshold, (values, correct) in zip(thresholds, seen, strict=True)
            ]
            result = {"target_accuracy": target_accuracy, **mean_selective(done)}
            (summary["choices"] if view else summary)["selective"] = result


def by_seed(predictions: dict | list[dict]) -> list[dict]:
    """What the students of an arm predict, one dict for each seed."""
    return [predictions] if isinstance(predictions, dict) else predictions


def _view(predictions: dict, view: str) -> tuple | None:
    """(confidence, correct) over the whole vocabulary, or with "choice_" among the choices; None without choices."""
    if f"{view}confidence" not in predictions:
        return None
    return predictions[f"{view}confidence"], predictions[f"{view}correct"]


def _pooled(predictions: dict | list[dict]) -> tuple[np.ndarray, np.ndarray]:
    """(confidence, correct) of all seeds, one after the other: what a diagram of several draws."""
    seeds = by_seed(predictions)
    return tuple(np.concatenate([np.asarray(one[name]) for one in seeds]) for name in ("confidence", "correct"))


def _label(arm: str) -> str:
    return arm.replace("_", " ").replace("/seed-", ", seed ")


def _file_name(name: str) -> str:
    return re.sub(r"[^\w.-]+", "-", name)


def _set_title(metrics: dict, name: str) -> str:
    size = next(sets[name]["num_examples"] for sets in metrics["arms"].values() if name in sets)
    return f"{name}, {'out of' if name in metrics['out_of_domain'] else 'in'} domain, {size:,} examples"


def draw(
    metrics: dict, predictions: dict, calibration: dict | None, num_bins: int, test_curves: dict, training: dict
) -> dict:
    """All pictures as PNG: "files" {name: png} for the folder, "panels" {set: {arm: png}} for the page's layout."""
    files, panels = {}, {}
    for name in metrics["differences"]:
        answered = {arm: sets[name] for arm, sets in predictions.items() if name in sets}
        diagrams, curves = {}, {}
        for arm, values in answered.items():
            measured, pooled = metrics["arms"][arm][name], _pooled(values)
            several = len(by_seed(values)) > 1
            diagrams[arm] = {
                "title": _label(arm),
                "bins": reliability_bins(*pooled, num_bins),
                "ece": expected_calibration_error(*pooled, num_bins) if several else measured["ece"],
                "accuracy": measured["accuracy"],
                "confidence": measured["mean_confidence"],
            }
            curve = risk_coverage_curve(*pooled)
            drawn = curve.coverage * measured["num_examples"] >= min(MIN_ANSWERED, measured["num_examples"])
            curves[_label(arm)] = curve.coverage[drawn], curve.risk[drawn]
        title = _set_title(metrics, name)
        if any(len(by_seed(values)) > 1 for values in answered.values()):
            title += ", seeds pooled"
        files[f"reliability_{_file_name(name)}"] = to_png(reliability_figure(list(diagrams.values()), title))
        files[f"risk_coverage_{_file_name(name)}"] = to_png(risk_coverage_figure(curves, title, _label(FOCUS)))
        panels[name] = {arm: to_png(reliability_figure([diagram], legend=False)) for arm, diagram in diagrams.items()}
    families = {
        method: family
        for method, family in (calibration or {}).get("families", {}).items()
        if family["value"] is not None
    }
    if families:
        files["calibration"] = to_png(calibration_figure(families, test_curves))
    losses = {_label(arm): lines for arm, history in training.items() if any((lines := _losses(history)).values())}
    if losses:
        files["training"] = to_png(training_figure(losses))
    return {"files": files, "panels": panels}


def _losses(history: list[dict]) -> dict[str, list[tuple[float, float]]]:
    """The points of a trainer's `log_history` that hold a loss."""
    return {
        name: [(entry["step"], entry[key]) for entry in history if key in entry]
        for name, key in (("training", "loss"), ("validation", "eval_loss"))
    }


def rows(metrics: dict, name: str, view: str | None = None) -> list[dict]:
    """A set's table as text: one dict per arm with "arm" and "cells" in the order of `COLUMNS`."""
    result = []
    for arm, sets in metrics["arms"].items():
        values = sets.get(name) if view is None else sets.get(name, {}).get(view)
        if values is None:
            continue
        ece = f"{100 * values['ece']:.1f} %"
        if "ece" in values["ci"]:
            low, high = values["ci"]["ece"]
            ece += f" ({100 * low:.1f} to {100 * high:.1f})"
        accuracy, spread = percent(values["accuracy"]), values.get("seeds")
        if spread is not None:
            accuracy += f" ± {100 * spread['accuracy']['spread']:.1f}"
            ece += f" ± {100 * spread['ece']['spread']:.1f}"
        nll = "infinite" if values["num_impossible_labels"] else _number(values["nll"])
        cells = [accuracy, ece, f"{100 * values['trust_score']:.1f} %", nll]
        cells += [_number(values["brier"]), _number(values["auroc"]), _sure(values.get("selective"))]
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


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def table_markdown(metrics: dict) -> str:
    """`table.md`: one table per test set, and one more where answers were also restricted to the choices."""
    parts = []
    for name in metrics["differences"]:
        for view, suffix in ((None, ""), ("choices", ", restricted to the choices")):
            lines = rows(metrics, name, view)
            if lines:
                parts.append(f"### {_set_title(metrics, name)}{suffix}\n")
                header = ["Arm", *COLUMNS]
                parts += [_markdown_row(header), "| --- |" + " ---: |" * len(COLUMNS)]
                parts += [_markdown_row([f"`{line['arm']}`", *line["cells"]]) for line in lines]
                parts.append("")
    return "\n".join(parts)


def _markdown_row(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def summary_markdown(sentences: list[dict]) -> str:
    """`summary.md`: the headline, one list per test set, and what holds for all of them."""
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
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["code"] = _code
    environment.filters["data_uri"] = lambda png: "data:image/png;base64," + base64.b64encode(png).decode()
    environment.filters["size"] = _size
    environment.filters["percent"] = percent
    return environment.get_template("report.html").render(
        metrics=metrics,
        pictures=pictures["files"],
        panels=pictures["panels"],
        sets=[
            {
                "name": name,
                "file": _file_name(name),
                "title": _set_title(metrics, name),
                "rows": rows(metrics, name),
                "choices": rows(metrics, name, "choices"),
                "sentences": [sentence for sentence in metrics["summary"] if sentence["set"] == name],
            }
            for name in metrics["differences"]
        ],
        headline=[s["text"] for s in metrics["summary"] if s["kind"] == "headline"],
        general=[s for s in metrics["summary"] if s["set"] is None and s["kind"] != "headline"],
        columns=COLUMNS,
        target=DEFAULT_TARGET,
        focus=FOCUS,
        label=_label,
        plain={key: value for key, value in provenance.items() if not isinstance(value, dict | list)},
        nested={key: _pretty(value) for key, value in provenance.items() if isinstance(value, dict | list)},
    )


def _pretty(value: dict | list) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False, default=str)
