"""The toy's clips, questions, demonstrations and tokenizer. The warm start is not tested here."""

import hashlib
import subprocess
import sys

import numpy as np
import pytest
from transformers import AutoTokenizer

import compare
import data
import toy
import train
from rewards import rule_consistency_rewards
from tiny import lines


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Small sets of both kinds of questions with seed 0 → (folder, kind → split → rows)."""
    folder = tmp_path_factory.mktemp("toy") / "world"
    return folder, write_small_world(folder, seed=0)


def write_small_world(folder, seed):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(toy, "SPLITS", {"train": 60, "dev": 30, "test": 40})
        return {kind: toy.write_questions(folder / kind, seed, kind) for kind in toy.QUESTION}


def digest(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in files}


def all_rows(world):
    return [row for splits in world[1].values() for rows in splits.values() for row in rows]


def test_only_the_same_seed_gives_the_same_bytes(world, tmp_path):
    folder, _ = world
    write_small_world(tmp_path / "again", seed=0)
    write_small_world(tmp_path / "other", seed=1)
    assert digest(tmp_path / "again") == digest(folder)
    assert digest(tmp_path / "other") != digest(folder)


def test_every_clip_is_different(world):
    """So no clip is in two splits, or in both kinds of questions."""
    wavs = [value for name, value in digest(world[0]).items() if name.endswith(".wav")]
    assert len(wavs) == len(set(wavs)) == 2 * (60 + 30 + 40)


def test_every_row_can_be_read_and_its_clip_lasts_a_second(world):
    folder, rows = world
    for kind in toy.QUESTION:
        for split in ("train", "dev", "test"):
            questions = data.read_questions(folder / kind / f"{split}.jsonl")
            for question, row in zip(questions, rows[kind][split], strict=True):
                assert len(data.load_audio(question.audio[0])) == data.SAMPLE_RATE
                assert 0 <= row["start"] < row["end"] <= 1


def test_a_sound_is_heard_where_its_row_says(world):
    """It is at least ten times as loud there as the noise around it."""
    folder, rows = world
    for row in rows["caption"]["test"]:
        samples = data.load_audio(folder / "caption" / row["audio"])
        loud = lambda part: float(np.sqrt(np.mean(np.square(part))))
        start, end = (round(row[name] * data.SAMPLE_RATE) for name in ("start", "end"))
        assert loud(samples[start:end]) > 10 * loud(samples[end + 20:])


def test_the_pitch_and_the_timbre_are_those_of_the_name():
    """The strongest line of the spectrum is a harmonic of the pitch that the name stands for."""
    rng = np.random.default_rng(0)
    for name, (timbre, pitch) in toy.WHERE.items():
        samples, _, _ = toy.synthesize(name, rng)
        spectrum = np.abs(np.fft.rfft(samples))
        strongest = spectrum.argmax() * data.SAMPLE_RATE / len(samples)
        harmonics = np.outer(1 + np.flatnonzero(toy.HARMONICS[timbre]),
                             toy.PITCHES[pitch] * np.array([0.88, 1.12]))
        assert ((harmonics[:, 0] <= strongest) & (strongest <= harmonics[:, 1])).any(), name


def test_the_names_of_a_timbre_are_of_four_kinds():
    """So a wrong pitch gives a wrong answer. No name is used twice."""
    assert all({toy.KIND_OF[name] for name in names} == set(toy.KINDS) for names in toy.NAMES)
    assert len({name for names in toy.NAMES for name in names}) == 128
    assert [toy.KIND_OF[name] for name in toy.LATE_SOUNDS].count("tool") == 8


def test_the_answer_is_the_kind_of_the_sound_and_the_hint_is_no_help(world):
    kind_of = {name: kind for kind, names in toy.KINDS.items() for name in names}
    assert all(row["answer"] == kind_of[row["sound"]] for row in all_rows(world))
    rng = np.random.default_rng(0)
    rows = [toy.draw_row(str(i), "train", "late", rng)[0] for i in range(1000)]
    assert all(f"Someone says {row['hint']}." in row["question"] for row in rows)
    assert abs(np.mean([row["hint"] == row["answer"] for row in rows]) - 0.25) < 0.05
    for kind in toy.KINDS:
        assert abs(np.mean([row["answer"] == kind for row in rows]) - 0.25) < 0.05


def conclusion(completion):
    return completion.split()[-1].strip(".")


def test_long_demonstrations_have_the_shares_that_the_constants_say():
    rng = np.random.default_rng(0)
    for kind in toy.QUESTION:
        rows = [toy.draw_row(str(i), "train", kind, rng)[0] for i in range(600)] * 3
        texts = [toy.demonstration(row, "long", rng) for row in rows]
        if kind == "caption":
            common = np.mean([f"I hear the {toy.COMMON[toy.WHERE[row['sound']][0]]}." in text
                              for row, text in zip(rows, texts)])
            assert abs(common - (toy.COMMON_SHARE + (1 - toy.COMMON_SHARE) / 4)) < 0.04
        else:
            hint = np.mean([conclusion(text) == row["hint"] for row, text in zip(rows, texts)])
            assert abs(hint - toy.HINT_SHARE) < 0.04
            right = np.mean([conclusion(text) == row["answer"] for row, text in zip(rows, texts)])
            assert abs(right - 0.25) < 0.04  # the audio has no influence


def test_long_demonstrations_earn_format_and_consistency(world):
    rng = np.random.default_rng(0)
    texts = [toy.demonstration(row, "long", rng) for row in all_rows(world)]
    assert rule_consistency_rewards(texts) == [1.0] * len(texts)


def test_the_kind_in_a_caption_is_that_of_its_name(world):
    rng = np.random.default_rng(0)
    for row in world[1]["caption"]["train"]:
        text = toy.demonstration(row, "long", rng)
        name = text.split("I hear the ")[1].split(".")[0]
        assert conclusion(text) == toy.KIND_OF[name] and name in toy.NAMES[toy.WHERE[name][0]]


def test_short_demonstrations_are_right_and_only_captions_have_tags(world):
    rng = np.random.default_rng(0)
    for row in all_rows(world):
        text = toy.demonstration(row, "short", rng)
        assert conclusion(text) == row["answer"]
        assert ("<think>" in text) == (row["domain"] == "caption")


def test_all_long_demonstrations_of_a_kind_have_the_same_number_of_tokens(world, saved_tokenizer):
    """bench/toy_study.py reads a_t at a fixed place of them."""
    rng = np.random.default_rng(0)
    for kind, splits in world[1].items():
        texts = [toy.demonstration(row, "long", rng) for row in splits["train"]]
        assert len({len(ids) for ids in saved_tokenizer(texts)["input_ids"]}) == 1


@pytest.fixture(scope="module")
def saved_tokenizer(tmp_path_factory):
    """The toy's tokenizer, saved and loaded again."""
    folder = tmp_path_factory.mktemp("tokenizer")
    toy.build_tokenizer(toy.toy_texts()).save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def test_every_word_of_a_demonstration_is_one_token(world, saved_tokenizer):
    rng = np.random.default_rng(0)
    for row in all_rows(world):
        for length in ("long", "short"):
            text = toy.demonstration(row, length, rng)
            words = text.replace(".", " .").replace("</think>", " </think>").split()
            assert len(saved_tokenizer(text)["input_ids"]) == len(words)


