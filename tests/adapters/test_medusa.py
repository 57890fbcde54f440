"""Medusa: heads from every layout, refusals by name, trees and their calibration, proposals against a plain forward."""

import dataclasses
import itertools
import json
import logging

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
from medusa_heads import hidden_rows, plain_logits, random_heads, taught_heads
from parsedec import Parse, PrefixVerification, TargetOnly
from parsedec.errors import ConfigError, IncompatibleStack
from parsedec.loop import Rounds
from parsedec.segmenters import EveryTokens
from parsedec.sessions.session import Session
from parsedec.types import Seen
from parsedec_adapters.medusa import (
    Medusa,
    MedusaHeads,
    head_accuracies,
    load_heads,
    save_heads,
    tree_from_accuracies,
)
from parsedec_adapters.medusa.trees import TreeShape, clip, named_trees, read_tree

SMALL = [[0], [1], [2], [0, 0], [0, 1], [1, 0], [0, 0, 0]]
TOKENS = torch.randint(5, tiny.VOCAB, (20,), generator=torch.Generator().manual_seed(3)).tolist()


def tensors_of(heads, prefix=""):
    """The public names, written out here once more."""
    out = {}
    for k in range(heads.heads):
        for j in range(heads.layers):
            out[f"{prefix}{k}.{j}.linear.weight"] = heads.weight[j, k]
            out[f"{prefix}{k}.{j}.linear.bias"] = heads.bias[j, k]
        if heads.output is not None:
            out[f"{prefix}{k}.{heads.layers}.weight"] = heads.output[k]
    return {name: tensor.detach().clone().contiguous() for name, tensor in out.items()}


def v01_pt(heads, folder):
    torch.save(tensors_of(heads), folder / "medusa_lm_head.pt")
    (folder / "config.json").write_text(json.dumps({"medusa_num_heads": 2, "medusa_num_layers": 1}))


def v01_safetensors(heads, folder):
    save_file(tensors_of(heads), folder / "medusa_lm_head.safetensors")


def medusa2_single(heads, folder):
    save_file(tensors_of(heads, "medusa_head.") | {"lm_head.weight": torch.ones(3)}, folder / "model.safetensors")


