"""The whole way once, in seconds: load the embedded pair, compose the two levels, answer, score, render the trace."""

from parsedec import Parse, StopReason, load
from parsedec.experiment.record import to_json
from parsedec.experiment.summary import summarise
from parsedec.experiment.trace import render_trace
from parsedec.tasks.zoo_arithmetic import ZooArithmetic
from parsedec_adapters.draft_model import DraftModel


def test_the_main_job():
    target, draft = (load(f"zoo:{name}", dtype="float32", backend="auto") for name in ("target", "draft"))
    task = ZooArithmetic(n=6, seed=2)
    engine = Parse(target, draft, inner=DraftModel(length=3))
    alone = Parse(target)
    requests = []
    for problem in task.problems():
        result = engine.generate(problem.prompt)
        score = task.score(problem, result.text)
        requests.append({"id": problem.id, "prompt": problem.prompt, "correct": score.correct, "detail": score.detail,
                         "error": None, "result": to_json(result)})  # fmt: skip
        assert result.stop is StopReason.END_TOKEN
        assert result.counters.target_calls < alone.generate(problem.prompt).counters.target_calls
    summary = summarise(requests)
    assert summary["accuracy"] >= 4 / 6
    assert 0 < summary["kept_draft_tokens"] < summary["draft_tokens"]
    page = render_trace(
        {"schema_version": 1, "status": "finished", "title": "tiny", "config": {}, "provenance": {},
         "arms": [{"name": "parse", "description": "", "summary": summary, "requests": requests}]})  # fmt: skip
    assert requests[0]["result"]["spans"][0]["text"].split("\n")[0] in page
