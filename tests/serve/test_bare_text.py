"""Text that is gone on with as it is: each model of a pair reads it in its own tokens."""

from types import SimpleNamespace

import httpx
import pytest

import tiny
from parsedec import Limits, Parse
from parsedec.errors import PromptError
from parsedec.models.language_model import LanguageModel
from parsedec.text.chat import bare_ids
from parsedec.text.prompt import BareText
from serving import listening

TEXT = "w5w6w7"


@pytest.fixture(scope="module")
def engine():
    draft = LanguageModel.wrap(tiny.model("llama", seed=9, layers=2).hf, tiny.letters(), name="letters")
    return Parse(tiny.model("llama"), draft)


def test_models_of_different_vocabularies_both_read_it(engine):
    assert not engine.target.same_vocabulary(engine.draft)
    prompt = BareText(TEXT)
    result = engine.generate(prompt, max_new_tokens=8)
    assert result.counters.draft_tokens > 0
    assert result.prompt_tokens == len(engine.target.encode(TEXT, whole=True))
    read = []
    engine.draft.__dict__["encode"] = lambda text, **how: read.append((text, how)) or [5, 6]
    try:
        engine.generate(prompt, max_new_tokens=1)
    finally:
        del engine.draft.__dict__["encode"]
    assert read[0] == (TEXT, {"whole": True})


def test_a_text_completion_of_such_a_pair(engine):
    expected = engine.generate(BareText(TEXT), max_new_tokens=8)
    with listening(engine, model="m", limits=Limits(max_new_tokens=8)) as (address, _):
        answer = httpx.post(f"{address}/v1/completions", json={"model": "m", "prompt": TEXT}, timeout=60).json()
        assert answer["choices"][0]["text"] == expected.text
        details = answer["usage"]["completion_tokens_details"]
        drafted = details["accepted_prediction_tokens"] + details["rejected_prediction_tokens"]
        assert drafted == expected.counters.draft_tokens > 0
        empty = httpx.post(f"{address}/v1/completions", json={"model": "m", "prompt": ""}, timeout=60)
        assert (empty.status_code, "is empty" in empty.text) == (400, True)


def test_nothing_cannot_be_gone_on_with(engine):
    with pytest.raises(PromptError, match="the prompt is empty"):
        engine.generate(BareText(""), max_new_tokens=1)


def test_what_the_tokenizer_puts_in_front_is_there_once():
    model = SimpleNamespace(tokenizer=SimpleNamespace(bos_token="<s>"), encode=lambda text, whole: (text, whole))
    assert bare_ids(model, "a<s>") == ("a<s>", True)
    assert bare_ids(model, "<s>a") == ("<s>a", False)
