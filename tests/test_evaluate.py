"""evaluate.py: whole commands on a tiny model; interrupted processes are really killed."""

import contextlib
import hashlib
import io
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter

import numpy as np
import pytest
import soundfile
import tiny
import yaml
from test_benchmarks import mmar_rows, mmau_pro_rows, mmau_rows, mmsu_rows, write
from tiny import lines

import evaluate
from benchmarks import read_benchmark
from data import InputError
from model import Policy
from rollout import Completion
from scoring import score


def run(*arguments):
    """main() of the command line → (exit code, standard output, standard error)."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = evaluate.main(list(map(str, arguments)))
    return code, out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a tiny model and six questions."""
    return tiny.write_world(tmp_path_factory.mktemp("world"), tiny.qwen3_omni_that_ends(0.5))


# ──────── the benchmarks ────────


def write_mmau(folder, count=18, broken=()):
    """A file in MMAU's format, with our own questions and clips → its rows.

    broken: {number of a question: "no audio" or "missing"}.
    """
    rows, rng = [], np.random.default_rng(0)
    for i in range(count):
        if i not in broken:
            noise = 0.1 * rng.standard_normal(4000 + 300 * i)
            soundfile.write(folder / f"m{i}.wav", noise, 16000)
        elif broken[i] == "no audio":
            (folder / f"m{i}.wav").write_bytes(b"this is not audio")
        choices = ["a bell", "a dog", "a siren"] if i % 2 else ["a drum", "a flute"]
        rows.append({"id": f"m{i}", "audio_id": f"./m{i}.wav", "choices": choices,
                     "question": f"Which sound is number {i}?", "answer": choices[i % len(choices)],
                     "dataset": "own", "split": "test-mini", "category": "c", "sub-category": "s",
                     "task": ("sound", "music", "speech")[i % 3],
                     "difficulty": ("easy", "medium", "hard")[i % 3]})
    (folder / "mmau.json").write_text(json.dumps(rows))
    return rows


def mmau(world, folder, *more):
    """Arguments of the mmau command for the file of write_mmau."""
    return ["mmau", "--model", str(world / "model"), "--data", str(folder / "mmau.json"),
            "--max_new_tokens", "8", *map(str, more)]


def write_benchmark(path, rows):
    """A benchmark's file whose rows share one silent clip."""
    soundfile.write(path.parent / "clip.wav", np.zeros(16000), 16000)
    write(path, rows)


@pytest.fixture
def says(monkeypatch):
    """says({id: text}) makes the model answer each question with its text → ids in asked order."""
    def say(texts, finish_reason="stop"):
        asked = []

        def sample(policy, prompts, *_, **__):
            ids = [prompt.question.id for prompt in prompts]
            asked.extend(ids)
            return [Completion(policy.tokenizer(texts[i])["input_ids"], [], finish_reason)
                    for i in ids]
        monkeypatch.setattr(evaluate, "sample", sample)
        return asked
    return say


def report_of(folder):
    return json.loads((folder / "report.json").read_text())


def killable(arguments):
    """Runs in a process of its own, slowly enough to be killed in between."""
    complete = evaluate.complete
    evaluate.complete = lambda *more: (time.sleep(0.15), complete(*more))[1]
    sys.exit(evaluate.main(arguments))


