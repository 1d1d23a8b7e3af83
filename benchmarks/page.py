"""The tables and the chart of docs/benchmarks.md, from the figures alone: ``python -m benchmarks.page``."""

from collections import Counter
from pathlib import Path

from benchmarks import chart
from benchmarks.figures import FIGURES, Figures

DOCS = Path("docs")
PAGE = DOCS / "benchmarks.md"
OURS, DUCKDB, ROWS = "ours", "DuckDB", ("Beam, per row", "Beam, per row, tuned")
NONE = "–"
SIZES = ("3M", "30M", "300M")
MICRO, FLINK, ROWS_FLINK = "ours, micro-batch", "ours, Flink", "Beam, per row, Flink"
JOBS = {"live": "Arrow", "live_identity": "JSON, identity"}
RIVALS = ("PySpark", "PyFlink", "Bytewax", "Pathway")
Bar = tuple[str, float, float | None, bool]
"""What is asked, the bound, what was measured, and whether the bound is a greatest value (or a least one)."""


def write(figures: Figures) -> None:
    """The tables into the page, and the chart beside it."""
    replace(PAGE, tables(figures))
    chart.draw(figures, DOCS / "benchmarks.svg")


def replace(page: Path, parts: dict[str, str]) -> None:
    """Replaces what stands between ``<!-- name -->`` and ``<!-- end -->`` in a page, for every name."""
    text = page.read_text(encoding="utf-8")
    for name, part in parts.items():
        before, start, rest = text.partition(f"<!-- {name} -->\n")
        _, end, after = rest.partition("<!-- end -->")
        text = f"{before}{start}{part}\n{end}{after}"
    page.write_text(text, encoding="utf-8")


def summary(figures: Figures) -> str:
    """All that was measured, for a terminal."""
    cases = dict.fromkeys((run.job, run.dataset, run.peer) for run in figures.runs)
    rows = [[job, dataset, peer, *_costs(figures, job, dataset, peer)] for job, dataset, peer in cases]
    return table(["job", "rows", "program", "CPU-s", "wall s", "peak MiB", "× DuckDB"], rows)


def tables(figures: Figures) -> dict[str, str]:
    machine = ", ".join(f"{name} {value}" for name, value in figures.machine.items())
    return {
        "bars": _bars(figures),
        "base": _job(figures, "base"),
        "sketch": _job(figures, "sketch"),
        "sizes": _sizes(figures),
        "accuracy": _accuracy(figures),
        "profile": _profile(figures),
        "machine": machine + ".",
        "live-bars": _live_bars(figures),
        "live": _live(figures),
        "live-flink": _same_flink(figures),
    }


def _live(figures: Figures) -> str:
    """Every run on a stream, by job, program and rate."""
    header = ["job", "program", "rows/s", "p50 s", "p99 s", "backlog", "at twice the rate", "drained in s"]
    header += ["counted", "CPU-s per 1M rows", "peak MiB", "load"]
    rows = []
    for run in sorted(figures.live, key=lambda run: (run.job, -_holds(figures, run.job, run.peer), run.peer, run.rate)):
        rates = [f"{run.rate:,}", _seconds(run.p50), _seconds(run.p99), f"{run.backlog:,}", f"{run.surge:,}"]
        counted = "all" if run.counted == run.sent else f"{run.counted / run.sent:.0%} in time"
        costs = [f"{run.cpu / run.sent * 1e6:.2f}", _number(run.peak_mib), f"{run.load}"]
        rows.append([JOBS[run.job], run.peer, *rates, _seconds(run.drained), counted, *costs])
    return table(header, rows)


