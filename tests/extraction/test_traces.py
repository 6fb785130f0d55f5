"""The trace of a run, as a collector gets it."""

import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from audio_assets.extraction.traces import ENDPOINT
from tests import faults
from tests.conftest import PROJECT, write_tone
from tests.extraction.test_engine import engine

pytestmark = pytest.mark.usefixtures("own_state")


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Span]]:
    """The spans that a collector gets, which is set for this test."""
    got: list[Span] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                for scope in resource.scope_spans:
                    got.extend(scope.spans)
            self.send_response(200 if self.path == "/v1/traces" else 404)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Collector) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv(ENDPOINT, f"http://127.0.0.1:{server.server_port}")
        yield got
        server.shutdown()


def test_a_run_has_cells_and_these_have_stages(tmp_path: Path, spans: list[Span]) -> None:
    library = tmp_path / "music"
    library.mkdir()
    write_tone(library / "good.wav", 220.0)
    write_tone(library / "bad.wav", 330.0)
    one, two = faults.feature_set("one", faults.sound), faults.feature_set("two", faults.segfault)
    with engine(library, tmp_path, one, two) as shared:
        shared.begin([one, two], ["music/good.wav", "music/bad.wav"])
        for name in ("one", "two"):
            list(shared.drive(name))
        shared.end_trace()

    assert len({span.trace_id for span in spans}) == 1
    by_id = {span.span_id: span for span in spans}
    [run] = [span for span in spans if not span.parent_span_id]
    assert run.name == "run"
    cells = {
        (span.name, attribute.value.string_value): span
        for span in spans
        for attribute in span.attributes
        if attribute.key == "audio_assets.file_key"
    }
    assert cells.keys() == {(n, f"music/{f}.wav") for n in ("one", "two") for f in ("good", "bad")}
    assert {by_id[cell.parent_span_id].name for cell in cells.values()} == {"run"}
    stages = {
        key: [span.name for span in spans if span.parent_span_id == cell.span_id]
        for key, cell in cells.items()
    }
    assert stages["one", "music/good.wav"] == ["inspect", "hash", "duration", "decode", "extract"]
    assert stages["two", "music/good.wav"] == ["extract"]
    assert stages["two", "music/bad.wav"] == ["extract", "extract"]
    crashed, recovered = (
        span for span in spans if span.parent_span_id == cells["two", "music/bad.wav"].span_id
    )
    assert (crashed.status.code, recovered.status.code) == (
        Status.STATUS_CODE_ERROR,
        Status.STATUS_CODE_UNSET,
    )
    assert "SIGSEGV" in crashed.status.message
    for span in spans:
        assert span.start_time_unix_nano <= span.end_time_unix_nano
        if parent := by_id.get(span.parent_span_id):
            assert parent.start_time_unix_nano <= span.start_time_unix_nano
            assert span.end_time_unix_nano <= parent.end_time_unix_nano


def test_without_a_collector_nothing_is_imported() -> None:
    script = (
        "import sys\n"
        "from audio_assets.extraction import traces\n"
        "assert traces.begin('run') is None\n"
        "assert 'opentelemetry' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script], cwd=PROJECT, check=True)
