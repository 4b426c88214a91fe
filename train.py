"""Algorithm 1, Modality-Aware Policy Optimization, from top to bottom.

    python train.py recipes/toy.yaml                       # the embedded toy, on a CPU
    python train.py recipes/mapo_phase1.yaml --model FOLDER --data train.jsonl
    torchrun --nnodes 4 --nproc-per-node 8 train.py recipes/mapo_phase1.yaml --model FOLDER …    # see distributed.py
    python train.py --help                                 # every field: symbol, default, source

A recipe is a yaml file of fields; flags after it override. A run writes into output_dir: config.yaml, metrics.jsonl (a
line per optimizer step), completions.jsonl (a line per completion), evaluation.jsonl (greedy accuracy on eval_data),
training.png, and checkpoint/, a folder that transformers and vLLM load; while it lasts state/, to resume from.

The names of the paper: one *iteration* of Algorithm 1 is one generation batch here; its completions are split over
`steps_per_generation` optimizer steps, as in the paper (768 completions, 4 steps of 192).
"""

import contextlib
import copy
import dataclasses
import importlib.util
import json
import math
import os
import shutil
import signal
import sys
import threading
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
import yaml
from torch.distributed.tensor import DTensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import HfArgumentParser, get_cosine_schedule_with_warmup
from transformers.utils import logging as transformers_logging

from data import InputError, read_avqa, read_questions
from distributed import (Team, fill, join, launch, load_state, newest_state, portion, read_state, save_state, serve,
                         shard)
from mapo import MapoConfig, _described, audio_attention_mass, differential_entropy, group_advantages, mapo_loss
from model import WHOLE_MODEL, add_lora, check_policy, load_policy
from plan import print_plan
from pos_gate import load_tagger, pos_gate_batch
from rewards import (CheckerError, accuracy_reward, consistency_rewards, format_reward, rule_consistency_rewards,
                     total_reward)
from rollout import RolloutError, Server, check_push, push_weights, sample


@dataclass(frozen=True)
class TrainConfig(MapoConfig):
    """Everything a run is told. The fields of the equations come from MapoConfig; the rest is here. The defaults are
    the paper's Table 5 where it has the value; (release) is the authors' code, (ours) a decision of this project."""

    model: str = _described("", "folder of the checkpoint that starts π_θ, or `toy` for the embedded default (paper: "
                            "Qwen3-Omni-30B-A3B-Thinking)")
    data: str = _described("", "jsonl file of training questions, see data.py (paper: AVQA, then a 29k mixture)")
    data_format: str = _described("jsonl", "rows of data: `jsonl`, our own, or `avqa`, AVQA as R1-AQA writes it (ours)")
    instruction: str = _described("", "text after the options in the prompt, for models told their format (ours; "
                                  "Appendix G)")
    audio_root: str = _described("", "folder that the audio paths of avqa rows start from; empty is the file's own "
                                 "(ours)")
    eval_data: str = _described("", "jsonl file for greedy accuracy before and after training; empty is none (ours)")
    output_dir: str = _described("runs/run", "folder for everything a run writes (ours)")
    seed: int = _described(0, "seed of the data order, the sampling and new weights (ours)")
    max_steps: int = _described(800, "optimizer steps (release)")
    learning_rate: float = _described(1e-6, "peak learning rate of AdamW (release)")
    warmup_ratio: float = _described(0.05, "share of the steps in the linear warm-up from 0, cosine to 0 follows "
                                     "(release)")
    adam_beta1: float = _described(0.9, "AdamW β1 (release)")
    adam_beta2: float = _described(0.95, "AdamW β2 (release)")
    weight_decay: float = _described(0.1, "AdamW weight decay, on matrices alone (release)")
    max_grad_norm: float = _described(1.0, "gradient-norm clip (release)")
    generation_batch_size: int = _described(768, "completions per generation batch (paper, Table 5)")
    steps_per_generation: int = _described(4, "optimizer steps per generation batch (paper, Table 5)")
    micro_batch_size: int = _described(8, "completions per forward and backward; changes memory, not the gradient "
                                       "(ours)")
    temperature: float = _described(1.2, "sampling temperature; π_θ, π_ref and π_text-ref are taken at it (paper, "
                                    "Table 5)")
    top_k: int = _described(50, "top-k of the sampler; 0 is off (paper, Table 5)")
    top_p: float = _described(0.99, "top-p of the sampler (paper, Table 5)")
    repetition_penalty: float = _described(1.0, "repetition penalty of the sampler (paper, Table 5)")
    max_new_tokens: int = _described(1200, "longest completion, tokens (release)")
    mask_truncated: bool = _described(False, "leave completions cut at max_new_tokens out of every mean (ours; "
                                      "release: on)")
    target_layers: list[int] = field(default_factory=lambda: [43, 44, 45, 46, 47], metadata={
        "help": "L_tgt, decoder layers of a_t, 0-based (paper, Table 5)"})
    mass_interval: int = _described(10, "with eta 0, measure a_t (no gradient) every this many steps (ours)")
    reward_weights: list[float] = field(default_factory=lambda: [2.0, 1.0, 1.0], metadata={
        "help": "λ_acc λ_format λ_cons of Eq. 6 (paper)"})
    format_style: str = _described("think", "`think`: <think>…</think> answer; `reasoning`: <reasoning>…</reasoning>"
                                        "<answer>…</answer> (paper, Appendix G)")
    checker: str = _described("", "the consistency checker: base URL of an OpenAI-compatible server (its key, if any, "
                              "in CHECKER_API_KEY), the folder of a model to start vLLM on, or `rule` for the toy's "
                              "rule (paper: vLLM)")
    checker_model: str = _described("Qwen3-30B-A3B-Instruct", "model name asked of the checker (paper)")
    lora_rank: int = _described(0, "LoRA rank; 0 trains all parameters of the decoder (release: 128)")
    lora_alpha: int = _described(512, "LoRA α (release)")
    freeze_audio_tower: bool = _described(True, "keep the audio encoder and its projection as they are (ours)")
    gradient_checkpointing: bool = _described(True, "recompute activations in the backward pass (ours)")
    rollout: str = _described("local", "where completions are sampled: `local`, in this process, or `vllm`, on a vLLM "
                              "server (paper)")
    vllm_python: str = _described(".venv-vllm/bin/python", "interpreter of vLLM's environment, which `make vllm` "
                                  "builds; relative to train.py (ours)")
    vllm_url: str = _described("", "a vLLM server that runs already, in place of one of our own; its key in "
                               "VLLM_API_KEY (ours)")
    vllm_flags: str = _described("", "more flags of vLLM's for the rollout server, in one string: --vllm_flags=\"…\" "
                                 "(ours)")
    checker_flags: str = _described("", "more flags of vLLM's for the checker's server, in one string (ours)")
    async_rollouts: bool = _described(False, "sample the next generation batch while this one trains; its weights are "
                                      "then one push old (ours)")
    check_push_every: int = _described(10, "compare the server's log-probs with the trainer's at the start, after the "
                                       "first push and after every so many (ours)")
    max_push_gap: float = _described(0.1, "mean difference of those log-probs that stops the run, nats a token (ours)")
    rollout_nodes: int = _described(-1, "torchrun's nodes that serve vLLM in place of training: 0, or 1, the last; -1: "
                                    "1 where there are several (paper: 1 of 4)")
    offload_reference: bool = _described(False, "keep the sharded π_ref on the CPU between its forwards (ours)")
    save_every: int = _described(50, "optimizer steps between the states that a run can resume from (ours)")
    export_every: int = _described(0, "optimizer steps between checkpoints; 0 writes the last alone (ours)")
    resume: bool = _described(False, "go on from the newest state in output_dir (ours)")
    plan: bool = _described(False, "print what the run needs of each GPU, and end (ours)")
    plan_gpus: int = _described(24, "for the plan: GPUs that train (paper: 24)")
    plan_gib: float = _described(96.0, "for the plan: memory of a GPU, GiB (paper: 96 GB)")
    report_to: str = _described("none", "`tensorboard` or `wandb` through accelerate's trackers, or `none` (ours)")

    def __post_init__(self):
        super().__post_init__()
        for name in ("max_steps", "generation_batch_size", "steps_per_generation", "micro_batch_size", "max_new_tokens",
                     "learning_rate", "temperature", "mass_interval", "max_grad_norm", "repetition_penalty",
                     "lora_alpha", "check_push_every", "max_push_gap"):
            self._check(name, self._number(name) > 0, "a finite number above 0")
        for name in ("warmup_ratio", "adam_beta1", "adam_beta2"):
            self._check(name, 0 <= self._number(name) < 1, "at least 0 and under 1")
        for name in ("top_k", "lora_rank", "weight_decay", "save_every", "export_every"):
            self._check(name, self._number(name) >= 0, "at least 0")
        self._check("top_p", 0 < self._number("top_p") <= 1, "above 0 and at most 1")
        self._check("seed", 0 <= self.seed < 2**31, "from 0 to 2³¹ − 1")
        self._check("output_dir", bool(self.output_dir), "a folder")
        self._check("reward_weights", len(self.reward_weights) == 3 and all(map(math.isfinite, self.reward_weights)),
                    "three finite numbers, λ_acc λ_format λ_cons")
        if self.generation_batch_size % self.group_size:
            raise ValueError(f"generation_batch_size {self.generation_batch_size} is no multiple of group_size "
                             f"{self.group_size}")
        if self.generation_batch_size % self.steps_per_generation:
            raise ValueError(f"generation_batch_size {self.generation_batch_size} is no multiple of "
                             f"steps_per_generation {self.steps_per_generation}")
        for name, allowed in (("data_format", ("jsonl", "avqa")),
                              ("format_style", ("think", "reasoning")), ("rollout", ("local", "vllm")),
                              ("report_to", ("none", "tensorboard", "wandb"))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}: one of {', '.join(allowed)}")
        self._check("rollout_nodes", self.rollout_nodes in (-1, 0, 1), "-1, 0 or 1")
        if self.async_rollouts and self.rollout != "vllm":
            raise ValueError("async_rollouts needs rollout vllm: in one process sampling and training take turns")


