"""Where the head is, and through which interface and address this node reaches it."""

from __future__ import annotations

import ipaddress
import socket
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass

import psutil
from torch.distributed.elastic.rendezvous.utils import parse_rendezvous_endpoint

from mtunet_dist.errors import InputError

DEFAULT_PORT = 29400  # torchrun's for c10d

Interfaces = Mapping[str, Sequence[str]]  # the addresses of each network interface, by its name


@dataclass(frozen=True)
class Endpoint:
    """An address as numbers, and a port."""

    address: str
    port: int

    def __str__(self) -> str:
        return f"[{self.address}]:{self.port}" if ":" in self.address else f"{self.address}:{self.port}"

    @property
    def family(self) -> socket.AddressFamily:
        """IPv4 or IPv6."""
        return socket.AF_INET6 if ":" in self.address else socket.AF_INET


def resolve(head: str) -> Endpoint:
    """``HOST[:PORT]`` as numbers. Raises InputError if it is malformed or this node does not know the host."""
    try:
        host, port = parse_rendezvous_endpoint(head, DEFAULT_PORT)
    except ValueError:
        raise InputError(f"--head={head} is not HOST or HOST:PORT, with a port of 1 to 65535") from None
    if port == 0:
        raise InputError(f"--head={head}: all nodes must know the port; leave it out for {DEFAULT_PORT}")
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise InputError(f"--head={head}: {socket.gethostname()} cannot resolve {host}: {error.strerror}") from None
    return Endpoint(str(found[0][4][0]), port)


def interfaces() -> dict[str, list[str]]:
    """The interfaces of this node that have an IPv4 or IPv6 address, link-local ones left out."""
    found = {
        name: [a.address for a in entries if a.family in (socket.AF_INET, socket.AF_INET6) and "%" not in a.address]
        for name, entries in psutil.net_if_addrs().items()
    }
    return {name: addresses for name, addresses in found.items() if addresses}


def source_towards(head: Endpoint) -> str:
    """This node's address on the route to the head; nothing is sent. Raises InputError if there is no route."""
    with closing(socket.socket(head.family, socket.SOCK_DGRAM)) as probe:
        try:
            probe.connect((head.address, head.port))
        except OSError as error:
            raise InputError(f"this node has no route to the head, {head.address}: {error.strerror}") from None
        return str(probe.getsockname()[0])


def is_here(head: Endpoint, present: Interfaces) -> bool:
    """Whether the head's address is one of this node's."""
    return _is_loopback(head.address) or any(head.address in addresses for addresses in present.values())


def choose(head: Endpoint, wanted: str | None, present: Interfaces, source: str) -> tuple[str, str]:
    """The interface to use, and this node's address on it: that of the route to the head, or the ``wanted`` one's.

    ``source`` is this node's address on that route. Raises InputError if the interface is absent or has no address
    of the head's kind, or if the head's name means the loopback here, where no other node could connect.
    """
    listed = ", ".join(f"{name} ({' '.join(addresses)})" for name, addresses in present.items())
    if wanted is None:
        if _is_loopback(source):
            raise InputError(
                f"the head resolves to {head.address} here, the loopback, which other nodes cannot reach; "
                f"give --head the address that they see, or --interface. This node has {listed}"
            )
        return next((name for name, addresses in present.items() if source in addresses)), source
    if wanted not in present:
        raise InputError(f"this node has no interface {wanted} with an address. It has {listed}")
    if source in present[wanted]:
        return wanted, source
    same_kind = [address for address in present[wanted] if (":" in address) == (":" in head.address)]
    if not same_kind:
        kind = "IPv6" if ":" in head.address else "IPv4"
        raise InputError(f"the head's address {head.address} is {kind}, of which {wanted} has none. Present: {listed}")
    return wanted, same_kind[0]


def check_free(head: Endpoint) -> None:
    """On the head: raises InputError if something else listens on the port."""
    with closing(socket.socket(head.family, socket.SOCK_STREAM)) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", head.port))
        except OSError as error:
            raise InputError(
                f"port {head.port} of this node: {error.strerror}. Is another job's rendezvous here? "
                "Choose another port on all nodes, --head=HOST:PORT"
            ) from None


def wait_for(head: Endpoint, patience_s: float) -> None:
    """On another node: until the head listens. Raises InputError if it does not within ``patience_s`` seconds."""
    deadline = time.monotonic() + patience_s
    waiting = False
    while True:
        try:
            socket.create_connection((head.address, head.port), timeout=5).close()
            return
        except OSError as error:
            reason = error.strerror or str(error)
        if time.monotonic() > deadline:
            raise InputError(
                f"no answer from the head at {head} in {patience_s:.0f} s: {reason}. "
                "Was the same command started there? Does a firewall close the port?"
            )
        if not waiting:
            print(f"waiting for the head at {head}", flush=True)
            waiting = True
        time.sleep(0.5)


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address).is_loopback
