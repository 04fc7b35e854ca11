"""The server's parts that need no server: reading, remembering, limits, conversations, grammars, metrics, errors."""

from __future__ import annotations

import doctest
import importlib
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from serve_cases import tiny_engine
from tiny import tiny_tokenizer
from turbos.common.errors import UserError
from turbos.engine.grammar import GrammarCompiler
from turbos.engine.sampling_params import Grammar
from turbos.serve.asking import thinking_of
from turbos.serve.calls import SPELLING, CallableTool, call_grammar, callable_of
from turbos.serve.conversation import tools_of, turns_of
from turbos.serve.errors import ApiError, of_user_error
from turbos.serve.limits import MOST_BY_CUTS, PIECE, Gate, Keys, ServeOptions, completion_tokens, outgrows, read_keys
from turbos.serve.metrics import ServerMetrics
from turbos.serve.reading import ChatReader, Read, TextReader, Token
from turbos.serve.schema import ChatMessage, ChatRequest, ThinkingFields, ToolDefinition
from turbos.serve.turns import ALIKE, TurnMemory
from turbos.text.chat import parse
from turbos.text.messages import ChatError, Message, ToolCall
from turbos.text.parse import chat_tokens
from turbos.text.stream import ContentDelta, ReasoningDelta, RecastDelta, ToolCallDelta

TOKENIZER = tiny_tokenizer()
TAGS = chat_tokens(TOKENIZER)
CALL = (TAGS.call, *TOKENIZER.encode('\n{"name": "add", "arguments": {"a": 1}}\n'), TAGS.call_end)


def tokens(ids: Sequence[int]) -> list[Token]:
    """Each with a log-probability of its own, so that none can stand for another."""
    return [Token(id, -float(place)) for place, id in enumerate(ids)]


def read_in_pieces(reader: ChatReader | TextReader, ids: Sequence[int], draw: random.Random) -> list[Read]:
    found: list[Read] = []
    whole = tokens(ids)
    while whole and not reader.stopped:
        count = draw.randint(1, 5)
        found += reader.feed(whole[:count])
        whole = whole[count:]
    return found + reader.finish()


def content_of(reads: Sequence[Read]) -> str:
    return "".join(read.delta.text for read in reads if isinstance(read.delta, ContentDelta))


def random_turn(draw: random.Random) -> list[int]:
    tags = [TAGS.think, TAGS.think_end, TAGS.call, TAGS.call_end, TAGS.roles["user"], TAGS.end]
    return [draw.choice(tags) if draw.random() < 0.15 else draw.randrange(40, 320) for _ in range(draw.randint(0, 30))]


# Reading


@pytest.mark.parametrize("seed", range(200))
def test_a_turn_read_in_pieces_is_what_the_parser_reads_from_the_whole(seed: int) -> None:
    draw = random.Random(seed)
    ids = random_turn(draw)
    reader = ChatReader(TOKENIZER, [TAGS.roles["assistant"]])
    reads = read_in_pieces(reader, ids, draw)
    assert reader.message() == parse(TOKENIZER, ids)
    recast = max((place for place, read in enumerate(reads) if isinstance(read.delta, RecastDelta)), default=-1)
    assert content_of(reads[recast + 1 :]) == reader.message().content


def test_tokens_of_content_are_those_of_its_text() -> None:
    ids = [TAGS.think, *TOKENIZER.encode("12-6=6"), TAGS.think_end, *TOKENIZER.encode("gcd é 6"), *CALL, TAGS.end]
    reader = ChatReader(TOKENIZER, [TAGS.roles["assistant"]])
    reads = read_in_pieces(reader, ids, random.Random(0))
    shown = [token for read in reads for token in read.tokens]
    assert b"".join(TOKENIZER.token_bytes(token.id) for token in shown).decode() == "gcd é 6"
    # Each with its own number: those of the places where the content stands.
    first = ids.index(TAGS.think_end) + 1
    assert [-token.logprob for token in shown] == list(range(first, first + len(TOKENIZER.encode("gcd é 6"))))


