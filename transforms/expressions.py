"""A user's SQL expressions: row in, value out; parsed and typed by DuckDB itself, refused with the place underlined."""

import dataclasses
import difflib
import functools
import itertools
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

import duckdb

from pipelines.transforms import query
from pipelines.transforms.errors import UserError

_SELECT = "SELECT "
_KEYWORDS = {"current_date", "current_timestamp", "current_time", "localtime", "localtimestamp"}


class DefinitionError(UserError):
    """A definition that cannot run: says where, which text, and the fix."""


@dataclasses.dataclass(frozen=True)
class Expression:
    """A checked expression: its text with columns quoted where they are SQL keywords, DuckDB type, columns it reads."""

    sql: str
    type: str
    columns: frozenset[str]


def check(sql: str, columns: Mapping[str, str], where: str) -> Expression:
    """Checks that ``sql`` is one row-local expression over ``columns`` (name → DuckDB type) and finds its type.

    Refused: an unknown column, an aggregate, a window function, a subquery, a clock, randomness, a parameter, a type
    that does not fit. Raises DefinitionError, whose message begins with ``where``.

    >>> check("distance / hours", {"distance": "BIGINT", "hours": "DOUBLE"}, "here").type
    'DOUBLE'
    """
    if not isinstance(sql, str) or not sql.strip():
        raise DefinitionError(f"{where}: expected an SQL expression, got {sql!r}")
    return _check(sql.strip(), tuple(columns.items()), where)


@functools.lru_cache(maxsize=4096)
def _check(sql: str, columns: tuple[tuple[str, str], ...], where: str) -> Expression:
    known = dict(columns)
    sql, root = _parse(sql, known, where)
    used: set[str] = set()
    for node, bound in _walk(root, frozenset()):
        reason = _refusal(node)
        if reason:
            raise DefinitionError(_underline(sql, node, where, reason))
        if node["class"] == "COLUMN_REF":
            name = node["column_names"][0]
            if name.lower() in bound:
                continue
            match = next((column for column in known if column.lower() == name.lower()), None)
            if match is None:
                raise DefinitionError(_underline(sql, node, where, _unknown(name, known)))
            used.add(match)
    closed = f"{sql}\n" if "--" in sql else sql  # whatever is written behind it must not be in a comment
    return Expression(closed, _type(closed, known, where), frozenset(used))


def _parse(sql: str, known: Mapping[str, str], where: str) -> tuple[str, dict[str, Any]]:
    """The text and its tree. A column that is named as a keyword (``at``) is quoted where the text needs it."""
    tree = _tree(sql)
    if tree["error"]:
        quoted = next((text for text in _quoted(sql, known) if not _tree(text)["error"]), None)
        if quoted is None:
            at = int(tree.get("position") or len(_SELECT)) - len(_SELECT)
            raise DefinitionError(_mark(sql, max(0, at), 1, where, tree["error_message"]))
        sql, tree = quoted, _tree(quoted)
    node = tree["statements"][0]["node"]
    plain = node.get("type") == "SELECT_NODE" and len(node["select_list"]) == 1 and len(tree["statements"]) == 1
    extras = ("where_clause", "group_expressions", "having", "qualify", "modifiers", "sample")
    if not plain or node["from_table"]["type"] != "EMPTY" or any(node.get(key) for key in extras):
        raise DefinitionError(underlined(sql, where, "expected one expression over a row's columns, not a query"))
    if node["select_list"][0].get("alias"):
        alias = node["select_list"][0]["alias"]
        raise DefinitionError(underlined(sql, where, f"an expression takes no alias ({alias!r})"))
    return sql, node["select_list"][0]


def _tree(sql: str) -> dict[str, Any]:
    answer = query.cursor().execute("SELECT json_serialize_sql($1)", [_SELECT + sql]).fetchall()
    return json.loads(answer[0][0])  # type: ignore[no-any-return]


def _quoted(sql: str, known: Mapping[str, str]) -> Iterator[str]:
    """The text with some keywords in it that name columns quoted: one of them, then two, and so on."""
    text, columns = sql.encode(), {name.lower(): name for name in known}
    found = []
    for at, kind in duckdb.tokenize(sql):
        word = re.match(rb"\w*", text[at:])
        column = columns.get(word[0].decode(errors="replace").lower()) if word else None
        if kind == duckdb.token_type.keyword and word and column:
            found.append((at, at + word.end(), quote(column).encode()))
    for number in range(1, min(len(found), 6) + 1):
        for chosen in itertools.combinations(found[:6], number):
            made = text
            for start, stop, name in reversed(chosen):
                made = made[:start] + name + made[stop:]
            yield made.decode()


def _walk(node: Any, bound: frozenset[str]) -> Iterator[tuple[dict[str, Any], frozenset[str]]]:
    """Every parsed node with the lambda parameters that are in scope there."""
    if isinstance(node, list):
        for item in node:
            yield from _walk(item, bound)
    elif isinstance(node, dict):
        if node.get("class") == "LAMBDA":
            names = {
                ref["column_names"][0].lower() for ref, _ in _walk(node["lhs"], bound) if ref["class"] == "COLUMN_REF"
            }
            yield from _walk(node["expr"], bound | names)
            return
        if "class" in node:
            yield node, bound
        for key, value in node.items():
            if key != "type_expr":
                yield from _walk(value, bound)


