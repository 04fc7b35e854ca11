"""The generation loop: the same tokens alone, in a batch and streamed; seeds, stop ids, limits and log-probabilities.

Models are float64, so that a near tie cannot flip between batch shapes; one test repeats it in fp32.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch

from model_cases import VARIANTS, VOCABULARY, logits_of, random_tokens, tiny_model
from turbos.common.errors import UserError
from turbos.common.records import Completion
from turbos.model.generate import generate, stream
from turbos.model.lm import LanguageModel

PROMPT_LENGTHS = (5, 1, 33, 12, 5, 2, 20)
NEW = 12


@cache
def model_of(variant: str = "plain") -> LanguageModel:
    """A float64 model."""
    return tiny_model(dtype=torch.float64, **VARIANTS[variant])


def prompts() -> list[list[int]]:
    """Prompts of unlike lengths."""
    return [random_tokens(length, seed=number).tolist() for number, length in enumerate(PROMPT_LENGTHS)]


def ids_of(completions: list[Completion]) -> list[tuple[int, ...]]:
    """What was written after each prompt."""
    return [completion.ids for completion in completions]


@pytest.mark.parametrize("temperature", [0.0, 1.0, 0.4])
@pytest.mark.parametrize("variant", VARIANTS)
def test_batch_is_single_is_stream(variant: str, temperature: float) -> None:
    model, seeds = model_of(variant), [11, 7, 7, 0, 5, -3, 1 << 40]
    batch = generate(model, prompts(), NEW, temperature=temperature, seeds=seeds)
    for prompt, seed, completion in zip(prompts(), seeds, batch, strict=True):
        (single,) = generate(model, [prompt], NEW, temperature=temperature, seeds=[seed])
        assert single.ids == completion.ids and single.finish == completion.finish == "length"
        assert single.logprobs == pytest.approx(completion.logprobs, abs=1e-9)
        assert tuple(stream(model, prompt, NEW, temperature=temperature, seed=seed)) == completion.ids
        assert completion.prompt_ids == tuple(prompt) and len(completion.ids) == NEW


def test_fp32_batch_is_single() -> None:
    model = tiny_model()
    batch = generate(model, prompts(), NEW)
    assert ids_of(batch) == [generate(model, [prompt], NEW)[0].ids for prompt in prompts()]


def test_greedy_is_the_argmax_of_the_whole_sequence() -> None:
    model = model_of()
    for prompt, completion in zip(prompts(), generate(model, prompts(), NEW), strict=True):
        text = torch.tensor([*prompt, *completion.ids])
        best = logits_of(model, text, [len(text)]).argmax(-1)
        assert tuple(best[len(prompt) - 1 : -1].tolist()) == completion.ids


@pytest.mark.parametrize("temperature", [0.0, 1.0, 0.6])
@pytest.mark.parametrize("variant", VARIANTS)
def test_logprobs_are_those_of_the_logits(variant: str, temperature: float) -> None:
    model = model_of(variant)
    for prompt, completion in zip(prompts(), generate(model, prompts(), NEW, temperature=temperature), strict=True):
        text = torch.tensor([*prompt, *completion.ids])
        logits = logits_of(model, text, [len(text)])[len(prompt) - 1 : -1]
        logprobs = torch.log_softmax(logits / (temperature or 1.0), -1)
        want = logprobs.gather(1, torch.tensor(completion.ids)[:, None])[:, 0]
        assert completion.logprobs == pytest.approx(want.tolist(), abs=1e-9)


@pytest.mark.parametrize("max_batch", [1, 2, 3, 64])
@pytest.mark.parametrize("segment", [1, 8, 1024])
def test_batching_and_segments_change_nothing_and_order_is_kept(max_batch: int, segment: int) -> None:
    model, seeds = model_of(), list(range(100, 107))
    want = generate(model, prompts(), 6, temperature=0.8, seeds=seeds)
    got = generate(model, prompts(), 6, temperature=0.8, seeds=seeds, max_batch=max_batch, segment=segment)
    assert [completion.prompt_ids for completion in got] == [tuple(prompt) for prompt in prompts()]
    assert ids_of(got) == ids_of(want)


def test_seeds_decide_whatever_the_batch() -> None:
    model, prompt = model_of(), prompts()[0]
    first = generate(model, [prompt] * 4, NEW, temperature=1.0, seeds=[1, 2, 1, 3])
    assert first[0].ids == first[2].ids
    assert len({completion.ids for completion in first}) == 3
    again = generate(model, [prompts()[3], prompt], NEW, temperature=1.0, seeds=[9, 2])
    assert again[1].ids == first[1].ids
    assert ids_of(generate(model, [prompt] * 4, NEW, temperature=1.0, seeds=[1, 2, 1, 3])) == ids_of(first)


def test_default_seeds_are_the_places() -> None:
    model = model_of()
    assert ids_of(generate(model, prompts(), 5, temperature=1.0)) == ids_of(
        generate(model, prompts(), 5, temperature=1.0, seeds=range(len(prompts())))
    )


def test_the_global_generator_is_neither_read_nor_moved() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = generate(model_of(), prompts(), 5, temperature=1.0)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    assert ids_of(generate(model_of(), prompts(), 5, temperature=1.0)) == ids_of(first)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_stop_ids_end_a_row_and_only_that_row(temperature: float) -> None:
    model = model_of()
    free = generate(model, prompts(), NEW, temperature=temperature)
    # One stop id that ends some rows early, in different steps, and leaves others alone.
    counts = torch.bincount(torch.tensor([i for c in free for i in set(c.ids)]), minlength=VOCABULARY)
    stops = {int(counts.argmax()), free[0].ids[0]}
    stopped = generate(model, prompts(), NEW, temperature=temperature, stop_ids=stops)
    assert {completion.finish for completion in stopped} >= {"stop"}
    for prompt, a, b in zip(prompts(), free, stopped, strict=True):
        places = [place for place, token in enumerate(a.ids) if token in stops]
        want = a.ids[: places[0] + 1] if places else a.ids
        assert b.ids == want and b.finish == ("stop" if places else "length")
        assert len(b.logprobs) == len(b.ids) and b.logprobs == pytest.approx(a.logprobs[: len(want)], abs=1e-9)
        seed = prompts().index(prompt)
        assert tuple(stream(model, prompt, NEW, temperature=temperature, seed=seed, stop_ids=stops)) == want


def test_a_stop_id_as_the_last_allowed_token_is_a_stop() -> None:
    (free,) = generate(model_of(), prompts()[:1], 3, temperature=1.0)
    assert free.ids[2] not in free.ids[:2], "take another seed: the last token must be a first occurrence"
    (got,) = generate(model_of(), prompts()[:1], 3, temperature=1.0, stop_ids={free.ids[2]})
    assert got == replace(free, finish="stop")


@pytest.mark.parametrize("limit", [1, 2, 7])
def test_max_new_tokens_is_exact(limit: int) -> None:
    want = generate(model_of(), prompts(), NEW)
    got = generate(model_of(), prompts(), limit)
    assert ids_of(got) == [completion.ids[:limit] for completion in want]
    assert len(list(stream(model_of(), prompts()[2], limit))) == limit


def test_no_prompts_no_completions() -> None:
    assert generate(model_of(), [], 5) == []


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([], {}, "no tokens"),
        ([1], {"max_new_tokens": 0}, "max_new_tokens must be at least 1, not 0"),
        ([1], {"max_new_tokens": -5}, "max_new_tokens"),
        ([1], {"temperature": -0.1}, "temperature"),
        ([1], {"temperature": float("nan")}, "temperature"),
        ([1], {"temperature": float("inf")}, "temperature"),
    ],
)
def test_bad_input_is_a_user_error_of_one_line(prompt: list[int], options: dict[str, float], message: str) -> None:
    full = {"max_new_tokens": 3, **options}
    for call in (lambda: generate(model_of(), [[1, 2], prompt], **full), lambda: [*stream(model_of(), prompt, **full)]):
        with pytest.raises(UserError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("token", [VOCABULARY, -1])
def test_a_token_outside_the_vocabulary_is_a_user_error(token: int) -> None:
    with pytest.raises(UserError, match=r"vocabulary|vocab_size"):
        generate(model_of(), [[1, 2], [3, token]], 3)


@pytest.mark.parametrize("option", ["segment", "max_batch"])
@pytest.mark.parametrize("value", [0, -1])
def test_batches_and_segments_of_nothing_are_refused(option: str, value: int) -> None:
    with pytest.raises(UserError, match=option):
        generate(model_of(), prompts(), 3, **{option: value})


def test_seeds_must_match_prompts() -> None:
    with pytest.raises((UserError, ValueError)):
        generate(model_of(), prompts(), 3, temperature=1.0, seeds=[1, 2])


def test_sampling_follows_the_models_distribution() -> None:
    model, prompt, count = model_of(), prompts()[3], 2000
    drawn = generate(model, [prompt] * count, 1, temperature=1.0, max_batch=500)
    counts = torch.bincount(torch.tensor([c.ids[0] for c in drawn]), minlength=VOCABULARY).double()
    probabilities = torch.softmax(logits_of(model, torch.tensor(prompt), [len(prompt)])[-1], -1)
    large = probabilities * count > 5
    cells = torch.cat([counts[large], counts[~large].sum()[None]])
    expected = torch.cat([probabilities[large], probabilities[~large].sum()[None]]) * count
    statistic = float(((cells - expected) ** 2 / expected.clamp_min(1e-9)).sum())
    freedom = len(cells) - 1
    assert freedom >= 4 and statistic < freedom + 5 * (2 * freedom) ** 0.5


def test_nothing_is_left_requiring_gradients() -> None:
    model = model_of()
    generate(model, prompts()[:2], 2)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    running = stream(model, prompts()[0], 5)
    next(running)
    # Between two tokens the caller may train.
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
