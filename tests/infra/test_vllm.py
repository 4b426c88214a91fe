"""The server on a real vLLM: what it samples, what a push changes, and what is left of it when
something is killed. Skipped unless vLLM's environment exists."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import httpx
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM,
                          Qwen3OmniMoeThinkerForConditionalGeneration,
                          RepetitionPenaltyLogitsProcessor, TemperatureLogitsWarper,
                          TopKLogitsWarper, TopPLogitsWarper)

import evaluate
import model
from checkpoint import load_policy, make_policy, save_policy
from config import TrainConfig
import server as server_module
import toy
from data import read_questions
from processes import members, torchrun, wait_for_end
from rewards import CHECKER_PROMPT, CheckerError, check_consistency, consistency_rewards
from rollout import Sampling, check_push, push_weights, sample
from server import Command, RolloutError, Server
from serving import DEVELOPMENT_PATHS, ROOT, change_weights, count_groups
from tiny import lines

PYTHON = ROOT / ".venv-vllm" / "bin" / "python"
FLAGS = "--enforce-eager --max-model-len 512 --max-num-seqs 64 --no-enable-chunked-prefill"
pytestmark = [pytest.mark.vllm,
              pytest.mark.skipif(not PYTHON.is_file(), reason="no .venv-vllm; run `make vllm`")]


@pytest.fixture(scope="module")
def world():
    return toy.prepare(ROOT / "runs" / "toy-world-0", 0)


def load(world, count=8):
    policy = load_policy(world / "model")
    return policy, [policy.encode(q) for q in read_questions(world / "late" / "test.jsonl")[:count]]


@pytest.fixture(scope="module")
def experts(world, tmp_path_factory):
    """A folder like `world`, whose model has experts and random weights.

    The toy's own decoder is dense. vLLM loads and reloads experts in another way. Placeholders get
    almost no probability, as in tiny.qwen3_omni_that_ends: the server bans them, and check_push
    would see that.
    """
    folder = tmp_path_factory.mktemp("experts")
    toy_policy = load_policy(world / "model")
    torch.manual_seed(0)
    thinker = Qwen3OmniMoeThinkerForConditionalGeneration(toy.thinker_config(
        toy_policy.tokenizer, hidden_size=128, layers=3, audio_size=64, std=0.15))
    policy = make_policy(thinker, toy_policy.tokenizer, toy_policy.feature_extractor)
    with torch.no_grad():
        thinker.model.language_model.embed_tokens.weight[:, 0] = 10  # layers add less
        thinker.lm_head.weight[:, 0] = 0
        thinker.lm_head.weight[policy.placeholder_ids, 0] = -10
    save_policy(policy, folder / "model")
    (folder / "late").symlink_to(world / "late")
    return folder


@pytest.fixture(scope="module")
def served(experts, tmp_path_factory):
    """(server, a folder for pushes). A test that changes the policy pushes its weights."""
    folder = tmp_path_factory.mktemp("served")
    command = Command(python=PYTHON, log=folder / "vllm.log", flags=FLAGS)
    with Server(experts / "model", command) as server:
        yield server, folder
        group = server.process.pid
    assert wait_for_end(group)


@torch.no_grad()
def gap(policy, prompts, completions, sampling):
    """Largest difference of the server's log-probs from those of the trainer's own logits.

    One completion at a time, cut and renormalised by transformers' processors.
    """
    worst, group_size = 0.0, len(completions) // len(prompts)
    for i, completion in enumerate(completions):
        prompt, ids = prompts[i // group_size], completion.token_ids
        batch = policy.collate([prompt], [ids])
        output = policy.base.model(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False,
            position_ids=model.positions(batch.attention_mask), **batch.audio)
        logits = policy.base.lm_head(output.last_hidden_state[0, len(prompt.ids) - 1:-1])
        logits[:, policy.placeholder_ids] = -torch.inf
        for t, token in enumerate(ids):
            before, row = torch.tensor([prompt.ids + ids[:t]]), logits[t:t + 1]
            if sampling.repetition_penalty != 1:
                row = RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)(before, row)
            row = TemperatureLogitsWarper(sampling.temperature)(before, row)
            row = TopKLogitsWarper(sampling.top_k)(before, row) if sampling.top_k else row
            row = TopPLogitsWarper(sampling.top_p)(before, row) if sampling.top_p < 1 else row
            ours = row.log_softmax(dim=-1)[0, token].item()
            worst = max(worst, abs(ours - completion.logps[t]))
    return worst


def server_group(log):
    """The process group that vLLM's API server has named in its log."""
    return int(log.read_text().split("APIServer pid=")[1].split(")")[0])


