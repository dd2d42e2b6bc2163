"""rich's console, as every command uses it."""

import rich.console


class Console(rich.console.Console):
    """One that leaves a closed pipe to `cli.run_tool`; rich itself ends the process, with status 1."""

    def on_broken_pipe(self) -> None:
        """Called while the BrokenPipeError is handled."""
        raise BrokenPipeError
