"""How the cost of a step grows, and what sharing a group's prompt saves.

    python bench/scaling.py [--device cuda --dtype bfloat16]

Completion length T and group size G: full MAPO on the text model of trl_step.py (40 of the prompt's
64 tokens count as audio). Timed are the forwards of π_old, π_ref and π_text-ref and one update of
all completions, in micro-batches of 2. Memory is beyond weights and optimizer. The exponent is the
slope of a straight line through the logarithms.

Ranks: `train.py recipes/toy_late.yaml` on the toy's questions and untrained model, by torchrun on
gloo with one thread per rank. Times are medians over the steps after the first; memory is that of
the largest process. This part runs on the CPU alone: NCCL refuses two ranks on one GPU.

Prompt of a group: 4 prompts of 512 tokens, G = 8, 16 new tokens. Each prompt is prefilled once for
its group, or once per completion.

Sizes run in fresh processes, rounds in turn; the numbers are medians.
"""

import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import measure
import torch
from step import world
from trl_step import VOCABULARY, TextPolicy, text_model, text_prompt

import train
from checkpoint import save_policy
from config import TrainConfig
from distributed import Team
from mapo import group_advantages
from rollout import Completion, GenerationBatch, Sampling, sample
from run import Run, make_optimizer, make_reference

LENGTHS, GROUPS, RANKS = (256, 512, 1024, 2048, 4096), (2, 4, 8, 16), (1, 2)
# Runs a command and prints the peak memory of the largest of its processes, in KiB.
PEAK_OF = ("import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, "
           "stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL); "
           "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)")


def main():
    flags = measure.options(__doc__).parse_args()
    print(f"{measure.machine(flags.threads)}, medians of {flags.rounds} interleaved rounds\n")
    growth("T, 2 completions", LENGTHS, [(1, 2, length) for length in LENGTHS], flags)
    growth("G, 2 prompts, T = 128", GROUPS, [(2, group, 128) for group in GROUPS], flags)
    prefill(flags)
    if flags.device == "cpu":
        ranks()


# ──────── T and G ────────


def growth(name, values, sizes, flags):
    """sizes: (prompts, G, T) for each of the values."""
    prepare = partial(prepare_step, flags.device, flags.dtype)
    result = measure.compare(sizes, prepare, flags.rounds, flags.threads, flags.device)
    seconds = [result[size][0]["seconds"] for size in sizes]
    peaks = [result[size][1] / 2**20 for size in sizes]
    rows = [[unit, *(f"{x:{digits}}" for x in measured), f"{exponent(values, measured):.2f}",
             f"{exponent(values[-2:], measured[-2:]):.2f}"]
            for unit, digits, measured in (("s", ".2f", seconds), ("MiB", ".0f", peaks))]
    measure.table([name, *values, "exponent", "of the last doubling"], rows)


def exponent(sizes, values):
    """Slope of log value against log size."""
    return statistics.linear_regression([math.log(size) for size in sizes],
                                        [math.log(value) for value in values]).slope


def prepare_step(device, dtype, size):
    """size: (prompts, G, T) → the reference passes and one update, as a function"""
    count, group, length = size
    policy, total = text_policy(device, dtype), count * group
    config = TrainConfig(group_size=group, generation_batch_size=total, steps_per_generation=1,
                         micro_batch_size=2, micro_batch_tokens=0, target_layers=[2, 3],
                         gradient_checkpointing=False)
    run = Run(config, Team(), policy, make_reference(policy, config), [], [],
              *make_optimizer(policy, config))
    for parameter in policy.parameters():  # allocate AdamW's moments before the measurement
        parameter.grad = torch.zeros_like(parameter)
    run.optimizer.step()
    tokens = torch.randint(3, VOCABULARY, (total, length),
                           generator=torch.Generator().manual_seed(0)).tolist()
    batch = GenerationBatch([prompt(i, 64) for i in range(count) for _ in range(group)],
                            [Completion(ids, [-9.7] * length, "length") for ids in tokens], 0, 0.0)
    reward = torch.arange(total).remainder(2).float()
    batch.rewards = dict.fromkeys(("accuracy", "format", "consistency", "total"), reward)
    batch.advantages = group_advantages(reward, group, config.advantage_eps)
    batch.unreadable = [False] * total
    batch.pos_gates, batch.pos_fallbacks = [[1] * length] * total, [0] * total

    def passes_and_update():
        train.reference_passes(batch, run)
        train.update(batch, range(total), 1, run)
    return passes_and_update


def text_policy(device, dtype):
    policy = TextPolicy(text_model())
    policy.base.set_attn_implementation("audio_mass")
    return policy.to(device, getattr(torch, dtype or "float32"))


def prompt(number, length, audio=40):
    """A prompt of `length` tokens, of which the first `audio` count as audio."""
    generator = torch.Generator().manual_seed(number)
    ids = torch.randint(3, VOCABULARY, (length - audio,), generator=generator).tolist()
    return text_prompt(str(number), [2] * audio + ids, ids)


# ──────── the prompt of a group ────────


def prefill(flags):
    prepare = partial(prepare_generation, flags.device, flags.dtype)
    result = measure.compare(("per group", "per completion"), prepare, flags.rounds, flags.threads,
                             flags.device)
    shared = result["per group"][0]["seconds"]
    measure.table(["prompt prefilled once", "s", "/ per group", "MiB"],
                  [[name, f"{s['seconds']:.2f}", f"{s['seconds'] / shared:.2f}",
                    f"{peak / 2**20:.0f}"] for name, (s, peak) in result.items()])


def prepare_generation(device, dtype, name):
    policy, group = text_policy(device, dtype), 8
    policy.eos_ids = []  # all completions have the same length
    prompts = [prompt(i, 512) for i in range(4)]
    if name == "per completion":
        prompts, group = [p for p in prompts for _ in range(group)], 1
    sampling = Sampling(temperature=1.0, max_new_tokens=16)

    def generate():
        sample(policy, prompts, group, sampling, seed=0)
    return generate


# ──────── ranks ────────


def ranks():
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        policy, _ = world(folder / "world")
        save_policy(policy, folder / "model")
        for number in RANKS:
            out = folder / f"ranks-{number}"
            done = subprocess.run(
                [sys.executable, "-c", PEAK_OF, sys.executable, "-m", "torch.distributed.run",
                 "--standalone", "--nproc-per-node", str(number), str(measure.ROOT / "train.py"),
                 str(measure.ROOT / "recipes" / "toy_late.yaml"), "--model", str(folder / "model"),
                 "--data", str(folder / "world" / "train.jsonl"), "--output_dir", str(out),
                 "--max_steps", "8"],
                check=True, stdout=subprocess.PIPE, text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""})
            steps = [json.loads(line) for line in open(out / "metrics.jsonl", encoding="utf-8")]
            passes = sum(steps[4][f"seconds_{name}"]  # those of the second generation batch
                         for name in ("old", "reference", "text_reference"))
            update = statistics.median(step["seconds_update"] for step in steps[1:])
            found[number] = update, passes, int(done.stdout) / 1024
    update_1, passes_1, _ = found[1]
    measure.table(["ranks, one thread each", "update, s", "/ 1 rank", "π_old, π_ref, π_text-ref, s",
                   "/ 1 rank", "MiB per rank"],
                  [[number, f"{update:.2f}", f"{update / update_1:.2f}", f"{passes:.2f}",
                    f"{passes / passes_1:.2f}", f"{peak:.0f}"]
                   for number, (update, passes, peak) in found.items()])


if __name__ == "__main__":
    main()
