"""distributed.py, plan.py and what train.py does with them, on gloo over loopback, with torchrun:
the same training on any number of ranks, a node that serves, runs that are interrupted and resume,
exports, and the shapes of the 30B.

The runs are those of run_train.py, which has another reward, and faults on demand.
"""

import contextlib
import dataclasses
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import tiny
import torch
import torch.distributed as dist
from peft import PeftModel
from safetensors import safe_open
from transformers import Qwen3OmniMoeForConditionalGeneration

import checkpoint
import distributed
import plan
import real_models
import train
from config import read_config
from data import read_questions
from distributed import Team
from run import Run, make_optimizer, open_inputs, set_trainable
from processes import CLEAN, free_port, gone, torchrun
from server import Command
from tiny import arguments, lines

ROOT = Path(__file__).resolve().parents[2]
INFRA = ROOT / "tests" / "infra"
# What differs between any two runs.
TIMES = re.compile("seconds_|generation_tokens_per_second|wait_fraction")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a tiny model and six questions. Some completions end before max_new_tokens."""
    return tiny.write_world(tmp_path_factory.mktemp("world"), tiny.qwen3_omni_that_ends(0.7))


def near(value, **within):
    """pytest.approx, or None where nothing was measured."""
    return None if value is None else pytest.approx(value, **within)


@pytest.fixture(scope="module")
def forks():
    """A multiprocessing context. A server process that has loaded all modules forks its processes.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["run_train", "run_join", "matplotlib.figure", "peft"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(map(str, (ROOT, INFRA.parent, INFRA))))
        patch.setenv("OMP_NUM_THREADS", "1")
        multiprocessing.forkserver.ensure_running()
    return context


@pytest.fixture(scope="module")
def alone(forks, tmp_path_factory):
    """alone(flags, FAULT=…) → exit code and output of a run in one process of its own."""
    folder = tmp_path_factory.mktemp("alone")

    def run(flags, **environment):
        import run_train
        process = forks.Process(target=run_train.forked,
                                args=(flags, environment, folder / "output"))
        process.start()
        try:
            process.join(180)
            return process.exitcode, (folder / "output").read_text()
        finally:
            if process.is_alive():
                os.killpg(process.pid, signal.SIGKILL)

    return run


def job_of(folder, flags, ranks, **more):
    """run_train.py under torchrun: see processes.torchrun."""
    return torchrun(folder, [INFRA / "run_train.py", *flags], ranks, **more)


def together(folder, flags, ranks, **more):
    """The output of a job that succeeds."""
    with job_of(folder, flags, ranks, **more) as job:
        codes = job.wait()
        assert not any(codes), f"{codes}\n{job.output[-6000:]}"
        return job.output


# ──────── any number of ranks, the same result ────────


CONFIGURATIONS = {
    "grpo": ["--mask", "false", "--eta", "0", "--micro_batch_size", "0",
             "--micro_batch_tokens", "100"],
    "mask": ["--eta", "0", "--mask_truncated", "true", "--steps_per_generation", "1",
             "--offload_reference", "true"],
    "mapo": ["--eta", "0.5", "--gradient_checkpointing", "true", "--freeze_audio_tower", "false",
             "--micro_batch_tokens", "200"],
    "lora": ["--eta", "0.5", "--lora_rank", "2", "--lora_alpha", "8",
             "--gradient_checkpointing", "true"],
    "bf16": ["--eta", "0.5", "--bf16"]}  # what a GPU does; in one process it is fp32
# 8 completions per step; 16 for "mask".
RANKS = {2: ["mapo", "lora", "bf16"], 3: ["grpo", "mask"], 4: ["grpo", "mask", "mapo", "lora"]}
EXPORT = ["--export_every", "2", "--save_every", "0"]


@pytest.fixture(scope="module")
def runs(world, alone, tmp_path_factory):
    """runs(configuration, ranks) → folder of that run. One job makes all runs on so many ranks."""
    folder, made = tmp_path_factory.mktemp("runs"), set()

    def flags(name, ranks):
        return arguments(world, folder / f"{name}-{ranks}", *CONFIGURATIONS[name], *EXPORT)

    def run(name, ranks):
        if ranks == 1 and (name, 1) not in made:
            made.add((name, 1))
            code, output = alone(flags(name, 1))
            assert code == 0, output
        elif ranks > 1 and ranks not in made:
            several = [flag for each in RANKS[ranks] for flag in ("--then", *flags(each, ranks))]
            made.add(ranks)
            together(folder / f"job-{ranks}", several[1:], ranks, HELD=1)
        return folder / f"{name}-{ranks}"

    return run


