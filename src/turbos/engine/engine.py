"""The engine: many answers written at once over one pool of states, each as if it were alone.

`generate` runs requests to their end; `stream` gives one as it is written; `submit`, `cancel` and `step` are what both
are made of, for callers with a loop of their own (`engine.stream.AsyncEngine`, for asyncio). It is not a server: it
knows token ids, and text only where a tokenizer is given.

    engine = Engine.from_checkpoint("runs/demo/final")
    print(*engine.describe(), sep="\\n")
    (answer,) = engine.generate([prompt_ids], SamplingParams(max_new_tokens=64))
    answer.text, answer.logprobs
"""

from __future__ import annotations

import copy
import threading
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from collections.abc import Sequence as Many
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from turbos.common.errors import UserError
from turbos.common.records import Completion, Finish
from turbos.engine.cache import Miss, StateCache
from turbos.engine.choosing import warm_up
from turbos.engine.config import DEFAULTS, EngineConfig
from turbos.engine.memory import MemoryPlan, plan
from turbos.engine.metrics import Counters, EngineMetrics
from turbos.engine.pool import PAGE, StatePool
from turbos.engine.precision import Weights
from turbos.engine.sampler import Choice, NoChoice, Sampler
from turbos.engine.sampling_params import GREEDY, SamplingParams
from turbos.engine.scheduler import Scheduler
from turbos.engine.sequence import Delta, Sequence
from turbos.engine.snapshot import Origin, origin_of, place_session, read_session, save_session
from turbos.engine.writer import Writer
from turbos.model.lm import LanguageModel
from turbos.text.tokenizer import Tokenizer


