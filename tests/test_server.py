"""rollout.Server, push_weights, check_push and train.py on a vLLM server: what goes over the wire, and what is left
after faults. The server is the stand-in of tests/stand_in, a policy in a process of its own; see its faults there."""

import asyncio
import base64
import contextlib
import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import httpx
import numpy as np
import pytest
import soundfile
import tiny
import torch

import model
import rollout
import train
import vllm_worker
from data import InputError, Question, conversation, read_questions
from processes import members, wait_for_end
from rollout import RolloutError, Server, check_push, push_weights, sample
from tiny import lines

ROOT = Path(__file__).resolve().parents[1]
PYTHON = ROOT / "tests" / "stand_in" / "python"


@pytest.fixture(scope="module", autouse=True)
def stand_in(tmp_path_factory):
    """The environment of the stand-in, short deadlines, and a record of every process group that a Server starts."""
    folder, groups, start = tmp_path_factory.mktemp("stand_in"), [], Server._start

    def recorded(server):
        start(server)
        groups.append((server, server.process.pid))
        assert sum(known is server for known, _ in groups) < 12, "a server that starts again and again"

    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"STAND_IN": folder / "faults.json", "STAND_IN_LOG": folder / "requests.jsonl",
                            "STAND_IN_PYTHON": sys.executable, "OMP_NUM_THREADS": 1}.items():
            patch.setenv(name, str(value))
        patch.delenv("VLLM_API_KEY", raising=False)
        patch.setattr(rollout, "START_SECONDS", 90)
        patch.setattr(rollout, "STALL_SECONDS", 30)
        patch.setattr(Server, "_start", recorded)
        yield groups


@pytest.fixture(autouse=True)
def clean(stand_in):
    """Every test begins without faults and ends within 100 s; of the processes that it replaced or closed, none is
    left."""
    def late(*_):
        raise TimeoutError("this test hangs")

    want()
    Path(os.environ["STAND_IN_LOG"]).write_text("")
    handler = signal.signal(signal.SIGALRM, late)
    signal.alarm(100)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, handler)
    want()
    for server, group in stand_in:
        assert server.process and server.process.pid == group or wait_for_end(group)


def want(**faults):
    """Faults of the stand-in from its next request on; whole or not at all, as it may be reading."""
    path = Path(os.environ["STAND_IN"])
    path.with_suffix(".new").write_text(json.dumps(faults))
    path.with_suffix(".new").replace(path)


def requests(path=None):
    """What the stand-in was asked in this test, in the order of arrival."""
    return [r for r in lines(Path(os.environ["STAND_IN_LOG"])) if path in (None, r["path"])]


def chats():
    return requests("/v1/chat/completions")


def impatient(server):
    """A process that will not end by itself is given a tenth of the seconds that the server would have."""
    wait = server.process.wait
    server.process.wait = lambda timeout=None: wait(timeout and timeout / 10)


def ask(server, path, **more):
    return httpx.get(server.url + path, headers={"Authorization": f"Bearer {server.key}"}, **more)


# ─────────────────────────────────────────────────────── the models ───────────────────────────────────────────────────


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a tiny model and eight questions, one of them with two clips. Some completions end, and
    placeholders have no share that a ban could take."""
    folder = tmp_path_factory.mktemp("world")
    policy = tiny.qwen3_omni_that_ends(0.25)
    policy.save(folder / "model")
    rows = [{"id": q.id, "audio": [clip.name for clip in q.audio], "question": q.question, "choices": list(q.choices),
             "answer": q.answer}
            for q in tiny.questions(folder, seconds=((0.7,), (1.3, 0.4), (0.25,), (1.0043,), (1.0,), (0.5,), (2.1,),
                                                     (0.9,)))]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def load(world, change=None):
    """The policy and six prompts; `change`: a seed to move every weight of the decoder by a tenth of its size."""
    policy = model.load_policy(world / "model")
    prompts = [policy.encode(q) for q in read_questions(world / "data.jsonl")[:6]]
    if change is not None:
        torch.manual_seed(change)
        with torch.no_grad():
            for p in policy.base.model.language_model.parameters():
                p.add_(0.1 * p.abs().mean() * torch.randn_like(p))
    return policy, prompts


@pytest.fixture(scope="module")
def base(world):
    """Policy and prompts, for tests that leave them as they are."""
    return load(world)


@pytest.fixture(scope="module")
def served(world, tmp_path_factory):
    """A server that holds the weights of `base`; no test pushes to it or ends it."""
    log = tmp_path_factory.mktemp("served") / "vllm.log"
    with Server(world / "model", python=PYTHON, log=log, clips=2, flags="--seed 3 --no-such-flag 'a b'") as server:
        yield server
        group = server.process.pid
    assert wait_for_end(group)


@pytest.fixture(scope="module")
def victim(world, tmp_path_factory):
    """A server that tests push to and kill; each of them pushes its own weights first, and leaves it able to serve."""
    log = tmp_path_factory.mktemp("victim") / "vllm.log"
    with Server(world / "model", python=PYTHON, log=log, clips=2) as server:
        yield server
        group = server.process.pid
    assert wait_for_end(group)


@torch.no_grad()
def gap(policy, prompts, completions, temperature=1.2):
    """Largest difference of the completions' log-probs from those of policy(...) on the same ids."""
    policy.eval()
    size = len(completions) // len(prompts)
    batch = policy.collate([p for p in prompts for _ in range(size)], [c.token_ids for c in completions])
    logp = policy(batch, temperature).logp
    return max((logp[i, :len(c.logps)] - torch.tensor(c.logps)).abs().max().item() for i, c in enumerate(completions))


def ask_for(policy, prompts, server, group_size=3, seed=0, **options):
    return sample(policy, prompts, group_size, seed=seed, server=server,
                  **{"temperature": 1.2, "max_new_tokens": 10, **options})


# ──────────────────────────────────────────────────────── sampling ────────────────────────────────────────────────────