def tensors(folder):
    """name → tensor of a checkpoint folder, fp32."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            found |= {name: opened.get_tensor(name).float() for name in opened.keys()}
    return found


def flat(weights):
    return torch.cat([weights[name].flatten() for name in sorted(weights)])


@pytest.mark.parametrize("name, ranks", [
    pytest.param(name, ranks, marks=[pytest.mark.slow] if ranks > 2 else [])
    for ranks, names in RANKS.items() for name in names if name != "bf16"])
def test_ranks_train_as_one_process(world, runs, name, ranks):
    """The same completions, and gradient norms, losses and per-token records within rounding.

    After four steps the weights agree within 1e-5 of their size and 1e-3 of the way that they went.
    AdamW's first steps follow the gradient's sign, which is random where the gradient is rounding.
    """
    one, many = runs(name, 1), runs(name, ranks)
    for first, second in zip(lines(one / "completions.jsonl"), lines(many / "completions.jsonl"),
                             strict=True):
        for key in ("step", "prompt_id", "token_ids", "text", "reward_total", "weight_version",
                    "finish_reason"):
            assert first[key] == second[key], key
        for key in ("delta_h", "audio_mass", "advantage"):
            assert first[key] == near(second[key], abs=2e-4), key
    metrics = lines(one / "metrics.jsonl")
    for first, second in zip(metrics, lines(many / "metrics.jsonl"), strict=True):
        assert list(first) == list(second)
        assert first["grad_norm"] == pytest.approx(second["grad_norm"], rel=1e-5)
        assert first["grad_norm"] > 1e-3
        for key in first:
            if not TIMES.search(key):
                assert first[key] == near(second[key], rel=1e-4, abs=2e-6), key
    assert 0 < sum(m["truncated"] for m in metrics) < 4  # some completions end, some are cut
    start, single, team = (flat(tensors(folder)) for folder in (
        world / "model", one / "checkpoint", many / "checkpoint"))
    gap, moved = (single - team).norm(), (single - start).norm()
    print(f"{name} on {ranks}: weights differ by {gap / single.norm():.1e} of their size, "
          f"{gap / moved:.1e} of their way")
    assert gap < 1e-5 * single.norm() and gap < 1e-3 * moved and moved > 1e-3


def test_bf16_ranks_stay_near_fp32(runs):
    """Two ranks that gather fp32 master weights in bf16, beside one process in fp32.

    Most sampled tokens are the same, and losses, Δh_t and a_t stay within the rounding of bf16.
    """
    one, many = runs("bf16", 1), runs("bf16", 2)
    pairs = list(zip(lines(one / "completions.jsonl"), lines(many / "completions.jsonl"),
                     strict=True))
    same = [(a, b) for a, b in pairs if a["step"] == 1 and a["token_ids"] == b["token_ids"]]
    gaps = {key: max(abs(x - y) for a, b in same for x, y in zip(a[key], b[key], strict=True))
            for key in ("delta_h", "audio_mass")}
    metrics = list(zip(*(lines(run / "metrics.jsonl") for run in (one, many))))
    print(f"equal completions in step 1: {len(same)} of 8; largest differences {gaps}; gradient "
          f"norms {[(round(a['grad_norm'], 4), round(b['grad_norm'], 4)) for a, b in metrics]}")
    assert len(same) >= 4 and 0 < gaps["delta_h"] < 0.02 and 0 < gaps["audio_mass"] < 0.02
    for a, b in metrics:
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=0.05)
        assert b["kl_loss"] == pytest.approx(a["kl_loss"], abs=0.01)
    weights, start = flat(tensors(many / "checkpoint")), flat(tensors(many / "checkpoint-2"))
    assert (weights != weights.bfloat16().float()).any() and not torch.equal(weights, start)


# ──────── joining ────────


class Joining:
    """A job's rendezvous store, and its ranks, which start one by one."""

    def __init__(self, forks, folder, world, **options):
        self.store = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
        self.forks, self.folder, self.world, self.options = forks, folder, world, options
        self.processes = {}

    def start(self, *ranks):
        import run_join
        for rank in ranks:
            self.processes[rank] = self.forks.Process(
                target=run_join.forked, kwargs=self.options,
                args=(rank, self.world, self.store.port, self.folder / f"rank-{rank}"))
            self.processes[rank].start()

    def wait_for(self, *keys):
        until = time.monotonic() + 60
        while not self.store.check(list(keys)):
            assert time.monotonic() < until, keys
            time.sleep(0.05)

    def end(self, rank, seconds=60):
        """→ exit code and output of a rank that must end by itself"""
        self.processes[rank].join(seconds)
        return self.processes[rank].exitcode, (self.folder / f"rank-{rank}").read_text()

    def found(self, rank):
        """What a rank that joins has printed."""
        code, output = self.end(rank)
        assert code == 0, output
        return output, json.loads(output.splitlines()[-1])


@pytest.fixture
def joining(forks, tmp_path):
    """joining(world, here=…, …) → a Joining; the rest are options of run_join.forked."""
    jobs = []

    def make(world, **options):
        jobs.append(Joining(forks, tmp_path, world, **options))
        return jobs[-1]

    yield make
    for job in jobs:
        for process in job.processes.values():
            process.kill()
            process.join()


