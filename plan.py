"""What a run needs on each GPU, before anything is loaded.

    python plan.py recipes/mapo_phase1.yaml --model FOLDER --gpus 24 --gib 96

RECIPE and flags are those of train.py. Shapes come from the config.json of the model folder, on the
meta device: no weights are read, and the folder need not contain them. Each line of the table is a
formula in `plan`, whose comments say what is counted. The numbers are computed, not measured.
"""

import argparse
import math
import sys

from checkpoint import load_policy
from config import read_config
from data import InputError, audio_token_count
from distributed import units
from model import LOGIT_COLUMNS
from run import set_trainable

GIB = 2**30
MARGIN = 4 * GIB  # the CUDA context, NCCL's buffers, the allocator's losses: an allowance
PROMPT_TEXT = 200  # tokens of question and options beside the audio
MASS_ROWS = 128  # rows of attention weights at a time on a GPU, see attention.mass_rows


def plan(policy, config, gpus, audio_seconds=30):
    """→ bytes by name on each of `gpus` training GPUs, and other sizes by name.

    policy: prepared by set_trainable, on the meta device.
    Sharded: fp32 master weights, fp32 gradients and AdamW's two moments of what is trained, and the
    bf16 reference. Gathered in bf16: the unit in use and the next one, and the root unit
    (embeddings, lm_head) all the time. Activations: the inputs of all layers (checkpointing keeps
    no more) and the inside of one layer, while it is recomputed.
    """
    text = policy.base.config.get_text_config()

    def shard_size(parameters):
        """Their elements on the fullest GPU.

        fully_shard splits dimension 0 into equal pieces as far as they go: of 128 experts, 21 of 24
        GPUs get 6, one gets 2, and two get none.
        """
        return sum(math.ceil(p.shape[0] / gpus) * (p.numel() // p.shape[0]) for p in parameters)

    def trained(parameters):
        return [p for p in parameters if p.requires_grad]

    parameters = list(policy.parameters())
    inner, unit_sizes = set(), {}
    for module in units(policy):  # inner ones first: a unit excludes what its inner units hold
        own = [p for p in module.parameters() if id(p) not in inner]
        inner |= {id(p) for p in own}
        # Gathered with the padding of the pieces.
        unit_sizes[module] = gpus * shard_size(own), gpus * shard_size(trained(own))
    root, root_trained = unit_sizes.pop(policy)
    largest, largest_trained = max(unit_sizes.values())

    audio = audio_token_count(100 * audio_seconds, policy.base.config.model_type)
    length = PROMPT_TEXT + audio + config.max_new_tokens  # S, the longest row
    # B·S, the largest micro-batch
    tokens = max(length, min(config.micro_batch_tokens or math.inf,
                             length * (config.micro_batch_size or math.inf)))
    hidden, layers = text.hidden_size, text.num_hidden_layers
    heads, kv_heads = text.num_attention_heads, text.num_key_value_heads
    width = getattr(text, "head_dim", None) or hidden // heads
    experts = getattr(text, "num_experts_per_tok", 0) or 1
    inside = getattr(text, "moe_intermediate_size", 0) or text.intermediate_size
    # One layer in bf16, kept between its recomputation and its backward: norms and residuals; q, k,
    # v and output of the attention; and for each expert that a token visits its input, gate, up,
    # product and output.
    layer = 2 * tokens * (6 * hidden + 2 * width * (2 * heads + 2 * kv_heads)
                          + experts * (2 * hidden + 4 * inside))
    activations = layers * layer
    if config.gradient_checkpointing:
        activations = 2 * tokens * hidden * layers + layer
    mass_rows = min(MASS_ROWS, config.max_new_tokens)
    mass = 4 * 4 * tokens * heads * mass_rows  # z, α, dz …, fp32
    logits = 4 * 4 * tokens * LOGIT_COLUMNS  # logits, exponentials, copies, fp32
    everything = sum(p.numel() for p in parameters)
    reference = 0 if config.lora_rank else 2 * shard_size(parameters)
    on_gpu = {
        "weights, fp32, sharded": 4 * shard_size(parameters),
        "gradients, fp32, sharded": 4 * shard_size(trained(parameters)),
        "AdamW, fp32, sharded": 8 * shard_size(trained(parameters)),
        "reference, bf16, sharded": 0 if config.offload_reference else reference,
        "gathered: root unit, bf16": 2 * root,
        "gathered: a unit and the next, bf16": 2 * 2 * largest,
        "gradient of a unit and the root, bf16 and fp32": 6 * (largest_trained + root_trained),
        "activations": activations,
        "audio mass of a layer": mass if config.eta > 0 else 0,
        "logits of a block": logits,
        "margin": MARGIN}
    return on_gpu, {
        "parameters": everything, "trained": sum(p.numel() for p in trained(parameters)),
        "largest unit, bf16 bytes": 2 * largest, "root unit, bf16 bytes": 2 * root,
        "longest row, tokens": length,
        "reference on the CPU, bytes per GPU": reference if config.offload_reference else 0,
        "push, bf16 bytes": 2 * everything,
        "KV cache per token, bf16 bytes": 2 * 2 * layers * kv_heads * width}


def print_plan(on_gpu, other, gpus, gib):
    """Prints the table, and whether it fits GPUs of `gib` GiB. → bool"""
    need = sum(on_gpu.values())
    print(f"{other['parameters'] / 1e9:.2f} B parameters, {other['trained'] / 1e9:.2f} B trained, "
          f"{gpus} GPUs train\n")
    print("| on each GPU (computed) | GiB |\n|---|---|")
    for name, size in [*on_gpu.items(), ("sum", need)]:
        print(f"| {name} | {size / GIB:.2f} |")
    print(f"\nlongest row: {other['longest row, tokens']} tokens"
          f"\nlargest unit gathered at once: {other['largest unit, bf16 bytes'] / 1e9:.2f} GB, "
          f"root unit {other['root unit, bf16 bytes'] / 1e9:.2f} GB"
          f"\na push writes {other['push, bf16 bytes'] / 1e9:.1f} GB; the rollout server holds as "
          f"much, and {other['KV cache per token, bf16 bytes'] / 1e3:.0f} kB of KV cache per token")
    if other["reference on the CPU, bytes per GPU"]:
        print("reference on the CPU: "
              f"{other['reference on the CPU, bytes per GPU'] / GIB:.1f} GiB per GPU")
    fits = need <= gib * GIB
    advice = (": lower micro_batch_tokens or max_new_tokens, use more GPUs, set offload_reference, "
              "or train with LoRA")
    print(f"{'fits' if fits else 'does not fit'} {gib:g} GiB{'' if fits else advice}")
    return fits


def main(arguments):
    parser = argparse.ArgumentParser(prog="plan.py", description=__doc__.split("\n")[0],
                                     allow_abbrev=False,
                                     epilog="RECIPE and all other flags are those of train.py.")
    parser.add_argument("--gpus", type=int, default=24, help="GPUs that train (paper: 24)")
    parser.add_argument("--gib", type=float, default=96.0,
                        help="memory of a GPU in GiB (paper: 96 GB)")
    options, rest = parser.parse_known_args(arguments)
    try:
        config = read_config(rest)
        policy = set_trainable(load_policy(config.model, meta=True), config)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print_plan(*plan(policy, config, options.gpus), options.gpus, options.gib)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
