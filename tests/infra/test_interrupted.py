"""Runs, evaluations and exports that are killed at any moment, or whose disk fills up.

Then the next ordinary command: nothing that was on disk is lost, no weights of another run are
used, and what is refused is refused in one line.
"""

import contextlib
import itertools
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import threading

import numpy as np
import pytest
import soundfile
import tiny
import torch
from peft import PeftModel  # noqa: F401  (slow to import: once, for all child processes)
from test_distributed import assert_same_run

import checkpoint
import evaluate
import metrics
import pos_gate
import run
import train
from checkpoint import is_whole, states_in
from tiny import arguments, lines

MOMENTS = 5  # at which each kind of process is killed


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a tiny model and six questions. Some completions end before max_new_tokens."""
    pos_gate.load_tagger()  # once, for all child processes
    return tiny.write_world(tmp_path_factory.mktemp("world"), tiny.qwen3_omni_that_ends(0.7))


def in_child(function, *arguments):
    """Calls a function in a forked process → its exit code, or minus a signal, and the output."""
    reader, writer = os.pipe()

    def child():
        os.close(reader)
        for stream in (1, 2):
            os.dup2(writer, stream)
        text = open(1, "w", buffering=1, closefd=False)
        with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
            code = function(*arguments)
        sys.exit(code)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    os.close(writer)
    with open(reader, "rb") as output:
        printed = output.read().decode(errors="replace")
    process.join()
    return process.exitcode, printed


def command(main, flags):
    """Runs train.main or evaluate.main in this process, with other rewards and a quick picture."""
    torch.set_num_threads(1)
    train.accuracy_reward = lambda text, *_: float(len(text) % 2)
    train.format_reward = lambda text, *_: float(len(text) % 3 == 0)
    train.plot_training = picture
    return main(list(map(str, flags)))


def picture(folder):
    (folder / "training.png").write_bytes(b"a picture")


def words(output):
    """The errors and warnings in the output, and tracebacks."""
    return [line for line in output.replace("\r", "\n").splitlines()
            if line.startswith(("error: ", "warning: ")) or "Traceback" in line]


# ──────── killed ────────


def killed(main, flags, event=None, seconds=None):
    """`command`, until its process kills itself: before the event-th change of a file, or by time.

    Without either, it prints the number of changes.
    """
    changes = itertools.count(1)
    if seconds is not None:
        threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL)).start()

    def changed():
        if next(changes) == event:
            os.kill(os.getpid(), signal.SIGKILL)

    def hook(name, arguments):
        writes = name == "open" and isinstance(arguments[2], int) \
            and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if writes or name in ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate"):
            changed()

    sys.addaudithook(hook)
    open_log = metrics.open_log

    @contextlib.contextmanager
    def counted(*more):
        with open_log(*more) as log:
            yield lambda *record: (log(*record), changed())

    def completed(*more, complete=evaluate.complete):
        changed()
        return complete(*more)

    train.open_log, evaluate.complete = counted, completed
    code = command(main, flags)
    print(f"changes: {next(changes) - 1}")
    return code


def moments(main, flags, rng):
    """Runs the command to its end, then → keywords of `killed` for MOMENTS random moments.

    Every fourth is a time, which may fall inside a library's write or a computation. The others are
    changes of files.
    """
    started = os.times().elapsed
    code, output = in_child(killed, main, flags)
    seconds = os.times().elapsed - started
    assert code == 0, output
    changes = int(output.rpartition("changes: ")[2])
    return [{"seconds": rng.uniform(0.02, 0.9) * seconds} if number % 4 == 3
            else {"event": rng.randint(1, changes)} for number in range(MOMENTS)]


def long(world, out, *more):
    return arguments(world, out, "--save_every", "1", "--export_every", "1", "--lora_rank", "2",
                     "--lora_alpha", "8", "--max_new_tokens", "6", "--micro_batch_size", "8",
                     "--eval_data", world / "train.jsonl", *more)


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):
    """The same run without interruption."""
    out = tmp_path_factory.mktemp("whole") / "out"
    code, output = in_child(command, train.main, long(world, out))
    assert code == 0 and not words(output), output
    return out


def files(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_exports(folder, whole, every):
    """What is there under its own name is whole; with `every`, nothing is missing."""
    names = [f"{kind}{step}" for kind in ("checkpoint", "adapter")
             for step in ("-1", "-2", "-3", "")]
    for name in names:
        if every or (folder / name).exists():
            here, there = files(folder / name), files(whole / name)
            assert ({path.relative_to(folder): data for path, data in here.items()}
                    == {path.relative_to(whole): data for path, data in there.items()}), name


def carry_on(world, out, whole):
    """The ordinary commands after a kill: the same again, --resume, and if need be --overwrite."""
    before = files(out) if out.exists() else {}
    assert_exports(out, whole, every=False)
    code, output = in_child(command, train.main, long(world, out))
    if code == 0:  # it was killed before it wrote anything that counts
        assert not words(output), output
    else:
        assert code == 2 and files(out) == before, output
        [refused] = words(output)
        assert "--resume true" in refused and "--overwrite true" in refused, refused
        code, output = in_child(command, train.main, long(world, out, "--resume", "true"))
        if code:
            [refused] = words(output)
            assert code == 2 and files(out) == before, output
            assert "no whole state to resume from" in refused, refused
            assert not any(is_whole(state) for state in states_in(out / "state").values())
            code, output = in_child(command, train.main, long(world, out, "--overwrite", "true"))
        said = words(output)
        assert code == 0 and all("is not whole and was skipped" in line or "was dropped" in line
                                 for line in said), output
    assert_same_run(out, whole)
    assert_exports(out, whole, every=True)


@pytest.mark.slow
def test_a_fresh_run_that_is_killed(world, whole, tmp_path):
    """It continues or starts anew, and ends with every number of the run without interruption."""
    rng = random.Random(0)
    for number, moment in enumerate(moments(train.main, long(world, tmp_path / "count"), rng)):
        out = tmp_path / f"out-{number}"
        code, output = in_child(lambda: killed(train.main, long(world, out), **moment))
        assert code == -signal.SIGKILL or code == 0 and "seconds" in moment, (moment, output)
        carry_on(world, out, whole)
        shutil.rmtree(out)


@pytest.fixture(scope="module")
def stopped(world, tmp_path_factory):
    """A run that was killed in step 3: states of steps 1 and 2, lines of steps 1 and 2."""
    out = tmp_path_factory.mktemp("stopped") / "out"

    def run():
        step, count = torch.optim.AdamW.step, itertools.count(1)
        torch.optim.AdamW.step = lambda *more, **named: (
            os.kill(os.getpid(), signal.SIGKILL) if next(count) == 3 else step(*more, **named))
        return command(train.main, long(world, out))

    assert in_child(run)[0] == -signal.SIGKILL
    assert sorted(states_in(out / "state")) == [1, 2]
    return out


@pytest.mark.slow
def test_a_resumed_run_that_is_killed(world, whole, stopped, tmp_path):
    rng = random.Random(1)
    count = shutil.copytree(stopped, tmp_path / "count")
    for number, moment in enumerate(moments(train.main, long(world, count, "--resume", "true"),
                                            rng)):
        out = shutil.copytree(stopped, tmp_path / f"out-{number}")
        flags = long(world, out, "--resume", "true")
        code, output = in_child(lambda: killed(train.main, flags, **moment))
        assert code == -signal.SIGKILL or code == 0 and "seconds" in moment, (moment, output)
        assert [m["step"] for m in lines(out / "metrics.jsonl")[:2]] == [1, 2]
        carry_on(world, out, whole)
        shutil.rmtree(out)


def evaluation(world, folder, out):
    return ["mmau", "--model", world / "model", "--data", folder / "mmau.json", "--out", out,
            "--max_new_tokens", "6", "--batch_size", "2"]


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory):
    """A file in MMAU's format, with ten questions of our own."""
    folder, rows = tmp_path_factory.mktemp("mmau"), []
    for i in range(10):
        noise = 0.1 * np.random.default_rng(i).standard_normal(4000)
        soundfile.write(folder / f"m{i}.wav", noise, 16000)
        rows.append({"id": f"m{i}", "audio_id": f"m{i}.wav", "question": f"What is sound {i}?",
                     "choices": ["a bell", "a dog"], "answer": "a dog", "dataset": "own",
                     "task": ("sound", "music", "speech")[i % 3], "split": "test-mini",
                     "category": "c", "sub-category": "s", "difficulty": "easy"})
    (folder / "mmau.json").write_text(json.dumps(rows))
    return folder


