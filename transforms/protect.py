"""One key, and what is made with it: the cipher of what is at rest, pseudonyms and masks of what is published.

The key is 32 bytes, written as 64 hexadecimal digits in the environment variable PIPELINES_KEY, or in the file that
PIPELINES_KEY_FILE names. It is never used itself: every purpose has a key of its own, derived by HKDF (RFC 5869).
"""

import dataclasses
import functools
import hmac
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Self

import pyarrow as pa
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from pipelines.transforms.errors import UserError

VARIABLE = "PIPELINES_KEY"
_FILE = "PIPELINES_KEY_FILE"
_MAKE = f"make one with `openssl rand -hex 32 > pipelines.key` and set {_FILE}=pipelines.key"
_NONCE = 12


@dataclasses.dataclass(frozen=True)
class Key:
    """The one secret. It has no text and cannot be pickled: a worker reads it again from its own environment.

    >>> key = Key.load({"PIPELINES_KEY": "00" * 32})
    >>> key
    Key(id='bd54d8d0c03d2edc')
    """

    secret: bytes = dataclasses.field(repr=False)
    id: str = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "id", self.derive("id")[:8].hex())

    @classmethod
    def load(cls, environment: Mapping[str, str] = os.environ) -> Self:
        """The key of this environment. Raises UserError when there is none, or it is not 64 hexadecimal digits."""
        text, where = environment.get(VARIABLE, ""), VARIABLE
        if not text:
            name = environment.get(_FILE, "")
            if not name:
                raise UserError(f"personal columns need a key, and neither {VARIABLE} nor {_FILE} is set; {_MAKE}")
            text, where = _read(name), f"{_FILE}={name}"
        try:
            secret = bytes.fromhex(text.strip())
        except ValueError:
            secret = b""
        if len(secret) != 32:
            raise UserError(f"{where} does not hold a key of 64 hexadecimal digits; {_MAKE}")
        return cls(secret)

    def derive(self, purpose: str) -> bytes:
        """32 bytes for this purpose alone."""
        return HKDF(SHA256(), length=32, salt=None, info=f"pipelines/{purpose}".encode()).derive(self.secret)

    def __reduce__(self) -> tuple[object, ...]:
        return _again, (self.id,)


def _read(name: str) -> str:
    try:
        return Path(name).read_text("ascii")
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the key in {_FILE}={name}: {error}; {_MAKE}") from None


def _again(identity: str) -> Key:
    key = Key.load()
    if key.id != identity:
        raise UserError(f"this worker's key is {key.id}, the run's is {identity}: set the same {VARIABLE} everywhere")
    return key


@dataclasses.dataclass(frozen=True)
class Cipher:
    """AES-256-GCM over binary values, for one purpose (SP 800-38D).

    An encrypted value is nonce (12 bytes) || ciphertext || tag (16). Its context, such as the position of the row, is
    authenticated with it. The nonce is an HMAC of context and value, so that a retried unit of work writes the same
    bytes again; it repeats only where both are equal.

    >>> cipher = Cipher(Key.load({"PIPELINES_KEY": "00" * 32}), "dead letters")
    >>> sealed = cipher.encrypt(pa.array([b"secret", None]), [b"file 1", b"file 2"])
    >>> cipher.decrypt(sealed, [b"file 1", b"file 2"]).to_pylist()
    [b'secret', None]
    """

    key: Key
    purpose: str

    @property
    def key_id(self) -> str:
        """Names the key, tells nothing of it."""
        return self.key.id

    @functools.cached_property
    def _aes(self) -> AESGCM:
        return AESGCM(self.key.derive(f"{self.purpose}/aes"))

    @functools.cached_property
    def _nonces(self) -> bytes:
        return self.key.derive(f"{self.purpose}/nonce")

    def encrypt(self, values: pa.Array, contexts: Iterable[bytes]) -> pa.Array:
        """binary (or large_binary) → binary; null stays null. contexts: one for each value."""
        pairs = zip(values.to_pylist(), contexts, strict=True)
        return pa.array(
            [None if value is None else self._seal(value, context) for value, context in pairs], pa.binary()
        )

    def decrypt(self, values: pa.Array, contexts: Iterable[bytes]) -> pa.Array:
        """The inverse. Raises UserError where key, context or value is not the one that was encrypted."""
        pairs = zip(values.to_pylist(), contexts, strict=True)
        try:
            return pa.array(
                [None if value is None else self._open(value, context) for value, context in pairs], pa.binary()
            )
        except InvalidTag:
            raise UserError(
                f"cannot decrypt {self.purpose} with key {self.key_id}: another key, or altered bytes"
            ) from None

    def _seal(self, value: bytes, context: bytes) -> bytes:
        nonce = hmac.digest(self._nonces, len(context).to_bytes(8, "big") + context + value, "sha256")[:_NONCE]
        return nonce + self._aes.encrypt(nonce, value, context)

    def _open(self, value: bytes, context: bytes) -> bytes:
        return self._aes.decrypt(value[:_NONCE], value[_NONCE:], context)

    def __reduce__(self) -> tuple[object, ...]:
        return Cipher, (self.key, self.purpose)


