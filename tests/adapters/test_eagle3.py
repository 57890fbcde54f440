"""EAGLE-3 against a plain re-computation: every layout and variant, the tree's scores, refusals, composition."""

import json
import logging
import math

import pytest
import torch
from safetensors.torch import save_file

import eagle3_heads
import tiny
from parsedec import Parse, TargetOnly
from parsedec.boundary import FirstFailure
from parsedec.errors import ConfigError, IncompatibleStack
from parsedec.loop import Rounds
from parsedec.outer import PrefixVerification
from parsedec.sampling import Sampler
from parsedec.segmenters import EveryTokens
from parsedec.sessions.session import Session
from parsedec.types import Outcome, Sampling, Seen, StopReason
from parsedec_adapters.eagle3 import Eagle3, load_head, save_head

GREEDY = Sampler(Sampling())
BASE = 10000.0
FLAT = {
    "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 48, "num_attention_heads": 4,
    "num_key_value_heads": 2, "hidden_act": "silu", "rms_norm_eps": 1e-6, "vocab_size": 64, "draft_vocab_size": 40,
    "max_position_embeddings": 512, "num_hidden_layers": 1}  # fmt: skip
SPECULATORS = {
    "architectures": ["Eagle3Speculator"], "speculators_model_type": "eagle3", "draft_vocab_size": 40,
    "norm_before_residual": False, "eagle_aux_hidden_state_layer_ids": None, "target_hidden_size": None,
    "speculators_config": {"algorithm": "eagle3", "verifier": {"name_or_path": "org/some-target"}}}  # fmt: skip
LAYER = {key: FLAT[key] for key in FLAT if key not in ("draft_vocab_size", "architectures")} | {"model_type": "llama"}


def nested(layer=(), **changes):
    rope = {"rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"}}
    return {**SPECULATORS, "transformer_layer_config": {**LAYER, **rope, **dict(layer)}, **changes}


def renamed(name, *pairs):
    for old, new in pairs:
        name = name.replace(old, new, 1) if name.startswith(old) else name
    return name


MIDLAYER = (("layers.0.", "midlayer."),)
# name -> (head's settings, config.json, renaming, file, rope base, taps the file names)
LAYOUTS = {
    "eagle": ({}, FLAT, MIDLAYER, "pytorch_model.bin", BASE, None),
    "eagle safetensors": ({}, FLAT | {"rope_theta": 1e6}, MIDLAYER, "model.safetensors", 1e6, None),
    "full vocabulary": (
        {"draft_vocab_size": 64}, FLAT | {"draft_vocab_size": 64}, MIDLAYER, "model.safetensors", BASE, None),
    "specforge": (
        {"own_embedding": True, "head_dim": 8},
        FLAT | {"head_dim": 8, "architectures": ["LlamaForCausalLMEagle3"],
                "eagle_config": {"use_aux_hidden_state": True, "eagle_aux_hidden_state_layer_ids": [1, 3, 5]}},
        MIDLAYER, "model.safetensors", BASE, (2, 4, 6)),
    "specforge, input convention": (
        {}, FLAT | {"eagle_config": {"eagle_aux_hidden_state_layer_ids": [2, 3, 5]}}, MIDLAYER, "pytorch_model.bin",
        BASE, (2, 3, 5)),
    "eagle 3.1": (
        {"fc_norm": True, "norm_output": True}, FLAT | {"fc_norm": True, "norm_output": True},
        (*MIDLAYER, ("", "model.")), "model.safetensors", BASE, None),
    "sglang layers": (
        {"num_layers": 3, "mlp_stream": True}, FLAT,
        (*MIDLAYER, ("layers.1.", "additional_layers.0."), ("layers.2.", "additional_layers.1.")),
        "model.safetensors", BASE, None),
    "speculators": ({}, nested(), (), "model.safetensors", 5e5, None),
    "speculators qwen3": (
        {"qk_norm": True, "norm_before_residual": True, "num_layers": 2},
        nested({"model_type": "qwen3", "num_hidden_layers": 2}, norm_before_residual=True), (), "model.safetensors",
        5e5, None),
    "speculators norm_before_fc": (
        {"norm_before_fc": True, "num_taps": 4},
        nested(norm_before_fc=True, eagle_aux_hidden_state_layer_ids=[1, 2, 3, 4]), (), "model.safetensors", 5e5,
        (1, 2, 3, 4)),
    "speculators biases": (
        {"qkv_bias": True, "output_bias": True, "mlp_bias": True}, nested({"attention_bias": True, "mlp_bias": True}),
        (), "model.safetensors", 5e5, None),
    "small hidden": (
        {"hidden_size": 32, "own_embedding": True, "head_dim": 8},
        FLAT | {"hidden_size": 32, "target_hidden_size": 64}, MIDLAYER, "model.safetensors", BASE, None),
}  # fmt: skip


