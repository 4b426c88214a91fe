"""train.py: the gradient of an optimizer step, what a run writes, and what it refuses.

All on a tiny model with random weights.
"""

import contextlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import tiny
import torch
import yaml
from transformers import Qwen3OmniMoeThinkerForConditionalGeneration

import model
import train
from checkpoint import load_policy
from config import TrainConfig, read_config
from data import InputError, read_questions
from distributed import Team
from metrics import open_log
from run import Run, check_settings
from tiny import arguments, lines
from train import main

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True, scope="module")
def some_reward():
    """Makes the accuracy reward a function of the text alone.

    A random model never answers in the right form: all advantages would be 0.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "accuracy_reward", lambda text, *_: float(len(text) % 2))
        yield


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a tiny model and six questions, as a user would bring it."""
    # Small weights: sums in another order then differ by 1e-7 in fp32.
    policy = tiny.qwen3_omni(std=0.08)
    return tiny.write_world(tmp_path_factory.mktemp("world"), policy)


# ──────── the gradient of a step ────────


def a_run(config, policy, reference=None, questions=(), optimizer=None):
    """A Run of one process, as far as the functions under test need it."""
    frozen = (lambda: contextlib.nullcontext(reference)) if reference else None
    return Run(config, Team(), policy, frozen, list(questions), [], optimizer)


def prepared_batch(world, config):
    """→ a policy and a scored generation batch whose rewards differ; a random model earns none."""
    policy, reference = load_policy(world / "model"), load_policy(world / "model")
    run = a_run(config, policy, reference, read_questions(world / "train.jsonl"))
    batch = train.sample_batch(0, run)
    for i, completion in enumerate(batch.completions):  # ragged, as with a trained model
        n = 3 + i % 9
        batch.completions[i] = replace(completion, token_ids=completion.token_ids[:n],
                                       logps=completion.logps[:n])
    train.score(batch, train.ask_checker(batch, run), run)
    torch.manual_seed(1)
    batch.rewards["accuracy"] = (torch.arange(16) % 3 == 0).float()
    batch.advantages = torch.randn(16)
    with torch.no_grad():
        for p in reference.parameters():
            p.mul_(1.05)
        for p in policy.parameters():
            p.requires_grad_(False)
    train.reference_passes(batch, run)
    with torch.no_grad():  # the policy moves after π_old is recorded, so that ρ ≠ 1
        for p in policy.parameters():
            p.add_(0.02 * p.abs().mean() * torch.randn_like(p))
    policy.requires_grad_(True)
    policy.base.model.audio_tower.requires_grad_(False)  # as in a run
    return policy, batch


def gradient(policy, batch, config):
    """→ the gradient that `update` leaves behind, flattened, and its metrics.

    A learning rate of 0 moves nothing.
    """
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.0)
    metrics, _ = train.update(batch, range(16), 1, a_run(config, policy, optimizer=optimizer))
    return torch.cat([p.grad.flatten() for p in policy.parameters()
                      if p.grad is not None]), metrics


@pytest.mark.parametrize("flags", [
    ["--mask", "false", "--eta", "0"], ["--eta", "0"], ["--eta", "0.5"],
    ["--eta", "0.5", "--mask_truncated", "true"]], ids=["grpo", "mask", "mapo", "truncated"])
def test_micro_batches_sum_to_the_same_gradient(world, tmp_path, flags):
    """Micro-batches of 1, 2, 5 or all rows, or of at most 300 or 600 tokens: the same gradient and
    losses, to 1e-6 relative in fp32."""
    config = read_config(arguments(world, tmp_path, *flags, "--max_grad_norm", "1e9"))
    config = replace(config, steps_per_generation=1)
    policy, batch = prepared_batch(world, config)
    truncated = (1, 6, 7)  # what mask_truncated leaves out
    for i, completion in enumerate(batch.completions):
        reason = "length" if i in truncated else "stop"
        batch.completions[i] = replace(completion, finish_reason=reason)
    whole, metrics = gradient(policy, batch, replace(config, micro_batch_size=16))
    assert whole.norm() > 1e-3 and metrics["kl_loss"] > 0
    for size, tokens in ((1, 0), (2, 0), (5, 0), (0, 300), (5, 600)):
        part, part_metrics = gradient(policy, batch, replace(
            config, micro_batch_size=size, micro_batch_tokens=tokens))
        assert (part - whole).norm() / whole.norm() < 1e-6
        for name in ("loss", "policy_loss", "kl_loss", "attention_loss", "audio_mass_max",
                     "omega_mean", "policy_entropy"):
            assert part_metrics[name] == pytest.approx(metrics[name], rel=1e-5, abs=1e-7), name


def test_delta_h_is_right_where_truncated_completions_are_left_out(world, tmp_path):
    """Δh_t of every token is logged under mask_truncated too, and it is H_text-ref − H_π."""
    config = read_config(arguments(world, tmp_path, "--mask_truncated", "true"))
    config = replace(config, steps_per_generation=1, micro_batch_size=16)
    policy, batch = prepared_batch(world, config)
    batch.completions = [replace(c, finish_reason="length" if i % 2 else "stop")
                         for i, c in enumerate(batch.completions)]
    run = a_run(config, policy, optimizer=torch.optim.SGD(policy.parameters(), lr=0.0))
    _, per_token = train.update(batch, range(16), 1, run)
    for i, completion in enumerate(batch.completions):
        inputs = policy.collate([batch.prompts[i]], [completion.token_ids])
        expected = batch.text_ref_entropy[i] - policy(inputs, config.temperature).entropy[0]
        assert per_token[i][0] == pytest.approx(expected.tolist(), abs=1e-5)


def test_gradient_norm_is_clipped(world, tmp_path):
    """The optimizer sees a gradient of norm max_grad_norm; the metric is the norm before."""
    config = read_config(arguments(world, tmp_path))
    config = replace(config, steps_per_generation=1, max_grad_norm=1e9)
    policy, batch = prepared_batch(world, config)
    free, _ = gradient(policy, batch, config)
    clipped, metrics = gradient(policy, batch, replace(config, max_grad_norm=0.01))
    assert clipped.norm() == pytest.approx(0.01, rel=1e-4)
    assert metrics["grad_norm"] == pytest.approx(free.norm().item(), rel=1e-4)
    assert metrics["grad_norm"] > 0.1
    torch.testing.assert_close(clipped / clipped.norm(), free / free.norm(), atol=1e-6, rtol=1e-3)


