"""Labels agree with the checker, batches are a function of the step, drafts are written as `generate` would."""

import random

import pytest
import torch

import tiny
from parsedec import Parse
from parsedec.errors import ConfigError, OutputExistsError
from parsedec.models.language_model import load
from parsedec.tasks.zoo_arithmetic import ZooArithmetic, first_wrong_line, solution
from parsedec.training import drafts, generation
from parsedec.training.answers import clean, injected, mark
from parsedec.training.drafts import DraftPass, load_or_sample, sample_pool
from parsedec.training.generation import noised, prompts, write_answers
from parsedec.training.packing import Packer
from parsedec.training.rows import Batches, Mix, Rows, stream
from parsedec.types import StopReason

TASK = ZooArithmetic(n=24, split="train", seed=3)
PROBLEMS = TASK.problems()


@pytest.fixture(scope="module")
def zoo():
    return load("zoo:draft", dtype="float32", device="cpu")


def batches(zoo, pool=(), **settings):
    rows = Rows(model=zoo, task=TASK, problems=PROBLEMS, solution=solution, pool=list(pool), mix=Mix(), **settings)
    return Batches(rows=rows, packer=Packer.of(zoo), lengths=[448, 704], positions=1408)


def test_labels_agree_with_the_checker(zoo):
    rng = random.Random(1)
    for problem in PROBLEMS:
        for make in (clean, injected):
            answer = make(zoo, TASK, problem, solution, rng)
            lines = zoo.decode(answer.tokens).split("\n")
            wrong = first_wrong_line(problem.meta, "\n".join(lines))
            assert len(answer.cuts) == len(lines)
            assert (wrong is None) == (make is clean)
            for k, (cut, right) in enumerate(zip(answer.cuts, answer.right, strict=True)):
                prefix = "\n".join(lines[: k + 1])
                assert zoo.decode(answer.tokens[:cut]) == prefix
                # the checker's verdict on the prefix by itself: nothing wrong in it, at most something missing
                alone = first_wrong_line(problem.meta, prefix)
                assert right == (alone is None or alone == k + 1)


def test_only_right_text_is_taught(zoo):
    rng = random.Random(2)
    for problem in PROBLEMS:
        right = clean(zoo, TASK, problem, solution, rng)
        assert right.taught == len(right.tokens) + 1
        wrong = injected(zoo, TASK, problem, solution, rng)
        taught = zoo.decode(wrong.tokens[: wrong.taught])
        first = wrong.right.index(False)
        assert taught == "".join(line + "\n" for line in zoo.decode(wrong.tokens).split("\n")[:first])
        assert mark(zoo, TASK, problem, wrong.tokens, True).taught == 0  # a draft's errors teach no text at all
        assert mark(zoo, TASK, problem, right.tokens, False).taught == len(right.tokens)  # it did not end


def test_the_first_wrong_token_is_the_first_that_no_right_answer_has(zoo):
    rng = random.Random(3)
    for problem in PROBLEMS:
        right = clean(zoo, TASK, problem, solution, rng)
        assert (right.sound, right.slips) == (len(right.tokens), False)
        wrong = injected(zoo, TASK, problem, solution, rng)
        text, sound = zoo.decode(wrong.tokens), zoo.decode(wrong.tokens[: wrong.sound])
        line = wrong.right.index(False)
        assert sound.count("\n") in (line, line + 1)  # + 1: a line whose only fault is to end too early
        assert wrong.slips
        at = TASK.score(problem, text).error_at
        assert len(sound) <= at < len(zoo.decode(wrong.tokens[: wrong.sound + 1]))


def test_a_batch_depends_on_seed_and_step_alone(zoo):
    one, two = batches(zoo), batches(zoo)
    far = one.per_epoch + 1  # in the second epoch, asked for without the first
    assert torch.equal(one[far].input_ids, two[far].input_ids)
    assert not torch.equal(one[0].input_ids, batches(zoo, seed=1)[0].input_ids)
    streamed = list(stream(two, 1, 3, workers=0))
    assert [torch.equal(a.input_ids, one[i].input_ids) for i, a in enumerate(streamed, start=1)] == [True, True]


def test_an_epoch_reads_a_problem_once_and_draws_it_anew_in_the_next(zoo):
    data = batches(zoo)
    for epoch in range(2):
        seen = [index for _, indices in data._plan(epoch) for index in indices]
        assert len(seen) == len(set(seen))
    assert data.rows.row(0, 0) != data.rows.row(1, 0)
    assert data.rows.row(1, 0) == data.rows.row(1, 0)


def test_drafts_come_in_turn_wrong_and_right(zoo):
    rng, pool = random.Random(5), []
    for problem in PROBLEMS:
        pool.append([(make(zoo, TASK, problem, solution, rng).tokens, True) for make in (clean, injected, clean)])
    for index in range(len(PROBLEMS)):
        row = batches(zoo, pool).rows.row(0, index)
        of_pool = [answer for answer in row.answers if (answer.tokens, True) in pool[index]]
        assert sorted(all(answer.right) for answer in of_pool) == [False, True]
        assert not any(answer.taught for answer in of_pool)  # their habits are not the target's
        assert len(row.answers) == Mix().size


