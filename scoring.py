"""Scores on the four benchmarks of MAPO (arXiv 2605.27741, Tables 1-3): MMAU test-mini, MMAR, MMSU, MMAU-Pro.

    completion → rewards.extract_answer → map_to_option (rules, else a judge) → score → markdown_table

read_benchmark reads the files as their makers publish them. MMAU, MMAR and MMSU all end in MMAU's token-set match;
MMAU-Pro has three parts: closed questions through text embeddings, open ones through a judge, instruction following
through rules. The rules are those of the official scorers, quirks included, or scores could not be compared. A
prediction is a text: the option that map_to_option gives, "" where there is none, the raw response for open questions
and instruction following. All accuracies are fractions; the paper's numbers and markdown_table are per cent.
"""

import json
import re
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import httpx
import nltk
import numpy as np
import pyarrow
import pyarrow.parquet
import tenacity
import torch
from tqdm.contrib.concurrent import thread_map

import rewards
from data import InputError
from pos_gate import find_nltk_data


@dataclass(frozen=True)
class Item:
    """One row of a benchmark, as read_benchmark gives it."""

    id: str
    audio: tuple[Path, ...]
    question: str
    choices: tuple[str, ...]  # empty for open questions and instruction following
    answer: str  # one of the choices, the reference of an open question, or "" where there is none
    groups: dict[str, str]  # what the report is broken down by, as {"task": "sound", "difficulty": "easy"}
    kind: str = "closed"  # or "open", "instruction following", "not scored"
    task_identifier: str = ""  # of instruction following, with kwargs
    kwargs: dict = field(default_factory=dict)
    answer_letters: str = ""  # MMSU: the letters of the columns choice_a … choice_d that hold the answer


def score(name, items, predictions, judge=None, embed=None, answers=None):
    """The report of one benchmark: a dict that json can write.  (official rules; a missing row is wrong: ours)

    name: "mmau", "mmar", "mmsu" or "mmau-pro"; items: as read_benchmark gives them; predictions: {id: text}.
    judge: prompt → reply, called by JUDGE_AT_ONCE threads, and embed: list of texts → matrix [texts, dims]; both for
    MMAU-Pro alone. answers: {id: the text that a prediction was made from}, where MMSU's script reads its letters;
    without it, the predictions.

        accuracy, right, count   over all rows; right is a sum of points, in MMAU-Pro's open part of fractions
        missing, empty           rows without a prediction (wrong, counted), and with a blank one (scored as it is)
        groups                   {"task": {"sound": {accuracy, right, count}, …}, …}
        official                 the same over the official denominator: MMAU and MMAR leave out rows without a
                                 prediction; MMSU reads letters and leaves out rows where it reads none; {} for
                                 MMAU-Pro, whose official total is ours where no row is missing
        parts                    MMAU-Pro: "closed", "open", "instruction following", each with its method
        notes                    what a reader of the numbers must know, one sentence each

    Without a judge MMAU-Pro's open questions and its total are None, never a guess; without embed its closed
    questions are scored by string match, which `method` and `notes` say.
    Raises InputError for an unknown name, no items, an id that no item has, and a prediction that is no text.
    """
    _check_scoring(name, items, predictions)
    if name == "mmau-pro":
        report = _score_mmau_pro(items, predictions, judge, embed)
    else:
        points = [float(item.id in predictions and string_match(item.answer, predictions[item.id], item.choices))
                  for item in items]
        report = {**_tally(items, points), "method": "string match", "notes": [],
                  "official": _official(name, items, predictions, points, answers or predictions)}
    missing = sum(item.id not in predictions for item in items)
    if missing:
        report["notes"].append(f"{missing} of {len(items)} rows have no prediction and are counted wrong.")
    empty = sum(not predictions.get(item.id, "-").strip() for item in items)
    return {"benchmark": name, **report, "missing": missing, "empty": empty}


def _check_scoring(name, items, predictions):
    if name not in _COLUMNS:
        raise InputError(f"no benchmark {name!r}; choose one of {', '.join(_COLUMNS)}")
    if not items:
        raise InputError(f"{name}: no items to score; read some with read_benchmark")
    unknown = sorted(set(predictions) - {item.id for item in items}, key=str)
    if unknown:
        raise InputError(f"{name}: {len(unknown)} predictions have an id that the benchmark lacks, the first "
                         f"{unknown[0]!r}; give predictions of this benchmark alone")
    for key, text in predictions.items():
        if not isinstance(text, str):
            raise InputError(f"{name}: the prediction of {key!r} is {text!r}; give a text, \"\" for none")


