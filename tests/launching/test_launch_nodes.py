"""launch/nodes.py: what it derives, and two agents on two hosts, here network namespaces joined by a cable."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest

from helpers.training import (
    MakeConfig,
    assert_same_state,
    children,
    final_state,
    kill_all,
    on_two_ranks,
    records,
    steps_done,
    wait_until,
)
from mtunet_dist.errors import InputError
from mtunet_dist.launching import agent, network, nodes
from mtunet_dist.launching.network import Endpoint
from mtunet_dist.train import train

LAUNCH = [sys.executable, str(Path(__file__).parents[2] / "launch" / "nodes.py"), "--nproc=1"]
SETTINGS = ["log.every_steps=1", "eval_every_epochs=0", "checkpoint.every_steps=2", "data.augment.flip=true"]
HEAD, OTHER = "10.213.7.1", "10.213.7.2"
HERE = {"lo": ["127.0.0.1", "::1"], "eth0": ["192.0.2.5", "2001:db8::5"], "ib0": ["198.51.100.5"]}


@pytest.mark.parametrize(
    ("text", "endpoint"),
    [
        ("192.0.2.1", "192.0.2.1:29400"),
        ("192.0.2.1:1234", "192.0.2.1:1234"),
        ("[2001:db8::1]:1234", "[2001:db8::1]:1234"),
        ("[2001:db8::1]", "[2001:db8::1]:29400"),
    ],
)
def test_the_head_is_a_host_and_perhaps_a_port(text: str, endpoint: str) -> None:
    assert str(network.resolve(text)) == endpoint


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("no-such-host.invalid", "cannot resolve no-such-host.invalid"),
        ("192.0.2.1:http", "is not HOST or HOST:PORT"),
        ("192.0.2.1:65536", "is not HOST or HOST:PORT"),
        ("192.0.2.1:0", "all nodes must know the port"),
        ("a b", "is not HOST or HOST:PORT"),
    ],
)
def test_a_head_that_cannot_be_is_refused(text: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        network.resolve(text)


@pytest.mark.parametrize(
    ("head", "wanted", "source", "chosen"),
    [
        ("192.0.2.1", None, "192.0.2.5", ("eth0", "192.0.2.5")),
        ("2001:db8::1", None, "2001:db8::5", ("eth0", "2001:db8::5")),
        ("192.0.2.1", "ib0", "192.0.2.5", ("ib0", "198.51.100.5")),
        ("2001:db8::1", "eth0", "2001:db8::5", ("eth0", "2001:db8::5")),
        ("127.0.1.1", "eth0", "127.0.0.1", ("eth0", "192.0.2.5")),  # the head's own name, on Debian
        ("127.0.0.1", "lo", "127.0.0.1", ("lo", "127.0.0.1")),
    ],
)
def test_the_interface_is_that_of_the_route_or_the_one_asked_for(
    head: str, wanted: str | None, source: str, chosen: tuple[str, str]
) -> None:
    assert network.choose(Endpoint(head, 1), wanted, HERE, source) == chosen


@pytest.mark.parametrize(
    ("head", "wanted", "words"),
    [
        ("192.0.2.1", "eth7", r"no interface eth7 with an address. It has lo \(127.0.0.1 ::1\), eth0 .*, ib0"),
        ("2001:db8::1", "ib0", "2001:db8::1 is IPv6, of which ib0 has none"),
        ("127.0.1.1", None, "resolves to 127.0.1.1 here, the loopback"),
    ],
)
def test_an_interface_that_will_not_do_is_refused(head: str, wanted: str | None, words: str) -> None:
    with pytest.raises(InputError, match=words):
        network.choose(Endpoint(head, 1), wanted, HERE, "127.0.0.1" if head.startswith("127") else "192.0.2.5")


@pytest.mark.parametrize(
    ("address", "here"),
    [("192.0.2.5", True), ("2001:db8::5", True), ("127.0.1.1", True), ("192.0.2.1", False), ("2001:db8::1", False)],
)
def test_the_head_is_the_node_that_has_its_address(address: str, here: bool) -> None:
    assert network.is_here(Endpoint(address, 1), HERE) == here


@pytest.mark.parametrize(
    ("text", "head", "present", "way"),
    [
        ("n1", "127.0.1.1", {"lo": ["127.0.0.1"], "eth0": ["192.0.2.5"]}, "eth0"),
        ("n1:29400", "127.0.1.1", {"lo": ["127.0.0.1"], "eth0": ["192.0.2.5"], "eth1": ["2001:db8::5"]}, "eth0"),
        ("n1", "::1", {"lo": ["127.0.0.1", "::1"], "eth0": ["192.0.2.5"], "eth1": ["2001:db8::5"]}, "eth1"),
        ("n1", "127.0.1.1", HERE, None),
        ("n1", "192.0.2.5", {"lo": ["127.0.0.1"], "eth0": ["192.0.2.5"]}, None),
        ("127.0.0.1", "127.0.0.1", {"lo": ["127.0.0.1"], "eth0": ["192.0.2.5"]}, None),  # to the others too
    ],
)
def test_a_head_whose_own_name_means_the_loopback_takes_its_only_way_out(
    text: str, head: str, present: dict[str, list[str]], way: str | None
) -> None:
    assert network.way_out(text, Endpoint(head, 1), present) == way


def test_a_taken_port_is_refused_and_a_head_that_listens_is_found() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        head = Endpoint("127.0.0.1", other.getsockname()[1])
        with pytest.raises(InputError, match=f"port {head.port} of this node: Address already in use"):
            network.check_free(head)
        network.wait_for(head, 5)
    network.check_free(head)
    with pytest.raises(InputError, match=f"no answer from the head at 127.0.0.1:{head.port} in 1 s: Connection ref"):
        network.wait_for(head, 1)


@pytest.mark.parametrize(("text", "expected"), [("1", (1, 1)), ("4", (4, 4)), ("1:4", (1, 4)), ("2:2", (2, 2))])
def test_a_number_of_nodes_or_a_range(text: str, expected: tuple[int, int]) -> None:
    assert nodes.node_range(text) == expected


@pytest.mark.parametrize("text", ["0", "", "2:1", "0:2", "1:2:3", "two", "-1", "1:"])
def test_no_number_of_nodes(text: str) -> None:
    with pytest.raises(InputError, match=f"--nnodes={text} "):
        nodes.node_range(text)


@pytest.mark.parametrize(
    ("given", "number", "on_head", "rank"),
    [(None, 2, True, 0), (None, 2, False, 1), (None, 4, True, 0), (3, 4, False, 3), (0, 4, True, 0), (1, 2, True, 1)],
)
def test_static_node_ranks(given: int | None, number: int, on_head: bool, rank: int) -> None:
    assert nodes.static_rank(given, number, on_head=on_head) == rank


@pytest.mark.parametrize(
    ("given", "on_head", "words"),
    [
        (None, False, "--node-rank is missing: .* 1 to 3, another on each"),
        (4, False, "--node-rank=4 is not within 0 to 3"),
        (-1, True, "--node-rank=-1 is not within 0 to 3"),
        (0, False, "--node-rank=0 is the head's"),
    ],
)
def test_a_static_node_rank_that_cannot_be_is_refused(given: int | None, on_head: bool, words: str) -> None:
    with pytest.raises(InputError, match=words):
        nodes.static_rank(given, 4, on_head=on_head)


def test_options_that_do_not_go_together_are_refused() -> None:
    with pytest.raises(InputError, match="--node-rank=0 is for --rdzv=static"):
        nodes.check_rendezvous("c10d", 0, (2, 2))
    with pytest.raises(InputError, match="needs a fixed number of nodes, not 1:2"):
        nodes.check_rendezvous("static", 0, (1, 2))
    nodes.check_rendezvous("c10d", None, (1, 2))
    nodes.check_rendezvous("static", 1, (2, 2))


@pytest.mark.parametrize(
    ("batch", "wanted", "range_", "processes"),
    [(8, None, (1, 2), 4), (12, None, (1, 3), 2), (12, None, (2, 2), 3), (24, 8, (3, 3), 8), (4, None, (4, 4), 1)],
)
def test_processes_share_the_batch_at_every_number_of_nodes(
    make_config: MakeConfig,
    monkeypatch: pytest.MonkeyPatch,
    batch: int,
    wanted: int | None,
    range_: tuple[int, int],
    processes: int,
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    assert agent.processes_per_node(make_config("device=auto", f"batch_size={batch}"), wanted, range_) == processes


@pytest.mark.parametrize(
    ("words", "wanted", "range_", "misfits"),
    [
        (["batch_size=8"], 2, (1, 4), "8 samples .* evenly among 3 x 2 "),
        (["batch_size=8", "optim.accumulate=2"], 2, (1, 4), "4 samples .* evenly among 3 x 2, 4 x 2 "),
        (["batch_size=8"], None, (3, 3), "8 samples .* evenly among 3 x 1 "),
    ],
)
def test_numbers_of_nodes_that_cannot_share_the_batch_are_named(
    make_config: MakeConfig, words: list[str], wanted: int | None, range_: tuple[int, int], misfits: str
) -> None:
    with pytest.raises(InputError, match=misfits):
        agent.processes_per_node(make_config(*words), wanted, range_)


class TwoHosts:
    """Two network namespaces, joined by a veth pair."""

    numbers = count()

    def __init__(self) -> None:
        tag = f"mt{os.getpid()}n{next(self.numbers)}"
        self.names = [f"{tag}a", f"{tag}b"]
        self.running: list[subprocess.Popen[str]] = []

    def join(self) -> None:
        """Make them; raises CalledProcessError where that is not allowed."""
        a, b = self.names
        for name in self.names:
            _ip("netns", "add", name)
        _ip("link", "add", "veth0", "netns", a, "type", "veth", "peer", "name", "veth0", "netns", b)
        for name, address in ((a, HEAD), (b, OTHER)):
            _ip("-n", name, "addr", "add", f"{address}/24", "dev", "veth0")
            for device in ("lo", "veth0"):
                _ip("-n", name, "link", "set", device, "up")

    def start(self, host: int, *words: str) -> subprocess.Popen[str]:
        """``launch/nodes.py words...`` on a host."""
        inside = ["ip", "netns", "exec", self.names[host]]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        environment.pop("GLOO_SOCKET_IFNAME", None)  # these hosts have interfaces of their own
        process = subprocess.Popen([*inside, *LAUNCH, *words], env=environment, stderr=subprocess.PIPE, text=True)
        self.running.append(process)
        return process

    def remove(self) -> None:
        for process in self.running:
            process.kill()
            process.communicate()
        for name in self.names:
            subprocess.run(["ip", "netns", "delete", name], stderr=subprocess.DEVNULL, check=False)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[TwoHosts]:
    made = TwoHosts()
    try:
        if shutil.which("ip") is None:
            pytest.skip("no ip command: install iproute2")
        try:
            made.join()
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no network namespaces, which need root and CAP_NET_ADMIN: {error.stderr.strip()}")
        yield made
    finally:
        made.remove()
        kill_all(tmp_path / "run")


@pytest.fixture
def words(overrides: list[str], tmp_path: Path) -> list[str]:
    """CONFIG key=value... of a training of seconds."""
    config_file = tmp_path / "config.yaml"
    config_file.write_text("{}\n")
    return [str(config_file), *overrides, *SETTINGS]


@pytest.mark.slow
@pytest.mark.parametrize(("rdzv", "killed"), [("c10d", 1), ("static", 0)])
def test_two_hosts_train_as_one_with_two_processes_even_if_one_is_killed(
    hosts: TwoHosts, words: list[str], make_config: MakeConfig, tmp_path: Path, rdzv: str, killed: int
) -> None:
    command = [f"--head={HEAD}", "--nnodes=2", f"--rdzv={rdzv}", "--max-restarts=1", *words, "epochs=12"]
    other, head = hosts.start(1, *command), hosts.start(0, *command)
    wait_until(lambda: steps_done(tmp_path / "run") >= 3, head, other)
    os.kill(children((head, other)[killed].pid)[0], signal.SIGKILL)
    errors = [process.communicate(timeout=300)[1] for process in (head, other)]
    assert [head.returncode, other.returncode] == [0, 0], errors
    assert "ended with -9; starting all again, 1 of 1 restarts left" in errors[killed]

    whole = make_config(*SETTINGS, "epochs=12", f"run_dir={tmp_path / 'whole'}")
    on_two_ranks(train, whole)
    assert_same_state(final_state(tmp_path / "run"), final_state(whole.run_dir))
    assert [r["step"] for r in records(tmp_path / "run", "train")] == list(range(1, 37))


@pytest.mark.slow
def test_a_lost_host_is_done_without(hosts: TwoHosts, words: list[str], tmp_path: Path) -> None:
    command = [f"--head={HEAD}", "--nnodes=1:2", *words]
    head, other = hosts.start(0, *command, "epochs=1000000"), hosts.start(1, *command, "epochs=1000000")
    wait_until(lambda: steps_done(tmp_path / "run") >= 3, head, other)
    other.kill()  # and the kernel its process
    other.wait()
    before = steps_done(tmp_path / "run")
    wait_until(lambda: steps_done(tmp_path / "run") > before + 6, head)
    head.send_signal(signal.SIGTERM)
    _, errors = head.communicate(timeout=120)
    assert head.returncode == 75, errors
    assert "starting all again, 3 of 3 restarts left" in errors
    assert len(final_state(tmp_path / "run")["ranks"]) == 1
