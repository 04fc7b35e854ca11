"""`POST /v1/completions`: texts, or tokens, that are continued as they are, without any layout of a chat.

Several prompts and `n` answers to each are choices in the order of the prompts. Thinking and tools mean nothing here:
tags that the model writes stay in the text. `echo` gives the prompt back in front; log-probabilities of the prompt are
not computed, so the two together are refused.
"""

from __future__ import annotations

import asyncio
import codecs
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import replace
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from turbos.serve.asking import Asked, check_model, sampling_params, usage_wanted
from turbos.serve.chat import LEAST_LOGPROB, Reply, answering, failure_of, finish_reason, usage_of, usage_so_far
from turbos.serve.errors import ApiError, json_response
from turbos.serve.limits import completion_tokens, most_prompt_tokens, outgrows, too_long
from turbos.serve.reading import Token, token_text
from turbos.serve.schema import MOST_ANSWERS, CompletionRequest
from turbos.serve.service import Event, Finished, Part, Usage
from turbos.serve.serving import Serving, serving_of
from turbos.serve.sse import DONE, EventStream, event, until_gone
from turbos.text.messages import surrogate
from turbos.text.stream import ContentDelta
from turbos.text.thinking import Thinking
from turbos.text.tokenizer import Tokenizer

DEFAULT_TOKENS = 16
"""OpenAI's, of a completion that names no number."""


async def complete(request: Request, body: CompletionRequest) -> Response:
    """The response to a request for completions."""
    serving = serving_of(request)
    asked = await _ask(serving, body)
    reply, tokenizer = Reply.new(serving.service.model_name, "cmpl"), serving.service.tokenizer
    show = _Show(reply, tokenizer, asked, body)
    if not body.stream:
        return json_response(await until_gone(request.receive, show.whole(request)))

    @asynccontextmanager
    async def begin() -> AsyncIterator[AsyncIterator[bytes]]:
        async with _answering(request, asked) as events:
            yield show.chunks(events)

    return EventStream(begin, serving.options.stall_seconds)


async def _ask(serving: Serving, body: CompletionRequest) -> list[Asked]:
    """Each prompt as the service takes it."""
    service = serving.service
    check_model(service, body.model)
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise ApiError(400, "best_of: only the same number as n can be honoured", param="best_of")
    if body.echo and body.logprobs is not None:
        raise ApiError(400, "echo: log-probabilities of a prompt are not computed here", param="echo")
    if body.stream_options is not None and not body.stream:
        raise ApiError(400, "stream_options: only for a stream", param="stream_options")
    texts = _prompts(body.prompt)
    count, most = len(texts) * (body.n or 1), min(MOST_ANSWERS, serving.options.max_open)
    if not 1 <= count <= most:
        raise ApiError(400, f"prompt: between 1 and {most} answers at once, not {count}", param="prompt")
    strings = [one for one in texts if isinstance(one, str)]
    if any(surrogate(text) is not None for text in strings):
        raise ApiError(400, "prompt: half a surrogate pair is no text", param="prompt")
    limit = most_prompt_tokens(service.engine.longest, serving.options)
    if await asyncio.to_thread(outgrows, service.tokenizer, strings, limit):
        raise too_long(None, limit, "prompt")
    prompts = [await asyncio.to_thread(service.text_prompt, text) for text in texts]
    found = []
    limits = replace(serving.options, default_completion_tokens=DEFAULT_TOKENS)
    for prompt in prompts:
        most = completion_tokens(body.max_tokens, len(prompt.ids), service.engine.longest, limits, "prompt")
        params = sampling_params(body, most, logprobs=body.logprobs, eos_ids=service.engine.eos_ids)
        found.append(Asked(prompt, params, Thinking()))
    return found


def _prompts(prompt: str | list[str] | list[int] | list[list[int]]) -> Sequence[str | Sequence[int]]:
    if isinstance(prompt, str):
        return [prompt]
    if prompt and isinstance(prompt[0], int):
        return [[id for id in prompt if isinstance(id, int)]]
    return [one for one in prompt if not isinstance(one, int)]


@asynccontextmanager
async def _answering(request: Request, asked: Sequence[Asked]) -> AsyncIterator[AsyncIterator[tuple[int, Event]]]:
    """Events of all prompts, each with its prompt's place, as they come."""
    async with AsyncExitStack() as stack:
        streams = [await stack.enter_async_context(answering(request, one)) for one in asked]
        merged = await stack.enter_async_context(aclosing(_merged(streams)))
        yield merged


