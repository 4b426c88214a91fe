"""The rewards of MAPO (arXiv 2605.27741, Eq. 6): accuracy, format, and consistency through a checker model.

    r(x, y) = λ_acc·r_acc + λ_format·r_format + λ_cons·r_cons

A completion is the decoded text without special tokens. Two formats of an answer (`format_style`):

    "think"      <think>thinking</think>answer      thinking models; their chat template often opens the block itself,
                                                    and then the completion starts inside it
    "reasoning"  <reasoning>thinking</reasoning><answer>answer</answer>      instruct models (Appendix G)

Accuracy and format need nothing but the text. Consistency asks an OpenAI-compatible server (needs httpx, tenacity).
"""

import math
import re
import threading
import unicodedata
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait

import httpx
import tenacity


def total_reward(accuracy, format, consistency, weights=(2, 1, 1)):
    """r = λ_acc·r_acc + λ_format·r_format + λ_cons·r_cons.  (Eq. 6; weights from the paper)

    Raises ValueError when a reward is None or not finite: a missing reward stops the run, it never counts as 0.
    """
    rewards = {"accuracy": accuracy, "format": format, "consistency": consistency}
    missing = {name: reward for name, reward in rewards.items() if reward is None or not math.isfinite(reward)}
    if missing:
        raise ValueError(f"total_reward got {missing}: every reward must be a finite number")
    return float(sum(weight * reward for weight, reward in zip(weights, rewards.values(), strict=True)))


# ─────────────────────────────────────────────── r_acc: accuracy ──────────────────────────────────────────────────────


def accuracy_reward(completion, answer, choices, format_style="think"):
    """r_acc: 1.0 when the completion's answer is the right option, else 0.0.  (Sec. 4, "strict ground-truth accuracy")

    answer: the text of the right option; choices: the texts of all options, in the order of their letters A, B, C …
    Right is the option's text, or its letter alone ("B", "(b)", "B."), or its letter and its text ("B) dog", "B. dog").
    The whole answer must match: no prefix, no substring (ours; the release compares prefixes). Texts come before
    letters, for options may be letters themselves, such as musical keys.
    Raises ValueError for fewer than two choices, for two that are the same, and for an answer that is none of them.
    """
    options = [choice.strip() for choice in choices]
    if len(options) < 2:
        raise ValueError(f"choices is {list(choices)}: a multiple-choice question has at least two options")
    if len(set(options)) < len(options):
        raise ValueError(f"choices {list(choices)} holds the same option twice")
    if answer not in choices:
        raise ValueError(f"answer {answer!r} is not among the choices {list(choices)}")
    predicted = extract_answer(completion, format_style)
    return float(predicted is not None and chosen_option(predicted, options) == list(choices).index(answer))


def chosen_option(predicted, options):
    """The index of the option that `predicted` names, or None. options: different texts, stripped."""
    index, is_text = _option_of_text(predicted, options)
    if is_text:
        return index
    labelled = re.fullmatch(r"([A-Z])[).:]\s*(\S.*)", predicted.lstrip(_AROUND), re.I | re.S)
    letter = labelled[1] if labelled else _normalise(predicted)
    if not re.fullmatch("[A-Z]", letter, re.I):
        return None
    letter_index = ord(letter.upper()) - ord("A")
    if letter_index >= len(options) or (labelled and _option_of_text(labelled[2], options)[0] != letter_index):
        return None
    return letter_index


def _option_of_text(text, options):
    """→ (the index of the one option that `text` equals, or None; whether it is the text of any option at all).

    Texts are compared at the most tolerant first. Where that makes the text equal to several options ("c" of "C" and
    "c", "Help" of "Help" and "Help!"), a stricter comparison decides; where none singles one out it names no option.
    """
    for normalise in (_normalise,
                      lambda x: _normalise(x, fold_case=False),
                      lambda x: _normalise(x, strip_marks=False),
                      lambda x: _normalise(x, fold_case=False, strip_marks=False),
                      str.strip):
        equal = [i for i, option in enumerate(options) if normalise(option) == normalise(text)]
        if len(equal) == 1:
            return equal[0], True
        if not equal and normalise is _normalise:
            return None, False
    return None, True


# Marks around an answer that do not change what it says: quotes, brackets, Markdown; at its end, those of a sentence
# too. Not among them: the # of C#, the sign of −3 dB, %, $.
_AROUND = "\"'`“”‘’«»()[]{}*_ "
_AT_END = _AROUND + ".,;:!?。、"


