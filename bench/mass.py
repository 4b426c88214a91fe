"""The audio attention mass of a layer, forward and backward: ours, eager attention, and the exact forms that lost.

    python bench/mass.py [--device cuda --dtype bfloat16]

B = 1, H = 32 heads, 4 key heads, d = 128, S keys and queries, of which the last 1024 are the completion's; 390 audio
keys (30 s). Every arm is causal attention on the same q, k and v, an upstream gradient on its output, and one on the
mass as audio_attention_mass sends it: to one head a row. The 5 layers of L_tgt are five times this, one after the
other, as under checkpointing. At S = 4096 the forms that lost are left out.
  no mass          the fused attention of transformers alone
  ours             the same, and `model.AudioMass` beside it: softmax in blocks of rows, the backward for the rows with
                   a gradient alone
  eager            softmax(q·k)·v with the weights, as output_attentions=True has it
  lse              exp(lse_audio − lse_all) of blocks of rows, each under a checkpoint
  indicator value  a second fused attention whose value is 1 on audio keys
  value column     one fused attention, the indicator beside the value as column d + 1 (q and k padded to d + 8)
The error is that of the mass against float64. The value column has the mass for nearly nothing here, and is not ours:
the attention's own output changes in the last bit between a forward with the mass and one without, so that π_θ/π_old of
a step's first update is no longer 1; in bf16 the mass comes out rounded to bf16; and d = 136 may leave the fast kernels
of a GPU (not measured).
The path of --device cuda has not been run; there the table adds the floor of 7 products of the attention (causal, two
forward, five backward) at 989 TFLOP/s (H100, bf16 dense).
"""

from functools import partial
from types import SimpleNamespace

import measure
import torch
from torch.nn.functional import pad, scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from model import attention_with_mass

HEADS, KEY_HEADS, WIDTH, ROWS = 32, 4, 128, 1024
SCALE = WIDTH ** -0.5
ARMS = ("no mass", "ours", "eager", "lse", "indicator value", "value column")


def prepare(keys, dtype, device, name):
    q, k, v, audio, upstream, upstream_mass = inputs(keys, dtype, device)
    function = FUNCTIONS[name]

    def run():
        q.grad = k.grad = v.grad = None
        output, mass = function(q, k, v, audio)
        if mass is None:
            output.backward(upstream)
        else:
            torch.autograd.backward([output, mass], [upstream, upstream_mass.to(mass.dtype)])
    return run


def inputs(keys, dtype, device):
    torch.manual_seed(0)
    with torch.device(device):
        q, k, v = (torch.randn(1, heads, keys, WIDTH).to(dtype).requires_grad_()
                   for heads in (HEADS, KEY_HEADS, KEY_HEADS))
        audio = torch.zeros(1, keys, dtype=torch.bool)
        audio[:, 20:410] = True
        upstream_mass = torch.zeros(1, HEADS, ROWS).scatter_(1, torch.randint(HEADS, (1, 1, ROWS)),
                                                             torch.randn(1, 1, ROWS))
        return q, k, v, audio, torch.randn(1, HEADS, keys, WIDTH).to(dtype), upstream_mass


