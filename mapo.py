"""MAPO, the equations: Modality-Aware Policy Optimization (arXiv 2605.27741), one function each.

Conventions
    B completions, T completion tokens (padded), L target layers, H heads.
    Per-token tensors are [B, T], completion-aligned and right-padded: column t−1 belongs to y_t, t = 1..T.
    `mask` is bool [B, T], True on the tokens of the completion (EOS included). Whatever stands under False, NaN
    included, changes no result and no gradient. T in an equation is the length of that completion, mask.sum(1).
    Entropies and log-probabilities are in nats.

Every function takes and returns tensors, imports torch alone and knows nothing of models or distribution. To use one
elsewhere, paste its source, and that of the helpers it names, under `import torch`.

In the paper's order: Sec. 2 (advantages), 3.2 (a_t), 3.3 (Δh), 3.4 (Eq. 1, 2), 3.5 (Eq. 3, 4), 2 (k3), 3.6 (Eq. 5).
"""

from dataclasses import dataclass, field

import torch


# ───────────────────────────────────────────── Sec. 2 and 3.2–3.3: the inputs ─────────────────────────────────────────


def group_advantages(rewards, group_size, eps):
    """Â⁽ᵍ⁾ = (r⁽ᵍ⁾ − mean(r)) / (std(r) + ε), over the G completions of one prompt.  (Sec. 2)

    rewards [B], the G completions of a prompt contiguous → [B]. std is the sample standard deviation (ddof 1, ours:
    the paper does not say). A group of equal rewards gets 0.
    Raises ValueError when group_size < 2, when it does not divide B, or when a reward is not finite.
    """
    if group_size < 2:
        raise ValueError(f"group_size is {group_size}: a group-relative advantage needs at least 2 completions a "
                         "prompt")
    if rewards.dim() != 1 or rewards.numel() % group_size:
        raise ValueError(f"rewards has shape {tuple(rewards.shape)}: expected [B] with B a multiple of {group_size}")
    if not rewards.is_floating_point() or not torch.isfinite(rewards).all():
        raise ValueError("rewards holds a value that is not finite, or is no float: every completion needs a reward")
    r = rewards.double().view(-1, group_size)  # [B/G, G]; in fp32 equal rewards would leave a rest after r − mean
    centred = r - r.mean(dim=1, keepdim=True)  # r − mean
    return (centred / (r.std(dim=1, keepdim=True) + eps)).view(-1).to(rewards.dtype)  # / (std + ε)


def audio_attention_mass(head_mass):
    """a_t = 1/|L_tgt| · Σ_{l ∈ L_tgt} max_h m_t⁽ˡʰ⁾,  where m_t⁽ˡʰ⁾ = Σ_{j ∈ S_audio} α_{t,j}⁽ˡʰ⁾.  (Sec. 3.2)

    head_mass [L, B, H, T], the mass m of each target layer and head, in [0, 1] → [B, T].
    On a tie one head gets the whole gradient (Eq. 13); `amax` would split it.
    """
    layer_mass = head_mass.max(dim=2).values  # m_t⁽ˡ,max⁾  [L, B, T]
    return layer_mass.mean(dim=0)  # [B, T]


def differential_entropy(text_ref_entropy, policy_entropy):
    """Δh_t = H(π_text-ref(·|y_<t, x_text)) − H(π_θ(·|y_<t, x)), detached.  (Sec. 3.3)

    Both [B, T], nats → [B, T]. Positive where the audio made the policy surer than the language prior is.
    """
    return (text_ref_entropy - policy_entropy).detach()


# ───────────────────────────────────────── Sec. 3.4: the reweighted policy gradient ───────────────────────────────────


def length_temperature(mask, tau_base):
    """τ_T = τ_base · ln(max(T, 2)).  (Sec. 3.4)

    mask [B, T] → [B, 1], float64 (only a bool comes in; the caller casts).
    """
    length = mask.sum(dim=1, keepdim=True).double()  # T  [B, 1]
    return tau_base * length.clamp(min=2).log()


