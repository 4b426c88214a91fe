"""Evaluation: the four benchmarks, local evidence masking (Eq. 17), and the paper's diagnostics as tables and pictures.

    python evaluate.py mmau --model DIR --data mmau-test-mini.json --out DIR        # mmar, mmsu, mmau-pro: Tables 2, 3
    python evaluate.py score mmau --predictions FILE --data mmau-test-mini.json     # scoring alone
    python evaluate.py trace --model DIR --data FILE --out DIR                      # per token: Figs. 2 and 6
    python evaluate.py pos --trace DIR/trace.jsonl --out DIR                        # Fig. 7
    python evaluate.py acs --model DIR --data FILE --out DIR                        # Eq. 17: Table 4
    python evaluate.py curves RUN [RUN ...] --out DIR                               # Figs. 3, 4, 5 and 8
    python evaluate.py contamination --train FILE --benchmark mmau --data FILE      # what both hold

`--model` and RUN may be given several times where models are compared, each as DIR or NAME=DIR. The scorers themselves
are in scoring.py. `python evaluate.py trace --help`, and so on, says the rest.
"""

import argparse
import contextlib
import hashlib
import json
import os
import sys
import tempfile
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import soundfile
import torch
from matplotlib.figure import Figure
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from tqdm.contrib.concurrent import thread_map
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.utils import logging as transformers_logging

from data import SAMPLE_RATE, InputError, Question, load_audio, read_avqa, read_questions
from mapo import MapoConfig, audio_attention_mass, differential_entropy, inverse_relevance_weight, relevance_mask
from model import MASS_ROWS, AudioMass, audio_token_count, check_policy, load_policy, positions
from pos_gate import POS_TARGETS, load_tagger, pos_gate_batch, token_tags
from rewards import accuracy_reward, extract_answer
from rollout import RolloutError, Server, sample
from scoring import (JUDGE_AT_ONCE, JudgeError, ask_judge, load_embedder, map_to_option, markdown_table,
                     read_benchmark, score)
from scoring import follows_instruction, mmsu_letter, parse_judge, string_match  # for who looks for them here

BENCHMARKS = ("mmau", "mmar", "mmsu", "mmau-pro")
RATIOS = (0.05, 0.10, 0.30, 0.50)  # of the audio that is masked (paper, Table 4)
RANDOM_SEEDS = 5


# ───────────────────────────────────────────────────── the benchmarks ─────────────────────────────────────────────────


def benchmark(options):
    """Generates, extracts, maps to an option and scores → out/{completions.jsonl, predictions.jsonl, report.json,
    table.md}. Questions that completions.jsonl has are not asked again: an interrupted evaluation goes on.

    A question whose audio cannot be read is reported by its id, counts as wrong, and is tried again by the next call.
    """
    items = read_benchmark(options.command, options.data, options.audio_root)
    judge, embed = open_judge(options), load_embedder(options.embedder) if options.embedder else None
    out, unreadable = Path(options.out), {}
    settings = claim(out, options, "completions.jsonl", (
        "command", "model", "data", "engine", "temperature", "seed", "max_new_tokens", "instruction", "dtype"))
    rows = {row["id"]: row for row in finished_rows(out / "completions.jsonl")}
    missing = [item for item in items if item.id not in rows]
    if missing:
        with open_engine(options, max(len(item.audio) for item in items)) as (policy, server), \
                open(out / "completions.jsonl", "a", encoding="utf-8") as file:
            for some in batches(missing, options, options.command):
                made, broken = complete(policy, server, some, options)
                unreadable |= broken
                for row in made:
                    rows[row["id"]] = row
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
                file.flush()
    if not rows:
        first_error = next(iter(unreadable.values()))
        raise InputError(f"{options.data}: not one question could be asked; of the first: {first_error}")
    answers = {i: row["text"].strip() if options.format_style == "none"
               else extract_answer(row["text"], options.format_style) or "" for i, row in rows.items()}
    closed = [item for item in items if item.kind == "closed" and item.id in answers]
    mapped = thread_map(lambda item: map_to_option(answers[item.id], item.choices, judge), closed,
                        max_workers=JUDGE_AT_ONCE, desc="map")
    predictions = {item.id: option for item, option in zip(closed, mapped)}
    unnamed = [i for i, option in predictions.items() if answers[i] and not option]
    if options.command == "mmau-pro":  # its scorers take free text, and would give an empty one points: left out
        predictions = {i: predictions.get(i) or answer for i, answer in answers.items() if answer}
    with open(out / "predictions.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps({"id": i, "prediction": p, "answer": answers.get(i, "")}, ensure_ascii=False) + "\n"
                        for i, p in predictions.items())
    for name, error in unreadable.items():
        print(f"{name}: counted wrong: {error}")
    about = {"settings": settings, "judge": options.judge and options.judge_model, "unreadable": unreadable,
             "truncated": sum(row["finish_reason"] == "length" for row in rows.values()),
             "without an answer": sum(not answer for answer in answers.values()),
             "answers that name no option": len(unnamed)}
    report = score(options.command, items, predictions, judge=judge, embed=embed, answers=answers)
    write_report(out, options.command, report, about, options.model)


