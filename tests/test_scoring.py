"""The benchmark scorers: tables worked out by hand from the official rules, own files of the official shapes, a judge
on a real HTTP server, and the paper's tables against each other."""

import importlib.util
import itertools
import json
import math
import socket
import sys
import threading
import types
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import scoring
from data import InputError
from scoring import (JUDGE_PROMPT, MAP_PROMPT, PAPER, Item, JudgeError, ask_judge, closed_choice, follows_instruction,
                     map_to_option, markdown_table, mmsu_letter, paper_averages, parse_judge, read_benchmark, score,
                     string_match)

# ──────────────────────────────────────────────── string match ────────────────────────────────────────────────────────

PETS = ["a dog", "a seal", "a cat"]
YES_NO = ["Yes", "No"]
COUNTS = ["one", "two", "twenty two", "2"]
DUCKS = ["duck", "duck and goose", "goose"]
DASHED = ["high-pitched whistle", "low-pitched whistle", "a hum"]
TWINS = ["Rain!", "rain", "wind"]  # two options of the same words


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
    ("a dog", "A", PETS, False),  # letters stand for nothing
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
    ("two", "twenty two", COUNTS, False),  # "twenty" is what another option adds
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
    ("duck and goose", "duck and goose", DUCKS, True),  # what an option shares with the answer is no fault
    ("duck and goose", "goose and duck", DUCKS, True),
    ("duck and goose", "duck goose", DUCKS, False),
    ("goose", "goose and swan", DUCKS, False),  # "and" is a word of another option
    ("high-pitched whistle", "a high pitched whistle", DASHED, False),  # "a" is a word of "a hum"
    ("high-pitched whistle", "high pitched whistle", DASHED, True),
    ("high-pitched whistle", "high whistle", DASHED, False),
    ("high-pitched whistle", "high, not low, pitched whistle", DASHED, False),
    ("Rain!", "rain", TWINS, True),  # an option of the same words adds nothing
    ("rain", "RAIN!", TWINS, True),
    ("rain", "rain and wind", TWINS, False),
    ("Größe", "die größe", ["Größe", "Farbe"], True),
    ("Größe", "groesse", ["Größe", "Farbe"], False),
    ("3/4", "4/3", ["3/4", "2/4"], True),  # two words, no order
    ("3/4", "3/4, not 2/4", ["3/4", "2/4"], False),
    ("C#", "C", ["C#", "D"], True),  # # is in no word
    ("C#", "c sharp", ["C#", "D"], True),
    ("???", "anything", ["???", "dog"], True),  # an answer without words is a part of all that has some
    ("???", "???", ["???", "dog"], False),
    ("???", "dog", ["???", "dog"], False),
])
def test_string_match(answer, prediction, choices, right):
    assert string_match(answer, prediction, choices) is right


words = st.lists(st.sampled_from(["a", "dog", "cat", "No", "2", "-", "!", "é"]), max_size=4).map(" ".join)


@settings(max_examples=100)
@given(data=st.data(), choices=st.lists(words, min_size=2, max_size=5), prediction=words)
def test_the_order_of_choices_and_words_does_not_matter(data, choices, prediction):
    answer = data.draw(st.sampled_from(choices))
    shuffled = data.draw(st.permutations(choices))
    turned = " ".join(reversed(prediction.split()))
    assert string_match(answer, prediction, choices) == string_match(answer, turned.upper(), shuffled)


@settings(max_examples=50)
@given(choices=st.lists(words, min_size=2, max_size=5), blank=st.text(alphabet=" .?!-\n", max_size=5))
def test_an_empty_prediction_is_never_right(choices, blank):
    assert not any(string_match(choice, blank, choices) for choice in choices)


# ──────────────────────────────────────────────── MMSU's letters ──────────────────────────────────────────────────────


@pytest.mark.parametrize("prediction, letter", [
    ("A", "A"), ("B", "B"), ("C", "C"), ("D", "D"), ("E", None), ("a", None), ("d", None), ("", None), ("  ", None),
    ("\n", None), (" C ", "C"), ("\nB\n", "B"), ("A.", "A"), ("B) a dog", "B"), ("(B)", "B"), ("(b)", None),
    ("[D]", "D"), ("**C**", None), ("*C*", "C"), ("Dog", "D"), ("Cat", "C"), ("A dog", "A"), ("dog", None),
    ("Answer: B", "A"), ("answer: B", None), ("answer: B.", "B"), ("The answer is B", None),
    ("The answer is B.", "B"), ("The answer is B. ", "B"), ("The answer is B.\n", "B"), ("The answer is (B)", "B"),
    ("The answer is (B).", None), ("It is option C!", "C"), ("It is D'", "D"), ("Both", "B"), ("Definitely A", "D"),
    ("None", None), ("none", None), ("1", None), ("?", None), ("xA", None), ("Ax", "A"), ("xAx", "A"), ("xBxx", None),
    ("It is B\n.", "B"),  # line breaks go before the count
    ("NBC", "B"), ("see ABCD", "C"), ("É", None), ("Ａ", None), ("AB", "A"), ("EA", None), ("EAE", "A"),
    ("A, not B.", "A"), ("C: (D)", "C"), ("Dog (B)", "D"),  # the first character goes before the other
])
def test_mmsu_letter(prediction, letter):
    assert mmsu_letter(prediction) == letter


# ──────────────────────────────────────────── instruction following ───────────────────────────────────────────────────

PASS, FAIL = True, False
INCLUDE, FREQUENCY, FORBIDDEN = "Include Keywords", "Keyword Frequency", "Forbidden Words"
WORDS_MIN, WORDS_MAX, WORDS_RANGE = (f"Number Words ({how})" for how in ("at least", "at most", "range"))
SENTENCES_MIN, SENTENCES_MAX = "Number Sentences (at least)", "Number Sentences (at most)"
SENTENCES_RANGE = "Number Sentences (range)"
CAPITALS_MIN, CAPITALS_MAX, CAPITALS_RANGE = (f"All-capital Words ({how})" for how in ("at least", "at most", "range"))
HIGHLIGHTS, SECTIONS = "Minimum Number Highlighted Section", "Multiple Sections"
NAN = float("nan")

