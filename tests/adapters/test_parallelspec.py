"""ParallelSpec: the head against a plain restatement of it, its trees against all paths, its files, lossless output."""

import itertools
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
from every_draw import largest_error
from parallel_heads import inputs, new_head, teach
from parsedec import Parse, Sampling, TargetOnly
from parsedec.errors import ConfigError, IncompatibleStack
from parsedec.sampling import Sampler
from parsedec.sessions.session import Session
from parsedec.types import Seen
from parsedec_adapters.parallel_head import HeadConfig, ParallelHead, load_head, save_head
from parsedec_adapters.parallelspec import ParallelSpec, best_paths

TEXT = torch.randint(5, tiny.VOCAB, (24,), generator=torch.Generator().manual_seed(3)).tolist()


def one_by_one(head, embedded, hidden, anchor):
    """The group behind `anchor`, row by row and head by head in plain arithmetic: features [K, H]."""
    config, w = head.config, dict(head.named_parameters())
    before = torch.cat([torch.zeros(1, config.hidden_size), hidden[0]])
    rows = [(embedded[0, p], before[p], p) for p in range(anchor + 1)]
    rows += [(w["slot_embeddings"][j], w["slot_hidden"], anchor + 1 + j) for j in range(config.slots - 1)]

    def norm(x, name):
        return x * (x.square().mean() + config.rms_norm_eps).rsqrt() * w[f"{name}.weight"]

    def turned(x, position):
        half = config.head_dim // 2
        z = torch.complex(x[:half], x[half:])
        angle = position * config.rope_theta ** (-torch.arange(half) / half)
        z = z * torch.polar(torch.ones(half), angle)
        return torch.cat([z.real, z.imag])

    wide = [torch.cat([norm(e, "embedding_norm"), norm(h, "hidden_norm")]) for e, h, _ in rows]
    heads = {name: [(w[f"{name}_proj.weight"] @ x).split(config.head_dim) for x in wide] for name in "qkv"}
    shared = config.num_attention_heads // config.num_key_value_heads
    features = []
    for i in range(anchor, len(rows)):
        mixed = []
        for n in range(config.num_attention_heads):
            query = turned(heads["q"][i][n], rows[i][2])
            scores = torch.stack([query @ turned(heads["k"][j][n // shared], rows[j][2]) for j in range(i + 1)])
            weights = (scores / config.head_dim**0.5).softmax(0)
            mixed.append(sum(weights[j] * heads["v"][j][n // shared] for j in range(i + 1)))
        x = wide[i][config.hidden_size :] + w["o_proj.weight"] @ torch.cat(mixed)
        y = norm(x, "mlp_norm")
        gate = torch.nn.functional.silu(w["gate_proj.weight"] @ y)
        features.append(norm(x + w["down_proj.weight"] @ (gate * (w["up_proj.weight"] @ y)), "norm"))
    return torch.stack(features)


@pytest.mark.parametrize("anchor", [0, 1, 6])
def test_a_group_in_plain_arithmetic(tiny_target, anchor):
    head = new_head(tiny_target)
    with torch.no_grad():
        embedded, hidden = inputs(tiny_target, TEXT[:8])
        ours = head(embedded, hidden, torch.tensor([anchor]))[0, 0]
        torch.testing.assert_close(ours, one_by_one(head, embedded, hidden, anchor), rtol=0, atol=1e-4)


def test_groups_do_not_see_each_other_or_what_follows(tiny_target):
    head = new_head(tiny_target)
    with torch.no_grad():
        embedded, hidden = inputs(tiny_target, TEXT[:10])
        features = head(embedded, hidden)
        assert features.shape == (1, 10, 4, tiny_target.hidden_size)
        for anchor in (0, 5, 9):
            alone = head(embedded[:, : anchor + 1], hidden[:, : anchor + 1], torch.tensor([anchor]))
            torch.testing.assert_close(features[:, anchor], alone[:, 0], rtol=0, atol=1e-4)
        other = embedded.clone()
        other[:, 6:] += 1.0
        assert torch.equal(head(other, hidden)[:, :6], features[:, :6])


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
def test_drafting_behind_a_cache_equals_the_training_pass(family):
    """Proposals after commits and rewinds come from the same features as one pass over the whole text."""
    model = tiny.model(family)
    head = new_head(model)
    inner = ParallelSpec(head=head, tokens=9, top_k=3).bind(model, None)
    session = Session(model, inner.needs.hidden_layers)
    session.feed(TEXT[:9])
    session.append(TEXT[9])
    state = inner.start(session.tokens, session.seen(0), Sampler(Sampling()))
    inner.propose(state, 4)
    with torch.no_grad():
        embedded, hidden = inputs(model, session.tokens)
        features = head(embedded, hidden, torch.tensor([9]))[0, 0]
        best = model.hf.get_output_embeddings()(features).log_softmax(-1).topk(3)
    expected = best_paths(TEXT[9], best.indices.tolist(), best.values.tolist(), 9)
    for again in (state, inner.rewind(state, 10)):
        assert inner.propose(again, 4) == expected
    assert inner.propose(state, 2).depth <= 2


def test_only_new_rows_are_computed(tiny_target, monkeypatch):
    prompt, tokens = tiny.plain_answer(tiny_target)
    lengths = []
    plain = ParallelHead.draft
    monkeypatch.setattr(ParallelHead, "draft", lambda self, e, *rest: lengths.append(len(e)) or plain(self, e, *rest))
    inner = ParallelSpec(head=new_head(tiny_target))
    result = Parse(tiny_target, inner=inner, outer=TargetOnly()).generate(prompt, max_new_tokens=len(tokens))
    steps = result.counters.inner_steps
    assert len(lengths) <= steps
    assert lengths[0] == len(prompt) + 1
    assert sum(lengths) <= len(prompt) + len(tokens)  # every known row once


@pytest.mark.parametrize("guesses", [1, 5, 17, 200])
def test_the_tree_holds_the_most_probable_paths(guesses):
    generator = torch.Generator().manual_seed(guesses)
    scores = torch.randn(3, 4, generator=generator).mul(2).log_softmax(-1).sort(descending=True).values
    names = [[10 * level + rank for rank in range(4)] for level in range(3)]
    tree = best_paths(1, names, scores.tolist(), guesses)
    paths = {
        tuple(10 * level + rank for level, rank in enumerate(ranks)): sum(
            float(scores[level, rank]) for level, rank in enumerate(ranks)
        )
        for depth in (1, 2, 3)
        for ranks in itertools.product(range(4), repeat=depth)
    }
    best = sorted(paths, key=paths.get, reverse=True)[:guesses]
    assert tree.size == 1 + min(guesses, len(paths))
    assert {tuple(tree.tokens[i] for i in tree.path_to(node))[1:] for node in range(1, tree.size)} == set(best)
    siblings = [[scores[0, tree.tokens[n] % 10].item() for n in range(1, tree.size) if tree.parents[n] == 0]]
    assert siblings[0] == sorted(siblings[0], reverse=True)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize(
    "shape", [dict(tokens=12, top_k=4), dict(tokens=3, top_k=1), dict(tokens=20, top_k=64, depth=2)]
)
def test_it_never_changes_tokens(family, shape):
    model = tiny.model(family)
    prompt, tokens = tiny.plain_answer(model)
    engine = Parse(model, inner=ParallelSpec(head=new_head(model), **shape), outer=TargetOnly())
    result = engine.generate(prompt, max_new_tokens=len(tokens))
    assert list(result.tokens) == tokens
    assert len(result.counters.offered_by_depth) <= shape.get("depth", 4)


@pytest.mark.parametrize("family", ["qwen3_next", "lfm2"])
def test_chains_serve_recurrent_targets(family):
    model = tiny.model(family)
    prompt, tokens = tiny.plain_answer(model)
    engine = Parse(model, inner=ParallelSpec(head=new_head(model), top_k=1), outer=TargetOnly())
    assert list(engine.generate(prompt, max_new_tokens=len(tokens)).tokens) == tokens


def test_one_token_prompt(tiny_target):
    prompt, tokens = tiny.plain_answer(tiny_target, length=1)
    engine = Parse(tiny_target, inner=ParallelSpec(head=new_head(tiny_target)), outer=TargetOnly())
    assert list(engine.generate(prompt, max_new_tokens=len(tokens)).tokens) == tokens
    half = tiny.model("llama", dtype=torch.bfloat16)
    result = Parse(half, inner=ParallelSpec(head=new_head(half)), outer=TargetOnly()).generate(prompt, max_new_tokens=9)
    assert result.new_tokens == 9


def test_it_can_be_trained(tiny_target):
    """Some steps on the target's own answer: the guesses become right, and decoding takes fewer calls of the target."""
    prompt, tokens = tiny.plain_answer(tiny_target)
    head = new_head(tiny_target)

    def calls():
        engine = Parse(tiny_target, inner=ParallelSpec(head=head, tokens=8, top_k=2), outer=TargetOnly())
        result = engine.generate(prompt, max_new_tokens=len(tokens))
        assert list(result.tokens) == tokens
        return result.counters.target_calls

    untrained = calls()
    teach(head, tiny_target, prompt, tokens)
    assert calls() < 0.6 * untrained


def test_sampled_text_is_exactly_the_targets(tiny_target):
    inner = ParallelSpec(head=new_head(tiny_target, slots=2), tokens=200, top_k=40).bind(tiny_target, None)
    assert largest_error(tiny_target, inner, TEXT[:5], 3, Sampling(temperature=2.5, top_k=2)) < 1e-5


def test_files_round_trip(tiny_target, tmp_path):
    head = new_head(tiny_target)
    save_head(head, tmp_path / "head")
    twin = load_head(tmp_path / "head")
    assert twin.config == head.config
    assert all(torch.equal(a, b) for a, b in zip(head.state_dict().values(), twin.state_dict().values(), strict=True))
    bound = ParallelSpec(head=str(tmp_path / "head")).bind(tiny.model("llama", dtype=torch.bfloat16), None)
    assert bound.head.norm.weight.dtype is torch.bfloat16
    assert next(head.parameters()).dtype is torch.float32


def damaged(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def rewritten(folder, **values):
    path = folder / "config.json"
    config = json.loads(path.read_text()) | values
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


FAULTS = {
    "missing tensor": (lambda f: damaged(f, lambda t: t.pop("norm.weight")), "norm.weight is missing"),
    "unknown tensor": (lambda f: damaged(f, lambda t: t.update(extra=torch.ones(1))), "extra is unknown"),
    "wrong shape": (
        lambda f: damaged(f, lambda t: t.update({"slot_hidden": torch.ones(3)})),
        r"slot_hidden is \[3\], expected \[64\]",
    ),
    "truncated": (
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:5000]),
        "cannot be read",
    ),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "has no model.safetensors"),
    "no config": (lambda f: (f / "config.json").unlink(), "has no config.json"),
    "not json": (lambda f: (f / "config.json").write_text("{"), "is not JSON"),
    "another head": (lambda f: rewritten(f, format="eagle"), "format='eagle'"),
    "a size missing": (lambda f: rewritten(f, slots=None), "slots"),
    "an odd size": (lambda f: rewritten(f, slots=0), "'slots': 0"),
    "an unknown field": (lambda f: rewritten(f, layers=2), "layers"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_damaged_files_are_refused_by_name(tiny_target, tmp_path, fault):
    damage, message = FAULTS[fault]
    save_head(new_head(tiny_target), tmp_path)
    damage(tmp_path)
    with pytest.raises(IncompatibleStack, match=message):
        ParallelSpec(head=str(tmp_path)).bind(tiny_target, None)


def test_refusals(tiny_target):
    head = new_head(tiny_target)
    other = ParallelHead(HeadConfig(**{**vars(head.config), "hidden_size": 32, "vocab_size": 99}))
    with pytest.raises(IncompatibleStack, match=r"hidden size 32, but .* has 64; and vocabulary 99, but .* has 64"):
        ParallelSpec(head=other).bind(tiny_target, None)
    with pytest.raises(IncompatibleStack, match=r"inner\.top_k=1"):
        ParallelSpec(head=head).bind(tiny.model("qwen3_next"), None)
    with pytest.raises(IncompatibleStack, match=r"inner\.depth=5, but the head has 4 slots"):
        ParallelSpec(head=head, depth=5).bind(tiny_target, None)
    with pytest.raises(IncompatibleStack, match="or cannot be reached"):
        ParallelSpec(head="no/such-head").bind(tiny_target, None)
    with pytest.raises(IncompatibleStack, match="bind"):
        ParallelSpec(head=head).start([1], Seen(), Sampler(Sampling()))
    for setting in ("tokens", "top_k", "depth"):
        with pytest.raises(ConfigError, match=setting):
            ParallelSpec(head=head, **{setting: 0})
