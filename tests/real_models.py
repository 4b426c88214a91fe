"""The sizes of real checkpoints, as configs of the transformers classes. No weights.

Qwen3-Omni: the values of its config on the hub. Qwen2.5-Omni-3B: the decoder of Qwen2.5-3B (its
technical report), with the encoders of the class defaults and an lm_head of its own. Qwen2-Audio:
the class defaults with the vocabulary and the MLP of its config. The numbers of parameters are
31.7, 4.70 (the thinker) and 8.40 billion.
"""

import tiny
from transformers import (Qwen2_5OmniThinkerConfig, Qwen2AudioConfig, Qwen3OmniMoeConfig,
                          Qwen3OmniMoeThinkerConfig)


def write_folder(config, folder):
    """A model folder without weights, with the tokenizer of the tiny models → folder."""
    config.save_pretrained(folder)
    small = tiny.qwen3_omni()
    small.tokenizer.save_pretrained(folder)
    small.feature_extractor.save_pretrained(folder)
    assert not list(folder.glob("*.safetensors"))
    return folder


def omni_config(layers=48, experts=128, hidden=2048, audio=1280, vision=1152, vocabulary=152064):
    """Qwen3-Omni-30B-A3B's config. Smaller numbers give the same tensors, but smaller and fewer."""
    thinker = Qwen3OmniMoeThinkerConfig(
        audio_config=dict(
            d_model=audio, encoder_layers=32 * layers // 48 or 1, encoder_attention_heads=20,
            encoder_ffn_dim=4 * audio, output_dim=hidden, num_mel_bins=128,
            downsample_hidden_size=3 * audio // 8, n_window=50, n_window_infer=800),
        vision_config=dict(
            depth=27, hidden_size=vision, num_heads=16, intermediate_size=vision * 4304 // 1152,
            out_hidden_size=hidden, num_position_embeddings=2304,
            deepstack_visual_indexes=[8, 16, 24]),
        text_config=dict(
            vocab_size=vocabulary, hidden_size=hidden, intermediate_size=3 * hidden // 8,
            num_hidden_layers=layers, num_attention_heads=32, num_key_value_heads=4,
            head_dim=hidden // 16, num_experts=experts, num_experts_per_tok=8,
            moe_intermediate_size=3 * hidden // 8, max_position_embeddings=65536,
            rope_parameters=dict(rope_type="default", rope_theta=1000000.0,
                                 mrope_section=[24, 20, 20], mrope_interleaved=True)),
        audio_token_id=151675, audio_start_token_id=151669, audio_end_token_id=151670,
        image_token_id=151655, video_token_id=151656, vision_start_token_id=151652,
        vision_end_token_id=151653)
    return Qwen3OmniMoeConfig(thinker_config=thinker.to_dict(), enable_audio_output=False,
                              dtype="bfloat16")


def omni_3b_config():
    """Qwen2.5-Omni-3B's thinker."""
    return Qwen2_5OmniThinkerConfig(
        audio_config=dict(
            d_model=1280, encoder_layers=32, encoder_attention_heads=20, encoder_ffn_dim=5120,
            output_dim=2048, num_mel_bins=128, n_window=100),
        vision_config=dict(depth=32, hidden_size=1280, num_heads=16, intermediate_size=3420,
                           out_hidden_size=2048),
        text_config=dict(
            vocab_size=151936, hidden_size=2048, intermediate_size=11008, num_hidden_layers=36,
            num_attention_heads=16, num_key_value_heads=2, max_position_embeddings=32768,
            rope_parameters=dict(rope_type="default", rope_theta=1000000.0,
                                 mrope_section=[16, 24, 24])),
        audio_token_id=151646, dtype="bfloat16")


def audio_7b_config():
    """Qwen2-Audio-7B."""
    return Qwen2AudioConfig(
        audio_config=dict(
            d_model=1280, encoder_layers=32, encoder_attention_heads=20, encoder_ffn_dim=5120,
            num_mel_bins=128),
        text_config=dict(
            model_type="qwen2", vocab_size=156032, hidden_size=4096, intermediate_size=11008,
            num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=32,
            max_position_embeddings=8192),
        audio_token_id=151646, dtype="bfloat16")
