import hmac
import pickle
from pathlib import Path

import pyarrow as pa
import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import given
from hypothesis import strategies as st

from pipelines.transforms import query
from pipelines.transforms.errors import UserError
from pipelines.transforms.protect import KEYS, Cipher, Key, Mask, Pseudonym, pseudonym_keys

KEY = Key.load({"PIPELINES_KEY": "0123456789abcdef" * 4})
OTHER = Key.load({"PIPELINES_KEY": "f" * 64})


def test_the_key_comes_from_the_environment_or_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "pipelines.key"
    file.write_text("0123456789abcdef" * 4 + "\n")
    assert Key.load({"PIPELINES_KEY_FILE": str(file)}) == KEY


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({}, "neither PIPELINES_KEY nor PIPELINES_KEY_FILE is set"),
        ({"PIPELINES_KEY": "abc"}, "PIPELINES_KEY does not hold a key of 64 hexadecimal digits"),
        ({"PIPELINES_KEY": "é" * 64}, "PIPELINES_KEY does not hold a key"),
        ({"PIPELINES_KEY_FILE": "/nowhere/key"}, "cannot read the key in PIPELINES_KEY_FILE=/nowhere/key"),
    ],
)
def test_without_a_key_one_line_says_how_to_make_one(environment: dict[str, str], said: str) -> None:
    with pytest.raises(UserError) as raised:
        Key.load(environment)
    told = str(raised.value)
    assert said in told
    assert "openssl rand -hex 32 > pipelines.key" in told
    assert "\n" not in told
    assert "abc" not in told


def test_no_text_shows_the_secret() -> None:
    shown = repr(KEY) + repr(Cipher(KEY, "dead letters")) + str(pseudonym_keys(KEY).schema)
    assert KEY.secret.hex() not in shown
    assert repr(KEY.secret) not in shown


def test_a_pickled_cipher_takes_the_key_from_where_it_wakes_up(monkeypatch: pytest.MonkeyPatch) -> None:
    pickled = pickle.dumps(Cipher(KEY, "dead letters"))
    assert KEY.secret not in pickled
    monkeypatch.setenv("PIPELINES_KEY", KEY.secret.hex())
    assert pickle.loads(pickled) == Cipher(KEY, "dead letters")
    monkeypatch.setenv("PIPELINES_KEY", OTHER.secret.hex())
    with pytest.raises(UserError, match=f"this worker's key is {OTHER.id}, the run's is {KEY.id}"):
        pickle.loads(pickled)


values = st.lists(st.tuples(st.none() | st.binary(max_size=50), st.binary(max_size=10)), max_size=10)


@given(values)
def test_what_is_encrypted_decrypts_and_is_the_same_on_a_retry(pairs: list[tuple[bytes | None, bytes]]) -> None:
    cipher, contexts = Cipher(KEY, "dead letters"), [context for _, context in pairs]
    clear = pa.array([value for value, _ in pairs], pa.binary())
    sealed = cipher.encrypt(clear, contexts)
    assert sealed == cipher.encrypt(clear, contexts)
    assert cipher.decrypt(sealed, contexts) == clear
    for value, hidden in zip(clear.to_pylist(), sealed.to_pylist(), strict=True):
        assert value is None or len(hidden) == 12 + len(value) + 16
        assert not value or len(value) < 4 or value not in hidden


def test_an_encrypted_value_is_plain_aes_gcm() -> None:
    [sealed] = Cipher(KEY, "lake").encrypt(pa.array([b"secret"]), [b"here"]).to_pylist()
    assert AESGCM(KEY.derive("lake/aes")).decrypt(sealed[:12], sealed[12:], b"here") == b"secret"


@pytest.mark.parametrize(
    ("cipher", "context"),
    [(Cipher(OTHER, "lake"), b"here"), (Cipher(KEY, "dead letters"), b"here"), (Cipher(KEY, "lake"), b"there")],
)
def test_another_key_purpose_or_context_does_not_decrypt(cipher: Cipher, context: bytes) -> None:
    sealed = Cipher(KEY, "lake").encrypt(pa.array([b"secret"]), [b"here"])
    with pytest.raises(UserError, match="cannot decrypt"):
        cipher.decrypt(sealed, [context])


def run(expression: str, values: pa.Array) -> list[str | None]:
    tables = {"t": pa.table({"x": values}), KEYS: pseudonym_keys(KEY)}
    return query.run(f"select {expression} as x from t", tables)["x"].to_pylist()  # type: ignore[no-any-return]


@given(st.lists(st.none() | st.text() | st.text("+0123456789", min_size=50, max_size=80), max_size=5))
def test_a_pseudonym_is_the_hmac_of_the_text(texts: list[str | None]) -> None:
    expected = [
        None if text is None else hmac.digest(KEY.derive("pseudonym"), text.encode(), "sha256")[:16].hex()
        for text in texts
    ]
    assert run(Pseudonym().sql("x", "VARCHAR"), pa.array(texts, pa.string())) == expected


def test_a_pseudonym_of_a_number_is_that_of_its_text_and_of_bytes_that_of_the_bytes() -> None:
    [text] = run(Pseudonym().sql("x", "VARCHAR"), pa.array(["42"]))
    assert run(Pseudonym().sql("x", "BIGINT"), pa.array([42, None])) == [text, None]
    assert run(Pseudonym().sql("x", "BLOB"), pa.array([b"42", None])) == [text, None]


def test_a_mask_shows_the_last_characters_of_longer_texts_only() -> None:
    texts = pa.array(["+33612345678", "5678", "", "éàüöñ", None])
    assert run(Mask(keep=4).sql("x", "VARCHAR"), texts) == ["***5678", "***", "***", "***àüöñ", None]
    assert run(Mask().sql("x", "VARCHAR"), texts) == ["***", "***", "***", "***", None]


def test_types_without_one_text_are_refused() -> None:
    assert Pseudonym().check("VARCHAR") is None
    assert "not DOUBLE" in str(Pseudonym().check("DOUBLE"))
    assert "not VARCHAR[]" in str(Mask().check("VARCHAR[]"))
    with pytest.raises(UserError, match=r"Mask\(keep=-1\)"):
        Mask(keep=-1)
