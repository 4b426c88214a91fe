"""The official scoring rules of four benchmarks: MMAU test-mini, MMAR, MMSU and MMAU-Pro.

    completion → rewards.extract_answer → map_to_option (rules, then a judge) → score

MMAU, MMAR and MMSU all use MMAU's token-set match. MMAU-Pro has three parts: closed questions are
scored by text embeddings, open ones by a judge, and instruction following by benchmarks.py. The
rules are those of the official scorers, quirks included; otherwise scores could not be compared.

A prediction is a text: the option that map_to_option returns ("" for none), or the raw response for
open questions and instruction following. Accuracies are fractions, not per cent.

This file imports no transformers, and neither do data.py and benchmarks.py. So they also run in
the environment that MMAU-Pro's official embedder needs (see load_embedder).
"""

import re
from pathlib import Path

import httpx
import numpy as np
import torch
from tqdm.contrib.concurrent import thread_map

import rewards
from benchmarks import BENCHMARKS, follows_instruction
from data import InputError


def score(name, items, predictions, judge=None, embed=None, answers=None):
    """The report of one benchmark, as a dict that json can write.

    name: one of benchmarks.BENCHMARKS. items: from read_benchmark. predictions: {id: text}.
    judge: prompt → reply; JUDGE_AT_ONCE threads call it. embed: list of texts → matrix
    [texts, dims]. Only MMAU-Pro needs these two. answers: {id: the text that the prediction was
    made from}; MMSU's letters are read from it (default: from the predictions).

        accuracy, right, count   over all rows. right is the sum of points; an open question of
                                 MMAU-Pro earns a fraction of a point
        missing, empty           rows without a prediction (wrong), and with a blank one (scored)
        unlisted, ceiling        closed rows whose answer is none of the options, and the highest
                                 accuracy that predictions that are options can reach
        groups                   {"task": {"sound": {accuracy, right, count}, …}, …}
        official                 accuracy, right, count and groups over the official denominator
                                 (MMSU: and a ceiling of its own). MMAU and MMAR leave out
                                 rows without a prediction. MMSU reads letters and leaves out rows
                                 without one. {} for MMAU-Pro: its official total is ours when no
                                 row is missing
        parts                    MMAU-Pro: "closed", "open", "instruction following"; each names
                                 its method
        notes                    what you must know to read the numbers, one sentence each

    Without a judge, MMAU-Pro's open questions and its total are None. Without embed, its closed
    questions are scored by string match, and `method` and `notes` say so. (The rules are official;
    counting missing rows as wrong is ours.)
    Raises InputError for an unknown name, no items, an id that no item has, and a prediction that
    is not a text.
    """
    _check_scoring(name, items, predictions)
    if name == "mmau-pro":
        report = _score_mmau_pro(items, predictions, judge, embed)
    else:
        points = [float(item.id in predictions
                        and string_match(item.answer, predictions[item.id], item.choices))
                  for item in items]
        answers = answers or predictions
        report = {**_tally(items, points), "method": "string match", "notes": [],
                  "official": _official(name, items, predictions, points, answers)}
        blank = sum(answers.get(item.id, "-").strip() in ("", "None") for item in items)
        if name == "mmsu" and blank:
            report["notes"].append(
                f"Answers that are blank or \"None\": {blank}. The official script gives such a "
                "row the letter of the row before (a bug); here its figure leaves them out.")
    _note_ceilings(name, items, report, embed)
    missing = [item for item in items if item.id not in predictions]
    if missing:
        report["notes"].append(
            f"{len(missing)} of {len(items)} rows have no prediction and count as wrong.")
    if any(item.kind == "instruction following" for item in missing):
        report["notes"].append(
            "Some of them are instructions. The official script reads such a row as the word "
            "\"nan\", which can pass a rule, such as \"All Lowercase\".")
    empty = sum(not predictions.get(item.id, "-").strip() for item in items)
    return {"benchmark": name, **report, "missing": len(missing), "empty": empty}


def _check_scoring(name, items, predictions):
    if name not in BENCHMARKS:
        raise InputError(f"no benchmark {name!r}; choose one of {', '.join(BENCHMARKS)}")
    if not items:
        raise InputError(f"{name}: no items to score; read them with read_benchmark")
    unknown = sorted(set(predictions) - {item.id for item in items}, key=str)
    if unknown:
        raise InputError(f"{name}: {len(unknown)} predictions have ids that are not in the "
                         f"benchmark, the first {unknown[0]!r}; give predictions for this "
                         "benchmark only")
    for key, text in predictions.items():
        if not isinstance(text, str):
            raise InputError(f"{name}: the prediction of {key!r} is {text!r}; give a text, or \"\" "
                             "for none")


