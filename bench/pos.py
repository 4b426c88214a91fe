"""The POS gate: tokens/s for 192 completions of 500 tokens, on one core and on all.

    python bench/pos.py

The completions are sentences about sounds (`SENTENCES`; their names are drawn from the 12,204 words that the tagger
knows), cut at 500 tokens of a byte-level BPE of Qwen's class and pre-tokenizer, trained on them.
  ours          `pos_gate.pos_gate_batch` on all completions
  word by word  the same words, but a call of NLTK's tagger for each completion, and each token's text decoded by the
                tokenizer and laid along the words: what one writes first
On all cores: the completions are split over processes that are there already.
A step of the 30B recipe: the paper's 24 training GPUs, taken as H20 (148 TFLOP/s in bf16) at 40 % of that rate, for the
forwards of π_old, π_ref, π_text-ref and the update with recomputation, 2 + 2 + 2 + 8 FLOPs a parameter and token, on
192 completions of 500 tokens and prompts of 590; 3.35 B parameters are active. Computed, and generation left out: a
lower bound.
"""

import os
import random
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import measure
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import Qwen2Tokenizer

import pos_gate
from plan import PROMPT_TEXT

COMPLETIONS, TOKENS, ACTIVE, AUDIO = 192, 500, 3.35e9, 390
SENTENCES = ("First I listen to the recording: there is a {a}, followed by what sounds like a {b}.",
             "The question asks which sound comes first, so I need to compare the {a} with the {b} carefully.",
             "At about {n}.{m} seconds the {a} gets louder, and it doesn't fade until the {b} starts.",
             "Hmm, it could also be a {b}, but the rhythm isn't regular enough for that.",
             "The options are A. {a}, B. {b}, C. {c}; option B seems unlikely because I hear no {b} at all.",
             "Therefore the most plausible answer is \"{a}\" — the {c} is only in the background.\n\n")


def text(number):
    """A thought of more than 500 tokens, another for each number."""
    draw, parts = random.Random(number), ["<think>"]
    while sum(map(len, parts)) < 3500:
        a, b, c = (" ".join(draw.choices(_own["names"], k=2)) for _ in range(3))
        parts.append(draw.choice(SENTENCES).format(a=a, b=b, c=c, n=draw.randrange(30), m=draw.randrange(10)) + " ")
    return "".join(parts)


def tokenizer():
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(map(text, range(200)), trainers.BpeTrainer(
        vocab_size=8000, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return Qwen2Tokenizer(tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>")


def word_by_word(completions, tok, tagger):
    """The gate as one writes it first. Right where every token is whole characters, as here."""
    gates = []
    for ids in completions:
        pieces = [tok.decode([i]) for i in ids]
        spans, tokens = pos_gate._tokens("".join(pieces))
        wanted = set()
        for span, (_, tag) in zip(spans, tagger.tag(tokens)):
            if span and pos_gate.PENN_TO_UNIVERSAL[tag] in pos_gate.POS_TARGETS:
                wanted.update(range(*span))
        gate, place = [], 0
        for piece in pieces:
            gate.append(int(any(c in wanted for c in range(place, place + len(piece)))))
            place += len(piece)
        gates.append(gate)
    return gates


_own = {}  # of a process: its tokenizer, NLTK's tagger, and the names of the sentences


def start(tok=None):
    tagger = pos_gate.load_tagger()
    names = sorted(word.removeprefix("i word ") for word in tagger.model.weights if word.startswith("i word "))
    _own.update(tagger=tagger, names=names)
    _own["tokenizer"] = tok or tokenizer()
    tok = _own["tokenizer"]
    pos_gate.pos_gate_batch([completion(tok, 0)], tok)  # its tables are made once


def completion(tok, number):
    return tok(text(number), add_special_tokens=False)["input_ids"][:TOKENS]


def gates_of(name, completions):
    if name == "ours":
        return pos_gate.pos_gate_batch(completions, _own["tokenizer"])[0]
    return word_by_word(completions, _own["tokenizer"], _own["tagger"])


def main():
    flags = measure.options(__doc__, rounds=5, device=False).parse_args()
    start()
    tok, cores = _own["tokenizer"], len(os.sched_getaffinity(0))
    completions = [completion(tok, number) for number in range(COMPLETIONS)]
    assert {len(c) for c in completions} == {TOKENS}
    words = sum(len(words) for words in pos_gate.tagged_words(completions, tok))
    different = len({word for c in completions for word in tok.decode(c).split()})
    parts = [completions[i::cores] for i in range(cores)]
    seconds = {(name, n): [] for name in ("word by word", "ours") for n in sorted({1, cores})}
    with ProcessPoolExecutor(cores, get_context("spawn"), start, (tok,)) as pool:
        list(pool.map(gates_of, ["ours"] * cores, parts))
        for _ in range(flags.rounds):
            results = {}
            for name, n in seconds:
                started = time.perf_counter()
                results[name, n] = gates_of(name, completions) if n == 1 else list(
                    pool.map(gates_of, [name] * cores, parts))
                seconds[name, n].append(time.perf_counter() - started)
            assert results["ours", 1] == results["word by word", 1]
    step = (2 + 2 + 2 + 8) * ACTIVE * COMPLETIONS * (TOKENS + PROMPT_TEXT + AUDIO) / (24 * 148e12 * 0.4)
    print(f"{measure.machine(1, 'nltk')}, medians of {flags.rounds} interleaved repeats; {words:,} words, "
          f"{different:,} different; a step of the 30B recipe: {step:.1f} s (computed)\n")
    middle = {key: statistics.median(values) for key, values in seconds.items()}
    measure.table(["POS gate, 192 × 500 tokens", "cores", "s", "tokens/s", "× word by word", "% of a step"],
                  [[name, n, f"{middle[name, n]:.3f}", f"{COMPLETIONS * TOKENS / middle[name, n]:,.0f}",
                    f"{middle['word by word', n] / middle[name, n]:.1f}", f"{100 * middle[name, n] / step:.1f}"]
                   for name, n in middle])


if __name__ == "__main__":
    main()