def test_ranks_that_start_far_apart(joining):
    """Two ranks connect although the second starts later than all attempts to connect would take.

    Rank 0 says for whom it waits, once. Each rank of a node gets its part of the cores.
    """
    job = joining(2, here=2, CONNECT_SECONDS=1, TELL_SECONDS=2, JOIN_SECONDS=60)
    job.start(0)
    job.wait_for("here/0")
    time.sleep(6)
    job.start(1)
    outputs, found = zip(*map(job.found, (0, 1)))
    assert [f["gathered"] for f in found] == [[0, 1]] * 2
    assert [f["threads"] for f in found] == [12 // 2] * 2
    assert outputs[0].count("still waiting for rank 1 of node 0 (") == 1, outputs[0]
    assert "waiting" not in outputs[1]


def test_a_rank_that_never_comes(joining):
    """Rank 2 of four does not start: every other rank ends with an error that names it."""
    job = joining(4, here=2, JOIN_SECONDS=2)
    job.start(0, 1, 3)
    for rank in (0, 1, 3):
        code, output = job.end(rank)
        assert code == 1, output
        assert "after 2 s, these processes have not started: rank 2 of node 1 (" in output


@pytest.mark.parametrize("act, message", [
    (signal.SIGINT, "error: rank 1: KeyboardInterrupt"),
    pytest.param(signal.SIGKILL, "error: rank 1 has been silent for 4 s", marks=pytest.mark.slow)])
def test_a_rank_that_fails_while_the_others_wait(joining, act, message):
    """Rank 0 ends at once, not after JOIN_SECONDS: it waits for a third rank when rank 1 fails."""
    job = joining(3, here=1, SILENCE_SECONDS=4, JOIN_SECONDS=600)
    job.start(0, 1)
    job.wait_for("here/0", "here/1", "beat/1")
    os.kill(job.processes[1].pid, act)
    code, output = job.end(0)
    assert code == 1 and message in output, output


@pytest.mark.parametrize("serve", [0, 1])
def test_process_groups(joining, serve):
    """Of three ranks with a GPU each, which we pretend: gloo for objects, with a long time-out, and
    NCCL (recorded; gloo here) for the mesh of the ranks that train, with its own time-out."""
    job, trainers = joining(3, here=1, serve=serve, gpus=True), list(range(3 - serve))
    job.start(0, 1, 2)
    for rank in range(3):
        _, found = job.found(rank)
        trains, gloo = rank < 3 - serve, [[None, trainers, 30, None]]
        nccl = ["nccl", trainers, 600, "cuda:0" if trains else None]
        assert found["calls"] == [*gloo[:serve], *[["set_device", "cuda:0"]][:trains], nccl]
        assert found["WORLD"] == 7200 and found["threads"] == 12
        if trains:
            assert (found["gathered"], found["sum"]) == (trainers, sum(trainers))
            assert (found["group"], found["mesh"]) == (7200, 600)
            assert (found["device"], found["dtype"]) == ("cuda", "torch.bfloat16")


def test_process_groups_on_cpus(joining):
    """The mesh is made from the group of the ranks that train, and nothing is rounded to bf16."""
    job = joining(3, here=1, serve=1)
    job.start(0, 1, 2)
    for rank in (0, 1):
        _, found = job.found(rank)
        assert (found["gathered"], found["sum"], found["one group"]) == ([0, 1], 1, True)
        assert (found["group"], found["device"], found["dtype"]) == (7200, "cpu", "None")
    assert job.found(2)[1]["WORLD"] == 7200


# ──────── one GPU ────────


def test_a_process_with_a_gpu_joins_alone(joining):
    """Its groups are those of many processes. Its number of threads stays as it was."""
    job = joining(1, here=1, gpus=True)
    job.start(0)
    _, found = job.found(0)
    assert found["calls"] == [["set_device", "cuda:0"], ["nccl", [0], 600, "cuda:0"]]
    assert (found["device"], found["dtype"], found["threads"]) == ("cuda", "torch.bfloat16", 1)


@pytest.fixture
def gpu():
    """The Team of a process with one GPU, with gloo on the CPU in its place."""
    with distributed.team_of_one(torch.device("cpu"), "gloo") as team:
        yield team
    assert not dist.is_initialized()


def test_one_gpu_is_a_mesh_of_one(gpu, world):
    """fp32 master weights that are gathered in bf16: bit for bit the log-probs, masses and
    gradients of a model whose parameters are bf16, but gradients and parameters stay fp32."""
    assert (gpu.size, gpu.leads, gpu.mesh.size(), gpu.dtype) == (1, True, 1, torch.bfloat16)
    policy = checkpoint.load_policy(world / "model")
    low = checkpoint.load_policy(world / "model")
    for p in low.parameters():
        p.data = p.data.bfloat16()
    sharded = distributed.shard(checkpoint.load_policy(world / "model", meta=True), gpu, gpu.dtype)
    distributed.fill(sharded, policy, gpu)
    prompts = [policy.encode(q) for q in read_questions(world / "train.jsonl")[:3]]
    batch = policy.collate(prompts, [[5, 6, 7], [8], [9, 10]])
    found, wanted = (each(batch, 1.2, (1, 2)) for each in (sharded, low))
    for statistics in (found, wanted):
        (statistics.logp.sum() + statistics.head_mass.sum()).backward()
    assert torch.equal(found.logp, wanted.logp)
    assert torch.equal(found.head_mass, wanted.head_mass)
    expected, trained = dict(low.named_parameters()), 0
    for name, p in sharded.named_parameters():
        assert p.dtype == torch.float32 and torch.equal(p.to_local(), policy.get_parameter(name))
        if p.grad is not None:
            trained += 1
            assert p.grad.dtype == torch.float32
            assert torch.equal(p.grad.to_local(), expected[name].grad.float()), name
    assert trained > 20


@pytest.mark.parametrize("flags", [("--lora_rank", 2), ()], ids=["LoRA", "full"])
def test_frozen_weights_of_a_bf16_folder_stay_bf16(gpu, tmp_path, flags):
    """Only what is trained has fp32 masters. Log-probs and gradients are those of fp32 masters for
    everything, bit for bit, and so are the weights of an export."""
    policy = tiny.qwen3_omni_that_ends(0.7)
    policy.saved_dtype = torch.bfloat16
    world = tiny.write_world(tmp_path, policy)
    config = read_config(arguments(world, tmp_path / "run", *flags))
    questions, _, narrow, _ = open_inputs(config, gpu)
    torch.manual_seed(config.seed)  # LoRA's A is random
    whole = set_trainable(checkpoint.load_policy(world / "model"), config)
    wide = set_trainable(checkpoint.load_policy(world / "model", meta=True), config)
    wide = distributed.fill(distributed.shard(wide, gpu, gpu.dtype), whole, gpu)
    kinds = {(p.requires_grad, p.dtype) for p in narrow.parameters()}
    assert kinds == {(True, torch.float32), (False, torch.bfloat16)}
    prompts = [narrow.encode(q) for q in questions[:3]]
    batch = narrow.collate(prompts, [[5, 6, 7], [8], [9, 10]])
    for each in (narrow, wide):
        out = each(batch, 1.2, (1, 2))
        (out.logp.sum() + out.head_mass.sum()).backward()
        each.logp = out.logp
    assert torch.equal(narrow.logp, wide.logp)
    gradients = [{name: p.grad.to_local() for name, p in each.named_parameters()
                  if p.grad is not None} for each in (narrow, wide)]
    assert len(gradients[0]) > 10 and gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(g, gradients[1][name]) for name, g in gradients[0].items())
    for number, each in enumerate((narrow, wide)):
        checkpoint.save_policy(each, tmp_path / f"export-{number}", gpu)
    assert torch.equal(*(flat(tensors(tmp_path / f"export-{number}")) for number in (0, 1)))


