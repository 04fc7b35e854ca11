"""What routes work with: the service, the options, the counters; kept in the application's state.

@router.get("/v1/something")
async def something(request: Request) -> Response:
    return json_response(serving_of(request).service.model_name)
"""

from __future__ import annotations

from dataclasses import dataclass

from starlette.requests import Request

from turbos.serve.limits import Gate, ServeOptions
from turbos.serve.metrics import ServerMetrics
from turbos.serve.service import Service


@dataclass(frozen=True)
class Serving:
    """The parts of one running server; `began` is a Unix time."""

    service: Service
    options: ServeOptions
    gate: Gate
    metrics: ServerMetrics
    began: int


def serving_of(request: Request) -> Serving:
    """What the application of a request works with."""
    serving: Serving = request.app.state.serving
    return serving
