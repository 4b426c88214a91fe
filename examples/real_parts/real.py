"""GRPO and MAPO on a small audio LLM of real pretrained parts: `make real`.

    python examples/real_parts/real.py                       # seed 0, two arms at the same time
    python examples/real_parts/real.py --seeds 0 1 --steps 150

builds the model (build.py), writes the questions (questions.py), aligns the model (align.py),
trains it with train.py, and measures each model on the held-out questions. Every part is kept in
the output folder. A second call continues where the first one stopped: finished parts are not done
again, and training resumes from its last state. Runs with --steps have folders of their own.
"""

import argparse
import dataclasses
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from matplotlib.figure import Figure
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT))
from checkpoint import load_policy, states_in  # noqa: E402
from config import read_recipe  # noqa: E402
from data import json_lines, read_questions, write_whole  # noqa: E402
from mapo import audio_attention_mass  # noqa: E402
from rewards import accuracy_reward  # noqa: E402
from rollout import Sampling, sample  # noqa: E402

ARMS = {"GRPO": ["--mask", "false", "--eta", "0"], "MAPO": []}
RECIPE = read_recipe(HERE / "recipe.yaml")
LAYERS = tuple(RECIPE["target_layers"])  # L_tgt
LONGEST = RECIPE["max_new_tokens"]  # tokens of a completion
AT_ONCE = 64  # questions of a forward
WINDOW = 10  # steps that a point of the accuracy curve is the mean of
MASS_QUESTIONS = 200  # held-out questions whose completions a_t is measured on


def main(arguments):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/real"), help="output folder")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the training")
    parser.add_argument("--steps", type=int, help="optimizer steps (default: the recipe's)")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the training ends as well
    out, cost = options.out, Costs(options.out / "costs.json")
    out.mkdir(parents=True, exist_ok=True)
    model, questions, aligned = out / "model", out / "questions", out / "aligned"
    test = questions / "test.jsonl"
    cost.part("model", model, lambda folder: script("build.py", folder))
    cost.part("questions", questions, lambda folder: script("questions.py", folder))
    cost.part("alignment", aligned, lambda folder: script(
        "align.py", model, questions / "train.jsonl", folder))
    cost.part("evaluation of the alignment", out / "aligned.json",
              lambda file: evaluate(aligned, test, file))
    ending = f"-{options.steps}-steps" if options.steps else ""
    runs = {(arm, seed): out / f"{arm}-{seed}{ending}" for arm in ARMS for seed in options.seeds}
    started = time.time()
    failed = train(runs, aligned, questions / "train.jsonl", options.steps)
    cost.add("training", time.time() - started)
    if failed:
        print(f"error: {', '.join(failed)} failed or was stopped; see above, then call again to "
              "continue", file=sys.stderr)
        return 1
    for (arm, seed), run in runs.items():
        cost.part(f"evaluation of {arm}, seed {seed}", run / "held_out.json",
                  lambda file: evaluate(run / "checkpoint", test, file, out / "aligned.json"))
    text = report(out, runs)
    write_whole(out / "report.md", text)
    draw(runs, out / "training.png")
    print(text)
    print(f"{out}: report.md, training.png; costs.json has seconds and memory")
    return 0


