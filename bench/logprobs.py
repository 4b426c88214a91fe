"""From hidden states to log-prob and entropy, forward and backward: ours and other implementations.

    python bench/logprobs.py [--device cuda --dtype bfloat16]

T = 1024 rows, V = 151,936, hidden size D. Log-probs have gradients with respect to the states and
the weight; the entropy has none.

    ours             model.token_statistics
    naive            logits, log_softmax, gather; the entropy from them under no_grad
    TRL, functions   logits, then selective_log_softmax and entropy_from_logits
    TRL, chunked     ChunkedLogProbFunction with blocks of 32,768 columns, as in TRL's trainer
    verl, fused      FusedLinearForPPOFunction with blocks of 512 rows; only its file is loaded,
                     because importing verl takes seconds (it imports Ray)

The error is the largest difference from float64 on 64 of the rows; gradients are relative to the
largest value. Memory is the peak beyond inputs and gradients, which all arms have. Each arm runs in
a fresh process, rounds in turn; the last two, the slowest, run once.

The matrix products alone are a lower bound of the time. Ours needs four, because the backward makes
the logits again; naive needs three. With --device cuda the table adds
this bound for an H100 (989 TFLOP/s, bf16 dense).
"""

import copy
import importlib.util
from functools import partial

import measure
import torch

from model import token_statistics

ROWS, VOCABULARY, TEMPERATURE = 1024, 151_936, 1.2
ARMS = ("ours", "naive", "TRL, functions", "TRL, chunked", "verl, fused")
RUN_ONCE = ("TRL, chunked", "verl, fused")
PRODUCTS = {"naive": 3, "TRL, functions": 3}  # matrix products of T·V·D; the others need 4
H100_FLOPS = 989e12


def main():
    flags = measure.options(__doc__).parse_args()
    on_gpu = flags.device == "cuda"
    print(f"{measure.machine(flags.threads, 'trl', 'verl')}, medians of {flags.rounds} "
          "interleaved rounds\n")
    arms = [name for name in ARMS if is_installed(name)]
    chosen = [(256, torch.float32), (2048, torch.float32), (2048, torch.bfloat16)]
    if flags.dtype:
        chosen = [(size, getattr(torch, flags.dtype)) for size in (256, 2048)]
    for size, dtype in chosen:
        torch.set_num_threads(flags.threads)
        wrong = errors(arms, size, dtype, flags.device)
        result = measure.compare(arms, partial(prepare, size, dtype, flags.device), flags.rounds,
                                 flags.threads, flags.device, once=RUN_ONCE)
        gradients = (ROWS + VOCABULARY) * size * dtype.itemsize
        seconds = {name: values["seconds"] for name, (values, _) in result.items()}
        peaks = {name: max(0, peak - gradients) / 2**20 for name, (_, peak) in result.items()}
        rows = []
        for name in arms:
            row = [name, f"{seconds[name]:.3g}", f"{seconds[name] / seconds['naive']:.2f}",
                   f"{peaks[name]:.0f}", f"{peaks[name] / peaks['naive']:.3f}",
                   *(f"{error:.0e}" for error in wrong[name])]
            if on_gpu:
                flops = PRODUCTS.get(name, 4) * 2 * ROWS * VOCABULARY * size
                row.append(f"{flops / H100_FLOPS * 1e3:.2f}")
            rows.append(row)
        measure.table([f"D = {size}, {str(dtype).removeprefix('torch.')}", "s", "/ naive", "MiB",
                       "/ naive", "error logp", "entropy", "∂ states", "∂ weight",
                       *["products alone, ms"] * on_gpu], rows)


def prepare(size, dtype, device, name):
    hidden, head, ids, upstream = inputs(size, dtype, device, ROWS)
    function = function_of(name)

    def forward_and_backward():
        logp, _ = function(hidden, head, ids)
        logp.backward(upstream)
        hidden.grad = head.weight.grad = None  # so that each round starts without them
    return forward_and_backward


def inputs(size, dtype, device, rows):
    """The first rows → hidden [rows, D], head, ids [rows], upstream gradient [rows]

    The logits have a standard deviation of 3. The weight is filled in place, so that making it
    leaves no larger memory peak than the weight itself.
    """
    torch.manual_seed(0)
    with torch.device(device):
        head = torch.nn.Linear(1, 1, bias=False)
        weight = torch.empty(VOCABULARY, size, dtype=dtype).normal_(std=3 / size ** 0.5)
        head.weight = torch.nn.Parameter(weight)
        hidden = torch.empty(ROWS, size, dtype=dtype).normal_()[:rows].clone().requires_grad_()
        ids = torch.randint(VOCABULARY, (ROWS,))[:rows]
        return hidden, head, ids, torch.empty(ROWS).normal_()[:rows].clone()


# ──────── the arms: (hidden, head, ids) → logp, entropy ────────


def function_of(name):
    """The function of an arm. Imports what it needs now, before the measurement."""
    if name == "ours":
        return lambda hidden, head, ids: token_statistics(hidden, head, ids, TEMPERATURE)
    if name == "naive":
        return naive
    if name == "TRL, functions":
        from trl.trainer.utils import selective_log_softmax_and_entropy
        return lambda hidden, head, ids: selective_log_softmax_and_entropy(
            head(hidden).float() / TEMPERATURE, ids, False)
    if name == "TRL, chunked":
        from trl.kernels import ChunkedLogProbFunction
        return lambda hidden, head, ids: ChunkedLogProbFunction.apply(
            hidden, head.weight, None, ids, TEMPERATURE, 32768, None, 1.0, ("entropy",))[:2]
    if (package := importlib.util.find_spec("verl")) is None:
        raise ModuleNotFoundError("no verl")
    folder = package.submodule_search_locations[0]
    spec = importlib.util.spec_from_file_location(
        "fused", f"{folder}/utils/experimental/torch_functional.py")
    fused = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fused)
    return lambda hidden, head, ids: fused.FusedLinearForPPOFunction.apply(
        hidden, head.weight, ids, TEMPERATURE, 512)


def is_installed(name):
    """Can the function of an arm be imported? Prints why not."""
    try:
        function_of(name)
    except ImportError as error:
        print(f"{name}: left out ({str(error).splitlines()[0]}); see bench/requirements.txt\n")
        return False
    return True


def naive(hidden, head, ids):
    logits = head(hidden)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    log_probs = (logits / TEMPERATURE).log_softmax(dim=-1)
    with torch.no_grad():
        entropy = -(log_probs.exp() * log_probs).sum(dim=-1)
    return log_probs.gather(-1, ids[:, None])[:, 0], entropy


# ──────── errors ────────


def errors(arms, size, dtype, device):
    """name → largest errors of logp, entropy, gradient of the states, gradient of the weight."""
    hidden, head, ids, upstream = inputs(size, dtype, device, 64)

    def results(function, states, layer):
        logp, entropy = function(states, layer, ids)
        gradients = torch.autograd.grad(logp, [states, layer.weight], upstream.to(logp.dtype))
        return logp.detach(), entropy.detach(), *gradients

    exact = results(naive, hidden.detach().double().requires_grad_(), copy.deepcopy(head).double())
    scales = [1, 1, exact[2].abs().max(), exact[3].abs().max()]
    return {name: [((a - b).abs_().max() / scale).item() for a, b, scale in zip(
        results(function_of(name), hidden, head), exact, scales)] for name in arms}


if __name__ == "__main__":
    main()