# ────────────────────────────────────────────────────── Algorithm 1 ───────────────────────────────────────────────────


def train(config):
    """Runs Algorithm 1 and writes output_dir. Raises InputError at the door, before anything is written."""
    with join(config) as team:
        if team.serves:
            serve(team)
        else:
            _train(config, team)


def _train(config, team):
    questions, eval_questions, policy, reference = open_inputs(config, team)
    folder, done, batch = Path(config.output_dir), 0, None
    optimizer, schedule = make_optimizer(policy, config)
    if config.resume:
        done, batch = resume(policy, optimizer, schedule, config, team)
    with (asked_to_stop() as stop, open_log(config, team, done) as log,
          open_servers(config, policy, [*questions, *eval_questions], team) as (server, checker)):
        if eval_questions and not done:
            log("evaluation.jsonl", evaluate(policy, eval_questions, config, 0, server, team))
        size = config.generation_batch_size // config.steps_per_generation
        first = math.ceil(done / config.steps_per_generation)  # the first iteration that is not yet sampled
        batches = generation_batches(policy, questions, config, server, team, first)
        progress = tqdm(range(done + 1, config.max_steps + 1), desc="train", initial=done, total=config.max_steps,
                        disable=not team.leads)
        for step in progress:  # line 1: an iteration of the paper is steps_per_generation of these
            started, part = time.perf_counter(), (step - 1) % config.steps_per_generation
            seconds = defaultdict(float)  # a generation batch is counted in the step that waited for it
            if part == 0:
                with timed(seconds, "generate"):
                    batch = next(batches)  # lines 2, 3
                with timed(seconds, "reward"):
                    score(batch, policy, config, checker, team)  # line 4: r(x, y) and Â
                freeze(batch, policy, reference, config, seconds, team)  # π_old, π_ref, π_text-ref on these tokens
            rows = range(part * size, (part + 1) * size)
            measure = config.eta > 0 or step % config.mass_interval == 0 or step == 1
            with timed(seconds, "update"):
                metrics, per_token = update(policy, optimizer, batch, rows, config, measure, team)  # lines 5–12
            metrics = {"step": step, "learning_rate": schedule.get_last_lr()[0], **metrics,
                       "weight_version": batch.weight_version,
                       "generation_tokens_per_second": batch.tokens_per_second if part == 0 else None,
                       "seconds_push": batch.seconds_push if part == 0 else 0.0,
                       **{f"seconds_{name}": seconds[name] for name in
                          ("generate", "reward", "old", "reference", "text_reference", "update")},
                       "seconds_step": time.perf_counter() - started}
            metrics["wait_fraction"] = metrics["seconds_generate"] / metrics["seconds_step"]  # of the trainer's time
            schedule.step()
            log("metrics.jsonl", metrics)
            for row in rows:
                log("completions.jsonl", completion_record(batch, row, step, per_token[row]))
            progress.set_postfix(reward=f"{metrics['reward']:.2f}", accuracy=f"{metrics['accuracy']:.2f}",
                                 a_t=f"{metrics['audio_mass_max']:.3f}" if measure else "–",
                                 s=f"{metrics['seconds_step']:.1f}")
            ending = any(team.gather(stop.is_set()))
            if step < config.max_steps and (ending or config.save_every and step % config.save_every == 0):
                unfinished = batch if step % config.steps_per_generation else None
                save_state(folder / "state", step, policy, optimizer, schedule, unfinished, config, team)
            if ending:
                if team.leads:
                    print(f"{config.output_dir}: asked to stop after step {step}; --resume true goes on from there")
                return
            if config.export_every and step % config.export_every == 0 and step < config.max_steps:
                save_checkpoint(policy, folder / f"checkpoint-{step}", team)
        if eval_questions:
            log("evaluation.jsonl", evaluate(policy, eval_questions, config, config.max_steps, server, team))
    save_checkpoint(policy, folder / "checkpoint", team)
    if team.leads:
        plot_training(folder)
        shutil.rmtree(folder / "state", ignore_errors=True)  # the run is over
        print(f"{config.output_dir}: training.png, metrics.jsonl, completions.jsonl, checkpoint/")


