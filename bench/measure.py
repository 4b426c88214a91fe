"""How the benchmarks measure: each arm in a fresh process, rounds in turn, medians.

Because the arms take turns, a slow moment of the machine affects all of them, and memory that one
arm allocates does not count for another. Peak memory is what the process uses beyond its prepared
inputs: the largest resident set, or on CUDA the peak of torch's allocator. (The resident set is
VmHWM of /proc; ru_maxrss survives exec, so it would start at the parent's peak.)
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

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the scripts import the modules of the repository


def compare(arms, prepare, rounds, threads, device="cpu", once=()):
    """Runs every arm `rounds` times → name → (median of each number, peak bytes of the first run).

    prepare(name) is called in a fresh process. It returns a function without arguments, which is
    called once per round and then either timed (it returns None; the number is "seconds") or
    trusted to measure itself (it returns a dict of numbers). Arms in `once` run in the first round
    only.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train"])  # imports once for all arms, but runs nothing
    pipes, processes = {}, []
    for name in arms:
        pipes[name], far_end = context.Pipe()
        processes.append(context.Process(
            target=_run_arm, args=(far_end, prepare, name, threads, device), daemon=True))
        processes[-1].start()
        far_end.close()
    for pipe in pipes.values():
        pipe.recv()  # all arms are prepared before the first one runs
    numbers, peaks = {name: [] for name in arms}, {}
    for round_number in range(rounds):
        for name, pipe in pipes.items():
            if round_number and name in once:
                continue
            pipe.send("run")
            values, peak = pipe.recv()
            numbers[name].append(values)
            peaks.setdefault(name, peak)
    for pipe in pipes.values():
        pipe.send("end")
    for process in processes:
        process.join()
    return {name: ({key: statistics.median(row[key] for row in rows) for key in rows[0]},
                   peaks[name]) for name, rows in numbers.items()}


def _run_arm(pipe, prepare, name, threads, device):
    """The process of one arm."""
    torch.set_num_threads(threads)
    torch.backends.cuda.enable_cudnn_sdp(False)  # as in a run, see checkpoint.make_policy
    function = prepare(name)
    if device == "cuda":
        function()  # the first call also loads kernels and makes the handles of cuBLAS
    pipe.send("prepared")
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
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def options(doc, rounds=2, device=True):
    """The flags that the scripts share → argparse parser."""
    parser = argparse.ArgumentParser(description=doc.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=rounds, help="runs of every arm")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    if device:
        parser.add_argument("--device", default="cpu")
        parser.add_argument("--dtype", default=None,
                            help="float32 or bfloat16 (default: as in docs/benchmarks.md)")
    return parser


def machine(threads, *packages):
    """One line: processor, threads, versions."""
    names = [line.split(":")[1].strip() for line in open("/proc/cpuinfo")
             if line.startswith("model name")]
    versions = []
    for package in ("torch", "transformers", *packages):
        try:
            versions.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            versions.append(f"no {package}")
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    count = f"{threads} thread{'s' * (threads != 1)}"
    return (f"{names[0] if names else platform.machine()}{gpu}, {count}, "
            f"Python {platform.python_version()}, {', '.join(versions)}")


def table(header, rows):
    """Prints a Markdown table."""
    print("| " + " | ".join(map(str, header)) + " |\n" + "|---" * len(header) + "|")
    for row in rows:
        print("| " + " | ".join(map(str, row)) + " |")
    print(flush=True)
