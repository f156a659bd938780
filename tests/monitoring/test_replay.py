"""An alert compared with its second computation: to the last bit, or what differs."""

import pyarrow as pa
import pytest

from monitoring.alerts import Alert, read_alert, write_alert
from monitoring.replay import compare, kept_rows, run_of
from pipeline.errors import DataError
from pipeline.records import RunFolder

SCORES = {"energy": [0.1, 0.2], "mutual_information": [1e-17, None]}


@pytest.fixture
def alert():
    return Alert(
        "0123", "run", "v1", "2026-05-04T00:00:00+00:00", "warning", "rule", "title",
        rows=[{"sample_id": 7, "place": 3, "value": 0}, {"sample_id": 9, "place": 0, "value": 0}],
        window={"kept": "windows/abc.parquet"}, replay={"scores": SCORES},
    )  # fmt: skip


def test_equal_means_every_bit(alert):
    assert compare(alert, {"plan": "p"}, {"plan": "p"}, pa.table(SCORES)).equal
    next_float = pa.table(SCORES | {"energy": [0.1, 0.20000000000000004]})
    found = compare(alert, {}, {}, next_float)
    assert found.differences == ["energy of sample 9 was 0.2, is 0.20000000000000004"]
    assert (found.num_rows, found.num_scores) == (2, 4)


def test_facts_that_changed_and_scores_that_are_gone_are_named(alert):
    again = pa.table({"energy": SCORES["energy"]})
    found = compare(alert, {"plan": "p", "masks": "a"}, {"plan": "q", "masks": "a"}, again)
    assert found.differences == ["plan was p, is q", "mutual_information is not computed any more"]


def test_of_many_differences_the_first_are_shown_and_the_others_counted(alert):
    rows = [{"sample_id": n, "place": n, "value": 0.0} for n in range(30)]
    many = Alert.from_json(
        alert.to_json() | {"rows": rows, "replay": {"scores": {"a": [0.0] * 30}}}
    )
    found = compare(many, {}, {}, pa.table({"a": [1.0] * 30}))
    assert len(found.differences) == 11
    assert found.differences[-1] == "and 20 more"


def test_an_alert_is_read_back_equal_and_anything_else_is_refused(alert, tmp_path):
    path = write_alert(tmp_path, alert)
    assert read_alert(path) == alert
    for text in ("{", "[]", '{"schema": "other"}', '{"schema": "masklock-alert-v1"}'):
        path.write_text(text)
        with pytest.raises(DataError, match="was to hold an alert|no whole alert"):
            read_alert(path)
    with pytest.raises(DataError, match="cannot be read"):
        read_alert(tmp_path / "absent.json")


def test_an_alert_belongs_to_the_run_in_whose_folder_it_lies(tmp_path):
    assert run_of(tmp_path / "run" / "monitoring" / "alerts" / "a.json").path == tmp_path / "run"
    with pytest.raises(DataError, match="monitoring/alerts/ of the run"):
        run_of(tmp_path / "a.json")


def test_rows_that_cannot_be_computed_again_say_why(alert, tmp_path):
    scored_elsewhere = Alert.from_json(alert.to_json() | {"replay": {}})
    with pytest.raises(DataError, match="production scored itself"):
        kept_rows(RunFolder(tmp_path), scored_elsewhere)
    with pytest.raises(DataError, match="abc.parquet"):
        kept_rows(RunFolder(tmp_path), alert)
