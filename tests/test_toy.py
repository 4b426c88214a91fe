"""The toy's clips, questions, demonstrations and tokenizer. The warm start is not tested here."""

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
    """A small world with seed 0 → (folder, rows)."""
    folder = tmp_path_factory.mktemp("toy") / "world"
    return folder, write_small_world(folder, seed=0)


def write_small_world(folder, seed):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(toy, "SPLITS", {"train": 60, "dev": 30, "test": 40})
        return toy.write_world(folder, seed)


def digest(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in files}


def recompute(row):
    """The answer, from the events and the text of the question alone. Uses no code of toy.py."""
    names = [event["sound"] for event in sorted(row["events"], key=lambda event: event["start"])]
    if row["question"] == "How many knocks are there?":
        knocks = sum(e["count"] for e in row["events"] if e["sound"] == "knocks")
        return ["zero", "one", "two", "three", "four"][knocks]
    place = row["question"].split()[-1].rstrip("?")
    return names[{"first": 0, "second": 1, "third": 2, "last": -1}[place]]


def test_only_the_same_seed_gives_the_same_bytes(world, tmp_path):
    folder, _ = world
    write_small_world(tmp_path / "again", seed=0)
    write_small_world(tmp_path / "other", seed=1)
    assert digest(tmp_path / "again") == digest(folder)
    assert digest(tmp_path / "other") != digest(folder)


def test_every_clip_is_different(world):
    """So no clip is in two splits."""
    folder, _ = world
    wavs = [value for name, value in digest(folder).items() if name.endswith(".wav")]
    assert len(wavs) == len(set(wavs)) == 60 + 30 + 40


def test_every_row_can_be_read_and_its_clip_is_as_long_as_its_events(world):
    folder, rows = world
    for split in ("train", "dev", "test"):
        questions = data.read_questions(folder / f"{split}.jsonl")
        for question, row in zip(questions, rows[split], strict=True):
            seconds = len(data.load_audio(question.audio[0])) / data.SAMPLE_RATE
            assert row["events"][-1]["end"] < seconds < row["events"][-1]["end"] + 0.1


def test_the_answer_follows_from_the_events(world):
    folder, _ = world
    for split in ("train", "dev", "test"):
        for line in (folder / f"{split}.jsonl").read_text().splitlines():
            row = json.loads(line)
            assert recompute(row) == row["answer"]


def test_the_favoured_option_is_right_in_its_share_of_the_questions():
    rng = np.random.default_rng(0)
    rows = [toy.draw_row(str(i), "train", rng) for i in range(2000)]
    right = np.mean([toy.preferred(row["choices"]) == row["answer"] for row in rows])
    assert abs(right - toy.PRIOR_RIGHT) < 0.04


def test_a_clean_demonstration_is_right_consistent_and_exact(world):
    _, rows = world
    rng = np.random.default_rng(0)
    for row in rows["train"]:
        thinking, _, answer = toy.demonstration(row, rng).partition("</think>")
        assert answer.strip() == row["answer"]
        assert rule_consistency_rewards([f"{thinking}</think>{answer}"]) == [1.0]
        assert toy.caption_is_exact(thinking, row["events"])


@pytest.mark.parametrize("completion, exact", [
    ("<think> I hear: the first is a bell, the last is a hum. So", True),
    ("<think> I hear: the first is a hum, the last is a bell. So", False),  # wrong order
    ("<think> I hear: the first is a bell. The last is a hum.", False),  # not in one sentence
])
def test_caption_is_exact(completion, exact):
    assert toy.caption_is_exact(completion, [{"sound": "bell"}, {"sound": "hum"}]) == exact


@pytest.fixture
def saved_tokenizer(world, tmp_path):
    """A tokenizer trained on demonstrations, saved and loaded again → (tokenizer, texts)."""
    _, rows = world
    rng = np.random.default_rng(0)
    texts = [toy.demonstration(row, rng) for row in rows["train"]]
    toy.build_tokenizer(texts).save_pretrained(tmp_path)
    return AutoTokenizer.from_pretrained(tmp_path), texts


def test_decoding_keeps_think_tags_and_drops_the_end_token(saved_tokenizer):
    tokenizer, texts = saved_tokenizer
    for text in texts[:10]:
        ids = tokenizer(text + "<|im_end|>")["input_ids"]
        assert ids[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
    for tag in ("<think>", "</think>"):
        assert len(tokenizer(tag)["input_ids"]) == 1


def test_the_chat_template_writes_one_audio_placeholder(saved_tokenizer, world):
    tokenizer, _ = saved_tokenizer
    folder, _ = world
    question = data.read_questions(folder / "train.jsonl")[0]
    messages = data.conversation(question)
    text = next(part["text"] for part in messages[0]["content"] if part["type"] == "text")
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert rendered == (f"<|im_start|>user\n<|audio_start|><|audio_pad|><|audio_end|>{text}"
                        "<|im_end|>\n<|im_start|>assistant\n")
    audio = tokenizer.convert_tokens_to_ids("<|audio_pad|>")
    assert tokenizer(rendered)["input_ids"].count(audio) == 1


def test_a_folder_that_toy_did_not_write_is_left_alone(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(data.InputError, match="not written by toy.py"):
        toy.prepare(tmp_path / "mine", 0)
    assert (tmp_path / "mine" / "notes.txt").read_text() == "keep"
