"""Algorithm 1, Modality-Aware Policy Optimization (arXiv 2605.27741), from top to bottom.

    python train.py recipes/toy_late.yaml                       # the built-in toy, on a CPU
    python train.py recipes/mapo_phase1.yaml --model FOLDER --data train.jsonl
    torchrun --nnodes 4 --nproc-per-node 8 train.py recipes/mapo_phase1.yaml --model FOLDER …
    python train.py --help                                 # every field: symbol, default, source

Algorithm 1 shows one prompt and one update per iteration. With Table 5, an iteration is one
generation batch: 96 prompts with 8 completions each, split over 4 optimizer steps of 192
completions. Lines 5 to 12 run once per optimizer step. The 1/G of line 11 and that of Eqs. 2 and 4
is the same one and is applied once.

`run.team` is the group of training processes; `team.leads` is true on rank 0, and in a run without
torchrun.

A run writes into output_dir: config.yaml, metrics.jsonl, completions.jsonl, evaluation.jsonl (see
metrics.py), training.png, and checkpoint/, a folder that transformers and vLLM load. While it
lasts, state/ holds what --resume needs.
"""

import dataclasses
import sys
import time
from collections import defaultdict
from functools import partial
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

from checkpoint import remove_numbered, save_checkpoint
from config import read_config
from data import InputError
from distributed import join, serve
from mapo import audio_attention_mass, differential_entropy, group_advantages, mapo_loss
from metrics import (DISK_FAULTS, StepMetrics, batch_metrics, check_output_dir, held_out_accuracy,
                     log_step, not_finite, open_log, timed, warn_if_nothing_is_learnt)
from plots import plot_training
from pos_gate import load_tagger, pos_gate_batch
from rewards import (CheckerError, accuracy_reward, check_consistency, format_reward,
                     think_is_prefilled, total_reward)
from rollout import (GenerationBatch, Sampling, collate, encode_prompts, gather_rows,
                     micro_batches, rows_of_step, sample)
from run import after_step, open_run, update_server
from server import RolloutError


def train(config):
    """Runs Algorithm 1 and writes output_dir.

    Raises InputError before anything is written; later CheckerError, RolloutError, or
    FloatingPointError when a loss or gradient is not finite.
    """
    with join(config) as team:
        if team.serves:
            serve(team)
            return
        with open_run(config, team) as run, open_log(config, team, run.steps_done) as log:
            if run.eval_questions and not run.steps_done:
                log("evaluation.jsonl", held_out_accuracy(run, 0))
            # Without `disable`, the environment's TQDM_DISABLE decides.
            hidden = {} if team.leads else {"disable": True}
            with tqdm(desc="train", total=config.max_steps, initial=run.steps_done,
                      **hidden) as bar:
                finished = algorithm_1(run, log, bar)
            if not finished:  # stopped by SIGTERM, to be resumed
                return
            if run.eval_questions:
                log("evaluation.jsonl", held_out_accuracy(run, config.max_steps))
        folder = Path(config.output_dir)
        save_checkpoint(run.policy, folder / "checkpoint", team)
        if team.leads:
            plot_training(folder)
            remove_numbered(folder / "state", "step")  # nothing left to resume
            print(f"{folder}: training.png, metrics.jsonl, completions.jsonl, checkpoint/")


# ──────── Algorithm 1 ────────


