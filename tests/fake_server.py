"""An OpenAI-compatible server over a local model, with real logits: what a remote engine is checked against.

`flavour` decides what it can do, as vLLM, SGLang, llama.cpp or a server that speaks text only would; `faults` what goes
wrong next. It runs in threads of the test process.
"""

import json
import socket
import struct
import threading
import time
from collections import deque
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch

FLAVOURS = ("vllm", "sglang", "llamacpp", "plain")
OWNERS = {"vllm": "vllm", "sglang": "sglang", "llamacpp": "llamacpp"}
VERSIONS = {"/version": "vllm", "/get_server_info": "sglang", "/props": "llamacpp"}


REFUSED = {"error": {"message": "this adapter is not allowed", "type": "BadRequestError", "code": 400}}


class Refused(Exception):
    pass


class FakeServer:
    """`with FakeServer(model) as server: connect(server.url, …)`.

    faults   for the next requests that generate, one each: "500", "busy", "malformed", "slow", "reset", "reset_stream",
             "broken_stream", "empty", "400" (refused), "refused_stream" (refused in a stream that has begun), "drip"
             (a line without end), "drip500" (an error without end); None for one that goes well; a function that
             changes the JSON of the answer, of a stream's fourth event
    logprobs  whether it shows log-probabilities
    pace_s   seconds a token takes
    """

    def __init__(self, model, flavour="vllm", *, logprobs=True, pace_s=0.0, name="tiny", api_key=None):
        self.model, self.flavour, self.logprobs, self.pace_s, self.name = model, flavour, logprobs, pace_s, name
        self.api_key = api_key
        self.faults = deque()
        self.seen = []  # (path, body) of every request that generates
        self.hung_up = threading.Event()  # a client has gone in mid-stream
        self.slow_s = 30.0
        self.retry_after = None  # what "busy" and "500" say of it
        self.released = threading.Event()
        self.lock = threading.Lock()
        self.dead = False

    def __enter__(self):
        handler = type("Bound", (Handler,), {"fake": self})
        self.dead = False
        self.http = ThreadingHTTPServer(("127.0.0.1", getattr(self, "port", 0)), handler)
        self.http.daemon_threads = True
        self.port = self.http.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *error):
        self.released.set()
        self.http.shutdown()
        self.http.server_close()

    def kill(self):
        """No connection is accepted any more, and those there are break."""
        self.dead = True
        self.__exit__()

    def logits(self, ids):
        with self.lock, torch.inference_mode():
            return self.model.hf(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0, -1].float()

    def generate(self, ids, body):
        """(token, log-probabilities [V]) one at a time, the end token included."""
        ids, limit = list(ids), body["max_tokens"]
        generator = torch.Generator().manual_seed(body.get("seed") or 0)
        for _ in range(limit):
            if len(ids) >= self.model.context_limit:
                return
            logits = self.logits(ids)
            warm = body.get("temperature", 1.0)
            token = (
                int(torch.multinomial((logits / warm).softmax(-1), 1, generator=generator))
                if warm
                else int(logits.argmax())
            )
            time.sleep(self.pace_s)
            yield token, logits.log_softmax(-1)
            ids.append(token)
            if token in self.model.end_ids:
                return

    def ids(self, prompt):
        if isinstance(prompt, str):
            return self.model.encode(prompt)
        if self.flavour == "plain":
            raise Refused("prompt must be a string")
        if not all(isinstance(i, int) and 0 <= i < self.model.vocab_size for i in prompt):
            raise Refused("token out of vocabulary")
        return prompt


