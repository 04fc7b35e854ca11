"""The sampler against slower truths: a float64 re-statement, frequencies, the plain loop, rows alone and in crowds."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sampling_cases import chi_square, true_distribution, true_token
from tiny import tiny_tokenizer
from turbos.common.errors import UserError
from turbos.engine.choosing import COMPILED, perturbed_argmax, smallest_kept
from turbos.engine.penalties import TokenCounts, penalise
from turbos.engine.sampler import BROKEN, NOTHING, Choice, NoChoice, Sampler
from turbos.engine.sampling_params import Grammar, SamplingParams
from turbos.engine.writer import Writer
from turbos.model.generate import sample
from turbos.ops.sampling import gumbel_noise

VOCABULARY = 320
PROMPT = [3, 4, 5, 5]
INF = math.inf

MIXED = [
    SamplingParams(),
    SamplingParams(temperature=1.0),
    SamplingParams(temperature=0.3, seed=5),
    SamplingParams(temperature=1.0, top_p=0.8, seed=-1),
    SamplingParams(temperature=2.0, top_k=7, seed=9),
    SamplingParams(temperature=1.0, min_p=0.2, seed=2**63 - 1),
    SamplingParams(temperature=0.9, top_k=40, top_p=0.9, min_p=0.01, seed=-(2**63)),
    SamplingParams(temperature=1.0, repetition_penalty=1.5, presence_penalty=0.3, frequency_penalty=0.2),
    SamplingParams(temperature=0.0, repetition_penalty=4.0),
    SamplingParams(temperature=1.0, logit_bias={5: 3.0, 9: -INF}, logprobs=3),
    SamplingParams(temperature=1.0, thinking_budget=4),
    SamplingParams(temperature=1.0, grammar=Grammar("regex", "[0-9]{3,20}")),
    SamplingParams(temperature=1e-30, seed=3),
]


def sampler(compiled: bool = COMPILED) -> Sampler:
    """Of a model with a few ids more than its tokenizer."""
    assert tiny_tokenizer().vocab_size < VOCABULARY
    return Sampler(VOCABULARY, tiny_tokenizer(), compiled)


def random_logits(rows: int, seed: int = 0, scale: float = 3.0, vocabulary: int = VOCABULARY) -> torch.Tensor:
    """Normal logits, fp32 `[rows, vocabulary]`."""
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed)) * scale


def written(writer: Writer, tokens: list[int]) -> Writer:
    """The writer after some tokens."""
    for token in tokens:
        writer.accept(token, 0.0)
    return writer


def tokens_of(choices: list[Choice | NoChoice]) -> list[int]:
    """Tokens of rows that all have one."""
    assert all(isinstance(choice, Choice) for choice in choices)
    return [choice.token for choice in choices if isinstance(choice, Choice)]


params_strategy = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.2, 0.7, 1.0, 3.0]),
    top_p=st.sampled_from([0.0, 0.1, 0.5, 0.9, 0.999, 1.0]),
    top_k=st.sampled_from([0, 1, 2, 5, 50, 319, 320, 1000]),
    min_p=st.sampled_from([0.0, 0.05, 0.5, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 0.5, 1.3]),
    presence_penalty=st.sampled_from([0.0, -1.0, 2.0]),
    frequency_penalty=st.sampled_from([0.0, 0.5]),
    seed=st.integers(-(2**63), 2**63 - 1),
    logit_bias=st.dictionaries(st.integers(0, VOCABULARY - 1), st.sampled_from([-INF, -3.0, 2.0, 5.0]), max_size=6),
)


@settings(max_examples=300, deadline=None)
@given(params=params_strategy, ids=st.lists(st.integers(0, VOCABULARY - 1), max_size=12), seed=st.integers(0, 10**6))
@pytest.mark.parametrize("compiled", {COMPILED, False})
def test_tokens_are_those_of_the_float64_truth(
    params: SamplingParams, ids: list[int], seed: int, compiled: bool
) -> None:
    logits_1V = random_logits(1, seed)
    one = sampler(compiled)
    writer = written(one.writer(params, PROMPT), ids)
    (choice,) = one.sample(logits_1V, [writer])
    assert isinstance(choice, Choice)
    probabilities = true_distribution(logits_1V[0].numpy(), params, PROMPT, ids)
    assert choice.token == true_token(probabilities, params.seed, len(PROMPT) + len(ids))
    want = torch.log_softmax(logits_1V[0].double() / (params.temperature or 1.0), -1)[choice.token]
    assert choice.logprob == pytest.approx(float(want), abs=1e-4)


@pytest.mark.parametrize("params", MIXED[1:9])
def test_frequencies_follow_the_distribution(params: SamplingParams) -> None:
    count, logits_V = 4000, random_logits(1, seed=3, scale=2.0)[0]
    one, prompt = sampler(), [*PROMPT, 70, 71]
    counts = np.zeros(VOCABULARY)
    for start in range(0, count, 500):
        writers = [one.writer(replace(params, seed=seed), prompt) for seed in range(start, start + 500)]
        for token in tokens_of(one.sample(logits_V.expand(500, -1), writers)):
            counts[token] += 1
    probabilities = true_distribution(logits_V.numpy(), params, prompt, [])
    assert counts[probabilities == 0].sum() == 0
    statistic, freedom = chi_square(counts, probabilities)
    assert statistic < freedom + 5 * (2 * freedom) ** 0.5 + 1e-9


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("temperature", [0.0, 1.0, 0.7, 0.05, 13.0])
def test_temperature_alone_is_the_plain_loops_sampling(temperature: float, dtype: torch.dtype) -> None:
    one, rows = sampler(), 64
    for scale in (0.1, 3.0, 20.0):
        logits_BV = random_logits(rows, int(scale), scale).to(dtype)
        writers = [
            one.writer(SamplingParams(temperature=temperature, seed=7 * row - 50), PROMPT) for row in range(rows)
        ]
        seeds_B, positions_B = torch.tensor([writer.seed for writer in writers]), torch.full((rows,), len(PROMPT))
        tokens_B, logprobs_B = sample(logits_BV, temperature, seeds_B, positions_B)
        choices = one.sample(logits_BV, writers)
        assert tokens_of(choices) == tokens_B.tolist()
        assert [choice.logprob for choice in choices if isinstance(choice, Choice)] == logprobs_B.tolist()


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("vocabulary", [VOCABULARY, 50_257])
def test_a_row_is_the_same_alone_and_in_any_batch(threads: int, vocabulary: int) -> None:
    one = Sampler(vocabulary, tiny_tokenizer())
    logits_BV = random_logits(len(MIXED), vocabulary=vocabulary)
    torch.set_num_threads(threads)
    alone = [one.sample(logits_BV[row : row + 1], [one.writer(params, PROMPT)])[0] for row, params in enumerate(MIXED)]
    for order in (list(range(len(MIXED))), list(reversed(range(len(MIXED)))), [*range(0, len(MIXED), 2)] * 3):
        crowd = one.sample(logits_BV[order], [one.writer(MIXED[row], PROMPT) for row in order])
        assert crowd == [alone[row] for row in order]


def test_siblings_have_seeds_of_their_own_and_the_position_counts() -> None:
    one, params, logits_BV = sampler(), SamplingParams(temperature=1.0, seed=5, n=8), random_logits(1).expand(8, -1)
    siblings = tokens_of(one.sample(logits_BV, [one.writer(params, PROMPT, place) for place in range(8)]))
    seeds = [one.writer(SamplingParams(temperature=1.0, seed=5 + place), PROMPT) for place in range(8)]
    assert siblings == tokens_of(one.sample(logits_BV, seeds)) and len(set(siblings)) > 1
    later = [written(one.writer(params, PROMPT), [9] * count) for count in range(8)]
    assert len(set(tokens_of(one.sample(logits_BV, later)))) > 1


@settings(max_examples=150, deadline=None)
@given(
    scale=st.sampled_from([0.0, 0.01, 1.0, 4.0, 30.0]),
    seed=st.integers(-(2**63), 2**63 - 1),
    position=st.integers(0, 2**40),
    size=st.sampled_from([1, 2, 7, 320, 5000]),
    cut=st.booleans(),
)
def test_the_kernel_chooses_what_torchs_noise_chooses(
    scale: float, seed: int, position: int, size: int, cut: bool
) -> None:
    scores_BV = torch.log_softmax(random_logits(3, seed % 1000, scale, size), -1)
    if cut:
        scores_BV = scores_BV.masked_fill(scores_BV < scores_BV.amax(-1, keepdim=True), -INF)
    seeds, positions = [seed, seed ^ 1, 0], [position, position, position + 1]
    noise_BV = gumbel_noise(torch.tensor(seeds), torch.tensor(positions), size)
    want = (scores_BV + noise_BV).argmax(-1).tolist()
    assert perturbed_argmax(scores_BV, seeds, positions) == want
    assert perturbed_argmax(scores_BV, seeds, positions, compiled=False) == want


def test_the_kernel_chooses_what_torchs_noise_chooses_many_times() -> None:
    scores_BV = torch.log_softmax(random_logits(1, 1, 0.0, 2000), -1).expand(500, -1).contiguous()
    ties = 0
    for start in range(0, 10_000, 500):
        seeds = list(range(start, start + 500))
        noise_BV = scores_BV + gumbel_noise(torch.tensor(seeds), torch.tensor(seeds), 2000)
        assert perturbed_argmax(scores_BV, seeds, seeds) == noise_BV.argmax(-1).tolist()
        best_B2 = noise_BV.topk(2).values
        ties += int((best_B2[:, 0] - best_B2[:, 1] < 1e-4).sum())
    assert ties > 0, "the case that rounding decides must have been met"


def test_ties_that_rounding_makes_are_torchs_to_decide() -> None:
    for seed in range(200):
        noise_V = gumbel_noise(torch.tensor([seed]), torch.tensor([9]), 8)[0]
        scores_1V = torch.full((1, 8), -INF)
        # In fp32 the two perturbed scores are nearly always equal; in float64 they never are.
        scores_1V[0, [2, 5]] = torch.stack([noise_V.max() - noise_V[2], noise_V.max() - noise_V[5]])
        scores_1V -= scores_1V.max()
        assert perturbed_argmax(scores_1V, [seed], [9]) == [int((scores_1V[0] + noise_V).argmax())]


@given(
    logits=st.lists(st.floats(-4.0, 4.0, width=32), min_size=12, max_size=12),
    prompt=st.lists(st.integers(0, 11), max_size=6),
    ids=st.lists(st.integers(0, 11), max_size=40),
    repetition=st.sampled_from([0.5, 1.0, 1.7]),
    presence=st.sampled_from([-0.5, 0.0, 1.0]),
    frequency=st.sampled_from([0.0, 0.25]),
)
def test_penalties_change_each_logit_as_they_should(
    logits: list[float], prompt: list[int], ids: list[int], repetition: float, presence: float, frequency: float
) -> None:
    counts = TokenCounts(prompt)
    for id in ids:
        counts.add(id)
    got = penalise(torch.tensor(logits), counts, repetition, presence, frequency).tolist()
    for token, (before, after) in enumerate(zip(logits, got, strict=True)):
        want = before
        if token in prompt or token in ids:
            want = before / repetition if before > 0 else before * repetition
        if token in ids:
            want -= presence + frequency * ids.count(token)
        assert after == pytest.approx(want, abs=1e-5)


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    scale=st.sampled_from([0.0, 0.5, 3.0, 60.0]),
    steps=st.sampled_from([0, 4]),
    top_k=st.integers(0, 400),
    top_p=st.floats(0.0, 1.0),
)
def test_the_edge_of_a_nucleus_is_that_of_a_sort(seed: int, scale: float, steps: int, top_k: int, top_p: float) -> None:
    logits_V = random_logits(1, seed, scale)[0]
    # Rounded logits have ties.
    probabilities_V = torch.softmax((logits_V * steps).round() / steps if steps else logits_V, -1)
    p = probabilities_V.double().numpy()
    edges = [smallest_kept(probabilities_V, top_k, top_p, compiled) for compiled in (COMPILED, False)]
    if top_k:
        p = p * (p >= np.sort(p)[::-1][:top_k][-1])
    for edge in edges:
        above, kept = p[p > edge].sum() / p.sum(), p[p >= edge].sum() / p.sum()
        assert kept >= top_p - 1e-9
        # Nothing is kept that need not be, unless it is all that top-k left.
        assert above < top_p + 1e-9 or not (p > edge).any() or top_p == 1.0


def test_reported_logprobs_are_the_models_own() -> None:
    one, logits_1V = sampler(), random_logits(1)
    params = SamplingParams(temperature=0.5, top_k=3, logit_bias={5: 9.0}, repetition_penalty=1.4, logprobs=4)
    (choice,) = one.sample(logits_1V, [one.writer(params, PROMPT)])
    assert isinstance(choice, Choice)
    logprobs_V = torch.log_softmax(logits_1V[0].double() / 0.5, -1)
    assert choice.logprob == pytest.approx(float(logprobs_V[choice.token]), abs=1e-5)
    assert [token for token, _ in choice.top] == logprobs_V.argsort(descending=True)[:4].tolist()
    assert [value for _, value in choice.top] == pytest.approx(
        logprobs_V.sort(descending=True).values[:4].tolist(), abs=1e-5
    )


@pytest.mark.parametrize("count", [None, 0, 1, 1024])
def test_as_many_alternatives_as_asked_for_and_no_more_than_there_are(count: int | None) -> None:
    one = sampler()
    (choice,) = one.sample(random_logits(1), [one.writer(SamplingParams(logprobs=count), PROMPT)])
    assert isinstance(choice, Choice) and len(choice.top) == min(count or 0, VOCABULARY)


@pytest.mark.parametrize("bad", [math.nan, INF, -INF])
@pytest.mark.parametrize("row", range(len(MIXED)))
def test_broken_logits_end_their_own_row_only(bad: float, row: int) -> None:
    one, logits_BV = sampler(), random_logits(len(MIXED))
    writers = [one.writer(params, PROMPT) for params in MIXED]
    want = one.sample(logits_BV, writers)
    before = logits_BV.clone()
    logits_BV[row, 17] = bad
    got = one.sample(logits_BV, writers)
    assert got[row] is BROKEN
    assert got[:row] + got[row + 1 :] == want[:row] + want[row + 1 :]
    logits_BV[row, 17] = before[row, 17]
    assert torch.equal(logits_BV, before), "the caller's logits are left as they are"


@pytest.mark.parametrize("params", [SamplingParams(), SamplingParams(temperature=1.0, top_p=0.9)])
def test_where_everything_is_banned_there_is_no_choice(params: SamplingParams) -> None:
    one = sampler()
    banned = one.writer(replace(params, logit_bias=dict.fromkeys(range(VOCABULARY), -INF)), PROMPT)
    assert one.sample(random_logits(2), [banned, one.writer(params, PROMPT)])[0] is NOTHING
    one_left = {token: -INF for token in range(VOCABULARY) if token != 77}
    assert tokens_of(one.sample(random_logits(1), [one.writer(replace(params, logit_bias=one_left), PROMPT)])) == [77]


@pytest.mark.parametrize("temperature", [1e-300, 1e-45, 1e-38, 1e-30, 1e-10])
@pytest.mark.parametrize("scale", [1e-3, 3.0, 1e8, 1e30])
def test_tiny_temperatures_are_greedy(temperature: float, scale: float) -> None:
    one, logits_BV = sampler(), random_logits(8, scale=scale)
    for options in ({}, {"top_p": 0.5}, {"top_k": 3}, {"logit_bias": {3: -1.0}}):
        writers = [one.writer(SamplingParams(temperature=temperature, **options), PROMPT) for _ in range(8)]
        choices = one.sample(logits_BV, writers)
        assert tokens_of(choices) == logits_BV.argmax(-1).tolist()
        assert all(choice.logprob == 0.0 for choice in choices if isinstance(choice, Choice))


def test_equal_logits_at_a_tiny_temperature_are_still_drawn() -> None:
    one, logits_BV = sampler(), torch.zeros(64, VOCABULARY)
    logits_BV[:, [3, 9]] = 1.0
    writers = [one.writer(SamplingParams(temperature=1e-40, seed=seed), PROMPT) for seed in range(64)]
    assert set(tokens_of(one.sample(logits_BV, writers))) == {3, 9}


def test_ties_stay_together() -> None:
    one, logits_BV = sampler(), torch.zeros(200, VOCABULARY)
    logits_BV[:, :4] = torch.tensor([5.0, 4.0, 4.0, 3.0])
    for params, kept in (
        (SamplingParams(temperature=1.0, top_k=2), {0, 1, 2}),
        (SamplingParams(temperature=1.0, top_p=0.0), {0}),
        (SamplingParams(temperature=9.0, min_p=1.0), {0}),
        (SamplingParams(temperature=9.0, min_p=math.exp(-0.112)), {0, 1, 2}),
    ):
        writers = [one.writer(replace(params, seed=seed), PROMPT) for seed in range(200)]
        assert set(tokens_of(one.sample(logits_BV, writers))) == kept


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (SamplingParams(logit_bias={VOCABULARY: 1.0}), "logit_bias: token 320 lies outside vocab_size 320"),
        (SamplingParams(stop_ids=frozenset({5, 10**9})), "stop_ids: token 1000000000 lies outside"),
    ],
)
def test_tokens_outside_the_vocabulary_are_refused(params: SamplingParams, message: str) -> None:
    with pytest.raises(UserError, match=message):
        sampler().writer(params, PROMPT)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (SamplingParams(stop=("a",)), "stop strings need a tokenizer"),
        (SamplingParams(grammar=Grammar("json")), "a grammar need"),
        (SamplingParams(thinking_budget=0), "thinking_budget needs a tokenizer"),
    ],
)
def test_without_a_tokenizer_there_are_ids_only(params: SamplingParams, message: str) -> None:
    one = Sampler(VOCABULARY, None)
    with pytest.raises(UserError, match=message):
        one.writer(params, PROMPT)
    writer = one.writer(SamplingParams(max_new_tokens=2), PROMPT)
    for _ in range(2):
        (choice,) = one.sample(random_logits(1), [writer])
        assert isinstance(choice, Choice)
        writer.accept(choice.token, choice.logprob)
    assert writer.text is None and writer.finish == "length" and len(writer.ids) == 2


def test_an_empty_batch_is_no_choices() -> None:
    assert sampler().sample(torch.empty(0, VOCABULARY), []) == []
