import io
import threading

import pytest

from pipelines import progress
from pipelines.transforms import progress as counted
from pipelines.transforms.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("state", "words"),
    [
        (Progress(0, 0.0, 0, None), "0 rows · 0 rows/s"),
        (Progress(336_776, 2.0, 0, None), "336,776 rows · 168k rows/s"),
        (Progress(900, 2.0, 25, 100), "900 rows · 450 rows/s · 0:06 left"),
        (Progress(900, 100.0, 50, 100), "900 rows · 9 rows/s · 1:40 left"),
        (Progress(900, 2.0, 100, 100), "900 rows · 450 rows/s · all read, writing"),
    ],
)
def test_it_tells_rows_rate_and_time_left(state: Progress, words: str) -> None:
    assert progress.told(state) == words


@pytest.mark.parametrize(("done", "full"), [(0, 0), (50, 14), (100, 28), (130, 28)])
def test_the_bar_is_the_share_done(done: int, full: int) -> None:
    assert progress.bar(Progress(done=done, total=100)) == "━" * full + "╺" * (28 - full)


def test_readers_on_many_threads_lose_no_row() -> None:
    counted.expect(4000)

    def read() -> None:
        for _ in range(1000):
            counted.advance(1)

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (counted.now().rows, counted.now().done, counted.now().total) == (4000, 4000, 4000)


def test_bytes_may_be_what_is_done() -> None:
    counted.expect(1000)
    counted.advance(3, 250)
    assert (counted.now().rows, counted.now().done) == (3, 250)


@pytest.mark.parametrize(("stream", "every"), [(io.StringIO(), "LINE_SECONDS"), (Terminal(), "FRAME_SECONDS")])
def test_a_terminal_gets_one_redrawn_line_and_a_file_plain_ones(
    stream: io.StringIO, every: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, every, 0.001)
    seen = threading.Event()
    write = stream.write

    def noting(text: str) -> int:
        if "5 rows" in text:
            seen.set()
        return write(text)

    monkeypatch.setattr(stream, "write", noting)
    with progress.shown("flights", stream):
        counted.advance(5)
        assert seen.wait(10)
    text = stream.getvalue()
    if stream.isatty():
        assert text.endswith("\r\x1b[2K")
        assert "\n" not in text
    else:
        assert "\x1b" not in text
        assert text.splitlines()[-1].startswith("flights: 5 rows")


def test_nothing_is_left_on_a_terminal_by_a_failed_run() -> None:
    stream = Terminal()
    with pytest.raises(ZeroDivisionError), progress.shown("flights", stream):
        raise ZeroDivisionError
    assert stream.getvalue().endswith("\r\x1b[2K")


def test_the_last_line_is_full() -> None:
    counted.expect(None)
    counted.advance(5)
    stream = io.StringIO()
    progress.last(stream)
    assert stream.getvalue().startswith(f"  {'━' * 28}  5 rows · ")
    assert stream.getvalue().endswith(" · 0:00 left\n")