def test_thinking_tokens_are_counted_without_their_tags() -> None:
    thought = TOKENIZER.encode("18-12=6 12-6=6")
    reader = ChatReader(TOKENIZER, [TAGS.roles["assistant"], TAGS.think])
    reads = read_in_pieces(reader, [*thought, TAGS.think_end, *TOKENIZER.encode("6")], random.Random(1))
    assert reader.reasoning_tokens == len(thought)
    counts = [read.reasoning_tokens for read in reads if isinstance(read.delta, ReasoningDelta)]
    assert counts == sorted(counts) and counts[-1] == len(thought)


def test_thinking_that_was_never_opened_counts_when_it_is_closed() -> None:
    thought = TOKENIZER.encode("18-12=6")
    reader = ChatReader(TOKENIZER, [TAGS.roles["assistant"]])
    reads = read_in_pieces(reader, [*thought, TAGS.think_end, *TOKENIZER.encode("6")], random.Random(2))
    assert any(isinstance(read.delta, RecastDelta) for read in reads)
    assert (reader.reasoning_tokens, reader.message().thinking, reader.message().content) == (
        len(thought),
        "18-12=6",
        "6",
    )


@pytest.mark.parametrize("seed", range(20))
def test_a_stop_string_ends_content_and_nothing_of_it_is_shown(seed: int) -> None:
    draw = random.Random(seed)
    ids = [TAGS.think, *TOKENIZER.encode("12 and 34"), TAGS.think_end, *TOKENIZER.encode("add 12 and 34")]
    reader = ChatReader(TOKENIZER, [TAGS.roles["assistant"]], stop=("and",))
    reads = read_in_pieces(reader, ids, draw)
    assert reader.stopped and reader.cut
    assert (reader.message().thinking, reader.message().content) == ("12 and 34", "add 12 ")
    assert content_of(reads) == "add 12 "


def test_what_may_begin_a_stop_string_is_given_when_the_answer_ends() -> None:
    reader = ChatReader(TOKENIZER, [TAGS.roles["assistant"]], stop=("18?",))
    reads = read_in_pieces(reader, TOKENIZER.encode("12 and 18"), random.Random(0))
    assert not reader.stopped and content_of(reads) == reader.message().content == "12 and 18"


def test_an_answer_ends_after_as_many_calls_as_it_may_have() -> None:
    reader = ChatReader(TOKENIZER, [TAGS.roles["assistant"]], most_calls=1)
    reads = reader.feed(tokens([*CALL, *CALL]))
    assert reader.stopped and not reader.cut
    assert [read.delta for read in reads] == [ToolCallDelta(0, ToolCall("add", '{"a": 1}'))]
    assert reader.num_tokens == len(CALL) and reader.message().ids == CALL


@pytest.mark.parametrize("seed", range(50))
def test_a_text_read_in_pieces_is_the_decoded_whole(seed: int) -> None:
    draw = random.Random(seed)
    ids = [draw.randrange(13, 320) for _ in range(draw.randint(1, 30))]
    reader = TextReader(TOKENIZER, {TAGS.end})
    assert content_of(read_in_pieces(reader, [*ids, TAGS.end], draw)) == TOKENIZER.decode(ids)
    assert reader.message().ids == tuple(ids)


# Remembering


def test_a_turn_is_found_again_only_after_what_came_before_it() -> None:
    memory, asked = TurnMemory(), [Message("system", "be short"), Message("user", "2 plus 2?")]
    said = Message("assistant", "4", thinking="2+2", ids=(7, 8, 9))
    memory.remember(memory.recall(asked).key, said)
    sent = Message("assistant", "4")
    assert memory.recall([*asked, sent]).turns[-1] == said
    assert memory.recall([asked[1], sent]).turns[-1] == sent
    assert memory.recall([*asked, replace(sent, content="5")]).turns[-1].ids is None
    assert memory.recall([*asked, replace(sent, thinking="2+2")]).turns[-1] == said
    assert memory.recall([*asked, replace(sent, thinking="other")]).turns[-1].ids is None


