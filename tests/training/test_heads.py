"""Heads for models other than the zoo's: what a configuration does not name, or names otherwise."""

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

import tiny
from parsedec import LanguageModel, Parse, TargetOnly
from parsedec.errors import ConfigError
from parsedec.sampling import Sampler
from parsedec.sessions.session import Session
from parsedec.training.heads import Distillation, Texts
from parsedec.types import Sampling
from parsedec_adapters.eagle3 import Eagle3
from parsedec_adapters.medusa import Medusa
from parsedec_adapters.parallelspec import ParallelSpec
from parsedec_adapters.training.eagle3 import Eagle3Training
from parsedec_adapters.training.medusa import MedusaTraining
from parsedec_adapters.training.parallelspec import ParallelSpecTraining
from parsedec_adapters.training.pard import PardTraining

HEADS = {
    "eagle3": (Eagle3Training, lambda folder: Eagle3(head=folder, tokens=12, depth=2, top_k=3)),
    "medusa": (MedusaTraining, lambda folder: Medusa(heads=folder, nodes=12)),
    "parallelspec": (ParallelSpecTraining, lambda folder: ParallelSpec(head=folder, tokens=12)),
}


@pytest.fixture(scope="module")
def gpt2():
    """A model that counts its positions by embeddings, shares its output matrix with its input, and does not name the
    width of its MLP."""
    torch.manual_seed(0)
    sizes = dict(n_embd=64, n_layer=8, n_head=4, n_positions=96)
    config = GPT2Config(vocab_size=tiny.VOCAB, eos_token_id=1, bos_token_id=None, pad_token_id=0, **sizes)
    return LanguageModel.wrap(AutoModelForCausalLM.from_config(config).eval(), tiny.tokenizer(), name="tiny gpt2")


@pytest.mark.parametrize("name", HEADS)
def test_heads_are_learnt_for_a_model_of_another_family(gpt2, tmp_path, name):
    training, speculator = HEADS[name]
    prompt = [9, 30, 12, 44, 7]
    tokens, _ = tiny.greedy(gpt2, prompt, 24)
    head = training(target=gpt2, answers=[[(tuple(tokens), False)]], seed=0)
    ids = torch.tensor([[*prompt, *tokens]])
    answers = torch.zeros_like(ids, dtype=torch.bool)
    answers[:, len(prompt) - 1 : -1] = True
    objective = Distillation(gpt2, head, decay=0.8, autocast=False)
    optimiser = torch.optim.AdamW(head.module.parameters(), 2e-3)
    means = []
    for _ in range(12):
        losses = [loss.total / loss.labels for loss in objective.losses((ids, answers))]
        optimiser.zero_grad()
        sum(losses).backward()
        optimiser.step()
        means.append(float(sum(losses).detach()) / len(losses))
    assert means[-1] < means[0]
    head.save(tmp_path)
    result = Parse(gpt2, inner=speculator(str(tmp_path)), outer=TargetOnly()).generate(prompt, max_new_tokens=24)
    assert list(result.tokens) == tokens
    assert sum(result.counters.offered_by_depth) > 0


@pytest.mark.parametrize(("layers", "taps"), [(3, None), (4, None), (8, [5, 2, 3]), (8, [2, 3, 9])])
def test_hidden_states_that_other_readers_would_take_in_another_order_are_refused(layers, taps):
    """EAGLE's choice is none for a target of few layers."""
    with pytest.raises(ConfigError, match=r"recipe\.head\.taps"):
        Eagle3Training(target=tiny.model("llama", layers=layers), answers=[], seed=0, taps=taps)


DRAFTING = {  # how the module in training drafts chains
    "eagle3": ({"taps": (1, 2, 3), "draft_vocab": 40, "passes": 4}, lambda m: Eagle3(head=m, top_k=1, depth=3)),
    "medusa": ({"heads": 3}, lambda m: Medusa(heads=m, tree="chain")),
    "parallelspec": ({"slots": 4, "share": 1.0}, lambda m: ParallelSpec(head=m, top_k=1)),
}


