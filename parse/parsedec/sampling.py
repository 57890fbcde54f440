"""From logits to a distribution, and from that to a token. Randomness is an argument: a `torch.Generator`.

Filters follow Hugging Face's order: temperature, top-k, top-p.   Shapes: N rows, V vocabulary.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from parsedec.errors import ConfigError, LogitsError, require_kind, require_number
from parsedec.types import Sampling

OVERFLOW = "They overflow in the model's dtype, or its weights are damaged. Load it with dtype=bfloat16 or float32."
SEED_STRIDE = 1_000_003  # between the generators of neighbouring seeds: more than the requests of a run


def request_generator(seed: int, index: int) -> torch.Generator:
    """The source of randomness, on the CPU, of request `index` of a run with this seed."""
    return torch.Generator().manual_seed((seed * SEED_STRIDE + index) % 2**63)


def chosen_generator(seed: int | None, generator: torch.Generator | None, index: int = 0) -> torch.Generator | None:
    """The generator a request draws from: that of its seed (`request_generator`), or the one given; None without
    either. Raises ConfigError if both are given."""
    if seed is None:
        return generator
    if generator is not None:
        raise ConfigError(f"both seed={seed!r} and a generator are given; a seed makes one. Leave one of the two out.")
    require_number("seed", seed, whole=True)
    return request_generator(int(seed), index)


def checked_token(token: int, vocabulary: int) -> int:
    """The token, if it is one; raises LogitsError for what is drawn from logits that are not numbers."""
    if token >= vocabulary:
        raise LogitsError(f"a token was to be drawn from logits that are not numbers. {OVERFLOW}")
    return token


def check_numbers(logits: Tensor, model: str) -> None:
    """Raise LogitsError if the largest of the logits [V] is not a finite number. The host waits for the device."""
    if logits.numel() and not math.isfinite(best := float(logits.max())):  # nan if any logit is nan
        raise LogitsError(f"the logits of {model} behind the prompt are not numbers: the largest is {best}. {OVERFLOW}")


def token_at(probabilities: Tensor, share: float) -> Tensor:
    """The first token [] at which the cumulative mass of probabilities [V] exceeds `share`, in [0, 1), of the total; V
    if they are not numbers. In double precision, since many tokens of a large vocabulary have less than 2^-24."""
    mass = probabilities.cumsum(-1, dtype=torch.float64)
    return (~(mass > share * mass[-1])).sum()


class Sampler:
    """Sampling settings and the generator to draw from; one per request and model."""

    def __init__(self, settings: Sampling, generator: torch.Generator | None = None) -> None:
        require_kind("sampling", settings, Sampling, "Sampling(temperature=…)")
        if generator is not None:
            require_kind("generator", generator, torch.Generator, "torch.Generator().manual_seed(…)")
        elif not settings.greedy:
            raise ConfigError(
                f"temperature={settings.temperature} needs seed=…, or a generator=torch.Generator().manual_seed(…)."
            )
        self.settings = settings
        self.generator = generator

    @property
    def greedy(self) -> bool:
        return self.settings.greedy

    def apart(self) -> Sampler:
        """The same settings with a generator of its own, still to be seeded by `start_from`."""
        own = None if self.generator is None else torch.Generator(self.generator.device)
        return Sampler(self.settings, own)

    def start_from(self, other: Sampler) -> None:
        """Seed its generator with one draw from another's, which is unaffected by how much is drawn here afterwards."""
        if self.generator is not None and other.generator is not None:
            device = other.generator.device
            self.generator.manual_seed(int(torch.randint(1 << 62, (), generator=other.generator, device=device)))

    def log_distribution(self, logits: Tensor) -> Tensor:
        """Log of the distribution tokens are drawn from, [..., V] float32; not defined for greedy decoding."""
        logits = logits.float() / self.settings.temperature
        if 0 < self.settings.top_k < logits.shape[-1]:
            floor = logits.topk(self.settings.top_k, dim=-1).values[..., -1:]
            logits = logits.masked_fill(logits < floor, -torch.inf)
        if self.settings.top_p < 1:
            order = logits.sort(dim=-1, descending=True)
            mass = order.values.softmax(-1)
            # a token is dropped if those before it already hold top_p
            late = mass.cumsum(-1) - mass >= self.settings.top_p
            late[..., 0] = False  # the first stays, even if top_p is 0 in float32
            logits = logits.masked_fill(torch.zeros_like(late).scatter(-1, order.indices, late), -torch.inf)
        return logits.log_softmax(-1)

    def pick(self, logits: Tensor) -> int:
        """The next token for logits [V]."""
        if self.greedy:
            return int(logits.argmax())
        return self.draw(self.log_distribution(logits).exp())

    def chosen(self, logits: Tensor) -> Tensor:
        """As `pick`, but the token stays on the device of the logits: an integer [], V if they are not numbers."""
        return logits.argmax() if self.greedy else self._drawn(self.log_distribution(logits).exp())

    def draw(self, probabilities: Tensor) -> int:
        """A token drawn from a distribution [V]; raises LogitsError if its values are not numbers."""
        return checked_token(int(self._drawn(probabilities)), len(probabilities))

    def _drawn(self, probabilities: Tensor) -> Tensor:
        """A token [] drawn from a distribution [V], on its device; V if its values are not numbers. All tokens are
        drawn here: with a generator on that device, as Hugging Face's `generate` draws; with one elsewhere, from a
        single random number, so that nothing of the size of a vocabulary changes devices."""
        assert self.generator is not None
        if self._is_beside(probabilities):
            try:
                return torch.multinomial(probabilities, 1, generator=self.generator).squeeze(0)
            except RuntimeError:  # on a GPU there is nothing to catch: values that are not numbers end the process
                if bool(probabilities.isfinite().all()):
                    raise
                return torch.tensor(len(probabilities))
        device = self.generator.device
        share = torch.rand((), dtype=torch.float64, generator=self.generator, device=device)
        return token_at(probabilities, float(share))

    def _is_beside(self, probabilities: Tensor) -> bool:
        return self.generator is not None and self.generator.device.type == probabilities.device.type

    def uniform(self) -> float:
        assert self.generator is not None
        return float(torch.rand((), generator=self.generator, device=self.generator.device))
