"""Reading configurations: traps of YAML, overrides, and every problem at once."""

from pathlib import Path

import pytest

from pipeline.config.installed import OURS, installed_problems
from pipeline.config.load import config_diff, config_hash, dump_config, load_config
from pipeline.config.schema import RunConfig
from pipeline.config.strict_yaml import dump_yaml, parse_yaml
from pipeline.config.training import TrainConfig
from pipeline.errors import ConfigError

MINIMAL = """\
name: first
model: {task: text-classification, model_name_or_path: some/model}
data: {path: builtin:python-stdlib}
"""
BITS = "model.quantization_config="
NF4 = "{quant_method: bitsandbytes, load_in_4bit: true, "


@pytest.fixture
def write(tmp_path):
    def write(text: str, name: str = "run.yaml") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    return write


@pytest.fixture
def load(write):
    def load(text: str, *overrides: str, **options) -> RunConfig:
        return load_config(write(text), overrides, **options)

    return load


@pytest.fixture
def problems(load):
    def problems(text: str, *overrides: str) -> list[str]:
        with pytest.raises(ConfigError) as caught:
            load(text, *overrides)
        return caught.value.problems

    return problems


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("5E+3", 5000.0),
        ("-.5", -0.5),
        ("1.", 1.0),
        ("12", 12),
        ("-3", -3),
        ("0x1F", 31),
        ("010", 10),
        ("true", True),
        ("False", False),
        ("~", None),
        ("", None),
        ("yes", "yes"),
        ("off", "off"),
        ("2024-01-31", "2024-01-31"),
        ("1:30", "1:30"),
        ("1_000", "1_000"),
        ("'1e-4'", "1e-4"),
        ("nan", "nan"),
        ("[1e-4, no]", [1e-4, "no"]),
        ("{1: a, on: b, 2024-01-31: c}", {"1": "a", "on": "b", "2024-01-31": "c"}),
    ],
)
def test_scalars_are_what_they_look_like(text, value):
    document = parse_yaml(text)
    assert (document.value, document.problems) == (value, [])
    assert type(document.value) is type(value)


@pytest.mark.parametrize(
    "value",
    ["1e-4", "010", "yes", "null", "~", "", " x ", "2024-01-31", "1:30", "=", "<<", "a: b", "#x"]
    + ["é\u2028\x85", "line\nline", "'", '"', "*.layer", "!x", "0x1F", ".5", "-", "\t", "😀"]
    + [1e-7, 1e22, -0.0, 0.1, 10**30, True, None, [], {}, [[1], {"a": {"b": ["*"]}}], {"1": 1}],
)
def test_what_is_dumped_is_read_back_equal(value):
    document = parse_yaml(dump_yaml({"key": value, "list": [value, value]}))
    assert document.problems == []
    assert repr(document.value) == repr({"key": value, "list": [value, value]})


def test_a_key_that_stands_twice_is_refused_with_both_lines(problems):
    said = problems(MINIMAL + "train:\n  max_steps: 1\n  eval_steps: 2\n  max_steps: 3\n")
    assert said == ["train.max_steps: given twice, on lines 5 and 7; remove one of them"]


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "empty"),
        ("# nothing\n", "empty"),
        ("[1, 2]", "found a list"),
        ("just words", "found a single value"),
        ("a: [", "line 1, column 5"),
        ("a:\n\t- b", "tabs"),
        ("a: 1\n---\nb: 2\n", "single document"),
        ("a: !!python/object/apply:os.system ['true']", "tag !!python/object/apply:os.system"),
        ("a: !!binary aGVsbG8=", "tag !!binary"),
        ("a: &a [*a]", "alias contains itself"),
        ("[" * 500, "nested too deeply"),
        ("? [1]\n: 2", "keys are words"),
        ("a: {<<: {b: 1}}", "merge keys"),
        ("a: .inf", "cannot be used as float"),
        ("a: 1e999", "cannot be used as float"),
        ("a: " + "9" * 5000, "cannot be used as int"),
        ("a: \x01", "not readable as YAML"),
    ],
)
def test_text_that_is_no_configuration_is_refused(problems, text, part):
    assert part in " ".join(problems(text))


def test_aliases_that_multiply_are_cut_off():
    bomb = "a0: &a0 [1, 2]\n" + "".join(
        f"a{i + 1}: &a{i + 1} [{', '.join([f'*a{i}'] * 9)}]\n" for i in range(9)
    )
    assert "more than" in parse_yaml(bomb).problems[0]


def test_binary_files_and_folders_without_a_run_are_refused(tmp_path):
    (tmp_path / "a.bin").write_bytes(b"\x7fELF\xff\xfe")
    (tmp_path / "b.bin").write_bytes(b"a: 1\0")
    for name, part in [("a.bin", "not UTF-8"), ("b.bin", "binary"), ("", "no run folder")]:
        with pytest.raises(ConfigError, match=part):
            load_config(tmp_path / name)


