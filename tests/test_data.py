"""data.py: what is read from files, and that every mistake gets one line that names its place."""

import json
import os
import pwd
import re

import numpy as np
import pytest
import soundfile
from transformers import WhisperFeatureExtractor

from data import (LOUDEST, InputError, Question, cache_file, check_clips, conversation,
                  json_lines, load_audio, log_mel, read_avqa, read_questions)
from families import FAMILIES
from metrics import continue_log

ROW = {"id": "q1", "audio": "clips/a.wav", "question": "What barks?",
       "choices": ["a dog", "a seal"], "answer": "a dog"}
AVQA = {"id": 183, "question_text": "What is in the video?", "answer": 1,
        "multi_choice": ["a dog", "a seal", "a bell"], "question_type": "Come From",
        "audio_path": "clips/a.wav"}


@pytest.fixture
def folder(tmp_path):
    """A folder with two sound clips, an empty one, clips with NaN, and files that are not audio."""
    clips = tmp_path / "clips"
    clips.mkdir()
    tone = np.sin(np.arange(1600) / 5).astype(np.float32) / 2
    soundfile.write(clips / "a.wav", tone, 16000)
    soundfile.write(clips / "b.flac", tone, 16000)
    soundfile.write(clips / "empty.wav", tone[:0], 16000)
    with_nan = np.where(np.arange(1600) == 700, np.nan, tone)
    soundfile.write(clips / "nan.wav", with_nan, 16000, subtype="FLOAT")
    soundfile.write(clips / "nan64.wav", with_nan, 16000, subtype="DOUBLE")
    with_inf = np.where(np.arange(1600) == 1599, np.inf, tone)
    soundfile.write(clips / "inf.wav", with_inf, 16000, subtype="FLOAT")
    soundfile.write(clips / "float.wav", tone, 16000, subtype="FLOAT")
    (clips / "text.wav").write_text("this is not audio")
    soundfile.write(clips / "huge.wav", 1e25 * tone, 16000, subtype="FLOAT")
    soundfile.write(clips / "1hz.wav", tone, 1)
    (clips / "headerless.raw").write_bytes(bytes(3200))
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, 48000)
    soundfile.write(clips / "middle.flac", noise, 16000)
    whole = bytearray((clips / "middle.flac").read_bytes())
    whole[len(whole) // 2:len(whole) // 2 + 200] = bytes(200)  # header and end stay as they are
    (clips / "middle.flac").write_bytes(whole)
    (clips / "cut.flac").write_bytes((clips / "b.flac").read_bytes()[:20])
    return tmp_path


def lines(folder, *rows):
    """A jsonl file of the rows. A string is written as it is."""
    path = folder / "questions.jsonl"
    texts = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(text + "\n" for text in texts))
    return path


def error_of(call, *args):
    """The message of the InputError that the call raises. It must be one line."""
    with pytest.raises(InputError) as error:
        call(*args)
    assert "\n" not in str(error.value)
    return str(error.value)


# ──────── questions ────────


def test_read_questions(folder):
    """Two rows, one with several clips and a domain, and a blank line between them."""
    path = lines(folder, ROW, "", {**ROW, "id": "q2", "audio": ["clips/a.wav", "clips/b.flac"],
                                   "answer": "a seal", "domain": "nature", "more": 1})
    one, two = folder / "clips" / "a.wav", folder / "clips" / "b.flac"
    choices = ("a dog", "a seal")
    assert read_questions(path) == [
        Question("q1", (one,), "What barks?", choices, "a dog", ""),
        Question("q2", (one, two), "What barks?", choices, "a seal", "nature")]


def test_paths_are_relative_to_the_file(folder, monkeypatch):
    """Not to the working folder. Absolute paths remain, and float files without NaN are fine."""
    monkeypatch.chdir("/")
    clips = folder / "clips"
    path = lines(folder, {**ROW, "audio": [str(clips / "float.wav"), "clips/a.wav"]})
    assert read_questions(str(path))[0].audio == (clips / "float.wav", clips / "a.wav")


