"""`turbos bench serve`: a served model under load, beside the engine alone and llama-server; what is read again.

A model of 26M active parameters with random weights (`bench-26m`), or a checkpoint that is given, is served by `turbos
serve` as a process of its own. 64 clients ask for streamed chats at once; so is the engine, in a process without HTTP,
and llama-server, with a q8_0 file of the same weights beside our int8. Client, server and model share the machine's
cores. Rows (a ratio above 1: the server is better):

- `serve aggregate 64`: tokens a second of all, prompts included; its ratio to `engine` is what HTTP leaves of it.
- `serve first token`, `serve between tokens`: percentiles; a part of a stream counts as a token.
- `serve longest / median 64`: of the times to finish, large where some starve.
- `serve reread <case>`: tokens that are read when a conversation comes again (`serve_reread`).

    rows = bench_serve(ServePlan(threads=2))
"""

from __future__ import annotations

import importlib.util
import statistics
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

from turbos.bench.rows import Row
from turbos.bench.serve_client import Address, ask_one
from turbos.bench.serve_load import Contestants, load_rows, measure_load
from turbos.bench.serve_plan import ServePlan, make_checkpoint, open_checkpoint, say
from turbos.bench.serve_processes import Server, start_engine, start_peer, start_server
from turbos.bench.serve_reread import (
    CASES,
    ChatTalk,
    PeerTalk,
    Reread,
    SessionTalk,
    hold_chat,
    hold_peer,
    hold_session,
    reread_rows,
    restarted,
)
from turbos.common.errors import UserError
from turbos.model.lm import LanguageModel
from turbos.model.package import Package

FILE_KIND = "q8_0"
"""Of llama.cpp's files: weights as wide as int8."""

SLOT = 4096
"""Tokens that a slot of llama-server holds."""

COMPARED, CANDIDATES, APART = 8, 20, 0.1
"""Prompts after which both servers' likeliest tokens are compared, how many, and how many nats apart they may be."""

NEEDED = ("fastapi", "uvicorn", "h11")
DEFAULTS = ServePlan()


def bench_serve(
    plan: ServePlan = DEFAULTS, checkpoint: Path | None = None, model: LanguageModel | None = None
) -> Sequence[Row]:
    """All rows; `checkpoint` None makes one of `model`, which is the benchmark's shape unless given."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"bench serve: needs {', '.join(missing)}: pip install 'turbos[serve]'")
    with TemporaryDirectory(prefix="turbos-bench-serve-") as parent:
        root = Path(parent)
        package = open_checkpoint(checkpoint or make_checkpoint(root / "checkpoint", model))
        file = _peer_file(package, root) if plan.peer else None
        return _Bench(plan, package, file, root).rows()


def _peer_file(package: Package, root: Path) -> Path | None:
    """The same weights for llama-server; None, with a line that says why, where it cannot run them."""
    if importlib.util.find_spec("xllamacpp") is None:
        say("llama-server is left out: not installed (pip install 'turbos[peers]')")
        return None
    from turbos.model.gguf import write_gguf

    path = root / f"{FILE_KIND}.gguf"
    try:
        write_gguf(package.model, package.tokenizer, path, FILE_KIND, package.token_ids)
    except UserError as error:
        say(f"llama-server is left out: {error}")
        return None
    return path


class _Bench:
    """One run. The servers are started twice: the second time to find what the first one saved."""

    def __init__(self, plan: ServePlan, package: Package, file: Path | None, root: Path) -> None:
        self._plan, self._package, self._file = plan, package, file
        self._sessions, self._states = root / "sessions", root / "states"
        self._states.mkdir()

    def rows(self) -> list[Row]:
        """All rows."""
        plan, tokenizer = self._plan, self._package.tokenizer
        with ExitStack() as stack:
            engine = stack.enter_context(start_engine(self._package.directory, plan))
            server = stack.enter_context(self._server()).address
            peer = None if self._file is None else stack.enter_context(self._peer(self._file)).address
            if peer is not None:
                prompts = engine.ask({"texts": plan.requests(-1)[:COMPARED], "answer": 1})["prompts"]
                require_same_model(server, peer, prompts)
            rows = list(load_rows(measure_load(Contestants(engine, server, peer), plan), plan.streams))
            say(f"a conversation of {plan.turns} turns, read again")
            chat = hold_chat(ChatTalk(server, plan.reply), plan, tokenizer)
            talk = SessionTalk(server, plan.reply)
            session = hold_session(talk, plan)
            theirs = None if peer is None else PeerTalk(peer, tokenizer, plan.reply)
            held = None if theirs is None else hold_peer(theirs, plan, tokenizer)
        with self._server() as again:
            restarted(SessionTalk(again.address, plan.reply, talk.id), session, plan)
        if theirs is not None and held is not None and self._file is not None:
            with self._peer(self._file) as other:
                theirs.restore(other.address)
                restarted(theirs, held, plan)
        ours = _in_order({**chat.cases, **session.cases})
        return [*rows, *reread_rows(ours, {} if held is None else _in_order(held.cases))]

    def _server(self) -> AbstractContextManager[Server]:
        return start_server(self._package.directory, self._plan, self._sessions)

    def _peer(self, file: Path) -> AbstractContextManager[Server]:
        return start_peer(file, self._plan, SLOT, self._states)


def _in_order(cases: dict[str, Reread]) -> dict[str, Reread]:
    return {case: cases[case] for case in CASES if case in cases}


def require_same_model(ours: Address, theirs: Address, prompts: Sequence[Sequence[int]]) -> None:
    """Refuse to compare servers of different models, by their likeliest tokens after some prompts.

    Both round the weights to 8 bits, each in its way, so that log-probabilities differ a little.
    """
    compared = [_likeliest(ours, theirs, ids) for ids in prompts]
    found = [pair for pair in compared if pair is not None]
    shared = [{token: (one[token], other[token]) for token in one.keys() & other.keys()} for one, other in found]
    apart = [abs(one - other) for pairs in shared for one, other in pairs.values()]
    if not apart or len(apart) < CANDIDATES * len(found) / 4 or statistics.median(apart) > APART:
        raise RuntimeError("bench serve: turbos and llama-server do not serve the same model")
    same = sum(
        max(one, key=lambda token: one[token]) == max(other, key=lambda token: other[token]) for one, other in found
    )
    say(
        f"turbos and llama-server: log-probabilities are {statistics.median(apart):.3f} nats apart, "
        f"the likeliest token is the same after {same} of {len(found)} prompts"
    )


def _likeliest(ours: Address, theirs: Address, ids: Sequence[int]) -> tuple[dict[str, float], dict[str, float]] | None:
    """Log-probabilities of the likeliest next tokens, by both servers.

    None where llama-server tells none: of a token that is no whole character.
    """
    body = {"prompt": list(ids), "max_tokens": 1, "temperature": 0, "logprobs": CANDIDATES}
    told = ask_one(ours, "/v1/completions", body)["choices"][0]["logprobs"]["top_logprobs"][0]
    asked = {"prompt": list(ids), "n_predict": 1, "temperature": 0, "n_probs": CANDIDATES}
    told_too = ask_one(theirs, "/completion", asked).get("completion_probabilities")
    return (told, {rank["token"]: rank["logprob"] for rank in told_too[0]["top_logprobs"]}) if told_too else None
