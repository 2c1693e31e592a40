"""How the agents of a job meet: torch's two rendezvous, with the additions that a restarted job needs."""

from __future__ import annotations

from contextlib import suppress
from datetime import timedelta

from torch.distributed import DistError
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.elastic.rendezvous import (
    RendezvousClosedError,
    RendezvousConnectionError,
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
)
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import create_backend
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import DynamicRendezvousHandler, RendezvousTimeout
from torch.distributed.elastic.rendezvous.static_tcp_rendezvous import StaticTCPRendezvous

LAST_CALL_S = 15  # seconds that the least number of nodes waits for more, here and after a node is lost


class Dynamic(DynamicRendezvousHandler):
    """c10d: nodes may join and leave; ranks follow the order of the nodes' addresses."""

    _lost = False  # the connection is lost; otherwise torch would print the stack at every second try

    def num_nodes_waiting(self) -> int:
        """The number of nodes that want to join. 0 once the head's agent has gone.

        The head's agent goes when its processes have ended. The processes of this node are then ending too, with their
        own exit code. torch's agent would count the lost connection as its own failure and end them first.
        """
        if not self._lost:
            try:
                return super().num_nodes_waiting()
            except RendezvousConnectionError:
                self._lost = True
        return 0


class Static(StaticTCPRendezvous):
    """static: a fixed number of nodes, with given ranks. All must restart equally often; a failure ends all of them.

    torch's own version gives the processes the agents' store, with the keys of failed processes (see agent.py), and
    cannot be closed. Here each round has its own store, and a node that gives up tells the others.
    """

    def __init__(self, host: str, port: int, rank: int, nodes: int, run_id: str, timeout_s: int, address: str) -> None:
        super().__init__(host, port, rank, nodes, run_id, timeout_s)
        self._address = address
        self._round = 0

    @property
    def use_agent_store(self) -> bool:
        """False: the processes have their own store."""
        return False

    def next_rendezvous(self) -> RendezvousInfo:
        """Join the next round. The node of rank 0 tells the others where the processes meet."""
        if self.is_closed():
            raise RendezvousClosedError
        try:
            info = super().next_rendezvous()
            self._round += 1
            store = PrefixStore(str(self._round), info.store)
            meeting = RendezvousStoreInfo.build(self.rank, store, self._address)
        except DistError as error:
            raise RendezvousConnectionError(str(error)) from error
        return RendezvousInfo(store, self.rank, self.world_size, meeting)

    def is_closed(self) -> bool:
        """Whether a node has given up."""
        with suppress(DistError):
            return self._store is not None and PrefixStore(self.run_id, self._store).check(["closed"])
        return True  # the store has gone together with the head

    def set_closed(self) -> None:
        """Give up for all nodes."""
        if self._store is not None:
            with suppress(DistError):
                PrefixStore(self.run_id, self._store).set("closed", "1")

    def shutdown(self) -> bool:
        """Give up for all nodes."""
        self.set_closed()
        return True


def dynamic(
    endpoint: str, *, is_host: bool, nodes: tuple[int, int], run_id: str, address: str, timeout_s: int
) -> RendezvousHandler:
    """A c10d rendezvous of ``nodes`` (least, most). With ``is_host`` this process serves its store.

    Raises RendezvousConnectionError if there is no connection.
    """
    least, most = nodes
    parameters = RendezvousParameters("c10d", endpoint, run_id, least, most, address, is_host=is_host)
    backend, store = create_backend(parameters)
    timeout = RendezvousTimeout(join=timedelta(seconds=timeout_s), last_call=timedelta(seconds=LAST_CALL_S))
    handler: Dynamic = Dynamic.from_backend(run_id, store, backend, least, most, address, timeout)
    return handler
