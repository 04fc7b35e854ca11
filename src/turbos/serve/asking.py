"""What a chat request asks of the engine: its options read into one record, or refused by name.

Here options meet: thinking in all its spellings, tools and who decides on calls, formats, how long the answer may be.
Sessions ask in the same way; only where the turns come from differs.

    asked = await ask(service, options, serve_options, turns)
    async for event in service.answer(asked.prompt, asked.params, most_calls=asked.most_calls): ...
"""

from __future__ import annotations

import asyncio
import json
import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from turbos.engine.sampling_params import Grammar, SamplingParams
from turbos.serve.calls import CallableTool, call_grammar, callable_of
from turbos.serve.conversation import tools_of
from turbos.serve.errors import ApiError
from turbos.serve.limits import ServeOptions, completion_tokens, most_prompt_tokens, outgrows, too_long
from turbos.serve.schema import (
    ChatOptions,
    NamedTool,
    ObjectFormat,
    SamplingFields,
    SchemaFormat,
    StreamOptions,
    TemplateFields,
    ThinkingFields,
)
from turbos.serve.service import Prompt, Service
from turbos.text.messages import Message
from turbos.text.parse import chat_tokens
from turbos.text.thinking import Thinking, requested_thinking

T = TypeVar("T")

OBJECT = {"type": "object"}


@dataclass(frozen=True)
class Asked:
    """A request as the service takes it, and what its answer is to show."""

    prompt: Prompt
    params: SamplingParams
    thinking: Thinking
    most_calls: int | None = None
    logprobs: bool = False
    include_usage: bool = False
    running_usage: bool = False


@dataclass(frozen=True)
class _Calls:
    """How tools may be called: the grammar that says so, tokens that may not come, calls after which all is said."""

    grammar: Grammar | None = None
    banned: tuple[int, ...] = ()
    most: int | None = None


async def ask(service: Service, options: ChatOptions, limits: ServeOptions, turns: Sequence[Message]) -> Asked:
    """Read a request for the next of some turns. ApiError or UserError for what cannot be honoured."""
    check_model(service, options.model)
    if options.top_logprobs and not options.logprobs:
        raise ApiError(400, "top_logprobs: needs logprobs true", param="top_logprobs")
    if options.stream_options is not None and not options.stream:
        raise ApiError(400, "stream_options: only for a stream", param="stream_options")
    tools = tools_of(options.tools or ())
    thinking, budget = thinking_of(options, turns, service.speaks_chat)
    calls = _calls(service, options)
    # Encoding a long text takes a while, and others' answers want to be sent.
    limit = most_prompt_tokens(service.engine.longest, limits)
    texts = [turn.content for turn in turns] + [tool.definition for tool in tools]
    texts += [call.text for turn in turns for call in turn.tool_calls]
    texts += [turn.thinking for turn in turns if turn.thinking and service.speaks_chat]
    if await asyncio.to_thread(outgrows, service.tokenizer, texts, limit):
        raise too_long(None, limit, "messages")
    prompt = await asyncio.to_thread(service.prompt, turns, tools, thinking)
    most = completion_tokens(_max_tokens(options), len(prompt.ids), service.engine.longest, limits)
    params = sampling_params(
        options,
        most,
        logprobs=(options.top_logprobs or 0) if options.logprobs else None,
        grammar=calls.grammar or _format(options),
        budget=budget,
        banned=calls.banned,
        eos_ids=service.engine.eos_ids,
    )
    usage, running = usage_wanted(options.stream_options)
    return Asked(prompt, params, thinking, calls.most, bool(options.logprobs), usage, running)


def usage_wanted(options: StreamOptions | None) -> tuple[bool, bool]:
    """Whether a stream ends with its usage, and whether each chunk counts so far. ApiError for the latter alone."""
    if options is None:
        return False, False
    if options.continuous_usage_stats and not options.include_usage:
        what = "stream_options.continuous_usage_stats: needs include_usage true"
        raise ApiError(400, what, param="stream_options.continuous_usage_stats")
    return bool(options.include_usage), bool(options.continuous_usage_stats)


def check_model(service: Service, model: str | None) -> None:
    """ApiError 404 for a model that is not served here."""
    if model is not None and model != service.model_name:
        what = f"model {model[:80]!r} is not served here; this server has {service.model_name!r}"
        raise ApiError(404, what, param="model", code="model_not_found")


def sampling_params(
    fields: SamplingFields,
    max_new_tokens: int,
    *,
    logprobs: int | None = None,
    grammar: Grammar | None = None,
    budget: int | None = None,
    banned: Sequence[int] = (),
    eos_ids: frozenset[int] = frozenset(),
) -> SamplingParams:
    """The engine's record of a request's sampling. A request without a seed draws one."""
    stop = [fields.stop] if isinstance(fields.stop, str) else fields.stop or []
    ends = frozenset() if fields.ignore_eos else eos_ids
    return SamplingParams(
        max_new_tokens=max_new_tokens,
        temperature=1.0 if fields.temperature is None else float(fields.temperature),
        top_p=1.0 if fields.top_p is None else float(fields.top_p),
        top_k=max(fields.top_k or 0, 0),
        min_p=float(fields.min_p or 0.0),
        repetition_penalty=1.0 if fields.repetition_penalty is None else float(fields.repetition_penalty),
        presence_penalty=float(fields.presence_penalty or 0.0),
        frequency_penalty=float(fields.frequency_penalty or 0.0),
        seed=secrets.randbits(62) if fields.seed is None else fields.seed,
        n=fields.n or 1,
        stop=tuple(stop),
        stop_ids=ends | frozenset(fields.stop_token_ids or ()),
        logprobs=logprobs,
        logit_bias=_biases(fields) | {id: -math.inf for id in banned},
        grammar=grammar,
        thinking_budget=budget,
    )


