"""The page's chart: speed of everyone, and the line of cost over rows."""

from pathlib import Path
from typing import Any

from benchmarks.data import DATASETS
from benchmarks.figures import Figures

OURS = "ours"
SIZES = ("3M", "30M", "300M")
COLOURS = {"base": "#1f6f8b", "sketch": "#99a8b2"}
STYLE: dict[Any, Any] = {
    "svg.hashsalt": "benchmarks",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def draw(figures: Figures, path: Path) -> None:
    """Writes an SVG, the same for the same figures."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    with plt.rc_context(STYLE):
        figure, (speeds, line) = plt.subplots(1, 2, figsize=(10, 3.8), width_ratios=(3, 2), layout="constrained")
        _speeds(speeds, figures)
        _line(line, figures)
        figure.savefig(path, metadata={"Date": None})
        plt.close(figure)


def _speeds(axes: Any, figures: Figures) -> None:
    peers = sorted(figures.peers("base", ("3M", "30M")), key=lambda peer: figures.speed("base", peer))
    for job, shift in (("base", 0.2), ("sketch", -0.2)):
        speeds = [figures.speed(job, peer) for peer in peers]
        places = [number + shift for number in range(len(peers))]
        bars = axes.barh(places, speeds, height=0.38, color=COLOURS[job], label=job)
        axes.bar_label(
            bars,
            [f" {speed / 1e6:.2g}M" if speed >= 1e6 else f" {speed / 1e3:.3g}k" if speed else "" for speed in speeds],
        )
    axes.set_yticks(range(len(peers)), peers)
    for label in axes.get_yticklabels():
        label.set_fontweight("bold" if label.get_text() == OURS else "normal")
    axes.set_xscale("log")
    axes.margins(x=0.15)
    axes.set_title("rows per CPU-second (log)")
    axes.legend(frameon=False, loc="lower right")


def _line(axes: Any, figures: Figures) -> None:
    """CPU-seconds over rows; both axes logarithmic, so a cost that grows with the rows has slope 1."""
    for job, peer, style in (("base", OURS, "o-"), ("sketch", OURS, "o--"), ("base", "DuckDB", "s:")):
        sizes = [size for size in SIZES if figures.of(job, size, peer)]
        costs = [figures.median(job, size, peer, "cpu") for size in sizes]
        axes.plot([DATASETS[size].rows for size in sizes], costs, style, label=f"{peer}, {job}", color=COLOURS[job])
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks([DATASETS[size].rows for size in SIZES], SIZES)
    axes.minorticks_off()
    axes.set_title("CPU-seconds over rows (log–log)")
    axes.legend(frameon=False)
