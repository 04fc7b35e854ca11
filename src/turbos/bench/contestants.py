"""Programs that read a prompt and decode from the same weights, behind one face: ours, transformers, llama.cpp, vLLM.

Ours and transformers' run in this process, the others in one of their own (`peer_worker`), which lives through the
whole benchmark and does nothing between its turns. Each says itself how many seconds its work took.
"""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from turbos.bench.peers import seconds_of
from turbos.bench.prefill import our_prefill, their_prefill
from turbos.common.errors import UserError
from turbos.model.generate import stream
from turbos.model.lm import LanguageModel

WORKER = Path(__file__).with_name("peer_worker.py")
PATIENCE = 1800.0
"""Seconds after which a program that gives no answer has failed."""


class Contestant(Protocol):
    """What is measured of a program."""

    name: str

    def prefill(self, tokens: Sequence[int]) -> float:
        """Seconds to read a prompt into a fresh cache, up to the next token's logits."""
        ...

    def decode(self, tokens: Sequence[int], steps: int) -> float:
        """Seconds for `steps` greedy tokens, one by one, after a prompt; reading it is not counted."""
        ...

    def likeliest(self, tokens: Sequence[int], count: int) -> Mapping[int, float]:
        """Log-probabilities of the `count` likeliest tokens after a prompt, or of none where a program does not say."""
        ...


class Ours:
    """Our model as `generate` runs it."""

    name = "turbos"

    def __init__(self, model: LanguageModel) -> None:
        self._model = model

    def prefill(self, tokens: Sequence[int]) -> float:
        """In segments, into a state allocated for it."""
        return seconds_of(lambda: our_prefill(self._model, list(tokens)))

    def decode(self, tokens: Sequence[int], steps: int) -> float:
        """From the first token, which the prompt's pass gives, to the last."""
        sampled = stream(self._model, tokens, steps + 1)
        next(sampled)
        return seconds_of(lambda: list(sampled))

    def likeliest(self, tokens: Sequence[int], count: int) -> Mapping[int, float]:
        """From the logits after the prompt."""
        return top_logprobs(our_prefill(self._model, list(tokens)), count)


class Transformers:
    """transformers' own model and cache, without the overhead of its `generate`."""

    name = "transformers"

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def prefill(self, tokens: Sequence[int]) -> float:
        """The whole prompt in one call."""
        return seconds_of(lambda: their_prefill(self._model, list(tokens)))

    @torch.inference_mode()
    def decode(self, tokens: Sequence[int], steps: int) -> float:
        """One call for each token, the cache passed on."""
        output = self._model(input_ids=torch.tensor([tokens]), use_cache=True, logits_to_keep=1)

        def go_on() -> None:
            last = output
            for _ in range(steps):
                chosen = last.logits[:, -1].argmax(-1, keepdim=True)
                last = self._model(input_ids=chosen, past_key_values=last.past_key_values, use_cache=True)

        return seconds_of(go_on)

    def likeliest(self, tokens: Sequence[int], count: int) -> Mapping[int, float]:
        """From the logits after the prompt."""
        return top_logprobs(their_prefill(self._model, list(tokens)), count)


class Worker:
    """A program in a process of its own; use it in a `with` block, which ends the process."""

    def __init__(
        self, name: str, program: str, python: Path, path: Path, threads: int, context: int, requests: int = 1
    ) -> None:
        """Start it and wait until its weights are loaded; UserError where that fails.

        `context` tokens for each of `requests` that `decode` runs at once.
        """
        self.name = name
        self._complaints = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the process)
        self._process = subprocess.Popen(
            [str(python), "-I", str(WORKER), program, str(path), str(threads), str(context), str(requests)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._complaints,
            env=worker_environment(threads),
        )
        try:
            self._answer()
        except UserError:
            self.__exit__()
            raise

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        # It may have gone already, with a question unread.
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._complaints.close()

    def prefill(self, tokens: Sequence[int]) -> float:
        """As `peer_worker` measures it."""
        return float(self._ask("prefill", tokens, 0))

    def decode(self, tokens: Sequence[int], steps: int) -> float:
        """As `peer_worker` measures it."""
        return float(self._ask("decode", tokens, steps))

    def likeliest(self, tokens: Sequence[int], count: int) -> Mapping[int, float]:
        """As the program tells."""
        return {int(token): logprob for token, logprob in self._ask("likeliest", tokens, count).items()}

    def _ask(self, work: str, tokens: Sequence[int], number: int) -> Any:
        assert self._process.stdin is not None
        question = json.dumps({"work": work, "tokens": list(tokens), "number": number})
        with suppress(BrokenPipeError):  # its last words say more
            self._process.stdin.write(question.encode() + b"\n")
            self._process.stdin.flush()
        return self._answer()["answer"]

    def _answer(self) -> Any:
        """The next line that the process writes; UserError with its last words where none comes."""
        assert self._process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            line = self._process.stdout.readline() if selector.select(PATIENCE) else b""
        if line:
            return json.loads(line)
        self._complaints.seek(0)
        lines = self._complaints.read().decode(errors="replace").strip().splitlines() or ["it gave no reason"]
        # llama.cpp's first error says more than the end of a traceback.
        complaint = next((line for line in lines if " E " in line), lines[-1])
        raise UserError(f"bench: {self.name} gives no answer: {complaint}")


class LlamaBench:
    """A llama-bench program, started anew for each measurement; it reads random tokens of its own."""

    name = "llama.cpp"

    def __init__(self, program: Path, path: Path, threads: int) -> None:
        self._words = [str(program), "-m", str(path), "-t", str(threads), "-r", "1", "-o", "json"]
        self._words += ["-ctk", "f32", "-ctv", "f32"]

    def prefill(self, tokens: Sequence[int]) -> float:
        """A prompt of the same length."""
        return self._measure("-p", len(tokens), "-n", 0)

    def decode(self, tokens: Sequence[int], steps: int) -> float:
        """After a prompt of the same length."""
        return self._measure("-p", 0, "-n", steps, "-d", len(tokens))

    def likeliest(self, tokens: Sequence[int], count: int) -> Mapping[int, float]:
        """It does not say."""
        return {}

    def _measure(self, *options: str | int) -> float:
        words = [*self._words, *map(str, options)]
        run = subprocess.run(words, capture_output=True, text=True, errors="replace", timeout=PATIENCE, check=False)
        try:
            return float(json.loads(run.stdout)[0]["samples_ns"][0]) / 1e9
        except (ValueError, LookupError, TypeError) as error:
            lines = run.stderr.strip().splitlines() or [repr(error)]
            raise UserError(f"bench: {words[0]} measured nothing (code {run.returncode}): {lines[-1]}") from error


def worker_environment(threads: int) -> Mapping[str, str]:
    """This process's environment, with what vLLM needs to keep to so many threads and off the network."""
    return {
        **os.environ,
        **{"OMP_NUM_THREADS": str(threads), "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_KVCACHE_SPACE": "1"},
        **{"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"},
    }


def top_logprobs(logits_V: Tensor, count: int) -> Mapping[int, float]:
    """The likeliest tokens and their log-probabilities."""
    top = torch.log_softmax(logits_V, -1).topk(count)
    return dict(zip(top.indices.tolist(), top.values.tolist(), strict=True))
