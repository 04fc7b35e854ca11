"""Answers of a chat in OpenAI's JSON, whole or as a stream of chunks.

Thinking is sent as `reasoning` and as `reasoning_content`, which other servers and their clients call it; content and
calls as OpenAI does. A model that closes thinking which it never opened has sent its thinking as content: in a stream a
delta `{"recast": true}` says so. An answer that fails ends a stream with an `error` instead of a finish_reason.

    asked = await ask(serving.service, options, serving.options, turns)
    response = await respond(request, asked, stream=True)
"""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from turbos.serve.asking import Asked
from turbos.serve.entrance import entry_of
from turbos.serve.errors import ApiError, json_response
from turbos.serve.metrics import Watch
from turbos.serve.reading import Token, token_text
from turbos.serve.service import Event, Finished, Part, Usage
from turbos.serve.serving import serving_of
from turbos.serve.sse import DONE, EventStream, event, until_gone
from turbos.text.messages import Message, ToolCall
from turbos.text.stream import ContentDelta, ReasoningDelta, RecastDelta, ToolCallDelta
from turbos.text.stream import Delta as TurnDelta
from turbos.text.tokenizer import Tokenizer

LEAST_LOGPROB = -9999.0
"""What OpenAI writes for a token that cannot be; JSON has no minus infinity."""

OnFinish = Callable[[Finished], None]


@dataclass(frozen=True)
class Reply:
    """What all JSON of one request has in common."""

    id: str
    created: int
    model: str

    @classmethod
    def new(cls, model: str, prefix: str = "chatcmpl") -> Reply:
        """A reply with a name of its own."""
        return cls(f"{prefix}-{secrets.token_hex(12)}", int(time.time()), model)

    def body(self, kind: str, choices: Sequence[object], **more: object) -> dict[str, Any]:
        """The JSON of a reply or of a chunk of it."""
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "choices": list(choices),
            **more,
        }


async def respond(
    request: Request,
    asked: Asked,
    *,
    stream: bool,
    on_finish: OnFinish | None = None,
    extra: dict[str, Any] | None = None,
) -> Response:
    """The response to a chat request. `on_finish` hears of each answer; `extra` fields stand in the reply, too."""
    serving = serving_of(request)
    reply, tokenizer = Reply.new(serving.service.model_name), serving.service.tokenizer
    if not stream:
        finished = await until_gone(request.receive, _whole(request, asked, on_finish))
        return json_response({**_completion(reply, tokenizer, asked, finished), **(extra or {})})

    @asynccontextmanager
    async def begin() -> AsyncIterator[AsyncIterator[bytes]]:
        async with answering(request, asked, on_finish) as events:
            yield _chunks(reply, tokenizer, asked, events, extra or {})

    return EventStream(begin, serving.options.stall_seconds)


@asynccontextmanager
async def answering(
    request: Request, asked: Asked, on_finish: OnFinish | None = None
) -> AsyncIterator[AsyncIterator[Event]]:
    """The events of a request that is let in; ApiError or UserError, before the first, for one that cannot be."""
    serving = serving_of(request)
    with serving.gate.admit(asked.params.n):
        await serving.service.check(asked.prompt, asked.params)
        events = serving.service.answer(asked.prompt, asked.params, most_calls=asked.most_calls)
        async with aclosing(events), aclosing(_watched(request, events, on_finish)) as watched:
            yield watched


async def _watched(
    request: Request, events: AsyncIterator[Event], on_finish: OnFinish | None
) -> AsyncGenerator[Event, None]:
    """The same events, counted and told to who wants to know."""
    watch, entry = Watch(serving_of(request).metrics), entry_of(request)
    async for one in events:
        watch.see(one)
        if isinstance(one, Finished):
            entry.finished.append(one)
            if on_finish is not None:
                on_finish(one)
        yield one


async def _whole(request: Request, asked: Asked, on_finish: OnFinish | None) -> list[tuple[Finished, list[Token]]]:
    """All answers in their order, with the tokens of their content. ApiError where one failed."""
    tokens: dict[int, list[Token]] = {index: [] for index in range(asked.params.n)}
    found: dict[int, Finished] = {}
    async with answering(request, asked, on_finish) as events:
        async for one in events:
            if isinstance(one, Part):
                if isinstance(one.delta, RecastDelta):
                    tokens[one.index].clear()
                tokens[one.index] += one.tokens
                continue
            if (failure := failure_of(one)) is not None:
                raise failure
            found[one.index] = one
    return [(found[index], tokens[index]) for index in sorted(found)]


def failure_of(finished: Finished) -> ApiError | None:
    """The error that an answer ended in, if it did."""
    if finished.reason == "cancelled":
        return ApiError(503, "the server is stopping", code="stopping")
    if finished.reason != "error":
        return None
    if "logits" in finished.detail:
        return ApiError(500, finished.detail)
    return ApiError(400, f"the answer cannot go on: {finished.detail}", code="no_token_allowed")


