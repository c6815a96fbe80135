"""The guard with the system's own resolver, a real name server, and a receiver at every address of the internet.

All of it is in a network namespace of its own: see `tests.support.egress`.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict
from ipaddress import ip_address
from pathlib import Path

import pytest

from app.utils.webhook import Outcome
from tests.support.certificates import self_signed
from tests.support.egress import Case, Result
from tests.unit.utils.test_guard import DENIED, PUBLIC

UNSHARE = ["unshare", "--user", "--map-root-user", "--net", "--mount"]
NEIGHBOUR = ["93.184.216.34", "2606:4700:4700::1111"]
"""Public addresses beside which a denied one stands in an answer."""


def literal(address: str) -> str:
    return f"https://[{address}]/" if ":" in address else f"https://{address}/"


def host(kind: str, number: int) -> str:
    return f"https://{kind}-{number}.hooks.example/"


def cases() -> list[Case]:
    made = []
    for number, address in enumerate(DENIED):
        made += [
            Case(name=f"literal {address}", url=literal(address)),
            Case(name=f"record {address}", url=host("record", number), answers=[[address]]),
            Case(name=f"mixed {address}", url=host("mixed", number), answers=[[*NEIGHBOUR, address]]),
            Case(name=f"rebound {address}", url=host("rebound", number), answers=[NEIGHBOUR[:1], [address]], posts=2),
            Case(name=f"unguarded {address}", url=host("open", number), answers=[[address]], guarded=False),
        ]
    for number, address in enumerate(PUBLIC):
        made += [
            Case(name=f"literal {address}", url=literal(address)),
            Case(name=f"record {address}", url=host("public", number), answers=[[address]]),
        ]
    return made


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Result]:
    """What became of each case, by its name."""
    for program in ("unshare", "ip"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")
    if subprocess.run([*UNSHARE, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this machine allows no network namespaces")
    directory = tmp_path_factory.mktemp("egress")
    asked = directory / "cases.json"
    crt, key = self_signed(directory, "*.hooks.example", addresses=PUBLIC)
    asked.write_text(json.dumps({"crt": str(crt), "key": str(key), "cases": [asdict(one) for one in cases()]}))
    done = subprocess.run(
        [*UNSHARE, sys.executable, "-m", "tests.support.egress", str(asked)],
        capture_output=True, text=True, check=False, timeout=100, cwd=Path(__file__).parents[3],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return {one["name"]: Result(**one) for one in json.loads(done.stdout)}


@pytest.mark.parametrize("address", DENIED)
def test_nothing_reaches_a_denied_address_however_its_host_is_spelled(
    address: str, results: Mapping[str, Result]
) -> None:
    for kind in ("literal", "record", "mixed"):
        result = results[f"{kind} {address}"]
        assert (list(result.outcomes), list(result.reached)) == ([Outcome.BLOCKED], []), kind


@pytest.mark.parametrize("address", DENIED)
def test_a_name_that_is_rebound_after_its_first_answer_gains_nothing(
    address: str, results: Mapping[str, Result]
) -> None:
    result = results[f"rebound {address}"]
    assert list(result.outcomes) == [Outcome.SUCCESS, Outcome.BLOCKED]
    assert list(result.reached) == NEIGHBOUR[:1]


@pytest.mark.parametrize("address", PUBLIC)
def test_a_public_address_is_delivered_to_as_a_literal_and_as_a_record(
    address: str, results: Mapping[str, Result]
) -> None:
    mapped = getattr(ip_address(address), "ipv4_mapped", None) or address
    for kind in ("literal", "record"):
        result = results[f"{kind} {address}"]
        assert list(result.outcomes) == [Outcome.SUCCESS], kind
        assert list(result.reached) == [str(mapped)], kind


def test_without_the_guard_the_receiver_is_reached_at_nearly_all_of_them(results: Mapping[str, Result]) -> None:
    # So that the silence above means something: to multicast, broadcast and the
    # like there is no TCP anyway.
    unreached = {address for address in DENIED if not results[f"unguarded {address}"].reached}
    assert len(DENIED) - len(unreached) >= 45, unreached
