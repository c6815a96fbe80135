import hashlib
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr

from app import keys
from app.core import errors

OLD, NEW = SecretStr("o" * 32), SecretStr("n" * 32)


def test_a_key_has_its_form_and_its_id() -> None:
    key = keys.made()
    found = re.fullmatch(r"tq_live_([0-9A-Za-z]{10})_[0-9A-Za-z]{43}[0-9a-f]{8}", key)
    assert found is not None
    assert keys.id_of(key) == found[1]
    assert keys.ID.fullmatch(found[1])


def test_no_two_keys_are_alike() -> None:
    assert len({keys.made() for _ in range(1000)}) == 1000


def test_the_template_of_a_chart_can_make_a_key() -> None:
    """As `printf "tq_live_%s_%s" (randAlphaNum 10) (randAlphaNum 43)`, and of that `sha256sum | trunc 8`."""
    rest = f"tq_live_{'Ab1' * 3}x_{'z' * 43}"
    assert keys.id_of(rest + hashlib.sha256(rest.encode()).hexdigest()[:8]) == "Ab1Ab1Ab1x"


@pytest.mark.parametrize("place", range(70))
def test_a_key_with_one_wrong_character_is_none(place: int) -> None:
    key = keys.made()
    other = "0" if key[place] != "0" else "1"
    assert keys.id_of(key[:place] + other + key[place + 1 :]) is None


@given(st.text())
def test_no_text_is_taken_for_a_key_or_breaks_anything(text: str) -> None:
    assert keys.id_of(text) is None
    assert keys.id_of("tq_live_" + text) is None
    assert keys.id_of(keys.made() + text) is None or not text


def test_what_is_kept_knows_its_own_key_only() -> None:
    masters = keys.Masters.of([NEW])
    key = keys.made()
    digest = masters.digest(key)
    assert masters.know(key, digest)
    assert not masters.know(keys.made(), digest)
    assert not masters.know(key, bytes(32))
    assert not keys.Masters.of([OLD]).know(key, digest), "the table alone opens nothing"
    assert key.encode() not in digest


def test_a_key_is_known_by_every_secret_and_kept_by_the_first() -> None:
    key = keys.made()
    digest = keys.Masters.of([OLD]).digest(key)
    both = keys.Masters.of([NEW, OLD])
    assert both.know(key, digest)
    assert both.digest(key) == keys.Masters.of([NEW]).digest(key) != digest
    assert both.newest == keys.Masters.of([NEW]).newest != keys.Masters.of([OLD]).newest


def test_without_a_secret_no_key_can_be_known() -> None:
    with pytest.raises(errors.SettingsError, match="TASKQUEUE_SECRET_KEY is not set"):
        keys.Masters.of([])


def test_masters_do_not_show_what_they_hold() -> None:
    shown = repr(keys.Masters.of([NEW, OLD]))
    assert "n" * 32 not in shown
    assert "b'" not in shown
