"""How a step grows: with the completion length T, the group size G and the number of ranks; and a prompt shared by its
group against one prefilled G times.

    python bench/scaling.py [--device cuda --dtype bfloat16]

T and G: the text model of trl_step.py (4 layers, D = 128, V = 16,384; 40 of the prompt's 64 tokens count as audio),
full MAPO: the forwards of π_old, π_ref and π_text-ref and one update of all completions, micro-batches of 2. A fresh
process for each size, repeats in turn, medians; memory beyond weights and optimizer. The exponent is the slope of a
straight line through the logarithms.
Ranks: `train.py recipes/toy.yaml` on the toy's world and untrained model, torchrun on gloo, one thread a rank, the
median of the steps after the first; memory is that of the largest process. Two ranks on two cores share them with
nobody.
Generation: 4 prompts of 512 tokens, G = 8, 16 new tokens.
"""

import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from functools import partial
from pathlib import Path

import measure
import torch
from step import world
from trl_step import VOCABULARY, TextPolicy, text_model, tokenizer

import train
from data import Question
from model import Prompt
from rollout import Completion, sample

ROOT = Path(__file__).resolve().parents[1]
LENGTHS, GROUPS = (256, 512, 1024, 2048, 4096), (2, 4, 8, 16)
WRAPPER = ("import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL, "
           "stderr=subprocess.DEVNULL); print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)")


def text_policy(device, dtype):
    model = text_model()
    model.config.audio_token_id = 2
    model.set_attn_implementation("audio_mass")
    return TextPolicy(model.to(device, getattr(torch, dtype)), tokenizer(), None)


def prompt(number, length, audio=40):
    ids = torch.randint(3, VOCABULARY, (length,), generator=torch.Generator().manual_seed(number)).tolist()
    return Prompt(Question(str(number), (), "", (), ""), [2] * audio + ids[audio:], ids[audio:], (), ())


def prepare_step(device, dtype, size):
    """size: (prompts, G, T) → the forwards of the frozen policies and one update"""
    count, group, length = size
    policy = text_policy(device, dtype)
    config = train.TrainConfig(group_size=group, generation_batch_size=count * group, steps_per_generation=1,
                               micro_batch_size=2, target_layers=[2, 3], gradient_checkpointing=False)
    reference = train.make_reference(policy, config)
    optimizer, _ = train.make_optimizer(policy, config)
    for parameter in policy.parameters():  # AdamW's moments stand before the measurement
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    draw = torch.Generator().manual_seed(0)
    completions = [Completion(ids, [-9.7] * length, "length")
                   for ids in torch.randint(3, VOCABULARY, (count * group, length), generator=draw).tolist()]
    batch = train.GenerationBatch([prompt(i, 64) for i in range(count) for _ in range(group)], completions, 0, 0.0, 0.0)
    reward = torch.arange(count * group).remainder(2).float()
    batch.rewards = {name: reward for name in ("accuracy", "format", "consistency", "total")}
    batch.advantages = train.group_advantages(reward, group, config.advantage_eps)
    batch.pos_gates, batch.pos_fallbacks = [[1] * length] * len(completions), [0] * len(completions)

    def run():
        train.freeze(batch, policy, reference, config, defaultdict(float))
        train.update(policy, optimizer, batch, range(len(completions)), config, measure=True)
    return run


def prepare_generation(device, dtype, name):
    policy = text_policy(device, dtype)
    policy.eos_ids = []
    prompts = [prompt(i, 512) for i in range(4)]
    if name == "shared":
        return lambda: sample(policy, prompts, 8, temperature=1.0, max_new_tokens=16, seed=0) and None
    return lambda: sample(policy, [p for p in prompts for _ in range(8)], 1, temperature=1.0, max_new_tokens=16,
                          seed=0) and None


def exponent(sizes, values):
    """Slope of log value against log size."""
    x, y = [math.log(size) for size in sizes], [math.log(value) for value in values]
    mean_x, mean_y = statistics.fmean(x), statistics.fmean(y)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y)) / sum((a - mean_x) ** 2 for a in x)


def curve(name, sizes, chosen, flags, dtype):
    result = measure.compare(chosen, partial(prepare_step, flags.device, dtype), flags.rounds, flags.threads,
                             flags.device)
    seconds = [result[size][0]["seconds"] for size in chosen]
    peaks = [result[size][1] / 2**20 for size in chosen]
    measure.table([name, *sizes, "exponent", "of the last doubling"],
                  [["s", *(f"{s:.2f}" for s in seconds), f"{exponent(sizes, seconds):.2f}",
                    f"{exponent(sizes[-2:], seconds[-2:]):.2f}"],
                   ["MiB", *(f"{p:.0f}" for p in peaks), f"{exponent(sizes, peaks):.2f}",
                    f"{exponent(sizes[-2:], peaks[-2:]):.2f}"]])


def ranks():
    """→ ranks → (seconds of a step, MiB of the largest process)"""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        policy, _ = world(folder / "world")
        policy.save(folder / "model")
        for number in (1, 2):
            out = folder / f"ranks{number}"
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(number),
                       str(ROOT / "train.py"), str(ROOT / "recipes" / "toy.yaml"), "--model", str(folder / "model"),
                       "--data", str(folder / "world" / "train.jsonl"), "--output_dir", str(out), "--max_steps", "8"]
            done = subprocess.run([sys.executable, "-c", WRAPPER, *command], check=True, capture_output=True, text=True,
                                  env={**os.environ, "OMP_NUM_THREADS": "1"})
            steps = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
            found[number] = (statistics.median(m["seconds_update"] for m in steps[1:]), int(done.stdout) / 1024,
                             steps[4]["seconds_old"] + steps[4]["seconds_reference"]
                             + steps[4]["seconds_text_reference"])
    return found


def main():
    flags = measure.options(__doc__).parse_args()
    dtype = flags.dtype or "float32"
    print(f"{measure.machine(flags.threads)}, medians of {flags.rounds} interleaved repeats\n")
    curve("T, 2 completions", LENGTHS, [(1, 2, length) for length in LENGTHS], flags, dtype)
    curve("G, 2 prompts, T = 128", GROUPS, [(2, group, 128) for group in GROUPS], flags, dtype)
    made = measure.compare(("shared", "G times"), partial(prepare_generation, flags.device, dtype), flags.rounds,
                           flags.threads, flags.device)
    measure.table(["a prompt prefilled", "s", "/ shared", "MiB"],
                  [[name, f"{s['seconds']:.2f}", f"{s['seconds'] / made['shared'][0]['seconds']:.2f}",
                    f"{peak / 2**20:.0f}"] for name, (s, peak) in made.items()])
    measure.table(["ranks, a thread each", "update, s", "/ 1 rank", "3 frozen forwards of 256, s", "/ 1 rank",
                   "MiB a rank"],
                  [[number, f"{update:.2f}", f"{update / by_rank[1][0]:.2f}", f"{frozen:.2f}",
                    f"{frozen / by_rank[1][2]:.2f}", f"{peak:.0f}"]
                   for by_rank in [ranks()] for number, (update, peak, frozen) in by_rank.items()])


if __name__ == "__main__":
    main()