def test_gradient_checkpointing_changes_nothing(world, tmp_path):
    """Recomputed activations, among them the masses of L_tgt, give the same gradient."""
    config = read_config(arguments(world, tmp_path, "--eta", "0.5", "--max_grad_norm", "1e9"))
    config = replace(config, steps_per_generation=1)
    policy, batch = prepared_batch(world, config)
    calls = []
    first_layer = policy.base.model.language_model.layers[0]
    first_layer.self_attn.q_proj.register_forward_hook(lambda *_: calls.append(1))
    plain, _ = gradient(policy, batch, config)
    once = len(calls)
    policy.base.activation_checkpointing_enable({"use_reentrant": False})
    again, _ = gradient(policy, batch, replace(config, gradient_checkpointing=True))
    assert len(calls) == once + 2 * once  # recomputed
    assert (again - plain).norm() / plain.norm() < 1e-6


def test_gradient_is_that_of_the_loss_by_finite_differences(world, tmp_path):
    """A step along the gradient changes the reported loss by its squared norm.

    So clipping, weights and detaching are right. Δh and ω̃ are live and detached: a finite
    difference would see them move. GRPO has none, so the test uses GRPO.
    """
    config = read_config(arguments(world, tmp_path, "--mask", "false", "--eta", "0",
                                   "--max_grad_norm", "1e9"))
    config = replace(config, steps_per_generation=1, beta=0.5)
    policy, batch = prepared_batch(world, config)
    policy.double()
    policy.base.set_experts_implementation("eager")
    for name in ("old_logp", "ref_logp"):
        setattr(batch, name, [x.double() for x in getattr(batch, name)])
    batch.advantages = batch.advantages.double()
    g, _ = gradient(policy, batch, config)
    along = [p.grad.clone() if p.grad is not None else None for p in policy.parameters()]
    # A shorter step drowns in the fp32 of RMSNorm, a longer one meets the kinks of ρ.
    step, losses = 1e-5 / g.norm().item(), []
    for sign in (1, -2):  # θ + step·g, then θ − step·g
        with torch.no_grad():
            for p, direction in zip(policy.parameters(), along):
                if direction is not None:
                    p.add_(direction, alpha=sign * step)
        losses.append(gradient(policy, batch, config)[1]["loss"])
    slope = (losses[0] - losses[1]) / (2 * step)
    assert slope / g.norm().item() ** 2 == pytest.approx(1, rel=1e-3)


def test_work_per_generation_batch(world, tmp_path, monkeypatch):
    """The frozen quantities are computed once per batch; plain GRPO has no text-only forward."""
    calls = []
    forward = model.Policy.forward

    def counting(self, batch, *rest):
        calls.append(("audio" if batch.audio else "text", torch.is_grad_enabled()))
        return forward(self, batch, *rest)

    monkeypatch.setattr(model.Policy, "forward", counting)
    for flags, text_only in ((["--mask", "false", "--eta", "0"], 0), ([], 2)):
        calls.clear()
        assert main(arguments(world, tmp_path, "--micro_batch_size", "8", "--overwrite", "true",
                              *flags)) == 0
        assert calls.count(("audio", True)) == 4  # one per optimizer step
        # Two generation batches, π_old and π_ref, two micro-batches each.
        assert calls.count(("audio", False)) == 2 * (2 + 2)
        assert calls.count(("text", False)) == 2 * text_only and ("text", True) not in calls


# ──────── what a run writes ────────


