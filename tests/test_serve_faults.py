"""A server among clients that are broken, hostile, slow, gone, or too many."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import struct
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest
import torch

from serve_cases import PATIENCE, Server, serving, tiny_service
from turbos.serve.entrance import LOG, MOST_BODIES
from turbos.serve.limits import ServeOptions

CHAT = "/v1/chat/completions"
ASK = [{"role": "user", "content": "gcd of 12 and 18?"}]
ENDLESS = {"messages": ASK, "max_tokens": 900, "stream": True, "ignore_eos": True, "temperature": 1.0}
SOON = 1.0
"""Seconds within which the slots of clients that are gone are free."""


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving() as running:
        yield running


def raw_request(server: Server, body: bytes, path: str = CHAT, **headers: str) -> bytes:
    host = server.url.removeprefix("http://")
    fields = {"Host": host, "Content-Type": "application/json", "Content-Length": str(len(body)), **headers}
    head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
    return f"POST {path} HTTP/1.1\r\n{head}\r\n".encode() + body


def connect(server: Server) -> socket.socket:
    host, port = server.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=PATIENCE)


def is_alive(server: Server) -> bool:
    reply = server.post(CHAT, {"messages": ASK, "max_tokens": 2})
    return reply.status_code == 200 and httpx.get(f"{server.url}/health").status_code == 200


def error_of(reply: httpx.Response) -> dict[str, Any]:
    """The error of a refusal in OpenAI's shape."""
    body = reply.json()
    assert set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}
    error: dict[str, Any] = body["error"]
    return error


# Bad requests


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"3",
        b'"text"',
        b"\xff\xfe\x00",
        b'{"messages": "\xc3\x28"}',
        b'{"messages": [{"role": "user", "content": "\xed\xa0\x80"}]}',
        b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"messages": [{"role": "user", "content": "x"}], "temperature": NaN}',
        b'{"messages": [{"role": "user", "content": "x"}], "temperature": 1e999}',
        b'{"messages": [{"role": "user", "content": "x"}], "seed": ' + b"9" * 5000 + b"}",
        b'{"messages": [{"role": "user", "content": "x"}], "model": "\\udfff"}',
        b'{"messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"messages": [{"role": "user", "content": "x"}], "tools": [{"type": "function", "function": {"name": "f", '
        + b'"parameters": {"a": '
        + b'{"a": ' * 500
        + b"1"
        + b"}" * 500
        + b"}}}]}",
        b'{"messages": [{"role": "user", "content": "x"}], "response_format": {"type": "json_schema", "json_schema": '
        + b'{"schema": {"$ref": "http://127.0.0.1/x"}}}}',
        b'{"messages": [{"role": "user", "content": "x"}], "stop": ["\\ud800"]}',
        b'{"messages": [{"role": "user", "content": 5}]}',
        b'{"messages": [{"role": "king", "content": "x"}]}',
        b'{"messages": [{"role": "user", "content": "x"}], "max_tokens": "many"}',
        b'{"messages": [{"role": "user", "content": "x"}], "stream": "yes"}',
        b'{"messages": [{"role": "user", "content": "x"}], "stream": 1}',
        b'{"messages": [{"role": "user", "content": "x"}], "n": true}',
        b'{"messages": [{"role": "user", "content": "x"}], "logit_bias": {"1": 1e9}}',
    ],
)
def test_a_broken_body_is_a_400_in_openais_shape(server: Server, content: bytes) -> None:
    for path in (CHAT, "/v1/completions"):
        reply = server.send(path, content)
        assert reply.status_code == (404 if b"udfff" in content and path == CHAT else 400), reply.text
        assert len(error_of(reply)["message"]) < 600
    assert is_alive(server)


def test_bodies_of_other_kinds_are_refused(server: Server) -> None:
    good = json.dumps({"messages": ASK, "max_tokens": 1}).encode()
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", ""):
        reply = server.send(CHAT, good, **{"Content-Type": kind})
        assert reply.status_code == 400, kind
        error_of(reply)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", CHAT, 405), ("DELETE", "/health", 405), ("GET", "/v1/nothing", 404), ("GET", "/v1/../../etc/passwd", 404)],
)
def test_other_ways_in_are_refused_in_the_same_shape(server: Server, method: str, path: str, status: int) -> None:
    reply = httpx.request(method, f"{server.url}{path}")
    assert reply.status_code == status
    error_of(reply)


def test_nonsense_instead_of_http_does_no_harm(server: Server) -> None:
    for content in (b"\x00" * 1000, b"GET\r\n\r\n", b"POST / HTTP/1.1\r\nContent-Length: -5\r\n\r\n", b"\x16\x03\x01"):
        with connect(server) as client:
            client.sendall(content)
            client.shutdown(socket.SHUT_WR)
            client.recv(1000)
    assert is_alive(server)


