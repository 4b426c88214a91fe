"""train.py: the gradient of an optimizer step, what a run writes, and what it refuses. On a tiny random model."""

import contextlib
import json
import math
import re
import shutil
import subprocess
import sys
from collections import defaultdict
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
from data import read_questions
from tiny import arguments, lines
from train import TrainConfig, main, read_config

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True, scope="module")
def some_reward():
    """A random model never answers in the right form. So that advantages, losses and gradients are not all zero, the
    accuracy reward is a function of the text alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "accuracy_reward", lambda text, *_: float(len(text) % 2))
        yield


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a tiny model and six questions, as a user would bring it."""
    policy = tiny.qwen3_omni(std=0.08)  # well conditioned: in fp32 sums of another order differ by 1e-7
    return tiny.write_world(tmp_path_factory.mktemp("world"), policy)


# ───────────────────────────────────────────────── the gradient of a step ─────────────────────────────────────────────


def generated(policy, world, config):
    questions = train.draw(read_questions(world / "train.jsonl"), 0, config)
    prompts = [policy.encode(q) for q in questions]
    return train.GenerationBatch([p for p in prompts for _ in range(config.group_size)],
                                 *train.generate(policy, prompts, config, 0, None), 0.0)


def prepared_batch(world, config):
    """A policy and a scored, frozen generation batch whose rewards differ (a random model earns none)."""
    policy = model.load_policy(world / "model")
    batch = generated(policy, world, config)
    for i, completion in enumerate(batch.completions):  # ragged lengths, as a trained model has them
        n = 3 + i % 9
        batch.completions[i] = replace(completion, token_ids=completion.token_ids[:n], logps=completion.logps[:n])
    train.score(batch, policy, config)
    torch.manual_seed(1)
    batch.rewards["accuracy"] = (torch.arange(16) % 3 == 0).float()
    batch.advantages = torch.randn(16)
    reference = model.load_policy(world / "model")
    with torch.no_grad():
        for p in reference.parameters():
            p.mul_(1.05)
        for p in policy.parameters():  # after freezing π_old the policy has moved, so that ρ ≠ 1
            p.requires_grad_(False)
    train.freeze(batch, policy, lambda: contextlib.nullcontext(reference), config, defaultdict(float))
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(0.02 * p.abs().mean() * torch.randn_like(p))
    policy.requires_grad_(True)
    policy.base.model.audio_tower.requires_grad_(False)  # as a run leaves it
    return policy, batch


def gradient(policy, batch, config):
    """The gradient that `update` leaves behind, flattened, and its metrics; a learning rate of 0 moves nothing."""
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.0)
    metrics, _ = train.update(policy, optimizer, batch, range(0, 16), config, measure=True)
    return torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None]), metrics


@pytest.mark.parametrize("flags", [["--mask", "false", "--eta", "0"], ["--eta", "0"], ["--eta", "0.5"],
                                   ["--eta", "0.5", "--mask_truncated", "true"]],
                         ids=["grpo", "mask", "mapo", "truncated"])
def test_micro_batches_sum_to_the_same_gradient(world, tmp_path, flags):
    """Micro-batches of 1, 2, 5 or all: the same gradient and losses, 1e-6 relative in fp32."""
    config = replace(read_config(arguments(world, tmp_path, *flags, "--max_grad_norm", "1e9")), steps_per_generation=1)
    policy, batch = prepared_batch(world, config)
    for i in (1, 6, 7):  # what mask_truncated takes out
        batch.completions[i] = replace(batch.completions[i], finish_reason="length")
    for i in set(range(16)) - {1, 6, 7}:
        batch.completions[i] = replace(batch.completions[i], finish_reason="stop")
    whole, metrics = gradient(policy, batch, replace(config, micro_batch_size=16))
    assert whole.norm() > 1e-3 and metrics["kl_loss"] > 0
    for size in (1, 2, 5):
        part, part_metrics = gradient(policy, batch, replace(config, micro_batch_size=size))
        assert (part - whole).norm() / whole.norm() < 1e-6
        for name in ("loss", "policy_loss", "kl_loss", "attention_loss", "audio_mass_max", "omega_mean",
                     "policy_entropy"):
            assert part_metrics[name] == pytest.approx(metrics[name], rel=1e-5, abs=1e-7), name


