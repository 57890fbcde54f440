"""What the parts of a stack hand to each other: frozen dataclasses that refuse to be wrong. And what a result is.

Units are in the names (`_s` for seconds). Only raw counts are stored; ratios are properties.
Shapes in this file:  N nodes of a tree, V vocabulary, T committed tokens, A accepted tokens, L taps, H hidden.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from torch import Tensor

from parsedec.errors import ConfigError, require_number, require_texts

COLDEST = 1e-4  # the lowest temperature: below it logits overflow, and greedy decoding is what is meant
Message = Mapping[str, str]  # {"role": "user" | "assistant" | "system", "content": str}


class StopReason(StrEnum):
    """Why a request ended."""

    END_TOKEN = "end_token"
    STOP_STRING = "stop_string"
    TOKEN_LIMIT = "token_limit"
    CONTEXT_LIMIT = "context_limit"
    SERVER_LOST = "server_lost"
    SERVER_REFUSED = "server_refused"


class Author(StrEnum):
    """Who wrote a span of the answer."""

    DRAFT = "draft"
    TARGET = "target"


class JudgePath(StrEnum):
    """How a judge pass was computed. The scores of a judge do not depend on it."""

    PACKED = "packed"  # the draft and all probes in one masked pass
    FORKED = "forked"  # the draft, then the probes as a batch of copies of its cache
    CAUSAL = "causal"  # the draft alone, with nothing appended
    REMOTE = "remote"  # probes as prompts to a server


@dataclass(frozen=True, slots=True)
class Tree:
    """Guesses of an inner speculator. Node 0, the root, is the last committed token; every other node is a guess.

    tokens   N token ids
    parents  N indices: parents[0] = -1, and parents[i] < i
    logq     [N, V] log of the distribution node i was drawn from (row 0 is unused). None: all of it was on the guess
    """

    tokens: tuple[int, ...]
    parents: tuple[int, ...]
    logq: Tensor | None = None
    # computed once, since a step asks several times
    _depths: tuple[int, ...] = field(init=False, repr=False, compare=False)
    _laid: bool = field(init=False, repr=False, compare=False)  # whether the nodes are in depth-first order

    def __post_init__(self) -> None:
        n = len(self.tokens)
        if n == 0 or len(self.parents) != n:
            raise ValueError(
                f"Tree needs one parent per token and at least the root; got {n} tokens and {len(self.parents)} parents"
            )
        depths, laid = _walk(self.parents)
        if self.parents[0] != -1 or len(depths) < n:
            wrong = [i for i in range(1, n) if not 0 <= self.parents[i] < i]
            raise ValueError(
                f"Tree.parents must start with -1 and point backwards; nodes {wrong or [0]} do not "
                f"in {list(self.parents)}"
            )
        if self.logq is not None and self.logq.shape[0] != n:
            raise ValueError(f"Tree.logq has {self.logq.shape[0]} rows for {n} nodes; expected one a node")
        object.__setattr__(self, "_depths", tuple(depths))
        object.__setattr__(self, "_laid", laid)

    @classmethod
    def chain(cls, tokens: Sequence[int], logq: Tensor | None = None) -> Tree:
        """A tree without branches: each node guesses the token after the one before. tokens[0] is the root."""
        return cls(tuple(tokens), tuple(range(-1, len(tokens) - 1)), logq)

    @property
    def size(self) -> int:
        return len(self.tokens)

    @property
    def is_chain(self) -> bool:
        return self.depth == self.size - 1

    def depths(self) -> list[int]:
        """Depth of every node; the root has depth 0."""
        return list(self._depths)

    @property
    def depth(self) -> int:
        """Levels below the root."""
        return max(self._depths)

    def children(self) -> list[list[int]]:
        """The children of every node, in order."""
        children: list[list[int]] = [[] for _ in self.tokens]
        for node in range(1, self.size):
            children[self.parents[node]].append(node)
        return children

    def depth_first(self) -> tuple[Tree, list[int]]:
        """This tree in depth-first order, siblings in the order they have here, and the new index of every node.

        The tree itself if it is in that order already.
        """
        if self._laid:
            return self, list(range(self.size))
        children, order, waiting = self.children(), list[int](), [0]
        while waiting:
            node = waiting.pop()
            order.append(node)
            waiting += reversed(children[node])
        place = [0] * self.size
        for i, node in enumerate(order):
            place[node] = i
        tokens, parents = (self.tokens[node] for node in order), (place[self.parents[node]] for node in order[1:])
        return Tree(tuple(tokens), (-1, *parents), None if self.logq is None else self.logq[order]), place

    def first_levels(self, depth: int) -> Tree:
        """The tree without the nodes deeper than `depth`: what a speculator that stops there would have proposed."""
        kept = [node for node in range(self.size) if self._depths[node] <= depth]
        place = {node: i for i, node in enumerate(kept)}
        tokens, parents = (self.tokens[node] for node in kept), (place[self.parents[node]] for node in kept[1:])
        return Tree(tuple(tokens), (-1, *parents), None if self.logq is None else self.logq[kept])

    def path_to(self, node: int) -> list[int]:
        """Node indices from the root to `node`, both included."""
        path = [node]
        while self.parents[path[-1]] >= 0:
            path.append(self.parents[path[-1]])
        return path[::-1]


def _walk(parents: Sequence[int]) -> tuple[list[int], bool]:
    """Depths of the nodes, up to the first whose parent does not precede it; whether they are in depth-first order."""
    depths, path, laid = [0], [0], True  # path: the latest node of every depth
    for node in range(1, len(parents)):
        parent = parents[node]
        if not 0 <= parent < node:
            break
        depth = depths[parent]
        laid = laid and depth < len(path) and path[depth] == parent
        del path[depth + 1 :]
        path.append(node)
        depths.append(depth + 1)
    return depths, laid


@dataclass(frozen=True, slots=True)
class Needs:
    """What an inner speculator has to be given of the target.

    hidden_layers  indices into `output_hidden_states`: 0 the embeddings, the last one behind the final norm
    """

    hidden_layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:  # a list will do
        object.__setattr__(self, "hidden_layers", tuple(self.hidden_layers))


@dataclass(frozen=True, slots=True)
class Seen:
    """Hidden states the target handed over: `taps` [rows, L, H] for the layers in `Needs.hidden_layers`, or None."""

    taps: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a speculator's state has to take in: tokens committed since it was made, and the target's hidden states.

    tokens  A ids in order, whoever wrote them; the last one is the new root, which the target has not read yet
    seen    taps of the A rows that the target has read: those of the old root and of tokens[:-1]
    """

    tokens: tuple[int, ...]
    seen: Seen


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How the next token is chosen. Temperature 0 is greedy; top_k=0 and top_p=1 switch these filters off."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0

    def __post_init__(self) -> None:
        require_number("sampling.temperature", self.temperature)
        require_number("sampling.top_p", self.top_p)
        require_number("sampling.top_k", self.top_k, whole=True)
        warm = self.temperature == 0 or COLDEST <= self.temperature < math.inf
        if not warm or not 0 < self.top_p <= 1 or self.top_k < 0:
            raise ConfigError(
                f"sampling is temperature={self.temperature}, top_p={self.top_p}, top_k={self.top_k}; "
                f"expected temperature 0 or at least {COLDEST}, 0 < top_p <= 1 and top_k >= 0. Use temperature=0 for "
                "greedy."
            )

    @property
    def greedy(self) -> bool:
        return self.temperature == 0


