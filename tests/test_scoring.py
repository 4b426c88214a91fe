"""scoring.py: cases worked out by hand from the official rules, files in the official formats,
and a judge on a real HTTP server."""

import itertools
import json
import socket
import subprocess
import sys
import threading
import types
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_benchmarks import (mmar_rows, mmau_pro_rows, mmau_rows, mmsu_rows, quirky_files, write)

import rewards
import scoring
from benchmarks import BENCHMARKS, read_benchmark
from data import InputError
from scoring import (JUDGE_PROMPT, MAP_PROMPT, JudgeError, ask_judge, closed_choice, map_to_option,
                     mmsu_letter, parse_judge, score, string_match)

ROOT = Path(__file__).resolve().parents[1]


def test_scoring_and_data_import_no_transformers():
    """So both run beside the old transformers that NV-Embed-v2 needs."""
    code = "import sys, benchmarks, data, scoring; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


# ──────── string match ────────

PETS = ["a dog", "a seal", "a cat"]
YES_NO = ["Yes", "No"]
COUNTS = ["one", "two", "twenty two", "2"]
DUCKS = ["duck", "duck and goose", "goose"]
DASHED = ["high-pitched whistle", "low-pitched whistle", "a hum"]
TWINS = ["Rain!", "rain", "wind"]  # two options with the same words
LATE = ["delayed", "meeting", "accident", "the"]


@pytest.mark.parametrize("answer, prediction, choices, right", [
    ("a dog", "a dog", PETS, True),
    ("a dog", "A DOG", PETS, True),
    ("a dog", "dog a", PETS, True),  # a set has no order
    ("a dog", "It is a dog.", PETS, True),
    ("a dog", "dog", PETS, False),  # "a" is missing
    ("a dog", "a a dog dog", PETS, True),
    ("a dog", "a dog, not a seal", PETS, False),  # a word of another option
    ("a dog", "a dog or a cat", PETS, False),
    ("a dog", "a seal", PETS, False),
    ("a dog", "dogs", PETS, False),
    ("a dog", "a dogfish", PETS, False),
    ("a dog", "A", PETS, False),  # letters do not stand for options
    ("a seal", "B", PETS, False),
    ("a dog", "(A) a dog", PETS, True),
    ("a seal", "(A) seal", PETS, True),  # the letter A is the word "a"
    ("a dog", "", PETS, False),
    ("a dog", "   \n", PETS, False),
    ("a dog", "?!...", PETS, False),
    ("a dog", "a-dog", PETS, True),
    ("a dog", "a_dog", PETS, False),  # an underscore joins words
    ("a dog", "a\ndog", PETS, True),
    ("a dog", "a dog's bark", PETS, True),
    ("Yes", "yes", YES_NO, True),
    ("No", "No answer", YES_NO, True),  # why a refusal must be ""
    ("No", "No, yes", YES_NO, False),
    ("Yes", "yes and no", YES_NO, False),
    ("No", "none", YES_NO, False),
    ("No", "I do not know", YES_NO, False),
    ("two", "two", COUNTS, True),
    ("two", "twenty two", COUNTS, False),  # another option adds "twenty"
    ("twenty two", "twenty two", COUNTS, True),
    ("twenty two", "twenty-two", COUNTS, True),
    ("twenty two", "two", COUNTS, False),
    ("twenty two", "twenty two, one too many", COUNTS, False),
    ("2", "2", COUNTS, True),
    ("2", "two", COUNTS, False),
    ("2", "2.", COUNTS, True),
    ("2", "22", COUNTS, False),
    ("duck", "duck", DUCKS, True),
    ("duck", "duck and goose", DUCKS, False),
    ("duck and goose", "duck and goose", DUCKS, True),  # options may share words with the answer
    ("duck and goose", "goose and duck", DUCKS, True),
    ("duck and goose", "duck goose", DUCKS, False),
    ("goose", "goose and swan", DUCKS, False),  # "and" is a word of another option
    ("high-pitched whistle", "a high pitched whistle", DASHED, False),  # "a" is in "a hum"
    ("high-pitched whistle", "high pitched whistle", DASHED, True),
    ("high-pitched whistle", "high whistle", DASHED, False),
    ("high-pitched whistle", "high, not low, pitched whistle", DASHED, False),
    ("Rain!", "rain", TWINS, True),  # an option with the same words adds nothing
    ("rain", "RAIN!", TWINS, True),
    ("rain", "rain and wind", TWINS, False),
    ("Größe", "die größe", ["Größe", "Farbe"], True),
    ("Größe", "groesse", ["Größe", "Farbe"], False),
    ("3/4", "4/3", ["3/4", "2/4"], True),  # two words, no order
    ("3/4", "3/4, not 2/4", ["3/4", "2/4"], False),
    ("C#", "C", ["C#", "D"], True),  # the # is not part of a word
    ("C#", "c sharp", ["C#", "D"], True),
    ("???", "anything", ["???", "dog"], True),  # an answer without words
    ("???", "???", ["???", "dog"], False),
    ("???", "dog", ["???", "dog"], False),
])
def test_string_match(answer, prediction, choices, right):
    assert string_match(answer, prediction, choices) is right


words = st.lists(st.sampled_from(["a", "dog", "cat", "No", "2", "-", "!", "é"]),
                 max_size=4).map(" ".join)


