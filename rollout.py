"""Rollouts: G completions y⁽¹⁾..y⁽ᴳ⁾ ~ π_θ(· | x) for every prompt x.  (Algorithm 1, line 3)

    sampling = Sampling(temperature=1.2, top_k=50, top_p=0.99, max_new_tokens=1200)
    completions = sample(policy, prompts, G, sampling, seed=0)                 # in this process
    completions = sample(policy, prompts, G, sampling, seed=0, server=server)  # on vLLM, server.py
    push_weights(server, policy, "runs/weights", version=4)                    # after an update

In this process, each prompt runs once; its keys and values are then repeated for the G samples. A
vLLM server (the paper's way) receives the audio with each question, and the policy's weights after
each update. We check its answers: the token ids of its prompts must equal ours, and so, after a
push, must the log-probs of its samples (`check_push`).
"""

import base64
import functools
import hashlib
import io
import math
import shutil
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import soundfile
import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import (LogitsProcessorList, RepetitionPenaltyLogitsProcessor,
                          SuppressTokensLogitsProcessor, TemperatureLogitsWarper,
                          TopKLogitsWarper, TopPLogitsWarper)

from balance import micro_batches_by_tokens, rows_of_rank
from checkpoint import replacing, save_policy
from data import SAMPLE_RATE, conversation
from distributed import Team
from model import Batch, positions
from server import RolloutError

SEQUENCES = 256  # completions decoded at the same time in this process; bounds the KV cache
ENCODED_AT_ONCE = 8  # questions whose audio a rank encodes in one forward
CHECK_TOKENS = 32  # length of the completions that check_push compares


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """The distribution that completions are sampled from."""

    temperature: float  # 0 is greedy decoding
    top_k: int = 0  # 0 keeps all tokens
    top_p: float = 1.0  # 1 keeps all tokens
    repetition_penalty: float = 1.0  # 1 is none
    max_new_tokens: int


@dataclass(frozen=True)
class Completion:
    """One sampled completion. If the policy ended it, EOS is its last token."""

    token_ids: list[int]
    logps: list[float]  # of the sampler, after temperature, top-k and top-p, renormalised; nats
    finish_reason: str  # "stop" (EOS was sampled) or "length" (max_new_tokens was reached)


def sample(policy, prompts, group_size, sampling, *, seed, progress=False, server=None):
    """Samples G = group_size completions for each of P prompts.  (Algorithm 1, line 3)

    → list of P·G Completions; those of one prompt are next to each other. Placeholder ids, such as
    those of audio tokens, are never sampled.

    server: a server.Server, which samples with the weights that were pushed last. Without one the
    policy samples in this process, and the same seed gives the same completions.
    Raises RolloutError if the server fails or its answer is not usable.
    """
    if server is None:
        return _sample_here(policy, prompts, group_size, sampling, seed, progress)
    requests = [(prompt.question.id, functools.partial(_request, policy, prompt, group_size,
                                                       sampling, f"{seed} {i}"))
                for i, prompt in enumerate(prompts)]
    return server.complete(
        requests, lambda i, answer: _read(answer, policy, prompts[i], group_size), progress)


# ──────── the completions of one iteration ────────


@dataclass
class GenerationBatch:
    """The completions of one iteration, group by group, and what is computed on them once.

    N = generation_batch_size; entry i of every list belongs to completion i, whose length is T.
    """

    prompts: list  # [N] model.Prompt, each repeated G times
    completions: list  # [N] rollout.Completion
    weight_version: int  # optimizer steps behind the weights that sampled them
    tokens_per_second: float  # of sampling
    seconds: dict = field(default_factory=lambda: defaultdict(float))  # phase → time, for the log
    texts: list = None  # [N] str
    rewards: dict = None  # name → tensor [N]: accuracy, format, consistency, total (Eq. 6)
    unreadable: list = None  # [N] bool: the checker gave no verdict that could be read
    advantages: torch.Tensor = None  # [N] Â
    pos_gates: list = None  # [N] of [T] 0/1, g_t^pos
    pos_fallbacks: list = None  # [N] 0/1: did the gate fall back to all ones?
    old_logp: list = None  # [N] of [T], π_old = π_θ at the start of the iteration
    ref_logp: list = None  # [N] of [T]
    text_ref_entropy: list = None  # [N] of [T], H(π_text-ref); None in plain GRPO


