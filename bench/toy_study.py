"""What the toy shows, and what it does not: several arms from the same warm start, over seeds.

    python bench/toy_study.py                 # 3 seeds × 4 arms; about 60 minutes on 2 cores
    python bench/toy_study.py --report        # the tables and the pictures again, from the runs on disk

Every arm is `python train.py recipes/toy.yaml` with other flags. Then, for each seed:
  accuracy   greedy, on the held-out test questions, before and after (train.py writes it)
  a_t        audio attention mass of each trained model on the SAME text, the warm start's greedy completions on the dev
             questions, teacher-forced: arms write different sentences, so their own completions cannot be compared
  captions   how often the thinking names all sounds in order: a right answer does not prove a faithful caption
  ACS        Eq. 17 of full MAPO and of mask only, on the first 512 test questions (evaluate.py acs)
  trace      the first test questions, token by token (evaluate.py trace); one of the pictures is docs/toy_trace.png
Writes runs/study/{table.md, acs.md}, docs/toy_attention.png, docs/toy_training.png and docs/toy_acs.png.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

ARMS = {"GRPO": ["--mask", "false", "--eta", "0"], "mask only (η 0)": ["--eta", "0"], "η 0.1": ["--eta", "0.1"],
        "η 0.5": ["--eta", "0.5"]}
COLORS = {"warm start": "black", "GRPO": "tab:gray", "mask only (η 0)": "tab:blue", "η 0.1": "tab:orange",
          "η 0.5": "tab:red"}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "study")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--flags", nargs=argparse.REMAINDER, default=[], help="last: flags of train.py for every arm")
    parser.add_argument("--report", action="store_true", help="only measure and draw the runs that exist")
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
    evidence(options.out, options.seeds)


def folder_of(out, seed, arm):
    return out / f"seed{seed}-{''.join(c if c.isalnum() or c == '.' else '_' for c in arm)}"


def run_arms(options):
    def run(command, log):
        threads = str(max(1, os.cpu_count() // options.jobs))
        with open(log, "w") as file:
            subprocess.run([sys.executable, *command], cwd=ROOT, stdout=file, stderr=file, check=True,
                           env={**os.environ, "OMP_NUM_THREADS": threads})
        print(log.parent.name if log.name == "log.txt" else log.name, "done", flush=True)

    def warm_start(seed):  # first, for the arms of a seed share one
        world = options.out / f"toy-world-{seed}"
        run(["-c", f"import toy; toy.prepare({str(world)!r}, {seed})"], options.out / f"world-{seed}.txt")

    def train_arm(job):
        seed, arm = job
        folder = folder_of(options.out, seed, arm)
        folder.mkdir(parents=True, exist_ok=True)
        run(["train.py", "recipes/toy.yaml", "--seed", str(seed), "--output_dir", str(folder), *ARMS[arm],
             *options.flags], folder / "log.txt")

    options.out.mkdir(parents=True, exist_ok=True)
    code = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True).stdout
    (options.out / "code.txt").write_text(code)  # do not edit the tree while it runs: every arm starts train.py anew
    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(warm_start, options.seeds))
        list(pool.map(train_arm, [(seed, arm) for arm in ARMS for seed in options.seeds]))


def measure_seed(out, seed):
    """→ arm → {accuracy, format, length, caption, a_t, thirds, profile}; "warm start" is one of them."""
    from data import read_questions
    from model import load_policy
    from rollout import sample
    from toy import caption_is_exact

    world = out / f"toy-world-{seed}"
    truth = {row["id"]: row["events"] for row in map(json.loads, open(world / "test.jsonl", encoding="utf-8"))}
    warm = load_policy(world / "model")
    dev, test = read_questions(world / "dev.jsonl"), read_questions(world / "test.jsonl")
    prompts, test_prompts = [warm.encode(q) for q in dev], [warm.encode(q) for q in test]
    text = [c.token_ids for c in sample(warm, prompts, 1, temperature=0, max_new_tokens=64, seed=0)]
    results = {}
    for arm in ("warm start", *ARMS):
        policy = warm if arm == "warm start" else load_policy(folder_of(out, seed, arm) / "checkpoint")
        run = folder_of(out, seed, "GRPO" if arm == "warm start" else arm)  # every arm evaluates the warm start first
        evaluations = [json.loads(line) for line in open(run / "evaluation.jsonl")]
        completions = sample(policy, test_prompts, 1, temperature=0, max_new_tokens=64, seed=0)
        exact = [caption_is_exact(policy.text(c), truth[q.id]) for c, q in zip(completions, test)]
        results[arm] = {**evaluations[0 if arm == "warm start" else -1], "caption": sum(exact) / len(exact),
                        **mass_on_text(policy, prompts, text)}
    return results


def mass_on_text(policy, prompts, text, bins=12):
    """Teacher-forced a_t: mean over tokens, of each third, and by relative position t/T in `bins` bins."""
    import torch

    from mapo import audio_attention_mass

    layers = (policy.num_layers - 2, policy.num_layers - 1)
    sums, counts, thirds = [0.0] * bins, [0] * bins, [[], [], []]
    with torch.no_grad():
        for start in range(0, len(prompts), 64):
            batch = policy.collate(prompts[start:start + 64], text[start:start + 64])
            mass = audio_attention_mass(policy(batch, 1.0, layers).head_mass)
            for row, ids in zip(mass.tolist(), text[start:start + 64]):
                for t in range(len(ids)):
                    sums[t * bins // len(ids)] += row[t]
                    counts[t * bins // len(ids)] += 1
                    thirds[t * 3 // len(ids)].append(row[t])
    return {"a_t": statistics.fmean(sum(thirds, [])), "thirds": [statistics.fmean(t) for t in thirds],
            "profile": [s / n for s, n in zip(sums, counts)]}


def evidence(out, seeds):
    """Eq. 17 for two arms of every seed, and traces for the first seed."""
    import evaluate

    rows = []
    for seed in seeds:
        world, folder = out / f"toy-world-{seed}", out / f"acs-{seed}"
        models = [f for name, arm in (("full MAPO (η 0.1)", "η 0.1"), ("mask only (η 0)", "mask only (η 0)"))
                  for f in ("--model", f"{name}, seed {seed}={folder_of(out, seed, arm) / 'checkpoint'}")]
        common = ["--data", str(world / "test.jsonl"), "--max_new_tokens", "64"]
        if not (folder / "acs.jsonl").is_file():
            evaluate.main(["acs", *models, *common, "--limit", "512", "--out", str(folder)])
        rows += [json.loads(line) for line in open(folder / "acs.jsonl", encoding="utf-8")]
        if seed == seeds[0]:
            evaluate.main(["trace", *models, "--model", f"warm start={world / 'model'}", "--reference",
                           str(world / "model"), *common, "--limit", "12", "--target_layers", "2", "3", "--out",
                           str(out / "trace")])
    (out / "acs.md").write_text(evaluate.acs_table(rows), encoding="utf-8")
    evaluate.draw_acs([row for row in rows if "full" in row["model"]], ROOT / "docs" / "toy_acs.png")


def make_table(results):
    lines = ["| seed | arm | greedy accuracy, test | format | exact captions | tokens | a_t, same text | first third "
             "| last third | last third / η 0 | last / first third |", "|---|---|---|---|---|---|---|---|---|---|---|"]
    for seed, arms in results.items():
        base = arms["mask only (η 0)"]["thirds"][2]
        for arm, r in arms.items():
            lines.append(f"| {seed} | {arm} | {r['accuracy']:.3f} | {r['format']:.3f} | {r['caption']:.3f} | "
                         f"{r['completion_length']:.1f} | {r['a_t']:.3f} | {r['thirds'][0]:.3f} | "
                         f"{r['thirds'][2]:.3f} | {r['thirds'][2] / base:.2f} | "
                         f"{r['thirds'][2] / r['thirds'][0]:.2f} |")
    return "\n".join(lines) + "\n"


def draw_attention(results, path):
    """a_t on the same text against the place in the completion, a panel a seed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.4 * len(results), 4), layout="constrained")
    axes = figure.subplots(1, len(results), sharey=True, squeeze=False)[0]
    for axis, (seed, arms) in zip(axes, results.items()):
        for arm, r in arms.items():
            n = len(r["profile"])
            axis.plot([(i + 0.5) / n for i in range(n)], r["profile"], color=COLORS[arm], label=arm,
                      linestyle="--" if arm == "warm start" else "-")
        axis.set(title=f"toy, seed {seed}", xlabel="place in the completion, t/T")
        axis.grid(alpha=0.3)
    axes[0].set(ylabel="audio attention mass $a_t$", ylim=(0, None))
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(COLORS), fontsize=9)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=110)


def draw_training(out, seeds, path, window=8):
    """Accuracy, length (Fig. 4) and a_t of the policy's own completions (Fig. 5) over steps, all seeds of an arm."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13.5, 3.8), layout="constrained")
    axes = figure.subplots(1, 3)
    for arm in ARMS:
        for seed in seeds:
            metrics = [json.loads(line) for line in open(folder_of(out, seed, arm) / "metrics.jsonl")]
            for axis, name in zip(axes, ("accuracy", "completion_length", "audio_mass_max")):
                values = [m[name] for m in metrics]
                smooth = [statistics.fmean(values[max(0, i + 1 - window):i + 1]) for i in range(len(values))]
                axis.plot([m["step"] for m in metrics], smooth, color=COLORS[arm], alpha=0.85, linewidth=1.2,
                          label=arm if seed == seeds[0] else None)
    for axis, title, unit in ((axes[0], "Training accuracy (sampled)", "share right"),
                              (axes[1], "Completion length", "tokens"),
                              (axes[2], "$a_t$ of its own completions", "share of attention")):
        axis.set(title=title, xlabel="optimizer step", ylabel=unit)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.suptitle(f"toy, one line a seed ({', '.join(map(str, seeds))}), mean of {window} steps", fontsize=9)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
