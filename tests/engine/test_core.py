"""EngineCore on small random models, GQA and MLA: what a request gets must not depend on what else is served, on how
its prompt is cut up, on what is reused, or on how often it is preempted."""

from __future__ import annotations

import random
import warnings
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.core import EngineCore
from engine.errors import CapacityError, RequestError
from engine.messages import Output, Request
from engine.model.transformer import Transformer
from engine.sampling_params import SamplingParams
from tests.engine.tiny import CONTEXT, VOCAB, all_logits, engine, generate, run, tiny_model, tokens

KINDS = ("gqa", "mla")
TIE = 1e-4  # greedy texts may part where the two best logits are this close


@cache
def model_of(kind: str) -> Transformer:
    return tiny_model(kind)


@pytest.fixture(params=KINDS)
def model(request: pytest.FixtureRequest) -> Transformer:
    return model_of(request.param)


def random_prompts(seed: int, lengths: list[int]) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(VOCAB) for _ in range(length)] for length in lengths]


def mixed_prompts(n: int = 32) -> list[list[int]]:
    lengths = [1, 2, 15, 16, 17, 31, 32, 33, 48, 64, 65, 100, 130]
    return random_prompts(1, [lengths[i % len(lengths)] for i in range(n)])


def greedy(name: object, prompt: list[int], max_tokens: int = 20) -> Request:
    return Request(id=str(name), prompt_ids=prompt, params=SamplingParams(temperature=0, max_tokens=max_tokens))


def assert_same_text(model: Transformer, prompt: list[int], got: list[int], expected: list[int]) -> None:
    """Token for token, unless they part at a tie; then says so."""
    if got == expected:
        return
    assert len(got) == len(expected)
    i = next(i for i, (a, b) in enumerate(zip(got, expected, strict=True)) if a != b)
    best, second = all_logits(model, prompt + expected[:i])[-1].topk(2).values.tolist()
    assert best - second < TIE, f"token {i}: {got[i]} instead of {expected[i]}, {best - second} apart"
    warnings.warn(f"texts part at token {i}, a tie of {best - second:.1e}", stacklevel=2)


def assert_idle(core: EngineCore) -> None:
    core.scheduler.check()
    stats = core.stats()
    assert (stats.num_running, stats.num_waiting, stats.free_blocks) == (0, 0, stats.total_blocks)
    assert not core.has_work
    assert core.step() == []


@cache
def texts_alone(kind: str) -> list[list[int]]:
    """Each of mixed_prompts by the definition: the whole text anew for every token; no engine, no cache."""
    model = model_of(kind)
    texts = []
    for prompt in mixed_prompts():
        text = list(prompt)
        for _ in range(20):
            text.append(int(all_logits(model, text)[-1].argmax()))
        texts.append(text[len(prompt) :])
    return texts


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("requests", "config"),
    [
        (32, {}),
        (32, {"cache_tokens": 256}),
        (32, {"max_batched_tokens": 64, "cache_tokens": 336}),
        (32, {"max_batched_tokens": 7}),
        (9, {"max_batched_tokens": 1}),
        (32, {"block_size": 1, "cache_tokens": 400}),
        (32, {"max_num_seqs": 3, "prefix_cache": False}),
    ],
    ids=str,
)
def test_concurrent_requests_get_the_text_each_gets_alone(kind: str, requests: int, config: dict[str, int]):
    model, prompts = model_of(kind), mixed_prompts(requests)
    core = engine(model, **config)
    outputs = run(core, [greedy(i, prompt) for i, prompt in enumerate(prompts)])
    for i, prompt in enumerate(prompts):
        assert_same_text(model, prompt, tokens(outputs[str(i)]), texts_alone(kind)[i])
        assert outputs[str(i)][-1].finish_reason == "length"
    assert (core.stats().preemptions > 0) == ("cache_tokens" in config)
    assert core.stats().generated_tokens == 20 * requests
    assert core.stats().prompt_tokens == sum(map(len, prompts))
    assert_idle(core)


