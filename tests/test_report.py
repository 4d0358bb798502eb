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
from first_trl.report.verdict import ARMS, order_arms, outcome, verdict
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
    }


SHARPNESS = {
    "teacher": 3, "teacher_recalibrated": 1, "base": 1.5, "fine_tuned": 4, "fine_tuned_post_hoc": 1.6, "distilled": 3,
    "distilled_post_hoc": 1.4, "first": 1,
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
        for arm in reversed(ARMS)
    }
    history = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}, {"step": 2, "eval_loss": 1.5}, {"step": 2}]
    metrics = write_report(
        folder,
        predictions,
        CALIBRATION,
        {"name": "demo", "seed": 3, "recipe": {"prompt": "</pre><script>alert('x')</script>"}},
        {"long <b>"},
        bootstrap=100,
        validation={arm: answers(500, SHARPNESS[arm], 11) for arm in ARMS},
        test_curves={"temperature": {"reviews": [{"value": 1.0, "ece": 0.1}, {"value": 2.0, "ece": 0.05}]}},
        training={"first": history, "distilled": [{"step": 1}]},
    )
    return folder, metrics, predictions


def test_the_files_of_a_report_are_all_there_and_nothing_else(written):
    folder = written[0]
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        ["metrics.json", "table.md", "summary.md", "index.html", "calibration.png", "training.png"]
        + [f"{kind}_{name}.png" for kind in ("reliability", "risk_coverage") for name in ("reviews", "long-b-")]
    )
    for path in folder.glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG")


def test_metrics_json_holds_what_metrics_measures(written):
    folder, metrics, predictions = written
    assert json.loads((folder / "metrics.json").read_text()) == metrics
    assert list(metrics["arms"]) == list(ARMS)
    assert list(metrics["arms"]["first"]) == ["reviews", "long <b>"] and metrics["out_of_domain"] == ["long <b>"]
    values = predictions["first"]["reviews"]
    measured = metrics["arms"]["first"]["reviews"]
    alone = summarize(values["confidence"], values["correct"], values["label_log_prob"], bootstrap=100)
    assert {name: measured[name] for name in alone} == alone
    assert measured["mean_confidence"] == pytest.approx(values["confidence"].mean())
    pair = paired_difference(values, predictions["distilled"]["reviews"], bootstrap=100)
    assert metrics["differences"]["reviews"]["distilled"] == pair
    assert metrics["calibration"] == CALIBRATION


def test_the_view_restricted_to_choices_is_never_mixed_with_the_full_one(written):
    _, metrics, predictions = written
    values, measured = predictions["first"]["reviews"], metrics["arms"]["first"]["reviews"]
    restricted = expected_calibration_error(values["choice_confidence"], values["choice_correct"])
    assert measured["choices"]["ece"] == pytest.approx(restricted)
    assert measured["ece"] == pytest.approx(expected_calibration_error(values["confidence"], values["correct"]))
    assert abs(measured["ece"] - restricted) > 0.01
    assert measured["choices"]["nll"] is None and measured["nll"] is not None


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
        f"({100 * low:.1f} to {100 * high:.1f}) | {100 * measured['trust_score']:.1f} % | {measured['nll']:.3f} | "
        f"{measured['brier']:.3f} | {measured['auroc']:.3f} | {100 * sure['accuracy']:.1f} % "
        f"({100 * sure['coverage']:.1f} %) |"
    ) in text


def test_a_pipe_in_a_name_does_not_break_the_table():
    metrics = {"arms": {"a|b": {"x": summarize([0.5], [1], None, bootstrap=0)}}, "differences": {"x": {}},
               "out_of_domain": []}  # fmt: skip
    assert "| `a\\|b` | 100.0 % | 50.0 % | 50.0 % | - | 0.250 | - | - |" in table_markdown(metrics)


def sentences(first, controls, size=2000):
    """The verdict of a report of one set "x", as text by kind."""
    predictions = {"first": {"x": first}} | {arm: {"x": values} for arm, values in controls.items()}
    ordered = {arm: predictions[arm] for arm in order_arms(predictions)}
    return verdict(measure(ordered, None, set(), 10, 200, 0))


