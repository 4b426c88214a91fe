"""The rewards: accuracy and format case by case, consistency against a server on localhost."""

import json
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import rewards
from rewards import (CHECKER_PROMPT, CheckerError, accuracy_reward, consistency_rewards,
                     extract_answer, format_reward, split_completion, total_reward)

# ──────── the sum, Eq. 6 ────────


def test_total_reward_is_the_weighted_sum():
    assert total_reward(1.0, 1.0, 1.0) == 4.0  # weights 2, 1, 1
    assert total_reward(1.0, 0.0, 0.0) == 2.0
    assert total_reward(0.0, 1.0, 0.5) == 1.5
    assert total_reward(1.0, 10.0, 100.0, weights=(3, 5, 7)) == 753.0


@pytest.mark.parametrize("bad", [None, float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["accuracy", "format", "consistency"])
def test_a_missing_reward_is_an_error(name, bad):
    with pytest.raises(ValueError, match=name):
        total_reward(**{"accuracy": 1.0, "format": 1.0, "consistency": 1.0, name: bad})


def test_total_reward_needs_three_weights():
    with pytest.raises(ValueError):
        total_reward(1.0, 1.0, 1.0, weights=(2, 1))


# ──────── parsing ────────


@pytest.mark.parametrize("style, completion, answer, parts", [
    ("think", "<think>It barks.</think>\n a dog \n", "a dog", ("It barks.", "a dog")),
    # Here the template has opened the block.
    ("think", "It barks.\n</think>\n\na dog", "a dog", ("It barks.", "a dog")),
    ("think", "<think></think>a dog", "a dog", None),
    ("think", "<think>It barks.</think>  ", None, None),
    ("think", "<think>It barks and", None, None),  # cut off
    ("think", "a dog", None, None),
    ("think", "", None, None),
    ("think", "a</think>b</think>c", "c", ("a</think>b", "c")),
    ("think", "<reasoning>r</reasoning><answer>a dog</answer>", None, None),
    ("think", "<think>r</think>\n<answer>\n a dog </answer>", "a dog", ("r", "a dog")),
    ("think", "r</think>It is <answer>a dog</answer>.", "a dog", ("r", "a dog")),
    ("think", "<answer>a cat</answer></think><answer>a dog</answer>", "a dog",
     ("<answer>a cat</answer>", "a dog")),
    ("think", "r</think><answer> </answer>", None, None),
    ("think", "r</think><answer>B</answer><answer>C</answer>",  # not one block, so it is text
     "<answer>B</answer><answer>C</answer>", ("r", "<answer>B</answer><answer>C</answer>")),
    ("think", "r</think><answer>a dog", "<answer>a dog", ("r", "<answer>a dog")),
    ("think", "r</think></answer>a dog<answer>", "</answer>a dog<answer>",
     ("r", "</answer>a dog<answer>")),
    ("reasoning", "<reasoning>It barks.</reasoning>\n<answer> a dog </answer>", "a dog",
     ("It barks.", "a dog")),
    ("reasoning", "<answer>a dog</answer>", "a dog", None),
    ("reasoning", "<reasoning>It barks.</reasoning><answer>a dog", None, None),
    ("reasoning", "<reasoning>It barks.</reasoning><answer> </answer>", None, None),
    ("reasoning", "<reasoning>It barks.<answer>a dog</answer>", "a dog", None),
    ("reasoning", "<reasoning>r</reasoning><answer>a cat</answer><answer>a dog</answer>", "a dog",
     ("r", "a dog")),
    ("reasoning", "<think>r</think>a dog", None, None),
])
def test_a_completion_is_split_into_thinking_and_answer(style, completion, answer, parts):
    assert extract_answer(completion, style) == answer
    assert split_completion(completion, style) == parts


@pytest.mark.parametrize("call", [extract_answer, split_completion, format_reward])
def test_an_unknown_style_is_an_error(call):
    with pytest.raises(ValueError, match="xml"):
        call("a</think>b", format_style="xml")


# ──────── accuracy ────────

ANIMALS = ["a seal", "a dog", "a cat"]
KEYS = ["B", "C", "A", "a"]
PAIRS = ["Help", "Help!", "C#", "C", "−3 dB", "3 dB", "x²", "x2"]


def accuracy(predicted, answer, choices, **style):
    return accuracy_reward(f"Some thinking.</think>\n{predicted}", answer, choices, **style)


def accuracies(predicted, choices):
    """The reward of one answer with each option in turn as the right one."""
    return [accuracy(predicted, choice, choices) for choice in choices]


@pytest.mark.parametrize("predicted", [
    "a dog", "A dog.", " A  DOG ", "a\ndog", "\"a dog\"", "“a dog”", "**a dog**", "(a dog)",
    "a dog!", "ａ ｄｏｇ",
    "B", "b", "B.", "(b)", "(B)", "B)", "[B]", "**B**", "B:", "'B'",
    "B) a dog", "B. a dog", "(B) A dog.", "b: a dog", "**B. a dog**", "B.a dog", "B - a dog",
    "B – a dog", "**B.** a dog", "(B): a dog", "‘a dog’", "«a dog»", "「a dog」",
    "Ｂ", "（Ｂ）", "Ｂ．a dog", "B：a dog", "（B）ａ dog",
    "Answer: B", "answer: b", "Answer: a dog", "**Answer:** B", "**Answer**: a dog", "Answer：B",
    "The answer is B.", "the answer is B", "The answer is: B", "The answer is a dog.",
    "The correct answer is (B) a dog.", "My final answer is \"a dog\".", "Final Answer:\n\nB",
    "Option B", "option (b)", "Option B: a dog", "The answer is option B.", "### Answer: B",
    "\\boxed{B}", "$\\boxed{B}$", "\\boxed{a dog}", "\\boxed{\\text{B}}",
    "\\[\\boxed{ B. a dog }\\]", "The answer is $\\boxed{B}$.", "**The answer is B.**",
    "<answer>B</answer>", "<answer>\nThe answer is a dog.\n</answer>",
])
def test_right_answers(predicted):
    assert accuracy(predicted, "a dog", ANIMALS) == 1.0


@pytest.mark.parametrize("predicted", [
    "a", "dog", "a do", "a dog barks", "It is a dog", "a seal", "adog",
    "a dog, a cat", "", "...", "A", "C", "D", "Z", "BB", "1", "2", "é", "ß", "B or C", "B, C",
    "B a dog", "A) a dog", "B) a cat", "B) dog", "B) a dog or a seal", "A - a dog", "B-dog",
    "Answer:", "The answer is", "Answer: dog", "The answer is not B", "The answer isn't B",
    "The answer is B or C", "Answer: B\n\nIt barks.", "The answers: B", "Options A and B",
    "Answer: A) a dog", "\\boxed{A}", "\\boxed{}", "\\boxed{A} or \\boxed{B}", "\\boxed{B} or C",
    "<answer>A</answer><answer>B</answer>", "I think it is B", "a dog is the answer",
])
def test_wrong_answers(predicted):
    assert accuracy(predicted, "a dog", ANIMALS) == 0.0


@pytest.mark.parametrize("predicted, answer", [
    ("The answer is A.", "delayed"), ("The answer is a", "delayed"), ("A", "delayed"),
    ("The answer is the.", "the"), ("The answer is a meeting.", None), ("I", None), ("a the", None),
    ("The answer is an accident", None)])
def test_a_letter_is_no_article_and_no_pronoun(predicted, answer):
    """A single letter is that of an option; a letter before a word names nothing."""
    words = ["delayed", "meeting", "accident", "the"]
    assert accuracies(predicted, words) == [float(word == answer) for word in words]


@pytest.mark.parametrize("predicted", ["It’s a bell", "It's a bell", "“IT‘S A BELL.”"])
def test_typographic_forms_are_the_same(predicted):
    for option in ("It's a bell", "It’s a bell"):
        assert accuracy(predicted, option, [option, "a drum"]) == 1
    assert accuracy("twenty–two", "twenty-two", ["twenty-two", "2"]) == 1


def test_an_option_that_is_printed_twice():
    """As in some rows of the benchmarks: every way to name either of the two is right."""
    twice = ["twelve", "seven", "twelve", "Seven"]
    for said in ("twelve", "A", "C", "C) twelve", "Answer: twelve"):
        assert accuracy(said, "twelve", twice) == 1 and accuracy(said, "seven", twice) == 0
    assert accuracies("seven", twice) == [0, 1, 0, 0]


def test_an_answer_that_is_none_of_the_options_is_never_right():
    assert not any(accuracy(said, "a cow", ANIMALS) for said in ("a cow", *ANIMALS, "A", "D"))


@pytest.mark.parametrize("predicted, answer", [
    ("B", "B"), ("C", "C"), ("(b)", "B"), ("c.", "C"), ("A", "A"), ("a", "a"), ("A.", "A"),
    ("(a)", "a"), ("Ａ", "A"), ("ａ", "a"),
    ("D", "a"),  # not the text of an option, so the letter of the fourth
    ("A. B", "B"), ("C) A", "A"), ("D) a", "a"), ("d) a.", "a"),
    ("The answer is A.", "A"), ("Answer: a", "a"), ("Option C", "C"), ("\\boxed{B}", "B"),
    ("**A**", "A"), ("D - a", "a"),
])
def test_options_that_are_letters(predicted, answer):
    """Texts are tried before letters."""
    assert accuracies(predicted, KEYS) == [float(key == answer) for key in KEYS]


@pytest.mark.parametrize("predicted", ["E", "C) a", "A. A"])
def test_a_letter_that_names_no_option(predicted):
    assert not any(accuracies(predicted, KEYS))


@pytest.mark.parametrize("predicted, answer", [
    ("Help", "Help"), ("help", "Help"), ("HELP!", "Help!"), ("\"Help\"", None), ("Help.", None),
    ("C#", "C#"), ("c#", "C#"), ("C", "C"), ("C.", "C"), ("−3 dB", "−3 dB"), ("3 db", "3 dB"),
    ("x²", "x²"), ("x2", "x2"), ("X²", "x²"),
    ("B. Help!", "Help!"), ("A. Help", "Help"), ("A. Help!", None), ("G", "x²"),
])
def test_options_that_differ_by_little_are_kept_apart(predicted, answer):
    assert accuracies(predicted, PAIRS) == [float(option == answer) for option in PAIRS]


@pytest.mark.parametrize("said, option", [
    ("102", "10²"), ("x1", "x₁"), ("1", "①"), ("TM", "™"), ("1/2", "½")])
def test_other_characters_are_not_the_option(said, option):
    """Only full-width forms are folded: a superscript, say, is not a digit."""
    assert not accuracy(said, option, [option, "a dog"])
    assert accuracy(option, option, [option, "a dog"])


@pytest.mark.parametrize("said", ["__Answer:__ B", "_Answer_: B", "_The answer is_ B", "【B】",
                                  "B、a seal", "\\(\\mathbf{B}\\)", "Answer: a seal…"])
def test_emphasis_and_brackets_of_other_kinds(said):
    assert accuracy(said, "a seal", ["a dog", "a seal"])


def test_marks_that_have_a_meaning_are_compared():
    assert accuracy("C", "C#", ["C#", "D"]) == 0.0
    assert accuracy("3 dB", "-3 dB", ["-3 dB", "5 dB"]) == 0.0
    assert accuracy("5", ".5", [".5", "1"]) == 0.0
    assert accuracy("?", "?", ["?", "!"]) == 1.0 and accuracy("!", "?", ["?", "dog"]) == 0.0


def test_a_text_that_fits_several_options_is_not_read_as_a_letter():
    assert accuracies("a.", ["A!", "A", "x"]) == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("completion, style, reward", [
    ("a dog", "think", 0), ("<think>a dog", "think", 0), ("<think>r</think>B", "reasoning", 0),
    ("<reasoning>r</reasoning><answer>B</answer>", "reasoning", 1)])
def test_accuracy_needs_the_place_for_an_answer(completion, style, reward):
    assert accuracy_reward(completion, "a dog", ANIMALS, style) == reward


@pytest.mark.parametrize("choices", [[], ["a dog"]])
def test_fewer_than_two_choices_are_an_error(choices):
    with pytest.raises(ValueError, match="at least two"):
        accuracy("a dog", "a dog", choices)


option_texts = st.one_of(st.text("abAB.!()#é² \"", min_size=1, max_size=4),
                         st.text(min_size=1, max_size=8))
option_texts = option_texts.map(str.strip).filter(lambda text: text and "</think>" not in text)


@settings(max_examples=150, deadline=None)
@given(choices=st.lists(option_texts, min_size=2, max_size=5, unique=True), data=st.data())
def test_the_text_of_an_option_names_that_option_alone(choices, data):
    said = data.draw(st.sampled_from(choices))
    assert accuracies(said, choices) == [float(choice == said) for choice in choices]


FORMS = ["{letter}", "({letter})", "{letter}.", "{letter}) {text}", "{letter}. {text}",
         "{letter} - {text}", "{letter}: {text}", "{text}", "**{text}**", "“{text}”"]
LEADS = ["{}", "Answer: {}", "**Answer:** {}", "The answer is {}.", "The correct answer is: {}",
         "\\boxed{{{}}}", "The answer is $\\boxed{{{}}}$.", "<answer>{}</answer>", "Option {}"]
names = st.lists(st.text("bdeg", min_size=2, max_size=4), min_size=1, max_size=3).map(" ".join)
sounds = st.lists(names, min_size=2, max_size=6, unique=True)


@settings(max_examples=200, deadline=None)
@given(choices=sounds, form=st.sampled_from(FORMS), lead=st.sampled_from(LEADS), data=st.data())
def test_every_form_names_its_option(choices, form, lead, data):
    """Each form can follow each lead."""
    index = data.draw(st.integers(0, len(choices) - 1))
    said = lead.format(form.format(letter="ABCDEF"[index], text=choices[index]))
    assert accuracies(said, choices) == [float(i == index) for i in range(len(choices))]


@settings(max_examples=200, deadline=None)
@given(choices=sounds, lead=st.sampled_from(LEADS), data=st.data())
def test_a_part_of_an_option_earns_nothing(choices, lead, data):
    """No proper substring of the right option does, but for a letter that names it."""
    right = data.draw(st.sampled_from(choices))
    start = data.draw(st.integers(0, len(right) - 2))
    part = right[start:data.draw(st.integers(start + 2, len(right)))].strip()
    assume(1 < len(part) < len(right))
    assert accuracy(lead.format(part), right, choices) == 0.0


@settings(max_examples=200, deadline=None)
@given(choices=st.lists(option_texts, min_size=2, max_size=5, unique=True),
       said=st.text(max_size=8))
def test_at_most_one_option_is_right(choices, said):
    assert sum(accuracies(said, choices)) <= 1


@given(words=st.lists(st.sampled_from(["dog", "loud", "bell", "ring"]), min_size=2, max_size=4),
       extra=st.text("abc ", min_size=1))
def test_neither_a_prefix_nor_a_longer_text_is_right(words, extra):
    text = " ".join(words)
    assume(extra.strip())
    assert accuracy(text + extra, text, [text, "something else"]) == 0.0
    assert accuracy(text[:-1], text, [text, "something else"]) == 0.0


# ──────── format ────────


@pytest.mark.parametrize("completion, opened, prefilled", [
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
    ("<think>It barks.</think><answer>a dog</answer>", 1, 0),
    ("It barks.</think><answer>a dog</answer>", 0, 1),
    ("<think>It barks.</think><answer></answer>", 0, 0),
    ("", 0, 0),
])
def test_think_format(completion, opened, prefilled):
    """The two numbers are the rewards with prefilled=False and prefilled=True."""
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
def test_a_completion_in_its_format_has_thinking_and_an_answer(completion):
    for style in ("think", "reasoning"):
        if format_reward(completion, style):
            thinking, answer = split_completion(completion, style)
            assert thinking and answer == extract_answer(completion, style)


@pytest.mark.parametrize("ending, prefilled", [
    ("<think>", True), ("<think>\n", True), ("", False), ("<think>\n\n</think>\n\n", False)])
def test_think_is_prefilled_when_the_prompt_ends_inside_the_block(tokenizer, ending, prefilled):
    """A template may also open and close an empty block, to switch thinking off."""
    text = f"<|im_start|>user\nWhat barks?<|im_end|>\n<|im_start|>assistant\n{ending}"
    prompt = SimpleNamespace(text_ids=tokenizer(text)["input_ids"])
    assert rewards.think_is_prefilled(tokenizer, prompt) == prefilled


def test_a_question_about_the_tag_does_not_open_the_block(tokenizer):
    text = "<|im_start|>user\nWhat is <think>?<|im_end|>\n<|im_start|>assistant\n"
    prompt = SimpleNamespace(text_ids=tokenizer(text)["input_ids"])
    assert not rewards.think_is_prefilled(tokenizer, prompt)


@pytest.fixture(scope="module")
def tokenizer():
    import tiny  # slow to import, and no other test here needs it

    return tiny.qwen3_omni().tokenizer


# ──────── consistency ────────

PROMPT_OF_BARKS = """\
You are a reasoning consistency evaluator. Given a model’s thinking process and its final answer, \
your task is to evaluate it against two specific failure modes.

Thinking Process:
It {barks}.

Final Answer:
a dog

Respond “NO” ONLY if at least one of the following is true:
1. The conclusion reached in the thinking process does not agree with or contradicts the final \
answer.
2. The thinking process is visibly incomplete or cut off prematurely.

If neither of these failure modes is present, respond “YES”. Only output YES or NO."""


@pytest.fixture
def start_checker(monkeypatch):
    """start_checker(reply) starts a Checker; retries wait hardly at all."""
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


class Checker:
    """A chat server on localhost.

    `reply(prompt, n)`, where n counts requests from 0, returns what the server sends: a text, an
    HTTP status, the bytes of a body, or None to drop the connection.
    """

    def __init__(self, reply):
        self.requests, self.in_flight, self.most_in_flight = [], 0, 0
        checker, lock = self, threading.Lock()

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
                if answer is None:
                    self.close_connection = True
                    return self.connection.shutdown(socket.SHUT_RDWR)
                status = answer if isinstance(answer, int) else 200
                if isinstance(answer, str):
                    message = {"role": "assistant", "content": answer}
                    answer = json.dumps({"choices": [{"message": message}]}).encode()
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


def completions(n):
    return [f"<think>It {i}.</think>a dog" for i in range(n)]


def number_in(prompt):
    return int(prompt.split("Thinking Process:\nIt ")[1].split(".")[0])


def ask(texts, checker, **options):
    return consistency_rewards(texts, url=checker.url, model="judge", **options)


def refused_port():
    """A socket that is bound but does not listen, so that its port refuses connections."""
    taken = socket.socket()
    taken.bind(("127.0.0.1", 0))
    return taken


def test_what_a_request_holds(start_checker):
    checker = start_checker(lambda *_: "YES")
    assert ask(["<think>It {barks}.</think>\na dog"], checker, api_key="k3y\n") == [1.0]
    (path, headers, body), = checker.requests
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == "Bearer k3y"
    assert body["model"] == "judge" and body["temperature"] == 0 and 2 <= body["max_tokens"] <= 16
    assert body["messages"] == [{"role": "user", "content": PROMPT_OF_BARKS}]


def test_a_request_without_a_key_has_no_authorization(start_checker):
    checker = start_checker(lambda *_: "YES")
    ask(completions(1), checker)
    (_, headers, _), = checker.requests
    assert "Authorization" not in headers


def test_a_slash_at_the_end_of_the_address_does_no_harm(start_checker):
    checker = start_checker(lambda *_: "YES")
    consistency_rewards(completions(1), url=checker.url + "/", model="judge")
    (path, _, _), = checker.requests
    assert path == "/v1/chat/completions"


def test_the_prompt_is_the_papers():
    """Word for word Appendix B, apart from white space, which the text of the PDF does not keep."""
    assert " ".join(CHECKER_PROMPT.split()) == (
        "You are a reasoning consistency evaluator. Given a model’s thinking process and its final "
        "answer, your task is to evaluate it against two specific failure modes. Thinking Process: "
        "{think_text} Final Answer: {answer_text} Respond “NO” ONLY if at least one of the "
        "following is true: 1. The conclusion reached in the thinking process does not agree with "
        "or contradicts the final answer. 2. The thinking process is visibly incomplete or cut off "
        "prematurely. If neither of these failure modes is present, respond “YES”. Only output YES "
        "or NO.")


def test_rewards_keep_the_order_and_requests_their_bound(start_checker):
    """Later answers arrive before earlier ones; at most max_in_flight requests run at a time."""
    def reply(prompt, n):
        time.sleep(0.002 * (7 * number_in(prompt) % 11))
        return "YES" if number_in(prompt) % 3 else "NO"

    checker = start_checker(reply)
    assert ask(completions(60), checker, max_in_flight=8) == [float(i % 3 > 0) for i in range(60)]
    assert len(checker.requests) == 60
    assert 1 < checker.most_in_flight <= 8


def test_as_many_requests_in_flight_as_allowed(start_checker):
    """The server answers once 12 requests have arrived."""
    together = threading.Barrier(12)
    checker = start_checker(lambda *_: "YES" if together.wait(10) >= 0 else "")
    assert ask(completions(12), checker, max_in_flight=12) == [1.0] * 12
    assert checker.most_in_flight == 12


@pytest.mark.parametrize("reply, reward", [
    ("YES", 1), ("yes", 1), (" Yes.\n", 1), ("“YES”", 1), ("NO", 0), ("no", 0), ("No!", 0),
    ("\nNO. ", 0), ("**NO**", 0), ("YES, because it barks", 1), ("**No** – it contradicts", 0),
    ("YES or NO", 1)])
def test_verdicts(start_checker, reply, reward):
    assert ask(completions(1), start_checker(lambda *_: reply)) == [reward]


@pytest.mark.parametrize("reply", ["MAYBE", "", "NOT", "YESNO", "YES/NO", "The answer is YES", "1",
                                   "<think>"])
def test_another_reply_is_an_error_that_quotes_it(start_checker, reply):
    """The verdict is the first word. One completion alone is more than 2 % of the batch."""
    checker = start_checker(lambda *_: reply)
    with pytest.raises(CheckerError) as error:
        ask(completions(1), checker)
    assert repr(reply) in str(error.value) and checker.url in str(error.value)
    assert "\n" not in str(error.value) and len(checker.requests) == 2


def test_an_unreadable_reply_is_asked_for_again_with_another_seed(start_checker):
    """Greedy first. A second run does not ask with the same seed, so it can get another reply."""
    checker = start_checker(lambda prompt, n: "NO" if n % 2 else "The answer is NO")
    for _ in range(3):
        assert ask(completions(1), checker) == [0.0]
    bodies = [body for _, _, body in checker.requests]
    assert [body["temperature"] for body in bodies] == [0, 1] * 3
    assert ["seed" in body for body in bodies] == [False, True] * 3
    assert len({body["seed"] for body in bodies[1::2]}) == 3


@pytest.mark.parametrize("count, unreadable, passes", [
    (8, 1, True), (8, 2, False), (50, 1, True), (99, 2, False), (100, 2, True), (100, 3, False),
    (2, 1, True), (1, 1, False)])
def test_few_unreadable_verdicts_are_none_and_many_an_error(start_checker, count, unreadable,
                                                            passes):
    """More than one, and more than 2 % of the batch, end the run."""
    checker = start_checker(lambda prompt, n: "Hm" if number_in(prompt) < unreadable else "YES")
    if passes:
        readable = count - unreadable
        assert ask(completions(count), checker) == [None] * unreadable + [1.0] * readable
    else:
        with pytest.raises(CheckerError, match=f"on {unreadable} of {count} completions"):
            ask(completions(count), checker)
    assert len(checker.requests) == count + unreadable


@pytest.mark.parametrize("body", [
    b"<html>", b"{}", b"[]", b'{"choices": []}', b'{"choices": [{"message": {"content": null}}]}'])
def test_a_body_that_is_not_a_chat_completion_is_an_error(start_checker, body):
    checker = start_checker(lambda *_: body)
    with pytest.raises(CheckerError, match="no chat completion"):
        ask(completions(1), checker)
    assert len(checker.requests) == 1


def test_an_incomplete_completion_gets_0_without_a_request(start_checker):
    checker = start_checker(lambda *_: "YES")
    incomplete = ["<think>It ba", "<think>It barks.</think>", "a dog", "", "<think></think>a dog"]
    assert ask([*incomplete, "It barks.</think>a dog"], checker) == [0.0] * len(incomplete) + [1.0]
    assert len(checker.requests) == 1


def test_no_completions_give_no_rewards(start_checker):
    assert ask([], start_checker(lambda *_: "YES")) == []


def test_completions_in_the_reasoning_format(start_checker):
    checker = start_checker(lambda *_: "YES")
    completion = "<reasoning>It barks.</reasoning><answer>a dog</answer>"
    assert ask([completion, "It barks.</think>a dog"], checker,
               format_style="reasoning") == [1.0, 0.0]
    assert len(checker.requests) == 1


# ──────── faults of the checker ────────


@pytest.mark.parametrize("fault", [408, 409, 429, 500, 502, 503, None])
def test_a_passing_fault_is_tried_again(start_checker, fault, monkeypatch):
    monkeypatch.setattr(rewards, "ATTEMPTS", 3)
    checker = start_checker(lambda prompt, n: fault if n < 2 else "NO")
    assert ask(completions(1), checker) == [0.0]
    assert len(checker.requests) == 3


def test_faults_of_some_requests_do_not_disturb_the_others(start_checker):
    seen, lock = set(), threading.Lock()

    def reply(prompt, n):
        number = number_in(prompt)
        with lock:
            first = number not in seen
            seen.add(number)
        if first:
            return 503 if number % 2 else None
        return "YES" if number % 3 else "NO"

    checker = start_checker(reply)
    assert ask(completions(30), checker) == [float(i % 3 > 0) for i in range(30)]
    assert len(checker.requests) == 60


@pytest.mark.parametrize("fault, text", [(503, "HTTP 503"), (None, "RemoteProtocolError")])
def test_a_fault_that_does_not_pass_is_an_error(start_checker, fault, text, monkeypatch):
    monkeypatch.setattr(rewards, "ATTEMPTS", 4)
    checker = start_checker(lambda *_: fault)
    with pytest.raises(CheckerError, match="in 4 attempts") as error:
        ask(completions(1), checker)
    assert checker.url in str(error.value) and text in str(error.value)
    assert "\n" not in str(error.value)
    assert len(checker.requests) == 4


def test_the_first_error_ends_the_other_requests(start_checker, monkeypatch):
    """It does not wait for those that would try again in 20 seconds."""
    monkeypatch.setattr(rewards, "FIRST_WAIT", 20.0)
    replies = {0: 503, 1: 503, 2: 503, 3: 401}
    checker = start_checker(lambda prompt, n: replies.get(number_in(prompt), "YES"))
    started = time.monotonic()
    with pytest.raises(CheckerError, match="401"):
        ask(completions(500), checker, max_in_flight=4)
    assert time.monotonic() - started < 5
    assert len(checker.requests) < 100


def test_a_run_that_ends_gives_the_checker_up(start_checker, monkeypatch):
    """The event ends the waits for another attempt, and no further completion is asked about."""
    monkeypatch.setattr(rewards, "FIRST_WAIT", 20.0)
    over, started = threading.Event(), time.monotonic()
    checker = start_checker(lambda prompt, n: over.set() or 503)
    with pytest.raises(CheckerError):
        ask(completions(500), checker, max_in_flight=4, given_up=over)
    assert time.monotonic() - started < 5 and len(checker.requests) <= 8


def test_a_refused_connection_is_an_error(monkeypatch):
    monkeypatch.setattr(rewards, "FIRST_WAIT", 0.01)
    monkeypatch.setattr(rewards, "ATTEMPTS", 2)
    with refused_port() as port:
        url = f"http://127.0.0.1:{port.getsockname()[1]}/v1"
        with pytest.raises(CheckerError, match=f"{url}.*ConnectError"):
            consistency_rewards(completions(3), url=url, model="judge")


def test_a_reply_that_takes_too_long_is_asked_for_again(start_checker):
    def reply(prompt, n):
        time.sleep(0.6 * (n == 0))
        return "YES" if n else "NO"

    checker = start_checker(reply)
    assert ask(completions(1), checker, timeout=0.2) == [1.0]
    assert len(checker.requests) == 2


@pytest.mark.parametrize("status", [400, 401, 403, 404, 422, 302])
def test_any_other_status_is_an_error_at_once(start_checker, status):
    checker = start_checker(lambda *_: status)
    with pytest.raises(CheckerError, match=f"{checker.url}.*HTTP {status}.*no luck"):
        ask(completions(1), checker)
    assert len(checker.requests) == 1


@pytest.mark.parametrize("url", ["localhost:8000/v1", "ftp://127.0.0.1/v1", "http://host:port/v1"])
def test_an_address_that_is_not_http_is_an_error_at_once(url):
    with pytest.raises(CheckerError, match="not an http address"):
        consistency_rewards(completions(2), url=url, model="judge")


def test_a_proxy_is_used_only_if_asked_for(start_checker, monkeypatch):
    """http_proxy names a port that refuses connections."""
    monkeypatch.setattr(rewards, "ATTEMPTS", 1)
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    checker = start_checker(lambda *_: "YES")
    with refused_port() as port:
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{port.getsockname()[1]}")
        assert ask(completions(1), checker, trust_env=False) == [1.0]
        with pytest.raises(CheckerError, match="ConnectError"):
            ask(completions(1), checker)


# ──────── another attempt after a passing fault ────────


def test_waits_double(start_checker, monkeypatch):
    """With up to FIRST_WAIT of jitter in addition."""
    monkeypatch.setattr(rewards, "FIRST_WAIT", 0.05)
    times = []

    def reply(prompt, n):
        times.append(time.monotonic())
        return 503 if n < 3 else "YES"

    assert ask(completions(1), start_checker(reply)) == [1.0]
    first, second, third = (later - earlier for earlier, later in zip(times, times[1:]))
    assert first >= 0.05 and second >= 0.1 and third >= 0.2


def test_retrying_ends_after_the_last_attempt(monkeypatch):
    monkeypatch.setattr(rewards, "FIRST_WAIT", 0.001)
    monkeypatch.setattr(rewards, "ATTEMPTS", 3)
    calls = []

    def fail():
        calls.append(1)
        raise rewards.PassingFault("busy")

    with pytest.raises(rewards.PassingFault, match="busy"):
        rewards.retrying()(fail)
    assert len(calls) == 3


def test_retrying_passes_other_errors_on_at_once():
    calls = []

    def fail():
        calls.append(1)
        raise CheckerError("refused")

    with pytest.raises(CheckerError):
        rewards.retrying()(fail)
    assert len(calls) == 1


def test_retrying_passes_arguments_and_result():
    assert rewards.retrying()(lambda *numbers: sum(numbers), 1, 2, 3) == 6


def test_giving_up_ends_a_wait(monkeypatch):
    monkeypatch.setattr(rewards, "FIRST_WAIT", 20.0)
    given_up, calls = threading.Event(), []

    def fail():
        calls.append(1)
        threading.Timer(0.05, given_up.set).start()
        raise rewards.PassingFault("busy")

    started = time.monotonic()
    with pytest.raises(rewards.PassingFault):
        rewards.retrying(given_up)(fail)
    assert time.monotonic() - started < 5 and len(calls) <= 2


@pytest.mark.parametrize("status, passes", [
    (408, True), (409, True), (429, True), (500, True), (599, True),
    (200, False), (302, False), (400, False), (404, False), (499, False)])
def test_statuses_that_may_pass(status, passes):
    assert rewards.passing_status(status) is passes


# ──────── the checker of a run ────────


def run_config(checker="", weights=(2, 1, 1), style="think"):
    """The fields of TrainConfig that check_consistency reads."""
    return SimpleNamespace(checker=checker, reward_weights=list(weights), format_style=style,
                           checker_model="judge")


class OwnServer:
    """What check_consistency needs of server.Server, in front of a Checker.

    healthy: what answers() says until recover() is called.
    """

    def __init__(self, checker, healthy=True):
        self.url, self.key, self.trust_env = checker.url.removesuffix("/v1"), "own-key", False
        self.healthy, self.deaths, self.waits, self.recovered = healthy, 1, 0, []

    def wait(self):
        self.waits += 1

    def answers(self):
        return self.healthy

    def recover(self, fault):
        assert not self.recovered, "it was started again twice"
        self.recovered.append(fault)
        self.healthy = True


def test_no_checker_is_asked_when_its_weight_is_0():
    config = run_config("http://127.0.0.1:9/v1", weights=(2, 1, 0))
    assert rewards.check_consistency(completions(3), config) == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("style, completion", [
    ("think", "<think>It is a bell.</think> bell"),
    ("reasoning", "<reasoning>It is a bell.</reasoning><answer>bell</answer>")])
def test_a_run_may_use_the_rule(style, completion):
    config = run_config("rule", style=style)
    assert rewards.check_consistency([completion, "bell"], config) == [1.0, 0.0]


def test_a_run_may_use_a_server_of_others(start_checker, monkeypatch):
    """With its model's name, and the key in CHECKER_API_KEY."""
    monkeypatch.setenv("CHECKER_API_KEY", "their-key")
    checker = start_checker(lambda prompt, n: "YES" if number_in(prompt) else "NO")
    assert rewards.check_consistency(completions(2), run_config(checker.url)) == [0.0, 1.0]
    assert {(headers["Authorization"], body["model"])
            for _, headers, body in checker.requests} == {("Bearer their-key", "judge")}


def test_a_run_may_use_its_own_server(start_checker, monkeypatch):
    """With the server's own key. Verdicts end the series of deaths in a row."""
    monkeypatch.setenv("CHECKER_API_KEY", "their-key")
    checker = start_checker(lambda prompt, n: "YES" if number_in(prompt) else "NO")
    server = OwnServer(checker)
    assert rewards.check_consistency(completions(2), run_config("folder"), server) == [0.0, 1.0]
    assert server.waits == 1 and server.deaths == 0 and not server.recovered
    assert {headers["Authorization"] for _, headers, _ in checker.requests} == {"Bearer own-key"}


def test_an_own_server_that_died_is_started_again(start_checker, monkeypatch):
    """Then every completion is asked about anew."""
    monkeypatch.setattr(rewards, "ATTEMPTS", 1)
    checker = start_checker(lambda prompt, n: None if n < 1 else "YES")
    server = OwnServer(checker, healthy=False)
    assert rewards.check_consistency(completions(1), run_config("folder"), server) == [1.0]
    assert server.waits == 2 and len(server.recovered) == 1
    assert "RemoteProtocolError" in server.recovered[0]


def test_an_error_of_an_own_server_that_lives_ends_the_run(start_checker):
    checker = start_checker(lambda *_: "MAYBE")
    server = OwnServer(checker)
    with pytest.raises(CheckerError, match="MAYBE"):
        rewards.check_consistency(completions(1), run_config("folder"), server)
    assert not server.recovered


# ──────── consistency by a rule, for the toy ────────


@pytest.mark.parametrize("completion, score", [
    ("<think> I hear a bell. So the first is a bell.</think> bell", 1.0),
    ("<think>So the first is a bell. </think>Bell", 1.0),
    ("<think>So it is the door bell.</think> door bell", 1.0),
    ("<think>So the first is a bell</think> bell", 0.0),  # cut off: no full stop
    ("<think>So the first is a bell.</think> hum", 0.0),  # a contradiction
    ("<think>So the first is a doorbell.</think> bell", 0.0),  # another word
    ("<think>So the first is a bell.", 0.0),  # no answer
    ("bell", 0.0)])
def test_consistency_by_rule(completion, score):
    """1 if the thinking ends in a full stop and its last words are the answer."""
    assert rewards.rule_consistency_rewards([completion, completion]) == [score, score]