def test_log_probs_are_the_policys(base, served):
    """Clips of 0.25 s, of no whole number of frames, two in a question, an instruction: the server makes the trainer's
    prompt ids of them (else sample raises), and log-probs within 1e-5. Some completions end with EOS, some do not."""
    policy, prompts = base
    prompts = [*prompts, policy.encode(prompts[1].question, "Answer in one word.")]
    assert len(policy.clip(prompts[3].question.audio[0])) % 160 == 0 and len(prompts[1].features) == 2
    completions = ask_for(policy, prompts, served)
    assert len(completions) == 21 and gap(policy, prompts, completions) < 1e-5
    assert {c.finish_reason for c in completions} == {"stop", "length"}
    for c in completions:
        assert (c.token_ids[-1] in policy.eos_ids) == (c.finish_reason == "stop") or len(c.token_ids) == 10
        assert not set(c.token_ids[:-1]) & set(policy.eos_ids)


@pytest.mark.parametrize("options", [
    dict(temperature=1.2), dict(temperature=0), dict(temperature=0.7, top_k=5, max_new_tokens=7),
    dict(temperature=1.2, top_k=50, top_p=0.99), dict(temperature=1.0, top_p=0.6, group_size=4),
    dict(temperature=1.0, repetition_penalty=1.5)], ids=str)
def test_options_reach_the_server(base, served, monkeypatch, options):
    """Each group is what this process samples for its prompt with the same options and the seed of the request, token
    for token, with the log-probs of the cut distribution; some of many EOS ids end it."""
    policy, prompts = base
    prompts = prompts[1:4]
    monkeypatch.setattr(rollout, "IN_FLIGHT", 1)  # so that requests arrive in the order of the prompts
    monkeypatch.setattr(policy, "eos_ids", [*range(0, 320, 5), 320])
    found = ask_for(policy, prompts, served, **options)
    here = []
    for prompt, request in zip(prompts, chats(), strict=True):
        here += ask_for(policy, [prompt], None, seed=request["seed"], **options)
    assert [(c.token_ids, c.finish_reason) for c in found] == [(c.token_ids, c.finish_reason) for c in here]
    for c, expected in zip(found, here):
        assert c.logps == pytest.approx(expected.logps, abs=1e-6)
    assert len(found) == 3 * options.get("group_size", 3)
    assert any(c.finish_reason == "stop" and c.token_ids[-1] != 320 for c in found)


def test_groups_are_in_the_order_of_the_prompts(base, served):
    """Also when the first questions are answered last. The same seed gives the same completions, another one others."""
    policy, prompts = base
    plain = ask_for(policy, prompts, served, seed=5)
    want(delay=[0.9, 0.6, 0.3])
    assert ask_for(policy, prompts, served, seed=5) == plain
    other = ask_for(policy, prompts, served, seed=6)
    assert all(a.token_ids != b.token_ids for a, b in zip(plain, other) if len(a.token_ids) > 2)


def test_seeds_of_questions_do_not_meet(base, served):
    """vLLM gives the samples of a question seed, seed + 1, …: no two questions share one, in a batch or in the next,
    also when the question is the same."""
    policy, prompts = base
    batches = [ask_for(policy, prompts[:3] * 2, served, group_size=4, seed=seed, max_new_tokens=4)
               for seed in (7, 8, 1_000_003)]
    ranges = sorted((r["seed"], r["seed"] + r["n"]) for r in chats())
    assert len(ranges) == 18 and all(end <= start for (_, end), (start, _) in zip(ranges, ranges[1:]))
    assert all(0 <= start < end < 2 ** 63 for start, end in ranges)
    for batch in batches:
        assert batch[:12] != batch[12:]


def test_no_more_questions_at_once_than_in_flight(base, served, monkeypatch):
    """IN_FLIGHT of them, and no fewer while there is work."""
    policy, prompts = base
    monkeypatch.setattr(rollout, "IN_FLIGHT", 3)
    want(delay=0.2)
    ask_for(policy, prompts, served, max_new_tokens=2)
    assert len(chats()) == 6 and max(r["in_flight"] for r in chats()) == 3


def test_the_very_samples_are_sent(base, tmp_path):
    """A clip of another rate and two channels, which 16 bits would round, reaches the server as our encoder hears it;
    beside it stand the texts of the conversation, and no path of this machine."""
    policy, _ = base
    path, noise = tmp_path / "stereo.wav", np.random.default_rng(0).uniform(-1e-3, 1e-3, (15000, 2))
    soundfile.write(path, noise, 22050, subtype="FLOAT")
    question = Question("q9", (path, path), "What hums?", ("a fan", "a fridge"), "a fan")
    body = rollout._request(policy, policy.encode(question, "Think."), {"n": 2}, "0 0")()
    assert str(tmp_path) not in json.dumps(body) and [m["role"] for m in body["messages"]] == ["user"]
    *clips, text = body["messages"][0]["content"]
    assert text == conversation(question, False, "Think.")[0]["content"][0] and len(clips) == 2
    for clip in clips:
        samples, rate = soundfile.read(io.BytesIO(base64.b64decode(clip["input_audio"]["data"])), dtype="float32")
        assert rate == 16000 and np.array_equal(samples, policy.clip(path)) and len(samples) == 16000


def test_clips_are_read_when_their_turn_comes(base, served, monkeypatch):
    """Audio of the whole batch is not held at once."""
    policy, prompts = base
    monkeypatch.setattr(rollout, "IN_FLIGHT", 1)
    read, order = policy.clip, []
    monkeypatch.setattr(policy, "clip", lambda path: order.append("clip") or read(path))
    take = rollout._read
    monkeypatch.setattr(rollout, "_read", lambda *given: order.append("answer") or take(*given))
    ask_for(policy, prompts[2:5], served, max_new_tokens=2)
    assert order == ["clip", "answer"] * 3


def test_passing_faults(base, served, monkeypatch):
    """HTTP 500, dropped connections, pages of a proxy: asked again; every group exactly once, the same as without."""
    policy, prompts = base
    plain, process, seen, take = ask_for(policy, prompts, served), served.process, Counter(), rollout._read
    monkeypatch.setattr(rollout, "_read", lambda answer, policy, prompt, size: seen.update([prompt.question.id])
                        or take(answer, policy, prompt, size))
    want(fail=3, drop=3, html=3)
    assert ask_for(policy, prompts, served) == plain
    assert len(chats()) == 6 + 9 + 6 and set(seen.values()) == {1} and len(seen) == 6
    assert served.process is process and process.poll() is None


