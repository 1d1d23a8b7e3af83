"""Queries: what they are set to, and that the database is opened anew without anyone noticing."""

import threading

import pyarrow as pa
import pytest

from pipelines.transforms import query


def test_the_database_is_opened_anew_after_so_many_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(query, "RENEWED", 5)
    seen, wrong = set(), []

    def ask() -> None:
        for number in range(20):
            found = query.run(
                "SELECT x, current_setting('TimeZone') AS zone FROM batch", {"batch": pa.table({"x": [number]})}
            )
            if found.to_pylist() != [{"x": number, "zone": "UTC"}]:
                wrong.append(found)
            seen.add(query._opened)

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(seen) > 5