# Large bodies


def test_ten_megabytes_are_read_and_refused_for_their_tokens(server: Server) -> None:
    began = time.monotonic()
    reply = server.post(CHAT, {"messages": [{"role": "user", "content": "gcd 12 " * 1_500_000}], "max_tokens": 1})
    assert reply.status_code == 400 and error_of(reply)["code"] == "context_length_exceeded"
    assert time.monotonic() - began < PATIENCE and is_alive(server)


def test_others_are_answered_while_a_long_text_is_encoded(server: Server) -> None:
    body = {"messages": [{"role": "user", "content": "gcd 12 " * 1_500_000}], "max_tokens": 1}
    with ThreadPoolExecutor(1) as pool:
        long = pool.submit(server.post, CHAT, body)
        count = 0
        while not long.done():
            assert is_alive(server)
            count += 1
        assert count >= 2 and long.result().status_code == 400


@pytest.mark.parametrize("says_so", [True, False])
def test_a_body_beyond_the_limit_is_refused_before_it_is_read(says_so: bool) -> None:
    with serving(options=ServeOptions(max_body=10_000)) as server:

        def pieces() -> Iterator[bytes]:
            for _ in range(200):
                yield b" " * 100

        body: Any = b" " * 20_000 if says_so else pieces()
        reply = httpx.post(f"{server.url}{CHAT}", content=body, headers={"Content-Type": "application/json"})
        assert reply.status_code == 413 and error_of(reply)["code"] == "body_too_large"
        assert is_alive(server)


def test_more_bodies_than_memory_should_hold_are_sent_away() -> None:
    with serving(options=ServeOptions(max_body=20_000)) as server:
        held = [connect(server) for _ in range(MOST_BODIES)]
        try:
            for client in held:
                # All of the largest body but its end.
                client.sendall(raw_request(server, b" " * 20_000)[:-1])
            end = time.monotonic() + PATIENCE
            while (reply := server.send(CHAT, b" " * 15_000)).status_code != 429:
                assert time.monotonic() < end and reply.status_code == 400
            assert reply.headers["Retry-After"] == "1" and error_of(reply)["type"] == "rate_limit_error"
        finally:
            for client in held:
                client.close()
        while server.send(CHAT, b" " * 15_000).status_code != 400:
            assert time.monotonic() < end
        assert is_alive(server)


# Keys and names


def test_a_key_is_wanted_where_there_are_keys() -> None:
    with serving(options=ServeOptions(api_keys=("right-key-1", "right-key-2"))) as server:
        for key in ("wrong-key-1", "right-key-", "right-key-11", "clé"):
            reply = server.post(CHAT, {}, headers={"Authorization": f"Bearer {key}".encode()})
            assert reply.status_code == 401 and error_of(reply)["code"] == "invalid_api_key"
        with pytest.raises(openai.AuthenticationError):
            server.client(api_key="wrong-key-1").models.list()
        assert [model.id for model in server.client(api_key="right-key-2").models.list()] == ["tiny"]
        assert httpx.get(f"{server.url}/metrics").status_code == 401
        assert httpx.get(f"{server.url}/health").status_code == 200


def test_a_name_that_a_browser_was_tricked_into_is_refused() -> None:
    with serving(options=ServeOptions(allowed_hosts=("127.0.0.1", "[::1]"))) as server:
        assert is_alive(server)
        for name in ("evil.example", "evil.example:80", "127.0.0.1.evil.example", "", "[::1].evil.example"):
            reply = httpx.get(f"{server.url}/health", headers={"Host": name})
            assert reply.status_code in (400, 403), name
        assert httpx.get(f"{server.url}/health", headers={"Host": "[::1]:80"}).status_code == 200


def test_a_page_of_another_site_changes_nothing(server: Server) -> None:
    body = {"messages": ASK, "max_tokens": 2}
    for origin in ("http://evil.example", "null", "http://127.0.0.1:1", f"{server.url}.evil.example"):
        reply = server.post(CHAT, body, headers={"Origin": origin})
        assert reply.status_code == 403 and error_of(reply)["code"] == "origin_not_allowed"
    assert server.post(CHAT, body, headers={"Origin": server.url}).status_code == 200
    # What only reads is answered without leave to read it: there are no headers of CORS.
    reply = httpx.get(f"{server.url}/v1/models", headers={"Origin": "http://evil.example"})
    assert reply.status_code == 200 and not any(name.startswith("access-control") for name in reply.headers)


# Too much at once


