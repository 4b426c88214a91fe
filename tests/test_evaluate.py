"""evaluate.py against plain attention in float64, loops written from the equations, and real interrupted processes."""

import contextlib
import hashlib
import io
import json
import math
import multiprocessing
import os
import random
import signal
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import test_model as plain  # its reference: whole attention weights, one unpadded question at a time
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Qwen2AudioConfig, Qwen3OmniMoeThinkerConfig

import evaluate
import model
from data import load_audio
from rollout import Completion
from tiny import lines

ROOT = Path(__file__).resolve().parents[1]
LAYERS = (0, 2)


def run(*arguments):
    """main() of the command line → (exit code, standard output, standard error)."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = evaluate.main(list(map(str, arguments)))
    return code, out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    """A tiny Qwen3-Omni in float64, its copy with plain attention, and three questions; the second has two clips."""
    return plain.make_family("qwen3_omni", tmp_path_factory.mktemp("clips"))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a tiny model and six questions."""
    return tiny.write_world(tmp_path_factory.mktemp("world"), tiny.qwen3_omni_that_ends(0.5))


@pytest.fixture
def pictures(monkeypatch):
    """The matplotlib figures that are saved, by file name."""
    saved, save = {}, evaluate.Figure.savefig

    def keep(figure, path, **how):
        save(figure, path, **how)
        saved[Path(path).name] = figure
    monkeypatch.setattr(evaluate.Figure, "savefig", keep)
    return saved


# ───────────────────────────────────────────────────────── trace ──────────────────────────────────────────────────────


def expected_columns(family, question, completion, temperature):
    """Every column of a trace by itself: float64, no padding, loops over tokens; Eqs. 1, 3 with τ_base 1, C_mask 5."""
    ids, audio = plain.inputs_alone(family.kind, family.policy, question)
    text_ids, _ = plain.inputs_alone(family.kind, family.policy, question, with_audio=False)
    with torch.no_grad():
        logp, entropy, mass = plain.alone(family.plain, ids, audio, completion, temperature, LAYERS, family.audio_id)
        _, text_entropy, _ = plain.alone(family.plain, text_ids, {}, completion, temperature)
    heads, length = mass.shape[1], len(completion)
    tau = math.log(max(length, 2))
    delta_h = [(h_text - h).item() for h_text, h in zip(text_entropy, entropy)]
    gate = evaluate.pos_gate_batch([completion], family.policy.tokenizer)[0][0]
    share = [math.exp(abs(d) / tau) for d in delta_h]
    inverse = [g * math.exp(-abs(d) / tau) for g, d in zip(gate, delta_h)]
    return {"prompt_ids": ids, "text_prompt_ids": text_ids, "token_ids": completion, "logp": logp.tolist(),
            "policy_entropy": entropy.tolist(), "text_ref_entropy": text_entropy.tolist(), "delta_h": delta_h,
            "audio_mass_max": [sum(max(mass[i, h, t].item() for h in range(heads)) for i in range(len(LAYERS)))
                               / len(LAYERS) for t in range(length)],
            "audio_mass_mean": [sum(mass[i, h, t].item() for h in range(heads) for i in range(len(LAYERS)))
                                / (heads * len(LAYERS)) for t in range(length)], "pos_gate": gate,
            "omega": [min(length * s / sum(share), 5) for s in share],
            "nu": [min(sum(gate) * s / sum(inverse), 5) if sum(gate) else 0 for s in inverse]}


@pytest.mark.parametrize("rows", [(0, 1, 2), (2,)], ids=["left-padded batch", "one alone"])
def test_trace_equals_plain_attention(family, rows):
    """Each column within 1e-6, ids and gates exactly."""
    rng = random.Random(len(rows))
    words = family.policy.tokenizer(" I hear a bell, then a dog barks twice. The first sound is a bell.")["input_ids"]
    completions = [(words + [rng.randrange(320) for _ in range(6)])[row:][:9 + 4 * row] + [320] for row in rows]
    prompts = [family.prompts[row] for row in rows]
    traced = evaluate.trace(family.policy, family.policy, prompts, completions, 1.2, LAYERS)
    assert any(0 < sum(row["pos_gate"]) < len(row["pos_gate"]) for row in traced)
    for row, number, completion in zip(traced, rows, completions):
        wanted = expected_columns(family, family.questions[number], completion, 1.2)
        assert set(row) == {"id", "tokens", "pos_tag", *wanted} and row["id"] == family.questions[number].id
        for name, values in wanted.items():
            assert row[name] == pytest.approx(values, rel=1e-6, abs=1e-6), name
        assert "".join(row["tokens"]) == family.policy.tokenizer.decode(completion)
        assert max(abs(d) for d in row["delta_h"]) > 0.01 and max(row["audio_mass_max"]) > max(row["audio_mass_mean"])


def test_trace_takes_the_reference_for_the_text_alone(family):
    """π_text-ref is another model: its entropy changes, and log-probs and masses of the policy do not."""
    other = tiny.qwen3_omni(seed=5, dtype=torch.float64, experts="eager")
    completions = [[5, 17, 300, 320]]
    own, mixed = (evaluate.trace(family.policy, reference, family.prompts[:1], completions, 1.0, LAYERS)[0]
                  for reference in (family.policy, other))
    assert own["text_ref_entropy"] != mixed["text_ref_entropy"] and own["omega"] != mixed["omega"]
    for name in ("logp", "policy_entropy", "audio_mass_max", "audio_mass_mean"):
        assert own[name] == mixed[name]
    assert mixed["delta_h"] == pytest.approx([h - p for h, p in zip(mixed["text_ref_entropy"], own["policy_entropy"])])


