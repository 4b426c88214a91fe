"""The rewards: accuracy and format case by case, consistency against a real HTTP server on this machine."""

import json
import socket
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import rewards
from rewards import (CHECKER_PROMPT, CheckerError, accuracy_reward, consistency_rewards, extract_answer, format_reward,
                     split_completion, total_reward)

# ─────────────────────────────────────────────────── total ────────────────────────────────────────────────────────────


def test_total_reward():
    assert total_reward(1.0, 1.0, 1.0) == 4.0  # Eq. 6 with 2/1/1
    assert total_reward(1.0, 0.0, 0.0) == 2.0
    assert total_reward(0.0, 1.0, 0.5) == 1.5
    assert total_reward(1.0, 10.0, 100.0, weights=(3, 5, 7)) == 753.0


@pytest.mark.parametrize("bad", [None, float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["accuracy", "format", "consistency"])
def test_a_missing_reward_is_an_error(name, bad):
    with pytest.raises(ValueError, match=name):
        total_reward(**{"accuracy": 1.0, "format": 1.0, "consistency": 1.0, name: bad})


def test_weights_are_three():
    with pytest.raises(ValueError):
        total_reward(1.0, 1.0, 1.0, weights=(2, 1))


# ─────────────────────────────────────────────────── parsing ──────────────────────────────────────────────────────────


@pytest.mark.parametrize("style, completion, answer, parts", [
    ("think", "<think>It barks.</think>\n a dog \n", "a dog", ("It barks.", "a dog")),
    ("think", "It barks.\n</think>\n\na dog", "a dog", ("It barks.", "a dog")),  # the template opened the block
    ("think", "<think></think>a dog", "a dog", None),
    ("think", "<think>It barks.</think>  ", None, None),
    ("think", "<think>It barks and", None, None),  # cut off
    ("think", "a dog", None, None),
    ("think", "", None, None),
    ("think", "a</think>b</think>c", "c", ("a</think>b", "c")),
    ("think", "<reasoning>r</reasoning><answer>a dog</answer>", None, None),
    ("reasoning", "<reasoning>It barks.</reasoning>\n<answer> a dog </answer>", "a dog", ("It barks.", "a dog")),
    ("reasoning", "<answer>a dog</answer>", "a dog", None),
    ("reasoning", "<reasoning>It barks.</reasoning><answer>a dog", None, None),
    ("reasoning", "<reasoning>It barks.</reasoning><answer> </answer>", None, None),
    ("reasoning", "<reasoning>It barks.<answer>a dog</answer>", "a dog", None),
    ("reasoning", "<reasoning>r</reasoning><answer>a cat</answer><answer>a dog</answer>", "a dog", ("r", "a dog")),
    ("reasoning", "<think>r</think>a dog", None, None),
])
def test_parsing(style, completion, answer, parts):
    assert extract_answer(completion, style) == answer
    assert split_completion(completion, style) == parts


@pytest.mark.parametrize("call", [extract_answer, split_completion, format_reward])
def test_an_unknown_style_is_an_error(call):
    with pytest.raises(ValueError, match="xml"):
        call("a</think>b", format_style="xml")


# ────────────────────────────────────────────────── accuracy ──────────────────────────────────────────────────────────

ANIMALS = ["a seal", "a dog", "a cat"]
KEYS = ["B", "C", "A", "a"]
PAIRS = ["Help", "Help!", "C#", "C", "−3 dB", "3 dB", "x²", "x2"]


def accuracy(predicted, answer, choices, **style):
    return accuracy_reward(f"Some thinking.</think>\n{predicted}", answer, choices, **style)


@pytest.mark.parametrize("predicted", [
    "a dog", "A dog.", " A  DOG ", "a\ndog", "\"a dog\"", "“a dog”", "**a dog**", "(a dog)", "a dog!", "ａ ｄｏｇ",
    "B", "b", "B.", "(b)", "(B)", "B)", "[B]", "**B**", "B:", "'B'",
    "B) a dog", "B. a dog", "(B) A dog.", "b: a dog", "**B. a dog**", "B.a dog",
])
def test_right_answers(predicted):
    assert accuracy(predicted, "a dog", ANIMALS) == 1.0


@pytest.mark.parametrize("predicted", [
    "a", "dog", "a do", "a dog barks", "It is a dog", "the answer is B", "a seal", "adog", "a dog, a cat", "", "...",
    "A", "C", "D", "Z", "BB", "1", "2", "é", "ß", "B or C", "B, C", "B a dog", "A) a dog", "B) a cat", "B) dog",
    "B) a dog or a seal",
])
def test_wrong_answers(predicted):
    assert accuracy(predicted, "a dog", ANIMALS) == 0.0


@pytest.mark.parametrize("predicted, answer", [
    ("B", "B"), ("C", "C"), ("(b)", "B"), ("c.", "C"), ("A", "A"), ("a", "a"), ("A.", "A"), ("(a)", "a"),  # texts first
    ("Ａ", "A"), ("ａ", "a"),
    ("D", "a"),  # no text, so a letter: the fourth option
    ("A. B", "B"), ("C) A", "A"), ("D) a", "a"), ("d) a.", "a"),
])
def test_options_that_are_letters(predicted, answer):
    assert [accuracy(predicted, key, KEYS) for key in KEYS] == [float(key == answer) for key in KEYS]


@pytest.mark.parametrize("predicted", ["E", "C) a", "A. A"])
def test_no_option_that_is_a_letter(predicted):
    assert not any(accuracy(predicted, key, KEYS) for key in KEYS)


@pytest.mark.parametrize("predicted, answer", [
    ("Help", "Help"), ("help", "Help"), ("HELP!", "Help!"), ("\"Help\"", None), ("Help.", None),
    ("C#", "C#"), ("c#", "C#"), ("C", "C"), ("C.", "C"), ("−3 dB", "−3 dB"), ("3 db", "3 dB"),
    ("x²", "x²"), ("x2", "x2"), ("X²", None),
    ("B. Help!", "Help!"), ("A. Help", "Help"), ("A. Help!", None), ("G", "x²"),
])
def test_options_that_differ_by_little_are_not_merged(predicted, answer):
    assert [accuracy(predicted, pair, PAIRS) for pair in PAIRS] == [float(pair == answer) for pair in PAIRS]


def test_marks_with_a_meaning_are_compared():
    assert accuracy("C", "C#", ["C#", "D"]) == 0.0
    assert accuracy("3 dB", "-3 dB", ["-3 dB", "5 dB"]) == 0.0
    assert accuracy("5", ".5", [".5", "1"]) == 0.0
    assert accuracy("?", "?", ["?", "!"]) == 1.0 and accuracy("!", "?", ["?", "dog"]) == 0.0


def test_a_text_of_several_options_is_no_letter():
    assert [accuracy("a.", choice, ["A!", "A", "x"]) for choice in ("A!", "A", "x")] == [0.0, 0.0, 0.0]


def test_accuracy_needs_the_block():
    assert accuracy_reward("a dog", "a dog", ANIMALS) == 0.0
    assert accuracy_reward("<think>a dog", "a dog", ANIMALS) == 0.0
    assert accuracy_reward("<reasoning>r</reasoning><answer>B</answer>", "a dog", ANIMALS, "reasoning") == 1.0
    assert accuracy_reward("<think>r</think>B", "a dog", ANIMALS, "reasoning") == 0.0


@pytest.mark.parametrize("answer, choices, message", [
    ("a cow", ANIMALS, "a cow"), ("A DOG", ANIMALS, "A DOG"), ("a dog", ["a dog"], "two"), ("a dog", [], "two"),
    ("a dog", ["a dog", "a dog "], "twice"),
])
def test_bad_questions_are_errors(answer, choices, message):
    with pytest.raises(ValueError, match=message):
        accuracy("a dog", answer, choices)


option_texts = st.one_of(st.text("abAB.!()#é² \"", min_size=1, max_size=4), st.text(min_size=1, max_size=8))
option_texts = option_texts.map(str.strip).filter(lambda text: text and "</think>" not in text)


@settings(max_examples=300, deadline=None)
@given(choices=st.lists(option_texts, min_size=2, max_size=5, unique=True), data=st.data())
def test_the_text_of_an_option_is_that_option_alone(choices, data):
    said = data.draw(st.sampled_from(choices))
    assert [accuracy(said, choice, choices) for choice in choices] == [float(choice == said) for choice in choices]


@settings(max_examples=200, deadline=None)
@given(choices=st.lists(option_texts, min_size=2, max_size=5, unique=True), said=st.text(max_size=8))
def test_at_most_one_option_is_right(choices, said):
    assert sum(accuracy(said, choice, choices) for choice in choices) <= 1


@given(words=st.lists(st.sampled_from(["dog", "loud", "bell", "ring"]), min_size=2, max_size=4),
       extra=st.text("abc ", min_size=1))
def test_no_prefix_and_no_longer_text(words, extra):
    text = " ".join(words)
    assume(extra.strip())
    assert accuracy(text + extra, text, [text, "something else"]) == 0.0
    assert accuracy(text[:-1], text, [text, "something else"]) == 0.0


# ─────────────────────────────────────────────────── format ───────────────────────────────────────────────────────────


@pytest.mark.parametrize("completion, opened, prefilled", [  # the rewards for prefilled=False and True
    ("<think>It barks.</think>a dog", 1, 0),
    (" \n<think>\nIt barks.\n</think>\n\na dog\n", 1, 0),
    ("It barks.</think>a dog", 0, 1),
    ("\nIt barks.\n</think>\n\na dog", 0, 1),
    ("Well. <think>It barks.</think>a dog", 0, 0),
    ("<think>It <think>barks.</think>a dog", 0, 0),
    ("<think>It barks.</think></think>a dog", 0, 0),
    ("<think>a</think><think>b</think>a dog", 0, 0),
    ("It barks.</think>a dog</think>", 0, 0),
    ("<think>It barks.", 0, 0),
    ("It barks.", 0, 0),
    ("<think>It barks.</think> \n", 0, 0),
    ("<think> \n</think>a dog", 0, 0),
    ("</think>a dog", 0, 0),
    ("a dog</think><think>", 0, 0),
    ("", 0, 0),
])
def test_think_format(completion, opened, prefilled):
    assert format_reward(completion, prefilled=False) == opened
    assert format_reward(completion, prefilled=True) == prefilled
    assert format_reward(completion) == max(opened, prefilled)


@pytest.mark.parametrize("completion, reward", [
    ("<reasoning>It barks.</reasoning>\n<answer>a dog</answer>", 1),
    (" <reasoning>\nIt barks.\n</reasoning><answer>\na dog\n</answer>\n", 1),
    ("<answer>a dog</answer><reasoning>It barks.</reasoning>", 0),
    ("So: <reasoning>It barks.</reasoning><answer>a dog</answer>", 0),
    ("<reasoning>It barks.</reasoning><answer>a dog</answer>.", 0),
    ("<reasoning>It barks.</reasoning> thus <answer>a dog</answer>", 0),
    ("<reasoning>a</reasoning><reasoning>b</reasoning><answer>a dog</answer>", 0),
    ("<reasoning>a</reasoning><answer>a cat</answer><answer>a dog</answer>", 0),
    ("<reasoning>a<answer>b</answer></reasoning><answer>a dog</answer>", 0),
    ("<reasoning> </reasoning><answer>a dog</answer>", 0),
    ("<reasoning>a</reasoning><answer></answer>", 0),
    ("<reasoning>a</reasoning>", 0),
    ("<answer>a dog</answer>", 0),
    ("<think>It barks.</think>a dog", 0),
    ("", 0),
])
def test_reasoning_format(completion, reward):
    assert format_reward(completion, "reasoning") == reward


TAGS = ["<think>", "</think>", "<reasoning>", "</reasoning>", "<answer>", "</answer>"]
pieces = st.lists(st.sampled_from([*TAGS, "x", " ", "\n"]), max_size=8).map("".join)


@settings(max_examples=300)
@given(completion=pieces)
def test_a_completion_in_format_parses(completion):
    for style in ("think", "reasoning"):
        if format_reward(completion, style):
            thinking, answer = split_completion(completion, style)
            assert thinking and answer == extract_answer(completion, style)


# ───────────────────────────────────────────────── consistency ────────────────────────────────────────────────────────

PROMPT_OF_BARKS = """\
You are a reasoning consistency evaluator. Given a model’s thinking process and its final answer, your task is to \
evaluate it against two specific failure modes.

Thinking Process:
It {barks}.

Final Answer:
a dog

Respond “NO” ONLY if at least one of the following is true:
1. The conclusion reached in the thinking process does not agree with or contradicts the final answer.
2. The thinking process is visibly incomplete or cut off prematurely.

If neither of these failure modes is present, respond “YES”. Only output YES or NO."""


class Checker:
    """A server. `reply(prompt, n)`, n counting requests from 0, gives a text, an HTTP status, the bytes of a body, or
    None to drop the connection."""

    def __init__(self, reply):
        checker, self.requests, self.in_flight, self.most_in_flight, lock = self, [], 0, 0, threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    number = len(checker.requests)
                    checker.requests.append((self.path, dict(self.headers), body))
                    checker.in_flight += 1
                    checker.most_in_flight = max(checker.most_in_flight, checker.in_flight)
                answer = reply(body["messages"][0]["content"], number)
                with lock:
                    checker.in_flight -= 1
                if answer is None:  # a transport fault
                    self.close_connection = True
                    return self.connection.shutdown(socket.SHUT_RDWR)
                status = answer if isinstance(answer, int) else 200
                if isinstance(answer, str):
                    answer = json.dumps({"choices": [{"message": {"role": "assistant", "content": answer}}]}).encode()
                data = answer if isinstance(answer, bytes) else b"no luck"
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.02,))
        self.thread.start()