@pytest.fixture(scope="module")
def finished(world, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "out"
    assert main(arguments(world, out, "--eval_data", world / "train.jsonl")) == 0
    return out


def test_metrics_of_every_step(finished):
    """One line per optimizer step with all that the paper's curves need; nothing is NaN."""
    metrics = lines(finished / "metrics.jsonl")
    assert [m["step"] for m in metrics] == [1, 2, 3, 4]
    expected = """loss policy_loss kl_loss attention_loss reward reward_accuracy reward_format
        reward_consistency accuracy clip_fraction grad_norm learning_rate policy_entropy
        text_ref_entropy audio_mass_max audio_mass_mean audio_mass_max_late audio_mass_mean_late
        omega_mean omega_square omega_capped pos_coverage pos_fallbacks completion_length truncated
        sampler_gap seconds_generate seconds_reward seconds_pos_gate seconds_old seconds_reference
        seconds_text_reference seconds_update seconds_step""".split()
    for m in metrics:
        assert set(expected) <= set(m)
        assert all(math.isfinite(v) for v in m.values() if v is not None)
        total = m["policy_loss"] + 0.002 * m["kl_loss"] + 0.1 * m["attention_loss"]
        assert m["loss"] == pytest.approx(total, abs=1e-6)
        assert 0 <= m["audio_mass_mean"] <= m["audio_mass_max"] <= 1
        assert m["grad_norm"] > 1e-3 and m["zero_advantage"] < 1 and m["attention_loss"] > 0
    first, third = metrics[0], metrics[2]
    # Banning the placeholders costs the sampler less than this; a wrong temperature shows as 0.1.
    assert first["sampler_gap"] < 0.02
    # At first π_θ = π_old = π_ref. Step 3 has a new π_old, and still the first π_ref.
    assert first["clip_fraction"] == 0 and first["kl_loss"] == pytest.approx(0, abs=1e-9)
    assert third["clip_fraction"] == 0 and third["kl_loss"] > 1e-7
    assert [m["seconds_generate"] > 0 for m in metrics] == [True, False, True, False]


def test_completions_of_every_step(finished):
    """One line per completion: 4 steps of 8, groups of one prompt, Δh and a_t per token."""
    rows = lines(finished / "completions.jsonl")
    assert len(rows) == 32
    for row in rows:
        assert len(row["delta_h"]) == len(row["audio_mass"]) == len(row["token_ids"]) > 0
        assert row["reward_accuracy"] == len(row["text"]) % 2
        assert row["reward_total"] == (2 * row["reward_accuracy"] + row["reward_format"]
                                       + row["reward_consistency"])
    assert any(row["reward_accuracy"] for row in rows)
    # A generation batch has two steps with two prompts each.
    assert len({row["prompt_id"] for row in rows[:16]}) == 4
    for group in (rows[i:i + 4] for i in range(0, 32, 4)):
        assert len({row["prompt_id"] for row in group}) == 1
        total = [row["reward_total"] for row in group]
        mean = sum(total) / 4
        std = math.sqrt(sum((r - mean) ** 2 for r in total) / 3)
        assert [row["advantage"] for row in group] == pytest.approx(
            [(r - mean) / (std + 0.1) for r in total], abs=1e-5)


def test_mass_metrics_are_those_of_the_completions(finished):
    """a_t over all tokens and over the last third, recomputed from completions.jsonl."""
    rows = lines(finished / "completions.jsonl")
    for m in lines(finished / "metrics.jsonl"):
        masses = [row["audio_mass"] for row in rows if row["step"] == m["step"]]
        # The last third is what follows the first ⌈2T/3⌉ tokens.
        late = [a for row in masses for a in row[math.ceil(2 * len(row) / 3):]]
        every = [a for row in masses for a in row]
        assert m["audio_mass_max"] == pytest.approx(sum(every) / len(every), abs=1e-4)
        assert m["audio_mass_max_late"] == pytest.approx(sum(late) / len(late), abs=1e-4)


def test_draw_goes_through_the_data_by_epochs():
    """Two questions per iteration: an epoch has each of the five once, in its own order.

    An iteration is the same whether or not the ones before it were drawn.
    """
    config = TrainConfig(group_size=4, generation_batch_size=8, seed=3)
    questions = ["a", "b", "c", "d", "e"]
    drawn = [q for i in range(5) for q in train.draw(questions, i, config)]
    assert sorted(drawn[:5]) == sorted(drawn[5:]) == questions and drawn[:5] != drawn[5:]
    assert train.draw(questions, 3, config) == drawn[6:8]
    other = replace(config, seed=4)
    assert [q for i in range(5) for q in train.draw(questions, i, other)] != drawn


def test_the_checker_answers_during_the_frozen_forwards(world, tmp_path, monkeypatch):
    """Its verdicts come only once π_ref has run; without a thread of its own this would wait."""
    config = read_config(arguments(world, tmp_path))
    policy = load_policy(world / "model")
    run = a_run(config, policy, policy, read_questions(world / "train.jsonl"))
    forwards_are_over = threading.Event()

    def check(texts, *_):
        assert forwards_are_over.wait(60)
        return [1.0] * len(texts)

    monkeypatch.setattr(train, "check_consistency", check)
    batch = train.sample_batch(0, run)
    verdicts = train.ask_checker(batch, run)
    train.reference_passes(batch, run)
    assert batch.ref_logp and not batch.rewards
    forwards_are_over.set()
    train.score(batch, verdicts, run)
    assert (batch.rewards["consistency"] == 1).all()


def test_reference_passes(world, tmp_path):
    """log π_old, log π_ref and H(π_text-ref), against one forward per completion.

    All are at the sampling temperature. H(π_text-ref) is the reference's, on the text prompt.
    """
    config = replace(read_config(arguments(world, tmp_path)), steps_per_generation=1)
    policy, reference = load_policy(world / "model"), load_policy(world / "model")
    with torch.no_grad():  # not the audio encoder, which is frozen and therefore the policy's
        for p in reference.base.model.language_model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    run = a_run(config, policy, reference, read_questions(world / "train.jsonl"))
    batch = train.sample_batch(0, run)
    train.reference_passes(batch, run)

    def log_probs(model, prompt_ids, ids, audio):  # of the rows that predict the completion [T, V]
        whole = torch.tensor([prompt_ids + ids])
        with torch.no_grad():
            logits = model.base(input_ids=whole, attention_mask=torch.ones_like(whole),
                                **audio).logits[0, len(prompt_ids) - 1:-1]
        return (logits / 1.2).log_softmax(-1)

    for i in (0, 5, 15):
        prompt, ids = batch.prompts[i], batch.completions[i].token_ids
        audio = {"input_features": torch.stack(policy.encode(prompt.question).features),
                 "feature_attention_mask": torch.ones(1, prompt.frames[0], dtype=torch.long)}
        for ours, model_ in ((batch.old_logp, policy), (batch.ref_logp, reference)):
            expected = log_probs(model_, prompt.ids, ids, audio)[range(len(ids)), ids]
            torch.testing.assert_close(ours[i], expected, atol=2e-5, rtol=0)
        logp = log_probs(reference, prompt.text_ids, ids, {})
        expected = -(logp.exp() * logp).sum(-1)
        torch.testing.assert_close(batch.text_ref_entropy[i], expected, atol=2e-5, rtol=0)


def test_config_and_picture(finished):
    """config.yaml holds every field and starts the same run again; training.png is a picture."""
    saved = yaml.safe_load((finished / "config.yaml").read_text())
    assert set(saved) == {f.name for f in fields(TrainConfig)}
    assert read_config([str(finished / "config.yaml")]) == TrainConfig(**saved)
    assert (finished / "training.png").read_bytes()[:4] == b"\x89PNG"
    assert [e["step"] for e in lines(finished / "evaluation.jsonl")] == [0, 4]


def moved_weights(world, checkpoint):
    """Names of the tensors in which a checkpoint differs from the world's model."""
    load = Qwen3OmniMoeThinkerForConditionalGeneration.from_pretrained
    trained, start = load(checkpoint).state_dict(), load(world / "model").state_dict()
    assert set(trained) == set(start)
    return {name for name in start if not torch.equal(start[name], trained[name])}


def test_checkpoint_loads_in_transformers(finished, world):
    """The checkpoint is a normal folder with trained weights; the audio tower is unchanged."""
    moved = moved_weights(world, finished / "checkpoint")
    assert any("self_attn.q_proj" in name for name in moved)
    assert not any("audio_tower" in name or "visual" in name for name in moved)
    assert load_policy(finished / "checkpoint").tokenizer.chat_template


def test_same_seed_same_metrics(finished, world, tmp_path):
    """The same seed on the same machine gives the same numbers, times apart; another seed not."""
    timing = re.compile("seconds_.*|generation_tokens_per_second|wait_fraction")

    def numbers(out):
        return [{k: v for k, v in m.items() if not timing.fullmatch(k)}
                for m in lines(out / "metrics.jsonl")]

    again, other = tmp_path / "again", tmp_path / "other"
    assert main(arguments(world, again, "--eval_data", world / "train.jsonl")) == 0
    assert numbers(again) == numbers(finished)
    assert main(arguments(world, other, "--seed", 1)) == 0
    assert numbers(other) != numbers(finished)


def test_eta_zero_measures_on_an_interval(world, tmp_path):
    """η = 0 needs no a_t; it is still measured every mass_interval steps (Fig. 5, η = 0)."""
    assert main(arguments(world, tmp_path, "--eta", "0", "--mass_interval", "2")) == 0
    measured = [m["audio_mass_max"] is not None for m in lines(tmp_path / "metrics.jsonl")]
    assert measured == [True, True, False, True]


def test_lora(world, tmp_path):
    """LoRA: the reference is the policy without adapters.

    The checkpoint is merged, and the adapter is written beside it.
    """
    assert main(arguments(world, tmp_path, "--lora_rank", "4", "--lora_alpha", "8",
                          "--learning_rate", "0.05")) == 0
    metrics = lines(tmp_path / "metrics.jsonl")
    assert metrics[0]["kl_loss"] == pytest.approx(0, abs=1e-9) and metrics[-1]["kl_loss"] > 0
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    moved = moved_weights(world, tmp_path / "checkpoint")
    assert moved and all(re.search(r"language_model.*(q|k|v|o)_proj", name) for name in moved)


# ──────── what a run refuses ────────


def bad(tmp_path, world, **change):
    """A copy of the first rows with one changed: a jsonl file with paths into `world`."""
    rows = lines(world / "train.jsonl")
    for row in rows:
        row["audio"] = [str(world / clip) for clip in row["audio"]]
    rows[1].update(change)
    path = tmp_path / "bad.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ["--data", path]


def write_wav(path, samples):
    soundfile.write(path, np.asarray(samples, dtype=np.float32), 16000, subtype="FLOAT")
    return str(path)


def edited_model(tmp_path, world, **change):
    folder = tmp_path / "model"
    shutil.copytree(world / "model", folder)
    config = json.loads((folder / "config.json").read_text())
    config["thinker_config"]["text_config"].update(change.pop("text", {}))
    config["thinker_config"].update(change)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def two_placeholders(tmp_path, world):
    folder = edited_model(tmp_path, world)
    template = folder / "chat_template.jinja"
    template.write_text(template.read_text().replace("<|audio_pad|>", "<|audio_pad|><|audio_pad|>"))
    return ["--model", folder]


def text_model(tmp_path, world):
    folder = tmp_path / "text"
    shutil.copytree(world / "model", folder)
    config = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config))
    return ["--model", folder]


