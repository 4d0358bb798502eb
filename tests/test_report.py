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
from first_trl.report.writing import measure, table_markdown, write_report


def answers(size, sharpness, seed=0, noise=0.0, ceiling=1.0):
    """An arm whose true chance of being right is known; sharpness 1 states it, more is over-confident."""
    generator = np.random.default_rng(seed)
    truth = generator.uniform(0.4, 1, size)
    right = np.random.default_rng(seed + 1).random(size) < truth * ceiling
    stated = (truth + np.random.default_rng(seed + 2).normal(0, noise, size)).clip(0.02, 0.999) ** (1 / sharpness)
    return {
        "confidence": stated,
        "correct": right,
        "label_log_prob": np.log(np.where(right, stated, 1 - stated)),
        "choice_confidence": np.sqrt(stated),
        "choice_correct": right,
        "choice_label_log_prob": np.log(np.where(right, np.sqrt(stated), 1 - np.sqrt(stated))),
    }


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
        "none": {
            "value": None, "interval": None, "ece_before": 0.2, "ece_after": 0.2,
            "curve": [{"value": None, "ece": 0.2, "nll": 1.0}],
        },
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
        {"name": "demo", "seed": 3, "recipe": {"prompt": "</pre><script>alert('x')</script>"}},
        {"long <b>"},
        bootstrap=100,
        validation={arm: answers(500, SHARPNESS[arm], 11) for arm in SHARPNESS},
        test_curves={"temperature": {"reviews": [{"value": 1.0, "ece": 0.1}, {"value": 2.0, "ece": 0.05}]}},
        training={"first": history, "distilled": [{"step": 1}]},
    )
    return folder, metrics, predictions


def test_the_files_of_a_report_are_all_there_and_nothing_else(written):
    folder = written[0]
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        ["metrics.json", "table.md", "summary.md", "index.html", "calibration.png", "training.png", "overview.png"]
        + [f"{kind}_{name}.png" for kind in ("reliability", "risk_coverage") for name in ("reviews", "long-b-")]
    )
    for path in folder.glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG")


def test_metrics_json_holds_what_metrics_measures(written):
    folder, metrics, predictions = written
    assert json.loads((folder / "metrics.json").read_text()) == metrics
    assert list(metrics["arms"]) == list(SHARPNESS)
    assert list(metrics["arms"]["first"]) == ["reviews", "long <b>"] and metrics["out_of_domain"] == ["long <b>"]
    values = predictions["first"]["reviews"]
    measured = metrics["arms"]["first"]["reviews"]
    alone = summarize(values["confidence"], values["correct"], values["label_log_prob"], bootstrap=100)
    assert {name: measured[name] for name in alone} == alone
    assert measured["mean_confidence"] == pytest.approx(values["confidence"].mean())
    names = ("confidence", "correct", "label_log_prob")
    ours, theirs = (
        {name: predictions[arm]["reviews"][f"choice_{name}"] for name in names}
        for arm in ("first_post_hoc", "distilled")
    )
    pair = paired_difference(ours, theirs, bootstrap=100)
    found = metrics["differences"]["reviews"]["first_post_hoc"]["distilled"]
    assert metrics["view"] == "choices" and found == {name: pair[name] for name in found}
    assert {"nll", "accuracy", "ece_debiased"} <= set(found)
    assert metrics["calibration"] == CALIBRATION


def test_the_view_restricted_to_choices_is_never_mixed_with_the_full_one(written):
    _, metrics, predictions = written
    values, measured = predictions["first"]["reviews"], metrics["arms"]["first"]["reviews"]
    restricted = expected_calibration_error(values["choice_confidence"], values["choice_correct"])
    assert measured["choices"]["ece"] == pytest.approx(restricted)
    assert measured["ece"] == pytest.approx(expected_calibration_error(values["confidence"], values["correct"]))
    assert abs(measured["ece"] - restricted) > 0.01
    assert measured["choices"]["nll"] == pytest.approx(-values["choice_label_log_prob"].mean()) != measured["nll"]


