"""Requests made from the server's own OpenAPI document, fitting or not: no 5xx, and every refusal in one shape."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from random import Random
from typing import Any

import httpx
import hypothesis
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings, strategies
from schemathesis import Case, GenerationMode

from serve_cases import Server, serving, tiny_service
from turbos.serve.assembly import assemble
from turbos.serve.limits import ServeOptions

FEW, MANY = 240, 5000
"""Cases of the fast and of the slow test."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The whole server, with answers that are short whatever is asked."""
    options = ServeOptions(
        max_completion_tokens=8, default_completion_tokens=4, sessions=tmp_path_factory.mktemp("sessions")
    )
    service = tiny_service()
    with serving(service, app=assemble(service, options)) as running:
        yield running


def check(case: Case, reply: Any) -> None:
    """ApiError's shape for what is refused; nothing is the server's fault, and 422 is nothing that it says."""
    assert reply.status_code < 500 and reply.status_code != 422, (case.as_curl_command(), reply.text)
    if reply.status_code >= 400:
        error = reply.json()["error"]
        assert set(error) == {"message", "type", "param", "code"} and error["message"], case.as_curl_command()


PLAIN = {
    "/v1/chat/completions": ("messages", [{"role": "user", "content": "gcd?"}]),
    "/v1/completions": ("prompt", "gcd"),
}
"""What is asked where a request's options are on trial: nearly all made conversations are refused for their words."""


def run_cases(server: Server, count: int, seed: int) -> Counter[tuple[str, int]]:
    """Send so many cases, an eighth of them all operations' and the rest completions'; how often each status came."""
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    operations = [found.ok() for found in schema.get_all_operations()]
    assert len(operations) >= 16
    statuses: Counter[tuple[str, int]] = Counter()
    each = max(2, count // (16 * len(operations)))
    for operation in operations:
        for mode in GenerationMode:
            try:
                send_cases(operation, mode, each, seed, statuses)
            except hypothesis.errors.Unsatisfiable:
                # An operation without parameters has no unfitting request.
                assert mode == GenerationMode.NEGATIVE
    rest = -(-(count - statuses.total()) // 6)
    for operation in operations:
        if operation.path in PLAIN:
            send_cases(operation, GenerationMode.NEGATIVE, rest, seed + 1, statuses)
            send_cases(operation, GenerationMode.POSITIVE, rest, seed + 1, statuses)
            send_cases(operation, GenerationMode.POSITIVE, rest, seed + 2, statuses, most_options=3)
    return statuses


def send_cases(
    operation: Any,
    mode: GenerationMode,
    count: int,
    seed: int,
    statuses: Counter[tuple[str, int]],
    most_options: int | None = None,
) -> None:
    """Send cases of one operation; `most_options`: a plain question with so many of the made options."""

    @hypothesis.seed(seed)
    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode), draw=strategies.randoms(use_true_random=False))
    def send(case: Case, draw: Random) -> None:
        if most_options is not None and isinstance(case.body, dict):
            name, plain = PLAIN[operation.path]
            offered = sorted(set(case.body) - {name, "model"})
            kept = draw.sample(offered, min(len(offered), draw.randint(0, most_options)))
            case.body = {name: plain, **{option: case.body[option] for option in kept}}
        reply = case.call()
        check(case, reply)
        statuses[operation.label, reply.status_code] += 1

    send()


def seen(statuses: Counter[tuple[str, int]], label: str) -> set[int]:
    return {status for name, status in statuses if name == label}


@pytest.mark.parametrize(("count", "seed"), [(FEW, 1), pytest.param(MANY, 2, marks=pytest.mark.slow)])
def test_no_request_is_the_servers_fault(server: Server, count: int, seed: int) -> None:
    statuses = run_cases(server, count, seed)
    assert statuses.total() >= count
    # Both kinds of cases came through: some are answered, some are refused.
    for label in ("POST /v1/chat/completions", "POST /v1/completions"):
        assert {200, 400} <= seen(statuses, label), statuses
    assert httpx.get(f"{server.url}/health").status_code == 200 and server.wait_idle(5.0)
    print(f"{statuses.total()} cases:", dict(Counter(status for _, status in statuses.elements())))
