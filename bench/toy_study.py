"""What the toy shows: four arms from the same warm start, for several seeds.

    python bench/toy_study.py                 # 3 seeds × 4 arms; about 60 minutes on 2 cores
    python bench/toy_study.py --report        # tables and pictures again, from finished runs

Every arm is `python train.py recipes/toy.yaml` with its own flags. For each seed this measures

    accuracy   greedy, on the held-out test questions, before and after (train.py writes it)
    a_t        each model's audio attention mass on the same text: the warm start's greedy
               completions of the dev questions, teacher-forced. The arms write different sentences,
               so a_t on their own completions cannot be compared.
    captions   how often the thinking names all sounds in order; a right answer does not prove that
    ACS        Eq. 17 of full MAPO and of the mask alone, on 512 test questions (evaluate.py acs)
    trace      the first 12 test questions, token by token (evaluate.py trace), for the first seed;
               docs/toy_trace.png is one of the pictures

and writes runs/study/{table.md, acs.md}, docs/toy_attention.png, docs/toy_training.png and
docs/toy_acs.png.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import measure
import torch
from matplotlib.figure import Figure

import diagnostics
import evaluate
import plots
from checkpoint import load_policy
from data import read_questions
from mapo import audio_attention_mass
from rollout import Sampling, sample
from toy import caption_is_exact

ROOT = measure.ROOT
ARMS = {"GRPO": ["--mask", "false", "--eta", "0"], "mask only (η 0)": ["--eta", "0"],
        "η 0.1": ["--eta", "0.1"], "η 0.5": ["--eta", "0.5"]}
COLORS = {"warm start": "black", "GRPO": "tab:gray", "mask only (η 0)": "tab:blue",
          "η 0.1": "tab:orange", "η 0.5": "tab:red"}
GREEDY = Sampling(temperature=0, max_new_tokens=64)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "study")
    parser.add_argument("--jobs", type=int, default=2, help="runs at the same time")
    parser.add_argument("--report", action="store_true", help="measure finished runs; train none")
    parser.add_argument("--flags", nargs=argparse.REMAINDER, default=[],
                        help="must come last: flags of train.py for every arm")
    options = parser.parse_args()
    if not options.report:
        run_arms(options)
    results = {seed: measure_seed(options.out, seed) for seed in options.seeds}
    (options.out / "results.json").write_text(json.dumps(results, indent=1, ensure_ascii=False))
    table = make_table(results)
    (options.out / "table.md").write_text(table)
    print(table)
    draw_attention(results, ROOT / "docs" / "toy_attention.png")
    draw_training(options.out, options.seeds, ROOT / "docs" / "toy_training.png")
    mask_and_trace(options.out, options.seeds)


# ──────── the runs ────────


def run_arms(options):
    """Warm starts first, because the arms of a seed share one; then the arms.

    Do not edit the repository meanwhile: every arm starts train.py anew.
    """
    def run(command, log):
        threads = str(max(1, os.cpu_count() // options.jobs))
        with open(log, "w") as file:
            subprocess.run([sys.executable, *command], cwd=ROOT, stdout=file, stderr=file,
                           check=True, env={**os.environ, "OMP_NUM_THREADS": threads})
        print(log.parent.name if log.name == "log.txt" else log.name, "done", flush=True)

    def warm_start(seed):
        world = options.out.resolve() / f"toy-world-{seed}"
        run(["-c", f"import toy; toy.prepare({str(world)!r}, {seed})"],
            options.out / f"world-{seed}.txt")

    def train_arm(seed, arm):
        folder = folder_of(options.out.resolve(), seed, arm)
        folder.mkdir(parents=True, exist_ok=True)
        run(["train.py", "recipes/toy.yaml", "--seed", str(seed), "--output_dir", str(folder),
             "--overwrite", "true", *ARMS[arm], *options.flags], folder / "log.txt")

    options.out.mkdir(parents=True, exist_ok=True)
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT,
                            capture_output=True, text=True).stdout
    (options.out / "code.txt").write_text(commit)
    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(warm_start, options.seeds))
        jobs = [(seed, arm) for arm in ARMS for seed in options.seeds]
        list(pool.map(train_arm, *zip(*jobs)))


def folder_of(out, seed, arm):
    return out / f"seed{seed}-{''.join(c if c.isalnum() or c == '.' else '_' for c in arm)}"


# ──────── measurements of the trained models ────────


def measure_seed(out, seed):
    """→ arm → {accuracy, format, length, caption, a_t, thirds, profile}; "warm start" is one arm"""
    world = out / f"toy-world-{seed}"
    events = {row["id"]: row["events"] for row in lines(world / "test.jsonl")}
    warm = load_policy(world / "model")
    dev, test = read_questions(world / "dev.jsonl"), read_questions(world / "test.jsonl")
    prompts, test_prompts = [warm.encode(q) for q in dev], [warm.encode(q) for q in test]
    text = [c.token_ids for c in sample(warm, prompts, 1, GREEDY, seed=0)]
    results = {}
    for arm in ("warm start", *ARMS):
        if arm == "warm start":  # every arm evaluates it before its first step
            policy, evaluation = warm, lines(folder_of(out, seed, "GRPO") / "evaluation.jsonl")[0]
        else:
            folder = folder_of(out, seed, arm)
            policy = load_policy(folder / "checkpoint")
            evaluation = lines(folder / "evaluation.jsonl")[-1]
        completions = sample(policy, test_prompts, 1, GREEDY, seed=0)
        exact = [caption_is_exact(policy.decode(c), events[q.id])
                 for c, q in zip(completions, test)]
        results[arm] = {**evaluation, "caption": sum(exact) / len(exact),
                        **mass_on_text(policy, prompts, text)}
    return results


@torch.no_grad()
def mass_on_text(policy, prompts, text, bins=12):
    """Teacher-forced a_t: mean over tokens, over each third, and by relative position t/T."""
    layers = (policy.num_layers - 2, policy.num_layers - 1)
    profile, thirds = [[] for _ in range(bins)], [[], [], []]
    for start in range(0, len(prompts), 64):
        some = text[start:start + 64]
        batch = policy.collate(prompts[start:start + 64], some)
        mass = audio_attention_mass(policy(batch, 1.0, layers).head_mass).tolist()  # [B, T]
        for row, ids in zip(mass, some):
            for t in range(len(ids)):
                profile[t * bins // len(ids)].append(row[t])
                thirds[t * 3 // len(ids)].append(row[t])
    return {"a_t": statistics.fmean(sum(thirds, [])),
            "thirds": [statistics.fmean(values) for values in thirds],
            "profile": [statistics.fmean(values) for values in profile]}


def mask_and_trace(out, seeds):
    """Eq. 17 for two arms of every seed, and traces for the first seed."""
    rows = []
    for seed in seeds:
        world, folder = out / f"toy-world-{seed}", out / f"acs-{seed}"
        models = [flag for name, arm in (("full MAPO (η 0.1)", "η 0.1"),
                                         ("mask only (η 0)", "mask only (η 0)"))
                  for flag in ("--model", f"{name}, seed {seed}="
                               f"{folder_of(out, seed, arm) / 'checkpoint'}")]
        common = ["--data", str(world / "test.jsonl"), "--max_new_tokens", "64"]
        evaluate.main(["acs", *models, *common, "--limit", "512", "--out", str(folder)])
        rows += lines(folder / "acs.jsonl")
        if seed == seeds[0]:
            evaluate.main(["trace", *models, "--model", f"warm start={world / 'model'}",
                           "--reference", str(world / "model"), *common, "--limit", "12",
                           "--target_layers", "2", "3", "--out", str(out / "trace")])
    (out / "acs.md").write_text(diagnostics.acs_table(rows), encoding="utf-8")
    accuracies = diagnostics.acs_accuracies([row for row in rows if "full" in row["model"]])
    plots.draw_acs(accuracies, diagnostics.RANDOM_SEEDS, ROOT / "docs" / "toy_acs.png")


def lines(path):
    return [json.loads(line) for line in open(path, encoding="utf-8")]


# ──────── the table and the pictures ────────


def make_table(results):
    header = ("seed", "arm", "greedy accuracy, test", "format", "exact captions", "tokens",
              "a_t, same text", "first third", "last third", "last third / η 0",
              "last / first third")
    table = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    for seed, arms in results.items():
        base = arms["mask only (η 0)"]["thirds"][2]
        for arm, r in arms.items():
            first, _, last = r["thirds"]
            table.append(f"| {seed} | {arm} | {r['accuracy']:.3f} | {r['format']:.3f} | "
                         f"{r['caption']:.3f} | {r['completion_length']:.1f} | {r['a_t']:.3f} | "
                         f"{first:.3f} | {last:.3f} | {last / base:.2f} | {last / first:.2f} |")
    return "\n".join(table) + "\n"


def draw_attention(results, path):
    """a_t on the same text against the position in the completion; one panel per seed."""
    figure = Figure(figsize=(4.4 * len(results), 4), layout="constrained")
    axes = figure.subplots(1, len(results), sharey=True, squeeze=False)[0]
    for axis, (seed, arms) in zip(axes, results.items()):
        for arm, r in arms.items():
            n = len(r["profile"])
            axis.plot([(i + 0.5) / n for i in range(n)], r["profile"], color=COLORS[arm],
                      label=arm, linestyle="--" if arm == "warm start" else "-")
        axis.set(title=f"toy, seed {seed}", xlabel="position in the completion, t/T")
        axis.grid(alpha=0.3)
    axes[0].set(ylabel="audio attention mass $a_t$", ylim=(0, None))
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center",
                  ncols=len(COLORS), fontsize=9)
    figure.savefig(path, dpi=110)


def draw_training(out, seeds, path, window=8):
    """Accuracy, length (Fig. 4) and a_t of the policy's own completions (Fig. 5) over the steps."""
    figure = Figure(figsize=(13.5, 3.8), layout="constrained")
    axes = figure.subplots(1, 3)
    for arm in ARMS:
        for seed in seeds:
            metrics = lines(folder_of(out, seed, arm) / "metrics.jsonl")
            for axis, name in zip(axes, ("accuracy", "completion_length", "audio_mass_max")):
                values = [m[name] for m in metrics]
                smooth = [statistics.fmean(values[max(0, i + 1 - window):i + 1])
                          for i in range(len(values))]
                axis.plot([m["step"] for m in metrics], smooth, color=COLORS[arm], alpha=0.85,
                          linewidth=1.2, label=arm if seed == seeds[0] else None)
    for axis, title, unit in (
            (axes[0], "Training accuracy (sampled)", "share right"),
            (axes[1], "Completion length", "tokens"),
            (axes[2], "$a_t$ of the policy's own completions", "share of attention")):
        axis.set(title=title, xlabel="optimizer step", ylabel=unit)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.suptitle(f"toy, one line per seed ({', '.join(map(str, seeds))}), "
                    f"mean of the last {window} steps", fontsize=9)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