def test_a_threshold_is_fitted_on_validation_and_applied_to_test(written):
    _, metrics, predictions = written
    fitted = metrics["arms"]["first"]["reviews"]["selective"]
    answered = predictions["first"]["reviews"]["confidence"] >= fitted["threshold"]
    assert fitted["coverage"] == answered.mean() and 0.1 < fitted["coverage"] < 0.6
    assert fitted["accuracy"] == predictions["first"]["reviews"]["correct"][answered].mean() > 0.85


def test_the_threshold_of_the_view_restricted_to_choices_is_its_own(written):
    _, metrics, predictions = written
    restricted = metrics["arms"]["first"]["reviews"]["choices"]["selective"]
    answered = predictions["first"]["reviews"]["choice_confidence"] >= restricted["threshold"]
    assert restricted["coverage"] == answered.mean() > 0.1
    assert restricted["threshold"] != metrics["arms"]["first"]["reviews"]["selective"]["threshold"]


def test_an_arm_that_validation_never_found_sure_says_so(tmp_path):
    arm = {"first": {"x": answers(50, 1)}}
    wrong = {"confidence": np.full(50, 0.9), "correct": np.zeros(50, bool)}
    metrics = write_report(tmp_path, arm, None, {}, bootstrap=0, validation={"first": wrong})
    assert metrics["arms"]["first"]["x"]["selective"]["coverage"] == 0
    assert "| never sure |" in (tmp_path / "table.md").read_text()


def test_the_table_has_a_row_per_arm_and_every_cell(written):
    folder, metrics, _ = written
    text = (folder / "table.md").read_text()
    assert text.count("| `first` |") == 4 and text.count("### ") == 4  # two sets, two views
    measured = metrics["arms"]["first"]["reviews"]
    low, high = measured["ci"]["ece"]
    sure = measured["selective"]
    assert (
        f"| `first` | {100 * measured['accuracy']:.1f} % | {100 * measured['ece']:.1f} % "
        f"({100 * low:.1f} to {100 * high:.1f}) | {measured['nll']:.3f} | {measured['brier']:.3f} | "
        f"{measured['aurc']:.3f} | {100 * measured['trust_score']:.1f} % | {100 * sure['accuracy']:.1f} % "
        f"({100 * sure['coverage']:.1f} %) |"
    ) in text
    assert text.startswith("Measured: the declared choices") and text.index("restricted") < text.index(
        "over the whole"
    )


def test_a_pipe_in_a_name_does_not_break_the_table():
    metrics = {"arms": {"a|b": {"x": summarize([0.5], [1], None, bootstrap=0)}}, "differences": {"x": {}},
               "out_of_domain": [], "view": "vocabulary"}  # fmt: skip
    assert "| `a\\|b` | 100.0 % | 50.0 % | - | 0.250 | 0.000 | 50.0 % | - |" in table_markdown(metrics)


def sentences(arms, focus="first", **notes):
    """The verdict of a report of one set "x"; `arms` are the predictions of each."""
    ordered = {arm: {"x": arms[arm]} for arm in order_arms(arms)}
    return verdict(measure(ordered, None, set(), 10, 200, 0) | notes, focus)


def kind_of(said, control):
    return next(s["kind"] for s in said if s["text"].startswith(f"Against `{control}`"))


def text_of(said, beginning=""):
    return " ".join(s["text"] for s in said if s["text"].startswith(beginning))


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
    assert kind_of(said, "fine_tuned") == "noise" and "as much as `fine_tuned`" in text_of(said, "Is it better?")
    text = text_of(said, "Is it calibrated?")
    assert "as trained and" in text and "as shipped" in text and "cannot be told from perfect" in text
    assert "As trained, the lowest ECE is that of `fine_tuned`" in text_of(said)


