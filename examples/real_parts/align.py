"""A short alignment: teaches the new model to name what it hears, in the format of the rewards.

    python examples/real_parts/align.py MODEL QUESTIONS.jsonl OUT

1. The frozen audio encoder runs once on each clip.
2. The projection starts from a closed form: ridge regression from the mean features of a sound to
   the mean embedding of its name.
3. Supervised fine-tuning of the projection and the decoder on demonstrations such as

    <think> First I hear a drum, then a guitar. So the answer is guitar.</think> guitar

   Each time, the options are drawn anew, and so is the sound that a question about two sounds asks
   for. One demonstration in ten comes without audio and names random sounds: π_text-ref must know
   the format, and be uncertain about the sounds.
"""

import dataclasses
import sys
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from questions import INSTRUMENTS, TEXT

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository
from checkpoint import load_policy, save_policy  # noqa: E402
from data import json_lines, read_questions  # noqa: E402

CLIPS, STEPS, BATCH, LEARNING_RATE = 800, 100, 8, 2e-4
RIDGE = 1.0  # of features with a root mean square of 1
WITHOUT_AUDIO = 0.1  # share of the demonstrations
CLIPS_AT_ONCE = 8  # in a forward of the encoder


def align(model, file, out, steps=STEPS, clips=CLIPS):
    """Writes an aligned copy of the model to `out`. Deterministic on one machine."""
    policy = load_policy(model)
    if torch.cuda.is_available():
        policy.cuda()
    questions = read_questions(file)[:clips]
    heard = {row["id"]: row["heard"] for _, row in json_lines(file)}
    rng = np.random.default_rng(0)
    prompts = [policy.encode(q) for q in tqdm(questions, desc="align: features")]
    features = encode(policy, prompts)
    start_projection(policy, features, [heard[q.id] for q in questions])
    finetune(policy, questions, features, heard, steps, rng)
    save_policy(policy, out)


def encode(policy, prompts):
    """Runs the audio encoder alone, without the projection → [[audio tokens, 384]]."""
    projector, features = policy.base.model.multi_modal_projector, []
    linear, projector.linear = projector.linear, torch.nn.Identity()
    for first in tqdm(range(0, len(prompts), CLIPS_AT_ONCE), desc="align: audio encoder"):
        encoded = policy.encode_audio(prompts[first:first + CLIPS_AT_ONCE])
        features += [prompt.embeddings for prompt in encoded]
    projector.linear = linear
    return features


@torch.no_grad()
def start_projection(policy, features, heard):
    """The projection that best maps the mean features of a sound to its name, by ridge regression.

    Clips with two sounds are cut in half. The decoder can then work with what the audio tokens say
    from the first step of the fine-tuning on.
    """
    x = torch.stack([part.mean(0) for clip, names in zip(features, heard)
                     for part in clip.tensor_split(len(names))])  # [sounds, 384]
    table, tokenizer = policy.base.get_input_embeddings().weight.cpu(), policy.tokenizer
    embedding = {name: table[tokenizer(f" {name}")["input_ids"]].mean(0) for name in INSTRUMENTS}
    y = torch.stack([embedding[name] for names in heard for name in names])  # [sounds, D]
    centre, mean = x.mean(0), y.mean(0)
    x, y = x - centre, y - mean
    ridge = RIDGE * x.square().mean() * torch.eye(x.shape[1])
    weight = torch.linalg.solve(x.T @ x + ridge, x.T @ y).T  # [D, 384]
    projection = policy.base.model.multi_modal_projector.linear
    projection.weight.copy_(weight)
    projection.bias.copy_(mean - weight @ centre)


def finetune(policy, questions, features, heard, steps, rng):
    """Cross-entropy of demonstrations; AdamW with a warm-up and a linear decay to 0."""
    projection = policy.base.model.multi_modal_projector
    policy.requires_grad_(True)
    policy.base.model.audio_tower.requires_grad_(False)
    trained = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0)
    places, losses = [], []
    for step in (bar := tqdm(range(steps), desc="align: demonstrations")):
        if len(places) < BATCH:  # the next epoch
            places = list(rng.permutation(len(questions)))
        chosen, places = places[:BATCH], places[BATCH:]
        with_audio = rng.random() > WITHOUT_AUDIO
        asked, texts = [], []
        for i in chosen:
            question, text = demonstrate(questions[i], heard[questions[i].id], with_audio, rng)
            embeddings = projection(features[i].to(policy.device))  # [audio tokens, D]
            asked.append(dataclasses.replace(policy.encode(question), features=(),
                                             embeddings=embeddings))
            texts.append(text)
        eos = [policy.tokenizer.eos_token_id]
        ids = [tokens + eos for tokens in policy.tokenizer(texts)["input_ids"]]
        batch = policy.collate(asked, ids, text_only=not with_audio)
        loss = -policy(batch).logp.sum() / batch.completion_mask.sum()
        rate = min(1, (step + 1) / 10, (steps - step) / steps * 1.5)
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * rate
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        losses.append(loss.item())
        bar.set_postfix(loss=f"{np.mean(losses[-10:]):.3f}")


def demonstrate(question, names, with_audio, rng):
    """A question about the same clip with new options, and a right completion → both."""
    if not with_audio:
        names = list(rng.choice(list(INSTRUMENTS), len(names), replace=False))
    place = int(rng.integers(len(names)))
    text = TEXT["one"] if len(names) == 1 else TEXT[("first", "second")[place]]
    others = [name for name in INSTRUMENTS if name not in names]
    options = rng.permutation([*names, *rng.choice(others, 4 - len(names), replace=False)])
    said = ", then ".join(f"{'an' if name[0] in 'aeiou' else 'a'} {name}" for name in names)
    said = f"I hear {said}." if len(names) == 1 else f"First I hear {said}."
    answer = names[place]
    asked = dataclasses.replace(question, question=text, choices=tuple(map(str, options)),
                                answer=answer)
    return asked, f"<think> {said} So the answer is {answer}.</think> {answer}"


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit("usage: align.py MODEL QUESTIONS.jsonl OUT")
    align(*map(Path, sys.argv[1:4]))
