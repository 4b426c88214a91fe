"""plots.py: what the saved figures show. The commands of evaluate.py draw through it."""

import json
from pathlib import Path

import numpy as np
import pytest
from test_evaluate import run

import plots


@pytest.fixture
def pictures(monkeypatch):
    """{file name: the matplotlib figure that was saved under it}."""
    saved, save = {}, plots.Figure.savefig

    def keep(figure, path, **options):
        save(figure, path, **options)
        saved[Path(path).name] = figure
    monkeypatch.setattr(plots.Figure, "savefig", keep)
    return saved


def write_lines(path, rows):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def curves_of(axis):
    """{label: (x, y)} of an axis; y is rounded."""
    return {line.get_label(): (list(line.get_xdata()), list(np.round(line.get_ydata(), 9)))
            for line in axis.lines}


# ──────── training curves ────────


def test_training_png(tmp_path, pictures):
    """Faint values, their mean over the last 5, and the held-out accuracy. Nothing for no value."""
    write_lines(tmp_path / "metrics.jsonl", [
        {"step": s, "accuracy": s / 10, "completion_length": 7.0,
         "audio_mass_max": None if s == 2 else 0.1 * s, "audio_mass_max_late": None}
        for s in range(1, 8)])
    write_lines(tmp_path / "evaluation.jsonl", [{"step": 0, "accuracy": 0.5},
                                                {"step": 7, "accuracy": 1.0}])
    plots.plot_training(tmp_path)
    accuracy, length, mass = pictures["training.png"].axes
    faint, strong, held_out = accuracy.lines
    assert list(faint.get_ydata()) == [s / 10 for s in range(1, 8)] and faint.get_alpha() == 0.25
    assert list(strong.get_ydata()) == pytest.approx([0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5])
    assert list(held_out.get_xdata()) == [0, 7] and list(held_out.get_ydata()) == [0.5, 1.0]
    assert curves_of(length)["completion length"] == (list(range(1, 8)), [7.0] * 7)
    # a_t was not measured in step 2: the mean is over the last 5 measured steps
    steps, values = curves_of(mass)["max head, all tokens"]
    assert steps == [1, 3, 4, 5, 6, 7] and values[-1] == pytest.approx(0.5)
    assert [text.get_text() for text in mass.get_legend().get_texts()] == ["max head, all tokens"]


def test_curves_of_two_runs(tmp_path, pictures):
    """One line per run, smoothed over the window, without the steps that lack a value."""
    for name, eta in (("a", 0.1), ("b", 0.0)):
        write_lines(tmp_path / name / "metrics.jsonl", [
            {"step": s, "attention_loss": eta * s, "accuracy": s / 4,
             "completion_length": 10.0 * s, "audio_mass_max": None if s == 2 else 0.1 * s}
            for s in (1, 2, 3)])
        write_lines(tmp_path / name / "completions.jsonl", [
            {"step": s, "text": "one " * s * k + "</think> a"} for s in (1, 2, 3) for k in (1, 3)])
    code, _, err = run("curves", f"mapo={tmp_path / 'a'}", tmp_path / "b", "--out",
                       tmp_path / "out", "--window", 2)
    assert code == 0, err
    assert sorted(pictures) == ["fig3_attention_loss.png", "fig4_accuracy_length.png",
                                "fig5_audio_mass.png", "fig8_accuracy_words.png"]
    drawn = {name.split("_")[0]: [curves_of(axis) for axis in figure.axes]
             for name, figure in pictures.items()}
    # run b has η = 0 and no attention loss
    assert drawn["fig3"] == [{"mapo": ([1, 2, 3], [0.1, 0.15, 0.25])}]
    assert drawn["fig5"] == [{label: ([1, 3], [0.1, 0.2]) for label in ("mapo", "b")}]
    accuracy, length = drawn["fig4"]
    assert accuracy["b"][1] == [0.25, 0.375, 0.625] and length["mapo"][1] == [10, 15, 25]
    _, words = drawn["fig8"]
    assert words["b"] == ([1, 2, 3], [2, 3, 5])  # the steps have 2, 4 and 6 words of thinking


@pytest.mark.parametrize("text, style, words", [
    ("<think> a b c</think> d", "think", 3), ("a b c</think> d", "think", 3),
    ("a b c", "think", 3), ("<think> a b", "think", 2), ("</think> d", "think", 0),
    ("<reasoning>a b</reasoning><answer>c</answer>", "reasoning", 2),
    ("<reasoning>a b", "reasoning", 2), ("<answer>c</answer>", "reasoning", 0)])
def test_words_of_thinking(text, style, words):
    """A completion that was cut off while thinking is all thinking."""
    assert plots.thinking_words(text, style) == words


# ──────── traces ────────

ROW = {"model": "m", "id": "q", "tokens": ["$x", "\n", "_^{", "\t%"], "token_ids": [1, 2, 3, 4],
       "delta_h": [0.1, -0.2, 0.0, 1.0], "text_ref_entropy": [1.0] * 4,
       "audio_mass_max": [0.5] * 4, "audio_mass_mean": [0.1] * 4}