@pytest.mark.parametrize("kind", KINDS)
def test_an_engine_alone_agrees_with_the_definition(kind: str):
    for prompt, expected in list(zip(mixed_prompts(), texts_alone(kind), strict=True))[:8]:
        got = generate(engine(model_of(kind)), prompt, temperature=0, max_tokens=20)
        assert_same_text(model_of(kind), prompt, got, expected)


@pytest.mark.parametrize("config", [{}, {"cache_tokens": 256}, {"max_batched_tokens": 7}], ids=str)
def test_prefix_hits_do_not_change_the_text(model: Transformer, config: dict[str, int]):
    shared, *tails = random_prompts(2, [70, *[1, 5, 9, 10, 26, 27, 40] * 3])
    prompts = [shared + tail for tail in tails]
    core = engine(model, **config)
    first = run(core, [greedy("first", shared)])
    assert first["first"][-1].num_cached_tokens == 0
    outputs = run(core, [greedy(i, prompt, 10) for i, prompt in enumerate(prompts)])
    for i, prompt in enumerate(prompts):
        assert_same_text(
            model, prompt, tokens(outputs[str(i)]), generate(engine(model), prompt, temperature=0, max_tokens=10)
        )
    cached = [outputs[str(i)][-1].num_cached_tokens for i in range(len(prompts))]
    assert cached[0] >= 64
    assert core.stats().prefix_hit_tokens == sum(cached)
    assert_idle(core)


def test_generated_tokens_are_reused(model: Transformer):
    core = engine(model)
    (prompt,) = random_prompts(3, [20])
    answer = tokens(run(core, [greedy("turn 1", prompt, 30)])["turn 1"])
    outputs = run(core, [greedy("turn 2", prompt + answer + [5, 6], 4)])["turn 2"]
    assert outputs[-1].num_cached_tokens == 48  # of 52
    expected = generate(engine(model), prompt + answer + [5, 6], temperature=0, max_tokens=4)
    assert_same_text(model, prompt + answer + [5, 6], tokens(outputs), expected)


@pytest.mark.parametrize("block_size", [16, 64, 256])
@pytest.mark.parametrize("length", [63, 64, 65, 255, 256, 257])
def test_the_same_prompt_again_around_block_multiples(block_size: int, length: int):
    """A prompt wholly in the cache must still compute its last token, and never write into a shared block."""
    model = model_of("mla")
    (prompt,) = random_prompts(4, [length])
    core = engine(model, block_size=block_size)
    first = generate(core, prompt, temperature=0, max_tokens=3)
    outputs = run(core, [greedy(i, prompt, 3) for i in range(3)])
    for i in range(3):
        assert outputs[str(i)][-1].num_cached_tokens == (length - 1) // block_size * block_size
        assert_same_text(model, prompt, tokens(outputs[str(i)]), first)
    assert_idle(core)


def test_a_preempted_request_reuses_what_is_left_of_its_prefix(model: Transformer):
    core = engine(model, cache_tokens=96)
    prompts = random_prompts(5, [30, 30, 30])
    outputs = run(core, [greedy(i, prompt, 40) for i, prompt in enumerate(prompts)])
    assert core.stats().preemptions > 0
    for i, prompt in enumerate(prompts):
        expected = generate(engine(model), prompt, temperature=0, max_tokens=40)
        assert_same_text(model, prompt, tokens(outputs[str(i)]), expected)
    assert_idle(core)