@pytest.fixture
def start_checker(monkeypatch):
    monkeypatch.setattr(rewards, "FIRST_WAIT", 0.01)
    started = []

    def start(reply):
        started.append(Checker(reply))
        return started[-1]

    yield start
    for checker in started:
        checker.server.shutdown()
        checker.server.server_close()
        checker.thread.join()


def completions(n):
    return [f"<think>It {i}.</think>a dog" for i in range(n)]


def number_in(prompt):
    return int(prompt.split("Thinking Process:\nIt ")[1].split(".")[0])


def test_what_is_sent(start_checker):
    checker = start_checker(lambda prompt, n: "YES")
    completion = "<think>It {barks}.</think>\na dog"
    assert consistency_rewards([completion], url=checker.url + "/", model="judge", api_key="k3y\n") == [1.0]
    (path, headers, body), = checker.requests
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == "Bearer k3y"
    assert body["model"] == "judge" and body["temperature"] == 0 and 2 <= body["max_tokens"] <= 16
    assert body["messages"] == [{"role": "user", "content": PROMPT_OF_BARKS}]
    assert consistency_rewards(["It {barks}.</think>a dog"], url=checker.url, model="judge") == [1.0]
    assert "Authorization" not in checker.requests[1][1] and checker.requests[1][2] == body