def latin(tmp_path, world):
    path = tmp_path / "bad.jsonl"
    path.write_bytes('{"id": "café"}'.encode("latin-1"))
    return ["--data", path]


def cut_flac(tmp_path, world):
    path = tmp_path / "cut.flac"
    soundfile.write(path, np.random.default_rng(0).uniform(-0.5, 0.5, 48000), 16000)
    path.write_bytes(path.read_bytes()[:20000])
    return bad(tmp_path, world, audio=str(path))


def no_weights(tmp_path, world):
    folder = edited_model(tmp_path, world)
    (folder / "model.safetensors").unlink()
    return ["--model", folder]


def malformed(tmp_path, world):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"id": "q1", "audio"\n')
    return ["--data", path]


def recipe(tmp_path, text):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    return path


BAD_INPUT = {
    "malformed jsonl": (malformed, "bad.jsonl:1: not valid json"),
    "missing audio": (lambda t, w: bad(t, w, audio="nowhere.wav"),
                      r"bad.jsonl:2: audio file .*nowhere.wav does not exist"),
    "empty audio": (lambda t, w: bad(t, w, audio=write_wav(t / "empty.wav", [])),
                    r"bad.jsonl:2: .*empty.wav: the clip is empty"),
    "NaN audio": (lambda t, w: bad(t, w, audio=write_wav(t / "nan.wav", [0.1, np.nan] * 800)),
                  r"nan.wav: .*NaN"),
    "answer not a choice": (lambda t, w: bad(t, w, answer="a cat"),
                            "bad.jsonl:2: answer 'a cat' is not among"),
    "one choice": (lambda t, w: bad(t, w, choices=["a dog"]), "bad.jsonl:2: field 'choices'"),
    "duplicate id": (lambda t, w: bad(t, w, id="q0"), "bad.jsonl:2: id 'q0' .*bad.jsonl:1;"),
    "no data": (lambda t, w: ["--data", ""], "data is empty"),
    "no model": (lambda t, w: ["--model", t / "nothing"], "nothing: no config.json"),
    "a text-only model": (text_model, "config.json: qwen2 is a text-only model"),
    "layers out of range": (lambda t, w: ["--target_layers", "2", "3"],
                            "target_layers: 3 is out of range"),
    "placeholders and features": (two_placeholders,
                                  "chat template renders 2 audio placeholders"),
    "group of one": (lambda t, w: ["--group_size", "1"], "group_size is 1"),
    "groups do not divide": (lambda t, w: ["--group_size", "5"],
                             "generation_batch_size 16 is not a multiple of group_size 5"),
    "steps do not divide": (lambda t, w: ["--steps_per_generation", "3"],
                            "not a multiple of steps_per_generation 3"),
    "unknown flag": (lambda t, w: ["--etta", "1"], "etta"),
    "a word for a number": (lambda t, w: ["--eta", "much"], "eta.*much"),
    "choices that differ by a space": (
        lambda t, w: bad(t, w, choices=["a dog", "a dog ", "a cat"]), "an option twice"),
    "not UTF-8": (latin, "bad.jsonl:1: not UTF-8"),
    "a placeholder in a question": (lambda t, w: bad(t, w, question="What is <|audio_pad|>?"),
                                    "question q1: .* contains"),
    "a cut flac": (cut_flac, "bad.jsonl:2: .*cut.flac: cannot be read"),
    "a tensor of another shape": (
        lambda t, w: ["--model", edited_model(t, w, text=dict(hidden_size=16))],
        "cannot be loaded"),
    "weights missing": (no_weights, "model: cannot be loaded"),
    "output_dir under a file": (lambda t, w: ["--output_dir", w / "train.jsonl" / "out"],
                                "train.jsonl is a file"),
    "output_dir holds the model": (lambda t, w: ["--output_dir", w],
                                   "holds the model that this run needs"),
    "learning rate of inf": (lambda t, w: ["--learning_rate", "inf"], "learning_rate is inf"),
    "negative decay": (lambda t, w: ["--weight_decay", "-1"], "weight_decay is -1.0"),
    "no limit": (lambda t, w: ["--micro_batch_size", "0"],
                 "micro_batch_size and micro_batch_tokens are both 0"),
    "reward weights": (lambda t, w: ["--reward_weights", "1", "nan", "1"], "reward_weights is"),
    "seed": (lambda t, w: ["--seed", "-1"], "seed is -1"),
    "checker down": (lambda t, w: ["--checker", "http://127.0.0.1:9/v1"],
                     "checker: the checker at http://127.0.0.1:9"),
    "no tracker": (lambda t, w: ["--report_to", "wandb"],
                   "report_to is wandb, which is not installed"),
    "no checker": (lambda t, w: ["--checker", ""], "checker is ''"),
    "resume and overwrite": (lambda t, w: ["--resume", "true", "--overwrite", "true"],
                             "resume and overwrite are both true"),
    "nothing to resume": (lambda t, w: ["--resume", "true"],
                          "no whole state to resume from.*--overwrite true"),
}


