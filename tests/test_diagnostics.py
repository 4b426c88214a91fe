"""diagnostics.py against plain attention in float64, and loops written from the equations."""

import math
import random
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import test_model as plain  # its reference: whole attention weights, one unpadded question
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_evaluate import run, world, write_quirks  # noqa: F401 (world is a fixture)
from test_plots import curves_of, pictures, write_lines  # noqa: F401 (a fixture)
from tiny import lines

import diagnostics
import model
from data import load_audio
from families import FAMILIES
from plots import draw_acs
from pos_gate import pos_gate_batch

LAYERS = (0, 2)


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    """A tiny Qwen3-Omni in float64, its copy with plain attention, and three questions.

    The second question is about two clips.
    """
    return plain.make_family("qwen3_omni", tmp_path_factory.mktemp("clips"))


# ──────── traces ────────


def expected_columns(family, question, completion, temperature):
    """Every column of a trace on its own: float64, no padding, loops over tokens.

    Eqs. 1 and 3 with τ_base = 1 and C_mask = 5.
    """
    ids, audio = plain.inputs_alone(family.kind, family.policy, question)
    text_ids, _ = plain.inputs_alone(family.kind, family.policy, question, with_audio=False)
    with torch.no_grad():
        logp, entropy, mass = plain.alone(family.plain, ids, audio, completion, temperature,
                                          LAYERS, family.audio_id)
        _, text_entropy, _ = plain.alone(family.plain, text_ids, {}, completion, temperature)
    layers, heads, length = mass.shape
    strongest = [sum(max(mass[i, h, t].item() for h in range(heads)) for i in range(layers))
                 / layers for t in range(length)]
    mean = [sum(mass[i, h, t].item() for i in range(layers) for h in range(heads))
            / (layers * heads) for t in range(length)]
    tau = math.log(max(length, 2))
    delta_h = [(h_text - h).item() for h_text, h in zip(text_entropy, entropy)]
    gate = pos_gate_batch([completion], family.policy.tokenizer)[0][0]
    share = [math.exp(abs(d) / tau) for d in delta_h]
    inverse = [g * math.exp(-abs(d) / tau) for g, d in zip(gate, delta_h)]
    return {"prompt_ids": ids, "text_prompt_ids": text_ids, "token_ids": completion,
            "logp": logp.tolist(), "policy_entropy": entropy.tolist(),
            "text_ref_entropy": text_entropy.tolist(), "delta_h": delta_h,
            "audio_mass_max": strongest, "audio_mass_mean": mean, "pos_gate": gate,
            "omega": [min(length * s / sum(share), 5) for s in share],
            "nu": [min(sum(gate) * s / sum(inverse), 5) if sum(gate) else 0 for s in inverse]}


@pytest.mark.parametrize("numbers", [(0, 1, 2), (2,)], ids=["left-padded batch", "one alone"])
def test_trace_equals_plain_attention(family, numbers):
    """Numbers within 1e-6, token ids and gates exactly."""
    rng, policy = random.Random(len(numbers)), family.policy
    words = policy.tokenizer(" I hear a bell, then a dog barks twice. The first sound is a bell.")
    completions = [(words["input_ids"] + [rng.randrange(320) for _ in range(6)])[n:][:9 + 4 * n]
                   + [320] for n in numbers]
    prompts = [family.prompts[n] for n in numbers]
    traced = diagnostics.trace(policy, policy, prompts, completions, 1.2, LAYERS)
    assert any(0 < sum(row["pos_gate"]) < len(row["pos_gate"]) for row in traced)
    for row, n, completion in zip(traced, numbers, completions):
        wanted = expected_columns(family, family.questions[n], completion, 1.2)
        assert set(row) == {"id", "tokens", "pos_tag", *wanted}
        assert row["id"] == family.questions[n].id
        for name, values in wanted.items():
            assert row[name] == pytest.approx(values, rel=1e-6, abs=1e-6), name
        assert "".join(row["tokens"]) == policy.tokenizer.decode(completion)
        assert max(abs(d) for d in row["delta_h"]) > 0.01
        assert max(row["audio_mass_max"]) > max(row["audio_mass_mean"])


