"""The built-in toy: short synthetic sounds, questions about them, and a tiny model to post-train.

`prepare(folder, seed)` writes wav files, three jsonl files, and a checkpoint of 1.3 M parameters,
of the same class as the 30B model.

The questions. A clip holds three or four sounds in a row. A question asks which sound comes at a
given place (75 %), or how many knocks there are (25 %). A completion looks like this:

    <think> I hear: the first is a bell, the second is knocks, the last is a hiss. This asks for
    the second sound. Let me think slowly about it. So the second is knocks.</think> knocks

The language prior. For each question, text alone favours one option (see PREFERENCE; "three" for
the number of knocks). That option is right for a third of the questions. The demonstrations of the
warm start describe the sounds, but more often than not they conclude with the favoured option. The
policy learns to do the same: it describes what it hears and still answers from the prior. This is
the late-stage collapse that MAPO (arXiv 2605.27741) addresses. The policy can learn to conclude
from its own description or to listen again. The description leaves out the number of knocks, so
for that question only listening helps.
"""

import hashlib
import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import soundfile
import torch
from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers, trainers
from torch.nn import functional as F
from tqdm import tqdm
from transformers import (Qwen2Tokenizer, Qwen3OmniMoeThinkerConfig,
                          Qwen3OmniMoeThinkerForConditionalGeneration, WhisperFeatureExtractor)
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

import checkpoint
import data
from mapo import audio_attention_mass
from rewards import accuracy_reward
from rollout import Sampling, sample

SPLITS = {"train": 3000, "dev": 256, "test": 1024}  # number of questions; one clip for each
DOMAINS = {"place": 0.75, "count": 0.25}  # kinds of question and their shares
PRIOR_RIGHT = 1 / 3  # share of the questions whose answer is the favoured option
LISTENING = 0.4  # share of imperfect demonstrations that conclude from the audio, not the prior
SLIP = 0.05  # share of the sounds that an imperfect demonstration names wrongly
CLEAN_ENOUGH = 0.8  # greedy accuracy at which the warm start switches to imperfect demonstrations
AUDIO_TOWER_STEPS, MOST_CLEAN_STEPS, IMPERFECT_STEPS = 200, 225, 80  # of the warm start
# We induce the late-stage collapse. A large model attends little to the audio late in a completion,
# because it has learnt to write from text alone. A tiny model has not. So the steps with imperfect
# demonstrations penalise a_t above LATE_MASS once the description of the sounds is finished.
LATE_MASS, LATE_WEIGHT = 0.15, 1.0
LEARNING_RATE = 2.5e-3
MAX_NEW_TOKENS = 64  # when measuring greedy accuracy

SOUNDS = ("bell", "whistle", "siren", "hiss", "knocks", "hum", "chirp", "buzz", "drum")
# The prior's order of preference, most favoured first.
PREFERENCE = ("siren", "bell", "drum", "whistle", "buzz", "knocks", "chirp", "hum", "hiss")
NUMBERS = {2: "two", 3: "three", 4: "four"}
PLACES = ("first", "second", "third")
FILLERS = ("Let me think slowly about it.", "I should weigh every option carefully.",
           "Only one of these options can be right.", "Such recordings often surprise people.",
           "The recording is rather short.", "I will now compare the options.",
           "That seems quite simple.", "The answer needs a little care.")


# ──────── The whole preparation ────────


def prepare(folder, seed):
    """Writes folder/{model/, train.jsonl, dev.jsonl, test.jsonl, wav/} → folder.

    Returns at once if the folder was already built from the same seed and code. The work happens
    in a sibling folder that is renamed at the end, so an interrupted run leaves nothing half done.
    The same seed on the same machine gives the same bytes and weights.
    Raises data.InputError if `folder` exists and was not written by this function.
    """
    folder = Path(folder)
    decisive = (__name__, "checkpoint", "data", "mapo", "model", "rewards", "rollout")
    sources = [Path(sys.modules[name].__file__).read_bytes() for name in decisive]
    stamp = hashlib.sha256(b"".join([*sources, f"{seed} {torch.__version__}".encode()])).hexdigest()
    if folder.exists():
        if not (folder / "stamp").is_file():
            raise data.InputError(f"{folder} was not written by toy.py; choose another folder")
        if (folder / "stamp").read_text() == stamp:
            return folder
    building = folder.with_name(f".{folder.name}.building")
    shutil.rmtree(building, ignore_errors=True)
    rows = write_world(building, seed)
    rng = np.random.default_rng([seed, len(SPLITS)])
    questions = {split: data.read_questions(building / f"{split}.jsonl")
                 for split in ("train", "dev")}
    prompt_text = lambda q: data.conversation(q, with_audio=False)[0]["content"][0]["text"]
    tokenizer = build_tokenizer([f"{prompt_text(question)} {demonstration(row, rng)}"
                                 for question, row in zip(questions["train"], rows["train"])])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        extractor = WhisperFeatureExtractor(feature_size=128, **IMAGES)
        policy = checkpoint.make_policy(build_model(tokenizer), tokenizer, extractor)
        prompts = {split: [policy.encode(q) for q in tqdm(own, desc="toy: features", leave=False)]
                   for split, own in questions.items()}
        pretrain_audio_tower(policy, prompts["train"], rows["train"], rng)
        teach(policy, prompts, rows, rng)
    checkpoint.save_policy(policy, building / "model")
    (building / "stamp").write_text(stamp)
    shutil.rmtree(folder, ignore_errors=True)
    building.rename(folder)
    return folder