@contextlib.contextmanager
def asked_to_stop():
    """SIGTERM → an event, while it lasts: the run saves its state after the step that it is in, and ends."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # Python lets no other thread handle signals
        yield event
        return
    before = signal.signal(signal.SIGTERM, lambda *_: event.set())
    try:
        yield event
    finally:
        signal.signal(signal.SIGTERM, before)


@dataclass
class GenerationBatch:
    """The completions of an iteration, group by group, and what is computed on them once. N = generation_batch_size."""

    prompts: list  # [N] model.Prompt, each repeated G times
    completions: list  # [N] rollout.Completion
    weight_version: int  # of the weights that sampled them: the optimizer steps that these had seen
    tokens_per_second: float  # of sampling
    seconds_push: float  # time that the push of these weights took
    texts: list = None  # [N] str
    rewards: dict = None  # name → [N]: accuracy, format, consistency, total (Eq. 6)
    advantages: torch.Tensor = None  # [N]
    pos_gates: list = None  # [N] of [T] 0/1
    pos_fallbacks: list = None  # [N] 0/1: did the gate fall back to all ones?
    old_logp: list = None  # [N] of [T], π_old = π_θ at the start of the iteration
    ref_logp: list = None  # [N] of [T]
    text_ref_entropy: list = None  # [N] of [T], or None in plain GRPO


def draw(questions, iteration, config):
    """Line 2: the questions x = (x_text, x_audio) of an iteration. Epoch e is the e-th permutation of the data; a
    position in the run fixes the question, so that nothing needs to be remembered."""
    count = config.generation_batch_size // config.group_size
    places = [divmod(p, len(questions)) for p in range(iteration * count, (iteration + 1) * count)]  # (epoch, place)
    orders = {epoch: torch.randperm(len(questions),
                                    generator=torch.Generator().manual_seed(config.seed * 1_000_003 + epoch))
              for epoch in {epoch for epoch, _ in places}}
    return [questions[orders[epoch][place]] for epoch, place in places]


def generation_batches(policy, questions, config, server, team=Team(), first=0):
    """Lines 2 and 3 for every iteration: yields its GenerationBatch, sampled with the weights it starts from.

    async_rollouts: batch i + 1 is sampled while batch i trains, with the weights that batch i starts from. It is then
    one push stale when its turn comes; π_old of the clipped ratio is the trainer's own at that time, and
    importance_clip corrects for the rest.
    In a team rank 0 asks the server, for all; without a server every rank samples the same, in step.
    """
    count = math.ceil(config.max_steps / config.steps_per_generation)
    samples = team.leads or config.rollout == "local"

    def prompts_of(iteration):
        return [policy.encode(question, config.instruction) for question in draw(questions, iteration, config)]

    def batch_of(prompts, sampled, seconds_push):
        return GenerationBatch([p for p in prompts for _ in range(config.group_size)], *team.share(sampled),
                               seconds_push)

    if not config.async_rollouts:
        for i in range(first, count):
            prompts = prompts_of(i)
            seconds = push(server, policy, config, i, prompts, team, i <= first + 1)
            yield batch_of(prompts, generate(policy, prompts, config, i, server) if samples else None, seconds)
        return
    pool = ThreadPoolExecutor(1)  # its thread does HTTP alone; policy and tokenizer stay with this one
    try:
        if first < count:
            prompts = prompts_of(first)
            seconds = push(server, policy, config, first, prompts, team, True)
            ahead = pool.submit(generate, policy, prompts, config, first, server) if samples else None
        for i in range(first, count):
            batch = batch_of(prompts, ahead.result() if samples else None, seconds)
            if i + 1 < count:
                prompts = prompts_of(i + 1)
                seconds = push(server, policy, config, i, prompts, team, i == first + 1) if i > first else 0.0
                ahead = pool.submit(generate, policy, prompts, config, i + 1, server) if samples else None
            yield batch
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def push(server, policy, config, iteration, prompts, team=Team(), check=False):
    """The weights that an iteration starts from → the rollout server, when it does not hold them; compares log-probs at
    the start, after the first push (`check`) and after every check_push_every. → seconds"""
    if config.rollout == "local":
        return 0.0
    started, version = time.perf_counter(), iteration * config.steps_per_generation
    if team.share(team.leads and server.version != version):
        push_weights(server, policy, Path(config.output_dir) / "weights", version)
    if check or iteration % config.check_push_every == 0:
        check_push(server, policy, prompts[:4], temperature=config.temperature, max_gap=config.max_push_gap,
                   seed=config.seed, share=team.share)
    return time.perf_counter() - started


def generate(policy, prompts, config, iteration, server):
    """Line 3: G completions y ~ π_θ(· | x) of every prompt → completions, version of the weights, tokens/s."""
    version = iteration * config.steps_per_generation if server is None else server.version
    started = time.perf_counter()
    completions = sample(policy, prompts, config.group_size, temperature=config.temperature, top_k=config.top_k,
                         top_p=config.top_p, repetition_penalty=config.repetition_penalty,
                         max_new_tokens=config.max_new_tokens, seed=config.seed * 1_000_003 + iteration, server=server,
                         progress=server is not None and not config.async_rollouts)
    return completions, version, sum(len(c.token_ids) for c in completions) / (time.perf_counter() - started)


def score(batch, policy, config, checker=None, team=Team()):
    """Line 4: r = λ_acc r_acc + λ_format r_format + λ_cons r_cons (Eq. 6), Â (Sec. 2); the POS gates (Appendix E)."""
    if team.leads:
        batch.texts, style = [policy.text(c) for c in batch.completions], config.format_style
        accuracy = [accuracy_reward(text, p.question.answer, p.question.choices, style)
                    for text, p in zip(batch.texts, batch.prompts)]
        form = [format_reward(text, style, think_is_prefilled(policy, p))
                for text, p in zip(batch.texts, batch.prompts)]
        consistency = check_consistency(batch.texts, config, checker)
        total = [total_reward(a, f, c, config.reward_weights)
                 for a, f, c in zip(accuracy, form, consistency, strict=True)]
        batch.rewards = {"accuracy": torch.tensor(accuracy), "format": torch.tensor(form),
                         "consistency": torch.tensor(consistency), "total": torch.tensor(total)}
    batch.texts, batch.rewards = team.share((batch.texts, batch.rewards))
    own = batch.completions[team.rank::team.size]  # on rank 0 alone the gates would be 4 % of a step of the 30B
    batch.pos_gates, batch.pos_fallbacks = [None] * len(batch.completions), [None] * len(batch.completions)
    for rank, made in enumerate(team.gather(pos_gate_batch([c.token_ids for c in own], policy.tokenizer))):
        batch.pos_gates[rank::team.size], batch.pos_fallbacks[rank::team.size] = made
    batch.advantages = group_advantages(batch.rewards["total"], config.group_size, config.advantage_eps)


def think_is_prefilled(policy, prompt):
    """Does the chat template open the thinking block itself, so that the completion starts inside it?"""
    return policy.tokenizer.decode(prompt.text_ids[-8:]).rstrip().endswith("<think>")


def check_consistency(texts, config, checker=None):
    """r_cons of each completion (Appendix B). checker: the Server that was started on `config.checker`, if it was."""
    if config.reward_weights[2] == 0:  # nobody is asked; the metrics say null
        return [0.0] * len(texts)
    if config.checker == "rule":
        return rule_consistency_rewards(texts, format_style=config.format_style)
    if checker is None:
        return consistency_rewards(texts, url=config.checker, model=config.checker_model,
                                   format_style=config.format_style, api_key=os.environ.get("CHECKER_API_KEY"))
    while True:
        checker.wait()
        try:
            rewards = consistency_rewards(texts, url=f"{checker.url}/v1", model=config.checker_model,
                                          format_style=config.format_style, api_key=checker.key,
                                          trust_env=checker.trust_env)
            checker.deaths = 0
            return rewards
        except CheckerError as error:
            if checker.answers():
                raise
            checker.recover(f"ended ({error})")


@torch.no_grad()
def freeze(batch, policy, reference, config, seconds, team=Team()):
    """Once per iteration: log π_old and log π_ref of the tokens, and H(π_text-ref) (Sec. 3.3; no such pass in GRPO)."""
    count = len(batch.prompts)

    def forward(model, text_only=False):
        own = {}
        for rows, real in micro_batches(range(count), batch, config, team):
            s = model(collate(policy, batch, rows, text_only), config.temperature)
            own |= {row: (s.logp[i, :n].cpu(), s.entropy[i, :n].cpu())
                    for i, (row, n) in enumerate(zip(rows, lengths(batch, rows))) if real[i]}
        rows = {row: values for part in team.gather(own) for row, values in part.items()}
        return map(list, zip(*(rows[row] for row in range(count))))

    policy.eval()
    with timed(seconds, "old"):
        batch.old_logp, _ = forward(policy)
    with reference() as frozen:
        with timed(seconds, "reference"):
            batch.ref_logp, _ = forward(frozen)
        if config.mask or config.eta > 0:
            with timed(seconds, "text_reference"):
                _, batch.text_ref_entropy = forward(frozen, text_only=True)


def update(policy, optimizer, batch, rows, config, measure, team=Team()):
    """Lines 5–12 on the completions `rows`: one optimizer step. → its metrics, and row → (Δh_t, a_t) of its tokens.

    The loss of a micro-batch is a mean over its counted completions, so weighing it by their number gives the gradient
    of the whole step whatever micro_batch_size and the number of ranks are.
    """
    policy.train(config.gradient_checkpointing)  # transformers recomputes activations in training mode alone
    optimizer.zero_grad(set_to_none=True)
    counted = {i: not (config.mask_truncated and batch.completions[i].finish_reason == "length") for i in rows}
    totals, per_token = defaultdict(lambda: [0.0, 0.0]), {}
    for micro, real in micro_batches(rows, batch, config, team):
        inputs = collate(policy, batch, micro)
        now = policy(inputs, config.temperature, config.target_layers if measure else ())
        token_mask = inputs.completion_mask.to(policy.device) & torch.tensor(real, device=policy.device)[:, None]
        loss_mask = token_mask & torch.tensor([counted[i] for i in micro], device=policy.device)[:, None]
        advantages = batch.advantages[list(micro)].to(policy.device)
        mass = None if now.head_mass is None else audio_attention_mass(now.head_mass)  # line 7: a_t
        old_logp = pad([batch.old_logp[i] for i in micro], policy)
        text_ref_entropy = pad([batch.text_ref_entropy[i] for i in micro], policy) if batch.text_ref_entropy else None
        parts = mapo_loss(
            logp=now.logp, old_logp=old_logp, ref_logp=pad([batch.ref_logp[i] for i in micro], policy),
            advantages=advantages, mask=loss_mask, config=config,
            policy_entropy=now.entropy,  # live: Δh is that of this update (line 6)
            text_ref_entropy=text_ref_entropy, audio_mass=mass,
            pos_gate=pad([torch.tensor(batch.pos_gates[i]) for i in micro], policy),
            sampler_logp=pad([torch.tensor(batch.completions[i].logps) for i in micro], policy),
            accuracy_reward=batch.rewards["accuracy"][list(micro)].to(policy.device))  # lines 8–11
        share = sum(counted[i] and is_real for i, is_real in zip(micro, real)) / max(1, sum(counted.values()))
        if not torch.isfinite(parts["loss"]):
            ids = [batch.prompts[i].question.id for i in micro]
            raise FloatingPointError(f"the loss is {parts['loss'].item()} on the completions of {ids}")
        (parts["loss"] * share * team.size).backward()  # FSDP takes the mean over ranks, and Eqs. 2 and 4 the sum
        delta_h = collect(totals, parts, now, mass, old_logp, text_ref_entropy, advantages, token_mask, loss_mask,
                          share, config, team)
        for i, row in enumerate(micro):
            if real[i]:
                per_token[row] = [None if x is None else x[i][token_mask[i]].tolist() for x in (delta_h, mass)]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    grad_norm = torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
    grad_norm = grad_norm.full_tensor() if isinstance(grad_norm, DTensor) else grad_norm
    if not torch.isfinite(grad_norm):
        raise FloatingPointError(f"the gradient norm is {grad_norm.item()}")
    optimizer.step()  # line 12
    every_rank = team.gather((dict(totals), per_token))
    for other, _ in every_rank[1:]:
        for name, (value, weight) in other.items():
            every_rank[0][0][name] = [every_rank[0][0].get(name, (0, 0))[i] + (value, weight)[i] for i in (0, 1)]
    metrics = dict.fromkeys(("text_ref_entropy", "delta_h_abs", *MASS_METRICS))  # null where nothing was measured
    metrics |= {name: value / weight if weight else None for name, (value, weight) in every_rank[0][0].items()}
    per_token = {row: values for _, part in every_rank for row, values in part.items()}
    return {**metrics, **batch_metrics(batch, rows, config), "grad_norm": grad_norm.item()}, per_token


# ──────────────────────────────────────────────── Batches of ragged completions ───────────────────────────────────────


def micro_batches(rows, batch, config, team):
    """This rank's share of a range of rows, in micro-batches: (rows, which of them are real). Every rank gets as many,
    for every rank must run the same forwards; where rows run out, a row is repeated that does not count."""
    step = config.generation_batch_size // config.steps_per_generation
    for start in range(rows.start, rows.stop, step):  # the rows of one optimizer step stay with a rank
        part = rows[start - rows.start:start - rows.start + step]
        size_of = {i: len(batch.prompts[i].ids) + len(batch.completions[i].token_ids) for i in part}
        own = portion(part, size_of, team)
        for first in range(0, len(own), config.micro_batch_size):
            micro = own[first:first + config.micro_batch_size]
            yield [i for i, _ in micro], [is_real for _, is_real in micro]


def collate(policy, batch, rows, text_only=False):
    return policy.collate([batch.prompts[i] for i in rows], [batch.completions[i].token_ids for i in rows], text_only)


def lengths(batch, rows):
    return [len(batch.completions[i].token_ids) for i in rows]


def pad(rows, policy):
    """List of [T_i] → [B, max T_i] on the policy's device, 0 on the right."""
    return pad_sequence(rows, batch_first=True).to(policy.device)


