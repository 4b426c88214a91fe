"""Tiny audio LLMs with random weights, of the real transformers classes, and clips for them. Used by many tests."""

import json

import numpy as np
import soundfile
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (Qwen2_5OmniThinkerConfig, Qwen2_5OmniThinkerForConditionalGeneration, Qwen2AudioConfig,
                          Qwen2AudioForConditionalGeneration, Qwen2Tokenizer, Qwen3OmniMoeThinkerConfig,
                          Qwen3OmniMoeThinkerForConditionalGeneration, WhisperFeatureExtractor)

from data import Question
from model import make_policy

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|audio_start|>", "<|audio_pad|>", "<|audio_end|>",
           "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}"
    "{% if part.type == 'audio' %}<|audio_start|><|audio_pad|><|audio_end|>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
CORPUS = ["Which sound comes first in the recording? Choose one of these options: A. a bell B. a dog C. a siren",
          "I hear a bell, then a dog barks twice. The first sound is a bell."]


def tokenizer():
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(CORPUS, trainers.BpeTrainer(
        vocab_size=320, show_progress=False, special_tokens=[], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))

    saved = json.loads(bpe.to_str())["model"]
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in saved["merges"]]
    tok = Qwen2Tokenizer(vocab=saved["vocab"], merges=merges, eos_token="<|im_end|>", pad_token="<|endoftext|>",
                         extra_special_tokens=SPECIAL[1:])
    tok.add_tokens([AddedToken(t, special=False, normalized=False) for t in ("<think>", "</think>")])
    tok.chat_template = TEMPLATE
    return tok


def qwen3_omni(seed=0, layers=3, dtype=torch.float32, experts="grouped_mm", std=0.3):
    """The thinker of Qwen3-Omni: mixture of experts, grouped-query attention, M-RoPE. float64 needs experts="eager"."""
    tok = tokenizer()
    token = tok.convert_tokens_to_ids
    torch.manual_seed(seed)
    config = Qwen3OmniMoeThinkerConfig(
        audio_config=dict(d_model=32, encoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=32, num_mel_bins=128,
                          downsample_hidden_size=4, output_dim=32, n_window=50, n_window_infer=800),
        vision_config=dict(depth=1, hidden_size=16, num_heads=1, intermediate_size=16, out_hidden_size=32,
                           num_position_embeddings=16, deepstack_visual_indexes=[0]),
        text_config=dict(vocab_size=len(tok), hidden_size=32, intermediate_size=32, num_hidden_layers=layers,
                         num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_experts=4, num_experts_per_tok=2,
                         moe_intermediate_size=16, max_position_embeddings=2048, initializer_range=std,
                         rope_parameters=dict(rope_type="default", rope_theta=10000.0, mrope_section=[2, 1, 1],
                                              mrope_interleaved=True)),
        audio_token_id=token("<|audio_pad|>"), audio_start_token_id=token("<|audio_start|>"),
        audio_end_token_id=token("<|audio_end|>"), image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"), vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"), initializer_range=std, eos_token_id=token("<|im_end|>"),
        pad_token_id=token("<|endoftext|>"))
    model = Qwen3OmniMoeThinkerForConditionalGeneration._from_config(config, experts_implementation=experts).to(dtype)
    return make_policy(model, tok, WhisperFeatureExtractor(feature_size=128))


def qwen3_omni_that_ends(eos):
    """One whose completions end now and then, the sooner the larger `eos`, and never want a placeholder. Dimension 0 of
    every embedding is 1, so that the head can want and refuse tokens whatever the state."""
    policy = qwen3_omni(std=0.08)
    with torch.no_grad():
        policy.base.model.language_model.embed_tokens.weight[:, 0] = 1
        policy.base.lm_head.weight[:, 0] = 0
        policy.base.lm_head.weight[policy.eos_ids, 0] = eos
        policy.base.lm_head.weight[policy.placeholder_ids, 0] = -10
    return policy


