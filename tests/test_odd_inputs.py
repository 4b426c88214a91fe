"""Valid rows, audio files and recipes, changed at random.

Whatever the change is, the input is refused in lines that name the file and the line or field, or
it is accepted. The features of an accepted clip are finite.
"""

import io
import itertools
import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import tiny
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import evaluate
import train
from benchmarks import Item
from checkpoint import save_policy
from config import TrainConfig, read_config
from data import InputError, read_avqa, read_questions
from rollout import Completion
from run import check_policy

ROW = {"id": "q2", "audio": "good.wav", "question": "What barks?", "choices": ["a dog", "a seal"],
       "answer": "a dog", "domain": "animals"}
AVQA = {"id": 2, "question_text": "What is in the video?", "multi_choice": ["a dog", "a seal"],
        "answer": 1, "question_type": "Come From", "audio_path": "good.wav"}
RECIPE = {"model": "folder", "data": "train.jsonl", "max_steps": 4, "learning_rate": 1e-3,
          "temperature": 1.2, "target_layers": [1, 2], "reward_weights": [2.0, 1.0, 0.0],
          "eta": 0.1, "group_size": 4, "generation_batch_size": 16, "seed": 3, "mask": True}
ODD_YAML = ["2001-99-99", "!!timestamp x", "!!bool x", "!!int x", "[" * 5000, "&a [*a]", "{x}",
            '"\\ud83d"', "", "-", "0x", "1:99", ".nan", "!!binary é", "{[1]: 2}", "1e999", "x: y"]
ROOT = Path(__file__).resolve().parents[1]
COUNTER = itertools.count()


