"""On a GPU: the policy's statistics, its attention, sampling, and runs of train.py.

Skipped without CUDA. A process with one GPU shards like many: fp32 master weights, gathered in bf16
(distributed.join), so `train.main` is called as a user would.
"""

import copy
import shutil

import pytest
import tiny
import torch
import torch.distributed as dist
from transformers import Qwen3OmniMoeForConditionalGeneration

import attention
import checkpoint
import distributed
import train
from data import read_questions
from model import token_statistics
from rollout import Sampling, sample
from tiny import arguments, lines

pytestmark = [pytest.mark.gpu,
              pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
DEVICE = torch.device("cuda", 0)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a tiny model and six questions, as a user would bring it."""
    return tiny.write_world(tmp_path_factory.mktemp("world"), tiny.qwen3_omni(std=0.08))


@pytest.fixture
def team():
    """The Team of a process with one GPU."""
    with distributed.team_of_one(DEVICE, "nccl") as team:
        yield team
    assert not dist.is_initialized()


def a_batch(policy, world):
    """Three prompts of different lengths, padded on the left, with completions of 3, 1, 2 tokens.
    """
    prompts = [policy.encode(q) for q in read_questions(world / "train.jsonl")[:3]]
    return policy.collate(prompts, [[5, 6, 7], [8], [9, 10]])


def statistics_and_gradients(policy, batch):
    """→ log-probs, entropies and masses, and name → gradient, in float64 on the CPU."""
    policy.zero_grad(set_to_none=True)
    now = policy(batch, 1.2, (1, 2))
    (now.logp.sum() + now.head_mass.sum()).backward()
    gradients = {name: p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
                 for name, p in policy.named_parameters() if p.grad is not None}
    return ([x.detach().cpu().double() for x in now],
            {name: g.cpu().double() for name, g in gradients.items()})


def relative(found, wanted):
    """The norm of the difference over the norm of `wanted`."""
    return ((found - wanted).norm() / wanted.norm().clamp(min=1e-12)).item()


# ──────── the forward ────────


@pytest.mark.parametrize("build", [tiny.qwen3_omni, tiny.qwen2_5_omni, tiny.qwen2_audio])
def test_fp32_statistics_and_gradients_are_those_of_the_cpu(build, tmp_path, monkeypatch):
    # Convolutions of fp32 would otherwise round their inputs to TF32 on the GPU.
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    policy = build(std=0.08) if build is tiny.qwen3_omni else build()
    folder = tiny.write_world(tmp_path, policy)
    batch = a_batch(policy, folder)
    wanted, wanted_gradients = statistics_and_gradients(policy, batch)
    found, gradients = statistics_and_gradients(policy.to(DEVICE), batch)
    for name, there, here in zip(("logp", "entropy", "mass"), found, wanted):
        print(f"{build.__name__} fp32: {name} differs by {(there - here).abs().max():.1e}")
        torch.testing.assert_close(there, here, rtol=0, atol=1e-4)
    assert gradients.keys() == wanted_gradients.keys()
    for name, gradient in gradients.items():
        if wanted_gradients[name].norm() > 1e-5:
            assert relative(gradient, wanted_gradients[name]) < 2e-3, name


def test_bf16_statistics_and_gradients_are_those_of_float64(team, world):
    """fp32 master weights, gathered in bf16 on a mesh of one. The same weights, rounded to bf16, in
    float64 on the CPU are the measure, and a bf16 model on the CPU is the yardstick."""
    whole = checkpoint.load_policy(world / "model")
    sharded = distributed.shard(checkpoint.load_policy(world / "model", meta=True), team,
                                team.dtype)
    distributed.fill(sharded, whole, team)
    assert {p.dtype for p in sharded.parameters()} == {torch.float32}
    assert {p.device for p in sharded.parameters()} == {DEVICE}
    batch = a_batch(whole, world)
    whole.bfloat16()
    cpu, cpu_gradients = statistics_and_gradients(whole, batch)
    whole.base.set_experts_implementation("eager")  # the others have no float64
    exact, exact_gradients = statistics_and_gradients(whole.double(), batch)
    found, gradients = statistics_and_gradients(sharded, batch)
    for name, gpu, low, wanted in zip(("logp", "entropy", "mass"), found, cpu, exact):
        error, usual = (gpu - wanted).abs().max().item(), (low - wanted).abs().max().item()
        print(f"bf16: {name}: the GPU's largest error is {error:.1e}, the CPU's {usual:.1e}")
        assert error < 3 * usual + 1e-3
    assert gradients.keys() == exact_gradients.keys()
    for name, wanted in exact_gradients.items():
        if wanted.norm() > 1e-4:
            assert relative(gradients[name], wanted) < 3 * relative(cpu_gradients[name],
                                                                    wanted) + 0.02, name


@pytest.mark.parametrize("fp32_head", [True, False])
def test_token_statistics_against_float64(fp32_head):
    """The 30B's width and vocabulary. With fp32_head the logits leave the product in fp32."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    hidden = torch.randn(64, 2048, device=DEVICE, generator=generator).bfloat16()
    head = torch.nn.Linear(1, 1, bias=False)
    head.weight = torch.nn.Parameter(
        torch.randn(151_936, 2048, device=DEVICE, generator=generator).mul_(3 / 2048 ** 0.5)
        .bfloat16())
    ids = torch.randint(151_936, (64,), device=DEVICE, generator=generator)
    hidden.requires_grad_()
    logp, entropy = token_statistics(hidden, head, ids, 1.2, fp32_head)
    gradients = torch.autograd.grad(logp.sum(), [hidden, head.weight])
    exact_hidden = hidden.detach().double().requires_grad_()
    exact_head = copy.deepcopy(head).double()
    log_probs = (exact_head(exact_hidden) / 1.2).log_softmax(dim=-1)
    exact = log_probs.gather(1, ids[:, None])[:, 0]
    exact_entropy = -(log_probs.exp() * log_probs).sum(dim=-1)
    exact_gradients = torch.autograd.grad(exact.sum(), [exact_hidden, exact_head.weight])
    errors = [(found.double() - wanted).abs().max().item()
              for found, wanted in ((logp, exact), (entropy, exact_entropy))]
    print(f"fp32_head {fp32_head}: errors of log-prob and entropy", *map("{:.1e}".format, errors))
    assert max(errors) < (1e-4 if fp32_head else 0.1)
    assert errors[0] > 1e-3 or fp32_head  # the head that rounds its logits does so
    for found, wanted in zip(gradients, exact_gradients):
        assert relative(found.double(), wanted) < 0.02


# ──────── attention ────────


def attention_case(length, padding):
    """→ q, k, v, an upstream gradient, and which keys are real: row b has padding[b] in front."""
    generator = torch.Generator(DEVICE).manual_seed(length)
    q, k, v, upstream = (torch.randn(len(padding), heads, length, 128, device=DEVICE,
                                     generator=generator).bfloat16() for heads in (8, 2, 2, 8))
    real = torch.arange(length, device=DEVICE) >= torch.tensor(padding, device=DEVICE)[:, None]
    return q, k, v, upstream.transpose(1, 2), real.long()


def eager(q, k, v, mask):
    """softmax(q·kᵀ/√d)·v with key heads repeated → [B, S, H, d]"""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    z = (q @ k.transpose(-1, -2) * 128 ** -0.5).masked_fill(~mask, float("-inf"))
    return (z.softmax(dim=-1) @ v).transpose(1, 2)


class Layer(torch.nn.Module):
    """What transformers' attention function reads from its layer."""

    num_key_value_groups, is_causal, layer_idx = 4, True, 0


@pytest.mark.parametrize("length", [64, 192, 200, 256, 320, 448, 1088, 2048])
def test_left_padded_attention_is_finite_and_exact(length):
    """S % 128 == 64 is where cuDNN's backward makes NaN of padding rows on Hopper."""
    torch.backends.cuda.enable_cudnn_sdp(True)
    tiny.qwen3_omni()  # make_policy turns it off
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    q, k, v, upstream, real = attention_case(length, (length // 3, 0, 1))
    mask = attention.mask_without_empty_rows(3, length, length, attention_mask=real.bool(),
                                             device=DEVICE)
    tensors = [x.requires_grad_() for x in (q, k, v)]
    output, _ = attention.attention_with_mass(Layer(), q, k, v, mask, scaling=128 ** -0.5,
                                              dropout=0.0)
    found = [output, *torch.autograd.grad(output, tensors, upstream)]
    exact = [x.detach().double().requires_grad_() for x in tensors]
    wanted = eager(*exact, mask)
    wanted = [wanted, *torch.autograd.grad(wanted, exact, upstream.double())]
    for name, here, there in zip(("output", "∂q", "∂k", "∂v"), found, wanted):
        assert here.isfinite().all(), name
        assert relative(here.double(), there) < 0.01, name


# ──────── sampling ────────


def test_sampling_scores_its_own_tokens(team, world):
    """The sampler's log-probs are those of a forward on the same tokens, to bf16's precision, and
    the same seed samples the same completions."""
    whole = checkpoint.load_policy(world / "model")
    policy = distributed.shard(checkpoint.load_policy(world / "model", meta=True), team, team.dtype)
    distributed.fill(policy, whole, team)
    prompts = [policy.encode(q) for q in read_questions(world / "train.jsonl")[:3]]
    sampling = Sampling(temperature=1.2, max_new_tokens=24)
    completions = sample(policy, prompts, 4, sampling, seed=3)
    assert completions == sample(policy, prompts, 4, sampling, seed=3)
    repeated = [p for p in prompts for _ in range(4)]
    batch = policy.collate(repeated, [c.token_ids for c in completions])
    with torch.no_grad():
        logp = policy.eval()(batch, 1.2).logp.cpu()[batch.completion_mask]
    gap = (logp - torch.tensor([x for c in completions for x in c.logps])).abs()
    print(f"sampler and forward differ by {gap.mean():.1e} nats, at most {gap.max():.1e}")
    assert gap.mean() < 0.02 and gap.max() < 0.3


# ──────── a run ────────


@pytest.fixture(scope="module")
def some_reward():
    """Makes the accuracy reward a function of the text alone: a random model never answers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "accuracy_reward", lambda text, *_: float(len(text) % 2))
        yield


def weights_of(folder):
    thinker = checkpoint.load_policy(folder)
    return {name: p.detach() for name, p in thinker.named_parameters()}


FLAGS = [("--gradient_checkpointing", "true"),  # the 30B's choice
         ("--freeze_audio_tower", "false"),
         ("--offload_reference", "true"),
         ("--lora_rank", "4", "--lora_alpha", "8")]


@pytest.mark.parametrize("flags", [(), *FLAGS], ids=lambda flags: " ".join(flags) or "defaults")
def test_a_run_is_finite_and_its_export_is_readable(world, tmp_path, some_reward, flags):
    out = tmp_path / "run"
    assert train.main(arguments(world, out, *flags)) == 0
    steps = lines(out / "metrics.jsonl")
    assert len(steps) == 4
    for step in steps:
        for name in ("loss", "grad_norm", "audio_mass_max", "policy_entropy", "delta_h_abs"):
            assert torch.isfinite(torch.tensor(step[name])), (step["step"], name)
        assert step["sampler_gap"] < 0.05
    print("first step: clip_fraction", steps[0]["clip_fraction"], "grad_norm",
          [round(step["grad_norm"], 4) for step in steps])
    read, info = Qwen3OmniMoeForConditionalGeneration.from_pretrained(
        out / "checkpoint", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    before, after = weights_of(world / "model"), weights_of(out / "checkpoint")
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert all(x.isfinite().all() for x in after.values())


def test_a_resumed_run_ends_as_the_whole_run(world, tmp_path, some_reward, monkeypatch):
    """The state of step 3, in the middle of a generation batch, holds the fp32 masters, AdamW's
    moments and the batch, so the last step is the same up to the order of sums."""
    flags = ("--save_every", "3")
    after_step, whole, parts = train.after_step, tmp_path / "whole", tmp_path / "parts"

    def copy_state(step, batch, run):
        stop = after_step(step, batch, run)
        if step == 3:
            shutil.copytree(whole / "state", parts / "state")
        return stop

    with monkeypatch.context() as patch:
        patch.setattr(train, "after_step", copy_state)
        assert train.main(arguments(world, whole, *flags)) == 0
    assert train.main(arguments(world, parts, *flags, "--resume", "true")) == 0
    unbroken, resumed = lines(whole / "metrics.jsonl")[-1], lines(parts / "metrics.jsonl")[-1]
    print("loss and gradient norm of the last step:",
          *((step["loss"], step["grad_norm"]) for step in (unbroken, resumed)))
    assert resumed["grad_norm"] == pytest.approx(unbroken["grad_norm"], rel=1e-3)
    start, end, again = (torch.cat([p.flatten() for p in weights_of(folder).values()])
                         for folder in (world / "model", whole / "checkpoint",
                                        parts / "checkpoint"))
    print(f"the weights differ by {relative(again - start, end - start):.1e} of their change")
    assert relative(again - start, end - start) < 0.01
