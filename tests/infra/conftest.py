"""Fixtures of the tests that start servers on the stand-in of tests/stand_in."""

import os
import signal
import sys
from pathlib import Path

import pytest
import tiny

import server as server_module
from processes import wait_for_end
from server import Command, Server
from serving import STAND_IN, load, want


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory):
    """The environment of the stand-in, with short deadlines.

    → list of (Server, process group) for every start in this module.
    """
    folder, groups, start = tmp_path_factory.mktemp("stand_in"), [], Server._start

    def recorded(server):
        start(server)
        groups.append((server, server.process.pid))
        assert sum(known is server for known, _ in groups) < 12, "this server restarts forever"

    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"STAND_IN": folder / "faults.json",
                            "STAND_IN_LOG": folder / "requests.jsonl",
                            "STAND_IN_PYTHON": sys.executable, "OMP_NUM_THREADS": 1}.items():
            patch.setenv(name, str(value))
        patch.delenv("VLLM_API_KEY", raising=False)
        patch.setattr(server_module, "START_SECONDS", 240)
        patch.setattr(server_module, "STALL_SECONDS", 30)
        patch.setattr(Server, "_start", recorded)
        yield groups


@pytest.fixture
def clean(stand_in):
    """Starts a test without faults and ends it after 250 s at most.

    After the test, no process may be left of a server that was closed or restarted.
    """
    def late(*_):
        raise TimeoutError("this test hangs")

    want()
    Path(os.environ["STAND_IN_LOG"]).write_text("")
    handler = signal.signal(signal.SIGALRM, late)
    signal.alarm(250)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, handler)
    want()
    for server, group in stand_in:
        assert server.process and server.process.pid == group or wait_for_end(group)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a tiny model and eight questions, one of them with two clips.

    Some completions end before max_new_tokens. The model gives placeholders almost no probability,
    so that banning them does not change the log-probs of other tokens.
    """
    seconds = ((0.7,), (1.3, 0.4), (0.25,), (1.0043,), (1.0,), (0.5,), (2.1,), (0.9,))
    return tiny.write_world(tmp_path_factory.mktemp("world"), tiny.qwen3_omni_that_ends(0.25),
                            seconds)


@pytest.fixture(scope="module")
def base(world):
    """Policy and prompts, for tests that do not change them."""
    return load(world)


@pytest.fixture(scope="module")
def served(world, tmp_path_factory, stand_in):
    """A server with the weights of `base`. No test pushes to it or ends it."""
    log = tmp_path_factory.mktemp("served") / "vllm.log"
    command = Command(python=STAND_IN, log=log, clips=2, flags="--seed 3 --no-such-flag 'a b'")
    with Server(world / "model", command) as server:
        yield server
        group = server.process.pid
    assert wait_for_end(group)


@pytest.fixture(scope="module")
def victim(world, tmp_path_factory, stand_in):
    """A server for pushes and faults. Each test pushes its own weights, and leaves it working."""
    log = tmp_path_factory.mktemp("victim") / "vllm.log"
    with Server(world / "model", Command(python=STAND_IN, log=log, clips=2)) as server:
        yield server
        group = server.process.pid
    assert wait_for_end(group)


@pytest.fixture
def light(world, tmp_path, stand_in):
    """light() → a Server of the stand-in's that starts at once and has no model."""
    def make(flags="", sequences=0, **more):
        want(light=True)
        return Server(world / "model", Command(python=STAND_IN, log=tmp_path / "vllm.log",
                                               flags=flags, sequences=sequences), **more)
    return make