def changed(fault, answer):
    return fault(answer) if callable(fault) else answer


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    fake: FakeServer

    def log_message(self, *args):
        pass

    def do_GET(self):
        fake = self.fake
        if fake.api_key and self.headers.get("Authorization") != f"Bearer {fake.api_key}":
            return self.reply({"error": "wrong key"}, 401)
        if self.path == "/v1/models":
            entry = {"id": fake.name, "owned_by": OWNERS.get(fake.flavour, "someone")}
            if fake.flavour == "vllm":
                entry["max_model_len"] = fake.model.context_limit
            return self.reply({"data": [entry]})
        if VERSIONS.get(self.path) == fake.flavour:
            return self.reply({"version": "9.9.9", "build_info": "b9"})
        return self.reply({"error": "not found"}, 404)

    def do_POST(self):
        fake = self.fake
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if fake.dead:
            return self.reset()
        if fake.api_key and self.headers.get("Authorization") != f"Bearer {fake.api_key}":
            return self.reply({"error": "wrong key"}, 401)
        known = {"/v1/completions"} | ({"/generate"} if fake.flavour == "sglang" else set())
        known |= {"/generative_scoring"} if fake.flavour == "vllm" else set()
        if self.path not in known:
            return self.reply({"error": "not found"}, 404)
        fake.seen.append((self.path, body))
        fault = fake.faults.popleft() if fake.faults else None
        if self.before(fault):
            return None
        try:
            if self.path == "/generative_scoring":
                return self.scores(body, fault)
            if self.path == "/generate":
                return self.native(body, fault)
            return self.completions(body, fault)
        except Refused as error:
            return self.reply({"error": str(error)}, 400)
        except (BrokenPipeError, ConnectionResetError):
            fake.hung_up.set()
            self.close_connection = True

    def before(self, fault):
        """Faults that need no model."""
        if fault in ("500", "busy"):
            told = {"Retry-After": self.fake.retry_after} if self.fake.retry_after else {}
            self.reply({"error": "for now"}, 500 if fault == "500" else 429, told)
        elif fault == "400":
            self.reply(REFUSED, 400)
        elif fault == "malformed":
            self.reply("<html>no JSON</html>")
        elif fault == "empty":
            self.reply({"choices": []})
        elif fault == "reset":
            self.reset()
        elif fault in ("drip", "drip500"):
            self.drip(200 if fault == "drip" else 500)
        elif fault == "slow":
            self.fake.released.wait(self.fake.slow_s)
            self.close_connection = True
        else:
            return False
        return True

    def reset(self):
        """Close the connection as a process that was killed does."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True

    def drip(self, status):
        self.send_response(status)
        self.send_header("Connection", "close")
        self.end_headers()
        self.close_connection = True
        with suppress(BrokenPipeError, ConnectionResetError):
            for _ in range(int(self.fake.slow_s / 0.1)):
                self.wfile.write(b":")
                time.sleep(0.1)

    def completions(self, body, fault):
        fake = self.fake
        if fake.flavour == "plain" and {"top_k", "min_p", "return_token_ids"} & set(body):
            raise Refused("unknown parameter")
        if fake.flavour == "plain" and (body.get("logprobs") or 0) > 5:
            raise Refused("logprobs must be at most 5")
        prompt = body["prompt"]
        many = isinstance(prompt, list) and bool(prompt) and not isinstance(prompt[0], int)
        prompts = [fake.ids(p) for p in (prompt if many else [prompt])]
        if many and fake.flavour == "plain":
            raise Refused("one prompt at a time")
        if body.get("stream"):
            if fake.flavour == "llamacpp":
                return self.stream(self.whole_characters(prompts[0], body), fault, wrap=lambda event: event)
            return self.stream((self.choice(s, body) for s in self.steps(prompts[0], body)), fault)
        choices = []
        for index, ids in enumerate(prompts):
            steps = list(self.steps(ids, body))
            choice = self.choice([step for part in steps for step in part], body)
            choices.insert(0, choice | {"index": index})  # the last prompt's comes first: the index decides
        return self.reply(changed(fault, {"choices": choices, "usage": {"prompt_tokens": len(prompts[0])}}))

    def steps(self, ids, body):
        """Lists of (token, logprobs, finish): one token each, the reason with the last."""
        count = 0
        for token, logprobs in self.fake.generate(ids, body):
            count += 1
            if token in self.fake.model.end_ids:
                yield [(token, logprobs, "stop")]
                return
            yield [(token, logprobs, "length" if count == body["max_tokens"] else None)]
        if count < body["max_tokens"]:
            yield [(None, None, "length")]

    def whole_characters(self, ids, body):
        """Events of llama.cpp: text waits until its last character is whole, and comes with the last token alone."""
        held, count, finish = [], 0, None
        for part in self.steps(ids, body):
            held += [step for step in part if step[0] is not None]
            count, finish = count + len([step for step in part if step[0] is not None]), part[-1][2]
            text = self.fake.model.decode([token for token, _, _ in held])
            if finish != "stop" and held and not text.endswith("\ufffd"):
                yield {"choices": [self.choice([(*held[-1][:2], None)], body) | {"text": text}]}
                held = []
        yield {"choices": [{"index": 0, "text": "", "finish_reason": finish}], "usage": {"completion_tokens": count}}

    def choice(self, steps, body):
        fake, model = self.fake, self.fake.model
        tokens = [token for token, _, _ in steps if token is not None]
        shown = [t for t in tokens if t not in model.end_ids]
        choice = {"index": 0, "text": model.decode(shown), "finish_reason": steps[-1][2] if steps else None}
        if fake.flavour == "vllm" and body.get("return_token_ids"):
            choice["token_ids"] = tokens
        count = body.get("logprobs")
        if count and fake.logprobs and tokens:
            rows = [logprobs for token, logprobs, _ in steps if token is not None]
            choice["logprobs"] = (
                self.llamacpp(tokens, rows, count)
                if fake.flavour == "llamacpp"
                else self.openai(tokens, rows, count, body)
            )
        return choice

    def llamacpp(self, tokens, rows, count):
        def entry(token, row):
            spelt = self.fake.model.tokenizer.decode([token])
            return {"id": token, "token": spelt, "logprob": float(row[token])}

        def top(row):
            return {"top_logprobs": [entry(int(i), row) for i in row.topk(min(count, len(row))).indices]}

        return {"content": [entry(token, row) | top(row) for token, row in zip(tokens, rows, strict=True)]}

    def openai(self, tokens, rows, count, body):
        def name(token):
            named = body.get("return_tokens_as_token_ids") and self.fake.flavour == "vllm"
            return f"token_id:{token}" if named else self.fake.model.tokenizer.decode([token])

        wanted = body.get("logprob_token_ids") if self.fake.flavour == "vllm" else None
        top = [{name(int(i)): float(row[i]) for i in (wanted or row.topk(count).indices)} for row in rows]
        return {"tokens": [name(t) for t in tokens], "top_logprobs": top}

    def native(self, body, fault):
        """SGLang's /generate."""
        settings = body["sampling_params"]
        asked = {"max_tokens": settings["max_new_tokens"], "temperature": settings["temperature"],
                 "seed": settings.get("sampling_seed")}  # fmt: skip
        prompts = body.get("input_ids", body.get("text"))
        many = isinstance(prompts[0], list)
        model = self.fake.model

        def answer(steps):
            tokens = [t for t, _, _ in steps if t is not None]
            finish = steps[-1][2] if steps else None
            about = {"completion_tokens": len(tokens), "finish_reason": {"type": finish} if finish else None}
            if body.get("token_ids_logprob"):
                wanted = body["token_ids_logprob"]
                about["output_token_ids_logprobs"] = [[[float(r[i]), i, None] for i in wanted] for _, r, _ in steps]
            return {"text": model.decode(tokens), "output_ids": tokens, "meta_info": about}

        if body.get("stream"):
            so_far = []

            def growing():
                for part in self.steps(self.fake.ids(prompts), asked):
                    so_far.extend(part)
                    yield answer(so_far)

            return self.stream(growing(), fault, wrap=lambda event: event)
        answers = [answer([s for part in self.steps(self.fake.ids(p), asked) for s in part])
                   for p in (prompts if many else [prompts])]  # fmt: skip
        return self.reply(changed(fault, answers if many else answers[0]))

    def scores(self, body, fault):
        right, wrong = body["label_token_ids"]
        rows = [self.fake.logits([*body["query"], *item]) for item in body["items"]]
        scores = [{"index": i, "score": float((r[[right, wrong]]).softmax(-1)[0])} for i, r in enumerate(rows)]
        return self.reply(changed(fault, {"data": scores[::-1]}))

    def stream(self, events, fault, wrap=lambda choice: {"choices": [choice]}):
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        self.close_connection = True
        for i, event in enumerate(events):
            if fault == "reset_stream" and i == 3:
                return self.reset()
            if fault == "broken_stream" and i == 3:
                self.wfile.write(b"data: {not json\n\n")
                return None
            if fault == "refused_stream" and i == 3:
                self.wfile.write(f"data: {json.dumps(REFUSED)}\n\n".encode())
                return None
            if fault == "slow_stream" and i == 3:
                self.fake.released.wait(self.fake.slow_s)
            data = changed(fault if i == 3 else None, wrap(event))
            # what is not ASCII goes raw, as vLLM sends it
            self.wfile.write(f"data: {json.dumps(data, ensure_ascii=False)}\n\n".encode())
            self.wfile.flush()
        self.wfile.write(b"data: [DONE]\n\n")
        return None

    def reply(self, answer, status=200, headers=None):
        data = (answer if isinstance(answer, str) else json.dumps(answer)).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)
