"""Webhooks against a real https server: signed, pinned, bounded, and silent about secrets."""

import hashlib
import hmac
import json
import socket
import time
from datetime import UTC, datetime

import pytest

from monitoring.sinks import DeliveryError
from monitoring.sinks.webhook import WAITS, Webhook

LOOPBACK = ["127.0.0.0/8", "::1/128"]
ALERT = {"id": "0123456789abcdef", "title": "a <b> & c"}
NOW = datetime(2026, 5, 4, tzinfo=UTC)


@pytest.fixture
def webhook(server, certificate):
    """Makes a webhook of the test's server, which loopback must be allowed for by name."""

    def make(host="localhost", path="/hook", **changed):
        values = {
            "url": f"https://{host}:{server.port}{path}",
            "url_env": None,
            "allowed_hosts": [host],
            "secret_env": None,
            "allowed_networks": LOOPBACK,
            "ca_file": str(certificate),
            "timeout_seconds": 5.0,
            "now": lambda: NOW,
            "sleep": lambda seconds: None,
        }
        return Webhook(**values | changed)

    return make


def refusal(webhook):
    with pytest.raises(DeliveryError) as caught:
        webhook(ALERT)
    return str(caught.value)


def test_an_alert_arrives_as_json_under_its_id(webhook, server):
    webhook()(ALERT)
    [(path, headers, body)] = server.requests
    assert path == "/hook"
    assert json.loads(body) == ALERT
    assert headers["Idempotency-Key"] == ALERT["id"]
    assert headers["Host"] == f"localhost:{server.port}"
    assert "X-Masklock-Signature" not in headers


def test_the_signature_is_what_a_receiver_computes(webhook, server, monkeypatch):
    monkeypatch.setenv("HOOK_SECRET", "s3cret")
    webhook(secret_env="HOOK_SECRET")(ALERT)
    _, headers, body = server.requests[0]
    seconds, signature = (
        part.partition("=")[2] for part in headers["X-Masklock-Signature"].split(",")
    )
    assert int(seconds) == NOW.timestamp()
    expected = hmac.new(b"s3cret", seconds.encode() + b"." + body, hashlib.sha256).hexdigest()
    assert signature == expected


def test_no_alert_is_sent_unsigned_where_the_secret_is_missing(webhook, server, monkeypatch):
    monkeypatch.delenv("HOOK_SECRET", raising=False)
    assert "HOOK_SECRET is not set" in refusal(webhook(secret_env="HOOK_SECRET"))
    assert server.requests == []


def test_loopback_and_private_addresses_are_refused_unless_named(webhook, server):
    assert "has the address 127.0.0.1, which is not public" in refusal(webhook(allowed_networks=[]))
    assert "not public" in refusal(webhook(allowed_networks=["10.0.0.0/8"]))
    assert server.requests == []


def test_redirects_are_not_followed(webhook, server):
    server.statuses, server.headers = [302], {"Location": f"https://localhost:{server.port}/other"}
    assert refusal(webhook()) == "localhost answered 302: redirects are not followed"
    assert [path for path, _, _ in server.requests] == ["/hook"]


def test_the_connection_goes_to_the_address_that_was_vetted(webhook, server, monkeypatch):
    """A name that answers once with an allowed address, then with another one, gains nothing."""
    resolve, asked = socket.getaddrinfo, []

    def rebinding(host, *args, **options):
        if host != "hook.example":
            return resolve(host, *args, **options)
        asked.append(host)
        return resolve("127.0.0.1" if len(asked) == 1 else "127.0.0.2", *args, **options)

    monkeypatch.setattr(socket, "getaddrinfo", rebinding)
    webhook("hook.example")(ALERT)
    assert server.requests[0][1]["Host"] == f"hook.example:{server.port}"
    assert asked == ["hook.example"]


def test_a_certificate_of_another_host_or_authority_is_refused(webhook, server):
    assert "certificate of localhost is not trusted" in refusal(webhook(ca_file=None))
    other = webhook(url=f"https://127.0.0.1:{server.port}", allowed_hosts=["127.0.0.1"])
    assert "certificate of 127.0.0.1 is not trusted" in refusal(other)
    assert server.requests == []


def test_a_server_that_hangs_is_left_in_time(webhook, server):
    server.hang, started = True, time.monotonic()
    assert refusal(webhook(timeout_seconds=0.3)) == "localhost did not answer"
    assert time.monotonic() - started < 0.3 * (len(WAITS) + 1) + 2
    assert len(server.requests) == len(WAITS) + 1


def test_what_may_pass_is_tried_again_with_pauses_and_no_more_than_bounded(webhook, server):
    pauses = []
    server.statuses = [503, 429, 200]
    webhook(sleep=pauses.append)(ALERT)
    assert pauses == list(WAITS)
    assert len({headers["Idempotency-Key"] for _, headers, _ in server.requests}) == 1
    server.requests.clear()
    server.statuses = [503]
    assert refusal(webhook()) == "localhost answered 503"
    assert len(server.requests) == len(WAITS) + 1


def test_what_will_not_pass_is_not_tried_again(webhook, server):
    server.statuses = [400]
    assert refusal(webhook()) == "localhost answered 400"
    assert len(server.requests) == 1


def test_a_closed_port_and_an_unknown_host_are_named(webhook):
    with socket.create_server(("127.0.0.1", 0)) as held:
        port = held.getsockname()[1]
    assert refusal(webhook(url=f"https://localhost:{port}")) == "localhost did not answer"
    nowhere = webhook(url="https://nowhere.invalid/", allowed_hosts=["nowhere.invalid"])
    assert refusal(nowhere) == "nowhere.invalid has no address"


@pytest.mark.parametrize(
    "address",
    [
        "http://localhost/",
        "https://evil.example/",
        "https://",
        "https://[::1",
        "file:///etc/passwd",
    ],
)
def test_an_address_from_the_environment_is_held_to_the_same_rules(webhook, monkeypatch, address):
    monkeypatch.setenv("HOOK", address)
    said = refusal(webhook(url=None, url_env="HOOK"))
    assert "address" in said
    assert "evil" not in said


def test_what_is_said_of_a_failure_holds_no_path_and_no_answer(webhook, server, monkeypatch):
    monkeypatch.setenv("HOOK", f"https://localhost:{server.port}/T0P/s3cret?token=s3cret")
    server.statuses, server.headers = [403], {"X-Why": "s3cret"}
    assert refusal(webhook(url=None, url_env="HOOK")) == "localhost answered 403"
    assert server.requests[0][0] == "/T0P/s3cret?token=s3cret"
