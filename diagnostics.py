"""The paper's diagnostics: token traces, parts of speech, and local evidence masking.

    trace    what Eqs. 1 and 3 see at each token: Figs. 2 and 6
    pos      entropies by part of speech: Fig. 7
    acs      local evidence masking, Eq. 17: Table 4

The functions *_command are commands of evaluate.py; their `options` are its parsed arguments. The
pictures are in plots.py.
"""

import hashlib
import json
import tempfile
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import soundfile
import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import plots
from attention import allowed_keys, attention_weights, mask_without_empty_rows, mass_rows
from benchmarks import question_of, read_benchmark
from checkpoint import load_policy
from data import (SAMPLE_RATE, InputError, json_lines, load_audio, parse_json, read_questions,
                  write_whole)
from mapo import (MapoConfig, audio_attention_mass, differential_entropy, inverse_relevance_weight,
                  relevance_mask)
from metrics import continue_log
from model import positions
from pos_gate import POS_TARGETS, load_tagger, pos_gate_batch, token_tags
from rewards import accuracy_reward
from rollout import Sampling, sample
from run import check_policy

RATIOS = (0.05, 0.10, 0.30, 0.50)  # shares of the audio to mask (paper, Table 4)
RANDOM_SEEDS = 5

# ──────── per token: Figs. 2 and 6 ────────


@torch.no_grad()
def trace(policy, reference, prompts, completions, temperature, layers, config=MapoConfig()):
    """Everything that Eqs. 1 and 3 see at each token of given completions → one dict per prompt.

    completions: one list of token ids per prompt. layers: L_tgt. config: τ_base and C_mask. The
    values are lists over the tokens; entropies are in nats, a_t is a share.
    """
    batch = policy.collate(prompts, completions)
    mask = batch.completion_mask.to(policy.device)  # [B, T]
    now = policy(batch, temperature, layers)
    text_batch = reference.collate(prompts, completions, text_only=True)
    text_ref_entropy = reference(text_batch, temperature).entropy.to(policy.device)  # [B, T]
    gates, _ = pos_gate_batch(completions, policy.tokenizer)
    gate = pad_sequence([torch.tensor(g) for g in gates], batch_first=True).to(policy.device)
    delta_h = differential_entropy(text_ref_entropy, now.entropy)
    columns = {  # each [B, T]
        "logp": now.logp, "policy_entropy": now.entropy, "text_ref_entropy": text_ref_entropy,
        "delta_h": delta_h, "audio_mass_max": audio_attention_mass(now.head_mass),
        "audio_mass_mean": now.head_mass.mean(dim=(0, 2)),  # over layers and heads
        "omega": relevance_mask(delta_h, mask, config.tau_base, config.mask_clip),
        "nu": inverse_relevance_weight(delta_h, gate, mask, config.tau_base, config.mask_clip)}
    return [{"id": prompt.question.id, "prompt_ids": prompt.ids, "text_prompt_ids": prompt.text_ids,
             "token_ids": list(ids), "tokens": [policy.tokenizer.decode([i]) for i in ids],
             **{name: values[row, :len(ids)].tolist() for name, values in columns.items()},
             "pos_gate": gates[row], "pos_tag": token_tags(ids, policy.tokenizer)}
            for row, (prompt, ids) in enumerate(zip(prompts, completions))]