def _refusal(node: dict[str, Any]) -> str | None:
    """Why this part of an expression is not a function of the row alone, or None."""
    kind = node["class"]
    if kind not in _PLAIN:
        return _REFUSED.get(kind, "expected an expression over a row's columns")
    if kind == "COLUMN_REF" and node["column_names"][0].lower() in _KEYWORDS:
        return _CLOCK
    if kind != "FUNCTION":
        return None
    name = node["function_name"].lower()
    if name == "unnest":
        return "unnest makes several rows of one; use Explode"
    if name in _functions("function_type = 'aggregate'"):
        return f"{name} is an aggregate; aggregates are a View's measures"
    if name in _functions("stability IN ('CONSISTENT_WITHIN_QUERY', 'VOLATILE')"):
        return _CLOCK
    if name == "age" and len(node["arguments"]) == 1:
        return f"age of one time goes by the clock; use age(later, earlier). {_CLOCK}"
    return _macro(name) if name in _functions("function_type = 'macro'") else None


_PLAIN = {"BETWEEN", "CASE", "CAST", "COLLATE", "COLUMN_REF", "COMPARISON", "CONJUNCTION", "CONSTANT"}
_PLAIN |= {"FUNCTION", "LAMBDA", "OPERATOR", "TYPE"}
_REFUSED = {
    "SUBQUERY": "a subquery is not row-local; use Lookup for other tables",
    "WINDOW": "a window function is not row-local; use a View",
    "STAR": "name the columns; * is not an expression",
    "PARAMETER": "no parameters here; use an f-string and --set NAME=VALUE",
    "POSITIONAL_REFERENCE": "name the columns; they have no numbers",
}
_CLOCK = "clocks, randomness and settings give another answer on every run; use the row's own columns"


@functools.cache
def _functions(condition: str) -> frozenset[str]:
    sql = f"SELECT DISTINCT lower(function_name) FROM duckdb_functions() WHERE {condition}"
    return frozenset(name for (name,) in query.cursor().execute(sql).fetchall())


@functools.cache
def _macro(name: str) -> str | None:
    """Why a function that DuckDB defines by an expression is refused: a part of that expression is."""
    sql = "SELECT macro_definition FROM duckdb_functions() WHERE function_type = 'macro' AND lower(function_name) = $1"
    for (text,) in query.cursor().execute(sql, [name]).fetchall():
        for statement in _tree(text).get("statements", []):
            for node, _ in _walk(statement["node"]["select_list"], frozenset()):
                reason = None if str(node.get("function_name")).lower() == name else _refusal(node)
                if reason:
                    return f"{name} is {text}: {reason}"
    return None


def _type(sql: str, columns: Mapping[str, str], where: str) -> str:
    fields = ", ".join(f"NULL::{kind} AS {quote(name)}" for name, kind in columns.items()) or "1 AS _"
    try:
        rows = query.cursor().execute(f"DESCRIBE SELECT ({sql}) AS value FROM (SELECT {fields}) WHERE false").fetchall()
    except duckdb.Error as error:
        raise DefinitionError(underlined(sql, where, str(error).split("\n")[0])) from None
    return str(rows[0][1])


def arrow_types(schema: Any) -> dict[str, str]:
    """The DuckDB type of each column of an Arrow schema."""
    rows = query.run("SELECT column_name, column_type FROM (DESCRIBE _empty)", {"_empty": schema.empty_table()})
    return {row["column_name"]: row["column_type"] for row in rows.to_pylist()}


def quote(name: str) -> str:
    """A column's name as an SQL identifier."""
    return '"' + name.replace('"', '""') + '"'


def literal(text: str) -> str:
    """A text as an SQL string literal."""
    return "'" + text.replace("'", "''") + "'"


def nearest(name: str, names: Mapping[str, Any] | list[str] | tuple[str, ...]) -> str:
    """``Nearest: x.`` if one of the names is near, else nothing."""
    close = difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)
    return f" Nearest: {close[0]}." if close else ""


def _unknown(name: str, known: Mapping[str, str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    hint = f" Nearest: {close[0]} ({known[close[0]].lower()})." if close else ""
    return f"no column {name!r}.{hint} Columns here: {', '.join(known) or 'none'}"


def _underline(sql: str, node: Mapping[str, Any], where: str, message: str) -> str:
    at = node["query_location"] - len(_SELECT)
    if not 0 <= at < len(sql):
        at = 0
    return _mark(sql, at, node.get("query_location_length") or 1, where, message)


def underlined(sql: str, where: str, message: str) -> str:
    """A message about the whole expression."""
    return _mark(sql, 0, len(sql.encode()), where, message)


def _mark(sql: str, at: int, length: int, where: str, message: str) -> str:
    """The line of the text that byte ``at`` is in, with ``length`` bytes underlined."""
    text = sql.encode()
    begin, stop = (len(text[:to].decode(errors="ignore")) for to in (at, at + length))
    start = sql.rfind("\n", 0, begin) + 1
    line = sql[start:].split("\n")[0]
    marks = "^" * max(1, min(stop, start + len(line)) - begin)
    return f"{where}:\n  {line}\n  {' ' * (begin - start)}{marks} {message}"
