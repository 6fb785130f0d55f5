"""`audio-assets quarantine`."""

from datetime import UTC, datetime
from typing import Annotated

import typer

from audio_assets.cli.completion import feature_set_names
from audio_assets.cli.doctor import check_state
from audio_assets.cli.printing import AsCsv, AsJson, console, print_table
from audio_assets.library.text import masked


def show(as_csv: AsCsv = False, as_json: AsJson = False) -> None:
    """Show the quarantined cells, and why they failed."""
    from robustness.quarantine import Quarantine

    check_state()
    cells = Quarantine().list()
    if not (cells or as_csv or as_json):
        console.print("No cell is quarantined.")
        return
    print_table(
        ("file", "feature set", "error", "reason", "attempts", "since"),
        [
            (
                cell.file_key,
                cell.feature_set,
                cell.error_type,
                masked(cell.reason),
                cell.attempts,
                datetime.fromtimestamp(cell.first_failed_at, UTC),
            )
            for cell in cells
        ],
        as_csv=as_csv,
        as_json=as_json,
    )


def release(
    pattern: Annotated[str, typer.Argument(help="File key, pattern (*, ?) or content hash.")],
    feature_set: Annotated[
        str | None,
        typer.Option(
            help="Only this feature set.", show_default=False, autocompletion=feature_set_names
        ),
    ] = None,
) -> None:
    """Release cells, so that the next run tries them again."""
    from robustness.quarantine import Quarantine

    check_state()
    console.print(f"{Quarantine().release(pattern, feature_set)} cells released.")
