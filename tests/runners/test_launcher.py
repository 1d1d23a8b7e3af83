import shutil
import struct
import subprocess
import zipfile
from pathlib import Path

import pytest

from pipelines.runners import launcher

BUILDER = "x/NettyServerBuilder"


def text(value: str) -> bytes:
    return struct.pack(">BH", 1, len(value)) + value.encode()


def servers(code: bytes) -> bytes:
    """A class with the constants of Beam's, as far as they matter, and a code."""
    names = ["java/net/InetSocketAddress", "getPort", "()I", BUILDER, "forPort", f"(I)L{BUILDER};"]
    constants = [text(name) for name in names] + [
        struct.pack(">BH", 7, 1),  # 7: the address's class
        struct.pack(">BHH", 12, 2, 3),
        struct.pack(">BHH", 10, 7, 8),  # 9: getPort
        struct.pack(">BH", 7, 4),  # 10: the builder's class
        struct.pack(">BHH", 12, 5, 6),
        struct.pack(">BHH", 10, 10, 11),  # 12: forPort
        struct.pack(">Bq", 5, 1),  # takes two numbers: 13 and 14
    ]
    return struct.pack(">IHHH", 0xCAFEBABE, 0, 52, 15) + b"".join(constants) + code


def test_a_server_listens_where_it_was_told_to() -> None:
    before = bytes([0x2A, 0x2B, 0xB6, 0, 9, 0xB8, 0, 12, 0xB1])
    mended = launcher.listening(servers(before))
    assert mended is not None
    assert mended.endswith(bytes([0x2A, 0x2B, 0, 0, 0, 0xB8, 0, 18, 0xB1]))
    assert struct.unpack_from(">H", mended, 8) == (19,)
    assert text("forAddress") + text(f"(Ljava/net/SocketAddress;)L{BUILDER};") in mended
    assert struct.pack(">BHHBHH", 12, 15, 16, 10, 10, 17) in mended


def test_a_class_of_another_kind_is_left_alone() -> None:
    assert launcher.listening(servers(b"\x2a\xb1")) is None
    assert launcher.listening(struct.pack(">IHHH", 0xCAFEBABE, 0, 52, 1)) is None


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("java") is None, reason="no java")
def test_java_finds_classes_that_are_on_no_class_path(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "lib.jar", "w") as archive:  # the JDK takes any agent for a program, too
        archive.writestr("Other.class", launcher._agent().replace(b"Agent", b"Other"))
    assert not launcher.write(tmp_path / "launcher.jar", [tmp_path / "lib.jar"])
    java = ["java", f"-javaagent:{tmp_path}/launcher.jar", "-cp", f"{tmp_path}/none"]
    found, lacking = (
        subprocess.run([*java, name], capture_output=True, text=True).stderr for name in ("Other", "Another")
    )
    assert "Main method not found in class Other" in found
    assert "Could not find or load main class Another" in lacking