@pytest.mark.parametrize("kind", KINDS)
def test_a_seed_gives_the_same_text_in_any_company(kind: str):
    model, prompts = model_of(kind), mixed_prompts()
    options = [{}, {"top_k": 5}, {"top_p": 0.8}, {"min_p": 0.05}, {"repetition_penalty": 1.3}, {"temperature": 0.0}]
    params = [
        SamplingParams(**{"seed": i, "temperature": 0.9, "max_tokens": 12, **options[i % len(options)]})
        for i in range(32)
    ]
    requests = [
        Request(id=str(i), prompt_ids=prompt, params=p)
        for i, (prompt, p) in enumerate(zip(prompts, params, strict=True))
    ]
    core = engine(model, cache_tokens=400)
    together = run(core, requests)
    assert core.stats().preemptions > 0
    for request in requests:
        alone = run(engine(model), [request])
        assert tokens(alone[request.id]) == tokens(together[request.id])


def test_seeds_differ_and_no_seed_is_a_new_one_each_time(model: Transformer):
    core = engine(model)
    texts = {tuple(generate(core, [1, 2, 3], seed=seed, max_tokens=12)) for seed in range(8)}
    assert len(texts) == 8
    assert len({tuple(generate(core, [1, 2, 3], max_tokens=12)) for _ in range(8)}) > 1


def test_logprobs_are_those_of_the_models_own_logits(model: Transformer):
    (prompt,) = random_prompts(6, [40])
    params = SamplingParams(
        temperature=0.7, seed=3, top_k=4, repetition_penalty=1.5, presence_penalty=1, min_tokens=9, max_tokens=9,
        logprobs=3,
    )  # fmt: skip
    plain = SamplingParams(temperature=0, max_tokens=9)
    chosen_only = SamplingParams(max_tokens=9, logprobs=0)
    core = engine(model, eos=(3,))
    requests = [Request(id=str(i), prompt_ids=prompt, params=p) for i, p in enumerate((plain, params, chosen_only))]
    outputs = run(core, requests)
    assert all(output.logprobs is None for output in outputs["0"])
    for name, k in (("1", 3), ("2", 0)):
        text = tokens(outputs[name])
        expected = all_logits(model, prompt + text).log_softmax(-1)[len(prompt) - 1 : -1]
        for token, row, output in zip(text, expected, outputs[name], strict=True):
            assert output.logprobs is not None
            (found,) = output.logprobs
            assert found.logprob == pytest.approx(float(row[token]), abs=1e-4)
            assert [value for _, value in found.top] == pytest.approx(row.topk(k).values.tolist(), abs=1e-4)
            assert all(float(row[i]) == pytest.approx(value, abs=1e-4) for i, value in found.top)


def first_repeat_free(text: list[int], start: int) -> int:
    """Index >= start of a token that does not occur before it."""
    return next(i for i in range(start, len(text)) if text[i] not in text[:i])


def finish(outputs: list[Output]) -> tuple[str | None, int | None]:
    assert all(output.finish_reason is None for output in outputs[:-1])
    return outputs[-1].finish_reason, outputs[-1].stop_reason


def test_how_a_request_ends(model: Transformer):
    prompt = mixed_prompts()[4]
    text = generate(engine(model), prompt, temperature=0, max_tokens=60)
    end = first_repeat_free(text, 3)
    token = text[end]

    def ends(eos: tuple[int, ...] = (), **params: object) -> tuple[list[int], tuple[str | None, int | None]]:
        p = SamplingParams(**{"temperature": 0, "max_tokens": 60, **params})
        outputs = run(engine(model, eos=eos), [Request(id="x", prompt_ids=prompt, params=p)])["x"]
        return tokens(outputs), finish(outputs)

    assert ends() == (text, ("length", None))
    assert ends(eos=(token,)) == (text[: end + 1], ("stop", None))
    assert ends(eos=(token,), ignore_eos=True) == (text, ("length", None))
    assert ends(stop_token_ids=(token,)) == (text[: end + 1], ("stop", token))
    assert ends(stop_token_ids=(token,), max_tokens=end + 1) == (text[: end + 1], ("stop", token))
    assert ends(stop_token_ids=(token,), max_tokens=end) == (text[:end], ("length", None))
    assert ends(eos=(token,), min_tokens=end) == (text[: end + 1], ("stop", None))
    later, _ = ends(eos=(token,), min_tokens=end + 1)
    assert (later[:end], len(later) > end + 1) == (text[:end], True)
    assert token not in later[: end + 1]
    assert ends(max_tokens=1) == (text[:1], ("length", None))