@settings(max_examples=100)
@given(data=st.data(), choices=st.lists(words, min_size=2, max_size=5), prediction=words)
def test_order_of_choices_and_words_does_not_matter(data, choices, prediction):
    answer = data.draw(st.sampled_from(choices))
    shuffled = data.draw(st.permutations(choices))
    turned = " ".join(reversed(prediction.split()))
    right = string_match(answer, prediction, choices)
    assert string_match(answer, turned.upper(), shuffled) == right


@settings(max_examples=50)
@given(choices=st.lists(words, min_size=2, max_size=5),
       blank=st.text(alphabet=" .?!-\n", max_size=5))
def test_empty_predictions_are_never_right(choices, blank):
    assert not any(string_match(choice, blank, choices) for choice in choices)


# ──────── MMSU's letters ────────


@pytest.mark.parametrize("prediction, letter", [
    ("A", "A"), ("B", "B"), ("C", "C"), ("D", "D"), ("E", None), ("a", None), ("d", None),
    ("", None), ("  ", None), ("\n", None), (" C ", "C"), ("\nB\n", "B"), ("A.", "A"),
    ("B) a dog", "B"), ("(B)", "B"), ("(b)", None), ("[D]", "D"), ("**C**", None), ("*C*", "C"),
    ("Dog", "D"), ("Cat", "C"), ("A dog", "A"), ("dog", None), ("Answer: B", "A"),
    ("answer: B", None), ("answer: B.", "B"), ("The answer is B", None),
    ("The answer is B.", "B"), ("The answer is B. ", "B"), ("The answer is B.\n", "B"),
    ("The answer is (B)", "B"), ("The answer is (B).", None), ("It is option C!", "C"),
    ("It is D'", "D"), ("Both", "B"), ("Definitely A", "D"), ("None", None), ("none", None),
    ("1", None), ("?", None), ("xA", None), ("Ax", "A"), ("xAx", "A"), ("xBxx", None),
    ("It is B\n.", "B"),  # line breaks are removed first
    ("NBC", "B"), ("see ABCD", "C"), ("É", None), ("Ａ", None), ("AB", "A"), ("EA", None),
    ("EAE", "A"),
    ("A, not B.", "A"), ("C: (D)", "C"),
    ("Dog (B)", "D"),  # the first character takes precedence
])
def test_mmsu_letter(prediction, letter):
    assert mmsu_letter(prediction) == letter


# ──────── from answer to option ────────


@pytest.mark.parametrize("text, choices, option", [
    ("a dog", PETS, "a dog"), ("A Dog.", PETS, "a dog"), ("B", PETS, "a seal"),
    ("B.", PETS, "a seal"), ("(b)", PETS, "a seal"), ("C) a cat", PETS, "a cat"),
    (" b \n", PETS, "a seal"), ("It is a dog.", PETS, "a dog"), ("a dog or a cat", PETS, ""),
    ("a horse", PETS, ""), ("D", PETS, ""),
    ("C) a dog", PETS, "a dog"),  # letter and text disagree: the text decides
    ("", PETS, ""), (" \n", PETS, ""), ("?", PETS, ""), ("No answer", YES_NO, ""),
    ("no answer.", YES_NO, ""), ("No", YES_NO, "No"), ("The answer is no.", YES_NO, "No"),
    ("I don’t know", ["I", "IV"], ""), ("Unknown.", ["Unknown", "a dog"], "Unknown"),
    ("None", ["None", "Some"], "None"),
    ("Rain", ["Rain ", "Rain", "wind"], "Rain "),  # the same option twice
    ("twenty two", COUNTS, "twenty two"), ("duck", DUCKS, "duck"), ("A", ["B", "A"], "A"),
    ("C", ["B", "A"], ""),
    # an option of an official file that is printed twice, beside one of the same words
    ("slow then fast.", ["slow then fast.", "fast then slow.", "slow then fast."],
     "slow then fast."),
    ("Answer: B", PETS, "a seal"), ("The answer is B.", PETS, "a seal"),
    ("Option B", PETS, "a seal"), ("B - a seal", PETS, "a seal"), ("\\boxed{B}", PETS, "a seal"),
    ("**B**", PETS, "a seal"), ("'a seal'", PETS, "a seal"), ("The answer is A.", LATE, "delayed"),
    ("I think the one is B", LATE, ""), ("I hear a chord", ["I", "IV"], ""),
    ("It is a flute", ["A", "B"], ""), ("The key is C", ["A", "C"], "C"),
    ("The answer is the.", LATE, "the"), ("the", LATE, "the"),
    ("I don’t know", ["I don’t know", "a dog"], "I don’t know"), ("N/A", ["N/A", "yes"], "N/A"),
])
def test_map_to_option_by_rules(text, choices, option):
    assert map_to_option(text, choices) == option


@settings(max_examples=100, deadline=None)
@given(choices=st.lists(st.text(min_size=1, max_size=12).map(str.strip).filter(bool), min_size=2,
                        max_size=6), data=st.data())
def test_an_option_word_for_word_maps_to_itself(choices, data):
    """Also when it is printed twice, reads like a refusal, or looks like the letter of another."""
    said = data.draw(st.sampled_from(choices))
    assert map_to_option(said, choices) == said
    assert map_to_option(f" {said}\n", choices) == said


