"""Evaluation: the four benchmarks, their scores, the paper's diagnostics, and contamination.

    python evaluate.py mmau --model DIR --data mmau-test-mini.json --out DIR     # Tables 2 and 3
    python evaluate.py score mmau --predictions FILE --data mmau-test-mini.json  # scoring only
    python evaluate.py trace --model DIR --data FILE --out DIR                   # Figs. 2 and 6
    python evaluate.py pos --trace DIR/trace.jsonl --out DIR                     # Fig. 7
    python evaluate.py acs --model DIR --data FILE --out DIR                     # Eq. 17, Table 4
    python evaluate.py hide --model DIR --data FILE --out DIR                    # is it used?
    python evaluate.py curves RUN [RUN ...] --out DIR                            # Figs. 3, 4, 5, 8
    python evaluate.py contamination --train FILE --benchmark mmau --data FILE

mmar, mmsu and mmau-pro work like mmau. To compare models or runs, give `--model` or RUN several
times, each as DIR or NAME=DIR. `python evaluate.py COMMAND --help` explains every flag.

This file runs the benchmarks and holds the command line. The scoring rules are in scoring.py, the
commands trace, pos and acs in diagnostics.py, hide in hide.py, the pictures in plots.py.
"""

import argparse
import contextlib
import hashlib
import json
import os
import sys
from functools import cache
from pathlib import Path

import numpy as np
import soundfile
import torch
import yaml
from tqdm import tqdm
from tqdm.contrib.concurrent import thread_map
from transformers.utils import logging as transformers_logging

from benchmarks import BENCHMARKS, question_of, read_benchmark, read_predictions
from checkpoint import load_policy
from config import ask_as_in_training
from data import InputError, read_avqa, read_questions, write_whole
from diagnostics import acs_command, batches, claim, load, pos_command, trace_command
from hide import hide_command
from metrics import DISK_FAULTS, check_writable, continue_log
from plots import draw_curves
from rewards import extract_answer
from rollout import Sampling, sample
from scoring import JUDGE_AT_ONCE, JudgeError, ask_judge, load_embedder, map_to_option, score
from server import Command, RolloutError, Server

# ──────── the benchmarks ────────


def benchmark(options):
    """Generates completions, extracts the answers, maps them to options and scores them.

    Writes completions.jsonl, predictions.jsonl, report.json and table.md. An interrupted evaluation
    continues: questions that completions.jsonl has are not asked again. A question whose audio is
    unreadable counts as wrong, is reported by its id, and is tried again by the next call.
    """
    items = read_benchmark(options.command, options.data, options.audio_root)
    judge, embed = open_judge(options), open_embedder(options)
    out = Path(options.out)
    settings = claim(out, options, (
        "command", "model", "data", "engine", "temperature", "seed", "max_new_tokens",
        "instruction", "dtype"))
    rows, unreadable = generate(items, out / "completions.jsonl", options)
    for name, error in unreadable.items():
        print(f"{name}: counted as wrong: {error}")
    answers = {i: row["text"].strip() if options.format_style == "none"
               else extract_answer(row["text"], options.format_style) or ""
               for i, row in rows.items()}
    closed = [item for item in items if item.kind == "closed" and item.id in answers]
    mapped = thread_map(lambda item: map_to_option(answers[item.id], item.choices, judge), closed,
                        max_workers=JUDGE_AT_ONCE, desc="map")
    predictions = {item.id: option for item, option in zip(closed, mapped)}
    unnamed = [i for i, option in predictions.items() if answers[i] and not option]
    if options.command == "mmau-pro":
        # Its scorers take free text, and could give points to an empty one, which we leave out.
        predictions = {i: predictions.get(i) or text for i, text in answers.items() if text}
    write_whole(out / "predictions.jsonl", "".join(
        json.dumps({"id": i, "prediction": prediction, "answer": answers[i]},
                   ensure_ascii=False) + "\n" for i, prediction in predictions.items()))
    report = score(options.command, items, predictions, judge, embed, answers)
    report |= {"settings": settings, "judge": options.judge and options.judge_model,
               "unreadable": unreadable,
               "truncated": sum(row["finish_reason"] == "length" for row in rows.values()),
               "without an answer": sum(not text for text in answers.values()),
               "answers that name no option": len(unnamed)}
    write_report(out, options.command, report, options.model)


