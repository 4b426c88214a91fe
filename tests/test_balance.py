"""balance.py: every completion counts once, whatever the number of ranks and the limits."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import balance
import rollout
from distributed import Team

sys.path.append(str(Path(__file__).resolve().parents[1] / "bench"))
import padding  # noqa: E402


@settings(deadline=None)
@given(sizes=st.lists(st.integers(1, 3000), min_size=1, max_size=60), size=st.integers(1, 9))
def test_portion(sizes, size):
    """Every row counts once, on one rank. All ranks get as many rows, with fillers only where the
    number of ranks does not divide them.

    Each round hands out neighbours of the sorted rows, the longest to alternating ends of the
    ranks. So rows at the same place have similar lengths, and the ranks' sums differ by at most the
    difference of the longest and the shortest row.
    """
    rows = range(100, 100 + len(sizes))
    size_of = dict(zip(rows, sizes))
    parts = [balance.rows_of_rank(rows, size_of, Team(rank=rank, size=size))
             for rank in range(size)]
    assert sorted(row for part in parts for row, real in part if real) == list(rows)
    assert {len(part) for part in parts} == {-(-len(rows) // size)}
    assert sum(not real for part in parts for _, real in part) == -len(rows) % size
    totals = [sum(size_of[row] for row, _ in part) for part in parts]
    assert max(totals) - min(totals) <= max(sizes) - min(sizes)
    if size > 1:
        rounds = list(zip(*parts))
        for here, after in zip(rounds, rounds[1:]):
            assert min(size_of[row] for row, _ in here) >= max(size_of[row] for row, _ in after)


def test_micro_batches_of_so_many_rows():
    """With micro_batch_tokens 0: pieces of rows_of_rank, whose order is that of the lengths, back
    and forth. A single process keeps the order of the rows."""
    lengths = [5, 1, 4, 2, 3, 9, 9, 8, 7, 6]  # two steps of five rows
    batch = SimpleNamespace(prompts=[SimpleNamespace(ids=[0] * 3)] * 10,
                            completions=[SimpleNamespace(token_ids=[0] * n) for n in lengths])
    config = SimpleNamespace(step_size=5, micro_batch_size=2, micro_batch_tokens=0)
    first, second, alone = (
        list(rollout.micro_batches(range(10), batch, SimpleNamespace(config=config, team=team)))
        for team in (Team(rank=0, size=2), Team(rank=1, size=2), Team()))
    yes, no = [True, True], [False]
    assert first == [([0, 3], yes), ([1], [True]), ([5, 8], yes), ([9], [True])]
    assert second == [([2, 4], yes), ([1], no), ([6, 7], yes), ([9], no)]
    assert alone == [([0, 1], yes), ([2, 3], yes), ([4], [True]),
                     ([5, 6], yes), ([7, 8], yes), ([9], [True])]


@settings(deadline=None)  # on a busy machine an example takes long
@given(lengths=st.lists(st.tuples(st.integers(1, 900), st.integers(1, 1200)), min_size=1,
                        max_size=60),
       most_tokens=st.integers(1, 20000), most_rows=st.integers(0, 6), ranks=st.integers(1, 9),
       shuffle=st.randoms())
def test_micro_batches_by_tokens(lengths, most_tokens, most_rows, ranks, shuffle):
    """Every row counts once. Every rank has a micro-batch in each slot, within the limits unless it
    is a single row, and slots are sorted by size. Fillers stand only where there are fewer rows.

    No more slots than a plain greedy cut of the completions' order needs. Neither the order in
    which the lengths are given nor the process matters.
    """
    rows = range(100, 100 + len(lengths))
    sizes = dict(zip(rows, lengths))
    slots = balance.micro_batches_by_tokens(sizes, most_tokens, most_rows, ranks)
    parts = [part for slot in slots for part in slot]
    assert {len(slot) for slot in slots} == {ranks}
    assert sorted(row for part in parts for row, real in part if real) == list(rows)
    fillers = sum(not real for part in parts for _, real in part)
    assert fillers == max(0, len(parts) - len(rows))
    assert all(real for part in parts for _, real in part if len(part) > 1)

    def tokens(part):  # by hand: each row as a line of the padded tensor
        left, right = (max(side) for side in zip(*(sizes[row] for row, _ in part)))
        return sum(left + right for _ in part)

    for part in parts:
        assert len(part) == 1 or tokens(part) <= most_tokens and len(part) <= (most_rows or 60)
    for here, after in zip(slots, slots[1:]):
        assert min(map(tokens, here)) >= max(map(tokens, after))

    greedy = []
    for row in sorted(rows, key=lambda row: -sizes[row][1]):
        longer = [*greedy[-1], (row, True)] if greedy else []
        if longer and tokens(longer) <= most_tokens and len(longer) <= (most_rows or 60):
            greedy[-1] = longer
        else:
            greedy.append([(row, True)])
    assert len(slots) <= -(-len(greedy) // ranks)
    shuffled = list(sizes.items())
    shuffle.shuffle(shuffled)
    assert slots == balance.micro_batches_by_tokens(dict(shuffled), most_tokens, most_rows,
                                                        ranks)


@pytest.mark.parametrize("prompt", padding.PROMPTS.values(), ids=padding.PROMPTS)
def test_padding_of_a_step(prompt):
    """24 ranks compute, or wait for, at most 1.20 × the real tokens. Micro-batches of 8 rows make
    that at least 1.5."""
    steps = [padding.sizes_of_step(seed, *prompt) for seed in range(5)]
    now, before = ([padding.padding(slots_of(sizes), sizes)[0] for sizes in steps]
                   for slots_of in (padding.RULES["micro_batch_tokens 8192"],
                                    padding.RULES["micro_batch_size 8"]))
    print(f"{max(now):.3f}, {min(before):.3f} before")
    assert min(before) > 1.5
    assert sum(now) / len(now) <= 1.20 and max(now) <= 1.21