def test_a_missing_file_names_the_nearest_one_there_is(write, tmp_path):
    write(MINIMAL, "language/quickstart.yaml")
    write(MINIMAL, "runs/clinc/config.yaml")
    with pytest.raises(ConfigError, match=r"did you mean .*language/quickstart\.yaml\?"):
        load_config(tmp_path / "langauge/quickstar.yaml")
    with pytest.raises(ConfigError, match=r"did you mean .*runs/clinc\?"):
        load_config(tmp_path / "runs/clink")


def test_a_run_folder_is_read_by_its_config_yaml(write, load):
    folder = write(dump_config(load(MINIMAL, "seed=7")), "runs/first/config.yaml").parent
    assert load_config(folder).seed == 7


def test_all_problems_come_at_once_with_place_line_value_and_nearest_key(problems):
    said = problems(
        """\
name: first run
model: {task: text-clasification, model_name_or_path: m}
data:
  path: p
  max_lenght: 64
train:
  learning_rat: 1e-4
  max_steps: -1
  bf16: yes
  weight_decay: true
  load_best_model_at_end: true
evaluation:
learning_rate: 3
""",
        "wandb.mode=onlin",
        "train.epochs=3",
        "just-words",
    )
    expected = [
        ("name: ", "'first run'", "(line 1)"),
        ("model.task: ", "did you mean text-classification?", "(line 2)"),
        ("data.max_lenght: ", "did you mean max_length?", "(line 5)"),
        ("train.learning_rat: ", "did you mean learning_rate?", "(line 7)"),
        ("train.max_steps: ", "greater than 0, found -1", "(line 8)"),
        ("train.bf16: ", "valid boolean, found 'yes'", "(line 9)"),
        ("train.weight_decay: ", "valid number, found True", "(line 10)"),
        ("train: ", "load_best_model_at_end needs eval_steps", "(line 6)"),
        ("evaluation: ", "is empty", "(line 12)"),
        ("learning_rate: ", "did you mean train.learning_rate?", "(line 13)"),
        ("wandb.mode: ", "did you mean online?", "(command line)"),
        ("train.epochs: ", "unknown key", "(command line)"),
        ("'just-words': ", "key=value", ""),
    ]
    for start, middle, end in expected:
        assert any(one.startswith(start) and middle in one and one.endswith(end) for one in said), (
            start,
            said,
        )
    assert len(said) == len(expected)


def test_pairs_that_contradict_are_found_behind_other_problems(problems):
    said = problems(MINIMAL + "dropout: {adapter: 0.1}\nwandb: {mod: offline}\n")
    assert any("dropout.adapter needs a peft section" in one for one in said)
    assert any(one.startswith("wandb.mod: unknown key; did you mean mode?") for one in said)


def test_a_broken_section_causes_no_second_problem_elsewhere(problems):
    said = problems(MINIMAL + "peft: {peft_type: LORAA}\ndropout: {adapter: 0.1, hidden: 2}\n")
    assert [one.partition(":")[0] for one in said] == ["dropout.hidden", "peft.peft_type"]
    assert "did you mean LORA?" in said[1]


def test_overrides_are_read_as_yaml_and_make_the_sections_they_need(load):
    config = load(
        MINIMAL,
        "train.max_steps=1e2",
        "train.learning_rate=3e-4",
        "peft.r=4",
        "data.ood.other.path=folder/with.dots",
        "data.ood.other.split=test",
        "data.data_files=*.json",
        "wandb.tags=[a, 'yes']",
        "wandb.entity=",
        "model.config_overrides.rope.factor=2",
        "dropout.overrides={'a.b#1': 0.5}",
    )
    assert config.train.max_steps == 100
    assert config.train.learning_rate == 3e-4
    assert config.peft.model_extra == {"r": 4}
    assert config.data.ood["other"].path == "folder/with.dots"
    assert config.data.data_files == "*.json"
    assert (config.wandb.tags, config.wandb.entity) == (["a", "yes"], None)
    assert config.model.config_overrides == {"rope": {"factor": 2}}
    assert config.dropout.overrides == {"a.b#1": 0.5}


def test_below_a_dict_of_single_values_the_rest_of_an_override_is_one_key(load):
    config = load(MINIMAL, "dropout.overrides.bert.encoder.*=0.2", "dropout.head.variant=token")
    assert config.dropout.overrides == {"bert.encoder.*": 0.2}
    assert config.dropout.head.variant == "token"


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("train.max_stps=3", "did you mean max_steps?"),
        ("tran.max_steps=3", "did you mean train?"),
        ("max_steps=3", "did you mean train.max_steps?"),
        ("data.ood.far.pth=x", "did you mean path?"),
        ("train.max_steps.x=3", "train.max_steps is a single value"),
        ("model.x=[1", "not YAML"),
        ("=3", "key=value"),
        ("train.max_steps=many", "valid integer, found 'many' (command line)"),
    ],
)
def test_an_override_that_cannot_be_set_says_why(problems, override, part):
    assert part in " ".join(problems(MINIMAL, override))