def ours(q, k, v, audio, layers=(0,)):
    layer = SimpleNamespace(layer_idx=0, num_key_value_groups=HEADS // KEY_HEADS, training=False, is_causal=True)
    output, mass = attention_with_mass(layer, q, k, v, None, scaling=SCALE, mass_layers=layers, mass_keys=audio,
                                       mass_first_row=q.shape[2] - ROWS)
    return output.transpose(1, 2), mass  # [B, S, H, d] → [B, H, S, d]


def causal(rows, keys, device):
    return torch.ones(keys, keys, dtype=torch.bool, device=device).tril()[keys - rows:]


def repeated(x):
    return x.repeat_interleave(HEADS // KEY_HEADS, dim=1)


def eager(q, k, v, audio):
    z = q @ repeated(k).transpose(-1, -2) * SCALE
    bias = torch.zeros((), dtype=q.dtype, device=q.device).masked_fill(~causal(q.shape[2], k.shape[2], q.device),
                                                                       torch.finfo(q.dtype).min)
    alpha = (z + bias).softmax(dim=-1, dtype=torch.promote_types(torch.float32, q.dtype)).to(q.dtype)
    return alpha @ repeated(v), alpha[:, :, -ROWS:, audio[0]].sum(dim=-1)


def lse(q, k, v, audio):
    output, _ = ours(q, k, v, audio, layers=())

    def block(q_rows, k, allowed):
        z = (q_rows.float() @ repeated(k).float().transpose(-1, -2) * SCALE).masked_fill(~allowed, float("-inf"))
        return (z[..., audio[0]].logsumexp(dim=-1) - z.logsumexp(dim=-1)).exp()

    allowed = causal(ROWS, k.shape[2], q.device)
    return output, torch.cat([checkpoint(block, rows, k, a, use_reentrant=False)
                              for rows, a in zip(q[:, :, -ROWS:].split(64, dim=2), allowed.split(64))], dim=2)


def indicator(q, k, v, audio):
    output, _ = ours(q, k, v, audio, layers=())
    value = audio[:, None, :, None].to(v.dtype).expand_as(v)
    return output, scaled_dot_product_attention(q[:, :, -ROWS:], k, value, scale=SCALE, enable_gqa=True,
                                                attn_mask=causal(ROWS, k.shape[2], q.device))[..., 0]


def column(q, k, v, audio):
    value = torch.cat([v, audio[:, None, :, None].to(v.dtype).expand(*v.shape[:-1], 1),
                       v.new_zeros(*v.shape[:-1], 7)], dim=-1)
    both = scaled_dot_product_attention(pad(q, (0, 8)), pad(k, (0, 8)), value, is_causal=True, scale=SCALE,
                                        enable_gqa=True)
    return both[..., :WIDTH], both[:, :, -ROWS:, WIDTH]


FUNCTIONS = {"no mass": partial(ours, layers=()), "ours": ours, "eager": eager, "lse": lse,
             "indicator value": indicator, "value column": column}


def errors(keys, dtype, device):
    """name → largest difference of the mass from float64 of the same inputs."""
    q, k, v, audio, _, _ = inputs(keys, dtype, device)
    with torch.no_grad():
        z = q[:, :, -ROWS:].double() @ repeated(k).double().transpose(-1, -2) * SCALE
        alpha = z.masked_fill_(~causal(ROWS, keys, device), float("-inf")).softmax(dim=-1)
        exact = alpha[..., audio[0]].sum(dim=-1)
        return {name: (FUNCTIONS[name](q, k, v, audio)[1].double() - exact).abs().max().item()
                for name in ARMS if name != "no mass"}


def main():
    flags = measure.options(__doc__).parse_args()
    print(f"{measure.machine(flags.threads)}, medians of {flags.rounds} interleaved repeats\n")
    dtype = getattr(torch, flags.dtype or "float32")
    torch.set_num_threads(flags.threads)
    peaks, wrong = {}, errors(2048, dtype, flags.device)
    for keys in (2048, 4096):
        arms = ARMS if keys == 2048 else ARMS[:3]
        result = measure.compare(arms, partial(prepare, keys, dtype, flags.device), flags.rounds, flags.threads,
                                 flags.device)
        peaks[keys] = {name: peak for name, (_, peak) in result.items()}
        rows = []
        for name in arms:
            seconds = {arm: values["seconds"] for arm, (values, _) in result.items()}
            rows.append([name, f"{seconds[name]:.3g}", f"{seconds[name] / seconds['eager']:.2f}",
                         f"{seconds[name] / seconds['no mass']:.2f}", f"{peaks[keys][name] / 2**20:.0f}",
                         f"{peaks[keys][name] / peaks[keys]['eager']:.3f}",
                         f"{peaks[keys][name] / peaks[2048][name]:.1f}" if keys == 4096 else "",
                         f"{wrong[name]:.0e}" if name in wrong else ""])
            if flags.device == "cuda":
                rows[-1].append(f"{7 * HEADS * keys ** 2 * WIDTH / 989e12 * 1e3:.2f}")
        header = [f"S = {keys}, {str(dtype)[6:]}", "s", "/ eager", "/ no mass", "MiB", "/ eager", "/ S = 2048",
                  "error of the mass"] + ["floor, ms"] * (flags.device == "cuda")
        measure.table(header, rows)


if __name__ == "__main__":
    main()