def caption_is_exact(completion, events):
    """Whether the first sentence names exactly the sounds of `events` (of the row), in order."""
    first_sentence = completion.split(".")[0]
    named = [word for word in re.findall(r"\w+", first_sentence) if word in SOUNDS]
    return named == [event["sound"] for event in events]


# ──────── Sounds, clips and questions ────────


def synthesize(sound, count, rng):
    """One sound at a random pitch → float samples. `count` is the number of knocks."""
    seconds = 0.11 * count if sound == "knocks" else rng.uniform(0.26, 0.36)
    t = np.arange(int(seconds * data.SAMPLE_RATE)) / data.SAMPLE_RATE
    pitch = rng.uniform(0.9, 1.1)
    cycles = lambda hertz: np.cumsum(np.broadcast_to(hertz * pitch, t.shape)) / data.SAMPLE_RATE
    sine = lambda hertz: np.sin(2 * np.pi * cycles(hertz))
    noise, sweep = rng.standard_normal(len(t)), 750 - 350 * np.cos(2 * np.pi * t / seconds)
    wave = {
        "bell": lambda: (sine(880.0) + 0.7 * sine(2430.0) + 0.4 * sine(3700.0)) * np.exp(-7 * t),
        "whistle": lambda: sine(1900 + 60 * np.sin(2 * np.pi * 7 * t)),
        "siren": lambda: sine(sweep) + 0.3 * sine(2 * sweep),
        "hiss": lambda: np.diff(noise, append=0) * 0.6,
        "knocks": lambda: np.convolve(noise, np.ones(6) / 3, "same") * np.exp(-60 * (t % 0.11)),
        "hum": lambda: sine(120.0) + 0.6 * sine(240.0) + 0.3 * sine(360.0),
        "chirp": lambda: sine(2600 + 2600 * (t % 0.09) / 0.09),
        "buzz": lambda: np.sign(sine(210.0)) * 0.6,
        "drum": lambda: (sine(75.0) + 0.2 * noise * np.exp(-80 * t)) * np.exp(-9 * t) * 1.5,
    }[sound]()
    fade = np.minimum(1, np.minimum(t, t[::-1]) / 0.004)
    return wave * fade * rng.uniform(0.12, 0.3)


def draw_events(rng):
    """Three or four different sounds → [{"sound", "count"}]. The count is 1 except for knocks."""
    sounds = rng.choice(SOUNDS, size=rng.integers(3, 5), replace=False)
    return [{"sound": str(sound), "count": int(rng.integers(2, 5)) if sound == "knocks" else 1}
            for sound in sounds]


def render(events, rng):
    """Plays the events with gaps → samples. Adds "start" and "end" (seconds) to each event."""
    gap = lambda: np.zeros(int(rng.uniform(0.02, 0.06) * data.SAMPLE_RATE))
    pieces = [gap()]
    for event in events:
        start = sum(map(len, pieces))
        pieces += [synthesize(event["sound"], event["count"], rng), gap()]
        event["start"], event["end"] = (round(n / data.SAMPLE_RATE, 4)
                                        for n in (start, start + len(pieces[-2])))
    samples = np.concatenate(pieces)
    return samples + 0.003 * rng.standard_normal(len(samples))


def places(events):
    """The place of each event in words: first, second, ..., last."""
    return (*PLACES[:len(events) - 1], "last")