def relevance_mask(delta_h, mask, tau_base, mask_clip):
    """ω̃_t = min( T · exp(|Δh_t|/τ_T) / Σ_t' exp(|Δh_t'|/τ_T),  C_mask ), detached.  (Eq. 1)

    delta_h [B, T], mask [B, T] → [B, T], 0 off the mask. Sums to T where nothing is capped.
    Needs length_temperature.
    """
    tau = length_temperature(mask, tau_base).to(delta_h.dtype)  # τ_T  [B, 1]
    logits = (delta_h.abs() / tau).masked_fill(~mask, float("-inf"))  # |Δh_t| / τ_T
    length = mask.sum(dim=1, keepdim=True)  # T  [B, 1]
    omega = (length * logits.softmax(dim=1)).clamp(max=mask_clip)  # min(T · softmax, C_mask)
    return omega.masked_fill(~mask, 0).detach()


def clipped_surrogate(logp, old_logp, advantages, clip_ratio):
    """ℓ_t = −min( ρ_t·Â, clip(ρ_t, 1−ϵ, 1+ϵ)·Â ),  ρ_t = exp(logp_t − old_logp_t).  (Sec. 2, 3.4)

    logp, old_logp [B, T]; advantages [B] → [B, T]. Per token: fill log-probs under padding with 0 first, as mapo_loss
    does, for exp has no finite gradient at a NaN.
    """
    ratio = (logp - old_logp).exp()  # ρ_t
    advantage = advantages.unsqueeze(1)  # Â  [B, 1]
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - clip_ratio, 1 + clip_ratio) * advantage)


def importance_weight(old_logp, sampler_logp, importance_clip):
    """w_t = min( π_old(y_t) / μ(y_t), C ), detached: ℓ_t ← w_t·ℓ_t in Eq. 2.  (ours: the paper has no such weight)

    Truncated importance sampling, the field's remedy where the completions come from another distribution μ than
    π_old: another engine's arithmetic, weights of an earlier push, top-k and top-p.
    old_logp, sampler_logp (log μ) [B, T] → [B, T]. Fill log-probs under padding with 0 first, as mapo_loss does.
    """
    return (old_logp - sampler_logp).exp().clamp(max=importance_clip).detach()


def sequence_mean(per_sequence, mask):
    """1/G · Σ_g x⁽ᵍ⁾: the mean over completions, the outermost sum of Eqs. 2 and 4.

    per_sequence [B], mask [B, T] → scalar. A completion whose mask is empty (`mask_truncated`) stands in neither the
    numerator nor the denominator; with no completion left the mean is 0.
    """
    counted = mask.any(dim=1)  # [B]
    return per_sequence.masked_fill(~counted, 0).sum() / counted.sum().clamp(min=1)


def policy_loss(surrogate, omega, mask):
    """L_PG(ω̃) = 1/G · Σ_g [ Σ_t ω̃_t·ℓ_t / Σ_t ω̃_t ].  (Eq. 2; with ω̃ ≡ 1 it is GRPO's 1/T)

    surrogate, omega, mask [B, T] → scalar. Needs sequence_mean.
    """
    surrogate, omega = surrogate.masked_fill(~mask, 0), omega.masked_fill(~mask, 0)
    weight_sum = omega.sum(dim=1).masked_fill(~mask.any(dim=1), 1)  # Σ ω̃; 1 where there is no token to weigh
    return sequence_mean((omega * surrogate).sum(dim=1) / weight_sum, mask)


# ──────────────────────────────────────────── Sec. 3.5: the attention loss branch ─────────────────────────────────────


def inverse_relevance_weight(delta_h, pos_gate, mask, tau_base, mask_clip):
    """ν̃_t = min( T_pos · g_t·exp(−|Δh_t|/τ_T) / Σ_t' g_t'·exp(−|Δh_t'|/τ_T),  C_mask ), detached.  (Eq. 3)

    delta_h, pos_gate (0/1), mask [B, T] → [B, T], 0 where g is 0. T_pos = Σ_t g_t; τ_T from the whole length T.
    Needs length_temperature.
    """
    gate = pos_gate.bool() & mask  # g_t
    tau = length_temperature(mask, tau_base).to(delta_h.dtype)  # τ_T  [B, 1]
    logits = (-delta_h.abs() / tau).masked_fill(~gate, float("-inf"))  # −|Δh_t| / τ_T on g = 1
    t_pos = gate.sum(dim=1, keepdim=True)  # T_pos  [B, 1]
    nu = (t_pos * logits.softmax(dim=1)).clamp(max=mask_clip)  # min(T_pos · softmax, C_mask)
    return nu.masked_fill(~gate, 0).detach()


