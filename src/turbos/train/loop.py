"""The one training loop that pretraining and SFT share, and what surrounds it: opening, metrics, saving, stopping.

Batches come from a function of the step, so a run resumes from any checkpoint without replaying data. The loop does not
choose data or loss: `train.pretrain` and `train.sft` do. A run directory holds

    recipe.yaml  metrics.jsonl  checkpoints/{latest, step-000050/, ...}  final/

    resumed = open_run(recipe, run_dir)                 # None, or the checkpoint to go on from
    final = train(Run("sft", run_dir, recipe.train, trainer, tokenizer, batch_at), resumed)
"""

from __future__ import annotations

import fcntl
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from turbos.common.config import RECIPE_FILE, dump_recipe, parse_yaml, read_values, save_recipe
from turbos.common.errors import UserError
from turbos.common.metrics import METRICS_FILE, MetricsLog, truncate_after
from turbos.common.records import Batch
from turbos.model.config import ModelConfig
from turbos.model.describe import describe
from turbos.text.tokenizer import Tokenizer
from turbos.train.checkpoint import (
    TrainingState,
    latest_checkpoint,
    remove_leftovers,
    restore_optimizer,
    save_checkpoint,
    save_final,
)
from turbos.train.progress import ProgressLine
from turbos.train.trainer import BatchStats, Trainer

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Evaluate = Callable[[], Mapping[str, float]]


@dataclass(frozen=True)
class TrainConfig:
    """How long and in what portions to train; `threads` None leaves torch's choice, `keep` counts kept checkpoints."""

    steps: int
    tokens_per_step: int = 8192
    micro_batch_tokens: int = 4096
    eval_every: int = 100
    save_every: int = 100
    keep: int = 2
    seed: int = 0
    threads: int | None = None
    tensorboard: bool = False

    def __post_init__(self) -> None:
        counts = (self.steps, self.micro_batch_tokens, self.eval_every, self.save_every, self.keep)
        if min(counts) < 1:
            raise UserError("train: steps, micro_batch_tokens, eval_every, save_every and keep must be at least 1")
        if self.tokens_per_step < self.micro_batch_tokens:
            raise UserError("train: tokens_per_step must be at least micro_batch_tokens")
        require_seed_and_threads(self.seed, self.threads)


def require_seed_and_threads(seed: int, threads: int | None) -> None:
    """Refuse a seed that the random generators cannot take, and a number of threads below 1."""
    if not 0 <= seed < 2**63:
        raise UserError(f"train: seed must be from 0 to 2^63 - 1, not {seed}")
    if threads is not None and threads < 1:
        raise UserError(f"train: threads must be at least 1, or null for torch's choice; not {threads}")


@dataclass(frozen=True)
class Run:
    """What the loop needs: `batch_at(step)` gives a step's micro-batches (steps from 0), `evaluate` figures to log."""

    label: str
    run_dir: Path
    config: TrainConfig
    trainer: Trainer
    tokenizer: Tokenizer
    batch_at: Callable[[int], Sequence[Batch]]
    evaluate: Evaluate = dict


def train(run: Run, resumed: Path | None = None) -> Path:
    """Train from the checkpoint `resumed` (None: from the start) to the last step; returns the path of `final`.

    On Ctrl-C or SIGTERM the running step is finished and saved, then KeyboardInterrupt goes on.
    """
    trainer, config = run.trainer, run.config
    tokens = 0
    if resumed is not None:
        state = restore_optimizer(resumed, trainer.model, trainer.optimizer)
        trainer.step, tokens = state.step, state.tokens
    truncate_after(run.run_dir / METRICS_FILE, trainer.step)
    cost = describe(trainer.model.config)
    with (
        closing(MetricsLog(run.run_dir / METRICS_FILE, config.tensorboard)) as log,
        ProgressLine(run.label, config.steps, trainer.step, cost.active_params) as line,
        stop_requests() as stop,
    ):
        line.note(
            f"{cost.active_params / 1e6:.2f} M active of {cost.total_params / 1e6:.2f} M parameters ({cost.layers}), "
            f"experts by {cost.expert_product}, {config.steps - trainer.step} steps of {config.tokens_per_step} tokens"
        )
        while trainer.step < config.steps:
            started = time.perf_counter()
            lr, batches = trainer.lr, run.batch_at(trainer.step)
            data_seconds = time.perf_counter() - started
            stats = trainer.forward_backward(batches)
            grad_norm = trainer.optim_step()
            seconds = time.perf_counter() - started
            tokens += stats.tokens
            line.update(trainer.step, stats.loss, stats.tokens, seconds)
            figures = step_figures(stats, lr, grad_norm, seconds, data_seconds, line.share_of_machine)
            log.log(trainer.step, figures | {"largest_selection_bias": trainer.largest_selection_bias})
            if _due(trainer.step, config.eval_every, config):
                _evaluate(run, log, line)
            if _due(trainer.step, config.save_every, config) or stop.is_set():
                state = TrainingState(trainer.step, tokens)
                save_checkpoint(run.run_dir, state, trainer.model, run.tokenizer, trainer.optimizer, config.keep)
            if stop.is_set() and trainer.step < config.steps:
                line.note(f"stopped and saved at step {trainer.step}; run the same command again to resume")
                raise KeyboardInterrupt
    final = save_final(run.run_dir, trainer.model, run.tokenizer)
    if stop.is_set():
        # Asked for in the last step: this run is whole, but whoever runs stages in a row must stop too.
        raise KeyboardInterrupt
    return final


