"""Logits to a distribution, and a distribution to a token. Randomness is an argument: a `torch.Generator`.

Filters follow Hugging Face's order: temperature, top-k, top-p.   Shapes: N rows, V vocabulary.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from parsedec.errors import ConfigError, LogitsError, require_kind, require_number
from parsedec.types import Sampling

OVERFLOW = "They overflow in the model's dtype, or its weights are damaged. Load it with dtype=bfloat16 or float32."
SEED_STRIDE = 1_000_003  # between the generators of neighbouring seeds: more than a run has requests


def request_generator(seed: int, index: int) -> torch.Generator:
    """The source of randomness, on the CPU, of request `index` of a run with this seed."""
    return torch.Generator().manual_seed((seed * SEED_STRIDE + index) % 2**63)


def chosen_generator(seed: int | None, generator: torch.Generator | None, index: int = 0) -> torch.Generator | None:
    """What a request draws from: what `request_generator` makes of a seed, or the generator it is given. Raises
    ConfigError for both."""
    if seed is None:
        return generator
    if generator is not None:
        raise ConfigError(f"both seed={seed!r} and a generator are given; a seed makes one. Leave one of the two out.")
    require_number("seed", seed, whole=True)
    return request_generator(int(seed), index)


def checked_token(token: int, vocabulary: int) -> int:
    """The token, if it is one: what is drawn from logits that are no numbers is not. Raises LogitsError."""
    if token >= vocabulary:
        raise LogitsError(f"a token was to be drawn from logits that are not numbers. {OVERFLOW}")
    return token


def check_numbers(logits: Tensor, model: str) -> None:
    """Raise LogitsError where logits [V] have no best token that is a number. The host waits for the answer."""
    if logits.numel() and not math.isfinite(best := float(logits.max())):  # nan, if any of them is
        raise LogitsError(f"the logits of {model} behind the prompt are not numbers: the largest is {best}. {OVERFLOW}")


def token_at(probabilities: Tensor, share: float) -> Tensor:
    """The first token [] up to which there is more than `share`, 0 to below 1, of the mass of probabilities [V]; V if
    they are not numbers. In double precision: many tokens of a large vocabulary have less than 2^-24."""
    mass = probabilities.cumsum(-1, dtype=torch.float64)
    return (~(mass > share * mass[-1])).sum()


class Sampler:
    """Sampling settings with the generator they draw from; one per request and model."""

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
            # a token goes once those before it hold top_p already
            late = mass.cumsum(-1) - mass >= self.settings.top_p
            late[..., 0] = False  # the first stays, even where top_p is 0 in float32
            logits = logits.masked_fill(torch.zeros_like(late).scatter(-1, order.indices, late), -torch.inf)
        return logits.log_softmax(-1)

    def pick(self, logits: Tensor) -> int:
        """The next token for logits [V]."""
        if self.greedy:
            return int(logits.argmax())
        return self.draw(self.log_distribution(logits).exp())

    def chosen(self, logits: Tensor) -> Tensor:
        """The same token, still on the device of the logits: a whole number [], V if they are not numbers."""
        return logits.argmax() if self.greedy else self._drawn(self.log_distribution(logits).exp())

    def draw(self, probabilities: Tensor) -> int:
        """A token from a distribution [V]."""
        return checked_token(int(self._drawn(probabilities)), len(probabilities))

    def _drawn(self, probabilities: Tensor) -> Tensor:
        """A token [] from a distribution [V], on its device, V if that is no numbers; all draws of tokens are made
        here. Where the generator is there, too, it draws as `generate` of Hugging Face does; elsewhere it draws one
        number, and nothing of the size of a vocabulary changes devices."""
        assert self.generator is not None
        if self._is_beside(probabilities):
            try:
                return torch.multinomial(probabilities, 1, generator=self.generator).squeeze(0)
            except RuntimeError:  # on a GPU this cannot be caught: with a generator there it ends the process
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