def test_gradient_norm_is_clipped(world, tmp_path):
    """The gradient that the optimizer sees has norm max_grad_norm; the metric is the norm before."""
    config = replace(read_config(arguments(world, tmp_path)), steps_per_generation=1, max_grad_norm=1e9)
    policy, batch = prepared_batch(world, config)
    free, _ = gradient(policy, batch, config)
    clipped, metrics = gradient(policy, batch, replace(config, max_grad_norm=0.01))
    assert clipped.norm() == pytest.approx(0.01, rel=1e-4)
    assert metrics["grad_norm"] == pytest.approx(free.norm().item(), rel=1e-4) and metrics["grad_norm"] > 0.1
    torch.testing.assert_close(clipped / clipped.norm(), free / free.norm(), atol=1e-6, rtol=1e-3)


def test_gradient_checkpointing_changes_nothing(world, tmp_path):
    """Recomputed activations, the masses of L_tgt among them, give the same gradient."""
    config = read_config(arguments(world, tmp_path, "--eta", "0.5", "--max_grad_norm", "1e9"))
    config = replace(config, steps_per_generation=1)
    policy, batch = prepared_batch(world, config)
    calls = []
    policy.base.model.language_model.layers[0].self_attn.q_proj.register_forward_hook(lambda *_: calls.append(1))
    plain, _ = gradient(policy, batch, config)
    once = len(calls)
    policy.base.activation_checkpointing_enable({"use_reentrant": False})
    again, _ = gradient(policy, batch, replace(config, gradient_checkpointing=True))
    assert len(calls) == once + 2 * once  # recomputed
    assert (again - plain).norm() / plain.norm() < 1e-6


def test_gradient_is_that_of_the_loss_by_finite_differences(world, tmp_path):
    """A step along the gradient changes the reported loss by its squared norm: clipping, shares, detaching are right.

    Δh and ω̃ are live and detached, so the loss is compared with them held where they were: GRPO has none.
    """
    config = replace(read_config(arguments(world, tmp_path, "--mask", "false", "--eta", "0", "--max_grad_norm", "1e9")),
                     steps_per_generation=1, beta=0.5)
    policy, batch = prepared_batch(world, config)
    policy.double()
    policy.base.set_experts_implementation("eager")
    for name in ("old_logp", "ref_logp"):
        setattr(batch, name, [x.double() for x in getattr(batch, name)])
    batch.advantages = batch.advantages.double()
    g, _ = gradient(policy, batch, config)
    along = [p.grad.clone() if p.grad is not None else None for p in policy.parameters()]
    step, losses = 1e-5 / g.norm().item(), []  # shorter drowns in the fp32 of RMSNorm, longer meets kinks of ρ
    for sign in (1, -2):  # θ + step·g, then θ − step·g
        with torch.no_grad():
            for p, direction in zip(policy.parameters(), along):
                if direction is not None:
                    p.add_(direction, alpha=sign * step)
        losses.append(gradient(policy, batch, config)[1]["loss"])
    assert (losses[0] - losses[1]) / (2 * step * g.norm().item() ** 2) == pytest.approx(1, rel=1e-3)


def test_work_per_generation_batch(world, tmp_path, monkeypatch):
    """Frozen quantities are computed once per generation batch; plain GRPO makes no text-only forward."""
    calls = []
    forward = model.Policy.forward

    def counting(self, batch, *rest):
        calls.append(("audio" if batch.audio else "text", torch.is_grad_enabled()))
        return forward(self, batch, *rest)

    monkeypatch.setattr(model.Policy, "forward", counting)
    for flags, text_only in ((["--mask", "false", "--eta", "0"], 0), ([], 2)):
        calls.clear()
        assert main(arguments(world, tmp_path, "--micro_batch_size", "8", *flags)) == 0
        assert calls.count(("audio", True)) == 4  # one per optimizer step
        assert calls.count(("audio", False)) == 2 * (2 + 2)  # two generation batches: π_old and π_ref, two halves each
        assert calls.count(("text", False)) == 2 * text_only and ("text", True) not in calls


# ──────────────────────────────────────────────────── what a run writes ───────────────────────────────────────────────


