"""llama-server of the xllamacpp wheel in a process of its own, for `turbos bench serve`.

It imports nothing of this project and runs by its path. Everything is as llama-server comes, but for the number of
slots, the threads, and bounds on memory.

    python serve_peer.py model.gguf THREADS SLOTS TOKENS_OF_A_SLOT DIRECTORY_FOR_STATES

    -> {"address": "http://127.0.0.1:34567"}

It ends when there is no more to read.
"""

from __future__ import annotations

import json
import os
import sys

CACHE_MIB = 1024
"""For the states of prompts that no slot holds any more; llama-server's own default is 8 GiB."""


def main(path: str, threads: str, slots: str, context: str, states: str) -> None:
    """Serve until there is no more to read; what the program prints goes to stderr."""
    import xllamacpp

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    params = xllamacpp.CommonParams()
    params.model.path = path
    params.n_ctx, params.n_parallel = int(context) * int(slots), int(slots)
    params.warmup, params.verbosity = True, 1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = int(threads)
    params.n_threads_http = int(slots) + 4
    params.cache_ram_mib = CACHE_MIB
    params.slot_save_path = states
    params.endpoint_slots = True
    server = xllamacpp.Server(params)
    print(json.dumps({"address": server.listening_address}), file=answers, flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main(*sys.argv[1:])