# ─────────────────────────────────────────────────────── What is logged ───────────────────────────────────────────────


MASS_METRICS = ("audio_mass_max", "audio_mass_max_late", "audio_mass_mean", "audio_mass_mean_late")


@torch.no_grad()
def collect(totals, parts, now, mass, old_logp, text_ref_entropy, advantages, token_mask, loss_mask, share, config,
            team):
    """Adds a micro-batch to the step's metrics: totals[name] = [Σ value·weight, Σ weight]. → Δh_t [B, T] or None

    Losses are weighted as in the gradient. The rest are means over tokens: of ρ and ω̃ over those that the loss counts
    (`loss_mask`), of entropies and a_t over all of them. Late is the last third of each completion.
    """
    def add(name, values, where):
        totals[name][0] += values[where].sum().item()
        totals[name][1] += where.sum().item()

    for name in ("loss", "policy_loss", "kl_loss", "attention_loss"):
        totals[name][0] += parts[name].item() * share
        totals[name][1] = 1.0 / team.size  # the ranks' shares add up to 1
    position = torch.arange(1, token_mask.shape[1] + 1, device=token_mask.device)
    late = token_mask & ((position - 1) * 3 >= 2 * token_mask.sum(dim=1, keepdim=True))
    ratio, sign = (now.logp - old_logp).exp(), advantages.sign()[:, None]
    add("clip_fraction", ((ratio - 1) * sign > config.clip_ratio).float(), loss_mask)  # the clip stops the gradient
    add("policy_entropy", now.entropy, token_mask)  # H_policy
    delta_h = None
    if text_ref_entropy is not None:
        delta_h = differential_entropy(text_ref_entropy, now.entropy)
        add("text_ref_entropy", text_ref_entropy, token_mask)  # H_text-ref
        add("delta_h_abs", delta_h.abs(), token_mask)
    add("omega_mean", parts["omega"], loss_mask)
    add("omega_square", parts["omega"] ** 2, loss_mask)  # its spread: 1 when ω̃ ≡ 1
    add("omega_capped", (parts["omega"] >= config.mask_clip).float(), loss_mask)
    if mass is not None:
        mean_head = now.head_mass.mean(dim=(0, 2))  # mean over layers and heads  [B, T]
        for name, values in (("audio_mass_max", mass), ("audio_mass_mean", mean_head)):
            add(name, values, token_mask)
            add(f"{name}_late", values, late)
    return delta_h