def _official(name, items, predictions, points, answers):
    if name == "mmsu":
        letters = [mmsu_letter(answers.get(item.id, "")) for item in items]
        kept = [(item, float(letter in item.answer_letters)) for item, letter in zip(items, letters) if letter]
        method = "the letter that the official script reads; rows where it reads none are left out"
    else:
        kept = [(item, point) for item, point in zip(items, points) if item.id in predictions]
        method = "string match; rows without a prediction are left out"
    return {**_tally([item for item, _ in kept], [point for _, point in kept]), "method": method}


def _score_mmau_pro(items, predictions, judge, embed):
    parts, scored, points, notes = {}, [], [], []
    methods = {"closed": "string match (no embedder given)" if embed is None else "embedding",
               "open": "not scored: no judge" if judge is None else "judge",
               "instruction following": "rules"}
    for kind, method in methods.items():
        of_kind = [item for item in items if item.kind == kind]
        if kind == "open":
            of_part, unread = _open_points(of_kind, predictions, judge)
            if unread:
                notes.append(f"{unread} replies of the judge hold no score; the official rule reads each as 3 of 5.")
        else:
            of_part = [float(item.id in predictions and _is_right(item, predictions[item.id], embed))
                       for item in of_kind]
        if of_kind:
            parts[kind] = {**_summary(of_part), "method": method}
            scored += of_kind
            points += of_part
    if "closed" in parts and embed is None:
        notes.append("Closed questions are scored by string match, as no embedder was given: not the official score.")
    if "open" in parts and judge is None:
        notes.append("Open questions and the total are not scored, as no judge was given.")
    left_out = sum(item.kind == "not scored" for item in items)
    if left_out:
        notes.append(f"{left_out} rows have fewer than two choices and are left out, as in the official script.")
    return {**_tally(scored, points), "method": "count-weighted mean of the parts", "parts": parts, "notes": notes,
            "official": {}}


def _is_right(item, prediction, embed):
    if item.kind == "instruction following":
        return follows_instruction(item.task_identifier, item.kwargs, prediction, item.question)
    if embed is None:
        return string_match(item.answer, prediction, item.choices)
    return item.choices[closed_choice(prediction, item.choices, embed)].strip() == item.answer.strip()


def _open_points(items, predictions, judge):
    """→ (points of the open questions, None without a judge; how many replies hold no score at all)."""
    if judge is None:
        return [None] * len(items), 0
    asked = [item for item in items if item.id in predictions]
    replies = dict(zip((item.id for item in asked), thread_map(judge, [
        JUDGE_PROMPT.format(question=item.question, reference=item.answer, response=predictions[item.id])
        for item in asked], max_workers=JUDGE_AT_ONCE, desc="judge", leave=False)))
    unread = sum(not any(re.search(pattern, reply, re.I) for pattern in _MARKS.values()) for reply in replies.values())
    # A missing row is wrong, though the lowest mark of a judge would give it 1 of 5.
    return [parse_judge(replies[item.id])["overall"] / 5 if item.id in replies else 0.0 for item in items], unread


def _tally(items, points):
    """Points of the items, None where not scored → {accuracy, right, count, groups}."""
    groups = {}
    for item, point in zip(items, points, strict=True):
        for group, value in item.groups.items():
            groups.setdefault(group, {}).setdefault(value, []).append(point)
    return {**_summary(points), "groups": {group: {value: _summary(of_value) for value, of_value in values.items()}
                                           for group, values in groups.items()}}


def _summary(points):
    right = None if None in points else sum(points)
    return {"accuracy": None if right is None or not points else right / len(points), "right": right,
            "count": len(points)}


# ──────────────────────────────────────────── MMAU, MMAR, MMSU: the match ─────────────────────────────────────────────


def string_match(answer, prediction, choices):
    """MMAU's token-set match → bool.  (official; MMAR and, in the paper, MMSU use it too)

    The tokens of a text are the set of its words, lower case. Right: the prediction has words, all words of the answer
    are among them, and no word that an other option adds to the answer. Letters stand for no option, and a refusal
    must be "": the words "no answer" would match the answer "no".
    """
    predicted, right = _words(prediction), _words(answer)
    added_by_others = set().union(*(_words(choice) - right for choice in choices))
    return bool(predicted) and right <= predicted and not predicted & added_by_others


def _words(text):
    return set(re.findall(r"\b\w+\b", text.lower()))


def mmsu_letter(prediction):
    """The letter that MMSU's official script reads in a prediction, "A" to "D", or None: it leaves such a row out.

    Ends are stripped and line breaks removed; then the first character counts, else the one before the last, each if
    it is A to D. So "Dog" reads as D, "The answer is B." as B, and "Answer: B" as A.  (official)
    """
    text = prediction.strip().replace("\n", "")
    return next((letter for letter in (text[:1], text[-2:-1]) if letter and letter in "ABCD"), None)