def test_written_answers_equal_generate():
    model = tiny.model("llama")
    model = tiny.with_end_token(model, tiny.plain_answer(model)[1][5])  # so that rows leave the batch at some time
    contexts = [torch.randint(5, 64, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (3, 9, 5, 7)]
    told = []
    written = write_answers(model, contexts, max_new_tokens=12, batch=3, after_each=told.append)
    assert len(told) == len(contexts)
    for context, (tokens, ended) in zip(contexts, written, strict=True):
        plain = tiny.greedy(model, context, 12)[0]
        stop = plain.index(model.end_ids[0]) if model.end_ids[0] in plain else len(plain)
        assert list(tokens) == plain[:stop]
        assert ended == (stop < 12)


def test_answers_end_where_the_context_does():
    """As the engine's own do: nothing is learnt from positions that the model does not have."""
    model = tiny.model("llama", context_limit=12)
    contexts = [torch.randint(5, 64, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (3, 9, 12)]
    written = write_answers(model, contexts, max_new_tokens=20, batch=3)
    for context, (tokens, ended) in zip(contexts[:2], written, strict=False):
        result = Parse(model).generate(context, max_new_tokens=20)
        assert result.stop is StopReason.CONTEXT_LIMIT
        assert tokens == result.tokens
        assert len(context) + len(tokens) == 12
        assert not ended
    assert written[2] == ((), False)


def test_sampled_drafts_repeat_with_the_seed_and_are_kept(zoo, tmp_path):
    passes = [DraftPass(), DraftPass(temperature=1.0), DraftPass(noise=0.2)]
    settings = dict(max_new_tokens=24, batch=8, seed=4)
    pool = load_or_sample(tmp_path / "drafts.json", zoo, PROBLEMS[:6], passes, **settings)
    assert pool == sample_pool(zoo, PROBLEMS[:6], passes, **settings)
    stored = (tmp_path / "drafts.json").read_text()
    assert pool == load_or_sample(tmp_path / "drafts.json", zoo, PROBLEMS[:6], passes, **settings)
    assert (tmp_path / "drafts.json").read_text() == stored
    for others in ((zoo, PROBLEMS[1:7], passes), (zoo, PROBLEMS[:6], passes[:2])):
        with pytest.raises(OutputExistsError, match="other prompts"):
            load_or_sample(tmp_path / "drafts.json", *others, **settings)
    assert max(map(len, pool)) > 1
    assert all(len(answers) == len(set(answers)) for answers in pool)


@pytest.mark.parametrize("stop", [1, 2, 3, 4, 6, 8])
def test_a_killed_run_goes_on_from_the_drafts_it_has_saved(stop, zoo, tmp_path, monkeypatch):
    """Wherever it stops: within a pass that draws, between two, with noise. The pool is that of an unbroken run."""
    passes = [DraftPass(), DraftPass(temperature=1.0), DraftPass(temperature=1.0, noise=0.2)]
    settings, path = dict(max_new_tokens=16, batch=2, seed=4), tmp_path / "drafts.json"
    whole = sample_pool(zoo, PROBLEMS[:6], passes, **settings)
    monkeypatch.setattr(drafts, "SAVE_EVERY_S", 0.0)
    real, batches = generation._write_batch, []

    def breaking(*arguments):
        if len(batches) == stop:
            batches.append(None)
            raise KeyboardInterrupt
        batches.append(arguments)
        return real(*arguments)

    monkeypatch.setattr(generation, "_write_batch", breaking)
    with pytest.raises(KeyboardInterrupt):
        load_or_sample(path, zoo, PROBLEMS[:6], passes, **settings)
    assert not path.exists()
    with pytest.raises(OutputExistsError, match="other prompts"):
        load_or_sample(path, zoo, PROBLEMS[1:7], passes, **settings)
    assert load_or_sample(path, zoo, PROBLEMS[:6], passes, **settings) == whole
    assert len(batches) == 9 + 1  # nothing was written twice
    assert [one.name for one in tmp_path.iterdir()] == ["drafts.json"]


def test_noise_leaves_the_model_itself_alone(zoo):
    before = zoo.hf.get_input_embeddings().weight.clone()
    weaker = noised(zoo, 0.5, torch.Generator().manual_seed(0))
    assert torch.equal(zoo.hf.get_input_embeddings().weight, before)
    assert not torch.equal(weaker.hf.get_input_embeddings().weight, before)
    assert prompts(weaker, PROBLEMS[:1]) == prompts(zoo, PROBLEMS[:1])


def test_settings_that_cannot_work_are_refused(zoo):
    with pytest.raises(ConfigError, match="mix"):
        Mix(clean=0, injected=0, drafts=0)
    with pytest.raises(ConfigError, match="ascending"):
        Batches(rows=batches(zoo).rows, packer=Packer.of(zoo), lengths=[320, 320], positions=1000)
    with pytest.raises(ConfigError, match="problems"):
        Batches(rows=batches(zoo).rows, packer=Packer.of(zoo), lengths=[704], positions=704 * 100)