def temporal_weight(mask, kappa):
    """(t/T)^κ, t = 1..T.  (Sec. 3.5; κ = 0 gives 1)

    mask [B, T] → [B, T], float64 (only a bool comes in; the caller casts), 0 off the mask.
    """
    t = torch.arange(1, mask.shape[1] + 1, device=mask.device, dtype=torch.float64)  # [T]
    length = mask.sum(dim=1, keepdim=True).clamp(min=1)  # T  [B, 1]
    return ((t / length) ** kappa).masked_fill(~mask, 0)


def failure_gate(accuracy_reward, threshold, floor):
    """f̂ = max( 𝟙[r_acc ≤ θ_fail], α ).  (Sec. 3.5; values of θ_fail and α from the release)

    accuracy_reward [B] → [B]: 1 for a failed completion, α for a successful one.
    """
    return (accuracy_reward <= threshold).to(accuracy_reward.dtype).clamp(min=floor)


def attention_prefactor(gate, advantages, prefactor_clip):
    """min( f̂·|Â|, C_pref ).  (Eq. 4)   gate, advantages [B] → [B], detached."""
    return (gate * advantages.abs()).clamp(max=prefactor_clip).detach()


def attention_penalty(audio_mass, eps):
    """ℓ_t^attn = −ln(a_t + ε).  (Sec. 3.5)   audio_mass [B, T] in [0, 1] → [B, T]."""
    return -(audio_mass + eps).log()


def attention_loss(audio_mass, delta_h, pos_gate, advantages, accuracy_reward, mask, *,
                   tau_base, mask_clip, kappa, fail_threshold, fail_gate_floor, prefactor_clip, eps):
    """L_attn = 1/G · Σ_g min(f̂·|Â|, C_pref) · 1/N_pos · Σ_t (t/T)^κ · ν̃_t · ℓ_t^attn.  (Eq. 4)

    audio_mass, delta_h, pos_gate, mask [B, T]; advantages, accuracy_reward [B] → scalar. N_pos = T_pos = Σ_t g_t. A
    completion with N_pos = 0 gives 0. The gradient flows through a_t alone (Eq. 12: ∂L/∂a_t = −Γ_t/(a_t + ε)).
    Needs inverse_relevance_weight, temporal_weight, failure_gate, attention_prefactor, attention_penalty,
    length_temperature, sequence_mean.
    """
    nu = inverse_relevance_weight(delta_h, pos_gate, mask, tau_base, mask_clip)  # ν̃_t  [B, T]
    time = temporal_weight(mask, kappa).to(nu.dtype)  # (t/T)^κ  [B, T]
    penalty = attention_penalty(audio_mass.masked_fill(~mask, 0), eps)  # ℓ_t^attn  [B, T]
    gate = failure_gate(accuracy_reward, fail_threshold, fail_gate_floor)  # f̂  [B]
    prefactor = attention_prefactor(gate, advantages, prefactor_clip)  # min(f̂·|Â|, C_pref)  [B]
    n_pos = (pos_gate.bool() & mask).sum(dim=1).clamp(min=1)  # N_pos; ν̃ ≡ 0 where it is 0  [B]
    return sequence_mean(prefactor * (time * nu * penalty).masked_fill(~mask, 0).sum(dim=1) / n_pos, mask)


# ────────────────────────────────────────────── Sec. 2 and 3.6: KL and the total ──────────────────────────────────────


def k3_kl(logp, ref_logp):
    """k3 = exp(r − l) − (r − l) − 1 per token, l = log π_θ(y_t), r = log π_ref(y_t).  (Sec. 2)

    logp, ref_logp [B, T] → [B, T], ≥ 0. Algorithm 1 line 9 calls it D_KL(π_ref ‖ π_θ); averaged over tokens sampled
    from π_θ, as here, the formula estimates D_KL(π_θ ‖ π_ref).
    """
    log_ratio = ref_logp - logp  # r − l
    return log_ratio.exp() - log_ratio - 1