def test_a_batch_goes_on_without_metrics(base, served):
    """Where /metrics fails for less than STALL_SECONDS, the server that samples is left alone."""
    policy, prompts = base
    process = served.process
    want(blind=True, delay=1.5)
    assert len(ask_for(policy, prompts[:2], served, max_new_tokens=2)) == 6
    assert served.process is process and len(requests("/metrics")) >= 2


REFUSALS = {
    "wrong_prompt": r"question q\d: the server's prompt has (\d+) tokens and the trainer's \1, different from 0 on",
    "short_group": r"question q\d: the server sent 2 completions, 3 were asked",
    "nan": r"question q\d: .* not a whole completion",
    "null": r"question q\d: the server's answer lacks token ids or log-probs",
    "no_ids": r"question q\d: the server's answer lacks token ids or log-probs .*prompt_token_ids",
    "no_tokens": r"question q\d: the server's answer lacks token ids or log-probs .*token_ids",
    "no_logps": r"question q\d: the server's answer lacks token ids or log-probs",
    "few_logps": r"question q\d: .* not a whole completion",
    "cut": r"question q\d: .*finish reason 'stop'; not a whole completion",
    "abort": r"question q\d: .*finish reason 'abort'; not a whole completion",
    "refuse": r"question q\d.*HTTP 400: .*maximum model length",
}


@pytest.mark.parametrize("fault, message", REFUSALS.items(), ids=REFUSALS)
def test_refusals(base, served, fault, message):
    """What training must not use ends the run at once; the first line names the question. The server goes on."""
    policy, prompts = base
    served.wait()
    want(**{fault: True})
    started = time.monotonic()
    with pytest.raises(RolloutError) as error:
        ask_for(policy, prompts, served)
    assert re.search(message, str(error.value).splitlines()[0]), error.value
    assert time.monotonic() - started < 10 and served.process.poll() is None and not served.deaths
    want()
    assert len(ask_for(policy, prompts[:1], served, max_new_tokens=2)) == 3


def test_a_clip_too_many(base, served):
    """The server is told the most clips of a question."""
    policy, prompts = base
    question = prompts[1].question
    three = policy.encode(type(question)("q9", question.audio + question.audio[:1], "?", ("a", "b"), "a"))
    with pytest.raises(RolloutError, match="HTTP 400.*audio.*2"):
        ask_for(policy, [three], served)


# ───────────────────────────────────────────────────────── the key ────────────────────────────────────────────────────

PATHS = [("GET", "/v1/models"), ("GET", "/metrics"), ("GET", "/is_paused"), ("GET", "/weight_info"), ("POST", "/pause"),
         ("POST", "/collective_rpc"), ("POST", "/reset_prefix_cache"), ("POST", "/update_weight_version"),
         ("POST", "/v1/chat/completions")]


def test_nothing_without_the_key(served):
    """401 on every path but /health, without a key and with another one; a path that does not exist is no exception."""
    served.wait()
    for method, path in [*PATHS, ("GET", "/nowhere"), ("GET", "/health/..")]:
        for headers in ({}, {"Authorization": "Bearer x"}, {"Authorization": served.key}):
            assert httpx.request(method, served.url + path, headers=headers).status_code == 401, path
    assert httpx.get(f"{served.url}/health").status_code == 200 == ask(served, "/is_paused").status_code
    assert not ask(served, "/is_paused").json()["is_paused"]


def test_the_middleware_itself():
    """vllm_worker.RequireKey in ASGI's own terms: also a key of two headers, other cases of the header's value, and
    what is no http request."""
    def status(path="/pause", headers=(), kind="http"):
        sent = []

        async def application(scope, receive, send):
            sent.append({"status": 200})

        async def send(message):
            sent.append(message)

        asyncio.run(vllm_worker.RequireKey(application)({"type": kind, "path": path, "headers": headers}, None, send))
        return sent[0]["status"]

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_API_KEY", "abc")
        assert status(headers=[(b"authorization", b"Bearer abc")]) == status("/health") == 200
        assert status(kind="lifespan") == 200
        for path in ("/pause", "/", "/v1/models", "/healthy", "/health/x", "//health"):
            for value in (b"", b"abc", b"Bearer ab", b"Bearer abcd", b"Bearer ABC", "Bearer ä".encode("latin-1")):
                assert status(path, [(b"authorization", value)] if value else []) == 401
        patch.delenv("VLLM_API_KEY")
        with pytest.raises(KeyError):
            vllm_worker.RequireKey(None)


def test_the_key_is_a_secret(served, world, tmp_path):
    """Random bytes for each server, and on no command line."""
    served.wait()  # while it starts, members come and go
    arguments = [Path(f"/proc/{pid}/cmdline").read_text().split("\0") for pid in members(served.process.pid)]
    assert len(arguments) >= 2 and not any(served.key in word for words in arguments for word in words)
    assert any(words[-5:-1] == ["--seed", "3", "--no-such-flag", "a b"] for words in arguments)  # what flags= gave
    others = [Server(world / "model", python=PYTHON, log=tmp_path / "log").key for _ in range(2)]
    assert len({served.key, *others}) == 3 and all(len(bytes.fromhex(key)) >= 16 for key in others)
    assert served.key not in Path(served.log).read_text()


def test_a_key_in_the_environment(world, tmp_path, monkeypatch):
    """A server of our own has a key of its own, whatever VLLM_API_KEY is, and the development mode that it needs."""
    monkeypatch.setenv("VLLM_API_KEY", "of another server")
    monkeypatch.setenv("VLLM_SERVER_DEV_MODE", "0")
    want(light=True)
    with Server(world / "model", python=PYTHON, log=tmp_path / "log") as server:
        server.wait()
        assert ask(server, "/weight_info").json() == {"weight_version": "0"}


@pytest.mark.parametrize("opened", [True, "rpc"], ids=["all of it", "outside /v1"])
def test_a_server_without_a_lock_is_refused(base, served, world, monkeypatch, opened):
    """One that answers without the key, be it on the paths alone that vLLM itself leaves open."""
    monkeypatch.setenv("VLLM_API_KEY", served.key)
    want(open=opened)
    with Server(world / "model", url=served.url) as other, pytest.raises(RolloutError, match="without the key"):
        other.wait()


