import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.core.config import Settings
from app.utils import sealing
from app.utils.sealing import Seal
from tests.conftest import settings_for

OLD, NEW = "old-" * 8, "new-" * 8
SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"


def with_keys(text: str) -> Settings:
    return settings_for("postgresql://h/d", "redis://h/0", TASKQUEUE_SECRET_KEY=text)


@given(st.text(st.characters(codec="utf-8")), st.text(st.characters(codec="utf-8")))
def test_what_is_sealed_opens_for_what_it_belongs_to_and_nothing_else(secret: str, belongs_to: str) -> None:
    sealed = Seal([OLD]).seal(secret, belongs_to)
    assert Seal([OLD]).open(sealed, belongs_to) == secret
    with pytest.raises(sealing.Unreadable):
        Seal([OLD]).open(sealed, belongs_to + "x")


def test_a_sealed_secret_holds_nothing_of_it_and_is_another_each_time() -> None:
    seal = Seal([OLD])
    first, second = seal.seal(SECRET, "a"), seal.seal(SECRET, "a")
    assert first != second
    for part in (SECRET.encode(), SECRET[6:].encode(), OLD.encode(), OLD[:8].encode()):
        assert part not in first


def test_the_first_key_seals_and_each_of_them_opens() -> None:
    of_old, both = Seal([OLD]).seal(SECRET, "a"), Seal([NEW, OLD])
    assert both.open(of_old, "a") == SECRET
    of_new = both.seal(SECRET, "a")
    assert Seal([NEW]).open(of_new, "a") == SECRET
    assert (sealing.mark_of(of_new), [sealing.mark_of(of_old)]) == (both.mark, both.other_marks)
    for seal, sealed in ((Seal([NEW]), of_old), (Seal([OLD]), of_new)):
        with pytest.raises(sealing.Unreadable, match="no key of TASKQUEUE_SECRET_KEY") as refused:
            seal.open(sealed, "a")
        assert SECRET not in str(refused.value)


@pytest.mark.parametrize("place", [0, 1, 8, 9, 20, 21, -1])
def test_one_changed_bit_is_noticed_wherever_it_is(place: int) -> None:
    sealed = bytearray(Seal([OLD]).seal(SECRET, "a"))
    sealed[place] ^= 1
    with pytest.raises(sealing.Unreadable):
        Seal([OLD]).open(bytes(sealed), "a")


@pytest.mark.parametrize("length", [0, 1, 20, 21, 36])
def test_what_was_cut_off_does_not_open(length: int) -> None:
    with pytest.raises(sealing.Unreadable):
        Seal([OLD]).open(Seal([OLD]).seal(SECRET, "a")[:length], "a")


def test_the_settings_may_have_no_key_one_or_several() -> None:
    assert Seal.from_settings(with_keys("")) is None
    sealed = Seal([OLD]).seal(SECRET, "a")
    several = Seal.from_settings(with_keys(f"{NEW} {OLD}"))
    assert several is not None
    assert several.open(sealed, "a") == SECRET