def test_the_direction_of_the_error_is_explained_by_who_knows_more_and_corrected_by_the_closing_temperature():
    teacher, student = knowing(2000, 0.3, seed=1), knowing(2000, 0.8, 0.6)
    said = sentences(
        {"teacher": teacher, "first": student, "first_post_hoc": knowing(2000, 0.8)}, closing={"first": 0.7}
    )
    text = text_of(said, "The teacher is")
    assert "knows more than its teacher learns targets that are too soft" in text and "under-confident by" in text
    assert "its closing temperature 0.7 corrects that" in text
    said = sentences({"teacher": knowing(2000, 0.9), "first": knowing(2000, 0.4, 2.0)}, closing={"first": 1.5})
    text = text_of(said, "The teacher is")
    assert "knows less than its teacher learns targets that are too sharp" in text and "over-confident by" in text


def test_a_teacher_that_is_no_better_than_the_fine_tuned_student_buys_nothing():
    weak, strong = knowing(2000, 0.4), knowing(2000, 0.7, seed=1)
    arms = {"first": knowing(2000, 0.5), "fine_tuned": strong}
    assert "distilling from it buys nothing here" in text_of(sentences(arms | {"teacher": weak}))
    assert "buys nothing" not in text_of(sentences(arms | {"teacher": knowing(2000, 0.95)}))
    better = {"first": knowing(2000, 0.95), "fine_tuned": strong}
    assert "buys nothing" not in text_of(sentences(better | {"teacher": weak})), "the student gained all the same"


def test_a_temperature_that_no_student_carries_is_a_control_and_never_what_ships(tmp_path):
    arms = {"first": knowing(400, 0.5, 3.0), "first_post_hoc": knowing(400, 0.5), "fine_tuned": knowing(400, 0.4)}
    sets = {arm: {"x": values} for arm, values in arms.items()}
    metrics = write_report(
        tmp_path, sets, None, {}, bootstrap=20, validation=arms, closing={}, controls={"first": 2.0}
    )
    assert "first_post_hoc" in metrics["arms"] and "fine_tuned" in metrics["differences"]["x"]["first"]
    assert metrics["selection"]["nll"]["first"] == pytest.approx(-arms["first"]["label_log_prob"].mean())
    assert "as shipped" not in text_of(metrics["summary"], "Is it calibrated?")


def test_the_student_to_ship_has_the_lowest_nll_on_validation_as_shipped(tmp_path):
    arms = {"first": knowing(400, 0.5, 3.0), "first_post_hoc": knowing(400, 0.5), "fine_tuned": knowing(400, 0.2)}
    metrics = write_report(
        tmp_path, {arm: {"x": values} for arm, values in arms.items()}, None, {}, bootstrap=20, validation=arms
    )
    assert metrics["selection"]["best"] == "first"
    assert metrics["selection"]["nll"]["first"] == pytest.approx(-arms["first_post_hoc"]["label_log_prob"].mean())
    assert "`first` has the lowest NLL on validation" in text_of(metrics["summary"], "What should I ship?")
    assert metrics["verdicts"]["fine_tuned"][0]["text"].startswith("Is it calibrated? On `x` `fine_tuned`")


def test_what_a_control_could_not_measure_is_said():
    said = sentences({"first": knowing(60, 0.5)}, outside={"teacher_recalibrated": {"x": 3}}, omitted={"base": "why"})
    assert "in 3 rows of `x` a choice is outside the kept tokens" in text_of(
        said
    ) and "`base` is left out: why" in text_of(said)


def test_the_summary_names_missing_controls_the_teachers_gap_and_what_one_seed_cannot_tell(written):
    said = [s["text"] for s in written[1]["summary"] if s["kind"] == "warning"]
    (gap,) = [text for text in said if "95.0 % right" in text]
    assert "65.0 % right" in gap and "datasets.transfer" in gap and not any("Not measured" in text for text in said)
    assert any("trained once" in s["text"] for s in written[1]["summary"])
    said = sentences({"first": answers(100, 1), "fine_tuned": answers(100, 2)})
    missing = next(s["text"] for s in said if "Not measured" in s["text"])
    for arm in ("teacher", "teacher_recalibrated", "base", "distilled"):
        assert f"`{arm}`" in missing
    assert "`fine_tuned`" not in missing