def medusa2_shards(heads, folder):
    tensors = tensors_of(heads, "medusa_head.")
    names = sorted(tensors)
    shards = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for shard, part in shards.items():
        save_file({name: tensors[name] for name in part}, folder / shard)
    where = {name: shard for shard, part in shards.items() for name in part} | {"lm_head.weight": "absent.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))


def medusa2_bin(heads, folder):
    torch.save(tensors_of(heads, "medusa_head.") | {"lm_head.weight": torch.ones(3)}, folder / "pytorch_model.bin")


def prefixed_heads_file(heads, folder):
    torch.save(tensors_of(heads, "medusa_head."), folder / "medusa_lm_head.pt")


LAYOUTS = [v01_pt, v01_safetensors, medusa2_single, medusa2_shards, medusa2_bin, prefixed_heads_file]
every_layout = pytest.mark.parametrize("write", LAYOUTS, ids=lambda write: write.__name__)


def same(a, b):
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@every_layout
@pytest.mark.parametrize("layers", [1, 2])
def test_every_layout_gives_the_same_heads(write, layers, tmp_path):
    """The count of heads is the file's: the config of the published ones names fewer."""
    heads = random_heads(heads=5, layers=layers)
    write(heads, tmp_path)
    loaded = load_heads(tmp_path)
    assert (loaded.heads, loaded.layers, loaded.hidden, loaded.vocab) == (5, layers, 64, 64)
    assert same(loaded, heads)


def test_layers_without_output_matrices_use_the_target_s(tmp_path, tiny_target):
    heads = random_heads(vocab=None, seed=4)
    torch.save(tensors_of(heads), tmp_path / "medusa_lm_head.pt")
    loaded = load_heads(tmp_path)
    assert loaded.vocab is None
    assert same(loaded, heads)
    inner = Medusa(heads=loaded, tree="chain").bind(tiny_target, None)
    rows = hidden_rows(tiny_target, TOKENS)
    whole = random_heads(seed=4)
    whole.weight.data, whole.bias.data = heads.weight.data, heads.bias.data
    whole.output.data = tiny_target.hf.lm_head.weight.expand(3, -1, -1)
    torch.testing.assert_close(inner.logits(rows), plain_logits(whole, rows))


@pytest.mark.parametrize("vocab", [64, None], ids=["v0.1", "legacy"])
def test_saved_heads_are_read_back(vocab, tmp_path):
    heads = random_heads(vocab=vocab, layers=2)
    layout = "v0.1" if vocab else "legacy"
    file = save_heads(heads.half(), tmp_path / "new", layout=layout, base_model="a model")
    assert file.stat().st_mode & 0o777 == 0o644  # others may read it
    assert same(load_heads(file.parent), heads)
    assert set(load_file(file)) == set(tensors_of(heads))
    config = json.loads((file.parent / "config.json").read_text())
    assert (config["medusa_num_heads"], config["medusa_num_layers"]) == (3, 2)
    with pytest.raises(ConfigError, match="layout"):
        save_heads(heads, tmp_path, layout="legacy" if vocab else "v0.1")


@pytest.mark.parametrize("shape", [(64,), (5, 64), (2, 3, 64)], ids=str)
def test_heads_follow_their_formula(shape):
    heads, rows = random_heads(layers=2), torch.randn(shape, generator=torch.Generator().manual_seed(0))
    expected = plain_logits(heads, rows.reshape(-1, 64)).reshape(3, *shape[:-1], 64)
    torch.testing.assert_close(heads(rows), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(heads(rows, first=2), expected[:2], rtol=1e-4, atol=1e-4)


def test_new_heads_start_as_the_target_and_can_be_trained(tiny_target):
    heads = MedusaHeads.for_target(tiny_target, heads=2)
    rows = hidden_rows(tiny_target, TOKENS).clone()
    with torch.inference_mode():
        expected = tiny_target.hf.lm_head(rows)
    torch.testing.assert_close(heads(rows).detach(), expected.expand(2, -1, -1), rtol=1e-4, atol=1e-4)
    optimiser = torch.optim.AdamW(heads.parameters(), lr=3e-3)
    wanted = [torch.tensor(TOKENS[k + 2 :]) for k in range(2)]

    def loss():
        return sum(torch.nn.functional.cross_entropy(heads(rows)[k, : len(t)], t) for k, t in enumerate(wanted))

    before = loss().item()
    for _ in range(20):
        optimiser.zero_grad()
        loss().backward()
        optimiser.step()
    assert all(p.grad is not None and float(p.grad.abs().max()) > 0 for p in heads.parameters())
    assert loss().item() < before / 2


# Refusals ---------------------------------------------------------------------------------------------------------


def damaged(change):
    tensors = tensors_of(random_heads())
    change(tensors)
    return tensors


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("1.0.linear.bias"), r"missing \['1.0.linear.bias'\]"),
        (lambda t: t.pop("2.1.weight"), r"missing \['2.1.weight'\]"),
        (lambda t: [t.pop(n) for n in list(t) if n.startswith("1.")], r"missing \['1.0.linear.bias'"),
        (lambda t: t.update({"0.1.linear.weight": torch.ones(64, 64)}), "missing"),
        (lambda t: t.update({"lm_head.weight": torch.ones(64, 64)}), r"holds \['lm_head.weight'\]; expected only"),
        (lambda t: t.update({"0.2.weight": torch.ones(64, 64)}), r"unexpected \['0.2.weight'\]"),
        (lambda t: t.update({"1.0.linear.weight": torch.ones(64, 32)}), r"1.0.linear.weight .*\[64, 32\].*\[64, 64\]"),
        (lambda t: t.update({"2.1.weight": torch.ones(60, 64)}), r"2.1.weight .*\[60, 64\].*\[64, 64\]"),
        (lambda t: [t.pop(n) for n in list(t) if "linear" in n], "not a complete set"),
        (lambda t: t.clear(), "no tensors"),
    ],
)
@pytest.mark.parametrize("file", ["medusa_lm_head.pt", "medusa_lm_head.safetensors"])
def test_tensors_that_are_not_a_set_of_heads(change, message, file, tmp_path):
    tensors = damaged(change)
    torch.save(tensors, tmp_path / file) if file.endswith("pt") else save_file(tensors, tmp_path / file)
    with pytest.raises(IncompatibleStack, match=message) as error:
        load_heads(tmp_path)
    assert file in str(error.value)


@every_layout
@pytest.mark.parametrize("share", [0.0, 0.4, 0.95])
def test_truncated_files(write, share, tmp_path):
    write(random_heads(), tmp_path)
    file = sorted(path for path in tmp_path.iterdir() if path.suffix in (".pt", ".bin", ".safetensors"))[0]
    file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])
    with pytest.raises(IncompatibleStack, match=f"{file.name} cannot be read"):
        load_heads(tmp_path)


