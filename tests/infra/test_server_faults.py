"""Servers that die, hang or do not start, and what is left of them when the trainer ends.

The server is the stand-in, see serving.py.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import server as server_module
from processes import members, wait_for_end
from rollout import push_weights
from server import Command, RolloutError, Server
from serving import ROOT, STAND_IN, ask, ask_for, count_groups, gap, load, want

pytestmark = pytest.mark.usefixtures("clean")


# ──────── deaths ────────


def end_by_itself(server):
    want(die_after=0, once=True)


def hang(server):
    want(hang="chat", once=True)


def stop(server):
    os.kill(server.process.pid, signal.SIGSTOP)


@pytest.mark.parametrize("fault", [
    hang, *(pytest.param(fault, marks=pytest.mark.slow) for fault in (end_by_itself, stop))])
def test_death_in_the_middle_of_a_batch(world, victim, tmp_path, monkeypatch, fault):
    """After the third group, the server ends, hangs, or is stopped.

    The batch is complete, with every group exactly once, and equals one without a fault: the new
    server has the weights that were pushed to the old one.
    """
    monkeypatch.setattr(server_module, "STALL_SECONDS", 3)
    monkeypatch.setattr(victim, "in_flight", 2)
    policy, prompts = load(world, change=5)
    push_weights(victim, policy, tmp_path, 21)
    before = ask_for(policy, prompts, victim, seed=3)
    group = victim.process.pid
    seen = count_groups(monkeypatch, 3, lambda: fault(victim))
    assert ask_for(policy, prompts, victim, seed=3) == before
    assert set(seen.values()) == {1} and len(seen) == 6
    assert victim.process.pid != group and wait_for_end(group)
    assert gap(policy, prompts, before) < 1e-5 and victim.deaths == 0
    assert ask(victim, "/weight_info").json() == {"weight_version": "21"}


def test_death_during_a_push(world, victim, tmp_path):
    """The new server starts on the new weights."""
    policy, prompts = load(world, change=6)
    victim.wait()
    group = victim.process.pid
    want(die_on_push=True, once=True)
    push_weights(victim, policy, tmp_path, 31)
    assert [f.name for f in tmp_path.iterdir()] == ["version-31"]
    completions = ask_for(policy, prompts, victim)
    assert gap(policy, prompts, completions) < 1e-5 and len(completions) == 18
    assert victim.process.pid != group and victim.deaths == 0
    assert ask(victim, "/weight_info").json() == {"weight_version": "31"}


def test_a_push_that_ends_the_engine(light, base, tmp_path, stand_in):
    """HTTP 500 and then the end of the process, as from vLLM: that is a death, not a refusal."""
    before = len(stand_in)
    with light() as server:
        server.wait()
        want(light=True, die_on_push="late")
        push_weights(server, base[0], tmp_path / "weights", 31)
        server.wait()
        assert ask(server, "/weight_info").json() == {"weight_version": "31"}
    assert len(stand_in) == before + 2


@pytest.mark.parametrize("guard", [False, True], ids=["the server", "the server and its guard"])
def test_a_push_to_a_dead_server(light, base, tmp_path, stand_in, guard):
    """It restarts the server on the new weights, also when the whole process group is gone.

    Leaving the block works as well when the server is dead.
    """
    before = len(stand_in)
    with light() as server:
        for version in (31, None):
            server.wait()
            (os.killpg if guard else os.kill)(server.process.pid, signal.SIGKILL)
            with contextlib.suppress(ProcessLookupError):
                while server.process.wait() and guard:  # until the group has no zombie either
                    os.killpg(server.process.pid, 0)
                    time.sleep(0.05)
            if version:
                push_weights(server, base[0], tmp_path / "weights", version)
                server.wait()
                assert ask(server, "/weight_info").json() == {"weight_version": str(version)}
                words = Path(f"/proc/{server.process.pid}/cmdline").read_text().split("\0")
                folder = words[words.index("--model") + 1]
                assert folder == str(tmp_path / "weights" / f"version-{version}")
    assert len(stand_in) == before + 2


@pytest.mark.parametrize("faults, what", [
    (dict(light=True, die_after=0), "3 in a row"),
    (dict(die_after=0, die_at_start="out of memory"),
     "ended with status 1 before it was ready, 3 in a row"),
    (dict(die_on_push=True, die_at_start="out of memory"), "3 in a row")],
    ids=["at the first question", "at the restart", "during pushes"])
def test_three_deaths_in_a_row(light, base, tmp_path, stand_in, faults, what):
    """They end the run. The error has the last lines of the log, and no process is left."""
    before, policy = len(stand_in), base[0]
    with pytest.raises(RolloutError) as error:
        with light() as server:
            server.wait()
            want(**faults)
            if "die_on_push" in faults:
                for version in (1, 2, 3, 4):
                    push_weights(server, policy, tmp_path / "weights", version)
            ask_for(*base, server)
    first, *rest = str(error.value).splitlines()
    assert what in first and len(rest) <= 11
    assert "die_at_start" not in faults or "RuntimeError: out of memory" in rest[0]
    assert len(stand_in) - before == server_module.DEATHS
    for _, group in stand_in[before:]:
        assert wait_for_end(group, 2)


def test_a_first_start_that_fails(world, base, tmp_path, stand_in):
    """An error at once, with the lines of the log: another start would not help."""
    shutil.copytree(world / "model", tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    before = len(stand_in)
    with pytest.raises(RolloutError) as error:
        with Server(tmp_path / "model", Command(python=STAND_IN, log=tmp_path / "log")) as server:
            ask_for(*base, server)
    first, *rest = str(error.value).splitlines()
    assert "ended with status 1 before it was ready" in first
    assert rest[0] == rest[-1] == f"FileNotFoundError: {tmp_path / 'model'}: no weights"
    assert len(stand_in) == before + 1


def test_a_server_that_never_answers(base, world, monkeypatch):
    """The error says how long we have waited."""
    monkeypatch.setattr(server_module, "START_SECONDS", 0.2)
    with Server(world / "model", url="http://127.0.0.1:9") as server:
        with pytest.raises(RolloutError, match="the vLLM server at http://127.0.0.1:9 was not "
                                               "healthy after 0.2 s"):
            ask_for(*base, server)


def test_errors_quote_the_log_of_the_last_start(world, base, tmp_path):
    """The log has the output of all starts of this run, the error only that of the last one."""
    log = tmp_path / "log"
    log.write_text("OldError: of another run\n")
    want(die_at_start="the first")
    with pytest.raises(RolloutError) as error:
        with Server(world / "model", Command(python=STAND_IN, log=log)) as server:
            server.process.wait()
            want(die_at_start="the second")
            server.deaths = 1
            ask_for(*base, server)
    assert "RuntimeError: the second" in str(error.value) and "the first" not in str(error.value)
    assert "RuntimeError: the first" in log.read_text() and "OldError" not in log.read_text()


def test_a_server_at_a_url_that_dies(light, world, base, tmp_path, monkeypatch, stand_in):
    """We cannot restart it: its death is an error, in a batch, before one, and at a push.

    If its owner restarts it, it has the wrong weights, and that is an error too.
    """
    monkeypatch.setattr(server_module, "ATTEMPTS", 2)
    with light() as own:
        own.wait()
        monkeypatch.setenv("VLLM_API_KEY", own.key)
        with Server(world / "model", url=own.url) as there:
            push_weights(there, base[0], tmp_path / "weights", 7)
            own.recover("is restarted by its owner")
            own.wait()
            there.url = own.url  # a real owner would keep the port
            with pytest.raises(RolloutError, match="holds weights of version 0, but 7 was pushed; "
                                                   "was it restarted"):
                ask_for(*base, there)
            push_weights(there, base[0], tmp_path / "weights", 8)
            starts = len(stand_in)
            want(die_after=0)
            with pytest.raises(RolloutError,
                               match="at http://127.0.0.1:.* gave no answer in 2 attempts"):
                ask_for(*base, there)
            with pytest.raises(RolloutError, match="at http://127.0.0.1:"):
                ask_for(*base, there)
            with pytest.raises(RolloutError, match="during a push"):
                push_weights(there, base[0], tmp_path / "weights", 9)
            assert len(stand_in) == starts


# ──────── the end ────────


@pytest.mark.parametrize("loading", [False, True], ids=["ready", "loading"])
def test_an_exception_ends_the_server(world, tmp_path, loading):
    """The whole process group ends with the block, also while the server is still loading."""
    want(light=not loading)
    with pytest.raises(KeyError):
        with Server(world / "model", Command(python=STAND_IN, log=tmp_path / "log")) as server:
            group = server.process.pid
            if not loading:
                server.wait()
            while len(members(group)) < 2:
                time.sleep(0.02)
            raise KeyError("a bug")
    assert wait_for_end(group, 2) and server.process is None


TRAINERS = """
import os, signal, sys, time
from pathlib import Path
from server import Command, Server
signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs ignore it
folder, python, *ways = sys.argv[1:]
for way in ways:
    if os.fork() == 0:
        with Server(folder, Command(python=python, log=way + ".log")) as server, \\
                Server(folder, Command(python=python, log=way + ".checker.log"),
                       weights_change=False) as checker:
            server.wait()
            checker.wait()
            Path(way + ".new").write_text(
                f"{os.getpid()} {server.process.pid} {checker.process.pid}")
            Path(way + ".new").rename(way)
            time.sleep(600)
