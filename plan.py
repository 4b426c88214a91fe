"""What a run needs of each GPU, before anything is loaded.

    python train.py recipes/mapo_phase1.yaml --model FOLDER --data train.jsonl --plan true --plan_gpus 24 --plan_gib 96

Shapes come from the model folder's config.json on the meta device: no weights are read, and weights need not be there.
Each line of the table is a formula of `plan`, whose comments say what is counted. Computed, not measured.
"""

import math

from distributed import units
from model import LOGIT_COLUMNS, MASS_ROWS, audio_token_count

GIB = 2**30
MARGIN = 4 * GIB  # the CUDA context, NCCL's buffers and what the allocator loses: an allowance, no formula
PROMPT_TEXT = 200  # tokens of question and options beside the audio


def plan(policy, config, gpus, audio_seconds=30):
    """Bytes by name on each of `gpus` training GPUs, and what goes over the wire. policy: prepared, on the meta device.

    Sharded: fp32 master weights, fp32 gradients and AdamW's two moments of what is trained, the bf16 reference.
    Gathered in bf16: one unit and the next while it is used, and the root unit (embeddings, lm_head) all along.
    Activations: the inputs of all layers (checkpointing keeps no more) and one layer's inside, when it is recomputed.
    """
    text = policy.base.config.get_text_config()

    def share(parameters):
        """Elements of them on the fullest GPU: fully_shard deals out the rows (dimension 0) in equal pieces, as far as
        they go. Of 128 experts' rows 21 of 24 GPUs get 6, one gets 2, and two get none."""
        return sum(math.ceil(p.shape[0] / gpus) * (p.numel() // p.shape[0]) for p in parameters)

    def trained(parameters):
        return [p for p in parameters if p.requires_grad]

    parameters = list(policy.parameters())
    inner, unit_sizes = set(), {}
    for module in units(policy):  # inner ones first: a unit holds what no unit inside it holds
        own = [p for p in module.parameters() if id(p) not in inner]
        inner |= {id(p) for p in own}
        unit_sizes[module] = gpus * share(own), gpus * share(trained(own))  # gathered with the pieces' padding
    root, root_trained = unit_sizes.pop(policy)
    largest, largest_trained = max(unit_sizes.values())

    audio = audio_token_count(100 * audio_seconds, policy.base.config)
    length = PROMPT_TEXT + audio + config.max_new_tokens  # S, the longest row
    tokens, rows = config.micro_batch_size * length, config.micro_batch_size  # B·S, B
    hidden, layers = text.hidden_size, text.num_hidden_layers
    heads, kv_heads = text.num_attention_heads, text.num_key_value_heads
    width = getattr(text, "head_dim", None) or hidden // heads
    experts = getattr(text, "num_experts_per_tok", 0) or 1
    inside = getattr(text, "moe_intermediate_size", 0) or text.intermediate_size
    # One layer, bf16, kept between its recomputation and its backward: norms and residuals, q k v and output of the
    # attention, and for each expert that a token visits its input, gate, up, product and output.
    layer = 2 * tokens * (6 * hidden + 2 * width * (2 * heads + 2 * kv_heads) + experts * (2 * hidden + 4 * inside))
    if not config.gradient_checkpointing:
        activations = layers * layer
    else:
        activations = 2 * tokens * hidden * layers + layer
    mass = 4 * 4 * rows * heads * min(MASS_ROWS["cuda"], config.max_new_tokens) * length  # z, α, dz …, fp32
    logits = 4 * 4 * tokens * LOGIT_COLUMNS  # logits, exponentials, copies, fp32
    everything = sum(p.numel() for p in parameters)
    reference = 0 if config.lora_rank else 2 * share(parameters)
    on_gpu = {
        "weights, fp32, sharded": 4 * share(parameters),
        "gradients, fp32, sharded": 4 * share(trained(parameters)),
        "AdamW, fp32, sharded": 8 * share(trained(parameters)),
        "reference, bf16, sharded": 0 if config.offload_reference else reference,
        "gathered: root unit, bf16": 2 * root,
        "gathered: a unit and the next, bf16": 2 * 2 * largest,
        "gradient of a unit and the root, bf16 and fp32": 6 * (largest_trained + root_trained),
        "activations": activations,
        "audio mass of a layer": mass if config.eta > 0 else 0,
        "logits of a chunk": logits,
        "margin": MARGIN}
    return on_gpu, {
        "parameters": everything, "trained": sum(p.numel() for p in trained(parameters)),
        "largest unit, bf16 bytes": 2 * largest, "root unit, bf16 bytes": 2 * root, "longest row, tokens": length,
        "reference on the CPU, bytes a GPU": reference if config.offload_reference else 0,
        "push, bf16 bytes": 2 * everything, "rollout server's weights, bf16 bytes": 2 * everything,
        "KV cache of a token, bf16 bytes": 2 * 2 * layers * kv_heads * width}


def print_plan(policy, config, gpus, gib):
    """Prints the table, and whether it fits GPUs of `gib` GiB."""
    on_gpu, other = plan(policy, config, gpus)
    need = sum(on_gpu.values())
    print(f"{other['parameters'] / 1e9:.2f} B parameters, {other['trained'] / 1e9:.2f} B trained, {gpus} GPUs train\n")
    print("| on each GPU (computed) | GiB |\n|---|---|")
    for name, size in [*on_gpu.items(), ("sum", need)]:
        print(f"| {name} | {size / GIB:.2f} |")
    print(f"\nlongest row {other['longest row, tokens']} tokens; largest unit gathered at once "
          f"{other['largest unit, bf16 bytes'] / 1e9:.2f} GB, root {other['root unit, bf16 bytes'] / 1e9:.2f} GB; a "
          f"push writes {other['push, bf16 bytes'] / 1e9:.1f} GB; the rollout server holds as much, and "
          f"{other['KV cache of a token, bf16 bytes'] / 1e3:.0f} kB a token of KV cache"
          + (f"; reference on the CPU {other['reference on the CPU, bytes a GPU'] / GIB:.1f} GiB a GPU"
             if config.offload_reference else ""))
    fits = need <= gib * GIB
    print(f"{'fits' if fits else 'does not fit'} {gib:g} GiB"
          + ("" if fits else ": lower micro_batch_size or max_new_tokens, use more GPUs, offload_reference, or LoRA"))
    return fits