def draw_question(domain, events, rng):
    """A question about the events → {"question", "choices", "answer", "about", "domain"}."""
    heard = [event["sound"] for event in events]
    if domain == "count":
        answer = NUMBERS[events[heard.index("knocks")]["count"]]
        return {"question": "How many knocks are there?", "choices": list(NUMBERS.values()),
                "answer": answer, "about": "number of knocks", "domain": "count"}
    i = rng.integers(len(heard))
    place = places(events)[i]
    allowed = [sound for sound in SOUNDS if sound != heard[i]]
    choices = [heard[i], *rng.choice(allowed, size=3, replace=False)]
    return {"question": f"Which sound comes {place}?",
            "choices": [str(choice) for choice in rng.permutation(choices)],
            "answer": heard[i], "about": f"{place} sound", "domain": domain}


def preferred(choices):
    """The option that the language prior favours."""
    return "three" if "three" in choices else min(choices, key=PREFERENCE.index)


def draw_row(name, split, rng):
    """A row of the jsonl file. Its favoured option is right with probability PRIOR_RIGHT."""
    prior_right = rng.random() < PRIOR_RIGHT
    domain = str(rng.choice(list(DOMAINS), p=list(DOMAINS.values())))
    while True:
        events = draw_events(rng)
        if domain == "count" and all(event["sound"] != "knocks" for event in events):
            continue
        row = draw_question(domain, events, rng)
        if (preferred(row["choices"]) == row["answer"]) == prior_right:
            return {"id": name, "audio": f"wav/{split}/{name}.wav", **row, "events": events}