def _biases(fields: SamplingFields) -> dict[int, float]:
    found = {}
    for word, bias in (fields.logit_bias or {}).items():
        if not (word.isascii() and word.isdecimal() and len(word) < 10):
            raise ApiError(400, f"logit_bias: {word[:40]!r} is no token id", param="logit_bias")
        found[int(word)] = float(bias)
    return found


def thinking_of(fields: ThinkingFields, turns: Sequence[Message], speaks_chat: bool) -> tuple[Thinking, int | None]:
    """How the prompt leaves the thinking, and the most tokens of it. ApiError for spellings that contradict."""
    extra = fields.chat_template_kwargs or TemplateFields(thinking_budget=None)
    effort = fields.reasoning.effort if fields.reasoning is not None else None
    budget = _one("thinking_budget", fields.thinking_budget, fields.thinking_token_budget, extra.thinking_budget)
    word = _one("thinking", _word(fields.thinking), _word(extra.thinking))
    said = [turn.content for turn in turns if turn.role in ("system", "user")]
    mode = requested_thinking(
        *(said if speaks_chat else ()),
        thinking=word,
        enable_thinking=_one("enable_thinking", fields.enable_thinking, extra.enable_thinking),
        reasoning_effort=_one("reasoning_effort", fields.reasoning_effort, effort, extra.reasoning_effort),
    )
    if budget is None or mode.mode == "off":
        return mode, mode.budget
    if budget == 0:
        return Thinking("off"), None
    # A budget alone asks for thinking; with `auto` spelt out, the model decides whether to use it.
    explicit_auto = mode.mode == "auto" and word == "auto"
    return (mode if explicit_auto else Thinking("budget", budget)), budget


def _word(thinking: bool | str | None) -> str | None:
    return ("on" if thinking else "off") if isinstance(thinking, bool) else thinking


def _one(name: str, *values: T | None) -> T | None:
    """The value of an option that may be spelt in several places; ApiError where they differ."""
    given = [value for value in values if value is not None]
    if any(value != given[0] for value in given):
        raise ApiError(400, f"{name}: given twice, with different values", param=name)
    return given[0] if given else None


def _max_tokens(options: ChatOptions) -> int | None:
    return _one("max_tokens", options.max_completion_tokens, options.max_tokens)


def _format(options: ChatOptions) -> Grammar | None:
    """The grammar of `response_format`."""
    schema = _answer_schema(options)
    if schema is None:
        return None
    if isinstance(options.response_format, ObjectFormat):
        return Grammar("json")
    try:
        return Grammar("json_schema", json.dumps(schema))
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"response_format: no JSON ({error})", param="response_format") from error


def _answer_schema(options: ChatOptions) -> dict[str, object] | None:
    wanted = options.response_format
    if isinstance(wanted, SchemaFormat):
        return wanted.json_schema.schema_
    return dict(OBJECT) if isinstance(wanted, ObjectFormat) else None


def _calls(service: Service, options: ChatOptions) -> _Calls:
    """What tools and tool_choice ask for."""
    choice, definitions = options.tool_choice or "auto", options.tools or []
    if not definitions:
        if choice not in ("auto", "none"):
            raise ApiError(400, "tool_choice: there are no tools to choose from", param="tool_choice")
        return _Calls()
    if not service.speaks_chat:
        raise ApiError(400, "tools: this checkpoint's chat template is its own, and has none here", param="tools")
    tokens = chat_tokens(service.tokenizer)
    most = 1 if options.parallel_tool_calls is False or isinstance(choice, NamedTool) else None
    if choice == "none":
        return _Calls(None, (tokens.call,))
    offered = [callable_of(place, definition) for place, definition in enumerate(definitions)]
    if isinstance(choice, NamedTool):
        offered = _named(offered, choice.function.name)
    strict = any(definition.function.strict for definition in definitions)
    answer = _answer_schema(options)
    if choice == "auto" and not strict and answer is None:
        return _Calls(most=most)
    grammar = call_grammar(
        offered,
        tokens.call,
        tokens.call_end,
        most is None,
        text=choice == "auto",
        answer=answer if choice == "auto" else None,
    )
    return _Calls(grammar, most=most)


def _named(offered: Sequence[CallableTool], name: str) -> list[CallableTool]:
    found = [tool for tool in offered if tool.name == name]
    if not found:
        raise ApiError(400, f"tool_choice: none of the tools is named {name!r}", param="tool_choice")
    return found