LONG = {name: value * 60 if isinstance(value, list) else value for name, value in ROW.items()}
SHORT = {name: value[:1] if isinstance(value, list) else value for name, value in ROW.items()}
SHORT_WITHOUT_MASS = SHORT | {"audio_mass_max": [0.0]}


def test_labels_of_a_trace(tmp_path, pictures):
    """Dollars appear as they are, line breaks as escapes; a long completion has no labels."""
    plots.draw_trace([ROW], tmp_path / "few.png")
    plots.draw_trace([LONG], tmp_path / "long.png")
    few, long = pictures["few.png"].axes[0], pictures["long.png"].axes[0]
    assert [t.get_text() for t in few.get_xticklabels()] == ["$x", "\\n", "_^{", "\\t%"]
    assert len(long.get_xticks()) < 40


def test_traces_of_different_length(tmp_path, pictures):
    """All panels have the x axis of the longest, so that equal tokens are below each other."""
    plots.draw_trace([LONG, SHORT_WITHOUT_MASS], tmp_path / "uneven.png")
    assert {axis.get_xlim() for axis in pictures["uneven.png"].axes} == {(0, 241)}


def test_a_trace_of_one_token(tmp_path, pictures):
    """A line through one point would be invisible, so the point has a marker."""
    plots.draw_trace([SHORT_WITHOUT_MASS], tmp_path / "one.png")
    mass = pictures["one.png"].axes[1]
    assert mass.lines[0].get_marker() == "." and mass.get_ylim() == (0, 1)


# ──────── parts of speech, masking ────────


def test_bars_by_part_of_speech(tmp_path, pictures):
    """Each model's bars are at its own tags, side by side with those of the other model."""
    means = {"a": {"NOUN": (2, 2.0, 1.0), "no word": (1, 0.5, 0.1)}, "b": {"NOUN": (1, 3.0, -1.0)}}
    plots.draw_pos(["NOUN", "no word"], means, tmp_path / "pos.png")
    upper, lower = pictures["pos.png"].axes
    assert [bar.get_height() for bar in upper.patches] == [2.0, 0.5, 3.0]
    assert [bar.get_height() for bar in lower.patches] == [1.0, 0.1, -1.0]
    centres = [bar.get_x() + bar.get_width() / 2 for bar in upper.patches]
    assert centres == pytest.approx([-0.2, 0.8, 0.2])
    assert [t.get_text() for t in lower.get_xticklabels()] == ["NOUN *", "no word"]


def test_accuracy_of_masked_audio(tmp_path, pictures):
    """One panel per model, one line per kind of mask, all from the accuracy on whole clips."""
    by_ratio = {0.1: ({"top": 0.6, "random": 0.7, "low": 0.8}, {}),
                0.5: ({"top": 0.1, "random": 0.3, "low": 0.5}, {})}
    plots.draw_acs({"m": (0.9, by_ratio), "n": (0.8, {})}, 5, tmp_path / "acs.png")
    first, second = pictures["acs.png"].axes
    assert curves_of(first) == {"low attention": ([0, 10, 50], [0.9, 0.8, 0.5]),
                                "random, 5 seeds": ([0, 10, 50], [0.9, 0.7, 0.3]),
                                "top attention": ([0, 10, 50], [0.9, 0.6, 0.1])}
    assert [axis.get_title() for axis in (first, second)] == ["m", "n"]


# ──────── GRPO beside MAPO ────────


def test_comparison(tmp_path, pictures):
    """The held-out curve as it is, a_t where it was measured, length as a mean of five steps."""
    metrics = [{"step": s, "audio_mass_max_late": 0.1 if s == 1 else None,
                "completion_length": float(s)} for s in range(1, 7)]
    plots.draw_comparison({"GRPO": (metrics, [(0, 0.25), (6, 0.5)]),
                           "MAPO": (metrics, [(0, 0.25), (6, 0.75)])}, tmp_path / "compare.png")
    accuracy, mass, length = pictures["compare.png"].axes
    assert curves_of(accuracy) == {"GRPO": ([0, 6], [0.25, 0.5]), "MAPO": ([0, 6], [0.25, 0.75])}
    assert curves_of(mass)["MAPO"] == ([1], [0.1])
    assert curves_of(length)["GRPO"] == ([1, 2, 3, 4, 5, 6], [1, 1.5, 2, 2.5, 3, 4])


def test_study(tmp_path, pictures):
    """One thin line per seed, and their mean with the name of the arm."""
    row = lambda end: {"curve": [[0, 0.2], [20, end]], "late_mass": [[1, end]],
                       "length": [[10, 40.0]]}
    plots.draw_study({"GRPO": [row(0.2), row(0.4)]}, tmp_path / "study.png")
    accuracy, mass, _ = pictures["study.png"].axes
    assert [list(line.get_ydata()) for line in accuracy.lines[:2]] == [[0.2, 0.2], [0.2, 0.4]]
    assert curves_of(accuracy)["GRPO"] == ([0, 20], [0.2, 0.3])
    assert curves_of(mass)["GRPO"] == ([1], [0.3])