def write_world(folder, seed):
    """Writes the three jsonl files and the wav files → {split: rows}."""
    rows = {}
    for number, (split, size) in enumerate(SPLITS.items()):
        rng = np.random.default_rng([seed, number])
        (folder / "wav" / split).mkdir(parents=True)
        rows[split] = []
        for i in tqdm(range(size), desc=f"toy: {split} clips", leave=False):
            row = draw_row(f"{split}-{i}", split, rng)
            samples = render(row["events"], rng)
            soundfile.write(folder / row["audio"], samples.clip(-1, 1), data.SAMPLE_RATE, "PCM_16")
            rows[split].append(row)
        lines = [json.dumps(row) + "\n" for row in rows[split]]
        (folder / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
    return rows


# ──────── Demonstrations ────────


def article(sound):
    """The word with its article. "knocks" and numbers have none."""
    return f"a {sound}" if sound in SOUNDS and sound != "knocks" else sound


def demonstration(row, rng, listening=1.0, slip=0.0):
    """A completion for the row: description of the sounds, topic, filler, conclusion, answer.

    listening: probability that the answer comes from the audio and not from the prior.
    slip: probability that a sound's name is drawn at random. The defaults make no errors.
    """
    heard = [str(rng.choice(SOUNDS)) if rng.random() < slip else event["sound"]
             for event in row["events"]]
    answer = row["answer"] if rng.random() < listening else preferred(row["choices"])
    description = ", ".join(f"the {place} is {article(sound)}"
                            for place, sound in zip(places(row["events"]), heard))
    return (f"<think> I hear: {description}. This asks for the {row['about']}. "
            f"{rng.choice(FILLERS)} So the {row['about'].removesuffix(' sound')} is "
            f"{article(answer)}.</think> {answer}")


# ──────── The tiny model ────────

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|audio_start|>", "<|audio_end|>",
           "<|audio_pad|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
MARKERS = {"audio_token": "<|audio_pad|>", "audio_bos_token": "<|audio_start|>",
           "audio_eos_token": "<|audio_end|>", "image_token": "<|image_pad|>",
           "video_token": "<|video_pad|>", "vision_bos_token": "<|vision_start|>",
           "vision_eos_token": "<|vision_end|>"}
# Unused here, but a vLLM server looks for these fields in preprocessor_config.json.
IMAGES = {"processor_class": "Qwen3OmniMoeProcessor", "patch_size": 16, "merge_size": 2,
          "image_processor_type": "Qwen2VLImageProcessor", "temporal_patch_size": 2}
CHAT_TEMPLATE = """{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\n' }}
{%- if message.content is string %}{{- message.content }}
{%- else %}
{%- for item in message.content %}
{%- if item.type == 'audio' %}{{- '<|audio_start|><|audio_pad|><|audio_end|>' }}
{%- else %}{{- item.text }}{%- endif %}
{%- endfor %}
{%- endif %}
{{- '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"""


def build_tokenizer(texts, vocab_size=1000):
    """A byte-level BPE tokenizer trained on `texts`, with the real model's special tokens."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    bpe.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab_size, min_frequency=2, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    learnt = json.loads(bpe.to_str())["model"]
    tokenizer = Qwen2Tokenizer(
        vocab=learnt["vocab"], merges=[tuple(merge) for merge in learnt["merges"]],
        eos_token="<|im_end|>", pad_token="<|endoftext|>", extra_special_tokens=list(SPECIAL),
        padding_side="left", model_specific_special_tokens=MARKERS)
    tags = [AddedToken(tag, special=False) for tag in ("<think>", "</think>")]
    tokenizer.add_tokens(tags)  # not special, so that decoding keeps them
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def thinker_config(tokenizer, hidden_size, layers, audio_size, std):
    """The configuration of a small thinker of Qwen3-Omni, the class of the 30B model.

    hidden_size and layers belong to the text decoder, audio_size is the width of the audio tower,
    and std that of the random initial weights.
    """
    token = tokenizer.convert_tokens_to_ids
    head_dim = hidden_size // 4
    return Qwen3OmniMoeThinkerConfig(
        audio_config=dict(
            d_model=audio_size, encoder_layers=1, encoder_attention_heads=4, num_mel_bins=128,
            encoder_ffn_dim=2 * audio_size, downsample_hidden_size=16, output_dim=hidden_size,
            n_window=50, n_window_infer=800),
        vision_config=dict(
            depth=1, hidden_size=16, num_heads=1, intermediate_size=16, image_size=64,
            out_hidden_size=hidden_size, num_position_embeddings=16, deepstack_visual_indexes=[0],
            apply_vit_abs_pos_embed=True),
        text_config=dict(
            vocab_size=len(tokenizer), hidden_size=hidden_size, intermediate_size=2 * hidden_size,
            num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2,
            head_dim=head_dim, num_experts=4, num_experts_per_tok=2, initializer_range=std,
            moe_intermediate_size=hidden_size, max_position_embeddings=1024,
            tie_word_embeddings=False, rope_parameters=dict(
                rope_type="default", rope_theta=10000.0, mrope_interleaved=True,
                mrope_section=[head_dim // 4, head_dim // 8, head_dim // 8])),
        audio_token_id=token("<|audio_pad|>"), audio_start_token_id=token("<|audio_start|>"),
        audio_end_token_id=token("<|audio_end|>"), image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"), vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"), initializer_range=std,
        eos_token_id=token("<|im_end|>"), pad_token_id=token("<|endoftext|>"))


def build_model(tokenizer):
    """The toy's model with random weights: 4 text layers, 1 audio layer, 1.3 M parameters."""
    config = thinker_config(tokenizer, hidden_size=128, layers=4, audio_size=96, std=0.05)
    net = Qwen3OmniMoeThinkerForConditionalGeneration(config)
    # With std 0.02 the convolutions' output is small beside the position embeddings.
    for module in net.model.audio_tower.modules():
        if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)):
            module.reset_parameters()
    net.generation_config.update(eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id)
    return net


# ──────── The warm start ────────


