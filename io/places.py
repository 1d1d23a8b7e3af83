"""Where files are: URIs, globs, compression. Local paths by the system, any other scheme by fsspec.

``data/*.parquet`` · ``s3://bucket/day=*/part-*.csv.gz`` · ``flights.csv.zip?null=NA``: the query holds options.
"""

import contextlib
import dataclasses
import difflib
import glob
import gzip
import os
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import IO, Any, TypeVar, cast
from urllib.parse import unquote

from pipelines.transforms.errors import UserError

A = TypeVar("A")
B = TypeVar("B")

FORMATS = {
    ".parquet": "parquet",
    ".csv": "csv",
    ".tsv": "csv",
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".avro": "avro",
}
_CODECS = {".gz": "gzip", ".zip": "zip"}
_MAGIC = {b"PAR1": "parquet", b"Obj\x01": "avro", b"\x1f\x8b": "gzip", b"PK\x03\x04": "zip"}
_UTF16 = (b"\xff\xfe", b"\xfe\xff")


@dataclasses.dataclass(frozen=True)
class Options:
    """What a URI's query may say. format: csv, json, avro or parquet where the name does not tell. For CSV also null,
    the text that means no value; delimiter (``\\t`` or ``%09`` for a tab); quote, empty when quotes mean nothing (then
    one big file can be cut anywhere); header=no when the first line is data, in the schema's column order.
    """

    format: str | None = None
    null: str | None = None
    delimiter: str | None = None
    quote: str = '"'
    header: str = "yes"

    @staticmethod
    def of(query: str, uri: str) -> "Options":
        names = [field.name for field in dataclasses.fields(Options)]
        given = {}
        for part in query.split("&"):
            name, _, value = part.partition("=")
            if name not in names:
                nearest = difflib.get_close_matches(name, names, 1, 0)[0]
                raise UserError(f"{uri}: no option {name!r}. Nearest: {nearest}. Options: {', '.join(names)}")
            given[name] = unquote(value).replace("\\t", "\t")
        options = Options(**given)
        _one_of(uri, "format", options.format, (None, *sorted(set(FORMATS.values()))))
        _one_of(uri, "header", options.header, ("yes", "no"))
        for name, text in (("delimiter", options.delimiter), ("quote", options.quote)):
            if text and len(text.encode()) != 1:
                raise UserError(f"{uri}: {name}={text!r} must be a single ASCII character")
        return options


def _one_of(uri: str, name: str, value: str | None, known: tuple[str | None, ...]) -> None:
    if value not in known:
        raise UserError(f"{uri}: {name}={value!r} must be one of {', '.join(text for text in known if text)}")


@dataclasses.dataclass(frozen=True)
class File:
    """One stream of rows. source: what rows are said to come from. size: bytes as stored. member: inside a zip."""

    source: str
    path: str
    size: int
    format: str
    codec: str
    options: Options
    member: str = ""

    @property
    def local(self) -> bool:
        return "://" not in self.path

    @contextlib.contextmanager
    def open(self) -> Iterator[IO[bytes]]:
        """The decompressed bytes, as a stream; seekable where the file is not compressed."""
        with _open(self.path) as stored, truncation(self):
            if self.codec == "gzip":
                with gzip.GzipFile(fileobj=stored) as plain:
                    yield cast(IO[bytes], plain)
            elif self.codec == "zip":
                with zipfile.ZipFile(stored) as archive, _member(archive, self.member) as plain:
                    yield plain
            else:
                yield stored


def _member(archive: zipfile.ZipFile, name: str) -> IO[bytes]:
    try:
        return archive.open(name)
    except (OSError, LookupError, NotImplementedError, RuntimeError) as error:  # offsets past the file, odd methods
        raise zipfile.BadZipFile(str(error)) from error


@contextlib.contextmanager
def truncation(file: File) -> Iterator[None]:
    """A damaged archive is the user's to mend, wherever in the file it shows."""
    try:
        yield
    except (EOFError, NotImplementedError, zlib.error, zipfile.BadZipFile, gzip.BadGzipFile) as error:
        raise UserError(
            f"{file.source}: {file.codec} data is damaged or cut off ({error}); fetch the file again"
        ) from error


def find(uri: str) -> list[File]:
    """The files of a URI, sorted by name; zip archives give one for each member.

    Raises UserError for a path that is missing, unreadable or a folder, for a glob without a match, an unknown format,
    an empty file (of text formats a glob may match some, not only such) and bytes that are not what the name says.
    """
    place, options = _parse(uri)
    sizes = _local(place) if "://" not in place else _remote(place)
    files = [file for found in aside(lambda place: _files(*place, options, uri), sizes) for file in found]
    full = [file for file in files if file.size]
    if not full:
        raise UserError(f"{files[0].source if files else uri}: the file is empty (0 bytes)")
    for file in files:
        if not file.size and file.format in ("parquet", "avro"):
            raise UserError(f"{file.source}: the file is empty (0 bytes), which is not {file.format}")
    return full


def aside(function: Callable[[A], B], items: Sequence[A]) -> list[B]:
    """The function of each item, many at a time: looking at a remote file is waiting for it."""
    if len(items) < 2:
        return [function(item) for item in items]
    with ThreadPoolExecutor(16) as pool:
        return list(pool.map(function, items))


def _parse(uri: str) -> tuple[str, Options]:
    place, mark, query = uri.rpartition("?")
    if not mark or not re.match(r"\w+=", query):  # a ? without an option is a glob's
        place, query = uri, ""
    place = place.removeprefix("file://")
    return place, Options.of(query, uri) if query else Options()