def test_turns_of_one_text_are_kept_apart_by_their_thinking_and_the_first_one_stays() -> None:
    memory, asked = TurnMemory(), [Message("user", "2 plus 2?")]
    key = memory.recall(asked).key
    for number in range(ALIKE + 2):
        memory.remember(key, Message("assistant", "4", thinking=f"way {number}", ids=(number,)))
    assert memory.recall([*asked, Message("assistant", "4")]).turns[-1].ids == (0,)
    assert memory.recall([*asked, Message("assistant", "4", thinking="way 2")]).turns[-1].ids == (2,)


def test_thinking_that_a_stream_sent_as_content_is_known_by_what_it_showed() -> None:
    memory, asked = TurnMemory(), [Message("user", "2 plus 2?")]
    said = Message("assistant", "4", thinking="2+2=4", ids=(7, 8))
    memory.remember(memory.recall(asked).key, said, shown="2+2=44")
    assert memory.recall([*asked, Message("assistant", "2+2=44")]).turns[-1] == said


def test_memory_is_bounded_and_forgets_what_was_not_used() -> None:
    memory = TurnMemory(most_turns=10, most_tokens=10**6)
    questions = [[Message("user", f"question {number}")] for number in range(12)]
    for number, asked in enumerate(questions):
        memory.remember(memory.recall(asked).key, Message("assistant", "yes", ids=(number,)))
        memory.recall([*questions[0], Message("assistant", "yes")])  # the first one is in use
    found = [memory.recall([*asked, Message("assistant", "yes")]).turns[-1].ids for asked in questions]
    assert found == [(0,), None, None, *((number,) for number in range(3, 12))]


def test_memory_is_bounded_in_tokens() -> None:
    memory = TurnMemory(most_turns=100, most_tokens=10)
    keys = [memory.recall([Message("user", str(number))]).key for number in range(4)]
    for key in keys:
        memory.remember(key, Message("assistant", "yes", ids=(1, 2, 3, 4)))
    found = [memory.recall([Message("user", str(number)), Message("assistant", "yes")]) for number in range(4)]
    assert [one.turns[-1].ids is not None for one in found] == [False, False, True, True]


# Limits


def test_keys_are_compared_whole() -> None:
    keys = Keys(["first-key-1", "second-key-2"])
    assert keys.accept(b"Bearer second-key-2") and keys.accept(b"bearer first-key-1")
    for wrong in (b"", b"Bearer", b"Bearer first-key-", b"Bearer first-key-11", b"Basic first-key-1", b"first-key-1"):
        assert not keys.accept(wrong), wrong
    assert keys.wanted and not Keys([]).wanted