def _same_flink(figures: Figures) -> str:
    """What a row costs on the same Flink, each at the greatest rate that it was measured at: the cheapest there is."""
    runs = {run.peer: run for run in sorted(figures.live, key=lambda run: run.rate) if run.job == "live"}
    if not (FLINK in runs and ROWS_FLINK in runs):
        return NONE
    (ours, mine), (theirs, rows) = (
        (run.cpu / run.sent * 1e6, f"{run.rate:,} rows/s") for run in (runs[FLINK], runs[ROWS_FLINK])
    )
    ratio = f"{theirs / ours:.0f} times the {ours:.2f} of ours at {mine}"
    return f"On the same Flink an element per row costs {theirs:.1f} CPU-s per 1M rows at {rows}: {ratio}."


def _live_bars(figures: Figures) -> str:
    def worst(job: str, peer: str, rate: int) -> float | None:
        return next((run.p99 for run in figures.live if (run.job, run.peer, run.rate) == (job, peer, rate)), None)

    def steady(job: str, peer: str) -> float | None:
        runs = [run for run in figures.live if (run.job, run.peer) == (job, peer) and run.steady]
        return max((run.rate for run in runs), default=None)

    def lost(job: str, peer: str) -> float | None:
        runs = [run for run in figures.live if (run.job, run.peer) == (job, peer) and run.held]
        return max((run.sent - run.counted for run in runs), default=None)

    def drained(job: str, peer: str) -> float | None:
        runs = [run for run in figures.live if (run.job, run.peer) == (job, peer) and run.held]
        return max((run.drained or 0.0 for run in runs), default=None)

    bars: list[Bar] = [
        ("micro-batch, Arrow: rows/s held", 200_000, _holds(figures, "live", MICRO) or None, False),
        ("at 200,000 rows/s: p99 s", 2, worst("live", MICRO, 200_000), True),
        ("at twice every held rate: rows lost", 0, lost("live", MICRO), True),
        ("and the backlog drained in s", 60, drained("live", MICRO), True),
        ("Flink, Arrow: rows/s held", 400_000, _holds(figures, "live", FLINK) or None, False),
        ("at 400,000 rows/s: p99 s", 2, worst("live", FLINK, 400_000), True),
        ("Flink, JSON, identity: rows/s, at most 2 s of them behind", 100_000, steady("live_identity", FLINK), False),
    ]
    return _judged(bars)


def _holds(figures: Figures, job: str, peer: str) -> int:
    """The greatest rate that a program held; 0 for none."""
    return max((run.rate for run in figures.live if (run.job, run.peer) == (job, peer) and run.held), default=0)


def _seconds(value: float | None) -> str:
    return NONE if value is None else f"{value:.2f}"


def _job(figures: Figures, job: str) -> str:
    """Everyone at 3M and 30M rows, the fastest first, by the greatest size that each was measured at."""
    speeds = {peer: figures.speed(job, peer) for peer in figures.peers(job, ("3M", "30M"))}
    header = ["program", "rows per CPU-s"]
    header += [f"{size}: {name}" for size in ("3M", "30M") for name in ("CPU-s", "wall s", "peak MiB", "× DuckDB")]
    rows = [
        [peer, f"{speed:,.0f}", *_costs(figures, job, "3M", peer), *_costs(figures, job, "30M", peer)]
        for peer, speed in sorted(speeds.items(), key=lambda item: -item[1])
    ]
    return table(header, rows)


def _costs(figures: Figures, job: str, dataset: str, peer: str) -> list[str]:
    fields = [_number(figures.median(job, dataset, peer, field)) for field in ("cpu", "wall", "peak_mib")]
    ratio = figures.ratio(job, dataset, peer, DUCKDB)
    return [*fields, NONE if ratio is None else f"{ratio:.1f}"]


