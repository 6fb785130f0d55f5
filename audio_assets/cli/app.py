"""The command line `audio-assets`: its commands, what comes before each, and how it ends.

A module that has commands imports at its top what is light. What a command needs beyond it, such as
Dagster, DuckDB or SQLAlchemy, its function imports.
"""

import gc
import sys
from typing import Annotated

import typer
from typer.core import TyperCommand

from audio_assets.cli import (
    breakers,
    explain,
    export,
    health,
    home,
    quarantine,
    results,
    runs,
    serve,
)
from audio_assets.cli.doctor import CheckError
from audio_assets.cli.endings import EXIT_CODES, ExitCode, UserError
from audio_assets.cli.printing import AsCsv, AsJson, console, print_table, set_up_output


def main() -> None:
    """Run the command line; a known error is printed in one line."""
    gc.set_threshold(500_000)  # with 700 the garbage collector takes a tenth of the time of imports
    set_up_output()
    try:
        app()
    except CheckError as error:
        console.print(f"{error}: {error.advice}.", style="red", highlight=False)
        sys.exit(ExitCode.FAILED)
    except Exception as error:
        from robustness.error_classifier import ErrorType, get_error_classifier

        info = get_error_classifier().classify(error)
        if info.error_type is ErrorType.UNKNOWN:
            raise  # a defect: the traceback is what to report
        of_database = getattr(error, "orig", None)  # without SQLAlchemy's statement
        reason = f"A database failed: {of_database}" if of_database else info.reason
        console.print(reason, style="red", highlight=False)
        console.print("`audio-assets doctor` says what to do.")
        sys.exit(ExitCode.FAILED)
    finally:
        gc.freeze()  # else Python, as it exits, searches all of Dagster for cycles: up to a second


_MAKE_A_HOME = ("analyze", "scan", "serve", "doctor", "prepare")


class _Command(TyperCommand):
    """A command that first prepares Dagster's home: not for help or wrong arguments."""

    def invoke(self, context: typer.Context) -> object:  # type: ignore[override]
        try:
            if context.params.get("as_csv") and context.params.get("as_json"):
                raise UserError("--csv and --json exclude each other: give one of them.")
            _prepare(self.name or "")
            return super().invoke(context)
        except KeyboardInterrupt as interrupt:
            console.print(f"Interrupted. {interrupt}".rstrip())
            raise typer.Exit(ExitCode.INTERRUPTED) from None


def _prepare(command: str) -> None:
    """Set DAGSTER_HOME before Dagster is imported, and make it a safe place."""
    try:
        home.prepare(home.find(), must_exist=command not in _MAKE_A_HOME)
    except (CheckError, OSError) as error:
        if command != "doctor":
            advice = getattr(error, "advice", "`audio-assets doctor` says what to do")
            raise UserError(f"{error}: {advice}.") from None


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        console.print(f"audio-assets {version('audio-assets')}", highlight=False)
        raise typer.Exit


def prepare() -> None:
    """Prepare Dagster's home, as every command does."""


def doctor(as_csv: AsCsv = False, as_json: AsJson = False) -> None:
    """Check the installation, and say what to fix."""
    from audio_assets.cli.doctor import Verdict, diagnose

    with console.status("checking the installation"):
        findings = list(diagnose())
    print_table(
        ("verdict", "check", "found", "to do"),
        [(str(f.verdict), f.check, f.found, f.advice) for f in findings],
        as_csv=as_csv,
        as_json=as_json,
    )
    if any(finding.verdict is Verdict.FAILED for finding in findings):
        raise typer.Exit(ExitCode.FAILED)


app = typer.Typer(
    help="Audio features of whole music libraries: extraction by Dagster, results in DuckDB.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version.", is_eager=True, callback=_print_version
        ),
    ] = False,
) -> None:
    pass


def _group(name: str, about: str) -> typer.Typer:
    group = typer.Typer(help=about, no_args_is_help=True)
    app.add_typer(group, name=name)
    return group


for command in (
    runs.analyze,
    runs.scan,
    runs.forget,
    results.query,
    export.export,
    results.status,
    health.health,
    explain.explain,
    health.top,
    health.daemon,
    serve.serve,
    results.publish,
    runs.reconcile,
    doctor,
):
    app.command(cls=_Command)(command)
app.command(cls=_Command, hidden=True)(prepare)
app.command()(home.init)

_history = _group("history", "Dagster's runs and events.")
_history.command(cls=_Command)(runs.prune)

_quarantine = _group("quarantine", "Cells that failed because of their file.")
_quarantine.command("list", cls=_Command)(quarantine.show)
_quarantine.command(cls=_Command)(quarantine.release)

_breakers = _group("breakers", "Circuit breakers.")
_breakers.command("list", cls=_Command)(breakers.show)
for command in (breakers.reset, breakers.force_open, breakers.disable):
    _breakers.command(cls=_Command)(command)
