"""One completion of four tokens, from Δh to the loss, with numbers to check on paper.

A question asks which animal is heard. The policy answers "A cat meows", four tokens with the end
of the text, and the answer is wrong. All settings are those of Table 5.

Two constants make the arithmetic easy. T = 4, so τ_T = ln 4 = 1.386. And Δh is given in units of
u = ln 2 · ln 4 = 0.961 nats, so that exp(|Δh|/τ_T) is 2 for 1u, 4 for 2u and 8 for 3u.

      t   token   Δh    g   a     π_θ   π_old  π_ref
      1   A       −2u   0   0.05  0.5   0.5    0.5
      2   cat     +3u   1   0.40  0.6   0.4    0.3
      3   meows   +1u   1   0.15  0.4   0.8    0.8
      4   <eos>   −1u   0   0.70  0.8   0.8    0.8
"""

import pytest
import torch

import mapo

CONFIG = mapo.MapoConfig()
LN2, LN4 = 0.693147181, 1.386294361
U = 0.960906028  # ln 2 · ln 4
MASK = torch.ones(1, 4, dtype=torch.bool)


def row(*values):
    """[1, 4], one number per token."""
    return torch.tensor([values], dtype=torch.float64)


DELTA_H = row(-2 * U, 3 * U, 1 * U, -1 * U)
POS_GATE = row(0, 1, 1, 0)
AUDIO_MASS = row(0.05, 0.40, 0.15, 0.70)
LOGP = row(0.5, 0.6, 0.4, 0.8).log()
OLD_LOGP = row(0.5, 0.4, 0.8, 0.8).log()
REF_LOGP = row(0.5, 0.3, 0.8, 0.8).log()
ADVANTAGE = torch.tensor([-1.0], dtype=torch.float64)
ACCURACY = torch.tensor([0.0], dtype=torch.float64)  # wrong


def equals(tensor, *expected):
    """True if the numbers of a tensor are the expected ones, to 8 digits."""
    return tensor.flatten().tolist() == pytest.approx(expected, rel=1e-8, abs=1e-8)


def test_step_1_the_advantage():
    """Four completions of the prompt earned 0, 0.4, 0.4 and 0.4, and ours is the first.

    mean = 1.2/4 = 0.3; squared deviations 0.09 + 3 · 0.01 = 0.12; std = √(0.12/3) = 0.2.
    Â = (0 − 0.3)/(0.2 + 0.1) = −1, and +1/3 for the other three.
    """
    rewards = torch.tensor([0.0, 0.4, 0.4, 0.4], dtype=torch.float64)
    advantages = mapo.group_advantages(rewards, group_size=4, eps=CONFIG.advantage_eps)
    assert equals(advantages, -1, 1 / 3, 1 / 3, 1 / 3)


def test_step_2_the_relevance_mask():
    """Eq. 1. τ_T = ln 4. exp(|Δh|/τ_T) = 4, 8, 2, 2, and their sum is 16.

    ω̃ = 4 · (4, 8, 2, 2)/16 = 1, 2, 0.5, 0.5. None reaches C_mask = 5. The sum is T = 4.
    """
    assert equals(mapo.length_temperature(MASK, CONFIG.tau_base), LN4)
    omega = mapo.relevance_mask(DELTA_H, MASK, CONFIG.tau_base, CONFIG.mask_clip)
    assert equals(omega, 1, 2, 0.5, 0.5)


def test_step_3_the_policy_loss():
    """ρ = π_θ/π_old = 1, 1.5, 0.5, 1, clipped to 0.8–1.2: 1, 1.2, 0.8, 1.

    With Â = −1, ℓ = −min(−ρ, −clip ρ) = max(ρ, clip ρ) = 1, 1.5, 0.8, 1.
    Eq. 2: Σ ω̃ℓ = 1·1 + 2·1.5 + 0.5·0.8 + 0.5·1 = 4.9, and L_PG = 4.9/4 = 1.225.
    GRPO, where ω̃ is 1, has (1 + 1.5 + 0.8 + 1)/4 = 1.075.
    """
    surrogate = mapo.clipped_surrogate(LOGP, OLD_LOGP, ADVANTAGE, CONFIG.clip_ratio)
    assert equals(surrogate, 1, 1.5, 0.8, 1)
    assert equals(mapo.policy_loss(surrogate, row(1, 2, 0.5, 0.5), MASK), 4.9 / 4)
    assert equals(mapo.policy_loss(surrogate, row(1, 1, 1, 1), MASK), 4.3 / 4)


def test_step_4_the_kl_loss():
    """x = π_ref/π_θ = 1, 0.5, 2, 1, and k3 = x − ln x − 1 = 0, ln 2 − 0.5, 1 − ln 2, 0.

    The sum is (0.693 − 0.5) + (1 − 0.693) = 0.5, and L_KL = 0.5/4 = 0.125.
    """
    assert equals(mapo.k3_kl(LOGP, REF_LOGP), 0, LN2 - 0.5, 1 - LN2, 0)
    assert equals(mapo.kl_loss(LOGP, REF_LOGP, MASK), 0.125)