def warmth(asked: float) -> float:
    """The temperature that is meant: users who ask for one so near to 0 that logits would overflow mean greedy."""
    return 0.0 if 0 < asked < COLDEST else asked


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """When a request ends, besides at the model's end token. `max_new_tokens` includes the end token."""

    max_new_tokens: int = 256
    stop: Sequence[str] = ()

    def __post_init__(self) -> None:
        require_number("max_new_tokens", self.max_new_tokens, whole=True, low=1)
        require_texts("stop", self.stop, empty="which would end every answer at once")
        object.__setattr__(self, "stop", tuple(self.stop))


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """One judged piece of a draft: the text between two cuts, and the score of the prefix that ends with it.

    `score` is None where the judge was not asked: the first pass of `two_pass` had already decided.
    """

    text: str
    tokens: int
    score: float | None
    kept: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """One draft-judge-continue cycle."""

    drafted: bool  # False: the gate let the target write alone
    judged_tokens: int = 0  # of the draft, in target tokens and without its end token: N of the judge pass
    kept_tokens: int = 0  # in target tokens, a drafted end token included
    draft_ended: bool = False  # whether the draft model wrote an end token
    accepted_whole: bool = False
    segments: tuple[Segment, ...] = ()
    judge_path: JudgePath | None = None
    judge_passes: int = 0
    judge_rows: int = 0
    mean_draft_logprob: float | None = None  # the target's, over the judged tokens; nats
    target_tokens: int = 0  # tokens the target wrote behind the kept prefix
    draft_s: float = 0.0
    judge_s: float = 0.0
    decode_s: float = 0.0

    def __post_init__(self) -> None:
        # + 1: a drafted end token may be kept, but is not judged
        if self.kept_tokens > self.judged_tokens + 1:
            raise ValueError(f"Round keeps {self.kept_tokens} of {self.judged_tokens} judged tokens")


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """A run of answer tokens by one author: `tokens[start:stop]` of the result, and their text."""

    author: Author
    start: int
    stop: int
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Counters:
    """Work done for one request. A call is one forward of a model; rows are the token positions it computes."""

    target_calls: int = 0  # forwards of the target, prefill and judge passes included
    target_rows: int = 0
    judge_passes: int = 0
    judge_rows: int = 0
    draft_calls: int = 0  # forwards of the outer level's draft model; inner speculators' are not counted
    draft_rows: int = 0
    draft_tokens: int = 0  # of all drafts, in target tokens, drafted end tokens included
    kept_draft_tokens: int = 0  # how many of them are part of the answer
    inner_steps: int = 0  # trees verified by the target
    offered_by_depth: tuple[int, ...] = ()  # [d] verified trees that were at least d + 1 deep
    accepted_by_depth: tuple[int, ...] = ()  # [d] those accepted to depth d + 1 or deeper

    def __post_init__(self) -> None:
        beyond = [
            d for d, (a, o) in enumerate(zip(self.accepted_by_depth, self.offered_by_depth, strict=True)) if a > o
        ]
        if beyond or self.kept_draft_tokens > self.draft_tokens:
            raise ValueError(
                f"Counters keep {self.kept_draft_tokens} of {self.draft_tokens} drafted tokens and accept "
                f"{self.accepted_by_depth} of {self.offered_by_depth} guesses; nothing can exceed what was offered"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseTimes:
    """Wall-clock seconds of one request, by phase. `wall_s` includes time that belongs to no phase.

    In a batch, a request is charged for what it computed alone and for its share, by rows, of the passes it shared: the
    seconds of all requests add up to the batch's. Only `first_token_s` and `elapsed_s` are then time that passed.
    """

    prefill_s: float
    draft_s: float
    judge_s: float
    decode_s: float
    wall_s: float
    first_token_s: float  # until the first token that was certain to stay in the answer
    elapsed_s: float | None = None  # until the answer was complete; `wall_s` where not in a batch. None: not measured


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """A finished answer. `tokens` are in the target's vocabulary and include the end token, if there was one."""

    text: str
    tokens: tuple[int, ...]
    prompt_tokens: int
    stop: StopReason
    spans: tuple[Span, ...]
    rounds: tuple[Round, ...]
    counters: Counters
    times: PhaseTimes
    judge_path: JudgePath | None = None
    notes: tuple[str, ...] = ()  # what a reader of the trace should know, e.g. why a fallback ran

    @property
    def new_tokens(self) -> int:
        return len(self.tokens)

    @property
    def kept_share(self) -> float:
        """Share of the drafted tokens that are part of the answer."""
        return self.counters.kept_draft_tokens / max(1, self.counters.draft_tokens)

    @property
    def tokens_per_s(self) -> float:
        return self.new_tokens / self.times.wall_s if self.times.wall_s > 0 else 0.0


@dataclass(frozen=True, slots=True)
class Shown:
    """A token of the answer and the target's log-probability of it, at temperature 1, in nats.

    top  the most probable tokens in its place with their log-probabilities, the likeliest first
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """One event of `Parse.stream`: text that is certain to stay in the answer, and who wrote it.

    The last event carries the finished `result` and may have no text. `shown` has an entry per token, if asked for.
    """

    text: str
    tokens: tuple[int, ...]
    author: Author
    result: Result | None = None
    shown: tuple[Shown, ...] = ()
