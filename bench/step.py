"""One iteration of Algorithm 1 on the toy: GRPO, the mask alone, and full MAPO.

    python bench/step.py [--device cuda --dtype bfloat16]

The toy's questions and model (random weights, so every completion has 80 tokens) with
recipes/toy_late.yaml: 128 completions, 4 optimizer steps, micro-batches of 32. All arms train on
the same completions, in one process and in turn; the numbers are medians. Sampling is the same for
all arms and is measured once per round. GRPO needs no text-only pass; GRPO and the mask alone need
no audio mass and no POS gate. (train.py makes the gate in every case, for its metrics; here its
time counts for full MAPO only.)
"""

import copy
import dataclasses
import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import measure
import torch
from transformers import WhisperFeatureExtractor

import data
import toy
import train
from checkpoint import make_policy
from config import read_config
from distributed import Team
from mapo import group_advantages
from metrics import timed
from rollout import GenerationBatch, rows_of_step
from run import Run, make_optimizer, make_reference, set_trainable

ARMS = {"GRPO": {"mask": False, "eta": 0.0}, "mask only": {"eta": 0.0}, "full MAPO": {}}
PARTS = ("old", "reference", "text_reference", "pos_gate", "updates")
HEADINGS = ("π_old", "π_ref", "π_text-ref", "POS gate", "4 updates")


def main():
    flags = measure.options(__doc__).parse_args()
    torch.set_num_threads(flags.threads)
    # With η 0, train.py measures a_t every mass_interval steps; here never, see `iteration`.
    config = dataclasses.replace(read_config([str(measure.ROOT / "recipes" / "toy_late.yaml")]),
                                 mass_interval=100)
    with tempfile.TemporaryDirectory() as folder:
        policy, questions = world(Path(folder) / "world")
        set_trainable(policy, config)
        policy.to(flags.device, getattr(torch, flags.dtype or "float32"))
        prompts = [policy.encode(q) for q in train.draw(questions, 0, config)]
    run = Run(config, Team(), policy, make_reference(policy, config), [], [])
    start, seconds = copy.deepcopy(policy.state_dict()), defaultdict(list)
    for _ in range(flags.rounds):
        started = time.perf_counter()
        completions, version, speed = train.generate(prompts, 0, run)
        seconds["sampling"].append(time.perf_counter() - started)
        repeated = [prompt for prompt in prompts for _ in range(config.group_size)]
        for arm, changes in ARMS.items():
            policy.load_state_dict(start)
            run.config = dataclasses.replace(config, **changes)
            batch = GenerationBatch(repeated, completions, version, speed)
            for part, value in iteration(batch, run).items():
                seconds[arm, part].append(value)
    median = {key: statistics.median(values) for key, values in seconds.items()}
    print(f"{measure.machine(flags.threads)}, medians of {flags.rounds} interleaved rounds; "
          f"sampling {median['sampling']:.2f} s\n")
    total = {arm: sum(median[arm, part] for part in PARTS) for arm in ARMS}
    whole = {arm: total[arm] + median["sampling"] for arm in ARMS}
    measure.table(
        ["one iteration, s", *HEADINGS, "sum", "/ GRPO", "with sampling", "/ GRPO"],
        [[arm, *(f"{median[arm, part]:.2f}" for part in PARTS), f"{total[arm]:.2f}",
          f"{total[arm] / total['GRPO']:.2f}", f"{whole[arm]:.2f}",
          f"{whole[arm] / whole['GRPO']:.2f}"] for arm in ARMS])


def world(folder):
    """The toy's late questions and its untrained model → policy, questions"""
    toy.write_questions(folder, 0, "late")
    tokenizer = toy.build_tokenizer(toy.toy_texts())
    torch.manual_seed(0)
    extractor = WhisperFeatureExtractor(feature_size=128, **toy.IMAGES)
    policy = make_policy(toy.build_model(tokenizer), tokenizer, extractor)
    return policy, data.read_questions(folder / "train.jsonl")


def iteration(batch, run):
    """Lines 4 to 12 for the completions of a batch → part → seconds"""
    config, seconds = run.config, batch.seconds
    run.optimizer, _ = make_optimizer(run.policy, config)
    train.score(batch, train.ask_checker(batch, run), run)
    if config.eta == 0:
        seconds["pos_gate"] = 0.0
    # An untrained model earns no rewards, and without rewards there is no gradient.
    reward = torch.randint(2, (len(batch.completions),),
                           generator=torch.Generator().manual_seed(0)).float()
    batch.rewards = dict.fromkeys(batch.rewards, reward)
    batch.advantages = group_advantages(reward, config.group_size, config.advantage_eps)
    train.reference_passes(batch, run)
    with timed(seconds, "updates"):
        # The steps of the second iteration: the first step of a run always measures a_t.
        for step in range(config.steps_per_generation + 1, 2 * config.steps_per_generation + 1):
            train.update(batch, rows_of_step(step, config), step, run)
    return {part: seconds[part] for part in PARTS}


if __name__ == "__main__":
    main()
