"""Exact distributions: a decoder is run once for every way its random choices can fall, and the chances add up.

The engine, the speculator and the acceptance rule run as they are; only the sampler is replaced by one that follows a
script and remembers which other ways there were.
"""

import copy
import dataclasses

import torch

from parsedec.inner import Decoder
from parsedec.meter import Tally
from parsedec.sampling import Sampler


class ScriptedSampler(Sampler):
    """Chooses as the script says, and the first possible way behind its end."""

    def __init__(self, settings, script):
        super().__init__(settings, torch.Generator())
        self.script, self.taken, self.others, self.weight = script, [], [], 1.0

    def choose(self, ways):
        possible = {way: chance for way, chance in ways if chance > 0}
        way = self.script[len(self.taken)] if len(self.taken) < len(self.script) else next(iter(possible))
        self.taken.append(way)
        self.others.append([other for other in possible if other != way])
        self.weight *= possible[way]
        return way

    def draw(self, probabilities):
        return self.choose(list(enumerate(probabilities.tolist())))

    def uniform(self):
        return _Uniform(self)


class _Uniform:
    """A number from 0 to 1 that is not drawn before it is compared."""

    def __init__(self, sampler):
        self.sampler = sampler

    def __lt__(self, chance):
        return self.sampler.choose([(True, float(chance)), (False, 1 - float(chance))])


def written(model, inner, prompt, new, settings):
    """Exact probability of every text of `new` tokens that the decoder writes after `prompt`, and how many guesses are
    accepted at each depth, in expectation."""
    out, accepted, waiting = {}, {}, [()]
    while waiting:
        script = waiting.pop()
        sampler, tally = ScriptedSampler(settings, script), Tally()
        decoder = Decoder(model, inner, sampler, tally)
        decoder.session.feed(prompt[:-1])
        decoder.session.append(prompt[-1])  # the first step is a tree
        tokens = []
        while len(tokens) < new:
            tokens += decoder.step(new - len(tokens))
        out[tuple(tokens)] = out.get(tuple(tokens), 0.0) + sampler.weight
        for depth, count in enumerate(tally.accepted_by_depth, 1):
            accepted[depth] = accepted.get(depth, 0.0) + count * sampler.weight
        for at in range(len(script), len(sampler.taken)):
            waiting += [(*sampler.taken[:at], other) for other in sampler.others[at]]
    return out, accepted


def target_writes(model, prompt, new, settings):
    """The same of the target alone, by one plain forward per text."""
    if new == 0:
        return {(): 1.0}
    with torch.inference_mode():
        logits = model.hf(input_ids=torch.tensor([list(prompt)])).logits[0, -1]
    p = Sampler(settings, torch.Generator()).log_distribution(logits).exp()
    out = {}
    for token in p.nonzero().flatten().tolist():
        for rest, chance in target_writes(model, [*prompt, token], new - 1, settings).items():
            out[(token, *rest)] = float(p[token]) * chance
    return out


def largest_error(model, inner, prompt, new, settings):
    """How far the decoder's distribution is from the target's, at its worst text. Refuses to compare where no guess is
    ever accepted at some depth, or none is ever refused: any rule would be right there."""
    ours, accepted = written(model, inner, prompt, new, settings)
    theirs = target_writes(model, prompt, new, settings)
    assert all(count > 0.01 for count in accepted.values()), accepted
    assert 0 < accepted.get(1, 0.0) < 0.99 * (new - 1), accepted
    return max(abs(ours.get(text, 0.0) - theirs.get(text, 0.0)) for text in {*ours, *theirs})


def relative(model, noise=0.3, seed=1):
    """A model that agrees with `model` often: its output matrix with some noise."""
    hf = copy.deepcopy(model.hf)
    weight = hf.get_output_embeddings().weight
    with torch.no_grad():
        generator = torch.Generator().manual_seed(seed)
        weight += noise * weight.std() * torch.randn(weight.shape, generator=generator)
    return dataclasses.replace(model, hf=hf, name=f"relative of {model.name}")
