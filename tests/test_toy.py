"""The toy world: deterministic, disjoint, answerable from its events; its rules; its tokenizer. (No warm start.)"""

import hashlib
import json

import numpy as np
import pytest
from transformers import AutoTokenizer

import data
import toy
from rewards import rule_consistency_rewards


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A small world written twice with one seed and once with another → folders and rows."""
    sizes, toy.SPLITS = toy.SPLITS, {"train": 60, "dev": 30, "test": 40}
    folders = [tmp_path_factory.mktemp("toy") / str(i) for i in range(3)]
    rows = [toy.write_world(folder, seed) for folder, seed in zip(folders, (0, 0, 1))]
    toy.SPLITS = sizes
    return folders, rows


def digest(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def recompute(row):
    """The answer from the events and the text of the question alone, sharing no code with toy.py."""
    names = [event["sound"] for event in sorted(row["events"], key=lambda event: event["start"])]
    if row["question"] == "How many knocks are there?":
        return ["zero", "one", "two", "three", "four"][sum(e["count"] for e in row["events"] if e["sound"] == "knocks")]
    place = row["question"].split()[-1].rstrip("?")
    return names[{"first": 0, "second": 1, "third": 2, "last": -1}[place]]


def test_the_same_seed_gives_the_same_bytes_and_another_seed_does_not(world):
    folders, _ = world
    assert digest(folders[0]) == digest(folders[1])
    assert digest(folders[0]) != digest(folders[2])


def test_no_clip_stands_in_two_splits(world):
    folders, _ = world
    wavs = [value for name, value in digest(folders[0]).items() if name.endswith(".wav")]
    assert len(wavs) == len(set(wavs)) == 130


def test_every_row_passes_the_reader_and_its_clip_lasts_as_long_as_its_events(world):
    folders, rows = world
    for split in ("train", "dev", "test"):
        questions = data.read_questions(folders[0] / f"{split}.jsonl")
        for question, row in zip(questions, rows[0][split], strict=True):
            seconds = len(data.load_audio(question.audio[0])) / data.SAMPLE_RATE
            assert row["events"][-1]["end"] < seconds < row["events"][-1]["end"] + 0.1


def test_the_answer_follows_from_the_events(world):
    folders, _ = world
    for split in ("train", "dev", "test"):
        for line in (folders[0] / f"{split}.jsonl").read_text().splitlines():
            row = json.loads(line)
            assert recompute(row) == row["answer"]


def test_the_prior_is_right_on_its_share_of_the_questions():
    rng = np.random.default_rng(0)
    rows = [toy.draw_row(str(i), "train", rng) for i in range(2000)]
    right = np.mean([toy.preferred(row["choices"]) == row["answer"] for row in rows])
    assert abs(right - toy.PRIOR_RIGHT) < 0.04


def test_a_clean_demonstration_is_right_consistent_and_exact(world):
    rng = np.random.default_rng(0)
    for row in world[1][0]["train"]:
        thinking, _, answer = toy.demonstration(row, rng).partition("</think>")
        assert answer.strip() == row["answer"]
        assert rule_consistency_rewards([f"{thinking}</think>{answer}"]) == [1.0]
        assert toy.caption_is_exact(thinking, row["events"])


def test_exactness_says_no():
    events = [{"sound": "bell"}, {"sound": "hum"}]
    assert toy.caption_is_exact("<think> I hear: the first is a bell, the last is a hum. So", events)
    assert not toy.caption_is_exact("<think> I hear: the first is a hum, the last is a bell. So", events)
    assert not toy.caption_is_exact("<think> I hear: the first is a bell. The last is a hum.", events)


def test_the_tokenizer_survives_a_round_trip(world, tmp_path):
    rng = np.random.default_rng(0)
    rows = world[1][0]["train"]
    texts = [toy.demonstration(row, rng) for row in rows]
    toy.build_tokenizer(texts).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    for text in texts[:10]:
        ids = tokenizer(text + "<|im_end|>")["input_ids"]
        assert ids[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(ids, skip_special_tokens=True) == text  # <think> stays, <|im_end|> goes
    question = data.read_questions(world[0][0] / "train.jsonl")[0]
    rendered = tokenizer.apply_chat_template(data.conversation(question), tokenize=False, add_generation_prompt=True)
    text = data.conversation(question)[0]["content"][1]["text"]
    assert rendered == (f"<|im_start|>user\n<|audio_start|><|audio_pad|><|audio_end|>{text}<|im_end|>\n"
                        "<|im_start|>assistant\n")
    audio = tokenizer.convert_tokens_to_ids("<|audio_pad|>")
    assert tokenizer(rendered)["input_ids"].count(audio) == 1
    assert len(tokenizer("<think>")["input_ids"]) == len(tokenizer("</think>")["input_ids"]) == 1


def test_a_folder_that_is_not_the_toys_is_left_alone(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(data.InputError, match="not written by toy.py"):
        toy.prepare(tmp_path / "mine", 0)
    assert (tmp_path / "mine" / "notes.txt").read_text() == "keep"
