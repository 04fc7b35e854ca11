"""Options that `turbos generate` and `turbos chat` share, read into the engine's own records.

A value that cannot be honoured is refused before a checkpoint is loaded. What the options do is the engine's matter.

>>> read_bytes("4GiB"), read_bytes("1.5 MB"), read_bytes("4096")
(4294967296, 1500000, 4096)
>>> read_think("64").mode, read_think("0")
(Thinking(mode='budget', budget=64), ThinkOption(mode=Thinking(mode='off', budget=None), budget=0))
"""

from __future__ import annotations

import argparse
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from turbos.common.errors import UserError
from turbos.text.thinking import Thinking

if TYPE_CHECKING:
    from turbos.engine.config import EngineConfig
    from turbos.engine.sampling_params import Grammar, SamplingParams

UNITS = {"": 1, "b": 1} | {
    f"{letter}{unit}": base ** (power + 1)
    for power, letter in enumerate("kmgt")
    for unit, base in (("b", 1000), ("ib", 1024))
}
"""Bytes of each unit of memory, in small letters."""

MOST_DIGITS = 9
"""Of a number of tokens: no budget needs more."""


@dataclass(frozen=True)
class ThinkOption:
    """How a prompt leaves the thinking, and the most tokens of it that the sampler allows (None: any number)."""

    mode: Thinking
    budget: int | None

    def __str__(self) -> str:
        return self.mode.mode if self.budget is None else str(self.budget)


def add_engine_options(parser: argparse.ArgumentParser, snapshot_every: int = 2048) -> None:
    """Declare how the model is run; `snapshot_every` is the default."""
    group = parser.add_argument_group("engine")
    group.add_argument(
        "--precision", default="auto", metavar="auto|own|fp32|bf16|int8", help="of the weights (auto: int8 on the CPU)"
    )
    group.add_argument(
        "--memory", metavar="SIZE", help="for weights, states and keys, such as 4GiB (default: 70%% of what is free)"
    )
    group.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: torch's choice)")
    group.add_argument("--device", metavar="cpu|cuda", help="where the model runs (default: the CPU)")
    group.add_argument(
        "--snapshot-every",
        type=int,
        default=snapshot_every,
        metavar="N",
        help=f"keep a state every N tokens of a prompt, to go on from (default {snapshot_every})",
    )
    group.add_argument(
        "--path",
        default="auto",
        metavar="auto|fused|graphs|torch",
        help="which decoding step (auto: the fused one, CUDA graphs on a CUDA device; torch: neither)",
    )
    loudness = group.add_mutually_exclusive_group()
    loudness.add_argument("--quiet", action="store_true", help="say nothing of the engine and of speed")
    loudness.add_argument("--verbose", action="store_true", help="say it also where stderr is no terminal")


def add_sampling_options(parser: argparse.ArgumentParser, max_new_tokens: int) -> None:
    """Declare how tokens are chosen; `max_new_tokens` is the default."""
    group = parser.add_argument_group("sampling")
    group.add_argument("--temperature", type=float, default=0.0, help="0 (default) takes the likeliest token")
    group.add_argument(
        "--top-p", type=float, default=1.0, metavar="P", help="the likeliest tokens of so much probability"
    )
    group.add_argument("--top-k", type=int, default=0, metavar="K", help="the K likeliest tokens (0: all)")
    group.add_argument(
        "--min-p", type=float, default=0.0, metavar="P", help="tokens of this share of the best's probability"
    )
    group.add_argument(
        "--repetition-penalty", type=float, default=1.0, metavar="R", help="above 1 avoids what was said"
    )
    group.add_argument("--seed", type=int, default=0, help="noise at temperature > 0")
    group.add_argument(
        "--max-new-tokens",
        type=int,
        default=max_new_tokens,
        metavar="N",
        help=f"at most so many (default {max_new_tokens})",
    )


def engine_config(args: argparse.Namespace, max_running: int) -> EngineConfig:
    """The engine's options; at most `max_running` answers are written at once. UserError for impossible ones."""
    from turbos.engine.config import EngineConfig

    return EngineConfig(
        memory=None if args.memory is None else read_bytes(args.memory),
        max_running=max_running,
        precision=args.precision,
        path=args.path,
        threads=args.threads,
        device=args.device,
        snapshot_every=args.snapshot_every,
    )


def sampling_params(
    args: argparse.Namespace,
    budget: int | None,
    *,
    n: int = 1,
    stop: tuple[str, ...] = (),
    grammar: Grammar | None = None,
) -> SamplingParams:
    """The sampling's options; `budget` tokens of thinking. UserError, naming the field, for impossible ones."""
    from turbos.engine.sampling_params import SamplingParams

    return SamplingParams(
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        min_p=args.min_p,
        repetition_penalty=args.repetition_penalty,
        seed=args.seed,
        n=n,
        stop=stop,
        grammar=grammar,
        thinking_budget=budget,
    )


def read_grammar(schema: Path | None, regex: str | None) -> Grammar | None:
    """The grammar that `--json-schema FILE` or `--regex TEXT` ask for; UserError where the file cannot be read."""
    from turbos.engine.sampling_params import Grammar

    if schema is None:
        return None if regex is None else Grammar("regex", regex)
    try:
        return Grammar("json_schema", schema.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--json-schema {schema}: cannot be read ({error})") from error


def read_think(text: str) -> ThinkOption:
    """What `auto`, `on`, `off` or a number of tokens asks for; UserError for anything else."""
    if text in ("auto", "on", "off"):
        return ThinkOption(Thinking.parse(text), None)
    if not (text.isascii() and text.isdecimal() and len(text) <= MOST_DIGITS):
        raise UserError(f"--think must be auto, on, off or a number of tokens, not {text!r}")
    budget = int(text)
    return ThinkOption(Thinking("budget", budget) if budget else Thinking("off"), budget)


def read_bytes(text: str) -> int:
    """Bytes of a size with a unit (kB, MB, GB, TB, KiB, MiB, GiB, TiB) or without; UserError for anything else."""
    found = re.fullmatch(r"(\d{1,15}(?:\.\d{1,15})?)\s*([A-Za-z]*)", text.strip(), re.ASCII)
    if found is None or found[2].lower() not in UNITS:
        raise UserError(f"{text!r} is no size of memory: write a number and a unit, such as 4GiB or 512MB")
    return int(float(found[1]) * UNITS[found[2].lower()])


def is_talkative(args: argparse.Namespace) -> bool:
    """Whether to say on stderr what the engine does: asked for, or unasked where somebody watches."""
    return args.verbose or (sys.stderr.isatty() and not args.quiet)
