import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest

from first_trl.metrics import expected_calibration_error, paired_difference, reliability_bins, summarize
from first_trl.report import figures
from first_trl.report.verdict import order_arms, outcome, verdict
from first_trl.report.writing import measure, write_report


def answers(size, sharpness, seed=0):
    """An arm whose true chance of being right is known; sharpness 1 states it, more is over-confident."""
    truth = np.random.default_rng(seed).uniform(0.4, 1, size)
    right = np.random.default_rng(seed + 1).random(size) < truth
    stated = truth.clip(0.02, 0.999) ** (1 / sharpness)
    found = {}
    for prefix, confidence in (("", stated), ("choice_", np.sqrt(stated))):
        log_prob = np.log(np.where(right, confidence, 1 - confidence))
        found |= {f"{prefix}confidence": confidence, f"{prefix}correct": right, f"{prefix}label_log_prob": log_prob}
    return found


SHARPNESS = {  # in the order of the report
    "teacher": 3, "teacher_recalibrated": 1, "base": 1.5, "fine_tuned": 4, "fine_tuned_post_hoc": 1.6, "distilled": 3,
    "distilled_post_hoc": 1.4, "first": 1.2, "first_post_hoc": 1,
}  # fmt: skip
CALIBRATION = {
    "method": "temperature",
    "value": 2.0,
    "criterion": "ece",
    "num_positions": 500,
    "families": {
        "temperature": {
            "value": 2.0, "interval": [1.8, 2.2], "ece_before": 0.2, "ece_after": 0.01,
            "curve": [{"value": value, "ece": abs(value - 2) / 10 + 0.01, "nll": 1.0} for value in (0.5, 1, 2, 4)],
        },
        "none": {"value": None, "interval": None, "ece_before": 0.2, "ece_after": 0.2, "curve": []},
    },
    "teacher": {
        "cached_rows": {"accuracy": 0.95, "confidence": 0.93},
        "validation": {"accuracy": 0.65, "confidence": 0.86},
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A whole report: two sets, the one out of domain given first, arms in no order, hostile names."""
    folder = tmp_path_factory.mktemp("report")
    predictions = {
        arm: {"long <b>": answers(300, SHARPNESS[arm] + 0.3, 7), "reviews": answers(800, SHARPNESS[arm])}
        for arm in reversed(SHARPNESS)
    }
    history = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}, {"step": 2, "eval_loss": 1.5}, {"step": 2}]
    metrics = write_report(
        folder,
        predictions,
        CALIBRATION,
        {
            "name": "x\u2066y",
            "recipe": {"prompt": "</pre><script>alert('x')</script>", "choice": "good\u202edab\u0007"},
        },
        {"long <b>"},
        bootstrap=100,
        validation={arm: answers(500, SHARPNESS[arm], 11) for arm in SHARPNESS},
        test_curves={"temperature": {"reviews": [{"value": 1.0, "ece": 0.1}, {"value": 2.0, "ece": 0.05}]}},
        training={"first": history, "distilled": [{"step": 1}]},
    )
    return folder, metrics, predictions


# Figures


def test_metrics_json_holds_what_metrics_measures(written):
    folder, metrics, predictions = written
    assert json.loads((folder / "metrics.json").read_text()) == metrics
    assert list(metrics["arms"]) == list(SHARPNESS)
    assert list(metrics["arms"]["first"]) == ["reviews", "long <b>"] and metrics["out_of_domain"] == ["long <b>"]
    values, measured = predictions["first"]["reviews"], metrics["arms"]["first"]["reviews"]
    alone = summarize(values["confidence"], values["correct"], values["label_log_prob"], bootstrap=100)
    assert {name: measured[name] for name in alone} == alone
    assert measured["mean_confidence"] == pytest.approx(values["confidence"].mean())
    names = ("confidence", "correct", "label_log_prob")
    both = (predictions[arm]["reviews"] for arm in ("first_post_hoc", "distilled"))
    pair = paired_difference(*({name: arm[f"choice_{name}"] for name in names} for arm in both), bootstrap=100)
    found = metrics["differences"]["reviews"]["first_post_hoc"]["distilled"]
    assert metrics["view"] == "choices" and found == {name: pair[name] for name in found}
    assert {"nll", "accuracy", "ece_debiased"} <= set(found)


def test_the_view_restricted_to_choices_and_its_threshold_are_never_mixed_with_the_full_one(written):
    _, metrics, predictions = written
    values, full = predictions["first"]["reviews"], metrics["arms"]["first"]["reviews"]
    for prefix, measured in (("", full), ("choice_", full["choices"])):
        confidence, right = values[f"{prefix}confidence"], values[f"{prefix}correct"]
        assert measured["ece"] == pytest.approx(expected_calibration_error(confidence, right))
        assert measured["nll"] == pytest.approx(-values[f"{prefix}label_log_prob"].mean())
        fitted = measured["selective"]
        answered = confidence >= fitted["threshold"]
        assert fitted["coverage"] == answered.mean() and fitted["accuracy"] == right[answered].mean() > 0.85
    assert full["ece"] != full["choices"]["ece"] and full["selective"]["threshold"] != fitted["threshold"]


def test_the_table_has_a_row_per_arm_and_every_cell(written):
    folder, metrics, _ = written
    text = (folder / "table.md").read_text()
    assert text.count("| `first` |") == 4 and text.count("### ") == 4, "two sets, two views"
    measured = metrics["arms"]["first"]["reviews"]
    (low, high), sure = measured["ci"]["ece"], measured["selective"]
    assert (
        f"| `first` | {100 * measured['accuracy']:.1f} % | {100 * measured['ece']:.1f} % "
        f"({100 * low:.1f} to {100 * high:.1f}) | {measured['nll']:.3f} | {measured['brier']:.3f} | "
        f"{measured['aurc']:.3f} | {100 * measured['trust_score']:.1f} % | {100 * sure['accuracy']:.1f} % "
        f"({100 * sure['coverage']:.1f} %) |"
    ) in text
    assert text.startswith("Measured: the declared choices")
    assert text.index("restricted to the choices") < text.index("over the whole vocabulary\n")


def test_extreme_arms_are_measured_drawn_and_written(tmp_path):
    ruled_out = {"confidence": [0.9], "correct": [False], "label_log_prob": [-np.inf]}
    certain = {"confidence": [1.0], "correct": [True], "label_log_prob": [0.0]}
    predictions = {"a|b": {"x": ruled_out}, "c": {"x": certain, "y": certain}}
    metrics = write_report(tmp_path, predictions, None, {}, bootstrap=10, validation={"c": ruled_out})
    said = [s["text"] for s in metrics["summary"]]
    assert "no `first` arm" in said[0] and any("probability 0" in text and "`a|b` on `x` (1)" in text for text in said)
    assert list(metrics["differences"]["x"]) == ["a|b", "c"] and metrics["differences"]["y"] == {"c": {}}
    table = (tmp_path / "table.md").read_text()
    assert "| `a\\|b` | 0.0 % |" in table and "| infinite |" in table and "| never sure |" in table
    with pytest.raises(ValueError, match="no predictions"):
        write_report(tmp_path, {"first": {}}, None, {})


# The verdict


def knowing(size, share, sharpness=1.0, seed=0):
    """Answers among four: each example's difficulty is shared by all arms, `share` of which an arm sees through."""
    generator = np.random.default_rng(5)
    hidden, noise = generator.random(size), np.random.default_rng(seed).normal(0, 0.05, size)
    truth = (0.25 + 0.7 * np.clip(share - 0.5 + hidden + noise, 0, 1)).clip(0.05, 0.95)
    right = generator.random(size) < truth
    stated = truth ** (1 / sharpness)
    return {
        "confidence": stated, "correct": right, "label_log_prob": np.log(np.where(right, stated, (1 - stated) / 3)),
    }  # fmt: skip


def sentences(arms, bootstrap=200, **notes):
    """The verdict of a report of one set "x"; `arms` are the predictions of each."""
    ordered = {arm: {"x": arms[arm]} for arm in order_arms(arms)}
    return verdict(measure(ordered, None, set(), 10, bootstrap, 0) | notes)


def kind_of(said, control):
    return next(s["kind"] for s in said if s["text"].startswith(f"Against `{control}`"))


def text_of(said, beginning=""):
    return " ".join(s["text"] for s in said if s["text"].startswith(beginning))


def test_the_verdict_asks_first_who_knows_more_and_never_calibration_alone():
    strong, weak = knowing(2000, 0.8), knowing(2000, 0.3, seed=1)
    said = sentences({"first": strong, "fine_tuned": weak})
    assert kind_of(said, "fine_tuned") == "win" and "knows more than `fine_tuned`" in text_of(said, "Is it better?")
    said = sentences({"first": weak, "fine_tuned": knowing(2000, 0.8, 3.0), "fine_tuned_post_hoc": strong})
    assert kind_of(said, "fine_tuned_post_hoc") == "loss"
    assert "knows less than `fine_tuned_post_hoc`" in text_of(said, "Is it better?")
    assert "does not beat the fine-tuned model under one temperature" in text_of(said, "Against")
    well_calibrated = [s for s in said if "cannot be told from perfect calibration" in s["text"]]
    assert well_calibrated and not any(s["kind"] == "win" for s in said), "a low ECE alone is no victory"


def test_equal_knowledge_is_noise_whatever_the_calibration_as_trained():
    same = knowing(2000, 0.6)
    said = sentences({"first": knowing(2000, 0.6, 2.0), "first_post_hoc": same, "fine_tuned": same})
    assert kind_of(said, "fine_tuned") == "noise" and "told apart from `fine_tuned`" in text_of(said, "Is it better?")
    text = text_of(said, "Is it calibrated?")
    assert "as trained and" in text and "as shipped" in text and "cannot be told from perfect" in text
    assert "As trained, the lowest ECE is that of `fine_tuned`" in text_of(said)


def test_the_direction_of_the_error_is_explained_by_who_knows_more_and_corrected_by_the_closing_temperature():
    under, over = knowing(2000, 0.8, 0.6), knowing(2000, 0.4, 2.0)
    arms = {"teacher": knowing(2000, 0.3, seed=1), "first": under, "first_post_hoc": knowing(2000, 0.8)}
    text = text_of(sentences(arms, closing={"first": 0.7}), "The teacher is")
    assert "knows more than its teacher learns targets that are too soft" in text and "under-confident by" in text
    assert "its closing temperature 0.7 corrects that" in text
    text = text_of(sentences({"teacher": knowing(2000, 0.9), "first": over}, closing={"first": 1.5}), "The teacher is")
    assert "knows less than its teacher learns targets that are too sharp" in text and "over-confident by" in text


@pytest.mark.parametrize(("teacher", "student", "nothing"), [(0.4, 0.5, True), (0.95, 0.5, False), (0.4, 0.95, False)])
def test_a_teacher_that_is_no_better_than_the_fine_tuned_student_buys_nothing(teacher, student, nothing):
    arms = {"teacher": teacher, "first": student, "fine_tuned": 0.7}
    said = sentences({arm: knowing(2000, share, seed=int(arm == "fine_tuned")) for arm, share in arms.items()})
    assert ("distilling from it buys nothing here" in text_of(said)) == nothing


@pytest.mark.parametrize("carried", [True, False])
def test_the_student_to_ship_has_the_lowest_nll_on_validation_and_ships_only_a_temperature_that_it_carries(
    tmp_path, carried
):
    arms = {"first": knowing(400, 0.5, 3.0), "first_post_hoc": knowing(400, 0.5), "fine_tuned": knowing(400, 0.2)}
    notes = {} if carried else {"closing": {}, "controls": {"first": 2.0}}
    sets = {arm: {"x": values} for arm, values in arms.items()}
    metrics = write_report(tmp_path, sets, None, {}, bootstrap=20, validation=arms, **notes)
    ships = "first_post_hoc" if carried else "first"
    assert metrics["selection"]["nll"]["first"] == pytest.approx(-arms[ships]["label_log_prob"].mean())
    assert "fine_tuned" in metrics["differences"]["x"][ships] and "first_post_hoc" in metrics["arms"]
    assert ("as shipped" in text_of(metrics["summary"], "Is it calibrated?")) == carried
    best = metrics["selection"]["best"]
    assert f"`{best}` has the lowest NLL on validation" in text_of(metrics["summary"], "What should I ship?")
    assert best == "first" or not carried
    assert metrics["verdicts"]["fine_tuned"][0]["text"].startswith("Is it calibrated? On `x`, `fine_tuned`")


def test_what_is_missing_left_out_or_out_of_reach_is_said(written):
    warned = [s["text"] for s in written[1]["summary"] if s["kind"] == "warning"]
    (gap,) = [text for text in warned if "95.0 % right" in text]
    assert "65.0 % right" in gap and "datasets.transfer" in gap and not any("Not measured" in text for text in warned)
    assert "trained once" in text_of(written[1]["summary"])
    arms = {"first": answers(100, 1), "fine_tuned": answers(100, 2)}
    said = sentences(arms, 0, outside={"teacher_recalibrated": {"x": 3}}, omitted={"base": "why"})
    missing = text_of(said, "Not measured")
    assert (
        "`teacher`" in missing and "`distilled`" in missing and "fine_tuned" not in missing and "base" not in missing
    )
    assert "in 3 rows of `x` a choice is outside the kept tokens" in text_of(said)
    assert "`base` is left out: why" in text_of(said)
    assert not any(s["kind"] == "win" for s in said), "without intervals nothing is called a win"
    assert "without bootstrap intervals" in text_of(said, "Is it better?")


def test_outcomes_depend_on_the_direction_of_the_metric():
    lower = {"difference": -0.1, "interval": [-0.2, -0.05]}
    assert (outcome(lower, True), outcome(lower, False)) == ("win", "loss")
    assert outcome({"difference": -0.1, "interval": [-0.3, 0.0]}, True) == "noise"
    assert outcome({"difference": -0.1, "interval": None}, True) == "unknown"


# Files, pictures and the page


def test_the_files_of_a_report_are_all_there_and_nothing_else(written):
    folder = written[0]
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        ["metrics.json", "table.md", "summary.md", "index.html", "calibration.png", "training.png", "overview.png"]
        + [f"{kind}_{name}.png" for kind in ("reliability", "risk_coverage") for name in ("reviews", "long-b-")]
    )
    summary = (folder / "summary.md").read_text()
    assert summary.startswith("Is it calibrated? On `reviews`") and "\n**reviews**\n\n- On `reviews`" in summary


def test_a_second_report_replaces_the_first_and_a_failing_one_leaves_it_as_it_was(tmp_path, monkeypatch):
    (tmp_path / "answers").mkdir()
    (tmp_path / "answers" / "kept.png").write_bytes(b"kept")
    write_report(tmp_path, {"first": {"old": answers(30, 1)}}, None, {}, bootstrap=0)
    write_report(tmp_path, {"first": {"new": answers(30, 1)}}, None, {}, bootstrap=0)
    names = {"index.html", "metrics.json", "summary.md", "table.md", "overview.png"}
    names |= {"reliability_new.png", "risk_coverage_new.png"}
    assert {path.name for path in tmp_path.iterdir()} == names | {"answers"}
    assert (tmp_path / "answers" / "kept.png").exists()
    before = {name: (tmp_path / name).read_bytes() for name in names}

    def full_disk(*_):
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="no space left"):
        write_report(tmp_path, {"first": {"new": answers(40, 1)}}, None, {}, bootstrap=0)
    assert {name: (tmp_path / name).read_bytes() for name in names} == before


