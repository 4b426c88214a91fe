"""Gradients of attention on left padding: which kernels make NaN on this GPU, before and after.

    python bench/cudnn_case.py

pytorch#196678: on Hopper, the backward of cuDNN's attention makes NaN when a mask is given, S % 128
is 64, and a query may attend to no key. Left padding makes such queries. We turn cuDNN's attention
off (checkpoint.make_policy) and let a padding query attend to itself (attention.py); either alone
should do. Each line of the table is bf16 attention of 3 rows, two of them padded, forward and
backward. The cells say whether the gradients of q, k and v are finite, and how far those of the
real positions are from float64 (norm of the difference over the norm), for each length S.

    default    the kernel that torch chooses while cuDNN's is allowed; the table names it
    cuDNN      cuDNN's kernel alone
    ours       the kernel that torch chooses while cuDNN's is turned off
    as is      transformers' mask: a padding query attends to no key
    ours       attention.mask_without_empty_rows
"""

import measure
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from transformers.masking_utils import sdpa_mask

from attention import mask_without_empty_rows

LENGTHS = (192, 256, 320, 384, 1088, 2048)
HEADS, WIDTH = 8, 128
OTHERS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
KERNELS = {"default": [*OTHERS, SDPBackend.CUDNN_ATTENTION], "cuDNN": [SDPBackend.CUDNN_ATTENTION],
           "ours": OTHERS}
MASKS = {"as is": sdpa_mask, "ours": mask_without_empty_rows}


def main():
    print(f"{measure.machine(torch.get_num_threads())}, cuDNN "
          f"{torch.backends.cudnn.version()}\n")
    rows = []
    for kernel, allowed in KERNELS.items():
        for name, make_mask in MASKS.items():
            rows.append([kernel, name, *(cell(length, make_mask, allowed) for length in LENGTHS)])
    measure.table(["kernel", "mask", *(f"S = {n} (S % 128 = {n % 128})" for n in LENGTHS)], rows)


def cell(length, make_mask, allowed):
    """→ "finite" or which gradients are not, the error, and the kernel's name."""
    generator = torch.Generator("cuda").manual_seed(length)
    q, k, v, upstream = (torch.randn(3, HEADS, length, WIDTH, device="cuda", generator=generator)
                         .bfloat16() for _ in range(4))  # [B, H, S, d]
    padding = torch.tensor([length // 3, 0, 1], device="cuda")
    real = torch.arange(length, device="cuda") >= padding[:, None]  # [B, S]
    mask = make_mask(3, length, length, attention_mask=real, device=torch.device("cuda"))
    upstream *= real[:, None, :, None]  # nothing reads the output of padding
    tensors = [x.requires_grad_() for x in (q, k, v)]
    try:
        with sdpa_kernel(allowed):
            chosen = SDPBackend(torch._fused_sdp_choice(*tensors, mask)).name.split("_")[0].lower()
            output = scaled_dot_product_attention(*tensors, mask)
            found = torch.autograd.grad(output, tensors, upstream)
    except RuntimeError as error:  # a kernel may refuse the inputs
        return " ".join(str(error).split())[:60]
    exact = [x.detach().double().requires_grad_() for x in tensors]
    z = exact[0] @ exact[1].transpose(-1, -2) * WIDTH ** -0.5
    alpha = z.masked_fill(~mask_without_empty_rows(
        3, length, length, attention_mask=real, device=torch.device("cuda")), float("-inf"))
    wanted = torch.autograd.grad(alpha.softmax(dim=-1) @ exact[2], exact, upstream.double())
    broken = [name for name, x in zip("qkv", found) if not x.isfinite().all()]
    keep = real[:, None, :, None]
    error = max(((x.double() - y) * keep).norm().item() / y.norm().item()
                for x, y in zip(found, wanted))
    return f"{chosen}: {'NaN in ∂' + ', ∂'.join(broken) if broken else 'finite'}, {error:.0e}"


if __name__ == "__main__":
    main()
