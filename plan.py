"""What a run needs, before anything is loaded: memory of GPUs and hosts, disk, seconds.

    python plan.py recipes/mapo_phase1.yaml --model FOLDER --gpus 24 --gib 96
    python plan.py recipes/one_gpu.yaml --model FOLDER --gpus 1 --gib 40 --colocated

RECIPE and flags are those of train.py. Shapes come from the config.json of the model folder, on the
meta device: no weights are read, and the folder need not contain them. Every number is computed
from them and from the rates that the flags state; nothing is measured. Each table is a function
below, whose lines are its formulas.
"""

import argparse
import math
import sys
from types import SimpleNamespace

import torch

import attention
from checkpoint import load_policy
from config import read_config
from data import InputError
from distributed import units
from export import FILE_BYTES
from model import LOGIT_COLUMNS
from run import set_trainable

GIB = 2**30
MARGIN = 4 * GIB  # the CUDA context, NCCL's buffers, the allocator's losses: an allowance
VLLM_MARGIN = 2 * GIB  # vLLM's context, activations and CUDA graphs: an allowance
PROMPT_TEXT = 200  # tokens of question and options beside the audio
MEL_BYTES = 4 * 128 * 100  # log-mel features of a second: 128 bins, 100 frames, fp32


def sizes_of(policy, config, gpus, audio_seconds=30):
    """→ the sizes that the formulas below use. policy: of set_trainable, on the meta device."""
    text = policy.base.config.get_text_config()
    s = SimpleNamespace(gpus=gpus, audio_seconds=audio_seconds)

    def shard_size(parameters):
        """Their elements on the fullest GPU.

        fully_shard splits dimension 0 into equal pieces as far as they go: of 128 experts, 21 of 24
        GPUs get 6, one gets 2, and two get none.
        """
        return sum(math.ceil(p.shape[0] / gpus) * (p.numel() // p.shape[0]) for p in parameters)

    def trained(parameters):
        return [p for p in parameters if p.requires_grad]

    def count(parameters):
        return sum(p.numel() for p in parameters)

    parameters = list(policy.parameters())
    s.parameters, s.trained = count(parameters), count(trained(parameters))
    s.exported = s.parameters - (s.trained if config.lora_rank else 0)  # adapters are merged
    s.shard, s.trained_shard = shard_size(parameters), shard_size(trained(parameters))
    s.frozen_width = 2 if policy.saved_dtype == torch.bfloat16 else 4  # bytes: run.narrow_frozen
    inner, unit_sizes = set(), {}
    for module in units(policy):  # inner ones first: a unit excludes what its inner units hold
        own = [p for p in module.parameters() if id(p) not in inner]
        inner |= {id(p) for p in own}
        # Gathered with the padding of the pieces.
        unit_sizes[module] = gpus * shard_size(own), gpus * shard_size(trained(own))
    s.root, s.root_trained = unit_sizes.pop(policy)
    unit_sizes.pop(getattr(policy.base.model, "visual", None), None)  # never run, never gathered
    s.largest, s.largest_trained = max(unit_sizes.values())

    s.hidden, s.layers = text.hidden_size, text.num_hidden_layers
    s.heads, s.kv_heads = text.num_attention_heads, text.num_key_value_heads
    s.width = getattr(text, "head_dim", None) or s.hidden // s.heads
    s.experts = getattr(text, "num_experts", 0) or 1
    s.experts_per_token = getattr(text, "num_experts_per_tok", 0) or 1
    s.inside = getattr(text, "moe_intermediate_size", 0) or text.intermediate_size
    # Of the decoder and lm_head, without adapters. Embeddings are looked up, not multiplied.
    decoder = {name: p for name, p in policy.base.named_parameters()
               if ("language_model" in name or "lm_head" in name) and ".lora_" not in name}
    s.decoder = count(decoder.values())
    multiplied = {name: p for name, p in decoder.items() if "embed_tokens" not in name}
    multiplied["lm_head.weight"] = policy.base.lm_head.weight  # also if it is the embeddings
    s.in_experts = count(p for name, p in multiplied.items() if ".mlp.experts." in name)
    s.outside_experts = count(multiplied.values()) - s.in_experts
    s.active = s.outside_experts + s.in_experts * s.experts_per_token / s.experts

    window = policy.feature_extractor.chunk_length
    if policy.family.one_window and audio_seconds > window:
        raise InputError(f"--audio_seconds is {audio_seconds}, but this {policy.family.name} takes "
                         f"at most {window} s, one window of its encoder; give that or less")
    s.audio = policy.family.tokens(100 * audio_seconds)
    s.feature_seconds = window if policy.family.one_window else audio_seconds  # padded clips
    s.prompt = PROMPT_TEXT + s.audio  # L
    s.longest = s.prompt + config.max_new_tokens
    s.questions = config.generation_batch_size // config.group_size
    s.embeddings = 2 * s.questions * s.audio * s.hidden  # of a batch's clips, bytes in bf16
    # The largest micro-batch.
    s.tokens = max(s.longest, min(config.micro_batch_tokens or math.inf,
                                  s.longest * (config.micro_batch_size or math.inf)))
    s.kv = 2 * 2 * s.layers * s.kv_heads * s.width  # bytes of a token's keys and values, bf16
    return s


# ──────── memory ────────


def plan(policy, config, gpus, audio_seconds=30):
    """→ bytes by name on each of `gpus` training GPUs, and sizes_of.

    Sharded: fp32 master weights, fp32 gradients and AdamW's two moments of what is trained, frozen
    weights (in bf16 if the folder is), and the bf16 reference. Gathered in bf16: the unit in use
    and the next one, and the root units (embeddings, lm_head) all the time. Activations: the inputs
    of all layers (checkpointing keeps no more) and the inside of one layer, while it is recomputed.
    The frozen audio tower runs before the updates and keeps nothing.
    """
    s = sizes_of(policy, config, gpus, audio_seconds)
    # One layer in bf16, kept between its recomputation and its backward: norms and residuals; q, k,
    # v and output of the attention; and for each expert that a token visits its input, gate, up,
    # product and output.
    layer = 2 * s.tokens * (6 * s.hidden + 2 * s.width * (2 * s.heads + 2 * s.kv_heads)
                            + s.experts_per_token * (2 * s.hidden + 4 * s.inside))
    activations = s.layers * layer
    if config.gradient_checkpointing:
        activations = 2 * s.tokens * s.hidden * s.layers + layer
    mass_rows = attention.mass_rows(torch.device("cuda"))
    mass = 4 * 4 * s.tokens * s.heads * min(mass_rows, config.max_new_tokens)  # z, α, dz …, fp32
    no_reference = config.lora_rank > 0  # the policy without its adapters
    return {
        "trained weights, fp32, sharded": 4 * s.trained_shard,
        "frozen weights, sharded": s.frozen_width * (s.shard - s.trained_shard),
        "gradients, fp32, sharded": 4 * s.trained_shard,
        "AdamW, fp32, sharded": 8 * s.trained_shard,
        "reference, bf16, sharded": 0 if no_reference or config.offload_reference else 2 * s.shard,
        "gathered: root unit, bf16": 2 * s.root,
        "gathered: root unit of the reference, bf16": 0 if no_reference else 2 * s.root,
        "gathered: a unit and the next, bf16": 2 * 2 * s.largest,
        "gradient of a unit and the root, bf16 and fp32": 6 * (s.largest_trained + s.root_trained),
        "activations": activations,
        "audio mass of a layer": mass if config.eta > 0 else 0,
        "logits of a block": 4 * 4 * s.tokens * LOGIT_COLUMNS,  # z, exponentials, copies, fp32
        "margin": MARGIN}, s


def host_memory(s, config):
    """→ bytes by name on the CPU, each for rank 0 and for another rank. Python itself not counted.

    Rank 0 loads the whole weights and sends them tensor by tensor; later it holds what all hold. In
    a push each rank holds one file of its part of the export.
    """
    embeddings = s.embeddings if config.audio_tower_is_frozen else 0
    reference = 2 * s.shard if config.offload_reference and not config.lora_rank else 0
    share = min(2 * s.exported / s.gpus, FILE_BYTES)
    kept = share + embeddings + reference
    return {"whole weights while loading, fp32": (4 * s.exported, 0),
            "a file of a push, bf16": (share, share),
            "embeddings of the clips, bf16": (embeddings, embeddings),
            "reference, offloaded, bf16": (reference, reference),
            "most at a time": (max(4 * s.exported, kept), kept)}


def disk(s, config):
    """→ bytes by name under output_dir."""
    mel = s.questions * s.feature_seconds * MEL_BYTES
    clips = s.embeddings if config.audio_tower_is_frozen else mel  # what the saved batch holds
    state = 12 * s.trained + clips if config.save_every else 0
    push = 2 * s.exported if config.rollout == "vllm" else 0
    parts = {"two states, and a third while it is written": 3 * state,
             "pushed weights, and the next ones, bf16": 2 * push,
             "a checkpoint, bf16": 2 * s.exported}
    return {**parts, "all of it": sum(parts.values())}


def beside_vllm(s, config, need, gib):
    """vLLM on the training GPUs → (largest utilization, bytes by name on each GPU, room of KV).

    A group shares the keys and values of its prompt. vLLM splits weights and heads over the GPUs;
    each GPU holds at least one key head. All completions are counted as max_new_tokens long.
    """
    utilization = max(0, math.floor(100 * (1 - need / (gib * GIB)))) / 100
    kv = s.kv * math.ceil(s.kv_heads / s.gpus) / s.kv_heads
    tokens = s.questions * s.prompt + config.generation_batch_size * config.max_new_tokens
    parts = {"weights, bf16": 2 * s.exported / s.gpus, "margin": VLLM_MARGIN}
    room = utilization * gib * GIB - sum(parts.values())
    return utilization, {**parts, "KV cache of a generation batch": kv * tokens}, room


# ──────── seconds ────────


def seconds(s, config, rates):
    """→ [(phase, seconds, formula)] of a generation batch. rates: the flags of main.

    The letters of the formulas are explained by LETTERS. Left out: the audio tower, attention's own
    products, the optimizer, and what is sent inside a node.
    """
    n, mean, longest = config.generation_batch_size, rates.mean_tokens, config.max_new_tokens
    flops = 1e12 * rates.tflops * rates.utilisation  # of a GPU
    train, serve, hbm = s.gpus * flops, rates.serving_gpus * flops, 1e12 * rates.hbm
    nodes, on_disk = math.ceil(s.gpus / rates.gpus_per_node), 1e9 * rates.disk
    network = 1e9 * rates.network if nodes > 1 else math.inf  # one node sends nothing over it
    rows = []
    if config.rollout == "vllm":
        # Which experts some token of a decode step visits, with n·mean/longest tokens in the step.
        touched = 1 - (1 - s.experts_per_token / s.experts) ** (n * mean / longest)
        weights = 2 * (s.outside_experts + s.in_experts * touched) / rates.serving_gpus
        cache = s.kv * math.ceil(s.kv_heads / rates.serving_gpus) / s.kv_heads
        rows += [
            ("push: gather", 2 * s.exported / network, "2P / network"),
            ("push: write", 2 * s.exported / (on_disk * nodes), "2P / (disk · nodes)"),
            ("push: read", 2 * s.exported / on_disk, "2P / disk"),
            ("generate: prompts", 2 * s.active * s.questions * s.prompt / serve,
             "2A · N/G · L / F"),
            ("generate: arithmetic", 2 * s.active * n * mean / serve, "2A · N · T / F"),
            ("generate: weights read", longest * weights / hbm, "T_max · 2A_all / B"),
            ("generate: KV cache read", n * mean * (s.prompt + mean / 2) * cache / hbm,
             "N · T · (L + T/2) · KV / B"),
            ("generate: launches", longest * rates.step_ms / 1000, "T_max · step_ms")]
    if config.reward_weights[2] and config.checker != "rule":
        rows.append(("rewards", n / rates.checks, "N / checks"))
    tokens, text = n * (s.prompt + mean) * rates.padding, n * (PROMPT_TEXT + mean) * rates.padding
    slots = config.steps_per_generation * max(
        math.ceil(tokens / config.steps_per_generation / s.gpus
                  / (config.micro_batch_tokens or math.inf)),
        math.ceil(config.step_size / s.gpus / (config.micro_batch_size or math.inf)))
    asks_text = bool(config.mask or config.eta)
    backward = 2 if config.lora_rank else 4  # of the inputs alone, or of the weights as well
    per_token = 2 + backward + 2 * config.gradient_checkpointing
    rows += [
        ("frozen forwards: arithmetic", 2 * s.active * (2 * tokens + asks_text * text) / train,
         f"2A · N · R · (2(L + T){' + L_text + T' * asks_text}) / F"),
        ("frozen forwards: network", slots * (2 + asks_text) * 2 * s.decoder / network,
         f"{slots} micro-batches · {2 + asks_text} · 2D / network"),
        ("updates: arithmetic", per_token * s.active * tokens / train,
         f"{per_token}A · N · R · (L + T) / F"),
        ("updates: network", slots * (4 * s.decoder + 4 * s.trained) / network,
         f"{slots} micro-batches · (2 · 2D + 4 · trained) / network")]
    return rows


LETTERS = """P: all parameters, D: the decoder's, A: those that a token uses, A_all: those that some
token of a decode step uses. N completions, G per question. L: tokens of a prompt, T: of a
completion on average, T_max: at most. R: padding. F: FLOP/s and B: bytes/s of the GPUs that train
or serve. KV: bytes of a token. 2 and 4: bytes of bf16 and fp32, or FLOPs per parameter. All
questions are in flight, and the parts of "generate" do not overlap."""


def total_seconds(rows, config):
    """The sum. Arithmetic hides the network, or the other way round: FSDP gathers ahead."""
    def phase(name, together=sum):
        return together([value for row, value, _ in rows if row.startswith(name)] or [0])

    # The checker answers during the frozen forwards.
    training = max(phase("rewards"), phase("frozen", max)) + phase("updates", max)
    if config.async_rollouts:  # samples while the batch before trains
        return phase("push") + max(phase("generate"), training)
    return phase("push") + phase("generate") + training


# ──────── the command ────────


def table(header, rows):
    print("\n| " + " | ".join(header) + " |\n" + "|---" * len(header) + "|")
    for row in rows:
        print("| " + " | ".join(row) + " |")


def print_plan(on_gpu, s, config, options):
    """Prints the tables, and whether GPUs of `gib` GiB hold it. → bool"""
    need, gib = sum(on_gpu.values()), options.gib
    print(f"{s.parameters / 1e9:.2f} B parameters, {s.trained / 1e9:.2f} B trained, "
          f"{s.active / 1e9:.2f} B used per token, {s.gpus} GPUs train; computed, not measured")
    table(("on each GPU (computed)", "GiB"),
          [(name, f"{size / GIB:.2f}") for name, size in (*on_gpu.items(), ("sum", need))])
    print(f"\nmicro-batches of at most {s.tokens} tokens, rows of at most {s.longest}"
          f"\nlargest unit gathered at once: {2 * s.largest / 1e9:.2f} GB, "
          f"root unit {2 * s.root / 1e9:.2f} GB; {s.kv / 1e3:.0f} kB of KV cache per token")
    fits = need <= gib * GIB
    advice = (": lower micro_batch_tokens or max_new_tokens, use more GPUs, set offload_reference, "
              "or train with LoRA")
    print(f"{'fits' if fits else 'does not fit'} {gib:g} GiB{'' if fits else advice}")
    if options.colocated:
        fits = print_colocated(s, config, need, gib)
    table(("on the CPU (computed)", "rank 0, GB", "another rank, GB"),
          [(name, f"{first / 1e9:.2f}", f"{other / 1e9:.2f}")
           for name, (first, other) in host_memory(s, config).items()])
    table(("on the disk (computed)", "GB"),
          [(name, f"{size / 1e9:.1f}") for name, size in disk(s, config).items()])
    rows = seconds(s, config, options)
    rows.append(("sum, of arithmetic and network the larger", total_seconds(rows, config),
                 "generate beside the rest" if config.async_rollouts else ""))
    table(("a generation batch (computed)", "s", "formula"),
          [(name, f"{value:.1f}", formula) for name, value, formula in rows])
    print(f"\n{LETTERS}")
    return fits


def print_colocated(s, config, need, gib):
    """Prints what vLLM may take of the training GPUs, and whether that is enough. → bool"""
    utilization, parts, room = beside_vllm(s, config, need, gib)
    table(("vLLM on each of the same GPUs (computed)", "GiB"),
          [(name, f"{size / GIB:.2f}") for name, size in parts.items()])
    at_once = math.floor(config.generation_batch_size * room
                         / parts["KV cache of a generation batch"])
    verdict = "weights and KV cache fit"
    if at_once < config.generation_batch_size:
        verdict = f"the weights fit, and the KV cache of {at_once} completions at a time"
    if at_once < config.group_size:
        verdict = "vLLM does not fit beside the trainer"
    print(f"\nlargest --gpu-memory-utilization: {utilization:.2f}, {utilization * gib:.1f} GiB; "
          f"{verdict}")
    return at_once >= config.group_size


def main(arguments):
    parser = argparse.ArgumentParser(prog="plan.py", description=__doc__.split("\n")[0],
                                     allow_abbrev=False,
                                     epilog="RECIPE and all other flags are those of train.py.")

    def flag(name, default, text):
        parser.add_argument(name, type=type(default), default=default,
                            help=f"{text} (default: {default})")

    flag("--gpus", 24, "GPUs that train; paper: 24")
    flag("--gib", 96.0, "memory of a GPU in GiB; paper: 96 GB")
    parser.add_argument("--colocated", action="store_true", help="vLLM shares the training GPUs")
    flag("--audio_seconds", 30, "audio of a question")
    flag("--mean_tokens", 477.0, "mean length of a completion")
    flag("--padding", 1.12, "computed tokens per real one; see bench/padding.py")
    flag("--tflops", 148.0, "bf16 peak of a GPU in TFLOP/s; H20: 148")
    flag("--utilisation", 0.35, "share of the peak that is reached")
    flag("--hbm", 4.0, "memory bandwidth of a GPU in TB/s; H20: 4.0")
    flag("--disk", 2.0, "disk of a node in GB/s, for reading and for writing")
    flag("--network", 25.0, "network of a node in GB/s")
    flag("--gpus_per_node", 8, "GPUs of a node")
    flag("--serving_gpus", 8, "GPUs that serve; with --colocated all of --gpus")
    flag("--step_ms", 5.0, "launches and waiting of a decode step, in ms")
    flag("--checks", 100.0, "completions that the checker judges per second")
    options, rest = parser.parse_known_args(arguments)
    if options.colocated:
        options.serving_gpus = options.gpus
    try:
        config = read_config(rest)
        policy = set_trainable(load_policy(config.model, meta=True), config)
        on_gpu, sizes = plan(policy, config, options.gpus, options.audio_seconds)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0 if print_plan(on_gpu, sizes, config, options) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
