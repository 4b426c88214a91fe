"""Small audio LLMs with random weights, of the real transformers classes, and clips for them."""

import json

import numpy as np
import soundfile
import torch
from transformers import (AudioFlamingo3Config, AudioFlamingo3ForConditionalGeneration,
                          GlmAsrConfig, GlmAsrForConditionalGeneration, Qwen2_5OmniThinkerConfig,
                          Qwen2_5OmniThinkerForConditionalGeneration, Qwen2AudioConfig,
                          Qwen2AudioForConditionalGeneration, Qwen3Config, Qwen3ForCausalLM,
                          Qwen3OmniMoeThinkerForConditionalGeneration, VoxtralConfig,
                          VoxtralForConditionalGeneration, WhisperFeatureExtractor)

import toy
from checkpoint import make_policy, save_policy
from data import Question

CORPUS = ["Which sound comes first in the recording? "
          "Choose one of these options: A. a bell B. a dog C. a siren",
          "I hear a bell, then a dog barks twice. The first sound is a bell."]


# Clips first, then the text, as in the template of Qwen3-Omni. The toy's own drops the options.
CHAT_TEMPLATE = """{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\n' }}
{%- if message.content is string %}{{- message.content }}
{%- else %}
{%- for item in message.content %}
{%- if item.type == 'audio' %}{{- '<|audio_start|><|audio_pad|><|audio_end|>' }}
{%- else %}{{- item.text }}{%- endif %}
{%- endfor %}
{%- endif %}
{{- '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"""


def build_tokenizer():
    """A tokenizer of 320 learnt and 12 added tokens. The first added one, 320, is <|im_end|>."""
    tokenizer = toy.build_tokenizer(2 * CORPUS, vocab_size=320)  # it merges only what occurs twice
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def qwen3_omni(seed=0, layers=3, dtype=torch.float32, experts="grouped_mm", std=0.3,
               tokenizer=None):
    """The thinker of Qwen3-Omni: mixture of experts, grouped-query attention, M-RoPE.

    float64 needs experts="eager". tokenizer: by default that of build_tokenizer.
    """
    tokenizer = build_tokenizer() if tokenizer is None else tokenizer
    torch.manual_seed(seed)
    model = Qwen3OmniMoeThinkerForConditionalGeneration._from_config(
        toy.thinker_config(tokenizer, hidden_size=32, layers=layers, audio_size=32, std=std),
        experts_implementation=experts).to(dtype)
    return make_policy(model, tokenizer, WhisperFeatureExtractor(feature_size=128))


def qwen3_omni_that_ends(eos):
    """A Qwen3-Omni that ends its completions, sooner for a larger `eos`.

    Dimension 0 of every embedding is 1. The head's weights for that dimension therefore act as a
    bias: `eos` for the end-of-sequence token, and -10 for placeholders, so that none is sampled.
    """
    policy = qwen3_omni(std=0.08)
    with torch.no_grad():
        policy.base.model.language_model.embed_tokens.weight[:, 0] = 1
        policy.base.lm_head.weight[:, 0] = 0
        policy.base.lm_head.weight[policy.eos_ids, 0] = eos
        policy.base.lm_head.weight[policy.placeholder_ids, 0] = -10
    return policy


