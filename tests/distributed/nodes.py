"""Two nodes on one machine: network namespaces with addresses and host names of their own, joined by a cable."""

import os
import shutil
import signal
import subprocess
from contextlib import suppress
from pathlib import Path

ADDRESSES = ("10.77.31.1", "10.77.31.2")
INTERFACE = "veth0"


def why_not():
    """Why there can be no namespaces here; None where there can."""
    if shutil.which("ip") is None or shutil.which("unshare") is None:
        return "needs ip (iproute2) and unshare (util-linux)"
    name = f"sigmoe-{os.getpid()}-try"
    tried = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    if tried.returncode:
        return f"network namespaces cannot be made: {tried.stderr.strip()}"
    subprocess.run(["ip", "netns", "del", name], check=True)
    return None


class Nodes:
    """Nodes 0 and 1, while the `with` block lasts; what still runs on them at its end is killed."""

    def __init__(self):
        self.names = [f"sigmoe-{os.getpid()}-{node}" for node in range(2)]

    def __enter__(self):
        for name in self.names:
            _ip("netns", "add", name)
        ends = [["name", INTERFACE, "netns", name] for name in self.names]
        _ip("link", "add", *ends[0], "type", "veth", "peer", *ends[1])
        for name, address in zip(self.names, ADDRESSES):
            _ip("-n", name, "addr", "add", f"{address}/24", "dev", INTERFACE)
            _ip("-n", name, "link", "set", INTERFACE, "up")
            _ip("-n", name, "link", "set", "lo", "up")
        return self

    def __exit__(self, *_):
        for node, name in enumerate(self.names):
            self.kill(node)
            _ip("netns", "del", name)

    def command(self, node, *words):
        """The command that runs `words` on a node, which is called node-0 or node-1 there."""
        inside = ["unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"', f"node-{node}", *words]
        return ["ip", "netns", "exec", self.names[node], "env", f"GLOO_SOCKET_IFNAME={INTERFACE}", *inside]

    def kill(self, node, *, rank=None):
        """Kill everything that runs on a node, or the one process that torchrun made this rank."""
        told = subprocess.run(["ip", "netns", "pids", self.names[node]], capture_output=True, text=True, check=True)
        for pid in map(int, told.stdout.split()):
            with suppress(OSError):  # it has ended
                if rank is None or f"RANK={rank}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                    os.kill(pid, signal.SIGKILL)

    def cut_off(self, *, plugged=False):
        """Pull the cable out, or plug it in again."""
        _ip("-n", self.names[1], "link", "set", INTERFACE, "up" if plugged else "down")

    def write_agent(self, path):
        """Write a program that takes ssh's place for mpirun: `agent ADDRESS COMMAND...`."""
        cases = [
            f'{address}) exec {" ".join(map(_quoted, self.command(node, "sh", "-c")))} "$*" ;;'
            for node, address in enumerate(ADDRESSES)
        ]
        path.write_text("\n".join(["#!/bin/sh", "host=$1; shift", 'case "$host" in', *cases, "esac", "exit 1", ""]))
        path.chmod(0o755)


def _quoted(word):
    return "'" + word.replace("'", "'\\''") + "'"


def _ip(*words):
    subprocess.run(["ip", *words], check=True)