@pytest.fixture(scope="module")
def finished(world, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "out"
    assert main(arguments(world, out, "--eval_data", world / "train.jsonl")) == 0
    return out


def test_metrics_of_every_step(finished):
    """A line per optimizer step with everything that the curves of the paper need; nothing is NaN."""
    metrics = lines(finished / "metrics.jsonl")
    assert [m["step"] for m in metrics] == [1, 2, 3, 4]
    expected = """loss policy_loss kl_loss attention_loss reward reward_accuracy reward_format reward_consistency
        accuracy clip_fraction grad_norm learning_rate policy_entropy text_ref_entropy audio_mass_max audio_mass_mean
        audio_mass_max_late audio_mass_mean_late omega_mean omega_square omega_capped pos_coverage pos_fallbacks
        completion_length truncated sampler_gap seconds_generate seconds_reward seconds_old seconds_reference
        seconds_text_reference seconds_update seconds_step""".split()
    for m in metrics:
        assert set(expected) <= set(m)
        assert all(math.isfinite(v) for v in m.values() if v is not None)
        assert m["loss"] == pytest.approx(m["policy_loss"] + 0.002 * m["kl_loss"] + 0.1 * m["attention_loss"], abs=1e-6)
        assert 0 <= m["audio_mass_mean"] <= m["audio_mass_max"] <= 1
    assert all(m["grad_norm"] > 1e-3 and m["zero_advantage"] < 1 and m["attention_loss"] > 0 for m in metrics)
    assert metrics[0]["sampler_gap"] < 0.02  # what banning the placeholders does; another temperature shows as 0.1
    # π_θ = π_old = π_ref
    assert metrics[0]["clip_fraction"] == 0 and metrics[0]["kl_loss"] == pytest.approx(0, abs=1e-9)
    assert metrics[2]["kl_loss"] > 1e-7 and metrics[2]["clip_fraction"] == 0  # a new π_old, and still the first π_ref
    assert [m["seconds_generate"] > 0 for m in metrics] == [True, False, True, False]


def test_completions_of_every_step(finished):
    """A line per completion: 4 steps of 8, groups of one prompt, Δh and a_t per token."""
    rows = lines(finished / "completions.jsonl")
    assert len(rows) == 32
    for row in rows:
        assert len(row["delta_h"]) == len(row["audio_mass"]) == len(row["token_ids"]) > 0
        assert row["reward_accuracy"] == len(row["text"]) % 2
        assert row["reward_total"] == 2 * row["reward_accuracy"] + row["reward_format"] + row["reward_consistency"]
    assert any(row["reward_accuracy"] for row in rows)
    assert len({row["prompt_id"] for row in rows[:16]}) == 4  # the two steps of a generation batch, 2 prompts each
    for group in (rows[i:i + 4] for i in range(0, 32, 4)):
        assert len({row["prompt_id"] for row in group}) == 1
        total = [row["reward_total"] for row in group]
        mean = sum(total) / 4
        std = math.sqrt(sum((r - mean) ** 2 for r in total) / 3)
        assert [row["advantage"] for row in group] == pytest.approx([(r - mean) / (std + 0.1) for r in total], abs=1e-5)


def test_mass_metrics_are_those_of_the_completions(finished):
    """a_t over all tokens and over the last third, recomputed from completions.jsonl."""
    rows = lines(finished / "completions.jsonl")
    for m in lines(finished / "metrics.jsonl"):
        masses = [row["audio_mass"] for row in rows if row["step"] == m["step"]]
        # The last third: what is left after ⌈2T/3⌉ tokens.
        late = [a for row in masses for a in row[math.ceil(2 * len(row) / 3):]]
        every = [a for row in masses for a in row]
        assert m["audio_mass_max"] == pytest.approx(sum(every) / len(every), abs=1e-4)
        assert m["audio_mass_max_late"] == pytest.approx(sum(late) / len(late), abs=1e-4)


def test_draw_goes_through_the_data_by_epochs():
    """Two questions an iteration: each of five stands once in an epoch, the next epoch has another order, and an
    iteration is the same whether or not the ones before it were drawn."""
    config = TrainConfig(group_size=4, generation_batch_size=8, seed=3)
    questions = ["a", "b", "c", "d", "e"]
    drawn = [q for i in range(5) for q in train.draw(questions, i, config)]
    assert sorted(drawn[:5]) == sorted(drawn[5:]) == questions and drawn[:5] != drawn[5:]
    assert train.draw(questions, 3, config) == drawn[6:8]
    assert [q for i in range(5) for q in train.draw(questions, i, replace(config, seed=4))] != drawn


def test_frozen_quantities(world, tmp_path):
    """π_old is the policy, π_ref the reference, both at the sampling temperature; H(π_text-ref) is the reference's, on
    the text prompt. Against a forward of each, one completion at a time."""
    config = replace(read_config(arguments(world, tmp_path)), steps_per_generation=1)
    policy, reference = model.load_policy(world / "model"), model.load_policy(world / "model")
    with torch.no_grad():
        for p in reference.parameters():
            p.add_(0.05 * torch.randn_like(p))
    batch = generated(policy, world, config)
    train.freeze(batch, policy, lambda: contextlib.nullcontext(reference), config, defaultdict(float))
    for i in (0, 5, 15):
        prompt, ids = batch.prompts[i], batch.completions[i].token_ids
        for ours, theirs, prompt_ids, audio in ((batch.old_logp, policy, prompt.ids, True),
                                                (batch.ref_logp, reference, prompt.ids, True),
                                                (batch.text_ref_entropy, reference, prompt.text_ids, False)):
            inputs = {} if not audio else {"input_features": torch.stack(prompt.features),
                                           "feature_attention_mask": torch.ones(1, prompt.frames[0], dtype=torch.long)}
            with torch.no_grad():
                logits = theirs.base(input_ids=torch.tensor([prompt_ids + ids]), attention_mask=torch.ones(
                    1, len(prompt_ids + ids), dtype=torch.long), **inputs).logits[0, len(prompt_ids) - 1:-1]
            logp = (logits / 1.2).log_softmax(-1)
            expected = logp[range(len(ids)), ids] if audio else -(logp.exp() * logp).sum(-1)
            torch.testing.assert_close(ours[i], expected, atol=2e-5, rtol=0)


def test_config_and_picture(finished):
    """config.yaml holds every field and starts the same run again; the picture is a picture."""
    saved = yaml.safe_load((finished / "config.yaml").read_text())
    assert set(saved) == {f.name for f in fields(TrainConfig)}
    assert read_config([str(finished / "config.yaml")]) == TrainConfig(**saved)
    assert (finished / "training.png").read_bytes()[:4] == b"\x89PNG"
    assert [e["step"] for e in lines(finished / "evaluation.jsonl")] == [0, 4]


def test_checkpoint_loads_in_transformers(finished, world):
    """The checkpoint is a folder like any other, with moved weights; the audio tower stayed frozen."""
    trained = Qwen3OmniMoeThinkerForConditionalGeneration.from_pretrained(finished / "checkpoint").state_dict()
    start = Qwen3OmniMoeThinkerForConditionalGeneration.from_pretrained(world / "model").state_dict()
    assert set(trained) == set(start)
    moved = {name for name in start if not torch.equal(start[name], trained[name])}
    assert any("self_attn.q_proj" in name for name in moved)
    assert not any("audio_tower" in name or "visual" in name for name in moved)
    assert model.load_policy(finished / "checkpoint").tokenizer.chat_template


def test_same_seed_same_metrics(finished, world, tmp_path):
    """Same seed, same machine: the same numbers, seconds apart; another seed: others."""
    def numbers(out):
        timing = re.compile("seconds_.*|generation_tokens_per_second|wait_fraction")
        return [{k: v for k, v in m.items() if not timing.fullmatch(k)} for m in lines(out / "metrics.jsonl")]

    assert main(arguments(world, tmp_path / "again", "--eval_data", world / "train.jsonl")) == 0
    assert numbers(tmp_path / "again") == numbers(finished)
    assert main(arguments(world, tmp_path / "other", "--seed", 1)) == 0
    assert numbers(tmp_path / "other") != numbers(finished)


def test_eta_zero_measures_on_an_interval(world, tmp_path):
    """η = 0 needs no a_t; it is measured every mass_interval steps all the same (Fig. 5's η = 0 curve)."""
    assert main(arguments(world, tmp_path, "--eta", "0", "--mass_interval", "2")) == 0
    assert [m["audio_mass_max"] is not None for m in lines(tmp_path / "metrics.jsonl")] == [True, True, False, True]


def test_lora(world, tmp_path):
    """LoRA: the reference is the policy with adapters disabled; the checkpoint is merged, the adapter lies beside."""
    assert main(arguments(world, tmp_path, "--lora_rank", "4", "--lora_alpha", "8", "--learning_rate", "0.05")) == 0
    metrics = lines(tmp_path / "metrics.jsonl")
    assert metrics[0]["kl_loss"] == pytest.approx(0, abs=1e-9) and metrics[-1]["kl_loss"] > 0
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    trained = Qwen3OmniMoeThinkerForConditionalGeneration.from_pretrained(tmp_path / "checkpoint").state_dict()
    start = Qwen3OmniMoeThinkerForConditionalGeneration.from_pretrained(world / "model").state_dict()
    assert set(trained) == set(start)
    moved = {name for name in start if not torch.equal(start[name], trained[name])}
    assert moved and all(re.search(r"language_model.*(q|k|v|o)_proj", name) for name in moved)


# ──────────────────────────────────────────────────── what a run refuses ──────────────────────────────────────────────


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
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}))
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
    "empty audio": (lambda t, w: bad(t, w, audio=write_wav(t / "empty.wav", [])), r"bad.jsonl:2: .*empty.wav is empty"),
    "NaN audio": (lambda t, w: bad(t, w, audio=write_wav(t / "nan.wav", [0.1, np.nan] * 800)), r"nan.wav: .*NaN"),
    "answer not a choice": (lambda t, w: bad(t, w, answer="a cat"), "bad.jsonl:2: answer 'a cat' is not among"),
    "one choice": (lambda t, w: bad(t, w, choices=["a dog"]), "bad.jsonl:2: field 'choices'"),
    "duplicate id": (lambda t, w: bad(t, w, id="q0"), "bad.jsonl:2: id 'q0' stands in line 1"),
    "no data": (lambda t, w: ["--data", ""], "data is empty"),
    "no model": (lambda t, w: ["--model", t / "nothing"], "nothing: no config.json"),
    "no audio_token_id": (text_model, "config.json: no audio_token_id"),
    "layers out of range": (lambda t, w: ["--target_layers", "2", "3"], "target_layers: 3 is out of range"),
    "placeholders and features": (two_placeholders, "chat template renders 2 audio placeholders"),
    "group of one": (lambda t, w: ["--group_size", "1"], "group_size is 1"),
    "groups do not divide": (lambda t, w: ["--group_size", "5"],
                             "generation_batch_size 16 is no multiple of group_size 5"),
    "steps do not divide": (lambda t, w: ["--steps_per_generation", "3"], "no multiple of steps_per_generation 3"),
    "unknown flag": (lambda t, w: ["--etta", "1"], "etta"),
    "a word for a number": (lambda t, w: ["--eta", "much"], "eta.*much"),
    "choices that differ by a space": (lambda t, w: bad(t, w, choices=["a dog", "a dog ", "a cat"]),
                                       "holds an option twice"),
    "not UTF-8": (latin, "bad.jsonl:1: not UTF-8"),
    "a placeholder in a question": (lambda t, w: bad(t, w, question="What is <|audio_pad|>?"),
                                    "question q1: its text holds"),
    "a cut flac": (cut_flac, "bad.jsonl:2: .*cut.flac cannot be read"),
    "a tensor of another shape": (lambda t, w: ["--model", edited_model(t, w, text=dict(hidden_size=16))],
                                  "cannot be loaded"),
    "weights missing": (no_weights, "model: cannot be loaded"),
    "output_dir under a file": (lambda t, w: ["--output_dir", w / "train.jsonl" / "out"], "train.jsonl is a file"),
    "output_dir holds the model": (lambda t, w: ["--output_dir", w], "holds the model that this run starts from"),
    "learning rate of inf": (lambda t, w: ["--learning_rate", "inf"], "learning_rate is inf"),
    "negative decay": (lambda t, w: ["--weight_decay", "-1"], "weight_decay is -1.0"),
    "reward weights": (lambda t, w: ["--reward_weights", "1", "nan", "1"], "reward_weights is"),
    "seed": (lambda t, w: ["--seed", "-1"], "seed is -1"),
    "checker down": (lambda t, w: ["--checker", "http://127.0.0.1:9/v1"], "checker: the checker at http://127.0.0.1:9"),
    "no tracker": (lambda t, w: ["--report_to", "wandb"], "report_to is wandb, which is not installed"),
    "no checker": (lambda t, w: ["--checker", ""], "checker is ''"),
}