def test_a_file_of_keys(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("# of the team\nfirst-key-1\n\n second-key-2 \n")
    assert read_keys(path) == ("first-key-1", "second-key-2")
    path.write_text("# none\n")
    with pytest.raises(UserError, match="holds no key"):
        read_keys(path)
    with pytest.raises(UserError, match="cannot be read"):
        read_keys(tmp_path / "absent")
    with pytest.raises(UserError, match="8 printable"):
        ServeOptions(api_keys=("short",))


def test_the_gate_counts_answers_and_says_when_to_come_again() -> None:
    gate = Gate(most=3)
    with gate.admit(2):
        with pytest.raises(ApiError) as refused, gate.admit(2):
            pytest.fail("four answers are more than three")
        assert refused.value.status == 429 and int(refused.value.headers["Retry-After"]) >= 1
        with gate.admit(1):
            assert gate.open == 3
    with pytest.raises(ZeroDivisionError), gate.admit(3):
        raise ZeroDivisionError
    assert (gate.open, gate.refused) == (0, 1)
    with pytest.raises(ApiError) as never, gate.admit(4):
        pytest.fail("never possible")
    assert never.value.status == 400


@pytest.mark.parametrize(
    ("asked", "prompt", "longest", "limits", "expected"),
    [
        (None, 10, 100, {}, 90),
        (None, 10, None, {}, 8192),
        (None, 10, 10**6, {"default_completion_tokens": 7}, 7),
        (90, 10, 100, {}, 90),
        (91, 10, 100, {}, "max_tokens 91 is more than the 90"),
        (1, 100, 100, {}, "the prompt has 100 tokens, this server takes at most 99"),
        (1, 11, None, {"max_prompt_tokens": 10}, "the prompt has 11 tokens, this server takes at most 10"),
        (6, 10, None, {"max_completion_tokens": 5}, "max_tokens 6 is more than the 5 that this server writes"),
        (None, 10, 1000, {"max_completion_tokens": 5}, 5),
    ],
)
def test_how_long_an_answer_may_be(
    asked: int | None, prompt: int, longest: int | None, limits: dict[str, int], expected: int | str
) -> None:
    options = ServeOptions(**limits)
    if isinstance(expected, int):
        assert completion_tokens(asked, prompt, longest, options) == expected
    else:
        with pytest.raises(ApiError, match=expected) as refused:
            completion_tokens(asked, prompt, longest, options)
        assert (refused.value.status, refused.value.code) == (400, "context_length_exceeded")


@pytest.mark.parametrize("seed", range(4))
def test_a_text_is_said_to_outgrow_a_limit_only_where_it_does(seed: int) -> None:
    draw = random.Random(seed)
    words = ["gcd ", "12", " ", "aé", "\n", "x" * 50, "add 12 and 34 "]
    texts = ["".join(draw.choices(words, k=12_000)) for _ in range(2)]
    count = sum(map(len, TOKENIZER.encode_batch(texts)))
    pieces = sum(len(text) // PIECE + 1 for text in texts)
    assert not outgrows(TOKENIZER, texts, count) and not outgrows(TOKENIZER, texts, None)
    assert outgrows(TOKENIZER, texts, count - MOST_BY_CUTS * pieces - 1)


# Conversations


def messages(*fields: dict[str, object]) -> list[ChatMessage]:
    return ChatRequest.model_validate({"messages": list(fields)}).messages


def call(id: str, name: str = "add", arguments: str = "{}") -> dict[str, object]:
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


def test_what_clients_write_freely_becomes_turns_in_order() -> None:
    turns = turns_of(
        messages(
            {"role": "system", "content": "be short"},
            {"role": "developer", "content": [{"type": "text", "text": "and "}, {"type": "text", "text": "kind"}]},
            {"role": "user", "content": "one"},
            {"role": "user", "content": "two"},
            {"role": "assistant", "content": None, "tool_calls": [call("a"), call("b", "mul")], "refusal": None},
            {"role": "tool", "tool_call_id": "b", "content": "second"},
            {"role": "tool", "tool_call_id": "a", "content": "first"},
            {"role": "assistant", "content": "done", "reasoning_content": "hm"},
            {"role": "user", "content": "and?"},
        )
    )
    assert turns == (
        Message("system", "be short\n\nand kind"),
        Message("user", "one\n\ntwo"),
        Message("assistant", "", None, None, (ToolCall("add"), ToolCall("mul"))),
        Message("tool", "first"),
        Message("tool", "second"),
        Message("assistant", "done", "hm"),
        Message("user", "and?"),
    )


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ([{"role": "tool", "tool_call_id": "a", "content": "x"}], "messages[0].tool_call_id"),
        ([{"role": "tool", "content": "x"}], "messages[0].tool_call_id"),
        ([{"role": "user", "content": "x", "tool_calls": [call("a")]}], "messages[0].tool_calls"),
        ([{"role": "user", "content": "x", "reasoning": "y"}], "messages[0].reasoning"),
        (
            [{"role": "assistant", "tool_calls": [call("a", arguments="{")]}],
            "messages[0].tool_calls[0].function.arguments",
        ),
        (
            [
                {"role": "assistant", "tool_calls": [call("a"), call("b")]},
                {"role": "tool", "tool_call_id": "b", "content": "x"},
            ],
            "messages[1]",
        ),
        (
            [
                {"role": "assistant", "tool_calls": [call("a")]},
                {"role": "tool", "tool_call_id": "a", "content": "x"},
                {"role": "tool", "tool_call_id": "a", "content": "x"},
            ],
            "messages[2].tool_call_id",
        ),
    ],
)
def test_messages_that_have_no_place_are_refused_by_name(fields: list[dict[str, object]], param: str) -> None:
    with pytest.raises(ApiError) as refused:
        turns_of(messages(*fields))
    assert (refused.value.status, refused.value.param) == (400, param)