async def _merged(streams: Sequence[AsyncIterator[Event]]) -> AsyncGenerator[tuple[int, Event], None]:
    """Events of several streams in the order in which they come; all are begun at once."""
    places = {asyncio.ensure_future(anext(stream)): place for place, stream in enumerate(streams)}
    try:
        while places:
            done, _ = await asyncio.wait(places, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                place = places.pop(task)
                if isinstance(task.exception(), StopAsyncIteration):
                    continue
                yield place, task.result()
                places[asyncio.ensure_future(anext(streams[place]))] = place
    finally:
        for task in places:
            task.cancel()
        if places:
            await asyncio.wait(places)


class _Show:
    """The JSON of one request."""

    def __init__(self, reply: Reply, tokenizer: Tokenizer, asked: Sequence[Asked], body: CompletionRequest) -> None:
        self._reply, self._tokenizer, self._asked = reply, tokenizer, asked
        self._n = body.n or 1
        self._logprobs = body.logprobs is not None
        self._usage, self._running = usage_wanted(body.stream_options)
        echoes = [tokenizer.decode(one.prompt.ids) if body.echo else "" for one in asked]
        self._echo: Callable[[int], str] = lambda index: echoes[index // self._n]
        self._places = [_Places(tokenizer) for _ in range(len(asked) * self._n)]

    async def whole(self, request: Request) -> dict[str, Any]:
        """The reply when all answers are there."""
        count = len(self._asked) * self._n
        tokens: list[list[Token]] = [[] for _ in range(count)]
        finished: dict[int, Finished] = {}
        async with _answering(request, self._asked) as events:
            async for place, one in events:
                index = place * self._n + one.index
                if isinstance(one, Part):
                    tokens[index] += one.tokens
                    continue
                if (failure := failure_of(one)) is not None:
                    raise failure
                finished[index] = one
        choices = [
            self._choice(index, self._echo(index) + finished[index].message.content, tokens[index], finished[index])
            for index in range(count)
        ]
        return self._reply.body("text_completion", choices, usage=self._total([*finished.items()]))

    async def chunks(self, events: AsyncIterator[tuple[int, Event]]) -> AsyncIterator[bytes]:
        """The events of a stream."""
        more: dict[str, Any] = {"usage": None} if self._usage else {}
        finished: list[tuple[int, Finished]] = []
        written: dict[int, int] = {}
        num_prompt = sum(len(one.prompt.ids) for one in self._asked)
        for index in range(len(self._asked) * self._n):
            if self._echo(index):
                yield event(self._reply.body("text_completion", [self._choice(index, self._echo(index))], **more))
        async for place, one in events:
            index = place * self._n + one.index
            written[index] = one.written if isinstance(one, Part) else one.usage.completion
            if self._running:
                more["usage"] = usage_so_far(num_prompt, written.values())
            if isinstance(one, Part):
                text = one.delta.text if isinstance(one.delta, ContentDelta) else ""
                yield event(self._reply.body("text_completion", [self._choice(index, text, one.tokens)], **more))
                continue
            if (failure := failure_of(one)) is not None:
                yield event(failure.body)
                return
            finished.append((index, one))
            yield event(self._reply.body("text_completion", [self._choice(index, "", (), one)], **more))
        if self._usage:
            yield event(self._reply.body("text_completion", [], usage=self._total(finished)))
        yield DONE

    def _choice(
        self, index: int, text: str, tokens: Sequence[Token] = (), finished: Finished | None = None
    ) -> dict[str, Any]:
        return {
            "index": index,
            "text": text,
            "logprobs": _logprobs(self._tokenizer, tokens, self._places[index]) if self._logprobs and tokens else None,
            "finish_reason": None if finished is None else finish_reason(finished),
        }

    def _total(self, finished: Sequence[tuple[int, Finished]]) -> dict[str, Any]:
        """The usage of all prompts together."""
        sums = Usage(0, 0, 0, 0)
        for place in range(len(self._asked)):
            its = usage_of([one.usage for index, one in finished if index // self._n == place])
            sums = Usage(
                sums.prompt + its["prompt_tokens"],
                sums.cached + its["prompt_tokens_details"]["cached_tokens"],
                sums.completion + its["completion_tokens"],
                sums.reasoning,
            )
        return usage_of([sums])


class _Places:
    """Where in an answer's text its tokens begin, in characters; a chunk of a stream goes on from the one before."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._length = 0

    def of(self, token: Token) -> int:
        """The next token's place: that of the character which holds its first byte."""
        content = self._tokenizer.token_bytes(token.id)
        self._length += len(self._decoder.decode(content[:1]))
        # The first byte ended a character, or it is held: alone where it begins one.
        place = self._length - (not self._decoder.getstate()[0])
        self._length += len(self._decoder.decode(content[1:]))
        return place


def _logprobs(tokenizer: Tokenizer, tokens: Sequence[Token], places: _Places) -> dict[str, Any]:
    """The older interface's four lists."""
    texts = [token_text(tokenizer, token.id) for token in tokens]
    tops = [{token_text(tokenizer, id): max(logprob, LEAST_LOGPROB) for id, logprob in token.top} for token in tokens]
    return {
        "tokens": texts,
        "token_logprobs": [max(token.logprob, LEAST_LOGPROB) for token in tokens],
        "top_logprobs": tops,
        "text_offset": [places.of(token) for token in tokens],
    }
