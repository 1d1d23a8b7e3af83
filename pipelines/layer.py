"""The speed layer of a pipeline, compiled: what its graphs need to know, in turns or unbounded. Beam-free."""

import dataclasses
import hashlib
from collections.abc import Iterable, Mapping

import pyarrow as pa

from pipelines.definition import Pipeline
from pipelines.io.log import open_log
from pipelines.io.store import LIVE, StoreConflict, open_store
from pipelines.io.table import Table, open_table
from pipelines.io.turns import Turns
from pipelines.options import Deployment, masked
from pipelines.sql import Plan
from pipelines.transforms.chain import Chain, SqlStage
from pipelines.transforms.deadletters import DEAD_LETTERS, PURPOSE
from pipelines.transforms.decoder import Decoder
from pipelines.transforms.errors import UserError
from pipelines.transforms.intake import Intake
from pipelines.transforms.lateness import Lateness
from pipelines.transforms.messages import Messages
from pipelines.transforms.protect import Cipher, Key
from pipelines.transforms.seen import Seen
from pipelines.transforms.speed import OpenView
from pipelines.transforms.windows import Duration

_SEALED = "sealed"


@dataclasses.dataclass(frozen=True)
class Layer:
    """The speed layer of a pipeline, as its graphs need it. log: a URI. seen: None where every row counts.
    dead_letters: a table of its own, as the batch layer replaces its. disorder: µs. max_rejected: the share of read
    rows past which it ends. sealed: for dimensions in its state, where one has personal columns."""

    pipeline: str
    log: str
    intake: Intake
    seen: Seen | None
    plan: Plan
    views: tuple[OpenView, ...]
    turns: Turns
    dead_letters: Table
    buckets: int
    disorder: int
    cipher: Cipher | None
    max_rejected: float | None = None
    sealed: Cipher | None = None

    @property
    def format(self) -> str:
        """Of the log's payloads."""
        return self.intake.messages.format

    def named(self, view: OpenView) -> str:
        """The view's name in the store."""
        return f"{self.pipeline}.{view.plan.name}"

    @property
    def place(self) -> str:
        """Where its state is kept: ``<state>/<pipeline>``."""
        return self.turns.uri

    def views_of(self, *kept: Mapping[str, str]) -> list[str]:
        """The names of its views, and of those in kept fingerprints."""
        parts = {part for one in (fingerprint(self), *kept) for part in one}
        return sorted(part.removeprefix("view ") for part in parts if part.startswith("view "))

    def forget(self, views: Iterable[str], store: str | None, token: str) -> None:
        """Removes what was delivered before a run that begins anew: live rows of these views, and dead letters. token:
        of the run; once done, doing it again leaves its own dead letters."""
        if store is not None:
            with open_store(store) as answers:
                for view in views:
                    answers.drop(f"{self.pipeline}.{view}", LIVE)
        letters = self.dead_letters
        if (last := letters.last()) is not None and last.token != token:
            version = letters.next_version()
            nothing = letters.stage("anew", token=token, version=version).finish()
            letters.commit(nothing, token=token, version=version, replace="everything")

    def resume(self, uri: str, *, anew: bool) -> None:
        """Makes the store ready for live rows. anew: of a run that begins so; another refuses a store without rows."""
        with open_store(uri) as store:
            for view in self.views:
                name, keys = self.named(view), (*view.plan.by, "window_start")
                if not anew:
                    try:
                        store.get(name, view.plan.schema.empty_table().select(keys), generation=LIVE)
                    except StoreConflict:
                        raise UserError(
                            f"--store={masked(uri)}: has no live rows of {name}, they were given to another; name that "
                            "one, or start again with --rebuild, which reads the log from its first offset"
                        ) from None
                store.resume(name, view.plan.schema, keys)

    def keep(self, name: str, dimension: pa.Table) -> None:
        """Writes a dimension as a state file; encrypted as a whole where a pipeline's dimension is personal."""
        if self.sealed is not None:
            sink = pa.BufferOutputStream()
            with pa.ipc.new_stream(sink, dimension.schema) as stream:
                stream.write_table(dimension)
            rows = pa.array([sink.getvalue().to_pybytes()], pa.binary())
            dimension = pa.table([self.sealed.encrypt(rows, [name.encode()])], [_SEALED])
        self.turns.write(name, dimension)

    def kept(self, name: str) -> pa.Table:
        """A dimension that ``keep`` has written. Raises UserError with another key."""
        rows = self.turns.read(name)
        if self.sealed is None:
            return rows
        return pa.ipc.open_stream(self.sealed.decrypt(rows[_SEALED], [name.encode()])[0].as_buffer()).read_all()


def layer(pipeline: Pipeline, deployment: Deployment, buckets: int) -> Layer:
    """What every graph of the pipeline's speed layer is made of. Raises UserError for what the user can mend."""
    source, plan = pipeline.source, pipeline.plan(live=True)
    if not plan.views:
        raise UserError(f"pipeline {pipeline.name!r} has no views, so a live run has nothing to keep; run it in batch")
    assert deployment.live
    if source.schema.personal or plan.keyed:
        Key.load()
    cipher = Cipher(Key.load(), PURPOSE) if source.schema.personal else None
    personal = any(of.schema.personal for of in pipeline.dimensions)
    disorder, allowed = (Duration.fixed(text, "Source") for text in (source.disorder, source.lateness))
    with open_log(deployment.live) as log:
        form, schemas = log.format, log.schemas
    decoder = Decoder(plan.read(source), pipeline.name, source.extra, source.invalid, None, cipher)
    views = tuple(OpenView(view, Lateness(view.window, allowed)) for view in plan.views)
    rules = tuple(dict.fromkeys(view.rule for view in views))
    guard = dataclasses.replace(plan.dating.guard, format=form)
    return Layer(
        pipeline=pipeline.name,
        log=deployment.live,
        intake=Intake(
            Messages(decoder, form, schemas), plan.event_time, disorder, deployment.ahead, rules, cipher, guard
        ),
        seen=Seen(source.identities, source.columns) if source.identities else None,
        plan=plan,
        views=views,
        turns=Turns(f"{deployment.state}/{pipeline.name}"),
        dead_letters=open_table(f"{deployment.dead_letters}/{pipeline.name}.live", DEAD_LETTERS),
        buckets=deployment.buckets or buckets,
        disorder=disorder,
        cipher=cipher,
        max_rejected=deployment.max_rejected,
        sealed=Cipher(Key.load(), "live state") if personal else None,
    )


def fingerprint(layer: Layer) -> dict[str, str]:
    """What kept state depends on, by the part that a person would name."""

    def digest(*parts: object) -> str:
        return hashlib.blake2b(repr(parts).encode(), digest_size=8).hexdigest()

    def steps(chain: Chain) -> list[str]:
        return [stage.sql if isinstance(stage, SqlStage) else stage.label for stage in chain.stages]

    intake = layer.intake
    parts = {
        "source": digest(intake.event_time, intake.disorder, layer.seen and (layer.seen.identity, layer.seen.columns)),
        "steps": digest(steps(layer.plan.chain)),
        "buckets": str(layer.buckets),
    }
    for view in layer.views:
        own = [] if view.plan.chain is None else steps(view.plan.chain)
        parts[f"view {view.plan.name}"] = digest(own, view.plan.partial, view.plan.result, view.rule)
    return parts