def test_the_prompt_is_the_papers():
    """Word for word Appendix B; white space apart, which the paper's text does not keep."""
    assert " ".join(CHECKER_PROMPT.split()) == (
        "You are a reasoning consistency evaluator. Given a model’s thinking process and its final answer, your task "
        "is to evaluate it against two specific failure modes. Thinking Process: {think_text} Final Answer: "
        "{answer_text} Respond “NO” ONLY if at least one of the following is true: 1. The conclusion reached in the "
        "thinking process does not agree with or contradicts the final answer. 2. The thinking process is visibly "
        "incomplete or cut off prematurely. If neither of these failure modes is present, respond “YES”. Only output "
        "YES or NO.")


def test_order_is_kept_and_requests_overlap_within_the_bound(start_checker):
    def reply(prompt, n):
        time.sleep(0.002 * (7 * number_in(prompt) % 11))  # answers overtake one another
        return "YES" if number_in(prompt) % 3 else "NO"

    checker = start_checker(reply)
    scores = consistency_rewards(completions(60), url=checker.url, model="judge", max_in_flight=8)
    assert scores == [float(i % 3 > 0) for i in range(60)]
    assert len(checker.requests) == 60
    assert 1 < checker.most_in_flight <= 8


def test_as_many_in_flight_as_allowed(start_checker):
    together = threading.Barrier(12)
    checker = start_checker(lambda prompt, n: "YES" if together.wait(10) >= 0 else "")  # replies when 12 are there
    assert consistency_rewards(completions(12), url=checker.url, model="judge", max_in_flight=12) == [1.0] * 12
    assert checker.most_in_flight == 12


