"""The pictures of the report, as matplotlib figures that the caller saves; how they look is in `report.mplstyle`.

They draw what they are given and measure nothing, so a picture cannot disagree with the table beside it. No pyplot:
figures are objects without global state. Colours are Okabe and Ito's, told apart by colour-blind readers, and every
line also has its own dash; gaps are hatched, so that a grey print still shows them.
"""

import io
import math
import textwrap
from collections.abc import Callable
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator, PercentFormatter

from ..constants import POST_HOC

STYLE = Path(__file__).parent / "report.mplstyle"
INK, ACCURACY, BARS = "#1f2933", "#0072b2", "#c3ccd6"
# An under-confident gap lies within the accuracy bar: the light ground keeps its hatching readable there.
OVER = {"edgecolor": "#d55e00", "facecolor": "#fdebe0", "hatch": "////", "linewidth": 0.8}
UNDER = {"edgecolor": "#009e73", "facecolor": "#d9f2ea", "hatch": "\\\\\\\\", "linewidth": 0.8}
DIAGONAL = {"color": INK, "linewidth": 1, "linestyle": (0, (4, 3))}
MEAN_ACCURACY = {"color": ACCURACY, "linewidth": 1.6}
MEAN_CONFIDENCE = {"color": INK, "linewidth": 1.2, "linestyle": (0, (2, 1.5))}
# One colour, one dash and one mark per arm, in their order.
LINES = (
    ("#0072b2", "-", "o"),
    ("#56b4e9", (0, (5, 1.5)), "s"),
    ("#999999", (0, (1, 1.2)), "D"),
    ("#d55e00", "-", "^"),
    ("#e69f00", (0, (5, 1.5)), "v"),
    ("#009e73", (0, (3, 1, 1, 1)), "P"),
    ("#cc79a7", "-", "*"),
    ("#7a5195", (0, (1, 1.2)), "X"),
    ("#8c564b", (0, (5, 1.5)), "h"),
)
PERCENT = PercentFormatter(1, decimals=0, symbol=" %")
styled = rc_context(fname=STYLE)  # as a decorator: matplotlib reads its settings where things are made and saved


@styled
def to_png(figure: Figure) -> bytes:
    """The figure as the content of a PNG file."""
    buffer = io.BytesIO()
    FigureCanvasAgg(figure)  # binds the figure to the backend that draws without a screen
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _grid(count: int, columns: int, width: float, height: float, extra: float, **options):
    """A figure of `count` panels of so many inches, `columns` in a row, and its axes; `extra` inches for the rest."""
    columns = min(columns, count)
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(width * columns + 0.4, height * rows + extra))
    panels = figure.subplots(rows, columns, squeeze=False, **options).ravel()
    for axes in panels[count:]:
        axes.remove()
    return figure, panels[:count]


@styled
def reliability_figure(panels: list[dict], title: str = "", columns: int = 4) -> Figure:
    """Reliability diagrams side by side (the paper's Figures 3 and 5), one per arm, each over its histogram.

    Args:
        panels: one dict per arm: "title", "bins" (`metrics.ReliabilityBins` of equal width), "ece" and "accuracy" as
            shares, "confidence" (the mean).
        title: what all panels share, such as the data set; empty for none.
        columns: panels in a row.
    """
    columns = min(columns, len(panels))
    rows = math.ceil(len(panels) / columns)
    legend_columns = min(columns, 3)
    figure = Figure(figsize=(2.4 * columns + 0.5, 3.5 * rows + 0.4 + 1.2 / legend_columns))
    if title:
        figure.suptitle(textwrap.fill(title, 23 * columns), x=0.01, ha="left")
    most = max((panel["bins"].count / panel["bins"].count.sum()).max() for panel in panels)
    parts = figure.subplots(2 * rows, columns, squeeze=False, sharex=True, height_ratios=[4, 1] * rows)
    for place in range(columns * rows):
        row, column = divmod(place, columns)
        diagram, histogram = parts[2 * row, column], parts[2 * row + 1, column]
        if place >= len(panels):
            diagram.remove()
            histogram.remove()
            continue
        _draw_reliability(diagram, panels[place])
        _draw_histogram(histogram, panels[place], math.ceil(4 * most) / 4)
        for axes, words in ((diagram, "accuracy"), (histogram, "examples")):
            axes.set_ylabel(words if column == 0 else "")
            axes.tick_params(labelleft=column == 0)
    handles = [
        Patch(facecolor=ACCURACY, label="accuracy in the bin"),
        Patch(label="over-confident by", **OVER),
        Patch(label="under-confident by", **UNDER),
        Line2D([], [], label="confidence = accuracy", **DIAGONAL),
        Line2D([], [], label="accuracy over all", **MEAN_ACCURACY),
        Line2D([], [], label="mean confidence", **MEAN_CONFIDENCE),
    ]
    figure.legend(handles=handles, loc="outside lower left", ncols=legend_columns, fontsize=8)
    return figure