def score_only(options):
    """`score`: {"id", "prediction"} lines and the benchmark's file → the report. Where lines have the "answer" too that
    the prediction was made from, as ours do, MMSU's letters are read from it."""
    items = read_benchmark(options.benchmark, options.data, options.audio_root)
    predictions, answers = {}, {}
    for number, row in numbered_rows(options.predictions):
        if not isinstance(row.get("id"), str) or not isinstance(row.get("prediction"), str):
            raise InputError(f"{options.predictions}:{number}: give {{\"id\": …, \"prediction\": …}}, two strings")
        if not isinstance(row.get("answer", ""), str):
            raise InputError(f"{options.predictions}:{number}: field 'answer' is {row['answer']!r}; give a string, or "
                             "leave it out")
        if row["id"] in predictions:
            raise InputError(f"{options.predictions}:{number}: a second prediction for {row['id']!r}; keep one")
        predictions[row["id"]] = row["prediction"]
        answers[row["id"]] = row.get("answer", row["prediction"])
    report = score(options.benchmark, items, predictions, judge=open_judge(options), answers=answers,
                   embed=load_embedder(options.embedder) if options.embedder else None)
    if options.out:
        Path(options.out).mkdir(parents=True, exist_ok=True)
        write_report(Path(options.out), options.benchmark, report, {}, options.predictions)
    else:
        print(json.dumps(report, indent=1, ensure_ascii=False))
        print(markdown_table(options.benchmark, report, Path(options.predictions).name))


def complete(policy, server, items, options):
    """Benchmark items → rows {"id", "text", "tokens", "finish_reason"}, and id → error of those that can't be asked."""
    broken, prompts = {}, []
    for item in items:
        try:
            prompts.append(policy.encode(question_of(item), options.instruction))
        except InputError as error:
            broken[item.id] = str(error)
    completions = sample(policy, prompts, 1, temperature=options.temperature, max_new_tokens=options.max_new_tokens,
                         seed=options.seed, server=server)
    return [{"id": prompt.question.id, "text": policy.text(completion), "tokens": len(completion.token_ids),
             "finish_reason": completion.finish_reason} for prompt, completion in zip(prompts, completions)], broken


def claim(out, options, file, names):
    """Makes the folder → the settings that its `file` is made with. Raises InputError where that was made with others:
    rows of two evaluations must not mix."""
    settings = {name: getattr(options, name) for name in names}
    known = out / "settings.json"
    if (out / file).is_file() and (not known.is_file() or json.loads(known.read_text()) != settings):
        raise InputError(f"{out / file}: made by another evaluation; give another --out")
    out.mkdir(parents=True, exist_ok=True)
    known.write_text(json.dumps(settings, indent=1, ensure_ascii=False))
    return settings


def finished_rows(path):
    """The rows of a jsonl file that is being written. A last line that was cut off with the process is removed."""
    if not path.is_file():
        return []
    data = path.read_bytes()
    whole = data[:data.rfind(b"\n") + 1]
    if whole != data:
        path.write_bytes(whole)
    return [json.loads(line) for line in whole.split(b"\n")[:-1]]  # not splitlines: text may hold other line ends


def write_report(out, name, report, about, label):
    (out / "report.json").write_text(json.dumps({**report, **about}, indent=1, ensure_ascii=False), encoding="utf-8")
    table = markdown_table(name, report, Path(label).name)
    (out / "table.md").write_text(table, encoding="utf-8")
    print(table)


def open_judge(options):
    """→ function prompt → reply, or None where no judge was given."""
    if not options.judge:
        return None
    return lambda prompt: ask_judge(options.judge, options.judge_model, prompt, os.environ.get("JUDGE_API_KEY"))


@contextlib.contextmanager
def open_engine(options, clips):
    """→ (policy, server or None): the model in this process, or its tokenizer and a vLLM server of it."""
    if options.engine == "local":
        yield load(options.model, options), None
        return
    python = Path(__file__).resolve().parent / options.vllm_python
    if not python.is_file():
        raise InputError(f"vllm_python {python}: no such interpreter; `make vllm` makes the environment of vLLM")
    policy = load_policy(options.model, meta=True)
    with Server(Path(options.model).resolve(), python=python, log=Path(options.out) / "vllm.log",
                flags=options.vllm_flags, clips=clips) as server:
        yield policy, server


# ──────────────────────────────────────────────── per token: Figs. 2 and 6 ────────────────────────────────────────────


