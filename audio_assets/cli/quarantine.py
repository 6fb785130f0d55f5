"""`audio-assets quarantine`."""

from collections import defaultdict
from datetime import UTC, datetime
from typing import Annotated

import typer

from audio_assets.cli.completion import feature_set_names
from audio_assets.cli.doctor import check_state
from audio_assets.cli.endings import UserError
from audio_assets.cli.printing import AsCsv, AsJson, Rows, console, print_table
from audio_assets.library.text import counted, masked


def show(as_csv: AsCsv = False, as_json: AsJson = False) -> None:
    """Show the files with quarantined cells, and why these failed; CSV and JSON have each cell."""
    from robustness.quarantine import Quarantine

    check_state()
    cells = [
        (
            cell.file_key,
            cell.feature_set,
            cell.error_type,
            masked(cell.reason),
            cell.attempts,
            datetime.fromtimestamp(cell.first_failed_at, UTC),
        )
        for cell in Quarantine().list()
    ]
    if as_csv or as_json:
        columns = ("file", "feature set", "error", "reason", "attempts", "since")
        print_table(columns, cells, as_csv=as_csv, as_json=as_json)
    elif cells:
        print_table(("file", "feature sets", "reason", "attempts", "since"), _by_file(cells))
    else:
        console.print("No cell is quarantined.")


def _by_file(cells: Rows) -> Rows:
    """Return a row for each file and reason."""
    grouped = defaultdict(list)
    for file_key, feature_set, _, reason, attempts, since in cells:
        grouped[file_key, reason].append((feature_set, attempts, since))
    rows = []
    for (file_key, reason), group in grouped.items():
        feature_sets, attempts, since = zip(*group, strict=True)
        is_all = set(feature_set_names("")) <= {*feature_sets}
        names = "all" if is_all else ", ".join(feature_sets)
        rows.append((file_key, names, reason, sum(attempts), min(since)))
    return rows


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
    known = feature_set_names("")
    if feature_set not in (None, *known):
        names = ", ".join(known)
        raise UserError(f"There is no feature set {feature_set!r}. Known feature sets: {names}.")
    released = Quarantine().release(pattern, feature_set)
    if not released:
        of_set = f" of {feature_set}" if feature_set else ""
        raise UserError(f"{pattern!r} matches no quarantined cell{of_set}.")
    console.print(f"{counted(released, 'cell')} released.")