@pytest.mark.parametrize("reply, option", [
    ("a seal", "a seal"), ("B", "a seal"), ("The answer chooses a cat.", "a cat"), ("NONE", ""),
    ("NONE.", ""), ("a horse", ""), ("a dog or a cat", ""), ("a dog, a seal, a cat", "")])
def test_map_to_option_by_a_judge(reply, option):
    prompts, text = [], "an {animal} that barks"
    assert map_to_option(text, PETS, lambda prompt: prompts.append(prompt) or reply) == option
    assert prompts == [MAP_PROMPT.format(options="A. a dog\nB. a seal\nC. a cat", answer=text)]


@pytest.mark.parametrize("text", ["", " \n", "no answer", "a dog", "B"])
def test_the_judge_is_asked_only_when_the_rules_decide_nothing(text):
    def judge(prompt):
        raise AssertionError(prompt)

    map_to_option(text, PETS, judge)


def test_none_from_the_judge_differs_from_an_option_none():
    assert map_to_option("neither", ["None", "Some"], lambda prompt: "None") == "None"
    assert map_to_option("neither", ["None", "Some"], lambda prompt: "NONE") == ""


# ──────── closed questions ────────

COMPASS = {"E": (1, 0), "NE": (1, 1), "N": (0, 1), "NW": (-1, 1), "W": (-1, 0), "SW": (-1, -1),
           "S": (0, -1), "SE": (1, -1), "far E": (64, 0), "far NE": (8, 8), "ENE": (2, 1),
           "near N": (0, 0.25), "nowhere": (0, 0)}


def compass(texts):
    return np.array([COMPASS[text] for text in texts], dtype=np.float32)


@pytest.mark.parametrize("prediction, choices, index", [
    ("E", "E,N", 0), ("N", "E,N", 1), ("W", "E,N", 1), ("S", "E,N", 0), ("S", "N,E", 1),
    ("NE", "S,NE,E", 1),
    ("NE", "E,N", 0), ("NE", "N,E", 0), ("SW", "E,N", 0), ("NW", "N,W,NW", 2),
    ("NW", "E,W", 1),  # ties: the first
    ("E", "far E,E", 0), ("E", "E,far E", 0), ("far E", "N,E,far E", 1),
    ("far E", "NE,ENE", 1),  # lengths do not count
    ("NE", "far E,near N", 0), ("NE", "near N,far E", 0), ("ENE", "far NE,E", 0),
    ("ENE", "N,E", 1), ("ENE", "E,far NE", 1), ("near N", "E,NE", 1), ("near N", "far NE,NW", 0),
    ("near N", "S,near N", 1), ("nowhere", "S,E,N", 0), ("nowhere", "nowhere,E", 0),
    ("E", "nowhere,N", 0), ("E", "W,nowhere", 1), ("E", "nowhere,NE", 1), ("W", "E,NE,SE", 1),
    ("W", "SE,NE,E", 0), ("S", "E,W", 0), ("SE", "N,W,S,E", 2), ("SE", "N,W,E,S", 2),
    ("E", "N,N,N,E,E", 3), ("N", "S,E,W,N", 3), ("NW", "SE,SW,NE", 1), ("NW", "SE,NE,SW", 1),
    ("SW", "NE,nowhere", 1), ("far NE", "E,NE,far NE", 1), ("E", "E", 0), ("ENE", "NE,ENE,E", 1),
])
@pytest.mark.parametrize("kind", [np.array, torch.tensor, list])
def test_closed_choice(prediction, choices, index, kind):
    asked = []

    def embed(texts):
        asked.append(texts)
        return kind(compass(texts).tolist())

    assert closed_choice(prediction, tuple(choices.split(",")), embed) == index
    assert asked == [[prediction], choices.split(",")]


def test_closed_choice_takes_bfloat16_with_a_gradient():
    def embed(texts):
        return torch.tensor(compass(texts), dtype=torch.bfloat16, requires_grad=True)

    assert closed_choice("N", ("E", "N"), embed) == 1


def test_among_equal_options_the_first_is_chosen():
    vector = np.random.default_rng(0).normal(size=(1, 4096)).astype(np.float32)

    def embed(texts):
        return np.repeat(vector, len(texts), axis=0)

    assert all(closed_choice("p", ["x"] * count, embed) == 0 for count in range(1, 9))


@pytest.mark.parametrize("embed", [
    lambda texts: [[1.0, 2.0]], lambda texts: [[1.0, 2.0]] * 3,
    lambda texts: [[float("nan"), 1.0]] * len(texts)])
def test_a_broken_embedder_is_an_error(embed):
    with pytest.raises(ValueError, match="one finite"):
        closed_choice("x", ["a", "b"], embed)


def fake_sentence_transformers(monkeypatch, made):
    class Model:
        def __init__(self, name, trust_remote_code):
            if name == "none/such":
                raise OSError("no such\nmodel")
            self.name, self.trusted, self.max_seq_length = name, trust_remote_code, 512
            self.tokenizer = types.SimpleNamespace(padding_side="left", eos_token="</s>")
            made.append(self)

        def encode(self, texts, convert_to_numpy):
            assert convert_to_numpy
            return np.array([[len(text), 1.0] for text in texts])

    package = types.SimpleNamespace(SentenceTransformer=Model)
    monkeypatch.setitem(sys.modules, "sentence_transformers", package)