# ──────── sampling and pushing ────────


def test_log_probs_before_and_after_pushes(experts, served):
    """Equal prompt ids (or sample raises) and log-probs within 1e-4 in fp32, with experts.

    Before a push, after it, and after a second one; with temperature, top-k, top-p and a repetition
    penalty.
    """
    server, folder = served
    policy, prompts = load(experts, 6)
    for version in range(3):
        if version:
            change_weights(policy, version)
            push_weights(server, policy, folder / "weights", version)
            found = check_push(server, policy, prompts[:4], temperature=1.2, max_gap=1e-4, seed=1)
            assert found < 1e-4
        for sampling in (Sampling(temperature=1.2, max_new_tokens=40),
                         Sampling(temperature=1.2, top_k=20, top_p=0.9, max_new_tokens=40)):
            completions = sample(policy, prompts, 3, sampling, seed=version, server=server)
            assert len(completions) == 18
            assert {c.finish_reason for c in completions} <= {"stop", "length"}
            assert gap(policy, prompts, completions, sampling) < 1e-4
    sampling = Sampling(temperature=1.0, repetition_penalty=1.2, max_new_tokens=40)
    completions = sample(policy, prompts, 2, sampling, seed=9, server=server)
    assert gap(policy, prompts, completions, sampling) < 1e-4
    old, _ = load(experts, 1)
    assert gap(old, prompts, completions, sampling) > 0.1  # the weights did change


def test_greedy_on_the_server_is_greedy_here(experts, served):
    server, folder = served
    policy, prompts = load(experts)
    push_weights(server, policy, folder / "weights", 10)
    greedy = Sampling(temperature=0, max_new_tokens=60)
    there, here = (sample(policy, prompts, 1, greedy, seed=0, server=s) for s in (server, None))
    assert [c.token_ids for c in there] == [c.token_ids for c in here]
    assert [c.finish_reason for c in there] == [c.finish_reason for c in here]


def test_check_push_finds_a_corrupting_push(experts, served, monkeypatch):
    """vLLM's own reload_weights answers 200 and leaves a CPU server's experts wrong.

    check_push raises, with both means. A push through our worker extension repairs the server.
    """
    server, folder = served
    policy, prompts = load(experts, 4)
    change_weights(policy, 20)
    with monkeypatch.context() as patch:
        patch.setattr(server_module, "reload_call", lambda folder: {
            "method": "reload_weights", "kwargs": {"weights_path": str(folder)}})
        push_weights(server, policy, folder / "weights", 20)
    how = dict(temperature=1.0, max_gap=0.1, seed=0)
    with pytest.raises(RolloutError, match=r"version 20: .*nats per token .*server -\d.*trainer -"):
        check_push(server, policy, prompts, **how)
    push_weights(server, policy, folder / "weights", 21)
    assert check_push(server, policy, prompts, **how) < 1e-4


@pytest.mark.parametrize("fp32_head", [True, False])
def test_the_head_of_a_bf16_server(experts, tmp_path, fp32_head):
    """The trainer's log-probs are nearer to the server's with the same head on both sides.

    The layers add nothing to the embeddings here: in bf16 their sums differ more than the heads do.
    What is left is the rounding of the last norm.
    """
    policy = load_policy(experts / "model")
    with torch.no_grad():
        for name, p in policy.base.model.language_model.named_parameters():
            if "o_proj" in name or "down_proj" in name:
                p.zero_()
    policy.saved_dtype = torch.bfloat16
    save_policy(policy, tmp_path / "model")
    policy = load_policy(tmp_path / "model", torch.bfloat16)
    prompts = load(experts, 8)[1]
    command = Command(python=PYTHON, log=tmp_path / "vllm.log", flags=FLAGS, fp32_head=fp32_head)
    with Server(tmp_path / "model", command) as server:
        sampling = Sampling(temperature=1.0, max_new_tokens=40)
        completions = sample(policy, prompts, 4, sampling, seed=0, server=server)
    batch = policy.collate([p for p in prompts for _ in range(4)],
                           [c.token_ids for c in completions])
    there = torch.tensor([logp for c in completions for logp in c.logps])
    error = {}
    for policy.fp32_head in (True, False):
        with torch.no_grad():
            here = policy(batch, 1.0).logp[batch.completion_mask]
        error[policy.fp32_head] = (there - here).abs().mean().item()
    print(f"server {'fp32' if fp32_head else 'bf16'}: mean difference to a trainer with fp32 head "
          f"{error[True]:.1e}, with bf16 head {error[False]:.1e} nats per token")
    assert error[fp32_head] < 0.7 * error[not fp32_head]


