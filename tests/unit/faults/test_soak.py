"""A soak that says too little is not good enough."""

from tests.faults.soak import LONG_MINUTES, shortfalls

FAULTS = ("flush", "kill")


def test_a_long_run_that_met_every_fault_under_load_is_good_enough() -> None:
    assert shortfalls(20_000, LONG_MINUTES, {"flush": 1, "kill": 3}, FAULTS) == []


def test_a_run_with_too_few_tasks_says_too_little() -> None:
    assert shortfalls(959, 1, {}, FAULTS) == ["959 tasks were acknowledged, fewer than 960"]
    assert shortfalls(960, 1, {}, FAULTS) == []


def test_a_long_run_that_never_met_a_fault_says_too_little() -> None:
    assert shortfalls(20_000, LONG_MINUTES, {"flush": 1, "kill": 0}, FAULTS) == ["never struck: kill"]
