"""Health and metrics of the server over plain HTTP, for the operator's own monitoring."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from http import HTTPStatus
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server
from wsgiref.types import StartResponse, WSGIEnvironment

from fedtune.errors import ConfigError, ExtraError, Fault
from fedtune.link import uploads
from fedtune.link.pki.roster import Roster
from fedtune.link.server.addresses import HEALTH_HINT
from fedtune.link.server.dispatcher import Dispatcher

try:
    from prometheus_client import CollectorRegistry, Counter, Gauge, PlatformCollector, ProcessCollector
    from prometheus_client.exposition import make_wsgi_app
except ModuleNotFoundError:
    raise ExtraError(
        "expected the package prometheus-client, which writes the metrics of fedtune serve; got none; run pip install "
        '"fedtune[flower]"'
    ) from None


class Metrics:
    """Counters of the events, and gauges of the current state."""

    def __init__(self, *, names: bool = False) -> None:
        """Begin to count; names of clients are labels only if `names` is set."""
        # A registry of its own: the library's global one would add up the runs of one process.
        self.registry, self._names = CollectorRegistry(), names
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        # Off unless asked for: those who read the metrics would learn which sites take part.
        label = ["client"] if names else []

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(name, text, [*labels, *label], registry=self.registry)

        self._events = counter("fedtune_events", "What happened on the link", "kind")
        self._receipts = counter("fedtune_answers", "Receipts given, by verdict", "verdict")
        self._refused = counter("fedtune_refused", "Calls and replies refused", "code")
        self._dropped = counter("fedtune_dropped", "Orders that clients do not believe", "code")
        self._bytes = counter("fedtune_bytes", "Bytes of parts", "direction")
        self._round = Gauge("fedtune_round", "Round that is open, or the last one", registry=self.registry)

    def add_gauges(
        self, dispatcher: Dispatcher, *, roster: Callable[[], Roster], certificate_until: Callable[[], float]
    ) -> None:
        """Add gauges that are computed whenever the metrics are read."""

        def arriving_bytes() -> int:
            return sum(path.stat().st_size for path in dispatcher.folder.iterdir() if path.is_file())

        # The names of series are those of earlier releases: dashboards and alerts refer to them.
        gauges: Mapping[str, tuple[str, Callable[[], float]]] = {
            "fedtune_clients_connected": ("Clients that give signs of life", lambda: len(dispatcher.fleet())),
            "fedtune_orders_open": (
                "Tasks that clients work on",
                lambda: sum(client.open_tasks for client in dispatcher.status().values()),
            ),
            "fedtune_spool_bytes": ("Bytes of replies that are arriving", arriving_bytes),
            "fedtune_disk_free_bytes": ("Bytes free on the disk", lambda: uploads.free_bytes(dispatcher.folder)),
            "fedtune_roster_version": ("Version of the roster", lambda: roster().version),
            "fedtune_roster_until_seconds": ("When the roster ends, since 1970", lambda: roster().valid_until),
            "fedtune_certificate_until_seconds": ("When the certificate ends, since 1970", certificate_until),
        }
        for name, (text, value) in gauges.items():
            Gauge(name, text, registry=self.registry).set_function(value)

    def record(self, kind: str, **fields: int | str) -> None:
        """Count an event."""
        client = {"client": str(fields.get("client", ""))} if self._names else {}
        self._events.labels(kind=kind, **client).inc()
        size = int(fields.get("bytes", 0))
        match kind:
            case "receipt":
                self._receipts.labels(verdict=str(fields["verdict"]), **client).inc()
            case "dropped":
                self._dropped.labels(code=str(fields["code"]), **client).inc()
            case "refused":
                self._refused.labels(code=str(fields["code"]), **client).inc()
            case "answered":
                self._bytes.labels(direction="up", **client).inc(size)
            case "fetched":
                self._bytes.labels(direction="down", **client).inc(size)
            case "round":
                self._round.set(int(fields["round"]))


class HealthServer(ThreadingMixIn, WSGIServer):
    # A probe that hangs must not keep the server from ending.
    daemon_threads = True


class QuietRequestHandler(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing: a probe comes every few seconds."""


@contextmanager
def serve_health(address: str, metrics: Metrics, *, unready: Callable[[], str]) -> Iterator[int]:
    """Answer /healthz, /readyz and /metrics until the block ends; yields the port.

    Args:
        address: host and port; on anything but loopback other machines can read the numbers.
        metrics: shown at /metrics.
        unready: returns why the server cannot take updates now; empty if it can.

    Raises:
        ConfigError: if the address cannot be listened on.
    """
    metrics_app = make_wsgi_app(metrics.registry)

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        path = environ.get("PATH_INFO", "")
        if path == "/metrics":
            page: Iterable[bytes] = metrics_app(environ, start_response)
            return page
        # Only /readyz: an orchestrator restarts what is not healthy, and a restart does not mend a full disk.
        reason = unready() if path == "/readyz" else ""
        status = HTTPStatus.OK if path in ("/healthz", "/readyz") else HTTPStatus.NOT_FOUND
        status = HTTPStatus.SERVICE_UNAVAILABLE if reason else status
        start_response(f"{status.value} {status.phrase}", [("Content-Type", "text/plain; charset=utf-8")])
        return [f"{reason or status.phrase.lower()}\n".encode()]

    host, _, port = address.rpartition(":")
    try:
        server = make_server(host, int(port), app, server_class=HealthServer, handler_class=QuietRequestHandler)
    except (OSError, ValueError, OverflowError) as error:
        got = f"{address!r} ({error})"
        raise ConfigError(Fault("link.health", "an address that is free", got, HEALTH_HINT)) from None
    thread = threading.Thread(target=server.serve_forever, name="fedtune health", daemon=True)
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