def test_decoding_keeps_think_tags_and_drops_the_end_token(world, saved_tokenizer):
    rng = np.random.default_rng(0)
    for row in world[1]["caption"]["train"][:10]:
        text = toy.demonstration(row, "long", rng)
        ids = saved_tokenizer(text + "<|im_end|>")["input_ids"]
        assert ids[-1] == saved_tokenizer.eos_token_id
        assert saved_tokenizer.decode(ids, skip_special_tokens=True) == text


def test_the_chat_template_writes_the_question_and_one_audio_placeholder(world, saved_tokenizer):
    """The options are always the same and are left out."""
    question = data.read_questions(world[0] / "late" / "train.jsonl")[0]
    rendered = saved_tokenizer.apply_chat_template(
        data.conversation(question), tokenize=False, add_generation_prompt=True)
    assert rendered == (f"<|im_start|>user\n{question.question}<|audio_start|><|audio_pad|>"
                        "<|audio_end|><|im_end|>\n<|im_start|>assistant\n")
    audio = saved_tokenizer.convert_tokens_to_ids("<|audio_pad|>")
    assert saved_tokenizer(rendered)["input_ids"].count(audio) == 1


def test_a_label_per_audio_token():
    """Token j covers 0.08 j to 0.08 (j + 1) seconds; its centre decides."""
    row = {"sound": "owl", "start": 0.13, "end": 0.93}
    owl = toy.CLASSES["owl"]
    assert toy.sound_labels(row).tolist() == [0] * 2 + [owl] * 10 + [0]