def test_another_key(base, served, world, monkeypatch, tmp_path):
    """A server at a url that takes another key: an error at once, for sampling and for a push."""
    monkeypatch.setenv("VLLM_API_KEY", "x")
    policy, prompts = base
    with Server(world / "model", url=served.url) as other:
        with pytest.raises(RolloutError, match="HTTP 401"):
            ask_for(policy, prompts, other)
        with pytest.raises(RolloutError, match="/pause.*HTTP 401"):
            push_weights(other, policy, tmp_path, 1)


def test_no_address_without_a_key(world, monkeypatch, tmp_path):
    """Another machine's server, and one of our own, need a key; a server on this machine may go without."""
    for url in ("http://10.0.0.1:1", "http://0.0.0.0:8000", "https://gpu.example/", "http://127.0.0.1.example:1"):
        with pytest.raises(InputError, match="VLLM_API_KEY"):
            Server(world / "model", url=url)
    with pytest.raises(InputError, match="VLLM_API_KEY"):
        Server(world / "model", python=PYTHON, log=tmp_path / "log", key="")
    for url in ("http://127.0.0.1:1", "http://localhost:8000/", "http://[::1]:8000"):
        assert Server(world / "model", url=url).key == ""
    monkeypatch.setenv("VLLM_API_KEY", "abc")
    assert Server(world / "model", url="http://10.0.0.1:1").key == "abc"


# ──────────────────────────────────────────────────────── pushing ─────────────────────────────────────────────────────


def test_push(world, victim, tmp_path):
    """After a push, and after the next, the server samples from the changed policy and says its version; the last
    checkpoint alone is left. The weights change while the server is paused, and its cache is dropped."""
    old, prompts = load(world)
    for version in (4, 6):
        policy, _ = load(world, change=version)
        push_weights(victim, policy, tmp_path / "weights", version)
        completions = ask_for(policy, prompts, victim)
        assert gap(policy, prompts, completions) < 1e-5 and gap(old, prompts, completions) > 1e-2
        assert ask(victim, "/weight_info").json() == {"weight_version": str(version)}
        assert [f.name for f in (tmp_path / "weights").iterdir()] == [f"version-{version}"]
        assert check_push(victim, policy, prompts, temperature=1.2, max_gap=1e-5, seed=0) < 1e-5
        old = policy
    posts = [r["path"] for r in requests()
             if r["path"] not in ("/health", "/v1/models", "/v1/chat/completions", "/metrics", "/weight_info")]
    once = ["/pause", "/collective_rpc", "/reset_prefix_cache", "/update_weight_version", "/resume"]
    assert posts[-10:] == once * 2 and {r["query"] for r in requests("/pause")} == {"mode=wait"}
    loaded = model.load_policy(tmp_path / "weights" / "version-6")
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), policy.parameters(), strict=True))


def test_leftovers_of_a_broken_push(world, victim, tmp_path):
    """Folders that an earlier run left half written are in nobody's way, and do not stay."""
    policy, prompts = load(world, change=8)
    for name in ("version-8", ".version-8.writing", "version-2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model-00001-of-00002.safetensors").write_text("half")
    push_weights(victim, policy, tmp_path, 8)
    assert gap(policy, prompts, ask_for(policy, prompts, victim)) < 1e-5
    assert [f.name for f in tmp_path.iterdir()] == ["version-8"]


def test_push_of_lora_is_merged(world, victim, tmp_path):
    """The server gets W + (α/r)·B·A and no adapters."""
    policy, prompts = load(world)
    old, _ = load(world)
    model.add_lora(policy, 4, 8)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, p in policy.named_parameters():
            if "lora_B" in name:
                p.copy_(0.1 * torch.randn_like(p))
    push_weights(victim, policy, tmp_path, 3)
    completions = ask_for(policy, prompts, victim)
    assert gap(policy, prompts, completions) < 1e-5 and gap(old, prompts, completions) > 1e-2


def test_placeholders_are_banned_on_the_server(world, victim, tmp_path):
    """Not even a head that wants nothing else gets one."""
    policy, prompts = load(world)
    with torch.no_grad():
        policy.base.lm_head.weight[policy.placeholder_ids, 0] = 10
    push_weights(victim, policy, tmp_path, 2)
    completions = ask_for(policy, prompts, victim)
    assert not {i for c in completions for i in c.token_ids} & set(policy.placeholder_ids)
    assert all(math.isfinite(x) for c in completions for x in c.logps)


def test_a_refused_push(world, victim, tmp_path):
    """RolloutError that names the path; the server is left running, not paused."""
    policy, prompts = load(world, change=1)
    victim.wait()
    impatient(victim)
    want(refuse_push=True)
    with pytest.raises(RolloutError, match="refused /collective_rpc: HTTP 500: .*the weights do not fit"):
        push_weights(victim, policy, tmp_path, 11)
    assert ask(victim, "/is_paused").json() == {"is_paused": False} and victim.process.poll() is None
    want()
    push_weights(victim, policy, tmp_path, 12)
    assert gap(policy, prompts, ask_for(policy, prompts, victim)) < 1e-5


def test_check_push_finds_old_weights(world, victim, tmp_path):
    """A server that says 200 and changes nothing: an error with both means; so is a policy gone to NaN."""
    policy, prompts = load(world, change=2)
    push_weights(victim, policy, tmp_path, 1)
    newer, _ = load(world, change=3)
    want(ignore_push=True)
    push_weights(victim, newer, tmp_path, 13)
    with pytest.raises(RolloutError) as error:
        check_push(victim, newer, prompts, temperature=1.2, max_gap=1e-3, seed=0)
    found = re.search(r"version 13: .*log-probs are ([\d.]+) nats .*more than 0.001 "
                      r"\(means: server (-[\d.]+), trainer (-[\d.]+)\)", str(error.value))
    measured, there, here = map(float, found.groups())
    completions = ask_for(policy, prompts, victim, group_size=1, max_new_tokens=rollout.CHECK_TOKENS)
    means = []
    for p in (policy, newer):
        with torch.no_grad():
            batch = p.collate(prompts, [c.token_ids for c in completions])
            means.append(p(batch, 1.2).logp[batch.completion_mask])
    assert (there, here) == pytest.approx([m.mean().item() for m in means], abs=1e-4)
    assert measured == pytest.approx((means[0] - means[1]).abs().mean().item(), rel=0.02) and measured > 1e-2
    with torch.no_grad():
        policy.base.lm_head.weight.fill_(math.nan)
    with pytest.raises(RolloutError, match="nan nats"):
        check_push(victim, policy, prompts, temperature=1.2, max_gap=1e9, seed=0)