def test_one_gpu_saves_and_resumes(gpu, world, tmp_path):
    """The state has the fp32 masters and AdamW's moments, and an export has the whole weights.

    The kind of AdamW is that of the run that resumes, here fused, not that of the saved one.
    """
    config = read_config(arguments(world, tmp_path))

    def loaded():
        policy = set_trainable(checkpoint.load_policy(world / "model", meta=True), config)
        policy = distributed.shard(policy, gpu, gpu.dtype)
        distributed.fill(policy, checkpoint.load_policy(world / "model"), gpu)
        run = Run(config, gpu, policy, None, [], [], *make_optimizer(policy, config), rows={})
        return run, {name: p.to_local() for name, p in policy.named_parameters()}

    run, weights = loaded()
    for group in run.optimizer.param_groups:
        group["lr"] = 1e-3  # the schedule starts at 0
        for p in group["params"]:
            p.grad = p.detach().clone()
    run.optimizer.step()
    for group in run.optimizer.param_groups:
        assert group["fused"]
        group["fused"] = False
    checkpoint.save_state(tmp_path / "state", 1, run, None)
    checkpoint.save_checkpoint(run.policy, tmp_path / "checkpoint", gpu)
    again, resumed = loaded()
    assert any(not torch.equal(resumed[name], weights[name]) for name in weights)
    assert checkpoint.resume(again) == (1, None)
    assert all(group["fused"] for group in again.optimizer.param_groups)
    assert all(torch.equal(resumed[name], weights[name]) for name in weights)
    moments, saved = (run_.optimizer.state_dict()["state"] for run_ in (again, run))
    assert all(torch.equal(moments[i]["exp_avg"].to_local(), saved[i]["exp_avg"].to_local())
               for i in saved)
    exported = checkpoint.load_policy(tmp_path / "checkpoint")
    assert all(torch.equal(p, weights[name]) for name, p in exported.named_parameters())


# ──────── exports ────────


@torch.no_grad()
def logits(thinker, policy, world):
    """All logits of the audio view of three questions with a completion each."""
    prompts = [policy.encode(q) for q in read_questions(world / "train.jsonl")[:3]]
    batch = policy.collate(prompts, [[5, 6, 7], [8], [9, 10]])
    output = thinker(input_ids=batch.input_ids, attention_mask=batch.attention_mask, **batch.audio)
    return output.logits[batch.attention_mask.bool()]


@pytest.mark.parametrize("name", ["mapo", "lora"])
def test_export_of_two_ranks(world, runs, name):
    """checkpoint/ loads as transformers' whole Omni model and with load_policy, with equal logits.

    Under LoRA they equal those of the base with adapter/, as peft loads it. export_every leaves the
    folder of an earlier step.
    """
    folder, base = runs(name, 2), checkpoint.load_policy(world / "model")
    whole = Qwen3OmniMoeForConditionalGeneration.from_pretrained(folder / "checkpoint",
                                                                 dtype=torch.float32).eval()
    policy = checkpoint.load_policy(folder / "checkpoint")
    exported = logits(policy.base, policy, world)
    torch.testing.assert_close(logits(whole.thinker, policy, world), exported, atol=1e-5, rtol=1e-5)
    assert (exported - logits(base.base, base, world)).abs().max() > 1e-3  # it has learned
    early = checkpoint.load_policy(folder / "checkpoint-2")
    exported_early = logits(early.base, early, world)
    assert (exported_early - exported).abs().max() > 1e-4
    assert not list(folder.glob(".*")) and not (folder / "state").exists()
    assert not (folder / "checkpoint-4").exists()
    has_adapters = name == "lora"
    assert (folder / "adapter").exists() == (folder / "adapter-2").exists() == has_adapters
    if has_adapters:
        for adapter, wanted in (("adapter", exported), ("adapter-2", exported_early)):
            adapted = PeftModel.from_pretrained(checkpoint.load_policy(world / "model").base,
                                                folder / adapter,
                                                key_mapping={r"^thinker\.": ""}).eval()
            torch.testing.assert_close(logits(adapted, base, world), wanted, atol=1e-5, rtol=1e-5)


# ──────── a node that serves ────────


SERVED = ["--rollout", "vllm", "--vllm_python", "tests/stand_in/python"]


def test_a_node_that_serves_is_told_everything(tmp_path, monkeypatch):
    """Every field of Command and every option of Server reaches the server on that node."""
    made = []

    class Recorded(contextlib.nullcontext):
        url, key = "http://10.0.0.1:1", "abc"

        def __init__(self, folder, command=None, **options):
            super().__init__(self)
            made.append((command, options))

        def raise_if_never_ready(self):
            pass

    def train_there():
        with contextlib.ExitStack() as stack:
            distributed.launch(stack, team, "rollout", tmp_path, command, name="p", in_flight=96)
        team.store.set("over", "well")

    monkeypatch.setattr(distributed, "Server", Recorded)
    monkeypatch.setattr(distributed, "_own_address", lambda: "10.0.0.1")
    monkeypatch.setenv("LOCAL_RANK", "0")
    team = Team(node_serves=True, store=dist.HashStore())
    command = Command(python="python", log=str(tmp_path / "log"), flags="--seed 3", clips=2,
                      sequences=768, fp32_head=False)
    fields = dataclasses.asdict(command)
    assert all(fields[f.name] != f.default for f in dataclasses.fields(Command)
               if f.name != "host")
    trainer, handler = threading.Thread(target=train_there), signal.getsignal(signal.SIGTERM)
    trainer.start()
    try:
        distributed.serve(team)
    finally:
        signal.signal(signal.SIGTERM, handler)
        trainer.join()
    options = {"name": "p", "in_flight": 96}
    assert made[0] == (dataclasses.replace(command, host="10.0.0.1"), options)
    restart = made[1][1].pop("restart")
    assert made[1] == (None, {"url": Recorded.url, "key": "abc", **options}) and restart


