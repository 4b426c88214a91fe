"""mapo.py against the paper (arXiv 2605.27741): loops, closed forms, properties.

The references below are plain Python: lists, floats and `math`, one scalar at a time, written from
the equations. They work on ragged lists and never see padding. The tensors that mapo.py gets are
those lists, padded with poison (NaN, ±inf, ±1e4). So a result that equals the loop shows the
equation and the masking at once.
"""

import dataclasses
import itertools
import math
import random
from types import SimpleNamespace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import mapo
from mapo import MapoConfig

NAN, INF = float("nan"), float("inf")
POISON = [NAN, INF, -INF, 1e4, -1e4, (NAN, 1e4, -INF, 3.0, INF, -1e4)]  # a tuple is used in turn
LOSSES = ("loss", "policy_loss", "kl_loss", "attention_loss")
PER_TOKEN = ("logp", "old_logp", "ref_logp", "policy_entropy", "text_ref_entropy", "audio_mass",
             "pos_gate", "sampler_logp")
PER_COMPLETION = ("advantages", "accuracy_reward")

CONFIGS = [
    MapoConfig(),
    MapoConfig(tau_base=0.5, mask_clip=1.5, kappa=2.0, clip_ratio=0.1, prefactor_clip=0.6,
               fail_threshold=0.5, fail_gate_floor=0.3, attention_eps=0.02, eta=0.7, beta=0.3,
               advantage_floor=0.4, importance_clip=1.3),
    MapoConfig(tau_base=2.0, mask_clip=1.05, kappa=0.0, fail_gate_floor=0.0, eta=2.0, beta=0.0),
]

prop = settings(max_examples=40, deadline=None)
every_poison = pytest.mark.parametrize("poison", POISON, ids=str)
every_config = pytest.mark.parametrize("config", CONFIGS, ids=["table5", "other", "flat"])


# ──────────────────────────────────── data, ragged and padded ─────────────────────────────────────


def make_rows(lengths, seed, spread=3.0):
    """One completion per length: lists of floats without padding. Entropies are in [0, spread]."""
    rng = random.Random(seed)
    rows = []
    for length in lengths:
        logp = [-rng.uniform(0.01, 3) for _ in range(length)]
        rows.append(SimpleNamespace(
            logp=logp,
            old_logp=[x + rng.uniform(-0.5, 0.5) for x in logp],  # ρ in [0.6, 1.65]
            ref_logp=[x + rng.uniform(-1, 1) for x in logp],
            policy_entropy=[rng.uniform(0, spread) for _ in range(length)],
            text_ref_entropy=[rng.uniform(0, spread) for _ in range(length)],
            audio_mass=[rng.random() for _ in range(length)],
            pos_gate=[float(rng.random() < 0.6) for _ in range(length)],
            advantages=rng.gauss(0, 1.5),
            accuracy_reward=rng.choice([0.0, 0.5, 1.0])))
        other = random.Random(f"{seed} {length}")
        rows[-1].sampler_logp = [x + other.uniform(-1, 1) for x in rows[-1].old_logp]
    return rows


# The completions of standard_rows, by what is special about each
LARGE_ADVANTAGE, ONE_GATED, EMPTY, NO_GATED, NO_ADVANTAGE, SHARP, HALF_RIGHT, ONE_UNGATED = range(8)


def standard_rows():
    """Eight completions; EMPTY is one that mask_truncated took out, SHARP has one large Δh."""
    rows = make_rows([9, 1, 0, 6, 3, 12, 4, 1], seed=7)
    rows[LARGE_ADVANTAGE].advantages, rows[LARGE_ADVANTAGE].accuracy_reward = -6.0, 0.0
    rows[ONE_GATED].pos_gate, rows[ONE_UNGATED].pos_gate = [1.0], [0.0]
    rows[NO_GATED].pos_gate = [0.0] * 6
    rows[NO_ADVANTAGE].advantages = 0.0
    rows[SHARP].text_ref_entropy[4], rows[SHARP].policy_entropy[4] = 9.0, 0.5
    rows[SHARP].accuracy_reward, rows[HALF_RIGHT].accuracy_reward = 1.0, 0.5
    return rows


def pad(lists, fill, width, dtype=torch.float64):
    """[B, width]: each list, then the fill (a number, or several used in turn)."""
    filler = itertools.cycle(fill if isinstance(fill, tuple) else (fill,))
    padded = [list(x) + [next(filler) for _ in range(width - len(x))] for x in lists]
    return torch.tensor(padded, dtype=dtype)


def tensors(rows, poison=0.0, extra=0, dtype=torch.float64):
    """The rows as tensors, poison where the mask is False, `extra` columns of padding more."""
    width = max(len(row.logp) for row in rows) + extra
    t = {name: pad([getattr(row, name) for row in rows], poison, width, dtype)
         for name in PER_TOKEN}
    t |= {name: torch.tensor([getattr(row, name) for row in rows], dtype=dtype)
          for name in PER_COMPLETION}
    t["mask"] = torch.tensor([[column < len(row.logp) for column in range(width)] for row in rows],
                             dtype=torch.bool)
    return SimpleNamespace(**t)


def part_of(t, which):
    """Some of the completions: `which` indexes the batch."""
    return SimpleNamespace(**{name: value[which] for name, value in vars(t).items()})


def delta_h_of(t):
    return t.text_ref_entropy - t.policy_entropy


def total(t, config, **replaced):
    """mapo_loss on the tensors of t, some of them replaced."""
    inputs = vars(t) | {"delta_h": delta_h_of(t)} | replaced
    del inputs["text_ref_entropy"], inputs["policy_entropy"]
    return mapo.mapo_loss(**inputs, config=config)


def attention_settings(config):
    return dict(tau_base=config.tau_base, mask_clip=config.mask_clip, kappa=config.kappa,
                eps=config.attention_eps, fail_threshold=config.fail_threshold,
                fail_gate_floor=config.fail_gate_floor, prefactor_clip=config.prefactor_clip)


def attention(t, config, **replaced):
    """attention_loss on the tensors of t, some of them replaced."""
    values = vars(t) | {"delta_h": delta_h_of(t)} | replaced
    names = ("audio_mass", "delta_h", "pos_gate", "advantages", "accuracy_reward", "mask")
    return mapo.attention_loss(*(values[name] for name in names), **attention_settings(config))


def omega_of(t, config):
    return mapo.relevance_mask(delta_h_of(t), t.mask, config.tau_base, config.mask_clip)


def nu_of(t, config):
    return mapo.inverse_relevance_weight(delta_h_of(t), t.pos_gate, t.mask, config.tau_base,
                                         config.mask_clip)


def assert_close(actual, expected, tol=1e-10):
    """A tensor against (nested) lists of floats, to `tol`, absolute and relative."""
    expected = torch.tensor(expected, dtype=torch.float64)
    assert actual.shape == expected.shape, f"{tuple(actual.shape)} is not {tuple(expected.shape)}"
    torch.testing.assert_close(actual.detach().double(), expected, rtol=tol, atol=tol)


def assert_rows(actual, lists, off_mask=0.0):
    """A [B, T] tensor against ragged lists, exactly `off_mask` (None: anything) after each end."""
    for row, expected in zip(actual, lists, strict=True):
        assert_close(row[:len(expected)], expected)
        if off_mask is not None:
            assert all(x == off_mask for x in row[len(expected):].tolist())


# ────────────────────────────── the paper again, one scalar at a time ─────────────────────────────


def loop_advantages(rewards, group_size, eps):
    out = []
    for first in range(0, len(rewards), group_size):
        group = [rewards[first + i] for i in range(group_size)]
        mean = sum(group) / group_size
        variance = sum((r - mean) ** 2 for r in group) / (group_size - 1)
        for r in group:
            out.append((r - mean) / (math.sqrt(variance) + eps))
    return out


def loop_softmax(logits):
    exponentials = [math.exp(z) for z in logits]
    return [x / sum(exponentials) for x in exponentials]


def loop_delta_h(row):
    return [h_text - h_policy for h_text, h_policy in zip(row.text_ref_entropy, row.policy_entropy)]


def loop_tau(length, tau_base):
    return tau_base * math.log(length if length > 2 else 2)


def loop_omega(delta_h, tau_base, cap):
    length = len(delta_h)
    tau = loop_tau(length, tau_base)
    denominator = 0.0
    for d in delta_h:
        denominator += math.exp(abs(d) / tau)
    out = []
    for d in delta_h:
        weight = length * math.exp(abs(d) / tau) / denominator
        out.append(weight if weight < cap else cap)
    return out


def loop_nu(delta_h, gate, tau_base, cap):
    tau = loop_tau(len(delta_h), tau_base)  # the whole length, not T_pos
    t_pos, denominator = 0, 0.0
    for d, g in zip(delta_h, gate):
        if g:
            t_pos += 1
            denominator += math.exp(-abs(d) / tau)
    out = []
    for d, g in zip(delta_h, gate):
        weight = t_pos * math.exp(-abs(d) / tau) / denominator if g else 0.0
        out.append(weight if weight < cap else cap)
    return out


