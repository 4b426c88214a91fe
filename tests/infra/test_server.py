"""Sampling on a server, its key, and pushing weights to it: what goes over the wire, and back.

The server is the stand-in, see serving.py. test_server_faults.py has the deaths and the exits.
"""

import asyncio
import base64
import io
import json
import math
import os
import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import httpx
import numpy as np
import pytest
import soundfile
import torch

import checkpoint
import rollout
import server as server_module
import vllm_worker
from data import InputError, Question, conversation
from processes import members
from rollout import Sampling, check_push, push_weights
from server import Command, RolloutError, Server
from serving import STAND_IN, ask, ask_for, chats, count_groups, gap, load, requests, want

pytestmark = pytest.mark.usefixtures("clean")


# ──────── sampling ────────


def test_log_probs_are_the_policys(base, served):
    """Every prompt gets the trainer's token ids (or sample raises) and log-probs within 1e-5.

    Among them are a clip of 0.25 s, clips that are not a whole number of frames, two clips in one
    question, and an instruction. Some completions end with EOS, some do not.
    """
    policy, prompts = base
    prompts = [*prompts, policy.encode(prompts[1].question, "Answer in one word.")]
    assert len(policy.load_clip(prompts[3].question.audio[0])) % 160 == 0
    assert len(prompts[1].features) == 2
    completions = ask_for(policy, prompts, served)
    assert len(completions) == 21 and gap(policy, prompts, completions) < 1e-5
    assert {c.finish_reason for c in completions} == {"stop", "length"}
    for c in completions:
        ended = c.token_ids[-1] in policy.eos_ids
        assert ended == (c.finish_reason == "stop") or len(c.token_ids) == 10
        assert not set(c.token_ids[:-1]) & set(policy.eos_ids)


@pytest.mark.parametrize("options", [
    dict(temperature=0), dict(temperature=0.7, top_k=5, max_new_tokens=7),
    dict(temperature=1.0, top_p=0.6, group_size=4),
    dict(temperature=1.0, repetition_penalty=1.5)], ids=str)
def test_options_reach_the_server(base, served, monkeypatch, options):
    """With the same options and seed, this process samples the same groups.

    Token ids, finish reasons and the log-probs of the cut distribution are equal. There are many
    EOS ids, and ids other than the tokenizer's own end completions.
    """
    policy, prompts = base
    prompts = prompts[1:4]
    monkeypatch.setattr(served, "in_flight", 1)  # requests arrive in the prompts' order
    own_eos = policy.eos_ids[0]
    monkeypatch.setattr(policy, "eos_ids", [*range(0, own_eos, 4), own_eos])
    found = ask_for(policy, prompts, served, **options)
    here = []
    for prompt, request in zip(prompts, chats(), strict=True):
        here += ask_for(policy, [prompt], None, seed=request["seed"], **options)
    assert len(found) == len(here) == 3 * options.get("group_size", 3)
    for there, expected in zip(found, here):
        assert there.token_ids == expected.token_ids
        assert there.finish_reason == expected.finish_reason
        assert there.logps == pytest.approx(expected.logps, abs=1e-6)
    assert any(c.finish_reason == "stop" and c.token_ids[-1] != own_eos for c in found)


def test_placeholders_are_never_sampled(world, victim, tmp_path):
    """Not even by a model that prefers placeholders to everything else."""
    policy, prompts = load(world)
    with torch.no_grad():
        policy.base.lm_head.weight[policy.placeholder_ids, 0] = 10
    push_weights(victim, policy, tmp_path, 2)
    completions = ask_for(policy, prompts, victim)
    assert not {i for c in completions for i in c.token_ids} & set(policy.placeholder_ids)
    assert all(math.isfinite(x) for c in completions for x in c.logps)


def test_groups_are_in_the_order_of_the_prompts(base, served):
    """Also when the first questions are answered last. The same seed gives the same completions,
    another seed gives others."""
    policy, prompts = base
    plain = ask_for(policy, prompts, served, seed=5)
    want(delay=[0.9, 0.6, 0.3])
    assert ask_for(policy, prompts, served, seed=5) == plain
    other = ask_for(policy, prompts, served, seed=6)
    assert all(a.token_ids != b.token_ids for a, b in zip(plain, other) if len(a.token_ids) > 2)