def test_an_empty_override_list_changes_nothing(load):
    assert load(MINIMAL) == RunConfig(
        name="first",
        model={"task": "text-classification", "model_name_or_path": "some/model"},
        data={"path": "builtin:python-stdlib"},
    )


def test_a_dumped_configuration_is_complete_and_loads_equal(load):
    config = load(
        MINIMAL,
        "name='1e3'",
        "seed=18446744073709551615",
        "peft={r: 8, target_modules: [query, 'yes', '1e-4']}",
        "data.ood={far: {path: 'off', data_files: {train: [a, b]}}}",
        "dropout.overrides={'*.layer.1.*': 1e-3, 'x#0': 1}",
        "model.config_overrides={a: [1, 1.0, null, true, {b: '~'}]}",
        "train.extra={tf32: false}",
    )
    again = load(dump_config(config))
    assert again == config
    assert dump_config(again) == dump_config(config)
    assert parse_yaml(dump_config(config)).value.keys() == RunConfig.model_fields.keys()


def test_the_hash_follows_values_and_not_their_spelling(load):
    spelled = load("seed: 42\n" + MINIMAL + "train: {learning_rate: 0.00005}\n")
    assert config_hash(spelled) == config_hash(load(MINIMAL))
    assert config_hash(load(MINIMAL, "seed=43")) != config_hash(load(MINIMAL))


def test_the_difference_of_two_configurations_is_one_line_a_value(load):
    before = load(MINIMAL, "train.max_steps=60", "dropout.overrides={a.b: 0.1}")
    after = load(MINIMAL, "train.max_steps=80", "peft.r=4")
    assert config_diff(before, before) == []
    assert config_diff(before, after) == [
        "train.max_steps: 60 -> 80",
        'dropout.overrides."a.b": 0.1 -> (absent)',
        "peft: null -> (absent)",
        'peft.peft_type: (absent) -> "LORA"',
        "peft.r: (absent) -> 4",
    ]


@pytest.mark.parametrize(
    ("override", "start", "part"),
    [
        ("train.extra.ddp_backnd=gloo", "train.extra.ddp_backnd: ", "did you mean ddp_backend?"),
        ("train.extra.adam_beta1=0.5", "train.extra.adam_beta1: ", "set train.adam_beta1"),
        ("train.extra.seed=3", "train.extra.seed: cannot be set here: ", "`seed`"),
        ("train.extra.ddp_timeout=soon", "train.extra.ddp_timeout: ", "found 'soon'"),
        ("train.tf32=true", "train.tf32: ", "goes into train.extra.tf32"),
        ("train.output_dir=x", "train.output_dir: ", "the run folder is"),
        ("train.lr_scheduler_type=cosin", "train.lr_scheduler_type: ", "did you mean cosine?"),
        ("train.optim=adam", "train.optim: ", "has no 'adam'"),
        ("peft.peft_type=QQQ", "peft.peft_type: ", "known: ADALORA"),
        ("peft.lora_alhpa=3", "peft.lora_alhpa: ", "did you mean lora_alpha?"),
        ("peft.r=many", "peft.r: ", "found 'many'"),
        ("peft.inference_mode=true", "peft.inference_mode: ", "training needs it off"),
        ("peft={peft_type: ADALORA}", "peft: AdaLoraConfig refuses", "total_step"),
        (BITS + "{load_in_4bit: true}", BITS[:-1] + ".quant_method: is missing", "known: aqlm"),
        (BITS + "{quant_method: bitsandbyte}", BITS[:-1] + ".quant_method: ", "mean bitsandbytes?"),
        (BITS + "{quant_method: bitsandbytes}", BITS[:-1] + ": set load_in_4bit or", "quantized"),
        (BITS + NF4 + "bnb_4bit_quant_typ: x}", BITS[:-1] + ".bnb_4bit_quant_typ: ", "quant_type?"),
        (BITS + NF4 + "llm_int8_threshold: 6}", BITS[:-1] + ": BitsAndBytesConfig", "a float"),
    ],
)
def test_what_only_the_installed_libraries_know_is_checked(problems, override, start, part):
    (said,) = problems(MINIMAL + "peft: {r: 4}\n" * override.startswith(BITS), override)
    assert said.startswith(start)
    assert part in said


def test_quantized_weights_need_an_adapter_and_weights_to_start_from(problems):
    (said,) = problems(MINIMAL, BITS + NF4 + "}")
    assert "model.quantization_config needs a peft section" in said
    scratch = MINIMAL.replace("model_name_or_path: some/model", "model_type: bert")
    (said,) = problems(scratch, BITS + NF4 + "}")
    assert "with model.model_type (from scratch) leave it out" in said


def test_the_installed_check_can_be_left_out_and_asked_for_later(load):
    config = load(MINIMAL, "peft.rr=3", check_installed=False)
    assert installed_problems(config)[0].startswith("peft.rr: LoraConfig has no such field")


def test_reserved_names_are_known_to_the_installed_trainer():
    from transformers import TrainingArguments

    assert set(OURS) <= set(TrainingArguments.__dataclass_fields__)
    assert not set(OURS) & set(TrainConfig.model_fields)
