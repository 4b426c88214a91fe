"""The four benchmarks: the files as their makers publish them, and MMAU-Pro's instruction rules.

    items = read_benchmark("mmau", "mmau-test-mini.json")

Like scoring.py, this file imports no transformers.
"""

import os
import re
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from data import (InputError, Question, audio_field, is_list_of_texts, items_of, json_lines,
                  json_object, parse_json, raise_bad_rows, text_field)
from pos_gate import find_nltk_data


@dataclass(frozen=True)
class Item:
    """One row of a benchmark, as read_benchmark returns it."""

    id: str
    audio: tuple[Path, ...]
    question: str
    choices: tuple[str, ...]  # empty for open questions and instruction following
    answer: str  # of a closed or open question, as in the file; it need not be one of the choices
    groups: dict[str, str]  # how reports break the score down: {"task": "sound", …}
    kind: str = "closed"  # or "open", "instruction following", "not scored"
    task_identifier: str = ""  # the rule of an instruction-following row, and its arguments
    kwargs: dict = field(default_factory=dict)
    answer_letters: str = ""  # MMSU: letters of the columns choice_a … choice_d with the answer


def question_of(item):
    """An Item → the Question that the model is asked.

    Raises InputError if a clip does not exist.
    """
    for clip in item.audio:
        if not os.path.isfile(clip):
            raise InputError(f"{clip}: no such file; see --audio_root")
    return Question(item.id, item.audio, item.question, item.choices, item.answer)


# Which columns of each file hold what. MMSU's jsonl and parquet name the audio differently. The
# first group is the one that the paper's table shows; it is required.
_COLUMNS = {
    "mmau": {"audio": ("audio_id",), "answer": "answer",
             "groups": ("task", "difficulty", "sub-category", "category")},
    "mmar": {"audio": ("audio_path",), "answer": "answer",
             "groups": ("modality", "category", "sub-category", "language")},
    "mmsu": {"audio": ("audio_path", "audio"), "answer": "answer_gt",
             "groups": ("category", "sub-category", "sub-sub-category", "task_name")},
    "mmau-pro": {"audio": ("audio_path",), "answer": "answer", "groups": ("category",)},
}
_LETTERS = {"A": "choice_a", "B": "choice_b", "C": "choice_c", "D": "choice_d"}  # columns of MMSU
BENCHMARKS = tuple(_COLUMNS)


def read_benchmark(name, path, audio_root=None):
    """A benchmark's file, as its makers publish it → list[Item], in the file's order.

    name: one of BENCHMARKS. path: a .json list, .jsonl or .parquet. Audio paths are relative to
    audio_root, by default the file's folder; the audio files are not opened. MMSU writes its paths
    with a leading slash: such a path also starts at audio_root, unless it exists as it is.

    The files are read with their quirks. A number counts as its text, and an empty option is no
    option. Options may be equal, and an answer may be none of them: scoring.score treats it as the
    official script does. Several values for a group are joined by " + ". MMSU's columns
    choice_a … choice_d become choices. The category of a row of MMAU-Pro decides its kind: "open",
    "instruction following", else closed. Closed rows with fewer than two choices become "not
    scored", because the official script leaves them out.

    Raises InputError for an unknown name, an unreadable file, and for all bad rows at once: those
    with a missing or mistyped field or a repeated id.
    """
    if name not in BENCHMARKS:
        raise InputError(f"no benchmark {name!r}; choose one of {', '.join(BENCHMARKS)}")
    path = Path(path)
    errors, root = [], Path(audio_root or path.parent)
    items = items_of(_rows(path, errors), lambda row, where: _item(
        name, json_object(row, where), root, where), errors)
    raise_bad_rows(path, errors)
    if not items:
        raise InputError(f"{path}: no rows in this file; give the file of {name} as published")
    return items


def _rows(path, errors):
    """→ (where, row) for each row of a file; `where` names the file and the line or row.

    errors: see data.json_lines.
    """
    if path.suffix == ".jsonl":
        yield from ((f"{path}:{number}", row) for number, row in json_lines(path, errors))
        return
    readers = {".json": _json_rows, ".parquet": _parquet_rows}
    if path.suffix not in readers:
        raise InputError(f"{path}: the name must end in .json, .jsonl or .parquet; rename the file "
                         "by its format")
    if not path.is_file():
        raise InputError(f"{path}: no such file; check the path")
    for number, row in enumerate(readers[path.suffix](path), start=1):
        yield f"{path}: row {number}", row


def _json_rows(path):
    rows = parse_json(path.read_bytes(), path,
                       "write one json list of objects, or rename a file of json lines to .jsonl")
    if not isinstance(rows, list):
        raise InputError(f"{path}: a {type(rows).__name__}, not a list; write one json list of "
                         "objects")
    return rows


