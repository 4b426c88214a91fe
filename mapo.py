"""The equations of MAPO, Modality-Aware Policy Optimization (arXiv 2605.27741), one function each.

Conventions
    B completions, L target layers, H heads, S keys, V vocabulary.
    Per-token tensors are [B, T], aligned with the completions and padded on the right to the
    longest one: column t−1 belongs to y_t.
    `mask` is [B, T], bool or 0/1 numbers: true on the tokens of the completion, EOS included. It
    may have holes, such as tool output inside a completion. In an equation T is the number of
    tokens under the mask of a completion, and t counts them.
    Functions that take `mask` ignore what is off it, NaN included. The others say what to fill in.
    Entropies and log-probabilities are in nats.

To use a function in your own code, paste it under `import torch`, together with what its docstring
lists after "Needs". The order is that of a training step: the inputs (Sec. 2, 3.2, 3.3), Eqs. 1
and 2 (Sec. 3.4), Eqs. 3 and 4 (Sec. 3.5), KL, Eq. 5 (Sec. 3.6), Table 5.
"""

from dataclasses import dataclass, field

import torch


# ──────── Sec. 2 and 3.2–3.3: the inputs ────────


def group_advantages(rewards, group_size, eps):
    """Â⁽ᵍ⁾ = (r⁽ᵍ⁾ − mean(r)) / (std(r) + ε), over the G completions of one prompt.  (Sec. 2)

    rewards [B], the G completions of a prompt side by side → [B], in the dtype of the rewards
    (integers give the default float dtype). std is the sample standard deviation (ddof 1; ours, the
    paper does not say which). A group of equal rewards gets 0.
    Raises ValueError when group_size is below 2 or does not divide B, or a reward is not finite.
    """
    if group_size < 2:
        raise ValueError(f"group_size is {group_size}: a group-relative advantage needs at least 2 "
                         "completions per prompt")
    if rewards.dim() != 1 or rewards.numel() % group_size:
        raise ValueError(f"rewards has shape {tuple(rewards.shape)}: expected [B] with B a "
                         f"multiple of {group_size}")
    dtype = rewards.dtype if rewards.is_floating_point() else torch.get_default_dtype()
    r = rewards.double().view(-1, group_size)  # [B/G, G]; fp32 would round the mean
    if not torch.isfinite(r).all():
        raise ValueError("rewards has a value that is not finite: every completion needs a reward")
    centred = r - r.mean(dim=1, keepdim=True)
    return (centred / (r.std(dim=1, keepdim=True) + eps)).view(-1).to(dtype)


def token_logp(logits, token_ids):
    """log π(y_t | y_<t, x) = z_t[y_t] − ln Σ_v exp(z_t[v]).  (used in Sec. 2)

    logits z [..., V], already divided by the sampling temperature; token_ids [...] → [...], in the
    dtype of the logits (convert bf16 logits to float32 first). z_t are the logits at the position
    that *predicts* y_t, whose input is y_{t−1}.
    model.token_statistics computes the same from hidden states, in blocks of the vocabulary.
    """
    return logits.log_softmax(dim=-1).gather(-1, token_ids.unsqueeze(-1)).squeeze(-1)


def head_audio_mass(attention, is_audio):
    """m_t⁽ˡʰ⁾ = Σ_{j ∈ S_audio} α_{t,j}⁽ˡʰ⁾, the attention of each head on the audio.  (Sec. 3.2)

    attention α [B, H, T, S], the softmax of one layer; is_audio [B, S], true on the audio tokens →
    [B, H, T]. Query t is the position that *predicts* y_t, as for Δh_t and ρ_t (ours: the paper
    says "generation position t").
    attention.AudioMass computes the same from queries and keys, a block of positions at a time.
    """
    not_audio = ~is_audio.bool()[:, None, None, :]  # j ∉ S_audio  [B, 1, 1, S]
    return attention.masked_fill(not_audio, 0).sum(dim=-1)


def audio_attention_mass(head_mass):
    """a_t = 1/|L_tgt| · Σ_{l ∈ L_tgt} max_h m_t⁽ˡʰ⁾.  (Sec. 3.2)

    head_mass [L, B, H, T], the m of each target layer and head, in [0, 1] → [B, T].
    On a tie one head gets the whole gradient (Eq. 13); `amax` would split it.
    """
    layer_mass = head_mass.max(dim=2).values  # m_t⁽ˡ,max⁾  [L, B, T]
    return layer_mass.mean(dim=0)  # [B, T]