def test_load_embedder(monkeypatch):
    made = []
    fake_sentence_transformers(monkeypatch, made)
    assert scoring.load_embedder("some/model")(["abc", ""]).tolist() == [[3, 1], [0, 1]]
    assert scoring.load_embedder("nvidia/NV-Embed-v2")(["abc"]).tolist() == [[7, 1]]
    assert [(m.name, m.trusted, m.max_seq_length) for m in made] == [
        ("some/model", False, 512), ("nvidia/NV-Embed-v2", True, 4096)]
    assert made[1].tokenizer.padding_side == "right"
    with pytest.raises(InputError, match=r"none/such cannot be loaded \(no such model\)"):
        scoring.load_embedder("none/such")
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)  # as if it were not installed
    with pytest.raises(InputError, match="pip install sentence-transformers"):
        scoring.load_embedder("some/model")


# ──────── the judge's marks ────────

FOUR = "CORRECTNESS: 5\nRELEVANCE: 4\nCOMPLETENESS: 2\nCLARITY: 1\n"  # their mean is 3
FIVES = "CORRECTNESS: 5 RELEVANCE: 5 COMPLETENESS: 5 CLARITY: 5 "


@pytest.mark.parametrize("text, marks", [
    (FOUR + "OVERALL: 4", (5, 4, 2, 1, 4)),
    (FOUR + "OVERALL: 2.5", (5, 4, 2, 1, 2.5)),
    (FOUR + "OVERALL: 3", (5, 4, 2, 1, 3)),
    (FOUR, (5, 4, 2, 1, 3)),
    (FIVES + "OVERALL: 3", (5, 5, 5, 5, 5)),  # an overall mark of 3 becomes the mean
    (FIVES + "OVERALL: 3.0", (5, 5, 5, 5, 5)),
    (FIVES + "OVERALL: 3.1", (5, 5, 5, 5, 3.1)),
    (FIVES, (5, 5, 5, 5, 5)),
    ("CORRECTNESS: 1 RELEVANCE: 1 COMPLETENESS: 1 CLARITY: 1", (1, 1, 1, 1, 1)),
    ("", (3, 3, 3, 3, 3)),
    ("I cannot judge this.", (3, 3, 3, 3, 3)),
    ("CORRECTNESS: 5", (5, 3, 3, 3, 3.5)),
    ("RELEVANCE: 5", (3, 5, 3, 3, 3.5)),
    ("COMPLETENESS: 1", (3, 3, 1, 3, 2.5)),
    ("CLARITY: 1", (3, 3, 3, 1, 2.5)),
    ("OVERALL: 5", (3, 3, 3, 3, 5)),
    ("OVERALL: 3", (3, 3, 3, 3, 3)),
    ("overall: 5", (3, 3, 3, 3, 5)),
    ("Overall:4", (3, 3, 3, 3, 4)),
    ("OVERALL:\n  4", (3, 3, 3, 3, 4)),
    ("OVERALL : 4", (3, 3, 3, 3, 3)),  # no space before the colon
    ("OVERALL 4", (3, 3, 3, 3, 3)),
    ("OVERALL: [4]", (3, 3, 3, 3, 3)),
    ("OVERALL: four", (3, 3, 3, 3, 3)),
    ("OVERALL: -4", (3, 3, 3, 3, 3)),
    ("**OVERALL**: 4", (3, 3, 3, 3, 3)),
    ("**OVERALL: 4**", (3, 3, 3, 3, 4)),
    ("OVERALL: 4/5", (3, 3, 3, 3, 4)),
    ("OVERALL: 4 - good", (3, 3, 3, 3, 4)),
    ("OVERALL: 4.", (3, 3, 3, 3, 4)),
    ("OVERALL: 4.75 of 5", (3, 3, 3, 3, 4.75)),
    ("OVERALL: .5", (3, 3, 3, 3, 3)),
    ("OVERALL: 10", (3, 3, 3, 3, 10)),  # not limited to 1 to 5
    ("OVERALL: 0", (3, 3, 3, 3, 0)),
    ("OVERALL: 2\nOVERALL: 5", (3, 3, 3, 3, 2)),  # the first counts
    ("OVERALL: none. OVERALL: 5", (3, 3, 3, 3, 5)),
    ("CORRECTNESS: 4.5", (4, 3, 3, 3, 3.25)),  # only the whole part is read
    ("CORRECTNESS: 5 OVERALL: 1.5", (5, 3, 3, 3, 1.5)),
    ("1. CORRECTNESS: 2", (2, 3, 3, 3, 2.75)),
    ("INCORRECTNESS: 1", (1, 3, 3, 3, 2.5)),  # also inside a word
    ("CORRECTNESS: 1 CORRECTNESS: 5", (1, 3, 3, 3, 2.5)),
    ("clarity: 5, completeness: 5, relevance: 1, correctness: 1", (1, 1, 5, 5, 3)),
    ("CORRECTNESS: 5\nRELEVANCE: 5\nOVERALL: 3.0", (5, 5, 3, 3, 4)),
    ("CORRECTNESS: 2\nOVERALL: 3.5 because of CLARITY: 4", (2, 3, 3, 4, 3.5)),
])
def test_parse_judge(text, marks):
    parsed = parse_judge(text)
    assert tuple(parsed.values()) == marks
    assert list(parsed) == ["correctness", "relevance", "completeness", "clarity", "overall"]
    assert all(type(mark) is float for mark in parsed.values())