def test_interrupted_evaluation_resumes(world, tmp_path):
    """Killed five times at random moments, once in the middle of a line.

    In the end every question has one row, equal to that of an uninterrupted evaluation.
    """
    write_mmau(tmp_path, count=30)
    code, *_ = run(*mmau(world, tmp_path, "--out", tmp_path / "whole"))
    assert code == 0
    out, rng, seen = tmp_path / "out", random.Random(1), 0
    file = out / "completions.jsonl"
    context = multiprocessing.get_context("fork")
    for kill in range(5):
        with (open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere),
              contextlib.redirect_stdout(nowhere)):
            arguments = mmau(world, tmp_path, "--out", out, "--batch_size", 2)
            process = context.Process(target=killable, args=(arguments,))
            process.start()
        until = time.monotonic() + 60
        while ((not file.is_file() or file.read_bytes().count(b"\n") <= seen)
               and time.monotonic() < until):
            assert process.is_alive()
            time.sleep(0.002)
        time.sleep(0.15 * rng.random())
        process.kill()
        process.join()
        if kill == 2:
            file.write_bytes(file.read_bytes()[:-20])  # as if killed in the middle of the line
        assert process.exitcode == -signal.SIGKILL and not (out / "report.json").exists()
        seen = file.read_bytes().count(b"\n")
    assert 5 <= seen < 30
    code, *_ = run(*mmau(world, tmp_path, "--out", out))
    assert code == 0
    rows = lines(file)
    assert Counter(row["id"] for row in rows) == Counter(f"m{i}" for i in range(30))
    by_id = {row["id"]: row for row in lines(tmp_path / "whole" / "completions.jsonl")}
    assert {row["id"]: row for row in rows} == by_id
    assert (lines(out / "predictions.jsonl")
            == lines(tmp_path / "whole" / "predictions.jsonl"))


def test_rows_of_two_evaluations_do_not_mix(world, tmp_path):
    write_mmau(tmp_path, count=2)
    assert run(*mmau(world, tmp_path, "--out", tmp_path / "out"))[0] == 0
    code, _, err = run(*mmau(world, tmp_path, "--out", tmp_path / "out", "--temperature", "0.5"))
    assert code == 2 and "give another --out" in err and err.count("\n") == 1
    assert "(temperature)" in err


def test_an_out_folder_that_cannot_be_used_is_refused_at_once(world, tmp_path, monkeypatch):
    """Before a model is loaded. Settings that are not json are one line, too."""
    monkeypatch.setattr(evaluate, "generate", None)
    write_mmau(tmp_path, count=2)
    (tmp_path / "file").touch()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "settings.json").write_text("{")
    for out, message in ((tmp_path / "file", "is a file"), ("/proc/out", "cannot be written"),
                         (tmp_path / "out", "settings.json: not valid json")):
        code, _, err = run(*mmau(world, tmp_path, "--out", out))
        assert code == 2 and message in err and err.count("\n") == 1, err


def test_an_evaluation_that_has_no_rows_yet_may_change_its_settings(world, tmp_path):
    """A wrong --model, say, does not lock the folder."""
    write_mmau(tmp_path, count=2)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "completions.jsonl").touch()
    (tmp_path / "out" / "settings.json").write_text('{"temperature": 1}')
    assert run(*mmau(world, tmp_path, "--out", tmp_path / "out"))[0] == 0


@pytest.mark.parametrize("changed", ["weights of --model", "content of --data"])
def test_other_weights_or_rows_under_the_same_name_do_not_mix(world, tmp_path, changed):
    """A model that was trained again, or a file with other rows: the old completions are not
    scored as theirs. Nothing changes."""
    shutil.copytree(world / "model", tmp_path / "model")
    arguments = mmau(tmp_path, tmp_path, "--out", tmp_path / "out")
    write_mmau(tmp_path, count=2)
    assert run(*arguments)[0] == 0
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    if changed.startswith("weights"):
        weights = tmp_path / "model" / "model.safetensors"
        weights.write_bytes(weights.read_bytes())
    else:
        write_mmau(tmp_path, count=3)
    code, _, err = run(*arguments)
    assert code == 2 and f"({changed})" in err and err.count("\n") == 1
    assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_two_commands_do_not_share_a_folder(world, tmp_path):
    """acs would replace the settings of the benchmark's completions."""
    write_mmau(tmp_path, count=2)
    assert run(*mmau(world, tmp_path, "--out", tmp_path / "out"))[0] == 0
    settings = (tmp_path / "out" / "settings.json").read_bytes()
    code, _, err = run("acs", "--model", world / "model", "--data", world / "train.jsonl",
                       "--out", tmp_path / "out")
    assert code == 2 and "completions.jsonl: made with other settings" in err
    assert (tmp_path / "out" / "settings.json").read_bytes() == settings


