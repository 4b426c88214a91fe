"""The rewards of MAPO (arXiv 2605.27741, Eq. 6): accuracy, format, and consistency.

    r(x, y) = λ_acc·r_acc + λ_format·r_format + λ_cons·r_cons

A completion is the decoded text without special tokens. An answer has one of two formats
(`format_style`):

    "think"      <think>thinking</think>answer
    "reasoning"  <reasoning>thinking</reasoning><answer>answer</answer>      (Appendix G)

"think" is for thinking models. Their chat template often opens the block itself; the completion
then starts inside it. "reasoning" is for instruct models.

Accuracy and format need only the text. Consistency asks a checker model on an OpenAI-compatible
server.
"""

import math
import os
import re
import secrets
import threading
import unicodedata
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait

import httpx
import tenacity


def total_reward(accuracy, format, consistency, weights=(2, 1, 1)):
    """r = λ_acc·r_acc + λ_format·r_format + λ_cons·r_cons.  (Eq. 6; weights from the paper)

    Raises ValueError when a reward is None or not finite. A missing reward must stop the run; it
    must not count as 0.
    """
    rewards = {"accuracy": accuracy, "format": format, "consistency": consistency}
    missing = {name: reward for name, reward in rewards.items()
               if reward is None or not math.isfinite(reward)}
    if missing:
        raise ValueError(f"total_reward got {missing}: every reward must be a finite number")
    return float(sum(weight * reward
                     for weight, reward in zip(weights, rewards.values(), strict=True)))


# ──────── r_acc: accuracy ────────


def accuracy_reward(completion, answer, choices, format_style="think"):
    """r_acc: 1.0 if the completion's answer is the right option, else 0.0.  (Sec. 4)

    The paper says "strict ground-truth accuracy". answer: the text of the right option; choices:
    the texts of all options, in the order of their letters A, B, C …
    The answer may be the option's text ("dog"), its letter ("B", "(b)", "B."), or both ("B) dog",
    "B. dog", "B - dog"). Each of them may follow a lead ("Answer: B", "The answer is dog.",
    "Option B") or be in LaTeX's \\boxed{}. Case, quotation marks, brackets, Markdown's emphasis and
    the marks that end a sentence do not count, nor do typographic and full-width forms.
    What remains must be the whole option: no prefix, no substring (ours; the release compares
    prefixes). Texts are tried before letters, because options may be letters themselves, such as
    musical keys. An answer that is none of the choices, as in some rows of the benchmarks, earns
    nothing.
    Raises ValueError for fewer than two choices.
    """
    options = [choice.strip() for choice in choices]
    if len(options) < 2:
        raise ValueError(f"choices is {list(choices)}: a multiple-choice question has at least two "
                         "options")
    predicted = extract_answer(completion, format_style)
    chosen = None if predicted is None else chosen_option(predicted, options)
    return float(chosen is not None and options[chosen] == answer.strip())


def chosen_option(predicted, options):
    """The index of the option that `predicted` names in a form of accuracy_reward, or None.

    options: stripped texts. A text names the first of several equal options.
    """
    while True:
        index, is_text = _option_of_text(predicted, options)
        if is_text:
            return index
        index = _option_of_letter(predicted, options)
        if index is not None:
            return index
        inner = _LEAD.fullmatch(predicted) or _LATEX.fullmatch(predicted)
        if not inner:
            return None
        predicted = inner[1].strip()


# "Answer: …", "The correct answer is …", "**Option** …": with or without a colon
_LEAD = re.compile(r"[\W_]*(?:(?:the|my)\s+)?(?:(?:final|correct|right|best)\s+)?"
                   r"(?:answer|option|choice)(?:\s+is)?(?![^\W_])[\s*_]*[:：=]?[\s*_]*(\S.*)",
                   re.I | re.S)
_LATEX = re.compile(r"[\s$*\[(\\]*\\(?:boxed|text|textbf|mathbf|mathrm)\s*\{(.*)\}"
                    r"[\s$*\])\\.]*", re.S)
_LABELLED = re.compile(r"([A-ZＡ-Ｚ])(?:[).:\]*_）．：］、]+\s*|\s+[-–—]\s+)(\S.*)", re.I | re.S)


def _option_of_letter(text, options):
    """The index of the option that a letter names, alone or before the option's text, or None."""
    letter, rest = _normalise(text), ""
    labelled = _LABELLED.fullmatch(text.strip().lstrip(_AROUND))
    if labelled and len(letter) > 1:
        letter, rest = _normalise(labelled[1]), labelled[2]
    if not re.fullmatch("[a-z]", letter) or ord(letter) - ord("a") >= len(options):
        return None
    index = ord(letter) - ord("a")
    if rest:
        of_rest, _ = _option_of_text(rest, options)
        if of_rest is None or options[of_rest] != options[index]:
            return None
    return index


