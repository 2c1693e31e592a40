"""The address and the interface by which other nodes reach this one. The route to one of these nodes tells both.

The host name does not tell them: on Debian and Ubuntu it means the loopback, and on other systems it may not resolve.
This module does not import torch.
"""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import Mapping, Sequence
from contextlib import closing

import psutil

from mtunet_dist.errors import InputError

LOOPBACK = "127.0.0.1"

Interfaces = Mapping[str, Sequence[str]]  # the addresses of each network interface, by its name


def interfaces() -> dict[str, list[str]]:
    """The interfaces of this node that have an IPv4 or IPv6 address. Link-local addresses are left out."""
    found = {
        name: [a.address for a in entries if a.family in (socket.AF_INET, socket.AF_INET6) and "%" not in a.address]
        for name, entries in psutil.net_if_addrs().items()
    }
    return {name: addresses for name, addresses in found.items() if addresses}


def numbers_of(host: str) -> str:
    """The numeric address of a host name or address. Raises OSError if this node does not know the host."""
    return str(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0])


def source_towards(address: str) -> str:
    """This node's address on the route to another numeric address. Nothing is sent.

    Raises InputError if there is no route.
    """
    with closing(socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM)) as probe:
        try:
            probe.connect((address, 1))
        except OSError as error:
            raise InputError(f"this node has no route to {address}: {error.strerror}") from None
        return str(probe.getsockname()[0])


def is_loopback(address: str) -> bool:
    """Whether only this node itself can use this numeric address."""
    return ipaddress.ip_address(address).is_loopback


def interface_of(address: str, present: Interfaces) -> str | None:
    """The interface that has this address of this node."""
    if address in (found := [a for addresses in present.values() for a in addresses]):
        return next(name for name, addresses in present.items() if address in addresses)
    # No interface has 127.0.1.1, but it still belongs to the loopback.
    loopback = [a for a in found if is_loopback(a)]
    return interface_of(loopback[0], present) if is_loopback(address) and loopback else None


def only_way_out(present: Interfaces, family_of: str) -> str | None:
    """The only interface by which other nodes can reach this one with an address of the same kind (IPv4 or IPv6) as
    ``family_of``. None if there is not exactly one."""
    ways = [
        name
        for name, addresses in present.items()
        if any((":" in a) == (":" in family_of) and not is_loopback(a) for a in addresses)
    ]
    return ways[0] if len(ways) == 1 else None


def use_route_to(head: str, *, alone: bool) -> None:
    """Make gloo and NCCL use the interface on the route to the process of rank 0, unless the user has chosen one.

    ``alone``: all processes are on this node. If they are not, the name of the head may still mean the loopback on the
    head itself. Then its only interface to other nodes is used. If it has several, the libraries choose.
    """
    try:
        present, address = interfaces(), numbers_of(head)
        interface = interface_of(source_towards(address), present)
    except (OSError, InputError):
        return  # the code that connects to it reports the error
    if is_loopback(address) and head != address and not alone:
        interface = only_way_out(present, address)
    if interface is not None:
        use_interface(interface)


def use_interface(interface: str, *, force: bool = False) -> None:
    """Make gloo and NCCL use an interface, also in the processes that this one starts. With ``force`` it replaces an
    interface that the environment names. Only gloo gets a loopback: NCCL finds faster ways within a node."""
    if force or "GLOO_SOCKET_IFNAME" not in os.environ:
        os.environ["GLOO_SOCKET_IFNAME"] = interface
    local = all(is_loopback(address) for address in interfaces().get(interface, ()))
    if force or not (local or "NCCL_SOCKET_IFNAME" in os.environ):
        os.environ["NCCL_SOCKET_IFNAME"] = f"={interface}"  # without the "=" the name would be a prefix