def algorithm_1(run, log, bar):
    """The numbered lines of Algorithm 1 are in the comments. → False if SIGTERM stopped the run."""
    config = run.config
    batch = GenerationBatch(**run.unfinished) if run.unfinished else None  # of a resumed run
    first = run.steps_done // config.steps_per_generation
    for iteration in range(first, config.iterations):  # line 1
        if batch is None:
            batch = sample_batch(iteration, run)  # lines 2, 3
            verdicts = ask_checker(batch, run)  # of line 4; it answers during the next line
            reference_passes(batch, run)  # π_old, π_ref and π_text-ref on these tokens
            score(batch, verdicts, run)  # line 4
            warn_if_nothing_is_learnt(batch, iteration, run)
        last_step = min((iteration + 1) * config.steps_per_generation, config.max_steps)
        for step in range(run.steps_done + 1, last_step + 1):
            with timed(batch.seconds, "update"):
                metrics, per_token = update(batch, rows_of_step(step, config), step, run)  # 5 to 12
            log_step(step, metrics, per_token, batch, run, log, bar)
            run.schedule.step()
            run.steps_done = step
            if after_step(step, batch, run):
                return False
        batch = None  # the next iteration samples a new one
    return True  # line 13: end for


def sample_batch(iteration, run):
    """Lines 2 and 3: draws questions and samples G completions of each → GenerationBatch.

    With async_rollouts the batch was sampled while the previous one trained, with the weights that
    the previous one started from. π_old of the clipped ratio is still the trainer's own, and
    importance_clip can correct for the difference.
    """
    config, seconds = run.config, defaultdict(float)
    with timed(seconds, "generate"):
        prompts, completions_of, seconds["push"] = run.ahead or start_sampling(iteration, run)
        # Only rank 0 asks a server. Without one, all ranks sample at the same time, with the same
        # seed, because sampling gathers the sharded weights.
        samples_here = run.team.leads or config.rollout == "local"
        completions, version, speed = run.team.broadcast(
            completions_of() if samples_here else None)
        if config.async_rollouts and iteration + 1 < config.iterations:
            run.ahead = start_sampling(iteration + 1, run)
    repeated = [prompt for prompt in prompts for _ in range(config.group_size)]
    return GenerationBatch(repeated, completions, version, speed, seconds)


def start_sampling(iteration, run):
    """→ prompts, a function that returns what `generate` returns, and seconds.

    The seconds are those of giving the server the policy's weights. With async_rollouts the
    sampling starts at once, in another thread, which does nothing but HTTP.
    """
    prompts = encode_prompts(draw(run.questions, iteration, run.config), run)
    seconds = update_server(run, iteration, prompts)
    completions_of = partial(generate, prompts, iteration, run)
    if run.config.async_rollouts and run.team.leads:
        completions_of = run.pool.submit(completions_of).result
    return prompts, completions_of, seconds


def draw(questions, iteration, config):
    """Line 2: the questions x = (x_text, x_audio) of an iteration.

    Epoch e is the e-th random permutation of the data. The position in the run fixes the question,
    so resuming needs no extra state.
    """
    count = config.generation_batch_size // config.group_size
    # (epoch, place in its permutation) of each question
    places = [divmod(p, len(questions)) for p in range(iteration * count, (iteration + 1) * count)]
    orders = {epoch: torch.randperm(len(questions), generator=torch.Generator().manual_seed(
        config.seed * 1_000_003 + epoch)) for epoch in {epoch for epoch, _ in places}}
    return [questions[orders[epoch][place]] for epoch, place in places]


def generate(prompts, iteration, run):
    """Line 3: G completions y ~ π_θ(· | x) per prompt → completions, weight version, tokens/s.

    The sampler is π_θ at the sampling temperature, cut by top-k and top-p (Table 5).
    """
    config, server, started = run.config, run.server, time.perf_counter()
    version = server.version if server else iteration * config.steps_per_generation
    sampling = Sampling(temperature=config.temperature, top_k=config.top_k, top_p=config.top_p,
                        repetition_penalty=config.repetition_penalty,
                        max_new_tokens=config.max_new_tokens)
    completions = sample(run.policy, prompts, config.group_size, sampling,
                         seed=config.seed * 1_000_003 + iteration, server=server,
                         progress=server is not None and not config.async_rollouts)
    tokens = sum(len(c.token_ids) for c in completions)
    return completions, version, tokens / (time.perf_counter() - started)