@pytest.mark.parametrize("make, message", BAD_INPUT.values(), ids=BAD_INPUT)
def test_bad_input(world, tmp_path, capsys, monkeypatch, make, message):
    """One line on stderr names file, line or field; exit code 2; nothing is written."""
    monkeypatch.setattr("rewards.FIRST_WAIT", 0.01)
    out = tmp_path / "out"
    assert main(arguments(world, out, *make(tmp_path, world))) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and "\n" not in error and re.search(message, error), error
    assert not out.exists()


@pytest.mark.parametrize("text, message", [
    ("etta: 1\n", "bad.yaml: unknown field 'etta'"), ("- 1\n", "bad.yaml: a list"),
    ("eta: [1\n", "bad.yaml: not valid yaml"), ("eta:\n", "bad.yaml: field 'eta' has no value")])
def test_bad_recipe(world, tmp_path, capsys, text, message):
    """A recipe with an unknown key, without a mapping, or that is not yaml."""
    assert main([str(recipe(tmp_path, text)), *arguments(world, tmp_path / "out")]) == 2
    error = capsys.readouterr().err.strip()
    assert "\n" not in error and message in error
    assert not (tmp_path / "out").exists()


def test_missing_tagger_data(world, tmp_path, capsys, monkeypatch):
    """Without NLTK's tagger data a run ends early, before a toy world is built."""
    def missing():
        raise LookupError("no tagger data: pip install it")

    monkeypatch.setattr(train, "load_tagger", missing)
    for more in ((), ("--model", "toy")):
        assert main(arguments(world, tmp_path / "runs" / "out", *more)) == 2
        assert capsys.readouterr().err == "error: no tagger data: pip install it\n"
    assert not (tmp_path / "runs").exists()


def test_exit_code_of_the_command(world, tmp_path):
    """The real command line, where libraries may write to stderr as well: one line, exit code 2."""
    make, message = BAD_INPUT["a tensor of another shape"]
    flags = arguments(world, tmp_path / "out", *make(tmp_path, world))
    done = subprocess.run([sys.executable, "train.py", *flags], cwd=ROOT, capture_output=True,
                          text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert re.search(message, done.stderr), done.stderr


# ──────── fields and recipes ────────


def test_every_field_has_its_source():
    """--help says of every field where its default comes from."""
    for f in fields(TrainConfig):
        assert re.search(r"\b(paper|release|ours)\b", f.metadata["help"]), f.name


def test_defaults_are_table_5():
    """Table 5, and the release where Table 5 has no value; written down here by hand."""
    table = dict(
        eta=0.1, tau_base=1.0, kappa=1.0, advantage_eps=0.1, attention_eps=0.1, mask_clip=5.0,
        prefactor_clip=3.0, target_layers=[43, 44, 45, 46, 47], beta=0.002, clip_ratio=0.2,
        group_size=8, generation_batch_size=768, steps_per_generation=4, temperature=1.2,
        top_k=50, top_p=0.99, repetition_penalty=1.0, reward_weights=[2.0, 1.0, 1.0],
        adam_beta1=0.9, adam_beta2=0.95, weight_decay=0.1, max_grad_norm=1.0, learning_rate=1e-6,
        warmup_ratio=0.05, max_steps=800, max_new_tokens=1200, fail_threshold=0.0,
        fail_gate_floor=0.1, mask=True, mask_truncated=False, advantage_floor=0.0)
    assert {name: getattr(TrainConfig(), name) for name in table} == table


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda p: p.stem)
def test_recipes(path):
    """Every recipe can be read. The rows of Table 1 differ only in what the table says."""
    config = read_config([str(path)])
    table_1 = {"grpo_lora": (False, 0, 128), "mapo_mask_lora": (True, 0, 128),
               "mapo_lora": (True, 0.1, 128), "grpo_phase1": (False, 0, 0),
               "mapo_phase1": (True, 0.1, 0), "mapo_phase2": (True, 0.1, 0)}
    if path.stem in table_1:
        mask, eta, rank = table_1[path.stem]
        assert config == replace(TrainConfig(), mask=mask, eta=eta, lora_rank=rank,
                                 data_format=config.data_format,
                                 output_dir=f"runs/{path.stem}", rollout="vllm")