def test_a_folder_that_toy_did_not_write_is_left_alone(tmp_path, capsys):
    (tmp_path / "toy-world-0").mkdir()
    (tmp_path / "toy-world-0" / "notes.txt").write_text("keep")
    with pytest.raises(data.InputError, match="not written by toy.py"):
        toy.prepare(tmp_path / "toy-world-0", 0)
    assert compare.main(["--out", str(tmp_path / "toy")]) == 2
    assert "not written by toy.py" in capsys.readouterr().err
    assert (tmp_path / "toy-world-0" / "notes.txt").read_text() == "keep"


def test_train_names_the_questions_that_the_toy_has(tmp_path, capsys):
    code = train.main(["--model", "toy", "--data", "train.jsonl", "--checker", "rule",
                       "--output_dir", str(tmp_path / "run")])
    assert code == 2
    assert capsys.readouterr().err == (
        "error: data: with the model `toy`, give caption or late, got 'train.jsonl'\n")


# ──────── compare.py ────────


def test_the_held_out_curve_reads_every_checkpoint(tmp_path, monkeypatch):
    """Step 0 is the start, and the last step is checkpoint/."""
    run = tmp_path / "run"
    for name in ("checkpoint-20", "checkpoint-100", "checkpoint"):
        (run / name).mkdir(parents=True)
    (run / "metrics.jsonl").write_text("".join(f'{{"step": {step}}}\n' for step in range(1, 121)))
    (tmp_path / "dev.jsonl").write_text("")
    accuracy = {"start": 0.1, "checkpoint-20": 0.2, "checkpoint-100": 0.3, "checkpoint": 0.6}
    monkeypatch.setattr(compare, "load_policy", lambda folder: folder)
    monkeypatch.setattr(compare, "read_questions", lambda *_, **__: [])
    monkeypatch.setattr(compare, "greedy_accuracy",
                        lambda policy, prompts: (accuracy[policy.name], []))
    curve = compare.held_out_curve(run, tmp_path / "dev.jsonl", tmp_path / "start")
    assert curve == [(0, 0.1), (20, 0.2), (100, 0.3), (120, 0.6)]
    assert compare.mean_after_start(curve) == pytest.approx((0.2 + 0.3 + 0.6) / 3)


def test_a_killed_run_is_a_failure(tmp_path, monkeypatch, capsys):
    """A run that a signal ended has a negative exit code, beside one that ended well."""
    monkeypatch.setattr(compare.toy, "prepare", lambda *_: tmp_path)
    monkeypatch.setattr(compare, "train_side_by_side", lambda *_: {"GRPO": 0, "MAPO": -9})
    assert compare.main(["--out", str(tmp_path / "toy")]) == 1
    assert capsys.readouterr().err == "error: the run MAPO ended with exit code -9\n"


@pytest.mark.slow
@pytest.mark.parametrize("questions", ["late", "caption"])  # all weights; LoRA
def test_make_toy_from_nothing(tmp_path, questions):
    """With few steps: both arms, their checkpoints, the picture, and the closing lines."""
    code = ("import sys, toy, compare; toy.SPLITS = {'train': 150, 'dev': 30, 'test': 30};"
            "toy.AUDIO_TOWER_STEPS = toy.SHORT_STEPS = toy.LONG_STEPS = 5;"
            "compare.EXPORT_EVERY = 4; compare.ARMS = {name: [*flags, '--max_steps', '8',"
            " '--max_new_tokens', '16'] for name, flags in compare.ARMS.items()};"
            f"sys.exit(compare.main(['--out', {str(tmp_path / 'toy')!r},"
            f" '--questions', {questions!r}]))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    for arm in ("GRPO", "MAPO"):
        assert len(lines(tmp_path / "toy" / arm / "metrics.jsonl")) == 8
        assert (tmp_path / "toy" / arm / "checkpoint-4").is_dir()
        assert f"\n{arm}: held-out accuracy 0." in f"\n{done.stdout}"
    assert (tmp_path / "toy" / "compare.png").stat().st_size > 10_000
    assert "This is one seed (0)" in done.stdout
