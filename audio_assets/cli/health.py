"""The commands that report health, and the daemon that systemd watches."""

import logging
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from audio_assets.cli.endings import ExitCode, UserError
from audio_assets.cli.printing import AsCsv, AsJson, console, print_json, print_table, records

COLUMNS = ("severity", "check", "found", "since", "evidence", "to do")
EXIT_CODES = {"well": 0, "degraded": 1, "broken": 2}


def health(as_csv: AsCsv = False, as_json: AsJson = False) -> None:
    """Report in a second whether all is well: exit code 0 well, 1 degraded, 2 broken."""
    from audio_assets.monitoring.findings import health_of
    from audio_assets.monitoring.health import examine, open_store

    logging.getLogger("robustness").setLevel(logging.CRITICAL)  # what they log is a finding
    findings = examine(open_store())
    verdict = health_of(findings)
    rows = [finding.row for finding in findings]
    if as_json:
        print_json({"health": str(verdict), "findings": records(COLUMNS, rows)})
    elif as_csv or rows:
        print_table(COLUMNS, rows, as_csv=as_csv)
    else:
        console.print("All is well.")
    raise typer.Exit(EXIT_CODES[verdict])


def top(
    once: Annotated[bool, typer.Option("--once", help="Print it once, and end.")] = False,
) -> None:
    """Show what goes on, live: throughput, workers, failures, and when all will be done."""
    from audio_assets.cli.top import show

    logging.getLogger("robustness").setLevel(logging.CRITICAL)  # what they log is a finding
    show(live=console.is_terminal and not once)


def daemon() -> None:
    """Run Dagster's daemon, and notify systemd's watchdog for as long as it lives."""
    from audio_assets.monitoring.watchdog import watch
    from audio_assets.settings import get_settings

    program = Path(sys.executable).with_name("dagster-daemon")
    if not program.exists():
        raise UserError(f"{program} is not installed.", ExitCode.FAILED)
    process = os.getpid()
    if os.environ.get("NOTIFY_SOCKET") and os.fork() == 0:
        try:
            watch(process)
        finally:
            os._exit(0)  # not back into the command line of the process that was forked
    workspace = get_settings().dagster_home / "workspace.yaml"
    os.execv(program, [str(program), "run", "--workspace", str(workspace)])
