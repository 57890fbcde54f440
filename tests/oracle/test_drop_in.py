"""`model.generate(custom_generate=hf_generate(…))` gives what plain `model.generate`, or the engine, gives."""

import queue
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import (
    DynamicCache,
    GenerationConfig,
    MaxLengthCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
    TextIteratorStreamer,
    TextStreamer,
)

import tiny
from parsedec import LabelJudge, Parse, PrefixVerification, Sampling, TargetOnly, hf_generate, load
from parsedec.boundary import FirstFailure
from parsedec.errors import ConfigError, IncompatibleStack, PromptError
from parsedec.models.language_model import LanguageModel
from parsedec.segmenters import EveryTokens
from parsedec_adapters.draft_model import DraftModel
from parsedec_adapters.ngram import Ngram

QUESTION = "Tom has 3 apples and buys 4 more. How many apples does he have?"
PROMPT = torch.tensor([[2, 20, 31, 12, 20, 31, 12, 3]])
FAMILIES = ["llama", "qwen3", "gemma3", "qwen3_next"]


@pytest.fixture(scope="module")
def zoo():
    return load("zoo:target", device="cpu", dtype="float32"), load("zoo:draft", device="cpu", dtype="float32")


def asked(model):
    text = [{"role": "user", "content": QUESTION}]
    return model.tokenizer.apply_chat_template(text, add_generation_prompt=True, return_tensors="pt", return_dict=True)


def plain(model, ids=PROMPT, **settings):
    return model.hf.generate(ids, attention_mask=torch.ones_like(ids), **settings)


def dropped_in(model, ids=PROMPT, settings=None, **made):
    parse = hf_generate(tokenizer=model.tokenizer, **made)
    return model.hf.generate(ids, attention_mask=torch.ones_like(ids), custom_generate=parse, **(settings or {}))


@pytest.mark.parametrize("inner", [None, Ngram(), DraftModel(model=None, length=3)])
@pytest.mark.parametrize("family", FAMILIES)
def test_inner_level_alone_is_plain_generate(family, inner):
    model = tiny.model(family)
    settings = {"max_new_tokens": 24, "do_sample": False}
    draft = tiny.model("llama", seed=7, layers=1)
    ours = dropped_in(model, settings=settings, draft=draft, inner=inner, outer=TargetOnly())
    assert torch.equal(ours, plain(model, **settings))


@pytest.mark.parametrize("filters", [{}, {"top_k": 5}, {"top_k": 0, "top_p": 0.7}, {"temperature": 0.6, "top_k": 0}])
def test_sampling_from_the_global_generator_is_generates_own(filters):
    model = tiny.model("llama")
    settings = {"max_new_tokens": 24, "do_sample": True, **filters}
    torch.manual_seed(5)
    theirs = plain(model, **settings)
    torch.manual_seed(5)
    assert torch.equal(dropped_in(model, settings=settings), theirs)


