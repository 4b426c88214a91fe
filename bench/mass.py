"""The audio attention mass of one layer, forward and backward: ours and other exact ways.

    python bench/mass.py [--device cuda --dtype bfloat16]

B = 1, H = 32 heads, 4 key heads, d = 128; S keys and queries, of which the last 1024 belong to the
completion; 390 audio keys (30 s). Every arm is causal attention on the same q, k and v, with an
upstream gradient on its output and one on the mass. The latter is as mapo.audio_attention_mass
makes it: one head per row. The 5 layers of L_tgt cost five times as much time; with checkpointing
they run one after the other.

    no mass          transformers' fused attention alone
    ours             the same, and attention.AudioMass: softmax in blocks of rows, and a backward
                     only for rows with a gradient
    eager            softmax(q·k)·v with the weights, as for output_attentions=True
    lse              exp(lse_audio − lse_all) in blocks of rows, each under a checkpoint
    indicator value  a second fused attention, whose value is 1 on audio keys
    value column     one fused attention with the indicator as column d + 1 of the value (q and k
                     are padded to d + 8)

The last three run at S = 2048 only. The error is that of the mass against float64. The value column
makes the mass almost free here, and we do not use it for three reasons: the attention's own output
differs in the last bit between forwards with and without the mass, so that π_θ/π_old of a step's
first update is no longer exactly 1; in bf16 the mass is rounded to bf16; and d = 136 may rule out a
GPU's fast kernels (not measured).

With --device cuda the table adds a lower bound for an H100: the 7
causal matrix products of attention, two forward and five backward, at 989 TFLOP/s (bf16 dense).
"""

from functools import partial
from types import SimpleNamespace

import measure
import torch
from torch.nn.functional import pad, scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from attention import attention_with_mass

HEADS, KEY_HEADS, WIDTH, ROWS = 32, 4, 128, 1024
SCALE = WIDTH ** -0.5
LENGTHS = {2048: ("no mass", "ours", "eager", "lse", "indicator value", "value column"),
           4096: ("no mass", "ours", "eager")}
H100_FLOPS = 989e12


def main():
    flags = measure.options(__doc__).parse_args()
    on_gpu = flags.device == "cuda"
    print(f"{measure.machine(flags.threads)}, medians of {flags.rounds} interleaved rounds\n")
    dtype = getattr(torch, flags.dtype or "float32")
    torch.set_num_threads(flags.threads)
    shortest, peaks = min(LENGTHS), {}
    wrong = errors(shortest, dtype, flags.device)
    for keys, arms in LENGTHS.items():
        result = measure.compare(arms, partial(prepare, keys, dtype, flags.device), flags.rounds,
                                 flags.threads, flags.device)
        seconds = {name: values["seconds"] for name, (values, _) in result.items()}
        peak = peaks[keys] = {name: peak / 2**20 for name, (_, peak) in result.items()}
        rows = []
        for name in arms:
            row = [name, f"{seconds[name]:.3g}", f"{seconds[name] / seconds['eager']:.2f}",
                   f"{seconds[name] / seconds['no mass']:.2f}", f"{peak[name]:.0f}",
                   f"{peak[name] / peak['eager']:.3f}",
                   f"{peak[name] / peaks[shortest][name]:.1f}",
                   f"{wrong[name]:.0e}" if name in wrong else ""]
            if on_gpu:
                row.append(f"{7 * HEADS * keys ** 2 * WIDTH / H100_FLOPS * 1e3:.2f}")
            rows.append(row)
        measure.table([f"S = {keys}, {str(dtype).removeprefix('torch.')}", "s", "/ eager",
                       "/ no mass", "MiB", "/ eager", f"/ S = {shortest}", "error of the mass",
                       *["products alone, ms"] * on_gpu], rows)


def prepare(keys, dtype, device, name):
    q, k, v, audio, upstream, upstream_mass = inputs(keys, dtype, device)
    function = FUNCTIONS[name]

    def forward_and_backward():
        output, mass = function(q, k, v, audio)
        if mass is None:
            output.backward(upstream)
        else:
            torch.autograd.backward([output, mass], [upstream, upstream_mass.to(mass.dtype)])
        q.grad = k.grad = v.grad = None  # so that each round starts without them
    return forward_and_backward


