"""An https address that is sent each alert as JSON, signed; no redirects, no private addresses.

    POST, Content-Type: application/json
    Idempotency-Key:      the alert's id, the same each time that it is sent
    X-Masklock-Signature: t=SECONDS,v1=HEX, HEX = HMAC-SHA256(secret, "SECONDS." + body)

What is said of a failure holds the host, never the whole address or an answer: both may be secret.
"""

import hashlib
import hmac
import http.client
import json
import os
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from urllib.parse import SplitResult, urlsplit

from monitoring.alerts import utc_now
from monitoring.sinks import DeliveryError
from monitoring.sinks.addresses import vetted_address

WAITS = (1.0, 3.0)
"""Seconds between the attempts of one run."""
TRY_AGAIN = {408, 425, 429, 500, 502, 503, 504}


@dataclass(frozen=True)
class Webhook:
    """Posts to `url`, or to the address in the environment variable `url_env`."""

    url: str | None
    url_env: str | None
    allowed_hosts: Sequence[str]
    secret_env: str | None
    allowed_networks: Sequence[str]
    ca_file: str | None
    timeout_seconds: float
    now: Callable[[], datetime] = utc_now
    sleep: Callable[[float], None] = time.sleep

    def __call__(self, alert: Mapping[str, Any]) -> None:
        address = self._address()
        body = json.dumps(alert).encode()
        for wait in (*WAITS, None):
            status = self._status(address, body, alert["id"])
            if status is not None and 200 <= status < 300:
                return
            if wait is None or (status is not None and status not in TRY_AGAIN):
                break
            self.sleep(wait)
        raise DeliveryError(_failure(address, status))

    def _status(self, address: SplitResult, body: bytes, key: str) -> int | None:
        """The status of the answer; None where there was none in time."""
        try:
            with self._connection(address) as connection:
                target = (address.path or "/") + (f"?{address.query}" if address.query else "")
                connection.request("POST", target, body, self._headers(body, key))
                return connection.getresponse().status
        except ssl.SSLCertVerificationError as error:
            raise DeliveryError(
                f"the certificate of {address.hostname} is not trusted: {error.verify_message}"
            ) from None
        except (OSError, http.client.HTTPException):
            return None

    def _headers(self, body: bytes, key: str) -> dict[str, str]:
        headers = {
            "Content-Type": "application/json",
            "User-Agent": "masklock",
            "Idempotency-Key": key,
        }
        if self.secret_env is not None:
            seconds = str(int(self.now().timestamp()))
            signature = sign(_from_environment(self.secret_env), seconds, body)
            headers["X-Masklock-Signature"] = f"t={seconds},v1={signature}"
        return headers

    def _address(self) -> SplitResult:
        url = self.url if self.url_env is None else _from_environment(self.url_env)
        try:
            address = urlsplit(url or "")
            address.port  # noqa: B018  raises where it is no number
        except ValueError:
            raise DeliveryError("the address of the webhook is none") from None
        hosts = [host.lower() for host in self.allowed_hosts]
        if address.scheme != "https" or address.hostname not in hosts:
            raise DeliveryError(
                f"the webhook's address must begin with https:// and one of its allowed hosts, "
                f"{', '.join(hosts)}"
            )
        return address

    def _trust(self) -> ssl.SSLContext:
        try:
            return ssl.create_default_context(cafile=self.ca_file)
        except OSError:
            raise DeliveryError(f"there are no certificates to read in {self.ca_file}") from None

    @contextmanager
    def _connection(self, address: SplitResult) -> Iterator[http.client.HTTPSConnection]:
        """A connection to the vetted address; its certificate must be that of the host."""
        assert address.hostname is not None
        port = address.port or 443
        pinned = vetted_address(address.hostname, port, self.allowed_networks)
        context = self._trust()
        with socket.create_connection((pinned, port), timeout=self.timeout_seconds) as plain:
            with _deadline(plain, self.timeout_seconds):
                encrypted = context.wrap_socket(plain, server_hostname=address.hostname)
                connection = http.client.HTTPSConnection(address.hostname, port, context=context)
                connection.sock = encrypted
                with encrypted:
                    yield connection


def sign(secret: str, seconds: str, body: bytes) -> str:
    """The signature that a receiver computes too, and compares with `hmac.compare_digest`."""
    return hmac.new(secret.encode(), f"{seconds}.".encode() + body, hashlib.sha256).hexdigest()


@contextmanager
def _deadline(connection: socket.socket, seconds: float) -> Iterator[None]:
    """Cut a connection after so long: one that drips a byte a second is never silent for long."""
    # the descriptor of its own outlives the wrapping of the socket, which closes the first one
    double = connection.dup()
    timer = threading.Timer(seconds, _cut, [double])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        double.close()


def _cut(connection: socket.socket) -> None:
    try:
        connection.shutdown(socket.SHUT_RDWR)
    except OSError:
        return  # it has ended meanwhile


def _from_environment(name: str) -> str:
    value = os.environ.get(name, "").strip()
    if not value:
        raise DeliveryError(f"the environment variable {name} is not set")
    return value


def _failure(address: SplitResult, status: int | None) -> str:
    if status is None:
        return f"{address.hostname} did not answer"
    hint = ": redirects are not followed" if 300 <= status < 400 else ""
    return f"{address.hostname} answered {status}{hint}"