def pretrain_audio_tower(policy, prompts, rows, rng):
    """Trains the audio tower to classify the sound at each audio token, then freezes it.

    The classification head is discarded. Without this step the demonstrations do not teach the
    model to recognise sounds (measured).
    """
    tower = policy.base.model.audio_tower
    head = torch.nn.Linear(tower.config.output_dim, len(SOUNDS) + 5)
    optimizer = torch.optim.AdamW([*tower.parameters(), *head.parameters()], lr=2e-3)
    labels = [sound_labels(row, prompt.ids.count(policy.audio_token_id))
              for row, prompt in zip(rows, prompts)]
    for step in (bar := tqdm(range(AUDIO_TOWER_STEPS), desc="toy: audio tower", leave=False)):
        optimizer.param_groups[0]["lr"] = 2e-3 * min(
            1, (step + 1) / 20, (AUDIO_TOWER_STEPS - step) / AUDIO_TOWER_STEPS * 2)
        chosen = rng.choice(len(rows), size=48, replace=False)
        audio = policy.collate([prompts[i] for i in chosen], [[]] * len(chosen)).audio
        # [audio tokens of all clips, classes]
        logits = head(policy.base.get_audio_features(**audio).last_hidden_state)
        target = torch.cat([labels[i] for i in chosen])
        loss = F.cross_entropy(logits, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        bar.set_postfix(loss=f"{loss:.2f}")
    tower.requires_grad_(False)


def sound_labels(row, tokens):
    """The class of each audio token → [tokens].

    0 is silence. Other classes are the sounds; knocks have one class per count. What counts is the
    centre of the token. The audio tower makes 13 tokens of 0.08 s for each second.
    """
    labels = torch.zeros(tokens, dtype=torch.long)
    for j in range(tokens):
        now = j // 13 + 0.08 * (j % 13) + 0.04  # seconds
        for event in row["events"]:
            if event["start"] <= now < event["end"]:
                labels[j] = (1 + SOUNDS.index(event["sound"]) if event["count"] == 1
                             else len(SOUNDS) + event["count"])
    return labels


def teach(policy, prompts, rows, rng):
    """Teaches the decoder to answer from what it hears, and then to favour the prior.

    First come clean demonstrations, until greedy accuracy on 128 dev questions reaches
    CLEAN_ENOUGH. It is measured every 25 steps from step 150 on; MOST_CLEAN_STEPS is the limit.
    Then come IMPERFECT_STEPS with imperfect demonstrations, while the learning rate falls to 0.
    """
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.01)

    def step(rate, late_weight, conclusion_weight, **kind):
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * rate
        chosen = rng.choice(len(rows["train"]), size=48, replace=False)
        demonstrations = [demonstration(rows["train"][i], rng, **kind) for i in chosen]
        loss = completion_loss(policy, [prompts["train"][i] for i in chosen], demonstrations,
                               late_weight, conclusion_weight)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        return float(loss.detach())

    accuracy = 0.0
    for i in (bar := tqdm(range(MOST_CLEAN_STEPS), desc="toy: clean steps", leave=False)):
        loss = step(min(1, (i + 1) / 20), 0.0, 8.0)
        if i >= 149 and i % 25 == 24:
            accuracy = greedy_accuracy(policy, prompts["dev"][:128])
            if accuracy >= CLEAN_ENOUGH:
                break
        bar.set_postfix(loss=f"{loss:.2f}", accuracy=f"{accuracy:.2f}")
    for i in (bar := tqdm(range(IMPERFECT_STEPS), desc="toy: imperfect steps", leave=False)):
        loss = step(1 - i / IMPERFECT_STEPS, LATE_WEIGHT, 1.0, listening=LISTENING, slip=SLIP)
        bar.set_postfix(loss=f"{loss:.2f}")


def completion_loss(policy, prompts, demonstrations, late_weight, conclusion_weight):
    """Cross-entropy of the demonstrations plus a penalty on late attention to the audio → scalar.

    conclusion_weight: weight of the sound or number in the conclusion; other tokens weigh 1.
    late_weight: weight of the penalty, the mean of max(a_t − LATE_MASS, 0) after the description.
    """
    tokenizer = policy.tokenizer
    batch = policy.collate(prompts, [ids + [tokenizer.eos_token_id]
                                     for ids in tokenizer(demonstrations)["input_ids"]])
    layers = (policy.num_layers - 2, policy.num_layers - 1) if late_weight else ()
    now = policy(batch, 1.0, layers)
    mask = batch.completion_mask.float()  # [B, T]
    target = batch.input_ids[:, -mask.shape[1]:]  # [B, T]

    def since(word):
        """1 from the first `word` of each completion on  [B, T]."""
        is_word = target == tokenizer.convert_tokens_to_ids(f"Ġ{word}")
        return is_word.cumsum(1).clamp(max=1) * mask

    content = tokenizer.convert_tokens_to_ids([f"Ġ{word}" for word in (*SOUNDS, *NUMBERS.values())])
    is_content = torch.isin(target, torch.tensor(content))
    weight = mask + (conclusion_weight - 1) * since("So") * is_content
    loss = -(now.logp * weight).sum() / weight.sum()
    if late_weight:
        excess = (audio_attention_mass(now.head_mass) - LATE_MASS).relu()
        loss = loss + late_weight * (excess * since("This")).sum() / since("This").sum()
    return loss


def greedy_accuracy(policy, prompts):
    """Share of the prompts whose greedy completion ends in the answer."""
    greedy = Sampling(temperature=0, max_new_tokens=MAX_NEW_TOKENS)
    completions = sample(policy, prompts, 1, greedy, seed=0)
    return float(np.mean([accuracy_reward(policy.decode(c), p.question.answer, p.question.choices)
                          for c, p in zip(completions, prompts)]))
