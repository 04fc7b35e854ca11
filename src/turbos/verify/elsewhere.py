"""One run of another program on a checkpoint: greedy continuations of prompts, and the likeliest next tokens.

It is a process of its own, because such a program may end the process that it lives in:

    python -m turbos.verify.elsewhere llama.cpp model.gguf asked.json told.json
    python -m turbos.verify.elsewhere vllm checkpoint-directory asked.json told.json

`asked.json` is `{"prompts": [[id, ...], ...], "steps": n}`. `told.json` has for each prompt
`{"tokens": [id, ...], "likeliest": [[id, log-probability], ...]}`: the continuation, and candidates for its first
token.
"""

from __future__ import annotations

import json
import sys
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

LIKELIEST = 8
"""Candidates whose log-probabilities are compared."""


@dataclass(frozen=True)
class Told:
    """What a program says after one prompt."""

    tokens: list[int]
    likeliest: list[tuple[int, float]]


def by_llama_cpp(path: str, prompts: Sequence[Sequence[int]], steps: int) -> list[Told]:
    """llama.cpp through the xllamacpp wheel, everything in fp32 that it lets be."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = path
    params.n_ctx = max(map(len, prompts)) + steps + 8
    params.n_parallel, params.warmup, params.verbosity = 1, False, 1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = xllamacpp.Server(params)

    def ask(prompt: Sequence[int], options: dict[str, Any]) -> Any:
        asked = {"prompt": list(prompt), "temperature": 0.0, "cache_prompt": False, **options}
        request = urllib.request.Request(
            server.listening_address + "/completion", json.dumps(asked).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)

    told = []
    for prompt in prompts:
        # Probabilities come where a character ends, and none with an end of text: one token is asked for by itself.
        first = ask(prompt, {"n_predict": 1, "n_probs": LIKELIEST, "ignore_eos": True})
        ranks = first["completion_probabilities"][0]["top_logprobs"]
        tokens = ask(prompt, {"n_predict": steps, "return_tokens": True})["tokens"]
        told.append(Told(tokens, [(rank["id"], rank["logprob"]) for rank in ranks]))
    return told


def by_vllm(path: str, prompts: Sequence[Sequence[int]], steps: int) -> list[Told]:
    """vLLM, fp32, without compiled graphs."""
    import vllm

    longest = max(map(len, prompts)) + steps
    model = vllm.LLM(model=path, dtype="float32", enforce_eager=True, max_model_len=longest, skip_tokenizer_init=True)
    greedy = vllm.SamplingParams(temperature=0.0, max_tokens=steps, logprobs=LIKELIEST, detokenize=False)
    answers = model.generate([{"prompt_token_ids": list(prompt)} for prompt in prompts], greedy)
    told = []
    for answer in answers:
        output = answer.outputs[0]
        first = [(token, rank.logprob) for token, rank in output.logprobs[0].items()]
        told.append(Told(list(output.token_ids), first))
    return told


PROGRAMS: dict[str, Callable[[str, Sequence[Sequence[int]], int], list[Told]]] = {
    "llama.cpp": by_llama_cpp,
    "vllm": by_vllm,
}
MODULES = {"llama.cpp": "xllamacpp", "vllm": "vllm"}
"""The Python package that each program comes with."""


def main(program: str, path: str, asked: str, told: str) -> None:
    """Run one program and write what it told."""
    question = json.loads(Path(asked).read_text(encoding="utf-8"))
    answer = PROGRAMS[program](path, question["prompts"], question["steps"])
    Path(told).write_text(json.dumps([asdict(one) for one in answer]), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
