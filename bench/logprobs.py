"""Hidden states → (log-prob, entropy), forward and backward: `model.token_statistics`, the plain way, and peers.

    python bench/logprobs.py [--device cuda --dtype bfloat16]

T = 1024 rows, V = 151,936, hidden size D; gradients of states and weight, none of the entropy. The error is that of a
run of 64 of the rows against float64 of the same inputs: the largest difference, of gradients over the largest value.
Memory is the peak beyond inputs and gradients, which all arms have. Each arm in a fresh process, repeats in turn;
the last two, slower by a third and more, are called once.
  naive            logits, log_softmax, gather; the entropy from them under no_grad
  TRL, functions   logits, then selective_log_softmax and entropy_from_logits
  TRL, chunked     its ChunkedLogProbFunction, blocks of 32,768 columns, its trainer's own number
  verl, fused      its FusedLinearForPPOFunction, blocks of 512 rows; the file alone is loaded, for verl itself wants
                   Ray and an older transformers
Time at the rate of the matrix products alone: ours needs four (the logits are made twice), the plain way three. The
path of --device cuda has not been run; there the table adds that floor, products at 989 TFLOP/s (H100, bf16 dense).
"""

import copy
import importlib.util
from functools import partial

import measure
import torch

import model

ROWS, VOCABULARY, TEMPERATURE = 1024, 151_936, 1.2
ARMS = ("ours", "naive", "TRL, functions", "TRL, chunked", "verl, fused")
SLOW = ("TRL, chunked", "verl, fused")  # called once
PRODUCTS = {"naive": 3, "TRL, functions": 3}  # matrix products of T·V·D; 4 elsewhere


def prepare(size, dtype, device, name):
    hidden, head, ids, upstream = inputs(size, dtype, device, ROWS)
    function = statistics_of(name)

    def run():
        hidden.grad = head.weight.grad = None
        logp, _ = function(hidden, head, ids)
        logp.backward(upstream)
    return run


def inputs(size, dtype, device, rows):
    """Logits of deviation 3. Made in place, so that making them leaves no larger peak than they are."""
    torch.manual_seed(0)
    with torch.device(device):
        head = torch.nn.Linear(1, 1, bias=False)
        head.weight = torch.nn.Parameter(torch.empty(VOCABULARY, size, dtype=dtype).normal_(std=3 / size ** 0.5))
        hidden = torch.empty(ROWS, size, dtype=dtype).normal_()[:rows].clone().requires_grad_()
        return hidden, head, torch.randint(VOCABULARY, (ROWS,))[:rows], torch.empty(ROWS).normal_()[:rows].clone()


def statistics_of(name):
    """→ function(hidden, head, ids) → logp, entropy"""
    if name == "ours":
        return token_statistics
    if name == "naive":
        return naive
    if name == "TRL, functions":
        from trl.trainer.utils import selective_log_softmax_and_entropy
        return lambda h, head, ids: selective_log_softmax_and_entropy((head(h).float() / TEMPERATURE), ids, False)
    if name == "TRL, chunked":
        from trl.kernels import ChunkedLogProbFunction
        return lambda h, head, ids: ChunkedLogProbFunction.apply(h, head.weight, None, ids, TEMPERATURE, 32768, None,
                                                                 1.0, ("entropy",))[:2]
    folder = importlib.util.find_spec("verl").submodule_search_locations[0]
    spec = importlib.util.spec_from_file_location("fused", f"{folder}/utils/experimental/torch_functional.py")
    fused = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fused)
    return lambda h, head, ids: fused.FusedLinearForPPOFunction.apply(h, head.weight, ids, TEMPERATURE, 512)


def token_statistics(hidden, head, ids):
    return model.token_statistics(hidden, head, ids, TEMPERATURE)


def naive(hidden, head, ids):
    logits = head(hidden)
    log_probs = ((logits if logits.dtype == torch.float64 else logits.float()) / TEMPERATURE).log_softmax(dim=-1)
    with torch.no_grad():
        entropy = -(log_probs.exp() * log_probs).sum(dim=-1)
    return log_probs.gather(-1, ids[:, None])[:, 0], entropy


def errors(size, dtype, device):
    """name → largest error of (logp, entropy, gradient of the states, gradient of the weight) on 64 rows."""
    hidden, head, ids, upstream = inputs(size, dtype, device, 64)

    def results(function, h, layer):
        logp, entropy = function(h, layer, ids)
        return logp.detach(), entropy.detach(), *torch.autograd.grad(logp, [h, layer.weight], upstream.to(logp.dtype))

    exact = results(naive, hidden.detach().double().requires_grad_(), copy.deepcopy(head).double())
    scale = [1, 1, exact[2].abs().max(), exact[3].abs().max()]
    return {name: [((a - b).abs_().max() / s).item()  # in float64, as b is; an arm at a time, for memory
                   for a, b, s in zip(results(statistics_of(name), hidden, head), exact, scale)] for name in ARMS}


def main():
    flags = measure.options(__doc__).parse_args()
    print(f"{measure.machine(flags.threads, 'trl', 'verl')}, medians of {flags.rounds} interleaved repeats\n")
    chosen = [(D, getattr(torch, flags.dtype)) for D in (256, 2048)] if flags.dtype else [
        (256, torch.float32), (2048, torch.float32), (2048, torch.bfloat16)]
    for size, dtype in chosen:
        torch.set_num_threads(flags.threads)
        wrong = errors(size, dtype, flags.device)
        result = measure.compare(ARMS, partial(prepare, size, dtype, flags.device), flags.rounds, flags.threads,
                                 flags.device, once=SLOW)
        gradients = (ROWS + VOCABULARY) * size * dtype.itemsize
        seconds = {name: values["seconds"] for name, (values, _) in result.items()}
        peak = {name: max(0, peak - gradients) / 2**20 for name, (_, peak) in result.items()}
        rows = []
        for name in ARMS:
            rows.append([name, f"{seconds[name]:.3g}", f"{seconds[name] / seconds['naive']:.2f}", f"{peak[name]:.0f}",
                         f"{peak[name] / peak['naive']:.3f}", *(f"{error:.0e}" for error in wrong[name])])
            if flags.device == "cuda":
                rows[-1].append(f"{PRODUCTS.get(name, 4) * 2 * ROWS * VOCABULARY * size / 989e12 * 1e3:.2f}")
        header = [f"D = {size}, {str(dtype)[6:]}", "s", "/ naive", "MiB", "/ naive", "error logp", "entropy",
                  "∂ states", "∂ weight"] + ["floor, ms"] * (flags.device == "cuda")
        measure.table(header, rows)


if __name__ == "__main__":
    main()