def _draw_reliability(axes, panel: dict) -> None:
    """Accuracy bars, and from each the hatched gap to the bin's mean confidence."""
    bins = panel["bins"]
    used = bins.count > 0
    left, width = bins.lower[used], (bins.upper - bins.lower)[used]
    accuracy, confidence = bins.accuracy[used], bins.confidence[used]
    axes.bar(left, accuracy, width, align="edge", color=ACCURACY, edgecolor="white", linewidth=0.8)
    for over, look in ((True, OVER), (False, UNDER)):
        show = (confidence > accuracy) == over
        low, high = np.minimum(accuracy, confidence)[show], np.maximum(accuracy, confidence)[show]
        axes.bar(left[show], high - low, width[show], bottom=low, align="edge", **look)
    axes.plot([0, 1], [0, 1], **DIAGONAL)
    axes.set_title(textwrap.fill(panel["title"], 24), pad=19)
    numbers = f"ECE {100 * panel['ece']:.1f} %   accuracy {100 * panel['accuracy']:.1f} %"
    axes.annotate(numbers, (0, 1), (0, 5), xycoords="axes fraction", textcoords="offset points", fontsize=8.5)
    axes.set(xlim=(0, 1), ylim=(0, 1), yticks=(0, 0.25, 0.5, 0.75, 1))
    axes.yaxis.set_major_formatter(PERCENT)


def _draw_histogram(axes, panel: dict, top: float) -> None:
    """Share of the examples in each bin, up to `top`; the distance of the two lines is the mean miscalibration."""
    bins = panel["bins"]
    share = bins.count / bins.count.sum()
    axes.bar(bins.lower, share, bins.upper - bins.lower, align="edge", color=BARS, edgecolor="white", linewidth=0.8)
    axes.vlines(panel["accuracy"], 0, top, **MEAN_ACCURACY)
    axes.vlines(panel["confidence"], 0, top, **MEAN_CONFIDENCE)
    axes.set(ylim=(0, top), yticks=(0, top), xlabel="confidence")
    axes.set_xticks((0, 0.25, 0.5, 0.75, 1), ["0", "25", "50", "75", "100 %"])
    axes.tick_params(labelbottom=True)
    axes.yaxis.set_major_formatter(PERCENT)


@styled
def overview_figure(
    points: dict[str, dict[str, tuple[float, float]]], titles: dict[str, str], label: Callable[[str], str]
) -> Figure:
    """All arms at a glance: accuracy against calibration error, one panel per set, an arrow to the arm as shipped.

    Args:
        points: {arm: {set: (ECE, accuracy)}}.
        titles: {set: its title}.
        label: the name of an arm for people.
    """
    figure, panels = _grid(len(titles), 3, 3.6, 3.2, 1.1)
    arms = [arm for arm in points if not arm.endswith(POST_HOC)]
    for axes, (name, title) in zip(panels, titles.items(), strict=True):
        for place, arm in enumerate(arms):
            color, _, marker = LINES[place % len(LINES)]
            trained, ships = points[arm].get(name), points.get(arm + POST_HOC, {}).get(name)
            if trained is None:
                continue
            mark = {"marker": marker, "color": color, "markersize": 7, "zorder": 3, "clip_on": False, "linestyle": ""}
            axes.plot(*trained, label=label(arm), **mark)
            if ships is not None and ships != trained:
                axes.annotate("", ships, trained, arrowprops={"arrowstyle": "->", "color": color}, zorder=2)
                axes.plot(*ships, markerfacecolor="white", **mark)
        axes.set(xlabel="calibration error (ECE)", ylabel="accuracy", xlim=(0, None))
        axes.xaxis.set_major_formatter(PERCENT)
        axes.yaxis.set_major_formatter(PERCENT)
        axes.set_title(textwrap.fill(title, 36), fontsize=9)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower left", ncols=3, fontsize=8)
    return figure