# ──────── the judge's server ────────


@pytest.fixture
def serve(monkeypatch):
    """serve(*replies) → (url, requests). The server sends the replies in turn and repeats the last.

    A reply is a text, an HTTP status, the bytes of a body, or None to drop the connection.
    """
    monkeypatch.setattr(rewards, "FIRST_WAIT", 0.01)
    servers = []

    def start(*replies):
        requests = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                requests.append((self.path, dict(self.headers), body))
                reply = replies[min(len(requests), len(replies)) - 1]
                if reply is None:
                    return self.connection.shutdown(socket.SHUT_RDWR)
                if isinstance(reply, str):
                    reply = json.dumps({"choices": [{"message": {"content": reply}}]}).encode()
                data = reply if isinstance(reply, bytes) else b"no luck"
                self.send_response(reply if isinstance(reply, int) else 200)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_):
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        servers.append((server, thread))
        return f"http://127.0.0.1:{server.server_port}/v1", requests

    yield start
    for server, thread in servers:
        server.shutdown()
        server.server_close()
        thread.join()


def test_what_is_sent_to_the_judge(serve):
    url, requests = serve(" a dog \n")
    assert ask_judge(url + "/", "judge-7b", "Which {one}?", api_key="k3y\n") == "a dog"
    (path, headers, body), = requests
    assert path == "/v1/chat/completions" and headers["Authorization"] == "Bearer k3y"
    assert body == {"model": "judge-7b", "temperature": 0, "max_tokens": 128,
                    "messages": [{"role": "user", "content": "Which {one}?"}]}
    assert ask_judge(url, "judge-7b", "Which?", max_tokens=512) == "a dog"
    assert "Authorization" not in requests[1][1] and requests[1][2]["max_tokens"] == 512


@pytest.mark.parametrize("fault", [500, 503, 429, 408, 409, None])
def test_a_passing_fault_is_retried(serve, fault):
    url, requests = serve(fault, fault, "a dog")
    assert ask_judge(url, "judge", "Which?") == "a dog"
    assert len(requests) == 3


def test_a_lasting_fault_is_an_error(serve):
    url, requests = serve(500)
    with pytest.raises(JudgeError, match="5 attempts; last fault: HTTP 500: 'no luck'"):
        ask_judge(url, "judge", "Which?")
    assert len(requests) == 5


@pytest.mark.parametrize("reply, message", [
    (400, "HTTP 400"), (401, "HTTP 401"), (404, "HTTP 404"), (b"<html>", "no chat completion"),
    (b"{}", "no chat completion"), (b'{"choices": []}', "no chat completion"),
    (b"[]", "no chat completion"),
    (b'{"choices": [{"message": {"content": null}}]}', "no chat completion"), ("", "empty"),
    (" \n", "empty")])
def test_a_refusal_or_garbage_is_an_error_at_once(serve, reply, message):
    url, requests = serve(reply)
    with pytest.raises(JudgeError, match=message) as error:
        ask_judge(url, "judge", "Which?")
    assert len(requests) == 1 and "\n" not in str(error.value)


@pytest.mark.parametrize("url", ["nowhere", "ftp://127.0.0.1/v1", "http://[::1/v1"])
def test_no_http_address_is_an_error_at_once(url):
    with pytest.raises(JudgeError, match="not an http address"):
        ask_judge(url, "judge", "Which?")


# ──────── files of the official shapes ────────