def token_entropy(logits):
    """H(π(·|y_<t, x)) = −Σ_v π(v) ln π(v), with π = softmax(z_t).  (used in Sec. 3.3)

    logits z [..., V], finite, already divided by the sampling temperature → [...], in the dtype of
    the logits (convert bf16 logits to float32 first).
    model.token_statistics computes the same from hidden states, in blocks of the vocabulary.
    """
    log_pi = logits.log_softmax(dim=-1)
    return -(log_pi.exp() * log_pi).sum(dim=-1)


def differential_entropy(text_ref_entropy, policy_entropy):
    """Δh_t = H(π_text-ref(·|y_<t, x_text)) − H(π_θ(·|y_<t, x)), detached.  (Sec. 3.3)

    Both [B, T], nats → [B, T]. Positive where the policy, which hears the audio, is more certain
    than the text-only reference.
    """
    return (text_ref_entropy - policy_entropy).detach()


# ──────── Sec. 3.4: the reweighted policy gradient ────────


def length_temperature(mask, tau_base):
    """τ_T = τ_base · ln(max(T, 2)).  (Sec. 3.4)

    mask [B, T] → [B, 1], in float64; callers convert.
    """
    length = mask.bool().sum(dim=1, keepdim=True).double()  # T  [B, 1]
    return tau_base * length.clamp(min=2).log()


def relevance_mask(delta_h, mask, tau_base, mask_clip):
    """ω̃_t = min( T · exp(|Δh_t|/τ_T) / Σ_t' exp(|Δh_t'|/τ_T),  C_mask ), detached.  (Eq. 1)

    delta_h, mask [B, T] → [B, T], 0 off the mask. Sums to T where nothing is capped.
    Needs length_temperature.
    """
    mask = mask.bool()
    tau = length_temperature(mask, tau_base).to(delta_h.dtype)  # τ_T  [B, 1]
    logits = (delta_h.abs() / tau).masked_fill(~mask, float("-inf"))  # |Δh_t| / τ_T
    length = mask.sum(dim=1, keepdim=True)  # T  [B, 1]
    omega = (length * logits.softmax(dim=1)).clamp(max=mask_clip)  # min(T · softmax, C_mask)
    return omega.masked_fill(~mask, 0).detach()


def clipped_surrogate(logp, old_logp, advantages, clip_ratio):
    """ℓ_t = −min( ρ_t·Â, clip(ρ_t, 1−ϵ, 1+ϵ)·Â ),  ρ_t = exp(logp_t − old_logp_t).  (Sec. 2, 3.4)

    logp, old_logp [B, T]; advantages [B] → [B, T]. It takes no mask: fill log-probabilities off the
    mask with 0 first, as mapo_loss does, because the gradient of exp at NaN is NaN.
    Raises ValueError when advantages is not [B]. Needs _check_per_completion.
    """
    _check_per_completion(len(logp), advantages=advantages)
    advantage = advantages.unsqueeze(1)  # Â  [B, 1]
    log_ratio = logp - old_logp  # ln ρ_t
    # For Â ≥ 0, ρ above 1 + ϵ is clipped anyway. This cap leaves ρ > 1 + ϵ, so nothing changes, but
    # exp cannot overflow (0·∞ is NaN). For Â < 0 an overflow is a loss of +∞, which is visible.
    log_ratio = torch.where(advantage >= 0, log_ratio.clamp(max=1 + clip_ratio), log_ratio)
    ratio = log_ratio.exp()  # ρ_t
    clipped = ratio.clamp(1 - clip_ratio, 1 + clip_ratio)  # clip(ρ_t, 1−ϵ, 1+ϵ)
    return -torch.minimum(ratio * advantage, clipped * advantage)


def importance_weight(old_logp, sampler_logp, importance_clip):
    """w_t = min( π_old(y_t) / μ(y_t), C ), detached: ℓ_t ← w_t·ℓ_t in Eq. 2.  (ours)

    The paper has no such weight. Truncated importance sampling corrects for completions that come
    from a distribution μ other than π_old: an engine that computes differently, older weights,
    top-k and top-p.
    old_logp, sampler_logp (log μ) [B, T] → [B, T]. Fill log-probabilities off the mask with 0
    first, as mapo_loss does.
    """
    return (old_logp - sampler_logp).exp().clamp(max=importance_clip).detach()