@torch.no_grad()
def trace(policy, reference, prompts, completions, temperature, layers, config=MapoConfig()):
    """Everything that Eqs. 1 and 3 see at each token of given completions → a dict of lists a prompt.

    completions: lists of token ids, one a prompt; layers: L_tgt; config: τ_base and C_mask. Nats; a_t is a share.
    """
    batch = policy.collate(prompts, completions)
    mask = batch.completion_mask.to(policy.device)  # [B, T]
    now = policy(batch, temperature, layers)
    text_ref = reference(reference.collate(prompts, completions, text_only=True), temperature)
    gates, _ = pos_gate_batch(completions, policy.tokenizer)
    gate = pad_sequence([torch.tensor(g) for g in gates], batch_first=True).to(policy.device)  # [B, T]
    delta_h = differential_entropy(text_ref.entropy.to(policy.device), now.entropy)
    columns = {"logp": now.logp, "policy_entropy": now.entropy, "text_ref_entropy": text_ref.entropy,
               "delta_h": delta_h, "audio_mass_max": audio_attention_mass(now.head_mass),
               "audio_mass_mean": now.head_mass.mean(dim=(0, 2)),  # over layers and heads
               "omega": relevance_mask(delta_h, mask, config.tau_base, config.mask_clip),
               "nu": inverse_relevance_weight(delta_h, gate, mask, config.tau_base, config.mask_clip)}
    return [{"id": prompt.question.id, "prompt_ids": prompt.ids, "text_prompt_ids": prompt.text_ids,
             "token_ids": list(ids), "tokens": [policy.tokenizer.decode([i]) for i in ids],
             **{name: values[row, :len(ids)].tolist() for name, values in columns.items()}, "pos_gate": gates[row],
             "pos_tag": token_tags(ids, policy.tokenizer)}
            for row, (prompt, ids) in enumerate(zip(prompts, completions))]


def trace_command(options):
    """`trace`: out/trace.jsonl, a row a question and model, and out/trace-<id>.png, the models one above the other."""
    questions = questions_of(options)
    given = read_completions(options.completions, questions) if options.completions else None
    questions = [q for q in questions if given is None or q.id in given]
    if not questions:
        raise InputError(f"{options.data}: no question to trace; see --limit and --completions")
    if len(options.model) > 1 and not options.reference:
        raise InputError("trace: several models are compared against one π_text-ref; give --reference DIR")
    load_tagger()
    out, traced, policy = Path(options.out), defaultdict(list), None
    reference = load(options.reference, options) if options.reference else None
    rows = []
    for label, folder in options.model.items():
        del policy  # two may not fit
        policy = load(folder, options)
        layers = target_layers(policy, options)
        check_policy(policy, questions, layers)
        for some in batches(questions, options, f"trace {label}"):
            prompts = [policy.encode(q, options.instruction) for q in some]
            completions = [given[q.id] for q in some] if given else [
                c.token_ids for c in sample(policy, prompts, 1, temperature=0, max_new_tokens=options.max_new_tokens,
                                            seed=0)]
            for row in trace(policy, reference or policy, prompts, completions, options.temperature, layers):
                rows.append({"model": label, **row})
                traced[row["id"]].append(rows[-1])
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "trace.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    for number, (question, panels) in enumerate(traced.items()):
        name = "".join(c if c.isalnum() or c in "-." else "_" for c in question)
        draw_trace(panels, out / f"trace-{number}-{name}.png")
    print(f"{out}: trace.jsonl, {len(rows)} rows; {len(traced)} pictures")


def read_completions(path, questions):
    """{"id", "token_ids"} lines → id → token ids. Raises InputError for an id that is not in the data."""
    known, given = {q.id for q in questions}, {}
    for number, row in numbered_rows(path):
        ids = row.get("token_ids")
        if row.get("id") not in known:
            raise InputError(f"{path}:{number}: id {row.get('id')!r} is not among the questions of --data")
        if not isinstance(ids, list) or not ids or not all(isinstance(i, int) and i >= 0 for i in ids):
            raise InputError(f"{path}:{number}: field 'token_ids' must be a list of token ids, at least one")
        given[row["id"]] = ids
    return given


def draw_trace(panels, path):
    """In the manner of Figs. 2 and 6: H(π_text-ref) (Fig. 2a) in grey behind the bars of Δh_t (Fig. 2b), a_t of the
    largest head (solid) and mean over heads (dashed) as lines."""
    longest = max(len(row["token_ids"]) for row in panels)
    named = longest <= 150  # more tokens than that cannot be read under an axis
    figure = Figure(figsize=(min(30, max(7, 0.21 * longest + 1.5)), 3.1 * len(panels) + 0.5), layout="constrained")
    axes = figure.subplots(len(panels), 1, squeeze=False, sharey=True)[:, 0]
    top, marker = max(max(row["audio_mass_max"]) for row in panels), "." if longest < 5 else None
    for axis, row in zip(axes, panels):
        x = range(1, len(row["token_ids"]) + 1)
        prior = axis.bar(x, row["text_ref_entropy"], color="0.85", width=0.8, label="$H(\\pi_{text-ref})$")
        bars = axis.bar(x, row["delta_h"], color="tab:blue", alpha=0.55, width=0.5, label="$\\Delta h_t$")
        axis.axhline(0, color="black", linewidth=0.6)
        mass = axis.twinx()
        high, = mass.plot(x, row["audio_mass_max"], marker=marker, color="tab:orange", label="$a_t$, max head")
        mean, = mass.plot(x, row["audio_mass_mean"], "--", marker=marker, color="tab:orange", label="mean head")
        mass.set(ylim=(0, 1.08 * top or 1), ylabel="audio attention mass\n(share of attention)")
        axis.set(title=f"{row['model']}: question {row['id']}", ylabel="$H$, $\\Delta h_t$ (nats)",
                 xlim=(0, longest + 1), xlabel="completion token" if axis is axes[-1] else "")
        axis.set_zorder(mass.get_zorder() - 1)
        if named:
            for text in axis.set_xticks(list(x), [printable(t) for t in row["tokens"]], rotation=90,
                                        fontsize=8):
                text.label1.set_parse_math(False)  # a token may hold a $
    shown = [prior, bars, high, mean]
    figure.legend(shown, [h.get_label() for h in shown], loc="outside upper right", ncols=4, fontsize=8)
    figure.savefig(path, dpi=110)