def _option_of_text(text, options):
    """→ (index of the option that `text` equals, or None; does it equal any option at all?).

    An option word for word is itself. Otherwise the most tolerant comparison comes first. Where it
    finds different options ("c" of "C" and "c", "Help" of "Help" and "Help!"), a stricter one
    decides. If none finds exactly one, the text names no option.
    """
    if text.strip() in options:
        return options.index(text.strip()), True
    for normalise in (_normalise,
                      lambda x: _normalise(x, fold_case=False),
                      lambda x: _normalise(x, strip_marks=False),
                      lambda x: _normalise(x, fold_case=False, strip_marks=False)):
        wanted = normalise(text)
        equal = [option for option in options if normalise(option) == wanted]
        if len(set(equal)) == 1:
            return options.index(equal[0]), True
        if not equal and normalise is _normalise:
            return None, False
    return None, True


# Marks around an answer that do not change its meaning: quotes, brackets, Markdown, and at the end
# those of a sentence. Not among them: the # of C#, the sign of −3 dB, %, $.
_AROUND = "\"'`“”‘’«»「」『』【】《》〈〉()[]{}（）［］｛｝＂＇*_ "
_AT_END = _AROUND + ".,;:!?。、…"
# Typographic apostrophes, quotes and dashes → plain ones.
_PLAIN = str.maketrans("‘’‚‛ʼ′“”„‟″«»‐‒–—―−", "'" * 6 + '"' * 7 + "-" * 6)


def _normalise(text, fold_case=True, strip_marks=True):
    # Full-width forms become plain. NFKC of the whole text would also turn 10² into 102.
    if not text.isascii():
        text = "".join(
            unicodedata.normalize("NFKC", c) if unicodedata.east_asian_width(c) in "FH" else c
            for c in unicodedata.normalize("NFC", text)).translate(_PLAIN)
    if fold_case:
        text = unicodedata.normalize("NFC", text.casefold())
    text = " ".join(text.split())
    stripped = text.lstrip(_AROUND).rstrip(_AT_END) if strip_marks else ""
    return stripped or text  # an option "?" is not stripped to nothing


# ──────── r_format: format ────────


def format_reward(completion, format_style="think", prefilled=None):
    """r_format: 1.0 if the completion keeps to its format, else 0.0.  (Sec. 4; Appendix G)

    "think": one <think> block that is not empty, nothing before it, an answer after it. The answer
    may be in an <answer> block: many models have learnt that, and it does no harm (ours).
    `prefilled`: True if the chat template has opened the block, so that the completion must not
    open it again; False if the completion must open it; None if the caller does not know: both
    count.
    "reasoning": one <reasoning> block, then one <answer> block, neither empty, nothing outside.
    `prefilled` is not used.
    """
    text = completion.strip()
    if split_completion(text, format_style) is None:
        return 0.0
    if format_style == "reasoning":
        tags = ("<reasoning>", "</reasoning>", "<answer>", "</answer>")
        once = all(text.count(tag) == 1 for tag in tags)
        whole = "<reasoning>.*</reasoning>\\s*<answer>.*</answer>"
        return float(once and re.fullmatch(whole, text, re.S) is not None)
    opened = text.count("<think>")
    may_open = {True: opened == 0, False: opened == 1, None: opened <= 1}[prefilled]
    starts_right = opened == 0 or text.startswith("<think>")
    return float(may_open and text.count("</think>") == 1 and starts_right)


def think_is_prefilled(tokenizer, prompt):
    """Does the chat template open the thinking block, so that the completion starts inside it?

    prompt: a model.Prompt.
    """
    return tokenizer.decode(prompt.text_ids[-8:]).rstrip().endswith("<think>")


def extract_answer(completion, format_style="think"):
    """The answer in a completion, stripped; None if the format's block is missing or it is empty.

    "think": what follows the last </think>; if that holds one <answer> block, the inside of it.
    "reasoning": the inside of the last <answer> block.
    """
    parts = _parts(completion, format_style)
    return (parts[1] or None) if parts else None


def split_completion(completion, format_style="think"):
    """→ (thinking, answer), both stripped and not empty, or None.

    As tolerant of text around them as extract_answer.
    """
    parts = _parts(completion, format_style)
    return parts if parts and all(parts) else None