@styled
def risk_coverage_figure(curves: dict[str, tuple[np.ndarray, np.ndarray]], title: str, emphasis: str = "") -> Figure:
    """Error rate among the answered examples against the share answered, one line per arm.

    Args:
        curves: {arm: (coverage, risk)}, both (G,) ascending in coverage.
        emphasis: the arm drawn thick.
    """
    figure, (axes,) = _grid(1, 1, 6.2, 3.7, 0)
    for place, (arm, (coverage, risk)) in enumerate(curves.items()):
        color, dash, _ = LINES[place % len(LINES)]
        width, order = (3.0, 3) if arm == emphasis else (1.5, 2)
        axes.plot(coverage, risk, color=color, linestyle=dash, linewidth=width, zorder=order, label=arm)
    axes.set(xlim=(0, 1), xlabel="share of the examples answered, most confident first", ylabel="error rate")
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_formatter(PERCENT)
    axes.yaxis.set_major_formatter(PERCENT)
    # Not the title of the axes, which would be cut beside the legend
    figure.suptitle(textwrap.fill(title, 70), x=0.01, ha="left", fontsize=10)
    figure.legend(loc="outside right center", handlelength=2.8)
    return figure


@styled
def calibration_figure(families: dict[str, dict], test_curves: dict[str, dict[str, list[dict]]]) -> Figure:
    """Calibration error against the recalibration value (the paper's Figure 6), one panel per family.

    Args:
        families: {method: an entry of `calibration.json`'s "families"}, only those with a value.
        test_curves: {method: {set: [{"value", "ece"}, ...]}}, may be empty.
    """
    figure, panels = _grid(len(families), len(families), max(3.4, 5.4 / len(families)), 3.7, 0, sharey=True)
    entries: dict = {}
    for axes, (method, family) in zip(panels, families.items(), strict=True):
        _draw_calibration(axes, method, family, test_curves.get(method, {}))
        handles, labels = axes.get_legend_handles_labels()
        entries = dict(zip(labels, handles, strict=True)) | entries
    panels[0].set(ylabel="calibration error (ECE)", ylim=(0, None))
    panels[0].yaxis.set_major_formatter(PERCENT)
    figure.legend(entries.values(), entries, loc="outside lower center", ncols=min(len(entries), 3 * len(families)))
    return figure


def _draw_calibration(axes, method: str, family: dict, test_curves: dict[str, list[dict]]) -> None:
    """One family's curves, the error without recalibration, and the value that was chosen."""
    if family.get("interval"):
        axes.axvspan(*family["interval"], color=ACCURACY, alpha=0.13, linewidth=0, label="95 % interval")
    axes.axhline(family["ece_before"], label="not recalibrated", **DIAGONAL)
    sets = {"validation": family["curve"], **test_curves}
    for (name, curve), (color, dash, _) in zip(sets.items(), (LINES[0], *LINES[3:]), strict=False):
        values, errors = [point["value"] for point in curve], [point["ece"] for point in curve]
        width = 2.2 if name == "validation" else 1.4
        axes.plot(values, errors, color=color, linestyle=dash, linewidth=width, label=name)
    axes.plot(family["value"], family["ece_after"], "o", color=INK, markersize=6, label="chosen", zorder=4)
    symbol = {"probability": "c", "label_smoothing": "d"}.get(method, "T")
    axes.set(title=f"{method.replace('_', ' ')}, {symbol} = {family['value']:.3g}")
    axes.set_xlabel(f"recalibration value {symbol}")
    if symbol == "T":
        low, *_, high = sorted(point["value"] for point in family["curve"])
        ticks = [tick for tick in (0.25, 0.5, 1, 2, 3, 5, 10) if low <= tick <= high]
        axes.set_xscale("log")
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.set_xticks([], minor=True)


@styled
def training_figure(logs: dict[str, dict[str, list[tuple[float, float]]]]) -> Figure:
    """Loss against the training step, one panel per arm, because losses of different kinds have no common scale.

    Args:
        logs: {arm: {"training" and "validation": [(step, loss), ...]}}.
    """
    figure, panels = _grid(len(logs), 3, 3.3, 2.5, 0.4)
    for axes, (arm, lines) in zip(panels, logs.items(), strict=True):
        for name, points in lines.items():
            color, dash, _ = LINES[0] if name == "training" else LINES[4]
            look = {"color": color, "linestyle": dash, "marker": "o" if len(points) < 30 else None, "markersize": 3}
            axes.plot(*zip(*points, strict=True), label=name, **look)
        axes.set(title=arm, xlabel="step", ylabel="loss (nats)", ylim=(0, None))
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.legend(fontsize=8)
    return figure