def counts(report, group):
    return {value: cell["count"] for value, cell in report["groups"][group].items()}


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".parquet"])
def test_mmau(tmp_path, suffix):
    rows = mmau_rows()
    if suffix == ".parquet":  # all rows of a column have the same type
        rows = [row if isinstance(row["category"], list) else row | {"category": [row["category"]]}
                for row in rows]
    items = read_benchmark("mmau", write(tmp_path / f"mmau{suffix}", rows))
    # u0 to u499 are right, but for u0; u500 to u899 are wrong; u900 to u999 are missing
    predictions = {f"u{i}": "a seal" if i < 500 else "a dog" for i in range(900)}
    predictions |= {"u0": "", "u1": "seal a"}
    report = score("mmau", items, predictions)
    assert counts(report, "task") == {"sound": 333, "music": 334, "speech": 333}
    assert counts(report, "difficulty") == {"easy": 224, "medium": 540, "hard": 236}
    assert counts(report, "category") == {"Perception + Reasoning": 13, "Perception": 987}
    assert (report["accuracy"], report["right"], report["count"]) == (0.499, 499, 1000)
    assert (report["missing"], report["empty"], report["method"]) == (100, 1, "string match")
    assert report["groups"]["task"]["sound"] == {"accuracy": 332 / 333, "right": 332, "count": 333}
    assert report["groups"]["task"]["music"]["right"] == 500 - 333
    assert report["groups"]["task"]["speech"]["accuracy"] == 0
    assert (report["official"]["accuracy"], report["official"]["count"]) == (499 / 900, 900)
    assert report["official"]["groups"]["task"]["speech"]["count"] == 233
    assert any("100 of 1000 rows" in note for note in report["notes"])
    json.dumps(report, allow_nan=False)


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".parquet"])
def test_mmar(tmp_path, suffix):
    items = read_benchmark("mmar", write(tmp_path / f"MMAR-meta{suffix}", mmar_rows()))
    predictions = {item.id: "Bob" if item.groups["modality"] == "mix" else "B" for item in items}
    report = score("mmar", items, predictions)
    assert counts(report, "modality") == {"sound": 165, "music": 206, "speech": 294, "mix": 335}
    assert report["accuracy"] == 0.335 == report["official"]["accuracy"]  # "B" is no option's text
    assert report["groups"]["modality"]["mix"]["accuracy"] == 1.0
    assert (report["missing"], report["empty"], report["notes"]) == (0, 0, [])


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_mmsu(tmp_path, suffix):
    items = read_benchmark("mmsu", write(tmp_path / f"mmsu{suffix}", mmsu_rows()))
    texts = ["falling", "B", "Both are falling", "D", "Answer: falling", "", "C"]
    report = score("mmsu", items, {f"s{i}": texts[i % 7] for i in range(4900)})
    assert counts(report, "category") == {"Perception": 2580, "Reasoning": 2420}
    # The three texts with the word "falling" are right, for 700 rows each.
    assert (report["accuracy"], report["right"], report["count"]) == (2100 / 5000, 2100, 5000)
    # Letters: B and Both are right; D, Answer (read as A) and C are wrong; two texts have none.
    official = report["official"]
    assert (official["accuracy"], official["right"], official["count"]) == (0.4, 1400, 3500)
    assert (report["missing"], report["empty"]) == (100, 700)
    assert "letter" in official["method"]


def test_mmsu_letters_stand_for_columns(tmp_path):
    """An empty column keeps its letter: the third choice is D."""
    rows = [{"id": 7, "audio": "a.wav", "question": "q", "choice_a": "one", "choice_b": "two",
             "choice_c": None, "choice_d": " three ", "answer_gt": " three ",
             "category": "Perception"}]
    item, = read_benchmark("mmsu", write(tmp_path / "x.jsonl", rows))
    assert item.id == "7" and item.choices == ("one", "two", " three ")
    assert item.answer_letters == "D"
    assert score("mmsu", [item], {"7": "D"})["official"]["right"] == 1
    wrong = score("mmsu", [item], {"7": "C"})["official"]
    assert (wrong["accuracy"], wrong["right"], wrong["count"]) == (0, 0, 1)
    assert wrong["groups"] == {"category": {"Perception": {"accuracy": 0, "right": 0, "count": 1}}}
    assert score("mmsu", [item], {"7": "three"})["official"]["accuracy"] is None  # no row is left


@pytest.mark.parametrize("name, file", [("mmar", "x.jsonl"), ("mmar", "x.json"),
                                        ("mmsu", "x.jsonl"), ("mmau-pro", "x.parquet")])
def test_files_with_the_quirks_of_the_official_ones(tmp_path, name, file):
    """Read, mapped and scored whole; every denominator is right.

    Two of three closed rows name the right option, the others a wrong one, in five styles by turns:
    text, letter, lead, letter and text, LaTeX.
    """
    items = read_benchmark(name, write(tmp_path / file, quirky_files()[name]))
    assert len(items) == {"mmar": 1000, "mmsu": 5000, "mmau-pro": 5305}[name]
    answers, named_right, closed = {}, set(), [item for item in items if item.kind == "closed"]
    for i, item in enumerate(closed):
        right = item.choices.index(item.answer) if item.answer in item.choices else 1
        chosen = (right + (i % 3 == 0)) % len(item.choices)
        letter, option = "ABCDE"[chosen], item.choices[chosen]
        answers[item.id] = (option, letter, f"The answer is {letter}.", f"{letter} - {option}",
                            f"\\boxed{{{letter}}}")[i % 5]
        if i % 3:
            named_right.add(item.id)
    predictions = {item.id: map_to_option(answers[item.id], item.choices) for item in closed}
    assert "" not in predictions.values()
    rest = {item.id: "a dog" for item in items if item.kind != "closed"}
    report = score(name, items, predictions | rest, lambda prompt: "OVERALL: 4", letters_embed,
                   answers)
    json.dumps(report, allow_nan=False)
    note, = [note for note in report["notes"] if "none of the options" in note]
    if name == "mmar":
        unlisted = {f"r{i}" for i in range(10, 15)}
        assert report["right"] == len(named_right - unlisted) and report["count"] == 1000
        assert (report["unlisted"], report["ceiling"]) == (5, 0.995)
        assert note.startswith("Rows whose answer is none of the options: 5 of 1000. No option is "
                               "right in 5 of them")
        assert sum(counts(report, "modality").values()) == report["official"]["count"] == 1000
    elif name == "mmsu":
        hyphens, thunder = ({f"s{i}" for i in of} for of in (range(300, 351), range(351, 355)))
        assert report["right"] == len(named_right - thunder) and report["count"] == 5000
        assert (report["unlisted"], report["ceiling"]) == (55, 4996 / 5000)
        with_letter = {item.id for i, item in enumerate(items) if i % 5}  # not those by text
        official = report["official"]
        assert official["count"] == 4000 and official["ceiling"] == 4945 / 5000
        assert official["right"] == len((named_right & with_letter) - hyphens - thunder)
        assert "its ceiling is 4945 of 5000" in note
        assert counts(report, "category") == {"Perception": 2580, "Reasoning": 2420}
    else:
        unlisted = {item.id for item in closed if item.answer != "a dog"}  # one ends in a blank
        parts = report["parts"]
        assert {kind: part["count"] for kind, part in parts.items()} == {
            "closed": 4592, "open": 625, "instruction following": 87}
        assert parts["closed"]["right"] == len(named_right - unlisted) and len(unlisted) == 21
        assert parts["instruction following"]["right"] == 86  # no count equals an N of null
        assert (report["unlisted"], report["count"]) == (21, 5304)
        assert report["ceiling"] == pytest.approx(1 - 21 / 5304)
        assert report["right"] == pytest.approx(parts["closed"]["right"] + 86 + 625 * 0.8)


