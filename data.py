"""Audio questions: our jsonl and AVQA, audio files, and what the model is given of them.

A row of our jsonl looks like this. Audio paths are relative to the file.

    {"id": "q1", "audio": "clips/q1.wav", "question": "What barks?",
     "choices": ["a dog", "a seal"], "answer": "a dog"}

`audio` may be a list of paths, for a question about several clips. `domain` is optional and only
used in reports. Every mistake that a user can make is found when the file is read: InputError names
the file, the line or field, and the fix. Every clip is decoded then; check_clips keeps the results.
"""

import dataclasses
import hashlib
import json
import os
import stat
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import soundfile
import soxr
from tqdm import tqdm

SAMPLE_RATE = 16_000  # Hz, what the audio encoders of all supported models expect
LOWEST_RATE = 1_000  # Hz; a lower one comes from a broken header, and resampling would fill memory
# Larger samples are refused, because their features could be NaN. Up to here the features are
# finite: a window of 400 samples gives |X| ≤ 200·10¹⁵ and |X|² ≤ 4·10³⁴, and fp32 ends at 3·10³⁸.
# That leaves a factor of 90 in |X| for the overshoot of the resampling. So it is enough to decode
# a clip; its features need not be computed.
LOUDEST = 1e15


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
    samples: tuple[int, ...] = field(default=(), compare=False)  # of each decoded clip, at 16 kHz
    where: str = field(default="", compare=False)  # the file and line that it comes from


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


def read_questions(path, decode=True):
    """Reads and checks our jsonl → list[Question].

    Decodes every clip (see check_clips) unless `decode` is false. Raises one InputError that lists
    the bad rows.
    """
    return _read(Path(path), Path(path).parent, lambda row, where: row, decode)


def read_avqa(path, audio_root=None, decode=True):
    """AVQA rows as R1-AQA writes them, one json object per line → list[Question].

    Fields: id, question_text, multi_choice (the options), answer (an index from 0), question_type,
    and audio_path (relative to audio_root, by default the file's folder). The questions were asked
    about videos, so "video" becomes "audio". Raises InputError.
    """
    return _read(Path(path), Path(audio_root or Path(path).parent), _row_of_avqa, decode)


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


def _read(path, audio_root, to_row, decode):
    errors = []
    rows = ((f"{path}:{number}", row) for number, row in json_lines(path, errors))
    questions = items_of(
        rows, lambda row, where: _question(to_row(row, where), audio_root, where), errors)
    if not questions and not errors:
        raise InputError(f"{path}: no questions in this file; write one json object per line")
    if not decode:
        raise_bad_rows(path, errors)
        return questions
    samples_of = check_clips(
        list(dict.fromkeys(clip for q in questions for clip in q.audio)), cache_file(path))
    for q in questions:
        bad = [samples_of[clip] for clip in q.audio if isinstance(samples_of[clip], InputError)]
        errors += [InputError(f"{q.where}: {error}") for error in bad[:1]]
    raise_bad_rows(path, errors)
    return [dataclasses.replace(q, samples=tuple(samples_of[clip] for clip in q.audio))
            for q in questions]


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
    return Question(row["id"], clips, row["question"], tuple(choices), row["answer"], domain or "",
                    where=where)


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


def items_of(rows, to_item, errors):
    """(where, row) pairs → items; a bad row or a repeated id goes to `errors`, as an InputError."""
    items, place_of = [], {}
    for where, row in rows:
        try:
            item = to_item(row, where)
            if item.id in place_of:
                raise InputError(f"{where}: id {item.id!r} is already used in {place_of[item.id]}; "
                                 "make ids unique")
        except InputError as error:
            errors.append(error)
            continue
        place_of[item.id] = where
        items.append(item)
    return items