def test_trace_command(world, tmp_path, pictures):
    """Two models in one picture a question, the one above the other; given completions are the traced ones."""
    given = {"q0": [70, 71, 72], "q2": [50, 320]}
    (tmp_path / "given.jsonl").write_text("".join(json.dumps({"id": i, "token_ids": ids}) + "\n"
                                                  for i, ids in given.items()))
    arguments = ["trace", "--model", f"one={world / 'model'}", "--model", f"two={world / 'model'}", "--data",
                 world / "train.jsonl", "--completions", tmp_path / "given.jsonl", "--out", tmp_path / "out"]
    code, _, err = run(*arguments)
    assert code == 2 and "give --reference" in err  # Δh of two models needs one language prior
    code, _, err = run(*arguments, "--reference", world / "model")
    assert code == 0, err
    rows = lines(tmp_path / "out" / "trace.jsonl")
    assert [(r["model"], r["id"], r["token_ids"]) for r in rows] == [
        (label, i, ids) for label in ("one", "two") for i, ids in given.items()]
    assert sorted(pictures) == ["trace-0-q0.png", "trace-1-q2.png"]
    figure = pictures["trace-0-q0.png"]
    bars, masses = figure.axes[:2], figure.axes[2:]
    assert [axis.get_title() for axis in bars] == ["one: question q0", "two: question q0"] and len(masses) == 2
    assert [patch.get_height() for patch in bars[0].patches] == pytest.approx(rows[0]["text_ref_entropy"]
                                                                              + rows[0]["delta_h"])
    assert [list(line.get_ydata()) for line in masses[0].lines] == [rows[0]["audio_mass_max"],
                                                                    rows[0]["audio_mass_mean"]]
    assert [label.get_text() for label in bars[0].get_xticklabels()] == rows[0]["tokens"]


def test_trace_samples_when_nothing_is_given(world, tmp_path, pictures):
    code, _, err = run("trace", "--model", world / "model", "--data", world / "train.jsonl", "--limit", 3,
                       "--max_new_tokens", 8, "--target_layers", 1, "--out", tmp_path)
    assert code == 0, err
    rows = lines(tmp_path / "trace.jsonl")
    assert [r["id"] for r in rows] == ["q0", "q1", "q2"] and len(pictures) == 3
    assert all(1 <= len(r["token_ids"]) <= 8 and len(r["logp"]) == len(r["token_ids"]) for r in rows)


def test_a_token_may_hold_anything(tmp_path, pictures):
    """Dollars and line breaks stand in the labels as they are, and a long completion is drawn without them."""
    row = {"model": "m", "id": "q", "tokens": ["$x", "\n", "_^{", "\t%"], "token_ids": [1, 2, 3, 4],
           "delta_h": [0.1, -0.2, 0.0, 1.0], "text_ref_entropy": [1.0] * 4,
           "audio_mass_max": [0.5] * 4, "audio_mass_mean": [0.1] * 4}
    evaluate.draw_trace([row], tmp_path / "few.png")
    long = {name: value * 60 if isinstance(value, list) else value for name, value in row.items()}
    evaluate.draw_trace([long], tmp_path / "long.png")
    assert [t.get_text() for t in pictures["few.png"].axes[0].get_xticklabels()] == ["$x", "\\n", "_^{", "\\t%"]
    assert len(pictures["long.png"].axes[0].get_xticks()) < 40
    none = {name: value[:1] if isinstance(value, list) else value for name, value in row.items()}
    evaluate.draw_trace([long, {**none, "audio_mass_max": [0.0]}], tmp_path / "uneven.png")
    assert {axis.get_xlim() for axis in pictures["uneven.png"].axes} == {(0, 241)}  # tokens stand under tokens
    evaluate.draw_trace([{**none, "audio_mass_max": [0.0]}], tmp_path / "one.png")  # a point is to be seen
    assert pictures["one.png"].axes[1].lines[0].get_marker() == "." and pictures["one.png"].axes[1].get_ylim() == (0, 1)


# ───────────────────────────────────────────── part of speech, curves ─────────────────────────────────────────────────