INSTRUCTIONS = [
    (INCLUDE, {"keywords": "dog, bark"}, "A DOG barks.", PASS),
    (INCLUDE, {"keywords": "dog, bark"}, "A dog howls.", FAIL),
    (INCLUDE, {"keywords": "DOG"}, "hotdogs", PASS),  # a substring is enough
    (INCLUDE, {"keywords": "dog,bark"}, "a dog barks", FAIL),  # split at ", " alone
    (INCLUDE, {"keywords": "dog,bark"}, "dog,bark", PASS),
    (INCLUDE, {"keywords": ""}, "anything", PASS),  # one empty item, which is in every text
    (INCLUDE, {"keywords": None}, "", PASS),
    (INCLUDE, None, "anything", PASS),
    (INCLUDE, {"keywords": "over, overlap"}, "overlap", PASS),  # items may overlap
    (FREQUENCY, {"keyword": "dog", "N": 2}, "Dog and DOG.", PASS),
    (FREQUENCY, {"keyword": "dog", "N": 2}, "dog dogs hotdog", FAIL),  # whole words
    (FREQUENCY, {"keyword": "dog", "N": 1}, "dog dogs hotdog", PASS),
    (FREQUENCY, {"keyword": "dog", "N": 2.0}, "dog, dog", PASS),
    (FREQUENCY, {"keyword": "dog", "N": 1}, "dog dog", FAIL),
    (FREQUENCY, {"keyword": "dog"}, "a cat", PASS),  # N is 0 by default
    (FREQUENCY, {"keyword": "dog", "N": None}, "a dog", FAIL),
    (FREQUENCY, {"keyword": "dog", "N": NAN}, "a cat", PASS),
    (FREQUENCY, {"keyword": "a b a", "N": 1}, "a b a b a", PASS),  # overlapping occurrences count once
    (FREQUENCY, {"keyword": "d.g", "N": 0}, "dog", PASS),  # no regular expression
    (FREQUENCY, {"keyword": "C++", "N": 1}, "I write C++ code", FAIL),  # no word ends after a +
    (FORBIDDEN, {"forbidden_words": "cat, seal"}, "A dog barks.", PASS),
    (FORBIDDEN, {"forbidden_words": "cat, seal"}, "A SEAL barks.", FAIL),
    (FORBIDDEN, {"forbidden_words": "cat"}, "concatenate", FAIL),
    (FORBIDDEN, {"forbidden_words": "cat,seal"}, "a cat", PASS),
    (FORBIDDEN, {"forbidden_words": ""}, "anything", FAIL),  # one empty item
    (FORBIDDEN, {"forbidden_words": None}, "anything", FAIL),
    (FORBIDDEN, None, "", FAIL),
    ("Number Paragraphs", {"N": 2}, "one *** two", PASS),
    ("Number Paragraphs", {"N": 2}, "one\n\ntwo", FAIL),
    ("Number Paragraphs", {"N": 2}, "*** one *** two ***\n", PASS),  # blank parts do not count
    ("Number Paragraphs", {"N": 2}, "one ****** two", PASS),
    ("Number Paragraphs", {"N": 2}, "one **** two", PASS),  # the fourth star belongs to the second part
    ("Number Paragraphs", {"N": 1}, "one *** two", FAIL),
    ("Number Paragraphs", {}, " ", PASS),
    ("Number Paragraphs", {"N": 2.0}, "one***two", PASS),
    (WORDS_MIN, {"N": 3}, "one two three", PASS),
    (WORDS_MIN, {"N": 3}, "one two-three", FAIL),
    (WORDS_MIN, {"N": 3}, "- - -", PASS),  # whatever white space separates
    (WORDS_MIN, None, "", PASS),
    (WORDS_MAX, {"N": 3}, "one\ntwo  three", PASS),
    (WORDS_MAX, {"N": 3}, "one two three four", FAIL),
    (WORDS_MAX, {"N": None}, "one", FAIL),
    (WORDS_MAX, {}, "", PASS),
    (WORDS_RANGE, {"N1": 2, "N2": 3}, "one two", PASS),
    (WORDS_RANGE, {"N1": 2.0, "N2": 3.0}, "one two three", PASS),
    (WORDS_RANGE, {"N1": 2, "N2": 3}, "one", FAIL),
    (WORDS_RANGE, {"N1": 2, "N2": 3}, "one two three four", FAIL),
    (WORDS_RANGE, {"N1": 2, "N2": None}, "w " * 999, PASS),  # N2 is 999 by default
    (WORDS_RANGE, {"N1": 2}, "w " * 1000, FAIL),
    (WORDS_RANGE, {"N2": 3, "N": 50}, "", PASS),
    (SENTENCES_MIN, {"N": 2}, "A dog barks. A cat meows.", PASS),
    (SENTENCES_MIN, {"N": 2}, "Dr. Smith hears a dog.", FAIL),  # an abbreviation ends none
    (SENTENCES_MIN, {"N": 3}, "Who? Me! Yes.", PASS),
    (SENTENCES_MAX, {"N": 1}, "Dr. Smith hears a dog.", PASS),
    (SENTENCES_MAX, {"N": 1}, "A dog barks. A cat meows.", FAIL),
    (SENTENCES_MAX, None, "", PASS),
    (SENTENCES_MAX, None, "One.", FAIL),
    (SENTENCES_RANGE, {"N1": 1, "N2": 2}, "A dog barks. A cat meows.", PASS),
    (SENTENCES_RANGE, {"N1": 1, "N2": 2}, "One. Two. Three.", FAIL),
    (SENTENCES_RANGE, {"N1": 1, "N2": 2}, "", FAIL),
    (SENTENCES_RANGE, {"N1": 2.0}, "It was 3.5 s long", FAIL),
    ("Postscript", {"postscript_marker": "P.S."}, "Bye. P.S. I barked", PASS),
    ("Postscript", {"postscript_marker": "P.S."}, "Bye. ps: I barked", PASS),  # letters alone are compared
    ("Postscript", {"postscript_marker": "P.S."}, "I like sheep, sir", PASS),  # across words: "sheepsir"
    ("Postscript", {"postscript_marker": "P.S."}, "Bye.", FAIL),
    ("Postscript", {"postscript_marker": "P.P.S."}, "P.S. bye", FAIL),
    ("Postscript", {"postscript_marker": "1."}, "Bye.", PASS),  # no letter is left of the marker
    ("Postscript", None, "", PASS),
    ("Number Placeholder", {"N": 2}, "[name] lives in [town]", PASS),
    ("Number Placeholder", {"N": 2}, "[a] [b] [c]", PASS),  # at least
    ("Number Placeholder", {"N": 2}, "[name] lives", FAIL),
    ("Number Placeholder", {"N": 1}, "[]", FAIL),
    ("Number Placeholder", {"N": 2}, "[[name]]", FAIL),  # one, from the first bracket on
    ("Number Placeholder", {"N": 1}, "[first\nline]", PASS),
    ("Number Bullets", {"N": 2}, "* one\n* two", PASS),
    ("Number Bullets", {"N": 2}, "List:\n  * one\n\t* two\nend", PASS),
    ("Number Bullets", {"N": 2}, "* one\n* two\n* three", FAIL),  # exactly
    ("Number Bullets", {"N": 1}, "- one", FAIL),
    ("Number Bullets", {"N": 1}, "*one", FAIL),
    ("Number Bullets", {"N": 1}, "see * one", FAIL),
    ("Number Bullets", {"N": 0}, "** one", PASS),
    ("Number Bullets", {"N": 1}, "*\n\n* one", PASS),  # white space after the first star takes both line breaks
    ("Number Bullets", {"N": 2.0}, "  * one\n* two", PASS),
    ("Title", None, "<<Bark>>\nA dog", PASS),
    ("Title", {}, "<Bark>", FAIL),
    ("Title", {}, "<<>>", FAIL),
    ("Title", {}, "<<a>b>>", FAIL),  # no > inside
    ("Title", {}, "text << >> text", PASS),
    (HIGHLIGHTS, {"N": 2}, "*one* and *two*", PASS),
    (HIGHLIGHTS, {"N": 2}, "*one* and two", FAIL),
    (HIGHLIGHTS, {"N": 1}, "**bold**", PASS),
    (HIGHLIGHTS, {"N": 2}, "*a*b*", FAIL),  # a star serves one section
    (HIGHLIGHTS, {"N": 1}, "**", FAIL),
    (HIGHLIGHTS, {"N": 1}, "* one\n* two", PASS),  # from bullet to bullet
    (HIGHLIGHTS, {"N": None}, "", PASS),
    (SECTIONS, {"N": 2, "section_splitter": "Part"}, "Part 1 dog Part 2 cat", PASS),
    (SECTIONS, {"N": 2, "section_splitter": "Part"}, "Intro Part 1 Part 2", FAIL),  # the text before counts as well
    (SECTIONS, {"N": 3, "section_splitter": "Part"}, "Intro Part 1 Part 2", PASS),
    (SECTIONS, {"N": 2, "section_splitter": "Part"}, "part 1 part 2", FAIL),  # case counts: one part
    (SECTIONS, {"N": 2, "section_splitter": "***"}, "dog *** cat", PASS),  # literal, no regular expression
    (SECTIONS, {"N": 1.0, "section_splitter": "a.b"}, "axb", PASS),
    (SECTIONS, {"N": 2, "section_splitter": "Part"}, "PartPart dog Part", FAIL),
    (SECTIONS, {"N": 3}, "a bc", PASS),  # an empty splitter parts characters
    ("Repeat Prompt", None, "  what BARKS here? A dog.", PASS),
    ("Repeat Prompt", None, "A dog. What barks here?", FAIL),
    ("Repeat Prompt", None, "What  barks here?", FAIL),
    ("Repeat Prompt", {}, "", FAIL),
    ("Two Responses", None, "a dog ****** a cat", PASS),
    ("Two Responses", None, "a dog ****** A Dog ", FAIL),
    ("Two Responses", None, "a dog *** a cat", FAIL),
    ("Two Responses", None, "a ****** b ****** c", FAIL),
    ("Two Responses", None, "a dog ******", PASS),  # nothing differs from a dog
    ("Two Responses", None, "a ******* a", PASS),  # the seventh star belongs to the second
    ("All Uppercase", None, "A DOG, 2 CATS!", PASS),
    ("All Uppercase", None, "A DOg", FAIL),
    ("All Uppercase", None, "123", FAIL),  # no cased letter
    ("All Uppercase", {}, "", FAIL),
    ("All Lowercase", None, "a dog, 2 cats!", PASS),
    ("All Lowercase", None, "a Dog", FAIL),
    ("All Lowercase", None, "?", FAIL),
    (CAPITALS_MIN, {"N": 2}, "A dog SAYS woof", PASS),
    (CAPITALS_MIN, {"N": 2}, "A dog Says woof", FAIL),
    (CAPITALS_MIN, {"N": 1}, "DOG's", FAIL),
    (CAPITALS_MIN, {"N": 2}, "DOG-CAT! 3", FAIL),  # one word; a number has no case
    (CAPITALS_MAX, {"N": 1}, "A dog", PASS),
    (CAPITALS_MAX, {"N": 1}, "A DOG", FAIL),
    (CAPITALS_MAX, None, "dog", PASS),
    (CAPITALS_RANGE, {"N1": 1, "N2": 2}, "A DOG", PASS),
    (CAPITALS_RANGE, {"N1": 1, "N2": 2}, "dog", FAIL),
    (CAPITALS_RANGE, {"N1": 1, "N2": 2}, "A BIG DOG", FAIL),
    (CAPITALS_RANGE, {"N1": 1}, "A BIG DOG", PASS),
    ("Start Checker", {"start_phrase": "Well, then:"}, "well then, a dog", PASS),
    ("Start Checker", {"start_phrase": "Well then"}, "So well then", FAIL),
    ("Start Checker", {"start_phrase": "Well then"}, " Well then", FAIL),  # spaces count
    ("Start Checker", {"start_phrase": "Well then"}, "\nWell then", PASS),  # line breaks do not
    ("Start Checker", {"start_phrase": "Well then"}, "Well  then", FAIL),
    ("Start Checker", None, "", PASS),
    ("End Checker", {"end_phrase": "That is all."}, "A dog. THAT IS ALL!\n", PASS),
    ("End Checker", {"end_phrase": "That is all."}, "That is all. Bye", FAIL),
    ("End Checker", {"end_phrase": "That is all."}, "That is all. ", FAIL),
    ("End Checker", {"end_phrase": "all"}, "a ball", PASS),
    ("End Checker", {"end_phrase": None}, "x", PASS),
    ("Quotation", None, ' "A dog." \n', PASS),
    ("Quotation", None, '"A dog."!', FAIL),
    ("Quotation", None, "“A dog.”", FAIL),
    ("Quotation", None, '"', PASS),  # one mark is both
    ("Quotation", None, "", FAIL),
    ("No Commas", None, "A dog; a cat", PASS),
    ("No Commas", None, "A dog, a cat", FAIL),
    ("No Commas", None, "", PASS),
    ("no commas", None, "A dog", FAIL),  # an unknown identifier
    ("Letter Frequency", {"N": 0}, "A dog", FAIL),
    ("", None, "A dog", FAIL),
]