def _note_ceilings(name, items, report, embed):
    """Adds to a report what answers that are none of the options cost."""
    closed = [item for item in items if item.kind == "closed"]
    unlisted = [item for item in closed if not item.answer_letters and
                (name == "mmsu" or item.answer not in item.choices)]
    # A token-set match can still accept an option, such as "Old-aged" for "old aged".
    by_match = name != "mmau-pro" or embed is None
    lost = [item for item in unlisted if not by_match or
            not any(string_match(item.answer, choice, item.choices) for choice in item.choices)]
    ceiling = 1 - len(lost) / report["count"] if report["count"] else None
    report |= {"unlisted": len(unlisted), "ceiling": ceiling}
    if not unlisted:
        return
    note = (f"Rows whose answer is none of the options: {len(unlisted)} of {len(closed)}. No "
            f"option is right in {len(lost)} of them, so predictions that are options have a "
            f"ceiling of {ceiling:.2%}.")
    if name == "mmsu":
        report["official"]["ceiling"] = 1 - len(unlisted) / len(items)
        note += (" The official script counts all of these rows as wrong, whatever is answered: "
                 f"its ceiling is {len(items) - len(unlisted)} of {len(items)}.")
    report["notes"].append(note)


def _official(name, items, predictions, points, answers):
    if name == "mmsu":
        letters = [mmsu_letter(answers.get(item.id, "")) for item in items]
        kept = [(item, float(letter in item.answer_letters))
                for item, letter in zip(items, letters) if letter]
        method = "the letter that the official script reads; rows without one are left out"
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
                notes.append(f"{unread} replies of the judge contain no score; the official rule "
                             "reads each as 3 of 5.")
        else:
            of_part = [float(item.id in predictions and
                             _is_right(item, predictions[item.id], embed)) for item in of_kind]
        if of_kind:
            parts[kind] = {**_summary(of_part), "method": method}
            scored += of_kind
            points += of_part
    if "closed" in parts and embed is None:
        notes.append("Closed questions are scored by string match because no embedder was given; "
                     "this is not the official score.")
    if "open" in parts and judge is None:
        notes.append("Open questions and the total are not scored because no judge was given.")
    left_out = sum(item.kind == "not scored" for item in items)
    if left_out:
        notes.append(f"{left_out} rows have fewer than two choices and are left out, as in the "
                     "official script.")
    return {**_tally(scored, points), "method": "count-weighted mean of the parts", "parts": parts,
            "notes": notes, "official": {}}


def _is_right(item, prediction, embed):
    if item.kind == "instruction following":
        return follows_instruction(item.task_identifier, item.kwargs, prediction, item.question)
    if embed is None:
        return string_match(item.answer, prediction, item.choices)
    return item.choices[closed_choice(prediction, item.choices, embed)] == item.answer


def _open_points(items, predictions, judge):
    """→ (points of each open question, None without a judge; number of replies without a score)."""
    if judge is None:
        return [None] * len(items), 0
    asked = [item for item in items if item.id in predictions]
    prompts = [JUDGE_PROMPT.format(question=item.question, reference=item.answer,
                                   response=predictions[item.id]) for item in asked]
    replies = thread_map(judge, prompts, max_workers=JUDGE_AT_ONCE, desc="judge", leave=False)
    replies = {item.id: reply for item, reply in zip(asked, replies)}
    unread = sum(not any(re.search(pattern, reply, re.I) for pattern in _MARKS.values())
                 for reply in replies.values())
    # A missing row is wrong: 0 points, although a judge's lowest mark would give it 1 of 5.
    return [parse_judge(replies[item.id])["overall"] / 5 if item.id in replies else 0.0
            for item in items], unread


def _tally(items, points):
    """The points of each item (None if not scored) → {accuracy, right, count, groups}."""
    groups = {}
    for item, point in zip(items, points, strict=True):
        for group, value in item.groups.items():
            groups.setdefault(group, {}).setdefault(value, []).append(point)
    return {**_summary(points),
            "groups": {group: {value: _summary(of_value) for value, of_value in values.items()}
                       for group, values in groups.items()}}


def _summary(points):
    right = None if None in points else sum(points)
    accuracy = None if right is None or not points else right / len(points)
    return {"accuracy": accuracy, "right": right, "count": len(points)}


# ──────── MMAU, MMAR, MMSU ────────


