"""examples/verl_mapo.py in the real verl: against verl's own losses and against mapo_loss."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch

from mapo import MapoConfig, differential_entropy, mapo_loss, token_entropy, token_logp

pytestmark = pytest.mark.bench
REASON = "verl is missing; `make test-examples` runs this in the environment of the benchmarks"
pytest.importorskip("verl", reason=REASON)

from tensordict import TensorDict  # noqa: E402 (after the check that verl is there)
from verl.trainer.ppo import core_algos  # noqa: E402
from verl.workers.config import ActorConfig, PolicyLossConfig  # noqa: E402
from verl.workers.utils.losses import ppo_loss  # noqa: E402

from verl_mapo import add_relevance_mask  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
LENGTHS = torch.tensor([9, 4, 1, 0, 9, 6])  # of the completions; 0 is one that verl left out
BETA = 0.04


def actor(loss_mode="mapo", **changed):
    return ActorConfig(**{
        "strategy": "fsdp", "rollout_n": 3, "ppo_micro_batch_size_per_gpu": 6,
        "loss_agg_mode": "seq-mean-token-mean", "use_kl_loss": True, "kl_loss_coef": BETA,
        "policy_loss": PolicyLossConfig(loss_mode=loss_mode), **changed})


def tensors(dtype=torch.float64, seed=0):
    """A batch as verl's trainer has it, [B, T]; junk off the mask."""
    generator = torch.Generator().manual_seed(seed)

    def random(scale):
        return scale * torch.randn(6, 9, generator=generator, dtype=dtype)

    mask = torch.arange(9) < LENGTHS[:, None]
    old = -random(1).abs() - 0.5
    advantages = torch.tensor([-1.3, 0.4, 0.9, 0.7, -1.1, 0.4], dtype=dtype)
    return {"response_mask": mask, "old_log_probs": old, "ref_log_prob": old + random(0.3),
            "advantages": (advantages[:, None] * mask), "log_probs": old + random(0.3),
            "entropys": random(1).abs(), "text_ref_entropys": random(2).abs()}


def call(loss_mode, batch, rows=slice(None), **info):
    """A loss of verl's registry, as verl calls it → (loss, gradient of log_probs)."""
    config = actor(loss_mode)
    config.global_batch_info.update(info)
    logp = batch["log_probs"][rows].clone().requires_grad_()
    omega = batch.get("rollout_is_weights")
    loss, metrics = core_algos.get_policy_loss_fn(loss_mode)(
        old_log_prob=batch["old_log_probs"][rows], log_prob=logp,
        advantages=batch["advantages"][rows], response_mask=batch["response_mask"][rows],
        loss_agg_mode=config.loss_agg_mode, config=config,
        rollout_is_weights=None if omega is None else omega[rows])
    assert all(isinstance(value, float) for value in metrics.values())
    loss.backward()
    return loss.item(), logp.grad


def by_hand(batch, config, omega_only=False):
    """mapo_loss on the same tensors → (parts, gradient of log_probs)."""
    logp = batch["log_probs"].clone().requires_grad_()
    parts = mapo_loss(
        logp=logp, old_logp=batch["old_log_probs"], ref_logp=batch["ref_log_prob"],
        advantages=torch.tensor([-1.3, 0.4, 0.9, 0.7, -1.1, 0.4], dtype=logp.dtype),
        mask=batch["response_mask"], config=config,
        delta_h=differential_entropy(batch["text_ref_entropys"], batch["entropys"]))
    parts["policy_loss" if omega_only else "loss"].backward()
    return parts, logp.grad


# ──────── one call ────────


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_the_mask_it_is_verls_grpo(dtype, record_property):
    batch = tensors(dtype)
    loss, grad = call("vanilla", batch)
    add_relevance_mask(batch, MapoConfig(mask=False, eta=0))
    ours, our_grad = call("mapo", batch)
    record_property("loss", abs(ours - loss))
    record_property("gradient", (our_grad - grad).abs().max().item())
    tolerance = 1e-7 if dtype == torch.float32 else 1e-8  # verl divides by T + 1e-8
    assert loss != 0 and abs(ours - loss) < tolerance
    assert (our_grad - grad).abs().max() < tolerance