def definition(name: str = "add", **function: object) -> ToolDefinition:
    return ToolDefinition.model_validate({"type": "function", "function": {"name": name, **function}})


def test_tools_keep_their_definition_and_their_names_apart() -> None:
    (tool,) = tools_of([definition(description="adds", parameters={"type": "object"}, strict=True)])
    assert tool.definition == (
        '{"type": "function", "function": {"name": "add", "description": "adds", "parameters": {"type": "object"}}}'
    )
    with pytest.raises(ApiError, match="two are named 'add'"):
        tools_of([definition(), definition()])


# Thinking


@pytest.mark.parametrize(
    ("fields", "said", "mode", "budget"),
    [
        ({}, "2 plus 2?", "auto", None),
        ({}, "2 plus 2? /think", "on", None),
        ({}, "2 plus 2? /no_think", "off", None),
        ({"enable_thinking": False}, "2 plus 2? /think", "off", None),
        ({"chat_template_kwargs": {"enable_thinking": False}}, "2 plus 2?", "off", None),
        ({"thinking": True}, "2 plus 2?", "on", None),
        ({"thinking": "budget 64"}, "2 plus 2?", "budget 64", 64),
        ({"reasoning_effort": "low"}, "2 plus 2?", "budget 1024", 1024),
        ({"reasoning": {"effort": "none"}}, "2 plus 2?", "off", None),
        ({"reasoning_effort": "low", "thinking_budget": 9}, "2 plus 2?", "budget 9", 9),
        ({"thinking_budget": 5}, "2 plus 2?", "budget 5", 5),
        ({"thinking_token_budget": 5}, "2 plus 2?", "budget 5", 5),
        ({"thinking_budget": 0}, "2 plus 2?", "off", None),
        ({"thinking_budget": 5, "thinking": "auto"}, "2 plus 2?", "auto", 5),
        ({"thinking_budget": 5, "enable_thinking": False}, "2 plus 2?", "off", None),
    ],
)
def test_thinking_in_all_its_spellings(fields: dict[str, object], said: str, mode: str, budget: int | None) -> None:
    found, most = thinking_of(ThinkingFields.model_validate(fields), [Message("user", said)], speaks_chat=True)
    assert (str(found), most) == (mode, budget)


def test_thinking_that_is_spelt_twice_must_agree() -> None:
    fields = ThinkingFields.model_validate({"thinking_budget": 5, "thinking_token_budget": 6})
    with pytest.raises(ApiError) as refused:
        thinking_of(fields, [Message("user", "?")], speaks_chat=True)
    assert refused.value.param == "thinking_budget"


# Grammars of calls

ADD = callable_of(0, definition(parameters={"properties": {"a": {"type": "integer"}}, "required": ["a"]}))
NOP = callable_of(1, definition("nop"))


def follows(grammar: Grammar, ids: Sequence[int]) -> bool | None:
    """Whether tokens are a whole answer of a grammar; None where they leave it."""
    constraint = GrammarCompiler(TOKENIZER).constraint(grammar)
    for id in ids:
        if not constraint.allowed()[id] or not constraint.accept(id):
            return None
    return constraint.may_end


def written(text: str) -> list[int]:
    return [TAGS.call, *TOKENIZER.encode(f"\n{text}\n"), TAGS.call_end]


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        (written('{"name": "add", "arguments": {"a": 12}}'), True),
        (written('{"name": "nop", "arguments": {}}'), True),
        (written('{"name": "add", "arguments": {"a": 12}}') + written('{"name": "nop", "arguments": {}}'), True),
        ([], False),
        (written('{"name": "add", "arguments": {"a": 12}}')[:-1], False),
        (written('{"name": "add", "arguments": {"a": "x"}}'), None),
        (written('{"name": "add", "arguments": {}}'), None),
        (written('{"name": "sub", "arguments": {}}'), None),
        (TOKENIZER.encode("12"), None),
        ([TAGS.think], None),
    ],
)
def test_the_grammar_of_calls_takes_calls_and_nothing_else(ids: list[int], expected: bool | None) -> None:
    assert follows(call_grammar([ADD, NOP], TAGS.call, TAGS.call_end, parallel=True), ids) is expected


