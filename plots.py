"""Every picture of the project; the only module that imports matplotlib.

    plot_training   training.png of one run: the curves of Figs. 4 and 5
    draw_curves     curves of several runs: Figs. 3, 4, 5 and 8
    draw_trace      one question, token by token: Figs. 2 and 6
    draw_pos        entropies by part of speech: Fig. 7
    draw_acs        accuracy with masked audio: Table 4 as a picture
    draw_comparison GRPO beside MAPO on the toy
    draw_study      four arms and many seeds on the toy
"""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from data import json_lines
from pos_gate import POS_TARGETS

# ──────── training curves ────────


def plot_training(folder):
    """training.png of a run: accuracy and length (Fig. 4) and a_t (Fig. 5) over the steps.

    Faint lines are the values, strong ones the mean of the last 5. Reads metrics.jsonl and
    evaluation.jsonl. Raises InputError if one of them is missing or broken.
    """
    folder = Path(folder)
    metrics, evaluations = ([row for _, row in json_lines(folder / name)]
                            for name in ("metrics.jsonl", "evaluation.jsonl"))
    figure = Figure(figsize=(13, 3.8), layout="constrained")
    accuracy, length, mass = figure.subplots(1, 3)
    for axis, key, label, color in (
            (accuracy, "accuracy", "sampled, training questions", "tab:blue"),
            (length, "completion_length", "completion length", "tab:green"),
            (mass, "audio_mass_max", "max head, all tokens", "tab:orange"),
            (mass, "audio_mass_max_late", "max head, last third", "tab:red"),
            (mass, "audio_mass_mean", "mean head, all tokens", "tab:gray")):
        points = _points(metrics, key)
        if points:
            axis.plot(*_columns(points), color=color, alpha=0.25, linewidth=1)
            axis.plot(*_columns(_moving_mean(points, 5)), color=color, label=label)
    if evaluations:
        accuracy.plot(*_columns(_points(evaluations, "accuracy")), "ko--", markersize=5,
                      linewidth=1, label="greedy, held-out questions")
    _describe(accuracy, "Accuracy", "share right")
    _describe(length, "Completion length", "tokens")
    _describe(mass, "Audio attention mass $a_t$", "share of attention")
    accuracy.set_ylim(0, 1.02)
    mass.set_ylim(bottom=0)
    figure.savefig(folder / "training.png", dpi=120)


def draw_curves(runs, out, window, format_style):
    """Figs. 3, 4, 5 and 8 for several runs, one picture each in folder `out` → their names.

    runs: {name: output folder of train.py}. window: each point is the mean of the last `window`
    measured steps. format_style: of the completions, whose words of thinking Fig. 8 shows.
    Reads metrics.jsonl and completions.jsonl; raises InputError if one is missing or broken.
    """
    runs = {name: _metrics_with_words(Path(run), format_style) for name, run in runs.items()}
    Path(out).mkdir(parents=True, exist_ok=True)
    figures = {
        "fig3_attention_loss": [("attention_loss", "Attention loss $L_{attn}$", "loss (Eq. 4)")],
        "fig4_accuracy_length": [("accuracy", "Reward accuracy", "share right"),
                                 ("completion_length", "Completion length", "tokens")],
        "fig5_audio_mass": [("audio_mass_max", "Mean audio attention mass $a_t$",
                             "share of attention")],
        "fig8_accuracy_words": [("accuracy", "Reward accuracy", "share right"),
                                ("words", "Length of the thinking", "words")]}
    for name, panels in figures.items():
        figure = Figure(figsize=(5.6 * len(panels), 3.9), layout="constrained")
        axes = figure.subplots(1, len(panels), squeeze=False)[0]
        for axis, (key, title, unit) in zip(axes, panels):
            for number, (label, metrics) in enumerate(runs.items()):
                points = _points(metrics, key)
                if key == "attention_loss":  # a run with η = 0 logs 0, which is not a measurement
                    points = [(step, value) for step, value in points if value]
                if points:
                    axis.plot(*_columns(_moving_mean(points, window)), color=f"C{number}",
                              label=label)
            _describe(axis, title, unit)
            axis.set_ylim(bottom=min(0, axis.get_ylim()[0]))
        figure.suptitle(f"mean of the last {window} measured steps", fontsize=8)
        figure.savefig(Path(out) / f"{name}.png", dpi=110)
    return list(figures)


