"""GET /metrics: what Prometheus collects of the API, the line and the jobs."""

import logging
import time
from collections.abc import Iterator

from flask import Blueprint, Flask, Response, g, request
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram
from prometheus_client import generate_latest as exposition
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from defect_detection import PipelineError
from defect_detection.service.backend import Backend

log = logging.getLogger("api")

METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
STATES = ("running", "succeeded", "failed", "cancelled")
BUCKETS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)  # seconds


def attach(app: Flask, backend: Backend) -> None:
    """Count the calls of an application, and give it the call /metrics."""
    registry = CollectorRegistry()
    calls = Counter("http_requests", "Calls", ["method", "rule", "status"], registry=registry)
    seconds = Histogram(
        "http_request_seconds",
        "Time to answer a call",
        ["rule"],
        registry=registry,
        buckets=BUCKETS,
    )
    registry.register(_Line(backend))

    @app.before_request
    def begin() -> None:
        g.began = time.perf_counter()

    @app.after_request
    def end(answer: Response) -> Response:
        rule = request.url_rule.rule if request.url_rule else "unknown"  # never a caller's text
        method = request.method if request.method in METHODS else "other"
        calls.labels(method, rule, answer.status_code).inc()
        if "began" in g:
            seconds.labels(rule).observe(time.perf_counter() - g.began)
        return answer

    pages = Blueprint("monitoring", __name__)

    @pages.get("/metrics")
    def metrics() -> Response:
        return Response(exposition(registry), content_type=CONTENT_TYPE_LATEST)

    app.register_blueprint(pages)


class _Line(Collector):
    """Reads what other processes know as well, at each collection."""

    def __init__(self, backend: Backend):
        self._backend = backend

    def collect(self) -> Iterator[Metric]:
        yield CounterMetricFamily(
            "verdicts_unlogged", "Verdicts that are not in the log", self._backend.log.unlogged
        )
        for part in (self._verdicts, self._labels, self._model_and_job):
            try:
                yield from list(part())
            except PipelineError as error:  # the others are still of use
                log.warning("/metrics: %s", error)

    def _verdicts(self) -> Iterator[Metric]:
        verdicts = CounterMetricFamily("verdicts", "Verdicts", labels=["source", "verdict"])
        for source, verdict, count in self._backend.verdicts.totals():
            verdicts.add_metric([source, verdict], count)
        yield verdicts
        backlog = GaugeMetricFamily("review_backlog", "Images that wait", labels=["reason"])
        for reason, count in self._backend.verdicts.backlog().items():
            backlog.add_metric([reason], count)
        yield backlog

    def _labels(self) -> Iterator[Metric]:
        overrides = CounterMetricFamily(
            "overrides", "Labels that contradict the verdict", labels=["verdict", "label"]
        )
        for (verdict, label), count in self._backend.inbox.overrides().items():
            overrides.add_metric([verdict, label], count)
        yield overrides

    def _model_and_job(self) -> Iterator[Metric]:
        model = self._backend.serving.model
        served = GaugeMetricFamily("model_info", "The model that judges", labels=["model"])
        if model is not None:
            served.add_metric([model.name], 1)
        yield served
        running = self._backend.jobs.running()
        newest = running or next(iter(self._backend.jobs.all(1)), None)
        state = GaugeMetricFamily("job_state", "1 for the newest job's state", labels=["state"])
        for name in STATES:
            state.add_metric([name], int(newest is not None and newest.state == name))
        yield state