def test_unicode(folder):
    """Text outside ASCII reads the same from UTF-8 and from json escapes."""
    row = {**ROW, "question": "Was hört man? 何の音?", "choices": ["ein Kauz 🦉", "é"],
           "answer": "é"}
    path = lines(folder, json.dumps(row, ensure_ascii=True))
    escaped = read_questions(path)
    path.write_text(json.dumps(row, ensure_ascii=False), encoding="utf-8")
    assert read_questions(path) == escaped and escaped[0].choices == ("ein Kauz 🦉", "é")


@pytest.mark.parametrize("change, part", [
    ({"id": None}, "field 'id' is None"),
    ({"id": 7}, "field 'id' is 7"),
    ({"question": "  "}, "field 'question' is '  '"),
    ({"answer": ""}, "field 'answer' is ''"),
    ({"audio": None}, "field 'audio' is None"),
    ({"audio": []}, "field 'audio' is []"),
    ({"audio": ["clips/a.wav", 3]}, "field 'audio' is ['clips/a.wav', 3]"),
    ({"audio": ""}, "field 'audio' is ''"),
    ({"audio": "clips/none.wav"}, "clips/none.wav does not exist"),
    ({"audio": "clips"}, "clips does not exist (not a file)"),
    ({"audio": "声" * 86}, "does not exist (File name too long)"),  # 258 bytes
    ({"audio": "a\nb\0.wav"}, "a\\nb\\x00.wav does not exist"),
    ({"audio": "clips/headerless.raw"}, "clips/headerless.raw: cannot be read as audio"),
    ({"audio": "clips/middle.flac"}, "clips/middle.flac: cannot be read as audio"),
    ({"audio": "clips/huge.wav"}, "clips/huge.wav: the clip holds NaN or infinite samples, or "),
    ({"audio": "clips/1hz.wav"}, "clips/1hz.wav: its sampling rate is 1 Hz"),
    ({"id": "\ud83d"}, "field 'id' cannot be encoded"),
    ({"question": "what \ud83d?"}, "field 'question' cannot be encoded"),
    ({"choices": ["a dog", "\udc00"]}, "field 'choices' cannot be encoded"),
    ({"audio": ["clips/a.wav", "\udcff"]}, "field 'audio' cannot be encoded"),
    ({"audio": "clips/text.wav"}, "clips/text.wav: cannot be read as audio"),
    ({"audio": "clips/cut.flac"}, "clips/cut.flac: cannot be read as audio"),
    ({"audio": "clips/empty.wav"}, "clips/empty.wav: the clip is empty"),
    ({"audio": "clips/nan.wav"}, "clips/nan.wav: the clip holds NaN"),
    ({"audio": ["clips/a.wav", "clips/nan64.wav"]}, "clips/nan64.wav: the clip holds NaN"),
    ({"audio": "clips/inf.wav"}, "clips/inf.wav: the clip holds NaN or infinite"),
    ({"choices": None}, "field 'choices' is None"),
    ({"choices": "a dog"}, "field 'choices' is 'a dog'"),
    ({"choices": ["a dog"]}, "at least two"),
    ({"choices": ["a dog", 2]}, "non-empty strings"),
    ({"choices": ["a dog", " "]}, "non-empty strings"),
    ({"choices": [f"{i}" for i in range(26)] + ["a dog"]}, "27 options"),
    ({"choices": ["a dog", "a dog"]}, "an option twice"),
    ({"choices": ["a dog", "a seal", "a seal"]}, "an option twice"),
    ({"answer": "A dog"}, "answer 'A dog' is not among the choices"),
    ({"domain": 4}, "field 'domain' is 4"),
])
def test_mistakes_in_a_row(folder, change, part):
    """The error names line 3: the mistake comes after a good row and a blank line."""
    path = lines(folder, ROW, "", {**ROW, "id": "q3", **change})
    message = error_of(read_questions, path)
    assert part in message and message.startswith(f"{path}:3: ")