def sequence_mean(per_sequence, mask):
    """1/G · Σ_g x⁽ᵍ⁾: the mean over completions, the outermost sum of Eqs. 2 and 4.

    per_sequence [B], mask [B, T] → scalar. For whole groups it equals the mean over prompts of the
    paper's 1/G Σ_g. A completion with an empty mask (left out because it was truncated) does not
    count; with none left the mean is 0. To split a step into micro-batches, multiply the loss of
    each by (completions that count in the micro-batch) / (completions that count in the step).
    """
    counted = mask.bool().any(dim=1)  # [B]
    return per_sequence.masked_fill(~counted, 0).sum() / counted.sum().clamp(min=1)


def policy_loss(surrogate, omega, mask):
    """L_PG(ω̃) = 1/G · Σ_g [ Σ_t ω̃_t·ℓ_t / Σ_t ω̃_t ].  (Eq. 2; with ω̃ ≡ 1 it is GRPO's 1/T)

    surrogate, omega, mask [B, T] → scalar. Needs sequence_mean.
    """
    mask = mask.bool()
    surrogate, omega = surrogate.masked_fill(~mask, 0), omega.masked_fill(~mask, 0)
    weight_sum = omega.sum(dim=1).masked_fill(~mask.any(dim=1), 1)  # Σ ω̃; 1 for an empty mask  [B]
    return sequence_mean((omega * surrogate).sum(dim=1) / weight_sum, mask)


# ──────── Sec. 3.5: the attention loss ────────


def inverse_relevance_weight(delta_h, pos_gate, mask, tau_base, mask_clip):
    """ν̃_t = min( T_pos · g_t·exp(−|Δh_t|/τ_T) / Σ_t' g_t'·exp(−|Δh_t'|/τ_T),  C_mask ).  (Eq. 3)

    Detached. delta_h, pos_gate g (0 or 1), mask [B, T] → [B, T], 0 where g is 0. T_pos = Σ_t g_t;
    τ_T is that of the whole length T.
    Needs length_temperature.
    """
    mask = mask.bool()
    gate = pos_gate.bool() & mask  # g_t
    tau = length_temperature(mask, tau_base).to(delta_h.dtype)  # τ_T  [B, 1]
    logits = (-delta_h.abs() / tau).masked_fill(~gate, float("-inf"))  # −|Δh_t| / τ_T on g = 1
    t_pos = gate.sum(dim=1, keepdim=True)  # T_pos  [B, 1]
    nu = (t_pos * logits.softmax(dim=1)).clamp(max=mask_clip)  # min(T_pos · softmax, C_mask)
    return nu.masked_fill(~gate, 0).detach()


def temporal_weight(mask, kappa):
    """(t/T)^κ, t = 1..T.  (Sec. 3.5; κ = 0 gives 1)

    mask [B, T] → [B, T], 0 off the mask, in float64; callers convert. t counts the tokens under the
    mask, so the last of them has weight 1.
    """
    mask = mask.bool()
    t = mask.cumsum(dim=1).double()  # 1..T  [B, T]
    length = mask.sum(dim=1, keepdim=True).clamp(min=1)  # T  [B, 1]
    return ((t / length) ** kappa).masked_fill(~mask, 0)


def failure_gate(accuracy_reward, threshold, floor):
    """f̂ = max( 𝟙[r_acc ≤ θ_fail], α ).  (Sec. 3.5; the values of θ_fail and α: release)

    accuracy_reward [B], float → [B]: 1 for a failed completion, α (`floor`) for a successful one.
    """
    return (accuracy_reward <= threshold).to(accuracy_reward.dtype).clamp(min=floor)


def floored_advantages(advantages, accuracy_reward, threshold, floor):
    """max(|Â|, floor) on failed completions, |Â| on the others, for Eq. 4.  (release; 0 is off)

    Where every completion of a group fails, Â and Eq. 4 are 0; the floor keeps the loss alive.
    advantages, accuracy_reward [B] → [B].
    Raises ValueError when one of them is not [B]. Needs _check_per_completion.
    """
    batch_size = len(accuracy_reward)
    _check_per_completion(batch_size, advantages=advantages, accuracy_reward=accuracy_reward)
    failed = accuracy_reward <= threshold
    return torch.where(failed, advantages.abs().clamp(min=floor), advantages.abs())


