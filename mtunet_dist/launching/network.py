"""The address of the head node, and whether it is this node."""

from __future__ import annotations

import socket
import time
from contextlib import closing
from dataclasses import dataclass

from torch.distributed.elastic.rendezvous.utils import parse_rendezvous_endpoint

from mtunet_dist.errors import InputError
from mtunet_dist.system.addresses import Interfaces, interface_of, is_loopback, numbers_of, only_way_out

DEFAULT_PORT = 29400  # torchrun's default for c10d


@dataclass(frozen=True)
class Endpoint:
    """A numeric address and a port."""

    address: str
    port: int

    def __str__(self) -> str:
        return f"[{self.address}]:{self.port}" if ":" in self.address else f"{self.address}:{self.port}"

    @property
    def family(self) -> socket.AddressFamily:
        """IPv4 or IPv6."""
        return socket.AF_INET6 if ":" in self.address else socket.AF_INET


def resolve(head: str) -> Endpoint:
    """``HOST[:PORT]`` as an endpoint. Raises InputError if the text is malformed or this node does not know the
    host."""
    try:
        host, port = parse_rendezvous_endpoint(head, DEFAULT_PORT)
    except ValueError:
        raise InputError(f"--head={head} is not HOST or HOST:PORT, with a port of 1 to 65535") from None
    if port == 0:
        raise InputError(f"--head={head}: all nodes must know the port; leave it out for {DEFAULT_PORT}")
    try:
        return Endpoint(numbers_of(host), port)
    except OSError as error:
        raise InputError(f"--head={head}: {socket.gethostname()} cannot resolve {host}: {error.strerror}") from None


def is_here(head: Endpoint, present: Interfaces) -> bool:
    """Whether the head's address is an address of this node."""
    return is_loopback(head.address) or any(head.address in addresses for addresses in present.values())


def way_out(text: str, head: Endpoint, present: Interfaces) -> str | None:
    """The only interface of the head to other nodes, if the head's name ``text`` means its own loopback, as on Debian.
    None if the head has several such interfaces, and on other nodes."""
    named = head.address not in text
    return only_way_out(present, head.address) if named and is_loopback(head.address) else None


def choose(head: Endpoint, wanted: str | None, present: Interfaces, source: str) -> tuple[str, str]:
    """The interface to use, and this node's address on it. It is the ``wanted`` one, or that of the route to the head.

    ``source`` is this node's address on that route. Raises InputError if the interface is absent or has no address of
    the head's kind, or if the head's name means the loopback here, where no other node could connect.
    """
    listed = ", ".join(f"{name} ({' '.join(addresses)})" for name, addresses in present.items())
    if wanted is None:
        if is_loopback(source):
            raise InputError(
                f"the head resolves to {head.address} here, the loopback, which other nodes cannot reach; "
                f"give --head the address that they see, or --interface. This node has {listed}"
            )
        interface = interface_of(source, present)
        assert interface is not None
        return interface, source
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
    """Raise InputError if another program listens on the head's port. Called on the head."""
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
    """Wait until the head listens. Called on other nodes. Raises InputError after ``patience_s`` seconds."""
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