@pytest.mark.parametrize("missing", list(ROW))
def test_missing_fields(folder, missing):
    """Only `domain` may be left out."""
    path = lines(folder, {key: value for key, value in ROW.items() if key != missing})
    assert error_of(read_questions, path).startswith(f"{path}:1: field '{missing}' is None")


@pytest.mark.parametrize("reader", [read_questions, read_avqa])
@pytest.mark.parametrize("line, part", [
    ('{"id": "q2"', "not valid json"), ("[1, 2]", "a list, not a json object"),
    ('"q"', "a str, not"), ("null", "a NoneType, not"), ("what?", "not valid json"),
    ("[" * 100_000, "not valid json"), ('{"id": ' + "1" * 5000 + "}", "not valid json")])
def test_mistakes_in_a_line(folder, reader, line, part):
    """A line that is not a json object is named by its number."""
    path = lines(folder, "", ROW if reader is read_questions else AVQA, line)
    message = error_of(reader, path)
    assert message.startswith(f"{path}:3: ") and part in message


def test_mistakes_in_the_file(folder):
    """Missing, empty and blank files, a folder instead of a file, and repeated ids."""
    missing = folder / "none.jsonl"
    assert error_of(read_questions, missing).startswith(f"{missing}: no such file")
    for reader in (read_questions, read_avqa):
        assert "no such file" in error_of(reader, folder)
    for path in (lines(folder), lines(folder, "", "  ")):
        assert error_of(read_questions, path).startswith(f"{path}: no question")
        assert error_of(read_avqa, path).startswith(f"{path}: no question")
    path = lines(folder, ROW, "", {**ROW, "id": "q2"}, ROW)
    message = error_of(read_questions, path)
    assert message.startswith(f"{path}:4: id 'q1'") and ":1; make" in message


def test_all_bad_rows_are_listed_at_once(folder):
    """The first 20 and the number of the rest. Good rows do not count."""
    bad = [{**ROW, "id": "a", "answer": "a cat"}, "{", {**ROW, "id": "b", "audio": "none.wav"}]
    path = lines(folder, ROW, *bad, {**ROW, "id": "c", "audio": ["clips/nan.wav", "none.wav"]})
    with pytest.raises(InputError) as error:
        read_questions(path)
    starts = [line.split(": ")[0] for line in str(error.value).split("\n")]
    assert starts == [f"{path}:{number}" for number in (2, 3, 4, 5)]
    path = lines(folder, *["{"] * 20, ROW, *["{"] * 3)
    with pytest.raises(InputError) as error:
        read_questions(path)
    *first, last = str(error.value).split("\n")
    assert len(first) == 20 and last == f"{path}: … and 3 more bad rows"


# ──────── AVQA ────────


def test_read_avqa(folder):
    """The index becomes the option, "video" becomes "audio", the type, if any, the domain."""
    row = {key: value for key, value in AVQA.items() if key != "question_type"}
    path = lines(folder, AVQA, {**row, "id": "x", "answer": 0,
                                "question_text": "Video: which of the videos?"})
    clip = folder / "clips" / "a.wav"
    choices = ("a dog", "a seal", "a bell")
    assert read_avqa(path) == [
        Question("183", (clip,), "What is in the audio?", choices, "a seal", "Come From"),
        Question("x", (clip,), "Audio: which of the audios?", choices, "a dog", "")]


def test_read_avqa_with_audio_elsewhere(folder, tmp_path_factory):
    """Paths are relative to audio_root."""
    path = lines(tmp_path_factory.mktemp("rows"), AVQA)
    assert "does not exist" in error_of(read_avqa, path)
    for audio_root in (folder, str(folder)):
        assert read_avqa(path, audio_root)[0].audio == (folder / "clips" / "a.wav",)