def write(folder, head, config, pairs=MIDLAYER, file="model.safetensors", drop=(), **more):
    """The head's tensors under a layout's names; `more` are added or replaced, `drop` left out."""
    tensors = {renamed(name, *pairs): tensor.clone() for name, tensor in head.state_dict().items()}
    tensors = {name: tensor for name, tensor in (tensors | more).items() if name not in drop}
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if file.endswith(".bin"):
        torch.save(tensors, folder / file)
    else:
        save_file(tensors, folder / file)
    return folder


def plain(weights, settings, taps, tokens, embedding, base, guesses=()):
    """The head in plain arithmetic, float64: rows (tap t, token t + 1), then a path of guesses that feeds its outputs
    back. Returns (hidden, logits) of the last row. taps [T, L * H], tokens [T]."""
    w = {name: tensor.double() for name, tensor in weights.items()}
    norm = lambda x, name: x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * w[name + ".weight"]  # noqa: E731
    linear = lambda x, name: x @ w[name + ".weight"].T + w.get(name + ".bias", 0.0)  # noqa: E731
    x = taps.double()
    if settings.norm_before_fc:
        x = norm(x, "input_norm")
    if settings.fc_norm:
        x = torch.cat([norm(part, f"fc_norm.{i}") for i, part in enumerate(x.chunk(settings.num_taps, -1))], -1)
    stream = [*linear(x, "fc")]
    ids = [*tokens, *guesses]
    positions = [*range(len(tokens)), *range(len(tokens), len(ids))]
    keys = [[] for _ in range(settings.num_layers)]
    for at, token in enumerate(ids):
        h = stream[at]
        for layer in range(settings.num_layers):
            p = f"layers.{layer}"
            if layer == 0:
                normed = norm(h, f"{p}.hidden_norm")
                x = torch.cat([norm(embedding[token].double(), f"{p}.input_layernorm"), normed])
                h = normed if settings.norm_before_residual else h
            else:
                x = norm(h, f"{p}.hidden_norm" if settings.mlp_stream else f"{p}.input_layernorm")
            q, k, v = (linear(x, f"{p}.self_attn.{n}_proj").view(-1, settings.head_dim) for n in "qkv")
            if settings.qk_norm:
                q, k = norm(q, f"{p}.self_attn.q_norm"), norm(k, f"{p}.self_attn.k_norm")
            keys[layer].append((turned(k, positions[at], base), v))
            q, share = turned(q, positions[at], base), settings.num_heads // settings.num_kv_heads
            out = []
            for head in range(settings.num_heads):
                scores = torch.stack([key[head // share] @ q[head] for key, _ in keys[layer]]) / settings.head_dim**0.5
                out.append(scores.softmax(0) @ torch.stack([value[head // share] for _, value in keys[layer]]))
            r = h + linear(torch.cat(out), f"{p}.self_attn.o_proj")
            x = norm(r, f"{p}.post_attention_layernorm")
            x = torch.nn.functional.silu(linear(x, f"{p}.mlp.gate_proj")) * linear(x, f"{p}.mlp.up_proj")
            x = linear(x, f"{p}.mlp.down_proj")
            h = x if settings.mlp_stream and layer < settings.num_layers - 1 else r + x
        normed = norm(h, "norm")
        stream.append(h)
        if at >= len(tokens) - 1:  # what follows is fed back
            fed = normed if settings.norm_output else h
            stream[at + 1 :] = [fed]
        else:
            stream.pop()
    return (normed if settings.norm_output else h), linear(normed, "lm_head")


def turned(x, position, base):
    """Llama's rotation, dimension j with j + d / 2."""
    d = x.shape[-1]
    out = x.clone()
    for j in range(d // 2):
        angle = position * base ** (-2 * j / d)
        a, b = x[:, j], x[:, j + d // 2]
        out[:, j], out[:, j + d // 2] = (
            a * math.cos(angle) - b * math.sin(angle), b * math.cos(angle) + a * math.sin(angle))  # fmt: skip
    return out


@pytest.fixture(scope="module")
def target():
    return tiny.model("llama", layers=8)


def bound(target, head, **settings):
    return Eagle3(head=head, **{"tokens": 14, "depth": 2, "top_k": 3, **settings}).bind(target, None)


def started(inner, target, tokens):
    session = Session(target, inner.needs.hidden_layers)
    session.feed(tokens[:-1])
    return inner.start(tokens, session.seen(0), GREEDY), session.seen(0).taps


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_computes_what_it_says(tmp_path, target, layout):
    """Loaded from its file, the head's tree has the scores that plain arithmetic gives its paths."""
    settings, config, pairs, file, base, taps = LAYOUTS[layout]
    original = eagle3_heads.random_head(**({"draft_vocab_size": 40} | settings))
    inner = bound(target, str(write(tmp_path / "head", original, config, pairs, file)))
    assert inner.taps == (taps or (2, 4, 5))
    assert inner.head.config.rope["rope_theta"] == base
    tokens = [9, 30, 12, 44, 7]
    state, seen = started(inner, target, tokens)
    drafted = inner.draft(state, 9)
    assert drafted.tree.size == 14
    embedding = original.embed_tokens.weight if original.embed_tokens else target.hf.get_input_embeddings().weight
    ids = inner.head.target_ids(torch.arange(inner.head.config.draft_vocab_size)).tolist()
    for node in (3, 6, 13):
        path = [drafted.tree.tokens[i] for i in drafted.tree.path_to(node)][1:]
        score = 0.0
        for at, token in enumerate(path):
            _, logits = plain(
                original.state_dict(), original.config, seen.flatten(1), tokens[1:], embedding.detach(), base, path[:at]
            )
            score += float(logits.detach().log_softmax(-1)[ids.index(token)])
        assert drafted.scores[node] == pytest.approx(score, abs=1e-3)


def test_a_saved_head_is_read_back_equal(tmp_path):
    for i, settings in enumerate((
        {"draft_vocab_size": 40, "taps": (1, 2, 3)},
        {"num_layers": 2, "qk_norm": True, "fc_norm": True, "norm_output": True, "fc_bias": True},
        {"num_layers": 2, "mlp_stream": True, "qkv_bias": True, "own_embedding": True, "norm_before_residual": True},
        {"rope": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e5}},
    )):  # fmt: skip
        head = eagle3_heads.random_head(seed=i, **settings)
        again = load_head(save_head(head, tmp_path / str(i)))
        assert again.config == head.config
        ours, theirs = head.state_dict(), again.state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_head_written_again_is_loaded_again(tmp_path, target):
    tokens, trees = [9, 30, 12, 44], []
    for seed in range(2):
        folder = save_head(eagle3_heads.random_head(seed=seed), tmp_path / "head")
        inner = bound(target, str(folder))
        trees.append(inner.propose(started(inner, target, tokens)[0], 3))
        assert bound(target, str(folder)).head.fc.weight is inner.head.fc.weight  # shared while it is the same
    assert trees[0] != trees[1]


def test_shards_are_read(tmp_path, target):
    head = eagle3_heads.random_head()
    folder = write(tmp_path / "head", head, FLAT | {"draft_vocab_size": 64}, file="pytorch_model.bin")
    tensors = torch.load(folder / "pytorch_model.bin")
    (folder / "pytorch_model.bin").unlink()
    names = sorted(tensors)
    weight_map = {name: f"model-{i % 2}.safetensors" for i, name in enumerate(names)}
    for file in set(weight_map.values()):
        save_file({name: tensors[name] for name in names if weight_map[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert torch.equal(load_head(folder).fc.weight, head.fc.weight)


DAMAGE = {
    "missing": (dict(drop=["midlayer.self_attn.k_proj.weight"]), r"k_proj.weight is missing \(expected \[32, 128\]"),
    "missing norm": (dict(drop=["norm.weight"]), r"norm.weight is missing \(expected \[64\]"),
    "missing d2t": (dict(drop=["d2t"]), r"d2t is missing \(expected \[40\]"),
    "unexpected": ({"fc.extra": torch.zeros(2, 3)}, r"fc.extra \[2, 3\] is not part"),
    "unused norm": ({"input_norm.weight": torch.zeros(192)}, r"input_norm.weight \[192\] is not part"),
    "shape": ({"lm_head.weight": torch.zeros(39, 64)}, r"lm_head.weight is \[39, 64\], expected \[40, 64\]"),
    "d2t as ids": ({"d2t": torch.arange(24, 64)}, r"d2t maps 40 draft tokens .* to 102; expected offsets"),
    "d2t repeats": ({"d2t": -torch.arange(40)}, r"d2t maps 40 draft tokens to 1 tokens"),
    "quantised": ({"norm.weight": torch.zeros(64, dtype=torch.int8)}, r"norm.weight is torch.int8"),
    "width": ({"fc.weight": torch.zeros(64, 200)}, r"fc.weight is \[64, 200\]; expected a multiple .* 64"),
}


@pytest.mark.parametrize("case", DAMAGE)
@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_a_damaged_checkpoint_is_refused_by_name(tmp_path, case, file):
    changes, message = DAMAGE[case]
    head = eagle3_heads.random_head(draft_vocab_size=40)
    with pytest.raises(IncompatibleStack, match=message):
        load_head(write(tmp_path / "head", head, FLAT, file=file, **changes))


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin", "config.json"])
def test_a_truncated_file_is_refused_by_name(tmp_path, file):
    weights = file if file != "config.json" else "model.safetensors"
    folder = write(tmp_path / "head", eagle3_heads.random_head(draft_vocab_size=40), FLAT, file=weights)
    whole = (folder / file).read_bytes()
    (folder / file).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(IncompatibleStack, match=file):
        load_head(folder)


BAD_CONFIGS = {
    "no hidden_size": ({k: v for k, v in FLAT.items() if k != "hidden_size"}, "hidden_size=None"),
    "eagle 2": (FLAT | {"eagle_config": {"use_aux_hidden_state": False}}, "use_aux_hidden_state"),
    "both norms": (FLAT | {"norm_before_fc": True, "fc_norm": True}, "both norm_before_fc and fc_norm"),
    "rope": (FLAT | {"rope_scaling": {"type": "spiral", "factor": 2}}, "rope_type='spiral'"),
    "rope incomplete": (FLAT | {"rope_scaling": {"rope_type": "llama3"}}, "incomplete for type 'llama3'"),
    "act": (FLAT | {"hidden_act": "snake"}, "hidden_act='snake'"),
    "other speculator": (SPECULATORS | {"speculators_model_type": "mlp"}, "'mlp' speculator"),
    "silent residual": ({k: v for k, v in nested().items() if k != "norm_before_residual"}, "norm_before_residual"),
    "window": (nested({"layer_types": ["sliding_attention"], "sliding_window": 8}), "sliding_window=8"),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_a_configuration_that_cannot_be_followed_is_refused(tmp_path, case):
    config, message = BAD_CONFIGS[case]
    with pytest.raises(IncompatibleStack, match=message):
        load_head(write(tmp_path / "head", eagle3_heads.random_head(draft_vocab_size=40), config, ()))


def test_a_folder_that_is_no_head_is_refused(tmp_path):
    with pytest.raises(IncompatibleStack, match="does not exist"):
        load_head(tmp_path / "nowhere")
    with pytest.raises(IncompatibleStack, match=r"no config\.json"):
        load_head(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(FLAT))
    with pytest.raises(IncompatibleStack, match=r"no weights; expected model\.safetensors"):
        load_head(tmp_path)


def test_overrides_replace_what_the_file_says(tmp_path, target):
    head = eagle3_heads.random_head(draft_vocab_size=40)
    silent = {k: v for k, v in nested().items() if k != "norm_before_residual"}
    folder = write(tmp_path / "head", head, silent, ())
    inner = bound(target, str(folder), rope_theta=123.0, norm_before_residual=True, taps=[0, 1, 8])
    assert inner.needs.hidden_layers == (0, 1, 8)
    assert inner.head.config.rope["rope_theta"] == 123.0
    assert inner.head.config.norm_before_residual
    same = bound(target, head, rope_theta=123.0, norm_before_residual=True, taps=[0, 1, 8])
    tokens = [9, 30, 12, 44]
    assert inner.propose(started(inner, target, tokens)[0], 3) == same.propose(started(same, target, tokens)[0], 3)
    assert not head.config.norm_before_residual  # the head that was given is as it was


def test_a_head_for_another_target_is_refused(target):
    head = eagle3_heads.random_head()
    refused = [
        (head, tiny.model("llama"), {}, "at least 7 layers"),
        (head, target, {"taps": [1, 2]}, "fuses 3"),
        (head, target, {"taps": [1, 2, 9]}, r"\[9\] are not hidden states"),
        (head, target, {"top_k": 65}, "knows 64 tokens"),
        (eagle3_heads.random_head(target_hidden_size=32), target, {}, "width 32"),
        (eagle3_heads.random_head(vocab_size=80, draft_vocab_size=40), target, {}, "vocabulary of 80"),
        (eagle3_heads.random_head(hidden_size=32), target, {}, "no embed_tokens.weight"),
        (head, tiny.model("qwen3_next"), {"taps": [1, 2, 3]}, "inner.top_k=1"),
    ]
    for wrong, model, settings, message in refused:
        with pytest.raises(IncompatibleStack, match=message):
            bound(model, wrong, **settings)
    with pytest.raises(IncompatibleStack, match="not bound"):
        Eagle3(head="somewhere").start([1, 2], None, GREEDY)
    for settings in ({"tokens": 1}, {"depth": -1}, {"top_k": 0}):
        with pytest.raises(ConfigError, match="expected a whole number, at least"):
            Eagle3(head=head, **settings)


def test_a_context_past_the_heads_is_announced(target, caplog):
    with caplog.at_level(logging.WARNING):
        bound(target, eagle3_heads.random_head())
        assert not caplog.records
        bound(target, eagle3_heads.random_head(max_position_embeddings=16))
    assert "trained on 16 tokens of context, tiny llama takes 512" in caplog.text


ROPES = [
    {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
    {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0},
    {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
    {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 4},
    {"rope_type": "longrope", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 4,
     "short_factor": [1.0] * 8, "long_factor": [2.0] * 8},
    {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
     "original_max_position_embeddings": 4},
]  # fmt: skip


@pytest.mark.parametrize("rope", ROPES, ids=lambda rope: rope["rope_type"])
def test_past_the_trained_context_states_still_add_up(target, rope):
    inner = bound(target, eagle3_heads.random_head(max_position_embeddings=8, rope=rope))
    tokens = torch.randint(5, tiny.VOCAB, (40,), generator=torch.Generator().manual_seed(0)).tolist()
    whole, seen = started(inner, target, tokens)
    state = inner.start(tokens[:1], None, GREEDY)
    for stop in (3, 6, 7, 21, 40):
        done = state.length
        state = inner.commit(state, Outcome(tuple(tokens[done + 1 : stop]), Seen(seen[done : stop - 1])))
    ours, theirs = inner.draft(state, 3), inner.draft(whole, 3)
    assert ours.tree == theirs.tree
    assert ours.scores == pytest.approx(theirs.scores, abs=1e-4)
    assert all(map(math.isfinite, ours.scores))


def test_a_batch_forward_says_what_drafting_says(target):
    """Training's forward and the rows kept while decoding are the same numbers; gradients reach every weight."""
    head = eagle3_heads.random_head(norm_before_fc=True)
    tokens = [9, 30, 12, 44, 7, 21]
    inner = bound(target, head)
    state, seen = started(inner, target, tokens)
    ids = torch.tensor([tokens[1:]])
    out = inner.head(seen.clone()[None], ids)
    assert torch.allclose(out.hidden[0], state.rows.store.outputs[: state.length], atol=1e-5)
    best = out.logits[0, -1].log_softmax(-1).topk(3)
    tree = inner.propose(state, 1)
    assert list(tree.tokens[1:]) == best.indices.tolist()
    causal = torch.ones(5, 5, dtype=torch.bool).tril()[None, None]
    again = inner.head(seen.clone()[None].flatten(2), ids, positions=torch.arange(5)[None], mask=causal)
    assert torch.allclose(again.logits, out.logits, atol=1e-5)
    out.logits.sum().backward()
    assert all(weight.grad is not None for weight in head.parameters())


def test_training_from_own_outputs_is_drafting(target):
    """What training computes step by step for all rows at once, the last row drafts as a chain."""
    inner = bound(target, eagle3_heads.random_head(), top_k=1)
    tokens = [9, 30, 12, 44, 7]
    state, seen = started(inner, target, tokens)
    drafted = inner.draft(state, 3)
    guesses, score = drafted.tree.tokens[1:], 0.0
    with torch.no_grad():
        steps = eagle3_heads.unrolled(inner.head, seen[None], torch.tensor([[*tokens, *guesses]]), 3)
        for guess, reached, logits in zip(guesses, drafted.scores[1:], steps, strict=True):
            score += float(logits[-1].log_softmax(-1)[guess])
            assert reached == pytest.approx(score, abs=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral_window"])
def test_families_and_dtypes_run(family, dtype):
    model = tiny.model(family, layers=8, dtype=dtype)
    inner = bound(model, eagle3_heads.random_head())
    assert inner.head.fc.weight.dtype == dtype
    result = Parse(model, inner=inner, outer=TargetOnly()).generate([9, 30, 12], max_new_tokens=24)
    assert result.counters.inner_steps > 0
    assert result.new_tokens == 24 or result.stop is StopReason.END_TOKEN


def test_a_recurrent_target_takes_a_chain():
    model = tiny.model("qwen3_next")
    prompt, tokens = tiny.plain_answer(model)
    inner = Eagle3(head=eagle3_heads.random_head(), top_k=1, depth=2, taps=[1, 2, 3])
    assert list(Parse(model, inner=inner, outer=TargetOnly()).generate(prompt, max_new_tokens=20).tokens) == tokens[:20]


def test_near_the_context_limit():
    prompt, tokens = tiny.plain_answer(tiny.model("llama", layers=8), new=24)
    model = tiny.model("llama", layers=8, context_limit=len(prompt) + 6)
    inner = bound(model, eagle3_heads.taught_head(tiny.model("llama", layers=8), (*prompt, *tokens)), depth=5)
    result = Parse(model, inner=inner, outer=TargetOnly()).generate(prompt, max_new_tokens=40)
    assert list(result.tokens) == tokens[:6]
    assert result.stop is StopReason.CONTEXT_LIMIT


def test_it_serves_the_draft_model_and_the_outer_level():
    """PARSE around it judges, rewinds and injects, and the draft model drafts with a head of its own: what is written
    and kept is that of plain decoding on both levels, in fewer calls."""
    target, draft = tiny.model("llama", layers=8), tiny.model("llama", seed=5, layers=7)
    prompt = [9, 30, 12, 44, 7]
    kept, steps = set(), 0
    for seed in range(3):
        outer = PrefixVerification(
            judge=tiny.ScriptedJudge(seed=seed), segmenter=EveryTokens(delta=4), loop=Rounds(rounds=3),
            boundary=FirstFailure(threshold=0.4, full_threshold=0.8))  # fmt: skip
        plainly = Parse(target, draft, outer=outer).generate(prompt, max_new_tokens=40)
        inner = bound(target, eagle3_heads.taught_head(target, (*prompt, *plainly.tokens)))
        drafts = bound(draft, eagle3_heads.taught_head(draft, (*prompt, *tiny.greedy(draft, prompt, 40)[0])))
        ours = Parse(target, draft, inner=inner, draft_inner=drafts, outer=outer).generate(prompt, max_new_tokens=40)
        assert ours.tokens == plainly.tokens
        assert [done.kept_tokens for done in ours.rounds] == [done.kept_tokens for done in plainly.rounds]
        assert ours.counters.target_calls <= plainly.counters.target_calls
        steps += ours.counters.inner_steps
        assert ours.counters.draft_calls < plainly.counters.draft_calls
        kept |= {done.kept_tokens for done in ours.rounds}
    assert len(kept) > 2  # boundaries fell in different places
    assert steps > 5


def test_drafting_copies_no_rows(target):
    """A growing request appends to one store; an older state goes on in a copy, and both stay right."""
    inner = bound(target, eagle3_heads.random_head())
    tokens = torch.randint(5, tiny.VOCAB, (30,), generator=torch.Generator().manual_seed(1)).tolist()
    whole, seen = started(inner, target, tokens)
    state = inner.start(tokens[:2], Seen(seen[:1]), GREEDY)
    store, old = state.rows.store, state
    for at in range(2, 30):
        inner.propose(state, 3)
        state = inner.commit(state, Outcome((tokens[at],), Seen(seen[at - 1 : at])))
        assert state.rows.store is store
    other = inner.commit(old, Outcome((tokens[2],), Seen(seen[1:2])))
    assert other.rows is not state.rows
    assert inner.propose(state, 3) == inner.propose(whole, 3)