def qwen2_5_omni(seed=0, dtype=torch.float32):
    tok = tokenizer()
    token = tok.convert_tokens_to_ids
    torch.manual_seed(seed)
    config = Qwen2_5OmniThinkerConfig(
        audio_config=dict(d_model=32, encoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=32, num_mel_bins=128,
                          output_dim=32, n_window=100),
        vision_config=dict(depth=1, hidden_size=16, num_heads=1, intermediate_size=16, out_hidden_size=32),
        text_config=dict(vocab_size=len(tok), hidden_size=32, intermediate_size=32, num_hidden_layers=3,
                         num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=2048,
                         initializer_range=0.3,
                         rope_parameters=dict(rope_type="default", rope_theta=10000.0, mrope_section=[2, 1, 1])),
        audio_token_index=token("<|audio_pad|>"), audio_token_id=token("<|audio_pad|>"),
        audio_start_token_id=token("<|audio_start|>"), audio_end_token_id=token("<|audio_end|>"),
        image_token_index=token("<|image_pad|>"), video_token_index=token("<|video_pad|>"),
        image_token_id=token("<|image_pad|>"), video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"), initializer_range=0.3)
    model = Qwen2_5OmniThinkerForConditionalGeneration(config).to(dtype)
    return make_policy(model, tok, WhisperFeatureExtractor(feature_size=128))


def qwen2_audio(seed=0, dtype=torch.float32):
    tok = tokenizer()
    torch.manual_seed(seed)
    config = Qwen2AudioConfig(
        audio_config=dict(model_type="qwen2_audio_encoder", d_model=32, encoder_layers=1, encoder_attention_heads=2,
                          encoder_ffn_dim=32, num_mel_bins=128),
        text_config=dict(model_type="qwen2", vocab_size=len(tok), hidden_size=32, intermediate_size=32,
                         num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
                         max_position_embeddings=2048, initializer_range=0.3),
        audio_token_index=tok.convert_tokens_to_ids("<|audio_pad|>"),
        audio_token_id=tok.convert_tokens_to_ids("<|audio_pad|>"))
    model = Qwen2AudioForConditionalGeneration(config).to(dtype)
    return make_policy(model, tok, WhisperFeatureExtractor(feature_size=128))


def questions(folder, seconds=((0.7,), (1.3, 0.4), (0.25,)), seed=0):
    """One question per tuple of clip lengths; a tuple of two is a question about two clips."""
    rng = np.random.default_rng(seed)
    result = []
    for i, lengths in enumerate(seconds):
        clips = []
        for j, length in enumerate(lengths):
            clips.append(folder / f"clip{seed}_{i}_{j}.wav")
            t = np.arange(int(length * 16000)) / 16000
            tone = 0.3 * np.sin(2 * np.pi * rng.uniform(200, 2000) * t) + 0.01 * rng.standard_normal(len(t))
            soundfile.write(clips[-1], tone.astype(np.float32), 16000)
        text = "Which sound comes first?" + " In the recording." * i
        result.append(Question(f"q{i}", tuple(clips), text, ("a bell", "a dog", "a siren"), "a dog"))
    return result


def write_world(folder, policy, seconds=((0.7,), (1.3,), (0.25,), (0.5,), (1.0,), (0.4,))):
    """A folder with a model and questions, as a user would bring it."""
    policy.save(folder / "model")
    rows = [{"id": q.id, "audio": [clip.name for clip in q.audio], "question": q.question, "choices": list(q.choices),
             "answer": q.answer} for q in questions(folder, seconds=seconds)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def arguments(world, out, *more):
    """Flags of train.py for a short run on it: 4 steps of 8 completions, 2 a generation batch."""
    flags = {"model": world / "model", "data": world / "train.jsonl", "output_dir": out, "max_steps": 4,
             "group_size": 4, "generation_batch_size": 16, "steps_per_generation": 2, "micro_batch_size": 3,
             "temperature": 1.2, "top_k": 0, "top_p": 1.0, "max_new_tokens": 12, "checker": "rule",
             "learning_rate": 1e-3, "gradient_checkpointing": "false"}
    given = [str(x) for name, value in flags.items() for x in (f"--{name}", value)]
    return [*given, "--target_layers", "1", "2", *map(str, more)]


def lines(path):
    """The records of a jsonl file."""
    return [json.loads(line) for line in path.read_bytes().split(b"\n") if line]