@pytest.mark.parametrize("change, part", [
    ({"id": 183}, "id '183' is already used in"), ({"id": ""}, "field 'id' is ''"),
    ({"question_type": 5}, "field 'domain' is 5"),
    ({"answer": 3}, "answer 3 is not an index into the 3 options"),
    ({"answer": -1}, "answer -1 is not an index"),
    ({"answer": "a dog"}, "field 'answer' is 'a dog'"),
    ({"answer": True}, "field 'answer' is True"),
    ({"question_text": None}, "field 'question_text' is None"),
    ({"multi_choice": "abc"}, "field 'multi_choice' is 'abc'"),
    ({"multi_choice": ["x"], "answer": 0}, "at least two"),
    ({"multi_choice": ["x", "x"], "answer": 0}, "an option twice"),
    ({"audio_path": 4}, "field 'audio_path' is 4"),
    ({"audio_path": "clips/b.wav"}, "does not exist"),
    ({"audio_path": "clips/text.wav"}, "cannot be read as audio")])
def test_mistakes_in_an_avqa_row(folder, change, part):
    """The error names the file, the line and the field."""
    path = lines(folder, AVQA, {**AVQA, "id": 184, **change})
    message = error_of(read_avqa, path)
    assert message.startswith(f"{path}:2: ") and part in message


# ──────── json lines ────────


def test_json_lines_end_at_line_feeds(tmp_path):
    """A text may contain U+2028 or U+0085. Blank lines count. The last line may lack its end."""
    rows = [{"text": "one\u2028two\x85three"}, {"text": "four"}]
    first, second = (json.dumps(row, ensure_ascii=False) for row in rows)
    (tmp_path / "a.jsonl").write_text(f"{first}\n\n{second}", encoding="utf-8", newline="")
    assert list(json_lines(tmp_path / "a.jsonl")) == [(1, rows[0]), (3, rows[1])]
    assert error_of(list, json_lines(tmp_path / "none.jsonl")).startswith(
        f"{tmp_path / 'none.jsonl'}: no such file")


@pytest.mark.parametrize("end", [b"", b'{"step": 3, "te', b'{"step": 3}'])
def test_continue_log(tmp_path, end):
    """A last line without its line end was cut off with its process, and is removed."""
    path = tmp_path / "log.jsonl"
    assert continue_log(path) == []
    whole = b'{"step": 1}\n{"step": 2, "text": "\xe2\x80\xa8"}\n'
    path.write_bytes(whole + end)
    assert continue_log(path) == [{"step": 1}, {"step": 2, "text": "\u2028"}]
    assert path.read_bytes() == whole
    path.write_bytes(b"[]\n" + end)
    assert error_of(continue_log, path).startswith(f"{path}:1: a list, not a json object")


# ──────── audio ────────


def frequency(samples):
    """Frequency of the strongest bin, Hz, at 16 kHz."""
    return np.abs(np.fft.rfft(samples * np.hanning(len(samples)))).argmax() * 16000 / len(samples)


def test_load_audio_keeps_16_khz_mono_as_it_is(tmp_path):
    """float32, one axis, the file's own samples."""
    samples = np.random.default_rng(0).uniform(-0.9, 0.9, 3001).astype(np.float32)
    soundfile.write(tmp_path / "a.wav", samples, 16000, subtype="FLOAT")
    loaded = load_audio(tmp_path / "a.wav")
    assert loaded.dtype == np.float32 and loaded.shape == (3001,)
    assert np.abs(loaded - samples).max() < 1e-6


def test_load_audio_averages_channels(tmp_path):
    """Two and four channels become their mean, not their sum or the first."""
    samples = np.random.default_rng(0).uniform(-0.9, 0.9, (1000, 4)).astype(np.float32)
    for channels in (2, 4):
        soundfile.write(tmp_path / "a.wav", samples[:, :channels], 16000, subtype="FLOAT")
        mean = samples[:, :channels].mean(axis=1)
        assert np.abs(load_audio(tmp_path / "a.wav") - mean).max() < 1e-6


@pytest.mark.parametrize("rate", [8000, 22050, 44100, 48000])
def test_load_audio_resamples(tmp_path, rate):
    """A tone keeps its seconds, frequency and loudness; too high a tone does not alias."""
    t = np.arange(int(1.5 * rate)) / rate
    soundfile.write(tmp_path / "a.wav", 0.5 * np.sin(2 * np.pi * 1234 * t), rate)
    loaded = load_audio(tmp_path / "a.wav")
    assert abs(len(loaded) - 24000) <= 1
    assert abs(frequency(loaded) - 1234) <= 1
    assert abs(np.abs(loaded[4000:-4000]).max() - 0.5) < 0.01
    if rate > 24000:
        soundfile.write(tmp_path / "high.wav", 0.5 * np.sin(2 * np.pi * 11000 * t), rate)
        assert np.abs(load_audio(tmp_path / "high.wav")[1000:-1000]).max() < 1e-3


