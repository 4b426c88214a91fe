"""How the benchmarks measure: every arm in a fresh process of its own, their repeats in turn, the median of each.

A slow moment of the machine hits all arms, and what one arm allocates does not count for another. Peak memory is the
process's largest resident set less what it was when the inputs stood; on CUDA the allocator's own peak. (The set is
VmHWM of /proc: ru_maxrss survives exec, and would begin with the parent's.)
"""

import argparse
import multiprocessing
import platform
import statistics
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def options(doc, rounds=2, device=True):
    """Flags that the scripts share."""
    parser = argparse.ArgumentParser(description=doc.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=rounds, help="repeats of every arm")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    if device:
        parser.add_argument("--device", default="cpu")
        parser.add_argument("--dtype", default=None, help="float32 or bfloat16; by default those of the README")
    return parser


def machine(threads, *packages):
    """One line: processor, threads, versions."""
    names = [line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")]
    found = []
    for package in ("torch", "transformers", *packages):
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            found.append(f"{package} absent")
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return (f"{names[0] if names else platform.machine()}{gpu}, {threads} threads, Python {platform.python_version()}, "
            f"{', '.join(found)}")


def compare(arms, prepare, rounds, threads, device="cpu", once=()):
    """arms: names. prepare(name) is called in a fresh process and gives a function without arguments, which is called
    once a round; those of `once` in the first alone. → name → (median of each number that it returns, peak bytes of its
    first call).

    A function that returns None is timed; one that returns a dict of numbers has timed itself.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train"])  # imported once for all of them, where it is found; nothing has run in it
    pipes, processes = {}, []
    for name in arms:
        pipes[name], far = context.Pipe()
        processes.append(context.Process(target=_serve, args=(far, prepare, name, threads, device), daemon=True))
        processes[-1].start()
        far.close()
    assert all(pipe.recv() for pipe in pipes.values())  # all stand before the first starts
    numbers, peaks = {name: [] for name in arms}, {}
    for number in range(rounds):
        for name, pipe in pipes.items():
            if number and name in once:
                continue
            pipe.send("run")
            values, peak = pipe.recv()
            numbers[name].append(values)
            peaks.setdefault(name, peak)
    for pipe in pipes.values():
        pipe.send("end")
    for process in processes:
        process.join()
    return {name: ({key: statistics.median(row[key] for row in rows) for key in rows[0]}, peaks[name])
            for name, rows in numbers.items()}


def _serve(pipe, prepare, name, threads, device):
    torch.set_num_threads(threads)
    function = prepare(name)
    pipe.send(True)
    while pipe.recv() == "run":
        if device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        before = memory(device)
        started = time.perf_counter()
        values = function()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
        peak = torch.cuda.max_memory_allocated() if device == "cuda" else memory(device)
        pipe.send((values or {"seconds": seconds}, peak - before))


def memory(device):
    """Bytes: the largest resident set so far; on CUDA what is allocated now."""
    if device == "cuda":
        return torch.cuda.memory_allocated()
    line = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def table(header, rows):
    """Prints a markdown table."""
    print("| " + " | ".join(map(str, header)) + " |\n" + "|---" * len(header) + "|")
    for row in rows:
        print("| " + " | ".join(map(str, row)) + " |")
    print(flush=True)