def attention_prefactor(gate, advantages, prefactor_clip):
    """min( f̂·|Â|, C_pref ), detached.  (Eq. 4)

    gate f̂, advantages [B] → [B].
    Raises ValueError when one of them is not [B]. Needs _check_per_completion.
    """
    _check_per_completion(len(gate), gate=gate, advantages=advantages)
    return (gate * advantages.abs()).clamp(max=prefactor_clip).detach()


def attention_penalty(audio_mass, eps):
    """ℓ_t^attn = −ln(a_t + ε), a_t [B, T] in [0, 1], 0 off the mask → [B, T].  (Sec. 3.5)"""
    return -(audio_mass + eps).log()


def attention_loss(audio_mass, delta_h, pos_gate, advantages, accuracy_reward, mask, *, tau_base,
                   mask_clip, kappa, fail_threshold, fail_gate_floor, prefactor_clip, eps):
    """L_attn = 1/G · Σ_g min(f̂·|Â|, C_pref) · 1/N_pos · Σ_t (t/T)^κ · ν̃_t · ℓ_t^attn.  (Eq. 4)

    audio_mass a_t (with gradient), delta_h, pos_gate (0 or 1), mask [B, T]; advantages,
    accuracy_reward (r_acc, not multiplied by λ) [B] → scalar, not multiplied by η. The keywords
    are fields of MapoConfig, which explains them (eps is its attention_eps).
    N_pos = T_pos = Σ_t g_t (ours: the paper has two symbols); a completion with N_pos = 0 gives 0.
    The gradient flows through a_t alone (Eq. 12): ∂L/∂a_t = −Γ_t/(a_t + ε), where Γ_t is all that
    multiplies ℓ_t^attn, here with 1/G and C_pref.
    Raises ValueError when advantages or accuracy_reward is not [B].
    Needs inverse_relevance_weight, length_temperature, temporal_weight, attention_penalty,
    failure_gate, attention_prefactor, _check_per_completion, sequence_mean.
    """
    _check_per_completion(len(mask), advantages=advantages, accuracy_reward=accuracy_reward)
    mask = mask.bool()
    nu = inverse_relevance_weight(delta_h, pos_gate, mask, tau_base, mask_clip)  # ν̃_t  [B, T]
    time = temporal_weight(mask, kappa).to(nu.dtype)  # (t/T)^κ  [B, T]
    penalty = attention_penalty(audio_mass.masked_fill(~mask, 0), eps)  # ℓ_t^attn  [B, T]
    gate = failure_gate(accuracy_reward, fail_threshold, fail_gate_floor)  # f̂  [B]
    prefactor = attention_prefactor(gate, advantages, prefactor_clip)  # min(f̂·|Â|, C_pref)  [B]
    n_pos = (pos_gate.bool() & mask).sum(dim=1).clamp(min=1)  # N_pos; ν̃ ≡ 0 where it is 0  [B]
    token_sum = (time * nu * penalty).masked_fill(~mask, 0).sum(dim=1)  # Σ_t  [B]
    return sequence_mean(prefactor * token_sum / n_pos, mask)


# ──────── Sec. 2 and 3.6: KL and the total ────────


def k3_kl(logp, ref_logp):
    """k3 = exp(r − l) − (r − l) − 1 per token, l = log π_θ(y_t), r = log π_ref(y_t).  (Sec. 2)

    logp, ref_logp [B, T] → [B, T], ≥ 0. Fill off-mask values with 0 first, as kl_loss does.
    Averaged over tokens sampled from π_θ itself, the *value* estimates D_KL(π_θ ‖ π_ref). The
    expected *gradient* is exactly ∇D_KL(π_ref ‖ π_θ), and not ∇D_KL(π_θ ‖ π_ref). So Algorithm 1,
    line 9, names what is optimised: D_KL(π_ref ‖ π_θ).
    """
    log_ratio = ref_logp - logp  # r − l
    return log_ratio.exp() - log_ratio - 1


def kl_loss(logp, ref_logp, mask):
    """L_KL = 1/G · Σ_g 1/T · Σ_t k3_t.  (Sec. 2; uniform 1/T, not ω̃)

    logp, ref_logp, mask [B, T] → scalar. Needs k3_kl, sequence_mean.
    """
    mask = mask.bool()
    k3 = k3_kl(logp.masked_fill(~mask, 0), ref_logp.masked_fill(~mask, 0))
    length = mask.sum(dim=1).clamp(min=1)  # T  [B]
    return sequence_mean(k3.masked_fill(~mask, 0).sum(dim=1) / length, mask)