@pytest.mark.parametrize("suffix", ["flac", "ogg", "mp3"])
def test_load_audio_formats(tmp_path, suffix):
    """Compressed files give the tone that they hold."""
    t = np.arange(44100) / 44100
    soundfile.write(tmp_path / f"a.{suffix}", 0.5 * np.sin(2 * np.pi * 700 * t), 44100)
    loaded = load_audio(tmp_path / f"a.{suffix}")
    assert abs(len(loaded) - 16000) < 1200 and abs(frequency(loaded[:15000]) - 700) <= 2


def test_load_audio_refuses(folder):
    """Broken, empty and NaN files. The error names the file."""
    for name, part in (("text.wav", "cannot be read"), ("empty.wav", "empty"), ("nan.wav", "NaN"),
                       ("inf.wav", "infinite"), ("none.wav", "cannot be read"),
                       ("huge.wav", "beyond"), ("headerless.raw", "cannot be read"),
                       ("middle.flac", "cannot be read"), ("1hz.wav", "rate"),
                       ("声" * 100, "cannot be read"), ("a\0.wav", "")):
        path = folder / "clips" / name
        shown = re.escape(str(path).replace("\0", "\\x00"))
        assert re.match(f"{shown}: .*{part}", error_of(load_audio, path))


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 44100, 48000, 96000])
def test_the_length_of_a_checked_clip_is_that_of_the_loaded_one(tmp_path, rate):
    """The check does not resample: it computes how many samples soxr makes."""
    for count in (6, 100, 441, 1103, 7777, rate, 3 * rate + 1):
        soundfile.write(tmp_path / f"{count}.wav", np.zeros(count), rate)
    clips = list(tmp_path.iterdir())
    assert check_clips(clips, None) == {clip: len(load_audio(clip)) for clip in clips}


def test_the_loudest_samples_have_finite_features(tmp_path):
    """Noise, a constant and single samples at the limit, at every rate; above it, an error."""
    extractor = WhisperFeatureExtractor(feature_size=128)
    for rate in (8000, 16000, 44100):
        noise = np.random.default_rng(0).choice([-LOUDEST, LOUDEST], (rate, 2))
        spike = noise * (np.arange(rate) == 99)[:, None]
        for samples in (noise, np.full((rate, 2), LOUDEST), spike):
            soundfile.write(tmp_path / "a.wav", samples, rate, subtype="DOUBLE")
            features, _ = log_mel(load_audio(tmp_path / "a.wav"), extractor,
                                  FAMILIES["qwen3_omni_moe_thinker"])
            assert features.isfinite().all()
            soundfile.write(tmp_path / "a.wav", 1.01 * samples, rate, subtype="DOUBLE")
            assert "beyond ±1e+15" in error_of(load_audio, tmp_path / "a.wav")


# ──────── what is kept of the check ────────


@pytest.fixture
def decoded(monkeypatch):
    """The names of the clips that are decoded, in the order of their names."""
    names, read = [], soundfile.read
    monkeypatch.setattr(soundfile, "read", lambda path, **kwargs: (
        names.append(path.name), read(path, **kwargs))[1])
    return names


def test_a_second_start_decodes_nothing(folder, decoded):
    """Only a clip whose size or time of change is another is decoded again."""
    path = lines(folder, ROW, {**ROW, "id": "q2", "audio": ["clips/b.flac", "clips/a.wav"]})
    first = read_questions(path)
    assert sorted(decoded) == ["a.wav", "b.flac"]
    assert [q.samples for q in first] == [(1600,), (1600, 1600)]
    assert [q.where for q in first] == [f"{path}:1", f"{path}:2"]
    again = read_questions(path)
    assert len(decoded) == 2 and [q.samples for q in again] == [(1600,), (1600, 1600)]
    os.utime(folder / "clips" / "b.flac", ns=(1, 1))
    read_questions(path)
    assert decoded[2:] == ["b.flac"]
    soundfile.write(folder / "clips" / "a.wav", np.zeros(800), 16000)
    assert read_questions(path)[0].samples == (800,)