def _local(place: str) -> list[tuple[str, int]]:
    if os.path.isdir(place):
        raise UserError(f"{place}: a folder; name its files, such as {os.path.join(place, '*.parquet')}")
    paths = [place] if os.path.exists(place) else sorted(filter(os.path.isfile, glob.glob(place, recursive=True)))
    if not paths:
        raise _missing(place, os.listdir(_folder(place)) if os.access(_folder(place), os.R_OK) else None)
    return [(path, os.path.getsize(path)) for path in paths]


def _folder(place: str) -> str:
    return os.path.dirname(place) or "."


def _missing(place: str, beside: list[str] | None) -> UserError:
    if glob.has_magic(place):
        return UserError(f"{place}: no file matches")
    if beside is None:
        return UserError(f"{place}: no such file, nor a readable folder {_folder(place)}")
    nearest = difflib.get_close_matches(os.path.basename(place), beside, 1)
    return UserError(
        f"{place}: no such file" + (f". Nearest: {os.path.join(_folder(place), nearest[0])}" if nearest else "")
    )


def _remote(place: str) -> list[tuple[str, int]]:
    system, path = _system(place)
    try:
        if glob.has_magic(path):
            infos = [info for info in system.glob(path, detail=True).values() if info["type"] == "file"]
        else:
            infos = [system.info(path)]
    except FileNotFoundError:
        raise UserError(f"{place}: no such file") from None
    except Exception as error:  # each store has errors of its own: no rights, no bucket, no network
        raise UserError(f"{place}: cannot be read: {_line(error)}") from error
    if any(info["type"] != "file" for info in infos):
        raise UserError(f"{place}: a folder; name its files, such as {place.rstrip('/')}/*.parquet")
    if not infos:
        raise _missing(place, None)
    scheme = place.partition("://")[0]
    return sorted((f"{scheme}://{info['name'].lstrip('/')}", int(info["size"])) for info in infos)


def _system(place: str) -> tuple[Any, str]:
    import fsspec

    try:
        system, path = fsspec.core.url_to_fs(place)
    except (ImportError, ValueError) as error:  # a known scheme whose package is missing; an unknown scheme
        raise UserError(f"{place}: {_line(error)}") from error
    return system, path


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _open(path: str) -> IO[bytes]:
    try:
        if "://" not in path:
            return cast(IO[bytes], open(path, "rb"))
        system, inner = _system(path)
        return cast(IO[bytes], system.open(inner, "rb"))
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{path}: cannot be read: {_line(error)}") from error


def _files(path: str, size: int, options: Options, uri: str) -> list[File]:
    stem, codec = _codec(path)
    if not size:
        return [File(path, path, 0, _format(stem, options, uri), codec, options)]
    with _open(path) as stored:
        head = stored.read(4)
    found = _sniff(head)
    if codec:
        if found != codec:
            raise UserError(f"{path}: not {codec} data (it starts with {head!r}); name it for what it is")
        if codec == "zip":
            return _members(path, stem, options, uri)
    file = File(path, path, size, _format(stem, options, uri), codec, options)
    return [_checked(file, found, head) if not codec else file]


def _codec(path: str) -> tuple[str, str]:
    stem, extension = os.path.splitext(path)
    codec = _CODECS.get(extension.lower(), "")
    return (stem, codec) if codec else (path, "")


def _sniff(head: bytes) -> str | None:
    return next((name for magic, name in _MAGIC.items() if head.startswith(magic)), None)


def _checked(file: File, found: str | None, head: bytes) -> File:
    """The file, unless its first bytes say that it is something else."""
    if head.startswith(_UTF16) and file.format in ("csv", "json"):
        raise UserError(f"{file.source}: UTF-16 text; convert it: iconv -f UTF-16 -t UTF-8")
    if file.format in ("parquet", "avro") and found != file.format:
        raise UserError(
            f"{file.source}: not {file.format}: it starts with {head!r}" + (f", as {found} does" if found else "")
        )
    if found is not None and found != file.format:
        raise UserError(f"{file.source}: not {file.format} but {found}; name it for what it is, or give ?format=")
    return file


def _format(stem: str, options: Options, uri: str) -> str:
    found = options.format or FORMATS.get(os.path.splitext(stem)[1].lower())
    if found is None:
        raise UserError(
            f"{uri}: format of {os.path.basename(stem)!r} unknown; add ?format=csv (or json, avro, parquet)"
        )
    return found


def _members(path: str, stem: str, options: Options, uri: str) -> list[File]:
    with _open(path) as stored:
        try:
            infos = [info for info in zipfile.ZipFile(stored).infolist() if _is_data(info)]
            if any(info.flag_bits & 1 for info in infos):
                raise UserError(f"{path}: the archive has a password; unpack it first")
        except (NotImplementedError, zipfile.BadZipFile) as error:
            raise UserError(f"{path}: zip data is damaged or cut off ({error}); fetch the file again") from error
    files = []
    for info in infos:
        known = os.path.splitext(info.filename)[1].lower() in FORMATS
        form = _format(info.filename if known else stem, options, uri)
        source = path if len(infos) == 1 else f"{path}!{info.filename}"
        files.append(File(source, path, info.file_size, form, "zip", options, info.filename))
    return files


def _is_data(info: zipfile.ZipInfo) -> bool:
    return not info.is_dir() and not info.filename.startswith("__MACOSX/")


def option_delimiter(file: File) -> str:
    """The delimiter given, else a tab for .tsv and a comma for the rest."""
    name = file.member or _codec(file.path)[0]
    return file.options.delimiter or ("\t" if name.lower().endswith(".tsv") else ",")
