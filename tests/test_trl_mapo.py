"""examples/trl_mapo.py in the real TRL: its loss against TRL's own and against mapo_loss by hand.

By hand means: transformers' eager attention, one completion at a time, without padding.
"""

import os
from dataclasses import replace

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM, Qwen2AudioForConditionalGeneration

from checkpoint import save_policy
from data import conversation
from mapo import (MapoConfig, audio_attention_mass, differential_entropy, head_audio_mass,
                  mapo_loss, token_entropy, token_logp)
from pos_gate import pos_gate

pytestmark = pytest.mark.bench
os.environ["HF_HUB_OFFLINE"] = "1"
REASON = "TRL is missing; `make test-examples` runs this in the environment of the benchmarks"
trl = pytest.importorskip("trl", reason=REASON)
datasets = pytest.importorskip("datasets", reason=REASON)

from trl_mapo import MapoTrainer  # noqa: E402 (after the check that TRL is there)

LAYERS, TEMPERATURE, BETA = (1, 2), 1.2, 0.04
LENGTHS = [12, 7, 3, 0, 12, 1, 9, 5]  # of the completions; 0 is one that TRL emptied


# ──────── the trainers ────────


def accuracy(completion_ids, **_):
    return [float(sum(ids) % 2) for ids in completion_ids]


