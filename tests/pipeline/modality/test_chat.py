"""Conversations: what is learned of them, held to what was written by hand; what is refused."""

import json

import pytest
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from pipeline.config.load import ROOT
from pipeline.config.schema import RunConfig
from pipeline.errors import DataError, ModelError
from pipeline.modality import MODALITIES
from pipeline.modality.bundle import modality_of
from pipeline.modality.quarantine import BadSample, Quarantine

CHAT = MODALITIES["conversations"]
MARKED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<bot> "
    "{% generation %}{{ m.content }} <end>"
    "{% endgeneration %} {% else %}<{{ m.role }}> {{ m.content }} <end> {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<bot>{% endif %}"
)
PLAIN = MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "")
# Like Qwen3: thoughts are written in the last turn only.
FORGETFUL = PLAIN.replace("<bot> {{ m.content }}", "<bot> {{ 't ' if loop.last }}{{ m.content }}")
WORDS = ["<pad>", "<eos>", "<unk>", "<bot>", "<user>", "<system>", "<tool>", "<end>"]
WORDS += "a b c d e f g t".split()
TALK = [("user", "a b"), ("assistant", "c"), ("user", "d"), ("assistant", "e f")]
WRITTEN = "<user> a b <end> <bot> c <end> <user> d <end> <bot> e f <end>"
LEARNED = "c <end> e f <end>"


def tokenizer_with(template):
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", pad_token="<pad>", eos_token="<eos>"
    )
    made.chat_template = template
    return made


def talk(*turns):
    return [{"role": role, "content": content} for role, content in turns]


def config_of(**data):
    names = {} if "prompt_column_name" in data else {"messages_column_name": "messages"}
    model = {"task": "text-generation", "model_type": "llama"}
    data = {"path": "json", "max_length": 32} | names | data
    return RunConfig.model_validate({"name": "t", "model": model, "data": data})


def prepare(rows, template=MARKED, **data):
    config = config_of(**data)
    found = CHAT.prepare(rows, config.data, config, tokenizer_with(template), None)
    places = Quarantine(0.0).usable("train", found, lambda one: CHAT.judge(one, config))
    return found.select(places)


def written(row):
    return " ".join(WORDS[token] for token in row["input_ids"])


def learned(row):
    pairs = zip(row["input_ids"], row["label_mask"], strict=True)
    return " ".join(WORDS[token] for token, is_learned in pairs if is_learned)


def problems_of(rows, **data):
    return list(CHAT.problems(Dataset.from_list(rows), config_of(**data).data, None))


PAIR = {"prompt_column_name": "prompt", "completion_column_name": "completion"}


def test_a_run_whose_rows_are_conversations_has_their_bundle():
    assert modality_of(config_of()) is CHAT
    assert modality_of(config_of(**PAIR)) is CHAT


@pytest.mark.parametrize("template", [MARKED, PLAIN], ids=["marked", "growing prefixes"])
def test_a_conversation_is_one_sample_of_which_assistant_turns_are_learned(template):
    rows = prepare(Dataset.from_list([{"messages": talk(*TALK)}] * 2), template)
    assert [written(row) for row in rows] == [WRITTEN] * 2
    assert [learned(row) for row in rows] == [LEARNED] * 2
    assert list(rows["sample_id"]) == [0, 1]


def test_the_template_chat_models_share_gives_the_same_by_marks_and_by_prefixes(tmp_path):
    config = config_of(chat_template=str(ROOT / "configs/language/chatml.jinja"))
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}]}
    turns = [*talk(("system", "s"), ("user", "q")), call, *talk(("tool", "1"), ("assistant", "r"))]
    rows = Dataset.from_list([{"messages": turns}])
    tokenizer = CHAT.load_processor(config, rows)
    marked = CHAT.prepare(rows, config.data, config, tokenizer, None)[0]
    tokenizer.chat_template = tokenizer.chat_template.replace("{%- generation %}", "").replace(
        "{%- endgeneration %}", ""
    )
    wide = config.model_copy(update={"data": config.data.model_copy(update={"max_length": 999})})
    marked_wide, prefixes = (
        CHAT.prepare(rows, wide.data, wide, one, None)[0]
        for one in (CHAT.load_processor(config, rows), tokenizer)
    )
    assert marked["fault"].startswith("its first 32 of")
    assert prefixes["input_ids"] == marked_wide["input_ids"]
    text = tokenizer.decode(
        [t for t, m in zip(marked_wide["input_ids"], marked_wide["label_mask"], strict=True) if m]
    )
    called = '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'
    assert text == f"{called}<|im_end|>r<|im_end|>"
    gained = sum(prefixes["label_mask"]) - sum(marked_wide["label_mask"])
    assert gained == 2  # the line break that closes a turn


