"""The engine for asyncio: a thread of its own drives the steps, each request is an asynchronous stream of deltas.

    async with AsyncEngine(engine) as running:
        async for delta in running.stream(prompt_ids, SamplingParams()):
            print(delta.text, end="")

Leaving the loop early, cancelling the task, or closing the event loop cancels the request. An error of the model ends
every open stream with that error; the engine is closed then. It is not a queue with limits: how many requests may wait
is for whoever opens the streams to decide.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import TracebackType

from torch import Tensor

from turbos.common.errors import UserError
from turbos.engine.engine import Engine
from turbos.engine.sampling_params import GREEDY, SamplingParams
from turbos.engine.sequence import Delta
from turbos.engine.sequence import Sequence as Answer


class AsyncEngine:
    """Drives an engine from a thread for as long as it is open; streams may be opened from any event loop."""

    def __init__(self, engine: Engine) -> None:
        """Nothing runs until `start` or `async with`."""
        self.engine = engine
        self._wake = threading.Event()
        self._closing = False
        self._thread: threading.Thread | None = None
        # Guards all below: a stream that opens as the last step ends is either told of it or sees it.
        self._lock = threading.Lock()
        self._ended = False
        self._failure: BaseException | None = None
        self._failure_is_known = False
        self._streams: set[Stream] = set()
        self._loads: deque[_Load] = deque()

    def start(self) -> AsyncEngine:
        """Begin to drive; returns itself. UserError where it was closed."""
        with self._lock:
            if self._closing:
                raise _closed()
            if self._thread is None:
                self._thread = threading.Thread(target=self._drive, name="turbos-engine", daemon=True)
                self._thread.start()
        return self

    def close(self) -> None:
        """Stop after the present step; open streams end as cancelled. Raises a failure that no stream has heard of."""
        with self._lock:
            self._closing = True
        self._wake.set()
        if self._thread is not None:
            self._thread.join()
        with self._lock:
            unheard = self._failure is not None and not self._failure_is_known
            self._failure_is_known = True
        if unheard:
            raise _failed() from self._failure

    async def __aenter__(self) -> AsyncEngine:
        return self.start()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await asyncio.to_thread(self.close)

    async def stream(
        self, prompt: Sequence[int], params: SamplingParams = GREEDY, *, marks: Collection[int] = ()
    ) -> AsyncIterator[Delta]:
        """The deltas of a request, of all its `n` answers as they come; UserError for what cannot be."""
        with self.open(prompt, params, marks=marks) as stream:
            unfinished = len(stream.answers)
            while unfinished:
                for delta in await stream.get_all():
                    unfinished -= delta.finish is not None
                    yield delta

    @contextmanager
    def open(
        self, prompt: Sequence[int], params: SamplingParams = GREEDY, *, marks: Collection[int] = ()
    ) -> Iterator[Stream]:
        """A request whose deltas are taken as many at a time as there are, and whose answers can be ended singly.

        Leaving the context cancels what has not ended. Within a coroutine; UserError for what cannot be.
        """
        self._check_running()
        stream = Stream(asyncio.get_running_loop(), self.engine.cancel)
        stream.answers = self.engine.submit(prompt, params, marks=marks, sink=stream.put)
        try:
            with self._lock:
                self._streams.add(stream)
            # It may have ended since it was asked.
            self._check_running()
            self._wake.set()
            yield stream
        finally:
            with self._lock:
                self._streams.discard(stream)
            stream.cancel()
            self._wake.set()

    @property
    def failed(self) -> bool:
        """Whether the model has raised an error: nothing is answered any more."""
        with self._lock:
            return self._failure is not None

    async def load_weights(self, named: Iterable[tuple[str, Tensor]], version: int) -> None:
        """`Engine.load_weights` between two steps; nothing else runs meanwhile but the answers that it waits for.

        The event loop runs on, where `Engine.load_weights` itself would hold it up.
        """
        load = _Load(dict(named), version)
        with self._lock:
            self._loads.append(load)
        self._check_running()
        self._wake.set()
        await asyncio.wrap_future(load.done)

    def _check_running(self) -> None:
        with self._lock:
            if self._failure is not None:
                self._failure_is_known = True
                raise _failed() from self._failure
            if self._closing or self._ended:
                raise _closed()
            if self._thread is None:
                raise UserError("engine: it is not running; open it with 'async with' or start()")

    # In the thread

    def _drive(self) -> None:
        failure = None
        try:
            while not self._closing:
                self._wake.clear()
                self._load()
                self._forget_closed_loops()
                if not self.engine.step():
                    self._wake.wait()
        # Whatever it is, it belongs to those who wait for their answers.
        except BaseException as error:
            failure = error
        with self._lock:
            self._ended, self._failure = True, failure
            streams, loads = list(self._streams), list(self._loads)
            self._failure_is_known = failure is not None and bool(streams or loads)
        for load in loads:
            load.refuse(_closed() if failure is None else failure)
        for stream in streams:
            if failure is None:
                stream.cancel()
            else:
                stream.fail(failure)

    def _load(self) -> None:
        while self._loads:
            self._loads.popleft().run(self.engine)

    def _forget_closed_loops(self) -> None:
        """Cancel streams whose event loop was closed under them: nobody else will."""
        with self._lock:
            gone = [stream for stream in self._streams if stream.loop.is_closed()]
            self._streams.difference_update(gone)
        for stream in gone:
            stream.cancel()


def _failed() -> RuntimeError:
    return RuntimeError("the engine has failed")


def _closed() -> UserError:
    return UserError("engine: it was closed; a closed one does not start again, make another AsyncEngine")


@dataclass(eq=False)
class _Load:
    """New weights on their way to the engine's thread."""

    named: dict[str, Tensor]
    version: int
    done: Future[None] = field(default_factory=Future)

    def run(self, engine: Engine) -> None:
        if not self.done.set_running_or_notify_cancel():
            return
        try:
            engine.load_weights(self.named.items(), self.version)
        # Weights that do not fit are the mistake of who gave them; the engine goes on with the old ones.
        except UserError as error:
            self.done.set_exception(error)
        except BaseException as error:
            self.done.set_exception(error)
            raise
        else:
            self.done.set_result(None)

    def refuse(self, error: BaseException) -> None:
        if self.done.set_running_or_notify_cancel():
            self.done.set_exception(error)