def batch_metrics(batch, rows, config):
    """Rewards by kind, lengths and the POS gate of a step's completions, and the sampler's distance from π_old: the
    mean of |log π_old − log μ| over tokens, and the effective sample size of w = π_old/μ, (Σw)² / (n·Σw²), 1 when they
    are the same. Top-k, top-p and a repetition penalty are part of μ, and thereby of both."""
    rows = list(rows)
    tokens = lengths(batch, rows)
    old_logp = torch.cat([batch.old_logp[i] for i in rows]).cpu()
    log_ratio = old_logp - torch.tensor([logp for i in rows for logp in batch.completions[i].logps])
    weight = log_ratio.double().exp()
    mean = {f"reward_{name}": values[rows].mean().item() for name, values in batch.rewards.items() if name != "total"}
    if config.reward_weights[2] == 0:
        mean["reward_consistency"] = None
    return {"reward": batch.rewards["total"][rows].mean().item(), **mean,
            "reward_std": batch.rewards["total"][rows].std(unbiased=False).item(),
            "accuracy": mean["reward_accuracy"],
            "zero_advantage": (batch.advantages[rows].abs() < 1e-6).float().mean().item(),
            "completion_length": sum(tokens) / len(tokens),
            "truncated": sum(batch.completions[i].finish_reason == "length" for i in rows) / len(rows),
            "pos_coverage": sum(sum(batch.pos_gates[i]) for i in rows) / sum(tokens),
            "pos_fallbacks": sum(batch.pos_fallbacks[i] for i in rows),
            "sampler_gap": log_ratio.abs().mean().item(),
            "importance_ess": (weight.sum() ** 2 / (len(weight) * (weight ** 2).sum())).item()}