def loop_omegas(rows, config):
    return [loop_omega(loop_delta_h(row), config.tau_base, config.mask_clip) for row in rows]


def loop_nus(rows, config):
    return [loop_nu(loop_delta_h(row), row.pos_gate, config.tau_base, config.mask_clip)
            for row in rows]


def loop_surrogate(logp, old_logp, advantage, clip_ratio):
    rho = math.exp(logp) / math.exp(old_logp)
    clipped = min(max(rho, 1 - clip_ratio), 1 + clip_ratio)
    return -min(rho * advantage, clipped * advantage)


def loop_surrogates(row, clip_ratio):
    return [loop_surrogate(x, old, row.advantages, clip_ratio)
            for x, old in zip(row.logp, row.old_logp)]


def loop_importance(row, cap):
    """min(π_old/μ, C), from probabilities."""
    return [min(math.exp(old) / math.exp(sampler), cap)
            for old, sampler in zip(row.old_logp, row.sampler_logp)]


def loop_mean(rows, per_completion):
    """1/G Σ_g, over the completions that have a token."""
    values = [per_completion(row) for row in rows if len(row.logp)]
    return sum(values) / len(values) if values else 0.0


def loop_weighted_mean(weights, values):
    numerator = denominator = 0.0
    for weight, value in zip(weights, values):
        numerator += weight * value
        denominator += weight
    return numerator / denominator


def loop_policy_loss(rows, config):
    def one(row):
        weights = [1.0] * len(row.logp)
        if config.mask:
            weights = loop_omega(loop_delta_h(row), config.tau_base, config.mask_clip)
        surrogates = loop_surrogates(row, config.clip_ratio)
        if config.importance_clip:
            importance = loop_importance(row, config.importance_clip)
            surrogates = [w * x for w, x in zip(importance, surrogates)]
        return loop_weighted_mean(weights, surrogates)
    return loop_mean(rows, one)


def loop_grpo(rows, clip_ratio):
    """GRPO's policy loss: the mean over completions of the plain token mean."""
    return loop_mean(rows, lambda row: sum(loop_surrogates(row, clip_ratio)) / len(row.logp))


def loop_k3(logp, ref_logp):
    return math.exp(ref_logp) / math.exp(logp) - (ref_logp - logp) - 1


def loop_kl_loss(rows):
    def one(row):
        return sum(map(loop_k3, row.logp, row.ref_logp)) / len(row.logp)
    return loop_mean(rows, one)


def loop_failure_gate(accuracy_reward, threshold, floor):
    return 1.0 if accuracy_reward <= threshold else floor


def loop_gamma(row, config, advantage_floor=0.0):
    """Γ_t of Eq. 12 (with the cap of Eq. 4): the factor of ℓ_t^attn, for one completion."""
    magnitude = abs(row.advantages)
    if row.accuracy_reward <= config.fail_threshold:
        magnitude = max(magnitude, advantage_floor)
    gate = loop_failure_gate(row.accuracy_reward, config.fail_threshold, config.fail_gate_floor)
    prefactor = min(gate * magnitude, config.prefactor_clip)
    nu = loop_nu(loop_delta_h(row), row.pos_gate, config.tau_base, config.mask_clip)
    n_pos = sum(1 for g in row.pos_gate if g)
    length = len(nu)
    return [prefactor / n_pos * (t / length) ** config.kappa * nu[t - 1] if n_pos else 0.0
            for t in range(1, length + 1)]


def loop_attention_loss(rows, config, advantage_floor=0.0):
    def one(row):
        return sum(gamma * -math.log(a + config.attention_eps)
                   for gamma, a in zip(loop_gamma(row, config, advantage_floor), row.audio_mass))
    return loop_mean(rows, one)


def loop_total(rows, config):
    parts = {"policy_loss": loop_policy_loss(rows, config), "kl_loss": loop_kl_loss(rows),
             "attention_loss": 0.0}
    if config.eta:
        parts["attention_loss"] = loop_attention_loss(rows, config, config.advantage_floor)
    parts["loss"] = (parts["policy_loss"] + config.beta * parts["kl_loss"]
                     + config.eta * parts["attention_loss"])
    return parts


# ────────────────────── 1. every function equals its loop, whatever the padding ───────────────────


@pytest.mark.parametrize("group_size, eps", [(2, 0.1), (4, 0.1), (8, 1e-4)])
def test_sec2_group_advantages(group_size, eps):
    """Sec. 2: (r − mean) / (std + ε) in each contiguous group; a group of equal rewards gets 0."""
    rng = random.Random(group_size)
    rewards = [rng.choice([0.0, 1.0, 2.0, 3.5]) + rng.random() for _ in range(3 * group_size)]
    rewards += [0.7] * group_size
    actual = mapo.group_advantages(torch.tensor(rewards, dtype=torch.float64), group_size, eps)
    assert_close(actual, loop_advantages(rewards, group_size, eps))
    assert_close(actual[-group_size:], [0.0] * group_size)
    by_hand = mapo.group_advantages(torch.tensor([1.0, 3.0]), 2, 0.1)  # std: √2 (ddof 1), not 1
    assert_close(by_hand, [-1 / (math.sqrt(2) + 0.1), 1 / (math.sqrt(2) + 0.1)], tol=1e-6)


LOGITS = [[[3.0, -1.0, 0.5, 7.0], [0.0, 0.0, 0.0, 0.0], [-8.0, 2.0, 2.5, -0.5]],
          [[1.0, 2.0, 3.0, 4.0], [9.0, -9.0, 0.0, 1.0], [-3.0, -2.0, -1.0, 6.0]]]  # [2, 3, 4]


def test_sec2_token_logp():
    """Sec. 2: log π of the token, and its gradient ∂logp_t/∂z_{t,v} = 𝟙[v = y_t] − π_t(v)."""
    token_ids = [[0, 1, 2], [3, 0, 1]]
    z = torch.tensor(LOGITS, dtype=torch.float64, requires_grad=True)
    logp = mapo.token_logp(z, torch.tensor(token_ids))
    logp.sum().backward()
    for b, t in itertools.product(range(2), range(3)):
        pi, chosen = loop_softmax(LOGITS[b][t]), token_ids[b][t]
        assert_close(logp[b, t], math.log(pi[chosen]))
        assert_close(z.grad[b, t], [float(v == chosen) - pi[v] for v in range(4)])
    assert_close(mapo.token_logp(z[0, 0], torch.tensor(3)), logp[0, 0].item() + 4)  # one token


def test_sec33_token_entropy():
    """Sec. 3.3: H = −Σ π ln π in nats, so ln 4 for four equal logits."""
    entropy = mapo.token_entropy(torch.tensor(LOGITS, dtype=torch.float64))
    assert_close(entropy, [[-sum(p * math.log(p) for p in loop_softmax(z)) for z in row]
                           for row in LOGITS])
    assert_close(entropy[0, 1], 1.3862943611198906)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float64])
def test_sec32_head_audio_mass(dtype):
    """Sec. 3.2: the sum of α over the audio keys of each completion, whatever α is elsewhere."""
    rng = random.Random(1)
    batch, heads, width, keys = 2, 3, 4, 6
    alpha = [[[loop_softmax([rng.uniform(-3, 3) for _ in range(keys)]) for _ in range(width)]
              for _ in range(heads)] for _ in range(batch)]
    audio = [{1, 2, 4}, {0, 5}]
    expected = [[[0.0] * width for _ in range(heads)] for _ in range(batch)]
    for b, h, t in itertools.product(range(batch), range(heads), range(width)):
        for j in audio[b]:
            expected[b][h][t] += alpha[b][h][t][j]
    is_audio = torch.tensor([[j in audio[b] for j in range(keys)] for b in range(batch)])
    attention = torch.tensor(alpha, dtype=torch.float64)
    assert_close(mapo.head_audio_mass(attention, is_audio.to(dtype)), expected)
    poisoned = attention.masked_fill(~is_audio[:, None, None, :], NAN)
    assert_close(mapo.head_audio_mass(poisoned, is_audio.to(dtype)), expected)


def test_sec32_audio_attention_mass():
    """Sec. 3.2: the largest head of each layer, averaged over the layers."""
    layers, batch, heads, width = 3, 2, 4, 5
    rng = random.Random(0)
    mass = [[[[rng.random() for _ in range(width)] for _ in range(heads)] for _ in range(batch)]
            for _ in range(layers)]
    expected = [[0.0] * width for _ in range(batch)]
    for b in range(batch):
        for t in range(width):
            for layer in range(layers):
                largest = 0.0
                for head in range(heads):
                    if mass[layer][b][head][t] > largest:
                        largest = mass[layer][b][head][t]
                expected[b][t] += largest / layers
    assert_close(mapo.audio_attention_mass(torch.tensor(mass, dtype=torch.float64)), expected)