def test_check_push_is_at_the_sampling_temperature(world, victim, tmp_path):
    """At another temperature than 1 as well the gap is rounding alone."""
    policy, prompts = load(world, change=4)
    push_weights(victim, policy, tmp_path, 1)
    for temperature in (0.5, 2.0):
        assert check_push(victim, policy, prompts, temperature=temperature, max_gap=1, seed=0) < 1e-5


def test_worker_loads_every_file(world, tmp_path):
    """load_folder hands over all tensors of all files, and clears the kernels that a CPU worker would keep; on a GPU it
    leaves them. A folder without weights is an error."""
    policy, _ = load(world)
    policy.base.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    for device, kernel in (("cpu", None), ("cuda", "built")):
        expert, taken = torch.nn.Linear(1, 1), {}
        expert.quant_method = SimpleNamespace(moe_kernel="built")
        worker = vllm_worker.WeightReload()
        worker.device = torch.device(device)
        worker.model_runner = SimpleNamespace(get_model=lambda: torch.nn.Sequential(expert, torch.nn.Linear(1, 1)))
        worker.reload_weights = lambda weights_iterator: taken.update(weights_iterator)
        worker.load_folder(str(tmp_path))
        assert expert.quant_method.moe_kernel == kernel
        again = type(policy.base).from_pretrained(tmp_path).state_dict()
        assert torch.equal(taken["thinker.lm_head.weight"], policy.base.lm_head.weight)
        assert sum(t.numel() for t in taken.values()) == sum(t.numel() for t in again.values())
        with pytest.raises(FileNotFoundError, match="no .*safetensors"):
            worker.load_folder(str(world))


# ───────────────────────────────────────────────────────── deaths ─────────────────────────────────────────────────────


def count_groups(monkeypatch, at=None, do=None):
    """Counter of the groups that are taken; after the `at`-th, `do` happens."""
    seen, take = Counter(), rollout._read

    def read(answer, policy, prompt, group_size):
        group = take(answer, policy, prompt, group_size)
        seen[prompt.question.id] += 1
        if seen.total() == at:
            do()
        return group

    monkeypatch.setattr(rollout, "_read", read)
    return seen


def end_by_itself(server):
    want(die_after=0, once=True)


def hang(server):
    want(hang="chat", once=True)


def stop(server):
    os.kill(server.process.pid, signal.SIGSTOP)
    impatient(server)


@pytest.mark.parametrize("fault", [end_by_itself, hang, pytest.param(stop, marks=pytest.mark.slow)])
def test_deaths_in_the_middle_of_a_batch(world, victim, tmp_path, monkeypatch, fault):
    """After the third group, with pushed weights, the server ends, hangs, or is stopped: the batch is whole, every
    group exactly once, from a new server with the same weights."""
    monkeypatch.setattr(rollout, "STALL_SECONDS", 3)
    monkeypatch.setattr(rollout, "IN_FLIGHT", 2)
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


def test_a_push_that_ends_the_engine(world, base, tmp_path, stand_in):
    """HTTP 500 and then the end of the process, as from vLLM when its engine dies: a death, no refusal."""
    want(light=True)
    before = len(stand_in)
    with Server(world / "model", python=PYTHON, log=tmp_path / "log") as server:
        server.wait()
        want(light=True, die_on_push="late")
        push_weights(server, base[0], tmp_path / "weights", 31)
        server.wait()
        assert ask(server, "/weight_info").json() == {"weight_version": "31"} and len(stand_in) == before + 2


@pytest.mark.parametrize("guard", [False, True], ids=["the server", "its guard too"])
def test_a_push_to_a_dead_server(world, base, tmp_path, stand_in, guard):
    """A push that finds the server dead starts it again on the new weights, also when the whole process group has gone
    and its number is free. The end of the block takes no offence either."""
    want(light=True)
    before = len(stand_in)
    with Server(world / "model", python=PYTHON, log=tmp_path / "log") as server:
        for version in (31, None):
            server.wait()
            (os.killpg if guard else os.kill)(server.process.pid, signal.SIGKILL)
            with contextlib.suppress(ProcessLookupError):
                while server.process.wait() and guard:  # until nothing is left of the group, not even a zombie
                    os.killpg(server.process.pid, 0)
                    time.sleep(0.05)
            if version:
                push_weights(server, base[0], tmp_path / "weights", version)
                server.wait()
                assert ask(server, "/weight_info").json() == {"weight_version": str(version)}
                words = Path(f"/proc/{server.process.pid}/cmdline").read_text().split("\0")
                assert words[words.index("--model") + 1] == str(tmp_path / "weights" / f"version-{version}")
    assert len(stand_in) == before + 2


@pytest.mark.parametrize("faults, what", [
    (dict(light=True, die_after=0), "3 in a row"),
    (dict(die_at_start="out of memory"), "ended with status 1 before it was ready, 3 in a row")],
    ids=["at the first question", "at the start"])
def test_three_deaths_in_a_row(world, base, tmp_path, stand_in, faults, what):
    """A server that dies each time, at the first question or while it starts again, ends the run with the error and the
    last lines of its log. The block that this ends leaves no process."""
    before = len(stand_in)
    want(light=True)
    with pytest.raises(RolloutError) as error:
        with Server(world / "model", python=PYTHON, log=tmp_path / "log", clips=2) as server:
            server.wait()
            want(**{"die_after": 0, **faults})
            ask_for(*base, server)
    first, *rest = str(error.value).splitlines()
    assert what in first and len(rest) <= 11
    assert "die_at_start" not in faults or "RuntimeError: out of memory" in rest[0]
    assert len(stand_in) - before == rollout.DEATHS
    for _, group in stand_in[before:]:
        assert wait_for_end(group, 2)


def test_deaths_during_pushes(world, base, tmp_path):
    """Three in a row without a batch in between are a RolloutError too, whichever call meets them."""
    want(light=True)
    with Server(world / "model", python=PYTHON, log=tmp_path / "log") as server:
        server.wait()
        want(die_on_push=True, die_at_start="out of memory")
        with pytest.raises(RolloutError, match="(?s)3 in a row.*out of memory"):
            for version in (1, 2, 3, 4):
                push_weights(server, base[0], tmp_path / "weights", version)