def _normalise(text, fold_case=True, strip_marks=True):
    text = unicodedata.normalize("NFKC", text)
    if fold_case:
        text = unicodedata.normalize("NFKC", text.casefold())
    text = " ".join(text.split())
    return (text.lstrip(_AROUND).rstrip(_AT_END) if strip_marks else "") or text  # an option "?" stays as it is


# ─────────────────────────────────────────────── r_format: format ─────────────────────────────────────────────────────


def format_reward(completion, format_style="think", prefilled=None):
    """r_format: 1.0 when the completion keeps to its format, else 0.0.  (Sec. 4; Appendix G for "reasoning")

    "think": one <think> block that is not empty, nothing before it, an answer after it. `prefilled`: True where the
    chat template has opened the block, so that the completion must not; False where the completion must open it; None
    where the caller does not know: both count.
    "reasoning": one <reasoning> block, then one <answer> block, neither empty, nothing outside. `prefilled` is unused.
    """
    text = completion.strip()
    if split_completion(text, format_style) is None:
        return 0.0
    if format_style == "reasoning":
        once = all(text.count(tag) == 1 for tag in ("<reasoning>", "</reasoning>", "<answer>", "</answer>"))
        return float(once and re.fullmatch("<reasoning>.*</reasoning>\\s*<answer>.*</answer>", text, re.S) is not None)
    opened = text.count("<think>")
    may_open = {True: opened == 0, False: opened == 1, None: opened <= 1}[prefilled]
    return float(may_open and text.count("</think>") == 1 and (opened == 0 or text.startswith("<think>")))


def extract_answer(completion, format_style="think"):
    """The answer in a completion, stripped, or None where the format's block is missing or the answer empty.

    "think": what follows the last </think>. "reasoning": the inside of the last <answer> block.
    """
    parts = _parts(completion, format_style)
    return (parts[1] or None) if parts else None


def split_completion(completion, format_style="think"):
    """→ (thinking, answer), both stripped and not empty, or None. As tolerant of text around them as extract_answer."""
    parts = _parts(completion, format_style)
    return parts if parts and all(parts) else None


def _parts(completion, format_style):
    """→ (thinking, answer), stripped, either may be empty; None where the answer's place does not exist."""
    if format_style == "think":
        thinking, end, answer = completion.rpartition("</think>")
        return (thinking.strip().removeprefix("<think>").strip(), answer.strip()) if end else None
    if format_style == "reasoning":
        before, start, rest = completion.rpartition("<answer>")
        answer, end, _ = rest.partition("</answer>")
        thinking, closed, _ = before.rpartition("</reasoning>")
        thinking = thinking.strip().removeprefix("<reasoning>").strip() if closed else ""
        return (thinking, answer.strip()) if start and end else None
    raise ValueError(f"format_style is {format_style!r}; choose \"think\" or \"reasoning\"")


# ───────────────────────────────────────────── r_cons: consistency ────────────────────────────────────────────────────

# The paper's own text (arXiv 2605.27741, Appendix B; CC BY 4.0, its authors), verbatim; the line breaks around the two
# fields are the paper's, the others ours.
CHECKER_PROMPT = """\
You are a reasoning consistency evaluator. Given a model’s thinking process and its final answer, your task is to \
evaluate it against two specific failure modes.

Thinking Process:
{think_text}

Final Answer:
{answer_text}

Respond “NO” ONLY if at least one of the following is true:
1. The conclusion reached in the thinking process does not agree with or contradicts the final answer.
2. The thinking process is visibly incomplete or cut off prematurely.

If neither of these failure modes is present, respond “YES”. Only output YES or NO."""

FIRST_WAIT = 1.0  # seconds before the second attempt; each later wait is twice as long, up to LONGEST_WAIT (ours)
LONGEST_WAIT = 30.0


