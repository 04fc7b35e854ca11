"""How many tokens are read anew when a conversation comes again: repeated, longer, edited, forked, after a restart.

A conversation of about 1500 tokens is held turn by turn, as a client of chats does, and then asked once more:
`repeated` as it was; `appended` with its answer and another question; `edited` with other words from the middle of a
question in its midst; `forked` with another question in that one's place; `restarted` with another question after the
server has been started again from its saved session. `document` is one long message, the same up to its middle. What
is read is what the server says: prompt less cached tokens, of llama-server `timings.prompt_n`. What is `new` is what
no program could have read before.

llama-server is given the tokens that our chats become. It has no sessions: a fork is another prompt, and its state is
saved and restored by slot.

    held = hold(ServerTalk(address), plan)
    held.reads, then(ServerTalk(address), held)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from turbos.bench.rows import Row
from turbos.bench.serve_client import Address, ask_one
from turbos.bench.serve_plan import ServePlan, words
from turbos.bench.serve_processes import NAME
from turbos.text.chat import opening_ids, render
from turbos.text.messages import Message
from turbos.text.stream import TurnStream
from turbos.text.thinking import Thinking
from turbos.text.tokenizer import Tokenizer

CASES = ("repeated", "appended", "edited", "forked", "restarted", "document")
STATE = "bench.state"


@dataclass(frozen=True)
class Asked:
    """What a server counted of one request."""

    prompt: int
    read: int
    written: int

    @property
    def total(self) -> int:
        """Tokens of the prompt and of the answer."""
        return self.prompt + self.written


@dataclass(frozen=True)
class Reread:
    """A case: tokens of the prompt, those that were read, those that are new."""

    prompt: int
    read: int
    new: int


@dataclass
class Held:
    """A conversation after its last turn: what each turn counted, and the cases measured so far."""

    turns: list[Asked]
    cases: dict[str, Reread] = field(default_factory=dict)

    def note(self, case: str, asked: Asked, known: int) -> None:
        """A case more, of whose prompt so many tokens had come before."""
        self.cases[case] = Reread(asked.prompt, asked.read, asked.prompt - known)


class ChatTalk:
    """A client of `/v1/chat/completions`, which sends all messages each time."""

    def __init__(self, address: Address, reply: int) -> None:
        self._address, self._reply = address, reply
        self.messages: list[dict[str, str]] = []

    def say(self, text: str) -> Asked:
        """Ask, and keep the question and its answer."""
        self.messages.append({"role": "user", "content": text})
        asked, content = self._ask(self.messages)
        self.messages.append({"role": "assistant", "content": content})
        return asked

    def again(self, messages: Sequence[Mapping[str, str]]) -> Asked:
        """Ask for what follows some messages; nothing is kept."""
        return self._ask(messages)[0]

    def _ask(self, messages: Sequence[Mapping[str, str]]) -> tuple[Asked, str]:
        body = {"model": NAME, "messages": messages, "max_tokens": self._reply, "temperature": 0}
        answer = ask_one(self._address, "/v1/chat/completions", body)
        usage = answer["usage"]
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        counted = Asked(usage["prompt_tokens"], usage["prompt_tokens"] - cached, usage["completion_tokens"])
        return counted, answer["choices"][0]["message"]["content"]


class SessionTalk:
    """A client of `/v1/sessions`, where the server keeps the conversation."""

    def __init__(self, address: Address, reply: int, id: str | None = None) -> None:
        self._address, self._reply = address, reply
        self.id: str = ask_one(address, "/v1/sessions", {})["id"] if id is None else id

    def say(self, text: str) -> Asked:
        """Ask."""
        body = {"content": text, "max_tokens": self._reply, "temperature": 0}
        last = ask_one(self._address, f"/v1/sessions/{self.id}/messages", body)
        if last["type"] != "finish":
            raise RuntimeError(f"bench serve: a session's answer failed: {last}")
        usage = last["usage"]
        return Asked(
            usage["prompt_tokens"], usage["prompt_tokens"] - usage["cached_tokens"], usage["completion_tokens"]
        )

    def fork(self, turn: int) -> SessionTalk:
        """Another session with the turns before one."""
        forked = ask_one(self._address, f"/v1/sessions/{self.id}/fork", {"turn": turn})
        return SessionTalk(self._address, self._reply, forked["id"])

    def save(self) -> None:
        """Write the state to disk."""
        ask_one(self._address, f"/v1/sessions/{self.id}/save", {})


class PeerTalk:
    """A client of llama-server that sends all tokens each time, and keeps those of its answers."""

    def __init__(self, address: Address, tokenizer: Tokenizer, reply: int) -> None:
        self._address, self._tokenizer, self._reply = address, tokenizer, reply
        self._opening = opening_ids(tokenizer, Thinking())
        self.messages: list[Message] = []
        self.slot = 0

    def say(self, text: str) -> Asked:
        """Ask, and keep the question and its answer."""
        self.messages.append(Message("user", text))
        asked, ids = self._ask(self.messages)
        turn = TurnStream(self._tokenizer, self._opening)
        turn.feed(ids)
        turn.finish()
        self.messages.append(turn.message())
        return asked

    def again(self, messages: Sequence[Message]) -> Asked:
        """Ask for what follows some messages; nothing is kept."""
        return self._ask(messages)[0]

    def _ask(self, messages: Sequence[Message]) -> tuple[Asked, Sequence[int]]:
        ids = [*render(self._tokenizer, messages).ids, *self._opening]
        body = {"prompt": ids, "n_predict": self._reply, "temperature": 0, "cache_prompt": True, "return_tokens": True}
        answer = ask_one(self._address, "/completion", body)
        self.slot = answer["id_slot"]
        return Asked(len(ids), answer["timings"]["prompt_n"], answer["timings"]["predicted_n"]), answer["tokens"]

    def save(self) -> None:
        """Write the slot's state to disk."""
        ask_one(self._address, f"/slots/{self.slot}?action=save", {"filename": STATE})

    def restore(self, address: Address) -> None:
        """Let another llama-server, without anything in its slots, read the state."""
        self._address = address
        ask_one(address, f"/slots/{self.slot}?action=restore", {"filename": STATE})


