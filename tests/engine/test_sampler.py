"""The sampler against transformers' logits processors, and against the plain formulas it has none for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from engine.messages import Request
from engine.sampler import NOT_FINITE, Sampler
from engine.sampling_params import SamplingParams
from engine.sequence import Sequence

VOCAB = 60


def sequence(prompt: list[int], output: list[int], end_ids: tuple[int, ...] = (), seed: int = 0, **params: object):
    request = Request(id="x", prompt_ids=prompt, params=SamplingParams(**params))
    seq = Sequence(request, seed, 1000, frozenset(end_ids))
    for token in output:
        seq.append(token)
    return seq


def sample(logits: Tensor, seqs: list[Sequence]) -> list[int]:
    return Sampler(logits.device)(logits.clone(), seqs).token_ids


def random_texts(n: int) -> tuple[Tensor, list[list[int]], list[list[int]]]:
    generator = torch.Generator().manual_seed(n)
    logits = torch.randn(n, VOCAB, generator=generator) * 2
    texts = torch.randint(0, VOCAB, (n, 40), generator=generator).tolist()
    return (
        logits,
        [text[: 1 + i % 20] for i, text in enumerate(texts)],
        [text[20 : 20 + i % 21] for i, text in enumerate(texts)],
    )


def processed(logits: Tensor, text: list[int], params: SamplingParams) -> Tensor:
    """What transformers makes of one row of logits."""
    t = pytest.importorskip("transformers")
    row, ids = logits[None].clone(), torch.tensor([text])
    steps = [t.RepetitionPenaltyLogitsProcessor(params.repetition_penalty)]
    if params.temperature:
        steps.append(t.TemperatureLogitsWarper(params.temperature))
    if params.top_k:
        steps.append(t.TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        steps.append(t.TopPLogitsWarper(params.top_p))
    if params.min_p:
        steps.append(t.MinPLogitsWarper(params.min_p))
    for step in steps:
        row = step(ids, row)
    return row[0]


@pytest.mark.parametrize("penalty", [1.0, 1.3, 0.7])
def test_repetition_penalty_as_in_transformers(penalty: float):
    logits, prompts, outputs = random_texts(200)
    params = {"temperature": 0, "repetition_penalty": penalty}
    seqs = [sequence(prompt, output, **params) for prompt, output in zip(prompts, outputs, strict=True)]
    expected = [int(processed(row, seq.token_ids, seq.params).argmax()) for row, seq in zip(logits, seqs, strict=True)]
    assert sample(logits, seqs) == expected
    if penalty != 1:
        assert expected != logits.argmax(-1).tolist()


def test_presence_and_frequency_penalties_count_the_output_alone():
    logits, prompts, outputs = random_texts(200)
    penalties = {"presence_penalty": 0.9, "frequency_penalty": -0.4}
    seqs = [sequence(p, o, temperature=0, **penalties) for p, o in zip(prompts, outputs, strict=True)]
    expected = logits.clone()
    for row, output in zip(expected, outputs, strict=True):
        for token in set(output):
            row[token] -= 0.9 + -0.4 * output.count(token)
    assert sample(logits, seqs) == expected.argmax(-1).tolist() != logits.argmax(-1).tolist()


def test_a_penalty_is_of_its_own_row_alone():
    logits, prompts, outputs = random_texts(40)
    options = [{}, {"repetition_penalty": 1.5}, {"frequency_penalty": 1.0}, {"logprobs": 2}]
    seqs = [
        sequence(p, o, temperature=0, **options[i % 4]) for i, (p, o) in enumerate(zip(prompts, outputs, strict=True))
    ]
    alone = [sample(logits[i : i + 1], [seq])[0] for i, seq in enumerate(seqs)]
    assert sample(logits, seqs) == alone


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 3.0, "top_k": 7},
        {"top_p": 0.7},
        {"temperature": 2.0, "min_p": 0.2},
        {"temperature": 1.5, "top_k": 20, "top_p": 0.8, "min_p": 0.1, "repetition_penalty": 1.4},
    ],
    ids=str,
)
def test_draws_follow_the_distribution_of_transformers(params: dict[str, float]):
    n = 20_000
    logits = torch.randn(VOCAB, generator=torch.Generator().manual_seed(5)) * 2
    text = list(range(0, VOCAB, 7))
    seqs = [sequence(text, [], seed=seed * 7919, **params) for seed in range(n)]
    drawn = torch.tensor(sample(logits.expand(n, -1), seqs)).bincount(minlength=VOCAB)
    expected = processed(logits, text, seqs[0].params).softmax(-1) * n
    assert drawn[expected == 0].sum() == 0
    likely = expected > 5
    chi_square = ((drawn - expected)[likely] ** 2 / expected[likely]).sum()
    freedom = int(likely.sum()) - 1
    assert chi_square < freedom + 5 * (2 * max(freedom, 1)) ** 0.5  # mean and deviation of chi-square; seeds are fixed


def test_a_draw_depends_on_seed_and_position_alone():
    logits = torch.randn(1, VOCAB).expand(64, -1)
    seqs = [sequence([1] * (1 + i % 8), [2], seed=i // 8) for i in range(64)]
    drawn = sample(logits, seqs)
    assert len(set(drawn)) > 8
    assert [sample(logits[:1], [seq])[0] for seq in seqs] == drawn
    same_place = [sequence([9] * 5, [], seed=4), sequence([1, 2], [3, 4, 5], seed=4, top_k=VOCAB)]
    assert len(set(sample(logits[:2], same_place))) == 1


def test_parameters_are_not_taken_from_the_last_batch():
    logits, prompts, outputs = random_texts(8)
    sampler = Sampler(logits.device)
    greedy = [sequence(p, o, temperature=0) for p, o in zip(prompts, outputs, strict=True)]
    drawn = [sequence(p, o, temperature=5.0, seed=i) for i, (p, o) in enumerate(zip(prompts, outputs, strict=True))]
    for seqs in (greedy, drawn, drawn[::-1], greedy[:3], drawn[:3]):
        rows = logits[: len(seqs)]
        assert sampler(rows.clone(), seqs).token_ids == Sampler(logits.device)(rows.clone(), seqs).token_ids
        for seq in seqs:
            seq.append(1)
        assert sampler(rows.clone(), seqs).token_ids == Sampler(logits.device)(rows.clone(), seqs).token_ids


def test_end_tokens_are_forbidden_before_min_tokens():
    logits = torch.zeros(3, VOCAB)
    logits[:, 4], logits[:, 9], logits[:, 2] = 9.0, 8.0, 7.0
    common = {"end_ids": (4, 9), "min_tokens": 2, "temperature": 0}
    seqs = [sequence([1], [5] * n, **common) for n in (0, 1, 2)]
    assert sample(logits, seqs) == [2, 2, 4]


def test_rows_that_are_not_finite_are_told_apart():
    logits = torch.randn(5, VOCAB)
    logits[1, 3], logits[3, 50] = float("nan"), float("inf")
    for params in ({"temperature": 0}, {"temperature": 1.0, "top_p": 0.5}, {"logprobs": 3}):
        seqs = [sequence([1], [], **params) for _ in range(5)]
        sampled = Sampler(logits.device)(logits.clone(), seqs)
        assert [i for i, token in enumerate(sampled.token_ids) if token == NOT_FINITE] == [1, 3]
        assert set(sampled.logprobs) == ({0, 2, 4} if "logprobs" in params else set())