# ──────────────────────────────────────── from an answer to one option ────────────────────────────────────────────────

MAP_PROMPT = """\
Somebody was asked a multiple-choice question about a recording. Decide which of the options their answer chooses. Do \
not answer the question yourself.

Options:
{options}

Their answer:
{answer}

Reply with the text of the chosen option, copied exactly, and nothing else. If the answer chooses none of the options, \
or several, or refuses, reply NONE."""

# Answers that choose nothing, though the words of some could match an option such as "No".  (ours)
_REFUSALS = {"no answer", "none", "n/a", "unknown", "i don't know", "i do not know", "not sure", "i'm not sure"}


def map_to_option(text, choices, judge=None):
    """The extracted answer → the text of the option that it chooses, or "" for none.  (paper: rules, then a judge)

    Rules: rewards.chosen_option (text, letter, letter and text), then the one option that string_match finds. Where
    they decide nothing, judge: prompt → reply is asked, if given (paper: Qwen2.5-7B-Instruct), and its reply must
    name an option by the same rules, else "". A blank text is "", and so is a refusal in few words unless an option
    reads like it: nobody is asked.
    """
    if not text.strip() or _is_refusal(text, choices):
        return ""
    chosen = _by_rules(text, choices)
    if chosen or judge is None:
        return chosen
    lettered = "\n".join(f"{chr(ord('A') + i)}. {choice}" for i, choice in enumerate(choices))
    reply = judge(MAP_PROMPT.format(options=lettered, answer=text))
    if reply.strip(" \n.\"*") == "NONE" and "NONE" not in choices:  # an option may read "None"
        return ""
    return _by_rules(reply, choices)


def _by_rules(text, choices):
    options = [choice.strip() for choice in choices]
    index = rewards.chosen_option(text.strip(), options)
    if index is not None:
        return choices[index]
    matching = [i for i, option in enumerate(options) if string_match(option, text, options)]
    return choices[matching[0]] if len({options[i] for i in matching}) == 1 else ""


def _is_refusal(text, choices):
    refusal = text.strip(" \n\t.,;:!\"'*").replace("’", "'").lower()
    return refusal in _REFUSALS and refusal not in {choice.strip(" .").lower() for choice in choices}


# ───────────────────────────────────────────── MMAU-Pro: closed questions ─────────────────────────────────────────────


def closed_choice(prediction, choices, embed):
    """The index of the option nearest to the prediction by cosine, the first on ties.  (official, with NV-Embed-v2)

    embed: list of texts → matrix [texts, dims], a NumPy array, a tensor, or lists. Raises ValueError unless it gives
    one finite row a text. An empty prediction is embedded like any other, as in the official script.
    """
    predicted, options = _unit_rows(embed([prediction])), _unit_rows(embed(list(choices)))
    if len(predicted) != 1 or len(options) != len(choices) or not np.isfinite(options @ predicted[0]).all():
        raise ValueError(f"embed gave {predicted.shape} for 1 text and {options.shape} for {len(choices)}: one finite "
                         "row a text is needed")
    return int(np.argmax((options * predicted).sum(axis=1)))  # row by row, so that equal rows tie to the last bit


def _unit_rows(matrix):
    rows = torch.as_tensor(matrix).detach().cpu().double()
    return torch.nn.functional.normalize(rows, dim=1).numpy()


def load_embedder(name_or_folder):
    """A sentence-transformers model, by name or folder → embed: list of texts → array [texts, dims].

    "nvidia/NV-Embed-v2", which MMAU-Pro's script uses, runs the code that its repository brings; it reads up to 4096
    tokens a text, padded on the right, with the end-of-text token added (as its authors do). No other model may run
    code of its own. Raises InputError when sentence-transformers is not installed or the model cannot be loaded:
    NV-Embed-v2's code wants transformers 4.42, and names that later ones lack. This file imports no transformers, so
    that `score` runs in an environment of that kind.
    """
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise InputError(f"an embedder needs sentence-transformers ({error}); `pip install sentence-transformers`, or "
                         "score without an embedder") from error
    is_nv_embed = Path(name_or_folder).name == "NV-Embed-v2"
    try:
        model = SentenceTransformer(str(name_or_folder), trust_remote_code=is_nv_embed)
    except (OSError, ValueError, ImportError) as error:
        reason = " ".join(str(error).split())
        mend = ("its code wants transformers 4.42, see the README, Evaluation" if is_nv_embed else
                "give the name or folder of a sentence-transformers model")
        raise InputError(f"the embedder {name_or_folder} cannot be loaded ({reason}); {mend}") from error
    ending = ""
    if is_nv_embed:
        model.max_seq_length = 4096
        model.tokenizer.padding_side = "right"
        ending = model.tokenizer.eos_token

    def embed(texts):
        return model.encode([text + ending for text in texts], convert_to_numpy=True)

    return embed