def test_unreadable_audio_is_reported_and_counts_as_wrong(world, tmp_path, says):
    """A file that is not audio and a missing one. When they are repaired, only they are asked."""
    rows, out = write_mmau(tmp_path, count=6, broken={1: "no audio", 4: "missing"}), tmp_path / "o"
    answers = {row["id"]: row["answer"] for row in rows}
    asked = says({i: f"hm</think> {answer}" for i, answer in answers.items()})
    code, text, _ = run(*mmau(world, tmp_path, "--out", out))
    report = report_of(out)
    assert code == 0 and report["accuracy"] == pytest.approx(4 / 6) and report["count"] == 6
    assert asked == [row["id"] for row in lines(out / "completions.jsonl")]
    assert asked == ["m0", "m2", "m3", "m5"] and set(report["unreadable"]) == {"m1", "m4"}
    assert "m1: counted as wrong" in text
    assert f"m4: counted as wrong: {tmp_path / 'm4.wav'}: no such file; see --audio_root" in text
    assert {row["id"]: row["prediction"] for row in lines(out / "predictions.jsonl")} == {
        i: answers[i] for i in asked}
    assert report["missing"] == 2
    assert report["official"]["accuracy"] == 1 and report["official"]["count"] == 4
    assert "MAPO" in (out / "table.md").read_text()
    write_mmau(tmp_path, count=6)
    asked.clear()
    assert run(*mmau(world, tmp_path, "--out", out))[0] == 0 and asked == ["m1", "m4"]
    assert report_of(out)["accuracy"] == 1


def test_a_wrong_audio_root_is_an_error(world, tmp_path):
    """Not an accuracy of 0."""
    write_mmau(tmp_path, count=3)
    code, _, err = run(*mmau(world, tmp_path, "--audio_root", tmp_path / "nowhere", "--out",
                             tmp_path / "out"))
    assert code == 2 and "no question could be asked" in err
    assert not (tmp_path / "out" / "report.json").exists()


def test_line_ends_in_a_completion(world, tmp_path, says):
    """U+2028 and U+0085 inside a text do not end its line, also when the evaluation resumes."""
    write_mmau(tmp_path, count=2)
    text = "one\u2028two\x85three</think> a drum"
    asked = says({"m0": text, "m1": text})
    for _ in range(2):
        assert run(*mmau(world, tmp_path, "--out", tmp_path / "out"))[0] == 0
    assert asked == ["m0", "m1"]
    rows = lines(tmp_path / "out" / "completions.jsonl")
    assert [row["text"] for row in rows] == [text, text]


def test_mmsu_letters_are_read_from_the_answer(world, tmp_path, says):
    """Not from the option that it was mapped to: "B" and "B. Calm" are the letter B."""
    answers = {"a": "B", "b": "B. Calm", "c": "Calm", "d": "A"}
    write_benchmark(tmp_path / "mmsu.jsonl", [
        {"id": i, "task_name": "t", "audio": "clip.wav", "question": "q", "choice_a": "Angry",
         "choice_b": "Calm", "choice_c": None, "choice_d": None, "answer_gt": "Calm",
         "category": "Perception", "sub-category": "s", "sub-sub-category": "s"} for i in answers])
    says({i: f"hm</think> {answer}" for i, answer in answers.items()})
    code, _, err = run("mmsu", "--model", world / "model", "--data", tmp_path / "mmsu.jsonl",
                       "--out", tmp_path / "out")
    assert code == 0, err
    report = report_of(tmp_path / "out")
    assert report["accuracy"] == 0.75  # by text: a, b, c
    official = report["official"]
    assert (official["right"], official["count"]) == (2, 4)  # "Calm" reads as C
    code, _, err = run("score", "mmsu", "--predictions", tmp_path / "out" / "predictions.jsonl",
                       "--data", tmp_path / "mmsu.jsonl", "--out", tmp_path / "again")
    assert code == 0, err
    again = report_of(tmp_path / "again")  # scored from the lines that the first command wrote
    assert {name: report[name] for name in again} == again