def test_drawing_leaves_no_figure_and_no_style_behind():
    import matplotlib
    from matplotlib._pylab_helpers import Gcf

    before = dict(matplotlib.rcParams)
    figures.to_png(figures.risk_coverage_figure({"a": (np.array([0.5, 1]), np.array([0.1, 0.2]))}, "x"))
    assert dict(matplotlib.rcParams) == before and not Gcf.figs


def test_a_reliability_figure_has_one_diagram_and_one_histogram_per_arm_with_the_given_numbers():
    bins = reliability_bins([0.95, 0.95, 0.55], [1, 0, 1])
    panel = {"title": "a long arm, under one temperature", "bins": bins, "ece": 0.4567, "accuracy": 2 / 3}
    figure = figures.reliability_figure([panel | {"confidence": 0.8167}] * 5, "reviews")
    figures.to_png(figure)
    diagrams, histograms = (
        [axes for axes in figure.axes if (axes.get_xlabel() == "confidence") == below] for below in (False, True)
    )
    assert len(diagrams) == len(histograms) == 5
    for axes in diagrams:
        title = axes.title.get_window_extent()
        assert title.x1 <= figure.bbox.width and title.y1 <= figure.bbox.height, "no title is cut"
    assert diagrams[0].texts[0].get_text() == "ECE 45.7 %   accuracy 66.7 %"
    bars = [patch.get_height() for patch in diagrams[0].patches]
    assert bars[:2] == [1.0, 0.5] and bars[2:] == pytest.approx([0.45, 0.45])
    assert [patch.get_height() for patch in histograms[0].patches][5::4] == pytest.approx([1 / 3, 2 / 3])


