"""The pictures of the report, as matplotlib figures that nobody shows and the caller saves.

They draw what they are given and measure nothing, so a picture cannot disagree with the table beside it. No pyplot:
figures are objects without global state, drawn by the Agg backend. Colours are Okabe and Ito's, told apart by
colour-blind readers, and every line also has its own dash; gaps are hatched, so that a grey print still shows them.
"""

import io
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator, PercentFormatter

from ..constants import POST_HOC

INK, MUTED, GRID = "#1f2933", "#5f6b7a", "#e3e7ec"
ACCURACY, BARS = "#0072b2", "#c3ccd6"
# Edge, ground and hatch of a gap. An under-confident gap lies within the accuracy bar: the light ground keeps its
# hatching readable there.
OVER = {"edgecolor": "#d55e00", "facecolor": "#fdebe0", "hatch": "////", "linewidth": 0.8}
UNDER = {"edgecolor": "#009e73", "facecolor": "#d9f2ea", "hatch": "\\\\\\\\", "linewidth": 0.8}
DIAGONAL = {"color": INK, "linewidth": 1, "linestyle": (0, (4, 3))}
MEAN_ACCURACY = {"color": ACCURACY, "linewidth": 1.6}
MEAN_CONFIDENCE = {"color": INK, "linewidth": 1.2, "linestyle": (0, (2, 1.5))}
# One colour and one dash per line, in the order of the lines.
LINES = (
    ("#0072b2", "-"),
    ("#56b4e9", (0, (5, 1.5))),
    ("#999999", (0, (1, 1.2))),
    ("#d55e00", "-"),
    ("#e69f00", (0, (5, 1.5))),
    ("#009e73", (0, (3, 1, 1, 1))),
    ("#cc79a7", "-"),
    ("#7a5195", (0, (1, 1.2))),
    ("#8c564b", (0, (5, 1.5))),
)
MARKERS = "osD^vP*Xh"
STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": "#aab4c0",
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "hatch.linewidth": 0.8,
    "legend.frameon": False,
}
QUARTERS = (0, 0.25, 0.5, 0.75, 1)
PERCENT = PercentFormatter(1, decimals=0, symbol=" %")


def to_png(figure: Figure, dpi: int = 150) -> bytes:
    """The figure as the content of a PNG file."""
    buffer = io.BytesIO()
    FigureCanvasAgg(figure)  # binds the figure to the backend that draws without a screen
    with rc_context(STYLE):
        figure.savefig(buffer, format="png", dpi=dpi, facecolor="white")
    return buffer.getvalue()


def reliability_figure(panels: list[dict], title: str = "", columns: int = 4, legend: bool = True) -> Figure:
    """Reliability diagrams side by side (the paper's Figures 3 and 5), one per arm, each over its histogram.

    Args:
        panels: one dict per arm: "title", "bins" (`metrics.ReliabilityBins` of equal width), "ece" and "accuracy" as
            shares, "confidence" (the mean).
        title: what all panels share, such as the data set; empty for none.
        columns: panels in a row.
    """
    columns = min(columns, len(panels))
    rows = math.ceil(len(panels) / columns)
    # Placed by hand, in inches, so that all panels have one size and their histograms lie exactly under them.
    side, below, gap, pitch = 2.0, 0.5, 0.14, (2.62, 3.6)
    left, top = 0.66, 0.86 if title else 0.46
    width = left + side + pitch[0] * (columns - 1) + 0.2
    most = max((panel["bins"].count / panel["bins"].count.sum()).max() for panel in panels)
    height = top + side + gap + below + pitch[1] * (rows - 1) + (0.86 if legend else 0.46)
    with rc_context(STYLE):
        figure = Figure(figsize=(width, height))
        if title:
            figure.text(0.1 / width, 1 - 0.1 / height, title, fontsize=12, fontweight="bold", ha="left", va="top")
        for place, panel in enumerate(panels):
            row, column = divmod(place, columns)
            x, y = left + column * pitch[0], height - top - side - row * pitch[1]
            diagram = figure.add_axes((x / width, y / height, side / width, side / height))
            y -= gap + below
            histogram = figure.add_axes((x / width, y / height, side / width, below / height))
            _draw_reliability(diagram, panel, label=column == 0)
            _draw_histogram(histogram, panel, math.ceil(4 * most) / 4, label=column == 0)
        if legend:
            _reliability_legend(figure, columns)
    return figure