def test_mmau_pro_gives_no_points_for_nothing(world, tmp_path, says):
    """A truncated completion and unreadable audio get no points, although "" passes the rule."""
    write_benchmark(tmp_path / "pro.jsonl", [
        {"id": i, "audio_path": [clip], "question": "q", "category": "instruction following",
         "choices": None, "answer": None, "task_identifier": "No Commas", "kwargs": {}}
        for i, clip in (("cut", "clip.wav"), ("broken", "none.wav"), ("fine", "clip.wav"))])
    says({"cut": "hm", "fine": "hm</think> a b"}, finish_reason="length")
    code, _, err = run("mmau-pro", "--model", world / "model", "--data", tmp_path / "pro.jsonl",
                       "--out", tmp_path / "out")
    assert code == 0, err
    report = report_of(tmp_path / "out")
    assert (report["right"], report["count"], report["missing"]) == (1, 3, 2)
    assert report["truncated"] == 2 and report["without an answer"] == 1
    assert set(report["unreadable"]) == {"broken"}


def test_mmau_pro_maps_only_closed_answers(world, tmp_path, says):
    """A letter becomes its option. Answers that name no option, or to open questions, remain."""
    closed = {"category": "sound", "choices": ["a dog", "a cat"], "answer": "a cat"}
    open_one = {"category": "open", "choices": None, "answer": "a cat"}
    told = {"category": "instruction following", "choices": None, "answer": None,
            "task_identifier": "No Commas"}
    answers = {"letter": ("B", closed), "text": ("it is a cat", closed), "none": ("fish", closed),
               "open": ("B", open_one), "told": ("B", told)}
    write_benchmark(tmp_path / "pro.jsonl", [
        {"id": i, "audio_path": ["clip.wav"], "question": "q", "kwargs": {}, **row}
        for i, (_, row) in answers.items()])
    says({i: f"hm</think> {answer}" for i, (answer, _) in answers.items()})
    code, _, err = run("mmau-pro", "--model", world / "model", "--data", tmp_path / "pro.jsonl",
                       "--out", tmp_path / "out")
    assert code == 0, err
    rows = lines(tmp_path / "out" / "predictions.jsonl")
    assert {row["id"]: row["prediction"] for row in rows} == {
        "letter": "a cat", "text": "a cat", "none": "fish", "open": "B", "told": "B"}
    report = report_of(tmp_path / "out")
    assert report["parts"]["closed"]["right"] == 2
    assert report["answers that name no option"] == 1


def write_quirks(folder):
    """A file of MMAR with an empty option, equal options, and answers that are no option."""
    changes = {"number": {"choices": [8.5, 11], "answer": 11, "audio_path": ["clip.wav"] * 2},
               "part": {"choices": ["falling rain", "rising wind"], "answer": "falling"},
               "words": {"choices": ["fast; slow", "slow; fast", "fast; slow"],
                         "answer": "fast; slow", "category": ["a", "b"]},
               "twice": {"choices": ["twelve", "two", "twelve"], "answer": "twelve"},
               "empty": {"choices": ["a bell", "a dog", ""], "answer": "a bell"}}
    write_benchmark(folder / "mmar.jsonl", [
        mmar_rows()[0] | {"id": i, "audio_path": "clip.wav"} | change
        for i, change in changes.items()])
    return changes


def test_a_benchmark_with_the_quirks_of_official_files(world, tmp_path, says):
    """An option word for word is right, but where the answer is none of them: the report says so.

    The same holds when the predictions are scored again.
    """
    changes = write_quirks(tmp_path)
    says({i: f"hm</think> {row['choices'][i == 'number']}" for i, row in changes.items()})
    code, out, err = run("mmar", "--model", world / "model", "--data", tmp_path / "mmar.jsonl",
                         "--out", tmp_path / "out")
    assert code == 0, err
    report = report_of(tmp_path / "out")
    assert (report["right"], report["count"], report["unlisted"]) == (4, 5, 1)
    assert report["ceiling"] == 0.8 and "ceiling of 80.00%" in out
    code, out, err = run("score", "mmar", "--predictions", tmp_path / "out/predictions.jsonl",
                         "--data", tmp_path / "mmar.jsonl")
    assert code == 0 and json.loads(out[:out.rindex("}") + 1])["right"] == 4, err