def _metrics_with_words(run, format_style):
    """Rows of metrics.jsonl, each with "words": the mean words of thinking in the step."""
    words, metrics = {}, [row for _, row in json_lines(run / "metrics.jsonl")]
    for _, row in json_lines(run / "completions.jsonl"):
        words.setdefault(row["step"], []).append(thinking_words(row["text"], format_style))
    return [{**row, "words": float(np.mean(words[row["step"]])) if row["step"] in words else None}
            for row in metrics]


def thinking_words(text, format_style):
    """Number of words of thinking, also if it was cut off before its end tag."""
    if format_style == "think":  # the chat template may have opened the block
        return len(text.partition("</think>")[0].replace("<think>", " ").split())
    return len(text.partition("</reasoning>")[0].partition("<reasoning>")[2].split())


def _points(rows, key):
    """→ [(step, value)] of the rows that have a value."""
    return [(row["step"], row[key]) for row in rows if row.get(key) is not None]


def _moving_mean(points, window):
    steps, values = _columns(points)
    return [(step, np.mean(values[max(0, i + 1 - window):i + 1])) for i, step in enumerate(steps)]


def _columns(points):
    return [step for step, _ in points], [value for _, value in points]


def _describe(axis, title, unit):
    axis.set(title=title, xlabel="optimizer step", ylabel=unit)
    axis.grid(alpha=0.3)
    if axis.lines:
        axis.legend(fontsize=8)


# ──────── traces: Figs. 2 and 6 ────────


def draw_trace(panels, path):
    """One question, token by token, in the manner of Figs. 2 and 6; one panel per model.

    panels: rows of diagnostics.trace, each with its "model". Grey bars: H(π_text-ref) (Fig. 2a).
    Blue bars: Δh_t (Fig. 2b). Lines: a_t of the largest head (solid) and the mean over heads
    (dashed).
    """
    longest = max(len(row["token_ids"]) for row in panels)
    labelled = longest <= 150  # more labels than that are unreadable
    figure = Figure(figsize=(min(30, max(7, 0.21 * longest + 1.5)), 3.1 * len(panels) + 0.5),
                    layout="constrained")
    axes = figure.subplots(len(panels), 1, squeeze=False, sharey=True)[:, 0]
    top = max(max(row["audio_mass_max"]) for row in panels)
    marker = "." if longest < 5 else None  # a line through one point is invisible
    for axis, row in zip(axes, panels):
        x = range(1, len(row["token_ids"]) + 1)
        prior = axis.bar(x, row["text_ref_entropy"], color="0.85", width=0.8,
                         label="$H(\\pi_{text-ref})$")
        bars = axis.bar(x, row["delta_h"], color="tab:blue", alpha=0.55, width=0.5,
                        label="$\\Delta h_t$")
        axis.axhline(0, color="black", linewidth=0.6)
        mass = axis.twinx()
        high, = mass.plot(x, row["audio_mass_max"], marker=marker, color="tab:orange",
                          label="$a_t$, max head")
        mean, = mass.plot(x, row["audio_mass_mean"], "--", marker=marker, color="tab:orange",
                          label="mean head")
        mass.set(ylim=(0, 1.08 * top or 1), ylabel="audio attention mass\n(share of attention)")
        axis.set(title=f"{row['model']}: question {row['id']}", ylabel="$H$, $\\Delta h_t$ (nats)",
                 xlim=(0, longest + 1), xlabel="completion token" if axis is axes[-1] else "")
        axis.set_zorder(mass.get_zorder() - 1)
        if labelled:
            labels = [_printable(token) for token in row["tokens"]]
            for tick in axis.set_xticks(list(x), labels, rotation=90, fontsize=8):
                tick.label1.set_parse_math(False)  # a token may contain a $
    shown = [prior, bars, high, mean]
    figure.legend(shown, [handle.get_label() for handle in shown], loc="outside upper right",
                  ncols=4, fontsize=8)
    figure.savefig(path, dpi=110)


