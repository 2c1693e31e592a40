"""By which interface other nodes reach this one, and who is told so."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from mtunet_dist.system import addresses

NAMES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
HERE = {"lo": ["127.0.0.1", "::1"], "eth0": ["192.0.2.5"], "ib0": ["198.51.100.5", "2001:db8::5"]}
ONE = {"lo": ["127.0.0.1"], "eth0": ["192.0.2.5"]}


@pytest.fixture(autouse=True)
def unset(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither library has been told."""
    for name in NAMES:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


@pytest.mark.parametrize(
    ("means", "alone", "present", "told"),
    [
        ({"n1": "192.0.2.1"}, False, HERE, ["eth0", "=eth0"]),
        ({"n1": "198.51.100.1"}, False, HERE, ["ib0", "=ib0"]),
        ({"n1": "2001:db8::1"}, False, HERE, ["ib0", "=ib0"]),
        ({"n1": "127.0.1.1"}, False, ONE, ["eth0", "=eth0"]),  # on the head itself
        ({"n1": "127.0.1.1"}, False, HERE, [None, None]),  # which of them?
        ({"n1": "127.0.1.1"}, True, HERE, ["lo", None]),
        ({"n1": "127.0.0.1"}, True, ONE, ["lo", None]),
        ({}, False, HERE, [None, None]),
    ],
)
def test_the_libraries_use_the_route_to_the_head(
    monkeypatch: pytest.MonkeyPatch,
    means: dict[str, str],
    alone: bool,
    present: dict[str, list[str]],
    told: list[str | None],
) -> None:
    def numbers_of(host: str) -> str:
        if host not in means:
            raise OSError("unknown")
        return means[host]

    sources = {"192": "192.0.2.5", "198": "198.51.100.5", "200": "2001:db8::5", "127": "127.0.0.1"}
    monkeypatch.setattr(addresses, "numbers_of", numbers_of)
    monkeypatch.setattr(addresses, "source_towards", lambda address: sources[address[:3]])
    monkeypatch.setattr(addresses, "interfaces", lambda: present)
    addresses.use_route_to("n1", alone=alone)
    assert [os.environ.get(name) for name in NAMES] == told


def test_what_the_user_has_said_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(NAMES[0], "eth7")
    monkeypatch.setenv(NAMES[1], "eth8,eth9")
    monkeypatch.setattr(addresses, "interfaces", lambda: ONE)
    addresses.use_route_to("192.0.2.5", alone=False)
    addresses.use_interface("eth0")
    assert [os.environ[name] for name in NAMES] == ["eth7", "eth8,eth9"]
    addresses.use_interface("eth0", force=True)
    assert [os.environ[name] for name in NAMES] == ["eth0", "=eth0"]


def test_this_machines_own_interfaces_are_found() -> None:
    present = addresses.interfaces()
    assert "127.0.0.1" in present["lo"]
    assert addresses.source_towards("127.0.0.1") == "127.0.0.1"
    assert [addresses.interface_of(a, present) for a in ("127.0.0.1", "127.0.1.1", "192.0.2.77")] == ["lo", "lo", None]


def test_addresses_are_found_without_torch() -> None:
    code = "import sys, mtunet_dist.system.addresses; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