def qwen2_5_omni(seed=0, dtype=torch.float32):
    tokenizer = build_tokenizer()
    token = tokenizer.convert_tokens_to_ids
    torch.manual_seed(seed)
    config = Qwen2_5OmniThinkerConfig(
        audio_config=dict(AUDIO, output_dim=32, n_window=100),
        vision_config=dict(depth=1, hidden_size=16, num_heads=1, intermediate_size=16,
                           out_hidden_size=32),
        text_config=dict(TEXT, vocab_size=len(tokenizer), rope_parameters=dict(
            rope_type="default", rope_theta=10000.0, mrope_section=[2, 1, 1])),
        audio_token_index=token("<|audio_pad|>"), audio_token_id=token("<|audio_pad|>"),
        audio_start_token_id=token("<|audio_start|>"), audio_end_token_id=token("<|audio_end|>"),
        image_token_index=token("<|image_pad|>"), video_token_index=token("<|video_pad|>"),
        image_token_id=token("<|image_pad|>"), video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"), initializer_range=0.3)
    model = Qwen2_5OmniThinkerForConditionalGeneration(config).to(dtype)
    return make_policy(model, tokenizer, WhisperFeatureExtractor(feature_size=128))


def qwen2_audio(seed=0, dtype=torch.float32):
    tokenizer = build_tokenizer()
    audio_pad = tokenizer.convert_tokens_to_ids("<|audio_pad|>")
    torch.manual_seed(seed)
    config = Qwen2AudioConfig(
        audio_config=dict(AUDIO, model_type="qwen2_audio_encoder"),
        text_config=dict(TEXT, model_type="qwen2", vocab_size=len(tokenizer)),
        audio_token_index=audio_pad, audio_token_id=audio_pad)
    model = Qwen2AudioForConditionalGeneration(config).to(dtype)
    return make_policy(model, tokenizer, WhisperFeatureExtractor(feature_size=128))


def qwen3(tokenizer, seed=0):
    """A language model without audio, for the adapters of examples/."""
    torch.manual_seed(seed)
    return Qwen3ForCausalLM(Qwen3Config(
        **TEXT, head_dim=8, vocab_size=len(tokenizer), tie_word_embeddings=False,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None)).eval()


def with_tokens(template, *tokens):
    """The tokenizer with more special tokens, and a chat template that writes them."""
    tokenizer = build_tokenizer()
    tokenizer.add_tokens(list(tokens), special_tokens=True)
    tokenizer.chat_template = CONTENT + template
    return tokenizer


# Renders the parts of a message. The templates below write what the processors of the families
# write around it: as AudioFlamingo3's converter for the hub, mistral-common 1.13, GLM-ASR's demo.
CONTENT = """{%- macro content(message, audio) %}
{%- if message.content is string %}{{- message.content }}{%- else %}
{%- for item in message.content %}{{- audio if item.type == 'audio' else item.text }}{%- endfor %}
{%- endif %}{%- endmacro %}"""
FLAMINGO = """{{- '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\n' + content(message, '<sound>') + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"""
VOXTRAL = """{{- '<s>' }}
{%- for message in messages %}
{%- if message.role == 'user' %}
{{- '[INST]' + content(message, '[BEGIN_AUDIO][AUDIO]') + '[/INST]' }}
{%- else %}{{- content(message, '') + '</s>' }}{%- endif %}
{%- endfor %}"""
GLM = """{%- for message in messages %}
{{- '<|' + message.role + '|>\n' }}
{{- content(message, '<|begin_of_audio|><|pad|><|end_of_audio|>\n') }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>\n' }}{%- endif %}"""


def audioflamingo3(seed=0, dtype=torch.float32):
    tokenizer = with_tokens(FLAMINGO, "<sound>")
    torch.manual_seed(seed)
    config = AudioFlamingo3Config(
        audio_config=dict(AUDIO, model_type="audioflamingo3_encoder"),
        text_config=dict(TEXT, model_type="qwen2", vocab_size=len(tokenizer)),
        audio_token_id=tokenizer.convert_tokens_to_ids("<sound>"))
    model = AudioFlamingo3ForConditionalGeneration(config).to(dtype)
    return make_policy(model, tokenizer, WhisperFeatureExtractor(feature_size=128))


def voxtral(seed=0, dtype=torch.float32):
    tokenizer = with_tokens(VOXTRAL, "<s>", "</s>", "[INST]", "[/INST]", "[BEGIN_AUDIO]", "[AUDIO]")
    torch.manual_seed(seed)
    config = VoxtralConfig(
        audio_config=dict(AUDIO, model_type="voxtral_encoder", encoder_ffn_dim=4 * 32),
        text_config=dict(TEXT, model_type="llama", vocab_size=len(tokenizer), head_dim=8,
                         eos_token_id=tokenizer.eos_token_id),
        audio_token_id=tokenizer.convert_tokens_to_ids("[AUDIO]"))
    model = VoxtralForConditionalGeneration(config).to(dtype)
    return make_policy(model, tokenizer, WhisperFeatureExtractor(feature_size=128))


def glm_asr(seed=0, dtype=torch.float32):
    """Its lm_head is its embeddings."""
    tokenizer = with_tokens(GLM, "<|user|>", "<|assistant|>", "<|begin_of_audio|>", "<|pad|>",
                            "<|end_of_audio|>")
    torch.manual_seed(seed)
    config = GlmAsrConfig(
        audio_config=dict(model_type="glmasr_encoder", hidden_size=32, intermediate_size=4 * 32,
                          num_hidden_layers=1, num_attention_heads=2),
        text_config=dict(TEXT, model_type="llama", vocab_size=len(tokenizer), eos_token_id=None),
        audio_token_id=tokenizer.convert_tokens_to_ids("<|pad|>"))
    model = GlmAsrForConditionalGeneration(config).to(dtype)
    return make_policy(model, tokenizer, WhisperFeatureExtractor(feature_size=128))


# Sizes that most of them share.
AUDIO = dict(d_model=32, encoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=32,
             num_mel_bins=128)
TEXT = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=2048, initializer_range=0.3)


def questions(folder, seconds=((0.7,), (1.3, 0.4), (0.25,)), seed=0):
    """One question per tuple of clip lengths in seconds. Each length is one clip, a noisy tone."""
    rng = np.random.default_rng(seed)
    result = []
    for i, lengths in enumerate(seconds):
        clips = []
        for j, length in enumerate(lengths):
            clips.append(folder / f"clip{seed}_{i}_{j}.wav")
            t = np.arange(int(length * 16000)) / 16000
            tone = np.sin(2 * np.pi * rng.uniform(200, 2000) * t)
            samples = 0.3 * tone + 0.01 * rng.standard_normal(len(t))
            soundfile.write(clips[-1], samples.astype(np.float32), 16000)
        text = "Which sound comes first?" + " In the recording." * i
        result.append(Question(f"q{i}", tuple(clips), text, ("a bell", "a dog", "a siren"),
                               "a dog"))
    return result


def write_world(folder, policy, seconds=((0.7,), (1.3,), (0.25,), (0.5,), (1.0,), (0.4,))):
    """A folder with a model and questions, like one that a user would provide → folder."""
    save_policy(policy, folder / "model")
    rows = [{"id": q.id, "audio": [clip.name for clip in q.audio], "question": q.question,
             "choices": list(q.choices), "answer": q.answer}
            for q in questions(folder, seconds=seconds)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def arguments(world, out, *more):
    """Flags of train.py for a short run: 4 steps of 8 completions, 2 per generation batch."""
    flags = {"model": world / "model", "data": world / "train.jsonl", "output_dir": out,
             "max_steps": 4, "group_size": 4, "generation_batch_size": 16,
             "steps_per_generation": 2, "micro_batch_size": 3, "micro_batch_tokens": 0,
             "temperature": 1.2, "top_k": 0, "top_p": 1.0, "max_new_tokens": 12,
             "checker": "rule", "learning_rate": 1e-3, "gradient_checkpointing": "false"}
    given = [str(x) for name, value in flags.items() for x in (f"--{name}", value)]
    return [*given, "--target_layers", "1", "2", *map(str, more)]


def lines(path):
    """The records of a jsonl file."""
    return [json.loads(line) for line in path.read_bytes().split(b"\n") if line]