def mapo_loss(*, logp, advantages, mask, config, old_logp=None, ref_logp=None, delta_h=None,
              audio_mass=None, pos_gate=None, accuracy_reward=None, sampler_logp=None):
    """L_MAPO = L_PG(ω̃) + β·L_KL + η·L_attn.  (Eq. 5)

    Always: logp (with gradient), mask [B, T]; advantages [B]; config: a MapoConfig, or its fields.
    old_logp [B, T]: None is on-policy, where ρ_t = 1 in value and still carries the gradient.
    ref_logp [B, T]: needed when beta > 0; without it L_KL is 0.
    delta_h [B, T], from differential_entropy: needed when config.mask is true or eta > 0. With
    config.mask false ω̃ ≡ 1, which is GRPO.
    audio_mass (with gradient), pos_gate [B, T], accuracy_reward [B]: needed when eta > 0; with
    eta 0 the attention loss is not computed.
    sampler_logp [B, T], the log-probabilities that the completions were sampled with: needed when
    importance_clip > 0.

    Returns {"loss", "policy_loss", "kl_loss", "attention_loss"}, scalars (the last two not yet
    multiplied by β and η), and "omega" [B, T]. Each loss is a mean over the completions that count
    in this call. To split a step into micro-batches, multiply each "loss" by
        (completions that count in the micro-batch) / (completions that count in the step).

    Raises ValueError naming an input that is needed and missing, or advantages that are not [B].
    Needs length_temperature, relevance_mask, clipped_surrogate, importance_weight, sequence_mean,
    policy_loss, k3_kl, kl_loss, floored_advantages, inverse_relevance_weight, temporal_weight,
    failure_gate, attention_prefactor, attention_penalty, attention_loss, _check_given,
    _check_per_completion.
    """
    _check_given(config, ref_logp=ref_logp, delta_h=delta_h, audio_mass=audio_mass,
                 pos_gate=pos_gate, accuracy_reward=accuracy_reward, sampler_logp=sampler_logp)
    mask = mask.bool()
    logp = logp.masked_fill(~mask, 0)
    old_logp = logp.detach() if old_logp is None else old_logp.masked_fill(~mask, 0)

    if config.mask:
        omega = relevance_mask(delta_h, mask, config.tau_base, config.mask_clip)  # Eq. 1
    else:
        omega = mask.to(logp.dtype)  # ω̃ ≡ 1: GRPO
    surrogate = clipped_surrogate(logp, old_logp, advantages, config.clip_ratio)  # ℓ_t
    if config.importance_clip > 0:  # ours
        sampler_logp = sampler_logp.masked_fill(~mask, 0)
        surrogate = surrogate * importance_weight(old_logp, sampler_logp, config.importance_clip)
    l_pg = policy_loss(surrogate, omega, mask)  # Eq. 2

    l_kl = l_attn = logp.new_zeros(())
    if ref_logp is not None:
        l_kl = kl_loss(logp, ref_logp, mask)  # Sec. 2
    if config.eta > 0:
        floored = floored_advantages(  # release; off by default
            advantages, accuracy_reward, config.fail_threshold, config.advantage_floor)
        l_attn = attention_loss(  # Eq. 4
            audio_mass, delta_h, pos_gate, floored, accuracy_reward, mask,
            tau_base=config.tau_base, mask_clip=config.mask_clip, kappa=config.kappa,
            fail_threshold=config.fail_threshold, fail_gate_floor=config.fail_gate_floor,
            prefactor_clip=config.prefactor_clip, eps=config.attention_eps)

    loss = l_pg + config.beta * l_kl + config.eta * l_attn  # Eq. 5
    return {"loss": loss, "policy_loss": l_pg, "kl_loss": l_kl, "attention_loss": l_attn,
            "omega": omega}


# ──────── checks of the inputs ────────


def _check_per_completion(batch_size, **values):
    """Raises ValueError unless every value is [B], one number per completion."""
    for name, value in values.items():
        if value.shape != (batch_size,):
            raise ValueError(f"{name} has shape {tuple(value.shape)}: expected [{batch_size}], "
                             "one number per completion")


