"""train.py with a vLLM server for the rollouts, and with one for the checker.

The server is the stand-in, see serving.py.
"""

import math
import os
import re
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny

import run as run_module
import server as server_module
import train
from checkpoint import load_policy
from config import read_config
from data import read_questions
from distributed import Team
from metrics import held_out_accuracy
from processes import wait_for_end
from rewards import check_consistency
from rollout import push_weights
from run import Run, open_servers
from server import Command, RolloutError, Server
from serving import (DEVELOPMENT_PATHS, STAND_IN, ask, ask_for, count_groups, load, requests,
                     want)
from tiny import lines

pytestmark = pytest.mark.usefixtures("clean")

BARK = "<think>It barks.</think> a dog"


def arguments(world, out, *more):
    """Flags of a short run on the stand-in: 2 steps per generation batch, of 4 groups of 4."""
    flags = {"micro_batch_size": 8, "max_new_tokens": 8, "learning_rate": 5e-3, "warmup_ratio": 0,
             "rollout": "vllm", "vllm_python": STAND_IN, "check_push_every": 1,
             "max_push_gap": 1e-4}
    given = [x for name, value in flags.items() for x in (f"--{name}", value)]
    return tiny.arguments(world, out, *given, *more)


# ──────── the checker ────────


def test_the_checkers_server(world, light, tmp_path, monkeypatch, stand_in):
    """It answers under its name, and has no endpoints for weights.

    It may die in every batch as long as verdicts arrive in between; DEATHS deaths in a row are a
    RolloutError.
    """
    monkeypatch.setattr("rewards.FIRST_WAIT", 0.01)
    monkeypatch.setattr(server_module, "DEATHS", 2)
    config = read_config(arguments(world, tmp_path / "out", "--checker", world / "model"))
    texts = [BARK, "no form", "<think>It rings.</think> a bell"]
    before = len(stand_in)
    with light(weights_change=False, name=config.checker_model) as checker:
        for batch in range(3):
            want(light=True, say="NO" if batch == 1 else "Yes.")
            expected = [0, 0, 0] if batch == 1 else [1, 0, 1]
            assert check_consistency(texts, config, checker) == expected
            assert {ask(checker, path).status_code for path in DEVELOPMENT_PATHS} == {404}
            os.kill(checker.process.pid, signal.SIGKILL)
        assert len(stand_in) == before + 3
        want(light=True, die_after=0)
        with pytest.raises(RolloutError, match="2 in a row"):
            check_consistency(texts, config, checker)


@pytest.mark.slow
def test_our_own_servers_bypass_a_proxy(world, base, light, tmp_path, monkeypatch):
    """http_proxy names a port where nothing listens: requests through it would fail."""
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    command = Command(python=STAND_IN, log=tmp_path / "log", clips=2)
    with Server(world / "model", command) as server:
        ask_for(*base, server)
        push_weights(server, base[0], tmp_path / "weights", 1)
        ask_for(*base, server)
    config = read_config(arguments(world, tmp_path / "out", "--checker", world / "model"))
    with light(weights_change=False, name=config.checker_model) as checker:
        assert check_consistency([BARK], config, checker) == [1]


@pytest.mark.slow
def test_the_checker_starts_after_the_rollout_server(world, base, tmp_path, monkeypatch, stand_in):
    """They share GPUs. If both started at the same time, each would count the memory that the other
    allocates against its own share."""
    config = read_config(arguments(world, tmp_path, "--checker", world / "model"))
    before, ready, start = len(stand_in), [], Server._start

    def started(server):
        ready.append([other.ready for other, _ in stand_in[before:]])
        start(server)

    monkeypatch.setattr(Server, "_start", started)
    want(say="YES")
    with open_servers(config, base[0], read_questions(config.data), Team()) as (server, checker):
        ask_for(*base, server)
        assert check_consistency([BARK], config, checker) == [1]
    assert ready == [[], [True]]


