"""What asynchronous rollouts save: the toy, sampled in one process, and on vLLM sync and async.

    make vllm                                 # once
    python bench/rollouts.py [--batches 6] [--rounds 2]

Every arm is `train.py recipes/toy_late.yaml`, full MAPO on the same questions. The arms take turns,
`--rounds` times, so that a slow moment of the machine affects all of them. The numbers are medians
over generation batches (128 completions, 4 optimizer steps). The first batch is left out, because
it includes the server's start and vLLM's first question. Trainer and server get one thread each:
with two threads each on two cores, async runs would wait for each other.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import measure

import toy

ARMS = {"in this process": ("--rollout", "local"),
        "vLLM, sync": ("--rollout", "vllm"),
        "vLLM, async": ("--rollout", "vllm", "--async_rollouts", "true")}
STEPS = 4  # optimizer steps of a generation batch


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batches", type=int, default=6, help="generation batches per run")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", type=Path, default=measure.ROOT / "runs" / "bench-rollouts")
    options = parser.parse_args()
    world = toy.prepare(measure.ROOT / "runs" / "toy-world-0", 0)
    numbers = {arm: [] for arm in ARMS}
    for round_number in range(options.rounds):
        for arm, flags in ARMS.items():
            name = arm.replace(", ", "-").replace(" ", "-")
            steps = train(world, options.out / f"{round_number}-{name}", options.batches, flags)
            numbers[arm] += [of_batch(steps[i:i + STEPS])
                             for i in range(STEPS, len(steps), STEPS)]
    median = {arm: [statistics.median(values) for values in zip(*rows)]
              for arm, rows in numbers.items()}
    print(f"{measure.machine(1)}, and one thread for the server; medians of {options.rounds} × "
          f"{options.batches - 1} generation batches\n")
    formats = (".1f", ".0f", ".2f", ".2f", ".1e", ".4f")
    measure.table(
        ["per generation batch", "seconds", "sampling, tokens/s",
         "share of time the trainer waits", "of which pushing, s", "\\|log π_old − log μ\\|, nats",
         "effective sample size", "time / sync"],
        [[arm, *(f"{value:{spec}}" for value, spec in zip(values, formats)),
          f"{values[0] / median['vLLM, sync'][0]:.2f}"] for arm, values in median.items()])


def train(world, out, batches, flags):
    """A run of train.py → the lines of its metrics.jsonl"""
    subprocess.run(
        [sys.executable, str(measure.ROOT / "train.py"),
         str(measure.ROOT / "recipes" / "toy_late.yaml"), "--model", str(world / "model"),
         "--data", str(world / "late" / "train.jsonl"),
         "--output_dir", str(out), "--overwrite", "true", "--max_steps", str(STEPS * batches),
         "--top_k", "0", "--top_p", "1", *flags],  # so that the sampler μ is π_old itself
        check=True, stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return [json.loads(line) for line in open(out / "metrics.jsonl", encoding="utf-8")]


def of_batch(steps):
    """The optimizer steps of one generation batch → the numbers of its row."""
    seconds = sum(m["seconds_step"] for m in steps)
    return (seconds, steps[0]["generation_tokens_per_second"],
            sum(m["seconds_generate"] for m in steps) / seconds, steps[0]["seconds_push"],
            statistics.fmean(m["sampler_gap"] for m in steps),
            statistics.fmean(m["importance_ess"] for m in steps))


if __name__ == "__main__":
    main()