def trace_command(options):
    """Writes trace.jsonl, one row per model and question, and a picture per question."""
    questions = questions_of(options, decode=False)  # only the first ones are heard
    given = read_completions(options.completions, questions) if options.completions else None
    questions = [q for q in questions if given is None or q.id in given]
    if not questions:
        raise InputError(f"{options.data}: no question to trace; check --limit and --completions")
    if len(options.model) > 1 and not options.reference:
        raise InputError("trace: several models need the same π_text-ref to be compared; give "
                         "--reference DIR")
    load_tagger()
    reference = load(options.reference, options) if options.reference else None
    rows, policy = [], None
    for label, folder in options.model.items():
        del policy  # there may not be memory for two
        policy = load(folder, options)
        layers = target_layers(policy, options)
        check_policy(policy, questions, layers)
        for some in batches(questions, options, f"trace {label}"):
            prompts = [policy.encode(q, options.instruction) for q in some]
            completions = ([given[q.id] for q in some] if given
                           else [c.token_ids for c in greedy(policy, prompts, options)])
            rows += [{"model": label, **row}
                     for row in trace(policy, reference or policy, prompts, completions,
                                      options.temperature, layers)]
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    write_whole(out / "trace.jsonl",
                "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    for number, question in enumerate(questions):
        name = "".join(c if c.isalnum() or c in "-." else "_" for c in question.id)
        plots.draw_trace([row for row in rows if row["id"] == question.id],
                         out / f"trace-{number}-{name}.png")
    print(f"{out}: trace.jsonl, {len(rows)} rows; {len(questions)} pictures")


def read_completions(path, questions):
    """{"id", "token_ids"} lines → {id: token ids}. Raises InputError for an unknown id."""
    known, given = {q.id for q in questions}, {}
    for number, row in json_lines(path):
        ids = row.get("token_ids")
        if row.get("id") not in known:
            raise InputError(f"{path}:{number}: id {row.get('id')!r} is not among the questions of "
                             "--data; remove the line")
        if not isinstance(ids, list) or not ids or \
                not all(isinstance(i, int) and i >= 0 for i in ids):
            raise InputError(f"{path}:{number}: field 'token_ids' must be a list of at least one "
                             "token id")
        given[row["id"]] = ids
    return given


# ──────── by part of speech: Fig. 7 ────────


def pos_command(options):
    """Writes pos.md and pos.png: mean H(π_text-ref) and Δh of a trace, by part of speech."""
    tags, means = pos_means([row for _, row in json_lines(options.trace)])
    lines = ["| model | tag | gate | tokens | H(π_text-ref), nats | Δh, nats |",
             "|---|---|---|---|---|---|"]
    lines += [f"| {model} | {tag} | {int(tag in POS_TARGETS)} | {tokens} | {entropy:.3f} | "
              f"{delta_h:.3f} |"
              for model, by_tag in means.items()
              for tag, (tokens, entropy, delta_h) in by_tag.items()]
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    write_whole(out / "pos.md", "\n".join(lines) + "\n")
    print("\n".join(lines))
    plots.draw_pos(tags, means, out / "pos.png")


def pos_means(rows):
    """Rows of a trace → (tags, {model: {tag: (tokens, mean H(π_text-ref), mean Δh)}}).

    Universal tags, ordered by their mean H(π_text-ref) over all models, the largest first. Tokens
    without a tag, and those of completions that were not tagged, are "no word".
    """
    values = defaultdict(lambda: defaultdict(list))  # {tag: {model: [(H, Δh)]}}
    for row in rows:
        tags = row["pos_tag"] or [None] * len(row["token_ids"])
        for tag, *pair in zip(tags, row["text_ref_entropy"], row["delta_h"]):
            values[tag or "no word"][row["model"]].append(pair)
    tags = sorted(values, key=lambda tag: -np.mean([h for pairs in values[tag].values()
                                                    for h, _ in pairs]))
    models = dict.fromkeys(row["model"] for row in rows)
    return tags, {model: {tag: (len(values[tag][model]), *np.mean(values[tag][model], axis=0))
                          for tag in tags if values[tag][model]} for model in models}


# ──────── local evidence masking: Eq. 17, Table 4 ────────


def attention_causal_selectivity(random_accuracy, top_accuracy):
    """ACS(r) = Acc_rand(r) − Acc_top(r).  (Eq. 17)

    Positive: masking what the model attends to hurts more than masking at random.
    """
    return random_accuracy - top_accuracy


def acs_command(options):
    """Writes acs.jsonl, one row per model and question; acs.md (Table 4); acs.png.

    An answer is right if training would reward it (rewards.accuracy_reward). An interrupted run
    continues where it stopped.
    """
    questions, out, policy = questions_of(options), Path(options.out), None
    claim(out, options, ("model", "data", "benchmark", "target_layers",
                         "max_new_tokens", "instruction", "format_style", "dtype"))
    rows = continue_log(out / "acs.jsonl")
    done = {(row["model"], row["id"]) for row in rows}
    with open(out / "acs.jsonl", "a", encoding="utf-8") as file:
        for label, folder in options.model.items():
            missing = [q for q in questions if (label, q.id) not in done]
            if not missing:
                continue
            del policy  # there may not be memory for two
            policy = load(folder, options)
            layers = target_layers(policy, options)
            check_policy(policy, missing, layers)
            for row in evidence_masking(policy, missing, options, layers, label):
                rows.append(row)
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                file.flush()
    unlisted = sum(q.answer.strip() not in [c.strip() for c in q.choices] for q in questions)
    if unlisted:
        print(f"questions whose answer is none of the options, counted as wrong: {unlisted}")
    table = acs_table(rows)
    write_whole(out / "acs.md", table)
    plots.draw_acs(acs_accuracies(rows), RANDOM_SEEDS, out / "acs.png")
    print(table)


def evidence_masking(policy, questions, options, layers, label):
    """Greedy answers to whole and to masked clips → yields one row per question.

    A row is {"id", "model", "right", "seconds", "masked": [{"kind", "seed", "ratio", "seconds",
    "right"}]}.
    """
    for some in batches(questions, options, f"acs {label}"):
        prompts, completions, right = answer(policy, some, options)
        scores = audio_token_scores(policy, prompts, [c.token_ids for c in completions], layers)
        for question, prompt, whole, attention in zip(some, prompts, right, scores):
            clips = [load_audio(path) for path in question.audio]
            spans, start = [], 0  # spans of all clips joined, so that their tokens compete
            for clip, frames in zip(clips, prompt.frames):
                spans += [(start + first, start + end) for first, end
                          in audio_token_spans(len(clip), frames, policy.family)]
                start += len(clip)
            variants = mask_variants(spans, attention, question.id)
            with tempfile.TemporaryDirectory() as folder:
                masked = [mask_question(question, clips, [spans[token] for token in tokens],
                                        Path(folder) / str(number))
                          for number, tokens in enumerate(variants.values())]
                _, _, outcomes = answer(policy, masked, options)
            seconds = [sum(spans[token][1] - spans[token][0] for token in tokens) / SAMPLE_RATE
                       for tokens in variants.values()]
            yield {"id": question.id, "model": label, "right": whole,
                   "seconds": start / SAMPLE_RATE,
                   "masked": [{"kind": kind, "seed": seed, "ratio": ratio, "seconds": s, "right": r}
                              for (kind, seed, ratio), s, r in zip(variants, seconds, outcomes)]}


def answer(policy, questions, options):
    """→ prompts, greedy completions, and whether each answer is right."""
    prompts = [policy.encode(q, options.instruction) for q in questions]
    completions = greedy(policy, prompts, options)
    return prompts, completions, [
        bool(accuracy_reward(policy.decode(c), q.answer, q.choices, options.format_style))
        for c, q in zip(completions, questions)]


def mask_question(question, clips, spans, folder):
    """Writes the question's clips with silence in the spans → the question about those files."""
    joined = np.concatenate(clips)
    for start, end in spans:
        joined[start:end] = 0
    folder.mkdir()
    paths = [folder / f"{number}.wav" for number in range(len(clips))]
    for path, samples in zip(paths, np.split(joined, np.cumsum([len(c) for c in clips])[:-1])):
        soundfile.write(path, samples, SAMPLE_RATE, subtype="FLOAT")
    return replace(question, audio=tuple(paths))


def audio_token_spans(samples, frames, family):
    """The part of the waveform that each audio token stands for → [(start, end)], in samples.

    samples: length of the clip at 16 kHz. frames: its mel frames, of 10 ms or 160 samples each.
    family: of the model, see families.py. The spans cover the clip without gaps or overlap; a token
    that is only padding has an empty one.
    """
    first_frames = map(family.first_frame, range(family.tokens(frames)))
    edges = [min(160 * frame, samples) for frame in first_frames] + [samples]
    return list(zip(edges, edges[1:]))


def mask_variants(spans, scores, name):
    """{(kind, seed, ratio): audio tokens to mask}: the most and least attended, and random ones.

    Ties are broken by index. Random orders depend on the question's id (`name`) alone, so that all
    models get the same ones.
    """
    tokens = range(len(spans))
    orders = {("top", 0): sorted(tokens, key=lambda j: -scores[j]),
              ("low", 0): sorted(tokens, key=lambda j: scores[j])}
    digest = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8])
    for seed in range(RANDOM_SEEDS):
        generator = np.random.default_rng([seed, digest])
        orders["random", seed] = generator.permutation(len(spans)).tolist()
    return {(kind, seed, ratio): select_tokens(spans, order, ratio)
            for (kind, seed), order in orders.items() for ratio in RATIOS}