def test_a_given_generator_is_used_and_the_global_one_left_alone():
    model, settings = tiny.model("llama"), {"max_new_tokens": 16, "do_sample": True}
    state = torch.get_rng_state()
    answers = [
        dropped_in(model, settings=settings, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    ]
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(answers[0], answers[1])
    assert not torch.equal(answers[0], answers[2])


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_two_levels_are_the_engine(zoo, temperature):
    """The same callable twice, on the zoo pair: the engine's own answer both times."""
    target, draft = zoo
    inputs, results = asked(target), []
    engine = Parse(target, draft, inner=Ngram(), outer=PrefixVerification(boundary=FirstFailure(threshold=0.5)))
    generator = torch.Generator()
    parse = hf_generate(
        draft=draft,
        inner=Ngram(),
        outer=PrefixVerification(boundary=FirstFailure(threshold=0.5)),
        target=target,
        generator=generator,
        on_result=results.append,
    )
    sampled = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
    for seed in (3, 4):
        own = engine.generate(
            inputs["input_ids"][0].tolist(),
            max_new_tokens=120,
            sampling=Sampling(temperature=temperature),
            generator=torch.Generator().manual_seed(seed),
        )
        generator.manual_seed(seed)
        ids = target.hf.generate(**inputs, custom_generate=parse, max_new_tokens=120, **sampled)
        assert ids[0, : inputs["input_ids"].shape[1]].tolist() == inputs["input_ids"][0].tolist()
        assert tuple(ids[0, inputs["input_ids"].shape[1] :].tolist()) == own.tokens
        assert results[-1].text == own.text
    assert any(result.counters.judge_passes for result in results)


def test_streamer_pieces_spell_the_answer(zoo):
    target, draft = zoo
    inputs = asked(target)
    parse = hf_generate(draft=draft, target=target)
    streamer = TextIteratorStreamer(target.tokenizer, skip_prompt=True, timeout=60, skip_special_tokens=True)
    answers = queue.Queue()
    settings = {"max_new_tokens": 120, "do_sample": False, "custom_generate": parse}
    worker = threading.Thread(target=lambda: answers.put(target.hf.generate(**inputs, streamer=streamer, **settings)))
    worker.start()
    pieces = [piece for piece in streamer if piece]
    worker.join()
    ids = answers.get(timeout=60)[0, inputs["input_ids"].shape[1] :]
    assert "".join(pieces) == target.tokenizer.decode(ids, skip_special_tokens=True)
    assert len(pieces) > 1


def test_text_streamer_prints_what_it_prints_for_generate(zoo, capsys):
    target, _ = zoo
    inputs, settings = asked(target), {"max_new_tokens": 60, "do_sample": False}
    target.hf.generate(**inputs, streamer=TextStreamer(target.tokenizer), **settings)
    theirs = capsys.readouterr().out
    parse = hf_generate(target=target, inner=Ngram())
    target.hf.generate(**inputs, streamer=TextStreamer(target.tokenizer), custom_generate=parse, **settings)
    assert capsys.readouterr().out == theirs != ""


def test_a_streamer_ends_when_a_request_is_refused():
    model = tiny.model("llama")
    streamer = TextIteratorStreamer(model.tokenizer, timeout=5)
    with pytest.raises(IncompatibleStack, match="RepetitionPenalty"):
        dropped_in(model, settings={"repetition_penalty": 1.2, "streamer": streamer})
    assert len(list(streamer)) >= 1  # it raises queue.Empty where nobody ends it


def test_a_wrapped_one_finds_the_streamer_and_the_assistant(zoo, capsys):
    target, _ = zoo
    parse = hf_generate(target=target, inner=Ngram())
    settings = {**asked(target), "max_new_tokens": 8, "do_sample": False}

    def logged(*args, **options):
        return (lambda: parse(*args, **options))()

    target.hf.generate(custom_generate=parse, streamer=TextStreamer(target.tokenizer), **settings)
    direct = capsys.readouterr().out
    target.hf.generate(custom_generate=logged, streamer=TextStreamer(target.tokenizer), **settings)
    assert capsys.readouterr().out == direct != ""
    with pytest.raises(IncompatibleStack, match="assistant_model"):
        target.hf.generate(custom_generate=logged, assistant_model=target.hf, **settings)


def test_one_that_cannot_find_its_caller_says_so(zoo, caplog):
    """A call from another thread than that of `generate`."""
    target, _ = zoo
    parse = hf_generate(target=target)

    def elsewhere(*args, **options):
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(parse, *args, **options).result()

    target.hf.generate(custom_generate=elsewhere, **asked(target), max_new_tokens=2, do_sample=False)
    assert "the streamer gets nothing" in caplog.text


@pytest.mark.parametrize("inner", [None, Ngram()])
def test_end_tokens_limits_and_criteria_are_those_of_the_call(inner):
    model = tiny.model("llama")
    free = plain(model, max_new_tokens=30, do_sample=False, eos_token_id=tiny.VOCAB - 1)[0, PROMPT.shape[1] :].tolist()
    end = free[9]
    late = StoppingCriteriaList([lambda ids, scores, **_: torch.full((1,), ids.shape[1] > PROMPT.shape[1] + 12)])
    cases = [
        {"max_new_tokens": 7},
        {"max_length": PROMPT.shape[1] + 5},
        {"max_new_tokens": 30, "eos_token_id": end},
        {"max_new_tokens": 30, "eos_token_id": [end, free[4]]},
        {"generation_config": GenerationConfig(max_new_tokens=11, eos_token_id=free[20])},
        {"max_new_tokens": 30, "stopping_criteria": late},
        {"max_new_tokens": 30, "stopping_criteria": [MaxLengthCriteria(PROMPT.shape[1] + 3)]},
    ]
    for settings in cases:
        settings = {"do_sample": False, **settings}
        assert torch.equal(dropped_in(model, settings=settings, inner=inner), plain(model, **settings)), settings


def test_stop_strings(zoo):
    """As a criterion they end the answer where they end it for `generate`; as `stop` of the drop-in, too."""
    target, draft = zoo
    inputs, settings = asked(target), {"max_new_tokens": 60, "do_sample": False}
    start = inputs["input_ids"].shape[1]
    stop = target.decode(target.hf.generate(**inputs, **settings)[0, start:].tolist())[8:12]
    criteria = [StopStringCriteria(target.tokenizer, [stop])]
    theirs = target.hf.generate(**inputs, **settings, stopping_criteria=criteria)
    assert stop in target.decode(theirs[0, start:].tolist())
    by_itself, drafting = hf_generate(target=target, inner=Ngram()), hf_generate(target=target, draft=draft)
    ours = target.hf.generate(**inputs, **settings, stopping_criteria=criteria, custom_generate=by_itself)
    told = target.hf.generate(**inputs, **settings, custom_generate=hf_generate(target=target, stop=[stop]))
    drafted = target.hf.generate(**inputs, **settings, stopping_criteria=criteria, custom_generate=drafting)
    assert torch.equal(ours, theirs)
    assert torch.equal(told, theirs)
    assert target.decode(drafted[0, start:].tolist()).count(stop) == 1


def test_padding_on_the_left_stays_in_front():
    model, settings = tiny.model("llama"), {"max_new_tokens": 12, "do_sample": False}
    ids = torch.cat([torch.zeros(1, 3, dtype=torch.long), PROMPT], dim=1)
    mask = (torch.arange(ids.shape[1]) >= 3).long()[None]
    theirs = model.hf.generate(ids, attention_mask=mask, **settings)
    parse = hf_generate(tokenizer=model.tokenizer)
    assert torch.equal(model.hf.generate(ids, attention_mask=mask, custom_generate=parse, **settings), theirs)
    mask[0, 5] = 0
    with pytest.raises(PromptError, match="attention_mask"):
        model.hf.generate(ids, attention_mask=mask, custom_generate=parse, **settings)


def test_the_output_object_has_the_sequences():
    model = tiny.model("llama")
    settings = {"max_new_tokens": 8, "do_sample": False, "return_dict_in_generate": True}
    assert torch.equal(dropped_in(model, settings=settings).sequences, plain(model, **settings).sequences)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"num_beams": 3}, "num_beams"),
        ({"num_return_sequences": 2, "do_sample": True}, "num_return_sequences"),
        ({"repetition_penalty": 1.3}, "RepetitionPenaltyLogitsProcessor"),
        ({"min_new_tokens": 3}, "MinNewTokens"),
        ({"do_sample": True, "min_p": 0.1}, "MinPLogitsWarper"),
        ({"logits_processor": [lambda ids, scores: scores]}, "function"),
        ({"return_dict_in_generate": True, "output_scores": True}, "output_scores"),
        ({"prompt_lookup_num_tokens": 3}, "assisted_generation"),
        ({"past_key_values": DynamicCache()}, "past_key_values"),
        ({"cache_implementation": "static"}, "cache_implementation"),
        ({"assistant_model": "draft"}, "assistant_model"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(settings, named):
    model = tiny.model("llama")
    if settings.get("assistant_model"):
        settings = {"assistant_model": tiny.model("llama", seed=7, layers=1).hf}
    with pytest.raises(IncompatibleStack, match=named):
        dropped_in(model, settings={"max_new_tokens": 4, **settings})


def test_a_batch_is_refused():
    with pytest.raises(IncompatibleStack, match="batch size is 2"):
        dropped_in(tiny.model("llama"), ids=PROMPT.repeat(2, 1))


def test_models_that_do_not_fit_are_refused(zoo):
    model = tiny.model("llama")
    with pytest.raises(IncompatibleStack, match="different vocabulary"):
        dropped_in(model, draft=zoo[1], outer=PrefixVerification(judge=LabelJudge(labels=("Correct", "Incorrect"))))
    with pytest.raises(ConfigError, match=r"target\.hf\.generate"):
        model.hf.generate(PROMPT, custom_generate=hf_generate(target=zoo[0]))
    with pytest.raises(ConfigError, match="tokenizer="):
        model.hf.generate(PROMPT, custom_generate=hf_generate())


def test_a_transformers_model_drafts_with_the_targets_tokenizer():
    """Drafts by a copy of the target, all kept: what stands is the target's own greedy text."""
    model, results = tiny.model("llama"), []
    twin = LanguageModel.wrap(model.hf, model.tokenizer)
    outer = PrefixVerification(
        judge=LabelJudge(labels=("Correct", "Incorrect")),
        segmenter=EveryTokens(delta=4),
        boundary=FirstFailure(threshold=0.0, full_threshold=0.0),
    )
    settings = {"max_new_tokens": 20, "do_sample": False}
    ours = dropped_in(model, settings=settings, draft=twin.hf, outer=outer, on_result=results.append)
    assert torch.equal(ours, plain(model, **settings))
    assert results[0].kept_share == 1
