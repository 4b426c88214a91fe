"""What a run measures, warns of, and writes into output_dir.

metrics.jsonl has one line per optimizer step, completions.jsonl one per completion, and
evaluation.jsonl one per evaluation on the held-out questions. The last sections say which folders
a run may write into, and how files are written so that an interruption loses nothing.
"""

import contextlib
import dataclasses
import errno
import json
import os
import re
import shutil
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import torch
import yaml
from tqdm import tqdm

from checkpoint import remove_numbered, states_in
from data import InputError, json_lines, parse_json, write_whole
from rewards import accuracy_reward, format_reward, think_is_prefilled
from rollout import Sampling, push_weights, sample

FILES = ("metrics.jsonl", "completions.jsonl", "evaluation.jsonl")
FEW = 0.1  # share of the first generation batch in the right format, below which we warn (ours)
FLAT_BATCHES = 3  # generation batches in a row whose advantages are all 0, before a warning (ours)
MASS_METRICS = ("audio_mass_max", "audio_mass_max_late", "audio_mass_mean", "audio_mass_mean_late")


@contextlib.contextmanager
def timed(seconds, name):
    """Adds the wall time of the block to seconds[name]."""
    started = time.perf_counter()
    yield
    if torch.cuda.is_initialized():  # its kernels may still run
        torch.cuda.synchronize()
    seconds[name] += time.perf_counter() - started


# ──────── one optimizer step ────────


class StepMetrics:
    """Weighted means over the micro-batches of an optimizer step, and Δh_t and a_t per token.

    Losses are weighted as in the gradient. The rest are means over tokens: of ρ and ω̃ over those
    that the loss counts, of entropies and a_t over all of them. "late" is the last third of each
    completion.
    """

    def __init__(self, run):
        self.config, self.team = run.config, run.team
        self.sums = defaultdict(lambda: [0.0, 0.0])  # name → [Σ weight·value, Σ weight]
        self.per_token = {}  # row → (Δh_t, a_t) of its tokens, lists or None

    @torch.no_grad()
    def add(self, micro, now, delta_h, audio_mass, parts):
        """micro: rollout.MicroBatch; now: model.Statistics; parts: the result of mapo_loss."""
        for name in ("loss", "policy_loss", "kl_loss", "attention_loss"):
            self.sums[name][0] += parts[name].item() * micro.weight
            self.sums[name][1] = 1.0 / self.team.size  # the weights of all ranks add up to 1
        ratio = (now.logp - micro.old_logp).exp()  # ρ_t
        outside = (ratio - 1) * micro.advantages.sign()[:, None] > self.config.clip_ratio
        self._mean("clip_fraction", outside.float(), micro.loss_mask)  # no gradient from these
        omega = parts["omega"]
        self._mean("omega_mean", omega, micro.loss_mask)
        self._mean("omega_square", omega ** 2, micro.loss_mask)  # 1 when ω̃ ≡ 1
        self._mean("omega_capped", (omega >= self.config.mask_clip).float(), micro.loss_mask)
        self._mean("policy_entropy", now.entropy, micro.token_mask)  # H(π_θ)
        if delta_h is not None:
            self._mean("text_ref_entropy", micro.text_ref_entropy, micro.token_mask)
            self._mean("delta_h_abs", delta_h.abs(), micro.token_mask)
        if audio_mass is not None:
            length = micro.token_mask.sum(dim=1, keepdim=True)  # T  [B, 1]
            position = torch.arange(micro.token_mask.shape[1], device=length.device)  # t − 1
            late = micro.token_mask & (position * 3 >= 2 * length)
            mean_head = now.head_mass.mean(dim=(0, 2))  # over layers and heads  [B, T]
            for name, mass in (("audio_mass_max", audio_mass), ("audio_mass_mean", mean_head)):
                self._mean(name, mass, micro.token_mask)
                self._mean(f"{name}_late", mass, late)
        for i, row in enumerate(micro.rows):
            if micro.real[i]:
                tokens = micro.token_mask[i]
                self.per_token[row] = tuple(None if values is None else values[i][tokens].tolist()
                                            for values in (delta_h, audio_mass))

    def _mean(self, name, values, where):
        self.sums[name][0] += values[where].sum().item()
        self.sums[name][1] += where.sum().item()

    def merged(self):
        """→ the means over all ranks (None where nothing was measured), and row → (Δh_t, a_t)."""
        total, per_token = defaultdict(lambda: [0.0, 0.0]), {}
        for sums, tokens in self.team.gather((dict(self.sums), self.per_token)):
            per_token |= tokens
            for name, (value, weight) in sums.items():
                total[name][0] += value
                total[name][1] += weight
        means = dict.fromkeys(("text_ref_entropy", "delta_h_abs", *MASS_METRICS))
        means |= {name: value / weight if weight else None
                  for name, (value, weight) in total.items()}
        return means, per_token


