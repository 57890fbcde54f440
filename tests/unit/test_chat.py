"""Prompts and verification suffixes out of chat templates as they are found on the hub, and the tokens of labels."""

import copy
import dataclasses

import pytest

import parsedec
import tiny
from parsedec import Parse, load
from parsedec.errors import ChatTemplateError, ConfigError, JudgeError
from parsedec.judge import LabelJudge
from parsedec.models.language_model import JudgeCard
from parsedec.text.chat import label_tokens, prompt_ids, suffix_text
from parsedec.text.prompt import NewTurn, messages_of

ZOO = parsedec.load("zoo:target", device="cpu")
QUESTION = "Is all of it right?\nAnswer Correct or Incorrect."

# As in Qwen3: reasoning of earlier turns is dropped, and an empty one closes it where thinking is off
CHATML = (
    "{%- for message in messages %}"
    "{%- set content = message.content %}"
    "{%- if message.role == 'assistant' and '</think>' in content %}"
    "{%- set content = content.split('</think>')[-1].lstrip('\\n') %}{%- endif %}"
    "{{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}"
    "{%- endif %}{%- endif %}"
)
# As in Llama 3: contents are trimmed, the text begins with its own token
LLAMA3 = (
    "{{ '<|begin_of_text|>' }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}"
    "{{ message['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
# As in Mistral: no assistant opening, no system turn, roles must alternate
MISTRAL = (
    "{{ '<s>' }}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'] + '</s>' }}{% endif %}{% endfor %}"
)
LAST_TURN_ONLY = "{{ '<|user|>' + messages[-1]['content'] }}{% if add_generation_prompt %}<|assistant|>{% endif %}"
FIRST_TURNS_ONLY = "{% for m in messages[:2] %}{{ '<|' + m['role'] + '|>' + m['content'] }}{% endfor %}<|assistant|>"


def with_template(model, template):
    return dataclasses.replace(model, chat_template=template)


def rendered(model, *contents):
    """The prompt's text, special tokens included, for turns that alternate from a user's."""
    messages = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
    return model.tokenizer.decode(prompt_ids(model, messages))


# --- prompts ---


@pytest.mark.parametrize(
    ("template", "text"),
    [
        (CHATML, "<|im_start|>user\nHow many?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"),
        (
            LLAMA3,
            "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHow many?<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
        ),
        (MISTRAL, "<s>[INST] How many? [/INST]"),
        (None, "<|user|>How many?<|assistant|>"),
    ],
    ids=["chatml", "llama3", "mistral", "zoo"],
)
def test_prompt_ends_with_the_assistant_opening(template, text):
    model = with_template(ZOO, template) if template else ZOO
    assert rendered(model, "How many?") == text


def test_earlier_turns_are_part_of_the_prompt():
    text = rendered(with_template(ZOO, MISTRAL), "One?", "Yes.", "Two?")
    assert text == "<s>[INST] One? [/INST] Yes.</s>[INST] Two? [/INST]"


@pytest.mark.parametrize(
    ("template", "text"),
    [
        (LLAMA3, "<|start_header_id|>assistant<|end_header_id|>\n\nThere are"),
        (MISTRAL, "<s>[INST] How many? [/INST] There are"),
        (None, "<|user|>How many?<|assistant|>There are"),
    ],
    ids=["llama3", "mistral", "zoo"],
)
def test_a_last_turn_of_the_assistants_is_gone_on_with(template, text):
    """As transformers' pipeline does, with the model's own template; a new turn has to be asked for."""
    model = with_template(ZOO, template) if template else ZOO
    assert rendered(model, "How many?", "There are").endswith(text)
    messages = NewTurn([{"role": "user", "content": "How many?"}, {"role": "assistant", "content": "There are"}])
    opened = model.tokenizer.decode(prompt_ids(model, messages_of(messages)))
    assert len(opened) > len(rendered(model, "How many?", "There are"))
    assert opened == str(
        model.tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=True, chat_template=model.chat_template
        )
    )


def test_both_models_go_on_with_the_same_turn():
    engine = Parse(ZOO, load("zoo:draft", device="cpu"))
    question = {"role": "user", "content": "Tom has 3 coins. Ana gives Tom 4 coins. How many coins does Tom have now?"}
    whole = engine.generate([question])
    first = whole.text.splitlines(keepends=True)[0]
    rest = engine.generate([question, {"role": "assistant", "content": first.rstrip()}])
    assert first.rstrip() + rest.text == whole.text
    assert rest.counters.kept_draft_tokens > 0


def test_thinking_can_be_switched_back_on():
    model = dataclasses.replace(with_template(ZOO, CHATML), template_args={"enable_thinking": True})
    assert rendered(model, "Hi").endswith("<|im_start|>assistant\n")


def test_special_tokens_of_the_template_are_single_ids():
    ids = prompt_ids(ZOO, [{"role": "user", "content": "Hi"}])
    specials = ZOO.tokenizer.convert_tokens_to_ids(["<|user|>", "<|assistant|>"])
    assert [ids[0], ids[-1]] == specials


@pytest.mark.parametrize("messages", [[("system", "Be brief."), ("user", "Hi")], [("user", "Hi"), ("user", "Ho")]])
def test_roles_a_template_refuses_are_named(messages):
    roles = [{"role": role, "content": content} for role, content in messages]
    with pytest.raises(ChatTemplateError, match=rf"{roles[0]['role']}.*must alternate.*chat_template"):
        prompt_ids(with_template(ZOO, MISTRAL), roles)