def rank_of_parent(pid):
    """Rank and node of the process that started a server. The server itself does not know them."""
    parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]
    pairs = Path(f"/proc/{parent}/environ").read_text().split("\0")
    environment = dict(pair.split("=", 1) for pair in pairs if "=" in pair)
    return environment["RANK"], environment["GROUP_RANK"]


@pytest.mark.slow
def test_four_nodes_one_of_which_serves(world, alone, tmp_path):
    """The last of four nodes serves and does not train.

    One run is synchronous, one async, one also has a checker's server, and one has its server
    killed. All finish with the right weight versions, and nothing is left running.
    """
    log, python = tmp_path / "requests.jsonl", {"STAND_IN_PYTHON": sys.executable}
    five = [*SERVED, "--max_steps", "5"]
    names = {"sync": [], "async": ["--async_rollouts", "true"],
             "checked": ["--checker", world / "model"], "killed": []}
    flags = [flag for name, more in names.items()
             for flag in ("--then", *arguments(world, tmp_path / name, *five, *more))][1:]
    servers, killed, metrics = {}, None, tmp_path / "killed" / "metrics.jsonl"
    with job_of(tmp_path, flags, 4, nodes=4, STAND_IN_LOG=log, **python) as job:
        until = time.monotonic() + 300
        while any(agent.poll() is None for agent in job.agents) and time.monotonic() < until:
            time.sleep(0.02)
            asked = ([json.loads(line) for line in log.read_text().splitlines()]
                     if log.is_file() else [])
            for pid in {r["pid"] for r in asked} - set(servers):
                with contextlib.suppress(OSError):
                    servers[pid] = rank_of_parent(pid)
            chats = [r["pid"] for r in asked if r["path"] == "/v1/chat/completions"]
            if (killed is None and metrics.is_file() and chats[-1] == list(servers)[-1]
                    and len(lines(metrics)) >= 2):
                killed = chats[-1]
                os.kill(killed, signal.SIGKILL)
        assert job.wait(1) == [0] * 4, job.output[-6000:]
        assert gone(tmp_path)
        assert "starting it again with weights of version" in job.outputs[0].read_text()
    assert killed
    assert len(servers) == 6  # one per run, the checker, and the successor of the killed one
    assert "/health" in (tmp_path / "checked" / "checker.log").read_text()
    assert set(servers.values()) == {("3", "3")}
    for name in names:
        metrics = lines(tmp_path / name / "metrics.jsonl")
        versions = [0, 0, 0, 0, 2] if name == "async" else [0, 0, 2, 2, 4]
        assert [m["step"] for m in metrics] == [1, 2, 3, 4, 5]
        assert [m["weight_version"] for m in metrics] == versions
        for m in metrics:
            assert all(math.isfinite(m[key]) for key in ("loss", "grad_norm", "sampler_gap",
                                                         "reward"))
            fresh = m["step"] - 1 - m["weight_version"] < 2
            assert not fresh or m["sampler_gap"] < 1e-3, name
        assert not (tmp_path / name / "weights").exists()
        assert (tmp_path / name / "checkpoint").is_dir()
    code, output = alone(arguments(world, tmp_path / "one", *five), **python)
    assert code == 0, output
    for name in ("sync", "killed"):  # the seeds do not depend on who trains
        for first, second in zip(lines(tmp_path / "one" / "completions.jsonl"),
                                 lines(tmp_path / name / "completions.jsonl"), strict=True):
            assert first["prompt_id"] == second["prompt_id"]
            assert first["token_ids"] == second["token_ids"]


@pytest.mark.slow
def test_a_server_that_does_not_start_ends_the_job(world, tmp_path):
    """On a node that serves: all processes end within a minute, with the server's own error."""
    faults = tmp_path / "faults.json"
    faults.write_text(json.dumps({"die_at_start": "no memory for this model"}))
    flags = arguments(world, tmp_path / "out", *SERVED)
    with job_of(tmp_path / "job", flags, 2, nodes=2, STAND_IN=faults,
                STAND_IN_PYTHON=sys.executable) as job:
        assert all(code != 0 for code in job.wait(60))
        for output in job.outputs:
            assert "before it was ready" in output.read_text()
            assert "no memory for this model" in output.read_text()
        assert gone(tmp_path / "out")


BARRIER = """
import sys, time, torch, torch.distributed as dist
import distributed
distributed.CONNECT_SECONDS = 2
rank = int(sys.argv[1])
store = dist.TCPStore("127.0.0.1", int(sys.argv[2]), 2, rank == 0)
distributed._connect(store, rank, 2, 1)  # rank 1 serves
time.sleep(0 if rank else 5)
dist.barrier()
print("through", flush=True)
time.sleep(60)  # killed before: a rank that leaves would end the other's connections
"""


@pytest.mark.slow
def test_a_node_that_serves_waits_for_the_last_checkpoint(tmp_path):
    """Rank 0 may write for longer than CONNECT_SECONDS: the last barrier has no such limit."""
    port = str(free_port())
    processes = [subprocess.Popen([sys.executable, "-c", BARRIER, str(rank), port], cwd=ROOT,
                                  stdout=subprocess.PIPE, env={**CLEAN, "OMP_NUM_THREADS": "1"})
                 for rank in (0, 1)]
    try:
        assert [process.stdout.readline() for process in processes] == [b"through\n"] * 2
    finally:
        for process in processes:
            process.kill()
            process.communicate()


WANDB = """
import json, os
from types import SimpleNamespace
written = open(os.environ["WRITTEN"], "a")
config = SimpleNamespace(update=lambda values, allow_val_change: None)
def write(*values):
    print(*values, file=written, flush=True)
def init(project, **_):
    return SimpleNamespace(log=lambda values, step, **_: write(step, values["loss"]),
                           finish=lambda: write("finished"))
"""


