"""A sweep says which nodes have joined its Ray, and does not go on without one that it was promised."""

from __future__ import annotations

from typing import Any

import pytest

from mtunet_dist.sweeps.ray_backend import nodes as sweep_nodes


def node(name: str, number: int, *, alive: bool = True) -> dict[str, Any]:
    """What Ray says of a node."""
    names = {"NodeManagerHostname": name, "NodeManagerAddress": f"192.0.2.{number}"}
    return {**names, "Alive": alive, "Resources": {"CPU": 4.0, "memory": 1e9}}


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Those that the Ray has, to be changed."""
    present = [node("n2", 2), node("n1", 1), node("n3", 3, alive=False)]
    monkeypatch.setattr("ray.nodes", lambda: present)
    monkeypatch.setattr(sweep_nodes, "JOIN_S", 1.0)
    return present


@pytest.mark.parametrize("expected", [None, 1, 2])
def test_the_nodes_that_have_joined_are_listed(
    nodes: list[dict[str, Any]], capsys: pytest.CaptureFixture[str], expected: int | None
) -> None:
    sweep_nodes.wait_for_nodes("192.0.2.1:15000", expected)
    listed = "n1 192.0.2.1 (4 CPUs, 0 GPUs), n2 192.0.2.2 (4 CPUs, 0 GPUs)"
    assert capsys.readouterr().out == f"the Ray at 192.0.2.1:15000 has 2 nodes: {listed}\n"


def test_a_node_that_does_not_join_ends_the_sweep(nodes: list[dict[str, Any]]) -> None:
    message = r"error: only 2 of 3 nodes have joined the Ray at 192.0.2.1:15000 in 1 s: n1 192.0.2.1 .*, n2 192.0.2.2 "
    with pytest.raises(SystemExit, match=message):
        sweep_nodes.wait_for_nodes("192.0.2.1:15000", 3)


def test_a_node_that_joins_late_is_waited_for(
    nodes: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: nodes.append(node("n4", 4)))
    sweep_nodes.wait_for_nodes("192.0.2.1:15000", 3)
    assert "has 3 nodes: " in capsys.readouterr().out