def kind_of(said, control):
    return next(s["kind"] for s in said if f"`{control}`'s;" in s["text"])


def test_the_summary_says_where_first_is_better_and_where_a_control_wins():
    good, bad = answers(2000, 1), answers(2000, 4)
    said = sentences(good, {"fine_tuned": bad})
    assert kind_of(said, "fine_tuned") == "win" and "on 1 of 1" in said[0]["text"]
    said = sentences(bad, {"fine_tuned": bad, "fine_tuned_post_hoc": good})
    assert kind_of(said, "fine_tuned_post_hoc") == "loss"
    assert "on 0 of 1" in said[0]["text"] and "where it is not" in said[0]["text"]
    text = " ".join(s["text"] for s in said)
    assert "`first` does not beat `fine_tuned_post_hoc` here" in text and "is better calibrated." in text
    assert "not `first`'s but that of `fine_tuned_post_hoc`" in text


def test_a_difference_within_noise_is_called_noise_and_not_a_win():
    said = sentences(answers(2000, 1.05), {"fine_tuned_post_hoc": answers(2000, 1.1)})
    assert kind_of(said, "fine_tuned_post_hoc") == "noise"
    sentence = next(s["text"] for s in said if "`fine_tuned_post_hoc`'s;" in s["text"])
    assert "within noise" in sentence and "does not beat" in sentence and "as far as can be told" in sentence
    assert "on 0 of 1" in said[0]["text"]


def test_calibration_bought_with_accuracy_is_called_worse():
    said = sentences(answers(2000, 0.8, ceiling=0.8), {"fine_tuned": answers(2000, 4)})
    sentence = next(s for s in said if "`fine_tuned`'s;" in s["text"])
    assert sentence["kind"] == "loss" and re.search(r"accuracy \d+\.\d points lower", sentence["text"])


def test_the_summary_names_missing_controls_the_teachers_gap_and_what_one_seed_cannot_tell(written):
    said = [s["text"] for s in written[1]["summary"] if s["kind"] == "warning"]
    assert len(said) == 1 and "95.0 % right" in said[0] and "65.0 % right" in said[0]
    assert any("trained once" in s["text"] for s in written[1]["summary"])
    said = sentences(answers(100, 1), {"fine_tuned": answers(100, 2)})
    missing = next(s["text"] for s in said if "Not measured" in s["text"])
    for arm in ("teacher", "teacher_recalibrated", "base", "fine_tuned_post_hoc", "distilled", "distilled_post_hoc"):
        assert f"`{arm}`" in missing
    assert "`fine_tuned`" not in missing


def test_without_intervals_nothing_is_called_a_win(tmp_path):
    predictions = {"first": {"x": answers(50, 1)}, "fine_tuned": {"x": answers(50, 4)}}
    metrics = write_report(tmp_path, predictions, None, {}, bootstrap=0)
    assert not any(s["kind"] == "win" for s in metrics["summary"])
    assert "without bootstrap intervals" in metrics["summary"][0]["text"]


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
    assert len(page.alts) == 2 * len(SHARPNESS) + 2 + 2 and all(len(alt) > 30 for alt in page.alts)
    assert "&lt;/pre&gt;&lt;script&gt;alert(&#39;x&#39;)" in html and "long &lt;b&gt;" in html
    assert "b" not in page.tags
    assert 'name="viewport"' in html and "@media print" in html and "<code>fine_tuned</code>" in html


def test_a_second_report_replaces_the_first_and_leaves_other_files_alone(tmp_path):
    (tmp_path / "answers").mkdir()
    (tmp_path / "answers" / "kept.png").write_bytes(b"kept")
    one = {"first": {"old": answers(30, 1)}}
    write_report(tmp_path, one, None, {}, bootstrap=0)
    write_report(tmp_path, {"first": {"new": answers(30, 1)}}, None, {}, bootstrap=0)
    assert {path.name for path in tmp_path.iterdir()} == {
        "answers", "index.html", "metrics.json", "reliability_new.png", "risk_coverage_new.png", "summary.md",
        "table.md",
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
    assert metrics["differences"] == {"x": {}, "y": {}}
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