def _parts(completion, format_style):
    """→ (thinking, answer), stripped, either may be empty; None if no place for an answer."""
    if format_style == "think":
        thinking, end, answer = completion.rpartition("</think>")
        thinking = thinking.strip().removeprefix("<think>").strip()
        if answer.count("<answer>") == answer.count("</answer>") == 1:
            block = re.search("<answer>(.*)</answer>", answer, re.S)
            answer = block[1] if block else answer
        return (thinking, answer.strip()) if end else None
    if format_style == "reasoning":
        before, start, rest = completion.rpartition("<answer>")
        answer, end, _ = rest.partition("</answer>")
        thinking, closed, _ = before.rpartition("</reasoning>")
        thinking = thinking.strip().removeprefix("<reasoning>").strip() if closed else ""
        return (thinking, answer.strip()) if start and end else None
    raise ValueError(f"format_style is {format_style!r}; choose \"think\" or \"reasoning\"")


# ──────── r_cons: consistency ────────

# The paper's own text (arXiv 2605.27741, Appendix B; CC BY 4.0, by its authors), verbatim. The line
# breaks around the two fields are the paper's, the others ours.
CHECKER_PROMPT = """\
You are a reasoning consistency evaluator. Given a model’s thinking process and its final answer, \
your task is to evaluate it against two specific failure modes.

Thinking Process:
{think_text}

Final Answer:
{answer_text}

Respond “NO” ONLY if at least one of the following is true:
1. The conclusion reached in the thinking process does not agree with or contradicts the final \
answer.
2. The thinking process is visibly incomplete or cut off prematurely.

If neither of these failure modes is present, respond “YES”. Only output YES or NO."""

FIRST_WAIT = 1.0  # seconds before the second attempt; later waits double up to LONGEST_WAIT (ours)
LONGEST_WAIT = 30.0
ATTEMPTS = 5  # of one request (ours)
UNREADABLE = 0.02  # share of a batch whose verdicts may be unreadable before the run stops (ours)


def check_consistency(texts, config, checker=None, given_up=None):
    """r_cons of each completion of a run (Appendix B), as its config asks for.

    checker: the server.Server that was started on `config.checker`, if there is one. With λ_cons 0
    no checker is asked; the rewards are 0 and the metrics say null. None stands for a verdict that
    could not be read, as in consistency_rewards. given_up: an event that ends the asking early.
    """
    style = config.format_style
    if config.reward_weights[2] == 0:
        return [0.0] * len(texts)
    if config.checker == "rule":
        return rule_consistency_rewards(texts, style)
    if checker is None:
        return consistency_rewards(texts, url=config.checker, model=config.checker_model,
                                   format_style=style, given_up=given_up,
                                   api_key=os.environ.get("CHECKER_API_KEY"))
    while True:
        checker.wait()
        try:
            rewards = consistency_rewards(texts, url=f"{checker.url}/v1",
                                          model=config.checker_model, format_style=style,
                                          given_up=given_up, api_key=checker.key,
                                          trust_env=checker.trust_env)
            checker.deaths = 0
            return rewards
        except CheckerError as error:
            if checker.answers():
                raise
            checker.recover(f"ended ({error})")


def consistency_rewards(completions, *, url, model, api_key=None, format_style="think",
                        max_in_flight=32, timeout=60.0, trust_env=True, given_up=None):
    """r_cons of each completion, in order: the checker's YES is 1.0, its NO 0.0.  (Appendix B)

    The verdict is the first word of the reply. A reply that starts otherwise is asked for once
    more, at temperature 1 with a random seed; if that one cannot be read either, the result is
    None, which counts 0. More than one None that are also more than 2 % of the batch end the run,
    and so does one of a single completion.  (ours)

    url: base of an OpenAI-compatible server, such as "http://host:8000/v1"; model: the name of the
    checker there (paper: Qwen3-30B-A3B-Instruct); max_in_flight: requests at a time; timeout:
    seconds of one request; trust_env: use http_proxy and similar variables; given_up: an event
    that ends the asking early.
    A completion without thinking or without an answer is "visibly incomplete" (failure mode 2): it
    gets 0.0 without a request. Transport faults and HTTP 408, 409, 429 and 5xx are tried again,
    ATTEMPTS times in all, with growing waits.
    Raises CheckerError if they do not pass, at once for any other status, and for too many replies
    that cannot be read. A checker that fails never counts as 0.
    """
    endpoint = url.rstrip("/") + "/chat/completions"
    given_up = given_up or threading.Event()  # after a failure the other requests stop trying
    ask = retrying(given_up)
    unreadable = []  # replies

    def score(completion):
        parts = split_completion(completion, format_style)
        if parts is None:
            return 0.0
        if given_up.is_set():
            raise CheckerError(f"the checker at {endpoint} was given up")
        prompt = CHECKER_PROMPT.format(think_text=parts[0], answer_text=parts[1])
        # Greedy first. The second seed is random, so that a resumed run does not get the same
        # reply again.
        for sampling in ({}, {"temperature": 1, "seed": secrets.randbelow(2**31)}):
            reply = request(prompt, sampling)
            first_word = (reply.split() or [""])[0]
            verdict = re.fullmatch(r"[\W_]*(YES|NO)[\W_]*", first_word, re.I)
            if verdict:
                return 1.0 if verdict[1].upper() == "YES" else 0.0
        unreadable.append(reply)
        return None

    def request(prompt, sampling):
        try:
            return ask(chat_reply, client, endpoint, model, prompt, 8, "checker", CheckerError,
                       **sampling)
        except PassingFault as fault:
            raise CheckerError(f"the checker at {endpoint} gave no verdict in {ATTEMPTS} attempts; "
                               f"last fault: {fault}") from fault

    # A line break in a key would be printed in an error.
    headers = {"Authorization": f"Bearer {api_key.strip()}"} if api_key else {}
    limits = httpx.Limits(max_connections=max_in_flight, max_keepalive_connections=max_in_flight)
    with (httpx.Client(headers=headers, timeout=timeout, limits=limits,
                       trust_env=trust_env) as client,
          ThreadPoolExecutor(max_in_flight, thread_name_prefix="checker") as pool):
        futures = [pool.submit(score, completion) for completion in completions]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
            for future in futures:
                if future.done():
                    future.result()  # raises the first failure, before those it causes
            rewards = [future.result() for future in futures]
        finally:
            given_up.set()
            pool.shutdown(wait=False, cancel_futures=True)
    allowed = max(1, UNREADABLE * len(rewards)) if len(rewards) > 1 else 0
    if len(unreadable) > allowed:
        raise CheckerError(f"the checker at {endpoint} gave no readable verdict on "
                           f"{len(unreadable)} of {len(rewards)} completions, asked twice each; it "
                           f"replied {unreadable[0][:200]!r}, but the first word must be YES or NO")
    return rewards


