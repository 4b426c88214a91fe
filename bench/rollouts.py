"""What asynchronous rollouts save: the toy trained through a vLLM server, sync and async, and in one process.

    make vllm                                 # once
    python bench/rollouts.py [--batches 6] [--rounds 2]

The three run one after the other, `--rounds` times over, so that a slow moment of the machine hits all of them. Each is
`train.py recipes/toy.yaml` with full MAPO on the same questions. The first generation batch waits for the server's
start and for vLLM's first question, and is left out. Medians over generation batches (256 completions, 4 optimizer
steps). Trainer and server get one thread each: with two each on two cores, asynchronous they wait for one another.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import toy  # noqa: E402

ARMS = {"in this process": ("--rollout", "local"),
        "vLLM, sync": ("--rollout", "vllm"),
        "vLLM, async": ("--rollout", "vllm", "--async_rollouts", "true")}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batches", type=int, default=6, help="generation batches of a run")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "bench-rollouts")
    options = parser.parse_args()
    world = toy.prepare(ROOT / "runs" / "toy-world-0", 0)
    batches = {arm: [] for arm in ARMS}
    for number in range(options.rounds):
        for arm, flags in ARMS.items():
            out = options.out / f"{number}-{arm.replace(', ', '-').replace(' ', '-')}"
            subprocess.run([sys.executable, str(ROOT / "train.py"), str(ROOT / "recipes" / "toy.yaml"), "--model",
                            str(world / "model"), "--data", str(world / "train.jsonl"), "--output_dir", str(out),
                            "--max_steps", str(4 * options.batches), *flags], check=True, stderr=subprocess.DEVNULL,
                           env={**os.environ, "OMP_NUM_THREADS": "1"})
            steps = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
            batches[arm] += [measure(steps[i:i + 4]) for i in range(4, len(steps), 4)]
    names = ("seconds", "tokens/s of sampling", "share of the time that the trainer waits", "of it pushing, s",
             "|log π_old − log μ|, nats", "effective sample size")
    print(f"{platform.machine()}, {os.cpu_count()} cores, a thread for the trainer and one for the server, torch "
          f"{torch.__version__}, {options.rounds} rounds of {options.batches - 1} batches\n")
    print("| a generation batch | " + " | ".join(names) + " | time / sync |")
    print("|---" * (len(names) + 2) + "|")
    middle = {arm: [statistics.median(values) for values in zip(*rows)] for arm, rows in batches.items()}
    for arm, values in middle.items():
        cells = [f"{values[0]:.1f}", f"{values[1]:.0f}", f"{values[2]:.2f}", f"{values[3]:.2f}", f"{values[4]:.1e}",
                 f"{values[5]:.4f}", f"{values[0] / middle['vLLM, sync'][0]:.2f}"]
        print(f"| {arm} | " + " | ".join(cells) + " |")


def measure(steps):
    """The optimizer steps of one generation batch → its row of the table."""
    seconds = sum(m["seconds_step"] for m in steps)
    return (seconds, steps[0]["generation_tokens_per_second"], sum(m["seconds_generate"] for m in steps) / seconds,
            steps[0]["seconds_push"], statistics.mean(m["sampler_gap"] for m in steps),
            statistics.mean(m["importance_ess"] for m in steps))


if __name__ == "__main__":
    main()