def test_end_tokens_the_model_does_not_have_are_no_matter():
    core = engine(model_of("gqa"), eos=(5, VOCAB, 10 * VOCAB))
    assert len(generate(core, [1, 2, 3], temperature=0, min_tokens=8, max_tokens=8)) == 8


def test_the_context_and_the_cache_end_a_request_by_length(model: Transformer):
    (prompt,) = random_prompts(7, [20])
    for config in ({"max_model_len": 50}, {"cache_tokens": 48}, {"cache_tokens": 48, "max_num_seqs": 1}):
        core = engine(model, **config)
        limit = min(config.get("max_model_len", CONTEXT), config.get("cache_tokens", CONTEXT))
        for max_tokens in (None, 10_000):
            params = SamplingParams(temperature=0, max_tokens=max_tokens)
            outputs = run(core, [Request(id=str(i), prompt_ids=prompt, params=params) for i in range(3)])
            for i in range(3):
                assert len(tokens(outputs[str(i)])) == limit - len(prompt)
                assert outputs[str(i)][-1].finish_reason == "length"
        assert_idle(core)


@pytest.mark.parametrize(
    ("prompt", "params", "words"),
    [
        ([], {}, "prompt is empty"),
        ([1] * 64, {}, "64 tokens .* cache holds 64"),
        ([1] * 9999, {}, "9999 tokens"),
        ([1, VOCAB], {}, f"token id {VOCAB} .* vocabulary of {VOCAB}"),
        ([-1, 1], {}, "token id -1"),
        ([1], {"stop_token_ids": (VOCAB + 3,)}, f"token id {VOCAB + 3}"),
        ([1], {"stop_token_ids": tuple(range(VOCAB)), "min_tokens": 1}, "min_tokens"),
    ],
    ids=str,
)
def test_what_can_never_be_served_is_refused(prompt: list[int], params: dict[str, object], words: str):
    core = engine(model_of("gqa"), cache_tokens=64)
    with pytest.raises(RequestError, match=words):
        core.add(Request(id="x", prompt_ids=prompt, params=SamplingParams(**params)))
    assert_idle(core)


def test_the_context_is_named_where_it_is_the_limit():
    core = engine(model_of("gqa"), max_model_len=30)
    with pytest.raises(RequestError, match=r"30 tokens .* context is 30"):
        core.add(greedy("x", [1] * 30))
    core.add(greedy("x", [1] * 29))
    with pytest.raises(RequestError, match="'x' is in flight"):
        core.add(greedy("x", [1]))
    run(core, [])
    assert_idle(core)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"max_model_len": CONTEXT + 1}, "max_model_len"),
        ({"max_num_seqs": 0}, "max_num_seqs"),
        ({"block_size": -1}, "block_size"),
        ({"cache_tokens": 0}, "cache_tokens"),
        ({"max_batched_tokens": 0}, "max_batched_tokens"),
    ],
    ids=str,
)
def test_a_configuration_that_makes_no_sense_is_refused(config: dict[str, int], words: str):
    with pytest.raises(CapacityError, match=words):
        engine(model_of("gqa"), **config)


def test_without_cache_tokens_a_cpu_engine_takes_what_it_can_use():
    core = engine(model_of("mla"), cache_tokens=None, max_num_seqs=3, max_model_len=100)
    assert core.stats().total_blocks == 3 * 7