def test_files_that_are_something_else(tmp_path):
    torch.save([1, 2], tmp_path / "medusa_lm_head.pt")
    with pytest.raises(IncompatibleStack, match="no table of tensors"):
        load_heads(tmp_path)


def test_folders_without_heads(tmp_path):
    with pytest.raises(IncompatibleStack, match="holds no Medusa heads"):
        load_heads(tmp_path)
    with pytest.raises(IncompatibleStack, match="does not exist"):
        load_heads(tmp_path / "nowhere")
    save_file({"lm_head.weight": torch.ones(3)}, tmp_path / "model.safetensors")
    with pytest.raises(IncompatibleStack, match="model without Medusa heads"):
        load_heads(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"medusa_head.0.1.weight": "gone"}}')
    with pytest.raises(IncompatibleStack, match="gone cannot be read"):
        load_heads(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(IncompatibleStack, match="not an index"):
        load_heads(tmp_path)


def test_heads_of_another_target(tiny_target):
    with pytest.raises(IncompatibleStack, match=r"width 32.*has 64"):
        Medusa(heads=random_heads(hidden=32)).bind(tiny_target, None)
    with pytest.raises(IncompatibleStack, match=r"among 80 tokens.*has 64"):
        Medusa(heads=random_heads(vocab=80)).bind(tiny_target, None)


def test_a_branching_tree_needs_a_mask():
    model = tiny.model("mamba2")
    with pytest.raises(IncompatibleStack, match=r"inner\.tree=chain"):
        Medusa(heads=random_heads(), tree=SMALL).bind(model, None)
    assert Medusa(heads=random_heads(), tree="chain").bind(model, None).needs.hidden_layers == (4,)


def test_unbound():
    with pytest.raises(IncompatibleStack, match="not bound"):
        _ = Medusa(heads=random_heads()).needs


@pytest.mark.parametrize("write", [medusa2_single, medusa2_shards, medusa2_bin], ids=lambda write: write.__name__)
def test_heads_of_a_medusa_2_target_beside_another_target(write, tmp_path, tiny_target, caplog):
    write(random_heads(), tmp_path)
    (tmp_path / "config.json").write_text("{}")
    target = dataclasses.replace(tiny_target)
    target.hf.config.name_or_path = "elsewhere"
    with caplog.at_level(logging.WARNING):
        Medusa(heads=str(tmp_path)).bind(target, None)
    assert "elsewhere" in caplog.text
    caplog.clear()
    target.hf.config.name_or_path = str(tmp_path)
    Medusa(heads=str(tmp_path)).bind(target, None)
    target.hf.config.name_or_path = ""
    assert not caplog.text


# Trees ------------------------------------------------------------------------------------------------------------


def test_named_trees_are_whole():
    assert len(named_trees()) == 10
    for name, choices in named_trees().items():
        shape = TreeShape.of(choices)
        if name != "chain":
            assert len(shape.parents) == 64
            assert shape.branches
            for nodes in (1, 5, 30):  # cut short, every one is still a tree
                assert len(TreeShape.of(clip(choices, heads=5, ranks=10, nodes=nodes)).parents) == nodes + 1
    assert not TreeShape.of(named_trees()["chain"]).branches


def test_a_tree_is_laid_out_level_by_level():
    shape = TreeShape.of(read_tree([[1, 0], [1], [0], [0, 2], [0, 0], [1, 0, 0]]))
    assert shape.parents == (-1, 0, 0, 1, 1, 2, 5)
    assert shape.heads == (0, 0, 1, 1, 1, 2)
    assert shape.ranks == (0, 1, 0, 2, 0, 0)
    assert shape.sizes == (1, 3, 6, 7)
    assert (shape.depth, shape.width) == (3, 3)


def test_trees_from_a_file(tmp_path):
    path = tmp_path / "tree.json"
    path.write_text(json.dumps(SMALL))
    assert read_tree(str(path)) == read_tree(SMALL)
    path.write_text("{")
    with pytest.raises(ConfigError, match="not a JSON file"):
        read_tree(str(path))


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ("mc_sim_7b", "mc_sim_7b_63"),
        ([[0], [1, 0]], r"holds \[1, 0\], but not its parent \[1\]"),
        ([[0], [-1]], "below 0"),
        ([], "at least one"),
        ([[0], []], "none that is empty"),
        ([0, 1], "expected a name"),
        (7, "expected a name"),
    ],
)
def test_trees_that_are_none(tree, message):
    with pytest.raises(ConfigError, match=message):
        Medusa(heads=random_heads(), tree=tree)