def test_trace_uses_the_reference_only_for_the_text(family):
    """With another π_text-ref only its entropy changes, not the policy's log-probs and masses."""
    other = tiny.qwen3_omni(seed=5, dtype=torch.float64, experts="eager")
    own, mixed = (diagnostics.trace(family.policy, reference, family.prompts[:1],
                                    [[5, 17, 300, 320]], 1.0, LAYERS)[0]
                  for reference in (family.policy, other))
    for name in ("text_ref_entropy", "omega"):
        assert own[name] != mixed[name]
    for name in ("logp", "policy_entropy", "audio_mass_max", "audio_mass_mean"):
        assert own[name] == mixed[name]
    assert mixed["delta_h"] == pytest.approx(
        [h_text - h for h_text, h in zip(mixed["text_ref_entropy"], own["policy_entropy"])])


def test_trace_command(world, tmp_path, pictures):  # noqa: F811
    """Two models in one picture per question, tracing the given completions."""
    completions = {"q0": [70, 71, 72], "q2": [50, 320]}
    write_lines(tmp_path / "given.jsonl", [{"id": i, "token_ids": ids}
                                           for i, ids in completions.items()])
    arguments = ["trace", "--model", f"one={world / 'model'}", "--model", f"two={world / 'model'}",
                 "--data", world / "train.jsonl", "--completions", tmp_path / "given.jsonl",
                 "--out", tmp_path / "out"]
    code, _, err = run(*arguments)
    assert code == 2 and "give --reference" in err  # Δh of two models needs one language prior
    code, _, err = run(*arguments, "--reference", world / "model")
    assert code == 0, err
    rows = lines(tmp_path / "out" / "trace.jsonl")
    assert [(row["model"], row["id"], row["token_ids"]) for row in rows] == [
        (label, i, ids) for label in ("one", "two") for i, ids in completions.items()]
    assert sorted(pictures) == ["trace-0-q0.png", "trace-1-q2.png"]
    upper, lower, upper_mass, _ = pictures["trace-0-q0.png"].axes
    assert [axis.get_title() for axis in (upper, lower)] == ["one: question q0",
                                                            "two: question q0"]
    first = rows[0]
    assert [bar.get_height() for bar in upper.patches] == pytest.approx(
        first["text_ref_entropy"] + first["delta_h"])
    assert [list(line.get_ydata()) for line in upper_mass.lines] == [
        first["audio_mass_max"], first["audio_mass_mean"]]
    assert [label.get_text() for label in upper.get_xticklabels()] == first["tokens"]


def test_trace_samples_when_no_completions_are_given(world, tmp_path, pictures):  # noqa: F811
    code, _, err = run("trace", "--model", world / "model", "--data", world / "train.jsonl",
                       "--limit", 3, "--max_new_tokens", 8, "--target_layers", 1, "--out",
                       tmp_path)
    assert code == 0, err
    rows = lines(tmp_path / "trace.jsonl")
    assert [row["id"] for row in rows] == ["q0", "q1", "q2"] and len(pictures) == 3
    assert all(1 <= len(row["token_ids"]) <= 8 for row in rows)
    assert all(len(row["logp"]) == len(row["token_ids"]) for row in rows)


# ──────── parts of speech ────────


