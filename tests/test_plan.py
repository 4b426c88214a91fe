"""plan.py on the shapes of real models: numbers worked out by hand, and what fits where."""

import math
import re
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import real_models

import checkpoint
import plan
from config import read_config
from run import set_trainable

ROOT = Path(__file__).resolve().parents[1]
LORA = ("--lora_rank", 128, "--lora_alpha", 512)
H20 = SimpleNamespace(mean_tokens=477, padding=1.12, tflops=148, utilisation=0.35, hbm=4.0,
                      disk=2.0, network=25.0, gpus_per_node=8, serving_gpus=8, step_ms=5.0,
                      checks=100.0)


def folder_of(make):
    @pytest.fixture(scope="module")
    def folder(tmp_path_factory):
        return real_models.write_folder(make(), tmp_path_factory.mktemp("model"))
    return folder


big = folder_of(real_models.omni_config)
omni_3b = folder_of(real_models.omni_3b_config)
audio_7b = folder_of(real_models.audio_7b_config)


def planned(capsys, *arguments, code=0):
    """What plan.py prints: its text, and header → {name: the first number} of each table."""
    assert plan.main(list(map(str, arguments))) == code
    text, tables = capsys.readouterr().out, {}
    for header, body in re.findall(r"^\| (.+?) \|.*\n\|---.*\n((?:\|.*\n)+)", text, re.M):
        rows = re.findall(r"^\| (.+?) \| ([\d.]+) \|", body, re.M)
        tables[header.removesuffix(" (computed)")] = {name: float(value) for name, value in rows}
    return text, tables


@cache
def prepared(folder, *more):
    """→ config, and the policy on the meta device"""
    config = read_config([*map(str, more), "--model", str(folder)])
    return config, set_trainable(checkpoint.load_policy(folder, meta=True), config)


# ──────── memory ────────


def test_plan_of_the_30b(big, capsys, monkeypatch, tmp_path):
    """The paper's 24 GPUs of 96 GB are enough, and 8 of 80 for LoRA; one of 80 is not.

    The lines add up to the sum, and nothing is written.
    """
    monkeypatch.chdir(tmp_path)
    text, tables = planned(capsys, "--model", big, "--gpus", 24, "--gib", 96, "--rollout", "vllm")
    assert "31.72 B parameters" in text and re.search("^fits 96 GiB", text, re.M), text
    table = tables["on each GPU"]
    total = table.pop("sum")
    assert all(size > 0 for size in table.values())
    assert sum(table.values()) == pytest.approx(total, abs=0.06)
    policy = checkpoint.load_policy(big, meta=True)
    # As fully_shard cuts: the first of 24 ranks gets 6 of 128 experts, the last gets 2.
    first = sum(p.chunk(24)[0].numel() for p in policy.parameters())
    assert first > 1.1 * 31.72e9 / 24
    frozen = sum(p.chunk(24)[0].numel() for name, p in policy.named_parameters()
                 if "audio_tower" in name or "visual" in name)
    lines = [table["trained weights, fp32, sharded"], table["frozen weights, sharded"]]
    assert lines == pytest.approx([4 * (first - frozen) / 2**30, 2 * frozen / 2**30], abs=0.01)
    # Embeddings and lm_head, of the policy and of the reference.
    roots = [size for name, size in table.items() if name.startswith("gathered: root")]
    assert roots == pytest.approx([2 * 2 * 152064 * 2048 / 2**30] * 2, abs=0.01)
    text, _ = planned(capsys, "--model", big, "--gpus", 1, "--gib", 80, code=1)
    assert "does not fit 80 GiB" in text
    text, tables = planned(capsys, "--model", big, *LORA, "--gpus", 8, "--gib", 80)
    assert re.search("^fits 80 GiB", text, re.M), text
    assert tables["on each GPU"]["gathered: root unit of the reference, bf16"] == 0
    assert not list(tmp_path.iterdir())