def test_without_intervals_nothing_is_called_a_win(tmp_path):
    predictions = {"first": {"x": answers(50, 1)}, "fine_tuned": {"x": answers(50, 4)}}
    metrics = write_report(tmp_path, predictions, None, {}, bootstrap=0)
    assert not any(s["kind"] == "win" for s in metrics["summary"])
    assert "without bootstrap intervals" in text_of(metrics["summary"], "Is it better?")


def test_outcomes_depend_on_the_direction_of_the_metric():
    lower = {"difference": -0.1, "interval": [-0.2, -0.05]}
    assert (outcome(lower, True), outcome(lower, False)) == ("win", "loss")
    assert outcome({"difference": -0.1, "interval": [-0.3, 0.0]}, True) == "noise"
    assert outcome({"difference": -0.1, "interval": None}, True) == "unknown"


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
    assert "script" not in page.tags and "iframe" not in page.tags and "link" in page.tags
    assert not re.search(r"@import|url\(", html)
    assert len(page.alts) == 2 * len(SHARPNESS) + 2 + 3 and all(len(alt) > 30 for alt in page.alts)
    assert "&lt;/pre&gt;&lt;script&gt;alert(&#39;x&#39;)" in html and "long &lt;b&gt;" in html
    assert "b" not in page.tags
    assert 'name="viewport"' in html and "@media print" in html and "<code>fine_tuned</code>" in html


def test_characters_that_reorder_or_hide_others_are_written_as_codes(tmp_path):
    hidden = {"recipe": {"choices": ["good\u202edab", "\u0007bell"]}, "name": "x\u2066y"}
    write_report(tmp_path, {"first": {"x": answers(30, 1)}}, None, hidden, bootstrap=0)
    html = (tmp_path / "index.html").read_text()
    assert not set("\u202e\u2066\u0007") & set(html) and "good\\u202edab" in html and "x\\u2066y" in html


def test_a_second_report_replaces_the_first_and_leaves_other_files_alone(tmp_path):
    (tmp_path / "answers").mkdir()
    (tmp_path / "answers" / "kept.png").write_bytes(b"kept")
    one = {"first": {"old": answers(30, 1)}}
    write_report(tmp_path, one, None, {}, bootstrap=0)
    write_report(tmp_path, {"first": {"new": answers(30, 1)}}, None, {}, bootstrap=0)
    assert {path.name for path in tmp_path.iterdir()} == {
        "answers", "index.html", "metrics.json", "overview.png", "reliability_new.png", "risk_coverage_new.png",
        "summary.md", "table.md",
    }  # fmt: skip
    assert (tmp_path / "answers" / "kept.png").exists()


def test_a_failing_write_leaves_the_old_report(tmp_path, monkeypatch):
    predictions = {"first": {"x": answers(30, 1)}}
    write_report(tmp_path, predictions, None, {}, bootstrap=0)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full_disk(*_):
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="no space left"):
        write_report(tmp_path, {"first": {"x": answers(40, 1)}}, None, {}, bootstrap=0)
    assert {name: (tmp_path / name).read_bytes() for name in before} == before


