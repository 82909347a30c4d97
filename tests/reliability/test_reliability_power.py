"""A short form of the power losses."""

from pathlib import Path
from typing import Any

import pytest

from reliability import power


@pytest.mark.parametrize("durability", ["normal", "full"])
def test_what_a_power_loss_leaves_is_sound_and_a_prefix_of_the_commits(durability: Any, tmp_path: Path) -> None:
    figures = power.run(tmp_path, durability=durability, moments=8)

    assert figures.copies[power.NOTHING] == 8
    assert figures.most_lost[power.NOTHING] == 0
    if durability == "full" and power.has_compiler():
        assert figures.most_lost[power.UNFLUSHED] == 0
