"""What becomes of each cell of a file, from what is known."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from audio_assets.extraction.planning import Compute, Copy, Known, Reuse, Skip, plan_file
from robustness.error_classifier import ErrorType
from robustness.quarantine import QuarantinedCell
from tests import faults

PLAIN = faults.feature_set("plain", faults.sound)
TAGS = replace(faults.feature_set("tags", faults.length_of_file), reads="file")
OWN, OTHER = ({"value": value, "retry_after": None} for value in (1.0, 2.0))
DUE = OWN | {"retry_after": datetime.now(UTC) - timedelta(seconds=1)}
WAITS = OWN | {"retry_after": datetime.now(UTC) + timedelta(hours=1)}
BARRED = QuarantinedCell(
    content_hash="abc",
    feature_set="plain",
    file_key="music/a.wav",
    error_type="corrupt_file",
    reason="breaks off",
    first_failed_at=0.0,
    last_failed_at=0.0,
    attempts=1,
    code_version="1",
)


@pytest.mark.parametrize(
    ("known", "plain", "tags"),
    [
        (Known(), Compute(), Compute()),
        (Known({"abc": {"music/a.wav": OWN}}), Reuse(OWN), Reuse(OWN)),
        # Tags are the file's own: another file's are not copied.
        (Known({"abc": {"music/b.wav": OTHER}}), Copy(OTHER), Compute()),
        (Known({"other": {"music/a.wav": OWN}}), Compute(), Compute()),
        (Known({"abc": {"music/a.wav": DUE}}), Compute(DUE), Compute(DUE)),
        (Known({"abc": {"music/a.wav": WAITS}}), Reuse(WAITS), Reuse(WAITS)),
        (Known({"abc": {"music/b.wav": DUE}}), Compute(), Compute()),
    ],
)
def test_rows_in_force_are_used(known: Known, plain: object, tags: object) -> None:
    plans = plan_file("music/a.wav", "abc", [PLAIN, TAGS], {"plain": known, "tags": known})
    assert plans == {"plain": plain, "tags": tags}


def test_what_is_in_quarantine_is_skipped_with_its_reason() -> None:
    known = {"plain": Known(quarantined={"abc": BARRED})}
    plan = plan_file("music/a.wav", "abc", [PLAIN], known)["plain"]
    assert isinstance(plan, Skip)
    assert plan.error.error_type is ErrorType.CORRUPT_FILE
    assert plan.error.message == "breaks off"
