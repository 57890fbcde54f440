"""The chat page in a real browser: it shows an answer while it is written, by author, and loads nothing from elsewhere.

A script added by the test asks as a person would and sends what the page shows back to the server.
"""

import json
import shutil
import subprocess
import threading
import time

import pytest

from parsedec import Delta, Result, StopReason
from parsedec.errors import PromptError
from parsedec.serve import app
from parsedec.types import Author, Counters, PhaseTimes
from serving import listening

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome-headless-shell", "headless_shell")
BROWSER = next(filter(None, map(shutil.which, NAMES)), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason=f"no browser on PATH; looked for {', '.join(NAMES)}")

DRAFTED, WROTE = "12 + 30 = 42.\n<b>So</b>, ", "42 - 5 = 37 é."

SCRIPT = """<script>
const failures = [];
addEventListener("error", event => failures.push(event.message || `cannot load ${event.target.src}`), true);
addEventListener("securitypolicyviolation", event => failures.push(`blocked ${event.blockedURI}`));
const report = (step, more) => fetch("report", {method: "POST", body: JSON.stringify({step, ...more})});
const until = async condition => { while (!condition()) await new Promise(done => setTimeout(done, 20)); };
const shown = () => {
  const turn = [...document.querySelectorAll(".assistant")].at(-1);
  return {spans: [...turn.querySelectorAll("span")].map(span => [span.className, span.textContent]),
          told: [...document.querySelectorAll(".told")].at(-1).textContent,
          bar: [...document.querySelectorAll(".bar i")].at(-1).style.width,
          error: turn.querySelector(".error")?.textContent ?? null,
          looks: [...turn.querySelectorAll("span")].map(span => {
            const style = getComputedStyle(span);
            return [style.backgroundColor, style.borderBottomStyle]; })};
};
const ask = text => { at("question").value = text; at("send").click(); };
const idle = () => until(() => !at("send").disabled);
(async () => {
  ask("How many?");
  await until(() => document.querySelector(".assistant .draft"));
  await report("live", shown());
  await idle();
  await report("whole", {...shown(), messages});
  ask("Fail");
  await idle();
  await report("failed", {...shown(), messages});
  ask("Forever");
  await until(() => document.querySelectorAll(".assistant").length === 3);
  await until(() => shown().spans.length);
  at("stop").click();
  await idle();
  await report("stopped", shown());
  ask("Forever");
  await until(() => document.querySelectorAll(".assistant").length === 4);
  await until(() => shown().spans.length);
  at("fresh").click();
  await idle();
  await report("fresh", {messages, turns: document.querySelectorAll(".turn").length});
  const from = performance.getEntriesByType("resource").map(entry => entry.name);
  await report("end", {failures, model: at("model").textContent,
    elsewhere: from.filter(name => !name.startsWith(location.origin)),
    sideways: document.documentElement.scrollWidth - document.documentElement.clientWidth});
})().catch(error => report("broken", {said: String(error)}));
</script></body>"""


class Scripted:
    """Writes a drafted piece, waits, then one of the target's; fails or goes on for ever if that is asked."""

    def __init__(self):
        self.go, self.closed = threading.Event(), threading.Event()

    def stream(self, prompt, **options):
        question = prompt[-1]["content"]
        if question == "Fail":
            raise PromptError("the prompt is <i>not</i> liked.")
        if question == "Forever":
            try:
                while True:
                    yield Delta(text="on ", tokens=(1,), author=Author.TARGET)
                    time.sleep(0.02)
            finally:
                self.closed.set()
        yield Delta(text=DRAFTED, tokens=tuple(range(9)), author=Author.DRAFT)
        assert self.go.wait(60)
        yield Delta(text=WROTE[:5], tokens=(1, 2), author=Author.TARGET)
        times = PhaseTimes(prefill_s=0, draft_s=0, judge_s=0, decode_s=0, wall_s=1.5, first_token_s=0)
        counters = Counters(target_calls=4, draft_tokens=20, kept_draft_tokens=9)
        result = Result(
            text=DRAFTED + WROTE, tokens=tuple(range(12)), prompt_tokens=3, stop=StopReason.END_TOKEN, spans=(),
            rounds=(), counters=counters, times=times)  # fmt: skip
        yield Delta(text=WROTE[5:], tokens=(3,), author=Author.TARGET, result=result)


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    page = folder / "page.html"
    page.write_text(app.PAGE.read_text(encoding="utf-8").replace("</body>", SCRIPT), encoding="utf-8")
    engine, told, ended = Scripted(), {}, threading.Event()

    def with_reports(inside):
        async def outside(scope, receive, send):
            if scope["type"] != "http" or scope["path"] != "/report":
                await inside(scope, receive, send)
                return
            report = json.loads((await receive())["body"])
            told[report.pop("step")] = report
            if "live" in told:
                engine.go.set()
            if {"end", "broken"} & set(told):
                ended.set()
            await send({"type": "http.response.start", "status": 204, "headers": []})
            await send({"type": "http.response.body", "body": b""})

        return outside

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(app, "PAGE", page)
        with listening(engine, wrap=with_reports, model="scripted", run="threads", at_once=1) as (address, _):
            browser = subprocess.Popen(
                [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
                 "--disable-background-networking", "--disable-component-update", "--disable-sync",
                 "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", "--remote-debugging-port=0",
                 f"--user-data-dir={folder / 'profile'}", address],
                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
            try:
                assert ended.wait(120), f"the page came as far as {list(told)}"
            finally:
                browser.terminate()
                browser.wait(30)
            told["closed"] = engine.closed.wait(30)
    return told


def test_nothing_breaks_or_loads_from_elsewhere(reports):
    assert "broken" not in reports
    assert reports["end"] == {"failures": [], "model": "scripted", "elsewhere": [], "sideways": 0}


def test_kept_text_shows_while_the_answer_is_written(reports):
    live = reports["live"]
    assert live["spans"] == [["draft", DRAFTED]]  # text of models is no markup
    assert live["bar"] == "100%"
    assert live["told"].startswith("9 of 9 tokens kept from drafts (100 %)")


def test_whole_answer_shows_both_authors_and_the_kept_share(reports):
    whole = reports["whole"]
    assert whole["spans"] == [["draft", DRAFTED], ["target", WROTE]]
    assert whole["bar"] == "75%"
    for said in ("9 of 12 tokens kept from drafts (75 %)", "9 of 20 drafted", "4 target calls", "1.50 s", "end token"):
        assert said in whole["told"]
    draft, target = whole["looks"]
    assert draft[0] != target[0]
    assert (draft[1], target[1]) == ("none", "dotted")  # not by colour alone
    assert [m["role"] for m in whole["messages"]] == ["user", "assistant"]
    assert whole["messages"][1]["content"] == DRAFTED + WROTE


def test_errors_and_stops_are_told(reports):
    assert reports["failed"]["error"] == "the prompt is <i>not</i> liked."
    assert len(reports["failed"]["messages"]) == 2  # the question that failed is not part of the talk
    assert reports["stopped"]["error"] == "stopped"
    assert reports["closed"]


def test_a_new_chat_holds_nothing_of_an_answer_it_cut_short(reports):
    assert reports["fresh"] == {"messages": [], "turns": 0}