def _reliability_legend(figure: Figure, columns: int) -> None:
    handles = [
        Patch(facecolor=ACCURACY, label="accuracy in the bin"),
        Patch(label="over-confident by", **OVER),
        Patch(label="under-confident by", **UNDER),
        Line2D([], [], label="confidence = accuracy", **DIAGONAL),
        Line2D([], [], label="accuracy over all", **MEAN_ACCURACY),
        Line2D([], [], label="mean confidence", **MEAN_CONFIDENCE),
    ]
    figure.legend(
        handles=handles,
        loc="lower center",
        ncols={1: 2, 2: 3, 3: 3}.get(columns, 6),
        handlelength=1.6,
        columnspacing=1.2,
        fontsize=8 if columns > 1 else 6,
        borderaxespad=0.2,
    )


def _draw_reliability(axes, panel: dict, label: bool) -> None:
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
    axes.set_title(panel["title"], pad=19)
    numbers = f"ECE {100 * panel['ece']:.1f} %   accuracy {100 * panel['accuracy']:.1f} %"
    axes.annotate(numbers, (0, 1), (0, 5), xycoords="axes fraction", textcoords="offset points", fontsize=8.5)
    axes.set(xlim=(0, 1), ylim=(0, 1))
    axes.set(xticks=QUARTERS, yticks=QUARTERS)
    axes.yaxis.set_major_formatter(PERCENT)
    axes.tick_params(labelbottom=False, labelleft=label)
    if label:
        axes.set_ylabel("accuracy")
        axes.yaxis.set_label_coords(-0.24, 0.5)


def _draw_histogram(axes, panel: dict, top: float, label: bool) -> None:
    """Share of the examples in each bin, up to `top`; the distance of the two lines is the mean miscalibration."""
    bins = panel["bins"]
    share = bins.count / bins.count.sum()
    axes.bar(bins.lower, share, bins.upper - bins.lower, align="edge", color=BARS, edgecolor="white", linewidth=0.8)
    axes.vlines(panel["accuracy"], 0, top, **MEAN_ACCURACY)
    axes.vlines(panel["confidence"], 0, top, **MEAN_CONFIDENCE)
    axes.set(xlim=(0, 1), ylim=(0, top), xlabel="confidence", yticks=(0, top))
    axes.set_xticks(QUARTERS, ["0", "25", "50", "75", "100 %"])
    axes.yaxis.set_major_formatter(PERCENT)
    axes.tick_params(labelleft=label, labelsize=8)
    if label:
        axes.set_ylabel("examples", fontsize=8)
        axes.yaxis.set_label_coords(-0.24, 0.5)


def overview_figure(
    points: dict[str, dict[str, tuple[float, float]]], titles: dict[str, str], label: Callable[[str], str]
) -> Figure:
    """All arms at a glance: accuracy against calibration error, one panel per set, an arrow to the arm as shipped.

    Args:
        points: {arm: {set: (ECE, accuracy)}}.
        titles: {set: its title}.
        label: the name of an arm for people.
    """
    columns = min(3, len(titles))
    num_rows = math.ceil(len(titles) / columns)
    with rc_context(STYLE):
        figure = Figure(figsize=(3.6 * columns + 0.4, 3.2 * num_rows + 1.1), layout="constrained")
        panels = figure.subplots(num_rows, columns, squeeze=False).ravel()
        arms = [arm for arm in points if not arm.endswith(POST_HOC)]
        for axes in panels[len(titles) :]:
            axes.remove()
        for axes, (name, title) in zip(panels, titles.items(), strict=False):
            for place, arm in enumerate(arms):
                color, marker = LINES[place % len(LINES)][0], MARKERS[place % len(MARKERS)]
                trained, ships = points[arm].get(name), points.get(arm + POST_HOC, {}).get(name)
                if trained is None:
                    continue
                axes.plot(*trained, marker, color=color, markersize=7, label=label(arm), zorder=3)
                if ships is not None and ships != trained:
                    axes.annotate("", ships, trained, arrowprops={"arrowstyle": "->", "color": color}, zorder=2)
                    axes.plot(*ships, marker, color=color, markersize=7, markerfacecolor="white", zorder=3)
            axes.set_xlim(left=0)
            axes.set(xlabel="calibration error (ECE)", ylabel="accuracy")
            axes.xaxis.set_major_formatter(PERCENT)
            axes.yaxis.set_major_formatter(PERCENT)
            axes.set_title(title.replace(" domain, ", " domain,\n"), fontsize=9)
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8)
    return figure


