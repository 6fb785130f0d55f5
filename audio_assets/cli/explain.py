"""The command that explains a run."""

from typing import Annotated

import typer

from audio_assets.cli.endings import ExitCode, UserError
from audio_assets.cli.printing import (
    TablesAsCsv,
    TablesAsJson,
    console,
    print_json,
    print_table,
    records,
    shown_time,
)
from audio_assets.library.text import counted

COLUMNS = ("use", "seconds", "share", "meaning")

Run = Annotated[str, typer.Argument(help="ID of a run, or its beginning; by default the last run.")]


def explain(
    run: Run = "",
    as_csv: TablesAsCsv = False,
    as_json: TablesAsJson = False,
) -> None:
    """Explain what the time of a run's workers went to, and what would make it faster."""
    from audio_assets.monitoring import performance
    from audio_assets.settings import get_settings
    from audio_assets.warehouse.queries import QueryError

    try:
        found = performance.explain(get_settings().warehouse, run)
    except performance.NoRunError as error:
        raise UserError(str(error)) from None
    except QueryError as error:
        raise UserError(str(error), ExitCode.FAILED) from None
    rows = [(use.name, use.seconds, use.share, use.description) for use in found.uses]
    sets = found.feature_sets
    if as_json:
        head = {
            "run_id": found.run_id,
            "started_at": found.started_at,
            "host": found.host,
            "workers": found.workers,
            "bottleneck": found.uses[0].name,
            "advice": found.advice,
        }
        lists = {"time": records(COLUMNS, rows), "feature_sets": records(sets.columns, sets.rows)}
        print_json(head | lists)
        return
    title = (
        f"Run {found.run_id} of {shown_time(found.started_at)}, {counted(found.workers, 'worker')}"
    )
    print_table(COLUMNS, rows, f"{title} on {found.host}", as_csv=as_csv)
    if as_csv:
        console.print()
    print_table(sets.columns, sets.rows, "Feature sets, and decoding", as_csv=as_csv)
    if not as_csv:
        console.print(f"\nMost went to {found.uses[0].name}. {found.advice}", highlight=False)
