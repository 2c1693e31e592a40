"""By which address and interface other nodes reach this one: those of its route to one of them.

Not those of its host name, which on Debian and Ubuntu means the loopback, and elsewhere may mean nothing.
No torch is imported.
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
    """The interfaces of this node that have an IPv4 or IPv6 address, link-local ones left out."""
    found = {
        name: [a.address for a in entries if a.family in (socket.AF_INET, socket.AF_INET6) and "%" not in a.address]
        for name, entries in psutil.net_if_addrs().items()
    }
    return {name: addresses for name, addresses in found.items() if addresses}


def numbers_of(host: str) -> str:
    """The address of a host, given by name or address, as numbers. Raises OSError if this node does not know it."""
    return str(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0])


def source_towards(address: str) -> str:
    """This node's address on the route to another, given as numbers; nothing is sent.

    Raises InputError if there is no route.
    """
    with closing(socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM)) as probe:
        try:
            probe.connect((address, 1))
        except OSError as error:
            raise InputError(f"this node has no route to {address}: {error.strerror}") from None
        return str(probe.getsockname()[0])


def is_loopback(address: str) -> bool:
    """Whether an address, as numbers, is this node's for itself alone."""
    return ipaddress.ip_address(address).is_loopback


def interface_of(address: str, present: Interfaces) -> str | None:
    """The interface that has an address of this node."""
    if address in (found := [a for addresses in present.values() for a in addresses]):
        return next(name for name, addresses in present.items() if address in addresses)
    # 127.0.1.1 is none's, but the loopback's all the same.
    loopback = [a for a in found if is_loopback(a)]
    return interface_of(loopback[0], present) if is_loopback(address) and loopback else None


def only_way_out(present: Interfaces, family_of: str) -> str | None:
    """The interface through which alone other nodes can reach this one by an address of the kind of ``family_of``."""
    ways = [
        name
        for name, addresses in present.items()
        if any((":" in a) == (":" in family_of) and not is_loopback(a) for a in addresses)
    ]
    return ways[0] if len(ways) == 1 else None


def use_route_to(head: str, *, alone: bool) -> None:
    """Have gloo and NCCL use the interface on the route to the process of rank 0, unless the user has said which.

    ``alone``: all processes are on this node. Where they are not, the head's name may yet mean the loopback, on the
    head: then it is the only interface that leads out, and where there are several the libraries are left alone.
    """
    try:
        present, address = interfaces(), numbers_of(head)
        interface = interface_of(source_towards(address), present)
    except (OSError, InputError):
        return  # who connects to it says so
    if is_loopback(address) and head != address and not alone:
        interface = only_way_out(present, address)
    if interface is not None:
        use_interface(interface)


def use_interface(interface: str, *, force: bool = False) -> None:
    """Have gloo and NCCL use an interface, also in the processes that this one starts; with ``force`` even where the
    environment names another. A loopback is for gloo only: NCCL finds better ways within a node."""
    if force or "GLOO_SOCKET_IFNAME" not in os.environ:
        os.environ["GLOO_SOCKET_IFNAME"] = interface
    local = all(is_loopback(address) for address in interfaces().get(interface, ()))
    if force or not (local or "NCCL_SOCKET_IFNAME" in os.environ):
        os.environ["NCCL_SOCKET_IFNAME"] = f"={interface}"  # a bare name would be the beginning of one
