"""rollout.py against transformers' generate (greedy) and distributions recomputed from whole forwards (sampling)."""

import copy
import math

import pytest
import tiny
import torch

import rollout
from rollout import Completion, sample


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """A tiny Qwen3-Omni, its copy with eager attention, four prompts of different lengths."""
    policy = tiny.qwen3_omni(seed=1)
    questions = tiny.questions(tmp_path_factory.mktemp("clips"), seconds=((0.7,), (1.3, 0.4), (0.25,), (1.0,)))
    eager = copy.deepcopy(policy.base)
    eager.set_attn_implementation({"text_config": "eager"})
    return policy, eager, [policy.encode(q) for q in questions]


@pytest.fixture
def spoilt():
    """A policy of one's own, to rig."""
    return tiny.qwen3_omni(seed=1)


@pytest.fixture
def eos(setting, monkeypatch):
    """Sets the EOS ids of the shared policy for one test."""
    return lambda *ids: monkeypatch.setattr(setting[0], "eos_ids", list(ids))


def whole_logits(policy, eager, prompts, row, completion):
    """Logits [T, V] that predict a completion, from one forward of transformers over prompt + completion.

    The prompts go in together, as they did when sampling: a clip under a second is encoded by its neighbours' lengths.
    """
    batch = policy.collate(prompts, [completion if i == row else [] for i in range(len(prompts))])
    with torch.no_grad():
        logits = eager(input_ids=batch.input_ids, attention_mask=batch.attention_mask, **batch.audio).logits
    return logits[row, -len(completion) - 1:-1]


def kept(logits, ids_so_far, banned, temperature, top_k, top_p, penalty):
    """Log-probs [V] of the sampler's distribution for one row, option by option from their definitions."""
    scores = logits.tolist()
    for i in set(ids_so_far):
        scores[i] = scores[i] / penalty if scores[i] > 0 else scores[i] * penalty
    scores = [-math.inf if i in banned else s / temperature for i, s in enumerate(scores)]
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    if top_k:
        order = order[:top_k]
    weights = [math.exp(scores[i] - scores[order[0]]) for i in order]
    if top_p < 1:  # the fewest of the most likely tokens that reach top_p
        mass, reached = 0.0, 0
        while mass < top_p * sum(weights):
            mass, reached = mass + weights[reached], reached + 1
        order, weights = order[:reached], weights[:reached]
    result = [-math.inf] * len(scores)
    for i, w in zip(order, weights):
        result[i] = math.log(w / sum(weights)) if w else -math.inf
    return result