def test_the_grammar_of_one_call_ends_after_it() -> None:
    grammar = call_grammar([ADD], TAGS.call, TAGS.call_end, parallel=False)
    one = written('{"name": "add", "arguments": {"a": 1}}')
    assert follows(grammar, one) is True and follows(grammar, one + one) is None


def test_strict_tools_leave_text_free_and_calls_bound() -> None:
    grammar = call_grammar([ADD], TAGS.call, TAGS.call_end, parallel=True, text=True)
    good, bad = written('{"name": "add", "arguments": {"a": 1}}'), written('{"name": "add", "arguments": {}}')
    text = TOKENIZER.encode("gcd of 12, é")
    assert follows(grammar, text) is True and follows(grammar, text + good) is True
    assert follows(grammar, text + bad) is None


def test_a_format_and_tools_leave_the_choice() -> None:
    answer = {"type": "object", "properties": {"gcd": {"type": "integer"}}, "required": ["gcd"]}
    grammar = call_grammar([ADD], TAGS.call, TAGS.call_end, parallel=True, answer=answer)
    assert follows(grammar, TOKENIZER.encode('{"gcd": 6}')) is True
    assert follows(grammar, written('{"name": "add", "arguments": {"a": 1}}')) is True
    assert follows(grammar, TOKENIZER.encode("six")) is None


def test_a_call_by_grammar_is_spelt_as_it_will_be_rendered() -> None:
    tool = CallableTool("add", {"type": "object", "properties": {"a": {"type": "integer"}}, "x-guidance": SPELLING})
    grammar = call_grammar([tool], TAGS.call, TAGS.call_end, parallel=False)
    spelt = ToolCall("add", '{"a": 1}').text
    assert follows(grammar, written(spelt)) is True
    assert follows(grammar, written(spelt.replace(": 1", ":1"))) is None


def test_arguments_are_objects() -> None:
    with pytest.raises(ApiError) as refused:
        callable_of(3, definition(parameters={"type": "array"}))
    assert refused.value.param == "tools[3].function.parameters"


# Examples, metrics and errors


@pytest.mark.parametrize(
    "module", ["calls", "conversation", "errors", "limits", "log", "metrics", "reading", "service", "turns"]
)
def test_examples(module: str) -> None:
    assert doctest.testmod(importlib.import_module(f"turbos.serve.{module}")).failed == 0


def test_metrics_are_what_prometheus_reads() -> None:
    engine, metrics = tiny_engine(), ServerMetrics()
    engine.generate([[3, 50, 6, 4]])
    metrics.request("GET", '/odd"route\\', 200, 0.3)
    metrics.request("GET", "/other", 404, 30.0)
    families = {one.name: one for one in text_string_to_metric_families(metrics.text(engine.metrics(), Gate(1)))}
    requests = {sample.labels["route"]: sample.value for sample in families["turbos_requests"].samples}
    assert requests == {'/odd"route\\': 1.0, "/other": 1.0}
    buckets = {sample.labels.get("le"): sample.value for sample in families["turbos_request_seconds"].samples}
    assert (buckets["0.25"], buckets["0.5"], buckets["30.0"], buckets["+Inf"]) == (0.0, 1.0, 2.0, 2.0)
    (written_tokens,) = families["turbos_engine_written_tokens"].samples
    assert written_tokens.value == engine.metrics().written_tokens > 0


@pytest.mark.parametrize(
    ("error", "param"),
    [
        (UserError("top_p must lie between 0 and 1, not 2"), "top_p"),
        (UserError("engine: a prompt has no tokens; give at least one"), None),
        (UserError("logit_bias: token 9 lies outside vocab_size 8"), "logit_bias"),
        (ChatError("order", 3, "role", "a user turn cannot follow"), "messages[3]"),
        (ChatError("json", None, "tool", "broken JSON"), "tools"),
    ],
)
def test_a_mistake_from_below_names_its_option(error: UserError, param: str | None) -> None:
    assert of_user_error(error).body["error"]["param"] == param
    assert of_user_error(error).body["error"]["type"] == "invalid_request_error"
