"""The metrics that Prometheus reads at `/metrics`: requests, answers, tokens by author, and times."""

from __future__ import annotations

import time

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from parsedec.serve.jobs import Job
from parsedec.types import Result

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250)


class Metrics:
    """The figures of one server, in a registry of their own."""

    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry()
        self.requests = Counter("parsedec_requests", "HTTP requests by route and status", ["route", "status"],
                                registry=registry)  # fmt: skip
        self.answers = Counter("parsedec_answers", "Answers by how they ended", ["end"], registry=registry)
        self.tokens = Counter("parsedec_tokens", "Tokens: prompt, answer, drafted, kept of the drafted", ["kind"],
                              registry=registry)  # fmt: skip
        self.answer_s = Histogram("parsedec_answer_seconds", "From arrival to the end of an answer", buckets=SECONDS,
                                  registry=registry)  # fmt: skip
        self.first_s = Histogram("parsedec_first_piece_seconds", "From arrival to the first text that stands",
                                 buckets=SECONDS, registry=registry)  # fmt: skip
        self.queue_s = Histogram("parsedec_queue_seconds", "From arrival until the engine begins", buckets=SECONDS,
                                 registry=registry)  # fmt: skip
        self.running = Gauge("parsedec_running", "Answers being written", registry=registry)
        self.waiting = Gauge("parsedec_waiting", "Answers that wait", registry=registry)

    def count(self, job: Job) -> None:
        """Count a job that is over."""
        result = job.outcome
        if not isinstance(result, Result):
            self.answers.labels("dropped" if job.dropped and result is None else "error").inc()
            return
        now = time.perf_counter()
        self.answers.labels(result.stop.value).inc()
        self.answer_s.observe(now - job.came)
        self.first_s.observe((job.first or now) - job.came)
        self.queue_s.observe((job.began or now) - job.came)
        counters = result.counters
        kinds = {"prompt": result.prompt_tokens, "answer": result.new_tokens, "drafted": counters.draft_tokens,
                 "kept": counters.kept_draft_tokens}  # fmt: skip
        for kind, tokens in kinds.items():
            self.tokens.labels(kind).inc(tokens)

    def page(self) -> bytes:
        return bytes(generate_latest(self.registry))
