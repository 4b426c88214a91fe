"""bench/toy_study.py: the statistics, by hand. The study itself is not run here."""

import json
import sys
from pathlib import Path

import pytest
import torch

import toy

sys.path.append(str(Path(__file__).resolve().parents[1] / "bench"))
import toy_study  # noqa: E402


def test_paired_differences_by_hand():
    """Mean 0.2; standard deviation of 0.1, 0.2, 0.3 is 0.1, over √3."""
    assert toy_study.paired([0.1, 0.2, 0.3]) == "+0.200 ± 0.058 (3 of 3)"
    assert toy_study.paired([-0.1, 0.1]) == "+0.000 ± 0.100 (1 of 2)"


def test_the_key_token_is_the_first_name_or_kind(tmp_path):
    """ω̃ of Eq. 1 with T = 3: 3 e^{Δh/ln 3} / Σ, at the name and not at the kind after it."""
    tokenizer = toy.build_tokenizer(toy.toy_texts())
    the, owl, animal = tokenizer.convert_tokens_to_ids(["Ġthe", "Ġowl", "Ġanimal"])
    gains = [0.0, 2.0, 1.0]
    (tmp_path / "completions.jsonl").write_text(json.dumps(
        {"token_ids": [the, owl, animal], "delta_h": gains}) + "\n")
    weights = torch.exp(torch.tensor(gains) / torch.log(torch.tensor(3.0)))
    omega, gain = toy_study.key_token(tmp_path, tokenizer)
    assert omega == pytest.approx((3 * weights[1] / weights.sum()).item(), abs=1e-6)
    assert gain == 2.0
    (tmp_path / "completions.jsonl").write_text(json.dumps(
        {"token_ids": [the, owl], "delta_h": None}) + "\n")
    assert toy_study.key_token(tmp_path, tokenizer) == (None, None)


def test_a_run_that_has_a_line_is_not_repeated(tmp_path, monkeypatch):
    """A run with another rate is. A failed run keeps its line, too."""
    monkeypatch.setattr(toy_study, "RESULTS", tmp_path / "results.jsonl")
    monkeypatch.setattr(toy_study, "OUT", tmp_path)
    calls = []
    monkeypatch.setattr(toy_study.train, "main", lambda flags: calls.append(flags) or 1)
    for rate in (1e-3, 1e-3, 2e-3):
        toy_study.run(("late", 1, "mask", rate, "tune"))
    assert len(calls) == 2 and calls[0][calls[0].index("--eta") + 1] == "0"
    rows = toy_study.results()
    assert [(row["rate"], row["failed"]) for row in rows] == [(1e-3, 1), (2e-3, 1)]