def _check_given(config, **inputs):
    """Raises ValueError naming each input that is None although the config reads it."""
    read = {"ref_logp": config.beta > 0, "delta_h": config.mask or config.eta > 0,
            "audio_mass": config.eta > 0, "pos_gate": config.eta > 0,
            "accuracy_reward": config.eta > 0, "sampler_logp": config.importance_clip > 0}
    missing = [name for name, value in inputs.items() if value is None and read[name]]
    if missing:
        raise ValueError(f"mapo_loss needs {', '.join(missing)} when mask is {config.mask}, eta is "
                         f"{config.eta}, beta is {config.beta} and importance_clip is "
                         f"{config.importance_clip}")


# ──────── Table 5 ────────


def described(default, text):
    """A dataclass field with the text that --help shows. Needs `from dataclasses import field`."""
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class MapoConfig:
    """The settings of the equations, with the values of Table 5 where it has them.

    mapo_loss does not read group_size and advantage_eps: they belong to group_advantages.
    Each help text gives the symbol and the source of the default: paper, release (the authors'
    code), or ours. Raises ValueError naming the field when a value is out of range.
    Needs `from dataclasses import dataclass, field` and described.
    """

    group_size: int = described(8, "G, completions per prompt (paper, Table 5)")
    clip_ratio: float = described(0.2, "ϵ of the clipped surrogate (paper, Table 5)")
    mask: bool = described(
        True, "weight tokens by the modality relevance mask ω̃ of Eq. 1; false is GRPO's uniform "
        "weight (paper, Table 1)")
    tau_base: float = described(1.0, "τ_base of the length-scaled temperature (paper, Table 5)")
    mask_clip: float = described(5.0, "C_mask, cap of ω̃ and ν̃ (paper, Table 5)")
    eta: float = described(0.1, "η, weight of the attention loss; 0 is off (paper, Table 5)")
    kappa: float = described(1.0, "κ, exponent of the temporal weight (paper, Table 5)")
    fail_threshold: float = described(
        0.0, "θ_fail: a completion has failed when its accuracy reward is at most this (release)")
    fail_gate_floor: float = described(0.1, "α, the gate f̂ of a successful completion (release)")
    prefactor_clip: float = described(
        3.0, "C_pref, cap of f̂·|Â| in Eq. 4; Eq. 11 leaves it out (paper, Table 5, whose search "
        "range is [4, 5]; with G = 8 no |Â| reaches 3)")
    advantage_eps: float = described(
        0.1, "ε in the denominator of Â (paper, Table 5: \"Advantage Floor / Stability ε\", "
        "searched in [0, 0.1])")
    attention_eps: float = described(
        0.1, "ε in −ln(a_t + ε) (paper, Table 5: the same symbol as the ε of Â)")
    advantage_floor: float = described(
        0.0, "floor of |Â| in Eq. 4 on failed completions; 0 turns it off (release: 0.02; the "
        "paper's equations have no floor)")
    beta: float = described(0.002, "β, weight of the KL term (paper, Table 5)")
    importance_clip: float = described(
        0.0, "C of the truncated importance weight min(π_old/μ, C) in Eq. 2; 0 leaves the weight "
        "out, 2 is usual (ours)")

    def __post_init__(self):
        if not isinstance(self.mask, bool):
            raise ValueError(f"mask is {self.mask!r}: it must be true or false")
        if not isinstance(self.group_size, int) or self.group_size < 2:
            raise ValueError(f"group_size is {self.group_size!r}: it must be an integer, 2 or more")
        finite = self._number("fail_threshold") < float("inf")
        self._check("fail_threshold", finite, "a finite number")
        for name in ("clip_ratio", "fail_gate_floor"):
            self._check(name, 0 <= self._number(name) <= 1, "a number from 0 to 1")
        for name in ("eta", "kappa", "advantage_floor", "beta", "importance_clip"):
            self._check(name, self._number(name) >= 0, "a finite number, 0 or more")
        for name in ("tau_base", "mask_clip", "prefactor_clip", "advantage_eps", "attention_eps"):
            self._check(name, self._number(name) > 0, "a finite number above 0")

    def _number(self, name):
        """The value of a field if it is a finite number, else NaN, which fails every comparison."""
        value = getattr(self, name)
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return value if is_number and abs(value) < float("inf") else float("nan")

    def _check(self, name, fine, needed):
        if not fine:
            raise ValueError(f"{name} is {getattr(self, name)!r}: it must be {needed}")
