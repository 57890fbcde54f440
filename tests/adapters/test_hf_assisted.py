"""Hugging Face's assisted generation: its candidate generator in our loop, and its own loop as a baseline."""

import copy
import dataclasses
import itertools
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

import tiny
from every_draw import relative
from parsedec import Parse, Sampling, StopReason, TargetOnly
from parsedec.errors import ConfigError, IncompatibleStack
from parsedec.models.language_model import SELECTS_LAYERS, LanguageModel
from parsedec.peers import HfGenerate, clean_settings, settings
from parsedec.sampling import Sampler
from parsedec.types import Outcome, Seen
from parsedec_adapters.draft_model import DraftModel
from parsedec_adapters.hf_assisted import HfAssisted

TEXT = torch.randint(5, tiny.VOCAB, (40,), generator=torch.Generator().manual_seed(3)).tolist()
SAMPLED = Sampling(temperature=0.9, top_k=8)
rolls_windows_back = pytest.mark.skipif(
    not SELECTS_LAYERS, reason="assisted generation of transformers before 5.23 fails past a sliding window"
)


def greedy():
    return Sampler(Sampling())


def sampled(seed=0):
    return Sampler(SAMPLED, torch.Generator().manual_seed(seed))


# in our loop


def test_guesses_are_those_of_the_draft_model(tiny_target, tiny_draft):
    theirs = HfAssisted(length=4, confidence=None).bind(tiny_target, tiny_draft)
    ours = DraftModel(length=4).bind(tiny_target, tiny_draft)
    states = [inner.start(TEXT[:7], Seen(), greedy()) for inner in (theirs, ours)]
    for a, b in itertools.pairwise((7, 8, 12, 13)):
        trees = [inner.propose(state, 9).tokens for inner, state in zip((theirs, ours), states, strict=True)]
        assert trees[0] == trees[1]
        outcome = Outcome(tuple(TEXT[a:b]), Seen())
        states = [inner.commit(state, outcome) for inner, state in zip((theirs, ours), states, strict=True)]


@pytest.mark.parametrize("threshold", [0.3, 0.6, 0.9])
def test_it_stops_where_our_own_confidence_rule_stops(tiny_target, tiny_draft, threshold):
    trees = []
    for inner in (HfAssisted(length=6, confidence=threshold), DraftModel(length=6, confidence=threshold)):
        bound = inner.bind(tiny_target, tiny_draft)
        trees.append([bound.propose(bound.start(TEXT[:n], Seen(), greedy()), 9).tokens for n in range(3, 9)])
    assert trees[0] == trees[1]


def test_sampled_guesses_carry_what_they_were_drawn_from(tiny_target, tiny_draft):
    inner = HfAssisted(length=3, confidence=None).bind(tiny_target, tiny_draft)
    before = torch.random.get_rng_state()
    tree = inner.propose(inner.start(TEXT[:8], Seen(), sampled()), 9)
    assert torch.equal(torch.random.get_rng_state(), before)  # the global generator is nobody's
    with torch.inference_mode():
        logits = tiny_draft.hf(input_ids=torch.tensor([[*TEXT[:8], *tree.tokens[1:-1]]])).logits[0, -3:]
    torch.testing.assert_close(tree.logq[1:], sampled().log_distribution(logits), rtol=0, atol=1e-4)


def test_guesses_are_drawn_from_that_distribution(tiny_target, tiny_draft):
    """Chi-square of 250 first guesses, 8 outcomes; a correct drawing fails it once in a million seeds."""
    inner, sampler = HfAssisted(length=1).bind(tiny_target, tiny_draft), sampled(5)
    state, counts, draws = inner.start(TEXT[:6], Seen(), sampler), [0] * tiny.VOCAB, 250
    for _ in range(draws):
        tree = inner.propose(state, 1)
        counts[tree.tokens[1]] += 1
    expected = tree.logq[1].exp() * draws
    assert not any(n for n, e in zip(counts, expected.tolist(), strict=True) if e == 0)
    cells = [(n, e) for n, e in zip(counts, expected.tolist(), strict=True) if e >= 5]
    rest = draws - sum(n for n, _ in cells), draws - sum(e for _, e in cells)
    cells += [rest] if rest[1] > 1 else []
    statistic, freedom = sum((n - e) ** 2 / e for n, e in cells), len(cells) - 1
    score = ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / (2 / (9 * freedom)) ** 0.5
    assert freedom >= 2
    assert score < 4.75


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral_window"])
def test_in_our_loop_it_never_changes_tokens(family):
    model = tiny.model(family)
    prompt, tokens = tiny.plain_answer(model)
    engine = Parse(model, relative(model, noise=0.1), inner=HfAssisted(length=5, confidence=0.1), outer=TargetOnly())
    result = engine.generate(prompt, max_new_tokens=len(tokens))
    assert list(result.tokens) == tokens
    assert result.counters.inner_steps < 0.7 * len(tokens)