KEYS = "_keys"
"""The name under which a query with pseudonyms is given the table of ``pseudonym_keys``."""


def pseudonym_keys(key: Key) -> pa.Table:
    """One row (i: binary, o: binary), the two padded keys of HMAC (RFC 2104).

    They reach a query as data: neither its text nor its plan shows them.
    """
    secret = key.derive("pseudonym").ljust(64, b"\0")
    pads = [bytes(byte ^ pad for byte in secret) for pad in (0x36, 0x5C)]
    return pa.table([pa.array([pad], pa.binary()) for pad in pads], names=["i", "o"])


@dataclasses.dataclass(frozen=True)
class Pseudonym:
    """Replaces a value by 32 hexadecimal digits: the first 128 bits of the HMAC-SHA256 of its text (or bytes).

    Equal values have equal pseudonyms in every column and pipeline that has the same key, so they still group and
    join; without the key nobody can try values out. Null stays null. About 0.9 µs a value.
    """

    def check(self, kind: str) -> str | None:
        """Why a column of this DuckDB type cannot have pseudonyms, or None."""
        if kind in ("FLOAT", "DOUBLE") or not _scalar(kind):
            return f"Pseudonym needs a text, bytes, a whole or decimal number, a date or a time, not {kind}"
        return None

    def sql(self, column: str, kind: str) -> str:
        """A VARCHAR expression over the SQL expression of the column, in a query that is given KEYS.

        >>> from pipelines.transforms import query
        >>> keys = pseudonym_keys(Key.load({"PIPELINES_KEY": "00" * 32}))
        >>> sql = f"select {Pseudonym().sql('x', 'VARCHAR')} as x from t"
        >>> query.run(sql, {"t": pa.table({"x": ["+33"]}), KEYS: keys})
        pyarrow.Table
        x: string
        ----
        x: [["85c816d95eb9a16126ffd686716b51c3"]]
        """
        value = column if kind == "BLOB" else f"encode(({column})::VARCHAR)"
        inner = f"sha256((SELECT i FROM {KEYS}) || {value})"
        return f"left(sha256((SELECT o FROM {KEYS}) || unhex({inner})), 32)"


@dataclasses.dataclass(frozen=True)
class Mask:
    """Replaces a value by ``***`` and the last ``keep`` characters of its text.

    A text of no more than ``keep`` characters shows none of them, and no text shows its length. Null stays null.
    """

    keep: int = 0

    def __post_init__(self) -> None:
        if self.keep < 0:
            raise UserError(f"Mask(keep={self.keep}): the number of last characters to show, 0 or more")

    def check(self, kind: str) -> str | None:
        """Why a column of this DuckDB type cannot be masked, or None."""
        return None if _scalar(kind) else f"Mask needs a column of single values, not {kind}"

    def sql(self, column: str, kind: str) -> str:
        """A VARCHAR expression over the SQL expression of the column.

        >>> from pipelines.transforms import query
        >>> sql = f"select {Mask(keep=2).sql('x', 'VARCHAR')} as x from t"
        >>> query.run(sql, {"t": pa.table({"x": ["+33123", "12"]})})
        pyarrow.Table
        x: string
        ----
        x: [["***23","***"]]
        """
        text = f"({column})::VARCHAR"
        return f"'***' || right({text}, CASE WHEN length({text}) > {self.keep} THEN {self.keep} ELSE 0 END)"


def _scalar(kind: str) -> bool:
    return not kind.endswith("]") and not kind.startswith(("STRUCT", "MAP", "UNION"))