def _sizes(figures: Figures) -> str:
    """How our own cost grows."""
    jobs = [("base", "3M"), ("base", "30M"), ("base", "300M"), ("base", "10M-groups")]
    jobs += [("sketch", "3M"), ("sketch", "30M"), ("sketch", "300M")]
    jobs += [("identity", "3M"), ("identity", "30M"), ("identity", "300M")]
    rows = []
    for job, dataset in jobs:
        if runs := figures.of(job, dataset, OURS):
            cpu, wall, peak, ratio = _costs(figures, job, dataset, OURS)
            micros = figures.median(job, dataset, OURS, "cpu")
            assert micros is not None
            rows.append([job, dataset, cpu, f"{micros * 1e6 / runs[0].rows:.2f}", wall, peak, ratio])
    return table(["job", "rows", "CPU-s", "CPU-µs per row", "wall s", "peak MiB", "× DuckDB"], rows)


def _profile(figures: Figures) -> str:
    """The parts of our own runs, those that cost most over all first."""
    names = sorted(figures.profiles, key=lambda name: sum(figures.profiles[name].values()))
    totals = Counter[str]()
    for name in names:
        totals.update(figures.profiles[name])  # a Counter adds up seconds as well as counts
    rows = [[part, *(_share(figures.profiles[name], part) for name in names)] for part, _ in totals.most_common()]
    return table(["part", *(f"{name}: CPU-s" for name in names)], rows)


def _share(profile: dict[str, float], part: str) -> str:
    seconds = profile.get(part, 0.0)
    return f"{seconds:.2f} ({seconds / sum(profile.values()):.0%})"


def _accuracy(figures: Figures) -> str:
    rows = []
    for run in figures.runs:
        if run.job == "sketch" and run.dataset in ("3M", "30M") and (accuracy := run.accuracy):
            errors = (accuracy.p95, accuracy.p95_99, accuracy.users, accuracy.users_99)
            rows.append([run.peer, run.dataset, *(f"{100 * (error or 0):.2f} %" for error in errors)])
    return table(["program", "rows", "p95, mean", "p95, 99 % of groups", "distinct, mean", "distinct, 99 %"], rows)


def _bars(figures: Figures) -> str:
    def ratio(job: str, dataset: str) -> float | None:
        return figures.ratio(job, dataset, OURS, DUCKDB)

    def peak(job: str, *datasets: str) -> float | None:
        peaks = [run.peak_mib for dataset in datasets for run in figures.of(job, dataset, OURS)]
        return max(peaks, default=None)

    def ahead(peer: str) -> float | None:
        mine, theirs = figures.speed("base", OURS), figures.speed("base", peer)
        return mine / theirs if mine and theirs else None

    bars: list[Bar] = [
        ("base, 3M rows: CPU-seconds by DuckDB's", 5, ratio("base", "3M"), True),
        ("base, 30M rows", 3, ratio("base", "30M"), True),
        ("sketch, 3M rows", 8, ratio("sketch", "3M"), True),
        ("sketch, 30M rows", 4, ratio("sketch", "30M"), True),
        *((f"base: times the rows per CPU-second of {peer}", 50, ahead(peer), False) for peer in ROWS),
        *((f"base: times the rows per CPU-second of {peer}", 1, ahead(peer), False) for peer in RIVALS),
        ("peak MiB, base, 3M to 300M rows", 600, peak("base", *SIZES), True),
        ("peak MiB, sketch, 3M to 300M rows", 600, peak("sketch", *SIZES), True),
        ("peak MiB with identity, 3M to 300M rows", 1_000, peak("identity", *SIZES), True),
        ("peak MiB, 10M groups", 2_500, peak("base", "10M-groups"), True),
    ]
    return _judged(bars)


def _judged(bars: list[Bar]) -> str:
    rows = [
        [what, f"{'at most' if most else 'at least'} {bound:,g}", _number(value), _verdict(value, bound, most)]
        for what, bound, value, most in bars
    ]
    return table(["asked", "bar", "measured", ""], rows)


def _verdict(value: float | None, bound: float, most: bool) -> str:
    if value is None:
        return "not measured"
    return "met" if (value <= bound if most else value >= bound) else "**missed**"


def _number(value: float | None) -> str:
    if value is None:
        return NONE
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def table(header: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    write(Figures.load(FIGURES))
