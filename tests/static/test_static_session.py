"""The static backend passes the oracles of the eager one, in blocks of rows of any size, and writes the same tokens."""

import copy
import dataclasses
import random
import threading
import time

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import cuda_graphs
import oracle.test_judge_pass as judging
import oracle.test_session as walks
import tiny
from every_draw import relative
from medusa_heads import taught_heads
from parsedec import Parse, TargetOnly, load
from parsedec.errors import ConfigError, IncompatibleStack
from parsedec.sessions.backends import open_session, runs_static
from parsedec.sessions.session import Session
from parsedec.static import session as static
from parsedec.static.memory import FIRST_CAPACITY, Lease, Pool
from parsedec.static.session import StaticSession
from parsedec.static.steps import COMPILED_ROWS, Step, Steps, column_bucket
from parsedec.static.weights import join_weights, joined, read_weights, static_obstacle
from parsedec.types import JudgePath, Tree
from parsedec_adapters.draft_model import DraftModel
from parsedec_adapters.medusa import Medusa

FAMILIES = ["llama", "qwen2", "qwen3", "mistral"]
ROPES = {
    "linear": dict(rope_type="linear", factor=2.0, rope_theta=10000.0),
    "llama3": dict(
        rope_type="llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0,
        original_max_position_embeddings=64, rope_theta=10000.0),
    "yarn": dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=64, rope_theta=10000.0),
}  # fmt: skip


@pytest.fixture(autouse=True)
def static_sessions(monkeypatch):
    """The oracles make their sessions here."""
    monkeypatch.setattr(walks, "Session", StaticSession)
    monkeypatch.setattr(judging, "Session", StaticSession)


def in_blocks(monkeypatch, model, rows):
    """The model's passes cut into blocks of so many rows."""
    machine = static.machine_of(model)
    monkeypatch.setitem(static._machines, model.hf, dataclasses.replace(machine, block=rows))


class Replayed(Steps):
    """Steps that are captured and replayed, as on CUDA."""

    possible = True
    captured = cuda_graphs.captured


def in_steps(monkeypatch, model, kind=Steps, *, prefetches=False):
    """The model's decode steps in buckets, as on CUDA."""
    machine = static.machine_of(model)
    steps = kind(machine.network, compiled=False)
    pool = Pool(machine.pool.weights)  # buffers whose graphs are of this kind
    changed = dataclasses.replace(machine, pool=pool, steps={False: steps, True: steps}, prefetches=prefetches)
    monkeypatch.setitem(static._machines, model.hf, changed)
    return steps


def on(model, backend):
    return dataclasses.replace(model, backend=backend)


@pytest.mark.parametrize("block", [512, 7, 1])
@pytest.mark.parametrize("family", FAMILIES)
def test_random_walks_and_trees(monkeypatch, family, block):
    in_blocks(monkeypatch, tiny.model(family), block)
    if block > 1:  # a tree is one block
        walks.test_one_forward_over_a_tree_equals_one_forward_per_path(family)
    for seed in range(4):
        walks.test_a_random_walk_equals_a_plain_forward(family, seed)


@pytest.mark.parametrize("kind", [Steps, Replayed])
@pytest.mark.parametrize("family", FAMILIES)
def test_steps_in_buckets(monkeypatch, family, kind):
    """Padded rows and columns, chains and trees, growth and forks, taps: nothing of them shows."""
    steps = in_steps(monkeypatch, tiny.model(family), kind)
    walks.test_one_forward_over_a_tree_equals_one_forward_per_path(family)
    for seed in range(3):
        walks.test_a_random_walk_equals_a_plain_forward(family, seed)
    judging.test_packed_scores_equal_separate_forwards(family, "sdpa")
    judging.test_two_passes_reuse_the_draft_rows(family)
    prompt, tokens = tiny.plain_answer(tiny.model(family))
    inner = Medusa(heads=taught_heads(tiny.model(family), prompt, tokens, share=0.6), tree="mc_sim_7b_63")
    engine = Parse(on(tiny.model(family), "static"), inner=inner, outer=TargetOnly())
    assert list(engine.generate(prompt, max_new_tokens=len(tokens)).tokens) == tokens
    assert (1 < steps.captures < 30) == (kind is Replayed), "captured once a bucket, not once a step"