def test_hosts_and_disk_of_the_30b(big):
    """Whole fp32 weights on rank 0 alone; states, pushes and a checkpoint on the disk."""
    config, policy = prepared(big, "--rollout", "vllm", "--offload_reference", "true")
    on_gpu, s = plan.plan(policy, config, 24)
    host, everything, trained = plan.host_memory(s, config), 31.72e9, 30.53e9
    assert host["whole weights while loading, fp32"] == (
        pytest.approx(4 * everything, rel=1e-3), 0)
    rank_0, other = host["most at a time"]
    file, embeddings = 2e9, 96 * 390 * 2048 * 2  # 2.64 GB of a rank are two files
    assert rank_0 == pytest.approx(4 * everything, rel=1e-3)
    assert other == pytest.approx(file + embeddings + 2 * s.shard, rel=1e-3)
    assert on_gpu["reference, bf16, sharded"] == 0
    state = 12 * trained + embeddings  # 366 GB and less than one
    assert list(plan.disk(s, config).values()) == pytest.approx(
        [3 * state, 4 * everything, 2 * everything, 3 * state + 6 * everything], rel=1e-3)


@pytest.mark.parametrize("more", [(), LORA, ("--freeze_audio_tower", "false")],
                         ids=["full", "lora", "audio"])
def test_plan_divides_what_is_sharded(big, more):
    """With twice the GPUs, every sharded line halves and the others stay. Larger micro-batches need
    more activations; a row that is longer than the limit counts in full."""
    config, policy = prepared(big, *more)
    (few, _), (many, _) = (plan.plan(policy, config, gpus) for gpus in (8, 16))
    assert list(few) == list(many) and any("sharded" in name for name in few)
    for name in few:
        assert many[name] == pytest.approx(few[name] / (2 if "sharded" in name else 1)), name
    for larger in ("--micro_batch_tokens", "9000"), ("--max_new_tokens", "8000"):
        longer, _ = plan.plan(policy, read_config(["--model", str(big), *larger]), 8)
        assert longer["activations"] > few["activations"], larger


# ──────── one GPU ────────


def test_a_clip_beyond_the_encoders_window_is_refused(audio_7b, capsys):
    flags = ["--model", audio_7b, "--data", "x", "--audio_seconds", 31]
    planned(capsys, *flags[:-1], 30)
    assert plan.main(list(map(str, flags))) == 2
    assert "--audio_seconds is 31, but this Qwen2-Audio takes at most 30 s" in (
        capsys.readouterr().err)


def test_one_gpu(omni_3b, audio_7b, capsys):
    """LoRA on the 3B model fits 24 GiB, and 48 with vLLM beside it; full fine-tuning fits 80.
    Qwen2-Audio-7B with LoRA fits 48, with vLLM 80; full fine-tuning does not fit."""
    fits = {}
    for name, folder in (("3B", omni_3b), ("7B", audio_7b)):
        for method, flags in (("lora", LORA), ("full", ())):
            config, policy = prepared(folder, *flags, "--micro_batch_tokens", 4096)
            on_gpu, s = plan.plan(policy, config, 1)
            for gib in (24, 48, 80):
                options = SimpleNamespace(**vars(H20), gib=gib, colocated=False)
                trains = plan.print_plan(on_gpu, s, config, options)
                serves = plan.print_colocated(s, config, sum(on_gpu.values()), gib)
                said = capsys.readouterr().out
                assert (f"\nfits {gib} GiB" in said) == trains
                assert ("vLLM does not fit" in said) != serves
                fits[name, method, gib] = trains, serves
    no, alone, both = (False, False), (True, False), (True, True)
    assert fits == {("3B", "lora", 24): alone, ("3B", "lora", 48): both, ("3B", "lora", 80): both,
                    ("3B", "full", 24): no, ("3B", "full", 48): no, ("3B", "full", 80): alone,
                    ("7B", "lora", 24): no, ("7B", "lora", 48): alone, ("7B", "lora", 80): both,
                    ("7B", "full", 24): no, ("7B", "full", 48): no, ("7B", "full", 80): no}


def test_recipe_of_one_gpu(omni_3b):
    """Trainer and vLLM fit 40 GiB together with the recipe's flag, and 48 as well. KV cache by
    hand: 2 key heads of 128 in 36 layers; 16 prompts of 200 + 750 tokens, 128 completions."""
    config, policy = prepared(omni_3b, ROOT / "recipes" / "one_gpu.yaml")
    assert config.target_layers == list(range(policy.num_layers))[-5:]
    on_gpu, s = plan.plan(policy, config, 1)
    need = sum(on_gpu.values())
    used = float(re.search(r"--gpu-memory-utilization ([\d.]+)", config.vllm_flags)[1])
    for gib in (40, 48):
        largest, parts, room = plan.beside_vllm(s, config, need, gib)
        assert need + largest * gib * 2**30 <= gib * 2**30 < need + (largest + .01) * gib * 2**30
        assert used <= largest
        cache = parts["KV cache of a generation batch"]
        assert cache == 2 * 2 * 36 * 2 * 128 * (16 * 950 + 128 * 1200)
        assert sum(parts.values()) <= used * gib * 2**30
    assert parts["weights, bf16"] == pytest.approx(2 * 4.70e9, rel=1e-3)  # adapters are merged


