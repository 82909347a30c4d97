"""The `swarmdb` command. It stands on the facade, and needs the extra `cli`."""
