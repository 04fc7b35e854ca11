"""What requests hold, as OpenAI's clients write them: pydantic at the edge, and from there into the engine's records.

Types are strict (no "1" for 1) and unknown options are refused by name. Fields that mean nothing to a server of one
model (`user`, `metadata`, ...) are read and dropped; fields of which one value alone can be honoured take that one.
How a conversation becomes tokens is `chat.py`'s and `service.py`'s matter.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, model_validator

MOST_ANSWERS = 64
MOST_LOGPROBS = 20
MOST_STOPS = 16
MOST_MESSAGES = 20_000
MOST_TOOLS = 128
LONGEST_STOP = 1000
MOST_ENTRIES = 1024
MOST_FIELDS = 100
"""Of one object: more than any here has. Each unknown field would be a complaint of its own, and a body holds millions;
for the same reason lists are read to their first mistake only."""

Stop = Annotated[str, StringConstraints(min_length=1, max_length=LONGEST_STOP)]
ToolName = Annotated[str, StringConstraints(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
TokenId = Annotated[int, Field(ge=0, lt=1 << 31)]
TokenIds = Annotated[list[TokenId], Field(fail_fast=True)]
ManyTokenIds = Annotated[list[TokenIds], Field(fail_fast=True)]
Texts = Annotated[list[str], Field(fail_fast=True)]


class Strict(BaseModel):
    """Types as written, nothing unknown."""

    model_config = ConfigDict(strict=True, extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _few(cls, fields: object) -> object:
        if isinstance(fields, dict) and len(fields) > MOST_FIELDS:
            raise ValueError(f"an object of {len(fields)} fields, of which there are at most {MOST_FIELDS}")
        return fields


def _few_entries(entries: object) -> object:
    if isinstance(entries, dict) and len(entries) > MOST_ENTRIES:
        raise ValueError(f"{len(entries)} entries, of which there may be {MOST_ENTRIES}")
    return entries


class _Open(BaseModel):
    """For what clients send back as they got it: unknown fields are dropped."""

    model_config = ConfigDict(strict=True, extra="ignore")


class SamplingFields(Strict):
    """How tokens are chosen, in chats and texts alike."""

    temperature: float | None = Field(None, ge=0, le=1e6, description="0 takes the likeliest token; default 1")
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=-1, description="0 or -1: all tokens")
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, ge=1e-3, le=1e3)
    presence_penalty: float | None = Field(None, ge=-1e3, le=1e3)
    frequency_penalty: float | None = Field(None, ge=-1e3, le=1e3)
    logit_bias: Annotated[dict[str, float] | None, BeforeValidator(_few_entries)] = Field(
        None, description="token id to nats", max_length=MOST_ENTRIES
    )
    seed: int | None = Field(None, ge=-(2**63), lt=2**63 - MOST_ANSWERS)
    n: int | None = Field(None, ge=1, le=MOST_ANSWERS)
    stop: Stop | Annotated[list[Stop], Field(max_length=MOST_STOPS, fail_fast=True)] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=256, fail_fast=True)] | None = None
    ignore_eos: bool | None = None
    user: str | None = None
    metadata: Annotated[dict[str, str] | None, BeforeValidator(_few_entries)] = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    store: Literal[False] | None = None
    service_tier: Literal["auto", "default"] | None = None


class StreamOptions(Strict):
    """What a stream holds besides the answer; `include_obfuscation` can only be off."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = Field(None, description="with include_usage: the count so far, in each chunk")
    include_obfuscation: Literal[False] | None = None


class TextPart(Strict):
    """A part of a message's content: only texts are understood."""

    type: Literal["text", "input_text", "output_text"]
    text: str


class FunctionCall(_Open):
    """A call that an assistant's message holds."""

    name: ToolName
    arguments: str


class SentCall(_Open):
    """A call with the id that its result names."""

    id: str = Field(max_length=256)
    type: Literal["function"] = "function"
    function: FunctionCall


class ChatMessage(_Open):
    """A message; which fields a role may have is checked where it becomes a turn."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[TextPart], Field(fail_fast=True)] | None = None
    reasoning: str | None = Field(None, description="of an assistant's turn, where the client sends it back")
    reasoning_content: str | None = None
    tool_calls: Annotated[list[SentCall], Field(max_length=256, fail_fast=True)] | None = None
    tool_call_id: str | None = Field(None, max_length=256)


class FunctionDefinition(Strict):
    """A tool's name, what it is for, and the JSON schema of its arguments."""

    name: ToolName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ToolDefinition(Strict):
    """A tool that may be called."""

    type: Literal["function"]
    function: FunctionDefinition


class NamedFunction(Strict):
    """The name of a tool."""

    name: ToolName


class NamedTool(Strict):
    """A choice of one tool."""

    type: Literal["function"]
    function: NamedFunction


class TextFormat(Strict):
    """Any text."""

    type: Literal["text"]


class ObjectFormat(Strict):
    """A JSON object."""

    type: Literal["json_object"]


class NamedSchema(Strict):
    """A JSON schema; the answer always keeps to it, so `strict` changes nothing."""

    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class SchemaFormat(Strict):
    """JSON after a schema."""

    type: Literal["json_schema"]
    json_schema: NamedSchema


class TemplateFields(Strict):
    """What other servers hand to their chat templates."""

    enable_thinking: bool | None = None
    thinking: bool | str | None = None
    reasoning_effort: str | None = None
    thinking_budget: int | None = Field(None, ge=0)


class Reasoning(Strict):
    """OpenAI's other spelling of the effort."""

    effort: str | None = None


class ThinkingFields(Strict):
    """Who decides on thinking, in all the spellings that are about; docs/chat.md has their order."""

    thinking: bool | str | None = Field(None, description="auto, on, off, budget N; or true and false")
    enable_thinking: bool | None = None
    reasoning_effort: str | None = Field(None, description="none, minimal, low, medium, high, xhigh, max")
    reasoning: Reasoning | None = None
    thinking_budget: int | None = Field(None, ge=0, description="the most tokens of thinking")
    thinking_token_budget: int | None = Field(None, ge=0)
    chat_template_kwargs: TemplateFields | None = None


class ChatOptions(SamplingFields, ThinkingFields):
    """All of a chat request but the conversation."""

    model: str | None = None
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)
    tools: Annotated[list[ToolDefinition], Field(max_length=MOST_TOOLS, fail_fast=True)] | None = None
    tool_choice: Literal["auto", "none", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    response_format: Annotated[TextFormat | ObjectFormat | SchemaFormat, Field(discriminator="type")] | None = None
    modalities: Annotated[list[Literal["text"]], Field(fail_fast=True)] | None = None
    verbosity: Literal["medium"] | None = None


class ChatRequest(ChatOptions):
    """`POST /v1/chat/completions`."""

    messages: list[ChatMessage] = Field(min_length=1, max_length=MOST_MESSAGES, fail_fast=True)


class CompletionRequest(SamplingFields):
    """`POST /v1/completions`: texts, or their tokens, to go on with."""

    model: str | None = None
    prompt: str | Texts | TokenIds | ManyTokenIds = Field(max_length=1 << 25)
    max_tokens: int | None = Field(None, ge=1)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)
    echo: bool | None = None
    best_of: int | None = Field(None, ge=1, description="the same as n, or absent")
    suffix: Literal[""] | None = None


class ErrorDetail(Strict):
    """What went wrong; `param` is the option, where it is one's fault."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(Strict):
    """OpenAI's shape of every refusal."""

    error: ErrorDetail