def finish_reason(finished: Finished) -> str:
    """OpenAI's word for why an answer ended."""
    if finished.reason == "stop":
        return "tool_calls" if finished.message.tool_calls else "stop"
    return "length"


def usage_of(usages: Sequence[Usage]) -> dict[str, Any]:
    """OpenAI's count of all answers to one prompt; cached are the tokens that nobody had to read."""
    prompt = usages[0].prompt
    completion = sum(usage.completion for usage in usages)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": min(usage.cached for usage in usages)},
        "completion_tokens_details": {"reasoning_tokens": sum(usage.reasoning for usage in usages)},
    }


def usage_so_far(prompt: int, written: Iterable[int]) -> dict[str, int]:
    """The count of all answers to prompts of so many tokens in all, while they are written."""
    completion = sum(written)
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def logprobs_of(tokenizer: Tokenizer, tokens: Sequence[Token]) -> dict[str, Any]:
    """The content's tokens with their log-probabilities."""
    content = []
    for token in tokens:
        top = [_logprob(tokenizer, id, logprob) for id, logprob in token.top]
        content.append({**_logprob(tokenizer, token.id, token.logprob), "top_logprobs": top})
    return {"content": content, "refusal": None}


def _logprob(tokenizer: Tokenizer, id: int, logprob: float) -> dict[str, Any]:
    return {
        "token": token_text(tokenizer, id),
        "logprob": max(logprob, LEAST_LOGPROB),
        "bytes": list(tokenizer.token_bytes(id)),
    }


def _completion(
    reply: Reply, tokenizer: Tokenizer, asked: Asked, finished: Sequence[tuple[Finished, Sequence[Token]]]
) -> dict[str, Any]:
    choices = [
        {
            "index": one.index,
            "message": message_json(one.message),
            "logprobs": logprobs_of(tokenizer, tokens) if asked.logprobs else None,
            "finish_reason": finish_reason(one),
        }
        for one, tokens in finished
    ]
    return reply.body("chat.completion", choices, usage=usage_of([one.usage for one, _ in finished]))


def message_json(message: Message) -> dict[str, Any]:
    """An assistant's turn as OpenAI's JSON."""
    found: dict[str, Any] = {
        "role": "assistant",
        "content": message.content or (None if message.tool_calls else ""),
        "refusal": None,
    }
    if message.thinking is not None:
        found |= {"reasoning": message.thinking, "reasoning_content": message.thinking}
    if message.tool_calls:
        found["tool_calls"] = [call_json(call) for call in message.tool_calls]
    return found


def call_json(call: ToolCall) -> dict[str, Any]:
    """A call with an id by which its result can name it."""
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function}


async def _chunks(
    reply: Reply,
    tokenizer: Tokenizer,
    asked: Asked,
    events: AsyncIterator[Event],
    extra: dict[str, Any],
) -> AsyncIterator[bytes]:
    """The events of a stream."""
    usages: list[Usage] = []
    # With include_usage every chunk has the field, and only the last one's says something unless all should.
    written: dict[int, int] = {}
    more: dict[str, Any] = {**extra, **({"usage": None} if asked.include_usage else {})}

    def chunk(choices: Sequence[object], **fields: object) -> bytes:
        if asked.running_usage:
            more["usage"] = usage_so_far(len(asked.prompt.ids), written.values())
        return event(reply.body("chat.completion.chunk", choices, **{**more, **fields}))

    for index in range(asked.params.n):
        yield chunk([_choice(index, {"role": "assistant", "content": ""})])
    async for one in events:
        if isinstance(one, Part):
            written[one.index] = one.written
            delta = delta_json(one.delta)
            if delta or one.tokens:
                logprobs = logprobs_of(tokenizer, one.tokens) if asked.logprobs and one.tokens else None
                yield chunk([_choice(one.index, delta, logprobs)])
            continue
        if (failure := failure_of(one)) is not None:
            yield event(failure.body)
            return
        usages.append(one.usage)
        written[one.index] = one.usage.completion
        yield chunk([_choice(one.index, {}, None, finish_reason(one))])
    if asked.include_usage:
        yield chunk([], usage=usage_of(usages))
    yield DONE


def _choice(
    index: int, delta: dict[str, Any], logprobs: dict[str, Any] | None = None, finish: str | None = None
) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}


def delta_json(delta: TurnDelta) -> dict[str, Any]:
    """A part of an answer as a stream's delta; empty where it shows nothing."""
    if isinstance(delta, ReasoningDelta):
        return {"reasoning": delta.text, "reasoning_content": delta.text} if delta.text else {}
    if isinstance(delta, ContentDelta):
        return {"content": delta.text} if delta.text else {}
    if isinstance(delta, ToolCallDelta):
        return {"tool_calls": [{"index": delta.index, **call_json(delta.call)}]}
    return {"recast": True}