@pytest.mark.parametrize("identifier, kwargs, response, passes", INSTRUCTIONS)
def test_follows_instruction(identifier, kwargs, response, passes):
    assert follows_instruction(identifier, kwargs, response, " What barks here?\n") is passes


def test_all_27_instructions_have_cases_that_pass_and_fail():
    seen = {(identifier, passes) for identifier, _, _, passes in INSTRUCTIONS}
    assert len({identifier for identifier, passes in seen if passes}) == 27
    assert {i for i, passes in seen if passes} <= {i for i, passes in seen if not passes}


@pytest.mark.parametrize("identifier, kwargs, key", [
    ("Number Bullets", {"N": "two"}, "N"), ("Number Bullets", {"N": True}, "N"), (WORDS_RANGE, {"N1": [1]}, "N1"),
    (INCLUDE, {"keywords": ["dog"]}, "keywords"), ("Start Checker", {"start_phrase": 3}, "start_phrase"),
])
def test_an_argument_of_a_wrong_type_is_an_error(identifier, kwargs, key):
    with pytest.raises(InputError, match=f"'{key}' is .*needed"):
        follows_instruction(identifier, kwargs, "text", "prompt")


def test_missing_sentence_data_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(scoring.nltk.data, "path", [])
    scoring.load_sentence_splitter.cache_clear()
    with pytest.raises(LookupError, match=r"^NLTK's punkt_tab is missing: `pip install [^\n]*$"):
        follows_instruction(SENTENCES_MIN, {"N": 1}, "A dog.", "")