def generate(items, path, options):
    """Completes the items that `path` does not have yet, and appends them to it.

    → ({id: row of the file}, {id: error} of items whose audio is unreadable). Raises InputError if
    not a single item could be completed.
    """
    rows, unreadable = {row["id"]: row for row in continue_log(path)}, {}
    missing = [item for item in items if item.id not in rows]
    if missing:
        clips = max(len(item.audio) for item in items)
        with open_engine(options, clips) as (policy, server), \
                open(path, "a", encoding="utf-8") as file:
            for some in batches(missing, options, options.command):
                made, errors = complete(policy, server, some, options)
                unreadable |= errors
                for row in made:
                    rows[row["id"]] = row
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
                file.flush()
    if not rows:
        first_error = next(iter(unreadable.values()))
        raise InputError(f"{options.data}: no question could be asked; error of the first: "
                         f"{first_error}")
    return rows, unreadable


def complete(policy, server, items, options):
    """→ ([{"id", "text", "tokens", "finish_reason"}], {id: error} of unreadable items)."""
    errors, prompts = {}, []
    for item in items:
        try:
            prompts.append(policy.encode(question_of(item), options.instruction))
        except InputError as error:
            errors[item.id] = str(error)
    sampling = Sampling(temperature=options.temperature, max_new_tokens=options.max_new_tokens)
    completions = sample(policy, prompts, 1, sampling, seed=options.seed, server=server)
    return [{"id": prompt.question.id, "text": policy.decode(completion),
             "tokens": len(completion.token_ids), "finish_reason": completion.finish_reason}
            for prompt, completion in zip(prompts, completions)], errors


@contextlib.contextmanager
def open_engine(options, clips):
    """→ (policy, None), to sample in this process, or (policy without weights, its vLLM server).

    clips: the most clips of one question.
    """
    if options.engine == "local":
        yield load(options.model, options), None
        return
    python = Path(__file__).resolve().parent / options.vllm_python
    if not python.is_file():
        raise InputError(f"vllm_python {python}: no such interpreter; run `make vllm` to create "
                         "vLLM's environment")
    policy = load_policy(options.model, meta=True)
    command = Command(python, Path(options.out) / "vllm.log", options.vllm_flags, clips)
    with Server(Path(options.model).resolve(), command) as server:
        yield policy, server


def open_judge(options):
    """→ a function prompt → reply, or None if no judge was given."""
    if not options.judge:
        return None
    key = os.environ.get("JUDGE_API_KEY")
    return lambda prompt: ask_judge(options.judge, options.judge_model, prompt, key)


def open_embedder(options):
    return load_embedder(options.embedder) if options.embedder else None


def score_only(options):
    """Scores the lines {"id", "prediction"} of a file, such as a benchmark's predictions.jsonl.

    MMSU's letters are read from the field "answer" of a line that has it.
    """
    items = read_benchmark(options.benchmark, options.data, options.audio_root)
    predictions, answers = read_predictions(options.predictions)
    report = score(options.benchmark, items, predictions, open_judge(options),
                   open_embedder(options), answers)
    if options.out:
        Path(options.out).mkdir(parents=True, exist_ok=True)
        write_report(Path(options.out), options.benchmark, report, options.predictions)
    else:
        print(json.dumps(report, indent=1, ensure_ascii=False))
        print(markdown_table(options.benchmark, report, Path(options.predictions).name))


# ──────── the report beside the paper's tables ────────