def test_seeds_of_questions_do_not_overlap(base, served):
    """vLLM samples a group with seed, seed + 1, …: no two groups share one of these.

    That holds within a batch, between batches, and when a question appears twice in a batch.
    """
    policy, prompts = base
    batches = [ask_for(policy, prompts[:3] * 2, served, group_size=4, seed=seed, max_new_tokens=4)
               for seed in (7, 8, 1_000_003)]
    ranges = sorted((r["seed"], r["seed"] + r["n"]) for r in chats())
    assert len(ranges) == 18
    assert all(end <= start for (_, end), (start, _) in zip(ranges, ranges[1:]))
    assert all(0 <= start < end < 2 ** 63 for start, end in ranges)
    for batch in batches:
        assert batch[:12] != batch[12:]


def test_as_many_questions_at_once_as_in_flight(base, served, monkeypatch):
    """Never more than in_flight, and that many as long as there is work."""
    policy, prompts = base
    monkeypatch.setattr(served, "in_flight", 3)
    want(delay=0.2)
    ask_for(policy, prompts, served, max_new_tokens=2)
    assert len(chats()) == 6 and max(r["in_flight"] for r in chats()) == 3


@pytest.mark.parametrize("in_flight, wave", [(96, 96), (64, 64)])
def test_waves(light, in_flight, wave):
    """96 questions are one wave if so many may be in flight. With 64, 32 of them have to wait.

    The server is paused, so it answers none before all of a wave have arrived.
    """
    with light(in_flight=in_flight) as server:
        server.wait()
        server._post("/pause")
        body = {"messages": [{"role": "user", "content": "Is it one wave?"}]}
        with ThreadPoolExecutor(1) as pool:
            answers = pool.submit(server.complete, [(i, lambda: body) for i in range(96)],
                                  lambda i, answer: [i], False)
            until = time.monotonic() + 60
            while len(chats()) < wave and time.monotonic() < until:
                time.sleep(0.05)
            arrived = len(chats())
            server._post("/resume")
            assert answers.result() == list(range(96))
    assert arrived == wave == max(r["in_flight"] for r in chats()) and len(chats()) == 96


def test_clips_are_read_when_their_turn_comes(base, served, monkeypatch):
    """The audio of questions that wait is not in memory."""
    policy, prompts = base
    monkeypatch.setattr(served, "in_flight", 1)
    load_clip, read, order = policy.load_clip, rollout._read, []
    monkeypatch.setattr(policy, "load_clip", lambda path: order.append("clip") or load_clip(path))
    monkeypatch.setattr(rollout, "_read", lambda *given: order.append("answer") or read(*given))
    ask_for(policy, prompts[2:5], served, max_new_tokens=2)
    assert order == ["clip", "answer"] * 3


def test_the_server_gets_exactly_our_samples(base, tmp_path):
    """A stereo clip at another rate, which 16 bits would round, arrives as our encoder hears it.

    The request also has the texts of the conversation, and no path of this machine.
    """
    policy, _ = base
    path = tmp_path / "stereo.wav"
    noise = np.random.default_rng(0).uniform(-1e-3, 1e-3, (15000, 2))
    soundfile.write(path, noise, 22050, subtype="FLOAT")
    question = Question("q9", (path, path), "What hums?", ("a fan", "a fridge"), "a fan")
    sampling = Sampling(temperature=1.0, max_new_tokens=4)
    body = rollout._request(policy, policy.encode(question, "Think."), 2, sampling, "0 0")
    assert str(tmp_path) not in json.dumps(body)
    assert [message["role"] for message in body["messages"]] == ["user"]
    *clips, text = body["messages"][0]["content"]
    assert text == conversation(question, False, "Think.")[0]["content"][0] and len(clips) == 2
    for clip in clips:
        wav = io.BytesIO(base64.b64decode(clip["input_audio"]["data"]))
        samples, rate = soundfile.read(wav, dtype="float32")
        assert rate == 16000 and len(samples) == 16000
        assert np.array_equal(samples, policy.load_clip(path))