def batch_metrics(batch, rows, config):
    """Rewards, lengths, POS gates and sampler gap of the completions `rows` of a batch → dict.

    sampler_gap is the mean of |log π_old − log μ| over tokens, μ being the distribution that the
    completions were sampled from. importance_ess is the effective sample size of w = π_old/μ,
    (Σw)² / (n·Σw²), which is 1 when the two are the same. Top-k, top-p and a repetition penalty are
    part of μ.
    """
    rows = list(rows)
    lengths = [len(batch.completions[i].token_ids) for i in rows]
    old_logp = torch.cat([batch.old_logp[i] for i in rows]).cpu()
    sampler_logp = torch.tensor([logp for i in rows for logp in batch.completions[i].logps])
    log_ratio = old_logp - sampler_logp
    w = log_ratio.double().exp()
    total = batch.rewards["total"][rows]
    mean = {f"reward_{name}": values[rows].mean().item()
            for name, values in batch.rewards.items() if name != "total"}
    if config.reward_weights[2] == 0:
        mean["reward_consistency"] = None
    truncated = sum(batch.completions[i].finish_reason == "length" for i in rows)
    return {"reward": total.mean().item(), **mean,
            "reward_std": total.std(unbiased=False).item(),
            "accuracy": mean["reward_accuracy"],
            "checker_unreadable": (sum(batch.unreadable[i] for i in rows)
                                   if config.reward_weights[2] else None),
            "zero_advantage": (batch.advantages[rows].abs() < 1e-6).float().mean().item(),
            "completion_length": sum(lengths) / len(lengths),
            "truncated": truncated / len(rows),
            "pos_coverage": sum(sum(batch.pos_gates[i]) for i in rows) / sum(lengths),
            "pos_fallbacks": sum(batch.pos_fallbacks[i] for i in rows),
            "sampler_gap": log_ratio.abs().mean().item(),
            "importance_ess": (w.sum() ** 2 / (len(w) * (w ** 2).sum())).item()}


def time_metrics(batch):
    """Seconds of each phase → dict. The phases of a generation batch count in its first step."""
    phases = ("generate", "reward", "pos_gate", "old", "reference", "text_reference", "update")
    seconds = {f"seconds_{name}": batch.seconds[name] for name in phases}
    whole = sum(seconds.values())
    sampled_now = batch.seconds["generate"] > 0
    return {**seconds, "seconds_step": whole, "seconds_push": batch.seconds["push"],
            "generation_tokens_per_second": batch.tokens_per_second if sampled_now else None,
            "wait_fraction": batch.seconds["generate"] / whole}  # of the time, spent on sampling


def completion_record(batch, row, step, per_token):
    """A line of completions.jsonl, with Δh_t and a_t per token as the update saw them."""
    completion, (delta_h, audio_mass) = batch.completions[row], per_token

    def rounded(values):
        return None if values is None else [round(v, 4) for v in values]

    return {"step": step, "prompt_id": batch.prompts[row].question.id, "text": batch.texts[row],
            "finish_reason": completion.finish_reason, "weight_version": batch.weight_version,
            "token_ids": completion.token_ids,
            **{f"reward_{name}": values[row].item() for name, values in batch.rewards.items()},
            "advantage": batch.advantages[row].item(), "delta_h": rounded(delta_h),
            "audio_mass": rounded(audio_mass)}


def log_step(step, metrics, per_token, batch, run, log, bar):
    """Writes a step's line of metrics.jsonl and its completions, and moves the progress bar on.

    metrics, per_token: from train.update. log: from open_log. bar: tqdm.
    """
    metrics = {"step": step, "learning_rate": run.schedule.get_last_lr()[0], **metrics,
               "weight_version": batch.weight_version, **time_metrics(batch)}
    batch.seconds.clear()  # what the whole generation batch cost counts in its first step
    log("metrics.jsonl", metrics)
    for row in sorted(per_token):
        log("completions.jsonl", completion_record(batch, row, step, per_token[row]))
    mass = metrics["audio_mass_max"]
    bar.update()
    bar.set_postfix(reward=f"{metrics['reward']:.2f}", accuracy=f"{metrics['accuracy']:.2f}",
                    a_t="–" if mass is None else f"{mass:.3f}",
                    s=f"{metrics['seconds_step']:.1f}")


# ──────── a run that learns nothing ────────


