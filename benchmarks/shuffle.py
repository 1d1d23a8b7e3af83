"""What goes between partial and merge, and what a merge takes: ``python -m benchmarks.shuffle`` (``--quick``: less).

The parts of the graph itself are run over generated rows, without an engine: ``Partial`` gives states by bucket, a
bundle merges what it can (the lifted combine), and the coder says how many bytes that is. Writes into docs/scaling.md.
"""

import argparse
import dataclasses
import functools
import multiprocessing
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
from apache_beam.pvalue import TaggedOutput

from benchmarks import definitions
from benchmarks.data import ROW_GROUP, block
from benchmarks.page import DOCS, replace, table
from pipelines.transforms.aggregate import FINER, Merge, Partial
from pipelines.transforms.tables import TABLES, TableCoder
from pipelines.transforms.view import ViewPlan

PAGE = DOCS / "scaling.md"
BUCKETS = 8
BUNDLE = 3
"""Batches of a bundle: what a worker reads in a second or two, which is how long engines let one be."""

KEYS = (3, 30, 500, 6000)
"""Each has a group an hour, of a week: 504, 5,040, 84,000 and 1,008,000."""

MIB = 1 << 20


@dataclasses.dataclass(frozen=True)
class Shuffled:
    """Encoded bytes: of every batch's states; of those merged in bundles; of all merged at once. groups: those met."""

    job: str
    rows: int
    groups: int
    batches: int
    bundles: int
    whole: int

    def cells(self) -> list[str]:
        per_row = (f"{size / self.rows:,.3g}" for size in (self.batches, self.bundles, self.whole))
        return [self.job, f"{self.rows:,}", f"{self.groups:,}", *per_row, f"{self.whole / self.groups:,.0f}"]


@dataclasses.dataclass(frozen=True)
class Merging:
    """One merge in a process of its own. given: states. out: states merged. held: bytes of those given, as Arrow. peak:
    bytes by which the process grew."""

    job: str
    given: int
    out: int
    held: int
    peak: int

    def cells(self) -> list[str]:
        sizes = (f"{size / MIB:,.0f}" for size in (self.held, self.peak))
        return [self.job, f"{self.given:,}", f"{self.out:,}", *sizes, f"{self.peak / self.given:,.0f}"]


@functools.cache
def _plan(job: str) -> ViewPlan:
    (view,) = getattr(definitions, job).plan().views
    return view  # type: ignore[no-any-return]


def _states(job: str, rows: int, keys: int, buckets: int) -> Iterator[list[tuple[int, pa.Table]]]:
    """The states of each batch, by bucket."""
    partial = Partial(_plan(job), buckets, (), None)
    for start in range(0, rows, ROW_GROUP):
        batch = block(start, min(ROW_GROUP, rows - start), keys)
        given = partial.process(batch.append_column("event_time", batch["ts"]))
        yield [output for output in given if not isinstance(output, TaggedOutput)]


def shuffled(job: str, rows: int, keys: int) -> Shuffled:
    """Counts the bytes of a job over rows of so many keys."""
    buckets = BUCKETS * FINER if job == "sketch" else BUCKETS
    coder, merge = TableCoder(), Merge(_plan(job), buckets)
    batches = bundles = 0
    bundle, whole = dict[int, list[pa.Table]](), dict[int, list[pa.Table]]()
    last = -(-rows // ROW_GROUP)
    for number, parts in enumerate(_states(job, rows, keys, buckets), 1):
        for bucket, states in parts:
            batches += len(coder.encode(states))
            bundle[bucket] = merge.add_input(bundle.get(bucket) or merge.create_accumulator(), states)
        if number % BUNDLE and number != last:
            continue
        for bucket, accumulator in bundle.items():
            compacted = merge.compact(accumulator)
            bundles += len(TABLES.encode(compacted))
            held = [whole[bucket]] if bucket in whole else []
            whole[bucket] = merge.merge_accumulators([*held, compacted])
        bundle = {}
    merged = [merge.extract_output(accumulator) for accumulator in whole.values()]
    return Shuffled(job, rows, sum(map(len, merged)), batches, bundles, sum(len(coder.encode(one)) for one in merged))


def merging(job: str, rows: int, keys: int) -> Merging:
    """Merges the states of all batches at once, as one bucket."""
    with tempfile.NamedTemporaryFile() as file, multiprocessing.get_context("spawn").Pool(1) as alone:
        parts = [states for batch in _states(job, rows, keys, 1) for _, states in batch]
        Path(file.name).write_bytes(TABLES.encode(parts))
        return alone.apply(_merged, (job, file.name))


def _merged(job: str, path: str) -> Merging:
    """In a process that has done nothing else: what others have freed would hide what it takes."""
    plan, parts = _plan(job), TABLES.decode(Path(path).read_bytes())
    plan.merged([parts[0].slice(0, 1), parts[0].slice(0, 1)])  # DuckDB has started
    given, held, before = sum(map(len, parts)), sum(states.nbytes for states in parts), _process("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted anew (Linux)
    out = len(plan.merged(parts))
    return Merging(job, given, out, held, _process("VmHWM") - before)


def _process(what: str) -> int:
    """Bytes that this process holds, or has held at most."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith(what)).split()[1]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="300k rows, and nothing is written")
    quick = parser.parse_args().quick
    sizes = (300_000,) if quick else (3_000_000, 30_000_000)
    counted = []
    for job in ("base", "sketch"):
        for rows in sizes:
            for keys in KEYS:
                if job == "sketch" and rows * keys > 30_000_000 * 500:
                    continue  # 630,000 sketches a batch, thirty times
                counted.append(shuffled(job, rows, keys))
                print(counted[-1], flush=True)
    merges = []
    for job, rows, keys in (("base", sizes[0], 500), ("base", sizes[0], 6000), ("sketch", sizes[0], 500)):
        merges.append(merging(job, rows, keys))
        print(merges[-1], flush=True)
    names = ["job", "rows", "groups", "B/row, every batch", "B/row, bundles of 3M", "B/row, merged once", "B/group"]
    peaks = ["job", "states in", "states out", "MiB in", "MiB at the peak", "B a state"]
    if not quick:
        parts = {"shuffle": table(names, [one.cells() for one in counted])}
        replace(PAGE, parts | {"merge": table(peaks, [one.cells() for one in merges])})


if __name__ == "__main__":
    main()
