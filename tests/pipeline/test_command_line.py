"""The command line: what each command starts, what it prints where, and with which code it ends."""

import json
import resource
import subprocess
import sys
from types import ModuleType

import pytest

from pipeline import __main__ as command_line
from pipeline.errors import ConfigError, LayoutError, LeakError

YAML = "name: first\nmodel: {task: text-classification, model_name_or_path: m}\ndata: {path: p}\n"


@pytest.fixture
def masklock(monkeypatch, capsys):
    """Run the command line in this process; returns exit code, stdout and stderr."""

    def masklock(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["masklock", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            command_line.main()
        return (ended.value.code or 0, *capsys.readouterr())

    return masklock


@pytest.fixture
def stage(monkeypatch):
    """Put a function in the place of a stage's."""

    def stage(module: str, name: str, function) -> None:
        fake = ModuleType(module)
        setattr(fake, name, function)
        monkeypatch.setitem(sys.modules, module, fake)

    return stage


@pytest.fixture
def yaml_file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(YAML + f"output_dir: {tmp_path}/runs\n")
    return path


@pytest.fixture
def run_folder(yaml_file, tmp_path):
    folder = tmp_path / "runs" / "first"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml_file.read_text())
    return folder


def test_help_is_quick_and_imports_nothing_heavy():
    code = (
        "import sys; sys.argv = ['masklock', '--help']\n"
        "from pipeline.__main__ import main\n"
        "try: main()\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'datasets', 'wandb', 'numpy', 'pandas', 'pydantic'}\n"
        "sys.exit(' '.join(sorted(heavy & set(sys.modules))) or 0)"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert (done.returncode, done.stderr) == (0, "")
    assert "quickstart" in done.stdout
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5


def test_python_dash_m_pipeline_is_the_same_program():
    done = subprocess.run([sys.executable, "-m", "pipeline", "schema"], capture_output=True)
    assert json.loads(done.stdout)["properties"].keys() >= {"name", "model", "data", "train"}


def test_the_schema_hands_the_documentation_of_fields_to_editors(masklock):
    code, out, _ = masklock("schema")
    fields = json.loads(out)["$defs"]["TrainConfig"]["properties"]
    assert code == 0
    assert fields["max_steps"]["description"] == "Optimizer steps."


def test_train_hands_on_the_configuration_and_the_exit_code(masklock, stage, yaml_file):
    seen = []
    stage("pipeline.train", "train", lambda config, say, **_: seen.append(config) or 75)
    code, _, _ = masklock("train", yaml_file, "train.max_steps=3", "--local_rank=1")
    assert code == 75
    assert seen[0].train.max_steps == 3


@pytest.mark.parametrize(
    ("error", "code"),
    [(ConfigError(["a.b: is wrong"]), 2), (LayoutError("two worlds"), 2), (LeakError("a leak"), 1)],
)
def test_errors_of_users_end_with_their_code_and_no_traceback(
    masklock, stage, yaml_file, error, code
):
    def fail(config):
        raise error

    stage("pipeline.check", "check", fail)
    ended, out, err = masklock("check", yaml_file)
    assert (ended, out) == (code, "")
    assert err.startswith("masklock: ")
    assert str(error) in err


def test_a_wrong_configuration_ends_before_the_stage_starts(masklock, tmp_path):
    code, out, err = masklock("train", tmp_path / "none.yaml")
    assert (code, out) == (2, "")
    assert "no such file or run folder" in err


def test_ctrl_c_ends_with_130(masklock, stage, yaml_file):
    def interrupt(config):
        raise KeyboardInterrupt

    stage("pipeline.check", "check", interrupt)
    assert masklock("check", yaml_file)[0] == 130


def test_an_unknown_command_ends_with_2(masklock):
    code, _, err = masklock("trian")
    assert code == 2
    assert "trian" in err


class Plan:
    def table(self) -> str:
        return "a table"

    def to_json(self) -> dict:
        return {"digest": "d"}


def test_a_plan_as_json_has_stdout_for_itself(masklock, stage, yaml_file):
    stage("pipeline.check", "plan", lambda config: print("noise") or Plan())  # noqa: T201
    assert json.loads(masklock("plan", yaml_file, "--json")[1]) == {"digest": "d"}
    code, out, err = masklock("plan", yaml_file)
    assert (code, out, err) == (0, "a table\n", "noise\n")


def test_evaluate_takes_a_run_folder_or_its_yaml(masklock, stage, yaml_file, run_folder):
    seen = []

    def evaluated(folder, config, say, exhibits, keep_profile):
        seen.append((folder.path, config.evaluation.batch_size))
        return {"verdict": ["trust it"]}

    stage(
        "pipeline.evaluation.stage",
        "evaluate",
        evaluated,
    )
    assert masklock("evaluate", run_folder, "evaluation.batch_size=7")[:2] == (
        0,
        f"trust it\n{run_folder}/evaluation/report.json\n",
    )
    assert masklock("evaluate", yaml_file)[0] == 0
    assert seen == [(run_folder, 7), (run_folder, 32)]


def test_a_run_that_was_never_trained_says_so(masklock, yaml_file):
    code, _, err = masklock("report", yaml_file)
    assert code == 2
    assert "Train it first: masklock train" in err


def test_masks_of_cases_are_printed_as_json(masklock, stage, tmp_path):
    stage("pipeline.dropout.cases", "fill_cases", lambda document: document | {"keep": 1})
    (tmp_path / "cases.json").write_text('{"rows": []}')
    code, out, _ = masklock("mask", tmp_path / "cases.json")
    assert (code, json.loads(out)) == (0, {"rows": [], "keep": 1})


def test_cases_that_are_no_json_are_refused(masklock, tmp_path):
    (tmp_path / "cases.json").write_text("{")
    code, out, err = masklock("mask", tmp_path / "cases.json")
    assert (code, out) == (2, "")
    assert "cannot be read" in err


@pytest.mark.parametrize(("option", "purpose"), [("--step", "train"), ("--pass", "mc")])
def test_the_mask_of_a_run_is_asked_for_by_coordinates(
    masklock, stage, run_folder, option, purpose
):
    def mask_of_run(folder, seed, step, site, sample, purpose, domain):
        return {"asked": [str(folder.path), seed, step, site, sample, purpose, domain]}

    stage("pipeline.dropout.lookup", "mask_of_run", mask_of_run)
    named = ("--site", "a.b#0", "--sample", "17", "--domain", "web")
    _, out, _ = masklock("mask", run_folder, option, "3", *named)
    assert json.loads(out)["asked"] == [str(run_folder), 42, 3, "a.b#0", 17, purpose, "web"]


def test_the_mask_of_a_run_needs_all_coordinates(masklock, run_folder):
    code, _, err = masklock("mask", run_folder, "--site", "a")
    assert code == 2
    assert "--sample ID" in err


def test_export_and_quickstart_print_where_their_result_is(masklock, stage, run_folder, tmp_path):
    stage("pipeline.export", "export", lambda folder, output: output / "weights")
    stage("monitoring.report", "write_report", lambda folder: folder / "report.html")
    stage("pipeline.quickstart", "quickstart", lambda _, show, keep, write, say: write(tmp_path))
    assert masklock("export", run_folder, tmp_path / "out")[1] == f"{tmp_path}/out/weights\n"
    assert masklock("quickstart")[1] == f"The report is {tmp_path}/report.html\n"


def test_another_package_named_monitoring_is_refused(masklock, monkeypatch, tmp_path):
    (tmp_path / "monitoring").mkdir()
    (tmp_path / "monitoring" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "monitoring", raising=False)
    code, _, err = masklock("schema")
    assert code == 2
    assert f"finds it in {tmp_path}" in err