def hold_chat(talk: ChatTalk, plan: ServePlan, tokenizer: Tokenizer) -> Held:
    """The conversation by chats, and the cases that chats can ask for."""
    held = Held([talk.say(text) for text in plan.questions()])
    last, messages = held.turns[-1], list(talk.messages)
    held.note("repeated", talk.again(messages[:-1]), last.prompt)
    more = {"role": "user", "content": words(plan.question, "appended")}
    held.note("appended", talk.again([*messages, more]), last.total)
    kept, edited = plan.edited()
    place = 2 * plan.changed
    changed = [*messages[:place], {"role": "user", "content": edited}, *messages[place + 1 : -1]]
    held.note("edited", talk.again(changed), held.turns[plan.changed - 1].total + len(tokenizer.encode(kept)))
    document, kept, edited = plan.documents()
    talk.again([{"role": "user", "content": document}])
    held.note("document", talk.again([{"role": "user", "content": edited}]), len(tokenizer.encode(kept)))
    return held


def hold_session(talk: SessionTalk, plan: ServePlan) -> Held:
    """The conversation by a session, a fork of it; its state is on disk then."""
    held = Held([talk.say(text) for text in plan.questions()])
    forked = talk.fork(2 * plan.changed).say(words(plan.question, "forked"))
    held.note("forked", forked, held.turns[plan.changed - 1].total)
    talk.save()
    return held


def hold_peer(talk: PeerTalk, plan: ServePlan, tokenizer: Tokenizer) -> Held:
    """The same conversation with llama-server, in the same order; its state is on disk then."""
    held = Held([talk.say(text) for text in plan.questions()])
    last, messages = held.turns[-1], list(talk.messages)
    held.note("repeated", talk.again(messages[:-1]), last.prompt)
    more = Message("user", words(plan.question, "appended"))
    held.note("appended", talk.again([*messages, more]), last.total)
    kept, edited = plan.edited()
    place = 2 * plan.changed
    texts = [Message(one.role, one.content) for one in messages[place + 1 : -1]]
    changed = [*messages[:place], Message("user", edited), *texts]
    before = held.turns[plan.changed - 1].total
    held.note("edited", talk.again(changed), before + len(tokenizer.encode(kept)))
    forked = [*messages[:place], Message("user", words(plan.question, "forked"))]
    held.note("forked", talk.again(forked), before)
    document, kept, edited = plan.documents()
    talk.again([Message("user", document)])
    held.note("document", talk.again([Message("user", edited)]), len(tokenizer.encode(kept)))
    # What is saved is the whole conversation again.
    talk.again(messages[:-1])
    talk.save()
    return held


def restarted(talk: SessionTalk | PeerTalk, held: Held, plan: ServePlan) -> None:
    """The case that is left, with a client of the program that was started again."""
    held.note("restarted", talk.say(words(plan.question, "restarted")), held.turns[-1].total)


def reread_rows(ours: Mapping[str, Reread], theirs: Mapping[str, Reread]) -> Iterator[Row]:
    """A row for each case of ours, then of llama-server's; a ratio counts what is read as at least one token."""
    for case, one in ours.items():
        ratios = {"llama-server": max(theirs[case].read, 1) / max(one.read, 1)} if case in theirs else {}
        yield Row(f"serve reread {case}", float(one.read), _unit(one), ratios)
    for case, one in theirs.items():
        yield Row(f"llama-server reread {case}", float(one.read), _unit(one))


def _unit(one: Reread) -> str:
    return f"tokens of {one.prompt}, {one.new} new"