def consistency_rewards(completions, *, url, model, api_key=None, format_style="think", max_in_flight=32, timeout=60.0,
                        attempts=5, trust_env=True):
    """r_cons of each completion, in their order: the checker's YES is 1.0, its NO 0.0.  (Sec. 4, Appendix B)

    url: base of an OpenAI-compatible server, as "http://host:8000/v1"; model: the name it serves the checker under
    (paper: Qwen3-30B-A3B-Instruct); max_in_flight: requests at a time; timeout: seconds of one request;
    trust_env: whether http_proxy and the like count.
    A completion without thinking or without an answer is "visibly incomplete" (failure mode 2): 0.0, nobody is asked.
    Transport faults and HTTP 408, 409, 429 and 5xx are tried again, `attempts` times in all, with growing waits.
    Raises CheckerError when they do not pass, at once for any other status and for a reply that is neither YES nor NO:
    a checker that fails never scores 0.
    """
    endpoint = url.rstrip("/") + "/chat/completions"
    given_up = threading.Event()  # after the first failure the other requests do not go on trying
    ask = tenacity.Retrying(
        retry=tenacity.retry_if_exception_type(PassingFault), reraise=True,
        stop=tenacity.stop_any(tenacity.stop_after_attempt(attempts), tenacity.stop_when_event_set(given_up)),
        wait=tenacity.wait_exponential(multiplier=FIRST_WAIT, max=LONGEST_WAIT) + tenacity.wait_random(0, FIRST_WAIT),
        sleep=tenacity.sleep_using_event(given_up))

    def score(completion):
        parts = split_completion(completion, format_style)
        if parts is None:
            return 0.0
        prompt = CHECKER_PROMPT.format(think_text=parts[0], answer_text=parts[1])
        try:
            return ask(_verdict, client, endpoint, model, prompt)
        except PassingFault as fault:
            raise CheckerError(
                f"the checker at {endpoint} gave no verdict in {attempts} attempts; last fault: {fault}") from fault

    headers = {"Authorization": f"Bearer {api_key.strip()}"} if api_key else {}  # a line break would stand in an error
    limits = httpx.Limits(max_connections=max_in_flight, max_keepalive_connections=max_in_flight)
    with (httpx.Client(headers=headers, timeout=timeout, limits=limits, trust_env=trust_env) as client,
          ThreadPoolExecutor(max_in_flight, thread_name_prefix="checker") as pool):
        futures = [pool.submit(score, completion) for completion in completions]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
            for future in futures:
                if future.done():
                    future.result()  # raises the first failure, before the ones that giving up causes
            return [future.result() for future in futures]
        finally:
            given_up.set()
            pool.shutdown(wait=False, cancel_futures=True)


def rule_consistency_rewards(completions, format_style="think"):
    """r_cons by a rule in place of the checker, for the toy: 1.0 when the thinking ends in a full stop (it is not cut
    off) and its last words are the answer (it does not contradict it).  (ours; the two failure modes of Appendix B)
    """
    rewards = []
    for completion in completions:
        thinking, answer = split_completion(completion, format_style) or ("", "")
        conclusion, words = _normalise(thinking), _normalise(answer)
        rewards.append(float(bool(words) and thinking.rstrip().endswith(".")
                             and f" {conclusion}".endswith(f" {words}")))
    return rewards


def _verdict(client, endpoint, model, prompt):
    """One request → 1.0 or 0.0. Raises as chat_reply does, and CheckerError for a reply that is neither YES nor NO."""
    reply = chat_reply(client, endpoint, model, prompt, 8, "checker", CheckerError)
    verdict = reply.strip(" \t\r\n.,;:!\"'“”*").upper()
    if verdict not in ("YES", "NO"):
        raise CheckerError(f"the checker at {endpoint} replied {reply!r} where YES or NO is due")
    return 1.0 if verdict == "YES" else 0.0


def chat_reply(client, endpoint, model, prompt, max_tokens, who, error_class):
    """One greedy chat completion of an OpenAI-compatible server → the reply's text. `who` names the server in errors.

    Raises PassingFault where another attempt may help, else error_class, one line.
    """
    try:
        response = client.post(endpoint, json={"model": model, "messages": [{"role": "user", "content": prompt}],
                                               "temperature": 0, "max_tokens": max_tokens})
    except (httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
        raise error_class(f"the {who}'s address {endpoint} is no http address: {error}") from error
    except httpx.TransportError as fault:
        raise PassingFault(f"{type(fault).__name__}: {fault}") from fault
    if response.status_code in (408, 409, 429) or response.status_code >= 500:
        raise PassingFault(f"HTTP {response.status_code}: {response.text[:200]!r}")
    if response.status_code != 200:
        raise error_class(f"the {who} at {endpoint} refused: HTTP {response.status_code}: {response.text[:200]!r}")
    try:
        return response.json()["choices"][0]["message"]["content"].strip()
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise error_class(f"the {who} at {endpoint} sent no chat completion: {response.text[:200]!r}") from error


class CheckerError(RuntimeError):
    """The checker gave no verdict: one line that names its address and the last fault or the reply."""


class PassingFault(Exception):
    """A fault that may pass: worth another attempt."""