@pytest.mark.slow
def test_an_evaluation_that_is_killed(world, benchmark, tmp_path):
    """The same command ends with the same files. No question is lost or asked for twice."""
    rng, count = random.Random(2), tmp_path / "count"
    for number, moment in enumerate(moments(evaluate.main, evaluation(world, benchmark, count),
                                            rng)):
        out = tmp_path / f"out-{number}"
        flags = evaluation(world, benchmark, out)
        code, output = in_child(lambda: killed(evaluate.main, flags, **moment))
        assert code == -signal.SIGKILL or code == 0 and "seconds" in moment, (moment, output)
        file = out / "completions.jsonl"
        before = file.read_bytes() if file.exists() else b""
        code, output = in_child(command, evaluate.main, flags)
        assert code == 0 and all("was dropped" in line for line in words(output)), output
        assert file.read_bytes().startswith(before[:before.rfind(b"\n") + 1])
        assert files_by_name(out) == files_by_name(count), moment


def files_by_name(folder):
    return {path.name: content for path, content in files(folder).items()}


@pytest.mark.slow
def test_an_export_that_is_killed(world, whole, stopped, tmp_path):
    """What has a checkpoint's name is whole, and a resumed run writes the export that it missed."""
    rng = random.Random(3)
    count = shutil.copytree(stopped, tmp_path / "count")
    code, output = in_child(lambda: exporting(long(world, count, "--resume", "true")))
    assert code == 0, output
    changes = int(output.rpartition("changes: ")[2])
    for number, event in enumerate(sorted(rng.sample(range(1, changes + 1), MOMENTS))):
        out = shutil.copytree(stopped, tmp_path / f"out-{number}")
        code, output = in_child(lambda: exporting(long(world, out, "--resume", "true"), event))
        assert code == -signal.SIGKILL, (event, output)
        carry_on(world, out, whole)
        shutil.rmtree(out)