def step_figures(
    stats: BatchStats, lr: float, grad_norm: float, seconds: float, data_seconds: float, share: float
) -> dict[str, float]:
    """One line of the metrics: what a step did, in nats per unit of loss weight, tokens, seconds.

    `data_seconds` of the `seconds` it waited for its batches.
    """
    return {
        "loss": stats.loss,
        "grad_norm": grad_norm,
        "lr": lr,
        "tokens": stats.tokens,
        "loss_weight": stats.loss_weight,
        "balance_loss": stats.balance_loss,
        "z_loss": stats.z_loss,
        "load_max_over_mean": stats.load_max_over_mean,
        "seconds": seconds,
        "data_seconds": data_seconds,
        "tokens_per_second": stats.tokens / seconds,
        "share_of_sgemm": share,
        **stats.means,
    }


def open_run(recipe: DataclassInstance, run_dir: Path) -> Path | None:
    """Make or reopen a run: clears leftovers, saves the recipe, returns the checkpoint to resume from, if any.

    A run directory belongs to one recipe: another one is refused, with the keys that differ, unless nothing but the
    recipe lies there yet (a first start that failed).
    """
    if has_begun(run_dir):
        require_same_recipe(recipe, run_dir)
    remove_leftovers(run_dir)
    save_recipe(recipe, run_dir)
    return latest_checkpoint(run_dir)


def has_begun(run_dir: Path) -> bool:
    """Whether a run's directory holds a recipe and anything that was made by it."""
    return (run_dir / RECIPE_FILE).is_file() and any(path.stem != Path(RECIPE_FILE).stem for path in run_dir.iterdir())


def require_same_recipe(recipe: DataclassInstance, run_dir: Path) -> None:
    """Refuse a recipe that is not the one saved in the run's directory; the error names the keys that differ."""
    saved = run_dir / RECIPE_FILE
    old = _flat(read_values(saved))
    new = _flat(parse_yaml(dump_recipe(recipe), "recipe"))
    changed = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
    if changed:
        shown = ", ".join(f"{key} ({old.get(key)} -> {new.get(key)})" for key in changed)
        raise UserError(f"{run_dir} belongs to another recipe, differing in {shown}: choose another run directory")


@contextmanager
def sole_owner(run_dir: Path) -> Iterator[None]:
    """Hold a run's directory (made if missing) against a second process; the system lets go however this one ends."""
    run_dir.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(run_dir, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise UserError(
            f"another process is at work in {run_dir}: wait for it, or choose another run directory"
        ) from None
    try:
        yield
    finally:
        os.close(descriptor)


def final_checkpoint(run_dir: Path) -> Path | None:
    """`run_dir/final` of a run that has ended, None before."""
    final = run_dir / "final"
    return final if final.is_dir() else None


def require_fit(model: ModelConfig, tokenizer: Tokenizer) -> None:
    """Refuse a tokenizer whose vocabulary is not the model's."""
    if tokenizer.vocab_size != model.vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} tokens but the model {model.vocab_size}: "
            f"set model.vocab_size to {tokenizer.vocab_size} or name the tokenizer that belongs to the model"
        )


def _evaluate(run: Run, log: MetricsLog, line: ProgressLine) -> None:
    figures = run.evaluate()
    if figures:
        log.log(run.trainer.step, figures)
        shown = "  ".join(f"{name} {value:.4f}" for name, value in figures.items())
        line.note(f"step {run.trainer.step}: {shown}")


def _due(step: int, every: int, config: TrainConfig) -> bool:
    return step % every == 0 or step == config.steps


@contextmanager
def stop_requests() -> Iterator[threading.Event]:
    """An event set by the first Ctrl-C or SIGTERM; the second one acts at once, as usual."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def request(number: int, frame: FrameType | None) -> None:
        stop.set()
        restore()
        # Not through the console: the signal may have come in the middle of one of its writes.
        os.write(2, b"\nstopping after this step (again: at once, without saving)\n")

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    for number in before:
        signal.signal(number, request)
    try:
        yield stop
    finally:
        restore()


def _flat(values: object, prefix: str = "") -> dict[str, object]:
    if not isinstance(values, Mapping):
        return {prefix: values}
    flat: dict[str, object] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}.{key}" if prefix else str(key))
    return flat