def select_tokens(spans, order, ratio):
    """Takes whole audio tokens in `order` until they last `ratio` of the clip; at least one."""
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
    """The attention that each audio token gets → one list per prompt, over all its clips.

    s_j = mean over generated tokens y_t of 1/|L_tgt| · Σ_l max_h α_{t,j}⁽ˡʰ⁾, read at the rows that
    predict y_t, like a_t. (Sec. C.4, "aggregate the token-to-audio attention map during
    generation"; this way to aggregate is ours)
    """
    batch = policy.collate(prompts, completions).to(policy.device)
    first = batch.input_ids.shape[1] - batch.completion_mask.shape[1] - 1  # the row predicting y_1
    rows = torch.nn.functional.pad(batch.completion_mask, (0, 1))  # of rows first to last  [B, T+1]
    before = policy.base.config.get_text_config()._attn_implementation
    policy.base.set_attn_implementation({"text_config": "audio_scores"})
    try:
        output = policy.base.model(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False,
            position_ids=positions(batch.attention_mask), **batch.audio, output_attentions=True,
            score_layers=tuple(layers), score_first_row=first, score_rows=rows)
    finally:
        policy.base.set_attn_implementation({"text_config": before})
    scores = torch.stack(output.attentions).mean(dim=0)  # [L, B, S] → [B, S]
    return [s[ids == policy.audio_token_id].tolist() for s, ids in zip(scores, batch.input_ids)]