def completion_record(batch, row, step, per_token):
    """A line of completions.jsonl; Δh_t and a_t per token, as the update saw them."""
    completion, (delta_h, audio_mass) = batch.completions[row], per_token

    def rounded(values):
        return None if values is None else [round(v, 4) for v in values]

    return {"step": step, "prompt_id": batch.prompts[row].question.id, "text": batch.texts[row],
            "finish_reason": completion.finish_reason, "weight_version": batch.weight_version,
            "token_ids": completion.token_ids,
            **{f"reward_{name}": values[row].item() for name, values in batch.rewards.items()},
            "advantage": batch.advantages[row].item(), "delta_h": rounded(delta_h), "audio_mass": rounded(audio_mass)}


@contextlib.contextmanager
def open_log(config, team=Team(), done=0):
    """Makes output_dir, writes config.yaml, and yields log(file name, record), which appends a line of json. An earlier
    run's lines are dropped, or, where a run resumes, those after step `done`. Metrics go to accelerate's tracker as
    well, when one is asked for. On ranks other than 0 nothing is written."""
    if not team.leads:
        yield lambda name, record: None
        return
    folder = Path(config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(dataclasses.asdict(config), sort_keys=False), encoding="utf-8")
    tracker = None
    if config.report_to != "none":
        from accelerate import Accelerator  # slow to import, and needed for its trackers alone
        tracker = Accelerator(log_with=config.report_to, project_dir=folder)
        tracker.init_trackers(folder.name, config={k: str(v) for k, v in dataclasses.asdict(config).items()})
    with contextlib.ExitStack() as files:
        opened = {}
        for name in ("metrics.jsonl", "completions.jsonl", "evaluation.jsonl"):
            kept = []
            if done and (folder / name).is_file():
                with open(folder / name, encoding="utf-8") as file:
                    lines = list(file)  # not splitlines: a text may hold other line ends
                kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= done]
            opened[name] = files.enter_context(open(folder / name, "w", encoding="utf-8"))
            opened[name].writelines(kept)

        def log(name, record):
            opened[name].write(json.dumps(record, ensure_ascii=False) + "\n")
            opened[name].flush()
            if tracker and name == "metrics.jsonl":
                tracker.log({k: v for k, v in record.items() if v is not None}, step=record["step"])

        for each in tracker.trackers if tracker else ():  # end_training would tear down the ranks' connection as well
            files.callback(each.finish)
        yield log


@contextlib.contextmanager
def timed(seconds, name):
    started = time.perf_counter()
    yield
    seconds[name] += time.perf_counter() - started


def evaluate(policy, questions, config, step, server=None, team=Team()):
    """Greedy accuracy, format and length on `questions` → a record of evaluation.jsonl; prints it as well."""
    prompts = [policy.encode(q, config.instruction) for q in questions]
    if config.rollout == "vllm" and team.share(team.leads and server.version != step):
        push_weights(server, policy, Path(config.output_dir) / "weights", step)
    completions = None
    if team.leads or config.rollout == "local":
        completions = sample(policy, prompts, 1, temperature=0, seed=0, repetition_penalty=config.repetition_penalty,
                             max_new_tokens=config.max_new_tokens, progress=team.leads, server=server)
    completions = team.share(completions)
    texts = [policy.text(c) for c in completions]
    accuracy = [accuracy_reward(t, q.answer, q.choices, config.format_style) for t, q in zip(texts, questions)]
    form = [format_reward(t, config.format_style, think_is_prefilled(policy, p)) for t, p in zip(texts, prompts)]
    n = len(questions)
    record = {"step": step, "questions": n, "accuracy": sum(accuracy) / n, "format": sum(form) / n,
              "completion_length": sum(len(c.token_ids) for c in completions) / n}
    if team.leads:
        print(f"step {step}: greedy accuracy {record['accuracy']:.3f}, format {record['format']:.3f} on {n} questions")
    return record


def save_checkpoint(policy, folder, team=Team()):
    """Writes a folder that transformers, vLLM and load_policy read; beside it the adapter alone, for LoRA. Written in a
    sibling and renamed, so that a broken run leaves no half checkpoint."""
    building = folder.with_name(f".{folder.name}.writing")
    if team.leads:
        shutil.rmtree(building, ignore_errors=True)
    policy.save(building)
    adapter = folder.with_name(folder.name.replace("checkpoint", "adapter"))
    if policy.model is not policy.base:
        policy.save_adapter(adapter)
    if team.leads:
        shutil.rmtree(folder, ignore_errors=True)
        building.rename(folder)