# ────────────────────────────────────────────── MMAU-Pro: open questions ──────────────────────────────────────────────

JUDGE_PROMPT = """\
Grade how well an answer to a question about a recording agrees with a reference answer. The reference is right; the \
recording is not at hand.

Question:
{question}

Reference answer:
{reference}

Answer to grade:
{response}

Give five marks from 1 (worst) to 5 (best):
correctness (does what the answer states agree with the reference?), relevance (does it address the question?), \
completeness (does it cover all that the reference says?), clarity (is it clear and in good order?), and overall (the \
mean of the four).

Reply with these five lines and nothing else, a number in place of each N:
CORRECTNESS: N
RELEVANCE: N
COMPLETENESS: N
CLARITY: N
OVERALL: N"""

# The official script reads whole numbers for the four, and decimals for the last alone.
_MARKS = {"correctness": r"CORRECTNESS:\s*(\d+)", "relevance": r"RELEVANCE:\s*(\d+)",
          "completeness": r"COMPLETENESS:\s*(\d+)", "clarity": r"CLARITY:\s*(\d+)",
          "overall": r"OVERALL:\s*(\d+(?:\.\d+)?)"}


def parse_judge(text):
    """A judge's reply → {"correctness", "relevance", "completeness", "clarity", "overall"}, floats.  (official)

    The first `NAME: number` counts, in any case; of the four marks its whole part ("4.5" is 4). A missing mark is 3.0.
    An overall mark that is missing, or exactly 3.0, becomes the mean of the four. Marks are not kept within 1 to 5.
    """
    found = {name: re.search(pattern, text, re.I) for name, pattern in _MARKS.items()}
    marks = {name: float(match[1]) if match else 3.0 for name, match in found.items()}
    if marks["overall"] == 3.0:
        marks["overall"] = sum(marks[name] for name in _MARKS if name != "overall") / 4
    return marks


FIRST_WAIT = 1.0  # seconds before the second attempt; each later wait is twice as long, up to LONGEST_WAIT (ours)
LONGEST_WAIT = 30.0
ATTEMPTS = 5
TIMEOUT = 120.0  # seconds of one request
JUDGE_AT_ONCE = 16  # requests to the judge in flight


def ask_judge(url, model, prompt, api_key=None, max_tokens=128):
    """One greedy chat completion → the reply's text.  (paper: Qwen2.5-7B-Instruct, greedy, 128 tokens)

    url: base of an OpenAI-compatible server, as "http://host:8000/v1"; model: the name it serves the judge under.
    Transport faults and HTTP 408, 409, 429 and 5xx are tried again, ATTEMPTS times in all, with growing waits.
    Raises JudgeError when they do not pass, at once for any other status and for a reply without text.
    """
    endpoint = url.rstrip("/") + "/chat/completions"
    ask = tenacity.Retrying(
        retry=tenacity.retry_if_exception_type(rewards.PassingFault), reraise=True,
        stop=tenacity.stop_after_attempt(ATTEMPTS),
        wait=tenacity.wait_exponential(multiplier=FIRST_WAIT, max=LONGEST_WAIT) + tenacity.wait_random(0, FIRST_WAIT))
    headers = {"Authorization": f"Bearer {api_key.strip()}"} if api_key else {}
    with httpx.Client(headers=headers, timeout=TIMEOUT) as client:
        try:
            reply = ask(rewards.chat_reply, client, endpoint, model, prompt, max_tokens, "judge", JudgeError)
        except rewards.PassingFault as fault:
            raise JudgeError(
                f"the judge at {endpoint} gave no reply in {ATTEMPTS} attempts; last fault: {fault}") from fault
    if not reply:  # read as marks it would be 3 of 5
        raise JudgeError(f"the judge at {endpoint} sent an empty reply; is max_tokens {max_tokens} too small?")
    return reply


class JudgeError(RuntimeError):
    """The judge gave no reply: one line that names its address and the last fault."""


# ────────────────────────────────────────── MMAU-Pro: instruction following ───────────────────────────────────────────