@every_poison
def test_sec32_audio_attention_mass_poison(poison):
    """Sec. 3.2: a poisoned column of head_mass changes no other, and brings back no gradient."""
    rows, config = standard_rows(), MapoConfig()
    clean, dirty = tensors(rows), tensors(rows, poison)
    shape = 2, len(rows), 3, clean.mask.shape[1]
    heads = torch.rand(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    off = ~clean.mask[None, :, None, :].expand_as(heads)
    gradients = []
    for t, fill in ((clean, 0.0), (dirty, poison[0] if isinstance(poison, tuple) else poison)):
        head_mass = heads.masked_fill(off, fill).requires_grad_()
        attention(t, config, audio_mass=mapo.audio_attention_mass(head_mass)).backward()
        gradients.append(head_mass.grad)
    assert torch.equal(*gradients) and gradients[0].abs().sum() > 0
    assert (gradients[1][off] == 0).all()


@every_poison
def test_sec33_differential_entropy(poison):
    """Sec. 3.3: Δh = H_text-ref − H_policy, the text-only reference first."""
    rows = standard_rows()
    t = tensors(rows, poison)
    actual = mapo.differential_entropy(t.text_ref_entropy, t.policy_entropy)
    assert_rows(actual, map(loop_delta_h, rows), off_mask=None)


@pytest.mark.parametrize("tau_base", [1.0, 0.5, 2.0])
def test_sec34_length_temperature(tau_base):
    """Sec. 3.4: τ_T = τ_base · ln(max(T, 2)), from each completion's own length."""
    lengths = [0, 1, 2, 3, 9, 12]
    mask = tensors(make_rows(lengths, 0)).mask
    expected = [[loop_tau(length, tau_base)] for length in lengths]
    assert_close(mapo.length_temperature(mask, tau_base), expected)
    assert_close(mapo.length_temperature(mask, 1.0)[1], [0.6931471805599453])  # natural logarithm


@every_config
@every_poison
def test_eq1_relevance_mask(poison, config):
    """Eq. 1: ω̃ = min(T · softmax(|Δh|/τ_T), C_mask), 0 off the mask."""
    rows = standard_rows()
    expected = loop_omegas(rows, config)
    assert_rows(omega_of(tensors(rows, poison), config), expected)
    reached = [weight == config.mask_clip for row in expected for weight in row]
    assert any(reached) and not all(reached)  # the data has capped and uncapped weights


@pytest.mark.parametrize("clip_ratio", [0.2, 0.1, 0.0])
def test_sec34_clipped_surrogate(clip_ratio):
    """Sec. 3.4: ℓ = −min(ρÂ, clip(ρ, 1−ϵ, 1+ϵ)Â), per token."""
    rows = standard_rows()
    t = tensors(rows)
    actual = mapo.clipped_surrogate(t.logp, t.old_logp, t.advantages, clip_ratio)
    assert_rows(actual, [loop_surrogates(row, clip_ratio) for row in rows], off_mask=None)
    ratios = [math.exp(x - old) for row in rows for x, old in zip(row.logp, row.old_logp)]
    assert min(ratios) < 0.8 and max(ratios) > 1.2 and any(0.8 < r < 1.2 for r in ratios)


@every_poison
def test_sequence_mean(poison):
    """1/G Σ_g of Eqs. 2 and 4: an empty completion does not count; with none left the mean is 0."""
    mask = torch.tensor([[True, True], [False, False], [True, False]])
    empty = poison[0] if isinstance(poison, tuple) else poison
    values = torch.tensor([1.0, empty, 4.0], dtype=torch.float64)
    assert_close(mapo.sequence_mean(values, mask), 2.5)
    assert_close(mapo.sequence_mean(values, torch.zeros(3, 2, dtype=torch.bool)), 0.0)


@every_config
@every_poison
def test_eq2_policy_loss(poison, config):
    """Eq. 2: 1/G Σ_g (Σ ω̃ℓ / Σ ω̃)."""
    rows = standard_rows()
    t = tensors(rows, poison)
    width = t.mask.shape[1]
    surrogates = [loop_surrogates(row, config.clip_ratio) for row in rows]
    if config.importance_clip:
        surrogates = [
            [w * x for w, x in zip(loop_importance(row, config.importance_clip), values)]
            for row, values in zip(rows, surrogates)]
    omegas = loop_omegas(rows, config)
    actual = mapo.policy_loss(pad(surrogates, poison, width), pad(omegas, poison, width), t.mask)
    assert_close(actual, loop_policy_loss(rows, config))


@pytest.mark.parametrize("cap", [0.5, 1.3, 2.0, 1e9])
def test_eq2_importance_weight(cap):
    """Beside Eq. 2 (ours): min(π_old/μ, C), detached; capped and uncapped weights both occur."""
    rows = standard_rows()
    t = tensors(rows)
    t.old_logp.requires_grad_()
    actual = mapo.importance_weight(t.old_logp, t.sampler_logp, cap)
    assert_rows(actual, [loop_importance(row, cap) for row in rows], off_mask=None)
    assert not actual.requires_grad
    assert (actual[t.mask] < cap).any() and (cap > 3 or (actual[t.mask] == cap).any())


def test_importance_weight_scales_the_gradient():
    """∂L_PG/∂logp_t is w_t times what it is without w, clipped or not; other losses do not change.

    With importance_clip above 0, sampler_logp is needed.
    """
    rows = standard_rows()
    t, gradients, outs = tensors(rows, NAN), {}, {}
    for clip in (0.0, 1.3):
        leaf = t.logp.clone().requires_grad_()
        outs[clip] = total(t, MapoConfig(importance_clip=clip), logp=leaf)
        gradients[clip], = torch.autograd.grad(outs[clip]["policy_loss"], leaf)
    for row, plain, weighted in zip(rows, gradients[0.0], gradients[1.3]):
        n = len(row.logp)
        expected = [w * g for w, g in zip(loop_importance(row, 1.3), plain[:n].tolist())]
        assert_close(weighted[:n], expected)
    for name in ("kl_loss", "attention_loss"):
        assert torch.equal(outs[0.0][name], outs[1.3][name])
    with pytest.raises(ValueError, match="needs sampler_logp .*importance_clip is 1.3"):
        total(t, MapoConfig(importance_clip=1.3), sampler_logp=None)


@every_config
@every_poison
@pytest.mark.parametrize("gate_dtype", [torch.float64, torch.bool, torch.int64])
def test_eq3_inverse_relevance_weight(poison, config, gate_dtype):
    """Eq. 3: ν̃ = min(T_pos · softmax over g = 1 of −|Δh|/τ_T, C_mask), 0 where g is 0."""
    rows = standard_rows()
    t = tensors(rows, poison)
    if gate_dtype != torch.float64:
        t.pos_gate = t.pos_gate.nan_to_num(1, 1, 1).to(gate_dtype)
    expected = loop_nus(rows, config)
    assert_rows(nu_of(t, config), expected)
    assert sum(expected[NO_GATED]) == 0


def test_eq3_cap():
    """Eq. 3: C_mask caps ν̃ too. One |Δh| of six gated ones is near 0 and would get nearly 6."""
    delta_h, gate = [8.0, -9.0, 0.1, 9.5, -8.5, 9.0, 7.0], [1, 1, 1, 1, 1, 1, 0]
    expected = loop_nu(delta_h, gate, 1.0, 5.0)
    assert expected[2] == 5.0
    actual = mapo.inverse_relevance_weight(
        torch.tensor([delta_h], dtype=torch.float64), torch.tensor([gate]),
        torch.ones(1, 7, dtype=torch.bool), 1.0, 5.0)
    assert_close(actual, [expected])


@pytest.mark.parametrize("kappa", [0.0, 0.5, 1.0, 2.0])
def test_sec35_temporal_weight(kappa):
    """Sec. 3.5: (t/T)^κ with t = 1..T, so that the last token has weight 1; 0 off the mask."""
    rows = standard_rows()
    expected = []
    for length in (len(row.logp) for row in rows):
        expected.append([(t / length) ** kappa for t in range(1, length + 1)])
    assert_rows(mapo.temporal_weight(tensors(rows, extra=2).mask, kappa), expected)


@pytest.mark.parametrize("threshold, floor", [(0.0, 0.1), (0.5, 0.0), (0.5, 1.0)])
def test_sec35_failure_gate(threshold, floor):
    """Sec. 3.5: f̂ = max(𝟙[r_acc ≤ θ_fail], α); a reward equal to the threshold is a failure."""
    rewards = [-1.0, 0.0, 0.2, 0.5, 0.51, 1.0]
    actual = mapo.failure_gate(torch.tensor(rewards, dtype=torch.float64), threshold, floor)
    assert_close(actual, [loop_failure_gate(reward, threshold, floor) for reward in rewards])


def test_eq4_attention_prefactor():
    """Eq. 4: min(f̂·|Â|, C_pref), the cap on the product."""
    gates, advantages = [1.0, 1.0, 0.1, 0.1, 1.0], [-2.0, -7.0, 7.0, 70.0, 0.0]
    actual = mapo.attention_prefactor(torch.tensor(gates, dtype=torch.float64),
                                      torch.tensor(advantages, dtype=torch.float64), 3.0)
    assert_close(actual, [2.0, 3.0, 0.7, 3.0, 0.0])


@pytest.mark.parametrize("eps", [0.1, 1e-6])
def test_sec35_attention_penalty(eps):
    """Sec. 3.5: ℓ^attn = −ln(a + ε), ε inside the logarithm."""
    masses = [[0.0, 0.3, 0.9], [1.0, 1e-3, 0.5]]
    expected = [[-math.log(a + eps) for a in row] for row in masses]
    assert_close(mapo.attention_penalty(torch.tensor(masses, dtype=torch.float64), eps), expected)


@every_config
@every_poison
def test_eq4_attention_loss(poison, config):
    """Eq. 4, whole."""
    rows = standard_rows()
    assert_close(attention(tensors(rows, poison), config), loop_attention_loss(rows, config))


def test_sec2_k3_kl():
    """Sec. 2: k3 = exp(r − l) − (r − l) − 1, r the reference and l the policy, per token."""
    rows = standard_rows()
    t = tensors(rows)
    expected = [[loop_k3(x, ref) for x, ref in zip(row.logp, row.ref_logp)] for row in rows]
    assert_rows(mapo.k3_kl(t.logp, t.ref_logp), expected, off_mask=None)


def test_k3_value_and_gradient_belong_to_different_divergences():
    """Exact expectations over a vocabulary of five tokens that are sampled from π_θ.

    The value is D(π_θ ‖ π_ref). The gradient with respect to the logits is that of D(π_ref ‖ π_θ),
    which is π_θ − π_ref, and not that of D(π_θ ‖ π_ref), which is π_θ·(ln(π_θ/π_ref) − D).
    """
    logits = torch.tensor([0.3, -1.0, 2.0, 0.5, -0.2], dtype=torch.float64, requires_grad=True)
    pi = loop_softmax(logits.tolist())
    pi_ref = loop_softmax([2.0, 0.4, -1.5, 0.8, -2.0])
    log_pi = logits.log_softmax(-1)[None]  # column v is the token v  [1, 5]
    k3 = mapo.k3_kl(log_pi, torch.tensor([pi_ref], dtype=torch.float64).log())
    expectation = (log_pi.exp().detach() * k3).sum()
    gradient, = torch.autograd.grad(expectation, logits)

    reverse = sum(p * math.log(p / q) for p, q in zip(pi, pi_ref))
    forward = sum(q * math.log(q / p) for p, q in zip(pi, pi_ref))
    assert_close(expectation, reverse, tol=1e-12)
    assert abs(reverse - forward) > 0.1
    assert_close(gradient, [p - q for p, q in zip(pi, pi_ref)], tol=1e-12)
    reverse_gradient = [p * (math.log(p / q) - reverse) for p, q in zip(pi, pi_ref)]
    assert max(abs(x - y) for x, y in zip(gradient.tolist(), reverse_gradient)) > 0.1


@every_poison
def test_sec2_kl_loss(poison):
    """Sec. 2: the mean over completions of the plain token mean, 1/T and not ω̃."""
    rows = standard_rows()
    t = tensors(rows, poison)
    assert_close(mapo.kl_loss(t.logp, t.ref_logp, t.mask), loop_kl_loss(rows))


@every_config
@every_poison
def test_eq5_total(poison, config):
    """Eq. 5: L_PG(ω̃) + β·L_KL + η·L_attn, and each part, against the loops."""
    rows = standard_rows()
    out = total(tensors(rows, poison), config)
    for name, expected in loop_total(rows, config).items():
        assert_close(out[name], expected)
    parts = (out["policy_loss"] + config.beta * out["kl_loss"]
             + config.eta * out["attention_loss"])
    assert_close(out["loss"], parts.item())
    assert_rows(out["omega"], loop_omegas(rows, config))
    assert set(out) == {*LOSSES, "omega"}


def loss_and_gradients(name, t, config):
    """A loss and its gradient with respect to every tensor that it is differentiable in."""
    if name == "policy_loss":
        surrogate = mapo.clipped_surrogate(t.logp, t.old_logp, t.advantages, config.clip_ratio)
        leaves = [surrogate.detach().requires_grad_()]
        loss = mapo.policy_loss(leaves[0], omega_of(t, config), t.mask)
    elif name == "kl_loss":
        leaves = [t.logp.clone().requires_grad_()]
        loss = mapo.kl_loss(leaves[0], t.ref_logp, t.mask)
    elif name == "attention_loss":
        leaves = [t.audio_mass.clone().requires_grad_()]
        loss = attention(t, config, audio_mass=leaves[0])
    else:
        leaves = [t.logp.clone().requires_grad_(), t.audio_mass.clone().requires_grad_()]
        loss = total(t, config, logp=leaves[0], audio_mass=leaves[1])["loss"]
    return loss, torch.autograd.grad(loss, leaves)


EVERY_LOSS = ["policy_loss", "kl_loss", "attention_loss", "mapo_loss"]


@every_poison
@pytest.mark.parametrize("name", EVERY_LOSS)
def test_poison_reaches_no_gradient(name, poison):
    """Padding changes no gradient on the mask, bit for bit; off the mask every gradient is 0."""
    rows, config = standard_rows(), CONFIGS[1]
    clean, dirty = tensors(rows, extra=2), tensors(rows, poison, extra=2)
    loss, gradients = loss_and_gradients(name, clean, config)
    poisoned_loss, poisoned_gradients = loss_and_gradients(name, dirty, config)
    assert torch.equal(loss, poisoned_loss)
    for gradient, poisoned in zip(gradients, poisoned_gradients):
        assert poisoned.isfinite().all()
        assert torch.equal(gradient, poisoned)
        assert (poisoned[~dirty.mask] == 0).all()
        assert (poisoned[dirty.mask] != 0).any()


@every_poison
def test_every_completion_empty(poison):
    """With no completion left, every loss is 0 and every gradient is 0, not NaN."""
    t = tensors(standard_rows(), poison)
    t.mask = torch.zeros_like(t.mask)
    for name in EVERY_LOSS:
        loss, gradients = loss_and_gradients(name, t, MapoConfig())
        assert loss == 0 and all((gradient == 0).all() for gradient in gradients)


@every_config
def test_emptied_completions_leave_no_trace(config):
    """mask_truncated: emptying the mask of a completion gives the losses of the others alone."""
    t = tensors(standard_rows())
    emptied = [LARGE_ADVANTAGE, SHARP]
    left = [i for i in range(len(t.mask)) if i not in emptied]
    t.mask[emptied] = False
    without = total(part_of(t, left), config)
    for name in PER_TOKEN + PER_COMPLETION:
        getattr(t, name)[emptied] = NAN
    actual = total(t, config)
    for name in LOSSES:
        assert_close(actual[name], without[name].item())
    assert (actual["omega"][emptied] == 0).all()


# ───────────────────────────── 2. gradcheck, and what is detached ─────────────────────────────────


def gradcheck(function, *inputs):
    leaves = tuple(x.detach().clone().requires_grad_() for x in inputs)
    return torch.autograd.gradcheck(function, leaves)


def smooth_case():
    """A small padded case; its log ratios are at least 0.02 from the kinks ln(0.8) and ln(1.2)."""
    rows = make_rows([4, 1, 0, 3], seed=3)
    steps = itertools.cycle([-0.4, -0.1, 0.05, 0.3, 0.12])
    for row in rows:
        row.old_logp = [x - next(steps) for x in row.logp]
        row.pos_gate = [1.0, 0.0, 1.0, 1.0][:len(row.logp)]
    return tensors(rows, extra=1)


def test_gradcheck_surrogate_and_policy_loss():
    """Sec. 3.4, Eq. 2: autograd equals finite differences, away from the kinks of the clip."""
    t = smooth_case()
    omega = omega_of(t, MapoConfig())

    def surrogate(logp):
        return mapo.clipped_surrogate(logp, t.old_logp, t.advantages, 0.2)

    assert gradcheck(surrogate, t.logp)
    assert gradcheck(lambda x: mapo.policy_loss(x, omega, t.mask), surrogate(t.logp))
    assert gradcheck(lambda x: mapo.sequence_mean(x, t.mask), t.advantages)


def test_gradcheck_kl():
    """Sec. 2: k3 and its mean."""
    t = smooth_case()
    assert gradcheck(mapo.k3_kl, t.logp, t.ref_logp)
    assert gradcheck(lambda logp: mapo.kl_loss(logp, t.ref_logp, t.mask), t.logp)


def test_gradcheck_attention():
    """Sec. 3.2, 3.5, Eq. 4: the maximum over heads (away from ties), the penalty, the loss."""
    t, config = smooth_case(), CONFIGS[1]
    heads = torch.linspace(0.05, 0.95, 2 * 4 * 3 * 5, dtype=torch.float64)  # 0.007 apart
    order = torch.randperm(120, generator=torch.Generator().manual_seed(0))
    heads = heads[order].view(2, 4, 3, 5)
    assert gradcheck(mapo.audio_attention_mass, heads)
    assert gradcheck(lambda a: mapo.attention_penalty(a, 0.1), t.audio_mass)
    assert gradcheck(lambda a: attention(t, config, audio_mass=a), t.audio_mass)
    assert gradcheck(
        lambda m: attention(t, config, audio_mass=mapo.audio_attention_mass(m)), heads)


@pytest.mark.parametrize("config", [CONFIGS[0], dataclasses.replace(CONFIGS[1], clip_ratio=0.2)])
def test_gradcheck_total(config):
    """Eq. 5: the total, in log-probabilities and audio mass together."""
    t = smooth_case()
    assert gradcheck(lambda logp, a: total(t, config, logp=logp, audio_mass=a)["loss"],
                     t.logp, t.audio_mass)


def test_detached_weights_carry_no_gradient():
    """Sec. 3.3–3.5: Δh, ω̃, ν̃ and the prefactor are constants, even if their inputs are not."""
    t = smooth_case()
    for name in PER_TOKEN + PER_COMPLETION:
        getattr(t, name).requires_grad_()
    live = delta_h_of(t)
    assert live.requires_grad
    assert not mapo.differential_entropy(t.text_ref_entropy, t.policy_entropy).requires_grad
    assert not omega_of(t, MapoConfig()).requires_grad
    assert not nu_of(t, MapoConfig()).requires_grad
    assert not mapo.attention_prefactor(t.accuracy_reward, t.advantages, 3.0).requires_grad
    out = total(t, MapoConfig(), delta_h=live)
    assert not out["omega"].requires_grad
    blocked = [live, t.policy_entropy, t.text_ref_entropy, t.pos_gate, t.accuracy_reward]
    gradients = torch.autograd.grad(out["loss"], blocked, allow_unused=True, retain_graph=True)
    assert gradients == (None,) * 5
    loss = attention(t, MapoConfig(), delta_h=live)
    blocked = [live, t.pos_gate, t.advantages, t.accuracy_reward]
    assert torch.autograd.grad(loss, blocked, allow_unused=True) == (None,) * 4


# ───────────────────────── 3. Appendix A's closed forms, through real attention ───────────────────


def test_eq9_surrogate_gradient():
    """Eq. 9: ∂ℓ/∂logp = −Âρ where the clip does not hold, 0 where it does; −Â at ρ = 1 exactly."""
    for advantage in (1.5, -0.7):
        steps = [-0.5, -0.3, -0.1, 0.0, 0.1, 0.3, 0.5]
        logp = torch.tensor([[-1.0 + step for step in steps]], dtype=torch.float64,
                            requires_grad=True)
        old = torch.full((1, len(steps)), -1.0, dtype=torch.float64)
        advantages = torch.tensor([advantage], dtype=torch.float64)
        mapo.clipped_surrogate(logp, old, advantages, 0.2).sum().backward()
        expected = []
        for step in steps:
            rho = math.exp(step)
            held = rho > 1.2 if advantage > 0 else rho < 0.8  # the other side is not clipped
            expected.append(0.0 if held else -advantage * rho)
        assert 0.0 in expected
        assert_close(logp.grad, [expected])


def test_eq10_policy_gradient():
    """Eq. 10 with the 1/G of Eq. 2: ∂L_PG/∂logp_t = −1/G · ω̃_t/Σω̃ · Âρ_t, 0 where clipped."""
    rows, config = standard_rows(), MapoConfig(beta=0.0, eta=0.0)
    t = tensors(rows, NAN)
    logp = t.logp.requires_grad_()
    total(t, config)["loss"].backward()
    counted = sum(1 for row in rows if row.logp)
    expected = []
    for row, omega in zip(rows, loop_omegas(rows, config)):
        line = []
        for weight, x, old in zip(omega, row.logp, row.old_logp):
            rho = math.exp(x - old)
            held = rho > 1.2 if row.advantages > 0 else rho < 0.8
            line.append(0.0 if held else -weight / sum(omega) * row.advantages * rho / counted)
        expected.append(line)
    assert_rows(logp.grad, expected)


@every_config
def test_eq12_mass_gradient(config):
    """Eq. 12 with the 1/G of Eq. 4: ∂L_attn/∂a_t = −Γ_t/(a_t + ε)/G, G the counted completions."""
    rows = standard_rows()
    t = tensors(rows, NAN)
    mass = t.audio_mass.requires_grad_()
    attention(t, config).backward()
    counted = sum(1 for row in rows if row.logp)
    expected = [[-gamma / (a + config.attention_eps) / counted
                 for gamma, a in zip(loop_gamma(row, config), row.audio_mass)] for row in rows]
    assert_rows(mass.grad, expected)


PROMPT, COMPLETION, LAYERS, HEADS, DIM = 6, 5, 3, 4, 3
AUDIO_KEYS = [{1, 2, 3}, {0, 2, 4, 5}]  # S_audio of each sample
TARGET = [1, 2]  # L_tgt, the last two of the three layers


def real_attention(seed=0):
    """Causal multi-head attention in float64 → logits z and weights α per layer, [B, H, S, S].

    Between layers the hidden state is detached: Appendix A follows z of a layer to m of that layer.
    """
    generator = torch.Generator().manual_seed(seed)
    length, width = PROMPT + COMPLETION - 1, HEADS * DIM  # the last token is never a query
    future = torch.ones(length, length, dtype=torch.bool).triu(1)

    def random_matrix(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    hidden, logits, weights = random_matrix(len(AUDIO_KEYS), length, width), [], []
    for _ in range(LAYERS):
        w_q, w_k, w_v = (random_matrix(width, width).div(2).requires_grad_() for _ in range(3))
        q, k, v = ((hidden @ w).unflatten(-1, (HEADS, DIM)).transpose(1, 2)
                   for w in (w_q, w_k, w_v))
        z = q @ k.transpose(-1, -2) / math.sqrt(DIM)
        alpha = z.masked_fill(future, -INF).softmax(-1)
        hidden = torch.tanh(hidden + (alpha @ v).transpose(1, 2).flatten(-2)).detach()
        logits.append(z)
        weights.append(alpha)
    return logits, weights


def masses(weights):
    """m_t⁽ˡʰ⁾ of the target layers, [L, B, H, T]. The query of y_t is the row that predicts it."""
    is_audio = torch.tensor([[j in keys for j in range(weights[0].shape[-1])]
                             for keys in AUDIO_KEYS])
    return torch.stack([mapo.head_audio_mass(weights[layer][:, :, PROMPT - 1:], is_audio)
                        for layer in TARGET])


def loop_mass_gradient(logits_row, query, audio):
    """Eq. 15 for one head and query, over all keys: α(1 − m) on audio keys, −αm on the others."""
    alpha = loop_softmax(logits_row[:query + 1]) + [0.0] * (len(logits_row) - query - 1)
    m = sum(alpha[j] for j in audio)
    return [a * (1 - m) if key in audio else -a * m for key, a in enumerate(alpha)], m


def test_eq15_logit_gradient():
    """Eq. 15: ∂m_t/∂z_{t,i} for each head, layer, position and key; other queries get nothing."""
    logits, weights = real_attention()
    head_mass = masses(weights)
    for (number, layer), b, h, t in itertools.product(enumerate(TARGET), range(2), range(HEADS),
                                                      range(COMPLETION)):
        gradient, = torch.autograd.grad(head_mass[number, b, h, t], logits[layer],
                                        retain_graph=True)
        query = PROMPT - 1 + t
        z = logits[layer][b, h, query].tolist()
        expected, m = loop_mass_gradient(z, query, AUDIO_KEYS[b])
        assert_close(head_mass[number, b, h, t], m)
        assert_close(gradient[b, h, query], expected)
        assert gradient.count_nonzero() == query + 1  # the causal keys of that row alone


def test_eq13_one_head():
    """Eq. 13: in each target layer only the head of the largest mass gets a gradient, 1/|L_tgt|."""
    logits, weights = real_attention()
    head_mass = masses(weights)
    a = mapo.audio_attention_mass(head_mass)
    winners = set()
    for b, t in itertools.product(range(2), range(COMPLETION)):
        gradients = torch.autograd.grad(a[b, t], [head_mass, *logits], retain_graph=True,
                                        allow_unused=True)
        assert gradients[1] is None  # layer 0 is not a target
        for number, layer in enumerate(TARGET):
            by_head = head_mass[number, b, :, t].tolist()
            best = by_head.index(max(by_head))
            winners.add(best)
            query = PROMPT - 1 + t
            z = logits[layer][b, best, query].tolist()
            expected, _ = loop_mass_gradient(z, query, AUDIO_KEYS[b])
            for h in range(HEADS):
                share = 1 / len(TARGET) if h == best else 0.0
                assert gradients[0][number, b, h, t].item() == share
                assert_close(gradients[1 + layer][b, h, query], [share * x for x in expected])
    assert len(winners) > 1


def test_eq13_tie_goes_to_one_head():
    """Eq. 13 on an exact tie: one head gets the whole gradient, neither split nor doubled."""
    first, _ = real_attention()
    tied = [z.detach()[:, :1].expand(-1, HEADS, -1, -1).clone().requires_grad_() for z in first]
    future = torch.ones(tied[0].shape[-2:], dtype=torch.bool).triu(1)
    head_mass = masses([z.masked_fill(future, -INF).softmax(-1) for z in tied])
    assert (head_mass == head_mass[:, :, :1]).all()
    mapo.audio_attention_mass(head_mass).sum().backward()
    for layer, b, t in itertools.product(TARGET, range(2), range(COMPLETION)):
        query = PROMPT - 1 + t
        gradient = tied[layer].grad[b, :, query]  # [H, S]
        reached = [h for h in range(HEADS) if gradient[h].count_nonzero()]
        assert len(reached) == 1
        z = tied[layer][b, 0, query].tolist()
        expected, _ = loop_mass_gradient(z, query, AUDIO_KEYS[b])
        assert_close(gradient[reached[0]], [x / len(TARGET) for x in expected])


def test_eq16_attention_loss_logit_gradient():
    """Eq. 16 with the 1/G of Eq. 4: ∂L_attn/∂z, negative on audio keys, positive on the others."""
    rows, config = make_rows([COMPLETION, 3], seed=2), MapoConfig()
    rows[0].pos_gate, rows[1].pos_gate = [1.0, 0.0, 1.0, 1.0, 1.0], [0.0, 1.0, 1.0]
    rows[0].accuracy_reward, rows[1].accuracy_reward = 0.0, 1.0
    logits, weights = real_attention()
    a = mapo.audio_attention_mass(masses(weights))
    loss = attention(tensors(rows), config, audio_mass=a)
    gradients = torch.autograd.grad(loss, [logits[layer] for layer in TARGET])

    def of_every_head(layer, b, query):
        """(∂m/∂z, m) of each head, by Eq. 15."""
        return [loop_mass_gradient(logits[layer][b, h, query].tolist(), query, AUDIO_KEYS[b])
                for h in range(HEADS)]

    for (number, layer), (b, row) in itertools.product(enumerate(TARGET), enumerate(rows)):
        expected = torch.zeros(logits[layer].shape[1:]).tolist()  # [H, S, S]
        for t, gamma in enumerate(loop_gamma(row, config)):
            query = PROMPT - 1 + t
            a_t = sum(max(m for _, m in of_every_head(each, b, query)) for each in TARGET)
            a_t /= len(TARGET)
            heads = of_every_head(layer, b, query)
            best = max(range(HEADS), key=lambda h: heads[h][1])
            scale = -gamma / (len(TARGET) * (a_t + config.attention_eps)) / len(rows)
            expected[best][query] = [scale * x for x in heads[best][0]]
            if gamma:
                for i in range(query + 1):
                    assert (expected[best][query][i] < 0) == (i in AUDIO_KEYS[b])
        assert_close(gradients[number][b], expected)


# ────────────────────────────────────────── 4. properties ─────────────────────────────────────────


@st.composite
def batches(draw, shortest=0, longest=9):
    """Completions of drawn lengths (0: masked out), numbers and range of entropies."""
    lengths = draw(st.lists(st.integers(shortest, longest), min_size=1, max_size=5))
    return make_rows(lengths, draw(st.integers(0, 2**32)), spread=draw(st.floats(0, 8)))


@prop
@given(batches(), st.floats(0.5, 2))
def test_property_omega_sums_to_length(rows, tau_base):
    """Eq. 1: uncapped, ω̃ sums to T; capped, to no more than T."""
    t = tensors(rows, NAN)
    lengths = [float(len(row.logp)) for row in rows]
    assert_close(mapo.relevance_mask(delta_h_of(t), t.mask, tau_base, 1e6).sum(1), lengths)
    capped = mapo.relevance_mask(delta_h_of(t), t.mask, tau_base, 1.2).sum(1).tolist()
    assert all(x <= length + 1e-9 for x, length in zip(capped, lengths))


@prop
@given(batches(), st.floats(0.5, 2), st.floats(0.5, 5))
def test_property_weights_are_bounded(rows, tau_base, cap):
    """Eqs. 1, 3: ω̃ and ν̃ are in [0, C_mask]; uncapped, ν̃ sums to T_pos."""
    t, config = tensors(rows, INF), MapoConfig(tau_base=tau_base, mask_clip=cap)
    omega, nu = omega_of(t, config), nu_of(t, config)
    assert ((omega >= 0) & (omega <= cap)).all() and ((nu >= 0) & (nu <= cap)).all()
    assert (omega[t.mask] > 0).all()
    uncapped = nu_of(t, MapoConfig(tau_base=tau_base, mask_clip=1e6))
    assert_close(uncapped.sum(1), [sum(row.pos_gate) for row in rows])


@prop
@given(batches())
def test_property_weights_order_by_delta_h(rows):
    """Eqs. 1, 3: a larger |Δh| never gets less of ω̃ nor, among gated tokens, more of ν̃."""
    t = tensors(rows)
    omega = mapo.relevance_mask(delta_h_of(t), t.mask, 1.0, 1.5)
    nu = mapo.inverse_relevance_weight(delta_h_of(t), t.mask, t.mask, 1.0, 1.5)
    for row, up, down in zip(rows, omega.tolist(), nu.tolist()):
        order = sorted(range(len(row.logp)), key=lambda i: abs(loop_delta_h(row)[i]))
        assert all(up[i] <= up[j] and down[i] >= down[j] for i, j in zip(order, order[1:]))


@prop
@given(batches(), st.floats(1e-3, 1e3))
def test_property_policy_loss_ignores_scale_of_omega(rows, scale):
    """Sec. 3.4: the normalisation makes L_PG invariant to the scale of ω̃."""
    t = tensors(rows)
    surrogate = mapo.clipped_surrogate(t.logp, t.old_logp, t.advantages, 0.2)
    omega = omega_of(t, MapoConfig())
    expected = mapo.policy_loss(surrogate, omega, t.mask).item()
    assert_close(mapo.policy_loss(surrogate, scale * omega, t.mask), expected)


@prop
@given(batches(), st.floats(-5, 5))
def test_property_uniform_delta_h_is_grpo(rows, gap):
    """Eq. 2: with one |Δh| for all tokens, of either sign, ω̃ is 1 and L_PG is GRPO's."""
    t = tensors(rows, 1e4)
    signs = torch.tensor([(-1.0) ** i for i in range(t.mask.shape[1])], dtype=torch.float64)
    out = total(t, MapoConfig(), delta_h=(gap * signs).expand_as(t.logp))
    assert_rows(out["omega"], [[1.0] * len(row.logp) for row in rows])
    assert_close(out["policy_loss"], loop_grpo(rows, 0.2))


@prop
@given(batches(), st.randoms(use_true_random=False))
def test_property_permuting_completions(rows, rng):
    """Eqs. 2, 4, 5: the order of the completions changes no loss and permutes what is per token."""
    order = list(range(len(rows)))
    rng.shuffle(order)
    before, after = (total(tensors(x), CONFIGS[1]) for x in (rows, [rows[i] for i in order]))
    for name in LOSSES:
        assert_close(after[name], before[name].item())
    assert torch.equal(after["omega"], before["omega"][order])


@prop
@given(st.lists(st.floats(-5, 5), min_size=4, max_size=4), st.permutations(range(4)),
       st.floats(-10, 10))
def test_property_advantages(rewards, order, shift):
    """Sec. 2: Â follows a permutation, ignores a shift, has mean 0, and |Â| < (G−1)/√G."""
    r = torch.tensor(rewards, dtype=torch.float64)
    advantages = mapo.group_advantages(r, 4, 0.1)
    permuted = mapo.group_advantages(r[list(order)], 4, 0.1)
    assert_close(permuted, advantages[list(order)].tolist())
    assert_close(mapo.group_advantages(r + shift, 4, 0.1), advantages.tolist())
    assert_close(advantages.mean(), 0.0)
    assert (advantages.abs() < 1.5).all()
    both = mapo.group_advantages(torch.cat([r, 3 * r + 1]), 4, 0.1)
    assert_close(both[:4], advantages.tolist())  # the group beside it makes no difference


@prop
@given(st.floats(-100, 100), st.integers(2, 8), st.sampled_from([0.1, 1e-4]))
def test_property_equal_rewards_give_no_advantage(reward, group_size, eps):
    """Sec. 2: a group that agrees teaches nothing."""
    rewards = torch.full((2 * group_size,), reward, dtype=torch.float64)
    advantages = mapo.group_advantages(rewards, group_size, eps)
    assert_close(advantages, [0.0] * (2 * group_size), tol=1e-9)


@prop
@given(batches(), st.integers(1, 4), st.sampled_from(POISON))
def test_property_extra_padding(rows, extra, poison):
    """More columns of padding change no loss and no weight."""
    narrow = total(tensors(rows), CONFIGS[1])
    wide = total(tensors(rows, poison, extra), CONFIGS[1])
    for name in LOSSES:
        assert_close(wide[name], narrow[name].item())
    width = narrow["omega"].shape[1]
    torch.testing.assert_close(wide["omega"][:, :width], narrow["omega"], rtol=1e-12, atol=0)
    assert (wide["omega"][:, width:] == 0).all()


@prop
@given(batches(), st.floats(0, 3))
def test_property_temporal_weight(rows, kappa):
    """Sec. 3.5: non-decreasing, in (0, 1], 1 at the last token; κ = 0 gives 1 throughout."""
    mask = tensors(rows, extra=1).mask
    for row, weights in zip(rows, mapo.temporal_weight(mask, kappa).tolist()):
        weights = weights[:len(row.logp)]
        assert all(0 < x <= y for x, y in zip(weights, weights[1:]))
        assert not weights or weights[-1] == 1
    assert torch.equal(mapo.temporal_weight(mask, 0.0), mask.double())


@prop
@given(batches())
def test_property_no_gated_token_no_attention_loss(rows):
    """Eq. 4: with N_pos = 0 everywhere the loss is 0, and so is its gradient."""
    for row in rows:
        row.pos_gate = [0.0] * len(row.logp)
    loss, (gradient,) = loss_and_gradients("attention_loss", tensors(rows, NAN), MapoConfig())
    assert loss == 0 and (gradient == 0).all()


@prop
@given(batches(shortest=1, longest=1))
def test_property_single_token(rows):
    """T = 1: ω̃ is 1, ν̃ is the gate, t/T is 1, so that L_PG is the mean surrogate."""
    t, config = tensors(rows, NAN, extra=1), MapoConfig()
    assert_rows(omega_of(t, config), [[1.0]] * len(rows))
    assert_rows(nu_of(t, config), [row.pos_gate for row in rows])
    assert_rows(mapo.temporal_weight(t.mask, 1.0), [[1.0]] * len(rows))
    assert_close(total(t, config)["policy_loss"], loop_grpo(rows, 0.2))


@prop
@given(st.floats(-20, 0), st.floats(-20, 0))
def test_property_k3_is_not_negative(logp, ref_logp):
    """Sec. 2: k3 ≥ 0 but for the rounding of e^Δ (2⁻⁵³), and 0 where the two agree."""
    x = torch.tensor([[logp]], dtype=torch.float64)
    ref = torch.tensor([[ref_logp]], dtype=torch.float64)
    assert mapo.k3_kl(x, ref) >= -2**-52 and mapo.k3_kl(x, x) == 0


@prop
@given(st.lists(st.floats(-2, 2), min_size=1, max_size=6), st.floats(-1, 1), st.floats(0, 1))
def test_property_failure_gate_has_two_values(rewards, threshold, floor):
    """Sec. 3.5: f̂ is 1 or α."""
    gates = mapo.failure_gate(torch.tensor(rewards, dtype=torch.float64), threshold, floor)
    for gate, reward in zip(gates.tolist(), rewards, strict=True):
        assert gate == (1 if reward <= threshold else floor)


@prop
@given(batches(), st.data())
def test_property_micro_batches_add_up(rows, data):
    """Each micro-batch times its share of the counted completions: the pieces sum to the whole."""
    assume(any(row.logp for row in rows))
    cuts = sorted(data.draw(st.sets(st.integers(1, len(rows)))) | {0, len(rows)})
    config = CONFIGS[1]
    t = tensors(rows, NAN)
    leaves = t.logp.requires_grad_(), t.audio_mass.requires_grad_()
    whole = total(t, config)
    counted = t.mask.any(1).sum().item()
    summed = dict.fromkeys(LOSSES, 0.0)
    for first, last in zip(cuts, cuts[1:]):
        part = part_of(t, slice(first, last))
        out = total(part, config)
        share = part.mask.any(1).sum().item() / counted
        summed = {name: summed[name] + share * out[name] for name in LOSSES}
    for name in LOSSES:
        assert_close(summed[name], whole[name].item())
    gradients = torch.autograd.grad(summed["loss"], leaves)
    for pieces, at_once in zip(gradients, torch.autograd.grad(whole["loss"], leaves)):
        assert_close(pieces, at_once.tolist())


# ─────────────────────────────── 5. mapo_loss and its settings ────────────────────────────────────


@pytest.mark.parametrize("clip_ratio, beta", [(0.2, 0.002), (0.1, 0.5)])
def test_mask_off_is_grpo(clip_ratio, beta):
    """Sec. 2: `mask: false, eta: 0` is GRPO, 1/T throughout; it needs no Δh, attention or POS."""
    rows = standard_rows()
    t = tensors(rows, NAN)
    out = mapo.mapo_loss(
        logp=t.logp, old_logp=t.old_logp, ref_logp=t.ref_logp, advantages=t.advantages,
        mask=t.mask, config=MapoConfig(mask=False, eta=0.0, clip_ratio=clip_ratio, beta=beta))
    grpo = loop_grpo(rows, clip_ratio)
    assert_close(out["policy_loss"], grpo)
    assert_close(out["loss"], grpo + beta * loop_kl_loss(rows))
    assert out["attention_loss"] == 0
    assert torch.equal(out["omega"], t.mask.double())


def test_mask_off_keeps_attention():
    """Table 1's attention-only row: `mask: false` with η > 0 is GRPO plus Eq. 4."""
    rows, config = standard_rows(), MapoConfig(mask=False)
    out = total(tensors(rows, NAN), config)
    for name, expected in loop_total(rows, config).items():
        assert_close(out[name], expected)
    assert out["attention_loss"] != 0


def test_eta_zero_needs_no_attention_input():
    """Eq. 5 at η = 0: the attention loss is not computed, and its inputs may be left out."""
    rows, config = standard_rows(), MapoConfig(eta=0.0)
    t = tensors(rows, NAN)
    out = total(t, config, audio_mass=None, pos_gate=None, accuracy_reward=None)
    assert_close(out["loss"], loop_policy_loss(rows, config) + config.beta * loop_kl_loss(rows))
    assert out["attention_loss"] == 0
    given_anyway = total(t, config, audio_mass=t.audio_mass.requires_grad_())
    assert torch.equal(given_anyway["loss"], out["loss"])
    assert not given_anyway["loss"].requires_grad


@pytest.mark.parametrize("config", [
    MapoConfig(), MapoConfig(mask=False, eta=0.0), MapoConfig(importance_clip=1.3)],
    ids=["table5", "grpo", "importance"])
def test_old_logp_none_is_on_policy(config):
    """Without old_logp, ρ is 1 and carries the gradient: as if old_logp were logp, detached."""
    t = tensors(standard_rows(), NAN)
    leaf = t.logp.clone().requires_grad_()
    out = total(t, config, logp=leaf, old_logp=None)
    same = total(t, config, logp=leaf, old_logp=t.logp)
    assert all(torch.equal(out[name], same[name]) for name in LOSSES)
    gradient, = torch.autograd.grad(out["policy_loss"], leaf)
    expected, = torch.autograd.grad(same["policy_loss"], leaf)
    assert torch.equal(gradient, expected) and gradient.count_nonzero() > 0


def test_beta_zero_needs_no_ref_logp():
    """Eq. 5 at β = 0: ref_logp may be left out, and L_KL is then 0; with β > 0 it is needed."""
    t = tensors(standard_rows(), NAN)
    out = total(t, MapoConfig(beta=0.0), ref_logp=None)
    assert out["kl_loss"] == 0
    assert torch.equal(out["loss"], total(t, MapoConfig(beta=0.0))["loss"])
    with pytest.raises(ValueError, match="needs ref_logp when .*beta is 0.002"):
        total(t, MapoConfig(), ref_logp=None)


OPTIONAL = ["ref_logp", "delta_h", "audio_mass", "pos_gate", "accuracy_reward", "sampler_logp"]


@pytest.mark.parametrize("config, names", [
    (MapoConfig(), ["ref_logp", "delta_h", "audio_mass", "pos_gate", "accuracy_reward"]),
    (MapoConfig(eta=0.0), ["ref_logp", "delta_h"]),
    (MapoConfig(mask=False, beta=0.0), ["delta_h", "audio_mass", "pos_gate", "accuracy_reward"]),
    (MapoConfig(mask=False, eta=0.0, importance_clip=2.0), ["ref_logp", "sampler_logp"])])
def test_missing_input_is_named(config, names):
    """mapo_loss names the input that a setting reads and did not get, and names no other."""
    for name in names:
        with pytest.raises(ValueError, match=f"needs {name} when") as error:
            total(tensors(standard_rows()), config, **{name: None})
        assert not any(other in str(error.value) for other in OPTIONAL if other != name)
    total(tensors(standard_rows()), config, **{name: None for name in set(OPTIONAL) - set(names)})


def test_advantage_floor():
    """advantage_floor (release): |Â| is floored in Eq. 4 alone, and on failed completions alone."""
    rows = make_rows([5, 4, 3, 6], seed=11)
    for row, advantage, reward in zip(rows, [0.0, -0.1, 0.05, 2.0], [0.0, 0.0, 1.0, 0.0]):
        row.advantages, row.accuracy_reward = advantage, reward
        row.pos_gate = [1.0] * len(row.logp)
    t = tensors(rows, NAN)
    floored = mapo.floored_advantages(t.advantages, t.accuracy_reward, 0.0, 0.5)
    assert_close(floored, [0.5, 0.5, 0.05, 2.0])  # too small, too small, right, large enough
    off, on = total(t, MapoConfig()), total(t, MapoConfig(advantage_floor=0.5))
    assert_close(on["attention_loss"], loop_attention_loss(rows, MapoConfig(), advantage_floor=0.5))
    assert on["attention_loss"] > off["attention_loss"]
    assert all(torch.equal(on[name], off[name]) for name in ("policy_loss", "kl_loss"))


BAD = [("group_size", 1), ("group_size", 0), ("clip_ratio", -0.1), ("clip_ratio", 1.5),
       ("fail_gate_floor", -0.1), ("fail_gate_floor", 1.1), ("fail_threshold", INF),
       *((name, value) for name in ("eta", "kappa", "beta", "advantage_floor", "importance_clip")
         for value in (-0.1, INF)),
       *((name, value) for name in ("tau_base", "mask_clip", "prefactor_clip", "advantage_eps",
                                    "attention_eps")
         for value in (0.0, -1.0, INF)),
       *((field.name, NAN) for field in dataclasses.fields(MapoConfig) if field.type is float)]


@pytest.mark.parametrize("name, value", BAD)
def test_config_bad_value_is_named(name, value):
    """A value out of range raises ValueError, which names its field and what it must be."""
    with pytest.raises(ValueError, match=rf"^{name} is {value}: it must be a"):
        MapoConfig(**{name: value})


def test_config_accepts_the_edges():
    """The ends of our ranges, and of the ranges that Table 5 says were explored."""
    MapoConfig(group_size=2, clip_ratio=0.0, eta=0.0, kappa=0.0, fail_gate_floor=0.0,
               advantage_floor=0.0, beta=0.0)
    MapoConfig(clip_ratio=1.0, fail_gate_floor=1.0, fail_threshold=-1.0)
    MapoConfig(eta=0.5, tau_base=0.5, kappa=2.0, mask_clip=2.0, prefactor_clip=4.0, beta=0.02,
               group_size=4)


@pytest.mark.parametrize("rewards, group_size, message", [
    (torch.ones(4), 1, "group_size is 1"),
    (torch.ones(4), 0, "group_size is 0"),
    (torch.ones(8), 3, "multiple of 3"),
    (torch.ones(2, 4), 4, "rewards has shape"),
    (torch.tensor([1.0, NAN, 0.0, 0.0]), 2, "not finite"),
    (torch.tensor([1.0, 0.0, INF, 0.0]), 2, "not finite")])
def test_group_advantages_errors(rewards, group_size, message):
    """Sec. 2: no group of one, no incomplete group, no missing reward."""
    with pytest.raises(ValueError, match=message):
        mapo.group_advantages(rewards, group_size, 0.1)


# ─────────────────────────── 6. what other code bases pass in ─────────────────────────────────────


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.float32, torch.float16])
@pytest.mark.parametrize("name", EVERY_LOSS)
def test_masks_of_numbers(name, dtype):
    """A mask of zeros and ones gives what the bool mask gives, bit for bit, gradients too."""
    t = tensors(standard_rows(), NAN)
    loss, gradients = loss_and_gradients(name, t, CONFIGS[1])
    t.mask = t.mask.to(dtype)
    same_loss, same_gradients = loss_and_gradients(name, t, CONFIGS[1])
    assert torch.equal(loss, same_loss) and all(map(torch.equal, gradients, same_gradients))


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.float32, torch.float16])
def test_masks_of_numbers_in_the_small_functions(dtype):
    """The functions that take a mask, one by one: a mask of numbers makes no difference."""
    t, config = tensors(standard_rows()), MapoConfig()
    numbers = SimpleNamespace(**(vars(t) | {"mask": t.mask.to(dtype)}))
    for function in (lambda t: mapo.length_temperature(t.mask, 1.0),
                     lambda t: omega_of(t, config),
                     lambda t: nu_of(t, config),
                     lambda t: mapo.temporal_weight(t.mask, 1.0),
                     lambda t: mapo.sequence_mean(t.advantages, t.mask)):
        assert torch.equal(function(numbers), function(t))


