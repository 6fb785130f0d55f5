"""`audio-assets serve`: health and metrics by HTTP, alerts, and who may ask."""

import json
import re
import shutil
import socket
import subprocess
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from audio_assets.features import FEATURE_SETS
from audio_assets.monitoring.alerts import ROUNDS, Alerts, command, webhook
from audio_assets.monitoring.findings import Finding, Severity
from audio_assets.warehouse.landing import Landing
from audio_assets.warehouse.queries import query
from audio_assets.warehouse.schema import warehouse_tables
from tests.conftest import PROJECT, Home, make_home, serving
from tests.dagster_dev import wait_until
from tests.warehouse.rows import attempt

PROMETHEUS = PROJECT / "deploy" / "prometheus"
TOKEN = "a secret of the test"

needs_promtool = pytest.mark.skipif(
    not shutil.which("promtool"), reason="promtool (Debian: prometheus) is not installed"
)


def get(url: str, **headers: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers)) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def landing(home: Home) -> Landing:
    return Landing(str(home.path / "landing"), warehouse_tables(FEATURE_SETS.values()))


def samples(text: str, name: str) -> dict[str, float]:
    """Return a metric's samples, by their labels."""
    found = re.findall(rf"^audio_assets_{name}(?:{{(.*)}})? (\S+)$", text, re.MULTILINE)
    return {labels: float(value) for labels, value in found}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    """A home whose landing has attempts of all kinds, in many parts, some of them merged."""
    home = make_home(tmp_path_factory.mktemp("served"))
    written = landing(home)
    for n in range(20):
        rows = [
            attempt(f"{n}", "rhythm", duration_s=2.0 + n, audio_s=200.0),
            attempt(f"{n}", "key", "failed", recovery_strategy="increase_timeout", duration_s=20.0),
            attempt(f"{n}", "key", attempt=2, recovered=True, degraded="cut" if n < 2 else None),
        ]
        written.append("robustness/attempts", rows)
    written.append("robustness/attempts", [attempt("x", "key", "quarantined", duration_s=None)])
    assert home.cli("publish").returncode == 0  # the next one merges what this one has read
    written.append("robustness/attempts", [attempt("y", "key", "deferred", duration_s=None)])
    assert home.cli("publish").returncode == 0
    return home


@pytest.fixture(scope="module")
def url(home: Home) -> Iterator[str]:
    with serving(home) as address:
        wait_until(lambda: get(f"{address}/readyz")[0] == 200, "a first round of checks")
        yield address


def test_counters_are_the_counts_of_the_database(home: Home, url: str) -> None:
    def both(metric: str, sql: str) -> tuple[dict[str, float], dict[str, float]]:
        _, text = get(f"{url}/metrics")
        return samples(text, metric), dict(query(home.warehouse, sql).rows)

    attempts = (
        "attempts_total",
        'SELECT format(\'feature_set="{}",outcome="{}"\', feature_set, outcome), '
        "count(*)::DOUBLE FROM robustness.attempts GROUP BY ALL",
    )
    shown, counted = both(*attempts)
    assert shown == counted
    assert len(shown) == 5
    assert sum(shown.values()) == 62
    for metric, sql in (
        (
            "errors_total",
            'SELECT format(\'error_type="{}",feature_set="{}"\', error_type, feature_set), '
            "count(*)::DOUBLE FROM robustness.attempts WHERE outcome = 'failed' GROUP BY ALL",
        ),
        (
            "attempt_duration_seconds_count",
            "SELECT format('feature_set=\"{}\"', feature_set), count(duration_s)::DOUBLE "
            "FROM robustness.attempts WHERE outcome IN ('succeeded', 'failed') GROUP BY ALL",
        ),
        (
            "attempt_duration_seconds_sum",
            "SELECT format('feature_set=\"{}\"', feature_set), sum(duration_s) "
            "FROM robustness.attempts WHERE outcome IN ('succeeded', 'failed') GROUP BY ALL",
        ),
    ):
        shown, counted = both(metric, sql)
        assert shown == counted, metric
    _, text = get(f"{url}/metrics")
    buckets = samples(text, "attempt_duration_seconds_bucket")
    assert buckets['feature_set="rhythm",le="5.0"'] == 4
    assert buckets['feature_set="rhythm",le="+Inf"'] == 20
    tried = 'strategy="increase_timeout"'
    assert samples(text, "recoveries_tried_total") == {tried: 20}
    assert samples(text, "recoveries_succeeded_total") == {tried: 20}
    assert samples(text, "degraded_attempts_total") == {'feature_set="key"': 2}
    assert set(samples(text, "source_up").values()) == {1.0}

    landing(home).append("robustness/attempts", [attempt("z", "rhythm")])
    _, text = get(f"{url}/metrics")
    assert sum(samples(text, "attempts_total").values()) == 63  # before it is published


