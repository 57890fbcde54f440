"""Logits to a distribution, and a distribution to a token. Randomness is an argument: a `torch.Generator`.

Filters follow Hugging Face's order: temperature, top-k, top-p.   Shapes: N rows, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from parsedec.errors import ConfigError
from parsedec.types import Sampling

SEED_STRIDE = 1_000_003  # between the generators of neighbouring seeds: more than a run has requests


def request_generator(seed: int, index: int) -> torch.Generator:
    """The source of randomness, on the CPU, of request `index` of a run with this seed."""
    return torch.Generator().manual_seed((seed * SEED_STRIDE + index) % 2**63)


class Sampler:
    """Sampling settings with the generator they draw from; one per request and model."""

    def __init__(self, settings: Sampling, generator: torch.Generator | None = None) -> None:
        if generator is None and not settings.greedy:
            raise ConfigError(f"temperature={settings.temperature} needs a torch.Generator; pass one with a seed")
        self.settings = settings
        self.generator = generator

    @property
    def greedy(self) -> bool:
        return self.settings.greedy

    def apart(self) -> Sampler:
        """The same settings with a generator of its own, which `start_from` has yet to seed."""
        own = None if self.generator is None else torch.Generator(self.generator.device)
        return Sampler(self.settings, own)

    def start_from(self, other: Sampler) -> None:
        """Seed the own generator with one draw of another's: how much is drawn from it afterwards, nobody else sees."""
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
            # a token goes once those before it hold top_p already; the first always stays
            late = mass.cumsum(-1) - mass >= self.settings.top_p
            logits = logits.masked_fill(torch.zeros_like(late).scatter(-1, order.indices, late), -torch.inf)
        return logits.log_softmax(-1)

    def pick(self, logits: Tensor) -> int:
        """The next token for logits [V]."""
        if self.greedy:
            return int(logits.argmax())
        return self.draw(self.log_distribution(logits).exp())

    def draw(self, probabilities: Tensor) -> int:
        """A token from a distribution [V], drawn on the generator's device."""
        assert self.generator is not None
        return int(torch.multinomial(probabilities.to(self.generator.device), 1, generator=self.generator))

    def uniform(self) -> float:
        assert self.generator is not None
        return float(torch.rand((), generator=self.generator, device=self.generator.device))
