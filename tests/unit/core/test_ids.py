"""Ids that nobody else has, whoever draws them."""

import os
import time
from concurrent.futures import ThreadPoolExecutor

from app.core import ids


def test_an_id_is_a_uuid_of_version_7_that_says_when_it_was_made() -> None:
    before, made, after = time.time_ns() // 1_000_000, ids.uuid7(), time.time_ns() // 1_000_000
    assert (made.version, made.variant) == (7, "specified in RFC 4122")
    assert before <= made.int >> 80 <= after


def test_nothing_is_drawn_twice_by_several_threads() -> None:
    with ThreadPoolExecutor(8) as threads:
        drawn = list(threads.map(lambda _: ids.random_bytes(), range(20 * ids.DRAWN)))
    assert {len(one) for one in drawn} == {16}
    assert len(set(drawn)) == len(drawn)


def test_a_child_does_not_draw_what_its_parent_draws() -> None:
    ids.random_bytes()  # There is more where that came from.
    reads, writes = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writes, b"".join(ids.random_bytes() for _ in range(4)))
        os._exit(0)
    os.waitpid(child, 0)
    os.close(writes)
    with os.fdopen(reads, "rb") as pipe:
        theirs = pipe.read()
    mine = [ids.random_bytes() for _ in range(2 * ids.DRAWN)]
    assert len(theirs) == 64
    assert not {theirs[start : start + 16] for start in range(0, 64, 16)} & set(mine)
