"""The rollout server on a real vLLM, with the toy's checkpoint: what it samples, what a push changes, and what is left
of it when something is killed. Skipped where vLLM's environment is missing."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import httpx
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from transformers import RepetitionPenaltyLogitsProcessor, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

import evaluate
import model
import rollout
import toy
import train
from data import read_questions
from processes import members, wait_for_end
from rewards import CHECKER_PROMPT, CheckerError, consistency_rewards

ROOT = Path(__file__).resolve().parents[1]
PYTHON = ROOT / ".venv-vllm" / "bin" / "python"
FLAGS = "--enforce-eager --max-model-len 512 --max-num-seqs 64 --no-enable-chunked-prefill"
pytestmark = [pytest.mark.vllm,
              pytest.mark.skipif(not PYTHON.is_file(), reason="no .venv-vllm here; `make vllm` builds it")]


@pytest.fixture(scope="module")
def world():
    return toy.prepare(ROOT / "runs" / "toy-world-0", 0)


def load(world, count=8):
    policy = model.load_policy(world / "model")
    return policy, [policy.encode(q) for q in read_questions(world / "test.jsonl")[:count]]


@pytest.fixture(scope="module")
def served(world, tmp_path_factory):
    """(server, a folder for pushes); every test that changes the weights pushes its own."""
    folder = tmp_path_factory.mktemp("served")
    with rollout.Server(world / "model", python=PYTHON, log=folder / "vllm.log", flags=FLAGS) as server:
        yield server, folder
        group = server.process.pid
    assert wait_for_end(group)


def changed(policy, seed):
    """Moves every weight by about a tenth of its size."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, p in policy.named_parameters():
            if "visual" not in name:
                p.add_(0.1 * p.abs().mean() * torch.randn_like(p))


@torch.no_grad()
def gap(policy, prompts, completions, temperature=1.0, top_k=0, top_p=1.0, penalty=1.0):
    """Largest difference of the server's log-probs from those of the trainer's own logits, one completion at a time,
    cut to the same top-k and top-p and renormalised by transformers' processors."""
    worst, group_size = 0.0, len(completions) // len(prompts)
    for i, completion in enumerate(completions):
        prompt, ids = prompts[i // group_size], completion.token_ids
        batch = policy.collate([prompt], [ids])
        output = policy.base.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask,
                                   position_ids=model.positions(batch.attention_mask), use_cache=False, **batch.audio)
        logits = policy.base.lm_head(output.last_hidden_state[0, len(prompt.ids) - 1:-1])
        logits[:, policy.placeholder_ids] = -torch.inf
        for t, token in enumerate(ids):
            before, row = torch.tensor([prompt.ids + ids[:t]]), logits[t:t + 1]
            if penalty != 1:
                row = RepetitionPenaltyLogitsProcessor(penalty)(before, row)
            row = TemperatureLogitsWarper(temperature)(before, row)
            row = TopKLogitsWarper(top_k)(before, row) if top_k else row
            row = TopPLogitsWarper(top_p)(before, row) if top_p < 1 else row
            worst = max(worst, abs(row.log_softmax(dim=-1)[0, token].item() - completion.logps[t]))
    return worst


# ──────────────────────────────────────────────── sampling and pushing ────────────────────────────────────────────────


def test_log_probs_before_and_after_a_push(world, served):
    """Prompt ids equal (else sample() raises), log-probs within 1e-4 in fp32 for the mixture of experts: temperature,
    top-k with top-p, and a repetition penalty; before a push, after it, and after a second one."""
    server, folder = served
    policy, prompts = load(world, 6)
    for version in range(3):
        if version:
            changed(policy, version)
            rollout.push_weights(server, policy, folder / "weights", version)
            assert rollout.check_push(server, policy, prompts[:4], temperature=1.2, max_gap=1e-4, seed=1) < 1e-4
        for how in ({"temperature": 1.2}, {"temperature": 1.2, "top_k": 20, "top_p": 0.9}):
            completions = rollout.sample(policy, prompts, 3, max_new_tokens=40, seed=version, server=server, **how)
            assert len(completions) == 18 and {c.finish_reason for c in completions} <= {"stop", "length"}
            assert gap(policy, prompts, completions, **how) < 1e-4
    how = {"temperature": 1.0, "repetition_penalty": 1.2}
    completions = rollout.sample(policy, prompts, 2, max_new_tokens=40, seed=9, server=server, **how)
    assert gap(policy, prompts, completions, temperature=1.0, penalty=1.2) < 1e-4
    old, _ = load(world, 1)
    assert gap(old, prompts, completions, temperature=1.0, penalty=1.2) > 0.1  # the weights did change