# ────────────────────────────────────────────────── the judge's marks ─────────────────────────────────────────────────

FOUR = "CORRECTNESS: 5\nRELEVANCE: 4\nCOMPLETENESS: 2\nCLARITY: 1\n"  # their mean is 3


@pytest.mark.parametrize("text, marks", [
    (FOUR + "OVERALL: 4", (5, 4, 2, 1, 4)),
    (FOUR + "OVERALL: 2.5", (5, 4, 2, 1, 2.5)),
    (FOUR + "OVERALL: 3", (5, 4, 2, 1, 3)),
    (FOUR, (5, 4, 2, 1, 3)),
    ("CORRECTNESS: 5 RELEVANCE: 5 COMPLETENESS: 5 CLARITY: 5 OVERALL: 3", (5, 5, 5, 5, 5)),  # 3 becomes the mean
    ("CORRECTNESS: 5 RELEVANCE: 5 COMPLETENESS: 5 CLARITY: 5 OVERALL: 3.0", (5, 5, 5, 5, 5)),
    ("CORRECTNESS: 5 RELEVANCE: 5 COMPLETENESS: 5 CLARITY: 5 OVERALL: 3.1", (5, 5, 5, 5, 3.1)),
    ("CORRECTNESS: 5 RELEVANCE: 5 COMPLETENESS: 5 CLARITY: 5", (5, 5, 5, 5, 5)),
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
    ("OVERALL : 4", (3, 3, 3, 3, 3)),  # nothing between name and colon
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
    ("OVERALL: 10", (3, 3, 3, 3, 10)),  # not kept within 1 to 5
    ("OVERALL: 0", (3, 3, 3, 3, 0)),
    ("OVERALL: 2\nOVERALL: 5", (3, 3, 3, 3, 2)),  # the first counts
    ("OVERALL: none. OVERALL: 5", (3, 3, 3, 3, 5)),
    ("CORRECTNESS: 4.5", (4, 3, 3, 3, 3.25)),  # a whole number is read
    ("CORRECTNESS: 5 OVERALL: 1.5", (5, 3, 3, 3, 1.5)),
    ("1. CORRECTNESS: 2", (2, 3, 3, 3, 2.75)),
    ("INCORRECTNESS: 1", (1, 3, 3, 3, 2.5)),  # no word boundary is asked for
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


# ──────────────────────────────────────────────── closed questions ────────────────────────────────────────────────────

COMPASS = {"E": (1, 0), "NE": (1, 1), "N": (0, 1), "NW": (-1, 1), "W": (-1, 0), "SW": (-1, -1), "S": (0, -1),
           "SE": (1, -1), "far E": (64, 0), "far NE": (8, 8), "ENE": (2, 1), "near N": (0, 0.25), "nowhere": (0, 0)}


def compass(texts):
    return np.array([COMPASS[text] for text in texts], dtype=np.float32)


@pytest.mark.parametrize("prediction, choices, index", [
    ("E", "E,N", 0), ("N", "E,N", 1), ("W", "E,N", 1), ("S", "E,N", 0), ("S", "N,E", 1), ("NE", "S,NE,E", 1),
    ("NE", "E,N", 0), ("NE", "N,E", 0), ("SW", "E,N", 0), ("NW", "N,W,NW", 2), ("NW", "E,W", 1),  # ties: the first
    ("E", "far E,E", 0), ("E", "E,far E", 0), ("far E", "N,E,far E", 1), ("far E", "NE,ENE", 1),  # lengths do not count
    ("NE", "far E,near N", 0), ("NE", "near N,far E", 0), ("ENE", "far NE,E", 0), ("ENE", "N,E", 1),
    ("ENE", "E,far NE", 1), ("near N", "E,NE", 1), ("near N", "far NE,NW", 0), ("near N", "S,near N", 1),
    ("nowhere", "S,E,N", 0), ("nowhere", "nowhere,E", 0), ("E", "nowhere,N", 0), ("E", "W,nowhere", 1),
    ("E", "nowhere,NE", 1), ("W", "E,NE,SE", 1), ("W", "SE,NE,E", 0), ("S", "E,W", 0), ("SE", "N,W,S,E", 2),
    ("SE", "N,W,E,S", 2), ("E", "N,N,N,E,E", 3), ("N", "S,E,W,N", 3), ("NW", "SE,SW,NE", 1), ("NW", "SE,NE,SW", 1),
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
    assert closed_choice("N", ("E", "N"), lambda texts: torch.tensor(compass(texts), dtype=torch.bfloat16,
                                                                       requires_grad=True)) == 1


def test_equal_options_tie_to_the_first():
    vector = np.random.default_rng(0).normal(size=(1, 4096)).astype(np.float32)
    for n in range(1, 9):
        assert closed_choice("p", ["x"] * n, lambda texts: np.repeat(vector, len(texts), axis=0)) == 0


@pytest.mark.parametrize("embed", [
    lambda texts: [[1.0, 2.0]], lambda texts: [[1.0, 2.0]] * 3, lambda texts: [[NAN, 1.0]] * len(texts)])
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

    monkeypatch.setitem(sys.modules, "sentence_transformers", types.SimpleNamespace(SentenceTransformer=Model))


def test_load_embedder(monkeypatch):
    made = []
    fake_sentence_transformers(monkeypatch, made)
    assert scoring.load_embedder("some/model")(["abc", ""]).tolist() == [[3, 1], [0, 1]]
    assert scoring.load_embedder("nvidia/NV-Embed-v2")(["abc"]).tolist() == [[7, 1]]
    assert [(m.name, m.trusted, m.max_seq_length) for m in made] == [("some/model", False, 512),
                                                                     ("nvidia/NV-Embed-v2", True, 4096)]
    assert made[1].tokenizer.padding_side == "right"
    with pytest.raises(InputError, match=r"none/such cannot be loaded \(no such model\)"):
        scoring.load_embedder("none/such")
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)  # as if it were not installed
    with pytest.raises(InputError, match="pip install sentence-transformers"):
        scoring.load_embedder("some/model")


# ─────────────────────────────────────────────── from answer to option ────────────────────────────────────────────────


@pytest.mark.parametrize("text, choices, option", [
    ("a dog", PETS, "a dog"), ("A Dog.", PETS, "a dog"), ("B", PETS, "a seal"), ("B.", PETS, "a seal"),
    ("(b)", PETS, "a seal"), ("C) a cat", PETS, "a cat"), (" b \n", PETS, "a seal"),
    ("It is a dog.", PETS, "a dog"), ("a dog or a cat", PETS, ""), ("a horse", PETS, ""), ("D", PETS, ""),
    ("C) a dog", PETS, "a dog"),  # where letter and text disagree string_match sees the text alone
    ("", PETS, ""), (" \n", PETS, ""), ("?", PETS, ""),
    ("No answer", YES_NO, ""), ("no answer.", YES_NO, ""), ("No", YES_NO, "No"), ("The answer is no.", YES_NO, "No"),
    ("I don’t know", ["I", "IV"], ""), ("Unknown.", ["Unknown", "a dog"], "Unknown"),
    ("None", ["None", "Some"], "None"),
    ("Rain", ["Rain ", "Rain", "wind"], "Rain "),  # the same option twice
    ("twenty two", COUNTS, "twenty two"), ("duck", DUCKS, "duck"), ("A", ["B", "A"], "A"), ("C", ["B", "A"], ""),
])
def test_map_to_option_by_rules(text, choices, option):
    assert map_to_option(text, choices) == option


@pytest.mark.parametrize("reply, option", [
    ("a seal", "a seal"), ("B", "a seal"), ("The answer chooses a cat.", "a cat"), ("NONE", ""), ("NONE.", ""),
    ("a horse", ""), ("a dog or a cat", ""), ("a dog, a seal, a cat", "")])
def test_map_to_option_by_a_judge(reply, option):
    prompts = []
    assert map_to_option("an {animal} that barks", PETS, lambda prompt: prompts.append(prompt) or reply) == option
    assert prompts == [MAP_PROMPT.format(options="A. a dog\nB. a seal\nC. a cat", answer="an {animal} that barks")]


@pytest.mark.parametrize("text", ["", " \n", "no answer", "a dog", "B"])
def test_the_judge_is_asked_only_where_rules_decide_nothing(text):
    def judge(prompt):
        raise AssertionError(prompt)

    map_to_option(text, PETS, judge)


def test_a_judges_none_and_an_option_none():
    assert map_to_option("neither", ["None", "Some"], lambda prompt: "None") == "None"
    assert map_to_option("neither", ["None", "Some"], lambda prompt: "NONE") == ""


# ───────────────────────────────────────────────── the judge's server ─────────────────────────────────────────────────


@pytest.fixture
def serve(monkeypatch):
    """serve(replies) → (url, requests): a server that gives each reply in turn, the last for good: a text, a status,
    the bytes of a body, or None to drop the connection."""
    monkeypatch.setattr(scoring, "FIRST_WAIT", 0.01)
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


def test_what_the_judge_is_sent(serve):
    url, requests = serve(" a dog \n")
    assert ask_judge(url + "/", "judge-7b", "Which {one}?", api_key="k3y\n") == "a dog"
    (path, headers, body), = requests
    assert path == "/v1/chat/completions" and headers["Authorization"] == "Bearer k3y"
    assert body == {"model": "judge-7b", "messages": [{"role": "user", "content": "Which {one}?"}], "temperature": 0,
                    "max_tokens": 128}
    assert ask_judge(url, "judge-7b", "Which?", max_tokens=512) == "a dog"
    assert "Authorization" not in requests[1][1] and requests[1][2]["max_tokens"] == 512


@pytest.mark.parametrize("fault", [500, 503, 429, 408, 409, None])
def test_a_fault_that_passes_is_tried_again(serve, fault):
    url, requests = serve(fault, fault, "a dog")
    assert ask_judge(url, "judge", "Which?") == "a dog"
    assert len(requests) == 3


def test_a_fault_that_stays_is_an_error(serve):
    url, requests = serve(500)
    with pytest.raises(JudgeError, match="5 attempts; last fault: HTTP 500: 'no luck'"):
        ask_judge(url, "judge", "Which?")
    assert len(requests) == 5


@pytest.mark.parametrize("reply, message", [
    (400, "HTTP 400"), (401, "HTTP 401"), (404, "HTTP 404"), (b"<html>", "no chat completion"),
    (b"{}", "no chat completion"), (b'{"choices": []}', "no chat completion"), (b"[]", "no chat completion"),
    (b'{"choices": [{"message": {"content": null}}]}', "no chat completion"), ("", "empty"), (" \n", "empty")])
def test_a_refusal_or_garbage_is_an_error_at_once(serve, reply, message):
    url, requests = serve(reply)
    with pytest.raises(JudgeError, match=message) as error:
        ask_judge(url, "judge", "Which?")
    assert len(requests) == 1 and "\n" not in str(error.value)


@pytest.mark.parametrize("url", ["nowhere", "ftp://127.0.0.1/v1", "http://[::1/v1"])
def test_no_http_address_is_an_error_at_once(url):
    with pytest.raises(JudgeError, match="no http address"):
        ask_judge(url, "judge", "Which?")


# ───────────────────────────────────────── files of the official shapes ───────────────────────────────────────────────


def write(path, rows):
    if path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def spread(**counts):
    return [value for value, count in counts.items() for _ in range(count)]


def mmau_rows():
    tasks, levels = spread(sound=333, music=334, speech=333), spread(easy=224, medium=540, hard=236)
    rows = [{"id": f"u{i}", "audio_id": f"./test-mini-audios/u{i}.wav", "question": f"What is heard in {i}?",
             "choices": ["a dog", "a seal", "a cat", "a hum", "a bell", "wind", "rain", "hail"][:(2, 4, 5, 8)[i % 4]],
             "answer": "a seal", "dataset": "own", "task": tasks[i], "split": "test-mini", "category": "Perception",
             "sub-category": f"kind {i % 3}", "difficulty": levels[i]} for i in range(1000)]
    for row in rows[:13]:
        row["category"] = ["Perception", "Reasoning"]
    return rows


def mmar_rows():
    modalities = spread(sound=165, music=206, speech=294, mix=335)
    return [{"id": f"r{i}", "audio_path": f"./audio/r{i}.wav", "question": "Who speaks?", "choices": ["Ann", "Bob"],
             "answer": "Bob", "modality": modalities[i], "category": "Signal Layer", "sub-category": "Speaker",
             "language": "en"} for i in range(1000)]


def mmsu_rows():
    halves = spread(Perception=2580, Reasoning=2420)
    return [{"id": f"s{i}", "task_name": "own_task", "audio": f"audio/s{i}.wav", "question": "Which?",
             "choice_a": "rising", "choice_b": "falling", "choice_c": None if i % 2 else "flat", "choice_d": None,
             "answer_gt": "falling", "category": halves[i], "sub-category": "Pitch", "sub-sub-category": "Contour"}
            for i in range(5000)]


def mmau_pro_rows():
    kinds = spread(**{"instruction following": 87, "open": 625, "sound": 3000, "music": 1592, "speech": 1})
    rows = []
    for i, kind in enumerate(kinds):
        row = {"id": f"p{i}", "audio_path": [f"data/p{i}.wav"] + [f"data/p{i}b.wav"] * (i % 10 == 0),
               "question": "What barks?", "answer": "a dog", "choices": ["a dog", "a seal"], "category": kind,
               "task_identifier": None, "kwargs": {"N": None, "keywords": None}}
        if kind == "instruction following":
            row |= {"answer": None, "choices": None, "task_identifier": INCLUDE,
                    "kwargs": {"N": None, "keywords": "dog"}}
        elif kind in ("open", "speech"):  # the one row of "speech" is closed and has a single choice
            row |= {"choices": ["a dog"] if kind == "speech" else None}
        rows.append(row)
    return rows


def counts(report, group):
    return {value: cell["count"] for value, cell in report["groups"][group].items()}


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".parquet"])
def test_mmau(tmp_path, suffix):
    rows = mmau_rows()
    if suffix == ".parquet":  # a column has one type
        rows = [row | {"category": row["category"] if isinstance(row["category"], list) else [row["category"]]}
                for row in rows]
    items = read_benchmark("mmau", write(tmp_path / f"mmau{suffix}", rows))
    assert items[999] == Item("u999", (tmp_path / "test-mini-audios/u999.wav",), "What is heard in 999?",
                              ("a dog", "a seal", "a cat", "a hum", "a bell", "wind", "rain", "hail"), "a seal",
                              {"task": "speech", "difficulty": "hard", "sub-category": "kind 0",
                               "category": "Perception"})
    predictions = {f"u{i}": "a seal" if i < 500 else "a dog" for i in range(900)} | {"u0": "", "u1": "seal a"}
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
    items = read_benchmark("mmar", write(tmp_path / f"MMAR-meta{suffix}", mmar_rows()), audio_root="/clips")
    assert items[0].audio == (Path("/clips/audio/r0.wav"),) and items[0].kind == "closed"
    report = score("mmar", items, {item.id: "Bob" if item.groups["modality"] == "mix" else "B" for item in items})
    assert counts(report, "modality") == {"sound": 165, "music": 206, "speech": 294, "mix": 335}
    assert report["accuracy"] == 0.335 == report["official"]["accuracy"]  # "B" is no option's text
    assert report["groups"]["modality"]["mix"]["accuracy"] == 1.0
    assert (report["missing"], report["empty"], report["notes"]) == (0, 0, [])


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_mmsu(tmp_path, suffix):
    items = read_benchmark("mmsu", write(tmp_path / f"mmsu{suffix}", mmsu_rows()))
    assert items[0].choices == ("rising", "falling", "flat") and items[1].choices == ("rising", "falling")
    assert items[0].answer == "falling" and items[0].answer_letters == "B"
    texts = ["falling", "B", "Both are falling", "D", "Answer: falling", "", "C"]
    report = score("mmsu", items, {f"s{i}": texts[i % 7] for i in range(4900)})
    assert counts(report, "category") == {"Perception": 2580, "Reasoning": 2420}
    assert report["count"] == 5000 and report["right"] == 3 * 700 and report["accuracy"] == 2100 / 5000
    official = report["official"]  # letters: B and Both are right, D, Answer (A) and C wrong, two texts hold none
    assert (official["right"], official["count"], official["accuracy"]) == (1400, 3500, 0.4)
    assert (report["missing"], report["empty"]) == (100, 700)
    assert "letter" in official["method"]


def test_mmsu_letters_stand_for_columns(tmp_path):
    rows = [{"id": 7, "audio": "a.wav", "question": "q", "choice_a": "one", "choice_b": "two", "choice_c": None,
             "choice_d": " three ", "answer_gt": "three", "category": "Perception"}]
    item, = read_benchmark("mmsu", write(tmp_path / "x.jsonl", rows))
    assert item.id == "7" and item.choices == ("one", "two", " three ") and item.answer_letters == "D"
    assert score("mmsu", [item], {"7": "D"})["official"]["right"] == 1
    assert score("mmsu", [item], {"7": "C"})["official"] == {
        "accuracy": 0.0, "right": 0.0, "count": 1, "groups": {"category": {"Perception": {
            "accuracy": 0.0, "right": 0.0, "count": 1}}}, "method": score("mmsu", [item], {})["official"]["method"]}
    assert score("mmsu", [item], {"7": "three"})["official"]["accuracy"] is None  # nothing is left


@pytest.fixture(scope="module")
def pro(tmp_path_factory):
    return read_benchmark("mmau-pro", write(tmp_path_factory.mktemp("pro") / "test.parquet", mmau_pro_rows()))


def letters_embed(texts):
    return [[text.count("dog"), text.count("seal"), 0.01] for text in texts]


def test_mmau_pro(pro):
    assert Counter(item.kind for item in pro) == {"instruction following": 87, "open": 625, "closed": 4592,
                                                  "not scored": 1}
    assert [len(pro[i].audio) for i in (0, 1)] == [2, 1]
    assert pro[0].answer == "" and pro[0].choices == () and pro[0].kwargs == {"keywords": "dog"}
    assert pro[0].task_identifier == INCLUDE and pro[100].task_identifier == ""
    prompts, number = [], itertools.count(1)

    def judge(prompt):  # several threads call it
        prompts.append(prompt)
        return "OVERALL: 4" if next(number) <= 500 else "no idea"

    # 58 of 87 do as told; 500 marks of 4, 100 that are no marks (3), 25 rows missing; 3000 of 4592 choose the dog
    texts = {"sound": "the dog", "music": "seals", "speech": "dog"}
    predictions = {item.id: texts.get(item.groups["category"], "a dog") for item in pro}
    predictions |= {f"p{i}": "a cat" for i in range(29)}
    for i in range(87 + 600, 87 + 625):
        del predictions[f"p{i}"]
    report = score("mmau-pro", pro, predictions, judge, letters_embed)
    parts = report["parts"]
    assert {kind: (part["count"], part["method"]) for kind, part in parts.items()} == {
        "instruction following": (87, "rules"), "open": (625, "judge"), "closed": (4592, "embedding")}
    assert parts["instruction following"]["accuracy"] == 58 / 87
    assert parts["open"]["accuracy"] == pytest.approx((500 * 4 + 100 * 3) / 625 / 5)
    assert parts["closed"]["accuracy"] == 3000 / 4592
    assert report["count"] == 5304 and report["missing"] == 25
    assert report["accuracy"] == pytest.approx((58 + 460 + 3000) / 5304)
    assert counts(report, "category") == {"sound": 3000, "music": 1592, "open": 625, "instruction following": 87}
    assert report["groups"]["category"]["sound"]["accuracy"] == 1.0
    assert len(report["notes"]) == 3 and report["notes"][0].startswith("100 replies of the judge")
    assert len(prompts) == 600
    assert JUDGE_PROMPT.format(question="What barks?", reference="a dog", response="a dog") in prompts
    json.dumps(report, allow_nan=False)


def test_the_judge_is_asked_several_questions_at_once(pro):
    first, another = threading.Lock(), threading.Event()

    def judge(prompt):
        if first.acquire(blocking=False):
            assert another.wait(10)  # comes while this one is still being answered
        another.set()
        return "OVERALL: 5"

    items = [item for item in pro if item.kind == "open"][:20]
    report = score("mmau-pro", items, {item.id: "a dog" for item in items}, judge)
    assert report["accuracy"] == 1.0


def test_mmau_pro_without_judge_and_embedder_says_so(pro):
    report = score("mmau-pro", pro, {item.id: "a dog" for item in pro})
    assert report["accuracy"] is None and report["right"] is None and report["count"] == 5304
    assert report["parts"]["open"] == {"accuracy": None, "right": None, "count": 625, "method": "not scored: no judge"}
    assert report["parts"]["closed"] == {"accuracy": 1.0, "right": 4592, "count": 4592,
                                         "method": "string match (no embedder given)"}
    assert any("string match" in note for note in report["notes"])
    assert any("no judge" in note for note in report["notes"])
    assert report["groups"]["category"]["open"]["accuracy"] is None
    assert report["groups"]["category"]["music"]["accuracy"] == 1.0
    table = markdown_table("mmau-pro", report, "ours").splitlines()
    assert table[2] == "| ours | 100.00 | 100.00 | – | – |"


def test_a_judge_that_fails_stops_the_scoring(pro):
    def judge(prompt):
        raise JudgeError("gone")

    with pytest.raises(JudgeError, match="gone"):
        score("mmau-pro", pro, {item.id: "a dog" for item in pro}, judge=judge)


def test_an_empty_prediction_is_wrong_or_scored_officially(pro):
    items = [item for item in pro if item.kind == "closed"][:2]
    assert score("mmau-pro", items, {item.id: "" for item in items})["accuracy"] == 0
    report = score("mmau-pro", items, {items[0].id: ""}, embed=letters_embed)  # the embedding of "" ties: the first
    assert (report["right"], report["empty"], report["missing"]) == (1, 1, 1)


@pytest.mark.parametrize("predictions, message", [
    ({"u0": "a seal", "zz": "a seal"}, "1 predictions have an id .* 'zz'"), ({"u0": None}, "'u0' is None"),
    ({"u0": 3}, "'u0' is 3"), ({1: "a"}, "the first 1;")])
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


# ─────────────────────────────────────────────────── broken files ─────────────────────────────────────────────────────

BASE = {"mmau": mmau_rows()[20], "mmar": mmar_rows()[0], "mmsu": mmsu_rows()[0], "mmau-pro": mmau_pro_rows()[800]}


@pytest.mark.parametrize("name, change, message", [
    ("mmau", {"id": None}, "'id' is None"), ("mmau", {"id": True}, "'id' is True"), ("mmau", {"id": " "}, "'id'"),
    ("mmau", {"audio_id": None}, "'audio_id' is None"), ("mmau", {"audio_id": []}, "'audio_id'"),
    ("mmau", {"audio_id": ["x.wav", 3]}, "'audio_id'"), ("mmau", {"question": ""}, "'question'"),
    ("mmau", {"choices": None}, "'choices' is None"), ("mmau", {"choices": "a seal"}, "'choices'"),
    ("mmau", {"choices": ["a seal"]}, "1 choices"), ("mmau", {"choices": ["a seal", 3]}, "'choices'"),
    ("mmau", {"choices": ["a seal", " "]}, "'choices'"), ("mmau", {"answer": None}, "'answer' is None"),
    ("mmau", {"answer": "a horse"}, "'a horse' is not among"), ("mmau", {"task": None}, "'task' is None"),
    ("mmau", {"task": 3}, "'task' is 3"), ("mmau", {"category": []}, "'category'"),
    ("mmar", {"modality": None}, "'modality'"), ("mmar", {"answer": "bob"}, "not among"),
    ("mmar", {"audio_path": 3}, "'audio_path' is 3"),
    ("mmsu", {"answer_gt": None}, "'answer_gt'"), ("mmsu", {"answer_gt": "B"}, "'B' is not among"),
    ("mmsu", {"choice_b": None, "choice_c": None, "answer_gt": "rising"}, "1 choices"),
    ("mmsu", {"choice_c": ""}, "choice_a … choice_d"), ("mmsu", {"category": None}, "'category'"),
    ("mmau-pro", {"category": None}, "'category'"), ("mmau-pro", {"answer": None}, "'answer' is None"),
    ("mmau-pro", {"answer": "a horse"}, "not among"), ("mmau-pro", {"category": "open", "answer": None}, "'answer'"),
    ("mmau-pro", {"category": "instruction following"}, "'task_identifier' is None"),
    ("mmau-pro", {"category": "instruction following", "task_identifier": "Title", "kwargs": "N"}, "'kwargs' is 'N'"),
])
def test_a_bad_row_names_file_line_and_field(tmp_path, name, change, message):
    path = write(tmp_path / "rows.jsonl", [BASE[name], BASE[name] | {"id": "other"} | change])
    with pytest.raises(InputError, match=message) as error:
        read_benchmark(name, path)
    assert str(error.value).startswith(f"{path}:2: ") and "\n" not in str(error.value)


def test_an_id_that_stands_twice(tmp_path):
    for suffix, row in (".json", ": row "), (".jsonl", ":"), (".parquet", ": row "):
        path = write(tmp_path / f"rows{suffix}", [BASE["mmar"], BASE["mmar"] | {"id": "other"}, BASE["mmar"]])
        with pytest.raises(InputError) as error:
            read_benchmark("mmar", path)
        assert str(error.value) == f"{path}{row}3: id 'r0' stands in {path}{row}1 already; make ids unique"


@pytest.mark.parametrize("file, content, message", [
    ("none.json", None, "no such file"), ("rows.csv", b"id\n", "files end in .json, .jsonl, .parquet"),
    ("rows.json", b"", "not valid json"),
    ("rows.json", b'{"id": "a"}\n{"id": "b"}', "name a file of json lines .jsonl"),
    ("rows.json", b'{"id": "a"}', "a dict, not a list"), ("rows.json", b"[3]", "row 1: a int, not a json object"),
    ("rows.json", b"[]", "no rows"), ("rows.json", b'["\xff"]', "not UTF-8"),
    ("rows.jsonl", b"\n\n", "no rows"), ("rows.jsonl", b"\n{]\n", ":2: not valid json"),
    ("rows.jsonl", b"[]\n", ":1: a list, not a json object"), ("rows.jsonl", b"\xff\n", ":1: not UTF-8"),
    ("rows.parquet", b"PAR1 is not enough", "cannot be read as parquet"), ("rows.parquet", b"", "as parquet"),
])
def test_a_bad_file(tmp_path, file, content, message):
    if content is not None:
        (tmp_path / file).write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        read_benchmark("mmau", tmp_path / file)
    assert str(tmp_path / file) in str(error.value) and "\n" not in str(error.value)


def test_what_is_tolerated(tmp_path):
    row = BASE["mmau"] | {"answer": " a seal", "audio_id": ["./a/b.wav", "c.wav"], "difficulty": None}
    item, = read_benchmark("mmau", write(tmp_path / "rows.json", [row]))
    assert item.audio == (tmp_path / "a/b.wav", tmp_path / "c.wav") and "difficulty" not in item.groups
    assert score("mmau", [item], {item.id: "a seal"})["right"] == 1


def test_parquet_with_packed_sound(tmp_path):
    rows = [BASE["mmsu"] | {"audio": {"bytes": b"RIFF", "path": "s0.wav"}}]
    item, = read_benchmark("mmsu", write(tmp_path / "mmsu.parquet", rows), audio_root=tmp_path / "wav")
    assert item.audio == (tmp_path / "wav/s0.wav",)


# ────────────────────────────────────────────────── the paper's tables ────────────────────────────────────────────────


def test_table_1_is_the_mean_of_four_totals():
    for *totals, average in PAPER["table 1"].values():
        assert len(totals) == 4 and sum(totals) / 4 == pytest.approx(average, abs=0.00501)
    assert not math.isclose(sum(PAPER["table 1"]["GRPO (phase 1)"][:4]) / 4, 71.18, abs_tol=0.2)  # Section 4.1's text


def test_table_1_agrees_with_tables_2_and_3():
    averages = paper_averages()
    for model, in_table_1 in [("MAPO", "MAPO (phase 2)"), ("Qwen3-Omni-Thinking",) * 2, ("Qwen3-Omni-Instruct",) * 2]:
        assert averages[model] == pytest.approx(PAPER["table 1"][in_table_1][-1], abs=0.00501)
        assert tuple(PAPER[name][model][-1] for name in ("mmau", "mmar", "mmsu", "mmau-pro")) == \
            PAPER["table 1"][in_table_1][:4]


@pytest.mark.parametrize("model", ["MAPO", "Qwen3-Omni-Thinking", "Qwen3-Omni-Instruct"])
def test_totals_are_weighted_by_the_counts_of_rows(model):
    """So the paper counts over all rows, and its MMAU-Pro over 87 + 4592 + 625."""
    for name, weights in ("mmau", (333, 334, 333)), ("mmsu", (2580, 2420)), ("mmau-pro", (87, 4592, 625)):
        *values, total = PAPER[name][model]
        assert np.average(values, weights=weights) == pytest.approx(total, abs=0.011)


def test_markdown_table(tmp_path):
    rows = mmau_rows()
    items = read_benchmark("mmau", write(tmp_path / "m.json", rows))
    report = score("mmau", items, {row["id"]: "a seal" for row in rows if row["task"] != "music"})
    lines = markdown_table("mmau", report, "toy | run").splitlines()
    assert lines[:5] == ["| Model | Sound | Music | Speech | Avg. |", "|---|---:|---:|---:|---:|",
                         "| toy \\| run | 100.00 | 0.00 | 100.00 | 66.60 |",
                         "| MAPO (paper) | 79.88 | 71.86 | 81.68 | 77.80 |",
                         "| Qwen3-Omni-Thinking (paper) | 77.48 | 70.96 | 76.58 | 75.00 |"]
    assert len(lines) == 3 + len(PAPER["mmau"]) and lines[5].startswith("| Human (paper) | 86.31 |")
    with pytest.raises(InputError, match="'mmar' from a report of 'mmau'"):
        markdown_table("mmar", report, "ours")


@pytest.mark.parametrize("name, heading, mapo", [
    ("mmar", "| Model | Sound | Music | Speech | Avg. |", "| MAPO (paper) | 66.06 | 55.83 | 77.89 | 70.90 |"),
    ("mmsu", "| Model | Perception | Reasoning | Overall |", "| MAPO (paper) | 76.36 | 82.56 | 79.36 |"),
    ("mmau-pro", "| Model | AIF | Closed | Open | Overall |", "| MAPO (paper) | 95.40 | 62.00 | 85.32 | 65.29 |")])
def test_other_tables(tmp_path, name, heading, mapo):
    rows = {"mmar": mmar_rows, "mmsu": mmsu_rows, "mmau-pro": mmau_pro_rows}[name]()[:: 40]
    items = read_benchmark(name, write(tmp_path / "m.jsonl", rows))
    report = score(name, items, {item.id: item.answer for item in items}, judge=lambda prompt: "OVERALL: 5")
    lines = markdown_table(name, report, "ours").splitlines()
    assert lines[0] == heading and lines[3] == mapo and lines[4].startswith("| Qwen3-Omni-Thinking (paper) |")
    cells = lines[2].split(" | ")[1:]
    assert cells[-2 if name == "mmau-pro" else 0].startswith("100.00")
    assert all(line.count("|") == heading.count("|") for line in lines)
