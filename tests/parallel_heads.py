"""ParallelSpec heads for tests: untrained, or taught one answer."""

import torch

from parsedec_adapters.parallel_head import HeadConfig, ParallelHead


def new_head(model, slots=4, seed=0):
    torch.manual_seed(seed)
    return ParallelHead(HeadConfig.for_target(model, slots))


def inputs(model, text):
    """Embeddings and last hidden states of a text, [1, T, H] each."""
    ids = torch.tensor([text])
    with torch.no_grad():
        hidden = model.hf(input_ids=ids, output_hidden_states=True).hidden_states[-1]
        return model.hf.get_input_embeddings()(ids), hidden


def teach(head, model, prompt, tokens, steps=40):
    """Train the head on one answer, in place."""
    text = [*prompt, *tokens]
    embedded, hidden = inputs(model, text)
    slots = head.config.slots
    anchors = torch.arange(len(prompt), len(text) - slots)
    wanted = torch.tensor(text)[anchors[:, None] + 1 + torch.arange(slots)]  # [G, K]
    optimizer = torch.optim.AdamW(head.parameters(), lr=3e-3)
    for _ in range(steps):
        logits = model.hf.get_output_embeddings()(head(embedded, hidden, anchors)[0])  # [G, K, V]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), wanted.flatten())
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in head.parameters())
        optimizer.step()
    return head