def test_greedy_on_the_server_is_greedy_here(world, served):
    """The same tokens from both engines, where the two best logits are no tie."""
    server, folder = served
    policy, prompts = load(world)
    rollout.push_weights(server, policy, folder / "weights", 10)
    there, here = (rollout.sample(policy, prompts, 1, temperature=0, max_new_tokens=60, seed=0, server=s)
                   for s in (server, None))
    assert [c.token_ids for c in there] == [c.token_ids for c in here]
    assert [c.finish_reason for c in there] == [c.finish_reason for c in here] == ["stop"] * len(prompts)


def test_a_push_that_corrupts_is_caught(world, served, monkeypatch):
    """vLLM's own reload_weights answers 200 and leaves the experts of a CPU server wrong: check_push stops with both
    numbers. A push through our worker extension mends it."""
    server, folder = served
    policy, prompts = load(world, 4)
    changed(policy, 20)
    with monkeypatch.context() as patch:
        patch.setattr(rollout, "reload_call",
                      lambda folder: {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}})
        rollout.push_weights(server, policy, folder / "weights", 20)
    with pytest.raises(rollout.RolloutError, match=r"version 20: .*nats a token from .*server -\d.*trainer -\d"):
        rollout.check_push(server, policy, prompts, temperature=1.0, max_gap=0.1, seed=0)
    rollout.push_weights(server, policy, folder / "weights", 21)
    assert rollout.check_push(server, policy, prompts, temperature=1.0, max_gap=0.1, seed=0) < 1e-4


def test_no_endpoint_without_the_key(served):
    """vLLM itself guards /v1 alone; the paths that run methods by name are ours to guard. The key is nowhere in the
    processes' arguments."""
    server, _ = served
    server.wait()
    for method, path in (("GET", "/v1/models"), ("GET", "/metrics"), ("GET", "/is_paused"), ("POST", "/pause"),
                         ("POST", "/collective_rpc"), ("POST", "/reset_prefix_cache"),
                         ("POST", "/v1/chat/completions")):
        assert httpx.request(method, server.url + path).status_code == 401, path
        assert httpx.request(method, server.url + path, headers={"Authorization": "Bearer x"}).status_code == 401
    assert httpx.get(f"{server.url}/health").status_code == 200
    assert all(server.key not in Path(f"/proc/{pid}/cmdline").read_text() for pid in members(server.process.pid))


# ─────────────────────────────────────────────────────── faults ───────────────────────────────────────────────────────


def kill_the_server(server):
    os.kill(server.process.pid, signal.SIGKILL)


def kill_the_engine(server):
    os.kill(next(pid for pid in members(server.process.pid)
                 if "EngineCore" in Path(f"/proc/{pid}/cmdline").read_text()), signal.SIGKILL)


def stop_the_server(server):
    os.kill(server.process.pid, signal.SIGSTOP)


def stop_everything(server):
    os.killpg(server.process.pid, signal.SIGSTOP)


def test_server_faults_in_the_middle_of_a_batch(world, tmp_path, monkeypatch):
    """Four faults, one after the other: SIGKILL of the API server and of the engine behind it, SIGSTOP of the API
    server and of the whole process group. Each comes after the third group of a batch, with pushed weights; the batch
    is whole, finished by the new server with the same weights, and nothing of the old one is left."""
    monkeypatch.setattr(rollout, "STALL_SECONDS", 40)  # longer than vLLM takes over its first question
    policy, prompts = load(world, 24)
    read = rollout._read
    with rollout.Server(world / "model", python=PYTHON, log=tmp_path / "vllm.log", flags=FLAGS) as server:
        changed(policy, 5)
        rollout.push_weights(server, policy, tmp_path / "weights", 7)
        for fault in (kill_the_server, kill_the_engine, stop_the_server, stop_everything):
            before, seen = server.process.pid, Counter()

            def and_fault(answer, policy, prompt, group_size):
                group = read(answer, policy, prompt, group_size)
                seen[prompt.question.id] += 1
                if seen.total() == 3:
                    fault(server)
                return group

            monkeypatch.setattr(rollout, "_read", and_fault)
            completions = rollout.sample(policy, prompts, 8, temperature=1.0, max_new_tokens=64, seed=0, server=server)
            assert server.process.pid != before and wait_for_end(before) and server.version == 7, fault
            assert len(completions) == 24 * 8 and set(seen.values()) == {1} and len(seen) == 24, fault
            some = [c for i in range(0, 24, 6) for c in completions[8 * i:8 * i + 2]]
            assert gap(policy, prompts[::6], some) < 1e-4, fault
        group = server.process.pid
    assert wait_for_end(group)


