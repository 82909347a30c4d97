"""Running the command as a shell would, in this process."""

import fcntl
import json
import os
import pty
import re
import select
import signal
import sqlite3
import struct
import subprocess
import sys
import termios
from collections.abc import Mapping
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

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


def on_terminal(command: list[str], folder: Path, *, is_all: bool = False, **environment: str) -> tuple[bytes, bytes]:
    """Return what a program shows on a terminal, and what it writes to standard output.

    The terminal is its standard error; with *is_all*, its standard output as well.
    """
    shown, terminal = pty.openpty()
    usual = {name: value for name, value in os.environ.items() if name != "NO_COLOR"}
    variables = {**usual, "COLUMNS": "80", "TERM": "xterm", **environment}
    stdout = terminal if is_all else subprocess.PIPE
    with subprocess.Popen(command, cwd=folder, stdout=stdout, stderr=terminal, env=variables) as process:
        os.close(terminal)
        seen = b""
        with suppress(OSError):  # Linux's way to say that the other side is closed.
            while piece := os.read(shown, 65536):
                seen += piece
        os.close(shown)
        answer = b"" if process.stdout is None else process.stdout.read()
    assert process.returncode == 0
    return seen, answer


def execute(path: Path, statement: str, *parameters: object) -> None:
    """Run raw SQL, as another program may."""
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute(statement, parameters)


_CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class Terminal:
    """A program that goes on, on a terminal."""

    def __init__(
        self, command: list[str], environment: Mapping[str, str] | None = None, *, columns: int = 80, lines: int = 24
    ) -> None:
        self._shown, terminal = pty.openpty()
        self.resize(columns, lines)
        unset = {"NO_COLOR", "COLUMNS", "LINES"}
        usual = {name: value for name, value in os.environ.items() if name not in unset}
        variables = {**usual, "TERM": "xterm", **(environment or {})}
        self.process = subprocess.Popen(command, env=variables, stdin=terminal, stdout=terminal, stderr=terminal)
        os.close(terminal)
        self.seen = b""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._shown)

    def resize(self, columns: int, lines: int) -> None:
        self._lines = lines
        fcntl.ioctl(self._shown, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

    def until(self, wanted: str) -> list[str]:
        """Return the lines of the first screen that shows *wanted*, which later calls do not look at again."""
        seen = b""
        while True:
            *screens, last = seen.decode(errors="replace").split("\x1b[H")
            if last.count("\n") == self._lines - 1:
                screens.append(last)
            for screen in screens:
                if wanted in (text := _CONTROL.sub("", screen)):
                    return [line.rstrip() for line in text.splitlines()]
            piece = self.read()
            assert piece, f"it ended, having shown {seen!r}"
            seen += piece

    def interrupt(self) -> int:
        """Do what ctrl-C does, and return the status with which the program ends."""
        self.process.send_signal(signal.SIGINT)
        while self.read():
            pass
        return self.process.wait()

    def read(self) -> bytes:
        ready, _, _ = select.select([self._shown], [], [], 60)
        assert ready, f"nothing more came; it had shown {self.seen[-4000:]!r}"
        try:
            piece = os.read(self._shown, 65536)
        except OSError:  # Linux's way to say that the other side is closed.
            return b""
        self.seen += piece
        return piece