def test_no_endpoint_without_the_key(served):
    """vLLM guards only /v1; we guard the paths that run methods by name.

    The key is not among the processes' arguments.
    """
    server, _ = served
    server.wait()
    paths = ("/v1/models", "/v1/chat/completions", "/metrics", *DEVELOPMENT_PATHS)
    for path in paths:
        for method in ("GET", "POST"):
            for headers in ({}, {"Authorization": "Bearer x"}, {"Authorization": server.key}):
                answer = httpx.request(method, server.url + path, headers=headers)
                assert answer.status_code == 401, (method, path)
    assert httpx.get(f"{server.url}/health").status_code == 200
    for pid in members(server.process.pid):
        assert server.key not in Path(f"/proc/{pid}/cmdline").read_text()


# ──────── faults ────────


def kill_the_server(server):
    os.kill(server.process.pid, signal.SIGKILL)


def kill_the_engine(server):
    os.kill(next(pid for pid in members(server.process.pid)
                 if "EngineCore" in Path(f"/proc/{pid}/cmdline").read_text()), signal.SIGKILL)


def test_server_faults_in_the_middle_of_a_batch(world, tmp_path, monkeypatch):
    """vLLM's API server or its engine is killed after the third group of a batch.

    The new server has the pushed weights and completes the batch; nothing of the old one is left.
    Servers that hang are tested with the stand-in, see test_server_faults.py.
    """
    policy, prompts = load(world, 24)
    sampling = Sampling(temperature=1.0, max_new_tokens=64)
    command = Command(python=PYTHON, log=tmp_path / "vllm.log", flags=FLAGS)
    with Server(world / "model", command) as server:
        change_weights(policy, 5)
        push_weights(server, policy, tmp_path / "weights", 7)
        for fault in (kill_the_server, kill_the_engine):
            before = server.process.pid
            with monkeypatch.context() as patch:
                seen = count_groups(patch, 3, lambda: fault(server))
                completions = sample(policy, prompts, 8, sampling, seed=0, server=server)
            assert server.process.pid != before and wait_for_end(before), fault
            assert server.version == 7, fault
            assert len(completions) == 24 * 8, fault
            assert set(seen.values()) == {1} and len(seen) == 24, fault
            some = [c for i in range(0, 24, 6) for c in completions[8 * i:8 * i + 2]]
            assert gap(policy, prompts[::6], some, sampling) < 1e-4, fault
        group = server.process.pid
    assert wait_for_end(group)


def flags_of(world, out, *more):
    """Without top-k and top-p, so that the server samples from π_old itself."""
    return [ROOT / "recipes" / "toy_late.yaml", "--model", world / "model",
            "--data", world / "late" / "train.jsonl", "--output_dir", out, "--rollout", "vllm",
            "--top_k", 0, "--top_p", 1.0, *more]


def command(world, out, *more):
    return list(map(str, [sys.executable, ROOT / "train.py", *flags_of(world, out, *more)]))


@pytest.mark.parametrize("end, moment", [(signal.SIGKILL, "POST /v1/chat/completions"),
                                         (signal.SIGTERM, "EngineCore")],
                         ids=["SIGKILL, sampling", "SIGTERM, loading"])
def test_the_trainer_is_killed(world, tmp_path, end, moment):
    """While the server samples, or while it loads: no process is left over.

    SIGTERM first saves a state.
    """
    with open(tmp_path / "out.txt", "w") as out:
        trainer = subprocess.Popen(command(world, tmp_path / "run", "--max_steps", 100),
                                   stdout=out, stderr=out)
    log, until = tmp_path / "run" / "vllm.log", time.monotonic() + 300
    while not (log.is_file() and log.read_text(errors="replace").count(moment) > 5):
        output = (tmp_path / "out.txt").read_text()
        assert trainer.poll() is None and time.monotonic() < until, output[-2000:]
        time.sleep(0.2)
    children = Path(f"/proc/{trainer.pid}/task/{trainer.pid}/children").read_text().split()
    groups = [int(pid) for pid in children if members(int(pid))]
    assert sum(len(members(group)) for group in groups) >= 3  # API server, its guard, the engine
    trainer.send_signal(end)
    try:
        code = trainer.wait(180)
        assert all(wait_for_end(group) for group in groups)
    finally:
        trainer.kill()
    if end == signal.SIGTERM:  # the server finishes loading, and the first step is done and saved
        assert code == 0 and (tmp_path / "run" / "state" / "step-1" / "run.pt").is_file()
    else:
        assert code != 0