def warn_if_nothing_is_learnt(batch, iteration, run):
    """Prints a warning with one completion, on rank 0, when the run cannot learn.  (ours)

    That is likely when fewer than FEW of the run's first completions earn the format reward, and
    certain when all advantages of FLAT_BATCHES generation batches in a row are 0. After a resume
    the count starts at 0.
    """
    config, rewards = run.config, batch.rewards
    run.flat_batches = run.flat_batches + 1 if (batch.advantages.abs() < 1e-6).all() else 0
    cut = sum(c.finish_reason == "length" for c in batch.completions)
    formed, count = int((rewards["format"] > 0).sum()), len(batch.completions)
    said = []
    if iteration == 0 and config.reward_weights[1] != 0 and formed < FEW * count:
        said.append(f"only {formed} of the first {count} completions earned the format reward; "
                    f"{config.output_dir}/completions.jsonl has them. Likely causes: no "
                    "--instruction describes the format, as the one in recipes/instruct.yaml does; "
                    f"another --format_style than {config.format_style}; --max_new_tokens "
                    f"{config.max_new_tokens} ({cut} were cut off)")
    if run.flat_batches == FLAT_BATCHES:
        said.append(f"all advantages of {FLAT_BATCHES} generation batches in a row were 0: the "
                    "completions of each question earned equal rewards, so nothing was learnt. "
                    "Likely causes: a format that the model does not know; questions too easy or "
                    f"too hard (accuracy {rewards['accuracy'].mean():.2f}); --temperature "
                    f"{config.temperature} is too low")
    text = batch.texts[0]
    shown = repr(text if len(text) <= 400 else f"{text[:200]} … {text[-200:]}")
    for warning in said if run.team.leads else ():
        tqdm.write(f"warning: {warning}. A completion: {shown}", file=sys.stderr)


def not_finite(what, batch, rows):
    """→ a FloatingPointError that names the questions of the completions `rows`."""
    ids = list(dict.fromkeys(batch.prompts[row].question.id for row in rows))
    more = f" and {len(ids) - 8} more" if len(ids) > 8 else ""
    return FloatingPointError(
        f"{what}, on completions of {ids[:8]}{more}; listen to their clips, and try a lower "
        "--learning_rate in a new run (--resume true would repeat this step); the last state and "
        "the logs are kept")


# ──────── the files ────────


@contextlib.contextmanager
def open_log(config, team, done=0):
    """Opens the files in output_dir → log(file name, record), which appends a line of json.

    Writes config.yaml as well, always with `overwrite: false`. Lines after step `done` are dropped:
    a resumed run will repeat them. Metrics also go to accelerate's tracker if report_to asks for
    one. Ranks other than 0 write nothing.
    """
    if not team.leads:
        yield lambda name, record: None
        return
    folder = Path(config.output_dir)
    folder.resolve().mkdir(parents=True, exist_ok=True)
    fields = dataclasses.asdict(config) | {"overwrite": False}
    write_whole(folder / "config.yaml", yaml.safe_dump(fields, sort_keys=False))
    tracker = None
    if config.report_to != "none":
        from accelerate import Accelerator  # slow to import, and only its trackers are used
        tracker = Accelerator(log_with=config.report_to, project_dir=folder)
        tracker.init_trackers(folder.name, config={k: str(v) for k, v in fields.items()})
    with contextlib.ExitStack() as files:
        opened = {}
        for name in FILES:
            cut_log(folder / name, keep=lambda row: row["step"] <= done)
            opened[name] = files.enter_context(open(folder / name, "a", encoding="utf-8"))

        def log(name, record):
            opened[name].write(json.dumps(record, ensure_ascii=False) + "\n")
            opened[name].flush()
            if tracker and name == "metrics.jsonl":
                tracker.log({k: v for k, v in record.items() if v is not None},
                            step=record["step"])

        # Not end_training: it would also tear down the connection between the ranks.
        for each in tracker.trackers if tracker else ():
            files.callback(each.finish)
        yield log


# ──────── the folder ────────


def check_output_dir(config):
    """Can output_dir be written, and is it free for this run? Raises InputError; leaves no file."""
    out, where = Path(config.output_dir), f"output_dir {config.output_dir}"
    # `state` and `checkpoint` may link to another disk, where the checkpoint is renamed.
    for folder in (out, out / "state", Path(os.path.realpath(out / "checkpoint")).parent):
        check_writable(folder, where)
    left = files_of_run(out)
    links = [path for path in (out.iterdir() if out.is_dir() else ())
             if path.is_symlink() and path.is_dir() and WRITTEN.fullmatch(path.name)]
    for link in links:
        target = link.resolve()
        ours = not any(target.iterdir()) or any(
            (target / name).is_file() for name in ("config.json", "adapter_config.json"))
        if os.path.ismount(target) or not ours:
            raise InputError(f"{where}: {link.name} links to {target}, which the run would "
                             "replace, but it is a mount point or holds other files; link to a "
                             "new folder inside")
    replaced = {path.resolve() for path in (out, out / "checkpoint", out / "adapter", *left)}
    for name in ("model", "checker"):
        source = Path(getattr(config, name)).resolve()
        if source.is_dir() and replaced & {source, *source.parents}:
            raise InputError(f"{where} holds the {name} that this run needs; give another folder")
    if left and not config.resume and not config.overwrite:
        raise InputError(f"{where} holds another run ({left[0].relative_to(out)}); --resume true "
                         "continues it, --overwrite true removes it, or give another folder")


