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

    def marked(self, alerts: Sequence[Alert]) -> list[Alert]:
        """New alerts, those that repeat one of lately marked as such; they are as seen as it is."""
        told = self.history.raised(*self._around(timedelta(hours=self.config.repeat_after_hours)))
        return [
            alert if alert.subject not in told else self._repeat(alert, told[alert.subject])
            for alert in alerts
        ]

    def _repeat(self, alert: Alert, id: str) -> Alert:
        first = self.history.alert(id)
        return replace(alert, repeats=id, state=first.state, acknowledged=first.acknowledged)

    def plan(self, alerts: Sequence[Alert]) -> list[Delivery]:
        """Deliveries of new alerts; repeats, and those over the limit a day, are not due."""
        room = self._room()
        planned = []
        for alert in alerts:
            state: DeliveryState = "pending" if room > 0 else "held"
            state = "repeat" if alert.repeats else state
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
        tried = []
        for delivery in self.history.deliveries("pending"):
            if (receiver := self.receivers.get(delivery.sink)) is not None:
                error = _why_not_sent(receiver, self.history.alert(delivery.alert))
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
        due = list(dict.fromkeys(delivery.alert for delivery in held))[: self._room()]
        for delivery in held:
            if delivery.alert in due:
                released = replace(delivery, state="pending", changed=stamp(self.now()))
                self.history.save_delivery(released)

    def _room(self) -> int:
        """How many more alerts may be sent in these 24 hours."""
        records = {name for name, receiver in self.receivers.items() if receiver.keeps_all}
        num_told = self.history.num_told(*self._around(A_DAY), records)
        return max(0, self.config.max_alerts_a_day - num_told)

    def _around(self, span: timedelta) -> tuple[datetime, datetime]:
        """Lately, on both sides of now: a clock that was ahead silences nothing for long."""
        return self.now() - span, self.now() + span


def _why_not_sent(receiver: Receiver, alert: Alert) -> str:
    """The reason; empty where the alert was taken."""
    try:
        receiver.send(alert.to_json())
    except (DeliveryError, ConnectionError) as error:
        return str(error) or type(error).__name__
    except Exception as error:  # whatever one sink does, the others are still to be told
        return type(error).__name__  # not its text: who knows what it quotes
    return ""
