import datetime
from typing import Any

import pytest

from pipelines.options import Deployment, expand, instant, masked
from pipelines.transforms.errors import UserError


def test_the_embedded_defaults_need_no_server() -> None:
    deployment = Deployment("flights.csv")
    assert (deployment.warehouse, deployment.store, deployment.dead_letters) == (
        "data/warehouse",
        "data/store.db",
        "data/dead_letters",
    )


@pytest.mark.parametrize(
    ("report", "facts"), [("data/run.json", "data/run.facts.json"), ("s3://b/run", "s3://b/run.facts.json")]
)
def test_facts_are_beside_the_report(report: str, facts: str) -> None:
    assert Deployment("x", report=report).facts == facts


@pytest.mark.parametrize(
    ("wrong", "told"),
    [({"max_rejected": 1.5}, "--max_rejected=1.5"), ({"max_rejected": -0.1}, "share"), ({"buckets": 0}, "--buckets=0")],
)
def test_values_out_of_range_are_refused(wrong: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        Deployment("x", **wrong)


def test_an_empty_range_is_refused() -> None:
    day = instant("2013-01-02")
    Deployment("x", from_=day, to=day + datetime.timedelta(microseconds=1))
    with pytest.raises(UserError, match="exclusive"):
        Deployment("x", from_=day, to=day)


def test_variables_expand_and_a_missing_one_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BUCKET", "b")
    monkeypatch.delenv("NOWHERE", raising=False)
    assert expand("s3://${BUCKET}/${BUCKET}.csv") == "s3://b/b.csv"
    assert expand("$BUCKET {BUCKET}") == "$BUCKET {BUCKET}"
    with pytest.raises(UserError, match="NOWHERE is not set"):
        expand("s3://${NOWHERE}/x")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("redis://app:hunter2@host:6379/0", "redis://app:***@host:6379/0"),
        ("redis://:hunter2@host", "redis://:***@host"),
        ("postgres://u:p@ss:w@host/db", "postgres://u:***@host/db"),
        ("s3://b/x?secret_access_key=abc&region=eu", "s3://b/x?secret_access_key=***&region=eu"),
        ("cannot open kafka://h/t?sasl_password=x: refused", "cannot open kafka://h/t?sasl_password=*** refused"),
        ("flights.csv.zip?null=NA&delimiter=;", "flights.csv.zip?null=NA&delimiter=;"),
        ("s3://bucket/user@example.com/x", "s3://bucket/user@example.com/x"),
    ],
)
def test_secrets_are_masked_and_nothing_else(text: str, shown: str) -> None:
    assert masked(text) == shown


@pytest.mark.parametrize(
    ("text", "utc"),
    [
        ("2013-01-01", "2013-01-01T00:00:00+00:00"),
        ("2013-01-01 10:00", "2013-01-01T10:00:00+00:00"),
        ("2013-01-01T10:00-05:00", "2013-01-01T15:00:00+00:00"),
        ("2013-01-01T10:00Z", "2013-01-01T10:00:00+00:00"),
    ],
)
def test_times_are_utc_unless_they_have_an_offset(text: str, utc: str) -> None:
    assert instant(text).astimezone(datetime.UTC).isoformat() == utc


def test_what_is_no_time_is_refused() -> None:
    with pytest.raises(UserError, match="'yesterday' is not a time"):
        instant("yesterday")