odd_values = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 10**20) | st.floats() | st.text(max_size=5)
    | st.sampled_from(["", " ", "a dog", "open", "instruction following", "\ud800", "\0"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner,
                                                                max_size=2), max_leaves=5)


VALID = {"mmau": mmau_rows()[-2:], "mmar": mmar_rows()[:2], "mmsu": mmsu_rows()[:2],
         "mmau-pro": mmau_pro_rows()[85:88] + mmau_pro_rows()[800:801]}


@settings(max_examples=200, deadline=None)
@given(name=st.sampled_from(BENCHMARKS), data=st.data())
def test_a_changed_row_is_read_or_refused_with_its_line(tmp_path_factory, name, data):
    """Never a traceback. What is read can be mapped and scored."""
    row = dict(data.draw(st.sampled_from(VALID[name][1:])))
    for key in data.draw(st.lists(st.sampled_from(sorted(row)), min_size=1, max_size=3)):
        row[key] = data.draw(odd_values)
        if data.draw(st.booleans()):
            del row[key]
    path = write(tmp_path_factory.getbasetemp() / "odd.jsonl", [VALID[name][0], row])
    try:
        items = read_benchmark(name, path)
    except InputError as error:
        assert str(error).startswith(f"{path}:2: ") and "\n" not in str(error)
        return
    predictions = {item.id: map_to_option(data.draw(st.text(max_size=5)), item.choices)
                   if item.kind == "closed" else "A dog." for item in items}
    report = score(name, items, predictions, lambda prompt: "OVERALL: 4", letters_embed)
    json.dumps(report, allow_nan=False)
    assert 0 <= report["accuracy"] <= 1


def test_an_answer_that_is_none_of_the_options(tmp_path):
    """It is scored by the benchmark's own match, also when no option can be right."""
    row = mmar_rows()[0] | {"choices": ["Falling rain", "Rising wind"], "answer": "falling"}
    items = read_benchmark("mmar", write(tmp_path / "x.jsonl", [row]))
    reports = {text: score("mmar", items, {"r0": text}) for text in ("falling", "Falling rain", "")}
    assert [report["accuracy"] for report in reports.values()] == [1, 0, 0]
    assert all((report["unlisted"], report["ceiling"]) == (1, 0) for report in reports.values())


def test_mmsu_counts_an_answer_spelt_otherwise_as_wrong(tmp_path):
    """The official script does; the token-set match of the paper need not. The report says both."""
    row = mmsu_rows()[0] | {"choice_a": "Old-aged", "answer_gt": "old aged"}
    items = read_benchmark("mmsu", write(tmp_path / "x.jsonl", [row]))
    for letter in "ABCD":
        report = score("mmsu", items, {"s0": "Old-aged"}, answers={"s0": letter})
        assert report["accuracy"] == 1 and report["official"]["accuracy"] == 0
    assert (report["unlisted"], report["ceiling"], report["official"]["ceiling"]) == (1, 1, 0)
    assert "its ceiling is 0 of 1" in report["notes"][0]


@pytest.mark.parametrize("answer, noted", [("", True), (" \n", True), ("None", True), ("B", False),
                                           ("none", False)])
def test_blank_answers_of_mmsu_are_named(tmp_path, answer, noted):
    """The official script would give them the letter of the row before."""
    items = read_benchmark("mmsu", write(tmp_path / "x.jsonl", mmsu_rows()[:2]))
    report = score("mmsu", items, {"s0": "falling", "s1": ""}, answers={"s0": "B", "s1": answer})
    assert report["official"]["count"] == 1 + (answer == "B")
    assert [note for note in report["notes"] if "the row before" in note] == noted * [
        'Answers that are blank or "None": 1. The official script gives such a row the letter of '
        "the row before (a bug); here its figure leaves them out."]


def test_missing_instruction_rows_are_named(pro):
    report = score("mmau-pro", pro[:3], {"p0": "a dog"})
    assert report["right"] == 1 and report["missing"] == 2
    assert any('the word "nan"' in note for note in report["notes"])