@needs_promtool
@pytest.mark.parametrize("accepted", ["text/plain", "application/openmetrics-text"])
def test_metrics_are_those_of_prometheus(url: str, accepted: str) -> None:
    status, text = get(f"{url}/metrics", Accept=accepted)
    assert status == 200
    assert text.endswith("# EOF\n") is (accepted != "text/plain")
    if accepted == "text/plain":
        checked = subprocess.run(
            ["promtool", "check", "metrics"],
            input=text,
            capture_output=True,
            text=True,
            check=False,
        )
        assert (checked.returncode, checked.stdout + checked.stderr) == (0, "")
    assert "music/" not in text


@needs_promtool
@pytest.mark.parametrize(
    "arguments",
    [("check", "config", "prometheus.yml"), ("test", "rules", "alerts_test.yml")],
)
def test_alert_rules_do_what_they_should(arguments: tuple[str, ...]) -> None:
    done = subprocess.run(
        ["promtool", *arguments], cwd=PROMETHEUS, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_metric_of_the_alert_rules_is_there(url: str) -> None:
    rules = (PROMETHEUS / "alerts.yml").read_text()
    _, text = get(f"{url}/metrics")
    for name in set(re.findall(r"audio_assets_[a-z_]+(?=[{ ])", rules)):
        assert f"# TYPE {name} " in text, name


def test_health_is_told_and_a_source_that_is_away_costs_itself(home: Home, url: str) -> None:
    assert get(f"{url}/livez") == (200, "ok\n")
    place, away = home.path / "landing", home.path / "away"
    place.rename(away)
    try:
        wait_until(lambda: get(f"{url}/readyz")[0] == 503, "the landing is missed")
        found = json.loads(get(f"{url}/readyz")[1])
        bad = [f["check"] for f in found["findings"] if f["severity"] != Severity.NOTE]
        assert (found["health"], bad) == ("broken", ["landing"])
        _, text = get(f"{url}/metrics")
        assert samples(text, "health")['audio_assets_health="broken"'] == 1
    finally:
        away.rename(place)
    wait_until(lambda: get(f"{url}/readyz")[0] == 200, "it is back")
    home.warehouse.rename(away)
    try:
        home.warehouse.write_bytes(b"of another program")
        _, text = get(f"{url}/metrics")
        assert samples(text, "source_up")['source="database"'] == 0
        assert sum(samples(text, "attempts_total").values()) >= 62
    finally:
        away.rename(home.warehouse)


def connects(url: str, **headers: str) -> bool:
    """Return whether the service takes a websocket of the operations page."""
    address = url.replace("http://", "ws://") + "/operations/ws?session_id=s_of_the_test"
    try:
        with connect(address, additional_headers=headers):
            return True
    except InvalidStatus:
        return False


def test_pages_of_the_web_cannot_have_a_browser_ask(url: str) -> None:
    own, foreign = url, "http://attacker.example"
    assert get(f"{url}/metrics", Host="attacker.example")[0] == 400
    assert get(f"{url}/metrics", Origin=own)[0] == 200
    assert get(f"{url}/metrics", Origin=foreign)[0] == 403
    assert get(f"{url}/nothing")[0] == 404
    assert [connects(url, Origin=origin) for origin in (own, foreign)] == [True, False]


def test_pages_are_for_looking_only(url: str) -> None:
    status, page = get(f"{url}/")
    assert (status, "operations" in page) == (200, True)
    assert "import marimo" not in page
    for path in ("kernel/run", "kernel/save", "files/list_files", "usage"):
        assert get(f"{url}/operations/api/{path}")[0] in (401, 403, 404, 405), path


def test_who_is_not_on_this_machine_needs_a_token(home: Home) -> None:
    refused = home.cli("serve", "--host", "0.0.0.0", "--port", "0")
    assert refused.returncode == 2
    assert "AUDIO_ASSETS_TOKEN" in refused.stdout
    with serving(home, "--host", "0.0.0.0", AUDIO_ASSETS_TOKEN=TOKEN) as url:
        url = url.replace("0.0.0.0", "127.0.0.1")
        assert get(f"{url}/livez")[0] == 401
        assert get(f"{url}/livez", Authorization="Bearer another")[0] == 401
        header = {"Authorization": f"Bearer {TOKEN}"}
        assert get(f"{url}/livez", **header) == (200, "ok\n")
        assert (connects(url), connects(url, **header)) == (False, True)

        given, wrong = (f"{url}/?token={quote(token)}" for token in (TOKEN, "another"))
        assert get(wrong)[0] == 401
        with urllib.request.urlopen(given) as response:
            cookie = response.headers["Set-Cookie"]
        assert {"HttpOnly", "SameSite=strict"} < set(cookie.split("; "))
        assert TOKEN not in cookie
        with_cookie = {"Cookie": cookie.partition(";")[0]}
        assert get(f"{url}/livez", **with_cookie) == (200, "ok\n")
        assert connects(url, **with_cookie)


def test_a_port_that_is_taken_is_said_to_be(home: Home) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = home.cli("serve", "--port", str(port))
    assert (done.returncode, done.stdout.count("\n")) == (1, 1)
    assert f"127.0.0.1:{port}" in done.stdout


FULL = Finding("disks", Severity.BROKEN, "It is full", "0 MiB", "free space", subject="home")
BREAKER = Finding("breakers", Severity.DEGRADED, "It is open", "away", "wait", subject="b")
LOCKED = Finding("state", Severity.DEGRADED, "It is locked", "locked", "see who locks it")


def rounds(alerts: Alerts, *findings: Finding, number: int = ROUNDS) -> None:
    for _ in range(number):
        alerts.round(findings)


def test_an_incident_is_told_once_and_once_when_it_is_over(tmp_path: Path) -> None:
    log, script = tmp_path / "log", tmp_path / "tell me.sh"
    script.write_text(f"cat >> {log}; echo >> {log}")
    channel, path = command(f"sh '{script}'"), tmp_path / "incidents"

    def told() -> list[tuple[str, str]]:
        lines = log.read_text().splitlines() if log.exists() else []
        return [(alert["event"], alert["check"]) for alert in map(json.loads, lines)]

    alerts = Alerts(channel, path)
    rounds(alerts, FULL, number=ROUNDS - 1)
    rounds(alerts)
    assert told() == []  # it came and went
    rounds(alerts, FULL, number=3 * ROUNDS)
    assert told() == [("begun", "disks")]
    alerts = Alerts(channel, path)  # a restart
    rounds(alerts, FULL)
    rounds(alerts, number=ROUNDS - 1)
    rounds(alerts, FULL)
    assert told() == [("begun", "disks")]
    rounds(alerts, replace(FULL, severity=Severity.NOTE), number=3 * ROUNDS)
    assert told() == [("begun", "disks"), ("over", "disks")]


def test_an_incident_goes_on_while_nothing_is_known_of_it(tmp_path: Path) -> None:
    told: list[str] = []
    alerts = Alerts(lambda alert: told.append(f"{alert['check']} {alert['event']}"), tmp_path / "x")
    rounds(alerts, BREAKER)
    rounds(alerts, LOCKED)
    rounds(alerts, LOCKED, BREAKER)
    rounds(alerts)
    assert told == ["breakers begun", "state begun", "breakers over", "state over"]


def test_an_alert_that_is_not_delivered_is_told_again(tmp_path: Path) -> None:
    posted: list[dict[str, Any]] = []
    answers = iter([500, 200, 200])

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(status := next(answers))
            self.end_headers()
            if status == 200:
                posted.append(json.loads(body))

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        alerts = Alerts(webhook(f"http://127.0.0.1:{server.server_port}"), tmp_path / "incidents")
        rounds(alerts, FULL)
        assert posted == []
        rounds(alerts, FULL)
        rounds(alerts)
        server.shutdown()
    assert [alert["event"] for alert in posted] == ["begun", "over"]
    assert posted[0]["what"] == "It is full"
    rounds(Alerts(command("/no/such/command"), tmp_path / "none"), FULL)  # is logged


def test_serve_tells_of_what_it_finds(home: Home, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with serving(
        home, AUDIO_LIBRARY=str(tmp_path / "away"), AUDIO_ASSETS_ALERT_COMMAND=f"tee -a {log}"
    ):
        wait_until(lambda: log.exists() and log.read_text(), "an alert")
    assert json.loads(log.read_text())["check"] == "roots"
