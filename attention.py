"""The audio mass m_t⁽ˡʰ⁾ = Σ_{j ∈ S_audio} α_{t,j} beside a fused attention kernel.  (Sec. 3.2)

    mass = audio_mass(query, key, is_audio, allowed, scaling)         # the plain form
    mass = AudioMass.apply(query, key, is_audio, allowed, scaling)    # the same, without keeping α

The fused kernel of a decoder layer returns no attention weights α. `attention_with_mass` therefore
computes m_t from q and k a second time, in the layers of L_tgt only, a block of rows at a time. It
is the attention function of the text decoder; checkpoint.make_policy selects it.
"""

import torch
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from data import InputError
from mapo import head_audio_mass


def audio_mass(query, key, is_audio, allowed, scaling):
    """m_t = Σ_{j ∈ S_audio} α_{t,j} of every head, α = softmax(q·k·scaling).  (Sec. 3.2)

    This is the plain form: autograd differentiates it, and it keeps α [B, H, T, S]. AudioMass gives
    the same values and the same gradient without keeping α.
    query [B, H, S, d], whose last T rows count; key [B, Hkv, S, d]; is_audio [B, S] bool;
    allowed [B or 1, 1, T, S] bool: causal, and keys of the same sample → [B, H, T].
    Needs attention_weights, at_least_float32, head_audio_mass (of mapo.py).
    """
    rows = query[:, :, -allowed.shape[2]:]  # [B, H, T, d]
    alpha, _, _ = attention_weights(rows, key, allowed, scaling)  # [B, Hkv, H/Hkv, T, S]
    return head_audio_mass(alpha.flatten(1, 2), is_audio)


def attention_weights(query, key, allowed, scaling):
    """α = softmax(q·k·scaling) over the allowed keys → α, and q and k as they were multiplied.

    query [B, H, rows, d], key [B, Hkv, S, d], allowed [B or 1, 1 or Hkv, rows, S] → α
    [B, Hkv, H/Hkv, rows, S]. Each key head serves the next H/Hkv query heads. Products and softmax
    are in fp32 (fp64 for fp64 inputs), also under autocast.
    Needs at_least_float32.
    """
    q, k = at_least_float32(query), at_least_float32(key)
    q = q.unflatten(1, (key.shape[1], -1))  # [B, Hkv, H/Hkv, rows, d]
    with torch.autocast(query.device.type, enabled=False):
        z = torch.einsum("bgrtd,bgsd->bgrts", q * scaling, k)
    return z.masked_fill_(~allowed.unsqueeze(2), float("-inf")).softmax(dim=-1), q, k