def first_token(completion_ids, **_):
    return [ids[0] / 300 for ids in completion_ids]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A language model without audio: its folder, tokenizer and rows."""
    folder, tokenizer = tmp_path_factory.mktemp("text"), tiny.build_tokenizer()
    tiny.qwen3(tokenizer).save_pretrained(folder)
    question = "Which sound comes first?"
    rows = [{"prompt": f"I hear {heard}. {question}", "text_prompt": question}
            for heard in ("a bell", "a dog barks twice")]
    return {"folder": folder, "processing_class": tokenizer, "rows": rows}


@pytest.fixture(scope="module")
def audio(tmp_path_factory):
    """A Qwen2-Audio: its folder, tokenizer, feature extractor, rows, and encoded prompts."""
    folder, policy = tmp_path_factory.mktemp("audio"), tiny.qwen2_audio()
    save_policy(policy, folder)
    questions = tiny.questions(folder, seconds=((0.7,), (1.3,)))
    prompts = [policy.encode(question) for question in questions]
    rows = [{"prompt": conversation(question), "audio": str(question.audio[0]),
             "text_prompt": conversation(question, with_audio=False)} for question in questions]
    return {"folder": folder, "processing_class": policy.tokenizer, "rows": rows,
            "feature_extractor": policy.feature_extractor, "prompts": prompts}


def settings(folder, **changed):
    return trl.GRPOConfig(**{
        "output_dir": str(folder / "out"), "use_cpu": True, "bf16": False, "report_to": "none",
        "save_strategy": "no", "disable_tqdm": True, "logging_steps": 1, "max_steps": 4,
        "per_device_train_batch_size": 4, "per_device_eval_batch_size": 4, "num_generations": 4,
        "gradient_accumulation_steps": 2, "max_completion_length": max(LENGTHS),
        "temperature": TEMPERATURE, "top_k": 0, "beta": BETA, "loss_type": "grpo",
        "use_bias_correction_kl": False, "learning_rate": 1e-3,
        "generation_kwargs": {"min_new_tokens": max(LENGTHS)}, **changed})


def make(world, mapo, cls=MapoTrainer, args=None, **changed):
    more = {"mapo": mapo, "target_layers": LAYERS} if cls is MapoTrainer else {}
    if "feature_extractor" in world:
        more["feature_extractor"] = world["feature_extractor"]
    rows = datasets.Dataset.from_list(world["rows"])
    return cls(str(world["folder"]), [accuracy, first_token],
               settings(world["folder"], **(args or {})),
               **{"train_dataset": rows, "processing_class": world["processing_class"], **more,
                  **changed})


def generation_batch(trainer, world):
    """Eight completions of two prompts as TRL makes them, then unequal lengths and π_old ≠ π_θ."""
    torch.manual_seed(1)
    trainer.current_gradient_accumulation_steps = 1
    inputs = trainer._generate_and_score_completions(
        [row for row in datasets.Dataset.from_list(world["rows"]) for _ in range(4)])
    length = inputs["completion_ids"].shape[1]
    assert inputs["completion_mask"].all() and length == max(LENGTHS)
    inputs["completion_mask"] *= torch.arange(length) < torch.tensor(LENGTHS)[:, None]
    inputs["old_per_token_logps"] = inputs["ref_per_token_logps"] + 0.3 * torch.randn(8, length)
    # π_θ = π_ref before the first update, where k3 has no gradient.
    inputs["ref_per_token_logps"] += 0.3 * torch.randn(8, length)
    return inputs


def loss_and_gradient(trainer, inputs):
    trainer.model.zero_grad()
    loss = trainer._compute_loss(trainer.model, inputs)
    loss.backward()
    return loss.item(), {name: p.grad for name, p in trainer.model.named_parameters()
                         if p.grad is not None}


def largest_difference(one, other):
    """Of two gradients, relative to the largest entry."""
    assert one.keys() == other.keys()
    scale = max(grad.abs().max() for grad in other.values())
    return max(((one[name] - other[name]).abs().max() / scale).item() for name in one)


# ──────── GRPO: TRL's own loss ────────


@pytest.mark.parametrize("case", ["train", "eval", "tools"])
def test_without_mask_and_attention_loss_it_is_trls_grpo(text, case, record_property):
    trainer = make(text, {"mask": False, "eta": 0})
    own = make(text, None, trl.GRPOTrainer)
    inputs = generation_batch(trainer, text)
    for each in (trainer, own):
        each.model.train(case != "eval")
        each.current_gradient_accumulation_steps = 3  # counts in train mode only
    if case == "tools":  # tokens of a tool's answer, inside the completion
        inputs["tool_mask"] = torch.ones_like(inputs["completion_mask"])
        inputs["tool_mask"][:, 1:3] = 0
    (loss, grad), (own_loss, own_grad) = (loss_and_gradient(x, inputs) for x in (trainer, own))
    record_property("loss", abs(loss - own_loss))
    record_property("gradient", largest_difference(grad, own_grad))
    assert own_loss != 0 and abs(loss - own_loss) < 2e-7
    assert largest_difference(grad, own_grad) < 1e-5


# ──────── MAPO: mapo_loss by hand ────────


def by_hand(world, inputs, config):
    """mapo_loss with eager attention, a completion at a time → (loss, gradient, omega)."""
    audible = "prompts" in world
    cls = Qwen2AudioForConditionalGeneration if audible else AutoModelForCausalLM
    model = cls.from_pretrained(world["folder"], attn_implementation="eager").eval()
    tokenizer, total = world["processing_class"], max(LENGTHS)
    columns = {name: [] for name in ("logp", "entropy", "text", "mass", "gate")}
    for row, length in enumerate(LENGTHS):
        y = inputs["completion_ids"][row, :length]
        if audible:
            prompt = world["prompts"][row // 4]
            ids, text_ids = prompt.ids, prompt.text_ids
            heard = {"input_features": prompt.features[0][None],
                     "feature_attention_mask": torch.arange(3000)[None] < prompt.frames[0]}
        else:
            ids = tokenizer(world["rows"][row // 4]["prompt"])["input_ids"]
            text_ids, heard = tokenizer(world["rows"][row // 4]["text_prompt"])["input_ids"], {}
        ids = torch.tensor([*ids, *y])[None]
        text_ids = torch.tensor([*text_ids, *y])[None]
        first = ids.shape[1] - length - 1  # predicts y_1
        output = model(ids, **heard, output_attentions=True)
        logits = output.logits[:, first:-1] / TEMPERATURE
        with torch.no_grad():
            text_logits = model(text_ids).logits[:, -length - 1:-1] / TEMPERATURE
        # TRL's completion is the whole one; the tests cut it afterwards.
        gate = pos_gate(inputs["completion_ids"][row].tolist(), tokenizer)[:length]
        values = {"logp": token_logp(logits, y[None]), "entropy": token_entropy(logits),
                  "text": token_entropy(text_logits), "mass": torch.zeros(1, length),
                  "gate": torch.tensor(gate)[None]}
        if audible:
            is_audio = ids == model.config.audio_token_id
            values["mass"] = audio_attention_mass(torch.stack(
                [head_audio_mass(output.attentions[layer][:, :, first:-1], is_audio)
                 for layer in LAYERS]))
        for name, value in values.items():
            columns[name].append(torch.nn.functional.pad(value, (0, total - length)))
    columns = {name: torch.cat(rows) for name, rows in columns.items()}  # [B, T]
    delta_h = differential_entropy(columns["text"], columns["entropy"])
    right = torch.tensor(accuracy(inputs["completion_ids"].tolist()))  # of the whole completions
    parts = mapo_loss(
        logp=columns["logp"], old_logp=inputs["old_per_token_logps"],
        ref_logp=inputs["ref_per_token_logps"], advantages=inputs["advantages"],
        mask=torch.arange(total) < torch.tensor(LENGTHS)[:, None], delta_h=delta_h,
        audio_mass=columns["mass"], pos_gate=columns["gate"], accuracy_reward=right, config=config)
    counted = sum(n > 0 for n in LENGTHS)
    (parts["loss"] * counted / len(LENGTHS)).backward()  # TRL's mean is over all rows
    return ((parts["loss"] * counted / len(LENGTHS)).item(),
            {name: p.grad for name, p in model.named_parameters() if p.grad is not None},
            parts["omega"])


def test_the_mask(text, record_property):
    trainer = make(text, {"eta": 0, "tau_base": 0.2})  # a small τ: far from uniform weights
    inputs = generation_batch(trainer, text)
    loss, grad = loss_and_gradient(trainer, inputs)
    config = MapoConfig(eta=0, tau_base=0.2, beta=BETA)
    hand, hand_grad, omega = by_hand(text, inputs, config)
    record_property("loss", abs(loss - hand))
    record_property("gradient", largest_difference(grad, hand_grad))
    assert omega.max() > 1.5
    assert abs(loss - hand) < 1e-6 and largest_difference(grad, hand_grad) < 1e-5
    grpo, _, _ = by_hand(text, inputs, replace(config, mask=False))
    assert abs(loss - grpo) > 1e-3  # the mask is visible in the loss


def test_the_attention_loss(audio, record_property):
    trainer = make(audio, {"eta": 0.5, "tau_base": 0.2})
    inputs = generation_batch(trainer, audio)
    loss, grad = loss_and_gradient(trainer, inputs)
    hand, hand_grad, omega = by_hand(audio, inputs,
                                     MapoConfig(eta=0.5, tau_base=0.2, beta=BETA))
    record_property("loss", abs(loss - hand))
    record_property("gradient", largest_difference(grad, hand_grad))
    assert omega.max() > 1.5
    assert abs(loss - hand) < 2e-6 and largest_difference(grad, hand_grad) < 5e-5
    trainer.mapo = replace(trainer.mapo, eta=0)
    without, without_grad = loss_and_gradient(trainer, inputs)
    assert loss - without > 1e-2
    for layer in LAYERS:
        name = f"model.language_model.layers.{layer}.self_attn.q_proj.weight"
        assert (grad[name] - without_grad[name]).abs().max() > 1e-3


def test_micro_batches_of_a_step_add_up(audio):
    trainer = make(audio, {"eta": 0.5})
    inputs = generation_batch(trainer, audio)
    whole, whole_grad = loss_and_gradient(trainer, inputs)
    trainer.current_gradient_accumulation_steps = 2
    trainer.model.train()
    trainer.model.zero_grad()
    losses = []
    for rows in (slice(0, 4), slice(4, 8)):
        loss = trainer._compute_loss(trainer.model, {
            name: x[rows] if x.dim() else x for name, x in inputs.items()})
        loss.backward()
        losses.append(loss.item())
    grad = {n: p.grad for n, p in trainer.model.named_parameters() if p.grad is not None}
    assert abs(sum(losses) - whole) < 1e-6 and largest_difference(grad, whole_grad) < 1e-5


def test_placeholders_are_not_sampled(audio):
    trainer = make(audio, {"eta": 0})
    head, placeholder = trainer.model.lm_head.weight, trainer.audio_token_id
    with torch.no_grad():  # about every second token would be one
        head[placeholder] = 50 * head[placeholder + 5]
    assert not (generation_batch(trainer, audio)["completion_ids"] == placeholder).any()


# ──────── training ────────


def test_training_with_audio(audio):
    """Two optimizer steps per generation batch, each of two micro-batches, with checkpointing."""
    rows = datasets.Dataset.from_list(audio["rows"])
    trainer = make({**audio, "rows": 2 * audio["rows"]}, {"eta": 0.5}, eval_dataset=rows,
                   args={"steps_per_generation": 4, "gradient_checkpointing": True,
                         "generation_kwargs": None})
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    frozen = {name: p.detach().clone() for name, p in trainer.ref_model.named_parameters()}
    losses, compute = [], trainer._compute_loss

    def recorded(model, inputs):
        loss = compute(model, inputs)
        if model.training:
            assert inputs["completion_ids"].shape[0] == 4
            assert "old_per_token_logps" in inputs  # the second step is off-policy
        losses.append(loss.item())
        return loss

    trainer._compute_loss = recorded
    trainer.train()
    held_out = trainer.evaluate()
    logged = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
    assert len(logged) == 4 and torch.tensor(losses).isfinite().all()
    assert len(losses) == 4 * 2 + 2  # micro-batches, then two batches of held-out completions
    for entry in logged:
        assert entry["omega_max"] > 1.1 and entry["attention_loss"] > 0
        assert 0 < entry["grad_norm"] < float("inf")
    assert torch.tensor(held_out["eval_loss"]).isfinite() and held_out["eval_omega_max"] > 1.1
    for name in (f"model.language_model.layers.{layer}.self_attn.q_proj.weight"
                 for layer in LAYERS):
        assert not torch.equal(before[name], trainer.model.get_parameter(name))
    for name, parameter in trainer.ref_model.named_parameters():
        assert torch.equal(frozen[name], parameter)


def test_training_without_audio(text):
    trainer = make(text, {"eta": 0}, args={"max_steps": 3, "generation_kwargs": None})
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
    assert len(logged) == 3 and all(entry["omega_max"] > 1.1 for entry in logged)
    assert all(0 < entry["grad_norm"] < float("inf") for entry in logged)


# ──────── errors ────────


WRONG = {
    "loss_type": ({"args": {"loss_type": "dapo"}}, r"needs GRPOConfig\(loss_type='grpo'"),
    "k3 times ρ": ({"args": {"use_bias_correction_kl": True}}, "use_bias_correction_kl=False"),
    "no reference": ({"args": {"beta": 0.0}}, "needs TRL's reference model.*set beta above 0"),
    "no audio": ({"mapo": {"eta": 0.1}}, "eta is 0.1, and Qwen3ForCausalLM has no audio_token_id"),
    "column": ({"train_dataset": [{"prompt": "x"}]}, "train_dataset lacks the column text_prompt"),
    "eval column": ({"eval_dataset": [{"prompt": "x"}]}, "eval_dataset lacks the column text_pr"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_settings(text, name):
    changed, message = WRONG[name]
    changed = {key: datasets.Dataset.from_list(value) if key.endswith("dataset") else value
               for key, value in changed.items()}
    with pytest.raises(ValueError, match=message):
        make(text, **{"mapo": {"eta": 0}, **changed})


def test_settings_that_trl_already_has(text):
    with pytest.raises(TypeError, match="beta"):
        make(text, {"eta": 0, "beta": 0.1})


def test_audio_needs_clips_and_layers(audio):
    with pytest.raises(ValueError, match="target_layers is .2, 3.: .* has the layers 0 to 2"):
        make(audio, {}, target_layers=(2, 3))
    with pytest.raises(ValueError, match="feature_extractor is missing"):
        make(audio, {}, feature_extractor=None)
    world = {**audio, "rows": [{k: v for k, v in r.items() if k != "audio"}
                               for r in audio["rows"]]}
    with pytest.raises(ValueError, match="train_dataset lacks the column audio"):
        make(world, {})
    world = {**audio, "rows": [{**r, "prompt": r["text_prompt"]} for r in audio["rows"]]}
    trainer = make(world, {})
    with pytest.raises(ValueError, match="renders 0 audio placeholders .* it must be one"):
        trainer.train()