def _parquet_rows(path):
    import pyarrow.parquet  # slow to import, and only these files need it

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            # Some files hold the sound itself, as a struct of path and bytes: read only the path.
            columns = [f"{column.name}.path"
                       if column.name == "audio" and pyarrow.types.is_struct(column.type)
                       else column.name for column in file.schema_arrow]
            return file.read(columns=columns).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{path}: cannot be read as parquet ({' '.join(str(error).split())}); "
                         "download the file again") from error


def _item(name, raw, audio_root, where):
    columns, row = _COLUMNS[name], {key: _as_text(value) for key, value in raw.items()}
    groups, choices = _groups(name, row, where), _choices(name, row, where)
    kind = _kind(name, groups, choices, where)
    answer, answer_letters = row.get(columns["answer"]), ""
    if answer is None and kind in ("instruction following", "not scored"):
        answer = ""
    else:
        answer = text_field(row, columns["answer"], where)
    if name == "mmsu":  # the official script compares the values as they are in the file
        answer_letters = "".join(letter for letter, column in _LETTERS.items()
                                 if raw.get(column) == raw[columns["answer"]])
    task_identifier, kwargs = "", {}
    if kind == "instruction following":
        task_identifier, kwargs = text_field(row, "task_identifier", where), row.get("kwargs") or {}
        if not isinstance(kwargs, dict):
            raise InputError(f"{where}: field 'kwargs' is {kwargs!r}; give an object, or null")
        for key in _ARGUMENTS:
            _argument(kwargs, key, None, f"{where}: kwargs")
    return Item(text_field(row, "id", where), _audio(columns["audio"], raw, audio_root, where),
                text_field(row, "question", where), choices, answer, groups, kind, task_identifier,
                kwargs, answer_letters)


def _as_text(value):
    """A number becomes its text, also in a list; NaN, pandas' mark for nothing, becomes None.

    Any other value stays as it is.
    """
    if isinstance(value, list):
        return [one if isinstance(one, list) else _as_text(one) for one in value]
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value) if value == value else None
    return value


def _audio(names, row, audio_root, where):
    name = next((name for name in names if row.get(name) is not None), names[0])
    clips = row.get(name)
    clips = clips.get("path") if isinstance(clips, dict) else clips  # parquet with packed sound
    clips = [clip.lstrip("/") if clip.startswith("/") and not os.path.isfile(clip) else clip
             for clip in audio_field(clips, name, where)]
    return tuple(audio_root / clip.removeprefix("./") for clip in clips)


def _kind(name, groups, choices, where):
    if name == "mmau-pro":
        if groups["category"] in ("open", "instruction following"):
            return groups["category"]
        return "closed" if len(choices) >= 2 else "not scored"
    if len(choices) < 2:
        raise InputError(f"{where}: {len(choices)} choices; a multiple-choice question needs at "
                         "least two")
    return "closed"


def _choices(name, row, where):
    if name == "mmsu":
        choices = [row.get(column) for column in _LETTERS.values()]
    else:
        choices = row.get("choices")
        if choices is None and name == "mmau-pro":  # open questions and instruction following
            return ()
    choices = _without_blanks(choices)
    if not is_list_of_texts(choices):
        field_name = "choice_a … choice_d" if name == "mmsu" else "choices"
        raise InputError(f"{where}: field {field_name!r} is {choices!r}; give texts or numbers")
    return tuple(choices)


def _groups(name, row, where):
    groups, names = {}, _COLUMNS[name]["groups"]
    for group in names:
        values = row.get(group)
        values = _without_blanks(values if isinstance(values, list) else [values])
        if not is_list_of_texts(values) or (not values and group == names[0]):
            raise InputError(f"{where}: field {group!r} is {row.get(group)!r}; give a non-empty "
                             "string")
        if values:
            groups[group] = " + ".join(values)
    return groups


def _without_blanks(values):
    """A list without None and blank texts; any other value as it is."""
    if not isinstance(values, list):
        return values
    return [x for x in values if x is not None and not (isinstance(x, str) and not x.strip())]


def read_predictions(path):
    """A file of lines {"id", "prediction"} → ({id: prediction}, {id: answer}).

    Our own lines also have "answer", the text that the prediction was made from; elsewhere it is
    the prediction itself. Raises InputError for all bad lines at once.
    """
    predictions, answers, errors = {}, {}, []
    for number, row in json_lines(path, errors):
        name, prediction = _as_text(row.get("id")), _as_text(row.get("prediction"))
        answer = _as_text(row.get("answer", prediction))
        if not isinstance(name, str) or not isinstance(prediction, str):
            fault = 'give {"id": …, "prediction": …}, two strings'
        elif not isinstance(answer, str):
            fault = f"field 'answer' is {answer!r}; give a string, or leave it out"
        elif name in predictions:
            fault = f"a second prediction for {name!r}; keep one"
        else:
            predictions[name], answers[name] = prediction, answer
            continue
        errors.append(InputError(f"{path}:{number}: {fault}"))
    raise_bad_rows(path, errors)
    return predictions, answers


# ──────── instruction following in MMAU-Pro ────────


