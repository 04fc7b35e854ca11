"""What the engine counts: a prompt's look among kept states, and what came of it, once, whatever happens to answers."""

from __future__ import annotations

from test_engine import engine_of, prompts_of, tight_engine
from turbos.engine.sampling_params import SamplingParams


def plain(count: int, **options: object) -> SamplingParams:
    return SamplingParams(max_new_tokens=count, stop_ids=frozenset(), **options)  # type: ignore[arg-type]


def test_what_siblings_share_is_taken_once() -> None:
    engine = engine_of(path="torch")
    (prompt,) = prompts_of(engine.model, [90])
    engine.generate([prompt], plain(2))
    assert engine.metrics().cached_tokens == 0
    answers = engine.generate([prompt, prompt], plain(3, n=4, temperature=1.0))
    metrics = engine.metrics()
    assert [one.cached_tokens for one in answers] == [90] * 8
    assert (metrics.cached_tokens, metrics.cache.hits, metrics.cache.hit_tokens) == (90, 1, 90)
    engine.generate([prompt], plain(2))
    assert engine.metrics().cached_tokens == 180, "a later request is another prompt"


def test_siblings_of_a_prompt_that_was_read_have_taken_nothing() -> None:
    engine = engine_of(path="torch")
    engine.generate(prompts_of(engine.model, [90]), plain(3, n=4, temperature=1.0))
    metrics = engine.metrics()
    assert (metrics.cached_tokens, metrics.read_tokens, metrics.cache.hits, metrics.cache.misses) == (0, 90, 0, 1)


def test_waiting_and_stepping_back_count_nothing_again() -> None:
    """Preempted answers begin again from the state of their prompt, which is no other prompt's luck."""
    engine = tight_engine("MFAFMD", 5, 9, path="torch")
    prompts = prompts_of(engine.model, [62, 61, 60, 58, 70, 50])
    answers = engine.generate(prompts, plain(70))
    metrics = engine.metrics()
    assert metrics.preemptions > 0 and metrics.replayed_tokens > 0
    assert metrics.cache.hits + metrics.cache.misses == len(prompts)
    assert metrics.cached_tokens == metrics.cache.hit_tokens == 0
    assert any(one.cached_tokens for one in answers) or metrics.read_tokens > sum(map(len, prompts))
    engine.generate(prompts, plain(1))
    metrics = engine.metrics()
    assert metrics.cache.hits + metrics.cache.misses == 2 * len(prompts)
    assert metrics.cached_tokens == metrics.cache.hit_tokens