def printable(token):
    """A token as a label: line ends and the like as escapes."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in token)


# ─────────────────────────────────────────────── by part of speech: Fig. 7 ────────────────────────────────────────────


def pos_command(options):
    """`pos`: mean H(π_text-ref) and Δh by universal tag of the tokens of a trace → out/pos.md, out/pos.png."""
    sums = defaultdict(lambda: defaultdict(lambda: [0, 0.0, 0.0]))  # model → tag → [tokens, Σ H, Σ Δh]
    for _, row in numbered_rows(options.trace):
        for tag, entropy, delta_h in zip(row["pos_tag"] or [None] * len(row["token_ids"]), row["text_ref_entropy"],
                                         row["delta_h"]):
            total = sums[row["model"]][tag or "no word"]
            for i, value in enumerate((1, entropy, delta_h)):
                total[i] += value
    tags = sorted({tag for of in sums.values() for tag in of},  # by H(π_text-ref), over all models
                  key=lambda tag: -sum(of[tag][1] for of in sums.values() if tag in of)
                  / sum(of[tag][0] for of in sums.values() if tag in of))
    lines = ["| model | tag | gate | tokens | H(π_text-ref), nats | Δh, nats |", "|---|---|---|---|---|---|"]
    means = {model: {tag: (of[tag][0], of[tag][1] / of[tag][0], of[tag][2] / of[tag][0]) for tag in tags if tag in of}
             for model, of in sums.items()}
    lines += [f"| {model} | {tag} | {int(tag in POS_TARGETS)} | {n} | {entropy:.3f} | {delta_h:.3f} |"
              for model, of in means.items() for tag in tags if tag in of for n, entropy, delta_h in [of[tag]]]
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "pos.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))

    figure = Figure(figsize=(max(7, 0.9 * len(tags) + 2), 5.6), layout="constrained")
    axes = figure.subplots(2, 1, sharex=True)
    width = 0.8 / len(means)
    for number, (model, of) in enumerate(means.items()):
        x = [tags.index(tag) + (number - (len(means) - 1) / 2) * width for tag in of]
        for axis, part in zip(axes, (1, 2)):
            axis.bar(x, [of[tag][part] for tag in of], width=width, label=model)
    axes[0].set(title="Uncertainty of the language prior", ylabel="H(π_text-ref) (nats)")
    axes[1].set(title="Cross-modal differential entropy", ylabel="Δh (nats)",
                xlabel="universal tag; * is in the gate of Appendix E")
    axes[1].set_xticks(range(len(tags)), [f"{tag}{' *' if tag in POS_TARGETS else ''}" for tag in tags], rotation=30)
    for axis in axes:
        axis.grid(axis="y", alpha=0.3)
        axis.axhline(0, color="black", linewidth=0.6)
    if len(means) > 1:
        axes[0].legend(fontsize=8)
    figure.savefig(out / "pos.png", dpi=110)


# ──────────────────────────────────────── local evidence masking: Eq. 17, Table 4 ─────────────────────────────────────


def attention_causal_selectivity(random_accuracy, top_accuracy):
    """ACS(r) = Acc_rand(r) − Acc_top(r).  (Eq. 17)   Positive: what is attended to matters more than the average."""
    return random_accuracy - top_accuracy


def audio_token_spans(samples, frames, config):
    """The span of the waveform that each audio token stands for → [(start, end)] in samples at 16 kHz.

    samples: length of the clip; frames: its mel frames (10 ms, 160 samples each). Qwen3-Omni makes 13 tokens of each
    second, of 8 frames each but the last of 4; the others make one of 4 frames, the last of what is left. The spans
    follow one another without gap or overlap and cover the clip; a token of padding alone has an empty one.
    """
    count = audio_token_count(frames, config)
    if config.model_type.startswith("qwen3_omni_moe"):
        first_frames = [100 * (j // 13) + 8 * (j % 13) for j in range(count)]
    else:
        first_frames = [4 * j for j in range(count)]
    edges = [min(160 * frame, samples) for frame in first_frames] + [samples]
    return list(zip(edges, edges[1:]))


def select_tokens(spans, order, ratio):
    """Whole audio tokens, taken in `order` until their duration reaches `ratio` of the whole, at least one → list."""
    wanted, chosen, duration = ratio * sum(end - start for start, end in spans), [], 0
    for token in order:
        start, end = spans[token]
        if start == end:  # padding: nothing to mask
            continue
        chosen.append(token)
        duration += end - start
        if duration >= wanted:
            break
    return chosen


@torch.no_grad()
def audio_token_scores(policy, prompts, completions, layers):
    """Attention that each audio token gets → a list [audio tokens] a prompt, over all its clips.

    s_j = mean over generated tokens y_t of 1/|L_tgt| · Σ_l max_h α_{t,j}⁽ˡʰ⁾, read at the rows that predict y_t, those
    of a_t.  (Sec. C.4 "aggregate the token-to-audio attention map during generation"; the aggregation is ours)
    """
    batch = policy.collate(prompts, completions).to(policy.device)
    completion = batch.completion_mask.shape[1]  # T
    first = batch.input_ids.shape[1] - completion - 1  # the row that predicts y_1
    rows = torch.nn.functional.pad(batch.completion_mask, (0, 1))  # of first, …, the last row  [B, T+1]
    decoder = policy.base.config.get_text_config()
    before = decoder._attn_implementation
    policy.base.set_attn_implementation({"text_config": "audio_scores"})
    try:
        output = policy.base.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False,
                                   position_ids=positions(batch.attention_mask), **batch.audio, output_attentions=True,
                                   score_layers=tuple(layers), score_first_row=first, score_rows=rows)
    finally:
        policy.base.set_attn_implementation({"text_config": before})
    scores = torch.stack(output.attentions).mean(dim=0)  # [L, B, S] → [B, S]
    return [s[ids == policy.audio_token_id].tolist() for s, ids in zip(scores, batch.input_ids)]


def attention_with_scores(module, query, key, value, attention_mask, score_layers=(), score_first_row=0,
                          score_rows=None, **kwargs):
    """transformers' fused attention and, in the layers of L_tgt, mean_t max_h α_{t,j} [B, S] in the weights' place."""
    output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    if module.layer_idx not in score_layers:
        return output, None
    rows = query[:, :, score_first_row:]  # [B, H, T+1, d]
    if attention_mask is None:  # nothing padded: the kernel was told "causal", and nobody built the mask
        total = key.shape[2]
        attention_mask = torch.ones(total, total, dtype=torch.bool, device=key.device).tril()[None, None]
    allowed, scores = attention_mask[:, :, score_first_row:], 0
    at_once = MASS_ROWS[query.device.type]
    for start in range(0, rows.shape[2], at_once):
        some = slice(start, start + at_once)
        alpha, _, _ = AudioMass.weights(rows[:, :, some], key, allowed[:, :, some], kwargs["scaling"])
        strongest = alpha.flatten(1, 2).amax(dim=1)  # [B, Hkv, H/Hkv, rows, S] → [B, rows, S]
        scores = scores + (strongest * score_rows[:, some, None]).sum(dim=1)
    return output, scores / score_rows.sum(dim=1, keepdim=True)


AttentionInterface.register("audio_scores", attention_with_scores)
AttentionMaskInterface.register("audio_scores", sdpa_mask)


def mask_variants(spans, scores, name):
    """(kind, seed, ratio) → audio tokens to mask: the most attended, the least attended, and random ones. Ties by
    index. Random orders come from the question's id, so that two models get the same."""
    tokens = range(len(spans))
    orders = {("top", 0): sorted(tokens, key=lambda j: -scores[j]), ("low", 0): sorted(tokens, key=lambda j: scores[j])}
    digest = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8])
    for seed in range(RANDOM_SEEDS):
        orders["random", seed] = np.random.default_rng([seed, digest]).permutation(len(spans)).tolist()
    return {(kind, seed, ratio): select_tokens(spans, order, ratio)
            for (kind, seed), order in orders.items() for ratio in RATIOS}


