"""Every inner speculator as its YAML has it, on the embedded models: no token is another than with `inner=none`."""

import pytest
from hydra.utils import instantiate

from configs import CONF, composed
from parsedec.experiment.build import build_engine

INNERS = sorted(path.stem for path in (CONF / "inner").glob("*.yaml"))
POLICIES = {
    "alone": ["outer=none"],
    "parse": ["outer=parse", "boundary.threshold=0.9"],
    "two_pass, rounds": ["outer=parse", "outer.passes=two_pass", "loop=rounds", "boundary.threshold=0.97"],
    "adaptive gate": ["outer=parse", "gate=adaptive", "gate.cost_per_token=0.3"],
    "speculation for the draft model": ["outer=parse", "inner@draft.inner=draft_model", "draft.inner.model=zoo:draft"],
}


def answers(*overrides):
    cfg = composed(
        "config",
        "runtime=cpu",
        "runtime.backend=static",
        "target.dtype=float32",
        "draft.model.dtype=float32",
        *overrides,
    )
    engine, task = build_engine(cfg), instantiate(cfg.task)
    results = [engine.generate(problem.prompt, max_new_tokens=160) for problem in task.problems()]
    return [result.tokens for result in results], results


@pytest.fixture(scope="module")
def plain():
    return {name: answers(*overrides, f"task.n={asked(name)}")[0] for name, overrides in POLICIES.items()}


def asked(policy):
    """Problems: two, so that the second meets what the first left behind."""
    return 2 if policy == "alone" else 1


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("inner", INNERS)
def test_the_inner_level_changes_no_token(inner, policy, plain):
    tokens, results = answers(*POLICIES[policy], f"inner={inner}", f"task.n={asked(policy)}")
    assert tokens == plain[policy]
    if policy != "alone" or inner in ("none", "ngram"):
        return
    assert sum(sum(result.counters.offered_by_depth) for result in results) > 0, "it did speculate"
    if inner != "eagle3_random":  # whose guesses are noise; the others were right now and then
        assert sum(sum(result.counters.accepted_by_depth) for result in results) > 0
        assert sum(result.counters.target_calls for result in results) < sum(map(len, tokens))
