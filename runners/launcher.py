"""A jar that starts a Java program with the classes of other jars, and mends two things of Beam's Java on its way.

Beam stages every jar of its class path with every job: with Flink inside of them 200 MB, copied five times before a
job starts, though each member of a cluster has them. This jar is no part of the class path; it is an *agent*, to
which Java gives a class path of its own, where Beam does not look. And Beam's servers listen on all interfaces; one of
its classes is put before theirs here, in which they listen where they were told to.
"""

import os
import struct
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

SERVERS = "org/apache/beam/sdk/fn/server/ServerFactory$InetSocketAddressServerFactory.class"

_SIZES = {3: 4, 4: 4, 5: 8, 6: 8, 7: 2, 8: 2, 9: 4, 10: 4, 11: 4, 12: 4, 15: 3, 16: 2, 17: 4, 18: 4, 19: 2, 20: 2}
"""Bytes of a constant of a class, by its tag."""


def write(place: Path, jars: Sequence[Path]) -> bool:
    """Writes the jar, for ``-javaagent:``. Answers whether servers listen where they were told to."""
    likely = sorted(jars, key=lambda jar: "beam-sdks-java-core" not in jar.name)
    servers = next(filter(None, map(_class, likely)), None)
    bound = listening(servers) if servers else None
    entries = {"Premain-Class": "Agent", "Class-Path": " ".join(jar.absolute().as_uri() for jar in jars)}
    new = place.with_suffix(f".{os.getpid()}")  # others may be writing it too
    with zipfile.ZipFile(new, "w") as archive:
        archive.writestr("META-INF/MANIFEST.MF", manifest(entries))
        archive.writestr("Agent.class", _agent())
        if bound:
            archive.writestr(SERVERS, bound)
    new.replace(place)
    return bound is not None


def manifest(entries: dict[str, str]) -> str:
    """A manifest's lines have at most 72 bytes; what is longer goes on after a space.

    >>> [len(line) for line in manifest({"Class-Path": "a" * 80}).splitlines()]
    [21, 70, 23]
    """
    lines = []
    for name, value in {"Manifest-Version": "1.0", **entries}.items():
        line = f"{name}: {value}"
        lines += [line[:70], *(f" {line[at : at + 69]}" for at in range(70, len(line), 69))]
    return "\r\n".join([*lines, ""])


def _class(jar: Path) -> bytes | None:
    with zipfile.ZipFile(jar) as archive:
        return archive.read(SERVERS) if SERVERS in archive.namelist() else None


def listening(servers: bytes) -> bytes | None:
    """The class with ``forAddress(socket)`` where it has ``forPort(socket.getPort())``; None where it has not."""
    names: dict[int, str] = {}
    pairs: dict[int, tuple[int, int, int]] = {}
    end = 10
    for index, tag, value in _constants(servers):
        end = value + (2 + struct.unpack_from(">H", servers, value)[0] if tag == 1 else _SIZES[tag])
        if tag == 1:
            names[index] = servers[value + 2 : end].decode("utf-8", "replace")
        elif tag in (7, 10, 12):
            pairs[index] = (tag, *struct.unpack_from(">HH", servers, value))

    def method(owner: str, name: str) -> int | None:
        for index, (tag, of, called) in pairs.items():
            if tag == 10 and names[pairs[of][1]] == owner and names[pairs[called][1]] == name:
                return index
        return None

    port = method("java/net/InetSocketAddress", "getPort")
    builders = [name for name in names.values() if name.endswith("/NettyServerBuilder")]
    if port is None or not builders or (made := method(builders[0], "forPort")) is None:
        return None
    before = struct.pack(">BBHBH", 0x2B, 0xB6, port, 0xB8, made)  # aload_1, invokevirtual, invokestatic
    if servers.count(before) != 1:
        return None
    count = struct.unpack_from(">H", servers, 8)[0]
    added = _text("forAddress") + _text(f"(Ljava/net/SocketAddress;)L{builders[0]};")
    added += struct.pack(">BHH", 12, count, count + 1) + struct.pack(">BHH", 10, pairs[made][1], count + 2)
    after = struct.pack(">BBBBBH", 0x2B, 0, 0, 0, 0xB8, count + 3)
    return servers[:8] + struct.pack(">H", count + 4) + servers[10:end] + added + servers[end:].replace(before, after)


def _constants(code: bytes) -> Iterator[tuple[int, int, int]]:
    """The constants of a class: number, tag, and where the value is."""
    at, index, count = 10, 1, struct.unpack_from(">H", code, 8)[0]
    while index < count:
        tag = code[at]
        yield index, tag, at + 1
        at += 1 + (2 + struct.unpack_from(">H", code, at + 1)[0] if tag == 1 else _SIZES[tag])
        index += 2 if tag in (5, 6) else 1


def _agent() -> bytes:
    """A class with a ``premain`` that does nothing: an agent must have one."""
    constants = [
        _text("Agent"),
        struct.pack(">BH", 7, 1),
        _text("java/lang/Object"),
        struct.pack(">BH", 7, 3),
        *map(_text, ("premain", "(Ljava/lang/String;)V", "Code")),
    ]
    code = struct.pack(">HIHHIBHH", 7, 13, 0, 1, 1, 0xB1, 0, 0)
    premain = struct.pack(">HHHH", 0x0009, 5, 6, 1) + code
    head = struct.pack(">IHHH", 0xCAFEBABE, 0, 52, len(constants) + 1)
    return head + b"".join(constants) + struct.pack(">HHHHHH", 0x0021, 2, 4, 0, 0, 1) + premain + struct.pack(">H", 0)


def _text(text: str) -> bytes:
    return struct.pack(">BH", 1, len(text)) + text.encode()