def test_passing_faults(base, served, monkeypatch):
    """After HTTP 500, dropped connections and a proxy's html, the question is asked again.

    Every group arrives exactly once, and equals the group of a run without faults.
    """
    policy, prompts = base
    plain, process = ask_for(policy, prompts, served), served.process
    seen = count_groups(monkeypatch)
    want(fail=3, drop=3, html=3)
    assert ask_for(policy, prompts, served) == plain
    assert len(chats()) == 6 + 9 + 6 and set(seen.values()) == {1} and len(seen) == 6
    assert served.process is process and process.poll() is None


def test_a_batch_continues_without_metrics(base, served):
    """The server is not restarted while /metrics fails for less than STALL_SECONDS."""
    policy, prompts = base
    process = served.process
    want(blind=True, delay=1.5)
    assert len(ask_for(policy, prompts[:2], served, max_new_tokens=2)) == 6
    assert served.process is process and len(requests("/metrics")) >= 2


REFUSALS = {
    "wrong_prompt": r"prompt has (\d+) tokens, the trainer's has \1, and they .* token 0 on",
    "short_group": r"the server sent 2 completions instead of 3",
    "nan": r"not a complete completion",
    "null": r"lacks token ids or log-probs",
    "no_ids": r"lacks token ids or log-probs .*prompt_token_ids",
    "no_tokens": r"lacks token ids or log-probs .*'token_ids'",
    "no_logps": r"lacks token ids or log-probs",
    "few_logps": r"not a complete completion",
    "cut": r"finish reason 'stop'; not a complete completion",
    "abort": r"finish reason 'abort'; not a complete completion",
    "refuse": r"HTTP 400: .*maximum model length",
}


@pytest.mark.parametrize("fault, message", REFUSALS.items(), ids=REFUSALS)
def test_unusable_answers(base, served, fault, message):
    """They raise at once; the first line names the question. The server keeps running."""
    policy, prompts = base
    served.wait()
    want(**{fault: True})
    started = time.monotonic()
    with pytest.raises(RolloutError) as error:
        ask_for(policy, prompts, served)
    first = str(error.value).splitlines()[0]
    assert re.search(rf"question q\d: .*{message}", first), first
    assert time.monotonic() - started < 10 and not served.deaths
    want()
    assert len(ask_for(policy, prompts[:1], served, max_new_tokens=2)) == 3


def test_one_clip_too_many(base, served):
    """Command.clips reaches the server as its limit."""
    policy, prompts = base
    two = prompts[1].question
    three = Question("q9", (*two.audio, two.audio[0]), "?", ("a", "b"), "a")
    with pytest.raises(RolloutError, match="HTTP 400.*audio.*2"):
        ask_for(policy, [policy.encode(three)], served)


# ──────── the subprocess ────────


@pytest.mark.parametrize("sequences, flags, expected", [
    (0, "", []), (256, "", ["--max-num-seqs", 256]), (512, "", ["--max-num-seqs", 512]),
    (768, "", ["--max-num-seqs", 768, "--max-cudagraph-capture-size", 768]),
    (1000, "", ["--max-num-seqs", 1008, "--max-cudagraph-capture-size", 1008]),
    (4096, "", ["--max-num-seqs", 2048, "--max-cudagraph-capture-size", 2048]),
    (768, "--max_num_seqs=64", ["--max-num-seqs", 768]),
    (768, "-cc.cudagraph_mode=NONE", ["--max-num-seqs", 768])])
def test_flags_for_a_batch(sequences, flags, expected):
    """All of a batch at once, and in a CUDA graph, unless the user's flags say how many."""
    command = Command("python", "log", flags=flags, sequences=sequences)
    assert server_module._batch_flags(command) == expected


def test_the_users_flags_come_last(light):
    """Of repeated flags, vLLM's parser takes the last."""
    with light(flags="--max-num-seqs 64", sequences=768) as server:
        server.wait()
        words = Path(f"/proc/{server.process.pid}/cmdline").read_text().split("\0")
    places = [i for i, word in enumerate(words) if word == "--max-num-seqs"]
    assert [words[i + 1] for i in places] == ["768", "64"]