def _printable(token):
    """A token as a label: line ends and other invisible characters as escapes."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in token)


# ──────── parts of speech: Fig. 7 ────────


def draw_pos(tags, means, path):
    """Mean H(π_text-ref) and Δh by part of speech; one group of bars per tag, one bar per model.

    tags: in the order of the axis. means: {model: {tag: (tokens, H, Δh)}} (diagnostics.pos_means).
    """
    figure = Figure(figsize=(max(7, 0.9 * len(tags) + 2), 5.6), layout="constrained")
    upper, lower = axes = figure.subplots(2, 1, sharex=True)
    width = 0.8 / len(means)
    for number, (model, by_tag) in enumerate(means.items()):
        shift = (number - (len(means) - 1) / 2) * width
        x = [tags.index(tag) + shift for tag in by_tag]
        upper.bar(x, [entropy for _, entropy, _ in by_tag.values()], width=width, label=model)
        lower.bar(x, [delta_h for _, _, delta_h in by_tag.values()], width=width, label=model)
    upper.set(title="Uncertainty of the language prior", ylabel="H(π_text-ref) (nats)")
    lower.set(title="Cross-modal differential entropy", ylabel="Δh (nats)",
              xlabel="universal tag; * is in the gate of Appendix E")
    lower.set_xticks(range(len(tags)), [f"{tag}{' *' if tag in POS_TARGETS else ''}"
                                        for tag in tags], rotation=30)
    for axis in axes:
        axis.grid(axis="y", alpha=0.3)
        axis.axhline(0, color="black", linewidth=0.6)
    if len(means) > 1:
        upper.legend(fontsize=8)
    figure.savefig(path, dpi=110)


# ──────── local evidence masking: Table 4 ────────


def draw_acs(accuracies, random_seeds, path):
    """Accuracy against the masked share of the audio; one panel per model.

    accuracies: from diagnostics.acs_accuracies. random_seeds: how many random masks were averaged.
    """
    figure = Figure(figsize=(4.2 * len(accuracies) + 0.8, 3.8), layout="constrained")
    axes = figure.subplots(1, len(accuracies), sharey=True, squeeze=False)[0]
    for axis, (model, (whole, by_ratio)) in zip(axes, accuracies.items()):
        x = [0, *(100 * ratio for ratio in by_ratio)]
        for kind, color, label in (("low", "tab:green", "low attention"),
                                   ("random", "tab:gray", f"random, {random_seeds} seeds"),
                                   ("top", "tab:red", "top attention")):
            y = [whole, *(accuracy[kind] for accuracy, _ in by_ratio.values())]
            axis.plot(x, y, "o-", color=color, markersize=4, label=label)
        axis.set(title=model, xlabel="masked audio (% of its duration)")
        axis.grid(alpha=0.3)
    axes[0].set(ylabel="accuracy (share right)", ylim=(0, 1.02))
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3,
                  fontsize=9)
    figure.savefig(path, dpi=110)


# ──────── GRPO beside MAPO ────────


def draw_comparison(runs, path):
    """Several arms from one warm start.  (compare.py)

    runs: {name: (rows of metrics.jsonl, held-out curve [(step, accuracy)])}.
    """
    figure = Figure(figsize=(13.5, 3.9), layout="constrained")
    axes = figure.subplots(1, 3)
    for number, (name, (metrics, curve)) in enumerate(runs.items()):
        for axis, points in zip(axes, (curve, _points(metrics, "audio_mass_max_late"),
                                       _moving_mean(_points(metrics, "completion_length"), 5))):
            axis.plot(*_columns(points), color=f"C{number}", label=name)
    _save_arms(figure, path)


def draw_study(runs, path):
    """Four arms and many seeds, {arm: lines of the study's results}.  (bench/toy_study.py)

    Thin lines are seeds, thick ones their means.
    """
    figure = Figure(figsize=(13.5, 3.9), layout="constrained")
    axes = figure.subplots(1, 3)
    for number, (arm, rows) in enumerate(runs.items()):
        for axis, name in zip(axes, ("curve", "late_mass", "length")):
            for row in rows:
                axis.plot(*_columns(row[name]), color=f"C{number}", linewidth=0.6, alpha=0.4)
            mean = np.mean([row[name] for row in rows], axis=0)
            axis.plot(*mean.T, color=f"C{number}", linewidth=2, label=arm)
    _save_arms(figure, path)


def _save_arms(figure, path):
    accuracy, mass, length = figure.axes
    _describe(accuracy, "Held-out accuracy, greedy", "share right")
    _describe(mass, "Audio attention mass $a_t$, last third", "share of attention")
    _describe(length, "Completion length", "tokens")
    accuracy.set_ylim(0, 1.02)
    for axis in (mass, length):
        axis.set_ylim(bottom=0)
    for axis in (accuracy, length):
        axis.get_legend().remove()  # it would cover curves; that of the middle panel is enough
    figure.savefig(path, dpi=110)
