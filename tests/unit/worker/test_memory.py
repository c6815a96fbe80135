import multiprocessing
import os
import resource
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from app.worker import memory
from app.worker.memory import OomKills

V1 = "oom_kill_disable 0\nunder_oom 0\noom_kill 7\n"
V2 = "low 0\nhigh 0\nmax 31\noom 4\noom_kill 3\noom_group_kill 1\n"
CGROUPS = Path("/sys/fs/cgroup")


@pytest.mark.parametrize(("text", "kills"), [(V1, 7), (V2, 3), ("oom_kill_disable 0\nunder_oom 0\n", 0), ("", 0)])
def test_the_kills_are_read_in_either_version(text: str, kills: int) -> None:
    assert memory.parse_oom_kills(text) == kills


@pytest.mark.parametrize(
    ("own", "first"),
    [
        ("0::/\n", "memory.events"),
        ("0::/kubepods/pod1/c1\n", "kubepods/pod1/c1/memory.events"),
        ("5:cpu,cpuacct:/a\n4:memory:/docker/c1\n0::/\n", "memory/docker/c1/memory.oom_control"),
        ("4:cpu,memory:/c1\n", "memory/c1/memory.oom_control"),
    ],
)
def test_the_counter_is_looked_for_where_the_process_is(own: str, first: str) -> None:
    assert next(memory.oom_counters(own)) == CGROUPS / first


def test_a_container_s_own_mount_is_looked_at_too() -> None:
    places = list(memory.oom_counters("4:memory:/docker/c1\n0::/docker/c1\n"))

    assert CGROUPS / "memory/memory.oom_control" in places
    assert CGROUPS / "memory.events" in places


@pytest.mark.parametrize("own", ["", "garbage\n", "3:pids:/a\n"])
def test_without_a_memory_cgroup_there_is_no_counter(own: str) -> None:
    assert list(memory.oom_counters(own)) == []


@pytest.fixture
def counter(tmp_path: Path) -> Path:
    made = tmp_path / "memory.events"
    made.write_text("oom_kill 2\n")
    return made


def test_each_kill_explains_one_death(counter: Path) -> None:
    kills = OomKills(counter)
    assert not kills.explain_a_death(), "what was killed before does not count"

    counter.write_text("oom_kill 4\n")
    kills.look()
    assert [kills.explain_a_death() for _ in range(3)] == [True, True, False]


def test_a_kill_that_explained_no_death_for_long_explains_none_later(
    counter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kills = OomKills(counter)
    counter.write_text("oom_kill 3\n")
    monkeypatch.setattr(time, "monotonic", lambda: 100.0)
    kills.look()
    monkeypatch.setattr(time, "monotonic", lambda: 100.0 + memory.KILL_FRESH_SECONDS + 0.1)

    assert not kills.explain_a_death()


def test_without_a_counter_no_death_is_explained(tmp_path: Path) -> None:
    assert not OomKills(None).explain_a_death()
    assert not OomKills(tmp_path / "gone").explain_a_death()


MEBIBYTES_200 = 200 * memory.MEBIBYTE


def _limited() -> None:
    with pytest.raises(MemoryError), memory.allowance(64):
        bytearray(MEBIBYTES_200)
    assert len(bytearray(MEBIBYTES_200)) == MEBIBYTES_200, "behind the block it is lifted"


def _not_limited() -> None:
    with memory.allowance(None):
        bytearray(MEBIBYTES_200)


def _above_what_is_held() -> None:
    held = bytearray(b"x") * MEBIBYTES_200
    with memory.allowance(64):
        bytearray(32 * memory.MEBIBYTE)
    del held


def _below_a_limit_that_was_there() -> None:
    here = 10 * memory.MEBIBYTE
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    used = memory._status_bytes("VmData")
    assert used is not None
    resource.setrlimit(resource.RLIMIT_DATA, (used + here, hard))
    before = resource.getrlimit(resource.RLIMIT_DATA)
    with memory.allowance(64):
        assert resource.getrlimit(resource.RLIMIT_DATA) == before
    assert resource.getrlimit(resource.RLIMIT_DATA) == before


@pytest.mark.skipif(not memory.STATUS.exists(), reason="this system does not say what a process holds")
@pytest.mark.parametrize("work", [_limited, _not_limited, _above_what_is_held, _below_a_limit_that_was_there])
def test_a_process_may_take_its_allowance_and_no_more(work: Callable[[], None]) -> None:
    child = multiprocessing.get_context("fork").Process(target=work)
    child.start()
    child.join(20)
    assert child.exitcode == 0


@pytest.mark.skipif(not memory.STATUS.exists(), reason="this system does not say what a process holds")
def test_a_child_is_replaced_when_it_held_half_of_an_allowance_more_than_this_process() -> None:
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") // 1024

    most = memory.most_of_a_child(512)

    assert most is not None
    assert most - resident == pytest.approx(256 * 1024, abs=4096)