def test_whole_texts_as_answers(world, tmp_path, says):
    """--format_style none, for a model that does not think aloud."""
    says({row["id"]: row["answer"] for row in write_mmau(tmp_path, count=4)})
    for style, accuracy, without in (("none", 1, 0), ("think", 0, 4)):
        arguments = ("--format_style", style, "--out", tmp_path / style)
        assert run(*mmau(world, tmp_path, *arguments))[0] == 0
        report = report_of(tmp_path / style)
        assert report["accuracy"] == accuracy and report["without an answer"] == without


def test_a_checkpoint_is_asked_as_in_its_training(world, tmp_path, says, monkeypatch):
    """With the instruction and the format of the run that wrote it, unless flags say otherwise."""
    rows, told = write_mmau(tmp_path, count=4), "Write <reasoning></reasoning><answer></answer>."
    says({row["id"]: f"<reasoning>I hear it.</reasoning><answer>{row['answer']}</answer>"
          for row in rows})
    checkpoint = shutil.copytree(world / "model", tmp_path / "run" / "checkpoint-4")
    fields = {"instruction": told, "format_style": "reasoning", "max_steps": 8}
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(fields))
    prompts = []
    encode = Policy.encode
    monkeypatch.setattr(Policy, "encode", lambda self, question, instruction="": prompts.append(
        instruction) or encode(self, question, instruction))

    def evaluated(model, *flags):  # → (accuracy, instructions of the prompts, what is printed)
        prompts.clear()
        out = tmp_path / str(len(list(tmp_path.iterdir())))
        code, printed, err = run("mmau", "--model", model, "--data", tmp_path / "mmau.json",
                                 "--out", out, *flags)
        assert code == 0, err
        report = report_of(out)
        assert {report["settings"]["instruction"]} == set(prompts)
        return report["accuracy"], set(prompts), printed

    accuracy, prompted, printed = evaluated(checkpoint)
    assert (accuracy, prompted) == (1, {told})
    assert "config.yaml: format_style 'reasoning', as in training" in printed
    assert evaluated(checkpoint, "--instruction", "Think.")[:2] == (1, {"Think."})
    assert evaluated(checkpoint, "--format_style", "think")[:2] == (0, {told})
    assert evaluated(world / "model")[:2] == (0, {""})  # no run wrote it


def test_checkpoints_of_runs_with_other_instructions_are_refused(world, tmp_path):
    """trace compares models on the same prompts."""
    for name in ("a", "b"):
        shutil.copytree(world / "model", tmp_path / name / "checkpoint")
        (tmp_path / name / "config.yaml").write_text(f"instruction: Do {name}.")
    models = [f"--model={name}={tmp_path / name / 'checkpoint'}" for name in ("a", "b")]
    flags = ["--data", world / "train.jsonl", "--out", tmp_path / "out", "--limit", "1",
             "--reference", world / "model", "--max_new_tokens", "2", "--target_layers", "1"]
    code, _, err = run("trace", *models, *flags)
    assert code == 2 and "2 values of instruction; give --instruction" in err
    assert run("trace", *models, *flags, "--instruction", "")[0] == 0


def test_a_server_gives_the_same_completions(world, tmp_path, monkeypatch):
    """--engine vllm, with the tests' stand-in for vLLM."""
    monkeypatch.setenv("STAND_IN_PYTHON", sys.executable)
    write_mmau(tmp_path, count=4)
    for engine in ("local", "vllm"):
        code, _, err = run(*mmau(world, tmp_path, "--engine", engine, "--vllm_python",
                                 "tests/stand_in/python", "--out", tmp_path / engine))
        assert code == 0, err
    here, there = ({row["id"]: row for row in lines(tmp_path / engine / "completions.jsonl")}
                   for engine in ("local", "vllm"))
    assert here == there and len(here) == 4