def kl_loss(logp, ref_logp, mask):
    """L_KL = 1/G · Σ_g 1/T · Σ_t k3_t.  (Sec. 2; uniform 1/T, not ω̃)

    logp, ref_logp, mask [B, T] → scalar. Needs k3_kl, sequence_mean.
    """
    k3 = k3_kl(logp.masked_fill(~mask, 0), ref_logp.masked_fill(~mask, 0))
    length = mask.sum(dim=1).clamp(min=1)  # T  [B]
    return sequence_mean(k3.masked_fill(~mask, 0).sum(dim=1) / length, mask)


def mapo_loss(*, logp, old_logp, ref_logp, advantages, mask, config, policy_entropy=None, text_ref_entropy=None,
              audio_mass=None, pos_gate=None, accuracy_reward=None, sampler_logp=None):
    """L_MAPO = L_PG(ω̃) + β·L_KL + η·L_attn.  (Eq. 5)

    logp (with gradient), old_logp, ref_logp, policy_entropy, text_ref_entropy, audio_mass (with gradient), pos_gate,
    mask [B, T]; advantages, accuracy_reward [B]; config: a MapoConfig; sampler_logp [B, T]: the log-probs that the
    completions were sampled with, for `config.importance_clip` above 0 alone. With `config.mask` off (plain GRPO)
    ω̃ ≡ 1; with `config.eta` 0 the attention branch is not computed; what neither branch needs may be left out.
    Returns {"loss", "policy_loss", "kl_loss", "attention_loss"} (scalars; the last without η, 0 where off), "omega"
    [B, T], and "delta_h" [B, T] or None.
    Raises ValueError naming the input that a branch needs and did not get.
    Needs differential_entropy, relevance_mask, clipped_surrogate, importance_weight, policy_loss, kl_loss,
    attention_loss.
    """
    needs = {"policy_entropy": config.mask or config.eta > 0, "text_ref_entropy": config.mask or config.eta > 0,
             "audio_mass": config.eta > 0, "pos_gate": config.eta > 0, "accuracy_reward": config.eta > 0,
             "sampler_logp": config.importance_clip > 0}
    given = {"policy_entropy": policy_entropy, "text_ref_entropy": text_ref_entropy, "audio_mass": audio_mass,
             "pos_gate": pos_gate, "accuracy_reward": accuracy_reward,
             "sampler_logp": sampler_logp}
    missing = [name for name, needed in needs.items() if needed and given[name] is None]
    if missing:
        raise ValueError(f"mapo_loss needs {', '.join(missing)} when mask is {config.mask}, eta is {config.eta} and "
                         f"importance_clip is {config.importance_clip}")
    logp, old_logp, ref_logp = (x.masked_fill(~mask, 0) for x in (logp, old_logp, ref_logp))

    delta_h = None
    omega = mask.to(logp.dtype)  # GRPO: ω̃ ≡ 1
    if text_ref_entropy is not None and policy_entropy is not None:
        delta_h = differential_entropy(text_ref_entropy, policy_entropy).masked_fill(~mask, 0)  # Sec. 3.3
    if config.mask:
        omega = relevance_mask(delta_h, mask, config.tau_base, config.mask_clip)  # Eq. 1
    surrogate = clipped_surrogate(logp, old_logp, advantages, config.clip_ratio)
    if config.importance_clip > 0:  # ours; the paper's Eq. 2 has no such weight
        surrogate = surrogate * importance_weight(old_logp, sampler_logp.masked_fill(~mask, 0), config.importance_clip)
    parts = {"policy_loss": policy_loss(surrogate, omega, mask),  # Eq. 2
             "kl_loss": kl_loss(logp, ref_logp, mask),
             "attention_loss": logp.new_zeros(())}
    if config.eta > 0:
        # advantage_floor (release; 0 = off): |Â| of failed completions is at least this, in Eq. 4 alone.
        failed = accuracy_reward <= config.fail_threshold
        attention_advantages = torch.where(failed, advantages.abs().clamp(min=config.advantage_floor), advantages)
        parts["attention_loss"] = attention_loss(  # Eq. 4
            audio_mass, delta_h, pos_gate, attention_advantages, accuracy_reward, mask,
            tau_base=config.tau_base, mask_clip=config.mask_clip, kappa=config.kappa,
            fail_threshold=config.fail_threshold, fail_gate_floor=config.fail_gate_floor,
            prefactor_clip=config.prefactor_clip, eps=config.attention_eps)
    loss = parts["policy_loss"] + config.beta * parts["kl_loss"] + config.eta * parts["attention_loss"]  # Eq. 5
    return {"loss": loss, **parts, "omega": omega, "delta_h": delta_h}


