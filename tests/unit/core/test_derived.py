from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from pydantic import SecretStr

from app.core import derived

SECRET = SecretStr("s" * 40)


def test_a_key_is_what_hkdf_makes_of_the_secret() -> None:
    expected = HKDF(SHA256(), 32, salt=None, info=b"a purpose").derive(b"s" * 40)
    assert derived.key(SECRET, "a purpose") == expected


def test_another_purpose_and_another_secret_are_another_key() -> None:
    keys = {derived.key(SecretStr(letter * 32), purpose) for letter in "ab" for purpose in ("one", "other")}
    assert len(keys) == 4


def test_a_key_id_is_the_same_each_time_and_of_one_secret_only() -> None:
    assert derived.key_id(SECRET) == derived.key_id(SecretStr("s" * 40)) != derived.key_id(SecretStr("t" * 40))
    assert len(derived.key_id(SECRET)) == derived.KEY_ID_CHARACTERS