def exporting(flags, event=None):
    """`killed`, where only the changes during exports count."""
    save, within, changes = run.save_checkpoint, [], itertools.count(1)

    def hook(name, arguments):
        writes = name == "open" and isinstance(arguments[2], int) \
            and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if within and (writes or name.startswith("os.")) and next(changes) == event:
            os.kill(os.getpid(), signal.SIGKILL)

    def counted(*more):
        within.append(True)
        save(*more)
        within.pop()

    run.save_checkpoint = train.save_checkpoint = counted
    sys.addaudithook(hook)
    code = command(train.main, flags)
    print(f"changes: {next(changes) - 1}")
    return code


# ──────── a full disk ────────


def full(main, flags, module, name, call=1):
    """`command`, where no file can grow any more from the call-th call of a function on."""
    function, calls = getattr(module, name), itertools.count(1)

    def then_full(*more, **named):
        if next(calls) == call:
            resource.setrlimit(resource.RLIMIT_FSIZE,
                               (0, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        return function(*more, **named)

    setattr(module, name, then_full)
    return command(main, flags)


def writers():
    """(module, function, call) before which the disk fills up, for each writer of a run."""
    return {"nothing can be written": (run, "check_settings", 1),
            "config.yaml": (metrics, "write_whole", 1),
            "the log of step 3": (metrics.StepMetrics, "merged", 1),
            "the weights of a state": (run, "save_state", 1),
            "the random state": (torch, "get_rng_state", 1),
            "an export": (run, "save_checkpoint", 1),
            "a copied file": (shutil, "copyfile", 1),
            "an adapter": (checkpoint, "save_adapter", 1),
            "the last evaluation": (train, "held_out_accuracy", 1),
            "the last checkpoint": (train, "save_checkpoint", 1),
            "training.png": (sys.modules[__name__], "picture", 1)}


@pytest.mark.slow
@pytest.mark.parametrize("writer", writers())
def test_a_full_disk_while_training(world, whole, stopped, tmp_path, writer):
    """One line; every line of the logs and the newest state are kept, and the run resumes."""
    out = shutil.copytree(stopped, tmp_path / "out")
    flags = long(world, out, "--resume", "true")
    before = files_of_logs(out)
    code, output = in_child(lambda: full(train.main, flags, *writers()[writer]))
    assert code == (2 if writer == "nothing can be written" else 1), output
    [said] = words(output)
    assert said.startswith("error: ") and str(out) in said, said
    assert all(text.startswith(before[name]) for name, text in files_of_logs(out).items())
    newest = max(states_in(out / "state"))
    assert newest >= 2 and is_whole(states_in(out / "state")[newest])
    assert_exports(out, whole, every=False)
    code, output = in_child(command, train.main, flags)
    assert code == 0 and all("was dropped" in line for line in words(output)), output
    assert_same_run(out, whole)
    assert_exports(out, whole, every=True)


def files_of_logs(folder):
    return {name: (folder / name).read_bytes() for name in metrics.FILES}


EVALUATION_WRITERS = {
    "settings.json": ("claim", 1), "completions.jsonl": ("complete", 3),
    "predictions.jsonl": ("write_whole", 1), "report.json": ("write_report", 1),
    "table.md": ("write_whole", 3)}


@pytest.mark.slow
@pytest.mark.parametrize("writer", EVALUATION_WRITERS)
def test_a_full_disk_while_evaluating(world, benchmark, tmp_path, writer):
    """One line; the same command then ends with the same files."""
    flags = evaluation(world, benchmark, tmp_path / "out")
    code, output = in_child(
        lambda: full(evaluate.main, flags, evaluate, *EVALUATION_WRITERS[writer]))
    assert code == 1 and len(words(output)) == 1, output
    assert str(tmp_path / "out") in words(output)[0]
    for folder in (tmp_path / "out", tmp_path / "whole"):
        code, output = in_child(command, evaluate.main, evaluation(world, benchmark, folder))
        assert code == 0 and all("was dropped" in line for line in words(output)), output
    assert files_by_name(tmp_path / "out") == files_by_name(tmp_path / "whole")