# --- the verification suffix ---


@pytest.mark.parametrize(
    ("template", "suffix"),
    [
        (
            CHATML,
            f"<|im_end|>\n<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
        ),
        (
            LLAMA3,
            f"<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n{QUESTION}<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
        ),
        (MISTRAL, f"</s>[INST] {QUESTION} [/INST]"),
        (None, f"<|end|><|user|>{QUESTION}<|assistant|>"),
    ],
    ids=["chatml", "llama3", "mistral", "zoo"],
)
def test_suffix_is_what_stands_between_a_draft_and_the_verdict(template, suffix):
    model = with_template(ZOO, template) if template else ZOO
    assert suffix_text(model, QUESTION) == suffix


@pytest.mark.parametrize("template", [CHATML, LLAMA3, MISTRAL, None], ids=["chatml", "llama3", "mistral", "zoo"])
def test_prompt_draft_and_suffix_are_the_dialogue_with_the_question(template):
    """Judging a draft is the same as asking in a second user turn. Thinking is off for the first answer as well."""
    model = with_template(ZOO, template) if template else ZOO
    draft = "3 + 4 = 7.\nThe answer is 7."
    judged = rendered(model, "How many?") + draft + suffix_text(model, QUESTION)
    opening = "<think>\n\n</think>\n\n"
    asked = rendered(model, "How many?", draft, QUESTION)
    assert judged.replace(opening, "").replace("[/INST]3", "[/INST] 3") == asked.replace(opening, "")


@pytest.mark.parametrize("template", [LAST_TURN_ONLY, FIRST_TURNS_ONLY], ids=["last turn only", "first turns only"])
def test_template_that_drops_turns_cannot_judge(template):
    with pytest.raises(ChatTemplateError, match=rf"{ZOO.name}.*turn.*chat_template"):
        suffix_text(with_template(ZOO, template), QUESTION)


def test_a_model_without_a_template_is_told_what_to_set():
    tokenizer = copy.deepcopy(tiny.tokenizer())
    tokenizer.chat_template = None
    model = dataclasses.replace(tiny.model("llama", layers=1), tokenizer=tokenizer)
    with pytest.raises(ChatTemplateError, match=r"no chat template.*Set chat_template"):
        prompt_ids(model, [{"role": "user", "content": "w1"}])
    with pytest.raises(ChatTemplateError, match=model.name):
        suffix_text(model, QUESTION)
    assert prompt_ids(with_template(model, tiny.CHAT), [{"role": "user", "content": "w1"}])


def test_the_zoo_target_is_asked_what_it_was_trained_with():
    judge = LabelJudge().bind(ZOO)
    ids = ZOO.tokenizer.convert_tokens_to_ids(["<|end|>", "<|user|>", "<|verify|>", "<|assistant|>"])
    assert list(judge.suffix) == ids


def test_question_and_labels_left_open_come_from_the_judge_card():
    card = JudgeCard(question="Fine?", labels=("yes", "no"), threshold=0.5, full_threshold=0.5)
    model = dataclasses.replace(ZOO, judge_card=card)

    def asked(**settings):
        judge = LabelJudge(**settings).bind(model)
        return judge.question, judge.labels

    assert asked() == ("Fine?", ("yes", "no"))
    assert asked(labels=("good", "bad")) == ("Fine?", ("good", "bad"))
    assert asked(question="Right?") == ("Right?", ("Correct", "Incorrect"))  # the card's labels answer its own question


# --- labels ---


def test_labels_of_one_token():
    ids = ZOO.tokenizer.convert_tokens_to_ids(["Correct", "Incorrect"])
    assert label_tokens(ZOO, suffix_text(ZOO, QUESTION), ["Correct", "Incorrect"]) == ids


@pytest.mark.parametrize("template", [None, CHATML, MISTRAL], ids=["zoo", "chatml", "mistral"])
def test_labels_of_several_tokens_are_told_apart_by_the_first(template):
    model = with_template(ZOO, template) if template else ZOO
    suffix = suffix_text(model, QUESTION)
    head = len(model.encode(suffix))
    labels = ["wonderful", "mistaken", " yes"]
    assert all(len(model.encode(label)) > 1 for label in labels)
    assert label_tokens(model, suffix, labels) == [model.encode(suffix + label)[head] for label in labels]


@pytest.mark.parametrize("labels", [("Correct", "Correct"), ("yes, all", "yes, but"), ("wrong", "write")])
def test_labels_with_the_same_first_token_are_refused(labels):
    with pytest.raises(JudgeError, match=rf"{labels[0]}.*same token.*Choose"):
        LabelJudge(labels=labels).bind(ZOO)


def test_labels_the_vocabulary_does_not_know_are_refused():
    """A word-level vocabulary maps both to its unknown token."""
    with pytest.raises(JudgeError, match=r"Yes.*same token"):
        LabelJudge(labels=("Yes", "No")).bind(tiny.model("llama", layers=1))


@pytest.mark.parametrize("labels", [("", "Incorrect"), ("Correct", "")])
def test_empty_labels_are_refused(labels):
    with pytest.raises(ConfigError, match="holds an empty string"):
        LabelJudge(labels=labels)
    with pytest.raises(JudgeError, match="expected a word"):
        label_tokens(ZOO, suffix_text(ZOO, "Right?"), labels)
