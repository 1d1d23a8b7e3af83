"""Building a stage: steps add CTEs to one query, and to a second text of it that wraps every expression in TRY."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping

import pyarrow as pa

from pipelines.transforms import query
from pipelines.transforms.chain import FILTERED, ROW, Chain, Miss, PythonStage, Reason, SqlStage, Stage
from pipelines.transforms.expressions import DefinitionError, Expression, check, nearest, quote, underlined


@dataclasses.dataclass
class Scope:
    """The columns of a row at some point: DuckDB types, and the source columns each comes from."""

    types: dict[str, str]
    lineage: dict[str, frozenset[str]]

    def copy(self) -> "Scope":
        return Scope(dict(self.types), dict(self.lineage))

    def put(self, name: str, kind: str, sources: frozenset[str]) -> None:
        self.types[name], self.lineage[name] = kind, sources

    def drop(self, name: str) -> None:
        del self.types[name], self.lineage[name]

    def sources(self, *expressions: Expression) -> frozenset[str]:
        return frozenset().union(*(self.lineage[column] for found in expressions for column in found.columns))

    @property
    def arrow(self) -> pa.Schema:
        """The Arrow schema that DuckDB gives these columns."""
        fields = ", ".join(f"NULL::{kind} AS {quote(name)}" for name, kind in self.types.items())
        return query.run(f"SELECT {fields} WHERE false", {}).schema


@dataclasses.dataclass(frozen=True)
class Rule:
    """Where ``condition`` is true the row gets status ``code``; where evaluating it fails, status ``failed``."""

    condition: str
    code: int
    failed: int


class Builder:
    """Collects the steps of one chain. ``where`` and ``label`` name the step at hand, for messages and dead letters."""

    def __init__(self, pipeline: str, scope: Scope, part: str) -> None:
        self.pipeline, self.scope, self.part = pipeline, scope, part
        self.label, self.where = "source", f"pipeline {pipeline!r}, Source"
        self.used: set[str] = set()
        self._stages: list[Stage] = []
        self._open()

    def _open(self) -> None:
        self._ctes = [("SELECT *, NULL::SMALLINT AS _status FROM batch",) * 2]
        self._reasons: list[Reason] = []
        self._misses: list[Miss] = []
        self._dimensions: list[str] = []
        self._made: set[str] = set()
        self.keyed = False
        self._alias: str | None = None

    def chain(self, *, shared: bool) -> Chain:
        """The stages since the last chain was made."""
        self.close()
        stages, self._stages = tuple(self._stages), []
        return Chain(stages, self.scope.arrow, self.pipeline, shared=shared)

    # What steps ask for

    def check(self, sql: str, kind: str | None = None, name: str = "") -> Expression:
        """The expression over the columns here, of this DuckDB type if one is given. name: the argument that has it."""
        where = self.where.replace(")", f" {name}=)", 1) if name else self.where
        found = check(sql, self.scope.types, where)
        if kind is not None and found.type != kind:
            raise DefinitionError(underlined(sql, where, f"is {found.type}; expected {kind}"))
        self.used |= self.scope.sources(found)
        return found

    def column(self, name: str) -> str:
        """The name, if there is such a column here."""
        if name not in self.scope.types:
            known = ", ".join(self.scope.types)
            raise DefinitionError(
                f"{self.where}: no column {name!r}.{nearest(name, self.scope.types)} Columns here: {known}"
            )
        return name

    def free(self, name: str) -> str:
        """The name, if it may be given to a column. SQL does not tell upper case from lower."""
        other = next((column for column in self.scope.types if column.lower() == name.lower()), name)
        if other != name:
            raise DefinitionError(f"{self.where}: {name!r} and {other!r} are one name to SQL; choose another")
        if name.startswith("_") or name in ("event_time", "window_start", "window_end") or not name.isidentifier():
            raise DefinitionError(f"{self.where}: the name {name!r} is reserved or not a plain name; choose another")
        return name

    def settle(self, names: Iterable[str]) -> None:
        """Before these columns go: the open stage ends if it makes one of them, so that a row in which that fails is
        refused whatever else is in its batch. Within a query DuckDB computes nothing that goes."""
        if not self._made.isdisjoint(names):
            self.close()

    def reason(self, reason: str, detail: str, *, stop: bool = False) -> int:
        """The status code of a reason to refuse a row."""
        self._reasons.append(Reason(self.label, reason, detail, stop))
        return len(self._reasons) - 1

    def joins(self, dimension: str) -> None:
        """The open stage reads ``dim_<dimension>``."""
        self._dimensions.append(dimension)

    def miss(self, column: str, dimension: str, reason: str) -> None:
        self._misses.append(Miss(column, dimension, reason))

    def guard(self, sql: str) -> str:
        """The expression, not evaluated for a row that is refused already."""
        return f"CASE WHEN _status IS NULL THEN ({sql}) END" if self._reasons or len(self._ctes) > 1 else f"({sql})"

    def failure(self, name: str, sql: str, kind: str = "") -> Rule:
        """Refuses a row for which ``sql``, of DuckDB type ``kind``, fails or is a time past what places can hold."""
        failed = self.reason(f"{name} failed", sql)
        if kind not in ("DATE", "TIMESTAMP", "TIMESTAMP WITH TIME ZONE"):
            return Rule("false", FILTERED, failed)
        years = f"'0001-01-01'::{kind} AND '9999-12-31 23:59:59.999999'::{kind}"
        return Rule(f"({sql}) NOT BETWEEN {years}", failed, failed)

    def select(
        self,
        cells: Mapping[str, str] = {},
        rules: Iterable[tuple[str, Rule]] = (),
        source: Callable[[str], str] = str,
        extra: Mapping[str, str] = {},
        *,
        certain: bool = False,
    ) -> None:
        """Adds a CTE: ``cells`` are new or replaced columns, the scope's others stay.

        rules: (expression, Rule) in order. source: makes the FROM clause from the previous CTE's name. extra:
        bookkeeping columns, kept to the stage's end. certain: no cell fails, so none is tried (a subquery cannot be).
        """
        self._made |= set() if certain else cells.keys()
        previous = f"s{len(self._ctes) - 1}"
        kept = [quote(name) for name in self.scope.types if name not in cells]
        kept += [miss.column for miss in self._misses if miss.column not in extra]
        plain, safe = ["_status IS NOT NULL THEN _status"], ["_status IS NOT NULL THEN _status"]
        for sql, rule in rules:
            if rule.condition != "false":
                plain.append(f"{rule.condition} THEN {rule.code}")
            safe.append(f"TRY(({sql}) IS NULL) IS NULL THEN {rule.failed}")
            if rule.condition != "false":
                safe.append(f"TRY({rule.condition}) THEN {rule.code}")
        texts = []
        # In a CASE, as DuckDB moves what TRY(x) and TRY(x IS NULL) have in common out of the TRY.
        tried = str if certain else "TRY(CASE WHEN _status IS NULL THEN {} END)".format
        for attempt, whens in ((str, plain), (tried, safe)):
            made = [f"{attempt(sql)} AS {quote(name)}" for name, sql in cells.items()]
            status = f"CASE WHEN {' WHEN '.join(whens)} END AS _status" if len(whens) > 1 else "_status"
            columns = ", ".join([*kept, *made, *(f"{sql} AS {name}" for name, sql in extra.items()), ROW, status])
            texts.append(f"SELECT {columns} FROM {source(previous)}")
        self._ctes.append((texts[0], texts[1]))

    def alias(self, column: str) -> None:
        """Until another step comes, this stage only adds event_time, equal to this column."""
        self._alias = column

    def changed(self) -> None:
        self._alias = None

    # Stages

    def close(self, *, exploded: bool = False) -> None:
        """Ends the open stage and opens the next."""
        if len(self._ctes) > 1:
            columns = [*map(quote, self.scope.types), ROW, "_status", *(miss.column for miss in self._misses)]
            last = f"SELECT {', '.join(columns)} FROM s{len(self._ctes) - 1}"
            plain, safe = (
                "WITH " + ",\n".join(f"s{n} AS ({cte[kind]})" for n, cte in enumerate(self._ctes)) + "\n" + last
                for kind in (0, 1)
            )
            self._stages.append(
                SqlStage(
                    plain,
                    safe,
                    tuple(self._reasons),
                    tuple(self._misses),
                    self.part,
                    self._alias,
                    tuple(self._dimensions),
                    self.keyed,
                )
            )
        if exploded and self.part == "source":
            self.part = "exploded"
        self._open()

    def python(self, function: Callable[[pa.Table], pa.Table], adds: Mapping[str, str]) -> None:
        """A stage of its own: a function of the table, which sets the columns of ``adds`` (name → DuckDB type)."""
        self.close()
        sources = frozenset().union(*self.scope.lineage.values())
        for name, kind in adds.items():
            self.scope.put(self.free(name), kind, sources)
        self._stages.append(PythonStage(function, self.scope.arrow, self.label))
        self._open()