def test_pos_by_hand(tmp_path, pictures):  # noqa: F811
    """Means by tag over three completions. Those of an untagged one count as "no word"."""
    write_lines(tmp_path / "trace.jsonl", [
        {"model": "m", "id": "a", "token_ids": [1, 2, 3], "pos_tag": ["NOUN", None, "DET"],
         "text_ref_entropy": [3.0, 0.5, 1.0], "delta_h": [2.0, 0.1, -0.5]},
        {"model": "m", "id": "b", "token_ids": [4], "pos_tag": ["NOUN"],
         "text_ref_entropy": [1.0], "delta_h": [0.0]},
        {"model": "m", "id": "c", "token_ids": [4], "pos_tag": None, "text_ref_entropy": [0.1],
         "delta_h": [0.3]}])
    code, out, err = run("pos", "--trace", tmp_path / "trace.jsonl", "--out", tmp_path)
    assert code == 0, err
    assert out.splitlines()[2:] == ["| m | NOUN | 1 | 2 | 2.000 | 1.000 |",
                                    "| m | DET | 0 | 1 | 1.000 | -0.500 |",
                                    "| m | no word | 0 | 2 | 0.300 | 0.200 |"]
    assert (tmp_path / "pos.md").read_text() == out
    upper, lower = pictures["pos.png"].axes
    assert [bar.get_height() for bar in upper.patches] == pytest.approx([2, 1, 0.3])
    assert [bar.get_height() for bar in lower.patches] == pytest.approx([1, -0.5, 0.2])


def test_tags_of_two_models_are_ordered_together():
    """By the mean H(π_text-ref) over the tokens of both; a model lists only the tags it has."""
    rows = [{"model": "a", "token_ids": [1, 2], "pos_tag": ["DET", "VERB"],
             "text_ref_entropy": [2.0, 1.0], "delta_h": [0.0, 0.0]},
            {"model": "b", "token_ids": [1, 2, 3], "pos_tag": ["VERB", "VERB", "NOUN"],
             "text_ref_entropy": [4.0, 4.0, 0.5], "delta_h": [1.0, 2.0, 3.0]}]
    tags, means = diagnostics.pos_means(rows)
    assert tags == ["VERB", "DET", "NOUN"]  # 9/3, 2, 0.5
    assert means == {"a": {"VERB": (1, 1.0, 0.0), "DET": (1, 2.0, 0.0)},
                     "b": {"VERB": (2, 4.0, 1.5), "NOUN": (1, 0.5, 3.0)}}


# ──────── local evidence masking ────────

MODEL_TYPES = {"qwen3_omni": "qwen3_omni_moe_thinker", "qwen2_audio": "qwen2_audio"}