def plot_training(folder):
    """training.png: the paper's curves of this run: accuracy and length (Fig. 4), a_t (Fig. 5)."""
    from matplotlib.figure import Figure  # slow to import, and only needed at the end

    metrics, evaluations = ([json.loads(line) for line in open(folder / name, encoding="utf-8")]
                            for name in ("metrics.jsonl", "evaluation.jsonl"))
    figure = Figure(figsize=(13, 3.8), layout="constrained")
    accuracy, length, mass = figure.subplots(1, 3)

    def curve(axis, name, label, color):
        points = [(m["step"], m[name]) for m in metrics if m.get(name) is not None]
        if points:
            steps, values = zip(*points)
            smooth = [sum(values[max(0, i - 4):i + 1]) / len(values[max(0, i - 4):i + 1]) for i in range(len(values))]
            axis.plot(steps, values, color=color, alpha=0.25, linewidth=1)
            axis.plot(steps, smooth, color=color, label=label)

    curve(accuracy, "accuracy", "sampled, training questions", "tab:blue")
    if evaluations:
        accuracy.plot([e["step"] for e in evaluations], [e["accuracy"] for e in evaluations], "ko--", markersize=5,
                      linewidth=1, label="greedy, held-out questions")
    curve(length, "completion_length", "completion length", "tab:green")
    curve(mass, "audio_mass_max", "max head, all tokens", "tab:orange")
    curve(mass, "audio_mass_max_late", "max head, last third", "tab:red")
    curve(mass, "audio_mass_mean", "mean head, all tokens", "tab:gray")
    for axis, title, unit in ((accuracy, "Accuracy", "share right"), (length, "Completion length", "tokens"),
                              (mass, "Audio attention mass $a_t$", "share of attention")):
        axis.set(title=title, xlabel="optimizer step", ylabel=unit)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    accuracy.set_ylim(0, 1.02)
    mass.set_ylim(bottom=0)
    figure.savefig(folder / "training.png", dpi=120)


# ────────────────────────────────────────────────────── At the door ───────────────────────────────────────────────────


def open_inputs(config, team=Team()):
    """Reads and checks all a run needs → questions, eval questions, policy, reference. Raises InputError; writes
    nothing. In a team rank 0 does so for all, and alone holds the whole weights, for as long as it sends them."""
    whole, questions, eval_questions = None, None, None
    if team.leads:
        questions, eval_questions, whole = read_inputs(config)
    questions, eval_questions = team.share((questions, eval_questions))
    if team.size == 1:
        reference = make_reference(set_trainable(whole, config), config)
        whole.to(team.device)
        return questions, eval_questions, whole, reference
    dtype = torch.bfloat16 if team.device.type == "cuda" else None
    frozen = None
    if not config.lora_rank:  # under LoRA the reference is the policy without its adapters
        frozen = load_policy(config.model, dtype or torch.float32, meta=True).requires_grad_(False)
        frozen = fill(shard(frozen, team, dtype), whole, team).eval()
    if team.leads:
        set_trainable(whole, config)
    policy = set_trainable(load_policy(config.model, meta=True), config)
    policy = fill(shard(policy, team, dtype), whole, team)
    return questions, eval_questions, policy, make_reference(policy, config, frozen)


def read_inputs(config):
    """→ questions, eval questions, policy with whole weights on the CPU."""
    for name in ("model", "data"):
        if not getattr(config, name):
            raise InputError(f"{name} is empty: give --{name}, or a recipe that has it")
    if config.reward_weights[2] != 0 and config.checker != "rule" and not config.checker.startswith("http") \
            and not (Path(config.checker or "-") / "config.json").is_file():
        raise InputError(f"checker is {config.checker!r}: give the URL of the consistency checker, the folder of a "
                         "model to start vLLM on, `rule`, or λ_cons 0")
    starts_checker = config.reward_weights[2] != 0 and Path(config.checker).is_dir()
    if (config.rollout == "vllm" and not config.vllm_url or starts_checker) and not vllm_python(config).is_file():
        raise InputError(f"vllm_python {vllm_python(config)}: no such interpreter; `make vllm` makes the environment "
                         "of vLLM, see requirements-vllm.txt")
    if config.vllm_url and not config.vllm_url.startswith("http"):
        raise InputError(f"vllm_url is {config.vllm_url!r}: give a URL, as http://127.0.0.1:8000")
    if config.vllm_url:
        Server(config.model, url=config.vllm_url)  # refuses an address without a key
    if config.report_to != "none" and importlib.util.find_spec(config.report_to) is None:
        raise InputError(f"report_to is {config.report_to}, which is not installed: pip install {config.report_to}")
    output_dir = Path(config.output_dir).resolve()
    existing = next(folder for folder in (output_dir, *output_dir.parents) if folder.exists())
    if not existing.is_dir():
        raise InputError(f"output_dir {config.output_dir}: {existing} is a file; give a folder")
    if output_dir in (Path(config.model).resolve(), *Path(config.model).resolve().parents):
        raise InputError(f"output_dir {config.output_dir} holds the model that this run starts from; give another "
                         "folder")
    if config.reward_weights[2] != 0 and config.checker.startswith("http"):
        probe = {"think": "<think>2 is even.</think>even",
                 "reasoning": "<reasoning>2 is even.</reasoning><answer>even</answer>"}[config.format_style]
        try:
            check_consistency([probe], config)
        except CheckerError as error:
            raise InputError(f"checker: {error}") from error
    questions = (read_avqa(config.data, config.audio_root) if config.data_format == "avqa"
                 else read_questions(config.data))
    eval_questions = read_questions(config.eval_data) if config.eval_data else []
    torch.manual_seed(config.seed)
    policy = load_policy(config.model)
    check_policy(policy, [*questions, *eval_questions], config.target_layers)
    return questions, eval_questions, policy


def set_trainable(policy, config):
    """Says which parameters are trained, adds the adapters, switches checkpointing on. → policy, changed in place"""
    policy.requires_grad_(False)
    if config.lora_rank:
        add_lora(policy, config.lora_rank, config.lora_alpha)
    else:
        policy.base.requires_grad_(True)
        for name in ("visual", "audio_tower", "multi_modal_projector"):  # the vision tower has no part in the forward
            if hasattr(policy.base.model, name) and (name == "visual" or config.freeze_audio_tower):
                getattr(policy.base.model, name).requires_grad_(False)
    if config.gradient_checkpointing:
        policy.base.activation_checkpointing_enable({"use_reentrant": False})
    return policy


def resume(policy, optimizer, schedule, config, team):
    """Loads the newest whole state of output_dir → (steps done, unfinished GenerationBatch or None)."""
    folder = newest_state(Path(config.output_dir) / "state", team)
    if folder is None:
        raise InputError(f"{config.output_dir}/state: no whole state there to resume from; leave out --resume")
    saved = read_state(folder)
    for name, value in saved["config"].items():
        if name not in MAY_CHANGE and getattr(config, name) != value:
            raise InputError(f"{name} is {getattr(config, name)!r} and was {value!r} when {folder} was saved; resume "
                             f"with the same, or start a new run")
    load_state(folder, saved, policy, optimizer, schedule, team)
    return saved["step"], saved["batch"]


