"""Characters of several tokens, from a server that names only the last token of each: no token is lost.

Oracle: the tokens the server was made to write, one byte each, but for one character that is a single token.
"""

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fake_server import FakeServer
from parsedec import Parse
from parsedec.models.language_model import LanguageModel
from parsedec.remote import connect
from parsedec.remote.capabilities import TokensBack
from parsedec.remote.probing import TEXT
from parsedec.remote.reading import MENDED, WholeCharacters
from parsedec.remote.wire import Piece
from parsedec.types import StopReason

END = "<|end|>"
PROMPT, WRITTEN = (
    "xx",
    "né 漢字 🦄\u2028🎉\x85so\u2029!",
)  # str.splitlines ends lines there
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def byte_tokenizer():
    letters = sorted({letter for text in (TEXT, PROMPT, WRITTEN) for letter in BYTES.pre_tokenize_str(text)[0][0]})
    accented = BYTES.pre_tokenize_str("é")[0][0]
    vocabulary = {token: i for i, token in enumerate([END, *letters, accented])}
    core = Tokenizer(models.BPE(vocabulary, [tuple(accented)]))
    core.pre_tokenizer, core.decoder = BYTES, decoders.ByteLevel()
    core.add_special_tokens([END])
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token=END)


@pytest.fixture(scope="module")
def model():
    tokenizer = byte_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, max_position_embeddings=256, eos_token_id=0, bos_token_id=None)  # fmt: skip
    return LanguageModel.wrap(LlamaForCausalLM(config), tokenizer, name="bytes")


class Scripted(FakeServer):
    """Writes WRITTEN behind PROMPT, and an "x" behind anything else."""

    def logits(self, ids):
        prompt, script = self.model.encode(PROMPT), [*self.model.encode(WRITTEN), 0]
        ours = list(ids[: len(prompt)]) == prompt
        token = script[len(ids) - len(prompt)] if ours else self.model.encode("x")[0]
        return torch.nn.functional.one_hot(torch.tensor(token), self.model.vocab_size) * 20.0


@pytest.fixture
def served(model, tmp_path):
    model.tokenizer.save_pretrained(tmp_path)
    model.hf.config.save_pretrained(tmp_path)
    with Scripted(model, "llamacpp") as server:
        yield connect(server.url, tokenizer=str(tmp_path), retries=2, backoff_s=0.01, read_timeout_s=5.0), server


def test_no_token_of_a_character_is_lost(served, model):
    remote, _ = served
    assert remote.can.tokens_back is TokensBack.LOGPROBS
    script = model.encode(WRITTEN)
    assert len(script) >= len(WRITTEN) + 10, "most of its characters are several tokens"
    result = Parse(remote).generate(model.encode(PROMPT), max_new_tokens=60)
    assert (list(result.tokens), result.text, result.stop) == ([*script, 0], WRITTEN, StopReason.END_TOKEN)
    assert MENDED in result.notes
    plain = Parse(remote).generate(model.encode(PROMPT), max_new_tokens=2)
    assert (plain.text, plain.stop) == ("né", StopReason.TOKEN_LIMIT)
    assert MENDED not in plain.notes


@pytest.mark.parametrize("new", range(3, 21))
def test_a_limit_within_a_character_leaves_out_its_beginning(served, model, new):
    remote, server = served
    before = len(server.seen)
    script = model.encode(WRITTEN)
    assert new < len(script)
    result = Parse(remote).generate(model.encode(PROMPT), max_new_tokens=new)
    whole = model.decode(script[:new]).rstrip("\ufffd")
    assert (result.text, result.stop) == (whole, StopReason.TOKEN_LIMIT)
    assert list(result.tokens) == script[: len(result.tokens)]
    assert len(server.seen) - before <= 2, "it is asked once more at most"


@pytest.mark.parametrize("fault", ["reset_stream", "broken_stream"])
def test_a_stream_that_breaks_off_is_taken_up_behind_the_last_whole_character(served, model, fault):
    remote, server = served
    server.faults.append(fault)
    result = Parse(remote).generate(model.encode(PROMPT), max_new_tokens=60)
    assert (list(result.tokens), result.text) == ([*model.encode(WRITTEN), 0], WRITTEN)


def test_the_servers_own_limit_is_told_from_hidden_tokens(served, model):
    remote, server = served
    server.model = LanguageModel.wrap(model.hf, model.tokenizer, name="short", context_limit=12)
    result = Parse(remote).generate(model.encode(PROMPT), max_new_tokens=40)
    assert result.stop is StopReason.CONTEXT_LIMIT
    assert model.decode(model.encode(WRITTEN)[:10]).rstrip("\ufffd") == result.text


def test_a_server_that_names_every_token_is_taken_at_its_word(model):
    """Another spelling than the tokenizer's own stays what it is; and what comes without any id is encoded."""
    notes = set()
    reader = WholeCharacters(model, model.encode(PROMPT), notes)
    first, second = (model.tokenizer.convert_tokens_to_ids(letter) for letter in BYTES.pre_tokenize_str("é")[0][0])
    assert len(model.encode("é")) == 1
    pieces = [Piece((first,), "", None), Piece((second,), "é", None), Piece(tuple(model.encode("s")), "s", None)]
    assert [reader.push(piece) for piece in pieces] == [[first], [second], model.encode("s")]
    assert not notes
    assert reader.push(Piece((), "漢", None)) == model.encode("漢")
    assert notes == {MENDED}