@pytest.fixture(scope="module")
def pro(tmp_path_factory):
    path = write(tmp_path_factory.mktemp("pro") / "test.parquet", mmau_pro_rows())
    return read_benchmark("mmau-pro", path)


def letters_embed(texts):
    return [[text.count("dog"), text.count("seal"), 0.01] for text in texts]


def test_mmau_pro(pro):
    """Every part by its own method, and the total as their count-weighted mean."""
    prompts, number = [], itertools.count(1)

    def judge(prompt):  # called by several threads
        prompts.append(prompt)
        return "OVERALL: 4" if next(number) <= 500 else "no idea"

    told, asked = ([item for item in pro if item.kind == kind]
                   for kind in ("instruction following", "open"))
    texts = {"sound": "the dog", "music": "seals", "speech": "dog"}
    predictions = {item.id: texts.get(item.groups["category"], "a dog") for item in pro}
    predictions |= {item.id: "a cat" for item in told[:29]}  # 58 of 87 follow the instruction
    for item in asked[600:]:  # 25 of 625 are missing
        del predictions[item.id]
    report = score("mmau-pro", pro, predictions, judge, letters_embed)
    parts = report["parts"]
    assert {kind: (part["count"], part["method"]) for kind, part in parts.items()} == {
        "instruction following": (87, "rules"), "open": (625, "judge"),
        "closed": (4592, "embedding")}
    assert parts["instruction following"]["accuracy"] == 58 / 87
    open_points = (500 * 4 + 100 * 3) / 5  # 100 replies without a mark count as 3 of 5
    assert parts["open"]["accuracy"] == pytest.approx(open_points / 625)
    assert parts["closed"]["accuracy"] == 3000 / 4592  # those of the category "sound"
    assert report["count"] == 5304 and report["missing"] == 25
    assert report["accuracy"] == pytest.approx((58 + open_points + 3000) / 5304)
    assert counts(report, "category") == {"sound": 3000, "music": 1592, "open": 625,
                                          "instruction following": 87}
    assert report["groups"]["category"]["sound"]["accuracy"] == 1.0
    assert len(report["notes"]) == 3 and report["notes"][0].startswith("100 replies of the judge")
    assert len(prompts) == 600
    assert JUDGE_PROMPT.format(question="What barks?", reference="a dog",
                               response="a dog") in prompts
    json.dumps(report, allow_nan=False)


def test_the_judge_is_asked_several_questions_at_once(pro):
    first, another = threading.Lock(), threading.Event()

    def judge(prompt):
        if first.acquire(blocking=False):
            assert another.wait(10)  # waits for a second question
        another.set()
        return "OVERALL: 5"

    items = [item for item in pro if item.kind == "open"][:20]
    report = score("mmau-pro", items, {item.id: "a dog" for item in items}, judge)
    assert report["accuracy"] == 1.0


def test_mmau_pro_without_judge_and_embedder_says_so(pro):
    report = score("mmau-pro", pro, {item.id: "a dog" for item in pro})
    assert report["accuracy"] is None and report["right"] is None and report["count"] == 5304
    assert report["parts"]["open"] == {"accuracy": None, "right": None, "count": 625,
                                       "method": "not scored: no judge"}
    assert report["parts"]["closed"] == {"accuracy": 1.0, "right": 4592, "count": 4592,
                                         "method": "string match (no embedder given)"}
    assert any("string match" in note for note in report["notes"])
    assert any("no judge" in note for note in report["notes"])
    assert report["groups"]["category"]["open"]["accuracy"] is None
    assert report["groups"]["category"]["music"]["accuracy"] == 1.0


def test_a_failing_judge_stops_the_scoring(pro):
    def judge(prompt):
        raise JudgeError("gone")

    with pytest.raises(JudgeError, match="gone"):
        score("mmau-pro", pro, {item.id: "a dog" for item in pro}, judge=judge)


def test_empty_predictions_of_closed_questions(pro):
    """Wrong by string match; the embedder is asked about an empty text as about any other."""
    items = [item for item in pro if item.kind == "closed"][:2]
    assert score("mmau-pro", items, {item.id: "" for item in items})["accuracy"] == 0
    report = score("mmau-pro", items, {items[0].id: ""}, embed=letters_embed)
    # The embedding of "" is equally close to all options, so the first one is chosen: it is right.
    assert (report["right"], report["empty"], report["missing"]) == (1, 1, 1)


@pytest.mark.parametrize("predictions, message", [
    ({"u0": "a seal", "zz": "a seal"}, "1 predictions have ids .* 'zz'"),
    ({"u0": None}, "'u0' is None"), ({"u0": 3}, "'u0' is 3"), ({1: "a"}, "the first 1;")])
def test_bad_predictions(tmp_path, predictions, message):
    items = read_benchmark("mmau", write(tmp_path / "m.json", mmau_rows()[:3]))
    with pytest.raises(InputError, match=message):
        score("mmau", items, predictions)


def test_score_needs_a_benchmark_and_items():
    with pytest.raises(InputError, match="no benchmark 'mmlu'; choose one of mmau"):
        score("mmlu", [], {})
    with pytest.raises(InputError, match="no items"):
        score("mmau", [], {})
    with pytest.raises(InputError, match="no benchmark 'mmlu'"):
        read_benchmark("mmlu", "x.json")