@pytest.mark.parametrize("reply, score", [
    ("YES", 1), ("yes", 1), (" Yes.\n", 1), ("“YES”", 1), ("NO", 0), ("no", 0), ("No!", 0), ("\nNO. ", 0),
    ("**NO**", 0)])
def test_verdicts(start_checker, reply, score):
    assert consistency_rewards(completions(1), url=start_checker(lambda *_: reply).url, model="judge") == [score]


@pytest.mark.parametrize("reply", ["MAYBE", "", "YES or NO", "NOT", "YESNO", "YES, because", "The answer is YES", "1"])
def test_another_reply_raises_and_is_quoted(start_checker, reply):
    checker = start_checker(lambda *_: reply)
    with pytest.raises(CheckerError) as error:
        consistency_rewards(completions(1), url=checker.url, model="judge")
    assert repr(reply) in str(error.value) and checker.url in str(error.value)
    assert len(checker.requests) == 1


@pytest.mark.parametrize("body", [
    b"<html>", b"{}", b"[]", b'{"choices": []}', b'{"choices": [{"message": {"content": null}}]}'])
def test_a_body_that_is_no_chat_completion_raises(start_checker, body):
    checker = start_checker(lambda *_: body)
    with pytest.raises(CheckerError, match="no chat completion"):
        consistency_rewards(completions(1), url=checker.url, model="judge")
    assert len(checker.requests) == 1