for _ in ways:
    os.wait()
"""


def test_the_trainer_ends(world, tmp_path):
    """Killed or interrupted: no process of its two servers is left."""
    ways = ("SIGKILL", "SIGINT")
    want(light=True)
    trainers = subprocess.Popen(
        [sys.executable, "-c", TRAINERS, world / "model", STAND_IN, *ways], cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 60
    while not all((tmp_path / way).is_file() for way in ways):
        assert trainers.poll() is None and time.monotonic() < until
        time.sleep(0.05)
    pids = [list(map(int, (tmp_path / way).read_text().split())) for way in ways]
    groups = [group for _, *both in pids for group in both]
    assert len(groups) == 4 and all(members(group) for group in groups)
    for way, (trainer, *_) in zip(ways, pids):
        os.kill(trainer, getattr(signal, way))
    trainers.wait(30)
    assert all(wait_for_end(group) for group in groups)


def test_closing_ends_a_waiting_thread(world, base, tmp_path):
    """A thread that waits for a server that is still loading ends soon after the block."""
    ended = []

    def wait_for_completions():
        with pytest.raises(RolloutError):
            ask_for(*base, server)
        ended.append(True)

    command = Command(python=STAND_IN, log=tmp_path / "log", clips=2)
    with Server(world / "model", command) as server:
        thread = threading.Thread(target=wait_for_completions, daemon=True)
        thread.start()
        time.sleep(0.7)
    thread.join(8)
    assert ended