def test_step_5_the_inverse_relevance_weight():
    """Eq. 3. Two tokens have g = 1: T_pos = 2. exp(−|Δh|/τ_T) is 1/8 for "cat", 1/2 for "meows".

    The sum is 5/8. ν̃ = 2 · (1/8)/(5/8) = 0.4 for "cat", 2 · (1/2)/(5/8) = 1.6 for "meows".
    """
    nu = mapo.inverse_relevance_weight(DELTA_H, POS_GATE, MASK, CONFIG.tau_base, CONFIG.mask_clip)
    assert equals(nu, 0, 0.4, 1.6, 0)


def test_step_6_the_attention_loss():
    """t/T = 0.25, 0.5, 0.75, 1. ℓ^attn = −ln(a + 0.1) = −ln 0.5 = ln 2 for "cat", and for
    "meows" −ln 0.25 = ln 4 = 2 ln 2.

    The answer is wrong, so f̂ = 1, and min(f̂·|Â|, C_pref) = min(1, 3) = 1. N_pos = 2.
    Eq. 4: L_attn = 1 · 1/2 · (0.5 · 0.4 · ln 2 + 0.75 · 1.6 · 2 ln 2) = 1/2 · 2.6 ln 2 = 0.901.
    """
    assert equals(mapo.temporal_weight(MASK, CONFIG.kappa), 0.25, 0.5, 0.75, 1)
    penalty = mapo.attention_penalty(AUDIO_MASS, CONFIG.attention_eps)
    assert equals(penalty[:, 1:3], LN2, LN4)
    gate = mapo.failure_gate(ACCURACY, CONFIG.fail_threshold, CONFIG.fail_gate_floor)
    assert equals(gate, 1)
    assert equals(mapo.attention_prefactor(gate, ADVANTAGE, CONFIG.prefactor_clip), 1)
    loss = mapo.attention_loss(
        AUDIO_MASS, DELTA_H, POS_GATE, ADVANTAGE, ACCURACY, MASK, tau_base=CONFIG.tau_base,
        mask_clip=CONFIG.mask_clip, kappa=CONFIG.kappa, fail_threshold=CONFIG.fail_threshold,
        fail_gate_floor=CONFIG.fail_gate_floor, prefactor_clip=CONFIG.prefactor_clip,
        eps=CONFIG.attention_eps)
    assert equals(loss, 1.3 * LN2)


def test_step_7_the_total():
    """Eq. 5: L = 1.225 + 0.002 · 0.125 + 0.1 · 0.901 = 1.315."""
    out = mapo.mapo_loss(
        logp=LOGP, old_logp=OLD_LOGP, ref_logp=REF_LOGP, advantages=ADVANTAGE, mask=MASK,
        config=CONFIG, delta_h=DELTA_H, audio_mass=AUDIO_MASS, pos_gate=POS_GATE,
        accuracy_reward=ACCURACY)
    assert equals(out["policy_loss"], 1.225)
    assert equals(out["kl_loss"], 0.125)
    assert equals(out["attention_loss"], 1.3 * LN2)
    assert equals(out["loss"], 1.225 + 0.002 * 0.125 + 0.1 * 1.3 * LN2)
    assert round(out["loss"].item(), 3) == 1.315


def test_step_8_what_the_update_does():
    """A step against the gradients lowers the loss.

    Eq. 10: ∂L_PG/∂log π_t = −ω̃/Σω̃ · Âρ = (1/4)·1, (2/4)·1.5, 0, (0.5/4)·1 = 0.25, 0.75, 0, 0.125.
    The tokens of a wrong answer become less likely, most of all "cat", where the audio mattered
    most. "meows" is clipped: its probability has already fallen from 0.8 to 0.4.

    Eq. 12: ∂L_attn/∂a_t = −Γ_t/(a_t + ε) with Γ_t = 1/2 · (t/T) · ν̃_t: −0.1/0.5 = −0.2 for "cat",
    −0.6/0.25 = −2.4 for "meows". Both tokens attend more to the audio, "meows" above all.
    """
    logp, audio_mass = LOGP.clone().requires_grad_(), AUDIO_MASS.clone().requires_grad_()
    out = mapo.mapo_loss(
        logp=logp, old_logp=OLD_LOGP, ref_logp=REF_LOGP, advantages=ADVANTAGE, mask=MASK,
        config=CONFIG, delta_h=DELTA_H, audio_mass=audio_mass, pos_gate=POS_GATE,
        accuracy_reward=ACCURACY)
    policy_gradient, = torch.autograd.grad(out["policy_loss"], logp, retain_graph=True)
    mass_gradient, = torch.autograd.grad(out["attention_loss"], audio_mass)
    assert equals(policy_gradient, 0.25, 0.75, 0, 0.125)
    assert equals(mass_gradient, 0, -0.2, -2.4, 0)