# What a resumed run may have otherwise: where and how it runs, not what it computes.
MAY_CHANGE = {"output_dir", "resume", "report_to", "plan", "plan_gpus", "plan_gib", "micro_batch_size",
              "gradient_checkpointing", "save_every", "export_every", "rollout_nodes", "offload_reference", "rollout",
              "vllm_python", "vllm_url", "vllm_flags", "checker_flags", "check_push_every", "max_push_gap"}


def vllm_python(config):
    return Path(__file__).resolve().parent / config.vllm_python


@contextlib.contextmanager
def open_servers(config, policy, questions, team=Team()):
    """Starts the vLLM servers that a run asks for → (rollout server or None, checker's or None); ends them with it. In
    a team they are rank 0's to talk to; the last node runs them where nodes serve."""
    folder, server, checker = Path(config.output_dir).resolve(), None, None
    served = Path(config.model).resolve()
    if config.rollout == "vllm" and policy.full_config is None and policy.base.config.model_type in WHOLE_MODEL:
        served = folder / "weights" / "version-0"  # vLLM serves a thinker inside its whole model alone
        policy.save(served)
    with contextlib.ExitStack() as stack:
        if not team.leads:
            yield None, None
            return
        if config.rollout == "vllm":  # what was pushed; nobody reads it again
            stack.callback(shutil.rmtree, folder / "weights", ignore_errors=True)
        if config.rollout == "vllm" and config.vllm_url:
            server = stack.enter_context(Server(served, url=config.vllm_url))
        elif config.rollout == "vllm":
            server = launch(stack, team, "rollout", folder=served, python=vllm_python(config), log=folder / "vllm.log",
                            flags=config.vllm_flags, clips=max(len(q.audio) for q in questions))
        if config.reward_weights[2] != 0 and Path(config.checker).is_dir():
            if server and server.ours:  # on the same GPUs: vLLM measures what is free while it starts, one at a time
                server.wait()
            checker = launch(stack, team, "checker", folder=Path(config.checker).resolve(), python=vllm_python(config),
                             log=folder / "checker.log", flags=config.checker_flags, weights_change=False,
                             name=config.checker_model)
        yield server, checker


def make_reference(policy, config, frozen=None):
    """→ a context manager that yields the frozen initial policy: π_ref and π_text-ref. Under LoRA it is the policy with
    its adapters disabled, no copy; else `frozen`, or a copy made now."""
    if config.lora_rank:
        @contextlib.contextmanager
        def reference():
            with policy.model.disable_adapter():
                yield policy
        return reference
    if frozen is None:
        frozen = copy.deepcopy(policy).requires_grad_(False).eval()

    @contextlib.contextmanager
    def reference():
        yield frozen.to(policy.device)
        if config.offload_reference:
            frozen.to("cpu")
    return reference


def make_optimizer(policy, config):
    """AdamW with decay on matrices alone, and the cosine schedule with warm-up."""
    trained = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        [{"params": [p for p in trained if p.dim() >= 2], "weight_decay": config.weight_decay},
         {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0}],
        lr=config.learning_rate, betas=(config.adam_beta1, config.adam_beta2))
    warmup = math.ceil(config.warmup_ratio * config.max_steps)
    return optimizer, get_cosine_schedule_with_warmup(optimizer, warmup, config.max_steps)


def read_config(arguments):
    """Command line → TrainConfig: an optional recipe (yaml) first, then flags, which override it. Raises InputError."""
    parser = HfArgumentParser(TrainConfig, usage="train.py [RECIPE.yaml] [--FIELD VALUE ...]",
                              description=__doc__.split("\n")[0])

    def refuse(message):
        raise InputError(f"{message}; see python train.py --help")

    parser.error = refuse
    flags = []
    if arguments and not arguments[0].startswith("-"):
        recipe, arguments = Path(arguments[0]), arguments[1:]
        flags = [flag for name, value in read_recipe(recipe).items()
                 for flag in ((f"--{name}", *map(str, value)) if isinstance(value, list) else (f"--{name}={value}",))]
    try:
        return parser.parse_args_into_dataclasses([*flags, *arguments], look_for_args_file=False)[0]
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"config: {error}") from error


def read_recipe(path):
    """Yaml file of fields → dict. Raises InputError naming the file and the unknown key."""
    if not path.is_file():
        raise InputError(f"{path}: no such recipe; see recipes/")
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not valid yaml ({' '.join(str(error).split())})") from error
    known = {f.name for f in dataclasses.fields(TrainConfig)}
    if not isinstance(recipe, dict):
        raise InputError(f"{path}: a {type(recipe).__name__}; write one `field: value` a line")
    unknown = [key for key in recipe if key not in known]
    if unknown:
        raise InputError(f"{path}: unknown field {unknown[0]!r}; python train.py --help lists the fields")
    empty = [key for key, value in recipe.items() if value is None]
    if empty:
        raise InputError(f"{path}: field {empty[0]!r} has no value; give one or remove the line")
    return recipe


def main(arguments):
    transformers_logging.disable_progress_bar()  # its bars for loading and saving would break ours
    transformers_logging.set_verbosity_error()  # its reports on a broken checkpoint run over many lines
    try:
        config = read_config(arguments)
        try:
            load_tagger()
        except LookupError as error:
            raise InputError(str(error)) from error
        if config.model == "toy":  # the embedded default: a folder of its own, with model and questions
            from toy import prepare
            world = prepare(Path(config.output_dir).parent / f"toy-world-{config.seed}", config.seed)
            config = dataclasses.replace(config, model=str(world / "model"),
                                         data=str(world / "train.jsonl") if config.data in ("", "toy") else config.data,
                                         eval_data=config.eval_data or str(world / "test.jsonl"))
        if config.plan:
            policy = set_trainable(load_policy(config.model, meta=True), config)
            print_plan(policy, config, config.plan_gpus, config.plan_gib)
        else:
            train(config)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (CheckerError, RolloutError) as error:  # a reward or completions are missing: the run stops
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
