"""What a bounded run reads, files or the lake, and with it how much of its tables it computes."""

import contextlib
import dataclasses
from collections.abc import Mapping
from typing import Any

from pipelines import archive, scope
from pipelines.commit import Limits
from pipelines.definition import Pipeline
from pipelines.io import files, lake_rows
from pipelines.io.history import History
from pipelines.io.lake_rows import Archived, Wanted
from pipelines.io.store import open_store
from pipelines.io.table import Table
from pipelines.options import Deployment
from pipelines.scope import Scope
from pipelines.sql import Plan
from pipelines.transforms.decoder import Decoder
from pipelines.transforms.errors import UserError
from pipelines.transforms.ranges import Range
from pipelines.transforms.windows import Duration


@dataclasses.dataclass(frozen=True)
class Reading:
    """scope: what is computed. stop: µs UTC, where a range of files ends. through: µs UTC, how far the rows of a lake
    reach; None for files. spoken: boundaries of views of all time: what is behind them is left to the speed layer.
    endless: those of them that speak to where the rows of files end.
    note: of the tables' commits, so that a later run knows what is new; None where they keep theirs."""

    history: History
    decoder: Decoder | Archived
    scope: Scope
    stop: int | None = None
    through: int | None = None
    spoken: Mapping[str, int] = dataclasses.field(default_factory=dict)
    endless: tuple[str, ...] = ()
    note: Mapping[str, Any] | None = dataclasses.field(default_factory=dict)

    @property
    def limits(self) -> Limits:
        """What the commit step must know of it."""
        scope = self.scope
        return Limits(
            ranged=scope.ranged,
            stop=self.stop,
            through=self.through,
            spoken=dict(self.spoken),
            endless=self.endless,
            skipped=scope.skipped,
            told=scope.told,
            noted=self.note is not None,
        )


def reading(
    pipeline: Pipeline,
    plan: Plan,
    deployment: Deployment,
    decoder: Decoder,
    tables: Mapping[str, Table],
    definition: str,
) -> Reading:
    """tables: of the run, by name. definition: names what it computes. Raises UserError for what the user can mend."""
    start, stop = (None if at is None else int(at.timestamp() * 1_000_000) for at in (deployment.from_, deployment.to))
    within = scope.between(plan.views, Range(start, stop))
    source = pipeline.source
    if deployment.lake is None or deployment.history is not None:
        if deployment.since:
            raise UserError("--since=last: only a lake knows what is new in it; give --lake=URI and no --history")
        history = files.plan(deployment.history or "", decoder.schema, extra=source.extra, invalid=source.invalid)
        assert history.format
        return Reading(history, decoder, within, stop, endless=() if within.ranged else scope.endless(plan.views))
    place = archive.lake(pipeline, deployment.lake)
    extent = place.extent()
    same = extent.dated == (place.dated(plan.event_time),)
    if deployment.since:
        if within.ranged:
            raise UserError("--since=last: finds out itself what to compute; leave out --from and --to, or it")
        within = Scope(told="since last: all, as the lake's times were found by another definition")
        if same:
            with contextlib.ExitStack() as stack:
                store = stack.enter_context(open_store(deployment.store)) if deployment.store else None
                within = scope.last(pipeline.name, plan.views, tables, store, place, extent, definition)
    wanted = Wanted(within.rows, within.offsets) if same else Wanted()
    through = extent.through(Duration.fixed(source.disorder, "disorder"))
    note = {"lake": place.uri, "definition": definition, "offsets": dict(extent.offsets)}
    return Reading(
        history=lake_rows.plan(place, extent, wanted),
        decoder=Archived(decoder, plan.event_time, deployment.ahead, place.schemas),
        scope=within,
        through=through,
        spoken=scope.spoken(plan.views, through),
        note=None if within.ranged and not deployment.since else note,
    )