def test_the_server_takes_a_whole_batch(world, base, tmp_path, monkeypatch):
    """As many questions in flight as a generation batch has, and as many completions in vLLM."""
    want(light=True)
    config = read_config(arguments(world, tmp_path, "--generation_batch_size", 48))  # groups of 4
    questions = read_questions(config.data)
    with open_servers(config, base[0], questions, Team()) as (server, _):
        server.wait()
        words = Path(f"/proc/{server.process.pid}/cmdline").read_text().split("\0")
        assert words[words.index("--max-num-seqs") + 1] == "48" and server.in_flight == 12
        monkeypatch.setenv("VLLM_API_KEY", server.key)
        config = replace(config, vllm_url=server.url)
        with open_servers(config, base[0], questions, Team()) as (there, _):
            assert there.in_flight == 12


def test_the_ranks_wait_until_a_push_is_loaded(monkeypatch):
    """In gloo: NCCL's time-out is shorter than a push may take."""
    order = []
    monkeypatch.setattr(run_module, "push_weights", lambda *_: order.append("pushed"))
    team = SimpleNamespace(leads=True, broadcast=lambda value: value,
                           gather=lambda value: order.append("all here"))
    config = SimpleNamespace(rollout="vllm", output_dir="out", check_push_every=10)
    run = SimpleNamespace(config=config, team=team, policy=None, server=SimpleNamespace(version=0),
                          steps_done=2, checks=2)
    run_module.update_server(run, 1, [])
    assert order == ["pushed", "all here"]


# ──────── runs ────────


@pytest.fixture
def some_reward(monkeypatch):
    """A reward that depends on the text alone, so that groups have advantages.

    The random model never answers in the right format.
    """
    monkeypatch.setattr(train, "accuracy_reward", lambda text, *_: float(len(text) % 2))


def check_run(out, versions):
    """What every run on a server must have written. → its metrics"""
    metrics, records = lines(out / "metrics.jsonl"), lines(out / "completions.jsonl")
    assert [m["weight_version"] for m in metrics] == versions
    assert [r["weight_version"] for r in records] == [v for v in versions for _ in range(8)]
    for m in metrics:
        assert all(math.isfinite(v) for v in m.values() if v is not None)
        assert 0 <= m["wait_fraction"] <= 1 and m["grad_norm"] > 1e-4 and m["seconds_push"] >= 0
        fresh = m["weight_version"] == (m["step"] - 1) // 2 * 2
        assert (m["sampler_gap"] < 1e-5) == fresh and (m["importance_ess"] > 1 - 1e-6) == fresh
        begins = m["step"] % 2 == 1
        assert (m["generation_tokens_per_second"] is not None) == begins
    assert all(m["generation_tokens_per_second"] > 0 for m in metrics[::2])
    assert all(m["seconds_generate"] > 0 for m in metrics[::2])
    groups = [records[i:i + 4] for i in range(0, len(records), 4)]
    assert len(groups) == 2 * len(metrics)
    assert all(len({r["prompt_id"] for r in group}) == 1 for group in groups)
    epoch = groups[:8]
    assert len({group[0]["prompt_id"] for group in epoch}) == len(epoch)
    assert all(len({tuple(r["token_ids"]) for r in group}) > 1 for group in groups)
    return metrics


def test_train(world, tmp_path, some_reward, stand_in):
    """Synchronous: every batch is sampled with the weights that its training starts from.

    The evaluation on the server equals that of the checkpoint in this process. When the run ends,
    the server and the pushed weights are gone.
    """
    before, out = len(stand_in), tmp_path / "out"
    assert train.main(arguments(world, out, "--eval_data", world / "train.jsonl")) == 0
    metrics = check_run(out, [0, 0, 2, 2])
    assert metrics[0]["seconds_push"] > 0 and metrics[2]["seconds_push"] > 0
    assert metrics[1]["seconds_push"] == 0
    pushes = [r["path"] for r in requests()].count("/collective_rpc")
    assert pushes == 2  # versions 2 and 4, the last for the evaluation; the server has version 0
    policy = load_policy(out / "checkpoint")
    config = replace(read_config(arguments(world, out)), rollout="local")
    run = Run(config, Team(), policy, None, [], read_questions(world / "train.jsonl"))
    here = held_out_accuracy(run, 4)
    assert lines(out / "evaluation.jsonl")[1] == here
    assert len(stand_in) == before + 1 and wait_for_end(stand_in[-1][1], 2)
    assert not (out / "weights").exists()


