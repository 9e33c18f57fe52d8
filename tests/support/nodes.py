"""Two machines, as far as torch can tell: network namespaces with names and addresses of their own,
and a cable between them. Needs root on Linux."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.runs import ROOT

ADDRESSES = {"node7": "10.213.0.7", "node8": "10.213.0.8"}
FIRST, SECOND = ADDRESSES

# Inside a namespace: the machine's name, everybody's addresses, and, if asked for, a disk that the
# other one does not see.
ENTER = """
hostname "$1"
mount --bind "$2" /etc/hosts
if [[ -n $3 ]]; then mount -t tmpfs tmpfs "$3"; fi
shift 3
exec "$@"
"""


class Nodes:
    """Made by `two_nodes`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.hosts = directory / "hosts"
        lines = [f"{address} {name}\n" for name, address in ADDRESSES.items()]
        self.hosts.write_text("".join(["127.0.0.1 localhost\n", *lines]))
        self.running: list[subprocess.Popen] = []

    def namespace(self, node: str) -> str:
        return f"oprd-{os.getpid()}-{node}"

    def cable(self, node: str) -> str:
        return f"{node}-{os.getpid()}"

    def plug(self, node: str, state: str) -> None:
        """``up`` or ``down``."""
        ip("-n", self.namespace(node), "link", "set", self.cable(node), state)

    def torchrun(self, ranks: int, *arguments: str, private: Path | None = None) -> list[Path]:
        """Begin the same program on both, with so many ranks each; returns where they write what
        they say.

        Args:
            private: an empty directory of which the second has another one.
        """
        program = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--rdzv-id=1"]
        program += [f"--nproc-per-node={ranks}", "--rdzv-backend=c10d"]
        program += [f"--rdzv-endpoint={FIRST}:29400", *arguments]
        said = []
        for node in ADDRESSES:
            disk = str(private) if private is not None and node == SECOND else ""
            enter = ["ip", "netns", "exec", self.namespace(node), "unshare", "--uts", "--mount"]
            enter += ["bash", "-euc", ENTER, "bash", node, str(self.hosts), disk]
            said.append(self.directory / f"{node}.log")
            with said[-1].open("w") as log:
                self.running.append(
                    subprocess.Popen(
                        enter + program, stdout=log, stderr=log, cwd=ROOT,
                        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
                    )
                )  # fmt: skip
        return said

    def wait(self, timeout: float = 300) -> list[int]:
        """Until both have ended; their exit codes."""
        codes = [process.wait(timeout) for process in self.running]
        self.running.clear()
        return codes


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


def possible() -> bool:
    """Whether this process may make namespaces."""
    if os.geteuid() != 0 or not (shutil.which("ip") and shutil.which("unshare")):
        return False
    name = f"oprd-{os.getpid()}"
    steps = [
        f"ip netns add {name}", "ip link add oprd0 type veth peer name oprd1",
        "mount -t tmpfs tmpfs /mnt", "mount --bind /etc/hosts /etc/hosts",
        f"ip netns exec {name} true",
    ]  # fmt: skip
    probe = ["unshare", "--net", "--uts", "--mount", "bash", "-c", " && ".join(steps)]
    made = subprocess.run(probe, capture_output=True).returncode == 0
    subprocess.run(["ip", "netns", "del", name], capture_output=True)
    return made


@contextmanager
def two_nodes(directory: Path) -> Iterator[Nodes]:
    """While open, `FIRST` and `SECOND` are there."""
    nodes = Nodes(directory)
    try:
        for node in ADDRESSES:
            ip("netns", "add", nodes.namespace(node))
        a, b = (nodes.cable(node) for node in ADDRESSES)
        ip("-n", nodes.namespace(FIRST), "link", "add", a, "type", "veth", "peer", "name", b,
           "netns", nodes.namespace(SECOND))  # fmt: skip
        for node, address in ADDRESSES.items():
            ip(
                "-n",
                nodes.namespace(node),
                "addr",
                "add",
                f"{address}/24",
                "dev",
                nodes.cable(node),
            )
            ip("-n", nodes.namespace(node), "link", "set", "lo", "up")
            nodes.plug(node, "up")
        yield nodes
    finally:
        for process in nodes.running:
            process.kill()
        for node in ADDRESSES:
            name = nodes.namespace(node)
            pids = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True)
            subprocess.run(["kill", "-9", *pids.stdout.split()], capture_output=True)
            subprocess.run(["ip", "netns", "del", name], capture_output=True)
