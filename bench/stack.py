"""A slice of the 30B on one GPU: seconds, TFLOP/s, and the peak memory beside plan.py's.

    python bench/stack.py [--layers 4] [--tokens 4096] [--rounds 5]     # one GPU of 80 GB
    python bench/stack.py --device cpu --layers 2 --tokens 256 --small  # checks the script

The model is the thinker of Qwen3-Omni-30B-A3B with `--layers` decoder layers in place of 48: its
embeddings, lm_head and audio tower are whole, its vision tower has one layer. The weights are
random and are made on the GPU. As in a run on one GPU, the policy is sharded over a mesh of one
(fp32 masters, gathered in bf16), decoder layers are checkpointed, AdamW is fused, the audio tower
is frozen and encodes beforehand, and the reference lies beside the policy. One step is a forward
of the reference, and forward, backward and AdamW of the policy, on two rows of tokens/2 each: a
prompt with 390 tokens of audio, and a completion of at most 1,200 tokens. The second row is
shorter, so its prompt is padded on the left.

    mass on    the audio mass of every layer, with a gradient; off: L_tgt is empty
    experts    transformers' choices: grouped_mm (its default, ours) and eager, a loop over experts.
               batched_mm copies the weights of the experts for each token, so it is left out

TFLOP/s counts the products of the decoder, attention and lm_head, with what is computed again: see
`flops`. Seconds are medians of the rounds, with the GPU synchronised at both ends of each part. The
peak of an arm is that of torch's allocator. The first arm's is compared with plan.py's number:
"allocated" without the plan's margin, "reserved" with it (the CUDA context is still missing).
"""

import argparse
import statistics
import time

import measure
import torch
from transformers import (Qwen3OmniMoeThinkerConfig, Qwen3OmniMoeThinkerForConditionalGeneration,
                          WhisperFeatureExtractor)

import distributed
import toy
from checkpoint import make_policy
from config import TrainConfig
from mapo import audio_attention_mass
from model import Batch
from plan import GIB, plan
from run import make_optimizer, narrow_frozen, set_trainable