def test_a_resumed_log_keeps_the_steps_that_are_done(tmp_path):
    """Later steps are dropped, and so is a line that was cut off.

    A text may contain line ends other than ours.
    """
    texts = {1: "one\u2028two\x85three", 2: "four"}
    first, second = (json.dumps({"step": step, "text": text}, ensure_ascii=False) + "\n"
                     for step, text in texts.items())
    log = tmp_path / "completions.jsonl"
    log.write_text(first + second + second[:9], encoding="utf-8")
    with open_log(TrainConfig(output_dir=str(tmp_path)), Team(), done=1):
        pass
    assert log.read_text(encoding="utf-8") == first


def test_a_line_that_was_cut_inside_a_character_is_dropped_with_a_warning(tmp_path, capsys):
    """The other lines stay byte for byte, and new ones follow."""
    log = tmp_path / "completions.jsonl"
    lines_before = b'{"step": 1}\n\n{"step":2, "a": "caf\xc3\xa9"}\n'
    log.write_bytes(lines_before + b'{"step": 2, "text": "caf\xc3')
    with open_log(TrainConfig(output_dir=str(tmp_path)), Team(), done=2) as write:
        write("completions.jsonl", {"step": 3})
    assert log.read_bytes() == lines_before + b'{"step": 3}\n'
    assert capsys.readouterr().err == (f"warning: {log}:4: the line is cut off and was dropped\n")


def test_a_broken_line_inside_a_log_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(InputError, match="metrics.jsonl:2: not valid json"):
        with open_log(TrainConfig(output_dir=str(tmp_path)), Team(), done=3):
            pass


# ──────── the folder of a run ────────


def files(folder):
    return {path.relative_to(folder): path.read_bytes()
            for path in folder.rglob("*") if path.is_file()}


def refused(capsys, flags, code=2):
    """→ the one line that train.py prints when it refuses, or fails."""
    capsys.readouterr()
    assert main(flags) == code
    errors = [line for line in capsys.readouterr().err.replace("\r", "\n").splitlines()
              if line.startswith("error: ")]
    assert len(errors) == 1
    return errors[0]


@pytest.fixture(scope="module")
def unfinished(world, tmp_path_factory):
    """A run whose loss was not finite in step 4: it has states of steps 2 and 3."""
    out = tmp_path_factory.mktemp("unfinished") / "out"
    with nan_in_step(4):
        assert main(arguments(world, out, "--save_every", "1", "--eval_data",
                              world / "train.jsonl")) == 1
    assert sorted(path.name for path in (out / "state").iterdir()) == ["step-2", "step-3"]
    return out


@contextlib.contextmanager
def nan_in_step(number):
    """The loss of the step is not a number. Every step has the same number of micro-batches."""
    calls, loss, per_step = [], train.mapo_loss, 3  # 8 completions, 3 at a time

    def nan_then(**inputs):
        calls.append(1)
        parts = loss(**inputs)
        if len(calls) == (number - 1) * per_step + 2:
            parts["loss"] = parts["loss"] * math.nan
        return parts

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "mapo_loss", nan_then)
        yield


@pytest.mark.parametrize("left", ["config.yaml", "metrics.jsonl", "state/step-3/run.pt",
                                  "checkpoint/config.json", "checkpoint-20/config.json"])
def test_a_fresh_run_refuses_the_folder_of_another(world, tmp_path, capsys, left):
    """In one line that names both ways out. Nothing changes, and no model is loaded."""
    (tmp_path / left).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / left).write_text("of another run")
    before = files(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("run.read_inputs", None)
        error = refused(capsys, arguments(world, tmp_path))
    assert f"{tmp_path} holds another run ({left.split('/run.pt')[0].split('/config.json')[0]})" \
        in error
    assert "--resume true" in error and "--overwrite true" in error
    assert files(tmp_path) == before


def test_files_that_no_run_writes_are_no_run(world, tmp_path):
    """They stay, also with --overwrite true, which removes every file of the run before."""
    kept = ["notes.txt", "state/step-2-hf/weights", "checkpoint-best/weights", "vllm.log",
            "weights/mine/weights", "weights/version-best"]
    for name in kept:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("mine")
    (tmp_path / "checkpoint").mkdir()  # empty
    assert main(arguments(world, tmp_path, "--save_every", "1")) == 0
    assert {name: (tmp_path / name).read_text() for name in kept} == dict.fromkeys(kept, "mine")
    first = files(tmp_path)
    for name in ("state/step-7/run.pt", "checkpoint-2/old", "adapter/old", "checkpoint/old",
                 ".checkpoint-3.writing/old", "weights/version-4/old"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("of another run")
    assert main(arguments(world, tmp_path, "--overwrite", "true", "--save_every", "1")) == 0
    assert files(tmp_path).keys() == first.keys()
    assert {name: (tmp_path / name).read_text() for name in kept} == dict.fromkeys(kept, "mine")
    assert [m["step"] for m in lines(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]
    # The recipe that the run writes does not overwrite.
    assert not read_config([str(tmp_path / "config.yaml")]).overwrite


def test_hf_overrides_must_keep_the_head(world, tmp_path, capsys):
    """vLLM takes the last --hf-overrides alone, so a user's own would drop the fp32 head."""
    flags = arguments(world, tmp_path, "--vllm_flags=--hf-overrides {\"a\":1}")
    assert "head_dtype" in refused(capsys, flags)
    for more in (["--fp32_head", "false"],
                 ["--vllm_flags=--hf-overrides {\"a\":1,\"head_dtype\":\"float32\"}"]):
        check_settings(read_config([*flags, *more]))


def test_overwrite_removes_nothing_when_the_inputs_are_wrong(world, unfinished, tmp_path, capsys):
    out = shutil.copytree(unfinished, tmp_path / "out")
    before = files(out)
    assert "3 is out of range" in refused(capsys, arguments(
        world, out, "--overwrite", "true", "--target_layers", "3"))
    assert files(out) == before


def test_links_are_followed(world, tmp_path):
    """output_dir and checkpoint may be links; they stay, and the run writes behind them."""
    (tmp_path / "disk" / "old").mkdir(parents=True)
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "run")  # there is no such folder yet
    assert main(arguments(world, tmp_path / "out", "--max_steps", 1)) == 0
    assert (tmp_path / "disk" / "run" / "metrics.jsonl").is_file()
    second = tmp_path / "second"
    second.mkdir()
    (second / "checkpoint").symlink_to(tmp_path / "disk" / "old")
    for more in ((), ("--overwrite", "true")):
        assert main(arguments(world, second, "--max_steps", 1, *more)) == 0
        assert (second / "checkpoint").is_symlink()
        assert load_policy(tmp_path / "disk" / "old").num_layers == 3
    assert sorted(path.name for path in (tmp_path / "disk").iterdir()) == ["old", "run"]


@pytest.mark.parametrize("name", ["checkpoint", "adapter", "checkpoint-2"])
def test_a_link_that_would_cost_other_files_is_refused(world, tmp_path, capsys, name):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "photo").touch()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).symlink_to(tmp_path / "photos")
    for more in ((), ("--overwrite", "true")):
        error = refused(capsys, arguments(world, tmp_path / "out", *more))
        assert f"{name} links to {tmp_path / 'photos'}" in error
    assert (tmp_path / "photos" / "photo").exists()


