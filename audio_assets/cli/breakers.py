"""`audio-assets breakers`."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, TypeAlias

import typer

from audio_assets.cli.completion import breaker_names
from audio_assets.cli.doctor import check_state
from audio_assets.cli.endings import UserError
from audio_assets.cli.printing import AsCsv, AsJson, console, print_table
from audio_assets.library.text import masked

if TYPE_CHECKING:
    from robustness.circuit_breaker import CircuitBreaker

Name: TypeAlias = Annotated[
    str, typer.Argument(help="Name of the breaker.", autocompletion=breaker_names)
]

COLUMNS = ("breaker", "state", "by hand", "failures", "successes", "last error")


def show(as_csv: AsCsv = False, as_json: AsJson = False) -> None:
    """Show every breaker's state."""
    from robustness.circuit_breaker import all_circuit_breakers

    check_state()
    rows = breaker_rows(all_circuit_breakers().values())
    print_table(COLUMNS, rows, as_csv=as_csv, as_json=as_json)


def breaker_rows(breakers: Iterable["CircuitBreaker"]) -> list[tuple[object, ...]]:
    """Return the values of `COLUMNS` for breakers."""
    return [
        (
            breaker.name,
            stats["state"],
            stats["forced"],
            stats["failure_count"],
            stats["success_count"],
            stats["last_error"] and masked(stats["last_error"]),
        )
        for breaker in breakers
        if (stats := breaker.get_stats())
    ]


def reset(name: Name) -> None:
    """Close a breaker and forget its failures."""
    _breaker(name).reset()
    console.print(f"{name} is closed.")


def force_open(name: Name) -> None:
    """Have a breaker refuse all calls until it is reset."""
    _breaker(name).force_open()
    console.print(f"{name} refuses all calls until `breakers reset {name}`.")


def disable(name: Name) -> None:
    """Have a breaker allow all calls until it is reset."""
    _breaker(name).disable()
    console.print(f"{name} allows all calls until `breakers reset {name}`.")


def _breaker(name: str) -> "CircuitBreaker":
    from robustness.circuit_breaker import all_circuit_breakers

    check_state()
    breakers = all_circuit_breakers()
    if name not in breakers:
        known = ", ".join(breakers) or "none yet"
        raise UserError(f"There is no breaker {name!r}. Known breakers: {known}.")
    return breakers[name]
