"""The `swarmdb` command, also as ``python -m moai_flow.memory``."""

import sys

#: What the extra `cli` brings. The library itself does without.
_EXTRA = frozenset({"rich", "typer"})


def main() -> None:
    """Run the command, or say in one line what it needs."""
    try:
        from moai_flow.memory.cli.app import run

        run()
    except ModuleNotFoundError as error:
        if str(error.name).partition(".")[0] not in _EXTRA:
            raise
        sys.exit("swarmdb: the command needs typer and rich: pip install 'moai-flow-memory[cli]'")
    except KeyboardInterrupt:  # While it is loaded; typer does the same for a command that runs.
        sys.exit(130)


if __name__ == "__main__":
    main()