def test_the_model_of_the_run_is_never_overwritten(world, tmp_path, capsys):
    """Also where `checkpoint` links to it, or where --model goes through the link."""
    model = shutil.copytree(world / "model", tmp_path / "model")
    before = files(model)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "checkpoint").symlink_to(model)
    for given in (model, tmp_path / "out" / "checkpoint"):
        for name in ("--model", "--checker"):
            error = refused(capsys, arguments(world, tmp_path / "out", "--overwrite", "true",
                                              "--vllm_python", sys.executable, name, given))
            assert f"holds the {name[2:]} that this run needs" in error
    assert files(model) == before


def test_a_link_that_leads_to_itself(world, tmp_path, capsys):
    (tmp_path / "out").symlink_to(tmp_path / "out")
    assert "cannot be written" in refused(capsys, arguments(world, tmp_path / "out"))


@pytest.mark.parametrize("folder", ["/proc/out", "/proc/1/deep/out"])
def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_loaded(world, capsys,
                                                                              folder, monkeypatch):
    monkeypatch.setattr("run.read_inputs", None)
    assert f"output_dir {folder}: cannot be written" in refused(capsys, arguments(world, folder))
    # The toy would build its folder first.
    assert f"output_dir {folder}: cannot be written" in refused(
        capsys, arguments(world, folder, "--model", "toy"))


def test_resume_refuses_other_rows(world, unfinished, tmp_path, capsys):
    """Another order, another text, a clip of another length; of --data and of --eval_data.

    The folder of the data may move: clips count by name and size.
    """
    out, place = shutil.copytree(unfinished, tmp_path / "out"), tmp_path / "world"
    shutil.copytree(world, place)
    data = place / "train.jsonl"
    saved_fields = torch.load(out / "state" / "step-3" / "run.pt", weights_only=False)
    saved_fields["config"] |= {"model": str(place / "model")}
    torch.save(saved_fields, out / "state" / "step-3" / "run.pt")
    before = files(out)
    shutil.copy(data, place / "eval.jsonl")
    flags = arguments(place, out, "--resume", "true", "--save_every", "1", "--eval_data",
                      place / "eval.jsonl")
    for name in ("data", "eval_data"):
        path = place / ("train.jsonl" if name == "data" else "eval.jsonl")
        rows = path.read_text().splitlines(keepends=True)
        for changed in (rows[::-1], [rows[0].replace("Which", "What"), *rows[1:]], rows[:-1]):
            path.write_text("".join(changed))
            error = refused(capsys, flags)
            assert f"error: {name} {path}: its rows or clips are not those of" in error
        path.write_text("".join(rows))
    clip = next(place.glob("*.wav"))
    content = clip.read_bytes()
    soundfile.write(clip, np.zeros(9000), 16000)
    assert f"error: data {data}: its rows or clips" in refused(capsys, flags)
    assert files(out) == before
    clip.write_bytes(content)
    assert main(flags) == 0
    assert [m["step"] for m in lines(out / "metrics.jsonl")] == [1, 2, 3, 4]


def test_resume_skips_a_state_that_is_not_whole(world, unfinished, tmp_path, capsys):
    """It goes on from the one before, keeps a whole state at every moment, and ends as usual."""
    out = shutil.copytree(unfinished, tmp_path / "out")
    (out / "state" / "step-3" / "run.pt").unlink()
    flags = arguments(world, out, "--save_every", "1", "--eval_data", world / "train.jsonl")
    capsys.readouterr()
    assert main([*flags, "--resume", "true"]) == 0
    assert f"warning: {out / 'state' / 'step-3'} is not whole and was skipped\n" \
        in capsys.readouterr().err
    assert [m["step"] for m in lines(out / "metrics.jsonl")] == [1, 2, 3, 4]
    assert not (out / "state").exists()


def test_a_broken_state_with_a_higher_number_costs_no_whole_one(world, unfinished, tmp_path):
    """States that a run has passed are deleted; later ones are not its own."""
    out = shutil.copytree(unfinished, tmp_path / "out")
    (out / "state" / "step-9").mkdir()
    with nan_in_step(1):  # the first step after the resume
        assert main(arguments(world, out, "--save_every", "1", "--resume", "true", "--eval_data",
                              world / "train.jsonl")) == 1
    assert sorted(path.name for path in (out / "state").iterdir()) == ["step-2", "step-3", "step-9"]


def sigterm_in_step(number, monkeypatch):
    step, calls = torch.optim.AdamW.step, []

    def terminated(*more, **named):
        calls.append(1)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(*more, **named)

    monkeypatch.setattr(torch.optim.AdamW, "step", terminated)


def test_sigterm_in_the_last_step_does_not_cost_the_checkpoint(world, tmp_path, monkeypatch):
    """There is no state of the last step, so the run ends as usual."""
    sigterm_in_step(4, monkeypatch)
    assert main(arguments(world, tmp_path)) == 0
    assert (tmp_path / "checkpoint" / "config.json").is_file()


