"""Audio questions: our jsonl and AVQA, audio files, and what the model is given of them.

A row of our jsonl looks like this. Audio paths are relative to the file.

    {"id": "q1", "audio": "clips/q1.wav", "question": "What barks?",
     "choices": ["a dog", "a seal"], "answer": "a dog"}

`audio` may be a list of paths, for a question about several clips. `domain` is optional and only
used in reports. Every mistake that a user can make is found when the file is read: InputError names
the file, the line or field, and the fix.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import soxr

SAMPLE_RATE = 16_000  # Hz, what the audio encoders of all supported models expect


class InputError(ValueError):
    """Bad input from the user: one line that names the file, line or field, and the fix."""


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
    """The prompt x = (x_text, x_audio), as chat messages for the tokenizer's template.

    with_audio=False gives x_text alone. The clips come first, then the question, its lettered
    options, one per line (an open question has none), and the instruction if there is one. There is
    no system prompt. (ours: the paper does not print its prompt)
    """
    options = [f"{chr(ord('A') + i)}. {choice}" for i, choice in enumerate(question.choices)]
    heading = ["Choose one of these options:"] if options else []
    lines = [question.question, *heading, *options, instruction]
    text = "\n".join(line for line in lines if line)
    clips = [{"type": "audio", "audio": str(path)} for path in question.audio] if with_audio else []
    return [{"role": "user", "content": clips + [{"type": "text", "text": text}]}]


# ──────── questions to train on ────────


def read_questions(path):
    """Reads and checks our jsonl → list[Question].

    Opens the header of every audio file. Decodes samples only where the format can hold a NaN.
    Raises InputError (see the module's docstring).
    """
    return _read(Path(path), Path(path).parent, lambda row, where: row)


def read_avqa(path, audio_root=None):
    """AVQA rows as R1-AQA writes them, one json object per line → list[Question].

    Fields: id, question_text, multi_choice (the options), answer (an index from 0), question_type,
    and audio_path (relative to audio_root, by default the file's folder). The questions were asked
    about videos, so "video" becomes "audio". Raises InputError.
    """
    return _read(Path(path), Path(audio_root or Path(path).parent), _row_of_avqa)


def _row_of_avqa(row, where):
    kinds = {"question_text": str, "multi_choice": list, "answer": int, "audio_path": str}
    for key, kind in kinds.items():
        if not isinstance(row.get(key), kind) or isinstance(row[key], bool):
            raise InputError(f"{where}: field {key!r} is {row.get(key)!r}; an AVQA row needs a "
                             f"{kind.__name__} there")
    options = row["multi_choice"]
    if not 0 <= row["answer"] < len(options):
        raise InputError(f"{where}: answer {row['answer']} is not an index into the {len(options)} "
                         "options; count from 0")
    text = row["question_text"].replace("video", "audio").replace("Video", "Audio")
    return {"id": str(row.get("id", "")), "audio": row["audio_path"], "question": text,
            "choices": options, "answer": options[row["answer"]],
            "domain": row.get("question_type")}


def _read(path, audio_root, to_row):
    questions, line_of = [], {}
    for number, row in json_lines(path):
        where = f"{path}:{number}"
        question = _question(to_row(row, where), audio_root, where)
        if question.id in line_of:
            raise InputError(f"{where}: id {question.id!r} is already used in line "
                             f"{line_of[question.id]}; make ids unique")
        line_of[question.id] = number
        for clip in question.audio:
            check_audio(clip, where)
        questions.append(question)
    if not questions:
        raise InputError(f"{path}: no questions in this file; write one json object per line")
    return questions


def _question(row, folder, where):
    for key in ("id", "question", "answer"):
        text_field(row, key, where)
    choices, domain = row.get("choices"), row.get("domain")
    if not is_list_of_texts(choices) or len(choices) < 2:
        raise InputError(f"{where}: field 'choices' is {choices!r}; give a list of at least two "
                         "non-empty strings")
    if len(choices) > 26:
        raise InputError(f"{where}: field 'choices' holds {len(choices)} options; give at most 26, "
                         "one per letter")
    if row["answer"] not in choices:
        raise InputError(f"{where}: answer {row['answer']!r} is not among the choices {choices}; "
                         "copy one of them exactly")
    if len({choice.strip() for choice in choices}) < len(choices):
        raise InputError(f"{where}: field 'choices' holds an option twice: {choices}; make the "
                         "options different")
    if domain is not None and not isinstance(domain, str):
        raise InputError(f"{where}: field 'domain' is {domain!r}; give a string or leave it out")
    clips = tuple(folder / clip for clip in audio_field(row.get("audio"), "audio", where))
    return Question(row["id"], clips, row["question"], tuple(choices), row["answer"], domain or "")


# ──────── fields of a row ────────


def text_field(row, key, where):
    """The non-empty string of a field. Raises InputError."""
    if not isinstance(row.get(key), str) or not row[key].strip():
        raise InputError(f"{where}: field {key!r} is {row.get(key)!r}; give a non-empty string")
    return row[key]


def audio_field(value, key, where):
    """→ list of paths, as they are written in the row."""
    clips = [value] if isinstance(value, str) else value
    if not is_list_of_texts(clips) or not clips:
        raise InputError(f"{where}: field {key!r} is {value!r}; give a path, or a list of paths")
    return clips


def is_list_of_texts(value):
    """A list of non-empty strings?"""
    return isinstance(value, list) and all(isinstance(x, str) and x.strip() for x in value)


# ──────── json lines ────────


def json_lines(path, errors=None):
    """A jsonl file → yields (line number, object). Blank lines are skipped but counted.

    Only "\\n" ends a line, because a json string may hold other line ends, such as U+2028.
    Raises InputError if the file does not exist, and with the line for one that is not UTF-8, not
    json, or not an object. errors: a list that takes the errors of such lines, instead of raising.
    """
    if not os.path.isfile(path):
        raise InputError(f"{path}: no such file; check the path")
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            try:
                row = json_object(parse_json(line, where, "write one json object per line"), where)
            except InputError as error:
                if errors is None:
                    raise
                errors.append(error)
                continue
            yield number, row


def continue_log(path):
    """The rows of a jsonl log that we are about to append to; [] if it does not exist.

    If its process was killed while it wrote, the last line has no line end: it is cut off the file.
    """
    path = Path(path)
    if not path.is_file():
        return []
    os.truncate(path, path.read_bytes().rfind(b"\n") + 1)
    return [row for _, row in json_lines(path)]


def parse_json(data, where, fix):
    """Bytes → value. Raises InputError, which says `where` and ends in `fix`."""
    try:
        return json.loads(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: not UTF-8 ({error}); save the file as UTF-8") from error
    except (ValueError, RecursionError) as error:  # also numbers or brackets beyond Python's limits
        raise InputError(f"{where}: not valid json ({error}); {fix}") from error


def json_object(row, where):
    """The row, if it is a json object of texts that encode as UTF-8. Raises InputError."""
    if not isinstance(row, dict):
        raise InputError(f"{where}: a {type(row).__name__}, not a json object; write every row as "
                         "an object")
    for key, value in row.items():
        try:  # json can escape half of a character, which no tokenizer takes
            json.dumps(value, ensure_ascii=False, default=str).encode()
        except (UnicodeEncodeError, RecursionError) as error:
            raise InputError(f"{where}: field {key!r} cannot be encoded ({error}); write whole "
                             "characters") from error
    return row


def raise_bad_rows(path, errors):
    """Raises one InputError that lists the first 20 of `errors` and counts the rest.

    A single error is raised with its own line alone. An empty list raises nothing.
    """
    lines = [str(error) for error in errors[:20]]
    if len(errors) > 20:
        lines.append(f"{path}: … and {len(errors) - 20} more bad rows")
    if lines:
        raise InputError("\n".join(lines))


# ──────── audio files ────────


def load_audio(path):
    """One clip → float32 [samples], mono (the mean of the channels), 16 kHz.

    Raises InputError for a broken or empty file, and for NaN or infinite samples.
    """
    try:
        samples, rate = soundfile.read(path, dtype="float32", always_2d=True)  # [samples, channels]
    except soundfile.LibsndfileError as error:
        raise InputError(f"{path}: cannot be read as audio ({error}); give a wav, flac, ogg or mp3 "
                         "file") from error
    if not len(samples):
        raise InputError(f"{path}: the clip is empty; remove the question or replace the file")
    if not np.isfinite(samples).all():
        raise InputError(f"{path}: the clip holds NaN or infinite samples; replace the file")
    return soxr.resample(samples.mean(axis=1), rate, SAMPLE_RATE).astype(np.float32)


def check_audio(path, where):
    """Raises InputError unless `path` is an audio file that is not empty and holds no NaN.

    where: the file and line that name the clip, for the error.
    """
    if len(path.name) > 255 or not path.is_file():  # is_file raises for a longer name
        raise InputError(f"{where}: audio file {path} does not exist; paths are relative to the "
                         "jsonl file")
    try:
        header = soundfile.info(path)
        with soundfile.SoundFile(path) as file:  # a truncated file can have an intact header
            file.seek(max(0, file.frames - 1))
            file.read(1)
    except soundfile.LibsndfileError as error:
        raise InputError(f"{where}: {path} cannot be read as audio ({error}); give a wav, flac, "
                         "ogg or mp3 file") from error
    if not header.frames:
        raise InputError(f"{where}: {path} is empty; remove the question or replace the file")
    if header.subtype in ("FLOAT", "DOUBLE"):
        try:
            load_audio(path)
        except InputError as error:
            raise InputError(f"{where}: {error}") from error


# ──────── what the model is given ────────


@dataclass(frozen=True)
class Prompt:
    """An encoded question. `ids` has one placeholder per audio token; `text_ids` has no audio."""

    question: Question
    ids: list[int]
    text_ids: list[int]
    features: tuple  # log-mel tensors, one [mel bins, F] per clip
    frames: tuple[int, ...]  # how many of the F frames of each clip are audio; the rest is padding
    instruction: str = ""


def load_clip(path, extractor, model_type):
    """Path → float32 [samples] at 16 kHz, with silence added at the end where the encoder needs it.

    Qwen3-Omni: up to 1 s, because its encoder pads chunks of 1 s to the longest chunk of the
    batch, so that the features of a shorter clip would depend on its neighbours; and up to a whole
    frame of 10 ms, as vLLM does. Other models: up to what the centred STFT needs, which reflects
    half a window at the edges. extractor: the model's WhisperFeatureExtractor.
    """
    samples = load_audio(path)
    least = extractor.n_fft // 2 + 1
    if model_type.startswith("qwen3_omni_moe"):
        frames = -(-len(samples) // extractor.hop_length)  # ⌈N / 160⌉
        least = max(SAMPLE_RATE, frames * extractor.hop_length)
    return np.pad(samples, (0, max(0, least - len(samples))))


def log_mel(samples, extractor, model_type, path):
    """Samples of load_clip → (log-mel tensor [mel bins, F], frames that are audio).

    A frame is 10 ms. One clip at a time, so that the features do not depend on other clips of a
    batch. Raises InputError, naming `path`, for a clip that is too long for the model.
    """
    fixed = model_type == "qwen2_audio"  # its encoder takes windows of exactly 30 s
    if fixed and len(samples) > extractor.n_samples:
        raise InputError(f"{path}: {len(samples) / SAMPLE_RATE:.1f} s, but Qwen2-Audio takes at "
                         f"most {extractor.n_samples / SAMPLE_RATE:.0f} s; cut the clip")
    output = extractor(samples, sampling_rate=SAMPLE_RATE, return_tensors="pt", truncation=False,
                       padding="max_length" if fixed else True, return_attention_mask=True)
    return output["input_features"][0], int(output["attention_mask"].sum())


def audio_token_count(frames, model_type):
    """Audio tokens that the encoder makes of `frames` mel frames (10 ms each): model facts.

    Qwen3-Omni: three strided convolutions on chunks of 100 frames. A whole chunk gives 13 tokens,
    a rest of r frames ⌈⌈⌈r/2⌉/2⌉/2⌉.
    Qwen2-Audio, Qwen2.5-Omni: a strided convolution and a pooling by two on the whole clip.
    Raises InputError for another family, whose rule has to be added here.
    """
    if model_type.startswith("qwen3_omni_moe"):
        whole, rest = divmod(frames, 100)
        return 13 * whole + -(-rest // 8)  # ⌈⌈⌈r/2⌉/2⌉/2⌉ = ⌈r/8⌉
    if model_type in ("qwen2_audio", "qwen2_5_omni_thinker"):
        return ((frames - 1) // 2 + 1 - 2) // 2 + 1
    raise InputError(f"config.json: the number of audio tokens of a {model_type} is not known; "
                     "supported are Qwen3-Omni, Qwen2.5-Omni and Qwen2-Audio")