@pytest.mark.parametrize("name", DRAFTING)
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_what_is_trained_is_what_drafts(family, name):
    """A head drafts a chain; shown the text with its own chain behind, it has the same best guesses in training: what
    it sees, where it stands and what it is asked for are the same, depth by depth."""
    target, (settings, speculator) = tiny.model(family), DRAFTING[name]
    tokens = torch.randint(5, tiny.VOCAB, (16,), generator=torch.Generator().manual_seed(1)).tolist()
    head = HEADS[name][0](target=target, answers=[[(tuple(tokens), True)]], seed=0, **settings)
    with torch.no_grad():
        for weight in head.module.parameters():
            weight += 0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(2))
    inner, compared = speculator(head.module).bind(target, None), 0
    for length in range(6, 16, 3):
        session = Session(target, inner.needs.hidden_layers)
        session.feed(tokens[: length - 1])
        drafted = inner.propose(inner.start(tokens[:length], session.seen(0), Sampler(Sampling())), 4).tokens
        ids = torch.tensor([[*tokens[:length], *drafted[1:], 7]])
        answers = torch.ones_like(ids, dtype=torch.bool)
        answers[:, -1] = False
        with torch.no_grad():
            _, taps = Distillation(target, head, decay=1.0, autocast=False)._read(ids)
            guesses = list(head.guesses(Texts(ids, answers, taps)))
        for guess in guesses[: len(drafted) - 1]:
            at = guess.rows.tolist().index(length - 2 + guess.depth)
            best = int(guess.logits[at].argmax())
            assert drafted[guess.depth] == (best if guess.columns is None else int(guess.columns[best]))
            compared += 1
    assert compared >= 4 * 3


def of_rows(rows, layers, seed=0):
    torch.manual_seed(seed)
    sizes = {**tiny.COMMON, "vocab_size": rows, "num_hidden_layers": layers}
    return LanguageModel.wrap(AutoModelForCausalLM.from_config(LlamaConfig(**sizes)).eval(), tiny.tokenizer(), name="?")


@pytest.mark.parametrize(("rows", "drafts"), [(64, 64), (64, 72), (72, 64)])
def test_masks_are_read_as_when_drafting(tmp_path, rows, drafts):
    """Each guess is that of a forward over the text up to its root and as many masks as lie between. Models of one
    vocabulary may have different numbers of rows, as Qwen2.5's have; the text may hold what only the target has."""
    target, draft = of_rows(rows, 4), of_rows(drafts, 2, seed=1)
    draft.hf.save_pretrained(tmp_path)
    draft.tokenizer.save_pretrained(tmp_path)
    tokens = [*torch.randint(5, 60, (17,), generator=torch.Generator().manual_seed(1)).tolist(), rows - 1, 7, 8]
    text, answers = torch.tensor([tokens]), torch.ones(1, 20, dtype=torch.bool)
    answers[0, -1] = False
    head = PardTraining(
        target=target, answers=[], seed=0, init=str(tmp_path), mask_token=4, length=3, share=1.0, keep=1.0
    )
    for guess in head.guesses(Texts(text, answers, torch.empty(1, 20, 0, 64))):
        for row, logits in zip(guess.rows.tolist(), guess.logits, strict=True):
            read = [*draft.readable(tokens[: row - guess.depth + 2]), *[4] * (guess.depth - 1)]
            with torch.no_grad():
                plain = draft.hf(input_ids=torch.tensor([read])).logits[0, -1, :rows]
            torch.testing.assert_close(logits, plain, rtol=0, atol=1e-4)
    losses = list(Distillation(target, head, decay=0.8, autocast=False).losses((text, answers)))
    assert [loss.kind for loss in losses] == ["depth_1", "depth_2", "depth_3"]
    assert all(0 < float(loss.total.detach()) < 100 * loss.labels for loss in losses)


def test_guesses_are_about_the_answer_alone(tiny_target):
    """The next token of every row that a head guesses about belongs to an answer."""
    batch, length = 2, 14
    ids = torch.randint(5, tiny.VOCAB, (batch, length), generator=torch.Generator().manual_seed(0))
    answers = torch.zeros_like(ids, dtype=torch.bool)
    answers[0, 4:13], answers[1, 6:9] = True, True
    for training, settings in ((Eagle3Training, {"taps": [1, 2, 3]}), (MedusaTraining, {}), (ParallelSpecTraining, {})):
        head = training(target=tiny_target, answers=[], seed=0, **settings)
        taps = torch.randn(batch, length, len(head.layers), tiny_target.hidden_size)
        for guess in head.guesses(Texts(ids, answers, taps)):
            assert answers.flatten()[guess.rows].all(), training.__name__
