"""A short form of the soak."""

from pathlib import Path

import pytest

from reliability import soak
from reliability.units import BreachError


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="a process's memory is read from /proc")
def test_file_memory_and_descriptors_stay_flat_over_many_days(tmp_path: Path) -> None:
    figures = soak.run(tmp_path, operations=20_000, days=60)

    assert figures.flat[0].rows > 1000
    assert figures.flat[-1].day == 60


def test_growth_is_noticed() -> None:
    samples = tuple(soak.Sample(number, number, 100 * number, 100 * number, 0, 100, 5) for number in range(1, 21))
    with pytest.raises(BreachError, match="rows stays flat"):
        soak._check(soak.SoakFigures(samples, 1))
