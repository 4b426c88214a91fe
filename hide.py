"""Attending is not using: accuracy when the late part of a completion cannot see the audio.  (ours)

    python evaluate.py hide --model FOLDER --data FILE.jsonl --out DIR

A large a_t late in a completion says that the model attends to the audio there. It does not say
that the answer depends on it. This diagnostic keeps the first part of each greedy completion and
lets the model write the rest while the audio is hidden from its queries, in some layers. If the
accuracy falls to chance, the late attention in those layers is used.
"""

from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from attention import allowed_keys, mask_without_empty_rows
from data import InputError, write_whole
from diagnostics import answer, load, questions_of, target_layers
from rewards import accuracy_reward
from run import check_policy


def hide_command(options):
    """Writes hide.md: accuracy with the audio hidden from late tokens, by layer.

    The first column is the accuracy with nothing hidden.
    """
    if not 0 <= options.after <= 1:
        raise InputError(f"--after: give a share from 0 to 1, got {options.after}")
    rows, out, questions = {}, Path(options.out), questions_of(options)
    for label, folder in options.model.items():
        policy = load(folder, options)
        layers = target_layers(policy, options)
        check_policy(policy, questions, layers)
        rows[label] = hidden_accuracies(policy, questions, layers, options)
        del policy  # there may not be memory for two
    table = hide_table(rows)
    out.mkdir(parents=True, exist_ok=True)
    write_whole(out / "hide.md", table)
    print(table)


def hidden_accuracies(policy, questions, layers, options):
    """→ {name of a set of layers: accuracy with the audio hidden there}.

    The sets are: none, L_tgt, all layers, all but L_tgt; then each single layer of L_tgt, or of the
    whole model if it has at most eight.
    """
    every = list(range(policy.num_layers))
    sets = {"L_tgt": layers, "all layers": every,
            "all but L_tgt": [layer for layer in every if layer not in layers],
            **{f"layer {layer}": [layer] for layer in (every if len(every) <= 8 else layers)}}
    right = dict.fromkeys(["none", *sets], 0.0)
    for start in tqdm(range(0, len(questions), options.batch_size), desc="hide", unit=" batches"):
        some = questions[start:start + options.batch_size]
        prompts, completions, visible = answer(policy, some, options)
        right["none"] += sum(visible)
        for name, hidden in sets.items():
            texts = finish_without_audio(policy, prompts, completions, hidden, options.after,
                                         options.max_new_tokens)
            right[name] += sum(accuracy_reward(text, q.answer, q.choices, options.format_style)
                               for text, q in zip(texts, some))
    return {name: count / len(questions) for name, count in right.items()}


@torch.no_grad()
def finish_without_audio(policy, prompts, completions, layers, after, max_new_tokens):
    """Greedy completions from the share `after` of the given ones on, without audio → texts.

    They have at most max_new_tokens tokens, the kept ones included. In `layers`, the query that
    predicts the first new token and all later ones do not see S_audio.
    """
    kept = [c.token_ids[:int(after * len(c.token_ids))] for c in completions]
    started = [replace(prompt, ids=prompt.ids + ids) for prompt, ids in zip(prompts, kept)]
    batch = policy.collate(started, [[]] * len(started)).to(policy.device)
    # Completions are empty, but collate makes them at least one token long: drop that padding.
    ids, attention_mask = batch.input_ids[:, :-1], batch.attention_mask[:, :-1]  # [B, S]
    policy.eval()
    with hidden_audio(policy, ids == policy.audio_token_id, layers):
        output = policy.base.generate(
            input_ids=ids, attention_mask=attention_mask, **batch.audio, do_sample=False,
            max_new_tokens=max_new_tokens, eos_token_id=policy.eos_ids,
            suppress_tokens=policy.placeholder_ids, pad_token_id=policy.eos_ids[0])
    texts = []
    for first, new, completion in zip(kept, output[:, ids.shape[1]:].tolist(), completions):
        ends = [i for i, token in enumerate(new) if token in policy.eos_ids]
        whole = first + (new[:ends[0] + 1] if ends else new)
        texts.append(policy.decode(replace(completion, token_ids=whole[:max_new_tokens])))
    return texts


@contextmanager
def hidden_audio(policy, is_audio, layers):
    """Inside, the last query row does not see the keys is_audio [B, S] in `layers`.

    During generation that row is the end of the prompt, and then each new token.
    """
    def attention(module, query, key, value, attention_mask, **kwargs):
        if module.layer_idx in layers:
            new = key.shape[2] - is_audio.shape[1]  # tokens generated so far
            hidden = torch.nn.functional.pad(is_audio, (0, new))[:, None, None]  # [B, 1, 1, S+new]
            if query.shape[2] == 1 and attention_mask is None:  # one row, which may see all keys
                attention_mask = torch.ones_like(hidden)
            allowed = allowed_keys(attention_mask, key, 0).expand(len(query), -1, -1, -1).clone()
            allowed[:, :, -1:] &= ~hidden
            attention_mask = allowed
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)

    before = policy.base.config.get_text_config()._attn_implementation
    AttentionInterface.register("hidden_audio", attention)
    AttentionMaskInterface.register("hidden_audio", mask_without_empty_rows)
    policy.base.set_attn_implementation({"text_config": "hidden_audio"})
    try:
        yield
    finally:
        policy.base.set_attn_implementation({"text_config": before})


def hide_table(rows):
    """{model: {set of layers: accuracy}} → a Markdown table."""
    sets = list(dict.fromkeys(name for accuracies in rows.values() for name in accuracies))
    lines = ["| model | " + " | ".join(sets) + " |", "|---" * (len(sets) + 1) + "|"]
    for label, accuracies in rows.items():
        lines.append(f"| {label} | " + " | ".join(
            f"{accuracies[name]:.3f}" if name in accuracies else "" for name in sets) + " |")
    return "\n".join(lines) + "\n"
