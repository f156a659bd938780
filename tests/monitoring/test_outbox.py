"""Deliveries: each alert at least once to each sink, repeats and floods held back, nothing lost."""

from datetime import UTC, datetime, timedelta

import pytest

from monitoring.alerts import Alert, alert_id, stamp
from monitoring.history import History, WindowRecord
from monitoring.outbox import Outbox, Receiver
from monitoring.sinks import DeliveryError
from pipeline.config.monitoring import MonitoringConfig

START = datetime(2026, 5, 4, tzinfo=UTC)


class Post:
    """A sink that notes what it is sent, and fails while `error` is set; a clock; an outbox."""

    def __init__(self, history, **config):
        self.history, self.now, self.error, self.sent = history, START, None, []
        self.config = MonitoringConfig(**config)
        self.receivers = {"ops": Receiver(self.take)}

    def take(self, alert):
        if self.error:
            raise self.error
        self.sent.append(alert["id"])

    @property
    def outbox(self):
        return Outbox(self.history, self.receivers, self.config, lambda: self.now)

    def raise_alerts(self, *rules, severity="warning"):
        number = str(len(self.history.windows()))
        alerts = [
            Alert(
                alert_id("run", number, rule), "run", "v1", stamp(self.now), severity, rule, "title"
            )
            for rule in rules
        ]
        alerts = self.outbox.marked(alerts)
        record = WindowRecord(number, stamp(self.now), 1, "alert")
        self.history.add_window(record, {}, alerts, self.outbox.plan(alerts))
        self.outbox.deliver()
        return [alert.id for alert in alerts]

    def states(self, sink="ops"):
        return [one.state for one in self.history.deliveries() if one.sink == sink]


@pytest.fixture
def history(tmp_path):
    with History(tmp_path / "history.sqlite") as opened:
        yield opened


def test_what_fails_is_sent_at_a_later_run_and_what_was_sent_is_not(history):
    post = Post(history)
    post.error = DeliveryError("ops is away")
    ids = post.raise_alerts("a", "b")
    assert [one.error for one in history.deliveries("pending")] == ["ops is away"] * 2
    post.error = None
    post.outbox.deliver()
    post.outbox.deliver()
    assert post.sent == ids
    assert [one.attempts for one in history.deliveries("sent")] == [2, 2]


def test_a_delivery_is_given_up_after_so_many_runs_and_stays_visible(history):
    post = Post(history, sinks={"max_attempts": 3})
    post.error = ConnectionError("away")
    post.raise_alerts("a")
    for _ in range(5):
        post.outbox.deliver()
    assert [(one.state, one.attempts) for one in history.deliveries()] == [("given up", 3)]


def test_an_odd_error_of_a_sink_is_named_without_its_text_and_stops_no_other(history):
    post = Post(history)
    post.receivers["a first"] = Receiver(lambda alert: {}["secret"])
    ids = post.raise_alerts("a")
    assert post.sent == ids
    assert [one.error for one in history.deliveries("pending")] == ["KeyError"]


def test_the_same_rule_is_sent_once_in_so_many_hours(history):
    post = Post(history, repeat_after_hours=24.0)
    first = post.raise_alerts("a")
    post.now += timedelta(hours=5)
    other = post.raise_alerts("a", "b")[1:]
    post.now += timedelta(hours=20)
    again = post.raise_alerts("a")
    assert post.sent == [*first, *other, *again]
    assert post.states() == ["sent", "repeat", "sent", "sent"]
    assert len(history.alerts()) == 4, "all are recorded"
    assert history.num_repeats() == {first[0]: 1}


def test_what_repeats_an_acknowledged_alert_is_acknowledged_itself(history):
    post = Post(history)
    [first] = post.raise_alerts("a")
    history.acknowledge(first, "ann", "known", START)
    post.raise_alerts("a", "b")
    assert [one.state for one in history.alerts()] == ["acknowledged", "acknowledged", "open"]


def test_alerts_over_the_limit_of_a_day_are_held_and_sent_when_there_is_room(history):
    post = Post(history, max_alerts_a_day=2)
    ids = post.raise_alerts("a", "b", "c", "d", "e")
    assert post.sent == ids[:2]
    assert post.states() == ["sent", "sent", "held", "held", "held"]
    for _ in range(2):
        post.now += timedelta(hours=25)
        post.outbox.deliver()
    assert post.sent == ids


def test_a_file_of_all_alerts_knows_neither_limit_nor_repeat(history):
    post, kept = Post(history, max_alerts_a_day=1), []
    post.receivers["file"] = Receiver(kept.append, "info", keeps_all=True)
    for _ in range(3):
        post.raise_alerts("a", "b", severity="info")
    assert len(kept) == 6
    assert post.sent == [], "the other sink wants warnings"
    post.raise_alerts("c", "d")
    assert len(post.sent) == 1, "what only the file was told does not count"


def test_a_clock_that_was_far_ahead_silences_nothing_once_it_is_right(history):
    post = Post(history, max_alerts_a_day=1)
    post.now += timedelta(days=900)
    ahead = post.raise_alerts("a")
    post.now = START
    right = post.raise_alerts("a")
    assert post.sent == ahead + right


def test_a_process_that_dies_between_sending_and_recording_sends_again_under_the_same_id(history):
    post = Post(history)
    post.error = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        post.raise_alerts("a")
    post.error = None
    post.outbox.deliver()
    assert post.sent == [history.alerts()[0].id]
    assert post.states() == ["sent"]


def test_a_sink_that_the_configuration_no_longer_names_is_left_alone(history):
    post = Post(history)
    post.error = ConnectionError()
    post.raise_alerts("a")
    post.receivers = {}
    assert post.outbox.deliver() == []
    assert post.states() == ["pending"]