def test_score_command(tmp_path):
    """A missing prediction is wrong. A second one for the same id is refused."""
    rows, file = write_mmau(tmp_path, count=6), tmp_path / "predictions.jsonl"
    predictions = [{"id": row["id"], "prediction": row["answer"]} for row in rows[:3]]
    write(file, predictions)
    arguments = ["score", "mmau", "--predictions", file, "--data", tmp_path / "mmau.json"]
    code, out, err = run(*arguments)
    assert code == 0, err
    report = json.loads(out[:out.rindex("}") + 1])
    assert report["accuracy"] == 0.5 and report["count"] == 6
    assert run(*arguments, "--out", tmp_path / "out")[0] == 0
    assert report_of(tmp_path / "out")["accuracy"] == 0.5
    for extra, message in (
            ({"id": "m0", "prediction": "x"},
             "predictions.jsonl:4: a second prediction for 'm0'"),
            ({"id": "m0"}, "predictions.jsonl:4: give"),
            ({"id": "m5", "prediction": "x", "answer": None},
             "predictions.jsonl:4: field 'answer'"),
            ({"id": "z", "prediction": "x"}, "z")):
        write(file, [*predictions, extra])
        code, _, err = run(*arguments)
        assert code == 2 and message in err and err.count("\n") == 1
    write(file, [*predictions, {"id": "m0", "prediction": "x"}, {"id": 3}])
    code, _, err = run(*arguments)  # all bad lines at once
    assert code == 2 and err.count("\n") == 2
    assert "predictions.jsonl:4: a second" in err and "predictions.jsonl:5: give" in err


def test_predictions_with_numbers(tmp_path):
    """A number is its text, as in the benchmark's own file."""
    write(tmp_path / "mmar.jsonl", [mmar_rows()[0] | {"id": 7, "choices": [8.5, 11], "answer": 11}])
    write(tmp_path / "predictions.jsonl", [{"id": 7, "prediction": 11}])
    code, out, err = run("score", "mmar", "--predictions", tmp_path / "predictions.jsonl",
                         "--data", tmp_path / "mmar.jsonl")
    assert code == 0 and json.loads(out[:out.rindex("}") + 1])["accuracy"] == 1, err


# ──────── the paper's tables ────────


def test_table_1_is_the_mean_of_four_totals():
    for *totals, average in evaluate.paper_tables()["table 1"].values():
        assert len(totals) == 4 and sum(totals) / 4 == pytest.approx(average, abs=0.00501)


@pytest.mark.parametrize("model, in_table_1", [
    ("MAPO", "MAPO (phase 2)"), ("Qwen3-Omni-Thinking", "Qwen3-Omni-Thinking"),
    ("Qwen3-Omni-Instruct", "Qwen3-Omni-Instruct")])
def test_table_1_agrees_with_tables_2_and_3(model, in_table_1):
    tables = evaluate.paper_tables()
    *totals, average = tables["table 1"][in_table_1]
    assert [tables[name][model][-1] for name in evaluate.BENCHMARKS] == totals
    assert evaluate.paper_averages()[model] == pytest.approx(average, abs=0.00501)


@pytest.mark.parametrize("model", ["MAPO", "Qwen3-Omni-Thinking", "Qwen3-Omni-Instruct"])
@pytest.mark.parametrize("name, counts", [
    ("mmau", (333, 334, 333)), ("mmsu", (2580, 2420)), ("mmau-pro", (87, 4592, 625))])
def test_totals_are_weighted_by_the_counts_of_rows(model, name, counts):
    """So the paper counts over all rows, as we do."""
    *values, total = evaluate.paper_tables()[name][model]
    assert np.average(values, weights=counts) == pytest.approx(total, abs=0.011)