def test_more_than_may_be_open_is_sent_away_with_a_time() -> None:
    with serving(options=ServeOptions(max_open=2), max_running=1) as server:
        client = server.client()
        body: dict[str, Any] = {**ENDLESS, "model": "tiny"}
        body = {name: body[name] for name in ("messages", "max_tokens", "stream", "temperature", "model")}
        streams = [client.chat.completions.create(extra_body={"ignore_eos": True}, **body) for _ in range(2)]
        for stream in streams[:1]:
            next(iter(stream))
        with pytest.raises(openai.RateLimitError) as refused:
            client.chat.completions.create(**{**body, "stream": False})
        assert int(refused.value.response.headers["Retry-After"]) >= 1
        assert refused.value.body["code"] == "rate_limit_exceeded"  # type: ignore[index]
        for stream in streams:
            stream.close()
        assert server.wait_idle(PATIENCE)
        assert is_alive(server)


def test_a_client_that_asks_again_is_let_in() -> None:
    with serving(options=ServeOptions(max_open=1)) as server, ThreadPoolExecutor(1) as pool:
        busy = server.client().chat.completions.create(
            model="tiny", messages=ASK, max_tokens=200, stream=True, extra_body={"ignore_eos": True}
        )
        next(iter(busy))
        again = server.client(max_retries=8).chat.completions
        late = pool.submit(again.create, model="tiny", messages=ASK, max_tokens=2)
        assert len(list(busy)) > 2 and server.gate.refused >= 1
        assert late.result(PATIENCE).choices[0].finish_reason in ("stop", "length")


# Clients that are gone


def vanish(server: Server, place: int) -> None:
    """A client that asks and is gone: at once, after some bytes, or when it has the first token; some with a reset."""
    body = {**ENDLESS, "stream": place % 3 > 0, "seed": place}
    if place % 5 == 0:
        body["messages"] = [{"role": "user", "content": f"{place} " * 200}]
    with connect(server) as client:
        if place % 2:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.sendall(raw_request(server, json.dumps(body).encode()))
        if place % 3 == 2:
            client.recv(10)


@pytest.mark.parametrize("path", ["torch", "fused"])
def test_two_hundred_vanishing_clients_leave_no_slot_taken(path: str) -> None:
    with serving(path=path, snapshot_every=128) as server:
        slots = server.service.engine.metrics().free_slots
        assert is_alive(server)
        with ThreadPoolExecutor(16) as pool:
            list(pool.map(lambda place: vanish(server, place), range(200)))
        # Those that were gone before they were read are noticed when they are.
        assert server.wait_idle(SOON + 1.0)
        metrics = server.service.engine.metrics()
        assert metrics.free_slots == slots and server.gate.open == 0
        assert is_alive(server)


def test_a_slot_is_free_within_a_second_of_the_clients_end(server: Server) -> None:
    clients = [connect(server) for _ in range(40)]
    for client in clients:
        client.sendall(raw_request(server, json.dumps(ENDLESS).encode()))
    for client in clients:
        client.recv(10)
    assert server.service.engine.metrics().writing > 0
    for client in clients:
        client.close()
    assert server.wait_idle(SOON)


def test_a_client_that_waits_for_a_whole_answer_and_leaves_frees_its_slot(server: Server) -> None:
    with connect(server) as client:
        client.sendall(raw_request(server, json.dumps({**ENDLESS, "stream": False}).encode()))
        end = time.monotonic() + PATIENCE
        while not server.service.engine.metrics().writing:
            assert time.monotonic() < end
            time.sleep(0.005)
    assert server.wait_idle(SOON)