def test_a_template_that_rewrites_earlier_turns_is_refused_and_says_what_to_do():
    with pytest.raises(DataError, match=r"first 2 messages otherwise alone.*data\.chat_template"):
        prepare(Dataset.from_list([{"messages": talk(*TALK)}]), FORGETFUL)


def test_one_turn_of_such_a_template_is_no_trouble():
    row = prepare(Dataset.from_list([{"messages": talk(*TALK[:2])}]), FORGETFUL)[0]
    assert learned(row) == "t c <end>"


@pytest.mark.parametrize("template", [MARKED, PLAIN], ids=["marked", "growing prefixes"])
def test_of_a_prompt_and_its_completion_only_the_completion_is_learned(template):
    row = {"prompt": talk(*TALK[:3]), "completion": talk(TALK[3])}
    found = prepare(Dataset.from_list([row]), template, **PAIR)[0]
    assert (written(found), learned(found)) == (WRITTEN, "e f <end>")


def test_text_needs_no_template_and_is_closed_by_the_end_token():
    rows = Dataset.from_list([{"prompt": "a b", "completion": "c d"}])
    found = prepare(rows, None, **PAIR)[0]
    assert (written(found), learned(found)) == ("a b c d <eos>", "c d <eos>")


def test_a_long_conversation_is_cut_at_its_end():
    row = prepare(Dataset.from_list([{"messages": talk(*TALK)}]), max_length=6)[0]
    assert (written(row), learned(row)) == ("<user> a b <end> <bot> c", "c")


def test_conversations_without_an_assistant_token_left_are_set_aside_by_name():
    config = config_of(max_length=5)
    rows = Dataset.from_list([{"messages": talk(*TALK)}, {"messages": talk(*TALK[2:])}])
    found = CHAT.prepare(rows, config.data, config, tokenizer_with(MARKED), None)
    quarantine = Quarantine(0.5)
    assert quarantine.usable("train", found, lambda one: CHAT.judge(one, config)) == [1]
    assert "first 5 of 14 tokens (data.max_length) hold none" in quarantine.set_aside[0].reason
    with pytest.raises(BadSample):
        CHAT.judge(found[0], config)


def test_a_template_that_refuses_a_conversation_is_quoted():
    template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataError, match="the chat template refuses it: roles must alternate"):
        prepare(Dataset.from_list([{"messages": talk(*TALK)}]), template)


def test_a_tokenizer_without_a_template_is_refused():
    with pytest.raises(ModelError, match=r"no chat template.*data\.chat_template=FILE"):
        prepare(Dataset.from_list([{"messages": talk(*TALK)}]), None)


def test_every_way_of_being_no_conversation_is_said_with_all_rows():
    rows = [
        {"messages": json.dumps(talk(*TALK))},
        {"messages": "[]"},
        {"messages": json.dumps(talk(("human", "a"), ("gpt", "b")))},
        {"messages": json.dumps(talk(("assistant", "b")))},
        {"messages": "not a list"},
        {"messages": "[]"},
        {"messages": json.dumps([{"role": "user"}, {"role": "assistant", "content": "b"}])},
    ]
    assert problems_of(rows) == [
        "rows 1, 5: column 'messages' holds an empty conversation",
        "row 2: the role gpt, human is unknown; known: system, developer, user, assistant, tool, "
        "function, ipython",
        "row 3: column 'messages' has no turn of the user",
        "row 4: column 'messages' holds no list of messages such as {role: user, content: ...}",
        "row 6: a message has neither content nor tool_calls",
    ]


def test_prompts_without_text_are_said():
    rows = [{"prompt": "a", "completion": " "}, {"prompt": "a", "completion": "b"}]
    assert problems_of(rows, **PAIR) == ["row 0: prompt or completion has no text"]


def test_labels_are_the_assistants_tokens_and_nothing_else():
    rows = list(
        prepare(Dataset.from_list([{"messages": talk(*TALK)}, {"messages": talk(*TALK[2:])}]))
    )
    batch = CHAT.collator(tokenizer_with(MARKED), config_of())(rows)
    labels = batch["labels"]
    kept = [[WORDS[token] for token in row if token >= 0] for row in labels.tolist()]
    assert [" ".join(row) for row in kept] == [LEARNED, "e f <end>"]
    assert (labels[labels >= 0] == batch["input_ids"][labels >= 0]).all()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"prompt_column_name": "p"}, "completion_column_name go together"),
        ({**PAIR, "messages_column_name": "m"}, "give messages_column_name, or prompt_"),
        ({"ood": {"other": {"path": "json"}}}, r"data\.ood\.other: its rows are conversations"),
    ],
)
def test_columns_that_contradict_each_other_are_refused(data, message):
    with pytest.raises(ValueError, match=message):
        config_of(**data)