AUDIO = 390  # tokens of a clip of 30 s
PEAK_TFLOPS = 989  # of an H100 in bf16, dense


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layers", type=int, default=4, help="decoder layers")
    parser.add_argument("--tokens", type=int, default=4096, help="of both rows, with padding")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="narrow layers, for a CPU")
    flags = parser.parse_args()
    print(f"{measure.machine(torch.get_num_threads())}, {flags.layers} layers, {flags.tokens} "
          f"tokens, medians of {flags.rounds} rounds\n", flush=True)
    backend = "nccl" if flags.device == "cuda" else "gloo"
    device = torch.device("cuda", 0) if flags.device == "cuda" else torch.device("cpu")
    config = TrainConfig(target_layers=list(range(flags.layers)), micro_batch_tokens=flags.tokens,
                         micro_batch_size=0)
    audio = min(AUDIO, flags.tokens // 8)
    with distributed.team_of_one(device, backend) as team:
        policy, reference = models(flags, config, team)
        planned, sizes = plan(policy, config, gpus=1)
        batch = make_batch(policy, flags.tokens, audio, config.max_new_tokens).to(device)
        optimizer, _ = make_optimizer(policy, config)
        rows = []
        for experts, mass in (("grouped_mm", True), ("grouped_mm", False), ("eager", True)):
            for model in (policy, reference):
                model.base.set_experts_implementation(experts)
            layers = tuple(config.target_layers) if mass else ()
            cells, peaks = timings(policy, reference, optimizer, batch, layers, flags, sizes)
            rows.append([experts, "on" if mass else "off", *cells])
            print(" ".join(rows[-1]), flush=True)  # in case that the next arm fails
            if len(rows) == 1 and peaks:
                compare_with_plan(peaks, planned)
    measure.table(["experts", "mass", "reference, s", "forward, s", "backward, s", "AdamW, s",
                   "TFLOP/s of all but AdamW", f"/ {PEAK_TFLOPS}", "allocated, GiB",
                   "reserved, GiB"], rows)


def compare_with_plan(peaks, planned):
    """Prints the peaks, allocated and reserved, and what plan.py computes."""
    whole, margin = sum(planned.values()), planned["margin"]
    print()
    measure.table(["", "peak, GiB", "plan.py, GiB", "peak / plan.py"],
                  [[name, f"{peak / GIB:.2f}", f"{wanted / GIB:.2f}", f"{peak / wanted:.3f}"]
                   for name, peak, wanted in (("allocated", peaks[0], whole - margin),
                                              ("reserved", peaks[1], whole))])
    measure.table(["plan.py", "GiB"],
                  [[name, f"{size / GIB:.2f}"] for name, size in planned.items()])


# ──────── models and tokens ────────


def models(flags, config, team):
    """→ the policy and its reference, sharded over `team`, with random weights."""
    tokenizer = toy.build_tokenizer(toy.toy_texts())
    made = []
    for dtype in (torch.float32, torch.bfloat16):
        with torch.device("meta"):
            network = Qwen3OmniMoeThinkerForConditionalGeneration._from_config(
                thinker_config(flags.layers, flags.small), dtype=dtype)
        policy = make_policy(network, tokenizer, WhisperFeatureExtractor(feature_size=128),
                             saved_dtype=torch.bfloat16)
        if dtype == torch.float32:
            policy = narrow_frozen(set_trainable(policy, config), team)
        else:
            policy.requires_grad_(False)
        distributed.shard(policy, team, team.dtype).to_empty(device=team.device)
        fill_randomly(policy)
        made.append(policy)
    return made


@torch.no_grad()
def fill_randomly(policy):
    """Normal matrices, norms of 1, and the class's own buffers (the frequencies of RoPE)."""
    torch.manual_seed(0)
    for name, tensor in policy.named_parameters():
        if name.endswith(("norm.weight", "layernorm.weight")):
            tensor.to_local().fill_(1)
        else:
            tensor.to_local().normal_(std=0.02)
    for module in policy.base.modules():
        if any(True for _ in module.buffers(recurse=False)):
            policy.base._init_weights(module)


def thinker_config(layers, small):
    """Qwen3-Omni-30B-A3B's thinker with fewer decoder layers and a vision tower of one layer."""
    text = dict(vocab_size=152064, hidden_size=2048, intermediate_size=768, head_dim=128,
                num_attention_heads=32, num_key_value_heads=4, num_experts=128,
                num_experts_per_tok=8, moe_intermediate_size=768, norm_topk_prob=True,
                max_position_embeddings=65536, tie_word_embeddings=False,
                rope_parameters=dict(rope_type="default", rope_theta=1e6, mrope_interleaved=True,
                                     mrope_section=[24, 20, 20]))
    audio = dict(d_model=1280, encoder_layers=32, encoder_attention_heads=20, encoder_ffn_dim=5120,
                 num_mel_bins=128, downsample_hidden_size=480, output_dim=2048, n_window=50,
                 n_window_infer=800)
    if small:
        text |= dict(hidden_size=64, vocab_size=152064, num_attention_heads=4, num_experts=8,
                     num_key_value_heads=2, num_experts_per_tok=2, moe_intermediate_size=32)
        audio |= dict(d_model=64, encoder_layers=1, encoder_attention_heads=4, output_dim=64,
                      encoder_ffn_dim=64, downsample_hidden_size=16)
    return Qwen3OmniMoeThinkerConfig(
        text_config=dict(text, num_hidden_layers=layers), audio_config=audio,
        vision_config=dict(depth=1, deepstack_visual_indexes=[0], hidden_size=64, num_heads=1,
                           intermediate_size=64, out_hidden_size=text["hidden_size"]),
        audio_token_id=151675, image_token_id=151655, video_token_id=151656)


def make_batch(policy, tokens, audio, longest):
    """Two rows of tokens/2; the prompt of the second one is a quarter shorter. → Batch"""
    length = min(longest, tokens // 4)  # T
    prompt = tokens // 2 - length  # P
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, 150_000, (2, tokens // 2), generator=generator)  # [2, P+T]
    mask = torch.ones_like(ids)
    ids[1, :prompt // 4], mask[1, :prompt // 4] = 0, 0
    ids[:, prompt - audio:prompt] = policy.audio_token_id
    hidden = policy.base.config.get_text_config().hidden_size
    embeddings = torch.randn(2 * audio, hidden, generator=generator).mul_(0.02)  # [tokens, D]
    return Batch(ids, mask, mask[:, prompt:].bool(), {"embeddings": embeddings.bfloat16()})


# ──────── one step ────────


def timings(policy, reference, optimizer, batch, layers, flags, sizes):
    """→ cells of the table (seconds of each part, TFLOP/s, peaks), and the peaks in bytes."""
    on_gpu, peaks = flags.device == "cuda", ()
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    rounds = [step(policy, reference, optimizer, batch, layers, on_gpu)
              for _ in range(flags.rounds + 2)][2:]  # the first ones choose kernels and allocate
    parts = [statistics.median(values) for values in zip(*rounds)]
    rate = flops(batch, sizes) / sum(parts[:3]) / 1e12
    if on_gpu:
        peaks = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    return [*(f"{part:.4f}" for part in parts), f"{rate:.1f}", f"{rate / PEAK_TFLOPS:.2f}",
            *([f"{peak / GIB:.2f}" for peak in peaks] or ["", ""])], peaks


def step(policy, reference, optimizer, batch, layers, on_gpu):
    """→ seconds of the reference's forward, of forward, backward and AdamW."""
    seconds, started = [], time.perf_counter()

    def lap():
        nonlocal started
        if on_gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
        started = time.perf_counter()

    optimizer.zero_grad(set_to_none=True)
    with torch.no_grad():
        frozen = reference.eval()(batch, 1.2).logp
    lap()
    now = policy.train()(batch, 1.2, layers)
    loss = (frozen - now.logp).square().mean() - now.logp.mean()
    if layers:
        loss = loss - audio_attention_mass(now.head_mass).mean()
    lap()
    loss.backward()
    lap()
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    norm = torch.nn.utils.clip_grad_norm_(trained, 1.0).full_tensor()
    optimizer.step()
    lap()
    if not torch.isfinite(norm):
        raise FloatingPointError(f"the gradient norm is {norm.item()}")
    return seconds


def flops(batch, sizes):
    """Floating-point operations of the reference's forward, and of forward and backward.

    With A parameters per token outside lm_head: 2A a token forward, 4A backward, and 2A again as
    layers are checkpointed. Attention: q·k and α·v are 2·S²·H·d each, halved by causality, as is
    their backward, which has 5 products in place of 2. lm_head: 2·V·D a token of the completions,
    once for the reference, once forward, three times backward. The mass is not counted.
    """
    rows, length = batch.input_ids.shape
    head = sizes.root_trained // 2  # V·D; the embeddings are the other half of the root unit
    active = sizes.active - head
    decoder = 2 * active * rows * length * (1 + 1 + 2 + 1)
    product = rows * sizes.layers * sizes.heads * sizes.width * length ** 2  # one, causal
    return (decoder + product * (2 + 2 + 5 + 2)
            + 2 * head * batch.completion_mask.sum().item() * (1 + 1 + 3))


if __name__ == "__main__":
    main()