def attention_with_scores(module, query, key, value, attention_mask, score_layers=(),
                          score_first_row=0, score_rows=None, **kwargs):
    """transformers' fused attention; in layers of L_tgt also mean_t max_h α_{t,j} [B, S].

    The scores take the place of the attention weights in the result. transformers fixes the first
    five arguments; the score_* ones travel through the model's forward.
    """
    output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    if module.layer_idx not in score_layers:
        return output, None
    query = query[:, :, score_first_row:]  # [B, H, T+1, d]
    allowed = allowed_keys(attention_mask, key, score_first_row)  # [B or 1, 1, T+1, S]
    scores, at_once = 0, mass_rows(query.device)
    for start in range(0, query.shape[2], at_once):
        rows = slice(start, start + at_once)
        alpha, _, _ = attention_weights(query[:, :, rows], key, allowed[:, :, rows],
                                        kwargs["scaling"])  # [B, Hkv, H/Hkv, rows, S]
        strongest = alpha.flatten(1, 2).amax(dim=1)  # [B, rows, S]
        scores = scores + (strongest * score_rows[:, rows, None]).sum(dim=1)
    return output, scores / score_rows.sum(dim=1, keepdim=True)


AttentionInterface.register("audio_scores", attention_with_scores)
AttentionMaskInterface.register("audio_scores", mask_without_empty_rows)


def acs_accuracies(rows):
    """Rows of acs.jsonl → {model: (accuracy on whole clips, {ratio: (accuracies, seconds)})}.

    accuracies and mean masked seconds: {"top", "random", "low"}; random is the mean over its seeds.
    """
    accuracies = {}
    for model in dict.fromkeys(row["model"] for row in rows):
        own = [row for row in rows if row["model"] == model]
        masked = [m for row in own for m in row["masked"]]
        by_ratio = {}
        for ratio in sorted({m["ratio"] for m in masked}):
            of = {kind: [m for m in masked if (m["kind"], m["ratio"]) == (kind, ratio)]
                  for kind in ("top", "random", "low")}
            by_ratio[ratio] = tuple({kind: float(np.mean([m[key] for m in of[kind]]))
                                     for kind in of} for key in ("right", "seconds"))
        accuracies[model] = float(np.mean([row["right"] for row in own])), by_ratio
    return accuracies