def test_a_first_start_that_fails(world, base, tmp_path, stand_in):
    """An error at once, with the lines of the log: there is nothing to be gained by another start."""
    shutil.copytree(world / "model", tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    before = len(stand_in)
    with pytest.raises(RolloutError) as error:
        with Server(tmp_path / "model", python=PYTHON, log=tmp_path / "log", clips=2) as server:
            ask_for(*base, server)
    first, *rest = str(error.value).splitlines()
    assert "ended with status 1 before it was ready" in first
    assert rest[0] == rest[-1] == f"FileNotFoundError: {tmp_path / 'model'}: no weights"
    assert len(stand_in) == before + 1


def test_a_server_that_never_answers(base, world, monkeypatch):
    """An error that says for how long."""
    monkeypatch.setattr(rollout, "START_SECONDS", 0.2)
    with Server(world / "model", url="http://127.0.0.1:9") as server:
        with pytest.raises(RolloutError, match="the vLLM server at http://127.0.0.1:9 was not healthy after 0.2 s"):
            ask_for(*base, server)


def test_the_log_is_that_of_the_last_start(world, base, tmp_path):
    """The first exception and the last ten lines of what the last process wrote, not of one before it."""
    (tmp_path / "log").write_text("OldError: of another run\n")
    want(die_at_start="the first")
    with pytest.raises(RolloutError) as error:
        with Server(world / "model", python=PYTHON, log=tmp_path / "log") as server:
            server.process.wait()
            want(die_at_start="the second")
            server.deaths = 1
            ask_for(*base, server)
    assert "RuntimeError: the second" in str(error.value) and "the first" not in str(error.value)
    assert "RuntimeError: the first" in (tmp_path / "log").read_text()
    assert "OldError" not in (tmp_path / "log").read_text()


def test_an_interpreter_that_does_not_start(world, base, tmp_path):
    """The shell's word for it is in the error."""
    with pytest.raises(RolloutError, match="(?s)ended with status 127 .*no-python"):
        with Server(world / "model", python=tmp_path / "no-python", log=tmp_path / "log") as server:
            ask_for(*base, server)


# ─────────────────────────────────────────────────────── exit paths ───────────────────────────────────────────────────


@pytest.mark.parametrize("fails", [False, True], ids=["its end", "an exception"])
@pytest.mark.parametrize("loading", [False, True], ids=["ready", "loading"])
def test_the_block_ends_the_server(world, tmp_path, fails, loading):
    """Whole process group, also of a server that is still loading."""
    want(light=not loading)
    with pytest.raises(KeyError) if fails else contextlib.nullcontext():
        with Server(world / "model", python=PYTHON, log=tmp_path / "log") as server:
            group = server.process.pid
            if not loading:
                server.wait()
            while len(members(group)) < 2:
                time.sleep(0.02)
            if fails:
                raise KeyError("a bug")
    assert wait_for_end(group, 2) and server.process is None


TRAINERS = """
import os, signal, sys, time
from pathlib import Path
from rollout import Server
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background is started to ignore it
folder, python, *ways = sys.argv[1:]
for way in ways:
    if os.fork() == 0:
        with Server(folder, python=python, log=way + ".log") as server, \\
                Server(folder, python=python, log=way + ".checker.log", weights_change=False) as checker:
            server.wait()
            checker.wait()
            Path(way + ".new").write_text(f"{os.getpid()} {server.process.pid} {checker.process.pid}")
            Path(way + ".new").rename(way)
            while not Path("go").exists():
                time.sleep(0.05)
            if way == "_exit":
                os._exit(3)
            time.sleep(600)
for _ in ways:
    os.wait()
"""
WAYS = ("SIGKILL", "SIGTERM", "SIGINT", "_exit")


@pytest.fixture(scope="module")
def ended_trainers(world, tmp_path_factory, stand_in):
    """way → the process groups of two servers whose trainer has ended in that way, just now."""
    folder = tmp_path_factory.mktemp("trainers")
    want(light=True)
    trainers = subprocess.Popen([sys.executable, "-c", TRAINERS, world / "model", PYTHON, *WAYS], cwd=folder,
                                env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 60
    while not all((folder / way).is_file() for way in WAYS):
        assert trainers.poll() is None and time.monotonic() < until
        time.sleep(0.05)
    pids = {way: [int(pid) for pid in (folder / way).read_text().split()] for way in WAYS}
    assert all(members(group) for _, *groups in pids.values() for group in groups)
    (folder / "go").touch()
    for way in WAYS:
        if way != "_exit":
            os.kill(pids[way][0], getattr(signal, way))
    trainers.wait(30)
    return {way: groups for way, (_, *groups) in pids.items()}


@pytest.mark.parametrize("way", WAYS)
def test_the_trainer_ends(ended_trainers, way):
    """Killed, terminated, interrupted, or gone without a word: no process of its servers is left after 15 s."""
    assert len(ended_trainers[way]) == 2
    for group in ended_trainers[way]:
        assert wait_for_end(group)


def test_closing_ends_a_waiting_thread(world, base, tmp_path):
    """A thread that samples, as in async_rollouts, does not outlive the block by more than a moment: not when the block
    ends while the server still loads."""
    policy, prompts = base
    ended = []

    def go():
        with pytest.raises(RolloutError):
            ask_for(policy, prompts, server)
        ended.append(True)

    with Server(world / "model", python=PYTHON, log=tmp_path / "log", clips=2) as server:
        thread = threading.Thread(target=go, daemon=True)
        thread.start()
        time.sleep(0.7)
    thread.join(8)
    assert ended


# ──────────────────────────────────────────────── a server of others ──────────────────────────────────────────────────


def test_a_server_at_a_url(world, victim, tmp_path, monkeypatch):
    """It is sampled from and pushed to, and outlives the block. When others have pushed to it, it is refused."""
    policy, prompts = load(world, change=9)
    victim.wait()
    monkeypatch.setattr(rollout, "START_SECONDS", 10)
    monkeypatch.setenv("VLLM_API_KEY", victim.key)
    with Server(world / "model", url=victim.url + "/") as there:
        push_weights(there, policy, tmp_path / "weights", 7)
        completions = ask_for(policy, prompts, there)
        assert gap(policy, prompts, completions) < 1e-5 and len(completions) == 18
        assert ask(victim, "/weight_info").json() == {"weight_version": "7"}
        push_weights(victim, policy, tmp_path / "others", 8)
        with pytest.raises(RolloutError, match="holds weights of version 8, and 7 was pushed"):
            ask_for(policy, prompts, there)
    assert victim.process.poll() is None and len(ask_for(policy, prompts[:1], victim)) == 3


def test_a_server_at_a_url_dies(world, base, tmp_path, monkeypatch, stand_in):
    """Restarted by its owner, with other weights, it is refused; dead, in a batch, before it or at a push, it is an
    error, and nothing is started in its place."""
    monkeypatch.setattr(rollout, "ATTEMPTS", 2)
    want(light=True)
    with Server(world / "model", python=PYTHON, log=tmp_path / "log") as own:
        own.wait()
        monkeypatch.setenv("VLLM_API_KEY", own.key)
        with Server(world / "model", url=own.url) as there:
            push_weights(there, base[0], tmp_path / "weights", 7)
            own.recover("is restarted by its owner")
            own.wait()
            there.url = own.url  # in truth it would have the same port
            with pytest.raises(RolloutError, match="holds weights of version 0, and 7 was pushed: was it started"):
                ask_for(*base, there)
            push_weights(there, base[0], tmp_path / "weights", 8)
            starts = len(stand_in)
            want(die_after=0)
            with pytest.raises(RolloutError, match="at http://127.0.0.1:.* gave no answer in 2 attempts"):
                ask_for(*base, there)
            with pytest.raises(RolloutError, match="at http://127.0.0.1:"):
                ask_for(*base, there)
            with pytest.raises(RolloutError, match="during a push"):
                push_weights(there, base[0], tmp_path / "weights", 9)
            assert len(stand_in) == starts


# ─────────────────────────────────────────────────────── the checker ──────────────────────────────────────────────────


def test_the_checkers_server(world, tmp_path, monkeypatch, stand_in):
    """A checker of our own answers under its name and has no endpoints for weights. It may die in every batch as long
    as there are verdicts in between; when it dies DEATHS times in a row, that is a RolloutError."""
    monkeypatch.setattr("rewards.FIRST_WAIT", 0.01)
    monkeypatch.setattr(rollout, "DEATHS", 2)
    config = train.read_config(arguments(world, tmp_path / "out", "--checker", world / "model"))
    texts = ["<think>It barks.</think> a dog", "no form", "<think>It rings.</think> a bell"]
    want(light=True)
    before = len(stand_in)
    with Server(world / "model", python=PYTHON, log=tmp_path / "log", weights_change=False,
                name=config.checker_model) as checker:
        for batch in range(3):
            want(light=True, say="NO" if batch == 1 else "Yes.")
            assert train.check_consistency(texts, config, checker) == ([0, 0, 0] if batch == 1 else [1, 0, 1])
            assert {ask(checker, path).status_code for _, path in PATHS if "/v1" not in path} == {404, 200}  # /metrics
            os.kill(checker.process.pid, signal.SIGKILL)
        assert len(stand_in) == before + 3
        want(light=True, die_after=0)
        with pytest.raises(RolloutError, match="2 in a row"):
            train.check_consistency(texts, config, checker)


def test_a_proxy_never_sees_our_own_servers(world, base, tmp_path, monkeypatch):
    """http_proxy names a port where nobody answers: whoever asked there would wait for the server in vain."""
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    want()
    with Server(world / "model", python=PYTHON, log=tmp_path / "log", clips=2) as server:
        ask_for(*base, server)
        push_weights(server, base[0], tmp_path / "weights", 1)
        ask_for(*base, server)
    want(light=True, say="YES")
    config = train.read_config(arguments(world, tmp_path / "out", "--checker", world / "model"))
    with Server(world / "model", python=PYTHON, log=tmp_path / "log", weights_change=False,
                name=config.checker_model) as checker:
        assert train.check_consistency(["<think>It barks.</think> a dog"], config, checker) == [1]


def test_the_checker_starts_when_the_rollout_server_answers(world, base, tmp_path, monkeypatch, stand_in):
    """On the same GPUs: each of the two would take what the other allocates meanwhile for taken from its own share."""
    config = train.read_config(arguments(world, tmp_path, "--checker", world / "model"))
    before, ready, start = len(stand_in), [], Server._start

    def started(server):
        ready.append([other.ready for other, _ in stand_in[before:]])
        start(server)

    monkeypatch.setattr(Server, "_start", started)
    want(say="YES")
    with train.open_servers(config, base[0], read_questions(config.data)) as (server, checker):
        ask_for(*base, server)
        assert train.check_consistency(["<think>It barks.</think> a dog"], config, checker) == [1]
    assert ready == [[], [True]]


# ───────────────────────────────────────────────────────── train.py ───────────────────────────────────────────────────


@pytest.fixture
def some_reward(monkeypatch):
    """A random model never answers in the right form; so that there are advantages, the reward is of the text alone."""
    monkeypatch.setattr(train, "accuracy_reward", lambda text, *_: float(len(text) % 2))


def arguments(world, out, *more):
    """Flags of a short run on the stand-in: 2 steps a generation batch, of 4 groups of 4."""
    flags = {"model": world / "model", "data": world / "data.jsonl", "output_dir": out, "max_steps": 4, "group_size": 4,
             "generation_batch_size": 16, "steps_per_generation": 2, "micro_batch_size": 8, "temperature": 1.2,
             "top_k": 0, "top_p": 1.0, "max_new_tokens": 8, "checker": "rule", "learning_rate": 5e-3,
             "gradient_checkpointing": "false", "rollout": "vllm", "vllm_python": PYTHON, "check_push_every": 1,
             "max_push_gap": 1e-4, "warmup_ratio": 0}
    given = [str(x) for name, value in flags.items() for x in (f"--{name}", value)]
    return [*given, "--target_layers", "1", "2", *map(str, more)]


def check_run(out, versions):
    """What every run on a server must have written; → its metrics."""
    metrics, records = lines(out / "metrics.jsonl"), lines(out / "completions.jsonl")
    assert [m["weight_version"] for m in metrics] == versions
    assert [r["weight_version"] for r in records] == [v for v in versions for _ in range(8)]
    for m in metrics:
        assert all(math.isfinite(v) for v in m.values() if v is not None)
        assert 0 <= m["wait_fraction"] <= 1 and m["grad_norm"] > 1e-3 and m["seconds_push"] >= 0
        fresh = m["weight_version"] == (m["step"] - 1) // 2 * 2
        assert (m["sampler_gap"] < 1e-5) == fresh and (m["importance_ess"] > 1 - 1e-6) == fresh
    begins = [m["step"] % 2 == 1 for m in metrics]
    assert [m["generation_tokens_per_second"] is not None for m in metrics] == begins
    assert all(m["generation_tokens_per_second"] > 0 and m["seconds_generate"] > 0 for m in metrics[::2])
    groups = [records[i:i + 4] for i in range(0, len(records), 4)]
    assert len(groups) == 2 * len(metrics) and all(len({r["prompt_id"] for r in group}) == 1 for group in groups)
    assert len({group[0]["prompt_id"] for group in groups[:8]}) == len(groups[:8])  # of an epoch
    assert all(len({tuple(r["token_ids"]) for r in group}) > 1 for group in groups)
    return metrics


def test_train(world, tmp_path, some_reward, stand_in):
    """Sync: the weights of every batch are those that it starts from. The evaluation on the server is that of the
    checkpoint in this process. The server and the weights that were pushed go with the run."""
    before, out = len(stand_in), tmp_path / "out"
    assert train.main(arguments(world, out, "--eval_data", world / "data.jsonl")) == 0
    metrics = check_run(out, [0, 0, 2, 2])
    assert metrics[0]["seconds_push"] > 0 and metrics[2]["seconds_push"] > 0 == metrics[1]["seconds_push"]
    assert [r["path"] for r in requests()].count("/collective_rpc") == 2  # version 0 it held, version 4 it evaluated
    policy = model.load_policy(out / "checkpoint")
    config = replace(train.read_config(arguments(world, out)), rollout="local")
    here = train.evaluate(policy, read_questions(world / "data.jsonl"), config, 4)
    assert lines(out / "evaluation.jsonl")[1] == here
    assert len(stand_in) == before + 1 and wait_for_end(stand_in[-1][1], 2) and not (out / "weights").exists()


def test_train_async(world, tmp_path, monkeypatch, some_reward, stand_in):
    """Batches are one push stale, and no more, from the second on. The server is killed while the second one is sampled
    beside the training of the first: the run is what it would have been."""
    monkeypatch.setattr(rollout, "IN_FLIGHT", 2)
    before = len(stand_in)
    seen = count_groups(monkeypatch, 4 + 4 + 2, lambda: os.kill(stand_in[-1][1], signal.SIGKILL))
    out = tmp_path / "out"
    assert train.main(arguments(world, out, "--max_steps", 6, "--async_rollouts", "true")) == 0
    check_run(out, [0, 0, 0, 0, 2, 2])
    assert len(stand_in) == before + 2 and seen.total() == 4 + 4 + 4 + 4 + 4  # a check at the start and at the push


def test_train_on_a_server_at_a_url(world, tmp_path, victim, monkeypatch, some_reward):
    """It gets version 0 first, for nobody knows what it holds; it outlives the run."""
    victim.wait()
    monkeypatch.setenv("VLLM_API_KEY", victim.key)
    group, out = victim.process.pid, tmp_path / "out"
    more = ("--vllm_url", victim.url, "--vllm_python", "nowhere", "--max_steps", 2)
    assert train.main(arguments(world, out, *more)) == 0
    check_run(out, [0, 0])
    assert [r["path"] for r in requests()].count("/collective_rpc") == 1
    assert victim.process.pid == group and victim.process.poll() is None


def test_train_on_a_server_that_does_not_start(world, tmp_path, capsys, stand_in):
    """Exit code 1, the error first, no traceback of ours, and no process."""
    want(die_at_start="CUDA out of memory")
    assert train.main(arguments(world, tmp_path / "out")) == 1
    error = capsys.readouterr().err.strip().splitlines()
    at = next(i for i, line in enumerate(error) if line.startswith("error: "))
    assert "the vLLM server at http://127.0.0.1:" in error[at] and "RuntimeError: CUDA out of memory" in error[at + 1]
    assert wait_for_end(stand_in[-1][1], 1)


def test_train_stops_on_old_weights(world, victim, tmp_path, monkeypatch, capsys, some_reward):
    """A server that keeps its weights through a push, here those of another test, ends the run at once: exit code 1."""
    push_weights(victim, load(world, change=10)[0], tmp_path, 1)
    monkeypatch.setenv("VLLM_API_KEY", victim.key)
    want(ignore_push=True)
    assert train.main(arguments(world, tmp_path / "out", "--vllm_url", victim.url)) == 1
    assert re.search(r"error: weights of version 0: .*nats a token from the trainer's", capsys.readouterr().err)
    assert not lines(tmp_path / "out" / "metrics.jsonl")


DOOR = {
    "no interpreter": (["--vllm_python", "nowhere/bin/python"], "vllm_python .*/nowhere/bin/python: no such"),
    "async in this process": (["--rollout", "local", "--async_rollouts", "true"], "async_rollouts needs rollout vllm"),
    "never checked": (["--check_push_every", "0"], "check_push_every is 0"),
    "gap of zero": (["--max_push_gap", "0"], "max_push_gap is 0"),
    "another place": (["--rollout", "cloud"], "rollout is 'cloud'"),
    "no url": (["--vllm_url", "127.0.0.1:8000"], "vllm_url is '127.0.0.1:8000'"),
    "no key": (["--vllm_url", "http://10.0.0.1:8000"], "VLLM_API_KEY"),
}


@pytest.mark.parametrize("more, message", DOOR.values(), ids=DOOR)
def test_at_the_door(world, tmp_path, capsys, more, message):
    """One line on stderr, exit code 2, nothing written, nothing started."""
    out = tmp_path / "out"
    assert train.main(arguments(world, out, *more)) == 2
    error = capsys.readouterr().err.strip()
    assert "\n" not in error and error.startswith("error: ") and re.search(message, error), error
    assert not out.exists() and not requests()
