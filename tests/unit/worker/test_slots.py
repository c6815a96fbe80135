import multiprocessing
import os
from dataclasses import replace
from uuid import uuid4

import pytest

from app.lifecycle import Claim
from app.worker.slots import Running, Slots


def running(started: float = 1.5, limit: float = 0.0) -> Running:
    return Running(Claim(uuid4(), 7, uuid4()), started, limit)


def test_what_a_child_shows_is_read_by_whoever_shares_the_memory() -> None:
    slots = Slots.create(concurrency=2)
    beside = Slots(os.dup(slots.fd))
    index = slots.occupy()
    [idle] = beside.all()
    assert (idle.index, idle.pid, idle.running) == (index, os.getpid(), None)

    shown = running(limit=2.5)
    slots.show(index, shown)
    assert beside.all() == [replace(idle, running=shown)]
    slots.clear(index)
    assert beside.all() == [idle]
    beside.free(index)
    assert slots.all() == []


def test_each_child_has_a_slot_of_its_own_until_there_are_none() -> None:
    slots = Slots.create(concurrency=1)

    assert [slots.occupy() for _ in range(slots.count)] == list(range(slots.count))
    with pytest.raises(RuntimeError, match="no free slot"):
        slots.occupy()
    slots.free(3)
    assert slots.occupy() == 3


def test_a_slot_that_is_being_written_is_not_read_half() -> None:
    slots = Slots.create(concurrency=1)
    index = slots.occupy()
    slots.show(index, running())
    slots._memory[70] ^= 0xFF

    assert slots.read(index) is None


def test_a_kill_is_allowed_only_while_the_child_shows_the_attempt() -> None:
    slots = Slots.create(concurrency=1)
    index = slots.occupy()
    first, second = running(), running()

    slots.show(index, first)
    assert slots.order_death(index, first.claim)
    slots.clear(index)
    assert slots.ordered_to_die(index, first.claim), "the child knows that a signal may be on its way"

    slots.show(index, second)
    assert not slots.order_death(index, first.claim), "the next task is not killed for the last one"
    slots.clear(index)
    assert not slots.ordered_to_die(index, second.claim)


def test_what_an_attempt_is_told_is_not_told_to_the_next_one() -> None:
    slots = Slots.create(concurrency=1)
    index = slots.occupy()
    first, second = running(), running()

    slots.show(index, first)
    assert slots.order_soft_limit(index, first.claim)
    assert slots.ordered_by_soft_limit(index, first.claim)
    assert not slots.ordered_to_cancel(index, first.claim)
    assert not slots.ordered_to_die(index, first.claim)

    slots.show(index, second)
    assert not slots.order_soft_limit(index, first.claim), "it is too late for a signal"
    assert not slots.ordered_by_soft_limit(index, second.claim)


def test_the_last_slot_has_room_for_every_order() -> None:
    slots = Slots.create(concurrency=1)
    last = [slots.occupy() for _ in range(slots.count)][-1]
    shown = replace(running(limit=9.0), soft_limit_seconds=4.5)
    slots.show(last, shown)

    for order in (slots.order_death, slots.order_cancel, slots.order_soft_limit):
        assert order(last, shown.claim)
    assert slots.all()[-1].running == shown


def test_the_stop_of_the_worker_is_seen_by_all() -> None:
    slots = Slots.create(concurrency=1)
    assert not slots.stopping
    slots.announce_stop()
    assert Slots(os.dup(slots.fd)).stopping


def test_children_that_start_at_once_take_different_slots() -> None:
    slots = Slots.create(concurrency=4)
    context = multiprocessing.get_context("fork")
    children = [context.Process(target=_occupy, args=(slots,)) for _ in range(8)]
    for child in children:
        child.start()
    for child in children:
        child.join(10)

    assert len({slot.index for slot in slots.all()}) == len({slot.pid for slot in slots.all()}) == 8


def _occupy(slots: Slots) -> None:
    slots.occupy()


def test_a_process_that_has_the_pid_of_a_dead_child_is_not_taken_for_it() -> None:
    slots = Slots.create(concurrency=1)
    slots.occupy()
    [mine] = slots.all()

    assert mine.lives()
    assert not replace(mine, born=mine.born - 1).lives()
    assert not replace(mine, pid=2**22 + 1).lives()