def test_pos_by_hand(tmp_path, pictures):
    """Means by tag over two rows of a trace; a completion that fell back counts as no word."""
    rows = [{"model": "m", "id": "a", "token_ids": [1, 2, 3], "pos_tag": ["NOUN", None, "DET"],
             "text_ref_entropy": [3.0, 0.5, 1.0], "delta_h": [2.0, 0.1, -0.5]},
            {"model": "m", "id": "b", "token_ids": [4], "pos_tag": ["NOUN"], "text_ref_entropy": [1.0],
             "delta_h": [0.0]},
            {"model": "m", "id": "c", "token_ids": [4], "pos_tag": None, "text_ref_entropy": [0.1], "delta_h": [0.3]}]
    (tmp_path / "trace.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, out, err = run("pos", "--trace", tmp_path / "trace.jsonl", "--out", tmp_path)
    assert code == 0, err
    assert out.splitlines()[2:] == ["| m | NOUN | 1 | 2 | 2.000 | 1.000 |", "| m | DET | 0 | 1 | 1.000 | -0.500 |",
                                    "| m | no word | 0 | 2 | 0.300 | 0.200 |"]
    assert (tmp_path / "pos.md").read_text() == out
    upper, lower = pictures["pos.png"].axes
    assert [p.get_height() for p in upper.patches] == pytest.approx([2, 1, 0.3])
    assert [p.get_height() for p in lower.patches] == pytest.approx([1, -0.5, 0.2])
    assert [t.get_text() for t in lower.get_xticklabels()] == ["NOUN *", "DET", "no word"]


def test_curves_of_two_runs(tmp_path, pictures):
    """Each figure has a line a run, smoothed over the window, steps without a value left out."""
    for name, eta in (("a", 0.1), ("b", 0.0)):
        (tmp_path / name).mkdir()
        metrics = [{"step": s, "attention_loss": eta * s, "accuracy": s / 4, "completion_length": 10.0 * s,
                    "audio_mass_max": None if s == 2 else 0.1 * s} for s in (1, 2, 3)]
        texts = [{"step": s, "text": "one " * s * k + "</think> a"} for s in (1, 2, 3) for k in (1, 3)]
        for file, rows in (("metrics", metrics), ("completions", texts)):
            (tmp_path / name / f"{file}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, _, err = run("curves", f"mapo={tmp_path / 'a'}", tmp_path / "b", "--out", tmp_path / "out", "--window", 2)
    assert code == 0, err
    assert sorted(pictures) == [f"fig{n}.png" for n in ("3_attention_loss", "4_accuracy_length", "5_audio_mass",
                                                        "8_accuracy_words")]

    def drawn(name):
        return [{line.get_label(): (list(line.get_xdata()), list(np.round(line.get_ydata(), 9))) for line in axis.lines}
                for axis in pictures[name].axes]
    assert drawn("fig3_attention_loss.png") == [{"mapo": ([1, 2, 3], [0.1, 0.15, 0.25])}]  # η 0 has no such loss
    assert drawn("fig5_audio_mass.png") == [{label: ([1, 3], [0.1, 0.2]) for label in ("mapo", "b")}]
    accuracy, length = drawn("fig4_accuracy_length.png")
    assert accuracy["b"][1] == [0.25, 0.375, 0.625] and length["mapo"][1] == [10, 15, 25]
    assert drawn("fig8_accuracy_words.png")[1]["b"] == ([1, 2, 3], [2, 3, 5])  # words of thinking: 2, 4, 6


@pytest.mark.parametrize("text, style, words", [
    ("<think> a b c</think> d", "think", 3), ("a b c</think> d", "think", 3), ("a b c", "think", 3),
    ("<think> a b", "think", 2), ("</think> d", "think", 0),
    ("<reasoning>a b</reasoning><answer>c</answer>", "reasoning", 2),
    ("<reasoning>a b", "reasoning", 2), ("<answer>c</answer>", "reasoning", 0)])
def test_words_of_thinking(text, style, words):
    """A completion that was cut off in its thinking is all thinking."""
    assert evaluate.thinking_words(text, style) == words


# ───────────────────────────────────────────── local evidence masking ─────────────────────────────────────────────────

CONFIGS = {"qwen3_omni": Qwen3OmniMoeThinkerConfig(), "qwen2_audio": Qwen2AudioConfig()}


def mel_frames(kind, samples):
    """Mel frames of a clip as it is encoded; see Policy.clip."""
    return max(100, -(-samples // 160)) if kind == "qwen3_omni" else max(4, -(-samples // 160))


@pytest.mark.parametrize("kind", CONFIGS)
def test_spans_cover_the_clip(kind):
    """For every length from 0.01 s to 35 s in steps of 10 ms, and a sample more and less: the spans join without gap or
    overlap from the first sample to the last, and there is one for each audio token."""
    for hundredths in range(1, 3501):
        for samples in {160 * hundredths - 1, 160 * hundredths, 160 * hundredths + 1}:
            frames = mel_frames(kind, samples)
            spans = evaluate.audio_token_spans(samples, frames, CONFIGS[kind])
            assert len(spans) == plain.audio_tokens(kind, frames)
            assert spans[0][0] == 0 and spans[-1][1] == samples
            assert all(end == start for (_, end), (start, _) in zip(spans, spans[1:]))
            assert all(start <= end for start, end in spans)


def convolved(policy, samples, folder):
    """What Qwen3-Omni's convolutions make of a clip, before any attention: [audio tokens, D]."""
    soundfile.write(folder / "c.wav", samples, 16000, subtype="FLOAT")
    question = replace(tiny.questions(folder, seconds=((1.0,),))[0], audio=(folder / "c.wav",))
    batch, seen, tower = policy.collate([policy.encode(question)], [[]]), [], policy.base.model.audio_tower
    hook = tower.conv_out.register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.no_grad():
        policy.base.get_audio_features(**batch.audio)
    hook.remove()
    tokens = torch.cat([chunk for chunk in seen[0]]) if seen[0].dim() == 3 else seen[0]
    return tokens[:int((batch.input_ids == policy.audio_token_id).sum())]


@pytest.mark.parametrize("seconds", [0.61, 1.0, 2.3])
def test_masking_a_span_changes_its_token(tmp_path, seconds):
    """Every token with a span: silence there changes that token most; beyond two neighbours on each side, which the
    convolutions' and the spectrogram's windows reach, hardly anything (the spectrogram's floor may move)."""
    policy = tiny.qwen3_omni()
    for layer in policy.base.model.audio_tower.modules():
        if isinstance(layer, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(layer.weight)
    noise = np.random.default_rng(0).uniform(-0.3, 0.3, int(seconds * 16000)).astype(np.float32)
    whole = convolved(policy, noise, tmp_path)
    spans = evaluate.audio_token_spans(len(noise), mel_frames("qwen3_omni", len(noise)), policy.base.config)
    assert len(spans) == len(whole)
    for j, (start, end) in enumerate(spans):
        if start == end:
            continue
        masked = noise.copy()
        masked[start:end] = 0
        change = (convolved(policy, masked, tmp_path) - whole).abs().amax(dim=-1)
        assert change.argmax() == j and change[j] > 0.5 * whole.abs().max()
        assert all(change[k] < 0.03 * change[j] for k in range(len(spans)) if abs(k - j) > 2), j


def test_scores_equal_plain_attention(family):
    """s_j within 1e-9 of whole attention weights in float64, for a left-padded batch; two clips' tokens in one list."""
    completions = [[5, 17, 300, 33, 320], [70, 320], [90, 91, 92, 320]]
    found = evaluate.audio_token_scores(family.policy, family.prompts, completions, LAYERS)
    for question, completion, scores in zip(family.questions, completions, found):
        ids, audio = plain.inputs_alone(family.kind, family.policy, question)
        row = torch.tensor([ids + completion])
        with torch.no_grad():
            weights = family.plain(input_ids=row, attention_mask=torch.ones_like(row), output_attentions=True,
                                   use_cache=False, **audio).attentions  # L × [1, H, S, S]
        places = [j for j, token in enumerate(ids) if token == family.audio_id]
        wanted = [sum(max(weights[layer][0, head, len(ids) - 1 + t, j].item() for head in range(4))
                      for t in range(len(completion)) for layer in LAYERS) / (len(completion) * len(LAYERS))
                  for j in places]
        assert scores == pytest.approx(wanted, abs=1e-9)
    # the policy's own attention function is back in its place
    assert family.policy.base.config.get_text_config()._attn_implementation == "audio_mass"


@settings(max_examples=200, deadline=None)
@given(lengths=st.lists(st.integers(0, 9), min_size=1, max_size=30).filter(any), ratio=st.floats(0.01, 1),
       data=st.data())
def test_selection(lengths, ratio, data):
    """Whole tokens in order until the ratio is reached, at least one, none of padding; one fewer would fall short."""
    edges = np.concatenate([[0], np.cumsum(lengths)]).tolist()
    spans, order = list(zip(edges, edges[1:])), data.draw(st.permutations(range(len(lengths))))
    chosen = evaluate.select_tokens(spans, order, ratio)
    taken = [lengths[token] for token in chosen]
    assert chosen and 0 not in taken and sum(taken) >= ratio * sum(lengths) - 1e-9
    assert len(taken) == 1 or sum(taken[:-1]) < ratio * sum(lengths)
    assert chosen == [token for token in order if lengths[token]][:len(chosen)]


def test_variants_of_a_question():
    """Top takes the highest scores, low the lowest, ties by index; random has five orders, the same for every model."""
    spans, scores = [(i, i + 1) for i in range(20)], [0.1] * 10 + [0.3] + [0.2] * 9
    variants = evaluate.mask_variants(spans, scores, "q1")
    assert set(variants) == {(kind, seed, ratio) for ratio in (0.05, 0.1, 0.3, 0.5)
                             for kind, seed in [("top", 0), ("low", 0), *(("random", s) for s in range(5))]}
    assert variants["top", 0, 0.05] == [10] and variants["top", 0, 0.3] == [10, 11, 12, 13, 14, 15]
    assert variants["low", 0, 0.1] == [0, 1] and variants["low", 0, 0.5] == list(range(10))
    again, other = evaluate.mask_variants(spans, scores[::-1], "q1"), evaluate.mask_variants(spans, scores, "q2")
    assert all(variants["random", s, r] == again["random", s, r] for s in range(5) for r in (0.05, 0.5))
    assert variants["random", 0, 0.5] != variants["random", 1, 0.5] != other["random", 1, 0.5]


def test_masked_clips(world, tmp_path, monkeypatch):
    """What the model hears: a clip of the same length that is silent precisely in the spans of the chosen tokens, for
    their duration; answers are counted by kind, seed and ratio."""
    heard, encode = [], model.Policy.encode
    monkeypatch.setattr(model.Policy, "encode", lambda policy, question, *more: (
        heard.append([load_audio(path) for path in question.audio]), encode(policy, question, *more))[1])
    chosen, variants = [], evaluate.mask_variants
    monkeypatch.setattr(evaluate, "mask_variants", lambda spans, scores, name: chosen.append(
        (spans, variants(spans, scores, name))) or chosen[-1][1])
    code, out, err = run("acs", "--model", f"tiny={world / 'model'}", "--data", world / "train.jsonl", "--limit", 2,
                         "--max_new_tokens", 6, "--target_layers", 1, 2, "--batch_size", 1, "--out", tmp_path)
    assert code == 0, err
    rows = lines(tmp_path / "acs.jsonl")
    heard = heard[1:]  # the first is check_policy's
    for row, (spans, wanted), start in zip(rows, chosen, (0, 29)):
        whole, *masked = [clips[0] for clips in heard[start:start + 29]]
        assert row["seconds"] == len(whole) / 16000 and len(row["masked"]) == 28
        for (kind, tokens), clip, record in zip(wanted.items(), masked, row["masked"], strict=True):
            silent = np.zeros(len(whole), bool)
            for token in tokens:
                silent[slice(*spans[token])] = True
            assert np.array_equal(clip, np.where(silent, 0, whole))
            assert (record["kind"], record["seed"], record["ratio"]) == kind
            assert record["seconds"] == pytest.approx(silent.sum() / 16000)
            assert record["ratio"] <= record["seconds"] / row["seconds"] < record["ratio"] + 0.081 / row["seconds"]
    assert out.count("| tiny |") == 4 and (tmp_path / "acs.md").read_text() in out
    cut = (tmp_path / "acs.jsonl").read_bytes()[:-30]  # killed while it wrote the second question
    (tmp_path / "acs.jsonl").write_bytes(cut)
    before = len(chosen)
    code, out, err = run("acs", "--model", f"tiny={world / 'model'}", "--data", world / "train.jsonl", "--limit", 2,
                         "--max_new_tokens", 6, "--target_layers", 1, 2, "--batch_size", 1, "--out", tmp_path)
    assert code == 0 and lines(tmp_path / "acs.jsonl") == rows and len(chosen) == before + 1
    assert (tmp_path / "acs.png").stat().st_size > 5000


def test_two_clips_are_masked_as_one(family, tmp_path, monkeypatch):
    """Their tokens compete in one order; each clip keeps its length."""
    question = family.questions[1]
    policy = tiny.qwen3_omni()
    heard, encode = [], model.Policy.encode
    monkeypatch.setattr(model.Policy, "encode", lambda policy, q, *more: (
        heard.append([load_audio(path) for path in q.audio]), encode(policy, q, *more))[1])
    options = SimpleNamespace(instruction="", max_new_tokens=4, format_style="think", batch_size=4)
    row, = evaluate.evidence_masking(policy, [question], options, LAYERS, "m")  # one row
    first, second = heard[0]
    assert row["seconds"] == (len(first) + len(second)) / 16000
    for (one, two), record in zip(heard[1:], row["masked"], strict=True):
        assert len(one) == len(first) and len(two) == len(second)
        silent = ((one == 0) & (first != 0)).sum() + ((two == 0) & (second != 0)).sum()
        assert abs(silent / 16000 - record["seconds"]) < 0.01
    assert any((two == 0).mean() > 0.1 for _, two in heard[1:]) and any((one == 0).mean() > 0.1 for one, _ in heard[1:])


def test_eq17_by_hand(tmp_path, pictures):
    """ACS(r) = Acc_rand(r) − Acc_top(r), random averaged over its seeds."""
    assert evaluate.attention_causal_selectivity(0.776, 0.707) == pytest.approx(0.069)  # Table 4's last row says 0.068

    def row(i, top, low, randoms):
        outcomes = [("top", 0, top), ("low", 0, low), *(("random", s, r) for s, r in enumerate(randoms))]
        return {"id": i, "model": "m", "right": True, "seconds": 2.0, "masked": [
            {"kind": kind, "seed": seed, "ratio": 0.5, "seconds": 1.0, "right": right}
            for kind, seed, right in outcomes]}

    rows = [row("a", False, True, [True, True, True, False, True]),
            row("b", False, True, [True, False, False, False, False]),
            row("c", True, False, [True] * 5), row("d", True, True, [False] * 5)]
    whole, by_ratio = evaluate.acs_accuracies(rows, "m")
    assert whole == 1 and by_ratio[0.5][0] == pytest.approx({"top": 0.5, "low": 0.75, "random": 0.5})
    rows[3]["masked"][2]["right"] = True
    assert "| m | 1.000 | 50% | 0.500 | 0.550 | 0.750 | +0.050 | 1.00 / 1.00 / 1.00 |" in evaluate.acs_table(rows)
    evaluate.draw_acs(rows, tmp_path / "acs.png")
    drawn = {line.get_label(): list(line.get_ydata()) for line in pictures["acs.png"].axes[0].lines}
    assert drawn == {"low attention": [1, 0.75], "random, 5 seeds": [1, pytest.approx(0.55)], "top attention": [1, 0.5]}


# ─────────────────────────────────────────────────── the benchmarks ───────────────────────────────────────────────────


def write_mmau(folder, count=18, broken=()):
    """A file in MMAU's format, of questions and clips of our own. broken: number → what is wrong with its clip."""
    rows, rng = [], np.random.default_rng(0)
    for i in range(count):
        if i not in broken:
            soundfile.write(folder / f"m{i}.wav", 0.1 * rng.standard_normal(4000 + 300 * i), 16000)
        elif broken[i] == "no audio":
            (folder / f"m{i}.wav").write_bytes(b"this is no audio")
        choices = ["a bell", "a dog", "a siren"] if i % 2 else ["a drum", "a flute"]
        rows.append({"id": f"m{i}", "audio_id": f"./m{i}.wav", "question": f"Which sound is number {i}?",
                     "choices": choices, "answer": choices[i % len(choices)], "dataset": "own",
                     "task": ("sound", "music", "speech")[i % 3], "split": "test-mini", "category": "c",
                     "sub-category": "s", "difficulty": ("easy", "medium", "hard")[i % 3]})
    (folder / "mmau.json").write_text(json.dumps(rows))
    return rows


def mmau(world, folder, *more):
    return ["mmau", "--model", str(world / "model"), "--data", str(folder / "mmau.json"), "--max_new_tokens", "8",
            *map(str, more)]


def killable(arguments):
    """In a process of its own: two questions at a time, and time enough to be killed in."""
    complete = evaluate.complete
    evaluate.complete = lambda *how: (time.sleep(0.15), complete(*how))[1]
    sys.exit(evaluate.main(arguments))


def test_interrupted_evaluation_resumes(world, tmp_path):
    """Killed five times at random moments, once in the middle of a line: in the end each question has one row, those of
    an evaluation that nobody interrupted."""
    write_mmau(tmp_path, count=30)
    code, *_ = run(*mmau(world, tmp_path, "--out", tmp_path / "whole"))
    assert code == 0
    out, rng, seen = tmp_path / "out", random.Random(1), 0
    context = multiprocessing.get_context("fork")
    for kill in range(5):
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere), contextlib.redirect_stdout(nowhere):
            process = context.Process(target=killable, args=(
                mmau(world, tmp_path, "--out", out, "--batch_size", 2),))
            process.start()
        until, file = time.monotonic() + 60, out / "completions.jsonl"
        while (not file.is_file() or file.read_bytes().count(b"\n") <= seen) and time.monotonic() < until:
            assert process.is_alive()
            time.sleep(0.002)
        time.sleep(0.15 * rng.random())
        process.kill()
        process.join()
        data = file.read_bytes()
        if kill == 2:
            file.write_bytes(data[:-20])  # the line was not whole when the process ended
        assert process.exitcode == -signal.SIGKILL and not (out / "report.json").exists()
        seen = file.read_bytes().count(b"\n")
    assert 5 <= seen < 30
    code, *_ = run(*mmau(world, tmp_path, "--out", out))
    assert code == 0
    ours, wanted = ({row["id"]: row for row in lines(folder / "completions.jsonl")}
                    for folder in (out, tmp_path / "whole"))
    assert Counter(row["id"] for row in lines(out / "completions.jsonl")) == Counter(f"m{i}" for i in range(30))
    assert ours == wanted
    assert lines(out / "predictions.jsonl") == lines(tmp_path / "whole" / "predictions.jsonl")


def test_another_evaluation_is_not_mixed_in(world, tmp_path):
    write_mmau(tmp_path, count=2)
    assert run(*mmau(world, tmp_path, "--out", tmp_path / "out"))[0] == 0
    code, _, err = run(*mmau(world, tmp_path, "--out", tmp_path / "out", "--temperature", "0.5"))
    assert code == 2 and "give another --out" in err and err.count("\n") == 1


def test_broken_audio_is_reported_and_counted_wrong(world, tmp_path, monkeypatch):
    """A file that is no audio and one that is missing: named by id, counted wrong, and the run goes on."""
    rows = write_mmau(tmp_path, count=6, broken={1: "no audio", 4: "missing"})
    answers = {row["id"]: row["answer"] for row in rows}

    def right(policy, prompts, *_, **__):
        return [Completion(policy.tokenizer(f"hm</think> {answers[p.question.id]}")["input_ids"], [], "stop")
                for p in prompts]
    monkeypatch.setattr(evaluate, "sample", right)
    code, out, _ = run(*mmau(world, tmp_path, "--out", tmp_path / "out"))
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert code == 0 and report["accuracy"] == pytest.approx(4 / 6) and report["count"] == 6
    assert {row["id"] for row in lines(tmp_path / "out" / "completions.jsonl")} == {"m0", "m2", "m3", "m5"}
    assert set(report["unreadable"]) == {"m1", "m4"} and "m1: counted wrong" in out and "m4: counted wrong" in out
    predictions = {row["id"]: row["prediction"] for row in lines(tmp_path / "out" / "predictions.jsonl")}
    assert predictions == {i: answer for i, answer in answers.items() if i not in ("m1", "m4")}
    assert report["missing"] == 2 and report["official"]["accuracy"] == 1 and report["official"]["count"] == 4
    assert "MAPO" in (tmp_path / "out" / "table.md").read_text()
    write_mmau(tmp_path, count=6)  # mended: those two are asked, and only they
    asked = []
    monkeypatch.setattr(evaluate, "sample", lambda policy, prompts, *how, **more: (
        asked.extend(p.question.id for p in prompts), right(policy, prompts))[1])
    assert run(*mmau(world, tmp_path, "--out", tmp_path / "out"))[0] == 0 and asked == ["m1", "m4"]
    assert json.loads((tmp_path / "out" / "report.json").read_text())["accuracy"] == 1


def test_a_wrong_audio_root_is_an_error(world, tmp_path):
    """Not an accuracy of 0."""
    write_mmau(tmp_path, count=3)
    code, _, err = run(*mmau(world, tmp_path, "--audio_root", tmp_path / "nowhere", "--out", tmp_path / "out"))
    assert code == 2 and "not one question could be asked" in err and not (tmp_path / "out" / "report.json").exists()


def test_line_ends_in_a_completion(world, tmp_path, monkeypatch):
    """U+2028 and the like stand in a line of json, and end none."""
    write_mmau(tmp_path, count=2)
    text = "one\u2028two\x85three</think> a drum"
    monkeypatch.setattr(evaluate, "sample", lambda policy, prompts, *_, **__: [
        Completion(policy.tokenizer(text)["input_ids"], [], "stop") for _ in prompts])
    for _ in range(2):
        assert run(*mmau(world, tmp_path, "--out", tmp_path / "out"))[0] == 0
    rows = evaluate.finished_rows(tmp_path / "out" / "completions.jsonl")
    assert [row["text"] for row in rows] == [text] * 2
    assert [row for _, row in evaluate.numbered_rows(tmp_path / "out" / "completions.jsonl")] == rows


def write_benchmark(folder, name, rows):
    for row in rows:
        soundfile.write(folder / "clip.wav", np.zeros(16000), 16000)
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_mmsu_letters_are_read_from_the_answer(world, tmp_path, monkeypatch):
    """Not from the option that it was mapped to: "B" and "B. Calm" are the letter B, whatever Calm begins with."""
    said = {"a": "B", "b": "B. Calm", "c": "Calm", "d": "A"}
    write_benchmark(tmp_path, "mmsu.jsonl", [
        {"id": i, "task_name": "t", "audio": "clip.wav", "question": "q", "choice_a": "Angry", "choice_b": "Calm",
         "choice_c": None, "choice_d": None, "answer_gt": "Calm", "category": "Perception", "sub-category": "s",
         "sub-sub-category": "s"} for i in said])
    monkeypatch.setattr(evaluate, "sample", lambda policy, prompts, *_, **__: [
        Completion(policy.tokenizer(f"hm</think> {said[p.question.id]}")["input_ids"], [], "stop") for p in prompts])
    code, _, err = run("mmsu", "--model", world / "model", "--data", tmp_path / "mmsu.jsonl", "--out", tmp_path / "out")
    assert code == 0, err
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["accuracy"] == 0.75  # by text: a, b, c
    assert (report["official"]["right"], report["official"]["count"]) == (2, 4)  # "Calm" reads as C
    code, _, err = run("score", "mmsu", "--predictions", tmp_path / "out" / "predictions.jsonl", "--data",
                       tmp_path / "mmsu.jsonl", "--out", tmp_path / "again")
    again = json.loads((tmp_path / "again" / "report.json").read_text())
    assert code == 0 and {name: report[name] for name in again} == again  # the same from the lines that it wrote


def test_mmau_pro_gives_no_points_for_nothing(world, tmp_path, monkeypatch):
    """No answer passes no rule and is no option: a completion that was cut off, and audio that can't be read."""
    write_benchmark(tmp_path, "pro.jsonl", [
        {"id": i, "audio_path": [clip], "question": "q", "category": "instruction following", "choices": None,
         "answer": None, "task_identifier": "No Commas", "kwargs": {}}
        for i, clip in (("cut", "clip.wav"), ("broken", "none.wav"), ("fine", "clip.wav"))])
    monkeypatch.setattr(evaluate, "sample", lambda policy, prompts, *_, **__: [
        Completion(policy.tokenizer("hm" + "</think> a b" * (p.question.id == "fine"))["input_ids"], [], "length")
        for p in prompts])
    code, _, err = run("mmau-pro", "--model", world / "model", "--data", tmp_path / "pro.jsonl", "--out",
                       tmp_path / "out")
    assert code == 0, err
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert (report["right"], report["count"], report["missing"]) == (1, 3, 2)
    assert report["truncated"] == 2 and report["without an answer"] == 1 and set(report["unreadable"]) == {"broken"}


def test_mmau_pro_maps_closed_answers_alone(world, tmp_path, monkeypatch):
    """A letter is its option; what names none goes to the scorer as it is, as do the answers to other questions."""
    closed = {"category": "sound", "choices": ["a dog", "a cat"], "answer": "a cat"}
    open_one = {"category": "open", "choices": None, "answer": "a cat"}
    told = {"category": "instruction following", "choices": None, "answer": None, "task_identifier": "No Commas"}
    said = {"letter": ("B", closed), "text": ("it is a cat", closed), "none": ("fish", closed), "open": ("B", open_one),
            "told": ("B", told)}
    write_benchmark(tmp_path, "pro.jsonl", [{"id": i, "audio_path": ["clip.wav"], "question": "q", "kwargs": {}, **row}
                                            for i, (_, row) in said.items()])
    monkeypatch.setattr(evaluate, "sample", lambda policy, prompts, *_, **__: [
        Completion(policy.tokenizer(f"hm</think> {said[p.question.id][0]}")["input_ids"], [], "stop") for p in prompts])
    code, _, err = run("mmau-pro", "--model", world / "model", "--data", tmp_path / "pro.jsonl", "--out",
                       tmp_path / "out")
    assert code == 0, err
    predictions = {row["id"]: row["prediction"] for row in lines(tmp_path / "out" / "predictions.jsonl")}
    assert predictions == {"letter": "a cat", "text": "a cat", "none": "fish", "open": "B", "told": "B"}
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["parts"]["closed"]["right"] == 2 and report["answers that name no option"] == 1
    options = evaluate.read_options(["trace", "--model", "x", "--data", str(tmp_path / "pro.jsonl"), "--benchmark",
                                     "mmau-pro", "--out", "y"])
    assert [q.id for q in evaluate.questions_of(options)] == ["letter", "text", "none"]


def test_whole_texts_as_answers(world, tmp_path, monkeypatch):
    """--format_style none, for a model that does not think aloud."""
    rows = write_mmau(tmp_path, count=4)
    answers = {row["id"]: row["answer"] for row in rows}
    monkeypatch.setattr(evaluate, "sample", lambda policy, prompts, *_, **__: [
        Completion(policy.tokenizer(answers[p.question.id])["input_ids"], [], "stop") for p in prompts])
    for style, accuracy in (("none", 1), ("think", 0)):
        assert run(*mmau(world, tmp_path, "--format_style", style, "--out", tmp_path / style))[0] == 0
        report = json.loads((tmp_path / style / "report.json").read_text())
        assert report["accuracy"] == accuracy and report["without an answer"] == 4 * (style == "think")


def test_a_server_answers_the_same(world, tmp_path, monkeypatch):
    """--engine vllm, with the stand-in for the server: the completions of this process's engine."""
    monkeypatch.setenv("STAND_IN_PYTHON", sys.executable)
    write_mmau(tmp_path, count=4)
    for engine in ("local", "vllm"):
        code, _, err = run(*mmau(world, tmp_path, "--engine", engine, "--vllm_python", "tests/stand_in/python", "--out",
                                 tmp_path / engine))
        assert code == 0, err
    here, there = ({row["id"]: row for row in lines(tmp_path / engine / "completions.jsonl")}
                   for engine in ("local", "vllm"))
    assert here == there and len(here) == 4


def test_score_command(tmp_path):
    """From predictions alone: a missing row is wrong, a second one for the same id is refused."""
    rows = write_mmau(tmp_path, count=6)
    file = tmp_path / "predictions.jsonl"
    predictions = [{"id": row["id"], "prediction": row["answer"]} for row in rows[:3]]
    file.write_text("".join(json.dumps(p) + "\n" for p in predictions))
    arguments = ["score", "mmau", "--predictions", file, "--data", tmp_path / "mmau.json"]
    code, out, err = run(*arguments)
    assert code == 0, err
    report = json.loads(out[:out.rindex("}") + 1])
    assert report["accuracy"] == 0.5 and report["count"] == 6
    assert run(*arguments, "--out", tmp_path / "out")[0] == 0
    assert json.loads((tmp_path / "out" / "report.json").read_text())["accuracy"] == 0.5
    for extra, message in (({"id": "m0", "prediction": "x"}, "predictions.jsonl:4: a second prediction for 'm0'"),
                           ({"id": "m0"}, "predictions.jsonl:4: give"),
                           ({"id": "m5", "prediction": "x", "answer": None}, "predictions.jsonl:4: field 'answer'"),
                           ({"id": "z", "prediction": "x"}, "z")):
        file.write_text("".join(json.dumps(p) + "\n" for p in [*predictions, extra]))
        code, _, err = run(*arguments)
        assert code == 2 and message in err and err.count("\n") == 1


# ───────────────────────────────────────────────── contamination, the door ────────────────────────────────────────────


def test_contamination(world, tmp_path):
    """The same id, the same file name, and the same samples in another container and under another name."""
    write_mmau(tmp_path, count=5)
    (tmp_path / "clips").mkdir()
    samples, rate = soundfile.read(tmp_path / "m3.wav", dtype="int16")
    soundfile.write(tmp_path / "clips" / "other.flac", samples, rate)
    for i, name in enumerate(("m1", "own")):  # as floats, which are no 16-bit numbers
        soundfile.write(tmp_path / "clips" / f"{name}.wav", np.random.default_rng(i).standard_normal(4600) / 99, 16000,
                        subtype="FLOAT")
    soundfile.write(tmp_path / "m2.wav", np.random.default_rng(5).standard_normal(4600) / 99, 16000, subtype="FLOAT")
    train = [{"id": i, "audio": f"clips/{clip}", "question": "q", "choices": ["x", "y"], "answer": "x"}
             for i, clip in (("m2", "own.wav"), ("t1", "m1.wav"), ("t2", "other.flac"))]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in train))
    code, out, err = run("contamination", "--train", tmp_path / "train.jsonl", "--benchmark", "mmau", "--data",
                         tmp_path / "mmau.json", "--out", tmp_path / "out")
    assert code == 0, err
    content = f"16000 {(len(samples), 1)}".encode() + samples.tobytes()
    assert json.loads((tmp_path / "out" / "contamination.json").read_text()) == {
        "id": ["m2"], "audio file name": ["m1"], "audio samples": [hashlib.sha256(content).hexdigest()]}
    assert "id: 1 shared, of 3 in training and 5 in the benchmark; first ['m2']" in out
    avqa = [{"id": i, "question_text": "q", "multi_choice": ["x", "y"], "answer": 0, "audio_path": row["audio"][6:]}
            for i, row in enumerate(train)]
    (tmp_path / "avqa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in avqa))
    code, out, err = run("contamination", "--train", tmp_path / "avqa.jsonl", "--train_format", "avqa",
                         "--train_audio_root", tmp_path / "clips", "--benchmark", "mmau", "--data",
                         tmp_path / "mmau.json")
    assert code == 0, err
    assert "id: 0 shared" in out and "audio file name: 1 shared" in out and "audio samples: 1 shared" in out


def test_the_questions_of_a_benchmark(tmp_path):
    """trace and acs ask a benchmark's closed questions, the first of them, as the benchmark's own command does."""
    rows = write_mmau(tmp_path, count=4)
    options = evaluate.read_options(["acs", "--model", "x", "--data", str(tmp_path / "mmau.json"), "--benchmark",
                                     "mmau", "--limit", "3", "--out", "y"])
    questions = evaluate.questions_of(options)
    assert [(q.id, q.question, list(q.choices), q.answer, q.audio) for q in questions] == [
        (row["id"], row["question"], row["choices"], row["answer"], (tmp_path / f"{row['id']}.wav",))
        for row in rows[:3]]


@pytest.mark.parametrize("arguments, message", [
    (["mmau", "--model", "MODEL", "--data", "nowhere.json", "--out", "OUT"], "nowhere.json"),
    (["trace", "--model", "nowhere", "--data", "DATA", "--out", "OUT"], "nowhere: no config.json"),
    (["trace", "--model", "MODEL", "--data", "DATA", "--out", "OUT", "--target_layers", "9"], "9 is out of range"),
    (["trace", "--model", "MODEL", "--data", "DATA", "--completions", "BAD", "--out", "OUT"], "id 'z' is not among"),
    (["acs", "--model", "MODEL", "--data", "nowhere.jsonl", "--out", "OUT"], "nowhere.jsonl: no such file"),
    (["curves", "nowhere", "--out", "OUT"], "metrics.jsonl: no such file"),
    (["pos", "--trace", "DATA.missing", "--out", "OUT"], "no such file"),
    (["mmau", "--model", "MODEL", "--data", "MMAU", "--engine", "vllm", "--vllm_python", "none/python", "--out", "OUT"],
     "vllm_python")])
def test_bad_input_is_one_line(world, tmp_path, arguments, message):
    """On standard error, exit code 2."""
    write_mmau(tmp_path, count=1)
    (tmp_path / "bad.jsonl").write_text('{"id": "z", "token_ids": [1]}\n')
    places = {"MODEL": world / "model", "DATA": world / "train.jsonl", "OUT": tmp_path / "out",
              "BAD": tmp_path / "bad.jsonl", "MMAU": tmp_path / "mmau.json"}
    code, _, err = run(*[places.get(argument, argument) for argument in arguments])
    assert code == 2 and message in err and err.startswith("error: ") and err.count("\n") == 1, err


def test_names_of_models(capsys):
    """NAME=DIR, or the folder's own name; the same name twice is refused."""
    read = evaluate.read_options
    assert read(["curves", "a=x/y", "z/run", "--out", "o"]).run == {"a": "x/y", "run": "z/run"}
    both = read(["acs", "--model", "a=x", "--model", "y/b", "--data", "d", "--out", "o"]).model
    assert both == {"a": "x", "b": "y/b"}
    with pytest.raises(SystemExit):
        read(["curves", "a/run", "b/run", "--out", "o"])
    assert "the name 'run' is given twice" in capsys.readouterr().err