@pytest.mark.slow
def test_train_async(world, tmp_path, monkeypatch, some_reward, stand_in):
    """From the second on, batches are exactly one push old.

    The server is killed while it samples the second batch and the first one trains. The run is what
    it would have been without that.
    """
    before = len(stand_in)
    seen = count_groups(monkeypatch, 4 + 4 + 2, lambda: os.kill(stand_in[-1][1], signal.SIGKILL))
    out = tmp_path / "out"
    assert train.main(arguments(world, out, "--max_steps", 6, "--async_rollouts", "true")) == 0
    check_run(out, [0, 0, 0, 0, 2, 2])
    assert len(stand_in) == before + 2
    assert seen.total() == 3 * 4 + 2 * 4  # three batches, and a check at the start and at the push


def test_train_on_a_server_at_a_url(world, tmp_path, victim, monkeypatch, some_reward):
    """The run first pushes version 0, as it does not know what the server has.

    The server outlives the run.
    """
    victim.wait()
    monkeypatch.setenv("VLLM_API_KEY", victim.key)
    group, out = victim.process.pid, tmp_path / "out"
    more = ("--vllm_url", victim.url, "--vllm_python", "nowhere", "--max_steps", 2)
    assert train.main(arguments(world, out, *more)) == 0
    check_run(out, [0, 0])
    assert [r["path"] for r in requests()].count("/collective_rpc") == 1
    assert victim.process.pid == group and victim.process.poll() is None


def test_train_on_a_server_that_does_not_start(world, tmp_path, capsys, stand_in):
    """Exit code 1, an error that quotes the server's, and no process is left."""
    want(die_at_start="CUDA out of memory")
    assert train.main(arguments(world, tmp_path / "out")) == 1
    error = capsys.readouterr().err.strip().splitlines()
    at = next(i for i, line in enumerate(error) if line.startswith("error: "))
    assert "the vLLM server at http://127.0.0.1:" in error[at]
    assert "RuntimeError: CUDA out of memory" in error[at + 1]
    assert wait_for_end(stand_in[-1][1], 1)


def test_train_stops_on_old_weights(world, victim, tmp_path, monkeypatch, capsys, some_reward):
    """A server that ignores a push ends the run at once, with exit code 1."""
    push_weights(victim, load(world, change=10)[0], tmp_path, 1)
    monkeypatch.setenv("VLLM_API_KEY", victim.key)
    want(ignore_push=True)
    assert train.main(arguments(world, tmp_path / "out", "--vllm_url", victim.url)) == 1
    assert re.search(r"error: weights of version 0: .*nats per token from the trainer's",
                     capsys.readouterr().err)
    assert not lines(tmp_path / "out" / "metrics.jsonl")


BAD_INPUT = {
    "no interpreter": (["--vllm_python", "nowhere/bin/python"],
                       "vllm_python .*/nowhere/bin/python: no such"),
    "async in this process": (["--rollout", "local", "--async_rollouts", "true"],
                              "async_rollouts needs rollout vllm"),
    "never checked": (["--check_push_every", "0"], "check_push_every is 0"),
    "gap of zero": (["--max_push_gap", "0"], "max_push_gap is 0"),
    "another place": (["--rollout", "cloud"], "rollout is 'cloud'"),
    "not a url": (["--vllm_url", "127.0.0.1:8000"], "vllm_url is '127.0.0.1:8000'"),
    "no key": (["--vllm_url", "http://10.0.0.1:8000"], "VLLM_API_KEY"),
}


@pytest.mark.parametrize("more, message", BAD_INPUT.values(), ids=BAD_INPUT)
def test_bad_input(world, tmp_path, capsys, more, message):
    """One line on stderr, exit code 2, nothing written, nothing started."""
    out = tmp_path / "out"
    assert train.main(arguments(world, out, *more)) == 2
    error = capsys.readouterr().err.strip()
    assert "\n" not in error and error.startswith("error: ") and re.search(message, error), error
    assert not out.exists() and not requests()