TORCHRUN = {"RANK": 3, "LOCAL_RANK": 3, "WORLD_SIZE": 8, "LOCAL_WORLD_SIZE": 4, "GROUP_RANK": 0,
            "GROUP_WORLD_SIZE": 2, "ROLE_RANK": 3, "ROLE_WORLD_SIZE": 8, "ROLE_NAME": "default",
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 1, "TORCHELASTIC_RUN_ID": "none",
            "TORCHELASTIC_RESTART_COUNT": 0, "TORCHELASTIC_MAX_RESTARTS": 0,
            "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_ERROR_FILE": "/e",
            "TORCH_NCCL_ASYNC_ERROR_HANDLING": 1, "OMP_NUM_THREADS": 1}


def test_the_server_does_not_see_torchrun(light, monkeypatch):
    """vLLM would take torchrun's processes for its own. It gets all the rest of the environment.

    That includes a number of threads that the user chose: torchrun's own choice is 1.
    """
    others = {"NCCL_DEBUG": "WARN", "GLOO_SOCKET_IFNAME": "lo", "MY_RANK": "5", "ROLE_ARN": "x"}

    def child(**variables):
        for name, value in {**others, **variables}.items():
            monkeypatch.setenv(name, str(value))
        with light() as server:
            server.wait()
            pairs = Path(f"/proc/{server.process.pid}/environ").read_text().split("\0")
        seen = dict(pair.split("=", 1) for pair in pairs if pair)
        assert others.items() <= seen.items() and seen["PATH"] == os.environ["PATH"]
        return {name: seen[name] for name in TORCHRUN if name in seen}

    assert child(OMP_NUM_THREADS=1) == {"OMP_NUM_THREADS": "1"}  # without torchrun
    assert child(**TORCHRUN) == {}
    assert child(**TORCHRUN | {"OMP_NUM_THREADS": 8}) == {"OMP_NUM_THREADS": "8"}


# ──────── the key ────────


def test_the_middleware(monkeypatch):
    """RequireKey by itself, called as ASGI does, with other paths and almost the right key."""
    def status(path="/pause", headers=(), kind="http"):
        sent = []

        async def application(scope, receive, send):
            sent.append({"status": 200})

        async def send(message):
            sent.append(message)

        scope = {"type": kind, "path": path, "headers": headers}
        asyncio.run(vllm_worker.RequireKey(application)(scope, None, send))
        return sent[0].get("status", sent[0].get("code"))

    monkeypatch.setenv("VLLM_API_KEY", "abc")
    assert status(headers=[(b"authorization", b"Bearer abc")]) == status("/health") == 200
    assert status(kind="lifespan") == 200 and status(kind="websocket") == 1008
    for path in ("/pause", "/", "/v1/models", "/healthy", "/health/x", "//health"):
        for value in (b"", b"abc", b"Bearer ab", b"Bearer abcd", b"Bearer ABC",
                      "Bearer ä".encode("latin-1")):
            assert status(path, [(b"authorization", value)] if value else []) == 401
    monkeypatch.delenv("VLLM_API_KEY")
    with pytest.raises(KeyError):
        vllm_worker.RequireKey(None)


def test_the_key_is_secret(served, world, tmp_path):
    """Each server gets random bytes, which are on no command line and not in the log."""
    served.wait()  # during the start, processes come and go
    commands = [Path(f"/proc/{pid}/cmdline").read_text().split("\0")
                for pid in members(served.process.pid)]
    assert len(commands) >= 2
    assert not any(served.key in word for words in commands for word in words)
    assert served.key not in Path(served.command.log).read_text()
    flags = ["--seed", "3", "--no-such-flag", "a b"]  # Command.flags, split as a shell does
    assert any(words[-5:-1] == flags for words in commands)
    others = [Server(world / "model", Command(python=STAND_IN, log=tmp_path / "log")).key
              for _ in range(2)]
    assert len({served.key, *others}) == 3
    assert all(len(bytes.fromhex(key)) >= 16 for key in others)


def test_our_server_ignores_the_environments_key(light, monkeypatch):
    """It has its own key, and the development mode that it needs, whatever the environment says."""
    monkeypatch.setenv("VLLM_API_KEY", "of another server")
    monkeypatch.setenv("VLLM_SERVER_DEV_MODE", "0")
    with light() as server:
        server.wait()
        assert ask(server, "/weight_info").json() == {"weight_version": "0"}
        assert httpx.get(f"{server.url}/weight_info").status_code == 401
        assert httpx.get(f"{server.url}/health").status_code == 200