@pytest.mark.parametrize("make, message", BAD_INPUT.values(), ids=BAD_INPUT)
def test_bad_input(world, tmp_path, capsys, monkeypatch, make, message):
    """One line on stderr that names file, line or field and the mend; exit code 2; nothing written."""
    monkeypatch.setattr("rewards.FIRST_WAIT", 0.01)
    out = tmp_path / "out"
    assert main(arguments(world, out, *make(tmp_path, world))) == 2
    error = capsys.readouterr().err.strip()
    assert "\n" not in error and error.startswith("error: ") and re.search(message, error), error
    assert not out.exists()


@pytest.mark.parametrize("text, message", [("etta: 1\n", "bad.yaml: unknown field 'etta'"),
                                           ("- 1\n", "bad.yaml: a list"),
                                           ("eta: [1\n", "bad.yaml: not valid yaml"),
                                           ("eta:\n", "bad.yaml: field 'eta' has no value")])
def test_bad_recipe(world, tmp_path, capsys, text, message):
    """A recipe with an unknown key, or no mapping, or no yaml."""
    assert main([str(recipe(tmp_path, text)), *arguments(world, tmp_path / "out")]) == 2
    error = capsys.readouterr().err.strip()
    assert "\n" not in error and message in error
    assert not (tmp_path / "out").exists()