def test_the_mask_gives_the_policy_loss_of_mapo(record_property):
    batch, config = tensors(), MapoConfig(eta=0, tau_base=0.2)  # a small τ: far from uniform
    parts, grad = by_hand(batch, config, omega_only=True)
    grpo, _ = by_hand(batch, MapoConfig(mask=False, eta=0))
    add_relevance_mask(batch, config)
    loss, our_grad = call("mapo", batch)
    record_property("loss", abs(loss - parts["policy_loss"].item()))
    record_property("gradient", (our_grad - grad).abs().max().item())
    assert abs(loss - parts["policy_loss"].item()) < 1e-8
    assert (our_grad - grad).abs().max() < 1e-8
    assert batch["rollout_is_weights"].max() > 1.5
    assert abs(loss - grpo["policy_loss"].item()) > 1e-2


def test_what_is_off_the_mask_does_not_matter():
    batch = tensors()
    add_relevance_mask(batch, MapoConfig(eta=0))
    loss, grad = call("mapo", batch)
    off = ~batch["response_mask"]
    for name in ("log_probs", "old_log_probs", "advantages", "rollout_is_weights"):
        batch[name] = batch[name].masked_fill(off, float("nan"))
    again, again_grad = call("mapo", batch)
    assert again == loss and torch.equal(again_grad, grad)
    assert (grad[off] == 0).all()


def test_micro_batches_of_a_global_batch_add_up():
    """Unequal micro-batches; and two processes, whose gradients verl averages."""
    batch = tensors()
    parts, grad = by_hand(batch, MapoConfig(eta=0), omega_only=True)
    add_relevance_mask(batch, MapoConfig(eta=0))
    # verl divides by all six completions, mapo_loss by the five that count.
    whole, whole_grad = parts["policy_loss"].item() * 5 / 6, grad * 5 / 6
    for splits, processes in (((2, 4), 1), ((1, 2, 3), 1), ((6,), 1), ((4, 2), 2)):
        ends = torch.tensor(splits).cumsum(0).tolist()
        results = [call("mapo", batch, slice(end - size, end), global_batch_size=6,
                        dp_size=processes, batch_num_tokens=int(LENGTHS.sum()))
                   for size, end in zip(splits, ends)]
        losses, grads = zip(*results)
        assert abs(sum(losses) / processes - whole) < 1e-8
        assert (torch.cat(grads) / processes - whole_grad).abs().max() < 1e-8


# ──────── verl's loss of the actor ────────


def ppo(batch, logp, config, rows=slice(None)):
    """verl's ppo_loss, which calls the registry and adds the KL term → (loss, metrics).

    Prompts of one token. verl gets one row of log-probs per sequence, without padding; entry t is
    that of the next token.
    """
    def nested(x):
        return torch.nested.as_nested_tensor(list(x), layout=torch.jagged)

    lengths = [max(1, n) for n in LENGTHS[rows].tolist()]  # verl needs a token in every response
    data = {name: nested(row[:n] for row, n in zip(x[rows], lengths)) for name, x in batch.items()
            if name in ("response_mask", "old_log_probs", "advantages", "ref_log_prob",
                        "rollout_is_weights")}
    data["responses"] = nested(torch.zeros(n, dtype=torch.long) for n in lengths)
    data["prompts"] = nested(torch.zeros(1, dtype=torch.long) for _ in lengths)
    data = TensorDict(data, batch_size=len(lengths))
    for name, value in {"dp_size": 1, "batch_num_tokens": int(LENGTHS.sum()),
                        "global_batch_size": 6}.items():
        data.set_non_tensor(name, value)
    values = torch.cat([torch.nn.functional.pad(row[:n], (0, 1))
                        for row, n in zip(logp[rows], lengths)])
    offsets = torch.tensor([0, *[n + 1 for n in lengths]]).cumsum(0)
    return ppo_loss(config, {"log_probs": torch.nested.nested_tensor_from_jagged(values, offsets)},
                    data)