@pytest.mark.parametrize("opened", [True, "rpc"], ids=["every path", "paths outside /v1"])
def test_a_server_that_needs_no_key_is_refused(served, world, monkeypatch, opened):
    served.wait()
    monkeypatch.setenv("VLLM_API_KEY", served.key)
    want(open=opened)
    with Server(world / "model", url=served.url) as other:
        with pytest.raises(RolloutError, match="without the key"):
            other.wait()


def test_a_wrong_key(base, served, world, monkeypatch, tmp_path):
    """An error at once, for sampling and for a push."""
    served.wait()
    monkeypatch.setenv("VLLM_API_KEY", "x")
    policy, prompts = base
    with Server(world / "model", url=served.url) as other:
        with pytest.raises(RolloutError, match="HTTP 401"):
            ask_for(policy, prompts, other)
        with pytest.raises(RolloutError, match="/pause.*HTTP 401"):
            push_weights(other, policy, tmp_path, 1)


def test_which_addresses_need_a_key(world, monkeypatch, tmp_path):
    """Only a server on this machine that we did not start may do without a key."""
    folder = world / "model"
    for url in ("http://10.0.0.1:1", "http://0.0.0.0:8000", "https://gpu.example/",
                "http://127.0.0.1.example:1"):
        with pytest.raises(InputError, match="VLLM_API_KEY"):
            Server(folder, url=url)
    with pytest.raises(InputError, match="VLLM_API_KEY"):
        Server(folder, Command(python=STAND_IN, log=tmp_path / "log"), key="")
    for url in ("http://127.0.0.1:1", "http://localhost:8000/", "http://[::1]:8000"):
        assert Server(folder, url=url).key == ""
    monkeypatch.setenv("VLLM_API_KEY", "abc")
    assert Server(folder, url="http://10.0.0.1:1").key == "abc"


# ──────── pushing ────────


def test_push(world, victim, tmp_path):
    """After each of two pushes the server samples from the new policy and reports its version.

    It loads the weights while it is paused, and drops its cache. Only the last checkpoint is kept.
    """
    old, prompts = load(world)
    for version in (4, 6):
        policy, _ = load(world, change=version)
        push_weights(victim, policy, tmp_path / "weights", version)
        completions = ask_for(policy, prompts, victim)
        assert gap(policy, prompts, completions) < 1e-5
        assert gap(old, prompts, completions) > 1e-2
        assert ask(victim, "/weight_info").json() == {"weight_version": str(version)}
        assert [f.name for f in (tmp_path / "weights").iterdir()] == [f"version-{version}"]
        found = check_push(victim, policy, prompts, temperature=1.2, max_gap=1e-5, seed=0)
        assert found < 1e-5
        old = policy
    changing = ("/pause", "/collective_rpc", "/reset_prefix_cache", "/update_weight_version",
                "/resume")
    asked = [r["path"] for r in requests() if r["path"] in changing]
    assert asked[-10:] == [*changing] * 2
    assert {r["query"] for r in requests("/pause")} == {"mode=wait"}
    pushed = checkpoint.load_policy(tmp_path / "weights" / "version-6")
    for there, here in zip(pushed.parameters(), policy.parameters(), strict=True):
        assert torch.equal(there, here)


def test_leftovers_of_an_interrupted_push(world, victim, tmp_path):
    """Half-written folders of an earlier run do not disturb a push, which removes them."""
    policy, prompts = load(world, change=8)
    for name in ("version-8", ".version-8.writing", "version-2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model-00001-of-00002.safetensors").write_text("half")
    push_weights(victim, policy, tmp_path, 8)
    assert gap(policy, prompts, ask_for(policy, prompts, victim)) < 1e-5
    assert [f.name for f in tmp_path.iterdir()] == ["version-8"]


def test_lora_is_pushed_merged(world, victim, tmp_path):
    """The server gets W + (α/r)·B·A, and no adapters."""
    policy, prompts = load(world)
    old, _ = load(world)
    checkpoint.add_lora(policy, 4, 8)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, p in policy.named_parameters():
            if "lora_B" in name:
                p.copy_(0.1 * torch.randn_like(p))
    push_weights(victim, policy, tmp_path, 3)
    completions = ask_for(policy, prompts, victim)
    assert gap(policy, prompts, completions) < 1e-5 and gap(old, prompts, completions) > 1e-2