class AudioMass(torch.autograd.Function):
    """audio_mass(query, key, is_audio, allowed, scaling) with a block of rows of α at a time.

    The arguments are those of audio_mass. Pass the whole query: the gradient of a slice would be a
    second tensor of the same size. The backward is Eq. 15, ∂m_t/∂z_{t,i} =
    α_{t,i}·(𝟙[i ∈ S_audio] − m_t), with α computed again, then the chain rule of z = q·k·scaling.
    a_t takes the maximum over heads (Eq. 13), so in each layer only one head per token has a
    gradient; the backward computes α for that head alone. There is no second derivative.
    Needs attention_weights, at_least_float32, mass_rows,
    `from torch.autograd.function import once_differentiable`.
    """

    @staticmethod
    def forward(ctx, query, key, is_audio, allowed, scaling):
        last_rows = query[:, :, -allowed.shape[2]:]  # [B, H, T, d]
        dtype = at_least_float32(query[:0]).dtype
        mass = query.new_empty(last_rows.shape[:3], dtype=dtype)  # [B, H, T]
        step = mass_rows(query.device)
        with torch.autocast(query.device.type, enabled=False):
            for start in range(0, allowed.shape[2], step):
                rows = slice(start, start + step)
                alpha, _, _ = attention_weights(last_rows[:, :, rows], key, allowed[:, :, rows],
                                                scaling)
                mass[:, :, rows] = torch.einsum(  # Σ_{j ∈ S_audio} α_{t,j}
                    "bgrts,bs->bgrt", alpha, is_audio.to(alpha.dtype)).flatten(1, 2)
        ctx.save_for_backward(query, key, is_audio, allowed)
        ctx.scaling, ctx.mass = scaling, mass.detach()
        return mass

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        query, key, is_audio, allowed = ctx.saved_tensors
        groups, length = key.shape[1], allowed.shape[2]
        allowed = allowed[:, 0].expand(len(query), -1, -1)  # [B, T, S]
        # The rows (head, t) of each key head, those with a gradient first.
        has_grad = (grad != 0).unflatten(1, (groups, -1)).flatten(2)  # [B, Hkv, H/Hkv·T]
        most = has_grad.sum(dim=-1).max()
        wanted = has_grad.byte().argsort(dim=-1, descending=True)[..., :most]
        sample = torch.arange(len(query), device=query.device)[:, None, None]
        heads_per_key = query.shape[1] // groups
        first_head = torch.arange(0, query.shape[1], heads_per_key, device=query.device)[:, None]
        grad_query, grad_key = torch.zeros_like(query), torch.zeros_like(at_least_float32(key))
        last_rows, grad_last_rows = query[:, :, -length:], grad_query[:, :, -length:]
        with torch.autocast(query.device.type, enabled=False):
            for rows in wanted.split(mass_rows(query.device), dim=-1):
                # b, h and t of each row  [B, Hkv, rows]
                at = (sample, first_head + rows // length, rows % length)
                alpha, q, k = attention_weights(last_rows[at], key,
                                                allowed[sample, rows % length], ctx.scaling)
                m, g = (x[at][:, :, None, :, None] for x in (ctx.mass, grad))
                audio = is_audio[:, None, None, None].to(alpha.dtype)  # 𝟙[i ∈ S_audio]
                dz = g * alpha * (audio - m) * ctx.scaling  # Eq. 15
                grad_last_rows[at] = torch.einsum(
                    "bgrts,bgsd->bgrtd", dz, k).flatten(1, 2).to(query.dtype)
                grad_key += torch.einsum("bgrts,bgrtd->bgsd", dz, q)
        return grad_query, grad_key.to(key.dtype), None, None, None


def at_least_float32(x):
    return x if x.dtype == torch.float64 else x.float()


def mass_rows(device):
    """Query rows of attention weights that exist at a time.

    Few on a CPU, to stay in its cache; many on a GPU, where every block costs a dozen launches.
    """
    return 8 if device.type == "cpu" else 128


def attention_with_mass(module, query, key, value, attention_mask, mass_layers=(),
                        mass_first_row=0, mass_keys=None, output_attentions=None, **kwargs):
    """transformers' fused attention; in the layers of L_tgt also the audio mass.

    query [B, H, S, d], key and value [B, Hkv, S, d], after RoPE and normalisation. The signature is
    the one transformers calls; the mass_* arguments travel through the model's forward. Without
    them this is the fused attention alone. Returns (output, mass [B, H, rows] or None).
    """
    output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    if mass_keys is None or module.layer_idx not in mass_layers:
        return output, None
    allowed = allowed_keys(attention_mask, key, mass_first_row)
    return output, AudioMass.apply(query, key, mass_keys, allowed, kwargs["scaling"])


def allowed_keys(attention_mask, key, first_row):
    """Which keys each query row from `first_row` on may see → bool [B or 1, 1, rows, S].

    transformers passes no mask when nothing is padded: its kernel is then told "causal".
    """
    if attention_mask is None:
        total = key.shape[2]  # S
        causal = torch.ones(total, total, dtype=torch.bool, device=key.device).tril()
        attention_mask = causal[None, None]
    return attention_mask[:, :, first_row:]


def layer_masses(attentions, layers):
    """The masses that a forward returned for `layers` → [L, B, H, rows].

    attention_with_mass returns a mass [B, H, rows] in place of attention weights, and None in other
    layers, which transformers drops. Raises InputError when a layer of L_tgt did not go through it:
    nothing else would show that.
    """
    masses = [mass for mass in attentions or () if mass is not None and mass.dim() == 3]
    if len(masses) != len(layers):
        raise InputError(f"only {len(masses)} of {len(layers)} decoder layers went through "
                         "attention.attention_with_mass; the others would give no audio mass. Set "
                         "our attention function for them in checkpoint.make_policy")
    return torch.stack(masses)


# ──────── the mask ────────


def mask_without_empty_rows(batch_size, q_length, kv_length, q_offset=0, kv_offset=0, *,
                            device="cpu", **more):
    """transformers' causal mask, in which a padding query also attends to itself.  (ours)

    → bool [B, 1, queries, keys], or None where transformers passes none (nothing is padded).
    A query on left padding has no key that it may attend to. The fused kernels fill such a row with
    a large negative number, and the backward of cuDNN's then makes NaN on Hopper GPUs. Every other
    query attends to itself anyway, so the outputs of real tokens do not change.
    """
    mask = sdpa_mask(batch_size, q_length, kv_length, q_offset, kv_offset, device=device, **more)
    if mask is None:
        return None
    query = torch.arange(q_length, device=device) + q_offset
    key = torch.arange(kv_length, device=device) + kv_offset
    return mask | (query[:, None] == key)


# The mask function is needed too: without one, transformers would pass no mask.
AttentionInterface.register("audio_mass", attention_with_mass)
AttentionMaskInterface.register("audio_mass", mask_without_empty_rows)