def test_advantages_of_a_wrong_shape_are_named():
    """[B, T], even where T = B, [B, 1], [1] and a scalar: ValueError that gives the shape."""
    t, config = tensors(make_rows([4, 4, 3, 2], seed=5)), MapoConfig()
    right, gate = t.advantages, torch.ones(4, dtype=torch.float64)
    for wrong in (right[:, None].expand(4, 4), right[:, None], right[:1], right[0]):
        for function in (
                lambda: mapo.clipped_surrogate(t.logp, t.old_logp, wrong, 0.2),
                lambda: mapo.attention_prefactor(gate, wrong, 3.0),
                lambda: mapo.floored_advantages(wrong, t.accuracy_reward, 0.0, 0.1),
                lambda: attention(t, config, advantages=wrong),
                lambda: total(t, config, advantages=wrong),
                lambda: total(t, MapoConfig(mask=False, eta=0.0), advantages=wrong)):
            with pytest.raises(ValueError) as error:
                function()
            assert f"advantages has shape {tuple(wrong.shape)}: expected [4]" in str(error.value)
    with pytest.raises(ValueError, match=r"accuracy_reward has shape \(4, 1\)"):
        attention(t, config, accuracy_reward=t.accuracy_reward[:, None])


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.bool])
def test_rewards_of_integers(dtype):
    """Rewards of 0 and 1 as integers or bools give Â in the default float dtype."""
    rewards = [0, 1, 1, 0, 1, 0, 0, 0]
    actual = mapo.group_advantages(torch.tensor(rewards).to(dtype), 4, 0.1)
    assert actual.dtype == torch.get_default_dtype()
    assert_close(actual, loop_advantages(rewards, 4, 0.1), tol=1e-6)


