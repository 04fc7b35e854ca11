"""llama.cpp through the xllamacpp wheel, for tests: one model file, everything in fp32 that llama.cpp lets be.

Not a test file. Its server ends the process where a model cannot run, so only files that should run are given to it.

    server = LlamaServer(path)
    server.tokenize("text"), server.greedy([1, 2, 3], steps=8)
"""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import xllamacpp


class LlamaServer:
    """llama-server with a model file."""

    def __init__(self, path: Path, context: int = 512) -> None:
        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx, params.n_parallel, params.warmup, params.verbosity = context, 1, False, -1
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        # Flash attention rounds to half precision inside, whatever the cache holds.
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self._server = xllamacpp.Server(params)

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """The JSON answer to a request."""
        data = json.dumps(body).encode()
        address = self._server.listening_address + path
        request = urllib.request.Request(address, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)

    def tokenize(self, text: str) -> list[int]:
        """Ids of free text."""
        ids: list[int] = self.post("/tokenize", {"content": text, "add_special": False, "parse_special": False})[
            "tokens"
        ]
        return ids

    def greedy(self, prompt: Sequence[int], steps: int) -> list[int]:
        """Greedy tokens up to an end of text, which is included."""
        asked = {"prompt": list(prompt), "n_predict": steps, "temperature": 0.0, "cache_prompt": False}
        tokens: list[int] = self.post("/completion", {**asked, "return_tokens": True})["tokens"]
        return tokens

    def likeliest(self, prompt: Sequence[int], count: int) -> dict[int, float]:
        """Log-probabilities of the `count` likeliest next tokens."""
        asked = {"prompt": list(prompt), "n_predict": 1, "temperature": 0.0, "cache_prompt": False}
        answer = self.post("/completion", {**asked, "n_probs": count, "ignore_eos": True})
        return {rank["id"]: rank["logprob"] for rank in answer["completion_probabilities"][0]["top_logprobs"]}
