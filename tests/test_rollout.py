"""rollout.py, against transformers' generate (greedy decoding) and, for sampling, against
distributions that are computed again from forwards over whole completions."""

import copy
import math

import pytest
import tiny
import torch

import rollout
from rollout import Completion, Sampling


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """A tiny Qwen3-Omni, its copy with eager attention, and four prompts of different lengths."""
    policy = tiny.qwen3_omni(seed=1)
    questions = tiny.questions(tmp_path_factory.mktemp("clips"),
                               seconds=((0.7,), (1.3, 0.4), (0.25,), (1.0,)))
    eager = copy.deepcopy(policy.base)
    eager.set_attn_implementation({"text_config": "eager"})
    return policy, eager, [policy.encode(q) for q in questions]


@pytest.fixture
def long_clips(setting):
    """The prompts with clips of a second and more, whose encoding does not depend on the batch."""
    prompts = setting[2]
    return [prompts[1], prompts[3]]


@pytest.fixture
def own_policy():
    """A policy that a test may change."""
    return tiny.qwen3_omni(seed=1)


@pytest.fixture
def set_eos(setting, monkeypatch):
    """set_eos(*ids) sets the EOS ids of the shared policy for one test; none: nothing ends."""
    return lambda *ids: monkeypatch.setattr(setting[0], "eos_ids", list(ids))


def sample(policy, prompts, group_size, seed=0, **fields):
    return rollout.sample(policy, prompts, group_size, Sampling(**fields), seed=seed)


def whole_logits(policy, eager, prompts, row, completion):
    """Logits [T, V] that predict a completion, from one forward of transformers over all of it.

    All prompts go in together, as in sampling: the encoding of a clip under a second depends on the
    lengths of its neighbours.
    """
    batch = policy.collate(prompts, [completion if i == row else [] for i in range(len(prompts))])
    with torch.no_grad():
        logits = eager(input_ids=batch.input_ids, attention_mask=batch.attention_mask,
                       **batch.audio).logits
    return logits[row, -len(completion) - 1:-1]


def log_probs_of(logits, *, ids_so_far=(), banned=(), temperature=1.0, top_k=0, top_p=1.0,
                 repetition_penalty=1.0):
    """Log-probs [V] of the sampler for one row, option by option, from the options' definitions."""
    scores = logits.tolist()
    for i in set(ids_so_far):
        positive = scores[i] > 0
        scores[i] = scores[i] / repetition_penalty if positive else scores[i] * repetition_penalty
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
    for i, weight in zip(order, weights):
        result[i] = math.log(weight / sum(weights)) if weight else -math.inf
    return result


# ──────── greedy ────────


@pytest.mark.parametrize("kind", ["qwen3_omni", "qwen2_5_omni", "qwen2_audio", "audioflamingo3",
                                  "voxtral", "glm_asr"])