@dataclass(eq=False)
class Stream:
    """Deltas on their way from the engine's thread to an event loop."""

    loop: asyncio.AbstractEventLoop
    end: Callable[[Answer], None]
    answers: list[Answer] = field(default_factory=list)
    queue: asyncio.Queue[Delta | BaseException] = field(default_factory=asyncio.Queue)

    def put(self, delta: Delta) -> None:
        """Add a delta, from any thread."""
        self._send(delta)

    def fail(self, error: BaseException) -> None:
        """Let the reader hear of an error, from any thread."""
        self._send(error)

    def cancel(self, index: int | None = None) -> None:
        """End one answer, or all."""
        for answer in self.answers if index is None else self.answers[index : index + 1]:
            if answer.finish is None:
                self.end(answer)

    def _send(self, item: Delta | BaseException) -> None:
        try:
            self.loop.call_soon_threadsafe(self.queue.put_nowait, item)
        # The loop may close at any moment; it has nobody left to tell then (`_forget_closed_loops` cancels).
        except RuntimeError:
            if not self.loop.is_closed():
                raise

    async def get_all(self) -> list[Delta]:
        """The deltas that are there, at least one: a reader that was late gets several at once."""
        items = [await self.queue.get()]
        while not self.queue.empty():
            items.append(self.queue.get_nowait())
        deltas = []
        for item in items:
            if isinstance(item, BaseException):
                raise _failed() from item
            deltas.append(item)
        return deltas