def test_accepted_guesses_are_not_read_again(tiny_target, tiny_draft, monkeypatch):
    rows = []
    inner = HfAssisted(length=3, confidence=None).bind(tiny_target, tiny_draft)
    hook = tiny_draft.hf.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    state = inner.start(TEXT[:9], Seen(), greedy())
    guesses = inner.propose(state, 3).tokens[1:]
    state = inner.commit(state, Outcome((*guesses, 20), Seen()))
    inner.propose(state, 3)
    hook.remove()
    assert rows == [9, 1, 1, 2, 1, 1]  # the last guess and the target's token, then one by one


@pytest.mark.parametrize(
    "parts", [dict(inner=HfAssisted(length=3), outer=TargetOnly()), dict(outer=HfGenerate(assisted=True))], ids=str
)
def test_requests_in_threads_write_as_alone_and_leave_the_models_as_they_are(tiny_target, parts):
    models = [tiny_target, relative(tiny_target)]
    before = [model.hf.generation_config for model in models]
    engine = Parse(*models, **parts)

    def write(seed):
        return engine.generate(TEXT[seed : seed + 5], max_new_tokens=16, sampling=SAMPLED, seed=seed).tokens

    alone = [write(seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(write, range(4))) == alone
    assert all(model.hf.generation_config is config for model, config in zip(models, before, strict=True))


def test_refusals(tiny_target, tiny_draft):
    with pytest.raises(IncompatibleStack, match="recurrent"):
        HfAssisted().bind(tiny_target, dataclasses.replace(tiny.model("qwen3_next"), tokenizer=tiny_target.tokenizer))
    with pytest.raises(IncompatibleStack, match="vocabulary"):
        HfAssisted().bind(tiny_target, dataclasses.replace(tiny_draft, tokenizer=tiny.letters()))
    with pytest.raises(IncompatibleStack, match="no model"):
        HfAssisted().bind(tiny_target, None)
    with pytest.raises(IncompatibleStack, match="bind"):
        HfAssisted().start([1], Seen(), greedy())
    for wrong in (dict(length=0), dict(confidence=1.5)):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            HfAssisted(**wrong)


# its own loop


def generated(model, prompt, draft=None, new=48, options=None, **request):
    outer = HfGenerate(assisted=draft is not None, **(options or {}))
    return Parse(model, draft, outer=outer).generate(prompt, max_new_tokens=new, **request)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "qwen3_next"])
def test_plain_generate_is_the_baseline(family):
    model = tiny.model(family)
    prompt, tokens = tiny.plain_answer(model)
    result = generated(model, prompt)
    assert list(result.tokens) == tokens
    assert result.stop is StopReason.TOKEN_LIMIT
    ours = Parse(model, outer=TargetOnly()).generate(prompt, max_new_tokens=48)
    assert result.counters == ours.counters  # calls, rows and steps, counted alike
    assert (result.text, result.spans) == (ours.text, ours.spans)


@pytest.mark.parametrize("family", ["llama", "qwen3", pytest.param("mistral_window", marks=rolls_windows_back)])
@pytest.mark.parametrize("schedule", ["constant", "heuristic"])
def test_assisted_generate_writes_the_same_with_fewer_calls(family, schedule):
    model = tiny.model(family)
    prompt, tokens = tiny.plain_answer(model)
    result = generated(
        model, prompt, relative(model, noise=0.1), options=dict(length=4, confidence=None, schedule=schedule)
    )
    assert list(result.tokens) == tokens
    counters = result.counters
    assert counters.target_calls < 0.7 * len(tokens)
    assert counters.inner_steps == counters.target_calls
    assert sum(counters.accepted_by_depth) == len(tokens) - counters.target_calls


def test_assisted_by_a_model_of_another_vocabulary(tiny_target, tiny_draft):
    hf = copy.deepcopy(tiny_draft.hf)
    hf.resize_token_embeddings(len(tiny.letters()))
    other = dataclasses.replace(tiny_draft, hf=hf, tokenizer=tiny.letters())
    expected = Parse(tiny_target, outer=TargetOnly()).generate("w5w6w7", max_new_tokens=12).tokens
    assert generated(tiny_target, "w5w6w7", other, new=12).tokens == expected
    with pytest.raises(IncompatibleStack, match="prunes the draft model"):
        generated(tiny_target, "w5w6w7", other, sampling=SAMPLED, generator=torch.Generator().manual_seed(0))
    with pytest.raises(IncompatibleStack, match="compares only sizes"):
        generated(tiny_target, "w5w6w7", dataclasses.replace(tiny_draft, tokenizer=tiny.letters()))


def test_sampling_repeats_with_its_seed_and_is_generates_own(tiny_target):
    def run(seed, draft=None):
        generator = torch.Generator().manual_seed(seed)
        return list(generated(tiny_target, TEXT[:5], draft, 12, sampling=SAMPLED, generator=generator).tokens)

    before = torch.random.get_rng_state()
    assert run(1) == run(1) != run(2)
    assert run(1, relative(tiny_target)) == run(1, relative(tiny_target))
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(int(torch.randint(1 << 62, (), generator=torch.Generator().manual_seed(1))))
    prompt = torch.tensor([TEXT[:5]])
    expected = tiny_target.hf.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12, do_sample=True, temperature=0.9, top_k=8,
        top_p=1.0, pad_token_id=0)  # fmt: skip
    torch.random.set_rng_state(before)
    assert run(1) == expected[0, 5:].tolist()