# Heading of each column in the paper's table, and where a report has it; the total comes last.
_TABLE = {
    "mmau": {"Sound": ("groups", "task", "sound"), "Music": ("groups", "task", "music"),
             "Speech": ("groups", "task", "speech"), "Avg.": ()},
    "mmar": {"Sound": ("groups", "modality", "sound"), "Music": ("groups", "modality", "music"),
             "Speech": ("groups", "modality", "speech"), "Avg.": ()},
    "mmsu": {"Perception": ("groups", "category", "Perception"),
             "Reasoning": ("groups", "category", "Reasoning"), "Overall": ()},
    "mmau-pro": {"AIF": ("parts", "instruction following"), "Closed": ("parts", "closed"),
                 "Open": ("parts", "open"), "Overall": ()},
}


def write_report(out, name, report, label):
    """Writes report.json and table.md, and prints the table and the notes.

    label: a path; its name is shown.
    """
    text = json.dumps(report, indent=1, ensure_ascii=False)
    write_whole(out / "report.json", text)
    table = markdown_table(name, report, Path(label).name)
    write_whole(out / "table.md", table)
    print("\n".join([table, *report["notes"]]))


def markdown_table(name, report, label):
    """A report of scoring.score beside the paper's Table 2 or 3 → a Markdown table, in per cent.

    The first row is `label`, then MAPO and its baseline, then the other models in the paper's
    order. A column that the report does not have, or that was not scored, shows "–".
    """
    if report["benchmark"] != name:
        raise InputError(f"a table of {name!r} from a report of {report['benchmark']!r}; name the "
                         "report's benchmark")
    ours = [_accuracy(report, keys) for keys in _TABLE[name].values()]
    rows = [(label.replace("|", "\\|"), [None if x is None else 100 * x for x in ours])]
    paper = paper_tables()[name]
    rows += [(f"{model} (paper)", paper[model])
             for model in dict.fromkeys(("MAPO", "Qwen3-Omni-Thinking", *paper))]
    lines = [f"| Model | {' | '.join(_TABLE[name])} |", "|---" + "|---:" * len(ours) + "|"]
    for model, values in rows:
        cells = ["–" if value is None else f"{value:.2f}" for value in values]
        lines.append(f"| {model} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _accuracy(report, keys):
    for key in keys:
        report = report.get(key, {})
    return report.get("accuracy")


@cache
def paper_tables():
    """Tables 1 to 3 as printed: {"table 1" or a benchmark: {model: accuracies in per cent}}."""
    path = Path(__file__).resolve().parent / "docs" / "paper_tables.yaml"
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def paper_averages():
    """Table 1's averages, recomputed from Tables 2 and 3.

    → {model: unweighted mean of its four totals}, for the models that all four tables have.
    """
    tables = [paper_tables()[name] for name in BENCHMARKS]
    in_all = [model for model in tables[0] if all(model in table for table in tables)]
    return {model: sum(table[model][-1] for table in tables) / len(tables) for model in in_all}


# ──────── training curves, contamination ────────


def curves_command(options):
    """Draws several runs in one picture each: attention loss (Fig. 3), accuracy and completion
    length (Fig. 4), audio attention mass (Fig. 5), accuracy and words of thinking (Fig. 8)."""
    names = draw_curves(options.run, options.out, options.window, options.format_style)
    print(f"{options.out}: {', '.join(names)}")


def contamination_command(options):
    """Compares a training file and a benchmark by id, name of the audio file, and its samples.

    Samples are compared by a hash of their 16-bit values, so the wav and the flac of one recording
    are the same.
    """
    train = (read_questions(options.train, decode=False) if options.train_format == "jsonl"
             else read_avqa(options.train, options.train_audio_root, decode=False))
    items = read_benchmark(options.benchmark, options.data, options.audio_root)
    ours, theirs = fingerprints(train), fingerprints(items)
    shared = {kind: sorted(ours[kind] & theirs[kind]) for kind in ours}
    for kind, values in shared.items():
        print(f"{kind}: {len(values)} shared, of {len(ours[kind])} in training and "
              f"{len(theirs[kind])} in the benchmark" + (f"; first {values[:5]}" if values else ""))
    if options.out:
        Path(options.out).mkdir(parents=True, exist_ok=True)
        text = json.dumps(shared, indent=1, ensure_ascii=False)
        (Path(options.out) / "contamination.json").write_text(text)


def fingerprints(questions):
    """→ {"id", "audio file name", "audio samples": a set each}. Unreadable files are reported."""
    found = {"id": set(), "audio file name": set(), "audio samples": set()}
    for question in tqdm(questions, desc="hash", leave=False):
        found["id"].add(question.id)
        for path in question.audio:
            found["audio file name"].add(path.stem)
            try:
                samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
            except (soundfile.SoundFileError, OSError, TypeError, ValueError) as error:
                print(f"{question.id}: {path} is unreadable and was not compared: {error}")
                continue
            samples = np.nan_to_num(samples).clip(-1, 1)
            samples = np.round(samples * 2**15).clip(max=2**15 - 1).astype("<i2")
            content = f"{rate} {samples.shape}".encode() + samples.tobytes()
            found["audio samples"].add(hashlib.sha256(content).hexdigest())
    return found


# ──────── the command line ────────


class Named(argparse.Action):
    """DIR or NAME=DIR, several times → {name: folder}. The default name is the folder's own."""

    def __call__(self, parser, namespace, values, option_string=None):
        named = dict(getattr(namespace, self.dest) or {})
        for value in values if isinstance(values, list) else [values]:
            name, equals, folder = value.partition("=")
            if not equals or Path(value).exists():
                name, folder = Path(value).name, value
            if name in named:
                parser.error(f"{value}: the name {name!r} is given twice; use NAME=DIR")
            named[name] = folder
        setattr(namespace, self.dest, named)


def read_options(arguments):
    parser = argparse.ArgumentParser(prog="evaluate.py", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name, run, help):
        sub = commands.add_parser(name, help=help, description=run.__doc__)
        sub.set_defaults(run_command=run)
        return sub

    for name in BENCHMARKS:
        sub = command(name, benchmark, "generate, map to an option, score")
        sub.add_argument("--model", required=True, metavar="DIR")
        _add_generation(sub, batch_size=64, styles=("think", "reasoning", "none"))
        _add_scoring(sub)
        sub.add_argument("--out", required=True)
        sub.add_argument("--engine", default="local", choices=("local", "vllm"))
        sub.add_argument("--vllm_python", default=".venv-vllm/bin/python")
        sub.add_argument("--vllm_flags", default="",
                         help="further flags of vLLM, as one string: --vllm_flags=\"…\"")
        sub.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
        sub.add_argument("--seed", type=int, default=0)

    sub = command("score", score_only, "score predictions")
    sub.add_argument("benchmark", choices=BENCHMARKS)
    sub.add_argument("--predictions", required=True, help='jsonl, {"id", "prediction"} per line')
    _add_scoring(sub)
    sub.add_argument("--out")

    for name, run, limit, help in (
            ("trace", trace_command, 8, "what the equations see at each token"),
            ("acs", acs_command, None, "local evidence masking, Eq. 17"),
            ("hide", hide_command, None, "accuracy when late tokens cannot see the audio")):
        sub = command(name, run, help)
        sub.add_argument("--model", required=True, action=Named, metavar="[NAME=]DIR")
        _add_generation(sub, batch_size=8, styles=("think", "reasoning"))
        sub.add_argument("--data", required=True,
                         help="our jsonl of questions, or a benchmark's own file")
        sub.add_argument("--benchmark", choices=BENCHMARKS,
                         help="the benchmark of --data; its closed questions are asked")
        sub.add_argument("--audio_root", help="where a benchmark's audio paths start "
                                              "(default: the file's folder)")
        sub.add_argument("--out", required=True)
        sub.add_argument("--limit", type=int, default=limit,
                         help="only the first questions (default %(default)s)")
        sub.add_argument("--target_layers", type=int, nargs="+",
                         help="L_tgt, counted from 0 (default: the last five)")
        if name == "hide":
            sub.add_argument("--after", type=float, default=1 / 3, help="share of a completion "
                             "after which the audio is hidden (default %(default).2f)")
        if name == "trace":
            sub.add_argument("--reference", help="folder of π_text-ref (default: the model itself)")
            sub.add_argument("--completions", help='jsonl, {"id", "token_ids"} per line '
                                                   '(default: greedy completions)')
            sub.add_argument("--temperature", type=float, default=1.0, help="of the distributions")

    sub = command("pos", pos_command, "entropies by part of speech")
    sub.add_argument("--trace", required=True, help="trace.jsonl of the trace command")
    sub.add_argument("--out", required=True)

    sub = command("curves", curves_command, "training curves of several runs")
    sub.add_argument("run", nargs="+", action=Named, metavar="[NAME=]RUN",
                     help="output folders of train.py")
    sub.add_argument("--out", required=True)
    sub.add_argument("--window", type=int, default=8, help="steps of the moving mean")
    sub.add_argument("--format_style", default="think", choices=("think", "reasoning"))

    sub = command("contamination", contamination_command, "what training and benchmark share")
    sub.add_argument("--train", required=True, help="training questions")
    sub.add_argument("--train_format", default="jsonl", choices=("jsonl", "avqa"),
                     help="train.py's data_format")
    sub.add_argument("--train_audio_root", help="where AVQA's audio paths start (default: the "
                                                "file's folder)")
    sub.add_argument("--benchmark", required=True, choices=BENCHMARKS)
    sub.add_argument("--data", required=True)
    sub.add_argument("--audio_root")
    sub.add_argument("--out")
    return parser.parse_args(arguments)


def _add_generation(sub, batch_size, styles):
    sub.add_argument("--instruction", help="text after the options (default: as in the run that "
                                           "wrote the checkpoint --model, else none)")
    sub.add_argument("--format_style", choices=styles, help="default: as in that run, else think")
    sub.add_argument("--max_new_tokens", type=int, default=2048)
    sub.add_argument("--batch_size", type=int, default=batch_size,
                     help="questions at a time (default %(default)s)")
    sub.add_argument("--dtype", default="bfloat16" if torch.cuda.is_available() else "float32",
                     choices=("bfloat16", "float32", "float64"))


def _add_scoring(sub):
    sub.add_argument("--data", required=True, help="the benchmark's own file")
    sub.add_argument("--audio_root", help="where its audio paths start (default: the file's "
                                          "folder)")
    sub.add_argument("--judge", help="base URL of an OpenAI-compatible server; its key is read "
                                     "from JUDGE_API_KEY")
    sub.add_argument("--judge_model", default="Qwen2.5-7B-Instruct")
    sub.add_argument("--embedder", help="for MMAU-Pro: a folder of sentence-transformers, or "
                                        "nvidia/NV-Embed-v2")


def main(arguments):
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()  # its reports on a broken checkpoint are very long
    options = read_options(arguments)
    try:
        if options.out:
            check_writable(Path(options.out), f"--out {options.out}")
        if "instruction" in options:
            ask_as_in_training(options)
        options.run_command(options)
    except (InputError, LookupError) as error:
        if type(error) not in (InputError, LookupError):  # a KeyError is a bug of ours
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (JudgeError, RolloutError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        if error.errno not in DISK_FAULTS:
            raise
        print(f"error: {error.filename or options.out}: {error.strerror}; free some space, or "
              "check the disk. What was written is kept", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
