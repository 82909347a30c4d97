"""Running the command as a shell would, in this process."""

import json
import sys
from dataclasses import dataclass
from typing import Any

import pytest

from moai_flow.memory.__main__ import main


@dataclass(frozen=True)
class Ran:
    """What a command left behind."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        assert (self.err, self.status) == ("", 0)
        return json.loads(self.out)


class Command:
    """Calls ``swarmdb`` with arguments."""

    def __init__(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        self._capsys = capsys
        self._monkeypatch = monkeypatch
        for variable, value in {"COLUMNS": "80", "NO_COLOR": "1", "TERM": "dumb"}.items():
            monkeypatch.setenv(variable, value)

    def __call__(self, *arguments: object) -> Ran:
        self._monkeypatch.setattr(sys, "argv", ["swarmdb", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = self._capsys.readouterr()
        code = ended.value.code
        if isinstance(code, str):  # The interpreter prints it, and ends with 1.
            return Ran(1, out, f"{err}{code}\n")
        return Ran(code or 0, out, err)