def string_match(answer, prediction, choices):
    """MMAU's token-set match → bool.  (official; MMAR and, in the paper, MMSU use it too)

    A text counts as the set of its words, in lower case. The prediction is right if it has words,
    contains all words of the answer, and contains no word that another option adds to the answer.
    Letters do not stand for options. A refusal must be "": the words "no answer" would match the
    answer "no".
    """
    predicted, right = _words(prediction), _words(answer)
    added_by_others = set().union(*(_words(choice) - right for choice in choices))
    return bool(predicted) and right <= predicted and not predicted & added_by_others


def _words(text):
    return set(re.findall(r"\b\w+\b", text.lower()))


def mmsu_letter(prediction):
    """The letter, "A" to "D", that MMSU's script reads in a prediction, or None.  (official)

    Surrounding white space and all line breaks are removed. Then the first character counts, else
    the second to last, if it is A to D. So "Dog" reads as D, "The answer is B." as B, and
    "Answer: B" as A. The script leaves out rows without a letter.
    """
    text = prediction.strip().replace("\n", "")
    return next((letter for letter in (text[:1], text[-2:-1]) if letter and letter in "ABCD"), None)


# ──────── from an answer to one of the options ────────

MAP_PROMPT = """\
Somebody was asked a multiple-choice question about a recording. Decide which of the options their \
answer chooses. Do not answer the question yourself.

Options:
{options}

Their answer:
{answer}

Reply with the text of the chosen option, copied exactly, and nothing else. If the answer chooses \
none of the options, or several, or refuses, reply NONE."""

# Answers that choose nothing, although their words could match an option such as "No".  (ours)
_REFUSALS = {"no answer", "none", "n/a", "unknown", "i don't know", "i do not know", "not sure",
             "i'm not sure"}


def map_to_option(text, choices, judge=None):
    """The extracted answer → the text of the option that it chooses, or "" for none.

    The rules come first: rewards.chosen_option, which the training reward uses too (so an option
    word for word is itself); then the only option that string_match accepts. If neither decides,
    the judge is asked (if there is one), and its reply must name an option by the same rules. A
    blank text is "", and so is a short refusal, unless an option has the same words. (paper: rules,
    then Qwen2.5-7B-Instruct)
    """
    chosen = _by_rules(text, choices)
    if chosen or judge is None or not text.strip() or _is_refusal(text):
        return chosen
    lettered = "\n".join(f"{chr(ord('A') + i)}. {choice}" for i, choice in enumerate(choices))
    reply = judge(MAP_PROMPT.format(options=lettered, answer=text))
    if reply.strip(" \n.\"*") == "NONE" and "NONE" not in choices:  # an option may read "None"
        return ""
    return _by_rules(reply, choices)


def _by_rules(text, choices):
    index = rewards.chosen_option(text, [choice.strip() for choice in choices])
    if index is not None:
        return choices[index]
    if _is_refusal(text):
        return ""
    matching = [choice for choice in choices if string_match(choice, text, choices)
                and not _words(choice) <= _IN_ANY_SENTENCE]
    return matching[0] if len({choice.strip() for choice in matching}) == 1 else ""


# An option of these words alone, such as the key A, is not named by a sentence with them.  (ours)
_IN_ANY_SENTENCE = {"a", "an", "the", "i", "it", "is"}


def _is_refusal(text):
    return text.strip(" \n\t.,;:!\"'*").replace("’", "'").lower() in _REFUSALS


# ──────── MMAU-Pro: closed questions ────────


def closed_choice(prediction, choices, embed):
    """The index of the option closest to the prediction by cosine; the first one on ties.

    embed: list of texts → matrix [texts, dims], as a NumPy array, a tensor or lists. An empty
    prediction is embedded like any other. (official, with NV-Embed-v2)
    Raises ValueError unless embed returns one finite row per text.
    """
    predicted, options = _unit_rows(embed([prediction])), _unit_rows(embed(list(choices)))
    if len(predicted) != 1 or len(options) != len(choices) or \
            not np.isfinite(options @ predicted[0]).all():
        raise ValueError(f"embed returned {predicted.shape} for 1 text and {options.shape} for "
                         f"{len(choices)}: it must return one finite row per text")
    # Row by row, not as a matrix product, so that equal rows give exactly equal numbers.
    return int(np.argmax((options * predicted).sum(axis=1)))


def _unit_rows(matrix):
    rows = torch.as_tensor(matrix).detach().cpu().double()
    return torch.nn.functional.normalize(rows, dim=1).numpy()