def acs_table(rows):
    """Table 4 in Markdown, with the accuracy on whole clips and the seconds that were masked."""
    lines = ["| model | no mask | mask ratio | top-mask acc. | random-mask acc. | low-mask acc. | "
             "ACS | masked, s: top / random / low |", "|---|---|---|---|---|---|---|---|"]
    for model, (whole, by_ratio) in acs_accuracies(rows).items():
        for ratio, (accuracy, seconds) in by_ratio.items():
            acs = attention_causal_selectivity(accuracy["random"], accuracy["top"])
            lines.append(f"| {model} | {whole:.3f} | {ratio:.0%} | {accuracy['top']:.3f} | "
                         f"{accuracy['random']:.3f} | {accuracy['low']:.3f} | {acs:+.3f} | "
                         f"{' / '.join(f'{s:.2f}' for s in seconds.values())} |")
    return "\n".join(lines) + "\n"


# ──────── what the commands have in common ────────


def load(folder, options):
    """The policy of a folder, on the GPU if there is one."""
    policy = load_policy(folder, getattr(torch, options.dtype))
    return policy.to("cuda" if torch.cuda.is_available() else "cpu")


def target_layers(policy, options):
    """L_tgt: as given, else the last five (the paper's 43–47 of 48), or all of a smaller model."""
    return options.target_layers or list(range(max(0, policy.num_layers - 5), policy.num_layers))


def questions_of(options, decode=True):
    """The first questions of --data: our jsonl, or with --benchmark its closed questions."""
    if not options.benchmark:
        return read_questions(options.data, decode)[:options.limit]
    items = read_benchmark(options.benchmark, options.data, options.audio_root)
    closed = [item for item in items if item.kind == "closed"][:options.limit]
    return [question_of(item) for item in closed]


def batches(questions, options, name):
    """Yields --batch_size questions at a time, with a progress bar."""
    with tqdm(total=len(questions), desc=name, unit=" questions") as bar:
        for start in range(0, len(questions), options.batch_size):
            some = questions[start:start + options.batch_size]
            yield some
            bar.update(len(some))


def greedy(policy, prompts, options):
    """One greedy completion per prompt, sampled in this process."""
    greedy = Sampling(temperature=0, max_new_tokens=options.max_new_tokens)
    return sample(policy, prompts, 1, greedy, seed=0)


def claim(out, options, names):
    """Makes the folder `out` and records the settings of an evaluation there → the settings.

    names: the options that count, beside the content of --data and the weights' sizes and times.
    Raises InputError if `out` holds rows that were made with other settings.
    """
    settings = {name: getattr(options, name) for name in names}
    with open(options.data, "rb") as data:
        settings["content of --data"] = hashlib.file_digest(data, "sha256").hexdigest()
    folders = options.model if isinstance(options.model, dict) else {"": options.model}
    files = sorted(f for folder in folders.values() for f in Path(folder).glob("*.safetensors"))
    status = [(f.name, f.stat()) for f in files]
    settings["weights of --model"] = [[n, s.st_size, s.st_mtime_ns] for n, s in status]
    known = out / "settings.json"
    before = parse_json(known.read_bytes(), known, "delete it") if known.is_file() else {}
    made = [path for path in (out / "completions.jsonl", out / "acs.jsonl")
            if path.is_file() and path.stat().st_size]
    other = ", ".join(n for n in before | settings if before.get(n) != settings.get(n))
    if other and made:
        raise InputError(f"{made[0]}: made with other settings ({other}); give another --out")
    out.resolve().mkdir(parents=True, exist_ok=True)
    write_whole(known, json.dumps(settings, indent=1, ensure_ascii=False))
    return settings
