"""What the frozen audio encoder costs in one iteration: encoded once per clip, or in every forward.

    python bench/tower.py [--device cuda --dtype bfloat16]

A Qwen2-Audio of 171 M random parameters: the encoder of Whisper tiny, the decoder of SmolLM2-135M.
Two questions with a clip of 2 seconds, 4 completions of 24 tokens each, one optimizer step of full
MAPO with gradient checkpointing. The two arms train on the same completions:

    every forward     features in π_old, π_ref, π_text-ref and the update, and a backward that runs
                      through the encoder, because transformers' checkpointing makes its input
                      require gradients (this project until November 2026)
    once per clip     train.py: the encoder runs once, its embeddings serve all forwards
"""

import tempfile
import time
from functools import partial
from pathlib import Path

import measure
import numpy as np
import soundfile
import torch
from transformers import (Qwen2AudioConfig, Qwen2AudioForConditionalGeneration,
                          WhisperFeatureExtractor)

import toy
import train
from checkpoint import make_policy
from config import TrainConfig
from data import Question
from distributed import Team
from rollout import Completion, GenerationBatch
from run import Run, make_optimizer, make_reference, set_trainable

COMPLETION = 24
ENCODER = dict(model_type="qwen2_audio_encoder", d_model=384, encoder_layers=4, num_mel_bins=80,
               encoder_attention_heads=6, encoder_ffn_dim=1536)
DECODER = dict(model_type="llama", hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
               num_attention_heads=9, num_key_value_heads=3, vocab_size=49152)


def main():
    options = measure.options(__doc__, rounds=3).parse_args()
    results = measure.compare(["every forward", "once per clip"],
                              partial(arm, options.device, options.dtype), options.rounds,
                              options.threads, options.device)
    print(f"{measure.machine(options.threads)}, medians of {options.rounds} interleaved rounds\n")
    before = results["every forward"][0]
    measure.table(["", "encode, s", "frozen forwards, s", "update, s", "sum, s", "ratio",
                   "peak, MiB"],
                  [[name, *(f"{value:.2f}" for value in parts.values()),
                    f"{sum(parts.values()):.2f}",
                    f"{sum(before.values()) / sum(parts.values()):.2f}", f"{peak / 2**20:.0f}"]
                   for name, (parts, peak) in results.items()])


def arm(device, dtype, name):
    """prepare(name) of measure.compare"""
    config = TrainConfig(target_layers=[25, 26, 27, 28, 29], generation_batch_size=8, group_size=4,
                         steps_per_generation=1, checker="rule")
    policy, questions = world()
    set_trainable(policy, config)
    policy.to(device, getattr(torch, dtype or "float32"))
    run = Run(config, Team(), policy, make_reference(policy, config), questions, [])
    run.optimizer, _ = make_optimizer(policy, config)
    prompts = [policy.encode(question) for question in questions]
    if name == "every forward":
        policy.base.enable_input_require_grads()
    return partial(iteration, name, prompts, run)


def iteration(name, prompts, run):
    seconds, started = {}, time.perf_counter()

    def lap(part):
        nonlocal started
        if run.policy.device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        seconds[part], started = now - started, now

    if name == "once per clip":
        prompts = run.policy.encode_audio(prompts)
    lap("encode")
    rng = np.random.default_rng(0)
    completions = [Completion(rng.integers(10, 200, COMPLETION).tolist(), [-5.0] * COMPLETION,
                              "length") for _ in range(8)]
    batch = GenerationBatch([p for p in prompts for _ in range(4)], completions, 0, 1.0)
    batch.rewards = dict.fromkeys(("accuracy", "total"), torch.tensor([0.0, 1.0] * 4))
    batch.advantages = torch.tensor([-1.0, 1.0] * 4)
    batch.unreadable = [False] * 8
    batch.pos_gates = [[1] * COMPLETION] * 8
    batch.pos_fallbacks = [0] * 8
    train.reference_passes(batch, run)
    lap("frozen forwards")
    train.update(batch, range(8), 1, run)
    lap("update")
    return seconds


def world():
    """→ policy, two questions"""
    tokenizer = toy.build_tokenizer(toy.toy_texts())
    audio = tokenizer.convert_tokens_to_ids("<|audio_pad|>")
    torch.manual_seed(0)
    network = Qwen2AudioForConditionalGeneration(Qwen2AudioConfig(
        audio_config=ENCODER, text_config=DECODER, audio_token_id=audio, audio_token_index=audio))
    policy = make_policy(network, tokenizer, WhisperFeatureExtractor(feature_size=80))
    folder, questions = Path(tempfile.mkdtemp()), []
    for i in range(2):
        clip = folder / f"{i}.wav"
        samples = np.sin(np.arange(32000) * (0.1 + 0.05 * i)).astype(np.float32)
        soundfile.write(clip, samples, 16000)
        questions.append(Question(f"q{i}", (clip,), "What is it?", ("a", "b"), "a"))
    return policy, questions


if __name__ == "__main__":
    main()