def evidence_masking(policy, questions, options, layers, label):
    """Greedy answers to whole and to masked clips → yields a row a question: {"id", "model", "right", "seconds",
    "masked": [{"kind", "seed", "ratio", "seconds", "right"}]}."""
    def answers(questions):
        prompts = [policy.encode(q, options.instruction) for q in questions]
        completions = sample(policy, prompts, 1, temperature=0, max_new_tokens=options.max_new_tokens, seed=0)
        return prompts, completions, [
            bool(accuracy_reward(policy.text(c), q.answer, q.choices, options.format_style))
            for c, q in zip(completions, questions)]

    for some in batches(questions, options, f"acs {label}"):
        prompts, completions, right = answers(some)
        scores = audio_token_scores(policy, prompts, [c.token_ids for c in completions], layers)
        with tempfile.TemporaryDirectory() as folder:
            for question, prompt, whole, attention in zip(some, prompts, right, scores):
                clips = [load_audio(path) for path in question.audio]
                spans, edges = [], [0]  # of the clips joined, so that one order runs over all of them
                for clip, frames in zip(clips, prompt.frames):
                    spans += [(edges[-1] + start, edges[-1] + end)
                              for start, end in audio_token_spans(len(clip), frames, policy.base.config)]
                    edges.append(edges[-1] + len(clip))
                variants, masked, seconds = mask_variants(spans, attention, question.id), [], []
                for number, chosen in enumerate(variants.values()):
                    joined = np.concatenate(clips)
                    for token in chosen:
                        joined[slice(*spans[token])] = 0
                    paths = [Path(folder) / f"{number}-{i}.wav" for i in range(len(clips))]
                    for path, start, end in zip(paths, edges, edges[1:]):
                        soundfile.write(path, joined[start:end], SAMPLE_RATE, subtype="FLOAT")
                    masked.append(replace(question, audio=tuple(paths)))
                    seconds.append(sum(spans[t][1] - spans[t][0] for t in chosen) / SAMPLE_RATE)
                _, _, outcome = answers(masked)
                yield {"id": question.id, "model": label, "right": whole, "seconds": edges[-1] / SAMPLE_RATE,
                       "masked": [{"kind": kind, "seed": seed, "ratio": ratio, "seconds": s, "right": r}
                                  for (kind, seed, ratio), s, r in zip(variants, seconds, outcome)]}