def test_temporal_weight_counts_tokens():
    """Sec. 3.5: t counts the tokens under the mask, and skips holes (text that a tool wrote)."""
    mask = torch.tensor([[1, 0, 0, 1], [0, 1, 1, 1]])
    assert_close(mapo.temporal_weight(mask, 1.0), [[0.5, 0, 0, 1], [0, 1 / 3, 2 / 3, 1]])


@every_config
@every_poison
def test_holes_in_the_mask_change_nothing(poison, config):
    """Tokens spread over more columns, with poison between them, give the same losses."""
    rows = standard_rows()
    t, expected = tensors(rows), loop_total(rows, config)
    columns = torch.arange(t.mask.shape[1]) * 3 + 1  # two columns of poison between two tokens
    fill = poison[0] if isinstance(poison, tuple) else poison
    for name in (*PER_TOKEN, "mask"):
        value = getattr(t, name)
        spread = torch.full((len(rows), 3 * len(columns)), 0 if name == "mask" else fill,
                            dtype=value.dtype)
        spread[:, columns] = value
        setattr(t, name, spread)
    out = total(t, config)
    for name in LOSSES:
        assert_close(out[name], expected[name])


@pytest.mark.parametrize("dtype, log_ratio", [
    (torch.float64, 1000.0), (torch.float32, 100.0), (torch.bfloat16, 100.0),
    (torch.float16, 12.0)])
