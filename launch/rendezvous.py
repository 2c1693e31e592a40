"""How the agents of a job meet: torch's two ways, each with what it lacks for a job that is started again."""

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

LAST_CALL_S = 15  # that the least number of nodes waits for more, here and after the loss of one


class Dynamic(DynamicRendezvousHandler):
    """c10d: nodes come and go, ranks follow the order of the nodes' addresses."""

    _lost = False  # the connection; torch would print the stack at every other try

    def num_nodes_waiting(self) -> int:
        """Nodes that want to join; none once the head's agent has gone.

        It goes when its processes have ended. Those of this node are then ending too, by themselves and with an exit
        code of their own; torch's agent would take the lost connection for its own failure and end them first.
        """
        if not self._lost:
            try:
                return super().num_nodes_waiting()
            except RendezvousConnectionError:
                self._lost = True
        return 0


class Static(StaticTCPRendezvous):
    """static: a fixed number of nodes, with ranks as given. All must restart equally often, which a failure sees to.

    torch's own hands the processes the agents' store, with the keys of the ones that have failed (see agent.py), and
    knows no end: here each round has a store of its own, and a node that gives up says so to the others.
    """

    def __init__(self, host: str, port: int, rank: int, nodes: int, run_id: str, timeout_s: int, address: str) -> None:
        super().__init__(host, port, rank, nodes, run_id, timeout_s)
        self._address = address
        self._round = 0

    @property
    def use_agent_store(self) -> bool:
        """No."""
        return False

    def next_rendezvous(self) -> RendezvousInfo:
        """Join the next round; the node of rank 0 says where the processes will meet."""
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
        return True  # the store has gone, and with it the head

    def set_closed(self) -> None:
        """Give up, for all nodes."""
        if self._store is not None:
            with suppress(DistError):
                PrefixStore(self.run_id, self._store).set("closed", "1")

    def shutdown(self) -> bool:
        """The same."""
        self.set_closed()
        return True


def dynamic(
    endpoint: str, *, is_host: bool, nodes: tuple[int, int], run_id: str, address: str, timeout_s: int
) -> RendezvousHandler:
    """A c10d rendezvous of ``nodes`` (least, most) whose store is served, or not, by this process.

    Raises RendezvousConnectionError if there is no connection.
    """
    least, most = nodes
    parameters = RendezvousParameters("c10d", endpoint, run_id, least, most, address, is_host=is_host)
    backend, store = create_backend(parameters)
    timeout = RendezvousTimeout(join=timedelta(seconds=timeout_s), last_call=timedelta(seconds=LAST_CALL_S))
    handler: Dynamic = Dynamic.from_backend(run_id, store, backend, least, most, address, timeout)
    return handler
