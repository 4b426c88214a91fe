"""Rollouts: G completions y⁽¹⁾..y⁽ᴳ⁾ ~ π_θ(· | x) for every prompt (Algorithm 1, line 3), in this process.

The prompt of a group, audio encoder included, runs once; its keys and values are then repeated for the G samples.
"""

from dataclasses import dataclass

import torch
from tqdm import tqdm
from transformers import (LogitsProcessorList, RepetitionPenaltyLogitsProcessor, SuppressTokensLogitsProcessor,
                          TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper)

from model import positions

SEQUENCES = 256  # completions decoded at a time; bounds the KV cache


@dataclass(frozen=True)
class Completion:
    """One sampled completion. EOS, where the policy wrote it, is its last token."""

    token_ids: list[int]
    logps: list[float]  # the sampler's own log-probs, after temperature, top-k and top-p, renormalised; nats
    finish_reason: str  # "stop" (an EOS was sampled) or "length" (max_new_tokens reached)


@torch.no_grad()
def sample(policy, prompts, group_size, *, temperature, top_k=0, top_p=1.0, repetition_penalty=1.0, max_new_tokens,
           seed, progress=False):
    """`group_size` completions of every prompt → list[Completion], the completions of a prompt contiguous.

    temperature 0 is greedy decoding; top_k 0 and top_p 1 leave the distribution whole. Placeholder ids are banned. The
    same seed gives the same completions. Puts the policy into evaluation mode: in training mode with checkpointing
    transformers drops the cache, and would sample from nothing.
    """
    policy.eval()
    generator = torch.Generator(policy.device).manual_seed(seed)
    chain = [SuppressTokensLogitsProcessor(policy.placeholder_ids, device=policy.device)]
    if repetition_penalty != 1.0:
        chain.append(RepetitionPenaltyLogitsProcessor(repetition_penalty))
    if temperature not in (0, 1):
        chain.append(TemperatureLogitsWarper(float(temperature)))
    if top_k > 0:
        chain.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        chain.append(TopPLogitsWarper(top_p))
    prompts_at_once = max(1, SEQUENCES // group_size)
    completions = []
    for start in tqdm(range(0, len(prompts), prompts_at_once), desc="generate", leave=False, disable=not progress):
        completions += _sample_chunk(policy, prompts[start:start + prompts_at_once], group_size,
                                     LogitsProcessorList(chain), greedy=temperature == 0, max_new_tokens=max_new_tokens,
                                     generator=generator)
    return completions


def _sample_chunk(policy, prompts, group_size, processors, *, greedy, max_new_tokens, generator):
    base, device = policy.base, policy.device
    batch = policy.collate(prompts, [[]] * len(prompts)).to(device)  # with no completion T is 1, a column of padding
    ids, attention_mask = batch.input_ids[:, :-1], batch.attention_mask[:, :-1]  # [P, prompt length]
    output = base.model(input_ids=ids, attention_mask=attention_mask, position_ids=positions(attention_mask),
                        use_cache=True, **batch.audio)  # every prompt once
    cache = output.past_key_values
    cache.batch_repeat_interleave(group_size)
    hidden = output.last_hidden_state[:, -1].repeat_interleave(group_size, dim=0)  # [B, D], B = P·G
    # The repetition penalty reads `ids`: padding must name no new token, so it repeats the row's first.
    first = ids.gather(1, attention_mask.argmax(dim=1, keepdim=True))
    ids = torch.where(attention_mask.bool(), ids, first).repeat_interleave(group_size, dim=0)
    attention_mask = attention_mask.repeat_interleave(group_size, dim=0)
    eos = torch.tensor(policy.eos_ids, device=device)

    rows = torch.arange(len(ids), device=device)  # rows: the completions still being written
    tokens = torch.zeros(len(ids), max_new_tokens, dtype=torch.long, device=device)
    logps = torch.zeros(len(ids), max_new_tokens, device=device)
    lengths = torch.full((len(ids),), max_new_tokens, device=device)
    stopped = torch.zeros(len(ids), dtype=torch.bool, device=device)
    for t in range(max_new_tokens):
        scores = processors(ids, base.lm_head(hidden).float())  # [rows, V]
        log_probs = scores.log_softmax(dim=-1)
        token = scores.argmax(-1) if greedy else torch.multinomial(log_probs.exp(), 1, generator=generator)[:, 0]
        tokens[rows, t], logps[rows, t] = token, log_probs.gather(1, token[:, None])[:, 0]
        done = torch.isin(token, eos)
        lengths[rows[done]], stopped[rows[done]] = t + 1, True
        if done.all() or t + 1 == max_new_tokens:
            break
        ids = torch.cat([ids, token[:, None]], dim=1)
        attention_mask = torch.cat([attention_mask, attention_mask.new_ones(len(ids), 1)], dim=1)
        if done.any():  # finished rows leave the batch, and the cache
            keep = (~done).nonzero()[:, 0]
            rows, ids, attention_mask = rows[keep], ids[keep], attention_mask[keep]
            cache.batch_select_indices(keep)
        output = base.model(input_ids=ids[:, -1:], attention_mask=attention_mask, use_cache=True, past_key_values=cache,
                            position_ids=positions(attention_mask)[:, -1:])
        hidden = output.last_hidden_state[:, -1]
    tokens, logps, lengths, stopped = tokens.tolist(), logps.tolist(), lengths.tolist(), stopped.tolist()
    return [Completion(tokens[i][:n], logps[i][:n], "stop" if stopped[i] else "length") for i, n in enumerate(lengths)]
