"""The POS gate: tokens per second on one core and on all cores, and its share of a training step.

    python bench/pos.py

Input: 192 completions of 500 tokens. That is what one optimizer step of the paper trains on:
global batch 192, completions of at most 500 tokens. Each completion is made of SENTENCES about
sounds, whose names are drawn from the words that NLTK's tagger knows. Qwen's real vocabulary cuts
it into tokens.

The gate is compared with what it replaces: decoding the completion, NLTK's own word tokenizer and
the same tagger, without finding the tokens of each word. On all cores, the completions are split
over processes that have already loaded the tagger.

Share of a 30B step: each of the paper's 24 ranks computes the gate of its own completions, on one
core. The duration of the step is computed, not measured (see `step_seconds`), and leaves out
generation. The true step is longer, so the true share is smaller.
"""

import os
import random
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import measure
from nltk.tokenize import NLTKWordTokenizer
from transformers import AutoTokenizer

sys.path.append(str(measure.ROOT / "tests"))
import qwen_vocabulary
from plan import PROMPT_TEXT
from pos_gate import load_tagger, pos_gate_batch, tagged_words

COMPLETIONS, TOKENS = 192, 500  # of one optimizer step
RANKS = 24  # the paper's training GPUs
SENTENCES = (
    "First I listen to the recording: there is a {a}, followed by what sounds like a {b}.",
    "The question asks which sound comes first, so I need to compare the {a} with the {b}.",
    "At about {n}.{m} seconds the {a} gets louder, and it doesn't fade until the {b} starts.",
    "Hmm, it could also be a {b}, but the rhythm isn't regular enough for that.",
    "The options are A. {a}, B. {b}, C. {c}; option B seems unlikely: I hear no {b} at all.",
    "Therefore the most plausible answer is \"{a}\" — the {c} is only in the background.\n\n")


def step_seconds():
    """Seconds of one optimizer step of the 30B model, computed.

    FLOPs per parameter and token: 2 for each forward (π_old, π_ref, π_text-ref) and 8 for the
    update with recomputed activations. 3.35 B parameters are active. A row has 200 tokens of
    question, 390 of audio and 500 of completion. Each of the 24 GPUs (H20, 148 TFLOP/s in bf16)
    reaches 40 % of its peak.
    """
    flops = (2 + 2 + 2 + 8) * 3.35e9 * COMPLETIONS * (PROMPT_TEXT + 390 + TOKENS)
    return flops / (RANKS * 148e12 * 0.4)


def names():
    """The words that the tagger has seen in training."""
    features = load_tagger().model.weights
    return sorted(name.removeprefix("i word ") for name in features if name.startswith("i word "))


def text(number, names):
    """Reasoning of more than 500 tokens, different for each number."""
    draw, parts = random.Random(number), ["<think>"]
    while sum(map(len, parts)) < 3500:
        a, b, c = (" ".join(draw.choices(names, k=2)) for _ in range(3))
        parts.append(draw.choice(SENTENCES).format(
            a=a, b=b, c=c, n=draw.randrange(30), m=draw.randrange(10)) + " ")
    return "".join(parts)


def real_tokenizer():
    with tempfile.TemporaryDirectory() as folder:
        qwen_vocabulary.write_vocabulary(folder)
        qwen_vocabulary.write_config(Path(folder), template="")
        return AutoTokenizer.from_pretrained(folder)


_tokenizer = None  # one per process, because the gate caches its table of bytes per tokenizer


def start(tokenizer):
    """Prepares a process: it loads the tagger and makes the table of bytes."""
    global _tokenizer
    _tokenizer = tokenizer
    pos_gate_batch([[0]], tokenizer)


def gates_of(completions):
    return pos_gate_batch(completions, _tokenizer)[0]


def nltk_words(completions):
    """The words of each completion and their tags, from NLTK alone."""
    split = NLTKWordTokenizer().tokenize
    return [load_tagger().tag(split(_tokenizer.decode(ids))) for ids in completions]


def main():
    flags = measure.options(__doc__, rounds=5, device=False).parse_args()
    vocabulary, cores = names(), len(os.sched_getaffinity(0))
    texts = [text(number, vocabulary) for number in range(COMPLETIONS)]
    tokenizer = real_tokenizer()
    completions = [ids[:TOKENS]
                   for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
    assert {len(ids) for ids in completions} == {TOKENS}
    start(tokenizer)
    words = sum(len(tagged_words(ids, tokenizer)) for ids in completions)

    one, several, plain = [], [], []
    parts = [completions[i::cores] for i in range(cores)]
    with ProcessPoolExecutor(cores, get_context("spawn"), start, (tokenizer,)) as pool:
        list(pool.map(gates_of, parts))
        for _ in range(flags.rounds):
            started = time.perf_counter()
            gates_of(completions)
            one.append(time.perf_counter() - started)
            started = time.perf_counter()
            list(pool.map(gates_of, parts))
            several.append(time.perf_counter() - started)
            started = time.perf_counter()
            nltk_words(completions)
            plain.append(time.perf_counter() - started)

    print(f"{measure.machine(1, 'nltk')}; medians of {flags.rounds} interleaved repeats; "
          f"{words:,} words\n")
    total = COMPLETIONS * TOKENS
    one, several, plain = map(statistics.median, (one, several, plain))
    measure.table(["POS gate, 192 × 500 tokens", "s", "tokens/s", "time / NLTK's"],
                  [[name, f"{s:.2f}", f"{total / s:,.0f}", f"{s / plain:.2f}"]
                   for name, s in (("1 core", one), (f"{cores} cores", several),
                                   ("decode, NLTK's words and tags, 1 core", plain))])
    print(f"A step of the 30B model takes {step_seconds():.1f} s (computed). Each of {RANKS} ranks "
          f"gates {total // RANKS:,} tokens in {one / RANKS:.3f} s, "
          f"{100 * one / RANKS / step_seconds():.1f} % of the step.")


if __name__ == "__main__":
    main()