def table_of(name, folder, label="ours"):
    """→ lines of the table, for predictions that are all right, and the report."""
    rows = {"mmau": mmau_rows, "mmar": mmar_rows, "mmsu": mmsu_rows, "mmau-pro": mmau_pro_rows}
    items = read_benchmark(name, write(folder / "rows.jsonl", rows[name]()[::40]))
    report = score(name, items, {item.id: item.answer for item in items})
    return evaluate.markdown_table(name, report, label).splitlines(), report


@pytest.mark.parametrize("name, heading, ours, mapo, baseline", [
    ("mmau", "| Model | Sound | Music | Speech | Avg. |",
     "| ours | 100.00 | 100.00 | 100.00 | 100.00 |",
     "| MAPO (paper) | 79.88 | 71.86 | 81.68 | 77.80 |", "77.48 | 70.96 | 76.58 | 75.00 |"),
    ("mmar", "| Model | Sound | Music | Speech | Avg. |",
     "| ours | 100.00 | 100.00 | 100.00 | 100.00 |",
     "| MAPO (paper) | 66.06 | 55.83 | 77.89 | 70.90 |", "62.42 | 49.51 | 78.57 | 66.90 |"),
    ("mmsu", "| Model | Perception | Reasoning | Overall |",
     "| ours | 100.00 | 100.00 | 100.00 |",
     "| MAPO (paper) | 76.36 | 82.56 | 79.36 |", "74.19 | 78.55 | 76.30 |"),
    # no judge: open questions and the total are not scored; "" does not follow the instruction
    ("mmau-pro", "| Model | AIF | Closed | Open | Overall |",
     "| ours | 0.00 | 100.00 | – | – |",
     "| MAPO (paper) | 95.40 | 62.00 | 85.32 | 65.29 |", "62.07 | 59.63 | 84.77 | 62.63 |")])
def test_markdown_table(tmp_path, name, heading, ours, mapo, baseline):
    """Our row, MAPO and its baseline, then the other models of the paper in its order."""
    table, _ = table_of(name, tmp_path)
    assert table[0] == heading and table[1] == "|---" + "|---:" * (heading.count("|") - 2) + "|"
    assert table[2:5] == [ours, mapo, f"| Qwen3-Omni-Thinking (paper) | {baseline}"]
    others = [model for model in evaluate.paper_tables()[name]
              if model not in ("MAPO", "Qwen3-Omni-Thinking")]
    assert [line.split(" (paper)")[0] for line in table[5:]] == [f"| {model}" for model in others]
    assert all(line.count("|") == heading.count("|") for line in table)


def test_a_label_with_a_bar_and_a_report_of_another_benchmark(tmp_path):
    table, report = table_of("mmau", tmp_path, label="toy | run")
    assert table[2].startswith("| toy \\| run | 100.00 |")
    with pytest.raises(InputError, match="'mmar' from a report of 'mmau'"):
        evaluate.markdown_table("mmar", report, "ours")


# ──────── contamination ────────