def test_a_bad_clip_is_never_kept_as_good(folder, decoded):
    """It is decoded at every start until it is replaced; the good ones of the file are not."""
    path = lines(folder, ROW, {**ROW, "id": "q2", "audio": "clips/nan.wav"})
    for _ in range(2):
        assert "NaN" in error_of(read_questions, path)
    assert sorted(decoded) == ["a.wav", "nan.wav", "nan.wav"]
    soundfile.write(folder / "clips" / "nan.wav", np.zeros(1600), 16000)
    read_questions(path)


@pytest.mark.parametrize("content", [
    b"", b"{", b"\xff", b"[]", b"7", b"[" * 100_000, b'{"%s": 7}', b'{"%s": [1, 2]}',
    b'{"%s": [SIZE, TIME, "x"]}', b'{"%s": null}'])
def test_a_broken_cache_is_made_anew(folder, decoded, content):
    path = lines(folder, ROW)
    read_questions(path)
    cache = cache_file(path)
    whole = cache.read_bytes()
    clip = folder / "clips" / "a.wav"
    status = clip.stat()
    values = {"%s": clip, "SIZE": status.st_size, "TIME": status.st_mtime_ns}
    for name, value in values.items():
        content = content.replace(name.encode(), str(value).encode())
    cache.write_bytes(content)
    assert read_questions(path)[0].samples == (1600,)
    assert decoded == ["a.wav", "a.wav"] and cache.read_bytes() == whole
    assert [p.name for p in cache.parent.iterdir() if p.name.startswith(".")] == []


@pytest.mark.parametrize("home", [None, "/proc/nowhere"])
def test_without_a_place_for_the_cache_a_warning_says_so(folder, monkeypatch, capsys, home):
    """No home folder, or one that cannot be written. The questions are read all the same."""
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", lambda uid: {}[uid])  # a uid without a passwd entry
    if home:
        monkeypatch.setenv("HOME", home)
    assert read_questions(lines(folder, ROW))[0].samples == (1600,)
    warning = capsys.readouterr().err
    assert warning.startswith("warning: ") and warning.count("\n") == 1
    assert (home or "set HOME or XDG_CACHE_HOME") in warning


# ──────── prompt ────────


def test_conversation():
    """One user turn: the clips, then the question with lettered options. No system prompt."""
    choices = ("the first", "the second", "both")
    question = Question("q", ("a.wav", "b.wav"), "Which is louder?", choices, "both")
    words = ("Which is louder?\nChoose one of these options:\n"
             "A. the first\nB. the second\nC. both")
    text = {"type": "text", "text": words}
    assert conversation(question) == [{"role": "user", "content": [
        {"type": "audio", "audio": "a.wav"}, {"type": "audio", "audio": "b.wav"}, text]}]
    assert conversation(question, with_audio=False) == [{"role": "user", "content": [text]}]
    told = {"type": "text", "text": words + "\nThink first."}
    assert conversation(question, False, "Think first.") == [{"role": "user", "content": [told]}]
    assert conversation(question, True, "Think first.")[0]["content"][2] == told


def test_conversation_names_26_options_and_hides_the_answer():
    """Letters A to Z. The prompt does not depend on which option is right."""
    choices = tuple(f"option {i}" for i in range(26))
    prompts = [conversation(Question("q", ("a.wav",), "Which?", choices, answer))
               for answer in choices]
    assert all(prompt == prompts[0] for prompt in prompts)
    text = prompts[0][0]["content"][1]["text"]
    assert re.findall(r"^([A-Z])\. option (\d+)$", text, re.M) == [
        (chr(65 + i), str(i)) for i in range(26)]
