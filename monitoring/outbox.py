"""Deliveries of alerts: planned in the transaction that records them, made after it.

Promised: no alert is lost, and each reaches every sink at least once, unless `max_attempts` runs
have failed (then it is shown as given up). It is sent twice only if the process dies between the
sink's answer and its recording; the alert's id, the same both times, is the idempotency key. The
file of JSON lines passes over an id that it holds, so each alert is in it exactly once.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta

from monitoring.alerts import Alert, stamp
from monitoring.history import Delivery, DeliveryState, History
from monitoring.sinks import DeliveryError, Sink
from pipeline.config.monitoring import MonitoringConfig, Severity

A_DAY = timedelta(days=1)


@dataclass(frozen=True)
class Receiver:
    """A sink, and what it wants to know."""

    send: Sink
    min_severity: Severity = "warning"
    keeps_all: bool = False
    """A record, not a message: neither the limit a day nor repeats apply."""


@dataclass(frozen=True)
class Outbox:
    """What is to be sent, to whom, and how often."""

    history: History
    receivers: Mapping[str, Receiver]
    config: MonitoringConfig
    now: Callable[[], datetime]

    def plan(self, alerts: Sequence[Alert]) -> list[Delivery]:
        """Deliveries of new alerts; repeats, and those over the limit a day, are marked as such."""
        told = self._told()
        room = self.config.max_alerts_a_day - self._num_sent_today()
        planned = []
        for alert in alerts:
            state: DeliveryState = "pending" if room > 0 else "held"
            state = "repeat" if any(self._repeats(alert, one) for one in told) else state
            room -= state == "pending"
            planned += [
                Delivery(
                    alert.id, sink, "pending" if to.keeps_all else state, changed=stamp(self.now())
                )
                for sink, to in self.receivers.items()
                if alert.is_at_least(to.min_severity)
            ]
        return planned

    def deliver(self) -> list[Delivery]:
        """Send everything that is due, oldest first; returns what was tried, and how it went."""
        self._release_held()
        alerts = {alert.id: alert for alert in self.history.alerts()}
        tried = []
        for delivery in self.history.deliveries("pending"):
            if (receiver := self.receivers.get(delivery.sink)) is not None:
                error = _why_not_sent(receiver, alerts[delivery.alert])
                tried.append(self._after(delivery, error))
                self.history.save_delivery(tried[-1])
        return tried

    def _after(self, delivery: Delivery, error: str) -> Delivery:
        attempts = delivery.attempts + 1
        state: DeliveryState = "pending" if error else "sent"
        if error and attempts >= self.config.sinks.max_attempts:
            state = "given up"
        changed = stamp(self.now())
        return replace(delivery, state=state, attempts=attempts, changed=changed, error=error)

    def _release_held(self) -> None:
        """Held alerts become due, oldest first, as far as today's limit has room."""
        held = self.history.deliveries("held")
        room = max(0, self.config.max_alerts_a_day - self._num_sent_today())
        released = list(dict.fromkeys(delivery.alert for delivery in held))[:room]
        for delivery in held:
            if delivery.alert in released:
                due = replace(delivery, state="pending", changed=stamp(self.now()))
                self.history.save_delivery(due)

    def _messages(self, *states: DeliveryState) -> list[Delivery]:
        records = {name for name, receiver in self.receivers.items() if receiver.keeps_all}
        return [
            one
            for one in self.history.deliveries()
            if one.state in states and one.sink not in records
        ]

    def _num_sent_today(self) -> int:
        sent = self._messages("pending", "sent", "given up")
        return len({one.alert for one in sent if self._is_within(A_DAY, one.changed)})

    def _told(self) -> list[Alert]:
        """Alerts that people were told of, or will be."""
        ids = {one.alert for one in self._messages("pending", "held", "sent", "given up")}
        return [alert for alert in self.history.alerts() if alert.id in ids]

    def _repeats(self, alert: Alert, before: Alert) -> bool:
        """Whether people were told of the same thing lately."""
        lately = timedelta(hours=self.config.repeat_after_hours)
        return alert.subject == before.subject and self._is_within(lately, before.created)

    def _is_within(self, span: timedelta, time: str) -> bool:
        """Whether a time is near: a clock that has jumped ahead and back silences nothing long."""
        return abs(datetime.fromisoformat(time) - self.now()) < span


def _why_not_sent(receiver: Receiver, alert: Alert) -> str:
    """The reason; empty where the alert was taken."""
    try:
        receiver.send(alert.to_json())
    except (DeliveryError, ConnectionError) as error:
        return str(error) or type(error).__name__
    except Exception as error:  # whatever one sink does, the others are still to be told
        return type(error).__name__  # not its text: who knows what it quotes
    return ""
