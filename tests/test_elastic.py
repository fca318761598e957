"""Laws of lost processes and machines: the run continues by itself, and its result is the one without the loss."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import ROOT
from test_distributed import EXACT, PER_PROCESS, close

ARGUMENTS = (*EXACT, "--kimg=0.24", "--tick=0.016", "--snap=2")  # 30 steps, and a state every 4


class Host:
    """A machine made of a network namespace, which shares the file system with the others."""

    def __init__(self, name: str, address: str):
        self.name, self.address = name, address

    def torchrun(self, launcher: list[str], arguments: list[str]) -> subprocess.Popen:
        """Start torchrun with one process of train.py."""
        command = ["ip", "netns", "exec", self.name, sys.executable, "-m", "torch.distributed.run"]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "eth0"}
        train = [str(ROOT / "train.py"), *arguments]
        return subprocess.Popen([*command, f"--local-addr={self.address}", *launcher, *train], env=environment)

    def processes(self) -> list[int]:
        listed = subprocess.run(["ip", "netns", "pids", self.name], capture_output=True, text=True)
        return [int(pid) for pid in listed.stdout.split()]

    def kill(self, chosen: Callable[[str], bool] = lambda line: True) -> None:
        """Kill the processes whose command line is chosen."""
        for pid in self.processes():
            with contextlib.suppress(OSError):
                if chosen(Path(f"/proc/{pid}/cmdline").read_text()):
                    os.kill(pid, signal.SIGKILL)


@pytest.fixture
def hosts() -> Iterator[tuple[Host, Host]]:
    """Return two machines on one cable."""
    if os.geteuid() or not shutil.which("ip"):
        pytest.skip("network namespaces need root and the command ip")
    names = [f"creps-{os.getpid()}-{letter}" for letter in "ab"]
    first, second = pair = [Host(name, f"10.83.0.{i}") for i, name in enumerate(names, 1)]

    def ip(*arguments: str) -> None:
        done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"this system allows no network namespaces: {done.stderr.strip()}")

    try:
        for host in pair:
            ip("netns", "add", host.name)
        cable = ["type", "veth", "peer", "name", "eth0", "netns", second.name]
        ip("link", "add", "eth0", "netns", first.name, *cable)
        for host in pair:
            ip("-n", host.name, "address", "add", f"{host.address}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                ip("-n", host.name, "link", "set", device, "up")
        yield first, second
    finally:
        for host in pair:
            host.kill()
            subprocess.run(["ip", "netns", "delete", host.name], capture_output=True)


def wait_for_state(outdir: Path) -> None:
    until = time.monotonic() + 240
    while not list(outdir.glob("*/training-state-*.pt")):
        assert time.monotonic() < until
        time.sleep(0.02)


@pytest.mark.slow
def test_killed_processes_and_machines_cost_only_time(tiny, hosts):
    """With both kinds of rendezvous: one loses a process, which is replaced, the other one of two machines."""
    first, second = hosts
    static = ["--nnodes=2", "--max-restarts=2", f"--master-addr={first.address}", "--master-port=29511", "--node-rank"]
    c10d = ["--nnodes=1:2", "--max-restarts=2", "--rdzv-backend=c10d", f"--rdzv-endpoint={first.address}:29512"]
    conf = "last_call_timeout=5,keep_alive_interval=1,keep_alive_max_attempt=10"
    agents = [host.torchrun([*static, str(i)], tiny.new(*ARGUMENTS, outdir="static")) for i, host in enumerate(hosts)]
    for host in hosts:
        launcher = [*c10d, "--rdzv-id=7", f"--rdzv-conf={conf},is_host={int(host is first)}"]
        agents.append(host.torchrun(launcher, tiny.new(*ARGUMENTS, outdir="c10d")))
    wait_for_state(tiny.folder / "static")
    second.kill(lambda line: "static" in line and "distributed.run" not in line)
    wait_for_state(tiny.folder / "c10d")
    second.kill(lambda line: "c10d" in line)
    whole = tiny.run(*ARGUMENTS)
    assert [agent.wait(240) for agent in agents[:3]] == [0, 0, 0]
    for outdir in ("static", "c10d"):
        (folder,) = tiny.runs(outdir)
        close(whole, folder, without=PER_PROCESS)