@torch.no_grad()
def encode_prompts(questions, run):
    """Questions → Prompts, on every rank. Each rank encodes a part of them, and the ranks share.

    While the audio encoder is frozen, the prompts carry its embeddings, so each clip is encoded
    once per iteration. π_ref has the same encoder.
    """
    team, policy, config = run.team, run.policy, run.config
    rounds = math.ceil(len(questions) / team.size)
    # All ranks run the same forwards: those without a question of their own repeat the last one.
    places = [min(number * team.size + team.rank, len(questions) - 1) for number in range(rounds)]
    prompts = [policy.encode(questions[place], config.instruction) for place in places]
    if config.audio_tower_is_frozen:
        policy.eval()
        parts = [prompts[i:i + ENCODED_AT_ONCE] for i in range(0, rounds, ENCODED_AT_ONCE)]
        prompts = [prompt for part in parts
                   for prompt in policy.call_gathered(policy.encode_audio, part)]
    of_place = {}
    for part in team.gather(dict(zip(places, prompts))):
        of_place |= part
    return [of_place[place] for place in range(len(questions))]


def rows_of_step(step, config):
    """Which completions of its generation batch an optimizer step trains on; steps start at 1."""
    first = (step - 1) % config.steps_per_generation * config.step_size
    return range(first, first + config.step_size)


def micro_batches(rows, batch, run):
    """This rank's part of a range of rows, in micro-batches: (rows, which of them are real).

    Those of a step are the same in the frozen forwards and in the update, so that padding changes
    no last bit of π_θ/π_old.
    """
    config, team, most_rows = run.config, run.team, run.config.micro_batch_size
    for start in range(rows.start, rows.stop, config.step_size):
        step_rows = range(start, min(start + config.step_size, rows.stop))
        sizes = {i: (len(batch.prompts[i].ids), len(batch.completions[i].token_ids))
                 for i in step_rows}
        if config.micro_batch_tokens:
            slots = micro_batches_by_tokens(sizes, config.micro_batch_tokens, most_rows, team.size)
            parts = [slot[team.rank] for slot in slots]
        else:
            own = rows_of_rank(step_rows, {i: sum(size) for i, size in sizes.items()}, team)
            parts = [own[first:first + most_rows] for first in range(0, len(own), most_rows)]
        for part in parts:
            part_rows, real = zip(*part)
            yield list(part_rows), list(real)


@dataclass
class MicroBatch:
    """Tensors of B completions, padded to [B, T] on the policy's device; 0 where padded."""

    rows: list  # [B] places in the generation batch
    real: list  # [B] bool; False for a row that only keeps the ranks in step
    weight: float  # of its loss: counted completions here / counted completions of the step
    inputs: Batch
    token_mask: torch.Tensor  # [B, T] bool, the tokens of the real completions
    loss_mask: torch.Tensor  # [B, T] bool, those that the loss counts (mask_truncated)
    advantages: torch.Tensor  # [B]
    accuracy_reward: torch.Tensor  # [B]
    old_logp: torch.Tensor
    ref_logp: torch.Tensor
    sampler_logp: torch.Tensor
    pos_gate: torch.Tensor
    text_ref_entropy: torch.Tensor | None


def gather_rows(batch, step_rows, rows, real, run):
    """The completions `rows` of a generation batch → MicroBatch. step_rows: all of the step."""
    config, device = run.config, run.policy.device

    def counts(row):  # does the loss count this completion?
        return not (config.mask_truncated and batch.completions[row].finish_reason == "length")

    def padded(values):  # list of N tensors or lists [T] → [B, T]
        return pad_sequence([torch.as_tensor(values[row]) for row in rows],
                            batch_first=True).to(device)

    counted = torch.tensor([counts(row) for row in rows], device=device)[:, None]  # [B, 1]
    inputs = collate(batch, rows, run)
    token_mask = inputs.completion_mask.to(device) & torch.tensor(real, device=device)[:, None]
    here = sum(counts(row) and is_real for row, is_real in zip(rows, real))
    return MicroBatch(
        rows, real, here / max(1, sum(map(counts, step_rows))), inputs, token_mask,
        token_mask & counted, batch.advantages[rows].to(device),
        batch.rewards["accuracy"][rows].to(device), padded(batch.old_logp),
        padded(batch.ref_logp), padded([c.logps for c in batch.completions]),
        padded(batch.pos_gates), padded(batch.text_ref_entropy) if batch.text_ref_entropy else None)


def collate(batch, rows, run, text_only=False):
    return run.policy.collate([batch.prompts[row] for row in rows],
                              [batch.completions[row].token_ids for row in rows], text_only)


# ──────── sampling in this process ────────