def follows_instruction(task_identifier, kwargs, response, prompt):
    """Does the raw response do what the row asks for? → bool.  (official; 27 rules)

    An unknown identifier fails. kwargs: the row's arguments, or None. An absent argument takes its
    default: 0 for N and N1, 999 for N2, "" for texts. No count equals an N that is None or NaN;
    elsewhere such an argument, with which the official script ends in an error, takes its default.
    prompt: the row's question, which "Repeat Prompt" compares with.
    Raises InputError for an argument of the wrong type, and LookupError like
    load_sentence_splitter.
    """
    def text(key):
        return _argument(kwargs, key, "")

    def number(key, default=0):
        return _argument(kwargs, key, default)

    def exactly(count):  # get gives 0 for an absent N, and None for one that is null
        return count == number("N") and count == (kwargs or {}).get("N", 0)

    def within(count):  # the bound that the identifier ends in
        if task_identifier.endswith("(range)"):
            return number("N1") <= count <= number("N2", 999)
        at_least = task_identifier.endswith("(at least)")
        return count >= number("N") if at_least else count <= number("N")

    low = response.lower()
    match task_identifier:
        case "Include Keywords":
            return all(keyword in low for keyword in text("keywords").lower().split(", "))
        case "Keyword Frequency":
            return exactly(len(re.findall(rf"\b{re.escape(text('keyword').lower())}\b", low)))
        case "Forbidden Words":  # an empty list is one empty word, and every response contains it
            return not any(word in low for word in text("forbidden_words").lower().split(", "))
        case "Number Paragraphs":
            return exactly(_non_blank(response.split("***")))
        case "Number Words (at least)" | "Number Words (at most)" | "Number Words (range)":
            return within(len(response.split()))
        case ("Number Sentences (at least)" | "Number Sentences (at most)"
              | "Number Sentences (range)"):
            return within(_count_sentences(response))
        case ("All-capital Words (at least)" | "All-capital Words (at most)"
              | "All-capital Words (range)"):
            return within(sum(word.isupper() for word in response.split()))
        case "Postscript":
            return _only("a-z", text("postscript_marker")) in _only("a-z", response)
        case "Number Placeholder":
            return len(re.findall(r"\[[^\]]+\]", response)) >= number("N")
        case "Number Bullets":
            return exactly(len(re.findall(r"(?:\A|\n)\s*\*\s+", response)))
        case "Title":
            return re.search("<<[^>]+>>", response) is not None
        case "Minimum Number Highlighted Section":
            return len(re.findall(r"\*[^*]+\*", response)) >= number("N")
        case "Multiple Sections":  # an empty splitter splits between all characters
            splitter = re.escape(text("section_splitter"))
            return exactly(_non_blank(re.split(rf"\s*{splitter}\s*", response.strip())))
        case "Repeat Prompt":
            return low.strip().startswith(prompt.strip().lower())
        case "Two Responses":
            responses = [part.strip() for part in low.split("******")]
            return len(responses) == 2 and responses[0] != responses[1]
        case "All Uppercase":
            return response.isupper()
        case "All Lowercase":
            return response.islower()
        case "Start Checker":
            return _only("a-z ", response).startswith(_only("a-z ", text("start_phrase")))
        case "End Checker":
            return _only("a-z ", response).endswith(_only("a-z ", text("end_phrase")))
        case "Quotation":
            return response.strip().startswith('"') and response.strip().endswith('"')
        case "No Commas":
            return "," not in response
    return False


_ARGUMENTS = {**dict.fromkeys(("N", "N1", "N2"), (int, float)),
              **dict.fromkeys(("keywords", "keyword", "forbidden_words", "postscript_marker",
                               "section_splitter", "start_phrase", "end_phrase"), str)}


def _argument(kwargs, key, default, where="kwargs"):
    value, kind = (kwargs or {}).get(key), _ARGUMENTS[key]
    if value is None or value != value:  # pandas writes an absent number as NaN
        return default
    if not isinstance(value, kind) or isinstance(value, bool):
        raise InputError(f"{where}: field {key!r} is {value!r}; give a "
                         f"{'text' if kind is str else 'number'}")
    return value


def _non_blank(parts):
    return sum(bool(part.strip()) for part in parts)


def _only(characters, text):
    """Lower-cases ASCII letters and drops everything but the given characters, line breaks too."""
    return re.sub(f"[^{characters}]", "", re.sub("[^a-zA-Z ]", "", text).lower())


def _count_sentences(text):
    load_sentence_splitter()
    import nltk  # after the check that it can be imported
    return len(nltk.sent_tokenize(text))


@cache
def load_sentence_splitter():
    """Registers the data of NLTK's sentence splitter, which llama-index-core installs, with NLTK.

    Raises LookupError, like pos_gate.find_nltk_data, when the data is not found.
    """
    find_nltk_data("tokenizers/punkt_tab/english/", "llama_index", "core/_static/nltk_cache",
                   "pip install --no-deps llama-index-core==0.14.25")