def several(cases):
    return settings(max_examples=cases, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a clip, and a model whose tokenizer knows control tokens."""
    folder = tmp_path_factory.mktemp("odd")
    soundfile.write(folder / "good.wav", np.sin(np.arange(1600) / 5) / 2, 16000)
    return folder, tiny.qwen3_omni()


def check(world, read, path):
    """Reads the file, and checks and encodes its questions. Errors must name the file and line."""
    _, policy = world
    try:
        questions = read(path)
        check_policy(policy, questions, (0,))
        prompts = [policy.encode(question) for question in questions]
    except InputError as error:
        for line in str(error).split("\n"):
            assert re.match(rf"{re.escape(str(path))}:(\d+| …)", line), line
    else:
        assert all(f.isfinite().all() for prompt in prompts for f in prompt.features)


# ──────── rows ────────

ODD_TEXTS = st.sampled_from(
    ["", " ", "\0", "\n", "\u2028", "\ud83d", "\udcff", "a\ud83d", "<think>", "<|im_end|>",
     "<|audio_pad|>", "{{ 1 }}", "é" * 200, "a/" * 3000, "~", "..", "/dev/zero", "good.wav/x",
     "-1", "A", "🎵", "\x1b[2J", "x" * 100_000])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 2**70) | st.floats() | st.text() | ODD_TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=2),
    max_leaves=5)


@st.composite
def changed_rows(draw, row):
    """The bytes of a line: the row with another value, without a field, or with other bytes."""
    row, key = dict(row), draw(st.sampled_from(sorted(row)))
    match draw(st.sampled_from(["value", "text", "remove", "bytes"])):
        case "value":
            row[key] = draw(VALUES)
        case "text":  # a valid row but for the text
            text = draw(ODD_TEXTS | st.text(min_size=1))
            other = [text, row["choices"][0]] if "choices" in row else [text, "b"]
            row |= {"choices": other} if key == "choices" else {key: text}
        case "remove":
            del row[key]
        case "bytes":
            return draw(changed_bytes(json.dumps(row).encode()))
    return json.dumps(row).encode()


@st.composite
def changed_bytes(draw, data, first=None):
    """Up to four bytes replaced, inserted or removed, or the end cut off."""
    data = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, min(len(data), first or len(data))))
        match draw(st.sampled_from(["replace", "replace", "insert", "remove", "cut"])):
            case "replace":
                data[at:at + 1] = bytes([draw(st.integers(0, 255))])
            case "insert":
                data[at:at] = draw(st.binary(max_size=5))
            case "remove":
                del data[at:at + draw(st.integers(1, 8))]
            case "cut":
                del data[draw(st.integers(at, len(data))):]
    return bytes(data)


@several(200)
@given(line=changed_rows(ROW))
def test_changed_rows(world, line):
    path = world[0] / "rows.jsonl"
    path.write_bytes(b"\n".join([json.dumps(ROW | {"id": "q1"}).encode(), line]))
    check(world, read_questions, path)


@several(80)
@given(line=changed_rows(AVQA))
def test_changed_avqa_rows(world, line):
    path = world[0] / "avqa.jsonl"
    path.write_bytes(b"\n".join([json.dumps(AVQA | {"id": 1}).encode(), line]))
    check(world, read_avqa, path)


# ──────── audio files ────────

FORMATS = [("wav", "PCM_16"), ("wav", "FLOAT"), ("wav", "DOUBLE"), ("flac", "PCM_16"),
           ("ogg", "VORBIS"), ("mp3", "MPEG_LAYER_III"), ("aiff", "FLOAT"), ("au", "DOUBLE"),
           ("w64", "FLOAT"), ("rf64", "FLOAT"), ("caf", "FLOAT")]


def sound(format, subtype):
    """A short clip in stereo, as bytes."""
    file = io.BytesIO()
    samples = np.random.default_rng(0).uniform(-0.5, 0.5, (1000, 2))
    soundfile.write(file, samples, 16000, subtype, format=format)
    return file.getvalue()


SOUNDS = {format: sound(*format) for format in FORMATS}


@several(200)
@given(data=st.data(), format=st.sampled_from(FORMATS), name=st.sampled_from(["", ".raw", ".wav"]))
def test_changed_headers(world, data, format, name):
    """Of wav, flac, ogg, mp3 and rarer files, whatever their names end in."""
    folder, _ = world
    clip = folder / f"{next(COUNTER)}{name or '.' + format[0]}"  # a new name: nothing is cached
    clip.write_bytes(data.draw(changed_bytes(SOUNDS[format], first=120)))
    path = folder / "headers.jsonl"
    path.write_text(json.dumps(ROW | {"audio": clip.name}))
    check(world, read_questions, path)


@several(60)
@given(at=st.integers(0, 999), value=st.floats() | st.floats(allow_nan=False, width=32),
       subtype=st.sampled_from(["FLOAT", "DOUBLE"]), rate=st.sampled_from([1000, 16000, 44100]))
def test_a_changed_sample(world, at, value, subtype, rate):
    """Any float: NaN, infinite, huge or tiny."""
    folder, _ = world
    samples = np.random.default_rng(1).uniform(-0.5, 0.5, (1000, 2))
    samples[at, 0] = value
    clip = folder / f"{next(COUNTER)}.wav"
    with np.errstate(over="ignore"):
        soundfile.write(clip, samples, rate, subtype)
    path = folder / "samples.jsonl"
    path.write_text(json.dumps(ROW | {"audio": clip.name}))
    check(world, read_questions, path)


# ──────── commands ────────

BAD_CLIPS = {"spike.wav": "beyond", "nan.wav": "NaN", "headerless.raw": "cannot be read",
             "声" * 90 + ".wav": "no such file", "middle.flac": "lost sync"}


@pytest.fixture
def bad_clips(tmp_path):
    """The folder of BAD_CLIPS, and of a good one."""
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, 48000)
    soundfile.write(tmp_path / "good.wav", noise, 16000)
    soundfile.write(tmp_path / "spike.wav", np.where(noise > 0.499, 3e38, noise), 16000, "FLOAT")
    soundfile.write(tmp_path / "nan.wav", np.where(noise > 0.499, np.nan, noise), 16000, "FLOAT")
    (tmp_path / "headerless.raw").write_bytes(bytes(3200))
    soundfile.write(tmp_path / "middle.flac", noise, 16000)
    data = bytearray((tmp_path / "middle.flac").read_bytes())
    data[len(data) // 2:len(data) // 2 + 200] = bytes(200)
    (tmp_path / "middle.flac").write_bytes(data)
    return tmp_path


def test_training_refuses_bad_clips_together(world, bad_clips, capsys):
    """One line for each, exit code 2, and nothing is written."""
    _, policy = world
    save_policy(policy, bad_clips / "model")
    rows = [ROW | {"id": name, "audio": name} for name in ["good.wav", *BAD_CLIPS]]
    (bad_clips / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    capsys.readouterr()
    assert train.main(tiny.arguments(bad_clips, bad_clips / "out")) == 2
    first, *others = capsys.readouterr().err.splitlines()
    lines = [first.removeprefix("error: "), *others]
    assert [line.split(": ")[0] for line in lines] == [
        f"{bad_clips}/train.jsonl:{number}" for number in range(2, 7)]
    for line, part in zip(lines, ["beyond", "NaN", "cannot be read", "name too long", "lost sync"]):
        assert part in line
    assert not (bad_clips / "out").exists()


def test_evaluation_counts_bad_clips_as_unreadable(world, bad_clips, monkeypatch, capsys):
    """The other questions are asked. The comparison with training data goes on, too."""
    _, policy = world
    names = ["good.wav", *BAD_CLIPS]
    items = [Item(name, (bad_clips / name,), "What barks?", ("a dog", "a seal"), "a dog", {})
             for name in names]
    monkeypatch.setattr(evaluate, "sample", lambda policy, prompts, *_, **__: [
        Completion([5], [], "stop") for _ in prompts])
    options = SimpleNamespace(instruction="", temperature=0, max_new_tokens=4, seed=0)
    rows, errors = evaluate.complete(policy, None, items, options)
    assert [row["id"] for row in rows] == ["good.wav"] and errors.keys() == BAD_CLIPS.keys()
    for name, part in BAD_CLIPS.items():
        assert part in errors[name] and "\n" not in errors[name]
    found = evaluate.fingerprints(items)
    assert len(found["audio samples"]) == 3  # good, spike and nan: these two have a fingerprint
    assert capsys.readouterr().out.count("was not compared") == 3


@pytest.mark.parametrize("data", ["toy", "no_such.jsonl"])
@pytest.mark.parametrize("recipe", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda p: p.stem)
def test_a_missing_model_folder_is_named_first(recipe, data, capsys):
    """Before the data file, which may be missing as well."""
    assert train.main([str(recipe), "--model", "no_such_folder", "--data", data]) == 2
    assert capsys.readouterr().err.startswith("error: no_such_folder: no config.json; ")


# ──────── recipes ────────


@several(80)
@given(data=st.data())
def test_changed_recipes(tmp_path_factory, data):
    """A recipe is refused by the name of the file or field, or it gives a valid configuration."""
    recipe, path = dict(RECIPE), tmp_path_factory.getbasetemp() / "recipe.yaml"
    key = data.draw(st.sampled_from(sorted(recipe)))
    kind = data.draw(st.sampled_from(["value", "yaml", "bytes"]))
    if kind == "value":
        recipe[key] = data.draw(VALUES)
    text = "".join(f"{name}: {json.dumps(value)}\n" for name, value in recipe.items())
    if kind == "yaml":
        text += f"{key}: {data.draw(st.sampled_from(ODD_YAML))}\n"  # the last line counts
    path.write_bytes(data.draw(changed_bytes(text.encode())) if kind == "bytes" else text.encode())
    try:
        config = read_config([str(path)])
    except InputError as error:
        names = [str(path), *(f for f in TrainConfig.__dataclass_fields__)]
        assert any(name in str(error) for name in names) and "\n" not in str(error), error
    else:
        assert isinstance(config, TrainConfig)


@pytest.mark.parametrize("line", ["seed: [1, 2]", "data: [null, null]", "data: {a: b}",
                                  "target_layers: {1}", 'instruction: "\\ud83d"', "model:"])
def test_values_of_the_wrong_kind(tmp_path, line):
    """A list for one value, a mapping, half of a character: the file and the field are named."""
    (tmp_path / "recipe.yaml").write_text(line)
    with pytest.raises(InputError, match=f"recipe.yaml: field '{line.partition(':')[0]}' "):
        read_config([str(tmp_path / "recipe.yaml")])
