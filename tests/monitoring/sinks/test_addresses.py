"""Which addresses a webhook may connect to."""

import ipaddress

import pytest

from monitoring.sinks.addresses import is_allowed


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "127.8.8.8", "0.0.0.0", "10.1.2.3", "172.16.0.1", "192.168.1.1",
        "169.254.169.254", "100.64.0.1", "224.0.0.1", "255.255.255.255", "192.0.2.1",
        "::1", "::", "fe80::1", "fd00::1", "ff02::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1",
        "::127.0.0.1", "64:ff9b::10.0.0.1", "2002:7f00:1::", "2001:db8::1",
    ],
)  # fmt: skip
def test_addresses_that_are_not_public_are_refused_however_they_are_written(address):
    assert not is_allowed(ipaddress.ip_address(address), [])


@pytest.mark.parametrize("address", ["8.8.8.8", "2606:4700:4700::1111", "64:ff9b::8.8.8.8"])
def test_public_addresses_are_allowed(address):
    assert is_allowed(ipaddress.ip_address(address), [])


def test_a_private_network_is_allowed_by_name_and_no_other():
    assert is_allowed(ipaddress.ip_address("10.1.2.3"), ["10.1.0.0/16"])
    assert is_allowed(ipaddress.ip_address("::ffff:10.1.2.3"), ["10.1.0.0/16"])
    assert not is_allowed(ipaddress.ip_address("10.2.2.3"), ["10.1.0.0/16"])
