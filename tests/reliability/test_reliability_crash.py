"""A short form of the crashes: nothing that was acknowledged is lost, and nothing is there by half."""

from pathlib import Path
from typing import Any

import pytest

from moai_flow.memory import SwarmDB
from reliability import crash
from reliability.units import LEFT, BreachError, check_units, found, write


@pytest.mark.parametrize("durability", ["normal", "full"])
def test_killed_writers_leave_what_was_acknowledged_and_nothing_by_half(
    durability: Any, path: Path, tmp_path: Path
) -> None:
    figures = crash.run(f"sqlite:///{path}", tmp_path, durability=durability, rounds=5)

    assert figures.acknowledged > 0


def test_killed_clients_leave_the_same_on_a_server(postgres_url: str, tmp_path: Path) -> None:
    assert crash.run(postgres_url, tmp_path, rounds=3, processes=4).acknowledged > 0


@pytest.mark.parametrize("kind", LEFT)
def test_a_unit_leaves_what_is_looked_for(kind: str, db: SwarmDB) -> None:
    write(db, kind, f"r0/w0/{kind}/0")
    rows = found(db, "r0")

    assert {name: dict(tables) for name, tables in rows.items()} == {f"r0/w0/{kind}/0": LEFT[kind]}
    assert check_units(rows, {"r0/w0": list(rows)}) == 0
    assert check_units(rows, {"r0/w0": []}) == 1


@pytest.mark.parametrize(
    ("rows", "acknowledged", "promise"),
    [
        ({}, ["r0/w0/event/0"], "what was acknowledged is there"),
        ({"r0/w0/batch/0": {"agent_events": 19}}, [], "no half of a transaction"),
        ({"r0/w0/event/1": {"agent_events": 1}}, [], "nothing is there that was not begun"),
    ],
)
def test_a_breach_is_noticed(rows: Any, acknowledged: list[str], promise: str) -> None:
    with pytest.raises(BreachError, match=promise):
        check_units(rows, {"r0/w0": acknowledged})