def ask_checker(batch, run):
    """Asks the consistency checker about all completions, in another thread of rank 0.

    → a function that waits for its verdicts: 1, 0, or None where its reply cannot be read.
    """
    if not run.team.leads:
        return None
    batch.texts = [run.policy.decode(c) for c in batch.completions]
    return run.pool.submit(check_consistency, batch.texts, run.config, run.checker,
                           run.over).result


@torch.no_grad()
def reference_passes(batch, run):
    """Once per iteration: log π_old and log π_ref of the tokens, and H(π_text-ref) (Sec. 3.3).

    Algorithm 1 has no line for these frozen quantities. Plain GRPO needs no π_text-ref.
    """
    config, rows = run.config, range(len(batch.completions))

    def forward(model, text_only=False):  # → log-probs and entropies, each a list of N tensors [T]
        own = {}
        for part, real in micro_batches(rows, batch, run):  # real: see update
            now = model(collate(batch, part, run, text_only), config.temperature)
            for i, row in enumerate(part):
                if real[i]:
                    length = len(batch.completions[row].token_ids)
                    own[row] = now.logp[i, :length].cpu(), now.entropy[i, :length].cpu()
        of_row = {}
        for part in run.team.gather(own):  # of each rank
            of_row |= part
        logps, entropies = zip(*(of_row[row] for row in rows))
        return list(logps), list(entropies)

    run.policy.eval()
    with timed(batch.seconds, "old"):
        batch.old_logp, _ = forward(run.policy)
    with run.reference() as frozen:
        with timed(batch.seconds, "reference"):
            batch.ref_logp, _ = forward(frozen)
        if config.mask or config.eta > 0:
            with timed(batch.seconds, "text_reference"):
                _, batch.text_ref_entropy = forward(frozen, text_only=True)


def score(batch, verdicts, run):
    """Line 4: r = λ_acc r_acc + λ_format r_format + λ_cons r_cons (Eq. 6), then Â (Sec. 2).

    Also the POS gates g_t^pos of Eq. 3, which depend on the tokens alone.
    """
    config, policy, team = run.config, run.policy, run.team
    style, tokenizer = config.format_style, policy.tokenizer
    with timed(batch.seconds, "pos_gate"):
        own = [c.token_ids for c in batch.completions[team.rank::team.size]]
        batch.pos_gates = [None] * len(batch.completions)
        batch.pos_fallbacks = [None] * len(batch.completions)
        for rank, made in enumerate(team.gather(pos_gate_batch(own, tokenizer))):
            batch.pos_gates[rank::team.size], batch.pos_fallbacks[rank::team.size] = made
    with timed(batch.seconds, "reward"):
        if team.leads:
            pairs = list(zip(batch.texts, batch.prompts))
            accuracy = [accuracy_reward(text, p.question.answer, p.question.choices, style)
                        for text, p in pairs]
            form = [format_reward(text, style, think_is_prefilled(tokenizer, p))
                    for text, p in pairs]
            answers = verdicts()
            batch.unreadable = [verdict is None for verdict in answers]
            consistency = [verdict or 0.0 for verdict in answers]
            total = [total_reward(*rewards, config.reward_weights)
                     for rewards in zip(accuracy, form, consistency, strict=True)]
            batch.rewards = {"accuracy": torch.tensor(accuracy), "format": torch.tensor(form),
                             "consistency": torch.tensor(consistency), "total": torch.tensor(total)}
        batch.texts, batch.rewards, batch.unreadable = team.broadcast(
            (batch.texts, batch.rewards, batch.unreadable))
        batch.advantages = group_advantages(batch.rewards["total"], config.group_size,
                                            config.advantage_eps)


