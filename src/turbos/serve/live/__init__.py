"""The live page: what a run of `turbos demo` is doing, in a browser, from a process that only reads the run's files.

It reads   plan.json (stages, which of them runs), clock.json, */recipe.yaml, */metrics.jsonl, */eval.json,
           */thinking.json, */samples.json; any of them may be missing, half written or damaged
It gives   GET /live/  the page     GET /live/api/run  all of it as JSON     (`live_router`, `live_app`)

    python -m turbos.serve.live runs/demo --fd 3      # serves on a bound socket until its stdin ends; no torch
"""
