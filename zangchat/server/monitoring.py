"""Monitoring routes: health, the pool's numbers as JSON and for Prometheus."""

import time
from collections.abc import Iterator
from typing import Any

from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from zangchat.server.pool import Pool
from zangchat.server.service import CurrentService

router = APIRouter()


class PoolCollector(Collector):
    """Reads the pool's numbers at each scrape."""

    def __init__(self, pool: Pool) -> None:
        self.pool = pool

    def collect(self) -> Iterator[Metric]:
        pool = self.pool
        yield CounterMetricFamily("zangchat_requests", "Requests accepted.", pool.served)
        refused = "Requests refused because the queue was full."
        yield CounterMetricFamily("zangchat_refused", refused, pool.refused)
        load = "Continuations accepted and not yet delivered."
        yield GaugeMetricFamily("zangchat_in_hand", load, pool.load)
        tokens = CounterMetricFamily("zangchat_tokens", "Tokens generated.", labels=["gpu"])
        running = GaugeMetricFamily(
            "zangchat_rows_running", "Rows of the running batch in use.", labels=["gpu"]
        )
        waiting = GaugeMetricFamily(
            "zangchat_requests_waiting", "Continuations that wait for a row.", labels=["gpu"]
        )
        for worker in pool.workers:
            gpu = [str(worker.number)]
            tokens.add_metric(gpu, worker.tokens)
            running.add_metric(gpu, worker.rows)
            waiting.add_metric(gpu, worker.waiting)
        yield from (tokens, running, waiting)


@router.get("/health")
async def health(service: CurrentService) -> Response:
    healthy = service.pool.healthy
    return JSONResponse({"status": "ok" if healthy else "failed"}, 200 if healthy else 503)


@router.get("/metrics", response_class=PlainTextResponse)
async def metrics(service: CurrentService) -> Response:
    text = generate_latest(PoolCollector(service.pool))
    return Response(text, media_type=CONTENT_TYPE_LATEST)


@router.get("/stats")
async def stats(service: CurrentService) -> dict[str, Any]:
    pool = service.pool
    return {
        "model": service.settings.model_name,
        "uptime_seconds": round(time.time() - service.started),
        "in_hand": pool.load,
        "served": pool.served,
        "refused": pool.refused,
        "tokens": sum(worker.tokens for worker in pool.workers),
        "workers": [
            {"gpu": w.number, "running": w.rows, "waiting": w.waiting, "tokens": w.tokens}
            for w in pool.workers
        ],
    }