class Links(HTMLParser):
    """Every attribute that could make a browser fetch something, every tag, and every alternative text."""

    def __init__(self):
        super().__init__()
        self.links, self.tags, self.alts = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        values = dict(attrs)
        self.links += [values[name] for name in ("src", "href", "srcset", "data", "poster") if name in values]
        if tag == "img":
            self.alts.append(values.get("alt", ""))


def test_the_page_is_self_contained_escaped_and_describes_its_pictures(written):
    html = (written[0] / "index.html").read_text()
    page = Links()
    page.feed(html)
    assert page.links and all(link.startswith("data:") for link in page.links)
    assert {"script", "iframe", "b"}.isdisjoint(page.tags) and not re.search(r"@import|url\(", html)
    assert len(page.alts) == 3 + 2 * 2 and all(len(alt) > 30 for alt in page.alts)
    assert "&lt;/pre&gt;&lt;script&gt;alert(&#39;x&#39;)" in html and "long &lt;b&gt;" in html
    assert not set("\u202e\u2066\u0007") & set(html) and "good\\u202edab" in html and "x\\u2066y" in html
    assert 'name="viewport"' in html and "@media print" in html and "<code>fine_tuned</code>" in html


@pytest.mark.browser
def test_the_page_opens_in_chromium_without_an_error_or_a_request(written, tmp_path):
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("Chromium is not installed")
    page = (written[0] / "index.html").read_text()
    consoles = []
    for name, content in (
        ("page", page),
        ("asking", page.replace("<main>", "<main><img src='http://a.invalid/x.png'>")),
    ):
        (tmp_path / f"{name}.html").write_text(content)
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--window-size=400,2000"]
        flags += [f"--user-data-dir={tmp_path}/profile", f"--screenshot={tmp_path}/{name}.png"]
        command = [chromium, *flags, f"file://{tmp_path}/{name}.html"]
        run = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert run.returncode == 0 and (tmp_path / f"{name}.png").stat().st_size > 20_000, run.stderr
        consoles.append([line for line in run.stderr.splitlines() if "CONSOLE" in line])
    assert not consoles[0] and "Content Security Policy" in "".join(consoles[1]), "a request would be reported"