def test_missing_tagger_data(world, tmp_path, capsys, monkeypatch):
    """Without NLTK's tagger data a run ends at the door, also before a toy world is built."""
    def missing():
        raise LookupError("no tagger data: pip install it")

    monkeypatch.setattr(train, "load_tagger", missing)
    for more in ((), ("--model", "toy")):
        assert main(arguments(world, tmp_path / "runs" / "out", *more)) == 2
        assert capsys.readouterr().err == "error: no tagger data: pip install it\n"
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("name", ["group of one", "a tensor of another shape"])
def test_exit_code_of_the_command(world, tmp_path, name):
    """The real command line, where libraries may write to stderr as well: one line, exit code 2."""
    make, message = BAD_INPUT[name]
    done = subprocess.run([sys.executable, "train.py", *arguments(world, tmp_path / "out", *make(tmp_path, world))],
                          cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and re.search(message, done.stderr), done.stderr


# ───────────────────────────────────────────────────── fields and recipes ─────────────────────────────────────────────


def test_every_field_has_its_source():
    """--help says of every field where its default comes from."""
    for f in fields(TrainConfig):
        assert re.search(r"\b(paper|release|ours)\b", f.metadata["help"]), f.name


def test_defaults_are_table_5():
    """Table 5 of the paper, and the release's values where it has none (written down here by hand)."""
    table = dict(eta=0.1, tau_base=1.0, kappa=1.0, advantage_eps=0.1, attention_eps=0.1, mask_clip=5.0,
                 prefactor_clip=3.0, target_layers=[43, 44, 45, 46, 47], beta=0.002, clip_ratio=0.2, group_size=8,
                 generation_batch_size=768, steps_per_generation=4, temperature=1.2, top_k=50, top_p=0.99,
                 repetition_penalty=1.0, reward_weights=[2.0, 1.0, 1.0], adam_beta1=0.9, adam_beta2=0.95,
                 weight_decay=0.1, max_grad_norm=1.0, learning_rate=1e-6, warmup_ratio=0.05,
                 max_steps=800, max_new_tokens=1200, fail_threshold=0.0, fail_gate_floor=0.1,
                 mask=True, mask_truncated=False, advantage_floor=0.0)
    assert {name: getattr(TrainConfig(), name) for name in table} == table


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda p: p.stem)
def test_recipes(path):
    """Every recipe is read; the rows of Table 1 differ in what the table says and in nothing else of the method."""
    config = read_config([str(path)])
    expected = {"grpo_lora": (False, 0, 128), "mapo_mask_lora": (True, 0, 128), "mapo_lora": (True, 0.1, 128),
                "grpo_phase1": (False, 0, 0), "mapo_phase1": (True, 0.1, 0), "mapo_phase2": (True, 0.1, 0)}
    if path.stem in expected:
        mask, eta, rank = expected[path.stem]
        assert config == replace(TrainConfig(), mask=mask, eta=eta, lora_rank=rank, data_format=config.data_format,
                                 output_dir=f"runs/{path.stem}", rollout="vllm")


def test_a_resumed_log_keeps_the_steps_that_are_done(tmp_path):
    """Lines of later steps go, and one that was cut off; a text may hold line ends that are not ours."""
    texts = {1: "one\u2028two\x85three", 2: "four"}
    rows = [json.dumps({"step": step, "text": text}, ensure_ascii=False) + "\n" for step, text in texts.items()]
    (tmp_path / "completions.jsonl").write_text(rows[0] + rows[1] + rows[1][:9], encoding="utf-8")
    with train.open_log(train.TrainConfig(output_dir=str(tmp_path)), done=1):
        pass
    assert (tmp_path / "completions.jsonl").read_text(encoding="utf-8") == rows[0]