class Engine:
    """Continuous batching of one model. It takes the model over: weights may be rounded, `load_weights` replaces them.

    `submit`, `cancel` and `metrics` may be called from any thread at any time; what runs the model takes turns.
    """

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Tokenizer | None = None,
        config: EngineConfig = DEFAULTS,
        eos_ids: Collection[int] = (),
    ) -> None:
        """`eos_ids` end an answer unless a request names others. UserError where memory or options do not fit."""
        self.config, self.tokenizer, self.eos_ids = config, tokenizer, frozenset(eos_ids)
        self.weights = Weights.prepare(model, config)
        self.weights_version = 0
        shape, weight = model.config, model.embed_weight
        beyond = sorted(id for id in self.eos_ids if not 0 <= id < shape.vocab_size)
        if beyond:
            raise UserError(f"engine: end token {beyond[0]} lies outside vocab_size {shape.vocab_size}")
        static, kind = bool(self.weights.static), (weight.device, weight.dtype)
        self.plan: MemoryPlan = plan(
            shape,
            self.weights.nbytes,
            config.memory,
            config.context,
            config.max_running,
            device=kind[0],
            dtype=kind[1],
            segment=config.segment,
            static=static,
        )
        self.pool = StatePool(shape, self.plan.slots, self.plan.pages, *kind, scratch=static)
        self.cache = StateCache(self.pool, self.plan.cache_bytes)
        self.scheduler = Scheduler(self.pool, self.cache, config.segment, config.snapshot_every)
        self._sampler = Sampler(shape.vocab_size, tokenizer)
        # What is compiled is compiled here, never in the middle of a request.
        warm_up()
        self._runner = self.weights.runner(self.pool)
        self._lock = threading.RLock()
        self._next = threading.Lock()
        self._inbox: deque[Sequence] = deque()
        self._outbox: deque[tuple[Callable[[Delta], None], Delta]] = deque()
        self._inside = False
        self._holder: int | None = None
        self._counters = Counters()
        self._known_origin: Origin | None = None

    @classmethod
    def from_checkpoint(cls, name: str | Path, config: EngineConfig = DEFAULTS) -> Engine:
        """An engine for a checkpoint directory or hub id, with its tokenizer and its end tokens."""
        from turbos.model.package import load_package

        package = load_package(name)
        return cls(package.model, package.tokenizer, config, package.token_ids.eos)

    @classmethod
    def of_copy(
        cls,
        model: LanguageModel,
        tokenizer: Tokenizer | None = None,
        config: EngineConfig = DEFAULTS,
        eos_ids: Collection[int] = (),
    ) -> Engine:
        """An engine with a copy of a model's weights, for a model that goes on training."""
        return cls(copy.deepcopy(model), tokenizer, config, eos_ids)

    def describe(self) -> list[str]:
        """Which paths run and why, what a session costs and how many fit: a program's first lines."""
        return [f"engine: {self.weights.describe(self._runner)}", f"memory: {self.plan.describe()}"]

    @property
    def model(self) -> LanguageModel:
        """The torch model, with the numbers that the packed weights stand for."""
        return self.weights.model

    @property
    def longest(self) -> int | None:
        """Tokens that prompt and answer together may have; None where their number costs no memory."""
        return self.plan.pages * PAGE if self.pool.pages_matter else None

    def metrics(self) -> EngineMetrics:
        """Counters since the engine began, and what it holds at present."""
        return self._counters.metrics(self.scheduler, self.weights_version)

    # Requests

    def submit(
        self,
        prompt: Many[int],
        params: SamplingParams = GREEDY,
        *,
        marks: Collection[int] = (),
        sink: Callable[[Delta], None] | None = None,
    ) -> list[Sequence]:
        """Put a request in line: `params.n` answers, whose deltas go to `sink` from the thread that drives the engine.

        A sink may call `submit`, `cancel` and `step`; what it raises comes out of the step, and the engine lives. After
        `marks` tokens of the prompt (ends of messages, say) its state is kept. UserError for what cannot be.
        """
        prompt_ids = tuple(prompt)
        self._check(prompt_ids, params, marks)
        writers = [self._sampler.writer(params, prompt_ids, place, self.eos_ids) for place in range(params.n)]
        answers = [Sequence(prompt_ids, writer, params, frozenset(marks), sink or _nowhere) for writer in writers]
        self._inbox.extend(answers)
        return answers

    def check(self, prompt: Many[int], params: SamplingParams = GREEDY, *, marks: Collection[int] = ()) -> None:
        """UserError for what `submit` would refuse, without putting it in line.

        A grammar is compiled, which may take seconds, and kept: the `submit` that follows is quick.
        """
        prompt_ids = tuple(prompt)
        self._check(prompt_ids, params, marks)
        self._sampler.writer(params, prompt_ids, 0, self.eos_ids)

    def cancel(self, answer: Sequence) -> None:
        """End an answer: its memory is free before the next step, at once where none is running."""
        answer.cancelled = True
        if self._lock.acquire(blocking=False):
            holder, self._holder = self._holder, threading.get_ident()
            try:
                # The same thread may be in the midst of a step: a stream that nobody holds any more is closed anywhere.
                if not self._inside:
                    with self._change():
                        self._receive()
            finally:
                self._holder = holder
                self._lock.release()

    def generate(
        self, prompts: Many[Many[int]], params: SamplingParams | Many[SamplingParams] = GREEDY
    ) -> list[Completion]:
        """Answers to all prompts, in their order, the `n` answers to one side by side."""
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        if len(each) != len(prompts):
            raise UserError(f"engine: {len(each)} sampling parameters for {len(prompts)} prompts")
        answers: list[Sequence] = []
        try:
            for prompt, its in zip(prompts, each, strict=True):
                answers += self.submit(prompt, its)
            while not all(answer.finish for answer in answers):
                self.step()
        finally:
            # After Ctrl-C, or a prompt that was refused, nothing goes on unseen.
            for answer in answers:
                if not answer.finish:
                    self.cancel(answer)
        return [answer.completion() for answer in answers]

    def stream(
        self, prompt: Many[int], params: SamplingParams = GREEDY, *, marks: Collection[int] = ()
    ) -> Iterator[Delta]:
        """The deltas of a request as they come; leaving the loop early cancels it."""
        deltas: deque[Delta] = deque()
        answers = self.submit(prompt, params, marks=marks, sink=deltas.append)
        unfinished = len(answers)
        try:
            # Counted by deltas: where another thread drives, an answer is over a moment before its last one is here.
            while unfinished:
                while deltas:
                    delta = deltas.popleft()
                    unfinished -= delta.finish is not None
                    yield delta
                if unfinished:
                    self.step()
        finally:
            for answer in answers:
                if not answer.finish:
                    self.cancel(answer)

    # Weights

    def load_weights(self, named: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Take new weights: all tensors of the model by name, in any float dtype.

        Answers that have begun are finished first, so that each is of one version; kept states are dropped.
        UserError, and nothing changed, where a tensor is missing, unknown or of another shape.
        """
        new = dict(named)
        own = {**dict(self.weights.model.named_parameters()), **dict(self.weights.model.named_buffers())}
        for problem in _misfits(own, new):
            raise UserError(f"engine: weights version {version}: {problem}")
        with self._turn(), torch.no_grad():
            while self.scheduler.begun:
                with self._change():
                    self._receive()
                    self._advance(only_begun=True)
            for name, tensor in own.items():
                tensor.copy_(new[name])
            self.weights.pack()
            # Static steps read the model's tensors where they lie: they know the new numbers already.
            self._runner = replace(self._runner, fused=self.weights.fused_step(self.pool))
            self.cache.set_version(version)
            self.scheduler.release_prompts()
            self.weights_version = version
            self._known_origin = None

    # Sessions on disk

    def save_session(self, path: Path, ids: Many[int]) -> int:
        """Write the longest state that is kept of these tokens to a file; returns how many tokens it has read.

        After an answer that is all but its last token. UserError where none is kept, or the disk refuses.
        """
        # Weights are hashed once, which takes a while: before anybody must wait for it.
        _ = self._origin
        with self._turn():
            found, origin = self.cache.find(ids), self._origin
        if isinstance(found, Miss):
            raise UserError(f"cannot save the session {path}: no state of its tokens is kept ({found.reason})")
        try:
            # What is held does not change: answers go on while the disk takes its time.
            save_session(path, self.cache, found.snapshot, ids, origin)
        finally:
            with self._turn():
                self.cache.release(found.snapshot)
        return found.length

    def load_session(self, path: Path) -> tuple[int, ...]:
        """Keep the state that a file holds, so that a prompt which begins with its tokens goes on from there.

        Returns the tokens. UserError, naming the file, for one that is damaged, of another model or too large.
        """
        version = self.weights_version
        tensors = read_session(path, self.pool, self._origin)
        with self._turn():
            if self.weights_version != version:
                raise UserError(f"{path}: the engine's weights became others while the session was read")
            session = place_session(path, self.cache, tensors)
            try:
                if self.plan.state_bytes > self.cache.limit:
                    raise UserError(
                        f"{path}: a state takes {self.plan.state_bytes / 1e6:.1f} MB, kept states have "
                        f"{self.cache.limit / 1e6:.1f} MB: give the engine more memory"
                    )
                self.cache.keep_snapshot(session.ids, session.snapshot)
            finally:
                self.cache.release(session.snapshot)
            return session.ids

    def kept(self, ids: Many[int]) -> int:
        """How many tokens the longest state has read that is kept of a beginning of `ids`; it is not used by that."""
        with self._turn():
            return self.cache.kept_length(ids)

    @property
    def _origin(self) -> Origin:
        """What made this engine's states; hashed when first asked for, and again after new weights."""
        if self._known_origin is None:
            self._known_origin = origin_of(self.model)
        return self._known_origin

    # Steps

    @property
    def busy(self) -> bool:
        """Whether there is something to do."""
        return bool(self._inbox) or self.scheduler.busy

    @torch.inference_mode()
    def step(self) -> bool:
        """Read up to a segment of prompts and write a token of each running answer; whether there is more to do."""
        with self._turn():
            with self._change():
                self._receive()
                self._advance(only_begun=False)
            return self.busy

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """The engine for oneself, in turn: who only took the lock would wait for ever beside a busy driver.

        A sink may come back within a turn; it holds the lock already and must not stand in line for it.
        """
        if self._holder == threading.get_ident():
            yield
            return
        with self._next:
            self._lock.acquire()
        self._holder = threading.get_ident()
        try:
            yield
        finally:
            self._holder = None
            self._lock.release()

    @contextmanager
    def _change(self) -> Iterator[None]:
        """A change of what runs, then the deltas that came of it: no sink is called while anything is half done."""
        inside, self._inside = self._inside, True
        try:
            yield
        finally:
            self._inside = inside
        while self._outbox:
            sink, delta = self._outbox.popleft()
            sink(delta)

    @contextmanager
    def _whole(self, sequences: Many[Sequence]) -> Iterator[None]:
        """If the model fails or Ctrl-C comes within, states may be half written: these sequences read them again."""
        done = False
        try:
            yield
            done = True
        finally:
            if not done:
                for sequence in sequences:
                    if sequence.row is not None:
                        self.scheduler.step_back(sequence)

    def _receive(self) -> None:
        """Take new requests in, let cancelled ones go."""
        while self._inbox:
            self.scheduler.add(self._inbox.popleft())
        for sequence in self.scheduler.sequences():
            if sequence.cancelled:
                self._end(sequence, "cancelled", Delta(sequence.writer.place, (), (), finish="cancelled"))

    @torch.inference_mode()
    def _advance(self, only_begun: bool) -> None:
        self._counters.steps += 1
        tokens = 0
        while tokens < self.config.segment:
            sequence = self.scheduler.admit(only_begun)
            if sequence is None:
                break
            with self._whole([sequence]):
                tokens += self._read(sequence)
        self._write()

    def _read(self, sequence: Sequence) -> int:
        """One piece of a prompt; returns how many tokens it had, at least 1."""
        if sequence.hidden_D is not None:
            self._begin(sequence, sequence.hidden_D)
            return 1
        border = self.scheduler.next_border(sequence)
        row = sequence.row
        if border is None or row is None:
            return 1
        ids = sequence.ids(row.length, border)
        hidden_D, routes = self._runner.read(row, ids, sequence.params.routes)
        self._counters.read_tokens += len(ids)
        if routes is not None:
            sequence.routes.append(routes)
        if border == sequence.prompt_length:
            if sequence.params.cache:
                self.cache.keep(sequence.prompt_ids, row, hidden_D)
            self._begin(sequence, hidden_D)
        elif self.scheduler.is_kept_at(sequence, border):
            self.cache.keep(sequence.ids(0, border), row, hidden_D)
        return len(ids)

    def _begin(self, sequence: Sequence, hidden_D: Tensor) -> None:
        """The prompt is read: write the first token, unless this is an answer that had stepped back."""
        group = sequence.group
        if not (sequence.writer.ids or group.counted):
            self._counters.cached_tokens += sequence.cached_tokens
            group.counted = True
        if sequence.params.routes:
            # Members of a group share what its reader saw.
            group.routes = group.routes or tuple(sequence.routes)
            sequence.routes = list(group.routes)
        self.scheduler.prompt_was_read(sequence, hidden_D)
        if not sequence.writer.ids:
            if group.logits_V is None:
                group.logits_V = self._runner.logits(hidden_D)[0]
            self._sample([sequence], group.logits_V[None])
        self.scheduler.forget_if_done(sequence)

    def _write(self) -> None:
        """One token for each that writes; those that had stepped back read again what they had written."""
        batch = self.scheduler.batch()
        if batch:
            with self._whole(batch):
                self._write_batch(batch)

    def _write_batch(self, batch: list[Sequence]) -> None:
        rows = [sequence.row for sequence in batch if sequence.row is not None]
        ids = [sequence.ids(row.length, row.length + 1)[0] for sequence, row in zip(batch, rows, strict=True)]
        step = self._runner.step(rows, ids, any(sequence.params.routes for sequence in batch))
        for place, (sequence, row) in enumerate(zip(batch, rows, strict=True)):
            if sequence.params.routes and step.routes_BLK is not None:
                sequence.routes.append(step.routes_BLK[place, None])
            if self.scheduler.is_kept_at(sequence, row.length):
                self.cache.keep(sequence.ids(0, row.length), row)
        fresh = [place for place, row in enumerate(rows) if row.length == batch[place].total]
        self._counters.replayed_tokens += len(batch) - len(fresh)
        if fresh:
            logits_BV = step.logits_BV if len(fresh) == len(batch) else step.logits_BV[fresh]
            self._sample([batch[place] for place in fresh], logits_BV)

    def _sample(self, sequences: list[Sequence], logits_BV: Tensor) -> None:
        """A token for each, from its logits."""
        choices = self._sampler.sample(logits_BV, [sequence.writer for sequence in sequences])
        for sequence, choice in zip(sequences, choices, strict=True):
            delta = _written(sequence.writer, choice)
            self._counters.written_tokens += len(delta.ids)
            if delta.finish is None:
                self._outbox.append((sequence.sink, delta))
            else:
                self._end(sequence, delta.finish, delta)

    def _end(self, sequence: Sequence, finish: Finish, delta: Delta) -> None:
        """An answer is over: its state is kept for what may follow it, its row is free."""
        row = sequence.row
        if finish != "error" and sequence.params.cache and row is not None and row.length:
            self.cache.keep(sequence.ids(0, row.length), row)
        self.scheduler.end(sequence)
        sequence.finish, sequence.reason, sequence.weights_version = finish, delta.reason, self.weights_version
        self._outbox.append((sequence.sink, replace(delta, completion=sequence.completion())))

    def _check(self, prompt_ids: tuple[int, ...], params: SamplingParams, marks: Collection[int]) -> None:
        vocabulary = self.weights.model.config.vocab_size
        if not prompt_ids:
            raise UserError("engine: a prompt has no tokens; give at least one")
        if min(prompt_ids) < 0 or max(prompt_ids) >= vocabulary:
            raise UserError(f"engine: a prompt id lies outside vocab_size {vocabulary}: is this the model's tokenizer?")
        if any(not 0 < mark <= len(prompt_ids) for mark in marks):
            raise UserError(f"engine: marks must lie between 1 and the prompt's {len(prompt_ids)} tokens")
        total = len(prompt_ids) + params.max_new_tokens
        if self.longest is not None and total > self.longest:
            raise UserError(
                f"engine: {len(prompt_ids)} prompt tokens and max_new_tokens {params.max_new_tokens} are more than the "
                f"{self.longest} that fit into memory: shorten either, or give the engine more memory"
            )


def _written(writer: Writer, choice: Choice | NoChoice) -> Delta:
    """What a choice adds to an answer; where there was none, the answer ends as an error."""
    if isinstance(choice, NoChoice):
        written = writer.fail(choice.reason)
        return Delta(writer.place, (), (), written.text, written.finish, writer.reason)
    written = writer.accept(choice.token, choice.logprob, choice.top)
    tops = () if writer.params.logprobs is None else (choice.top,)
    return Delta(writer.place, (choice.token,), (choice.logprob,), written.text, written.finish, writer.reason, tops)


def _nowhere(delta: Delta) -> None:
    """The sink of those who look at the whole answer only."""


def _misfits(own: dict[str, Tensor], new: dict[str, Tensor]) -> Iterator[str]:
    for name in new:
        if name not in own:
            yield f"tensor {name} is not one of this model's"
    for name, tensor in own.items():
        if name not in new:
            yield f"tensor {name} is missing"
        elif new[name].shape != tensor.shape:
            yield f"tensor {name} has shape {list(new[name].shape)}, the model wants {list(tensor.shape)}"
        elif not new[name].dtype.is_floating_point:
            yield f"tensor {name} holds {new[name].dtype}, not floats"