def follows_instruction(task_identifier, kwargs, response, prompt):
    """Does the raw response do what the row asks for? → bool.  (official: 27 rules; any other identifier fails)

    kwargs: the row's arguments, or None; one that is absent, None or NaN has its default: N and N1 0, N2 999, texts "".
    prompt: what "Repeat Prompt" must begin with: the row's question.
    Raises InputError for an argument of a wrong type, LookupError as load_sentence_splitter does.
    """
    def text(key):
        return _argument(kwargs, key, str, "")

    def at_least(count):
        return count >= _argument(kwargs, "N", (int, float), 0)

    def at_most(count):
        return count <= _argument(kwargs, "N", (int, float), 0)

    def exactly(count):
        return count == _argument(kwargs, "N", (int, float), 0)

    def in_range(count):
        return _argument(kwargs, "N1", (int, float), 0) <= count <= _argument(kwargs, "N2", (int, float), 999)

    low = response.lower()
    match task_identifier:
        case "Include Keywords":
            return all(keyword in low for keyword in text("keywords").lower().split(", "))
        case "Keyword Frequency":
            return exactly(len(re.findall(rf"\b{re.escape(text('keyword').lower())}\b", low)))
        case "Forbidden Words":  # an empty list is one empty word, which is in every response
            return not any(word in low for word in text("forbidden_words").lower().split(", "))
        case "Number Paragraphs":
            return exactly(_non_blank(response.split("***")))
        case "Number Words (at least)":
            return at_least(len(response.split()))
        case "Number Words (at most)":
            return at_most(len(response.split()))
        case "Number Words (range)":
            return in_range(len(response.split()))
        case "Number Sentences (at least)":
            return at_least(_count_sentences(response))
        case "Number Sentences (at most)":
            return at_most(_count_sentences(response))
        case "Number Sentences (range)":
            return in_range(_count_sentences(response))
        case "Postscript":
            return _only("a-z", text("postscript_marker")) in _only("a-z", response)
        case "Number Placeholder":
            return at_least(len(re.findall(r"\[[^\]]+\]", response)))
        case "Number Bullets":
            return exactly(len(re.findall(r"(?:\A|\n)\s*\*\s+", response)))
        case "Title":
            return re.search("<<[^>]+>>", response) is not None
        case "Minimum Number Highlighted Section":
            return at_least(len(re.findall(r"\*[^*]+\*", response)))
        case "Multiple Sections":  # an empty splitter parts every character from the next
            return exactly(_non_blank(re.split(rf"\s*{re.escape(text('section_splitter'))}\s*", response.strip())))
        case "Repeat Prompt":
            return low.strip().startswith(prompt.strip().lower())
        case "Two Responses":
            responses = [part.strip() for part in low.split("******")]
            return len(responses) == 2 and responses[0] != responses[1]
        case "All Uppercase":
            return response.isupper()
        case "All Lowercase":
            return response.islower()
        case "All-capital Words (at least)":
            return at_least(_count_capitals(response))
        case "All-capital Words (at most)":
            return at_most(_count_capitals(response))
        case "All-capital Words (range)":
            return in_range(_count_capitals(response))
        case "Start Checker":
            return _only("a-z ", response).startswith(_only("a-z ", text("start_phrase")))
        case "End Checker":
            return _only("a-z ", response).endswith(_only("a-z ", text("end_phrase")))
        case "Quotation":
            return response.strip().startswith('"') and response.strip().endswith('"')
        case "No Commas":
            return "," not in response
    return False


def _argument(kwargs, key, kind, default):
    value = (kwargs or {}).get(key)
    if value is None or value != value:  # NaN is how pandas writes an absent number
        return default
    if not isinstance(value, kind) or isinstance(value, bool):
        raise InputError(f"kwargs field {key!r} is {value!r}; a {'text' if kind is str else 'number'} is needed")
    return value


def _non_blank(parts):
    return sum(bool(part.strip()) for part in parts)


def _only(characters, text):
    """Lower-cases ASCII letters and drops all but the given characters; line breaks go too."""
    return re.sub(f"[^{characters}]", "", re.sub("[^a-zA-Z ]", "", text).lower())


def _count_capitals(text):
    return sum(word.isupper() for word in text.split())


def _count_sentences(text):
    load_sentence_splitter()
    return len(nltk.sent_tokenize(text))


@cache
def load_sentence_splitter():
    """Makes the data of NLTK's sentence splitter known to NLTK, once. It is looked for as pos_gate.find_nltk_data says,
    in the installed package llama-index-core."""
    find_nltk_data("tokenizers/punkt_tab/english/", "llama_index", "core/_static/nltk_cache",
                   "pip install --no-deps llama-index-core==0.14.25")


# ───────────────────────────────────────────────── files of benchmarks ────────────────────────────────────────────────