@pytest.mark.parametrize("assisted", [False, True])
def test_stop_strings_end_tokens_and_limits(tiny_target, assisted):
    prompt, tokens = tiny.plain_answer(tiny_target)
    draft = relative(tiny_target) if assisted else None
    stop = tiny_target.decode(tokens)[10:15]
    for request in (dict(stop=[stop]), dict(new=7), dict(new=1)):
        ours = Parse(tiny_target, outer=TargetOnly()).generate(
            prompt, max_new_tokens=request.get("new", 48), stop=request.get("stop", ())
        )
        theirs = generated(tiny_target, prompt, draft, **request)
        assert (theirs.tokens, theirs.text, theirs.stop) == (ours.tokens, ours.text, ours.stop)
    closing = tiny.with_end_token(tiny_target, tokens[9])
    result = generated(closing, prompt, draft)
    assert list(result.tokens) == tokens[: tokens.index(tokens[9]) + 1]
    assert result.stop is StopReason.END_TOKEN


def test_the_context_limit_ends_an_answer():
    prompt, tokens = tiny.plain_answer(tiny.model("llama"))
    result = generated(tiny.model("llama", context_limit=len(prompt) + 6), prompt)
    assert list(result.tokens) == tokens[:6]
    assert result.stop is StopReason.CONTEXT_LIMIT


def test_nothing_of_the_models_is_changed(tiny_target):
    """Also where the checkpoints ask for something of their own, or the loop fails half way."""
    models = [tiny_target, relative(tiny_target)]
    configs = [model.hf.generation_config for model in models]
    contents = [config.to_dict() for config in configs]
    prompt, tokens = tiny.plain_answer(tiny_target)
    for config in configs:
        config.repetition_penalty = 5.0
    try:
        result = generated(tiny_target, prompt, models[1], options=dict(length=3, schedule="heuristic"))
        assert list(result.tokens) == tokens
        with pytest.raises(ValueError, match="mid"), clean_settings(tiny_target.hf):
            raise ValueError("mid")
    finally:
        for config, content in zip(configs, contents, strict=True):
            config.repetition_penalty = content["repetition_penalty"]
    assert [model.hf.generation_config for model in models] == configs
    assert [config.to_dict() for config in configs] == contents
    assert not tiny_target.hf._forward_pre_hooks


def test_end_tokens_only_the_checkpoint_names_end_an_answer(tiny_target):
    plain = Parse(tiny_target, outer=TargetOnly()).generate(TEXT, max_new_tokens=24).tokens
    hf = copy.deepcopy(tiny_target.hf)
    hf.generation_config.eos_token_id = [1, plain[5]]
    model = LanguageModel.wrap(hf, tiny_target.tokenizer)
    baseline = Parse(model, outer=HfGenerate()).generate(TEXT, max_new_tokens=24)
    assert (baseline.tokens, baseline.stop) == (plain[: plain.index(plain[5]) + 1], StopReason.END_TOKEN)
    assert Parse(model, outer=TargetOnly()).generate(TEXT, max_new_tokens=24).tokens == baseline.tokens


def test_filters_that_are_off_are_named():
    assert settings(tiny.model("llama"), Sampling(temperature=1.0), 5).top_k == 0


def test_the_time_of_the_first_token_is_its_own(tiny_target):
    prompt, _ = tiny.plain_answer(tiny_target)
    times = generated(tiny_target, prompt).times
    assert 0 < times.first_token_s < 0.5 * times.wall_s
    assert times.prefill_s <= times.first_token_s
    assert times.prefill_s + times.decode_s <= times.wall_s


def test_refusals_of_the_baseline(tiny_target, tiny_draft):
    with pytest.raises(IncompatibleStack, match=r"ignore inner=DraftModel.*inner=none"):
        Parse(tiny_target, tiny_draft, inner=DraftModel(), outer=HfGenerate())
    words = tiny.tokenizer().backend_tokenizer.to_str().replace('"w1"', '"v1"')
    other = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(words), eos_token="<|end|>", chat_template=tiny.CHAT
    )
    with pytest.raises(IncompatibleStack, match="the same size but with different tokens"):
        Parse(tiny_target, LanguageModel.wrap(tiny_draft.hf, other, name="other"), outer=HfGenerate(assisted=True))
    with pytest.raises(IncompatibleStack, match="needs a draft model"):
        Parse(tiny_target, outer=HfGenerate(assisted=True))
    with pytest.raises(IncompatibleStack, match="recurrent"):
        Parse(tiny.model("qwen3_next"), tiny_draft, outer=HfGenerate(assisted=True))
    for wrong in (dict(length=0), dict(schedule="x"), dict(confidence=2)):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            HfGenerate(**wrong)