def test_threads_read_what_their_own_replays_computed(monkeypatch, tiny_target):
    """The graphs of a model share memory: what one computed may be gone with the next replay of any."""
    engine, asked = Parse(on(tiny_target, "static"), outer=TargetOnly()), [walks.tokens(9, seed=i) for i in range(3)]
    in_steps(monkeypatch, tiny_target, Replayed)
    alone, found = [engine.generate(prompt, max_new_tokens=24).tokens for prompt in asked], {}

    def answer(i):
        found[i] = engine.generate(asked[i], max_new_tokens=24).tokens

    def slowly(self, *inputs):
        out = step(self, *inputs)
        time.sleep(0.001)  # another thread's chance
        return out

    step = Step.__call__
    monkeypatch.setattr(Step, "__call__", slowly)
    threads = [threading.Thread(target=answer, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[i] for i in range(3)] == alone


def test_steps_grow_into_the_next_bucket(monkeypatch, tiny_target):
    in_steps(monkeypatch, tiny_target)
    session, ids = StaticSession(tiny_target), walks.tokens(300)
    session.feed(ids[:250])
    for token in ids[250:]:
        logits = session.feed([token])
    walks.close(logits, walks.plain(tiny_target, ids)[0][-1])
    used = session._lease._buffers.graphs
    assert {(rows, columns) for rows, columns, *_ in used} == {(1, 384)}, "the steps of the larger buffers"


def test_compiled_steps_have_few_buckets_of_rows(monkeypatch, tiny_target):
    """Also where only what stands before the layers is compiled: every bucket takes a compiler's time."""
    monkeypatch.setattr("parsedec.static.steps._compiled", lambda call: call)
    steps = Steps(static.machine_of(tiny_target).network, compiled=True)
    steps.compiles_layers = False
    lease, ids = Lease(Pool(steps.network.weights)), walks.tokens(60)
    with torch.inference_mode():
        steps.run(lease, ids[:11], None, None, ())
        steps.run(lease, ids[11:12], None, None, ())
        logits, _ = steps.run(lease, ids[12:60], None, None, ())
    walks.close(logits[-1], walks.plain(tiny_target, ids)[0][-1])
    assert {rows for rows, *_ in lease.writable(1).graphs} == {1, 64} < set(COMPILED_ROWS)


def test_a_request_whose_numbers_were_too_large_spoils_no_other(monkeypatch, tiny_target):
    """Steps read whole buckets, and what is no number goes through every mask: CUDA hands buffers on cleared."""
    in_steps(monkeypatch, tiny_target)
    pool = static.machine_of(tiny_target).pool
    monkeypatch.setattr(pool, "clears", True)
    session = StaticSession(tiny_target)
    session.feed(walks.tokens(30))
    buffers = session._lease._buffers
    buffers.states.fill_(torch.nan)
    del session
    session, ids = StaticSession(tiny_target), walks.tokens(12, seed=1)
    session.feed(ids[:9])
    assert session._lease._buffers is buffers
    walks.close(session.feed(ids[9:]), walks.plain(tiny_target, ids)[0][-1])


def test_buckets_of_columns():
    assert [column_bucket(n) for n in (1, 256, 257, 385, 513, 769, 1025, 1537, 2049)] == [
        256, 256, 384, 512, 768, 1024, 1536, 2048, 3072]  # fmt: skip


@pytest.mark.slow
def test_compiled_steps(tiny_target):
    model = dataclasses.replace(tiny_target, backend="static", compiled=True)
    session, ids = open_session(model, (0, 4)), walks.tokens(40)
    session.feed(ids[:30])
    for token in ids[30:36]:
        session.feed([token])
    session.feed(ids[36:39])
    session.append(ids[39])
    session.tree(Tree((ids[39], 7, 8, 9), (-1, 0, 0, 2)))
    session.keep([0, 2, 3])
    expected, hidden = walks.plain(model, [*ids, 8, 9], (0, 4))
    walks.close(session.next_logits, expected[-1])
    walks.close(session.seen(0).taps, hidden)


@pytest.mark.parametrize("block", [512, 8, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_judge_passes(monkeypatch, family, block):
    in_blocks(monkeypatch, tiny.model(family), block)
    judging.test_packed_scores_equal_separate_forwards(family, "sdpa")
    judging.test_forked_batch_gives_the_same_scores(family)
    judging.test_draft_logprobs_and_cut_logits_come_with_the_pass(family)
    judging.test_two_passes_reuse_the_draft_rows(family)
    judging.test_a_pending_token_is_a_prefix_every_probe_sees(family)
    judging.test_leak_is_bit_exact(family)


@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_is_as_exact_as_a_plain_forward(family):
    judging.test_bf16_error_is_at_most_twice_that_of_a_plain_forward(family)


def test_verbs_and_limits_are_those_of_a_session(tiny_target):
    walks.test_verbs_out_of_order_are_refused(tiny_target)
    walks.test_judging_needs_a_prompt(tiny_target)
    walks.test_a_full_context_is_refused_before_anything_is_computed()


def test_judge_pass_equals_an_exact_one():
    """Against double precision the error is rounding."""
    model = tiny.model("qwen3")
    exact = dataclasses.replace(model, hf=copy.deepcopy(model.hf).double())
    _, rows = judging.judged(model, JudgePath.PACKED)
    assert judging.max_error(rows.probe_logits, judging.separate(exact)) < 1e-4
    _, rows = judging.judged(exact, JudgePath.PACKED)
    assert judging.max_error(rows.probe_logits, judging.separate(exact)) < 1e-6  # scores are stored in float32


class Largest(TorchDispatchMode):
    """The most elements any tensor had that an operation made."""

    def __init__(self, ignored):
        super().__init__()
        self.elements, self.ignored = 0, ignored

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if torch.is_tensor(tensor) and tensor._base is None and tensor.numel() not in self.ignored:
                self.elements = max(self.elements, tensor.numel())
        return out


def largest_of_a_pass(n, k, s=24):
    """The largest tensor of a judge pass over n draft rows and k probes, key and value buffers aside."""
    model = dataclasses.replace(tiny.model("llama"), context_limit=1 << 20)
    session = StaticSession(model)
    session.feed(walks.tokens(20))
    session._lease.writable(n + 512)  # the cache itself
    buffers = session._lease._buffers.states.numel()
    cuts = [n * (i + 1) // k for i in range(k)]
    with Largest({buffers}) as largest:
        rows = session.judge(walks.tokens(n, seed=1), cuts, walks.tokens(s, seed=2))
    assert rows.rows == n + k * s
    return largest.elements


def test_memory_of_a_judge_pass_grows_with_its_length():
    small, large = largest_of_a_pass(1000, 32), largest_of_a_pass(2000, 64)
    assert large <= 2.2 * small
    assert large <= 512 * (20 + 2000 + 512)  # a block of rows by all columns
    assert large < (2000 + 64 * 24) ** 2 / 8  # a dense mask


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_tokens_as_generate(family):
    model = on(tiny.model(family), "static")
    prompt, tokens = tiny.plain_answer(tiny.model(family))
    drafter = on(relative(tiny.model(family), noise=0.1), "static")
    heads = taught_heads(model, prompt, tokens, share=0.6)
    engines = {
        "plain": Parse(model, outer=TargetOnly()),
        "chain": Parse(model, drafter, inner=DraftModel(length=4), outer=TargetOnly()),
        "tree": Parse(model, inner=Medusa(heads=heads, tree="mc_sim_7b_63"), outer=TargetOnly()),
    }
    for name, engine in engines.items():
        result = engine.generate(prompt, max_new_tokens=len(tokens))
        assert list(result.tokens) == tokens, name
        assert (result.counters.target_calls == len(tokens)) == (name == "plain")


@pytest.mark.parametrize("inner", [None, DraftModel(length=3)], ids=["none", "draft_model"])
def test_a_whole_request_is_the_same_on_both_backends(inner):
    """The zoo pair with PARSE: text, rounds, scores and counters; only seconds differ."""
    pair = [load(f"zoo:{name}", dtype="float32", device="cpu") for name in ("target", "draft")]
    question = "Tom has 12 coins. Ana gives Tom 30 coins. Tom loses 5 coins. How many coins does Tom have now?"
    results = [
        Parse(*(on(model, backend) for model in pair), inner=inner).generate(question, max_new_tokens=80)
        for backend in ("eager", "static")
    ]
    eager, ours = results
    assert eager.text == ours.text
    assert eager.counters == ours.counters
    for name in ("spans", "stop", "notes", "judge_path"):
        assert getattr(eager, name) == getattr(ours, name)
    for one, other in zip(eager.rounds, ours.rounds, strict=True):
        for a, b in zip(one.segments, other.segments, strict=True):
            assert (a.text, a.kept) == (b.text, b.kept)
            assert a.score == pytest.approx(b.score, abs=1e-4)


@pytest.mark.parametrize("rope", ROPES)
def test_rotary_positions_of_every_fixed_kind(rope):
    """Positions beyond the original length, where the kinds differ."""
    config = copy.deepcopy(tiny.model("llama").hf.config)
    config.rope_parameters = ROPES[rope]
    hf = type(tiny.model("llama").hf)(config).eval()
    hf.load_state_dict(tiny.model("llama").hf.state_dict())
    model = dataclasses.replace(tiny.model("llama"), hf=hf, backend="static")
    ids = walks.tokens(150)
    session = open_session(model)
    assert isinstance(session, StaticSession)
    session.feed(ids[:140])
    walks.close(session.feed(ids[140:]), walks.plain(model, ids)[0][-1])


def test_forks_share_their_buffers_until_they_must_not():
    model = tiny.model("llama")
    session = StaticSession(model)
    session.feed(walks.tokens(10))
    first, second = session.fork(), session.fork()
    shared = session._lease._buffers
    first.feed([7])
    assert first._lease._buffers is shared, "the first that goes on writes in place"
    second.feed([8])
    assert second._lease._buffers is not shared
    session.feed([9])
    for one, token in ((first, 7), (second, 8), (session, 9)):
        walks.close(one.feed([11]), walks.plain(model, [*walks.tokens(10), token, 11])[0][-1])
    first.rewind(4)
    walks.close(first.feed([5]), walks.plain(model, [*walks.tokens(4), 5])[0][-1])


def test_branches_of_a_draft_leave_the_session_where_it_is():
    model = tiny.model("llama")
    session, draft, cuts = StaticSession(model), walks.tokens(16)[10:], [0, 2, 6]
    session.feed(walks.tokens(10))
    session.fan_out(draft, [2])  # to make room once
    buffers = session._lease._buffers
    branches = session.fan_out(draft, cuts)
    read = [walks.tokens(10) + draft[:cut] for cut in cuts]
    for step in range(3):
        for logits, ids in zip(branches.logits, read, strict=True):
            walks.close(logits, walks.plain(model, ids)[0][-1])
        more = [20 + 3 * step + i for i in range(3)]
        branches.step(more)
        read = [[*ids, token] for ids, token in zip(read, more, strict=True)]
    assert (branches.calls, branches.rows) == (3, 9)
    del branches
    session.keep_draft(2)
    walks.close(session.feed([11]), walks.plain(model, [*walks.tokens(10), *draft[:2], 11])[0][-1])
    assert session._lease._buffers is buffers


def test_leases_never_see_what_another_writes():
    """A random walk of leases on one pool against lists of numbers."""
    rng = random.Random(0)
    pool = Pool(read_weights(tiny.model("llama", layers=1).hf))
    leases = [(Lease(pool), [])]
    for step in range(400):
        lease, expected = at = rng.choice(leases)
        move = rng.choice(["write", "write", "write", "rewind", "fork", "drop"])
        if move == "write":
            count = rng.choice([1, 3, 100])
            buffers = lease.writable(count)
            for i in range(count):
                buffers.states[..., lease.rows + i, :] = step + i / 64
            lease.rows += count
            expected += [step + i / 64 for i in range(count)]
            if rng.random() < 0.5 and count == 3:
                lease.gather(lease.rows - 3, [0, 2])
                del expected[-2]
        elif move == "rewind":
            del expected[rng.randint(len(expected) // 2, len(expected)) :]
            lease.rows = len(expected)
        elif move == "fork" and len(leases) < 6:
            leases.append((lease.fork(), list(expected)))
        elif move == "drop" and len(leases) > 1:
            leases.remove(at)
        del lease, at
        for lease, expected in leases:
            if expected:
                held = lease._buffers.states[0, 0, 0, : lease.rows, 0]
                assert torch.equal(held, torch.tensor(expected))
        del lease
    assert len(pool._all) <= 8
    assert max(buffers.capacity for buffers in pool._all) > FIRST_CAPACITY["cpu"], "growth was not reached"


def test_what_does_not_qualify_is_named_and_runs_eagerly(caplog):
    reasons = {"mistral_window": "sliding window", "gemma3": "Gemma3ForCausalLM", "mamba2": "Mamba2ForCausalLM"}
    for family, reason in reasons.items():
        model = dataclasses.replace(tiny.model(family), hf=copy.deepcopy(tiny.model(family).hf))
        assert reason in static_obstacle(model)
        assert type(open_session(on(model, "auto"))) is Session
        assert reason in caplog.text
        with pytest.raises(IncompatibleStack, match=rf"{reason}.*backend=auto"):
            Parse(on(model, "static"))


def test_changed_models_are_found_out():
    original = tiny.model("llama")

    def changed(change):
        model = dataclasses.replace(original, hf=copy.deepcopy(original.hf), backend="auto")
        change(model.hf)
        return model

    def long_rope(hf):
        hf.model.rotary_emb.rope_type = "dynamic"

    def adapter(hf):
        class Adapter(torch.nn.Linear):
            pass

        hf.model.layers[1].mlp.up_proj = Adapter(64, 96, bias=False)

    def activation(hf):
        hf.config.hidden_act = "gelu"

    assert "type 'dynamic'" in static_obstacle(changed(long_rope))
    assert "Adapter" in static_obstacle(changed(adapter))
    assert "gelu" in static_obstacle(changed(activation))
    assert "forward was replaced" in static_obstacle(tiny.right_with_probability(original, 0.5))
    for register in ("register_forward_hook", "register_forward_pre_hook"):  # also one that only looks
        looked_at = changed(lambda hf, register=register: getattr(hf.model.layers[2], register)(lambda *a: None))
        assert "hooks of somebody's (LlamaDecoderLayer)" in static_obstacle(looked_at)

    # what no look at the modules shows is seen in the logits
    def scaling(hf):
        hf.model.layers[2].self_attn.scaling *= 4

    scaled = changed(scaling)
    assert static_obstacle(scaled) is None
    assert not runs_static(scaled)
    plain = changed(lambda hf: None)
    assert runs_static(plain)
    plain.hf(input_ids=torch.tensor([[5, 6]]), output_hidden_states=True)  # for which transformers leaves hooks
    assert any(module._forward_hooks for module in plain.hf.modules())
    assert runs_static(plain)


class Twice(torch.nn.Module):
    """An adapter around a projection."""

    def __init__(self, base):
        super().__init__()
        self.base = base

    def forward(self, x):
        return 2 * self.base(x)


class Other(torch.nn.Linear):
    def forward(self, x):
        return 3 * super().forward(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])  # with copies of the weights and without
def test_a_model_that_is_changed_between_requests_is_looked_at_again(dtype):
    """Each change is in effect in the next request, and the backend is static again where it can be."""
    hf = copy.deepcopy(tiny.model("llama").hf).to(dtype)
    model = on(dataclasses.replace(tiny.model("llama"), hf=hf), "auto")
    mlp, ids = hf.model.layers[1].mlp, [5, 6, 7]

    def now_runs(kind):
        session = open_session(model)
        assert type(session) is kind
        walks.close(session.feed(ids), walks.plain(model, ids)[0][-1])

    now_runs(StaticSession)
    hook = mlp.register_forward_hook(lambda *a: a[-1] * 2)
    now_runs(Session)
    hook.remove()
    mlp.register_forward_hook(lambda *a: a[-1] * 3)  # as many hooks as before
    now_runs(Session)
    mlp._forward_hooks.clear()
    now_runs(StaticSession)
    plain, mlp.up_proj = mlp.up_proj, Twice(mlp.up_proj)
    now_runs(Session)
    mlp.up_proj = plain
    now_runs(StaticSession)
    plain.weight = torch.nn.Parameter(2 * plain.weight)
    now_runs(StaticSession)
    plain.weight.data += 0.5  # as adapters are merged, which counts as no version of the parameter
    now_runs(StaticSession)
    hf.load_state_dict({name: value * 1.1 for name, value in hf.state_dict().items()}, assign=True)
    now_runs(StaticSession)
    mlp.up_proj = torch.nn.Linear(64, 96, bias=False, dtype=dtype)
    now_runs(StaticSession)
    mlp.up_proj.__class__ = Other
    now_runs(Session)
    mlp.up_proj.__class__ = torch.nn.Linear
    mlp.forward = lambda x: 3 * type(mlp).forward(mlp, x)
    now_runs(Session)


def test_weights_are_read_where_they_are():
    """Training on, or loading other weights into the same parameters, is seen without anything being made again."""
    model = dataclasses.replace(tiny.model("qwen2"), hf=copy.deepcopy(tiny.model("qwen2").hf), backend="static")
    before = open_session(model).feed([5, 6, 7])
    with torch.no_grad():
        for parameter in model.hf.parameters():
            parameter.mul_(1.1)
    after = open_session(model).feed([5, 6, 7])
    assert judging.max_error(before, after) > 0.1
    walks.close(after, walks.plain(model, [5, 6, 7])[0][-1])


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_that_are_joined_stay_the_modules_own(family):
    """As on CUDA, on a model that is not packed on the CPU."""
    hf = copy.deepcopy(tiny.model(family).hf).double()
    model = dataclasses.replace(tiny.model(family), hf=hf, backend="static")
    before, parameters = copy.deepcopy(hf.state_dict()), list(hf.parameters())
    assert len(read_weights(hf).layers[0].qkv) == 3
    join_weights(hf)
    assert all(one is other for one, other in zip(hf.parameters(), parameters, strict=True))
    assert all(torch.equal(value, before[name]) for name, value in hf.state_dict().items())
    layer = read_weights(hf).layers[-1]
    assert (len(layer.qkv), len(layer.gate_up)) == (1, 1)
    for scale in (1.0, 1.1):  # the second time after a change in place
        with torch.no_grad():
            hf.model.layers[0].self_attn.k_proj.weight.mul_(scale)
            hf.model.layers[1].mlp.up_proj.weight.mul_(scale)
        ids = walks.tokens(30)
        session = open_session(model)
        session.feed(ids[:20])
        walks.close(session.feed(ids[20:]), walks.plain(model, ids)[0][-1])


def test_joined_parts_lie_one_behind_another():
    whole = torch.randn(7, 3)
    assert torch.equal(joined([whole[:2], whole[2:3], whole[3:]]), whole)
    for parts in ([whole[:2], whole[3:]], [whole[2:], whole[:2]], [whole[:2], whole[2:].clone()], [whole.t()]):
        assert joined(parts) is None


def test_an_unknown_backend_is_refused(tiny_target):
    with pytest.raises(ConfigError, match=r"backend='fast'.*eager, static, auto"):
        on(tiny_target, "fast")


def test_a_tree_wider_than_its_depth_leaves_no_trace(tiny_target):
    session = StaticSession(tiny_target, (0, 4))
    session.feed(walks.tokens(9))
    session.append(5)
    wide = Tree((5, *walks.tokens(30, seed=3)), (-1, *([0] * 30)))
    session.tree(wide)
    session.keep([0, 17])
    assert session._lease.rows == session.cached == 11
    expected, hidden = walks.plain(tiny_target, session.tokens, (0, 4))
    walks.close(session.next_logits, expected[-1])
    walks.close(session.seen(0).taps, hidden)


def test_a_step_that_could_not_be_prepared_is_tried_again(monkeypatch):
    """As after a compiler's error: the steps behind it are captured all the same."""

    class Failing(Replayed):
        def captured(self, body):
            if not self.captures:
                self.captures += 1
                raise RuntimeError("no compiler")
            return super().captured(body)

    model = on(tiny.model("llama"), "static")
    assert runs_static(model)  # which takes steps of its own
    steps, session = in_steps(monkeypatch, model, Failing), open_session(model)
    ids = torch.randint(5, tiny.VOCAB, (12,), generator=torch.Generator().manual_seed(0)).tolist()
    with pytest.raises(RuntimeError, match="no compiler"):
        session.feed(ids)
    logits = open_session(model).feed(ids)
    assert steps.captures == 2
    with torch.inference_mode():
        expected = model.hf(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