def test_exploding_ratio_gives_no_nan(dtype, log_ratio):
    """exp(log ρ) overflows: Â > 0 is clipped, Â = 0 gives 0, Â < 0 gives +inf, and nothing NaN."""
    logp = torch.full((3, 2), log_ratio, dtype=dtype, requires_grad=True)
    advantages = torch.tensor([1.0, 0.0, -1.0], dtype=dtype)
    surrogate = mapo.clipped_surrogate(logp, torch.zeros_like(logp), advantages, 0.2)
    gradient, = torch.autograd.grad(surrogate.sum(), logp)
    clipped = torch.tensor(-1.2, dtype=dtype).item()
    assert surrogate.tolist() == [[clipped] * 2, [0] * 2, [INF] * 2]
    assert gradient.tolist() == [[0] * 2, [0] * 2, [INF] * 2]


@every_config
def test_exploding_ratio_in_the_total(config):
    """Eq. 5 with one ρ of e^1000 where Â ≥ 0: every loss and gradient is finite."""
    t = tensors(standard_rows(), NAN)
    for b in (ONE_UNGATED, NO_ADVANTAGE):
        t.advantages[b] = t.advantages[b].abs()
        t.old_logp[b, 0] = t.logp[b, 0] - 1000
    leaf = t.logp.requires_grad_()
    out = total(t, config)
    assert all(out[name].isfinite() for name in LOSSES)
    assert torch.autograd.grad(out["loss"], leaf)[0].isfinite().all()


# ─────────────────────────────────────────── 7. float32 ───────────────────────────────────────────


@every_config
def test_float32(config):
    """float32 in, float32 out, and within 1e-5 of float64: losses, weights and gradients."""
    rows = standard_rows()
    results = {}
    for dtype in (torch.float32, torch.float64):
        t = tensors(rows, NAN, dtype=dtype)
        leaves = t.logp.requires_grad_(), t.audio_mass.requires_grad_()
        out = total(t, config)
        alone = attention(t, config), mapo.kl_loss(t.logp, t.ref_logp, t.mask)
        gradients = torch.autograd.grad(out["loss"], leaves)
        results[dtype] = [*(out[name] for name in LOSSES), out["omega"], *alone, *gradients]
    for single, double in zip(results[torch.float32], results[torch.float64]):
        assert single.dtype == torch.float32 and double.dtype == torch.float64
        torch.testing.assert_close(single.double(), double, rtol=1e-5, atol=1e-5)
