"""GRPO and full MAPO on the toy, side by side from the same warm start: `make toy`.

    python compare.py                            # questions "late", seed 0; writes runs/toy/
    python compare.py --questions caption --seed 3

Each arm is one process of train.py with one thread, and the recipe of its questions. It keeps its
checkpoint every EXPORT_EVERY steps. Afterwards the greedy accuracy of these checkpoints on the dev
questions gives the held-out curve.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

import torch
from tqdm import tqdm

import plots
import toy
from checkpoint import load_policy, states_in
from data import InputError, json_lines, read_questions
from rewards import accuracy_reward
from rollout import Sampling, sample

ROOT = Path(__file__).resolve().parent
ARMS = {"GRPO": ["--mask", "false", "--eta", "0"], "MAPO": []}
EXPORT_EVERY = 20


def main(arguments):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--questions", choices=list(toy.QUESTION), default="late")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/toy"), help="output folder")
    options = parser.parse_args(arguments)
    try:
        world = toy.prepare(options.out.parent / f"toy-world-{options.seed}", options.seed)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    runs = {name: options.out / name for name in ARMS}
    codes = train_side_by_side(world, runs, options)
    for name, code in codes.items():
        if code:
            print(f"error: the run {name} ended with exit code {code}", file=sys.stderr)
    if any(codes.values()):
        return 1
    curves = {name: held_out_curve(run, world / options.questions / "dev.jsonl",
                                   start=world / "model") for name, run in runs.items()}
    plots.draw_comparison({name: ([row for _, row in json_lines(run / "metrics.jsonl")],
                                  curves[name]) for name, run in runs.items()},
                          options.out / "compare.png")
    report(runs, curves, options)
    return 0


def train_side_by_side(world, runs, options):
    """Runs the arms at the same time, one thread each → {arm: exit code}."""
    processes = {}
    for name, run in runs.items():
        command = [sys.executable, ROOT / "train.py",
                   *arm_flags(world, options.questions, run, options.seed), *ARMS[name]]
        # One progress bar is enough.
        quiet = {"TQDM_DISABLE": "1"} if processes else {}
        # On a GPU the toy would train in bf16, and not show the digits of README.md.
        processes[name] = subprocess.Popen(list(map(str, command)), env={
            **os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **quiet})
    try:
        return {name: process.wait() for name, process in processes.items()}
    finally:
        for process in processes.values():
            process.kill()


def arm_flags(world, questions, run, seed):
    """Arguments of train.py that all arms share. The recipe's own values hold for the rest."""
    return [ROOT / "recipes" / f"toy_{questions}.yaml", "--model", world / "model",
            "--data", world / questions / "train.jsonl", "--output_dir", run, "--seed", seed,
            "--export_every", EXPORT_EVERY, "--overwrite", "true"]


def held_out_curve(run, data, start):
    """Greedy accuracy of the checkpoints of a run on the questions of `data` → [(step, accuracy)].

    start: folder of the model that the run started from (step 0).
    """
    folders = {0: start, **states_in(run, "checkpoint")}
    last = max(row["step"] for _, row in json_lines(run / "metrics.jsonl"))
    folders[last] = run / "checkpoint"
    questions = read_questions(data, decode=False)
    prompts, curve = None, []
    for step, folder in tqdm(sorted(folders.items()), desc=f"{run.name}: held out", leave=False):
        policy = load_policy(folder)
        prompts = prompts or [policy.encode(q) for q in questions]
        curve.append((step, greedy_accuracy(policy, prompts)[0]))
    return curve


@torch.no_grad()
def greedy_accuracy(policy, prompts):
    """→ the share of right greedy answers, and the texts"""
    greedy = Sampling(temperature=0, max_new_tokens=80)
    texts = [policy.decode(c) for c in sample(policy, prompts, 1, greedy, seed=0)]
    right = [accuracy_reward(text, p.question.answer, p.question.choices)
             for text, p in zip(texts, prompts)]
    return sum(right) / len(right), texts


def report(runs, curves, options):
    """Says what was seen on this seed, and where the other seeds are."""
    for name, run in runs.items():
        metrics = [row for _, row in json_lines(run / "metrics.jsonl")]
        late = [row["audio_mass_max_late"] for row in metrics
                if row["audio_mass_max_late"] is not None]
        print(f"{name}: held-out accuracy {curves[name][0][1]:.3f} → {curves[name][-1][1]:.3f}, "
              f"mean over the run {mean_after_start(curves[name]):.3f}; "
              f"a_t of the last third {late[0]:.3f} → {late[-1]:.3f}")
    print(f"{options.out / 'compare.png'} shows the curves. This is one seed ({options.seed}); "
          "docs/toy.md has the study over all seeds.")


def mean_after_start(curve):
    """The area under the held-out curve: its mean, without step 0."""
    return sum(accuracy for _, accuracy in curve[1:]) / (len(curve) - 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
