"""Characters whose bytes are several tokens, between two models of different vocabularies: none is cut in half on the
way, wherever the target goes on from and wherever it hands back."""

import functools
import random

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

import tiny
from parsedec import Parse, PrefixVerification
from parsedec.boundary import FirstFailure
from parsedec.loop import Rounds
from parsedec.models.language_model import LanguageModel
from parsedec.segmenters import EveryTokens, Lines
from parsedec.streamed import StreamedVerification

TEXT = "日本語 é🎉。語日本\n本語日 is 3.5.\nend🎉 é語"
LETTERS = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
PROMPT = 4  # tokens of a one-letter message in either vocabulary


def bytes_in_order(seed):
    """A vocabulary of single bytes, numbered in an order of its own."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    random.Random(seed).shuffle(alphabet)
    core = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate([*tiny.SPECIAL, *alphabet])}, merges=[]))
    core.pre_tokenizer, core.decoder = LETTERS, decoders.ByteLevel()
    core.add_special_tokens(tiny.SPECIAL)
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<|pad|>", eos_token="<|end|>", chat_template=tiny.CHAT
    )


@functools.cache
def writer(seed):
    """A model that answers one-letter messages with TEXT: which byte is next, its position says."""
    tokenizer = bytes_in_order(seed)
    config = LlamaConfig(**{**tiny.COMMON, "vocab_size": len(tokenizer), "num_hidden_layers": 1})
    hf = AutoModelForCausalLM.from_config(config).float().eval()
    text, plain = tokenizer.encode(TEXT, add_special_tokens=False), hf.forward

    @functools.wraps(plain)
    def forward(input_ids, position_ids=None, past_key_values=None, **arguments):
        if position_ids is None:
            start = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = torch.arange(start, start + input_ids.shape[1])[None]
        out = plain(input_ids=input_ids, position_ids=position_ids, past_key_values=past_key_values, **arguments)
        places = position_ids[:, -out.logits.shape[1] :] - (PROMPT - 1)
        following = torch.tensor([*text, 1])[places.clamp(0, len(text))]
        out.logits = torch.nn.functional.one_hot(following, len(tokenizer)).float().expand_as(out.logits) * 20
        return out

    hf.forward = forward
    return LanguageModel.wrap(hf, tokenizer, name=f"writer {seed}")


@pytest.mark.parametrize("kind", [PrefixVerification, StreamedVerification])
@pytest.mark.parametrize("segmenter", [EveryTokens(delta=4), EveryTokens(delta=1), Lines(max_tokens=5)], ids=str)
def test_two_models_that_write_the_same_text_write_it_together(segmenter, kind):
    target, draft = writer(1), writer(2)
    assert not target.same_vocabulary(draft)
    authors = set()
    for seed in range(6):
        outer = kind(
            judge=tiny.ScriptedJudge(seed=seed),
            segmenter=segmenter,
            boundary=FirstFailure(threshold=0.3, full_threshold=1.0),
            loop=Rounds(rounds=8),
            max_draft_tokens=11,  # in the midst of characters, too
        )
        result = Parse(target, draft, outer=outer).generate("x", max_new_tokens=200)
        assert result.prompt_tokens == PROMPT
        assert result.text == TEXT
        authors |= {span.author for span in result.spans}
    assert len(authors) == 2
