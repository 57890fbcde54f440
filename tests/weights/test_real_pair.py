"""A real pair from disk: PARSEDEC_MODELS=DIR with the Qwen2.5-Coder GGUF files and SmolLM2 (another tokenizer)."""

import os
from pathlib import Path

import pytest
import torch

from parsedec import LabelJudge, Parse, PrefixVerification, TargetOnly, load
from parsedec.boundary import FirstFailure
from parsedec.segmenters import EveryTokens
from parsedec.sessions.session import Session
from parsedec.text.chat import prompt_ids
from parsedec.types import JudgePath

FOLDER = Path(os.environ.get("PARSEDEC_MODELS", "models"))
FILES = {"target": "qwen2.5-coder-1.5b-instruct-q4_k_m.gguf", "draft": "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
         "other": "smollm2-135m-instruct-q4_1.gguf"}  # fmt: skip
pytestmark = [
    pytest.mark.weights,
    pytest.mark.skipif(not all((FOLDER / f).is_file() for f in FILES.values()), reason=f"{FOLDER} lacks {FILES}"),
]
QUESTION = "What is 17 times 3? Answer in one short sentence."


@pytest.fixture(scope="module")
def models():
    return {name: load(FOLDER / file, dtype="float32") for name, file in FILES.items() if name != "target"}


def test_packed_scores_equal_separate_forwards(models):
    model = models["draft"]
    judge = LabelJudge().bind(model)
    assert judge.chosen is JudgePath.PACKED
    prompt = prompt_ids(model, [{"role": "user", "content": QUESTION}])
    draft = model.encode("17 times 3 is 51. That is all there is to say about it.")
    cuts = [4, 9, len(draft)]
    session = Session(model)
    session.feed(prompt)
    packed = session.judge(draft, cuts, judge.suffix).probe_logits
    for cut, row in zip(cuts, packed, strict=True):
        alone = Session(model).feed([*prompt, *draft[:cut], *judge.suffix])
        torch.testing.assert_close(row, alone.float(), rtol=0, atol=1e-3)


def test_plain_decoding_equals_generate(models):
    model = models["other"]
    ids = prompt_ids(model, [{"role": "user", "content": QUESTION}])
    reference = model.hf.generate(torch.tensor([ids]), max_new_tokens=24, do_sample=False)[0, len(ids) :].tolist()
    assert list(Parse(model, outer=TargetOnly()).generate(QUESTION, max_new_tokens=24).tokens) == reference


def test_a_draft_with_another_tokenizer(models):
    """SmolLM2 drafts for Qwen: the kept text is the draft's, and what follows is the target's own continuation."""
    rule = FirstFailure(threshold=0.0, full_threshold=1.0)
    outer = PrefixVerification(segmenter=EveryTokens(delta=6), boundary=rule, max_draft_tokens=12)
    result = Parse(models["draft"], models["other"], outer=outer).generate(QUESTION, max_new_tokens=24)
    assert result.counters.kept_draft_tokens >= 6
    assert result.spans[0].text.strip()
    assert result.text.startswith(result.spans[0].text)
