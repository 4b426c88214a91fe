"""MAPO in verl: the policy loss L_PG(ω̃) of Eq. 2, in verl's registry, and ω̃ for the batch.

    # Settings of verl 0.9.1; PYTHONPATH holds the repository and its examples/
    export VERL_USE_EXTERNAL_MODULES=verl_mapo
    actor_rollout_ref.actor.policy_loss.loss_mode=mapo
    actor_rollout_ref.actor.loss_agg_mode=seq-mean-token-mean
    actor_rollout_ref.actor.use_kl_loss=True actor_rollout_ref.actor.kl_loss_coef=0.002

The last line is β·L_KL: verl adds it itself, and its low_var_kl (the default) is k3.

verl calls a registered loss with log-probabilities, advantages, a mask and `rollout_is_weights`.
There is no slot for ω̃, so it travels as `rollout_is_weights`. That slot belongs to verl's rollout
correction, which must be off. verl's own trainer does not compute ω̃, so the settings alone end in
an error: derive a trainer from it that calls add_relevance_mask(batch, MapoConfig()) once per
generation batch, after verl has computed the log-probabilities of π_old. The batch then needs
    entropys            H(π_old(·|y_<t, x)), which verl's _compute_old_log_prob returns
    text_ref_entropys   H(π_text-ref(·|y_<t, x_text)): a pass of the reference worker on the prompts
                        without audio, with calculate_entropy=True

What differs from train.py:
    - ω̃ is that of π_old. It is Eq. 1 at the first update of a generation batch. At later updates
      π_θ has moved, and ω̃ has not.
    - Â is verl's (adv_estimator=grpo), with ε = 1e-6.
    - There is no attention loss, because a registered loss gets no attention weights.
    - verl's "vanilla" loss also caps ρ at clip_ratio_c = 3 where Â < 0. MAPO does not.
Tested on CPUs: the registry, and verl's ppo_loss around it. Not run: verl's trainer and workers.
"""

from verl.trainer.ppo.core_algos import agg_loss, register_policy_loss

from mapo import clipped_surrogate, differential_entropy, relevance_mask


def add_relevance_mask(batch, config):
    """Puts ω̃ of Eq. 1 into the batch, as "rollout_is_weights" [B, T].

    batch: a dict or TensorDict with response_mask, entropys and text_ref_entropys, [B, T] each.
    config: a MapoConfig. With config.mask false ω̃ ≡ 1, which is GRPO.
    Raises ValueError when a key is missing, or the slot is taken by verl's rollout correction.
    """
    missing = {"response_mask", "entropys", "text_ref_entropys"} - set(batch.keys())
    if missing:
        raise ValueError(f"the batch lacks {', '.join(sorted(missing))}, which ω̃ is made of")
    if "rollout_is_weights" in batch.keys():
        raise ValueError("the batch has rollout_is_weights, where ω̃ travels: turn off "
                         "algorithm.rollout_correction")
    mask = batch["response_mask"].bool()
    delta_h = differential_entropy(batch["text_ref_entropys"], batch["entropys"])
    omega = relevance_mask(delta_h, mask, config.tau_base, config.mask_clip)
    batch["rollout_is_weights"] = omega if config.mask else mask.to(omega.dtype)


@register_policy_loss("mapo")
def mapo_policy_loss(old_log_prob, log_prob, advantages, response_mask,
                     loss_agg_mode="token-mean", config=None, rollout_is_weights=None):
    """L_PG(ω̃) = 1/G · Σ_g [ Σ_t ω̃_t·ℓ_t / Σ_t ω̃_t ], as verl calls it → (loss, metrics).  (Eq. 2)

    All tensors are [B, T]; rollout_is_weights is ω̃. verl adds up the losses of the micro-batches of
    a global batch, so its agg_loss divides by the number of completions in the global batch. That
    number includes empty completions, which mapo.policy_loss leaves out.
    Raises ValueError when ω̃ is missing, or a setting of the actor asks for another loss than Eq. 2.
    """
    if rollout_is_weights is None:
        raise ValueError("the batch has no rollout_is_weights: call add_relevance_mask on it")
    if loss_agg_mode != "seq-mean-token-mean":
        raise ValueError(f"actor.loss_agg_mode is {loss_agg_mode}: MAPO's is seq-mean-token-mean")
    if not config.clip_ratio == config.clip_ratio_low == config.clip_ratio_high:
        raise ValueError("actor.clip_ratio, clip_ratio_low and clip_ratio_high differ: MAPO has "
                         "one ϵ, set all three to it")
    mask = response_mask.bool()
    logp, old_logp = log_prob.masked_fill(~mask, 0), old_log_prob.masked_fill(~mask, 0)
    surrogate = clipped_surrogate(  # ℓ_t; verl has an Â per token, so each token is a row here
        logp.reshape(-1, 1), old_logp.reshape(-1, 1), advantages.masked_fill(~mask, 0).flatten(),
        config.clip_ratio).view_as(logp)
    omega = rollout_is_weights.masked_fill(~mask, 0)
    # verl's mean over tokens divides by T, and Eq. 2 by Σ ω̃. An empty mask has Σ ω̃ = 0.
    weight_sum = omega.sum(dim=1, keepdim=True).masked_fill(~mask.any(dim=1, keepdim=True), 1)
    weight = omega * mask.sum(dim=1, keepdim=True) / weight_sum  # ω̃_t · T / Σ ω̃  [B, T]
    loss = agg_loss(weight * surrogate, mask, loss_agg_mode, **config.global_batch_info)
    return loss, {"actor/omega_max": omega.max().item()}
