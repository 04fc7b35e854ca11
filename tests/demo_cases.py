"""A demo on tiny recipes, for tests that want a whole run: a few seconds from text to a table. Not a test file."""

from __future__ import annotations

import json
from pathlib import Path

from turbos.data.problems import make_problem

PRETRAIN = """
model: {vocab_size: 304, hidden_size: 32, layers: MFAF, num_heads: 2, num_kv_heads: 1, head_dim: 16, mamba_heads: 4,
        mamba_head_dim: 16, mamba_state: 16, num_experts: 4, expert_size: 32, shared_expert_size: 32}
data: {sources: {TEXTS: 1.0}, held_out_tokens: 256}
train: {steps: 2, tokens_per_step: 256, micro_batch_tokens: 256}
"""
SFT = """
init: none
problems: {families: {gcd/0: 1.0}}
train: {steps: 2, tokens_per_step: 512, micro_batch_tokens: 512}
held_out: 2
"""
RL = """
init: none
problems: {families: {gcd/0: 1.0}}
rollout: {groups: 2, samples: 2, max_new_tokens: 8, max_answer_tokens: 4}
train: {steps: 2}
"""
DEMO = "pretrain: PATH/pretrain.yaml\nsft: PATH/sft.yaml\nrl: PATH/rl.yaml\n"
DEMO += "families: [gcd/0, addition/1]\nnum_problems: 3\n"
DEMO += "max_new_tokens: 8\nsamples: 2\nminutes: {pretrain: 2.0, sft: 1.5}\n"


def write_tiny_demo(directory: Path) -> Path:
    """Write the recipes, whose paths are relative to the directory, and their text; returns the demo's recipe."""
    texts = [make_problem("gcd", seed) for seed in range(120)]
    lines = [json.dumps({"text": f"{p.question}\n{p.answer}\n"}) + "\n" for p in texts]
    (directory / "texts.jsonl").write_text("".join(lines))
    (directory / "pretrain.yaml").write_text(PRETRAIN.replace("TEXTS", "texts.jsonl"))
    (directory / "sft.yaml").write_text(SFT)
    (directory / "rl.yaml").write_text(RL)
    (directory / "demo.yaml").write_text(DEMO.replace("PATH", "."))
    return directory / "demo.yaml"
