"""Turns: how many requests of one kind an API process works on at once, in all and for each owner."""

import contextlib
from collections import Counter
from collections.abc import Iterator

from app.core import errors


class Turns:
    """Few at once, so that what is costly, or reaches strangers, can't be used to wear anybody out.

    Args:
        what: the requests, as a sentence names them.
        of_one: those of one owner.
        of_all: those of all owners together.
    """

    def __init__(self, what: str, *, of_one: int, of_all: int) -> None:
        self._what = what
        self._of_one = of_one
        self._of_all = of_all
        self._taken: Counter[str] = Counter()

    @contextlib.contextmanager
    def turn(self, owner: str) -> Iterator[None]:
        """A turn of this owner.

        Raises:
            TooManyAtOnce: if the owner has as many as it may.
            ServiceUnavailable: if all together have.
        """
        if self._taken[owner] >= self._of_one:
            sentence = f"At most {self._of_one} {self._what} of yours can be under way: wait for one to end"
            raise errors.TooManyAtOnce(sentence, retry_after_seconds=1)
        if self._taken.total() >= self._of_all:
            sentence = f"Too many {self._what} are under way: try again"
            raise errors.ServiceUnavailable(sentence, retry_after_seconds=1)
        self._taken[owner] += 1
        try:
            yield
        finally:
            self._taken[owner] -= 1
            if not self._taken[owner]:
                del self._taken[owner]