def test_contamination(tmp_path):
    """The same id, the same file name, and the same samples in another format and file name."""
    write_mmau(tmp_path, count=5)
    clips = tmp_path / "clips"
    clips.mkdir()
    samples, rate = soundfile.read(tmp_path / "m3.wav", dtype="int16")
    soundfile.write(clips / "other.flac", samples, rate)
    for seed, path in enumerate((clips / "m1.wav", clips / "own.wav", tmp_path / "m2.wav")):
        noise = np.random.default_rng(seed).standard_normal(4600) / 99
        soundfile.write(path, noise, 16000, subtype="FLOAT")  # finer than 16 bits
    train = {"m2": "own.wav", "t1": "m1.wav", "t2": "other.flac"}
    write(tmp_path / "train.jsonl", [
        {"id": i, "audio": f"clips/{clip}", "question": "q", "choices": ["x", "y"], "answer": "x"}
        for i, clip in train.items()])
    arguments = ["--benchmark", "mmau", "--data", tmp_path / "mmau.json"]
    code, out, err = run("contamination", "--train", tmp_path / "train.jsonl", *arguments, "--out",
                         tmp_path / "out")
    assert code == 0, err
    content = f"16000 {(len(samples), 1)}".encode() + samples.tobytes()
    assert json.loads((tmp_path / "out" / "contamination.json").read_text()) == {
        "id": ["m2"], "audio file name": ["m1"],
        "audio samples": [hashlib.sha256(content).hexdigest()]}
    assert "id: 1 shared, of 3 in training and 5 in the benchmark; first ['m2']" in out
    write(tmp_path / "avqa.jsonl", [
        {"id": number, "question_text": "q", "multi_choice": ["x", "y"], "answer": 0,
         "audio_path": clip} for number, clip in enumerate(train.values())])
    code, out, err = run("contamination", "--train", tmp_path / "avqa.jsonl", "--train_format",
                         "avqa", "--train_audio_root", clips, *arguments)
    assert code == 0, err
    for kind, shared in (("id", 0), ("audio file name", 1), ("audio samples", 1)):
        assert f"{kind}: {shared} shared" in out


def test_contamination_of_a_file_with_quirks(world, tmp_path):
    write_quirks(tmp_path)
    code, out, err = run("contamination", "--train", world / "train.jsonl", "--benchmark", "mmar",
                         "--data", tmp_path / "mmar.jsonl")
    assert code == 0 and "id: 0 shared, of 6 in training and 5 in the benchmark" in out, err


# ──────── the command line ────────


@pytest.mark.parametrize("arguments, message", [
    (["mmau", "--model", "MODEL", "--data", "nowhere.json", "--out", "OUT"], "nowhere.json"),
    (["trace", "--model", "nowhere", "--data", "DATA", "--out", "OUT"], "nowhere: no config.json"),
    (["trace", "--model", "MODEL", "--data", "DATA", "--out", "OUT", "--target_layers", "9"],
     "9 is out of range"),
    (["trace", "--model", "MODEL", "--data", "DATA", "--completions", "BAD", "--out", "OUT"],
     "bad.jsonl:1: id 'z' is not among"),
    (["acs", "--model", "MODEL", "--data", "nowhere.jsonl", "--out", "OUT"],
     "nowhere.jsonl: no such file"),
    (["curves", "nowhere", "--out", "OUT"], "metrics.jsonl: no such file"),
    (["pos", "--trace", "DATA.missing", "--out", "OUT"], "no such file"),
    (["mmau", "--model", "MODEL", "--data", "MMAU", "--engine", "vllm", "--vllm_python",
      "none/python", "--out", "OUT"], "vllm_python")])
def test_bad_input_is_one_line(world, tmp_path, arguments, message):
    """On standard error, with exit code 2."""
    write_mmau(tmp_path, count=1)
    write(tmp_path / "bad.jsonl", [{"id": "z", "token_ids": [1]}])
    places = {"MODEL": world / "model", "DATA": world / "train.jsonl", "OUT": tmp_path / "out",
              "BAD": tmp_path / "bad.jsonl", "MMAU": tmp_path / "mmau.json"}
    code, _, err = run(*[places.get(argument, argument) for argument in arguments])
    assert code == 2 and message in err, err
    assert err.startswith("error: ") and err.count("\n") == 1, err


def test_names_of_models_and_runs(capsys):
    """NAME=DIR, or the folder's own name. The same name twice is refused."""
    read = evaluate.read_options
    runs = read(["curves", "a=x/y", "z/run", "--out", "o"]).run
    assert runs == {"a": "x/y", "run": "z/run"}
    models = read(["acs", "--model", "a=x", "--model", "y/b", "--data", "d", "--out", "o"]).model
    assert models == {"a": "x", "b": "y/b"}
    with pytest.raises(SystemExit):
        read(["curves", "a/run", "b/run", "--out", "o"])
    assert "the name 'run' is given twice" in capsys.readouterr().err