# The columns of each benchmark's file. The first group is the one of the paper's table and must be there.
_COLUMNS = {
    "mmau": {"audio": "audio_id", "answer": "answer", "groups": ("task", "difficulty", "sub-category", "category")},
    "mmar": {"audio": "audio_path", "answer": "answer", "groups": ("modality", "category", "sub-category", "language")},
    "mmsu": {"audio": "audio", "answer": "answer_gt",
             "groups": ("category", "sub-category", "sub-sub-category", "task_name")},
    "mmau-pro": {"audio": "audio_path", "answer": "answer", "groups": ("category",)},
}
_LETTER_COLUMNS = {"A": "choice_a", "B": "choice_b", "C": "choice_c", "D": "choice_d"}  # MMSU


def read_benchmark(name, path, audio_root=None):
    """A benchmark's file as its makers publish it → list[Item], in its order.

    name: "mmau", "mmar", "mmsu" or "mmau-pro". path: a .json list, .jsonl or .parquet; audio paths are relative to
    audio_root (default: the file's folder) and their files are not opened.
    A group whose value is a list, as in some rows of MMAU, counts under its values joined by " + ". MMSU's columns
    choice_a … choice_d become choices without the absent ones. MMAU-Pro goes by its category: "open", "instruction
    following", else closed; closed rows with fewer than two choices become "not scored", as the official script
    leaves them out.
    Raises InputError for an unknown name, a file that cannot be read, a field that is missing or of a wrong type, an
    id that stands there twice, and an answer that is not among the choices (compared without white space around).
    """
    if name not in _COLUMNS:
        raise InputError(f"no benchmark {name!r}; choose one of {', '.join(_COLUMNS)}")
    path = Path(path)
    items, place_of = [], {}
    for where, row in _rows(path):
        item = _item(name, row, Path(audio_root or path.parent), where)
        if item.id in place_of:
            raise InputError(f"{where}: id {item.id!r} stands in {place_of[item.id]} already; make ids unique")
        place_of[item.id] = where
        items.append(item)
    if not items:
        raise InputError(f"{path}: no rows in this file; give the file of {name} as published")
    return items


def _rows(path):
    """→ (where, row) of every row of a file; `where` names file and line or row for errors."""
    readers = {".json": _json_rows, ".jsonl": _jsonl_rows, ".parquet": _parquet_rows}
    if path.suffix not in readers:
        raise InputError(f"{path}: files end in {', '.join(readers)}; name this file by its format")
    if not path.is_file():
        raise InputError(f"{path}: no such file; give a benchmark's file as published")
    for where, row in readers[path.suffix](path):
        if not isinstance(row, dict):
            raise InputError(f"{where}: a {type(row).__name__}, not a json object; make every row an object")
        yield where, row


def _json_rows(path):
    rows = _parse_json(path.read_bytes(), path, "write one json list of objects, or name a file of json lines .jsonl")
    if not isinstance(rows, list):
        raise InputError(f"{path}: a {type(rows).__name__}, not a list; write one json list of objects")
    return ((f"{path}: row {number}", row) for number, row in enumerate(rows, start=1))


def _jsonl_rows(path):
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield f"{path}:{number}", _parse_json(line, f"{path}:{number}", "write one json object a line")


def _parse_json(data, where, mend):
    try:
        return json.loads(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: not UTF-8 ({error}); save the file as UTF-8") from error
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: not valid json ({error}); {mend}") from error


def _parquet_rows(path):
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            # Hubs pack the sound into such files, as a struct of path and bytes: only the path is read.
            columns = [f"{column.name}.path" if column.name == "audio" and pyarrow.types.is_struct(column.type)
                       else column.name for column in file.schema_arrow]
            rows = file.read(columns=columns).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path}: cannot be read as parquet ({reason}); download the file again") from error
    return ((f"{path}: row {number}", row) for number, row in enumerate(rows, start=1))


def _item(name, row, audio_root, where):
    columns = _COLUMNS[name]
    groups = _groups(row, columns["groups"], where)
    choices, answer_column, answer_letters, kind = _choices(name, row, where), columns["answer"], "", "closed"
    if name == "mmau-pro":
        kind = groups["category"] if groups["category"] in ("open", "instruction following") else kind
        kind = "not scored" if kind == "closed" and len(choices) < 2 else kind
    elif len(choices) < 2:
        raise InputError(f"{where}: {len(choices)} choices; a multiple-choice question has at least two")
    answer = row.get(answer_column)
    if answer is None and kind in ("instruction following", "not scored"):
        answer = ""
    elif not isinstance(answer, str) or not answer.strip():
        raise InputError(f"{where}: field {answer_column!r} is {answer!r}; a non-empty string is needed")
    if kind == "closed" and answer.strip() not in [choice.strip() for choice in choices]:
        raise InputError(f"{where}: answer {answer!r} is not among the choices {list(choices)}; copy one of them "
                         "exactly")
    if name == "mmsu":
        answer_letters = "".join(letter for letter, column in _LETTER_COLUMNS.items()
                                 if (row.get(column) or "").strip() == answer.strip())
    task_identifier, kwargs = "", {}
    if kind == "instruction following":
        task_identifier = _text(row, "task_identifier", where)
        kwargs = row.get("kwargs") or {}
        if not isinstance(kwargs, dict):
            raise InputError(f"{where}: field 'kwargs' is {kwargs!r}; give an object, or null")
    return Item(_id(row, where), _audio(row.get(columns["audio"]), columns["audio"], audio_root, where),
                _text(row, "question", where), choices, answer, groups, kind, task_identifier,
                {key: value for key, value in kwargs.items() if value is not None}, answer_letters)


