"""llama.cpp or vLLM in a process of its own, answering one line of JSON for each that it reads.

It imports nothing of this project and runs by its path, because vLLM lives in an environment of its own:

    python peer_worker.py llama.cpp model.gguf THREADS CONTEXT REQUESTS
    python peer_worker.py vllm checkpoint-directory THREADS CONTEXT 1

    -> {"ready": true}
    <- {"work": "prefill", "tokens": [5, 17, ...], "number": 0}     # seconds to read a prompt into a fresh cache
    <- {"work": "decode", "tokens": [5, 17, ...], "number": 64}     # seconds for 64 greedy tokens after it, for each
                                                                    # of REQUESTS at once (vLLM: one)
    <- {"work": "likeliest", "tokens": [5, 17, ...], "number": 20}  # log-probabilities of 20 next tokens
    -> {"answer": 0.123}
"""

from __future__ import annotations

import json
import os
import sys
import time
import urllib.request
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any


class LlamaCpp:
    """llama-server of the xllamacpp wheel; weights and cache are fp32, everything else as it comes."""

    def __init__(self, path: str, threads: int, context: int, requests: int) -> None:
        import xllamacpp

        self._requests = requests
        params = xllamacpp.CommonParams()
        params.model.path = path
        params.n_ctx, params.n_parallel = context * requests, requests
        params.warmup, params.verbosity = True, 1
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        # No copies of the state aside: they serve later requests, and would be charged to this one.
        params.n_ctx_checkpoints, params.cache_ram_mib = 0, 0
        self._server = xllamacpp.Server(params)

    def _complete(self, tokens: Sequence[int], count: int, candidates: int = 0) -> Any:
        asked = {"prompt": tokens, "n_predict": count, "n_probs": candidates, "temperature": 0.0}
        data = json.dumps({**asked, "ignore_eos": True, "cache_prompt": False}).encode()
        address = self._server.listening_address + "/completion"
        request = urllib.request.Request(address, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)

    def prefill(self, tokens: Sequence[int], number: int) -> float:
        """Its own clock, without HTTP."""
        return float(self._complete(tokens, 1)["timings"]["prompt_ms"]) / 1000

    def decode(self, tokens: Sequence[int], number: int) -> float:
        """Its clock starts with the first token, which the prompt's pass has given.

        Of several requests the last to start counts: the clocks of the others run while its prompt is read.
        """
        prompts = [[*tokens[place:], *tokens[:place]] for place in range(self._requests)]
        with ThreadPoolExecutor(self._requests) as together:
            answers = list(together.map(lambda prompt: self._complete(prompt, number + 1), prompts))
        return min(float(answer["timings"]["predicted_ms"]) for answer in answers) / 1000

    def likeliest(self, tokens: Sequence[int], number: int) -> Mapping[int, float]:
        """From the logits as they are, before any sampler."""
        ranks = self._complete(tokens, 1, number)["completion_probabilities"][0]["top_logprobs"]
        return {rank["id"]: rank["logprob"] for rank in ranks}


class Vllm:
    """vLLM's offline engine, fp32, one request at a time."""

    def __init__(self, path: str, threads: int, context: int, requests: int) -> None:
        import torch
        import vllm

        torch.set_num_threads(threads)
        self._vllm = vllm
        self._model = vllm.LLM(
            model=path,
            dtype="float32",
            max_model_len=context,
            max_num_seqs=1,
            skip_tokenizer_init=True,
            enable_prefix_caching=False,
        )

    def _generate(self, tokens: Sequence[int], count: int, candidates: int | None = None) -> Any:
        greedy = self._vllm.SamplingParams(
            temperature=0.0, max_tokens=count, ignore_eos=True, logprobs=candidates, detokenize=False
        )
        return self._model.generate([{"prompt_token_ids": list(tokens)}], greedy, use_tqdm=False)[0].outputs[0]

    def prefill(self, tokens: Sequence[int], number: int) -> float:
        """A request for one token."""
        start = time.perf_counter()
        self._generate(tokens, 1)
        return time.perf_counter() - start

    def decode(self, tokens: Sequence[int], number: int) -> float:
        """What a longer request takes beyond a request for one token."""
        start = time.perf_counter()
        self._generate(tokens, number + 1)
        return time.perf_counter() - start - self.prefill(tokens, 0)

    def likeliest(self, tokens: Sequence[int], number: int) -> Mapping[int, float]:
        """Log-probabilities as vLLM gives them."""
        return {token: rank.logprob for token, rank in self._generate(tokens, 1, number).logprobs[0].items()}


PROGRAMS: dict[str, type[LlamaCpp] | type[Vllm]] = {"llama.cpp": LlamaCpp, "vllm": Vllm}


def main(program: str, path: str, threads: str, context: str, requests: str) -> None:
    """Answer until there is no more to read; what the program prints goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    peer = PROGRAMS[program](path, int(threads), int(context), int(requests))
    works = {"prefill": peer.prefill, "decode": peer.decode, "likeliest": peer.likeliest}
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        answer = works[asked["work"]](asked["tokens"], asked["number"])
        print(json.dumps({"answer": answer}), file=answers, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