def command(world, out, *more):
    return [sys.executable, str(ROOT / "train.py"), str(ROOT / "recipes" / "toy.yaml"), "--model", str(world / "model"),
            "--data", str(world / "train.jsonl"), "--output_dir", str(out), "--rollout", "vllm", *map(str, more)]


@pytest.mark.parametrize("end, moment", [(signal.SIGKILL, "POST /v1/chat/completions"),
                                         (signal.SIGKILL, "EngineCore"), (signal.SIGTERM, "EngineCore"),
                                         (signal.SIGINT, "EngineCore")],
                         ids=["SIGKILL, sampling", "SIGKILL, loading", "SIGTERM, loading", "Ctrl-C, loading"])
def test_the_trainer_is_killed(world, tmp_path, end, moment):
    """Four faults: the trainer is killed while the server samples, and ended in three ways while it loads. No process
    is left over; SIGTERM saves a state first."""
    with open(tmp_path / "out.txt", "w") as out:
        trainer = subprocess.Popen(command(world, tmp_path / "run", "--max_steps", 100), stdout=out, stderr=out,
                                   preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    log, until = tmp_path / "run" / "vllm.log", time.monotonic() + 300
    while not (log.is_file() and log.read_text(errors="replace").count(moment) > 5):
        assert trainer.poll() is None and time.monotonic() < until, (tmp_path / "out.txt").read_text()[-2000:]
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
    if end == signal.SIGTERM:  # the server comes up, the first step is done and saved
        assert code == 0 and (tmp_path / "run" / "state" / "step-1" / "run.pt").is_file()
    else:
        assert code != 0


# ───────────────────────────────────────────────────── train.py ───────────────────────────────────────────────────────


@pytest.mark.parametrize("asynchronous, steps, versions", [(False, 5, [0] * 4 + [4]), (True, 9, [0] * 8 + [4])],
                         ids=["sync", "async"])
def test_train_on_vllm(world, tmp_path, asynchronous, steps, versions):
    """`python train.py recipes/toy.yaml --rollout vllm --max_steps 5`, and 9 steps async: accuracy and a_t finite,
    groups complete, log-probs those of the trainer, weight versions as documented."""
    run = subprocess.run(command(world, tmp_path / "run", "--max_steps", steps, "--async_rollouts", asynchronous),
                         capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    metrics, records = ([json.loads(line) for line in (tmp_path / "run" / name).read_text().splitlines()]
                        for name in ("metrics.jsonl", "completions.jsonl"))
    assert [m["weight_version"] for m in metrics] == versions
    assert [r["weight_version"] for r in records] == [v for v in versions for _ in range(64)]
    assert all(0 <= m["accuracy"] <= 1 and 0 < m["audio_mass_max"] < 1 for m in metrics)
    assert {n % 8 for n in Counter(r["prompt_id"] for r in records).values()} == {0}
    assert len({r["text"] for r in records}) > 100
    fresh = [m for m, version in zip(metrics, versions) if version == (m["step"] - 1) // 4 * 4]
    assert len(fresh) == (4 if asynchronous else 5)
    assert all(m["sampler_gap"] < 1e-4 and m["importance_ess"] > 0.999 for m in fresh)
    assert all(0 < m["sampler_gap"] < 0.2 and 0.5 < m["importance_ess"] <= 1 for m in metrics)
    begin = metrics[::4]
    assert all(m["generation_tokens_per_second"] > 0 and 0 < m["wait_fraction"] < 1 for m in begin)
    group = int((tmp_path / "run" / "vllm.log").read_text().split("APIServer pid=")[1].split(")")[0])
    assert wait_for_end(group)


def test_four_nodes_the_last_of_which_serves(world, tmp_path):
    """`torchrun --nnodes 4 --nproc-per-node 1 train.py`: three agents train the toy 5 steps, the fourth runs vLLM; the
    trainers find it without an address, sample from it and push to it. Nothing is left over."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    agents = []
    for node in range(4):
        launch = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "4", "--nproc-per-node", "1",
                  "--node-rank", str(node), "--master-addr", "127.0.0.1", "--master-port", port]
        with open(tmp_path / f"agent-{node}.txt", "w") as out:
            agents.append(subprocess.Popen([*launch, *command(world, tmp_path / "run", "--max_steps", 5)[1:]],
                                           stdout=out, stderr=out, start_new_session=True,
                                           env={**os.environ, "OMP_NUM_THREADS": "1"}))
    try:
        codes = [agent.wait(900) for agent in agents]
    finally:
        for agent in agents:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(agent.pid, signal.SIGKILL)
    assert codes == [0] * 4, [(tmp_path / f"agent-{node}.txt").read_text()[-1500:] for node in range(4)]
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [m["weight_version"] for m in metrics] == [0, 0, 0, 0, 4]
    assert all(0 < m["sampler_gap"] < 1e-4 and 0 < m["audio_mass_max"] < 1 and m["grad_norm"] > 0 for m in metrics)
    group = int((tmp_path / "run" / "vllm.log").read_text().split("APIServer pid=")[1].split(")")[0])
    assert wait_for_end(group)


# ───────────────────────────────────────────────────── evaluate.py ────────────────────────────────────────────────────


def test_a_benchmark_on_vllm(world, tmp_path):
    """`python evaluate.py mmau --engine vllm` on 40 questions of the toy: the texts of this process's engine but for a
    tie or two, and the server is gone."""
    rows = [json.loads(line) for line in (world / "test.jsonl").read_text().splitlines()[:40]]
    (tmp_path / "mmau.json").write_text(json.dumps([
        {"id": row["id"], "audio_id": row["audio"], "question": row["question"], "choices": row["choices"],
         "answer": row["answer"], "task": "sound", "difficulty": "easy"} for row in rows]))
    for engine in ("local", "vllm"):
        code = evaluate.main(["mmau", "--model", str(world / "model"), "--data", str(tmp_path / "mmau.json"),
                              "--audio_root", str(world), "--max_new_tokens", "64", "--engine", engine,
                              f"--vllm_flags={FLAGS}", "--out", str(tmp_path / engine)])
        assert code == 0
    here, there = ({row["id"]: row["text"] for row in map(json.loads, (tmp_path / engine / "completions.jsonl")
                                                          .read_text().splitlines())} for engine in ("local", "vllm"))
    assert len(there) == 40 and sum(here[i] == there[i] for i in here) >= 38
    report = json.loads((tmp_path / "vllm" / "report.json").read_text())
    assert report["count"] == 40 and 0.2 < report["accuracy"] <= 1 and report["unreadable"] == {}
    group = int((tmp_path / "vllm" / "vllm.log").read_text().split("APIServer pid=")[1].split(")")[0])
    assert wait_for_end(group)


# ──────────────────────────────────────────────────── the checker ─────────────────────────────────────────────────────


def tiny_checker(folder):
    """A text model of 2 layers and 40 words that was taught one rule: NO when the answer is a fox, else YES."""
    words = ["<eos>", "<user>", "<assistant>", "YES", "NO", "fox", "dog", "cat", "<other>"]
    words_tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<other>"))
    words_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words_tokenizer, eos_token="<eos>", pad_token="<eos>",
                                        unk_token="<other>", additional_special_tokens=["<user>", "<assistant>"])
    tokenizer.chat_template = ("{% for m in messages %}<user> {{ m.content }} {% endfor %}"
                               "{% if add_generation_prompt %}<assistant>{% endif %}")
    torch.manual_seed(0)
    checker = Qwen3ForCausalLM(Qwen3Config(
        vocab_size=len(words), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=512, eos_token_id=0, tie_word_embeddings=False))
    optimizer = torch.optim.AdamW(checker.parameters(), lr=3e-3)
    for step in range(120):
        answer = ("fox", "dog", "cat")[step % 3]
        prompt = CHECKER_PROMPT.format(think_text="the thinking " * (step % 7), answer_text=answer)
        ids = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True,
                                            tokenize=True, return_dict=False)
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
    """Appendix B through a real server on a real, tiny text model: YES is 1, NO is 0, in order; no dev endpoint is
    there; a checker that was killed is started again for the next batch."""
    tiny_checker(tmp_path / "checker")
    config = train.TrainConfig(checker=str(tmp_path / "checker"), vllm_python=str(PYTHON))
    texts = [f"<think> the thinking.</think> {word}" for word in ("dog", "fox", "cat", "fox", "dog")]
    with rollout.Server(tmp_path / "checker", python=PYTHON, log=tmp_path / "checker.log", weights_change=False,
                        flags="--enforce-eager --max-model-len 512", name=config.checker_model) as checker:
        assert train.check_consistency(texts, config, checker) == [1.0, 0.0, 1.0, 0.0, 1.0]
        headers = {"Authorization": f"Bearer {checker.key}"}
        assert httpx.post(f"{checker.url}/collective_rpc", headers=headers, json={"method": "x"}).status_code == 404
        with pytest.raises(CheckerError, match="401"):
            consistency_rewards(texts, url=f"{checker.url}/v1", model=config.checker_model, api_key="wrong")
        kill_the_server(checker)
        assert train.check_consistency(texts[:2], config, checker) == [1.0, 0.0]
        group = checker.process.pid
    assert wait_for_end(group)