def risk_coverage_figure(curves: dict[str, tuple[np.ndarray, np.ndarray]], title: str, emphasis: str = "") -> Figure:
    """Error rate among the answered examples against the share answered, one line per arm.

    Args:
        curves: {arm: (coverage, risk)}, both (G,) ascending in coverage.
        emphasis: the arm drawn thick.
    """
    with rc_context(STYLE):
        figure = Figure(figsize=(6.6, 3.7), layout="constrained")
        axes = figure.subplots()
        for place, (arm, (coverage, risk)) in enumerate(curves.items()):
            color, dash = LINES[place % len(LINES)]
            width, order = (3.0, 3) if arm == emphasis else (1.5, 2)
            axes.plot(coverage, risk, color=color, linestyle=dash, linewidth=width, zorder=order, label=arm)
        axes.set(xlim=(0, 1), xlabel="share of the examples answered, most confident first", ylabel="error rate")
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_formatter(PERCENT)
        axes.yaxis.set_major_formatter(PERCENT)
        axes.set_title(title)
        figure.legend(loc="outside right center", handlelength=2.8)
    return figure


def calibration_figure(families: dict[str, dict], test_curves: dict[str, dict[str, list[dict]]]) -> Figure:
    """Calibration error against the recalibration value (the paper's Figure 6), one panel per family.

    Args:
        families: {method: an entry of `calibration.json`'s "families"}, only those with a value.
        test_curves: {method: {set: [{"value", "ece"}, ...]}}, may be empty.
    """
    with rc_context(STYLE):
        figure = Figure(figsize=(max(3.4 * len(families), 5.4) + 0.4, 3.7), layout="constrained")
        panels = figure.subplots(1, len(families), squeeze=False, sharey=True)[0]
        for axes, (method, family) in zip(panels, families.items(), strict=True):
            _draw_calibration(axes, method, family, test_curves.get(method, {}))
        panels[0].set_ylim(bottom=0)
        panels[0].set_ylabel("calibration error (ECE)")
        panels[0].yaxis.set_major_formatter(PERCENT)
        entries: dict[str, Any] = {}
        for axes in panels:
            for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
                entries.setdefault(label, handle)
        figure.legend(
            entries.values(), entries, loc="outside lower center", ncols=min(len(entries), 3 * len(families))
        )
    return figure


def _draw_calibration(axes, method: str, family: dict, test_curves: dict[str, list[dict]]) -> None:
    """One family's curves, the error without recalibration, and the value that was chosen."""
    if family.get("interval"):
        axes.axvspan(*family["interval"], color="#0072b2", alpha=0.13, linewidth=0, label="95 % interval")
    axes.axhline(family["ece_before"], label="not recalibrated", **DIAGONAL)
    sets = {"validation": family["curve"], **test_curves}
    for (name, curve), (color, dash) in zip(sets.items(), (LINES[0], *LINES[3:]), strict=False):
        values, errors = [point["value"] for point in curve], [point["ece"] for point in curve]
        width = 2.2 if name == "validation" else 1.4
        axes.plot(values, errors, color=color, linestyle=dash, linewidth=width, label=name)
    axes.plot(family["value"], family["ece_after"], "o", color=INK, markersize=6, label="chosen", zorder=4)
    symbol = {"probability": "c", "label_smoothing": "d"}.get(method, "T")
    axes.set_title(f"{method.replace('_', ' ')}, {symbol} = {family['value']:.3g}")
    axes.set_xlabel(f"recalibration value {symbol}")
    if symbol == "T":
        _log_axis(axes, [point["value"] for point in family["curve"]])


def _log_axis(axes, values: list[float]) -> None:
    ticks = [tick for tick in (0.25, 0.5, 1, 2, 3, 5, 10) if min(values) <= tick <= max(values)]
    axes.set_xscale("log")
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_xticks([], minor=True)


def training_figure(logs: dict[str, dict[str, list[tuple[float, float]]]]) -> Figure:
    """Loss against the training step, one panel per arm, because losses of different kinds have no common scale.

    Args:
        logs: {arm: {"training" and "validation": [(step, loss), ...]}}.
    """
    columns = min(3, len(logs))
    rows = math.ceil(len(logs) / columns)
    with rc_context(STYLE):
        figure = Figure(figsize=(3.3 * columns + 0.3, 2.5 * rows + 0.4), layout="constrained")
        panels = figure.subplots(rows, columns, squeeze=False).ravel()
        for axes in panels[len(logs) :]:
            axes.remove()
        for axes, (arm, lines) in zip(panels, logs.items(), strict=False):
            for (name, points), (color, dash) in zip(lines.items(), (LINES[0], LINES[4]), strict=False):
                if points:
                    steps, losses = zip(*points, strict=True)
                    marker = "o" if len(points) < 30 else None
                    axes.plot(steps, losses, color=color, linestyle=dash, marker=marker, markersize=3, label=name)
            axes.set_title(arm)
            axes.set(xlabel="step", ylabel="loss (nats)")
            axes.set_ylim(bottom=0)
            axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
            axes.legend(fontsize=8)
    return figure
