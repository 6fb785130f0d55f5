"""Traces by OpenTelemetry: a span for the run, one for each of its cells, one for each stage.

The run's process makes them from what it has measured, so that workers know nothing of them. The
exporter's queue is bounded, and what it cannot take is dropped. Without an address to send them to,
nothing of this is imported.
"""

import os
import threading
import time
from typing import TYPE_CHECKING

from audio_assets.extraction.cells import CellOutcome
from audio_assets.extraction.results import Attempt
from audio_assets.library.text import masked, printable
from robustness.log_context import get_logger

if TYPE_CHECKING:
    from opentelemetry.trace import Span

logger = get_logger("traces")

ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT"

LAST_S = 5.0
"""A run waits no longer than this for its last spans to be sent (s)."""


class Traces:
    """The trace of a run, which begins now.

    Parameters
    ----------
    run_id : str
        The run.

    Raises
    ------
    ImportError
        If OpenTelemetry is not installed.
    """

    def __init__(self, run_id: str) -> None:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        name = os.environ.get("OTEL_SERVICE_NAME", "audio-assets")
        resource = Resource.create({"service.name": name})
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        self._tracer = self._provider.get_tracer("audio_assets")
        self._run = self._tracer.start_span("run", attributes={"audio_assets.run_id": run_id})
        self._cells: dict[tuple[str, str], Span] = {}
        """Spans of cells that have begun and not ended."""

    def attempt_ended(self, attempt: Attempt) -> None:
        """Add the stages of an attempt, to the cell that needs them first."""
        from opentelemetry.trace import Status, StatusCode

        stage, measurement = attempt.stage, attempt.measurement
        # Spans have times since the epoch.
        end = time.time() - (time.monotonic() - attempt.finished)
        at = end - measurement.seconds
        parent = self._run
        if cells := stage.cells:
            parent = self._cell(stage.file.key, cells[0].operation, at)
        error = attempt.future.exception()
        for name, seconds in measurement.stage_seconds.items():
            span = self._start(name, parent, at)
            at += seconds
            span.set_attributes(
                {
                    "audio_assets.attempt": stage.attempts + 1,
                    "audio_assets.worker_pid": measurement.worker_pid,
                    "audio_assets.peak_memory_mib": measurement.peak_memory_mib,
                    "audio_assets.core_wait_s": measurement.core_wait_seconds,
                }
            )
            if error:
                span.set_status(Status(StatusCode.ERROR, _text(str(error))))
            span.end(_ns(at))

    def cell_ended(self, outcome: CellOutcome) -> None:
        """End a cell, if any stage was traced for it."""
        from opentelemetry.trace import Status, StatusCode

        span = self._cells.pop((outcome.file_key, outcome.feature_set), None)
        if span:
            span.set_attribute("audio_assets.status", str(outcome.status))
            if outcome.error:
                span.set_attribute("error.type", outcome.error.error_type.value)
                span.set_status(Status(StatusCode.ERROR, _text(outcome.error.message)))
            span.end()

    def end(self) -> None:
        """End the trace, and send what is left of it."""
        for span in (*self._cells.values(), self._run):
            span.end()
        # It waits for a collector that hangs for longer than a run should.
        sending = threading.Thread(target=self._provider.shutdown, daemon=True)
        sending.start()
        sending.join(LAST_S)

    def _cell(self, file_key: str, feature_set: str, at: float) -> "Span":
        span = self._cells.get((file_key, feature_set))
        if span is None:
            span = self._cells[file_key, feature_set] = self._start(feature_set, self._run, at)
            span.set_attribute("audio_assets.file_key", _text(file_key))
        return span

    def _start(self, name: str, parent: "Span", at: float) -> "Span":
        from opentelemetry.trace import set_span_in_context

        return self._tracer.start_span(name, set_span_in_context(parent), start_time=_ns(at))


def begin(run_id: str) -> Traces | None:
    """Begin the trace of a run; None if there is no address to send it to."""
    if not os.environ.get(ENDPOINT):
        return None
    try:
        return Traces(run_id)
    except ImportError as error:
        logger.warning("%s is set, but traces need audio-assets[otel]: %s", ENDPOINT, error)
        return None


def _text(text: str) -> str:
    return masked(printable(text))


def _ns(seconds: float) -> int:
    return round(seconds * 1e9)