def load_embedder(name_or_folder):
    """A sentence-transformers model, by name or folder → embed: list of texts → [texts, dims].

    MMAU-Pro's script uses "nvidia/NV-Embed-v2", which runs code from its own repository; no other
    model may do that. As its authors prescribe, it reads up to 4096 tokens per text, padded on the
    right, with the end-of-text token appended. Its code needs transformers 4.42 and fails on later
    versions.
    Raises InputError if sentence-transformers is not installed or the model cannot be loaded.
    """
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise InputError(f"an embedder needs sentence-transformers ({error}); `pip install "
                         "sentence-transformers`, or score without an embedder") from error
    is_nv_embed = Path(name_or_folder).name == "NV-Embed-v2"
    try:
        model = SentenceTransformer(str(name_or_folder), trust_remote_code=is_nv_embed)
    except (OSError, ValueError, ImportError) as error:
        fix = ("its code needs transformers 4.42, see Evaluation in the README" if is_nv_embed else
               "give the name or folder of a sentence-transformers model")
        raise InputError(f"the embedder {name_or_folder} cannot be loaded "
                         f"({' '.join(str(error).split())}); {fix}") from error
    ending = ""
    if is_nv_embed:
        model.max_seq_length = 4096
        model.tokenizer.padding_side = "right"
        ending = model.tokenizer.eos_token
    return lambda texts: model.encode([text + ending for text in texts], convert_to_numpy=True)


# ──────── MMAU-Pro: open questions ────────

JUDGE_PROMPT = """\
Grade how well an answer to a question about a recording agrees with a reference answer. The \
reference is right; the recording is not at hand.

Question:
{question}

Reference answer:
{reference}

Answer to grade:
{response}

Give five marks from 1 (worst) to 5 (best):
correctness (does what the answer states agree with the reference?), relevance (does it address \
the question?), completeness (does it cover all that the reference says?), clarity (is it clear \
and in good order?), and overall (the mean of the four).

Reply with these five lines and nothing else, a number in place of each N:
CORRECTNESS: N
RELEVANCE: N
COMPLETENESS: N
CLARITY: N
OVERALL: N"""

# The official script reads whole numbers for the first four, and decimals only for the last.
_MARKS = {"correctness": r"CORRECTNESS:\s*(\d+)", "relevance": r"RELEVANCE:\s*(\d+)",
          "completeness": r"COMPLETENESS:\s*(\d+)", "clarity": r"CLARITY:\s*(\d+)",
          "overall": r"OVERALL:\s*(\d+(?:\.\d+)?)"}

TIMEOUT = 120.0  # seconds per request
JUDGE_AT_ONCE = 16  # requests to the judge in flight


def parse_judge(text):
    """A judge's reply → its five marks, {"correctness": 4.0, …, "overall": 3.5}.  (official)

    The first `NAME: number` counts, in upper or lower case. Of the first four marks only the whole
    part is read ("4.5" is 4). A missing mark is 3.0. An overall mark that is missing, or exactly
    3.0, becomes the mean of the other four. Marks are not limited to 1 to 5.
    """
    found = {name: re.search(pattern, text, re.I) for name, pattern in _MARKS.items()}
    marks = {name: float(match[1]) if match else 3.0 for name, match in found.items()}
    if marks["overall"] == 3.0:
        marks["overall"] = sum(marks[name] for name in _MARKS if name != "overall") / 4
    return marks


def ask_judge(url, model, prompt, api_key=None, max_tokens=128):
    """One greedy chat completion → the reply's text.  (paper: Qwen2.5-7B-Instruct, 128 tokens)

    url: base of an OpenAI-compatible server, such as "http://host:8000/v1". model: the name that
    it serves the judge under. Transport errors and HTTP 408, 409, 429 and 5xx are retried,
    rewards.ATTEMPTS times in all. Raises JudgeError if they persist, and at once for
    any other status and for an empty reply.
    """
    endpoint = url.rstrip("/") + "/chat/completions"
    ask = rewards.retrying()
    headers = {"Authorization": f"Bearer {api_key.strip()}"} if api_key else {}
    with httpx.Client(headers=headers, timeout=TIMEOUT) as client:
        try:
            reply = ask(rewards.chat_reply, client, endpoint, model, prompt, max_tokens, "judge",
                        JudgeError)
        except rewards.PassingFault as fault:
            raise JudgeError(f"the judge at {endpoint} gave no reply in {rewards.ATTEMPTS} "
                             f"attempts; last fault: {fault}") from fault
    if not reply:  # parse_judge would read it as 3 of 5
        raise JudgeError(f"the judge at {endpoint} sent an empty reply; is max_tokens {max_tokens} "
                         "too small?")
    return reply


class JudgeError(RuntimeError):
    """The judge gave no reply: one line that names its address and the last fault."""
