"""How a command ends: its exit codes, and errors that end it with one sentence."""

from enum import IntEnum

import typer

from audio_assets.cli.printing import console


class ExitCode(IntEnum):
    """What the command tells the shell."""

    DONE = 0
    FAILED = 1
    USAGE = 2
    SOME_FILES_FAILED = 3
    INTERRUPTED = 130


EXIT_CODES = (
    "Exit codes: 0 done; 1 failed; 2 wrong usage or settings; 3 done, but cells of some files "
    "failed or are in quarantine; 130 interrupted."
)


class UserError(typer.Exit):
    """Ends the command with a message.

    Parameters
    ----------
    message : str
        What was wrong and what to do.
    code : ExitCode
        Wrong usage by default.
    """

    def __init__(self, message: str, code: ExitCode = ExitCode.USAGE) -> None:
        console.print(message, style="red", highlight=False)
        super().__init__(code)