def test_a_refused_push(world, victim, tmp_path, monkeypatch):
    """RolloutError that names the path. The server keeps running and is not paused."""
    policy, prompts = load(world, change=1)
    victim.wait()
    wait = victim.process.wait  # for its end: 5 s, here 0.5 s
    monkeypatch.setattr(victim.process, "wait", lambda timeout=None: wait(timeout and timeout / 10))
    want(refuse_push=True)
    with pytest.raises(RolloutError,
                       match="refused /collective_rpc: HTTP 500: .*the weights do not fit"):
        push_weights(victim, policy, tmp_path, 11)
    assert ask(victim, "/is_paused").json() == {"is_paused": False}
    assert victim.process.poll() is None
    want()
    push_weights(victim, policy, tmp_path, 12)
    assert gap(policy, prompts, ask_for(policy, prompts, victim)) < 1e-5


def test_check_push_finds_old_weights(world, victim, tmp_path):
    """A server that answers 200 and keeps its weights: the error has the gap and both means.

    A policy whose log-probs are NaN is an error as well.
    """
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
    completions = ask_for(policy, prompts, victim, group_size=1,
                          max_new_tokens=rollout.CHECK_TOKENS)
    logps = []
    for each in (policy, newer):
        with torch.no_grad():
            batch = each.collate(prompts, [c.token_ids for c in completions])
            logps.append(each(batch, 1.2).logp[batch.completion_mask])
    assert (there, here) == pytest.approx([x.mean().item() for x in logps], abs=1e-4)
    expected = (logps[0] - logps[1]).abs().mean().item()
    assert measured == pytest.approx(expected, rel=0.02) and measured > 1e-2
    with torch.no_grad():
        policy.base.lm_head.weight.fill_(math.nan)
    with pytest.raises(RolloutError, match="nan nats"):
        check_push(victim, policy, prompts, temperature=1.2, max_gap=1e9, seed=0)


@pytest.mark.parametrize("device, kernel", [("cpu", None), ("cuda", "built")])
def test_the_worker_loads_every_file(world, tmp_path, device, kernel):
    """load_folder passes on all tensors of all files; a CPU worker first drops its kernels."""
    policy, _ = load(world)
    policy.base.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    expert, taken = torch.nn.Linear(1, 1), {}
    expert.quant_method = SimpleNamespace(moe_kernel="built")
    layers = torch.nn.Sequential(expert, torch.nn.Linear(1, 1))
    worker = vllm_worker.WeightReload()
    worker.device = torch.device(device)
    worker.model_runner = SimpleNamespace(get_model=lambda: layers)
    worker.reload_weights = lambda weights_iterator: taken.update(weights_iterator)
    worker.load_folder(str(tmp_path))
    assert expert.quant_method.moe_kernel == kernel
    whole = type(policy.base).from_pretrained(tmp_path).state_dict()
    assert torch.equal(taken["thinker.lm_head.weight"], policy.base.lm_head.weight)
    assert sum(t.numel() for t in taken.values()) == sum(t.numel() for t in whole.values())
    with pytest.raises(FileNotFoundError, match="no .*safetensors"):
        worker.load_folder(str(world))


# ──────── a server that we did not start ────────


def test_a_server_at_a_url(world, victim, tmp_path, monkeypatch):
    """We sample from it and push to it, and it outlives the block.

    If somebody else has pushed to it, it is refused.
    """
    policy, prompts = load(world, change=9)
    victim.wait()
    monkeypatch.setattr(server_module, "START_SECONDS", 10)
    monkeypatch.setenv("VLLM_API_KEY", victim.key)
    with Server(world / "model", url=victim.url + "/") as there:
        push_weights(there, policy, tmp_path / "weights", 7)
        completions = ask_for(policy, prompts, there)
        assert gap(policy, prompts, completions) < 1e-5 and len(completions) == 18
        assert ask(victim, "/weight_info").json() == {"weight_version": "7"}
        push_weights(victim, policy, tmp_path / "others", 8)
        with pytest.raises(RolloutError, match="holds weights of version 8, but 7 was pushed"):
            ask_for(policy, prompts, there)
    assert victim.process.poll() is None and len(ask_for(policy, prompts[:1], victim)) == 3
