"""Padding: how many tokens the ranks compute for each real one.

    python bench/padding.py

Simulated: lengths are drawn and micro-batches are made as in a run, but nothing is computed. An
optimizer step has 192 completions on 24 ranks. Their lengths are lognormal with σ 0.5 and a mean of
477 tokens, cut at 1,200. A prompt has 390 tokens of audio (30 s) and 200 of text; the second table
varies the text of each question from 50 to 350 tokens, the third has 10 s clips as well.

Ranks wait for each other in every layer. So a slot (the k-th micro-batch of all ranks) costs what
its largest micro-batch costs: `all ranks` is Σ over slots of the largest × ranks / real tokens.
`slowest rank` does not count waiting: it is the largest sum of a rank × ranks / real tokens.
Cells are means over the seeds; the last column is the largest of `all ranks`.
"""

import math
import random
import statistics
from functools import partial

import measure

from balance import micro_batches_by_tokens, padded_tokens, rows_of_rank
from config import TrainConfig
from distributed import Team

ROWS, GROUP, RANKS, SEEDS = 192, 8, 24, 20
LONGEST, MEAN, SIGMA = 1200, 477, 0.5  # tokens of a completion
PROMPTS = {"590 tokens": (390, 200, 200), "440 to 740 tokens": (390, 50, 350),
           "180 to 480 tokens": (130, 50, 350)}  # audio tokens, least and most text
BUDGET = TrainConfig().micro_batch_tokens


def sizes_of_step(seed, audio, least, most):
    """row → (tokens of its prompt, tokens of its completion); a group shares its prompt."""
    draw, sizes = random.Random(seed), {}
    for row in range(ROWS):
        if row % GROUP == 0:
            prompt = audio + draw.randint(least, most)
        length = draw.lognormvariate(math.log(MEAN) - SIGMA ** 2 / 2, SIGMA)
        sizes[row] = prompt, max(1, min(LONGEST, round(length)))
    return sizes


def slots_by_rows(most_rows, sizes):
    """Micro-batches of so many rows → [slots][ranks] of lists of rows."""
    length_of = {row: sum(size) for row, size in sizes.items()}
    ranks = []
    for rank in range(RANKS):
        own = [row for row, _ in rows_of_rank(sizes, length_of, Team(rank=rank, size=RANKS))]
        ranks.append([own[first:first + most_rows] for first in range(0, len(own), most_rows)])
    return list(zip(*ranks))


def slots_by_tokens(most_tokens, sizes):
    """Micro-batches of at most so many tokens → [slots][ranks] of lists of rows."""
    slots = micro_batches_by_tokens(sizes, most_tokens, 0, RANKS)
    return [[[row for row, _ in part] for part in slot] for slot in slots]


def padding(slots, sizes):
    """→ tokens of `all ranks` and of the `slowest rank`, over real tokens."""
    real = sum(map(sum, sizes.values()))
    tokens = [[padded_tokens(rows, sizes) for rows in slot] for slot in slots]
    return RANKS * sum(map(max, tokens)) / real, RANKS * max(map(sum, zip(*tokens))) / real


RULES = {**{f"micro_batch_size {rows}": partial(slots_by_rows, rows) for rows in (8, 4, 2, 1)},
         **{f"micro_batch_tokens {tokens}": partial(slots_by_tokens, tokens)
            for tokens in (BUDGET // 2, BUDGET, 2 * BUDGET)}}


def main():
    for name, prompt in PROMPTS.items():
        steps = [sizes_of_step(seed, *prompt) for seed in range(SEEDS)]
        rows = []
        for rule, slots_of in RULES.items():
            slots = [slots_of(sizes) for sizes in steps]
            everyone, slowest = zip(*map(padding, slots, steps))
            largest = max(padded_tokens(rows, sizes) for found, sizes in zip(slots, steps)
                          for slot in found for rows in slot)
            rows.append([rule, f"{statistics.mean(map(len, slots)):.1f}", f"{largest:,}",
                         f"{statistics.mean(everyone):.2f}", f"{statistics.mean(slowest):.2f}",
                         f"{max(everyone):.2f}"])
        measure.table([f"simulated, prompts of {name}", "forwards of a step", "most tokens",
                       "all ranks", "slowest rank", "worst seed"], rows)


if __name__ == "__main__":
    main()
