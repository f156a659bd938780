"""Which addresses a webhook may connect to: public ones, and private networks that are named."""

import ipaddress
import socket
from collections.abc import Sequence

from monitoring.sinks import DeliveryError

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def vetted_address(host: str, port: int, allowed_networks: Sequence[str] = ()) -> str:
    """The one address to connect to. Every address of the host must be allowed.

    The caller connects to what is returned and never resolves the name again, so that a name that
    changes its address after the check gains nothing.

    Raises:
        DeliveryError: the host has no address, or one that is refused.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        raise DeliveryError(f"{host} has no address") from None
    addresses = [str(entry[4][0]) for entry in found]
    for text in addresses:
        address = ipaddress.ip_address(text.partition("%")[0])
        if not is_allowed(address, allowed_networks):
            raise DeliveryError(
                f"{host} has the address {address}, which is not public; if it is meant, name its "
                f"network under allowed_networks"
            )
    return addresses[0]


def is_allowed(address: Address, allowed_networks: Sequence[str]) -> bool:
    """Public addresses that are of one host, and those of the networks named."""
    plain = _inner(address)
    if any(plain in ipaddress.ip_network(network) for network in allowed_networks):
        return True
    return plain.is_global and not plain.is_multicast


def _inner(address: Address) -> Address:
    """The IPv4 address that an IPv6 one stands for (mapped, 6to4, NAT64), else itself."""
    if isinstance(address, ipaddress.IPv4Address):
        return address
    if any(address in ipaddress.ip_network(network) for network in ("::/96", "64:ff9b::/96")):
        return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return address.ipv4_mapped or address.sixtofour or address