def test_an_incomplete_completion_scores_0_unasked(start_checker):
    checker = start_checker(lambda *_: "YES")
    scores = consistency_rewards(["<think>It ba", "<think>It barks.</think>", "a dog", "", "<think></think>a dog",
                                  "It barks.</think>a dog"], url=checker.url, model="judge")
    assert scores == [0.0, 0.0, 0.0, 0.0, 0.0, 1.0] and len(checker.requests) == 1
    assert consistency_rewards([], url=checker.url, model="judge") == []
    completion = "<reasoning>It barks.</reasoning><answer>a dog</answer>"
    assert consistency_rewards([completion], url=checker.url, model="judge", format_style="reasoning") == [1.0]


@pytest.mark.parametrize("fault", [408, 409, 429, 500, 502, 503, None])
def test_a_passing_fault_is_tried_again(start_checker, fault):
    checker = start_checker(lambda prompt, n: fault if n < 2 else "NO")
    assert consistency_rewards(completions(1), url=checker.url, model="judge", attempts=3) == [0.0]
    assert len(checker.requests) == 3


def test_faults_among_many(start_checker):
    seen, lock = set(), threading.Lock()

    def reply(prompt, n):
        with lock:
            first = number_in(prompt) not in seen
            seen.add(number_in(prompt))
        return (503 if number_in(prompt) % 2 else None) if first else ("YES" if number_in(prompt) % 3 else "NO")

    checker = start_checker(reply)
    assert consistency_rewards(completions(30), url=checker.url, model="judge") == [float(i % 3 > 0) for i in range(30)]
    assert len(checker.requests) == 60