def test_greedy_equals_generate(kind, tmp_path):
    """Token by token what transformers' generate writes for the left-padded batch, with the
    placeholders suppressed. All completions of a group are equal."""
    policy = getattr(tiny, kind)(seed=1)
    prompts = [policy.encode(q) for q in tiny.questions(tmp_path)]
    eager = copy.deepcopy(policy.base)
    eager.set_attn_implementation({"text_config": "eager"})
    batch = policy.collate(prompts, [[]] * 3)
    ids, mask = batch.input_ids[:, :-1], batch.attention_mask[:, :-1]
    written = eager.generate(input_ids=ids, attention_mask=mask, **batch.audio, do_sample=False,
                             max_new_tokens=12, suppress_tokens=policy.placeholder_ids,
                             eos_token_id=policy.eos_ids, pad_token_id=0)
    found = sample(policy, prompts, 3, temperature=0, max_new_tokens=12)
    assert len(found) == 9
    (eos,) = policy.eos_ids
    for i, completion in enumerate(found):
        row = written[i // 3, ids.shape[1]:].tolist()
        assert completion.token_ids == row[:row.index(eos) + 1 if eos in row else None]
    assert len({tuple(c.token_ids) for c in found}) == 3


def test_a_prompt_alone_and_in_a_batch(setting, long_clips, set_eos):
    """Greedy: a prompt's completions do not depend on the prompts and groups beside it."""
    policy, _, _ = setting
    set_eos()
    together = sample(policy, long_clips, 2, temperature=0, max_new_tokens=10)
    for i, prompt in enumerate(long_clips):
        (apart,) = sample(policy, [prompt], 1, seed=5, temperature=0, max_new_tokens=10)
        for completion in together[2 * i:2 * i + 2]:
            assert completion.token_ids == apart.token_ids
            assert completion.logps == pytest.approx(apart.logps, abs=1e-5)


@pytest.mark.parametrize("at_once, chunks", [(1, [1, 1, 1]), (4, [2, 1]), (6, [3])])
def test_chunks(setting, long_clips, set_eos, monkeypatch, at_once, chunks):
    """At most SEQUENCES completions are decoded at the same time, but at least one prompt's.

    The completions stay in the order of the prompts.
    """
    policy, _, _ = setting
    prompts = [*long_clips, long_clips[0]]
    set_eos()
    whole = sample(policy, prompts, 2, temperature=0, max_new_tokens=6)
    batches, collate = [], policy.collate
    monkeypatch.setattr(rollout, "SEQUENCES", at_once)
    monkeypatch.setattr(policy, "collate", lambda p, c: batches.append(len(p)) or collate(p, c))
    parts = sample(policy, prompts, 2, temperature=0, max_new_tokens=6)
    assert [c.token_ids for c in parts] == [c.token_ids for c in whole]
    assert batches == chunks


# ──────── log-probs ────────


@pytest.mark.parametrize("temperature", [1.0, 1.2])
def test_log_probs_are_the_trainers(setting, temperature):
    """With the whole distribution they are those of policy(...), but for the banned ids' share."""
    policy, eager, prompts = setting
    completions = sample(policy, prompts, 2, seed=3, temperature=temperature, max_new_tokens=8)
    for first in (0, 1):  # one completion per prompt: the same neighbours as in the sampler
        part = completions[first::2]
        with torch.no_grad():
            logp = policy(policy.collate(prompts, [c.token_ids for c in part]), temperature).logp
        for row, c in enumerate(part):
            logits = whole_logits(policy, eager, prompts, row, c.token_ids)
            banned = (logits / temperature).softmax(-1)[:, policy.placeholder_ids].sum(-1)
            ours = torch.tensor(c.logps) + (1 - banned).log()
            assert (ours - logp[row, :len(c.token_ids)]).abs().max() < 1e-5


@pytest.mark.parametrize("options", [
    dict(temperature=0.7), dict(temperature=1.2, top_k=50, top_p=0.99),
    dict(temperature=1.2, top_k=5), dict(temperature=0.7, top_p=0.8),
    dict(temperature=1.0, top_k=3, top_p=0.6),
    dict(temperature=1.2, top_k=20, top_p=0.9, repetition_penalty=1.5)], ids=str)
def test_log_probs_after_options(setting, long_clips, set_eos, options):
    """Sampled tokens are in the cut distribution of their own prompt, and have its log-probs."""
    policy, eager, _ = setting
    set_eos()
    completions = sample(policy, long_clips, 3, seed=2, **options, max_new_tokens=7)
    assert len(completions) == 6 and len({tuple(c.token_ids) for c in completions}) > 2
    for i, c in enumerate(completions):
        prompt = long_clips[i // 3]
        logits = whole_logits(policy, eager, [prompt], 0, c.token_ids)
        for t, token in enumerate(c.token_ids):
            expected = log_probs_of(logits[t], ids_so_far=prompt.ids + c.token_ids[:t],
                                    banned=policy.placeholder_ids, **options)
            assert abs(expected[token] - c.logps[t]) < 2e-5


def test_repetition_penalty_ignores_padding(own_policy, long_clips):
    """Padding is token 0, which the shorter prompt does not contain: it is not penalised.

    Token 0 is a likely one here, so that penalising it would change every log-prob.
    """
    prefer(own_policy, {0: 8.0})
    eager = copy.deepcopy(own_policy.base)
    eager.set_attn_implementation({"text_config": "eager"})
    short, long = sorted(long_clips, key=lambda prompt: len(prompt.ids))
    assert len(short.ids) < len(long.ids) and 0 not in short.ids
    options = dict(temperature=1.0, repetition_penalty=1.5)
    c = sample(own_policy, [short, long], 1, seed=2, **options, max_new_tokens=1)[0]
    logits = whole_logits(own_policy, eager, [short, long], 0, c.token_ids)
    logits[0, 0] += 8.0
    expected = log_probs_of(logits[0], ids_so_far=short.ids, banned=own_policy.placeholder_ids,
                            **options)
    assert math.exp(expected[0]) > 0.1  # the case is as described
    assert abs(expected[c.token_ids[0]] - c.logps[0]) < 2e-5


def test_greedy_log_probs(setting, long_clips, set_eos):
    """They are those of the whole distribution at temperature 1, without the banned ids."""
    policy, eager, _ = setting
    set_eos()
    (c,) = sample(policy, long_clips[:1], 1, temperature=0, max_new_tokens=5)
    logits = whole_logits(policy, eager, long_clips[:1], 0, c.token_ids)
    for t, token in enumerate(c.token_ids):
        expected = log_probs_of(logits[t], banned=policy.placeholder_ids)
        assert abs(expected[token] - c.logps[t]) < 1e-5


# ──────── ids and lengths ────────


def prefer(policy, biases):
    """Adds something to the logits of some ids."""
    bias = torch.zeros(policy.base.config.get_text_config().vocab_size)
    for i, value in biases.items():
        bias[i] = value
    policy.logits = lambda hidden: bias + policy.base.lm_head(hidden)


def allow_only(policy, logits):
    """Gives some ids these logits in every state, and makes all other ids impossible."""
    bias = torch.full((policy.base.config.get_text_config().vocab_size,), -math.inf)
    for i, value in logits.items():
        bias[i] = value
    policy.logits = lambda hidden: bias.expand(len(hidden), -1)


@pytest.mark.parametrize("options", [
    dict(temperature=0), dict(temperature=1.2), dict(temperature=1.0, top_k=2, top_p=0.9)], ids=str)
def test_placeholders_are_never_sampled(own_policy, setting, options):
    """Not even by a policy that prefers them to everything else; log-probs stay finite."""
    placeholders = set(own_policy.placeholder_ids)
    assert len(placeholders) == 3
    prefer(own_policy, {i: 1e4 for i in placeholders})
    completions = sample(own_policy, setting[2], 4, **options, max_new_tokens=6)
    assert not {i for c in completions for i in c.token_ids} & placeholders
    assert all(math.isfinite(x) for c in completions for x in c.logps)


def test_eos_is_kept_as_the_last_token(own_policy, setting):
    (eos,) = own_policy.eos_ids
    prefer(own_policy, {eos: 1e4})
    for c in sample(own_policy, setting[2], 2, temperature=1.0, max_new_tokens=6):
        assert c == Completion([eos], [0.0], "stop")


def test_each_of_several_eos_ids_ends_a_completion(own_policy, setting):
    """Three tokens are equally likely, and two of them are EOS: every log-prob is −log 3."""
    other, eos = 9, [7, *own_policy.eos_ids]
    own_policy.eos_ids = eos
    allow_only(own_policy, {i: 0.0 for i in (other, *eos)})
    completions = sample(own_policy, setting[2], 8, temperature=1.0, max_new_tokens=40)
    assert {c.token_ids[-1] for c in completions} == set(eos)
    assert {c.finish_reason for c in completions} == {"stop"}
    for c in completions:
        assert set(c.token_ids[:-1]) <= {other} and len(c.logps) == len(c.token_ids)
        assert c.logps == pytest.approx([-math.log(3)] * len(c.logps), abs=1e-5)
    assert len({len(c.token_ids) for c in completions}) > 3


def test_max_new_tokens_ends_with_length(own_policy, setting):
    """Without EOS there are exactly max_new_tokens tokens; an EOS as the last of them is a stop."""
    (eos,) = own_policy.eos_ids
    prefer(own_policy, {eos: -1e4})
    for n in (1, 5):
        for c in sample(own_policy, setting[2][:2], 2, temperature=1.0, max_new_tokens=n):
            assert len(c.token_ids) == len(c.logps) == n and c.finish_reason == "length"
    allow_only(own_policy, {eos: 0.0})
    (c,) = sample(own_policy, setting[2][:1], 1, temperature=1.0, max_new_tokens=1)
    assert c.finish_reason == "stop"


def test_finished_rows_do_not_disturb_others(setting, set_eos):
    """Rows end at different times: up to their EOS they equal those of a run that never ends.

    EOS ids are tokens that greedy decoding writes early in some rows and never in others. The batch
    shrinks as rows end.
    """
    policy, _, prompts = setting
    set_eos()
    greedy = dict(temperature=0, max_new_tokens=16)
    endless = sample(policy, prompts, 2, **greedy)
    assert all(c.finish_reason == "length" and len(c.token_ids) == 16 for c in endless)
    eos = [endless[0].token_ids[3], endless[4].token_ids[7]]
    lengths = [min((c.token_ids.index(e) + 1 for e in eos if e in c.token_ids), default=16)
               for c in endless]
    assert len({tuple(c.token_ids) for c in endless}) == 4  # the case is as described
    assert len(set(lengths)) >= 3 and 16 in lengths
    set_eos(*eos)
    sizes = []
    hook = policy.base.model.language_model.register_forward_hook(
        lambda module, arguments, output: sizes.append(len(output.last_hidden_state)))
    found = sample(policy, prompts, 2, **greedy)
    hook.remove()
    for c, whole, n in zip(found, endless, lengths, strict=True):
        assert c.token_ids == whole.token_ids[:n]
        assert c.logps == pytest.approx(whole.logps[:n], abs=1e-5)
        assert c.finish_reason == ("stop" if c.token_ids[-1] in eos else "length")
    assert sizes == [len(prompts)] + [sum(n > t for n in lengths) for t in range(1, 16)]


def test_log_probs_of_rows_that_outlive_others(setting, long_clips, set_eos):
    """Rows that continue after others have ended keep their own prompts and tokens."""
    policy, eager, _ = setting
    eos = set(range(0, min(policy.eos_ids), 6))  # a sixth of all tokens
    set_eos(*eos)
    completions = sample(policy, long_clips, 6, seed=4, temperature=1.0, max_new_tokens=12)
    assert len({len(c.token_ids) for c in completions}) > 3
    for i, c in enumerate(completions):
        logits = whole_logits(policy, eager, [long_clips[i // 6]], 0, c.token_ids)
        logits[:, policy.placeholder_ids] = -math.inf
        expected = logits.log_softmax(-1)[range(len(c.token_ids)), c.token_ids]
        assert (expected - torch.tensor(c.logps)).abs().max() < 1e-5
        assert not eos & set(c.token_ids[:-1])


# ──────── chance ────────


def test_seeds(setting):
    """A seed fixes the completions, whatever torch's own generator does; another seed gives others.

    The completions of a group differ.
    """
    policy, _, prompts = setting
    options = dict(temperature=1.2, max_new_tokens=6)
    torch.manual_seed(0)
    first = sample(policy, prompts, 2, seed=7, **options)
    torch.manual_seed(1)
    assert sample(policy, prompts, 2, seed=7, **options) == first
    assert sample(policy, prompts, 2, seed=8, **options) != first
    assert first[0].token_ids != first[1].token_ids


@pytest.mark.parametrize("options, possible, limit", [
    (dict(temperature=1.0), 5, 23.5), (dict(temperature=0.5), 5, 23.5),
    (dict(temperature=2.0, top_k=4), 4, 21.1), (dict(temperature=1.0, top_p=0.7), 2, 15.1)],
    ids=str)
def test_frequencies(own_policy, setting, options, possible, limit):
    """8192 draws from five logits, of which `possible` can be drawn.

    limit: the value of χ² that chance exceeds once in 10,000 runs.
    """
    logits = {10: 1.5, 11: 1.0, 12: 0.2, 13: -0.5, 14: -1.0}
    allow_only(own_policy, logits)
    completions = sample(own_policy, setting[2][2:4], 512, **options, max_new_tokens=8)
    draws = [t for c in completions for t in c.token_ids]
    log_probs = log_probs_of(own_policy.logits(torch.zeros(1))[0], **options)
    expected = {i: math.exp(log_probs[i]) * len(draws) for i in logits if log_probs[i] > -math.inf}
    assert len(draws) == 8192 and set(draws) == set(expected) and len(expected) == possible
    chi_square = sum((draws.count(i) - n) ** 2 / n for i, n in expected.items())
    assert chi_square < limit
    for c in completions[:50]:
        assert c.logps == pytest.approx([log_probs[t] for t in c.token_ids], abs=1e-5)


def test_no_gradient(setting):
    """Sampling computes no gradients, and leaves them switched on."""
    policy, _, prompts = setting
    sample(policy, prompts[:1], 1, temperature=1.0, max_new_tokens=2)
    assert torch.is_grad_enabled() and all(p.grad is None for p in policy.parameters())