def acs_command(options):
    """`acs`: out/acs.jsonl, a row a question and model, out/acs.md (Table 4) and out/acs.png. An answer counts by the
    accuracy reward of training. Interrupted, it goes on with the next questions."""
    questions = questions_of(options)
    out, policy = Path(options.out), None
    claim(out, options, "acs.jsonl", ("model", "data", "benchmark", "target_layers", "max_new_tokens", "instruction",
                                      "format_style", "dtype"))
    rows = finished_rows(out / "acs.jsonl")
    done = {(row["model"], row["id"]) for row in rows}
    with open(out / "acs.jsonl", "a", encoding="utf-8") as file:
        for label, folder in options.model.items():
            missing = [q for q in questions if (label, q.id) not in done]
            if not missing:
                continue
            del policy  # two may not fit
            policy = load(folder, options)
            layers = target_layers(policy, options)
            check_policy(policy, missing, layers)
            for row in evidence_masking(policy, missing, options, layers, label):
                rows.append(row)
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                file.flush()
    table = acs_table(rows)
    (out / "acs.md").write_text(table, encoding="utf-8")
    draw_acs(rows, out / "acs.png")
    print(table)


def acs_accuracies(rows, model):
    """→ accuracy on whole clips; ratio → {kind: accuracy}, {kind: mean masked seconds}. Random: mean over its seeds."""
    own = [row for row in rows if row["model"] == model]
    by_ratio = {}
    for ratio in sorted({m["ratio"] for row in own for m in row["masked"]}):
        of = {kind: [m for row in own for m in row["masked"] if (m["kind"], m["ratio"]) == (kind, ratio)]
              for kind in ("top", "random", "low")}
        by_ratio[ratio] = ({kind: float(np.mean([m["right"] for m in of[kind]])) for kind in of},
                           {kind: float(np.mean([m["seconds"] for m in of[kind]])) for kind in of})
    return float(np.mean([row["right"] for row in own])), by_ratio


def acs_table(rows):
    """Table 4, and beside it the accuracy without a mask and the seconds that were masked."""
    lines = ["| model | no mask | mask ratio | top-mask acc. | random-mask acc. | low-mask acc. | ACS | masked, s: top "
             "/ random / low |", "|---|---|---|---|---|---|---|---|"]
    for model in dict.fromkeys(row["model"] for row in rows):
        whole, by_ratio = acs_accuracies(rows, model)
        for ratio, (accuracy, seconds) in by_ratio.items():
            acs = attention_causal_selectivity(accuracy["random"], accuracy["top"])
            lines.append(f"| {model} | {whole:.3f} | {ratio:.0%} | {accuracy['top']:.3f} | {accuracy['random']:.3f} | "
                         f"{accuracy['low']:.3f} | {acs:+.3f} | " + " / ".join(f"{s:.2f}" for s in seconds.values())
                         + " |")
    return "\n".join(lines) + "\n"