def inputs(keys, dtype, device):
    """→ q [1, H, S, d], k and v [1, Hkv, S, d], audio [1, S], upstream gradients of the output
    [1, H, S, d] and of the mass [1, H, rows]"""
    torch.manual_seed(0)
    with torch.device(device):
        q, k, v = (torch.randn(1, heads, keys, WIDTH).to(dtype).requires_grad_()
                   for heads in (HEADS, KEY_HEADS, KEY_HEADS))
        audio = torch.zeros(1, keys, dtype=torch.bool)
        audio[:, 20:410] = True
        upstream_mass = torch.zeros(1, HEADS, ROWS).scatter_(
            1, torch.randint(HEADS, (1, 1, ROWS)), torch.randn(1, 1, ROWS))
        return q, k, v, audio, torch.randn(1, HEADS, keys, WIDTH).to(dtype), upstream_mass


# ──────── the arms: (q, k, v, audio) → output [1, H, S, d], mass [1, H, rows] ────────


def ours(q, k, v, audio, layers=(0,)):
    layer = SimpleNamespace(layer_idx=0, num_key_value_groups=HEADS // KEY_HEADS, training=False,
                            is_causal=True)
    output, mass = attention_with_mass(layer, q, k, v, None, scaling=SCALE, mass_layers=layers,
                                       mass_keys=audio, mass_first_row=q.shape[2] - ROWS)
    return output.transpose(1, 2), mass  # [1, S, H, d] → [1, H, S, d]


def eager(q, k, v, audio):
    z = q @ repeated(k).transpose(-1, -2) * SCALE
    bias = torch.zeros((), dtype=q.dtype, device=q.device).masked_fill(
        ~causal(q.shape[2], k.shape[2], q.device), torch.finfo(q.dtype).min)
    at_least_float32 = torch.promote_types(torch.float32, q.dtype)
    alpha = (z + bias).softmax(dim=-1, dtype=at_least_float32).to(q.dtype)
    return alpha @ repeated(v), alpha[:, :, -ROWS:, audio[0]].sum(dim=-1)


def lse(q, k, v, audio):
    output, _ = ours(q, k, v, audio, layers=())

    def block(q_rows, k, allowed):
        z = q_rows.float() @ repeated(k).float().transpose(-1, -2) * SCALE
        z = z.masked_fill(~allowed, float("-inf"))
        return (z[..., audio[0]].logsumexp(dim=-1) - z.logsumexp(dim=-1)).exp()

    blocks = zip(q[:, :, -ROWS:].split(64, dim=2), causal(ROWS, k.shape[2], q.device).split(64))
    return output, torch.cat([checkpoint(block, rows, k, allowed, use_reentrant=False)
                              for rows, allowed in blocks], dim=2)


def indicator_value(q, k, v, audio):
    output, _ = ours(q, k, v, audio, layers=())
    value = audio[:, None, :, None].to(v.dtype).expand_as(v)
    mass = scaled_dot_product_attention(
        q[:, :, -ROWS:], k, value, scale=SCALE, enable_gqa=True,
        attn_mask=causal(ROWS, k.shape[2], q.device))
    return output, mass[..., 0]


def value_column(q, k, v, audio):
    indicator = audio[:, None, :, None].to(v.dtype).expand(*v.shape[:-1], 1)
    value = torch.cat([v, indicator, v.new_zeros(*v.shape[:-1], 7)], dim=-1)  # [1, Hkv, S, d + 8]
    both = scaled_dot_product_attention(pad(q, (0, 8)), pad(k, (0, 8)), value, is_causal=True,
                                        scale=SCALE, enable_gqa=True)
    return both[..., :WIDTH], both[:, :, -ROWS:, WIDTH]


FUNCTIONS = {"no mass": partial(ours, layers=()), "ours": ours, "eager": eager, "lse": lse,
             "indicator value": indicator_value, "value column": value_column}


def causal(rows, keys, device):
    """Which keys the last rows may see → bool [rows, S]"""
    return torch.ones(keys, keys, dtype=torch.bool, device=device).tril()[keys - rows:]


def repeated(x):
    """Key heads → query heads"""
    return x.repeat_interleave(HEADS // KEY_HEADS, dim=1)


# ──────── errors ────────


@torch.no_grad()
def errors(keys, dtype, device):
    """name → largest difference of the mass from float64 on the same inputs."""
    q, k, v, audio, _, _ = inputs(keys, dtype, device)
    z = q[:, :, -ROWS:].double() @ repeated(k).double().transpose(-1, -2) * SCALE
    alpha = z.masked_fill_(~causal(ROWS, keys, device), float("-inf")).softmax(dim=-1)
    exact = alpha[..., audio[0]].sum(dim=-1)
    return {name: (function(q, k, v, audio)[1].double() - exact).abs().max().item()
            for name, function in FUNCTIONS.items() if name != "no mass"}


if __name__ == "__main__":
    main()
