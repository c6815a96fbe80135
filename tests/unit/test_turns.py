import pytest

from app.core import errors
from app.turns import Turns


def test_an_owner_has_few_turns_at_once_and_all_owners_some_more() -> None:
    turns = Turns("things", of_one=2, of_all=8)
    held = [turns.turn(owner) for owner in ("a", "a", "b", "b", "c", "c", "d", "d")]
    for one in held[:2]:
        one.__enter__()
    with pytest.raises(errors.TooManyAtOnce) as mine, turns.turn("a"):
        pass
    for one in held[2:]:
        one.__enter__()
    with pytest.raises(errors.ServiceUnavailable) as everybodys, turns.turn("e"):
        pass
    assert (mine.value.retry_after_seconds, everybodys.value.retry_after_seconds) == (1, 1)
    for one in held:
        one.__exit__(None, None, None)
    with turns.turn("a"), turns.turn("a"):
        pass