def _text(row, key, where):
    if not isinstance(row.get(key), str) or not row[key].strip():
        raise InputError(f"{where}: field {key!r} is {row.get(key)!r}; a non-empty string is needed")
    return row[key]


def _id(row, where):
    is_number = isinstance(row.get("id"), int) and not isinstance(row["id"], bool)
    return str(row["id"]) if is_number else _text(row, "id", where)


def _audio(value, key, audio_root, where):
    if isinstance(value, dict):
        value = value.get("path")
    clips = [value] if isinstance(value, str) else value
    if not isinstance(clips, list) or not clips or not all(isinstance(clip, str) and clip.strip() for clip in clips):
        raise InputError(f"{where}: field {key!r} is {value!r}; give a path, or a list of paths")
    return tuple(audio_root / clip.removeprefix("./") for clip in clips)


def _choices(name, row, where):
    if name == "mmsu":
        choices = [row[column] for column in _LETTER_COLUMNS.values() if row.get(column) is not None]
    else:
        choices = row.get("choices")
        if choices is None and name == "mmau-pro":  # open questions and instruction following
            return ()
    if not isinstance(choices, list) or not all(isinstance(choice, str) and choice.strip() for choice in choices):
        field_name = "choice_a … choice_d" if name == "mmsu" else "choices"
        raise InputError(f"{where}: field {field_name!r} is {choices!r}; non-empty strings are needed")
    return tuple(choices)


def _groups(row, names, where):
    groups = {}
    for name in names:
        values = row.get(name)
        values = [values] if isinstance(values, str) else values
        if values is None and name != names[0]:
            continue
        if not isinstance(values, list) or not values or not all(isinstance(v, str) and v.strip() for v in values):
            raise InputError(f"{where}: field {name!r} is {row.get(name)!r}; a non-empty string is needed")
        groups[name] = " + ".join(values)
    return groups


# ───────────────────────────────────────────────── the paper's tables ─────────────────────────────────────────────────