def check_writable(folder, where):
    """Raises InputError unless `folder`, or the folder that it will be made in, can be written."""
    try:
        folder = folder.resolve()
        existing = next(f for f in (folder, *folder.parents) if f.exists())
        if not existing.is_dir():
            raise InputError(f"{where}: {existing} is a file; give a folder")
        with tempfile.TemporaryFile(dir=existing) as file:
            file.write(b"whether the disk is full")
    except (OSError, RuntimeError) as error:  # RuntimeError: a link that leads to itself
        raise InputError(f"{where}: cannot be written ({error}); give another folder") from error


# What a run writes into output_dir, beside state/ and the servers' own files.
WRITTEN = re.compile(r"config\.yaml|(metrics|completions|evaluation)\.jsonl|training\.png"
                     r"|\.?(checkpoint|adapter)(-[0-9]+)?(\.writing)?")


def files_of_run(folder):
    """→ paths of what an earlier run has written there: its states, then the rest."""
    found = sorted(folder.iterdir()) if folder.is_dir() else []
    found = [path for path in found if WRITTEN.fullmatch(path.name)]
    return [*states_in(folder / "state").values(),
            *(path for path in found if path.is_file() or path.is_dir() and any(path.iterdir()))]


def remove_run(folder):
    """Removes what an earlier run has written there, and nothing else. Links stay."""
    remove_numbered(folder / "state", "step")
    remove_numbered(folder / "weights", "version")
    for path in files_of_run(folder):
        if path.is_dir():
            shutil.rmtree(path.resolve())
        else:
            path.resolve().unlink()


# ──────── writing so that nothing is lost ────────


def continue_log(path):
    """The rows of a jsonl log that we are about to append to; [] if it does not exist.

    Drops a last line that was cut off (see cut_log).
    """
    cut_log(path)
    return [row for _, row in json_lines(path)] if Path(path).is_file() else []


def cut_log(path, keep=lambda row: True):
    """Shortens a jsonl log, if it exists, to the rows before the first one that `keep` refuses.

    A last line without a line end is dropped too, with a warning: its process was killed while it
    wrote, or the disk was full. Shortening needs no space and leaves the other lines as they are.
    Raises InputError for a line that is not a json object.
    """
    path, end = Path(path), 0
    if not path.is_file():
        return
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            where = f"{path}:{number}"
            if not line.endswith(b"\n"):
                print(f"warning: {where}: the line is cut off and was dropped", file=sys.stderr)
                break
            if line.strip():
                row = parse_json(line, where, "delete the line")
                if not isinstance(row, dict):
                    raise InputError(f"{where}: a {type(row).__name__}, not a json object; delete "
                                     "the line")
                if not keep(row):
                    break
            end += len(line)
    if end < path.stat().st_size:
        os.truncate(path, end)


# Errors of a disk that is full or broken. Any other OSError is a bug of ours.
DISK_FAULTS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)


# ──────── held-out accuracy ────────


def held_out_accuracy(run, step):
    """Greedy accuracy, format and length on eval_data → a record of evaluation.jsonl."""
    config, policy, team, questions = run.config, run.policy, run.team, run.eval_questions
    prompts = [policy.encode(q, config.instruction) for q in questions]
    if config.rollout == "vllm" and team.broadcast(team.leads and run.server.version != step):
        push_weights(run.server, policy, Path(config.output_dir) / "weights", step, team)
    completions = None
    if team.leads or config.rollout == "local":
        greedy = Sampling(temperature=0, max_new_tokens=config.max_new_tokens,
                          repetition_penalty=config.repetition_penalty)
        completions = sample(policy, prompts, 1, greedy, seed=0, progress=team.leads,
                             server=run.server)
    completions = team.broadcast(completions)
    texts = [policy.decode(c) for c in completions]
    accuracy = [accuracy_reward(text, q.answer, q.choices, config.format_style)
                for text, q in zip(texts, questions)]
    form = [format_reward(text, config.format_style, think_is_prefilled(policy.tokenizer, p))
            for text, p in zip(texts, prompts)]
    n = len(questions)
    record = {"step": step, "questions": n, "accuracy": sum(accuracy) / n, "format": sum(form) / n,
              "completion_length": sum(len(c.token_ids) for c in completions) / n}
    if team.leads:
        print(f"step {step}: greedy accuracy {record['accuracy']:.3f}, format "
              f"{record['format']:.3f} on {n} questions")
    return record
