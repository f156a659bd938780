"""Who is told of an alert: a sink is a callable that takes `Alert.to_json()`.

It returns once the alert is taken, and raises `DeliveryError` (or ConnectionError) with the reason
where it is not. It may be called again with the same alert: its `id` is the idempotency key.
"""

from collections.abc import Callable, Mapping
from typing import Any

Sink = Callable[[Mapping[str, Any]], None]


class DeliveryError(Exception):
    """An alert was not taken; the reason, without secrets."""