@torch.no_grad()
def _sample_here(policy, prompts, group_size, sampling, seed, progress):
    # In training mode with gradient checkpointing, transformers drops the cache.
    policy.eval()
    generator = torch.Generator(policy.device).manual_seed(seed)
    prompts_at_once = max(1, SEQUENCES // group_size)
    completions = []
    for start in tqdm(range(0, len(prompts), prompts_at_once), desc="generate", leave=False,
                      disable=not progress):
        chunk = prompts[start:start + prompts_at_once]
        completions += policy.call_gathered(_sample_chunk, policy, chunk, group_size, sampling,
                                            generator)
    return completions


def _sample_chunk(policy, prompts, group_size, sampling, generator):
    base, device, longest = policy.base, policy.device, sampling.max_new_tokens
    processors = _processors(policy, sampling)
    # Completions are empty, but collate makes them at least one token long: drop that padding.
    batch = policy.collate(prompts, [[]] * len(prompts)).to(device)
    ids, attention_mask = batch.input_ids[:, :-1], batch.attention_mask[:, :-1]  # [P, S]
    output = base.model(**policy.model_inputs(ids, batch.audio), attention_mask=attention_mask,
                        position_ids=positions(attention_mask), use_cache=True)
    cache = output.past_key_values
    cache.batch_repeat_interleave(group_size)
    hidden = output.last_hidden_state[:, -1].repeat_interleave(group_size, dim=0)  # [B, D], B = P·G
    # The repetition penalty reads `ids`. Padding must not name a token that the prompt lacks, so
    # it becomes the first token of its row.
    first = ids.gather(1, attention_mask.argmax(dim=1, keepdim=True))
    ids = torch.where(attention_mask.bool(), ids, first)
    ids = ids.repeat_interleave(group_size, dim=0)  # [B, S]
    attention_mask = attention_mask.repeat_interleave(group_size, dim=0)
    eos = torch.tensor(policy.eos_ids, device=device)

    rows = torch.arange(len(ids), device=device)  # the completions that are not finished
    tokens = torch.zeros(len(ids), longest, dtype=torch.long, device=device)  # [B, T]
    logps = torch.zeros(len(ids), longest, device=device)
    lengths = torch.full((len(ids),), longest, device=device)
    stopped = torch.zeros(len(ids), dtype=torch.bool, device=device)
    for t in range(longest):
        scores = processors(ids, policy.logits(hidden).float())  # [rows, V]
        log_probs = scores.log_softmax(dim=-1)
        if sampling.temperature == 0:
            token = scores.argmax(-1)
        else:
            token = torch.multinomial(log_probs.exp(), 1, generator=generator)[:, 0]
        tokens[rows, t], logps[rows, t] = token, log_probs.gather(1, token[:, None])[:, 0]
        done = torch.isin(token, eos)
        lengths[rows[done]], stopped[rows[done]] = t + 1, True
        if done.all() or t + 1 == longest:
            break
        ids = torch.cat([ids, token[:, None]], dim=1)
        attention_mask = torch.cat([attention_mask, attention_mask.new_ones(len(ids), 1)], dim=1)
        if done.any():  # finished rows leave the batch and the cache
            keep = (~done).nonzero()[:, 0]
            rows, ids, attention_mask = rows[keep], ids[keep], attention_mask[keep]
            cache.batch_select_indices(keep)
        output = base.model(input_ids=ids[:, -1:], attention_mask=attention_mask, use_cache=True,
                            position_ids=positions(attention_mask)[:, -1:], past_key_values=cache)
        hidden = output.last_hidden_state[:, -1]
    columns = (tokens.tolist(), logps.tolist(), lengths.tolist(), stopped.tolist())
    return [Completion(token_ids[:n], values[:n], "stop" if ended else "length")
            for token_ids, values, n, ended in zip(*columns)]


def _processors(policy, sampling):
    """What the sampler does to the logits, in transformers' order."""
    chain = [SuppressTokensLogitsProcessor(policy.placeholder_ids, device=policy.device)]
    if sampling.repetition_penalty != 1.0:
        chain.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    if sampling.temperature not in (0, 1):
        chain.append(TemperatureLogitsWarper(float(sampling.temperature)))
    if sampling.top_k > 0:
        chain.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        chain.append(TopPLogitsWarper(sampling.top_p))
    return LogitsProcessorList(chain)


# ──────── sampling on a vLLM server ────────


def _request(policy, prompt, group_size, sampling, seed):
    """The body of the chat completion that samples one group."""
    content = []
    for part in conversation(prompt.question, True, prompt.instruction)[0]["content"]:
        if part["type"] == "audio":
            # Exactly the samples that our encoder hears: 16 bits would round them.
            wav = io.BytesIO()
            soundfile.write(wav, policy.load_clip(part["audio"]), SAMPLE_RATE, format="WAV",
                            subtype="FLOAT")
            data = base64.b64encode(wav.getvalue()).decode()
            part = {"type": "input_audio", "input_audio": {"data": data, "format": "wav"}}
        content.append(part)
    # vLLM samples a group with seed, seed + 1, …; hashing keeps the seeds of questions far apart.
    seed = int.from_bytes(hashlib.sha256(seed.encode()).digest()[:6])
    return {"messages": [{"role": "user", "content": content}], "n": group_size, "seed": seed,
            "temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p,
            "repetition_penalty": sampling.repetition_penalty,
            "max_tokens": sampling.max_new_tokens, "stop_token_ids": policy.eos_ids,
            "logit_bias": {str(i): -100 for i in policy.placeholder_ids},
            "logprobs": True, "return_token_ids": True}


def _read(answer, policy, prompt, group_size):
    """The answer to a chat completion → the G Completions of its prompt.

    Raises RolloutError if any of them is incomplete.
    """
    try:
        return _group(answer, policy, prompt, group_size)
    except (LookupError, TypeError) as error:
        raise RolloutError(f"question {prompt.question.id}: the server's answer lacks token ids or "
                           f"log-probs ({error!r}); use vLLM 0.32, which sends them") from error


def _group(answer, policy, prompt, group_size):
    where, ids = f"question {prompt.question.id}", answer["prompt_token_ids"]
    if ids != prompt.ids:
        differs = (i for i, (there, here) in enumerate(zip(ids, prompt.ids)) if there != here)
        at = next(differs, min(len(ids), len(prompt.ids)))
        raise RolloutError(f"{where}: the server's prompt has {len(ids)} tokens, the trainer's has "
                           f"{len(prompt.ids)}, and they differ from token {at} on; give both the "
                           "same tokenizer, chat template and processor files")
    choices = sorted(answer["choices"], key=lambda choice: choice["index"])
    if len(choices) != group_size:
        raise RolloutError(f"{where}: the server sent {len(choices)} completions instead of "
                           f"{group_size}")
    group = []
    for choice in choices:
        token_ids, reason = choice["token_ids"], choice["finish_reason"]
        logps = [token["logprob"] for token in choice["logprobs"]["content"]]
        complete = {"stop": token_ids[-1] in policy.eos_ids, "length": True}.get(reason, False)
        if not complete or len(logps) != len(token_ids) or not all(map(math.isfinite, logps)):
            raise RolloutError(f"{where}: the server sent {len(token_ids)} tokens, {len(logps)} "
                               f"log-probs and finish reason {reason!r}; not a complete completion")
        group.append(Completion(token_ids, logps, reason))
    return group


# ──────── the policy's new weights ────────


def push_weights(server, policy, folder, version, team=Team()):
    """Gives the server the policy's weights (LoRA merged) under the number `version`.

    They are written under `folder` as a checkpoint in the original layout, which is renamed when
    complete; the server pauses while it loads them. If it dies or hangs meanwhile, it restarts on
    the new weights. Every rank of a sharded policy makes this call with its `team` and writes its
    part; only rank 0 has a `server`, the others pass None. Raises RolloutError; on all ranks what
    save_policy raises.
    """
    folder = Path(folder).resolve()
    final = folder / f"version-{version}"
    if team.leads:
        for leftover in folder.glob(".version-*.writing"):  # of pushes that were killed
            shutil.rmtree(leftover, ignore_errors=True)
    with replacing(final, team) as building:
        save_policy(policy, building, team)
    if team.leads:
        server.load(final, version)
        for older in folder.glob("version-*"):
            if older != final:
                shutil.rmtree(older)


@torch.no_grad()
def check_push(server, policy, prompts, *, temperature, max_gap, seed, team=Team()):
    """mean |log π_server(y_t) − log π_θ(y_t)|, nats per token, on one short completion per prompt.

    The server samples the completions from its whole distribution, and the policy scores the same
    tokens. This is needed because a server that accepts a push may still hold wrong weights: vLLM
    has reloaded wrong numbers without an error. Raises RolloutError if the mean exceeds `max_gap`.

    Every rank of a sharded policy makes this call with its `team`. Only rank 0 has a `server`, the
    others pass None and get rank 0's completions.  (ours)
    """
    completions = None
    if server is not None:
        sampling = Sampling(temperature=temperature, max_new_tokens=CHECK_TOKENS)
        completions = sample(policy, prompts, 1, sampling, seed=seed, server=server)
    completions = team.broadcast(completions)
    policy.eval()
    batch = policy.collate(prompts, [c.token_ids for c in completions])
    trainer = policy(batch, temperature).logp.cpu()[batch.completion_mask]  # [tokens]
    there = torch.tensor([logp for c in completions for logp in c.logps])  # [tokens]
    gap = (there - trainer).abs().mean().item()
    if not gap <= max_gap:  # also true for NaN
        raise RolloutError(
            f"weights of version {getattr(server, 'version', '?')}: the server's log-probs are "
            f"{gap:.3g} nats per token from the trainer's, more than {max_gap} (means: server "
            f"{there.mean():.4f}, trainer {trainer.mean():.4f}); the server does not hold the "
            "policy's weights, or it computes differently")
    return gap