# Per cent, as printed; None where the paper prints "-". "table 1" holds MMAU, MMAR, MMSU, MMAU-Pro and their average,
# the unweighted mean of the four. Section 4.1 gives 71.18 for GRPO with full fine-tuning where the table gives 70.94:
# the mean of that row's four totals is 70.935, so the table is right. All other averages in that section agree.
PAPER = {
    "table 1": {
        "Qwen3-Omni-Instruct": (76.50, 70.80, 77.76, 61.84, 71.72),
        "Qwen3-Omni-Thinking": (75.00, 66.90, 76.30, 62.63, 70.21),
        "GRPO (LoRA)": (73.80, 66.60, 76.62, 61.04, 69.51),
        "MAPO (LoRA), mask": (75.60, 67.20, 76.20, 63.14, 70.53),
        "MAPO (LoRA), mask and attention loss": (76.60, 68.70, 77.26, 63.49, 71.51),
        "GRPO (phase 1)": (75.50, 68.10, 77.02, 63.12, 70.94),
        "MAPO (phase 1)": (77.10, 69.20, 77.74, 63.48, 71.88),
        "MAPO (phase 2)": (77.80, 70.90, 79.36, 65.29, 73.34),
    },
    "mmau": {  # Table 2: sound, music, speech, all
        "Human": (86.31, 78.22, 82.17, 82.23),
        "GPT-4o Audio": (64.56, 56.29, 66.67, 62.50),
        "Gemini 2.5 Pro": (75.08, 68.26, 71.47, 71.60),
        "Nova 2 Omni": (81.08, 70.36, 81.98, 77.80),
        "Audio Flamingo 3": (79.58, 66.77, 66.37, 73.30),
        "MiMo-Audio": (81.68, 74.25, 68.17, 74.70),
        "Qwen3-Omni-Thinking": (77.48, 70.96, 76.58, 75.00),
        "Covo-Audio": (78.68, 76.05, 71.17, 75.30),
        "Qwen3-Omni-Instruct": (77.78, 73.05, 78.68, 76.50),
        "Omni-R1": (81.70, 73.40, 76.00, 77.00),
        "Step-Audio-2": (84.04, 73.56, 75.15, 77.58),
        "Audio-Thinker": (81.98, 74.25, 76.88, 77.70),
        "MAPO": (79.88, 71.86, 81.68, 77.80),
    },
    "mmar": {  # Table 2: sound, music, speech, all (over the mixed modalities too)
        "GPT-4o Audio": (53.94, 50.97, 70.41, 64.09),
        "Qwen3-Omni-Thinking": (62.42, 49.51, 78.57, 66.90),
        "Qwen3-Omni-Instruct": (64.85, 56.80, 77.21, 70.80),
        "Omni-R1": (67.30, 51.50, 64.30, 63.46),
        "Audio-Thinker": (68.48, 53.88, 64.29, 67.25),
        "MAPO": (66.06, 55.83, 77.89, 70.90),
    },
    "mmsu": {  # Table 3: perception, reasoning, all
        "Gemini 1.5 Pro": (46.10, 76.16, 60.68),
        "GPT-4o Audio": (39.67, 71.96, 56.38),
        "Qwen2.5-Omni-7B": (42.50, 79.83, 60.57),
        "Covo-Audio": (58.95, 74.83, 66.64),
        "Qwen3-Omni-Instruct": (73.95, 81.82, 77.76),
        "Qwen3-Omni-Thinking": (74.19, 78.55, 76.30),
        "MAPO": (76.36, 82.56, 79.36),
    },
    "mmau-pro": {  # Table 3: instruction following, closed, open, all
        "Human": (100.00, 77.56, 77.30, 77.90),
        "GPT-4o Audio": (82.50, 53.20, 43.20, 52.50),
        "Gemini 2.5 Flash": (95.10, 57.39, 67.50, 59.20),
        "Qwen2.5-Omni-7B": (61.30, 52.01, 52.30, 52.20),
        "Qwen3-Omni-Instruct": (89.66, 57.84, 87.38, 61.84),
        "Qwen3-Omni-Thinking": (62.07, 59.63, 84.77, 62.63),
        "MAPO": (95.40, 62.00, 85.32, 65.29),
    },
}

# Where each column of the paper's table stands in a report, and its heading; the total comes last.
_TABLE = {
    "mmau": (("Sound", "groups", "task", "sound"), ("Music", "groups", "task", "music"),
             ("Speech", "groups", "task", "speech"), ("Avg.",)),
    "mmar": (("Sound", "groups", "modality", "sound"), ("Music", "groups", "modality", "music"),
             ("Speech", "groups", "modality", "speech"), ("Avg.",)),
    "mmsu": (("Perception", "groups", "category", "Perception"), ("Reasoning", "groups", "category", "Reasoning"),
             ("Overall",)),
    "mmau-pro": (("AIF", "parts", "instruction following"), ("Closed", "parts", "closed"), ("Open", "parts", "open"),
                 ("Overall",)),
}


def markdown_table(name, report, label):
    """A report of `score` beside the paper's Table 2 or 3 → a Markdown table, in per cent.

    First the row of `label`, then MAPO and its baseline, then the other models in the paper's order. A column that
    the report does not have, or that was not scored, is "–".
    """
    if name not in _TABLE or report["benchmark"] != name:
        raise InputError(f"a table of {name!r} from a report of {report['benchmark']!r}; name the report's benchmark")
    ours = [_find(report, keys) for _, *keys in _TABLE[name]]
    first = ("MAPO", "Qwen3-Omni-Thinking")
    others = [model for model in PAPER[name] if model not in first]
    rows = [(label.replace("|", "\\|"), [None if value is None else 100 * value for value in ours])]
    rows += [(f"{model} (paper)", PAPER[name][model]) for model in (*first, *others)]
    headings = [heading for heading, *_ in _TABLE[name]]
    lines = [f"| Model | {' | '.join(headings)} |", "|---" + "|---:" * len(headings) + "|"]
    for model, values in rows:
        lines.append(f"| {model} | {' | '.join('–' if v is None else f'{v:.2f}' for v in values)} |")
    return "\n".join(lines) + "\n"


def _find(report, keys):
    for key in keys:
        report = report.get(key, {})
    return report.get("accuracy")


def paper_averages():
    """Table 1's average from Tables 2 and 3: {model: unweighted mean of its four totals}, where it has all four."""
    benchmarks = [PAPER[name] for name in _TABLE]
    in_all = [model for model in benchmarks[0] if all(model in table for table in benchmarks)]
    return {model: sum(table[model][-1] for table in benchmarks) / len(benchmarks) for model in in_all}
