"""Which rank computes which completions of an optimizer step, and in which micro-batch.

    slots = micro_batches_by_tokens(sizes, 8192, 0, ranks=24)  # micro_batch_tokens 8192
    own = rows_of_rank(rows, length_of, team)                  # micro_batch_tokens 0

The gradient is the same for any micro-batches (train.update). What differs is memory, padding, and
how long the ranks wait for each other. rollout.micro_batches calls these functions.  (ours)
"""

import math
from bisect import bisect_left


def micro_batches_by_tokens(sizes, most_tokens, most_rows, ranks):
    """Cuts an optimizer step into micro-batches of at most `most_tokens` → [slots][ranks] of them.

    sizes: row → (tokens of its prompt, tokens of its completion). Padding counts, see
    padded_tokens; a longer row is a micro-batch of its own. most_rows: 0 is no limit.
    A micro-batch is a list of (row, is it real). In slot k, rank r computes the r-th one. The ranks
    wait for each other in every layer, so the micro-batches of a slot are about equally large. If
    the rows run out, a rank repeats the shortest one, which does not count (real: False).
    The result depends on the lengths alone, so all ranks find the same. Three orders of the rows
    are tried. The one with the fewest slots is kept, and among those the one with the least work.
    """
    slots = min((_slots(_by_length(sizes, bands), sizes, most_tokens, most_rows, ranks)
                 for bands in (1, 2, 4)), key=lambda slots: (len(slots), work(slots, sizes)))
    slots = [[[(row, True) for row in part] for part in slot] for slot in slots]
    shortest = min(sizes, key=lambda row: (sum(sizes[row]), row))
    slots[-1] += [[(shortest, False)]] * (ranks - len(slots[-1]))
    return slots


def padded_tokens(rows, sizes):
    """Tokens of a micro-batch: prompts are padded on the left, completions on the right."""
    return len(rows) * (max(sizes[row][0] for row in rows) + max(sizes[row][1] for row in rows))


def work(slots, sizes):
    """Tokens that every rank computes or waits for: the largest micro-batch of each slot."""
    return sum(max(padded_tokens(rows, sizes) for rows in slot) for slot in slots)


def _by_length(sizes, bands):
    """The rows in `bands` bands of similar prompts, by completion length inside a band.

    Every other band is in ascending order: neighbours are then similar across an edge as well.
    """
    by_prompt = sorted(sizes, key=lambda row: (-sizes[row][0], row))
    band = {row: place * bands // len(sizes) for place, row in enumerate(by_prompt)}
    return sorted(sizes, key=lambda row: (band[row], -sizes[row][1] * (-1) ** band[row], row))


def _slots(order, sizes, most_tokens, most_rows, ranks):
    """Neighbours in `order` → [slots][ranks] of lists of rows. The last slot may have fewer."""
    def cut(tokens):  # micro-batches that are as long as the limits allow
        parts = []
        for row in order:
            longer = [*parts[-1], row] if parts else []
            if (longer and padded_tokens(longer, sizes) <= tokens
                    and len(longer) <= (most_rows or len(order))):
                parts[-1] = longer
            else:
                parts.append([row])
        return parts

    wanted = ranks * math.ceil(len(cut(most_tokens)) / ranks)
    # The smallest limit that needs no more of them makes them most alike.
    limits = range(1, most_tokens + 1)
    parts = cut(limits[bisect_left(limits, True, key=lambda n: len(cut(n)) <= wanted)])
    while len(parts) < min(wanted, len(order)):
        largest = max((part for part in parts if len(part) > 1),
                      key=lambda part: padded_tokens(part, sizes))
        half = len(largest) // 2
        parts.remove(largest)
        parts += [largest[:half], largest[half:]]
    parts.sort(key=lambda part: (-padded_tokens(part, sizes), part))
    return [parts[start:start + ranks] for start in range(0, len(parts), ranks)]


# ──────── micro-batches of so many rows ────────


def rows_of_rank(rows, length_of, team):
    """Which completions of an optimizer step this rank computes → [(row, is it real)].

    Every rank gets the same number, because all must run the same forwards. Rows sorted by length
    go to the ranks in turn, back and forth, so that all ranks have about the same work. If the rows
    run out, a rank repeats one, which then does not count (is real: False).
    """
    if team.size == 1:
        return [(row, True) for row in rows]
    order, own = sorted(rows, key=lambda row: (-length_of[row], row)), []
    for number, start in enumerate(range(0, len(order), team.size)):
        forth = number % 2 == 0
        place = start + (team.rank if forth else team.size - 1 - team.rank)
        own.append((order[place], True) if place < len(order) else (order[-1], False))
    return own
