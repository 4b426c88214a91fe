"""train.py with another reward, and with faults on demand. test_distributed.py starts it.

    run_train.py FLAGS [--then FLAGS ...]     # one run, or several in turn by the same processes

Among the flags of one of several runs, --bf16 gathers the parameters in bf16, as on a GPU.

A random model never answers in the right format, so the accuracy reward depends on the text alone.

The environment asks for a fault of rank FAULT_RANK (default 0). FAULT is an act and a moment, such
as `kill step 3`:

    act              what happens
    kill             SIGKILL
    raise            an exception
    term             SIGTERM
    term-agent       SIGTERM to torchrun's agent

    moment           when
    step K           before the K-th optimizer step
    fsync K          before the K-th file of a state is flushed
    copyfile         when a checkpoint is half written
    before NAME      before the folder NAME is renamed
    after NAME       after that

HELD=1 writes held-RANK.json into output_dir: how many numbers the rank holds after a step.
"""

import contextlib
import json
import os
import shutil
import signal
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

ROOT = str(Path(__file__).resolve().parents[2])
sys.path[:0] = [ROOT] if ROOT not in sys.path else []

import torch
import torch.distributed as dist

import train

seen = Counter()


def moment(name):
    """The fault happens here if this is its moment."""
    act, _, when = os.environ.get("FAULT", "").partition(" ")
    rank = os.environ.get("RANK", "0")
    if when != name or os.environ.get("FAULT_RANK", "0") != rank:
        return
    if act == "raise":
        raise RuntimeError(f"the fault of rank {rank}")
    process = os.getppid() if act == "term-agent" else os.getpid()
    os.kill(process, signal.SIGKILL if act == "kill" else signal.SIGTERM)


def counted(name, function):
    """`function`, with a moment before each call: name 1, name 2, …"""
    def call(*arguments, **named):
        seen[name] += 1
        moment(f"{name} {seen[name]}")
        return function(*arguments, **named)
    return call


def install():
    def rename(path, target, original=Path.rename):
        moment(f"before {path.name}")
        result = original(path, target)
        moment(f"after {path.name}")
        return result

    def copyfile(*arguments, original=shutil.copyfile, **named):
        moment("copyfile")
        return original(*arguments, **named)

    train.accuracy_reward = lambda text, *_: float(len(text) % 2)
    Path.rename, shutil.copyfile = rename, copyfile
    torch.optim.AdamW.step = counted("step", torch.optim.AdamW.step)
    os.fsync = counted("fsync", os.fsync)
    if "HELD" in os.environ:
        train.update = held_after(train.update)
        train.reference_passes = held_by_reference(train.reference_passes)


def numbers(tensors):
    return sum((t.to_local() if hasattr(t, "to_local") else t).numel() for t in tensors)


def held_after(update):
    def call(batch, rows, step, run):
        result = update(batch, rows, step, run)
        parameters = list(run.policy.parameters())
        held = {"weights": numbers(parameters),
                "gradients": numbers(p.grad for p in parameters if p.grad is not None),
                "AdamW": numbers(value for state in run.optimizer.state.values()
                                 for name, value in state.items() if name != "step"),
                "reference": seen["reference"]}
        Path(run.config.output_dir, f"held-{run.team.rank}.json").write_text(json.dumps(held))
        return result
    return call


def held_by_reference(reference_passes):
    def call(batch, run):
        with run.reference() as frozen:
            seen["reference"] = 0 if frozen is run.policy else numbers(frozen.parameters())
        return reference_passes(batch, run)
    return call


def main(arguments):
    torch.set_num_threads(1)
    os.sched_getaffinity = lambda _: {0}  # join: one thread for each rank, however many cores
    install()
    runs = [[]]
    for argument in arguments:
        runs[-1].append(argument) if argument != "--then" else runs.append([])
    low = ["--bf16" in flags for flags in runs]
    runs = [[flag for flag in flags if flag != "--bf16"] for flags in runs]
    if len(runs) == 1:
        return train.main(runs[0])
    with train.join(train.read_config(runs[0])) as team:
        for number, flags in enumerate(runs):
            train.join = lambda _, number=number: part_of(team, number, low[number])
            if code := train.main(flags):
                return code
    return 0


@contextlib.contextmanager
def part_of(team, number, low):
    """The team for one of several runs: the job's processes and groups, but a store of its own.

    low: gather the parameters in bf16, as on a GPU.
    """
    team = replace(team, store=dist.PrefixStore(f"run-{number}", team.store),
                   dtype=torch.bfloat16 if low else None)
    yield team
    if team.leads:
        team.store.set("over", "well")


def forked(arguments, environment, output):
    """main() in a process that was forked from one with all modules loaded."""
    os.setsid()
    os.environ.update(environment)
    log = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.exit(main(arguments))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