def write_whole(path, text):
    """Writes a text file beside its place, then renames it. So the old one is never half gone."""
    path = Path(path).resolve()  # follows a link
    building = path.with_name(f".{path.name}.writing")
    try:
        building.write_text(text, encoding="utf-8")
        building.replace(path)
    finally:
        building.unlink(missing_ok=True)


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

    Raises InputError for a broken or empty file, and for samples that are NaN, infinite or larger
    than LOUDEST.
    """
    samples, rate, _ = _decode(path)
    return soxr.resample(samples.mean(axis=1), rate, SAMPLE_RATE).astype(np.float32)


def _decode(path):
    """→ float32 [samples, channels], their rate in Hz, and how many samples soxr makes of them."""
    shown = repr(str(path))[1:-1]  # a line end in a name must not break the message
    try:
        samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    # TypeError: the name ends in .raw, so soundfile expects no header. ValueError: no file can have
    # this name. MemoryError: a broken header promises billions of samples.
    except (soundfile.SoundFileError, OSError, TypeError, ValueError, MemoryError) as error:
        raise InputError(f"{shown}: cannot be read as audio ({' '.join(str(error).split())}); give "
                         "a wav, flac, ogg or mp3 file") from error
    if rate < LOWEST_RATE:
        raise InputError(f"{shown}: its sampling rate is {rate} Hz; give at least {LOWEST_RATE} Hz")
    resampled = int(len(samples) * SAMPLE_RATE / rate + 0.5)
    if not resampled:
        raise InputError(f"{shown}: the clip is empty; remove the question or replace the file")
    if not -LOUDEST <= samples.min() <= samples.max() <= LOUDEST:
        raise InputError(f"{shown}: the clip holds NaN or infinite samples, or some beyond "
                         f"±{LOUDEST:g}; replace the file")
    return samples, rate, resampled


def check_clips(clips, cache):
    """Decodes clips in threads → {path: its samples at 16 kHz, or the InputError of a bad clip}.

    cache: a json file with the good clips, by path, size and time of change. Only clips that it
    lacks are decoded, and it is then written anew. A broken cache counts as empty.
    """
    try:
        known = json.loads(cache.read_bytes()) if cache else {}
        known = known if isinstance(known, dict) else {}
    except (OSError, ValueError, RecursionError):
        known = {}
    check = lambda clip: _check_clip(clip, known.get(os.path.abspath(clip)))
    with ThreadPoolExecutor() as threads:
        bar = tqdm(threads.map(check, clips), "check clips", len(clips), leave=False, delay=1)
        found = dict(zip(clips, bar))
    good = {os.path.abspath(clip): result for clip, result in found.items()
            if not isinstance(result, InputError)}
    if good != known:
        try:
            if cache is None:
                raise OSError("set HOME or XDG_CACHE_HOME")
            cache.parent.mkdir(parents=True, exist_ok=True)
            write_whole(cache, json.dumps(good))
        except OSError as error:
            print("warning: the next start decodes all clips again, because the cache of the "
                  f"check cannot be written ({error})", file=sys.stderr)
    return {clip: result[2] if isinstance(result, list) else result
            for clip, result in found.items()}


def _check_clip(path, known):
    """→ [size, time of change, samples at 16 kHz], or the InputError.

    That is `known` if the file has not changed since.
    """
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise OSError("not a file")
        match known:
            case [status.st_size, status.st_mtime_ns, int()]:
                return known
        return [status.st_size, status.st_mtime_ns, _decode(path)[2]]
    except InputError as error:
        return error
    except (OSError, ValueError) as error:  # ValueError: no file can have this name
        return InputError(f"audio file {repr(str(path))[1:-1]} does not exist "
                          f"({getattr(error, 'strerror', None) or error}); paths are relative to "
                          "the jsonl file")


def cache_file(path):
    """Where check_clips keeps its results for the jsonl file `path`; None without a home folder.

    $XDG_CACHE_HOME/mapo or ~/.cache/mapo. The 1 in the name is the version of the check.
    """
    folder = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    name = hashlib.sha256(os.fsencode(os.path.abspath(path))).hexdigest()[:16]
    return Path(folder, "mapo", f"clips-1-{name}.json") if os.path.isabs(folder) else None


# ──────── what the model is given ────────


@dataclass(frozen=True)
class Prompt:
    """An encoded question. `ids` has one placeholder per audio token; `text_ids` has no audio."""

    question: Question
    ids: list[int]
    text_ids: list[int]
    features: tuple  # log-mel tensors, one [mel bins, F] per clip; () once they are encoded
    frames: tuple[int, ...]  # how many of the F frames of each clip are audio; the rest is padding
    instruction: str = ""
    embeddings: object = None  # tensor [audio tokens, D] in place of features, see model.py


def load_clip(path, extractor, family):
    """Path → float32 [samples] at 16 kHz, with silence added at the end where the encoder needs it.

    Raises InputError, naming `path`, for a clip that cannot be read, or that is too short or too
    long for the model. extractor: the model's WhisperFeatureExtractor; family: its entry in
    families.py.
    """
    samples = load_audio(path)
    clip_tokens(len(samples), extractor, family, path)
    return np.pad(samples, (0, _padded(len(samples), extractor, family) - len(samples)))


def _padded(samples, extractor, family):
    """Samples of a clip → samples with the silence that load_clip adds.

    Where the encoder pads chunks of 1 s: up to 1 s, because the features of a shorter clip would
    depend on its neighbours in the batch; and up to a whole frame of 10 ms, as vLLM does. Other
    models: up to what the centred STFT needs, which reflects half a window at the edges.
    """
    if family.pads_to_a_second:
        return max(SAMPLE_RATE, -(-samples // extractor.hop_length) * extractor.hop_length)
    return max(extractor.n_fft // 2 + 1, samples)


def clip_tokens(samples, extractor, family, path):
    """Audio tokens of a clip of `samples` at 16 kHz, before load_clip adds silence.

    Raises InputError, naming `path`, when the clip is too short or too long for the model.
    """
    seconds, hop = samples / SAMPLE_RATE, extractor.hop_length
    padded = _padded(samples, extractor, family)
    frames = padded // hop  # of 10 ms
    if family.one_window:
        if padded > extractor.n_samples:
            raise InputError(f"{path}: {seconds:.1f} s, but this {family.name} takes at most "
                             f"{extractor.chunk_length} s, one window of its encoder; cut the clip")
        frames = -(-padded // hop)  # the window has room for the last part of a frame
    tokens = family.tokens(frames)
    if tokens < family.least_tokens:
        raise InputError(f"{path}: {seconds:.3f} s is too short for this encoder; pad the clip "
                         "with silence or remove the question")
    return tokens


def log_mel(samples, extractor, family):
    """Samples of load_clip → (log-mel tensor [mel bins, F], frames that are audio).

    A frame is 10 ms. One clip at a time, so that the features do not depend on other clips of a
    batch.
    """
    output = extractor(samples, sampling_rate=SAMPLE_RATE, return_tensors="pt", truncation=False,
                       padding="max_length" if family.one_window else True,
                       return_attention_mask=True)
    return output["input_features"][0], int(output["attention_mask"].sum())