def draw_acs(rows, path):
    """Accuracy against the masked share, a panel a model."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    figure = Figure(figsize=(4.2 * len(models) + 0.8, 3.8), layout="constrained")
    axes = figure.subplots(1, len(models), sharey=True, squeeze=False)[0]
    for axis, model in zip(axes, models):
        whole, by_ratio = acs_accuracies(rows, model)
        x = [0, *(100 * ratio for ratio in by_ratio)]
        for kind, color in (("low", "tab:green"), ("random", "tab:gray"), ("top", "tab:red")):
            axis.plot(x, [whole, *(accuracy[kind] for accuracy, _ in by_ratio.values())], "o-", color=color,
                      markersize=4, label=f"{kind} attention" if kind != "random" else f"random, {RANDOM_SEEDS} seeds")
        axis.set(title=model, xlabel="masked audio (% of its duration)")
        axis.grid(alpha=0.3)
    axes[0].set(ylabel="accuracy (share right)", ylim=(0, 1.02))
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=9)
    figure.savefig(path, dpi=110)


# ────────────────────────────────────────── training curves: Figs. 3, 4, 5 and 8 ──────────────────────────────────────


def curves_command(options):
    """`curves`: attention loss (Fig. 3), accuracy and completion length (Fig. 4), audio attention mass (Fig. 5), and
    accuracy and words of thinking (Fig. 8) of several runs, in one picture each."""
    runs = {}
    for label, folder in options.run.items():
        metrics = [row for _, row in numbered_rows(Path(folder) / "metrics.jsonl")]
        words = defaultdict(list)
        for _, row in numbered_rows(Path(folder) / "completions.jsonl"):
            words[row["step"]].append(thinking_words(row["text"], options.format_style))
        for m in metrics:
            m["words"] = float(np.mean(words[m["step"]])) if words[m["step"]] else None
        runs[label] = metrics
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    figures = {"fig3_attention_loss": [("attention_loss", "Attention loss $L_{attn}$", "loss (Eq. 4)")],
               "fig4_accuracy_length": [("accuracy", "Reward accuracy", "share right"),
                                        ("completion_length", "Completion length", "tokens")],
               "fig5_audio_mass": [("audio_mass_max", "Mean audio attention mass $a_t$", "share of attention")],
               "fig8_accuracy_words": [("accuracy", "Reward accuracy", "share right"),
                                       ("words", "Length of the thinking", "words")]}
    for name, panels in figures.items():
        figure = Figure(figsize=(5.6 * len(panels), 3.9), layout="constrained")
        for axis, (key, title, unit) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
            for number, (label, metrics) in enumerate(runs.items()):
                points = [(m["step"], m[key]) for m in metrics if m.get(key) is not None]
                if key == "attention_loss":  # 0 where η is 0, which says nothing
                    points = [point for point in points if point[1]]
                if points:
                    steps, values = np.array(points, dtype=float).T
                    smooth = [values[max(0, i + 1 - options.window):i + 1].mean() for i in range(len(values))]
                    axis.plot(steps, smooth, color=f"C{number}", label=label)
            axis.set(title=title, xlabel="optimizer step", ylabel=unit)
            axis.set_ylim(bottom=min(0, axis.get_ylim()[0]))
            axis.grid(alpha=0.3)
            if axis.lines:
                axis.legend(fontsize=8)
        figure.suptitle(f"mean of the last {options.window} measured steps", fontsize=8)
        figure.savefig(out / f"{name}.png", dpi=110)
    print(f"{out}: {', '.join(figures)}")


def thinking_words(text, format_style):
    """Words of the thinking, also where it was cut off before its end (then they are the most)."""
    if format_style == "think":  # the template may have opened the block
        return len(text.partition("</think>")[0].replace("<think>", " ").split())
    return len(text.partition("</reasoning>")[0].partition("<reasoning>")[2].split())


# ───────────────────────────────────────────────────── contamination ──────────────────────────────────────────────────


def contamination_command(options):
    """`contamination`: what a training file and a benchmark share, by question id, by the name of the audio file, and
    by its samples (a hash of them as 16-bit numbers, so that wav and flac of a recording are the same)."""
    train = (read_questions(options.train) if options.train_format == "jsonl"
             else read_avqa(options.train, options.train_audio_root))
    items = read_benchmark(options.benchmark, options.data, options.audio_root)

    def keys(questions):
        found = {"id": set(), "audio file name": set(), "audio samples": set()}
        for question in tqdm(questions, desc="hash", leave=False):
            found["id"].add(question.id)
            for path in question.audio:
                found["audio file name"].add(path.stem)
                try:
                    samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
                    samples = np.round(samples * 2**15).clip(-2**15, 2**15 - 1).astype("<i2")
                    content = f"{rate} {samples.shape}".encode() + samples.tobytes()
                    found["audio samples"].add(hashlib.sha256(content).hexdigest())
                except soundfile.LibsndfileError as error:
                    print(f"{question.id}: {path} cannot be read and is not compared: {error}")
        return found

    ours, theirs = keys(train), keys(items)
    shared = {kind: sorted(ours[kind] & theirs[kind]) for kind in ours}
    for kind, values in shared.items():
        print(f"{kind}: {len(values)} shared, of {len(ours[kind])} in training and {len(theirs[kind])} in the benchmark"
              + (f"; first {values[:5]}" if values else ""))
    if options.out:
        Path(options.out).mkdir(parents=True, exist_ok=True)
        (Path(options.out) / "contamination.json").write_text(json.dumps(shared, indent=1, ensure_ascii=False))
    return shared


# ────────────────────────────────────────────────────── at the door ───────────────────────────────────────────────────


def load(folder, options):
    policy = load_policy(folder, getattr(torch, options.dtype))
    return policy.to("cuda" if torch.cuda.is_available() else "cpu")


def target_layers(policy, options):
    """L_tgt: as given, else the last five (the paper's 43–47 of 48), all of a smaller model."""
    return options.target_layers or list(range(max(0, policy.num_layers - 5), policy.num_layers))


def questions_of(options):
    """The first questions of --data: of our own jsonl, or with --benchmark the closed ones of that benchmark's file."""
    if not options.benchmark:
        return read_questions(options.data)[:options.limit]
    items = read_benchmark(options.benchmark, options.data, options.audio_root)
    return [question_of(item) for item in items if item.kind == "closed"][:options.limit]


def question_of(item):
    return Question(item.id, item.audio, item.question, item.choices, item.answer)


def batches(questions, options, name):
    with tqdm(total=len(questions), desc=name, unit=" questions") as bar:
        for start in range(0, len(questions), options.batch_size):
            some = questions[start:start + options.batch_size]
            yield some
            bar.update(len(some))


def numbered_rows(path):
    """(line number, object) of a jsonl file. Raises InputError for one that is no such file."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):  # not splitlines: text may hold others
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:  # no json, or no UTF-8
            raise InputError(f"{path}:{number}: not valid json ({error}); write one object a line") from error
        if not isinstance(row, dict):
            raise InputError(f"{path}:{number}: a {type(row).__name__}, not a json object")
        yield number, row


class Named(argparse.Action):
    """DIR or NAME=DIR, several → {name: folder}; without a name, the folder's own."""

    def __call__(self, parser, namespace, values, option_string=None):
        named = dict(getattr(namespace, self.dest) or {})
        for value in values if isinstance(values, list) else [values]:
            name, equals, folder = value.partition("=")
            name, folder = (name, folder) if equals and not Path(value).exists() else (Path(value).name, value)
            if name in named:
                parser.error(f"{value}: the name {name!r} is given twice; use NAME=DIR")
            named[name] = folder
        setattr(namespace, self.dest, named)


def read_options(arguments):
    parser = argparse.ArgumentParser(prog="evaluate.py", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name, run, help):
        sub = commands.add_parser(name, help=help, description=run.__doc__)
        sub.set_defaults(run_command=run)
        return sub

    def models(sub, batch_size, styles=(), **how):
        sub.add_argument("--model", required=True, **how)
        sub.add_argument("--instruction", default="", help="text after the options, as in training")
        sub.add_argument("--format_style", default="think", choices=("think", "reasoning", *styles))
        sub.add_argument("--batch_size", type=int, default=batch_size, help="questions at a time (default %(default)s)")
        sub.add_argument("--dtype", default="bfloat16" if torch.cuda.is_available() else "float32",
                         choices=("bfloat16", "float32", "float64"))

    def scored(sub):
        sub.add_argument("--data", required=True, help="the benchmark's own file")
        sub.add_argument("--audio_root", help="folder that its audio paths start from (default: the file's)")
        sub.add_argument("--judge", help="base URL of an OpenAI-compatible server; its key in JUDGE_API_KEY")
        sub.add_argument("--judge_model", default="Qwen2.5-7B-Instruct")
        sub.add_argument("--embedder", help="MMAU-Pro: sentence-transformers folder, or nvidia/NV-Embed-v2")

    for name in BENCHMARKS:
        sub = command(name, benchmark, "generate, map to an option, score")
        models(sub, 64, ("none",), metavar="DIR")
        scored(sub)
        sub.add_argument("--out", required=True)
        sub.add_argument("--engine", default="local", choices=("local", "vllm"))
        sub.add_argument("--vllm_python", default=".venv-vllm/bin/python")
        sub.add_argument("--vllm_flags", default="", help="more of vLLM's, in one string: --vllm_flags=\"…\"")
        sub.add_argument("--max_new_tokens", type=int, default=2048)
        sub.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
        sub.add_argument("--seed", type=int, default=0)

    sub = command("score", score_only, "score predictions")
    sub.add_argument("benchmark", choices=BENCHMARKS)
    sub.add_argument("--predictions", required=True, help='jsonl, {"id", "prediction"} a line')
    scored(sub)
    sub.add_argument("--out")

    for name, run, limit, help in (("trace", trace_command, 8, "what the equations see at each token"),
                                   ("acs", acs_command, None, "local evidence masking, Eq. 17")):
        sub = command(name, run, help)
        models(sub, 8, action=Named, metavar="[NAME=]DIR")
        sub.add_argument("--data", required=True, help="jsonl of questions, see data.py; or a benchmark's own file")
        sub.add_argument("--benchmark", choices=BENCHMARKS, help="which one --data is of; its closed questions count")
        sub.add_argument("--audio_root", help="folder that a benchmark's audio paths start from (default: the file's)")
        sub.add_argument("--out", required=True)
        sub.add_argument("--limit", type=int, default=limit, help="questions, from the first (default %(default)s)")
        sub.add_argument("--target_layers", type=int, nargs="+", help="L_tgt, 0-based (default: the last five)")
        sub.add_argument("--max_new_tokens", type=int, default=2048)
        if name == "trace":
            sub.add_argument("--reference", help="folder of π_text-ref (default: the model itself)")
            sub.add_argument("--completions", help='jsonl, {"id", "token_ids"} a line (default: greedy ones)')
            sub.add_argument("--temperature", type=float, default=1.0, help="of the distributions")

    sub = command("pos", pos_command, "entropies by part of speech")
    sub.add_argument("--trace", required=True, help="trace.jsonl of the trace command")
    sub.add_argument("--out", required=True)

    sub = command("curves", curves_command, "training curves of several runs")
    sub.add_argument("run", nargs="+", action=Named, metavar="[NAME=]RUN", help="output folders of train.py")
    sub.add_argument("--out", required=True)
    sub.add_argument("--window", type=int, default=8, help="steps of the moving mean")
    sub.add_argument("--format_style", default="think", choices=("think", "reasoning"))

    sub = command("contamination", contamination_command, "what training data and a benchmark share")
    sub.add_argument("--train", required=True, help="training questions")
    sub.add_argument("--train_format", default="jsonl", choices=("jsonl", "avqa"), help="train.py's data_format")
    sub.add_argument("--train_audio_root", help="folder that AVQA's audio paths start from (default: the file's)")
    sub.add_argument("--benchmark", required=True, choices=BENCHMARKS)
    sub.add_argument("--data", required=True)
    sub.add_argument("--audio_root")
    sub.add_argument("--out")
    return parser.parse_args(arguments)


def main(arguments):
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()  # its reports on a broken checkpoint run over many lines
    options = read_options(arguments)
    try:
        options.run_command(options)
    except (InputError, LookupError) as error:
        if type(error) not in (InputError, LookupError):  # a KeyError is a bug of ours
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (JudgeError, RolloutError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