def rule_consistency_rewards(completions, format_style="think"):
    """r_cons by a rule in place of the checker, for the toy.  (ours)

    1.0 if the thinking ends in a full stop (it is not cut off) and its last words are the answer
    (it does not contradict it): the two failure modes of Appendix B.
    """
    rewards = []
    for completion in completions:
        thinking, answer = split_completion(completion, format_style) or ("", "")
        conclusion, words = _normalise(thinking), _normalise(answer)
        agrees = bool(words) and f" {conclusion}".endswith(f" {words}")
        rewards.append(float(agrees and thinking.rstrip().endswith(".")))
    return rewards


class CheckerError(RuntimeError):
    """The checker gave no verdict: one line with its address and the last fault or a reply."""


# ──────── a chat client, shared by checker and judge ────────


def chat_reply(client, endpoint, model, prompt, max_tokens, who, error_class, **sampling):
    """One chat completion of an OpenAI-compatible server → the text of the reply.

    It is greedy unless `sampling` has another temperature, and a seed. `who` names the server in
    errors. Raises PassingFault when another attempt may help, else error_class, with one line.
    """
    body = {"model": model, "messages": [{"role": "user", "content": prompt}], "temperature": 0,
            "max_tokens": max_tokens, **sampling}
    try:
        response = client.post(endpoint, json=body)
    except (httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
        raise error_class(f"the {who}'s address {endpoint} is not an http address: "
                          f"{error}") from error
    except httpx.TransportError as fault:
        raise PassingFault(f"{type(fault).__name__}: {fault}") from fault
    status, text = response.status_code, response.text[:200]
    if passing_status(status):
        raise PassingFault(f"HTTP {status}: {text!r}")
    if status != 200:
        raise error_class(f"the {who} at {endpoint} refused: HTTP {status}: {text!r}")
    try:
        return response.json()["choices"][0]["message"]["content"].strip()
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise error_class(f"the {who} at {endpoint} sent no chat completion: {text!r}") from error


def retrying(given_up=None):
    """Calls a function again after each PassingFault, ATTEMPTS times in all, with growing waits.

    → tenacity.Retrying. given_up: an event that ends the waiting and the attempts early.
    """
    given_up = given_up or threading.Event()
    return tenacity.Retrying(
        retry=tenacity.retry_if_exception_type(PassingFault), reraise=True,
        stop=tenacity.stop_any(tenacity.stop_after_attempt(ATTEMPTS),
                               tenacity.stop_when_event_set(given_up)),
        wait=(tenacity.wait_exponential(multiplier=FIRST_WAIT, max=LONGEST_WAIT)
              + tenacity.wait_random(0, FIRST_WAIT)),
        sleep=tenacity.sleep_using_event(given_up))


def passing_status(status):
    """Is this HTTP status a fault that may pass?"""
    return status in (408, 409, 429) or status >= 500


class PassingFault(Exception):
    """A fault that may pass: worth another attempt."""
