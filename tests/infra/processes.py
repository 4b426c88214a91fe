"""Starting jobs of several processes, and finding the processes that are left over."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

CLEAN = {name: value for name, value in os.environ.items()
         if name not in ("FAULT", "FAULT_RANK", "HELD", "RANK", "WORLD_SIZE", "VLLM_API_KEY")}


def members(group):
    """Process ids of a process group. Zombies, which have ended, do not count."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[2]) == group and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


def processes_of(folder):
    """Process ids of those whose command line names a folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if str(folder).encode() in path.read_bytes():
                found.append(int(path.parent.name))
    return found


def wait_for_end(group, seconds=20):
    """True if no process of the group is left within these seconds."""
    return _none_left(lambda: members(group), seconds)


def gone(folder, seconds=10):
    """True if no process whose command line names the folder is left within these seconds."""
    return _none_left(lambda: processes_of(folder), seconds)


def _none_left(find, seconds):
    until = time.monotonic() + seconds
    while find() and time.monotonic() < until:
        time.sleep(0.1)
    return not find()


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Job:
    """torchrun's agents, one per node, all on this machine. command: a script and its flags."""

    def __init__(self, folder, command, ranks, nodes, environment):
        port = free_port()
        environment = {**CLEAN, "OMP_NUM_THREADS": "1",
                       **{name: str(value) for name, value in environment.items()}}
        folder.mkdir(parents=True, exist_ok=True)
        self.outputs = [folder / f"agent-{port}-{node}" for node in range(nodes)]
        self.agents = []
        for node, output in enumerate(self.outputs):
            words = [sys.executable, "-m", "torch.distributed.run", "--nnodes", nodes,
                     "--nproc-per-node", ranks // nodes, "--node-rank", node,
                     "--master-addr", "127.0.0.1", "--master-port", port, *command]
            self.agents.append(subprocess.Popen(
                list(map(str, words)), env=environment, start_new_session=True, cwd=folder,
                stdout=output.open("w"), stderr=subprocess.STDOUT))

    @property
    def output(self):
        return "\n".join(output.read_text(errors="replace") for output in self.outputs)

    def wait(self, seconds=200):
        """→ exit codes of the agents"""
        until = time.monotonic() + seconds
        return [agent.wait(max(0.1, until - time.monotonic())) for agent in self.agents]


@contextlib.contextmanager
def torchrun(folder, command, ranks, nodes=1, **environment):
    """A Job that ends with the block. The agents' outputs are in `folder`.

    The flags of `command` must name a path in `folder`: its processes are found by that.
    """
    job = Job(folder, command, ranks, nodes, environment)
    try:
        yield job
    finally:
        for agent in job.agents:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(agent.pid, signal.SIGKILL)
            agent.wait()
        for process in processes_of(folder):  # the workers have sessions of their own
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