def mel_frames(kind, samples):
    """Mel frames of a clip as the policy encodes it, with silence at its end."""
    return max(100 if kind == "qwen3_omni" else 4, -(-samples // 160))


@pytest.mark.parametrize("kind", MODEL_TYPES)
def test_spans_cover_the_clip(kind):
    """One span per audio token, from the first sample to the last, without gaps or overlap.

    For every length from 10 ms to 35 s in steps of 10 ms, and one sample more and less.
    """
    for hundredths in range(1, 3501):
        for samples in range(160 * hundredths - 1, 160 * hundredths + 2):
            frames = mel_frames(kind, samples)
            spans = diagnostics.audio_token_spans(samples, frames, FAMILIES[MODEL_TYPES[kind]])
            assert len(spans) == plain.audio_tokens(kind, frames)
            edges = [start for start, _ in spans] + [samples]
            assert edges[0] == 0 and edges == sorted(edges)
            assert [end for _, end in spans] == edges[1:]


def convolved(policy, samples, folder):
    """What Qwen3-Omni's convolutions make of a clip, before any attention: [audio tokens, D]."""
    soundfile.write(folder / "c.wav", samples, 16000, subtype="FLOAT")
    question, = tiny.questions(folder, seconds=((1.0,),))
    question = replace(question, audio=(folder / "c.wav",))
    batch = policy.collate([policy.encode(question)], [[]])
    seen = []
    hook = policy.base.model.audio_tower.conv_out.register_forward_hook(
        lambda module, inputs, output: seen.append(output))
    with torch.no_grad():
        policy.base.get_audio_features(**batch.audio)
    hook.remove()
    output, = seen
    tokens = output.flatten(0, 1) if output.dim() == 3 else output
    return tokens[:int((batch.input_ids == policy.audio_token_id).sum())]


@pytest.mark.parametrize("seconds", [0.61, 1.0, 2.3])
def test_masking_a_span_changes_its_token(tmp_path, seconds):
    """Silence in a token's span changes this token most.

    The windows of the convolutions and of the spectrogram reach two neighbours on each side. Beyond
    them hardly anything changes; the floor of the spectrogram may move.
    """
    policy = tiny.qwen3_omni()
    torch.manual_seed(1)  # with some random weights a neighbour changes more
    for layer in policy.base.model.audio_tower.modules():
        if isinstance(layer, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(layer.weight)
    noise = np.random.default_rng(0).uniform(-0.3, 0.3, int(seconds * 16000)).astype(np.float32)
    whole = convolved(policy, noise, tmp_path)
    frames = mel_frames("qwen3_omni", len(noise))
    spans = diagnostics.audio_token_spans(len(noise), frames, policy.family)
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
    """s_j within 1e-9 of whole attention weights in float64, for a left-padded batch.

    The tokens of two clips are in one list.
    """
    completions = [[5, 17, 300, 33, 320], [70, 320], [90, 91, 92, 320]]
    found = diagnostics.audio_token_scores(family.policy, family.prompts, completions, LAYERS)
    for question, completion, scores in zip(family.questions, completions, found):
        ids, audio = plain.inputs_alone(family.kind, family.policy, question)
        row = torch.tensor([ids + completion])
        with torch.no_grad():
            weights = family.plain(input_ids=row, attention_mask=torch.ones_like(row),
                                   output_attentions=True, use_cache=False, **audio).attentions
        places = [j for j, token in enumerate(ids) if token == family.audio_id]
        wanted = [sum(max(weights[layer][0, head, len(ids) - 1 + t, j].item() for head in range(4))
                      for t in range(len(completion)) for layer in LAYERS)
                  / (len(completion) * len(LAYERS)) for j in places]
        assert scores == pytest.approx(wanted, abs=1e-9)
    # afterwards the policy has its own attention function again
    assert family.policy.base.config.get_text_config()._attn_implementation == "audio_mass"


@settings(max_examples=200, deadline=None)
@given(lengths=st.lists(st.integers(0, 9), min_size=1, max_size=30).filter(any),
       ratio=st.floats(0.01, 1), data=st.data())
def test_selection(lengths, ratio, data):
    """Whole tokens in order, without padding, until the ratio is reached; one less falls short."""
    edges = np.concatenate([[0], np.cumsum(lengths)]).tolist()
    spans = list(zip(edges, edges[1:]))
    order = data.draw(st.permutations(range(len(lengths))))
    chosen = diagnostics.select_tokens(spans, order, ratio)
    taken = [lengths[token] for token in chosen]
    assert chosen and 0 not in taken and sum(taken) >= ratio * sum(lengths) - 1e-9
    assert len(taken) == 1 or sum(taken[:-1]) < ratio * sum(lengths)
    assert chosen == [token for token in order if lengths[token]][:len(chosen)]


def test_variants_of_a_question():
    """Top takes the highest scores, low the lowest, and ties go by index.

    There are five random orders. They depend on the question but not on the model's scores.
    """
    spans, scores = [(i, i + 1) for i in range(20)], [0.1] * 10 + [0.3] + [0.2] * 9
    variants = diagnostics.mask_variants(spans, scores, "q1")
    kinds = [("top", 0), ("low", 0), *(("random", seed) for seed in range(5))]
    assert set(variants) == {(*kind, ratio) for kind in kinds for ratio in (0.05, 0.1, 0.3, 0.5)}
    assert variants["top", 0, 0.05] == [10]
    assert variants["top", 0, 0.3] == [10, 11, 12, 13, 14, 15]
    assert variants["low", 0, 0.1] == [0, 1] and variants["low", 0, 0.5] == list(range(10))
    same_question = diagnostics.mask_variants(spans, scores[::-1], "q1")
    another = diagnostics.mask_variants(spans, scores, "q2")
    for seed in range(5):
        for ratio in (0.05, 0.5):
            assert variants["random", seed, ratio] == same_question["random", seed, ratio]
    assert variants["random", 0, 0.5] != variants["random", 1, 0.5]
    assert variants["random", 1, 0.5] != another["random", 1, 0.5]


@pytest.fixture
def heard(monkeypatch):
    """The clips of every question that a policy encodes, in order."""
    heard, encode = [], model.Policy.encode

    def listen(policy, question, *more):
        heard.append([load_audio(path) for path in question.audio])
        return encode(policy, question, *more)
    monkeypatch.setattr(model.Policy, "encode", listen)
    return heard


VARIANTS = 4 * (2 + 5)  # ratios × (top, low and five random masks)


def test_masked_clips(world, tmp_path, heard, monkeypatch):  # noqa: F811
    """The model hears clips of the same length that are silent exactly in the chosen spans."""
    chosen, variants = [], diagnostics.mask_variants

    def remember(spans, scores, name):
        chosen.append((spans, variants(spans, scores, name)))
        return variants(spans, scores, name)
    monkeypatch.setattr(diagnostics, "mask_variants", remember)
    arguments = ["acs", "--model", f"tiny={world / 'model'}", "--data", world / "train.jsonl",
                 "--limit", 2, "--max_new_tokens", 6, "--target_layers", 1, 2, "--batch_size", 1,
                 "--out", tmp_path]
    code, out, err = run(*arguments)
    assert code == 0, err
    rows = lines(tmp_path / "acs.jsonl")
    clips = iter([clip for clip, in heard[1:]])  # check_policy encodes the first question
    for row, (spans, wanted) in zip(rows, chosen, strict=True):
        whole = next(clips)
        assert row["seconds"] == len(whole) / 16000 and len(row["masked"]) == VARIANTS
        for ((kind, seed, ratio), tokens), record in zip(wanted.items(), row["masked"],
                                                         strict=True):
            silent = np.zeros(len(whole), bool)
            for token in tokens:
                silent[slice(*spans[token])] = True
            assert np.array_equal(next(clips), np.where(silent, 0, whole))
            assert (record["kind"], record["seed"], record["ratio"]) == (kind, seed, ratio)
            assert record["seconds"] == pytest.approx(silent.sum() / 16000)
            excess = record["seconds"] - ratio * row["seconds"]
            assert -1e-9 <= excess < 0.081  # at most the 80 ms of one token
    assert out.count("| tiny |") == 4 and (tmp_path / "acs.md").read_text() in out
    assert (tmp_path / "acs.png").stat().st_size > 5000

    # the same after a kill in the middle of the second row: only its question is asked again
    (tmp_path / "acs.jsonl").write_bytes((tmp_path / "acs.jsonl").read_bytes()[:-30])
    chosen.clear()
    code, out, err = run(*arguments)
    assert code == 0 and lines(tmp_path / "acs.jsonl") == rows and len(chosen) == 1


def test_two_clips_are_masked_as_one(family, heard):
    """The tokens of both compete in one order, and each clip keeps its length."""
    question, policy = family.questions[1], tiny.qwen3_omni()
    options = SimpleNamespace(instruction="", max_new_tokens=4, format_style="think", batch_size=4)
    row, = diagnostics.evidence_masking(policy, [question], options, LAYERS, "m")
    (first, second), *masked = heard
    assert row["seconds"] == (len(first) + len(second)) / 16000
    for (one, two), record in zip(masked, row["masked"], strict=True):
        assert len(one) == len(first) and len(two) == len(second)
        silent = ((one == 0) & (first != 0)).sum() + ((two == 0) & (second != 0)).sum()
        assert abs(silent / 16000 - record["seconds"]) < 0.01
    assert any((one == 0).mean() > 0.1 for one, _ in masked)
    assert any((two == 0).mean() > 0.1 for _, two in masked)


def acs_row(question, top, low, randoms):
    outcomes = [("top", 0, top), ("low", 0, low),
                *(("random", seed, right) for seed, right in enumerate(randoms))]
    return {"id": question, "model": "m", "right": True, "seconds": 2.0, "masked": [
        {"kind": kind, "seed": seed, "ratio": 0.5, "seconds": 1.0, "right": right}
        for kind, seed, right in outcomes]}


def test_eq17_by_hand(tmp_path, pictures):  # noqa: F811
    """ACS(r) = Acc_rand(r) − Acc_top(r), with the mean over the seeds as Acc_rand."""
    # Table 4's last row prints 0.068
    assert diagnostics.attention_causal_selectivity(0.776, 0.707) == pytest.approx(0.069)
    rows = [acs_row("a", False, True, [True, True, True, False, True]),  # 4 of 5 random masks
            acs_row("b", False, True, [True, False, False, False, False]),  # 1 of 5
            acs_row("c", True, False, [True] * 5),
            acs_row("d", True, True, [True] + [False] * 4)]  # 1 of 5, together 11 of 20
    accuracies = diagnostics.acs_accuracies(rows)
    whole, by_ratio = accuracies["m"]
    accuracy, seconds = by_ratio[0.5]
    assert whole == 1
    assert accuracy == pytest.approx({"top": 0.5, "low": 0.75, "random": 0.55})
    assert seconds == {"top": 1.0, "low": 1.0, "random": 1.0}
    assert ("| m | 1.000 | 50% | 0.500 | 0.550 | 0.750 | +0.050 | 1.00 / 1.00 / 1.00 |"
            in diagnostics.acs_table(rows))
    draw_acs(accuracies, diagnostics.RANDOM_SEEDS, tmp_path / "acs.png")
    assert curves_of(pictures["acs.png"].axes[0])["random, 5 seeds"] == ([0, 50], [1, 0.55])


# ──────── questions to ask ────────


def test_the_closed_questions_of_a_benchmark(tmp_path):
    """trace and acs can ask a benchmark's questions, but only closed ones, the first of them."""
    rows = [{"id": f"p{number}", "audio_path": ["a.wav"], "question": f"question {number}",
             "category": category, "choices": choices, "answer": "a cat"}
            for number, (category, choices) in enumerate([
                ("sound", ["a dog", "a cat"]), ("open", None), ("music", ["a cat", "a hum"]),
                ("speech", ["a cat", "wind"])])]
    write_lines(tmp_path / "pro.jsonl", rows)
    (tmp_path / "a.wav").touch()
    options = SimpleNamespace(benchmark="mmau-pro", data=tmp_path / "pro.jsonl", audio_root=None,
                              limit=2)
    questions = diagnostics.questions_of(options)
    assert [(q.id, q.question, q.choices, q.answer, q.audio) for q in questions] == [
        ("p0", "question 0", ("a dog", "a cat"), "a cat", (tmp_path / "a.wav",)),
        ("p2", "question 2", ("a cat", "a hum"), "a cat", (tmp_path / "a.wav",))]


def test_trace_and_acs_take_a_file_with_quirks(world, tmp_path):  # noqa: F811
    """Equal options, answers that are no option, numbers, several clips."""
    write_quirks(tmp_path)
    arguments = ["--model", world / "model", "--benchmark", "mmar", "--data",
                 tmp_path / "mmar.jsonl", "--max_new_tokens", 1, "--target_layers", 1,
                 "--limit", 3]
    code, _, err = run("trace", *arguments, "--out", tmp_path / "trace")
    assert code == 0, err
    assert len(lines(tmp_path / "trace" / "trace.jsonl")) == 3
    code, out, err = run("acs", *arguments, "--out", tmp_path / "acs")
    assert code == 0, err
    assert len(lines(tmp_path / "acs" / "acs.jsonl")) == 3
    assert "answer is none of the options, counted as wrong: 1" in out


@pytest.mark.parametrize("given, layers", [(None, [43, 44, 45, 46, 47]), ([3, 7], [3, 7])])
def test_target_layers(given, layers):
    """Those given, else the last five: the paper's for the 48 layers of its model."""
    policy, options = SimpleNamespace(num_layers=48), SimpleNamespace(target_layers=given)
    assert diagnostics.target_layers(policy, options) == layers


def test_target_layers_of_a_small_model():
    options = SimpleNamespace(target_layers=None)
    assert diagnostics.target_layers(SimpleNamespace(num_layers=3), options) == [0, 1, 2]
