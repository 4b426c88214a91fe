"""Helpers for the tests that sample on a server: the stand-in's faults and requests, log-probs.

The stand-in of tests/stand_in takes the place of vLLM: a policy in a process of its own, which
fails in the ways that its docstring lists. conftest.py has the fixtures that start it.
"""

import json
import os
from collections import Counter
from pathlib import Path

import httpx
import torch

import rollout
from checkpoint import load_policy
from data import read_questions
from rollout import Sampling, sample
from tiny import lines

ROOT = Path(__file__).resolve().parents[2]
STAND_IN = ROOT / "tests" / "stand_in" / "python"
DEVELOPMENT_PATHS = ("/is_paused", "/weight_info", "/pause", "/collective_rpc",
                     "/reset_prefix_cache", "/update_weight_version")


def want(**faults):
    """Sets the stand-in's faults from its next request on."""
    path = Path(os.environ["STAND_IN"])
    path.with_suffix(".new").write_text(json.dumps(faults))
    path.with_suffix(".new").replace(path)  # in one step: the stand-in may be reading


def requests(path=None):
    """The requests that the stand-in got during this test, in the order of their arrival."""
    return [r for r in lines(Path(os.environ["STAND_IN_LOG"])) if path in (None, r["path"])]


def chats():
    return requests("/v1/chat/completions")


def ask(server, path):
    """GET, with the key."""
    return httpx.get(server.url + path, headers={"Authorization": f"Bearer {server.key}"})


def load(world, change=None):
    """The policy and six prompts. change: a seed, to change the policy's weights."""
    policy = load_policy(world / "model")
    if change is not None:
        change_weights(policy, change)
    return policy, [policy.encode(q) for q in read_questions(world / "train.jsonl")[:6]]


def change_weights(policy, seed):
    """Moves every weight that sampling uses by about a tenth of its size."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, p in policy.named_parameters():
            if "visual" not in name:
                p.add_(0.1 * p.abs().mean() * torch.randn_like(p))


def ask_for(policy, prompts, server, group_size=3, seed=0, **options):
    """sample() with a few defaults; the options are fields of Sampling."""
    sampling = Sampling(**{"temperature": 1.2, "max_new_tokens": 10, **options})
    return sample(policy, prompts, group_size, sampling, seed=seed, server=server)


@torch.no_grad()
def gap(policy, prompts, completions, temperature=1.2):
    """Largest difference of the completions' log-probs from those of policy(...)."""
    policy.eval()
    size = len(completions) // len(prompts)
    batch = policy.collate([p for p in prompts for _ in range(size)],
                           [c.token_ids for c in completions])
    logp = policy(batch, temperature).logp  # [B, T]
    return max((logp[i, :len(c.logps)] - torch.tensor(c.logps)).abs().max().item()
               for i, c in enumerate(completions))


def count_groups(monkeypatch, at=None, do=None):
    """Counter of the groups that arrive, by question. Right after the `at`-th, do() is called."""
    seen, read = Counter(), rollout._read

    def counted(answer, policy, prompt, group_size):
        group = read(answer, policy, prompt, group_size)
        seen[prompt.question.id] += 1
        if seen.total() == at:
            do()
        return group

    monkeypatch.setattr(rollout, "_read", counted)
    return seen