# ──────── seconds ────────


def test_seconds_of_the_30b(big):
    """Every line again by hand, from the sizes of the model's card and an H20's rates."""
    config, policy = prepared(big, "--rollout", "vllm")
    _, s = plan.plan(policy, config, 24)
    # A layer: q and output, k and v, router, 8 experts.
    layer = 2 * 2048 * 4096 + 2 * 2048 * 512 + 2048 * 128 + 8 * 3 * 2048 * 768
    head, expert = 2048 * 152064, 3 * 2048 * 768
    active, every = 48 * layer + head, 48 * (layer + 120 * expert) + head
    flops, tokens = 148e12 * 0.35, 768 * (590 + 477) * 1.12
    text = 768 * (200 + 477) * 1.12
    expected = {
        "push: gather": 2 * 31.72e9 / 25e9, "push: write": 2 * 31.72e9 / 2e9 / 3,
        "push: read": 2 * 31.72e9 / 2e9, "generate: prompts": 2 * active * 96 * 590 / 8 / flops,
        "generate: arithmetic": 2 * active * 768 * 477 / 8 / flops,
        "generate: weights read": 1200 * 2 * every / 8 / 4e12,
        # 4 key heads on 8 GPUs: each GPU reads one.
        "generate: KV cache read": 768 * 477 * (590 + 238.5) * 2 * 2 * 48 * 128 / 4e12,
        "generate: launches": 6.0, "rewards": 7.68,
        "frozen forwards: arithmetic": 2 * active * (2 * tokens + text) / 24 / flops,
        # 9,560 tokens of a step on each GPU: 2 micro-batches, 4 steps.
        "frozen forwards: network": 8 * 3 * 2 * (every + head) / 25e9,
        "updates: arithmetic": 8 * active * tokens / 24 / flops,
        "updates: network": 8 * (2 * 2 + 4) * (every + head) / 25e9}
    rows = plan.seconds(s, config, H20)
    assert {name: value for name, value, _ in rows} == pytest.approx(expected, rel=2e-3)
    assert plan.total_seconds(rows, config) == pytest.approx(
        sum(expected.values()) - expected["frozen forwards: arithmetic"]
        - expected["updates: arithmetic"]  # which the network hides
        - expected["rewards"], rel=2e-3)  # which the frozen forwards hide


def test_what_the_seconds_depend_on(big):
    """One node sends nothing; GRPO has no text-only forward; LoRA needs no gradients of weights;
    asynchronous sampling hides behind training; smaller micro-batches gather more often."""
    def rows_of(*more, gpus=24):
        config, policy = prepared(big, "--rollout", "vllm", *more)
        rows = plan.seconds(plan.plan(policy, config, gpus)[1], config, H20)
        return {name: value for name, value, _ in rows}, plan.total_seconds(rows, config)

    whole, total = rows_of()
    one_node, _ = rows_of(gpus=8)
    assert all(value == 0 for name, value in one_node.items() if "network" in name)
    assert one_node["push: gather"] == 0 and one_node["push: write"] > whole["push: write"]
    grpo, _ = rows_of("--mask", "false", "--eta", 0)
    assert grpo["frozen forwards: network"] == pytest.approx(
        whole["frozen forwards: network"] * 2 / 3)
    lora, _ = rows_of(*LORA)
    assert lora["updates: arithmetic"] == pytest.approx(whole["updates: arithmetic"] * 6 / 8)
    _, ahead = rows_of("--async_rollouts", "true")
    generate = sum(value for name, value in whole.items() if name.startswith("generate"))
    assert total - ahead == pytest.approx(generate) and generate > 10
    small, _ = rows_of("--micro_batch_tokens", 0, "--micro_batch_size", 1)
    assert small["updates: network"] == pytest.approx(whole["updates: network"] * 8 / 2)
    assert math.isfinite(total)
