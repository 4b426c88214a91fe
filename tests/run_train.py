"""train.py with a reward that differs, and with faults on demand: what test_distributed.py starts.

    run_train.py FLAGS [--then FLAGS ...]        # one run, or several after another by the same processes

A random model never answers in the right form, so the accuracy reward is a function of the text alone. The environment
may ask for a fault of rank FAULT_RANK (default 0): FAULT is an act and a moment, such as `kill step 3`.
    acts       kill: SIGKILL; raise: an exception; term: SIGTERM; term-agent: SIGTERM to torchrun's agent
    moments    step K: before the K-th optimizer step; fsync K: before the K-th file of a state is flushed; copyfile: a
               checkpoint is half written; before NAME, after NAME: the folder NAME is renamed, or has been
HELD=1 writes held-RANK.json into output_dir: numbers of fp32 that the rank keeps after an optimizer step.
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

sys.path[:0] = [path for path in (str(Path(__file__).resolve().parents[1]),) if path not in sys.path]

import torch
import torch.distributed as dist

import train

seen = Counter()


def moment(name):
    """Here the fault happens that was asked for."""
    act, _, when = os.environ.get("FAULT", "").partition(" ")
    if when != name or os.environ.get("FAULT_RANK", "0") != os.environ.get("RANK", "0"):
        return
    if act == "raise":
        raise RuntimeError(f"the fault of rank {os.environ.get('RANK', '0')}")
    os.kill(os.getppid() if act == "term-agent" else os.getpid(), signal.SIGKILL if act == "kill" else signal.SIGTERM)


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
    torch.optim.AdamW.step, os.fsync = counted("step", torch.optim.AdamW.step), counted("fsync", os.fsync)
    if "HELD" in os.environ:
        train.update, train.freeze = held_after(train.update), held_by_reference(train.freeze)


def numbers(tensors):
    return sum((t.to_local() if hasattr(t, "to_local") else t).numel() for t in tensors)


def held_after(update):
    def call(policy, optimizer, batch, rows, config, measure, team):
        result = update(policy, optimizer, batch, rows, config, measure, team)
        parameters = list(policy.parameters())
        held = {"weights": numbers(parameters),
                "gradients": numbers(p.grad for p in parameters if p.grad is not None),
                "AdamW": numbers(v for state in optimizer.state.values() for n, v in state.items() if n != "step"),
                "reference": seen["reference"]}
        Path(config.output_dir, f"held-{team.rank}.json").write_text(json.dumps(held))
        return result
    return call


def held_by_reference(freeze):
    def call(batch, policy, reference, config, *more):
        with reference() as frozen:
            seen["reference"] = 0 if frozen is policy else numbers(frozen.parameters())
        return freeze(batch, policy, reference, config, *more)
    return call


def main(arguments):
    torch.set_num_threads(1)
    install()
    runs = [[]]
    for argument in arguments:
        runs[-1].append(argument) if argument != "--then" else runs.append([])
    if len(runs) == 1:
        return train.main(runs[0])
    with train.join(train.read_config(runs[0])) as team:
        for number, flags in enumerate(runs):
            train.join = lambda _, number=number: part_of(team, number)
            if code := train.main(flags):
                return code
    return 0


@contextlib.contextmanager
def part_of(team, number):
    """The team of one of several runs in a job: the job's processes and groups, and a store of its own."""
    team = replace(team, store=dist.PrefixStore(f"run-{number}", team.store))
    yield team
    if team.leads:
        team.store.set("over", "well")


def forked(arguments, environment, output):
    """The same in a process that was forked from one with all modules loaded."""
    os.setsid()
    os.environ.update(environment)
    log = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.exit(main(arguments))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