@pytest.mark.parametrize("fault, text", [(503, "HTTP 503"), (None, "RemoteProtocolError")])
def test_a_checker_that_stays_down_raises(start_checker, fault, text):
    checker = start_checker(lambda *_: fault)
    with pytest.raises(CheckerError) as error:
        consistency_rewards(completions(1), url=checker.url, model="judge", attempts=4)
    assert checker.url in str(error.value) and text in str(error.value) and "\n" not in str(error.value)
    assert len(checker.requests) == 4


def test_one_failure_ends_the_others(start_checker, monkeypatch):
    """With long waits before the second attempt: the first hard failure does not wait for them."""
    monkeypatch.setattr(rewards, "FIRST_WAIT", 20.0)
    checker = start_checker(lambda prompt, n: {0: 503, 1: 503, 2: 503, 3: 401}.get(number_in(prompt), "YES"))
    started = time.monotonic()
    with pytest.raises(CheckerError, match="401"):
        consistency_rewards(completions(500), url=checker.url, model="judge", max_in_flight=4)
    assert time.monotonic() - started < 5
    assert len(checker.requests) < 100


def test_nobody_listens():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, not listening: connections are refused
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/v1"
        with pytest.MonkeyPatch.context() as patch, pytest.raises(CheckerError, match=f"{url}.*ConnectError"):
            patch.setattr(rewards, "FIRST_WAIT", 0.01)
            consistency_rewards(completions(3), url=url, model="judge", attempts=2)


def test_a_slow_checker_times_out_and_is_tried_again(start_checker):
    checker = start_checker(lambda prompt, n: time.sleep(0.6 * (n == 0)) or ("YES" if n else "NO"))
    assert consistency_rewards(completions(1), url=checker.url, model="judge", timeout=0.2) == [1.0]
    assert len(checker.requests) == 2


@pytest.mark.parametrize("status", [400, 401, 403, 404, 422, 302])
def test_another_status_raises_at_once(start_checker, status):
    checker = start_checker(lambda *_: status)
    with pytest.raises(CheckerError, match=f"{checker.url}.*HTTP {status}.*no luck"):
        consistency_rewards(completions(1), url=checker.url, model="judge")
    assert len(checker.requests) == 1


@pytest.mark.parametrize("url", ["localhost:8000/v1", "ftp://127.0.0.1/v1", "http://host:port/v1"])
def test_a_url_that_is_none_raises_at_once(url):
    with pytest.raises(CheckerError, match="address"):
        consistency_rewards(completions(2), url=url, model="judge")


def test_waits_grow(start_checker, monkeypatch):
    monkeypatch.setattr(rewards, "FIRST_WAIT", 0.05)
    times = []
    checker = start_checker(lambda prompt, n: times.append(time.monotonic()) or (503 if n < 3 else "YES"))
    assert consistency_rewards(completions(1), url=checker.url, model="judge") == [1.0]
    first, second, third = (b - a for a, b in zip(times, times[1:]))
    assert first >= 0.05 and second >= 0.1 and third >= 0.2  # doubled, plus up to FIRST_WAIT of jitter


# ────────────────────────────────────────────── the toy's rule for r_cons ─────────────────────────────────────────────


@pytest.mark.parametrize("completion, score", [
    ("<think> I hear a bell. So the first is a bell.</think> bell", 1.0),
    ("<think>So the first is a bell. </think>Bell", 1.0),
    ("<think>So it is the door bell.</think> door bell", 1.0),
    ("<think>So the first is a bell</think> bell", 0.0),  # cut off: no full stop
    ("<think>So the first is a bell.</think> hum", 0.0),  # contradicts
    ("<think>So the first is a doorbell.</think> bell", 0.0),  # another word
    ("<think>So the first is a bell.", 0.0),  # no answer
    ("bell", 0.0)])
def test_consistency_by_rule(completion, score):
    """The thinking ends in a full stop and its last words are the answer."""
    assert rewards.rule_consistency_rewards([completion, completion]) == [score, score]