@pytest.mark.slow
def test_a_tracker_leaves_the_ranks_connected(world, tmp_path):
    """Metrics go to a stand-in for wandb. It is closed before the last checkpoint, which needs all
    ranks."""
    about = tmp_path / "site" / "wandb-1.dist-info" / "METADATA"
    about.parent.mkdir(parents=True)
    about.write_text("Metadata-Version: 2.1\nName: wandb\nVersion: 1\n")
    (tmp_path / "site" / "wandb.py").write_text(WANDB)
    flags = arguments(world, tmp_path / "out", "--report_to", "wandb", "--max_steps", "2")
    together(tmp_path / "job", flags, 2, PYTHONPATH=tmp_path / "site",
             WRITTEN=tmp_path / "written")
    assert len(list((tmp_path / "out" / "checkpoint").glob("model-*.safetensors"))) == 2
    logged = [f"{m['step']} {m['loss']}" for m in lines(tmp_path / "out" / "metrics.jsonl")]
    assert (tmp_path / "written").read_text().splitlines() == [*logged, "finished"]


# ──────── resuming ────────


LONG = ["--max_steps", "6", "--eta", "0.5", "--mask_truncated", "true"]


def long(world, out, *more):
    """Flags of a run of 6 steps with evaluations; a generation batch has 2 steps."""
    return arguments(world, out, *LONG, "--eval_data", world / "train.jsonl", *more)