# ──────── flags ────────


GRAPHS = """
import json, sys
from types import SimpleNamespace
from vllm.config import CompilationConfig, CUDAGraphMode
from vllm.config.vllm import VllmConfig
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser, found = make_arg_parser(FlexibleArgumentParser()), []
for flags in json.loads(sys.argv[1]):
    options = parser.parse_args(flags)
    graphs = CompilationConfig(max_cudagraph_capture_size=options.max_cudagraph_capture_size,
                               cudagraph_mode=CUDAGraphMode.FULL_AND_PIECEWISE)
    graphs.post_init_cudagraph_sizes = lambda: None
    scheduler = SimpleNamespace(max_num_seqs=options.max_num_seqs, max_num_batched_tokens=8192)
    VllmConfig._set_cudagraph_sizes(SimpleNamespace(
        model_config=SimpleNamespace(enforce_eager=False), compilation_config=graphs,
        scheduler_config=scheduler, uniform_decode_query_len=1, performance_mode="balanced"))
    found.append((options.max_num_seqs, graphs.cudagraph_capture_sizes))
print(json.dumps(found))
"""


def test_a_batch_fits_a_cuda_graph():
    """With our flags, vLLM's own rules give a graph of the size of the batch. Of two flags, the
    last one wins."""
    flags = {n: list(map(str, server_module._batch_flags(Command("python", "log", sequences=n))))
             for n in (100, 500, 768, 1000)}
    commands = [*flags.values(), ["--max-num-seqs", "768"],
                [*flags[100], "--max_num_seqs=64", "--max-cudagraph-capture-size", "32"]]
    run = subprocess.run([PYTHON, "-c", GRAPHS, json.dumps(commands)], capture_output=True,
                         text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    *ours, (_, without), (users, few) = json.loads(run.stdout.splitlines()[-1])
    for n, (most, sizes) in zip(flags, ours):
        assert n <= most < n + 16 and any(n <= size <= most for size in sizes)
    assert max(without) == 512 and users == 64 and max(few) == 32


# ──────── train.py ────────


def test_train_on_vllm_asynchronously(world, tmp_path):
    """Nine steps of the toy: weight versions as documented, complete groups, accuracy and a_t
    finite, and the trainer's log-probs where the weights are fresh.

    test_four_nodes_the_last_of_which_serves trains in sync.
    """
    versions = [0] * 8 + [4]
    more = ("--max_steps", 9, "--async_rollouts", "true", "--learning_rate", 5e-4)
    run = subprocess.run(command(world, tmp_path / "run", *more), capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    metrics = lines(tmp_path / "run" / "metrics.jsonl")
    records = lines(tmp_path / "run" / "completions.jsonl")
    assert [m["weight_version"] for m in metrics] == versions
    assert [r["weight_version"] for r in records] == [v for v in versions for _ in range(32)]
    assert all(0 <= m["accuracy"] <= 1 and 0 < m["audio_mass_max"] < 1 for m in metrics)
    assert {n % 8 for n in Counter(r["prompt_id"] for r in records).values()} == {0}
    assert len({r["text"] for r in records}) > 100
    fresh = [m for m, version in zip(metrics, versions) if version == (m["step"] - 1) // 4 * 4]
    assert len(fresh) == 4
    assert all(m["sampler_gap"] < 1e-4 and m["importance_ess"] > 0.999 for m in fresh)
    assert all(0 < m["sampler_gap"] < 0.2 and 0.5 < m["importance_ess"] <= 1 for m in metrics)
    begin = metrics[::4]
    assert all(m["generation_tokens_per_second"] > 0 for m in begin)
    assert all(0 < m["wait_fraction"] < 1 for m in begin)
    assert wait_for_end(server_group(tmp_path / "run" / "vllm.log"))


def test_four_nodes_the_last_of_which_serves(world, tmp_path):
    """Three nodes train the toy for 5 steps, the fourth runs vLLM, and nothing is left over.

    The trainers find the server without an address, sample from it and push to it.
    """
    flags = flags_of(world, tmp_path / "run", "--max_steps", 5)
    with torchrun(tmp_path, [ROOT / "train.py", *flags], 4, nodes=4) as job:
        codes = job.wait(900)
        assert codes == [0] * 4, job.output[-6000:]
    metrics = lines(tmp_path / "run" / "metrics.jsonl")
    assert [m["weight_version"] for m in metrics] == [0, 0, 0, 0, 4]
    for m in metrics:
        assert 0 < m["sampler_gap"] < 1e-4 and 0 < m["audio_mass_max"] < 1 and m["grad_norm"] > 0
    assert wait_for_end(server_group(tmp_path / "run" / "vllm.log"))


# ──────── evaluate.py ────────


def test_a_benchmark_on_vllm(world, tmp_path):
    """`evaluate.py mmau` on 40 questions: both engines write the same texts, but for a tie or two.

    The server is gone afterwards.
    """
    rows = lines(world / "late" / "test.jsonl")[:40]
    (tmp_path / "mmau.json").write_text(json.dumps([
        {"id": row["id"], "audio_id": row["audio"], "question": row["question"],
         "choices": row["choices"], "answer": row["answer"], "task": "sound", "difficulty": "easy"}
        for row in rows]))
    for engine in ("local", "vllm"):
        code = evaluate.main([
            "mmau", "--model", str(world / "model"), "--data", str(tmp_path / "mmau.json"),
            "--audio_root", str(world / "late"), "--max_new_tokens", "64", "--engine", engine,
            f"--vllm_flags={FLAGS}", "--out", str(tmp_path / engine)])
        assert code == 0
    here, there = ({row["id"]: row["text"]
                    for row in lines(tmp_path / engine / "completions.jsonl")}
                   for engine in ("local", "vllm"))
    assert len(there) == 40 and sum(here[i] == there[i] for i in here) >= 38
    report = json.loads((tmp_path / "vllm" / "report.json").read_text())
    assert report["count"] == 40 and 0 < report["accuracy"] < 0.5 and report["unreadable"] == {}
    assert wait_for_end(server_group(tmp_path / "vllm" / "vllm.log"))


# ──────── the checker ────────


def tiny_checker(folder):
    """A text model of 2 layers and 9 words that has learned to answer NO to a fox, else YES."""
    words = ["<eos>", "<user>", "<assistant>", "YES", "NO", "fox", "dog", "cat", "<other>"]
    word_level = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)},
                                            unk_token="<other>"))
    word_level.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=word_level, eos_token="<eos>", pad_token="<eos>", unk_token="<other>",
        additional_special_tokens=["<user>", "<assistant>"])
    tokenizer.chat_template = ("{% for m in messages %}<user> {{ m.content }} {% endfor %}"
                               "{% if add_generation_prompt %}<assistant>{% endif %}")
    torch.manual_seed(0)
    checker = Qwen3ForCausalLM(Qwen3Config(
        vocab_size=len(words), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, head_dim=32, max_position_embeddings=512,
        eos_token_id=0, tie_word_embeddings=False))
    optimizer = torch.optim.AdamW(checker.parameters(), lr=3e-3)
    for step in range(120):
        answer = ("fox", "dog", "cat")[step % 3]
        prompt = CHECKER_PROMPT.format(think_text="the thinking " * (step % 7), answer_text=answer)
        ids = tokenizer.apply_chat_template([{"role": "user", "content": prompt}],
                                            add_generation_prompt=True, tokenize=True,
                                            return_dict=False)
        ids = torch.tensor([ids + [words.index("NO" if answer == "fox" else "YES"), 0]])
        labels = ids.clone()
        labels[:, :-2] = -100
        loss = checker(input_ids=ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.05
    checker.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def test_checker_server(tmp_path):
    """Appendix B on a real server with a tiny text model: YES is 1, NO is 0, in order.

    The server has no development endpoint.
    """
    tiny_checker(tmp_path / "checker")
    config = TrainConfig(checker=str(tmp_path / "checker"), vllm_python=str(PYTHON))
    texts = [f"<think> the thinking.</think> {word}"
             for word in ("dog", "fox", "cat", "fox", "dog")]
    command = Command(python=PYTHON, log=tmp_path / "checker.log",
                      flags="--enforce-eager --max-model-len 512")
    with Server(tmp_path / "checker", command, weights_change=False,
                name=config.checker_model) as checker:
        assert check_consistency(texts, config, checker) == [1.0, 0.0, 1.0, 0.0, 1.0]
        answer = httpx.post(f"{checker.url}/collective_rpc", json={"method": "x"},
                            headers={"Authorization": f"Bearer {checker.key}"})
        assert answer.status_code == 404
        with pytest.raises(CheckerError, match="401"):
            consistency_rewards(texts, url=f"{checker.url}/v1", model=config.checker_model,
                                api_key="wrong")
        group = checker.process.pid
    assert wait_for_end(group)