def update(batch, rows, step, run):
    """Lines 5–12: one optimizer step on the completions `rows`.

    → metrics, and a dict from row to its (Δh_t, a_t). The loss of a micro-batch is a mean over its
    counted completions. Weighted by their number, the gradients add up to that of the whole step,
    for any micro-batches and number of ranks.
    """
    config, policy, team = run.config, run.policy, run.team
    # transformers checkpoints in training mode only. The modes are equal: dropout is 0.
    policy.train(config.gradient_checkpointing)
    run.optimizer.zero_grad(set_to_none=True)
    measure = config.eta > 0 or step % config.mass_interval == 0 or step == 1
    metrics = StepMetrics(run)
    # Line 5, for the completions of all groups. `real` is False for a row that is repeated so that
    # all ranks run the same number of forwards; it does not count.
    for part, real in micro_batches(rows, batch, run):
        micro = gather_rows(batch, rows, part, real, run)
        now = policy(micro.inputs, config.temperature, config.target_layers if measure else ())
        delta_h, audio_mass = None, None
        if micro.text_ref_entropy is not None:
            delta_h = differential_entropy(micro.text_ref_entropy, now.entropy)  # line 6: Δh_t
        if measure:
            audio_mass = audio_attention_mass(now.head_mass)  # line 7: a_t; ω̃_t, ν̃_t in mapo_loss
        parts = mapo_loss(  # lines 8 and 9, and the sum of line 11
            logp=now.logp, old_logp=micro.old_logp, ref_logp=micro.ref_logp, delta_h=delta_h,
            audio_mass=audio_mass, pos_gate=micro.pos_gate, advantages=micro.advantages,
            accuracy_reward=micro.accuracy_reward, sampler_logp=micro.sampler_logp,
            mask=micro.loss_mask, config=config)
        if not torch.isfinite(parts["loss"]):
            raise not_finite(f"the loss is {parts['loss'].item()}", batch, part)
        # The rest of line 11: weighted, the gradients add up to that of 1/G Σ_g over the step. FSDP
        # averages over the ranks, so the loss is multiplied by their number.
        (parts["loss"] * micro.weight * team.size).backward()
        metrics.add(micro, now, delta_h, audio_mass, parts)
    # line 10: end for
    trained = [p for group in run.optimizer.param_groups for p in group["params"]]
    grad_norm = torch.nn.utils.clip_grad_norm_(trained, config.max_grad_norm)
    grad_norm = grad_norm.full_tensor() if isinstance(grad_norm, DTensor) else grad_norm
    if not torch.isfinite(grad_norm):
        raise not_finite(f"the gradient norm is {grad_norm.item()}", batch, rows)
    run.optimizer.step()  # line 12
    means, per_token = metrics.merged()
    return {**means, **batch_metrics(batch, rows, config), "grad_norm": grad_norm.item()}, per_token


# ──────── the command ────────


def main(arguments):
    transformers_logging.disable_progress_bar()  # its progress bars would break ours
    transformers_logging.set_verbosity_error()  # it reports a broken checkpoint on many lines
    try:
        config = read_config(arguments, "Trains an audio language model with MAPO.")
        try:
            load_tagger()
        except LookupError as error:
            raise InputError(str(error)) from error
        if config.model == "toy":
            check_output_dir(config)
            from toy import QUESTION, prepare  # builds a folder with a model and questions
            if config.data not in QUESTION:
                raise InputError(f"data: with the model `toy`, give {' or '.join(QUESTION)}, "
                                 f"got {config.data!r}")
            world = prepare(Path(config.output_dir).parent / f"toy-world-{config.seed}",
                            config.seed)
            questions = world / config.data
            config = dataclasses.replace(
                config, model=str(world / "model"), data=str(questions / "train.jsonl"),
                eval_data=config.eval_data or str(questions / "test.jsonl"))
        train(config)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    # Rewards or completions are missing, or a loss or gradient is not finite.
    except (CheckerError, RolloutError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        if error.errno not in DISK_FAULTS:
            raise
        print(f"error: {error.filename or config.output_dir}: {error.strerror}; free some space "
              "or check the disk. What was saved is kept, and --resume true continues from the "
              "last state", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
