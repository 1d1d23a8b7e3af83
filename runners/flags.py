"""Beam's own options: a flag that we do not know is passed on if Beam knows it, and refused otherwise.

Beam itself only warns about an unknown flag, so a misspelt one would be as good as absent.
"""

import argparse
import difflib
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

from apache_beam.options.pipeline_options import PipelineOptions

from pipelines.transforms.errors import UserError

_MORE: dict[str, dict[str, Any]] = {
    "--state_backend": {"choices": ("filesystem", "rocksdb")},  # on the heap, or on disk
    "--checkpointing_interval": {"type": int},
    "--max_bundle_time_mills": {"type": int},
}
"""Options of Flink's job server that Beam's Python does not know."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (an option of Apache Beam)")


def accepted(flags: Sequence[str], ours: Iterable[str] = ()) -> list[str]:
    """The flags as Beam spells them (``-`` and ``_`` are the same). ours: further names for the nearest one's sake.

    Raises UserError, with the nearest name, for the first that Beam does not know, or whose value it does not take.

    >>> accepted(["--job-name=x", "--streaming"])
    ['--job_name=x', '--streaming']
    """
    parser = _Parser(allow_abbrev=False, conflict_handler="resolve", add_help=False)
    for options in PipelineOptions.__subclasses__():
        if options.__module__.startswith("apache_beam."):
            options._add_argparse_args(parser)
    for name, settings in _MORE.items():
        parser.add_argument(name, **settings)
    known = set(parser._option_string_actions)
    spelt = [_spelt(flag, known) for flag in flags]
    _, unknown = parser.parse_known_args(spelt)
    if unknown:
        raise UserError(_refusal(unknown[0], {*known, *ours}))
    return spelt


def _spelt(flag: str, known: set[str]) -> str:
    name, equals, value = flag.partition("=")
    plain = "--" + name[2:].replace("-", "_")
    return f"{plain}{equals}{value}" if name.startswith("--") and plain in known else flag


def _refusal(flag: str, names: set[str]) -> str:
    name = flag.partition("=")[0]
    if not name.startswith("-"):
        return f"unexpected argument {name!r}; every value belongs to an option, as in --pipeline={name}"
    close = difflib.get_close_matches("--" + name.lstrip("-").replace("-", "_"), sorted(names), n=1, cutoff=0.4)
    return f"no option {name}, neither here nor in Apache Beam{f'. Nearest: {close[0]}' if close else ''}"