class Costs:
    """Runs the parts that are not there yet, and keeps their seconds and memory in a file."""

    def __init__(self, file):
        self.file = file

    def part(self, name, path, make):
        """make(path beside the final one), renamed when it is whole."""
        if path.exists():
            print(f"{name}: {path} is there")
            return
        building, started = path.with_name(f".{path.name}.building"), time.time()
        shutil.rmtree(building, ignore_errors=True)
        make(building)
        building.rename(path)
        self.add(name, time.time() - started)

    def add(self, name, seconds):
        """Adds to what earlier calls spent on the same part."""
        gib = max(resource.getrusage(who).ru_maxrss / 2**20
                  for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        costs = json.loads(self.file.read_text()) if self.file.is_file() else {}
        before = costs.get(name, [0, 0])
        costs[name] = [round(before[0] + seconds), round(max(before[1], gib), 2)]
        write_whole(self.file, json.dumps(costs))
        print(f"{name}: {seconds / 60:.1f} minutes; the largest process so far, {gib:.1f} GiB")


def script(name, *arguments):
    """Runs a file of this folder in a process of its own, which gives its memory back."""
    done = subprocess.run([sys.executable, HERE / name, *map(str, arguments)])
    if done.returncode:
        sys.exit(f"error: {name} failed; see above")


# ──────── training ────────


def train(runs, model, data, steps):
    """Trains the runs that have no checkpoint, one thread each, as many at a time as there are
    cores; on a GPU all at once. → the folders' names of those that left no checkpoint"""
    waiting = [(name, run) for name, run in runs.items() if not (run / "checkpoint").exists()]
    at_once = len(waiting) if torch.cuda.is_available() else os.cpu_count()
    running, failed = {}, []
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                (arm, seed), run = waiting.pop(0)
                # One progress bar is enough.
                quiet = {"TQDM_DISABLE": "1"} if running else {}
                # In a session of its own, Ctrl-C does not reach it: we end it, see below.
                running[run] = subprocess.Popen(
                    command(run, model, data, arm, seed, steps), start_new_session=True,
                    env={**os.environ, "OMP_NUM_THREADS": "1", **quiet})
            time.sleep(1)
            for run, process in list(running.items()):
                if process.poll() is not None:
                    del running[run]
                    # train.py also returns 0 when somebody ended it with SIGTERM.
                    if process.returncode or not (run / "checkpoint").exists():
                        failed.append(run.name)
    finally:
        for process in running.values():
            process.terminate()  # train.py finishes its step and saves its state
        for process in running.values():
            process.wait()
    return failed


def command(run, model, data, arm, seed, steps):
    """The command line of train.py, which resumes if the run has saved a state."""
    again = "resume" if states_in(run / "state") else "overwrite"
    length = ["--max_steps", steps] if steps else []
    return list(map(str, [sys.executable, ROOT / "train.py", HERE / "recipe.yaml",
                          "--model", model, "--data", data, "--output_dir", run, "--seed", seed,
                          f"--{again}", "true", *length, *ARMS[arm]]))


# ──────── measuring ────────


def evaluate(folder, test, file, texts_from=None):
    """Writes greedy accuracies and a_t of a model on the held-out questions as json.

    accuracy: by domain, with the question's own clip, with another one that does not hold the right
    answer, and without a clip. mass: a_t over all tokens and over the last third, on completions
    that are the same for all models: those of `texts_from`, or else the model's own.
    """
    policy = load_policy(folder)
    if torch.cuda.is_available():
        policy.cuda()
    questions = read_questions(test)
    heard = {row["id"]: row["heard"] for _, row in json_lines(test)}
    clips = {"own": questions, "swapped": swapped(questions, heard), "none": questions}
    accuracy, completions = {}, {}
    for name, asked in clips.items():
        right, completions[name] = answers(policy, asked, name)
        accuracy[name] = {domain: mean(r for r, q in zip(right, questions) if q.domain == domain)
                          for domain in dict.fromkeys(q.domain for q in questions)}
        accuracy[name]["all"] = mean(right)
    ids = completions["own"][:MASS_QUESTIONS]
    if texts_from:
        ids = json.loads(texts_from.read_text())["completions"]
    masses = audio_masses(policy, questions[:MASS_QUESTIONS], ids)
    # The last third, rounded up. (metrics.py rounds it down.)
    late = [x for mass in masses for x in mass[2 * len(mass) // 3:]]
    file.write_text(json.dumps({
        "accuracy": accuracy, "mass": {"all": mean(x for mass in masses for x in mass),
                                       "late": mean(late)},
        "tokens": mean(map(len, completions["own"])), "completions": ids}))


def mean(values):
    values = list(values)
    return sum(values) / len(values)


def swapped(questions, heard):
    """Each question with the clip of the next one of its kind whose sounds do not answer it."""
    result = []
    for i, question in enumerate(questions):
        others = questions[i + 1:] + questions[:i]
        other = next(o for o in others if len(heard[o.id]) == len(heard[question.id])
                     and question.answer not in heard[o.id])
        result.append(dataclasses.replace(question, audio=other.audio))
    return result


def answers(policy, questions, clip):
    """Greedy completions → [1.0 or 0.0 for each], and their token ids. clip "none": text alone."""
    greedy, right, ids = Sampling(temperature=0, max_new_tokens=LONGEST), [], []
    for first in tqdm(range(0, len(questions), AT_ONCE), desc=f"evaluate: clip {clip}"):
        prompts = policy.encode_audio([policy.encode(q) for q in questions[first:first + AT_ONCE]])
        if clip == "none":
            prompts = [dataclasses.replace(p, ids=p.text_ids, embeddings=p.embeddings[:0])
                       for p in prompts]
        for prompt, completion in zip(prompts, sample(policy, prompts, 1, greedy, seed=0)):
            question = prompt.question
            right.append(accuracy_reward(policy.decode(completion), question.answer,
                                         question.choices))
            ids.append(completion.token_ids)
    return right, ids


@torch.no_grad()
def audio_masses(policy, questions, ids):
    """a_t of each completion → lists of [T]."""
    masses = []
    for first in tqdm(range(0, len(questions), AT_ONCE), desc="evaluate: a_t"):
        part = slice(first, first + AT_ONCE)
        prompts = policy.encode_audio([policy.encode(q) for q in questions[part]])
        batch = policy.collate(prompts, ids[part])
        mass = audio_attention_mass(policy(batch, target_layers=LAYERS).head_mass)  # [B, T]
        masses += [row[:len(y)].tolist() for row, y in zip(mass, ids[part])]
    return masses


# ──────── reporting ────────


def report(out, runs):
    """A Markdown table: accuracy with each clip, by domain, and a_t."""
    measured = {"after alignment": json.loads((out / "aligned.json").read_text())}
    for (arm, seed), run in runs.items():
        measured[f"{arm}, seed {seed}"] = json.loads((run / "held_out.json").read_text())
    first = measured["after alignment"]["accuracy"]
    columns = [(f"{clip} clip, {domain}", clip, domain) for clip in first for domain in first[clip]
               if clip == "own" or domain == "all"]
    lines = ["| | " + " | ".join(name for name, *_ in columns) + " | a_t | a_t, last third | "
             "tokens |", "|---" * (len(columns) + 4) + "|"]
    for name, values in measured.items():
        cells = [f"{values['accuracy'][clip][domain]:.3f}" for _, clip, domain in columns]
        cells += [f"{values['mass'][part]:.4f}" for part in ("all", "late")]
        lines.append(f"| {name} | {' | '.join(cells)} | {values['tokens']:.1f} |")
    return "\n".join(lines) + "\n"


def draw(runs, path):
    """Accuracy of the sampled training answers, and a_t, over the steps of every run."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axes = figure.subplots(1, 2)
    for (arm, seed), run in runs.items():
        metrics = [row for _, row in json_lines(run / "metrics.jsonl")]
        for axis, key in zip(axes, ("accuracy", "audio_mass_max")):
            points = [(row["step"], row[key]) for row in metrics if row.get(key) is not None]
            if key == "accuracy":  # a step has only eight questions
                points = [(step, mean(value for _, value in points[i + 1 - WINDOW:i + 1]))
                          for i, (step, _) in enumerate(points) if i + 1 >= WINDOW]
            if not points:  # a run of fewer steps
                continue
            axis.plot(*zip(*points), color=f"C{list(ARMS).index(arm)}", alpha=0.8,
                      linestyle=("-", "--", ":", "-.")[seed % 4],
                      label=f"{arm}, seed {seed}")
    for axis, title in zip(axes, (f"Accuracy of sampled answers (mean of {WINDOW} steps)",
                                  "$a_t$, mean over all tokens")):
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("optimizer step")
    axes[1].set_ylim(bottom=0)
    axes[1].legend(fontsize=8)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