def test_a_client_that_leaves_a_stream_of_the_real_client_frees_its_slot(server: Server) -> None:
    stream = server.client().chat.completions.create(
        model="tiny", messages=ASK, stream=True, max_tokens=900, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    stream.close()
    assert server.wait_idle(SOON)


# Slow readers


def test_a_slow_reader_keeps_nobody_waiting_and_gets_everything(server: Server) -> None:
    body = {**ENDLESS, "max_tokens": 120, "seed": 1, "logprobs": True, "top_logprobs": 20}
    with connect(server) as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.sendall(raw_request(server, json.dumps(body).encode(), Connection="close"))
        client.recv(1)
        # The engine goes on at its own pace; others come and go.
        assert is_alive(server)
        assert server.wait_idle(PATIENCE)
        received = b""
        while piece := client.recv(2000):
            received += piece
    assert b"[DONE]" in received


def test_a_reader_that_takes_nothing_is_cut_off() -> None:
    with serving(options=ServeOptions(stall_seconds=0.3)) as server:
        body = {**ENDLESS, "n": 8, "logprobs": True, "top_logprobs": 20}
        with connect(server) as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.sendall(raw_request(server, json.dumps(body).encode()))
            end = time.monotonic() + PATIENCE
            while server.gate.open or not server.service.engine.metrics().written_tokens:
                assert time.monotonic() < end, "it was not cut off"
                time.sleep(0.02)
            assert server.wait_idle(SOON)
        assert is_alive(server)


# The end


def test_open_answers_end_before_a_server_does() -> None:
    texts: list[str] = []
    with serving(grace_seconds=30) as server:

        def read() -> None:
            body = {**ENDLESS, "max_tokens": 150}
            with httpx.stream("POST", f"{server.url}{CHAT}", json=body, timeout=PATIENCE) as reply:
                texts.extend(reply.iter_text())

        reader = threading.Thread(target=read)
        reader.start()
        while not texts:
            time.sleep(0.005)
    reader.join(PATIENCE)
    assert "[DONE]" in "".join(texts)


def test_a_model_that_fails_is_a_500_and_then_a_503() -> None:
    service = tiny_service()
    with serving(service) as server:
        assert is_alive(server)

        def broken(*arguments: object) -> object:
            raise torch.OutOfMemoryError("no memory for the gcd of 12 and 18")

        service.engine.model.forward = broken  # type: ignore[method-assign, assignment]
        reply = server.post(CHAT, {"messages": ASK, "max_tokens": 5})
        assert reply.status_code == 500 and "gcd" not in reply.text
        assert error_of(reply)["type"] == "server_error"
        assert httpx.get(f"{server.url}/health").status_code == 503
        again = server.post(CHAT, {"messages": ASK, "max_tokens": 5})
        assert again.status_code in (500, 503)
        error_of(again)


# The log


@pytest.mark.parametrize("log_prompts", [False, True])
def test_the_log_has_counts_and_no_words(log_prompts: bool, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "turbos.serve")
    LOG.addHandler(caplog.handler)
    propagates, LOG.propagate = LOG.propagate, False
    try:
        with serving(options=ServeOptions(log_prompts=log_prompts)) as server:
            secret = "Schnabeltier"
            reply = server.post(CHAT, {"messages": [{"role": "user", "content": secret}], "max_tokens": 3})
            server.post(CHAT, {"messages": [{"role": "user", "content": secret}], secret: secret})
            server.post(CHAT, {"messages": [{"role": secret, "content": secret}]})
            server.send(CHAT, f'{{"messages": "{secret}'.encode())
            assert reply.headers["x-request-id"].startswith("req-")
    finally:
        LOG.removeHandler(caplog.handler)
        LOG.propagate = propagates
    lines = [record.__dict__["fields"] for record in caplog.records if record.getMessage() == "request"]
    lines = [line for line in lines if line["path"] == CHAT]
    assert [line["status"] for line in lines] == [200, 400, 400, 400]
    first = lines[0]
    assert first["completion_tokens"] == 3 and first["prompt_tokens"] > 3 and first["finish"] == ["length"]
    assert first["path"] == CHAT and first["id"] == reply.headers["x-request-id"]
    assert (secret in json.dumps(lines)) is log_prompts
    assert secret not in caplog.text


def test_metrics_count_what_happened(server: Server) -> None:
    def value(name: str) -> float:
        lines = httpx.get(f"{server.url}/metrics").text.splitlines()
        return float(next(line for line in lines if line.startswith(f"{name} ")).split()[-1])

    before = value("turbos_engine_written_tokens_total")
    firsts = value("turbos_first_token_seconds_count")
    server.post(CHAT, {"messages": ASK, "max_tokens": 7, "ignore_eos": True})
    assert value("turbos_engine_written_tokens_total") == before + 7
    assert value("turbos_first_token_seconds_count") == firsts + 1


def test_many_at_once_are_all_answered(server: Server) -> None:
    async def all_of_them() -> list[int]:
        async with httpx.AsyncClient(timeout=PATIENCE, limits=httpx.Limits(max_connections=150)) as client:
            bodies = [{"messages": ASK, "max_tokens": 5, "seed": place, "temperature": 1.0} for place in range(150)]
            replies = await asyncio.gather(*(client.post(f"{server.url}{CHAT}", json=body) for body in bodies))
            return [reply.status_code for reply in replies]

    assert asyncio.run(all_of_them()) == [200] * 150
    assert server.wait_idle(SOON)


def test_a_body_that_does_not_come_is_given_up() -> None:
    with serving(options=ServeOptions(stall_seconds=0.3)) as server:
        with connect(server) as client:
            client.sendall(raw_request(server, b'{"messages": []}')[:-4])
            answer = b"".join(iter(lambda: client.recv(4096), b""))
        assert answer.startswith(b"HTTP/1.1 408 ") and b"nothing more of the body came" in answer
        assert is_alive(server)
