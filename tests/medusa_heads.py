"""Medusa heads for tests: random ones, and ones that know an answer by heart. Nothing here uses the adapter's maths."""

import torch

from parsedec_adapters.medusa import MedusaHeads


def random_heads(heads=3, hidden=64, vocab=64, layers=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    made = MedusaHeads(heads=heads, hidden=hidden, vocab=vocab, layers=layers)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return made


@torch.no_grad()
def plain_logits(heads, rows):
    """The heads' formula, head by head and layer by layer: rows [R, H] -> [K, R, V]."""
    out = []
    for k in range(heads.heads):
        x = rows
        for j in range(heads.layers):
            x = x + torch.nn.functional.silu(torch.nn.functional.linear(x, heads.weight[j, k], heads.bias[j, k]))
        out.append(x @ heads.output[k].T)
    return torch.stack(out)


def hidden_rows(model, ids):
    """The target's hidden states after the final norm, from one plain forward [T, H]."""
    with torch.inference_mode():
        return model.hf(input_ids=torch.tensor([ids]), output_hidden_states=True, use_cache=False).hidden_states[-1][0]


def taught_heads(model, prompt, tokens, heads=3, share=1.0):
    """Heads that give the answer's own tokens at a share of its positions (least squares), and anything elsewhere."""
    ids = [*prompt, *tokens]
    rows = hidden_rows(model, ids)[len(prompt) - 1 :].double()  # [T, H]
    made = MedusaHeads(heads=heads, hidden=rows.shape[1], vocab=model.vocab_size)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for k in range(heads):
            truth = torch.tensor(ids[len(prompt) + k + 1 :])
            wrong = torch.rand(len(truth), generator=generator) >= share
            truth = torch.where(wrong, (truth + 7) % model.vocab_size, truth)
            wanted = torch.nn.functional.one_hot(truth, model.vocab_size).double()
            made.output[k].copy_((torch.linalg.pinv(rows[: len(truth)]) @ wanted).T)
    return made