@pytest.mark.parametrize("nodes", [0, -3])
def test_fewer_nodes_than_one(nodes):
    with pytest.raises(ConfigError, match="nodes"):
        Medusa(heads=random_heads(), nodes=nodes)


@pytest.mark.parametrize("seed", range(5))
def test_the_tree_from_accuracies_is_the_best_of_its_size(seed):
    generator = torch.Generator().manual_seed(seed)
    accuracies = torch.rand(3, 2, generator=generator).double()
    accuracies = (accuracies / accuracies.sum(1, keepdim=True) * 0.9).tolist()
    every = [c for depth in (1, 2, 3) for c in itertools.product(range(2), repeat=depth)]

    def accepted(choices):
        return sum(torch.tensor([accuracies[d][r] for d, r in enumerate(c)]).double().prod().item() for c in choices)

    for nodes in (1, 2, 4, 5):
        best = max(
            accepted(tree)
            for tree in itertools.combinations(every, nodes)
            if all(c[:-1] in tree for c in tree if len(c) > 1)
        )
        chosen = tree_from_accuracies(accuracies, nodes)
        assert len(chosen) == nodes
        assert abs(accepted(chosen) - best) < 1e-12
        TreeShape.of(chosen)


def test_guesses_that_are_never_right_are_not_in_the_tree():
    assert tree_from_accuracies([[0.5, 0.0], [0.0, 0.2]], 10) == ((0,), (0, 1))
    assert tree_from_accuracies([[1.0], [1.0], [1.0]], 2) == ((0,), (0, 0))
    for accuracies, nodes in (([], 3), ([[0.5]], 0), ([[1.5]], 1)):
        with pytest.raises(ConfigError, match="accuracies"):
            tree_from_accuracies(accuracies, nodes)


def test_accuracies_are_shares_of_the_target_s_own_answers(tiny_target):
    heads = random_heads(seed=2)
    inner = Medusa(heads=heads).bind(tiny_target, None)
    prompts = [tiny.plain_answer(tiny_target, length=n)[0] for n in (7, 5)]
    got = head_accuracies(inner, tiny_target, prompts, ranks=3, max_new_tokens=40)
    hits, places = torch.zeros(3, 3), torch.zeros(3)
    for prompt in prompts:
        answer, _ = tiny.greedy(tiny_target, prompt, 40)
        ids = [*prompt, *answer]
        logits = plain_logits(heads, hidden_rows(tiny_target, ids))
        for t in range(len(prompt) - 1, len(ids)):
            for k in range(3):
                if t + k + 2 < len(ids):
                    ranking = logits[k, t].argsort(descending=True)[:3].tolist()
                    places[k] += 1
                    if ids[t + k + 2] in ranking:
                        hits[k, ranking.index(ids[t + k + 2])] += 1
    torch.testing.assert_close(torch.tensor(got), hits / places[:, None])
    with pytest.raises(ConfigError, match="too short"):
        head_accuracies(inner, tiny_target, prompts, max_new_tokens=2)
    with pytest.raises(ConfigError, match="no prompts"):
        head_accuracies(inner, tiny_target, [])


def test_a_calibrated_tree_accepts_more_than_a_chain_of_its_size(tiny_target):
    prompt, tokens = tiny.plain_answer(tiny_target)
    heads = taught_heads(tiny_target, prompt, tokens, share=0.6)
    inner = Medusa(heads=heads).bind(tiny_target, None)
    accuracies = head_accuracies(inner, tiny_target, [prompt], max_new_tokens=48)
    assert accuracies[0][0] > 0.3
    tree = tree_from_accuracies(accuracies, 12)
    calls = {}
    for name, choices in (("chain", "chain"), ("calibrated", tree)):
        engine = Parse(tiny_target, inner=Medusa(heads=heads, tree=choices), outer=TargetOnly())
        result = engine.generate(prompt, max_new_tokens=48)
        assert list(result.tokens) == tokens
        calls[name] = result.counters.target_calls
    assert calls["calibrated"] < calls["chain"] < 48


# Proposals --------------------------------------------------------------------------------------------------------


