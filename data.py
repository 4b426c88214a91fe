"""Audio questions: the jsonl format, audio files, and the prompt.

One row of a jsonl file, audio paths relative to that file:

    {"id": "q1", "audio": "clips/q1.wav", "question": "What barks?", "choices": ["a dog", "a seal"], "answer": "a dog"}

`audio` may be a list of paths (several clips in one question); `domain` is optional and kept for reports. Everything a
user can get wrong is checked when the file is read: InputError names the file, the line or field, and the mend.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import soxr

SAMPLE_RATE = 16_000  # Hz, what the audio encoders of all supported models expect


class InputError(ValueError):
    """Bad input from the user: one line that names the file, line or field, and the mend."""


@dataclass(frozen=True)
class Question:
    """One multiple-choice question about one or several audio clips."""

    id: str
    audio: tuple[Path, ...]
    question: str
    choices: tuple[str, ...]
    answer: str
    domain: str = ""


def conversation(question, with_audio=True, instruction=""):
    """The prompt, as chat messages for a tokenizer's template. x = (x_text, x_audio); without audio it is x_text.

    The clips first, then the question, its options, one a line with a letter (an open question has none), and the
    instruction if there is one. No system prompt. (ours: the paper does not print its prompt)
    """
    options = [f"{chr(ord('A') + i)}. {choice}" for i, choice in enumerate(question.choices)]
    lines = [question.question, *(["Choose one of these options:"] if options else []), *options, instruction]
    text = "\n".join(line for line in lines if line)
    clips = [{"type": "audio", "audio": str(path)} for path in question.audio] if with_audio else []
    return [{"role": "user", "content": clips + [{"type": "text", "text": text}]}]


def read_questions(path):
    """Reads and checks a jsonl file → list[Question]. Raises InputError (see the module's docstring).

    Headers of all audio files are opened here; samples are decoded only where the format can hold a NaN.
    """
    return _read(Path(path), Path(path).parent, lambda row, where: row)


def read_avqa(path, audio_root=None):
    """AVQA rows as R1-AQA writes them (one json object a line) → list[Question].

    Keys: id, question_text, multi_choice (options), answer (0-based index), question_type, audio_path (relative to
    audio_root, default the file's folder). The question was asked about a video: "video" becomes "audio".
    """
    return _read(Path(path), Path(audio_root or Path(path).parent), _row_of_avqa)


def _row_of_avqa(row, where):
    for key, kind in (("question_text", str), ("multi_choice", list), ("answer", int), ("audio_path", str)):
        if not isinstance(row.get(key), kind) or isinstance(row[key], bool):
            raise InputError(f"{where}: field {key!r} is {row.get(key)!r}; an AVQA row needs a {kind.__name__} there")
    if not 0 <= row["answer"] < len(row["multi_choice"]):
        raise InputError(f"{where}: answer {row['answer']} is no index into the {len(row['multi_choice'])} options")
    return {"id": str(row.get("id", "")), "audio": row["audio_path"],
            "question": row["question_text"].replace("video", "audio").replace("Video", "Audio"),
            "choices": row["multi_choice"], "answer": row["multi_choice"][row["answer"]],
            "domain": row.get("question_type")}


def _read(path, audio_root, to_row):
    questions, line_of = [], {}
    for number, row in _json_lines(path):
        where = f"{path}:{number}"
        question = _question(to_row(row, where), audio_root, where)
        if question.id in line_of:
            raise InputError(f"{where}: id {question.id!r} stands in line {line_of[question.id]} already; make ids "
                             "unique")
        line_of[question.id] = number
        for clip in question.audio:
            check_audio(clip, where)
        questions.append(question)
    if not questions:
        raise InputError(f"{path}: no question in this file; give at least one json object a line")
    return questions


def load_audio(path):
    """One clip → float32 [samples], mono (channels averaged), 16 kHz.

    Raises InputError for a broken or empty file, and for NaN or infinite samples.
    """
    try:
        samples, rate = soundfile.read(path, dtype="float32", always_2d=True)  # [samples, channels]
    except soundfile.LibsndfileError as error:
        raise InputError(f"{path}: cannot be read as audio ({error}); give a wav, flac, ogg or mp3 file") from error
    if not len(samples):
        raise InputError(f"{path}: the clip is empty; remove the question or mend the file")
    if not np.isfinite(samples).all():
        raise InputError(f"{path}: the clip holds NaN or infinite samples; mend the file")
    return soxr.resample(samples.mean(axis=1), rate, SAMPLE_RATE).astype(np.float32)


def check_audio(path, where):
    """Raises InputError unless `path` is a non-empty audio file without NaN; `where` is the line that names it."""
    if len(path.name) > 255 or not path.is_file():  # a longer name makes is_file raise
        raise InputError(f"{where}: audio file {path} does not exist; paths are relative to the jsonl file")
    try:
        header = soundfile.info(path)
        with soundfile.SoundFile(path) as file:  # a compressed file that was cut off has a sound header
            file.seek(max(0, file.frames - 1))
            file.read(1)
    except soundfile.LibsndfileError as error:
        raise InputError(f"{where}: {path} cannot be read as audio ({error}); give a wav, flac, ogg or "
                         "mp3 file") from error
    if not header.frames:
        raise InputError(f"{where}: {path} is empty; remove the question or mend the file")
    if header.subtype in ("FLOAT", "DOUBLE"):
        try:
            load_audio(path)
        except InputError as error:
            raise InputError(f"{where}: {error}") from error


def _json_lines(path):
    if not path.is_file():
        raise InputError(f"{path}: no such file; give a jsonl file of questions")
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8"))
            except UnicodeDecodeError as error:
                raise InputError(f"{path}:{number}: not UTF-8 ({error}); save the file as UTF-8") from error
            except json.JSONDecodeError as error:
                raise InputError(f"{path}:{number}: not valid json ({error}); write one json object a line") from error
            if not isinstance(row, dict):
                raise InputError(f"{path}:{number}: a {type(row).__name__}, not a json object; write one object a line")
            yield number, row


def _question(row, folder, where):
    for key in ("id", "question", "answer"):
        if not isinstance(row.get(key), str) or not row[key].strip():
            raise InputError(f"{where}: field {key!r} is {row.get(key)!r}; a non-empty string is needed")
    audio = row.get("audio")
    audio = [audio] if isinstance(audio, str) else audio
    if not isinstance(audio, list) or not audio or not all(isinstance(clip, str) and clip for clip in audio):
        raise InputError(f"{where}: field 'audio' is {row.get('audio')!r}; give a path, or a list of paths")
    choices = row.get("choices")
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) and c.strip() for c in choices):
        raise InputError(f"{where}: field 'choices' is {choices!r}; a list of at least two non-empty strings is needed")
    if len(choices) > 26:
        raise InputError(f"{where}: field 'choices' holds {len(choices)} options; letters name at most 26")
    if row["answer"] not in choices:
        raise InputError(f"{where}: answer {row['answer']!r} is not among the choices {choices}; copy one of them "
                         "exactly")
    if len({choice.strip() for choice in choices}) < len(choices):
        raise InputError(f"{where}: field 'choices' holds an option twice: {choices}; make the options different")
    domain = row.get("domain")
    if domain is not None and not isinstance(domain, str):
        raise InputError(f"{where}: field 'domain' is {domain!r}; give a string or leave it out")
    clips = tuple(folder / clip for clip in audio)
    return Question(row["id"], clips, row["question"], tuple(choices), row["answer"], domain or "")