def test_verls_actor_loss_is_mapo_with_kl(record_property):
    batch, config = tensors(), MapoConfig(eta=0, beta=BETA)
    parts, grad = by_hand(batch, config)
    add_relevance_mask(batch, config)
    logp = batch["log_probs"].clone().requires_grad_()
    losses = [ppo(batch, logp, actor(), rows)[0] for rows in (slice(0, 2), slice(2, 6))]
    sum(losses).backward()
    record_property("loss", abs(sum(losses).item() - parts["loss"].item() * 5 / 6))
    record_property("gradient", (logp.grad - grad * 5 / 6).abs().max().item())
    assert abs(sum(losses).item() - parts["loss"].item() * 5 / 6) < 1e-8
    assert (logp.grad - grad * 5 / 6).abs().max() < 1e-8


def test_a_few_steps_train():
    """A language model on a fixed batch: completions with Â > 0 become likelier, others less."""
    model, batch = tiny.qwen3(tiny.build_tokenizer()), tensors(torch.float32)
    ids = torch.randint(0, 300, (6, 10), generator=torch.Generator().manual_seed(2))

    def forward():
        logits = model(ids).logits[:, :-1]
        return token_logp(logits, ids[:, 1:]), token_entropy(logits).detach()

    with torch.no_grad():
        batch["old_log_probs"], batch["entropys"] = forward()
    batch["ref_log_prob"] = batch["old_log_probs"]
    batch["text_ref_entropys"] = batch["entropys"] + batch["text_ref_entropys"]
    add_relevance_mask(batch, MapoConfig(eta=0, beta=BETA))
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=3e-4), []
    for _ in range(5):
        optimizer.zero_grad()
        parts = [ppo(batch, forward()[0], actor(), rows) for rows in (slice(0, 4), slice(4, 6))]
        loss = sum(part for part, _ in parts)
        loss.backward()
        assert parts[0][1]["actor/omega_max"].aggregate() > 1.2
        optimizer.step()
        losses.append(loss.item())
    assert torch.tensor(losses).isfinite().all() and losses[-1] < losses[0] - 0.05
    mask, change = batch["response_mask"], forward()[0].detach() - batch["old_log_probs"]
    mean = (change * mask).sum(1) / mask.sum(1).clamp(min=1)
    advantage = batch["advantages"].sum(1)
    assert (mean[advantage > 0] > 0).all() and (mean[advantage < 0] < 0).all()


# ──────── errors, and how verl finds the file ────────


def test_errors():
    batch = tensors()
    with pytest.raises(ValueError, match="no rollout_is_weights: call add_relevance_mask"):
        call("mapo", batch)
    with pytest.raises(ValueError, match="the batch lacks text_ref_entropys"):
        add_relevance_mask({k: v for k, v in batch.items() if k != "text_ref_entropys"},
                           MapoConfig())
    add_relevance_mask(batch, MapoConfig())
    with pytest.raises(ValueError, match="turn off algorithm.rollout_correction"):
        add_relevance_mask(batch, MapoConfig())
    logp = batch["log_probs"]
    with pytest.raises(ValueError, match="actor.loss_agg_mode is token-mean"):
        ppo(batch, logp, actor(loss_agg_mode="token-mean"))
    with pytest.raises(ValueError, match="one ϵ, set all three"):
        ppo(batch, logp, actor(clip_ratio_high=0.28))


def test_verl_imports_the_file_by_name():
    """As the docstring says: VERL_USE_EXTERNAL_MODULES."""
    code = ("import verl; from verl.trainer.ppo.core_algos import get_policy_loss_fn as get; "
            "print(get('mapo').__module__)")
    run = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=300,
        env={**os.environ, "VERL_USE_EXTERNAL_MODULES": "verl_mapo",
             "PYTHONPATH": f"{ROOT}:{ROOT / 'examples'}"})
    assert run.stdout.split() == ["verl_mapo"]
