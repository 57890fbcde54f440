"""Models of one tokenizer whose output matrices have different numbers of rows: padding spells nothing, but a model may
write it, and prompts may hold it. Nothing crashes, and what the target writes does not change."""

import copy
import dataclasses

import pytest
import torch

import tiny
from every_draw import largest_error, relative
from parsedec import Parse, PrefixVerification, Sampling, StopReason, TargetOnly
from parsedec.loop import Rounds
from parsedec.segmenters import EveryTokens
from parsedec.sessions.backends import open_session, runs_static
from parsedec.streamed import StreamedVerification
from parsedec_adapters.draft_model import DraftModel
from parsedec_adapters.hf_assisted import HfAssisted
from parsedec_adapters.pard import Pard

ROWS = 80
PROMPT = [6, 70, 25, 79, 30]
INNERS = {
    "draft_model": DraftModel(length=3),
    "pard": Pard(length=3, mask_token=4),
    "hf_assisted": HfAssisted(length=3, confidence=None),
}
every_inner = pytest.mark.parametrize("inner", INNERS.values(), ids=INNERS)


def padded(model, rows=ROWS):
    """The same model with more rows; some of the new ones are often its best, and all read as its last one does."""
    hf = copy.deepcopy(model.hf)
    hf.resize_token_embeddings(rows, mean_resizing=False)
    with torch.no_grad():
        read, write = hf.get_input_embeddings().weight, hf.get_output_embeddings().weight
        read[tiny.VOCAB :] = read[tiny.VOCAB - 1]
        write[tiny.VOCAB :] = 1.2 * write[34 : 34 + rows - tiny.VOCAB]
    return dataclasses.replace(model, hf=hf, name=f"{model.name} with {rows} rows")


@pytest.fixture(scope="module")
def wide(tiny_target):
    return padded(tiny_target)


@every_inner
@pytest.mark.parametrize("backend", ["eager", "static"])
def test_a_target_with_more_rows_writes_what_it_writes_alone(wide, inner, backend):
    draft = dataclasses.replace(tiny.model("llama"), backend=backend)
    target = dataclasses.replace(wide, backend=backend)
    assert runs_static(draft) == (backend == "static")
    plain = Parse(target, outer=TargetOnly()).generate(PROMPT, max_new_tokens=40)
    result = Parse(target, draft, inner=inner, outer=TargetOnly()).generate(PROMPT, max_new_tokens=40)
    assert max(result.tokens) >= tiny.VOCAB
    assert result.tokens == plain.tokens
    assert sum(result.counters.accepted_by_depth) > 0  # behind padding it guesses on


@every_inner
def test_a_draft_model_with_more_rows_guesses_ids_of_the_target(tiny_target, wide, inner):
    prompt, tokens = tiny.plain_answer(tiny_target)
    result = Parse(tiny_target, wide, inner=inner, outer=TargetOnly()).generate(prompt, max_new_tokens=len(tokens))
    assert list(result.tokens) == tokens
    assert sum(result.counters.accepted_by_depth) > 0


@pytest.mark.parametrize("inner", [DraftModel(length=2), Pard(length=1, mask_token=4)], ids=["draft_model", "pard"])
@pytest.mark.parametrize("wider", ["target", "draft"])
def test_sampled_text_is_exactly_the_targets(tiny_target, wide, inner, wider):
    target, draft = (wide, tiny_target) if wider == "target" else (tiny_target, wide)
    prompt = PROMPT if wider == "target" else [6, 25, 30, 29, 62]
    bound = inner.bind(target, draft)
    assert largest_error(target, bound, prompt, 3, Sampling(temperature=2.5, top_k=2)) < 1e-5


def test_hf_assisted_samples_ids_of_the_target(tiny_target, wide):
    engine = Parse(tiny_target, wide, inner=INNERS["hf_assisted"], outer=TargetOnly())
    result = engine.generate(
        [6, 25, 30], max_new_tokens=30, sampling=Sampling(temperature=1.5), generator=torch.Generator().manual_seed(0)
    )
    assert max(result.tokens) < tiny.VOCAB


@pytest.mark.parametrize("kind", [PrefixVerification, StreamedVerification])
@pytest.mark.parametrize("draft_inner", [None, DraftModel(length=3, model=relative(tiny.model("llama")))])
def test_a_draft_model_with_fewer_rows_follows_such_an_answer(wide, kind, draft_inner):
    """Every draft is refused, so the answer is the target's own; the draft model reads it round for round."""
    outer = kind(judge=tiny.ScriptedJudge(value=0.0), loop=Rounds(), segmenter=EveryTokens(delta=4))
    engine = Parse(wide, tiny.model("qwen2", layers=2), outer=outer, draft_inner=draft_inner)
    result = engine.generate(PROMPT, max_new_tokens=30)
    assert result.tokens == Parse(wide, outer=TargetOnly()).generate(PROMPT, max_new_tokens=30).tokens
    assert max(result.tokens) >= tiny.VOCAB
    assert sum(r.drafted for r in result.rounds) > 2


@pytest.mark.parametrize("kind", [PrefixVerification, StreamedVerification])
def test_a_draft_ends_at_an_id_the_target_has_not(tiny_target, wide, kind):
    alone = Parse(wide, outer=TargetOnly()).generate([6, 31], max_new_tokens=30).tokens
    known = next(i for i, token in enumerate(alone) if token >= tiny.VOCAB)
    assert known == 3
    outer = kind(judge=tiny.ScriptedJudge(value=1.0), segmenter=EveryTokens(delta=2))
    result = Parse(tiny_target, wide, outer=outer).generate([6, 31], max_new_tokens=30)
    assert result.tokens[:known] == alone[:known]
    assert result.rounds[0].kept_tokens == known
    assert not result.rounds[0].draft_ended
    assert result.stop is StopReason.TOKEN_LIMIT
    assert max(result.tokens) < tiny.VOCAB


def test_ids_are_looked_at_only_where_rows_differ(tiny_target, tiny_draft, wide, monkeypatch):
    seen = []
    monkeypatch.setattr(type(tiny_draft), "readable", lambda self, ids: seen.append(ids) or list(ids))
    outer = PrefixVerification(judge=tiny.ScriptedJudge(value=0.0), loop=Rounds(), segmenter=EveryTokens(delta=4))
    Parse(tiny_target, tiny_draft, outer=outer, inner=DraftModel()).generate([6, 25], max_new_tokens=20)
    Parse(tiny_target, wide, outer=outer, inner=DraftModel()).generate([6, 25], max_new_tokens=20)
    assert not seen
    session = open_session(tiny_draft, ids=ROWS)
    session.feed([6, 7])
    assert seen == [[6, 7]]