def test_extreme_arms_are_drawn_and_written(tmp_path):
    """One example, everything right, labels ruled out, an arm without a set, no `first`."""
    ruled_out = {"confidence": [0.9], "correct": [False], "label_log_prob": [-np.inf]}
    certain = {"confidence": [1.0], "correct": [True], "label_log_prob": [0.0]}
    predictions = {"a": {"x": ruled_out}, "b": {"x": certain, "y": certain}}
    metrics = write_report(tmp_path, predictions, None, {}, bootstrap=10)
    said = [s["text"] for s in metrics["summary"]]
    assert "no `first` arm" in said[0] and any("probability 0" in text and "`a` on `x` (1)" in text for text in said)
    assert list(metrics["differences"]["x"]) == ["a", "b"] and metrics["differences"]["y"] == {"b": {}}
    assert "| infinite |" in (tmp_path / "table.md").read_text()


def test_nothing_to_report_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no predictions"):
        write_report(tmp_path, {"first": {}}, None, {})
    with pytest.raises(ValueError, match="different numbers of examples"):
        write_report(tmp_path, {"first": {"x": answers(3, 1)}, "base": {"x": answers(4, 1)}}, None, {})


def test_drawing_leaves_no_figure_and_no_style_behind():
    import matplotlib
    from matplotlib._pylab_helpers import Gcf

    before = dict(matplotlib.rcParams)
    figures.to_png(figures.risk_coverage_figure({"a": (np.array([0.5, 1]), np.array([0.1, 0.2]))}, "x"))
    assert dict(matplotlib.rcParams) == before and not Gcf.figs


def test_a_reliability_figure_has_one_diagram_and_one_histogram_per_arm_with_the_given_numbers():
    bins = reliability_bins([0.95, 0.95, 0.55], [1, 0, 1])
    panel = {"title": "arm", "bins": bins, "ece": 0.4567, "accuracy": 2 / 3, "confidence": 0.8167}
    figure = figures.reliability_figure([panel] * 5, "reviews")
    assert len(figure.axes) == 10
    assert {round(axes.bbox.width) for axes in figure.axes} == {round(figure.axes[0].bbox.width)}
    assert figure.axes[0].texts[0].get_text() == "ECE 45.7 %   accuracy 66.7 %"
    bars = [patch.get_height() for patch in figure.axes[0].patches]
    assert bars[:2] == [1.0, 0.5] and bars[2:] == pytest.approx([0.45, 0.45])
    assert [patch.get_height() for patch in figure.axes[1].patches][5::4] == pytest.approx([1 / 3, 2 / 3])


def browse(page, folder):
    """Open a page in headless Chromium; returns its console and the addresses that it asked for."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("Chromium is not installed")
    flags = [
        "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
        "--disable-background-networking", "--disable-component-update", "--enable-logging=stderr",
        "--disable-features=NetworkTimeServiceQuerying", "--host-resolver-rules=MAP * ~NOTFOUND",
        "--window-size=400,2000", f"--user-data-dir={folder}/profile", f"--log-net-log={folder}/net.json",
        f"--screenshot={folder}/page.png",
    ]  # fmt: skip
    run = subprocess.run([chromium, *flags, f"file://{page}"], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    console = [line for line in run.stderr.splitlines() if "CONSOLE" in line]
    # The browser's own errands (updates, the time of day) have no page as their initiator.
    lines = [line for line in (folder / "net.json").read_text().splitlines() if '"initiator":' in line]
    pages = [line for line in lines if '"initiator":"not an origin"' not in line]
    asked = {url for line in pages for url in re.findall(r'"url":"(https?:[^"]*)"', line)}
    return console, asked


@pytest.mark.browser
def test_the_page_opens_in_chromium_without_an_error_or_a_request(written, tmp_path):
    console, asked = browse(written[0] / "index.html", tmp_path)
    assert not console and not asked
    assert (tmp_path / "page.png").stat().st_size > 20_000
    # The check sees what it looks for:
    (tmp_path / "other").mkdir()
    wrong = tmp_path / "other" / "page.html"
    wrong.write_text("<img src='http://elsewhere.invalid/x.png'><script>console.error('seen')</script>")
    console, asked = browse(wrong, tmp_path / "other")
    assert any("seen" in line for line in console) and "http://elsewhere.invalid/x.png" in asked