def test_abort_in_any_state(model: Transformer):
    core = engine(model, max_num_seqs=2, max_batched_tokens=24)
    prompts = random_prompts(8, [10, 100, 10, 10])
    for i, prompt in enumerate(prompts):
        core.add(greedy(i, prompt, 30))
    core.step()
    assert (core.stats().num_running, core.stats().num_waiting) == (2, 2)
    core.abort(["3", "unknown"])  # waiting
    core.abort(["1"])  # in the middle of its prefill
    core.scheduler.check()
    seen = {output.request_id for _ in range(3) for output in core.step()}
    assert seen == {"0", "2"}
    core.abort(["0"])  # decoding
    core.scheduler.check()
    assert set(run(core, [])) == {"2"}
    core.abort(["2", "0"])  # over
    assert_idle(core)


def test_broken_logits_end_their_request_and_no_other():
    model = tiny_model("mla", seed=3)
    expected = {i: generate(engine(model), [i, i + 1], temperature=0, max_tokens=4) for i in range(3)}
    bad = next(t for t in range(VOCAB) if all(t not in [i, i + 1, *text] for i, text in expected.items()))
    model.embedding[bad] = float("nan")
    core = engine(model)
    sampled = {"temperature": 1.0, "top_p": 0.9, "logprobs": 2, "frequency_penalty": 0.5}
    for company in ({"temperature": 0}, sampled):
        bad_request = Request(id="bad", prompt_ids=[1, bad], params=SamplingParams(max_tokens=4, **company))
        outputs = run(core, [bad_request, *(greedy(i, [i, i + 1], 4) for i in range(3))])
        (ended,) = outputs["bad"]
        assert ended.finish_reason == "abort"
        assert ended.error is not None
        assert "not finite" in ended.error
        assert ended.token_ids == []
        for i in range(3):
            assert tokens(outputs[str(i)]) == expected[i]
        assert_idle(core)


def test_a_failing_step_leaks_nothing(monkeypatch: pytest.MonkeyPatch):
    model = tiny_model("gqa")
    core = engine(model, max_num_seqs=2)
    for i in range(4):
        core.add(greedy(i, [1, 2, 3]))
    core.step()
    with monkeypatch.context() as patch:
        patch.setattr(model, "forward", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            core.step()
    assert_idle(core)
    assert len(generate(core, [1, 2, 3], temperature=0, max_tokens=5)) == 5


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_random_arrivals_and_aborts_change_nobodys_text(data: st.DataObject):
    kind = data.draw(st.sampled_from(KINDS))
    model, expected = model_of(kind), texts_alone(kind)
    core = engine(
        model,
        block_size=data.draw(st.sampled_from([1, 4, 16])),
        cache_tokens=data.draw(st.integers(160, 400)),
        max_num_seqs=data.draw(st.integers(1, 8)),
        max_batched_tokens=data.draw(st.integers(8, 100)),
    )
    prompts = mixed_prompts()
    got: dict[int, list[int]] = {}
    finished: set[int] = set()
    arrivals = data.draw(st.lists(st.integers(0, 31), unique=True, min_size=1, max_size=10))
    while arrivals or core.has_work:
        if arrivals and (not core.has_work or data.draw(st.booleans())):
            i = arrivals.pop()
            core.add(greedy(i, prompts[i]))
            got[i] = []
        if data.draw(st.integers(0, 15)) == 0:
            core.abort([str(data.draw(st.sampled_from(sorted(got))))])
        for output in core.step():
            got[int(output.request_id)] += output.token_ids
            if output.finish_reason:
                finished.add(int(output.request_id))
        core.scheduler.check()
    for i, text in got.items():
        assert_same_text(model, prompts[i], text, expected[i][: len(text)])
        assert i not in finished or len(text) == 20
    assert_idle(core)


def test_lower_precision_runs(model: Transformer):
    kind = model.spec.attention_kind
    half = tiny_model(kind, dtype=torch.bfloat16)
    outputs = run(engine(half), [greedy(i, prompt, 5) for i, prompt in enumerate(mixed_prompts(4))])
    assert all(len(tokens(o)) == 5 for o in outputs.values())