@pytest.fixture(scope="module")
def uninterrupted(world, alone, tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted") / "out"
    code, output = alone(long(world, folder))
    assert code == 0, output
    return folder


def assert_same_run(folder, wanted, exact=True):
    """Metrics, completions, evaluations and weights: bit for bit, or within 1e-6."""
    for name in ("metrics.jsonl", "evaluation.jsonl"):
        for first, second in zip(lines(folder / name), lines(wanted / name), strict=True):
            assert list(first) == list(second)
            for key in first:
                if not TIMES.search(key):
                    expected = second[key] if exact else near(second[key], rel=1e-6, abs=1e-6)
                    assert first[key] == expected, key
    here, there = folder / "completions.jsonl", wanted / "completions.jsonl"
    if exact:
        assert here.read_text() == there.read_text()
    assert ([(c["step"], c["token_ids"]) for c in lines(here)]
            == [(c["step"], c["token_ids"]) for c in lines(there)])
    weights, others = (tensors(f / "checkpoint") for f in (folder, wanted))
    if exact:
        assert len(weights) == len(others)
        assert all(torch.equal(weights[key], others[key]) for key in others)
    assert (flat(weights) - flat(others)).norm() < 1e-5 * flat(others).norm()
    assert not (folder / "state").exists() and not list(folder.glob(".*"))


def states(folder):
    return sorted(path.name for path in (folder / "state").iterdir())


# save_every, fault, step of the newest state (None if there is none)
MOMENTS = [
    (1, "kill step 1", None), (1, "kill step 2", 1), (1, "kill step 3", 2), (1, "kill step 4", 3),
    (1, "kill step 5", 4), (1, "kill step 6", 5), (2, "kill step 2", None), (2, "kill step 4", 2),
    (3, "kill step 6", 3), (1, "kill fsync 3", 1), (1, "kill fsync 6", 2),
    (1, "kill before .step-3.writing", 2), (1, "kill after .step-3.writing", 3),
    (2, "kill before .step-4.writing", 2), (1, "kill copyfile", 5),
    (1, "kill before .checkpoint.writing", 5), (4, "kill after .checkpoint.writing", 4),
    (1, "raise step 4", 3), (5, "term step 3", 3)]


@pytest.mark.slow
def test_resumes_from_any_moment(world, alone, uninterrupted, tmp_path):
    """A run that was killed and resumes ends with every number of the run without interruption.

    It is killed before each optimizer step, while a state is written or renamed, and in the last
    export. It repeats only the steps since the last state. The last two states are kept, and a
    half-written one is not read.
    """
    for number, (every, fault, newest) in enumerate(MOMENTS):
        out = tmp_path / f"out-{number}"
        flags = long(world, out, "--save_every", every)
        code, output = alone(flags, FAULT=fault)
        expected = {"kill": -signal.SIGKILL, "raise": 1, "term": 0}[fault.split()[0]]
        assert code == expected, (fault, output)
        names = states(out) if (out / "state").exists() else []
        whole = sorted(int(name.removeprefix("step-")) for name in names
                       if name.startswith("step-"))
        assert whole[-1:] == ([newest] if newest else []), fault
        assert len(whole) <= (3 if "after .step" in fault else 2), fault
        if newest is None:
            code, output = alone([*flags, "--resume", "true"])
            assert code == 2 and output.count("\n") == 1, output
            assert "no whole state to resume from" in output, output
            continue
        # What a run that dies while it writes leaves: the highest number, but not a state.
        half = out / "state" / ".step-9.writing"
        shutil.copytree(out / "state" / f"step-{newest}", half, dirs_exist_ok=True)
        (half / "run.pt").unlink()
        code, output = alone([*flags, "--resume", "true"])
        assert code == 0, (fault, output)
        assert_same_run(out, uninterrupted)


@pytest.fixture(scope="module")
def stopped(world, alone, tmp_path_factory):
    """output_dir of a run in one process that SIGTERM stopped after step 3."""
    folder = tmp_path_factory.mktemp("stopped") / "out"
    code, output = alone(long(world, folder, "--save_every", "1"), FAULT="term step 3")
    assert code == 0, output
    assert "stopped by SIGTERM after step 3; --resume true" in output, output
    assert states(folder) == ["step-2", "step-3"] and len(lines(folder / "metrics.jsonl")) == 3
    assert not (folder / "checkpoint").exists()
    return folder


CHANGES = {"learning_rate": 2e-3, "group_size": 8, "max_steps": 8, "seed": 1, "eta": 0.25,
           "lora_rank": 2, "temperature": 1.0, "steps_per_generation": 4,
           "mask_truncated": "false", "max_new_tokens": 11, "freeze_audio_tower": "false",
           "target_layers": 1, "weight_decay": 0.2, "instruction": "Think."}


@pytest.mark.parametrize("name", CHANGES)
def test_resume_refuses_another_configuration(world, alone, stopped, tmp_path, name):
    """For a field that changes results: one line that names it, exit code 2, files as before."""
    out = shutil.copytree(stopped, tmp_path / "out")
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    code, output = alone(long(world, out, "--resume", "true", f"--{name}", str(CHANGES[name])))
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(errors) == 1 and f"{name} is " in errors[0], output
    assert "Traceback" not in output, output
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_resume_accepts_another_place(world, alone, stopped, uninterrupted, tmp_path):
    """Fields that say where and how a run computes may change, and the folder may have moved."""
    out = shutil.copytree(stopped, tmp_path / "elsewhere")
    code, output = alone(long(world, out, "--resume", "true", "--save_every", "2",
                              "--micro_batch_size", "8", "--gradient_checkpointing", "true",
                              "--export_every", "5"))
    assert code == 0 and "Warning" not in output, output
    assert (out / "checkpoint-5").is_dir()
    for first, second in zip(lines(out / "metrics.jsonl"), lines(uninterrupted / "metrics.jsonl"),
                             strict=True):
        assert first["grad_norm"] == pytest.approx(second["grad_norm"], rel=1e-5)


@pytest.mark.slow
def test_resume_on_another_number_of_ranks(world, alone, stopped, uninterrupted, tmp_path):
    """SIGTERM to torchrun's agent leaves the state of the step. Two ranks resume on two and on one,
    and one process resumes on two."""
    two, one = tmp_path / "two", tmp_path / "one"
    grown = shutil.copytree(stopped, tmp_path / "grown")
    with job_of(tmp_path / "job", long(world, two, "--save_every", "1"), 2,
                FAULT="term-agent step 3") as job:
        job.wait(120)
        assert "stopped by SIGTERM after step 3" in job.output, job.output
    assert states(two) == ["step-2", "step-3"] and not (two / "checkpoint").exists()
    shutil.copytree(two, one)
    code, output = alone(long(world, one, "--resume", "true"))
    assert code == 0, output
    together(tmp_path / "job", [*long(world, two, "--resume", "true"), "--then",
                                *long(world, grown, "--resume", "true")], 2)
    for folder in (two, one, grown):
        assert_same_run(folder, uninterrupted, exact=False)


@pytest.mark.slow
def test_resume_of_lora(world, alone, tmp_path):
    """Adapters and their moments come back exactly; frozen weights come from the model folder."""
    whole, out, lora = tmp_path / "whole", tmp_path / "out", CONFIGURATIONS["lora"]
    code, output = alone(arguments(world, whole, *lora))
    assert code == 0, output
    code, _ = alone(arguments(world, out, *lora, "--save_every", "1"), FAULT="kill step 4")
    assert code == -signal.SIGKILL
    saved = sum(path.stat().st_size for path in (out / "state" / "step-3").glob("*.distcp"))
    assert saved < 0.5 * (world / "model" / "model.safetensors").stat().st_size
    code, output = alone(arguments(world, out, *lora, "--resume", "true"))
    assert code == 0, output
    assert_same_run(out, whole)


# ──────── failures ────────


@pytest.mark.slow
@pytest.mark.parametrize("act", ["raise", "kill"])
def test_a_rank_that_fails_ends_the_job(world, alone, uninterrupted, tmp_path, act):
    """Rank 1 of two nodes raises, or is killed, before the fourth optimizer step.

    Both agents end with an error within a minute, the output names the rank, nothing is left
    running, and the run resumes from its last state.
    """
    out = tmp_path / "out"
    with job_of(tmp_path / "job", long(world, out, "--save_every", "1"), 2, nodes=2,
                FAULT=f"{act} step 4", FAULT_RANK=1) as job:
        until = time.monotonic() + 120
        while not (out / "state" / "step-3").is_dir() and time.monotonic() < until:
            time.sleep(0.1)
        failed = time.monotonic()
        codes = job.wait(90)
        print(f"{act}: over after {time.monotonic() - failed:.1f} s")
        assert time.monotonic() - failed < 60 and all(codes), (codes, job.output)
        if act == "raise":
            assert "the fault of rank 1" in job.outputs[0].read_text(), job.output
        else:
            assert re.search(r"rank +: 1 [^$]*exitcode +: -9", job.output), job.output
        assert gone(out)
    assert states(out) == ["step-2", "step-3"]
    code, output = alone(long(world, out, "--resume", "true"))
    assert code == 0, output
    assert_same_run(out, uninterrupted, exact=False)


@pytest.mark.slow
def test_bad_input_under_torchrun(world, tmp_path):
    """A data file that does not exist: both ranks end within a minute, nothing is written, and only
    rank 0 prints an error, one line that names the file."""
    out = tmp_path / "out"
    with job_of(tmp_path / "job", arguments(world, out, "--data", "nowhere.jsonl"), 2) as job:
        assert job.wait(60) != [0]
        errors = [line for line in job.output.splitlines() if re.search("error: (?!rank)", line)]
        assert len(errors) == 1 and "nowhere.jsonl" in errors[0], job.output
        assert "[rank0]: Traceback" not in job.output and gone(out) and not out.exists()


WORLDS = {
    "one node serves": (1, 2, ["--rollout", "vllm", "--rollout_nodes", "1"],
                        "rollout_nodes is 1.*none would be left"),
    "two nodes serve": (2, 1, ["--rollout", "vllm", "--rollout_nodes", "2"],
                        "rollout_nodes is 2: it must be"),
    "a server without questions": (2, 1, ["--rollout_nodes", "1"],
                                   "rollout_nodes is 1 and rollout is 'local'"),
    "too many ranks": (3, 3, [], "9 processes train, but an optimizer step has only 8 completions")}


@pytest.mark.parametrize("nodes, here, more, message", WORLDS.values(), ids=WORLDS)
def test_a_world_that_does_not_fit(world, tmp_path, monkeypatch, capsys, nodes, here, more,
                                   message):
    """One line before anything starts, and exit code 2."""
    for name, value in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", nodes * here),
                        ("GROUP_WORLD_SIZE", nodes), ("LOCAL_WORLD_SIZE", here)):
        monkeypatch.setenv(name, str(value))
    assert train.main(arguments(world, tmp_path / "out", *more)) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and re.search(f"^error: .*{message}", error), error
    assert not (tmp_path / "out").exists()