def started(inner, target, tokens):
    session = Session(target, inner.needs.hidden_layers)
    if len(tokens) > 1:
        session.feed(tokens[:-1])
    return inner.start(tokens, session.seen(0), None)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
@pytest.mark.parametrize("budget", [0, 1, 2, 3, 9])
def test_proposals_are_the_heads_best_guesses(family, budget):
    target, heads = tiny.model(family), random_heads(seed=6)
    inner = Medusa(heads=heads, tree=SMALL).bind(target, None)
    tree = inner.propose(started(inner, target, TOKENS[:9]), budget)
    # the row before the root; head k says what comes k + 1 places behind the root
    best = plain_logits(heads, hidden_rows(target, TOKENS[:8])[-1:]).argsort(-1, descending=True)[:, 0]  # [K, V]
    expected = {c: int(best[len(c) - 1, c[-1]]) for c in map(tuple, SMALL) if len(c) <= budget}
    choices = [()]
    for node in range(1, tree.size):
        siblings = [i for i in range(1, node) if tree.parents[i] == tree.parents[node]]
        choices.append((*choices[tree.parents[node]], len(siblings)))
    assert tree.tokens[0] == TOKENS[8]
    assert dict(zip(choices[1:], tree.tokens[1:], strict=True)) == expected
    assert tree.logq is None
    assert tree.depth <= budget


def test_a_single_token_has_no_row_to_guess_from(tiny_target):
    inner = Medusa(heads=random_heads(), tree=SMALL).bind(tiny_target, None)
    state = started(inner, tiny_target, TOKENS[:1])
    assert inner.propose(state, 5).tokens == (TOKENS[0],)
    assert inner.rewind(state, 1).length == 1
    with pytest.raises(IncompatibleStack, match="no hidden states"):
        inner.start(TOKENS[:2], Seen(), None)


def test_a_tree_is_clipped_to_heads_nodes_and_vocabulary(tiny_target):
    state = Medusa(heads=random_heads(heads=2)).bind(tiny_target, None)
    assert state.stack.shape.depth == 2
    some = Medusa(heads=random_heads(heads=2), nodes=7).bind(tiny_target, None)
    assert len(some.stack.shape.parents) == 8
    wide = Medusa(heads=random_heads(), tree=[[0], [63], [64]]).bind(tiny_target, None)
    assert len(wide.stack.shape.parents) == 3


def test_heads_come_in_the_target_s_precision():
    target, heads = tiny.model("llama", dtype=torch.bfloat16), random_heads()
    inner = Medusa(heads=heads, tree=SMALL).bind(target, None)
    assert heads.weight.dtype is torch.float32  # the ones given are left alone
    assert inner.stack.heads.weight.dtype is torch.bfloat16
    tokens = Parse(target, inner=inner, outer=TargetOnly()).generate(TOKENS[:5], max_new_tokens=8).tokens
    assert len(tokens) == 8


def test_the_outer_level_and_the_draft_model_can_use_it():
    """PARSE with Medusa on both sides: boundaries, rollback and new rounds change no token, and calls are saved."""
    target, draft = tiny.model("llama"), tiny.model("llama", seed=5, layers=2)
    prompt, _ = tiny.plain_answer(target)
    outer = PrefixVerification(judge=tiny.ScriptedJudge(seed=1), segmenter=EveryTokens(delta=4), loop=Rounds(rounds=3))
    plain = Parse(target, draft, outer=outer).generate(prompt, max_new_tokens=40)
    inner = Medusa(heads=taught_heads(target, prompt, list(plain.tokens)), tree=SMALL)
    draft_inner = Medusa(heads=taught_heads(draft, *tiny.plain_answer(draft)), tree=SMALL)
    fast = Parse(target, draft, inner=inner, draft_inner=draft_inner, outer=outer).generate(prompt, max_new_tokens=40)
    assert fast.tokens == plain.tokens
    assert [r.kept_tokens for r in fast.rounds] == [r.kept_tokens for r in plain.rounds]
    assert fast.counters.target_calls < plain.counters.target_calls
    assert sum(fast.counters.accepted_by_depth) > 0


def test_heads_that_were_trained_again_are_loaded_again(tmp_path):
    target = tiny.model("llama")
    for seed in (0, 1):
        heads = random_heads(seed=seed)
        save_heads(heads, tmp_path)
        torch.testing.assert_close(Medusa(heads=str(tmp_path)).bind(target, None).stack.heads.weight, heads.weight)
