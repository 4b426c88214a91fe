"""NLTK's averaged perceptron tagger on many texts at once: the same tags, without a Python loop over features.

The score of a tag for word i is a sum of 14 weights (NLTK's `_get_features`). Ten of them know words alone: the word,
its first letter and ending, and the two words before and after it. They are added up once for each *different* word.
The other four know the tags of words i − 1 and i − 2, which come from the scores: so all texts advance together, one
word a step, and a step is a few operations on arrays of [texts, tags].

The weights are multiples of 0.001 below 100. In thousandths their sums are whole numbers that float32 holds exactly,
and equal scores are equal: NLTK's own sums of floats break such ties by the last bit.
"""

from functools import lru_cache

import numpy as np

# The features that know words alone, by the word that they are about (i, i − 1, i − 2, i + 1, i + 2), and what of it
# they read: the word, its last three letters or its first, as they stand or as NLTK's `normalize` writes them.
FEATURES = {"own": (("i suffix", "ending"), ("i pref1", "first"), ("i word", "plain")),
            "before": (("i-1 word", "plain"), ("i-1 suffix", "plain_ending")), "before2": (("i-2 word", "plain"),),
            "after": (("i+1 word", "plain"), ("i+1 suffix", "plain_ending")), "after2": (("i+2 word", "plain"),)}


def tag_texts(texts, tagger):
    """texts: lists of tokens → lists of Penn tags, those of [tagger.tag(text) for text in texts].

    Array names: [U] different words (and the marks of a text's start and end), [N] texts, longest first, C tags.
    """
    tags, rows, weights, follows, pairs = _tables(tagger)
    words = {word: u for u, word in enumerate(dict.fromkeys(word for text in texts for word in text))}
    starts, ends = [len(words), len(words) + 1], [len(words) + 2, len(words) + 3]
    known = np.array([tags.get(tagger.tagdict.get(word), -1) for word in words] + [-1] * 4)  # words of one tag [U]
    plain = [tagger.normalize(word) for word in words] + tagger.START + tagger.END
    read = {"plain": plain, "plain_ending": [p[-3:] for p in plain],
            "ending": [word[-3:] for word in words] + [""] * 4, "first": [word[:1] for word in words] + [""] * 4}
    nothing = len(weights) - 1  # the row of zeros
    by_word = {place: sum(weights[[rows[name].get(x, nothing) for x in read[what]]] for name, what in names)
               for place, names in FEATURES.items()}  # [U, C] each
    after_tag = np.full((len(plain), len(tags) + 2), nothing)  # row of "i-1 tag+i word" for each tag before  [U, C + 2]
    for u, p in enumerate(plain):
        for tag, row in follows.get(p, ()):
            after_tag[u, tag] = row

    order = sorted(range(len(texts)), key=lambda n: -len(texts[n]))  # the texts still running are the first ones
    lengths = np.array([len(texts[n]) for n in order])
    at = np.zeros((max(lengths, default=0) + 4, len(texts)), np.int64)  # words, two marks before and after  [L + 4, N]
    for column, n in enumerate(order):
        at[:len(texts[n]) + 4, column] = [*starts, *(words[word] for word in texts[n]), *ends]
    found = np.zeros_like(at[4:])  # tags  [L, N]
    previous, previous2 = np.full((2, len(texts)), [[len(tags)], [len(tags) + 1]])  # the tags of START
    for t in range(len(found)):
        running = (lengths > t).sum()
        w = at[:, :running]
        before, before2 = previous[:running], previous2[:running]
        scores = (by_word["own"][w[t + 2]] + by_word["before"][w[t + 1]] + by_word["before2"][w[t]]
                  + by_word["after"][w[t + 3]] + by_word["after2"][w[t + 4]] + pairs[before, before2]
                  + weights[after_tag[w[t + 2], before]])  # [texts still running, C]
        sure = known[w[t + 2]]
        found[t, :running] = np.where(sure >= 0, sure, scores.argmax(axis=1))
        previous, previous2 = found[t], before
    names, result = list(tags), [None] * len(texts)
    for column, n in enumerate(order):
        result[n] = [names[tag] for tag in found[:len(texts[n]), column]]
    return result


@lru_cache(maxsize=1)
def _tables(tagger):
    """The tagger's weights as arrays; made once (0.4 s).

    tags: name → number, in falling order, for argmax takes the first of equals and NLTK the last by name
    rows: name of a feature → what it reads → row of weights [features + 1, C], in thousandths; the last row is 0
    follows: word → [(tag before it, row)] of the features "i-1 tag+i word"
    pairs [C + 2, C + 2, C]: what the two tags before and the bias add; the last two are the marks of a text's start
    """
    model = tagger.model
    tags = {tag: c for c, tag in enumerate(sorted(model.classes, reverse=True))}
    before = {**tags, **{mark: len(tags) + i for i, mark in enumerate(tagger.START)}}
    weights = np.zeros((len(model.weights) + 1, len(tags)), np.float32)
    for row, by_tag in enumerate(model.weights.values()):
        for tag, weight in by_tag.items():
            weights[row, tags[tag]] = round(1000 * weight)
    rows = {name: {} for name in [name for names in FEATURES.values() for name, _ in names]
            + ["bias", "i-1 tag", "i-2 tag", "i tag+i-2 tag", "i-1 tag+i word"]}
    for row, feature in enumerate(model.weights):
        name = next(name for name in rows if feature == name or feature.startswith(name + " "))
        rows[name][feature[len(name) + 1:]] = row
    follows = {}
    for tag_and_word, row in rows["i-1 tag+i word"].items():
        tag, word = tag_and_word.split(" ", 1)
        follows.setdefault(word, []).append((before[tag], row))
    pairs = np.zeros((len(before), len(before), len(tags)), np.float32)
    for i, first in enumerate(before):
        for j, second in enumerate(before):
            for name, tag in (("bias", ""), ("i-1 tag", first), ("i-2 tag", second),
                              ("i tag+i-2 tag", f"{first} {second}")):
                pairs[i, j] += weights[rows[name].get(tag, -1)]
    return tags, rows, weights, follows, pairs