# ──────── the shapes of the 30B ────────


@pytest.fixture(scope="module")
def big(tmp_path_factory):
    """The folder of Qwen3-Omni-30B-A3B without weights, and with the tiny tokenizer."""
    return real_models.write_folder(real_models.omni_config(), tmp_path_factory.mktemp("big"))


def test_units_of_the_30b(big):
    """Each of the 31.7 B parameters is in exactly one unit, the innermost that contains it. No unit
    gathers more than 1.5 GB."""
    policy = checkpoint.load_policy(big, meta=True)
    assert sum(p.numel() for p in policy.parameters()) == pytest.approx(31.7e9, rel=1e-3)
    assert all(p.is_meta for p in policy.parameters())
    units = distributed.units(policy)
    assert len(units) == 48 + 32 + 3 and len(set(units)) == len(units) and units[-1] is policy
    owner = {}
    for i, unit in enumerate(units):
        inner = set(unit.modules()) - {unit}
        assert not any(later in inner for later in units[i + 1:])  # inner ones come first
        own = [p for p in unit.parameters() if id(p) not in owner]
        owner |= {id(p): unit for p in own}
        assert 0 < 2 * sum(p.numel() for p in own) <= 1.5e9
    assert set(owner) == {id(p) for p in policy.parameters()}
    head = {id(policy.base.lm_head.weight),
            id(policy.base.model.language_model.embed_tokens.weight)}
    assert head <= {p for p, unit in owner.items() if unit is policy}


def hub_names(layers, experts, encoder_layers, blocks, mergers):
    """The thinker's tensors in Qwen3-Omni-30B-A3B's checkpoint on the hub, from its index."""
    names = ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
    for i in range(layers):
        names += [f"model.layers.{i}.{x}.weight" for x in (
            "input_layernorm", "post_attention_layernorm", "self_attn.q_proj", "self_attn.k_proj",
            "self_attn.v_proj", "self_attn.o_proj", "self_attn.q_norm", "self_attn.k_norm",
            "mlp.gate")]
        names += [f"model.layers.{i}.mlp.experts.{e}.{x}_proj.weight" for e in range(experts)
                  for x in ("gate", "up", "down")]

    def both(prefix, *parts):
        return [f"{prefix}.{part}.{leaf}" for part in parts for leaf in ("weight", "bias")]

    names += ["audio_tower.conv_out.weight"]
    names += both("audio_tower", "conv2d1", "conv2d2", "conv2d3", "ln_post", "proj1", "proj2")
    for i in range(encoder_layers):
        names += both(f"audio_tower.layers.{i}", "self_attn.q_proj", "self_attn.k_proj",
                      "self_attn.v_proj", "self_attn.out_proj", "self_attn_layer_norm", "fc1",
                      "fc2", "final_layer_norm")
    names += ["visual.pos_embed.weight", *both("visual", "patch_embed.proj")]
    for i in range(blocks):
        names += both(f"visual.blocks.{i}", "attn.qkv", "attn.proj", "mlp.linear_fc1",
                      "mlp.linear_fc2", "norm1", "norm2")
    for merger in ("merger", *(f"merger_list.{i}" for i in range(mergers))):
        names += both(f"visual.{merger}", "ln_q", "mlp.0", "mlp.2")
    return {f"thinker.{name}" for name in names}


def test_exported_names_are_the_hubs(tmp_path):
    """What save writes for the 30B's config, with two narrow layers, has the names of the hub."""
    config = real_models.omni_config(layers=2, experts=16, hidden=64, audio=40, vision=32,
                                     vocabulary=400)
    small = tiny.qwen3_omni()
    token = small.tokenizer.convert_tokens_to_ids
    for name in ("audio", "image", "video"):
        setattr(config.thinker_config, f"{name}_token_id", token(f"<|{name}_pad|>"))
    config.thinker_config.text_config.rope_parameters["mrope_section"] = [1, 1, 0]
    config.save_pretrained(tmp_path)
    thinker = type(small.base)._from_config(config.thinker_config, dtype=torch.float32)
    policy = checkpoint.make_policy(thinker, small.tokenizer, small.feature_extractor)
    checkpoint.save_policy(policy, tmp_path / "saved")
    written = tensors(tmp_path / "saved")
    assert set(written) == hub_names(2, 16, 1, 27, 3)
    gate = written["thinker.model.layers.1.mlp.experts.15.gate_proj.weight"]
    assert gate.shape == (24, 64)


# ──────── the plan ────────


@pytest.mark.parametrize("name", ["mapo", "lora"])
def test_plan_is_what_two_ranks_hold(world, runs, name):
    """The sharded lines for two GPUs are what each of two ranks held after a step, within 2 %.

    On a CPU the reference is in fp32, hence numbers are compared, not bytes.
    """
    folder = runs(name, 2)
    config = read_config(arguments(world, folder, *CONFIGURATIONS[name]))
    policy = set_trainable(checkpoint.load_policy(world / "model", meta=True), config)
    table, _ = plan.plan(policy, config, 2)
    table["weights"] = (table["trained weights, fp32, sharded"]
                        + table["frozen weights, sharded"])
    for rank in (0, 1):
        held = json.loads((folder / f"held-{rank}.json").read_text())
        for what, line, width in (("weights", "weights", 4),
                                  ("gradients", "gradients, fp32, sharded", 4),
                                  ("AdamW", "AdamW, fp32, sharded", 4),
                                  ("reference", "reference, bf16, sharded", 2)):
            assert width * held[what] == pytest.approx(table[line], rel=0.02), what