# ───────────────────────────────────────────────────── Table 5 ────────────────────────────────────────────────────────


def _described(default, help):
    """A dataclass field with the text that --help shows."""
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class MapoConfig:
    """The values of Table 5 that the equations read. Each help text gives the symbol and the source of the default:
    paper, release (the authors' code), or ours. Raises ValueError naming the field when a value is out of range."""

    group_size: int = _described(8, "G, completions per prompt (paper, Table 5)")
    clip_ratio: float = _described(0.2, "ϵ of the clipped surrogate (paper, Table 5)")
    mask: bool = _described(True, "use the modality relevance mask ω̃ of Eq. 1; false is GRPO's uniform weight (paper, "
                             "Table 1)")
    tau_base: float = _described(1.0, "τ_base of the length-scaled temperature (paper, Table 5)")
    mask_clip: float = _described(5.0, "C_mask, cap of ω̃ and ν̃ (paper, Table 5)")
    eta: float = _described(0.1, "η, weight of the attention loss; 0 leaves the branch out (paper, Table 5)")
    kappa: float = _described(1.0, "κ, exponent of the temporal weight (paper, Table 5)")
    fail_threshold: float = _described(0.0, "θ_fail, accuracy reward at or under which a completion has failed "
                                       "(release)")
    fail_gate_floor: float = _described(0.1, "α, the gate f̂ of a successful completion (release)")
    prefactor_clip: float = _described(3.0, "C_pref, cap of f̂·|Â| (paper, Table 5)")
    advantage_eps: float = _described(0.1, "ε in the denominator of Â (paper, Table 5)")
    attention_eps: float = _described(0.1, "ε in −ln(a_t + ε) (paper, Table 5, one symbol with the ε of Â)")
    advantage_floor: float = _described(0.0, "floor of |Â| in Eq. 4 on failed completions; 0 is off (ours; 0.02 in "
                                        "the release)")
    beta: float = _described(0.002, "β, weight of the KL term (paper, Table 5)")
    importance_clip: float = _described(0.0, "C of the truncated importance weight min(π_old/μ, C) in Eq. 2; 0 leaves "
                                        "it out, 2 is usual (ours)")

    def __post_init__(self):
        if not isinstance(self.mask, bool):
            raise ValueError(f"mask is {self.mask!r}: it must be true or false")
        if not isinstance(self.group_size, int) or self.group_size < 2:
            raise ValueError(f"group_size is {self.group_size!r}: a group needs at least 2 completions")
        inf = float("inf")
        for name, low, high in (("clip_ratio", 0, 1), ("eta", 0, inf), ("kappa", 0, inf), ("beta", 0, inf),
                                ("fail_threshold", -inf, inf), ("fail_gate_floor", 0, 1), ("advantage_floor", 0, inf),
                                ("importance_clip", 0, inf)):
            self._check(name, low <= self._number(name) <= high, f"a finite number from {low} to {high}")
        for name in ("tau_base", "mask_clip", "prefactor_clip", "advantage_eps", "attention_eps"):
            self._check(name, self._number(name) > 0, "a finite number above 0")

    def _number(self, name):
        value = getattr(self, name)
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return value if is_number and abs(value) < float("inf") else float("nan")  # NaN fails every comparison

    def _check(self, name, fine, needed):
        if not fine:
            raise ValueError(f"{name} is {getattr(self, name)!r}: it must be {needed}")