def test_a_resumed_run_writes_the_export_that_it_missed(world, tmp_path, monkeypatch):
    """SIGTERM in a step whose checkpoint is due: the run saves its state and stops at once."""
    sigterm_in_step(2, monkeypatch)
    flags = arguments(world, tmp_path, "--export_every", "2")
    assert main(flags) == 0 and not (tmp_path / "checkpoint-2").exists()
    assert main([*flags, "--resume", "true"]) == 0
    assert moved_weights(world, tmp_path / "checkpoint-2")


# ──────── a run that learns nothing, or cannot go on ────────


def test_a_loss_that_is_not_finite(world, unfinished, tmp_path, capsys):
    """One line with the questions of the micro-batch and what to try; the last state is kept."""
    with nan_in_step(4):
        error = refused(capsys, arguments(world, tmp_path / "out", "--save_every", "1"), code=1)
    assert re.fullmatch(r"error: the loss is nan, on completions of \['q\d'(, 'q\d')*\]; listen to "
                        "their clips, and try a lower --learning_rate .* kept", error), error
    state = tmp_path / "out" / "state"
    assert sorted(path.name for path in state.iterdir()) == ["step-2", "step-3"]
    assert len(lines(tmp_path / "out" / "metrics.jsonl")) == 3


def test_a_gradient_that_is_not_finite(world, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: torch.tensor(math.inf))
    error = refused(capsys, arguments(world, tmp_path), code=1)
    assert re.search(r"the gradient norm is inf, on completions of \['q\d', 'q\d'\]; ", error)
    assert "lower --learning_rate" in error


def warnings_of(capsys, flags):
    capsys.readouterr()
    assert main(flags) == 0
    return [line for line in capsys.readouterr().err.replace("\r", "\n").splitlines()
            if line.startswith("warning: ")]


def test_a_run_whose_completions_have_no_format_says_so(world, tmp_path, capsys, monkeypatch):
    """Once, for the first generation batch: how many, where they are, and the likely causes."""
    flags = arguments(world, tmp_path, "--save_every", "1")
    [warning] = warnings_of(capsys, flags)
    assert "only 0 of the first 16 completions earned the format reward" in warning
    for part in (f"{tmp_path}/completions.jsonl", "--instruction", "recipes/instruct.yaml",
                 "--format_style", "--max_new_tokens 12"):
        assert part in warning
    assert len(lines(tmp_path / "completions.jsonl")) == 32  # of two generation batches
    first = lines(tmp_path / "completions.jsonl")[0]["text"]
    assert warning.endswith(f"A completion: {first!r}")
    monkeypatch.setattr(train, "format_reward", lambda *_: 1.0)
    assert warnings_of(capsys, [*flags, "--overwrite", "true"]) == []


def test_a_run_with_few_completions_in_the_format_says_how_many(world, tmp_path, capsys,
                                                                monkeypatch):
    """1 of 16 is below a tenth, 2 of 16 are not."""
    monkeypatch.setattr(train, "accuracy_reward", lambda text, *_: float(len(text) % 2))
    for formed, said in ((1, True), (2, False)):
        earned = iter([1.0] * formed + [0.0] * 100)
        monkeypatch.setattr(train, "format_reward", lambda *_: next(earned))
        warnings = warnings_of(capsys, arguments(world, tmp_path, "--max_steps", "2",
                                                 "--overwrite", "true"))
        assert [f"only {formed} of the first 16" in line for line in warnings] == [True] * said


def test_a_control_token_in_the_instruction_is_refused(world, tmp_path, capsys):
    """Before anything is written. The tags of the format are not refused."""
    text, out = "Write <think></think> and <answer></answer>.", tmp_path / "out"
    error = refused(capsys, arguments(world, out, "--instruction", f"{text}<|im_end|>"))
    assert "field 'instruction' contains <|im_end|>, a control token" in error
    assert not out.exists()
    assert main(arguments(world, out, "--instruction", text, "--max_steps", "1")) == 0


def test_a_run_whose_advantages_are_0_says_so(world, tmp_path, capsys, monkeypatch):
    """After three generation batches in a row, once."""
    monkeypatch.setattr(train, "accuracy_reward", lambda *_: 0.0)
    monkeypatch.setattr(train, "format_reward", lambda *_: 1.0)
    flags = arguments(world, tmp_path, "--steps_per_generation", "1", "--max_steps")
    assert warnings_of(capsys, [*flags, "2"]) == []
    [warning] = warnings_of(capsys, [*flags, "4", "--overwrite", "true"])
    assert "all advantages of 3 generation batches in a row were 0" in warning
    assert "accuracy 0.00" in warning and "--temperature 1.2" in warning


def test_a_resumed_run_does_not_warn_of_its_first_batch(world, unfinished, tmp_path, capsys):
    out = shutil.copytree(unfinished, tmp_path / "out")
    assert warnings_of(capsys, arguments(world, out, "--save_every", "1", "--resume", "true",
                                         "--eval_data", world / "train.jsonl")) == []


def test_unreadable_verdicts_are_counted(world, tmp_path, monkeypatch):
    """They count 0 in the reward. Without a checker there is no number."""
    monkeypatch.setattr(train, "check_consistency",
                        lambda texts, *_: [None if i == 3 else 1.0 for i in range(len(texts))])
    assert main(arguments(world, tmp_path)) == 0
    metrics = lines(tmp_path / "metrics.jsonl")
    assert [m["checker_unreadable"] for m in metrics] == [1, 0, 1, 0]
    assert [m["reward_consistency"] for m in metrics] == [7 / 8, 1, 7 / 8, 1]
    rows = lines(tmp_path / "completions.jsonl")
    assert [row["reward_consistency"] for row in rows[:5]] == [1, 1, 1, 0, 1]
    assert main(arguments(world, tmp_path, "--overwrite", "true",
                          "--reward_weights", "2", "1", "0")) == 0
    assert {m["checker_unreadable"] for m in lines(tmp_path / "metrics.jsonl")} == {None}
