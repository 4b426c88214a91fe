"""An iteration of Algorithm 1 on the toy: full MAPO against the mask alone against GRPO, on the same completions.

    python bench/step.py [--device cuda --dtype bfloat16]

The toy's world and model (random weights: every completion has 64 tokens), recipes/toy.yaml: 256 completions, 4
optimizer steps, micro-batches of 64. All arms in one process, in turn, medians; sampling is the same for all of them
and is measured once a round. GRPO makes no text-only pass and measures no mass; the POS gate is made by every arm, for
its metrics, and counted here where a loss needs it.
On CUDA, which has not been run, the table adds the floor of the update's products at 989 TFLOP/s (H100, bf16 dense).
"""

import copy
import dataclasses
import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import measure
import numpy as np
import torch
from transformers import WhisperFeatureExtractor

import data
import toy
import train
from model import make_policy
from pos_gate import pos_gate_batch

ARMS = {"GRPO": {"mask": False, "eta": 0.0}, "mask only": {"eta": 0.0}, "full MAPO": {}}
PARTS = ("old", "reference", "text-reference", "POS gate", "4 updates")


def world(folder):
    """The toy's questions and its model, untrained → policy, questions"""
    rows = toy.write_world(folder, 0)
    questions, rng = data.read_questions(folder / "train.jsonl"), np.random.default_rng(0)
    tokenizer = toy.build_tokenizer([f"{data.conversation(q, with_audio=False)[0]['content'][0]['text']} "
                                     f"{toy.demonstration(row, rng)}" for q, row in zip(questions, rows["train"])])
    torch.manual_seed(0)
    return make_policy(toy.build_model(tokenizer), tokenizer,
                       WhisperFeatureExtractor(feature_size=128, **toy.IMAGES)), questions


def main():
    flags = measure.options(__doc__).parse_args()
    torch.set_num_threads(flags.threads)
    root = Path(__file__).resolve().parents[1]
    with tempfile.TemporaryDirectory() as folder:
        policy, questions = world(Path(folder) / "world")
        config = train.read_config([str(root / "recipes" / "toy.yaml")])
        policy.to(flags.device, getattr(torch, flags.dtype or "float32"))
        prompts = [policy.encode(q) for q in train.draw(questions, 0, config)]
    reference = train.make_reference(policy, config)
    start, seconds = copy.deepcopy(policy.state_dict()), defaultdict(list)
    for _ in range(flags.rounds):
        started = time.perf_counter()
        completions, version, speed = train.generate(policy, prompts, config, 0, None)
        seconds["generate"].append(time.perf_counter() - started)
        for arm, changes in ARMS.items():
            policy.load_state_dict(start)
            for part, value in iteration(policy, reference, prompts, completions, dataclasses.replace(
                    config, **changes)).items():
                seconds[arm, part].append(value)
    middle = {key: statistics.median(values) for key, values in seconds.items()}
    print(f"{measure.machine(flags.threads)}, medians of {flags.rounds} interleaved repeats; sampling "
          f"{middle['generate']:.2f} s\n")
    total = {arm: sum(middle[arm, part] for part in PARTS) for arm in ARMS}
    whole = {arm: total[arm] + middle["generate"] for arm in ARMS}
    floor = 6 * sum(p.numel() for p in policy.parameters()) * sum(
        len(p.ids) * config.group_size for p in prompts) / 989e12 * 1e3
    measure.table(["an iteration, s", *PARTS, "without sampling", "/ GRPO", "with sampling", "/ GRPO"]
                  + ["floor of the updates, ms"] * (flags.device == "cuda"),
                  [[arm, *(f"{middle[arm, part]:.2f}" for part in PARTS), f"{total[arm]:.2f}",
                    f"{total[arm] / total['GRPO']:.2f}", f"{whole[arm]:.2f}", f"{whole[arm] / whole['GRPO']:.2f}"]
                   + [f"{floor:.2f}"] * (flags.device == "cuda") for arm in ARMS])


def iteration(policy, reference, prompts, completions, config):
    """Lines 4 to 12 on these completions → part → seconds"""
    spent = defaultdict(float)
    optimizer, _ = train.make_optimizer(policy, config)
    batch = train.GenerationBatch([p for p in prompts for _ in range(config.group_size)], completions, 0, 0.0, 0.0)
    with train.timed(spent, "POS gate"):
        batch.pos_gates, batch.pos_fallbacks = pos_gate_batch([c.token_ids for c in completions], policy.tokenizer)
    if config.eta == 0:
        spent["POS gate"] = 0.0
    draw = torch.Generator().manual_seed(0)
    reward = torch.randint(2, (len(completions),), generator=draw).float()
    batch.rewards = {name: reward for name in ("accuracy", "format", "consistency", "total")}
    batch.advantages = train.group_advantages(reward, config.group_size, config.advantage_eps)
    train.freeze(batch, policy, reference, config, spent)
    spent["text-reference"] = spent.pop("text_reference", 0.0)
    size = config.generation_batch_size // config.steps_per_generation
    with train.timed(spent, "4 updates"):
        for step in range(config.steps_per_generation):
            train.update(policy, optimizer, batch, range(step * size, (step + 1) * size), config, config.eta > 0)
    return spent


if __name__ == "__main__":
    main()