# ────────────────────────────────────────────────────────── greedy ────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", ["qwen3_omni", "qwen2_5_omni", "qwen2_audio"])
def test_greedy_is_generate(kind, tmp_path):
    """Token for token what transformers' generate writes for the left-padded batch, placeholders suppressed; all of a
    group alike."""
    policy = getattr(tiny, kind)(seed=1)
    prompts = [policy.encode(q) for q in tiny.questions(tmp_path)]
    eager = copy.deepcopy(policy.base)
    eager.set_attn_implementation({"text_config": "eager"})
    batch = policy.collate(prompts, [[]] * 3)
    ids, mask = batch.input_ids[:, :-1], batch.attention_mask[:, :-1]
    written = eager.generate(input_ids=ids, attention_mask=mask, **batch.audio, do_sample=False, max_new_tokens=12,
                             suppress_tokens=policy.placeholder_ids, eos_token_id=policy.eos_ids, pad_token_id=0)
    found = sample(policy, prompts, 3, temperature=0, max_new_tokens=12, seed=0)
    assert len(found) == 9
    for i, completion in enumerate(found):
        row = written[i // 3, ids.shape[1]:].tolist()
        assert completion.token_ids == row[:row.index(320) + 1 if 320 in row else None]
    assert len({tuple(c.token_ids) for c in found}) == 3


def test_a_prompt_alone_and_in_a_batch(setting, eos):
    """Greedy: each prompt alone, in groups beside others, and in chunks that cut the list, gives the same."""
    policy, _, prompts = setting
    prompts = [prompts[1], prompts[3]]  # clips of a second
    eos(-1)
    together = sample(policy, prompts, 2, temperature=0, max_new_tokens=10, seed=0)
    for i, prompt in enumerate(prompts):
        apart = sample(policy, [prompt], 1, temperature=0, max_new_tokens=10, seed=5)[0]
        for completion in together[2 * i:2 * i + 2]:
            assert completion.token_ids == apart.token_ids
            assert torch.allclose(torch.tensor(completion.logps), torch.tensor(apart.logps), atol=1e-5)


@pytest.mark.parametrize("at_once", [1, 4, 6])
def test_chunks(setting, eos, monkeypatch, at_once):
    """Prompts are decoded at most SEQUENCES completions at a time (one prompt at least), and come back in order."""
    policy, _, prompts = setting
    prompts = [prompts[i] for i in (1, 3, 1)]
    eos(-1)
    whole = sample(policy, prompts, 2, temperature=0, max_new_tokens=6, seed=0)
    batches, collate = [], policy.collate
    monkeypatch.setattr(rollout, "SEQUENCES", at_once)
    monkeypatch.setattr(policy, "collate", lambda p, c: batches.append(len(p)) or collate(p, c))
    parts = sample(policy, prompts, 2, temperature=0, max_new_tokens=6, seed=0)
    assert [c.token_ids for c in parts] == [c.token_ids for c in whole]
    assert batches == {1: [1, 1, 1], 4: [2, 1], 6: [3]}[at_once]


# ───────────────────────────────────────────────────── log-probs ──────────────────────────────────────────────────────


def test_logps_are_the_trainers(setting):
    """Nothing cut off: the sampler's log-probs are those of policy(...) but for the banned ids' share."""
    policy, eager, prompts = setting
    for temperature in (1.0, 1.2):
        completions = sample(policy, prompts, 2, temperature=temperature, max_new_tokens=8, seed=3)
        for group in (0, 1):  # the same prompts side by side as in the sampler
            part = completions[group::2]
            with torch.no_grad():
                batch = policy.collate(prompts, [c.token_ids for c in part])
                logp = policy(batch, temperature).logp
            for row, c in enumerate(part):
                logits = whole_logits(policy, eager, prompts, row, c.token_ids)
                banned = (logits / temperature).softmax(-1)[:, policy.placeholder_ids].sum(-1)
                ours = torch.tensor(c.logps) + (1 - banned).log()
                assert (ours - logp[row, :len(c.token_ids)]).abs().max() < 1e-5


def test_logps_equal_policy_without_bans(setting, monkeypatch):
    """With no banned ids they are equal outright."""
    policy, _, prompts = setting
    monkeypatch.setattr(policy, "placeholder_ids", [])
    completions = sample(policy, prompts, 1, temperature=1.2, max_new_tokens=8, seed=11)
    assert all(policy.audio_token_id not in c.token_ids for c in completions)  # of this seed
    with torch.no_grad():
        logp = policy(policy.collate(prompts, [c.token_ids for c in completions]), 1.2).logp
    for row, c in enumerate(completions):
        assert (torch.tensor(c.logps) - logp[row, :len(c.logps)]).abs().max() < 1e-5


@pytest.mark.parametrize("options", [
    dict(temperature=0.7), dict(temperature=1.2, top_k=50, top_p=0.99), dict(temperature=1.2, top_k=5),
    dict(temperature=0.7, top_p=0.8), dict(temperature=1.0, top_k=3, top_p=0.6),
    dict(temperature=1.2, top_k=20, top_p=0.9, repetition_penalty=1.5)], ids=str)
def test_logps_after_options(setting, eos, options):
    """Sampled tokens lie in the cut distribution and carry its log-probs, each row under its own prompt."""
    policy, eager, prompts = setting
    eos(-1)
    prompts, group = [prompts[1], prompts[3]], 3
    # Left padding is token 0 and would count as said; with one prompt length, there is none.
    prompts = [prompts[0]] * 2 if "repetition_penalty" in options else prompts
    wanted = {"top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0, **options}
    completions = sample(policy, prompts, group, **options, max_new_tokens=7, seed=2)
    assert len(completions) == 6 and len({tuple(c.token_ids) for c in completions}) > 2
    for i, c in enumerate(completions):
        prompt = prompts[i // group]
        logits = whole_logits(policy, eager, [prompt], 0, c.token_ids)
        for t, token in enumerate(c.token_ids):
            expected = kept(logits[t], prompt.ids + c.token_ids[:t], policy.placeholder_ids, wanted["temperature"],
                            wanted["top_k"], wanted["top_p"], wanted["repetition_penalty"])
            assert abs(expected[token] - c.logps[t]) < 2e-5


def test_repetition_penalty_does_not_see_padding(setting, eos):
    """A prompt's completions under a repetition penalty do not depend on how far it is padded."""
    policy, eager, prompts = setting
    eos(-1)
    prompts = [prompts[3], prompts[1]]
    assert len(prompts[0].ids) < len(prompts[1].ids) and 0 not in prompts[0].ids
    c = sample(policy, prompts, 1, temperature=1.0, repetition_penalty=1.5, max_new_tokens=1, seed=2)[0]
    logits = whole_logits(policy, eager, prompts, 0, c.token_ids)
    expected = kept(logits[0], prompts[0].ids, policy.placeholder_ids, 1.0, 0, 1.0, penalty=1.5)
    assert abs(expected[c.token_ids[0]] - c.logps[0]) < 2e-5


def test_greedy_logps(setting, eos):
    """Greedy log-probs are of the whole distribution at temperature 1, banned ids taken out."""
    policy, eager, prompts = setting
    eos(-1)
    c = sample(policy, prompts[1:2], 1, temperature=0, max_new_tokens=5, seed=0)[0]
    logits = whole_logits(policy, eager, prompts[1:2], 0, c.token_ids)
    for t, token in enumerate(c.token_ids):
        assert abs(kept(logits[t], [], policy.placeholder_ids, 1.0, 0, 1.0, 1.0)[token] - c.logps[t]) < 1e-5


# ──────────────────────────────────────────────────── ids and lengths ─────────────────────────────────────────────────


class Rigged(torch.nn.Module):
    """An lm_head whose logits are `bias` whatever the state, plus `inner`'s where there is one."""

    def __init__(self, bias, inner=None):
        super().__init__()
        self.bias, self.inner = bias, inner

    def forward(self, hidden):
        logits = self.bias.expand(*hidden.shape[:-1], -1)
        return logits if self.inner is None else logits + self.inner(hidden)


def rig(policy, biases, keep=True):
    """Adds logits for some ids; keep=False leaves those alone possible."""
    vocabulary = policy.base.config.get_text_config().vocab_size
    bias = torch.full((vocabulary,), 0.0 if keep else -math.inf)
    for i, value in biases.items():
        bias[i] = value
    policy.base.lm_head = Rigged(bias, policy.base.lm_head if keep else None)


@pytest.mark.parametrize("options", [dict(temperature=0), dict(temperature=1.2),
                                     dict(temperature=1.0, top_k=2, top_p=0.9)], ids=str)
def test_placeholders_are_never_sampled(spoilt, setting, options):
    """Not even by an lm_head that wants nothing else; log-probs stay finite."""
    assert len(spoilt.placeholder_ids) == 3
    rig(spoilt, {i: 1e4 for i in spoilt.placeholder_ids})
    completions = sample(spoilt, setting[2], 4, **options, max_new_tokens=6, seed=0)
    assert not {i for c in completions for i in c.token_ids} & set(spoilt.placeholder_ids)
    assert all(math.isfinite(x) for c in completions for x in c.logps)


def test_eos_ends_with_stop(spoilt, setting):
    """EOS is kept, as the last token, with its log-prob; each of several EOS ids will do."""
    rig(spoilt, {320: 1e4})
    for c in sample(spoilt, setting[2], 2, temperature=1.0, max_new_tokens=6, seed=0):
        assert c == Completion([320], [0.0], "stop")
    spoilt.eos_ids = [7, 320]
    rig(spoilt, {7: 0.0, 9: 0.0, 320: 0.0}, keep=False)
    completions = sample(spoilt, setting[2], 8, temperature=1.0, max_new_tokens=40, seed=0)
    assert {c.token_ids[-1] for c in completions} == {7, 320} and {c.finish_reason for c in completions} == {"stop"}
    for c in completions:
        assert set(c.token_ids[:-1]) <= {9} and len(c.logps) == len(c.token_ids)
        assert all(abs(x + math.log(3)) < 1e-5 for x in c.logps)
    assert len({len(c.token_ids) for c in completions}) > 3


def test_max_new_tokens_ends_with_length(spoilt, setting):
    """Without EOS: exactly max_new_tokens tokens and "length"; an EOS at the last place is a "stop"."""
    rig(spoilt, {320: -1e4})
    for n in (1, 5):
        for c in sample(spoilt, setting[2][:2], 2, temperature=1.0, max_new_tokens=n, seed=0):
            assert len(c.token_ids) == len(c.logps) == n and c.finish_reason == "length"
    rig(spoilt, {320: 1e5})
    assert sample(spoilt, setting[2][:1], 1, temperature=1.0, max_new_tokens=1, seed=0)[0].finish_reason == "stop"


def test_finished_rows_leave_without_a_trace(setting, eos, monkeypatch):
    """Rows that end at different times, against a run in which nothing ends: up to their EOS the completions are equal.

    EOS is a token that greedy decoding writes early in some rows and not in others. The batch shrinks as they leave.
    """
    policy, _, prompts = setting
    eos(-1)
    endless = sample(policy, prompts, 2, temperature=0, max_new_tokens=16, seed=0)
    assert all(c.finish_reason == "length" and len(c.token_ids) == 16 for c in endless)
    end = {tuple(c.token_ids) for c in endless}
    ends = [endless[0].token_ids[3], endless[4].token_ids[7]]
    expected = [min((c.token_ids.index(e) + 1 for e in ends if e in c.token_ids), default=16) for c in endless]
    assert len(end) == 4 and len(set(expected)) >= 3 and 16 in expected  # the case is as described
    eos(*ends)
    sizes = []
    hook = policy.base.model.language_model.register_forward_hook(
        lambda module, arguments, output: sizes.append(len(output.last_hidden_state)))
    found = sample(policy, prompts, 2, temperature=0, max_new_tokens=16, seed=0)
    hook.remove()
    for c, whole, n in zip(found, endless, expected):
        assert c.token_ids == whole.token_ids[:n]
        assert torch.allclose(torch.tensor(c.logps), torch.tensor(whole.logps[:n]), atol=1e-5)
        assert c.finish_reason == ("length" if n == 16 and c.token_ids[-1] not in ends else "stop")
    assert sizes == [4] + [sum(n > t for n in expected) for t in range(1, 16)]


def test_logps_of_rows_that_outlive_others(setting, eos):
    """Sampled: rows that go on after others have left carry the log-probs of their own prompts and tokens."""
    policy, eager, prompts = setting
    eos(*range(0, 320, 6))  # a sixth of all tokens
    prompts = [prompts[1], prompts[3]]
    completions = sample(policy, prompts, 6, temperature=1.0, max_new_tokens=12, seed=4)
    assert len({len(c.token_ids) for c in completions}) > 3
    for i, c in enumerate(completions):
        logits = whole_logits(policy, eager, [prompts[i // 6]], 0, c.token_ids)
        logits[:, policy.placeholder_ids] = -math.inf
        expected = logits.log_softmax(-1)[range(len(c.token_ids)), c.token_ids]
        assert (expected - torch.tensor(c.logps)).abs().max() < 1e-5
        assert all(t % 6 or t >= 320 for t in c.token_ids[:-1])


# ──────────────────────────────────────────────────────── chance ──────────────────────────────────────────────────────


def test_seeds(setting):
    """A seed gives its completions again, whatever torch's own generator did; another seed gives others."""
    policy, _, prompts = setting
    torch.manual_seed(0)
    first = sample(policy, prompts, 2, temperature=1.2, max_new_tokens=6, seed=7)
    torch.manual_seed(1)
    assert sample(policy, prompts, 2, temperature=1.2, max_new_tokens=6, seed=7) == first
    assert sample(policy, prompts, 2, temperature=1.2, max_new_tokens=6, seed=8) != first
    assert first[0].token_ids != first[1].token_ids  # the samples of a group differ


@pytest.mark.parametrize("options", [dict(temperature=1.0), dict(temperature=0.5), dict(temperature=2.0, top_k=4),
                                     dict(temperature=1.0, top_p=0.7)], ids=str)
def test_frequencies(spoilt, setting, options):
    """8192 draws from five logits: counts within a χ² that chance exceeds once in 10,000 runs."""
    logits = {10: 1.5, 11: 1.0, 12: 0.2, 13: -0.5, 14: -1.0}
    rig(spoilt, logits, keep=False)
    completions = sample(spoilt, setting[2][2:4], 512, **options, max_new_tokens=8, seed=0)
    draws = [t for c in completions for t in c.token_ids]
    row = torch.full((332,), -math.inf)
    for i, value in logits.items():
        row[i] = value
    log_probs = kept(row, [], [], options["temperature"], options.get("top_k", 0), options.get("top_p", 1.0), 1.0)
    expected = {i: math.exp(log_probs[i]) * len(draws) for i in logits if log_probs[i] > -math.inf}
    assert len(expected) == {"top_k": 4, "top_p": 2}.get(list(options)[-1], 5)
    assert len(draws) == 8192 and set(draws) == set(expected)
    chi2 = sum((draws.count(i) - n) ** 2 / n for i, n in expected.items())
    assert chi2 < {1: 15.1, 3: 21.1, 4: 23.5}[len(expected) - 1]
    for c in completions[:50]:
        assert all(abs(log_probs[t] - x) < 1e-5 for t, x in zip(c.token_ids, c.logps))


def test_no_gradient(setting):
    """Sampling leaves gradients off inside and on after."""
    policy, _, prompts = setting
    sample(policy, prompts[:1], 1, temperature=1.0, max_new_tokens=2, seed=0)
    assert torch.is_grad_enabled() and all(p.grad is None for p in policy.parameters())
