"""The embedded default world: short clips of synthetic sounds, questions about them and a tiny model that half listens.

`prepare(folder, seed)` writes everything the method needs to run for real on two CPU cores: wav files, three jsonl
files, and a checkpoint of the class that also holds the 30B model, warm-started on imperfect demonstrations.

The world. Three or four sounds in a row, and one of two questions: which sound stands at a place (75 %), or how many
knocks there are (25 %). A completion reads

    <think> I hear: the first is a bell, the second is knocks, the last is a hiss. This asks for the second sound. Let
    me think slowly about it. So the second is knocks.</think> knocks

The language prior. Each question has one option that text alone prefers (PREFERENCE; "three" knocks), and it is right
on a third of the questions. Demonstrations name the sounds they hear and then, more often than not, conclude with the
preferred option. The policy that learns from them hears, speaks of what it heard, and answers from the prior: the
late-stage collapse that MAPO (arXiv 2605.27741) is about. Its way out is to conclude from what it said, or, for the
number of knocks, which no caption tells, to listen again.
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
from transformers import (Qwen2Tokenizer, Qwen3OmniMoeThinkerConfig, Qwen3OmniMoeThinkerForConditionalGeneration,
                          WhisperFeatureExtractor)
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

import data
import model
from mapo import audio_attention_mass
from rewards import accuracy_reward
from rollout import sample

SPLITS = {"train": 3000, "dev": 256, "test": 1024}  # questions, each with a clip of its own
DOMAINS = {"place": 0.75, "count": 0.25}  # kinds of question, and their shares
PRIOR_RIGHT = 1 / 3  # share of the questions whose answer is the option that the language prior prefers
LISTENING = 0.4  # share of the demonstrations that conclude from the audio; the others conclude from the prior
SLIP = 0.05  # share of the sounds that a demonstration mishears
CLEAN_ENOUGH = 0.8  # greedy accuracy at which the warm start goes over to imperfect demonstrations
EAR_STEPS = 200
MOST_CLEAN_STEPS = 225
IMPERFECT_STEPS = 80
# A large model's attention leaves the audio late because it learnt to write from text alone. The toy has not: it is
# given that habit by a penalty on the a_t that exceeds LATE_MASS after the caption, in the imperfect phase alone.
LATE_MASS, LATE_WEIGHT = 0.15, 1.0
LEARNING_RATE = 2.5e-3
MAX_NEW_TOKENS = 64  # of the greedy looks at accuracy

SOUNDS = ("bell", "whistle", "siren", "hiss", "knocks", "hum", "chirp", "buzz", "drum")
PREFERENCE = ("siren", "bell", "drum", "whistle", "buzz", "knocks", "chirp", "hum", "hiss")  # the prior's, best first
NUMBERS = {2: "two", 3: "three", 4: "four"}
PLACES = ("first", "second", "third")
FILLERS = ("Let me think slowly about it.", "I should weigh every option carefully.",
           "Only one of these options can be right.", "Such recordings often surprise people.",
           "The recording is rather short.", "I will now compare the options.", "That seems quite simple.",
           "The answer needs a little care.")


# ──────────────────────────────────────────────── The whole preparation ───────────────────────────────────────────────


def prepare(folder, seed):
    """Writes folder/{model/, train.jsonl, dev.jsonl, test.jsonl, wav/} → folder. Returns at once when it stands.

    Built in a sibling folder and renamed at the end, so that a broken run leaves nothing half done. The same seed on
    the same machine gives the same bytes and weights. Raises data.InputError when `folder` holds something else.
    """
    folder = Path(folder)
    used = (__name__, "data", "mapo", "model", "rewards", "rollout")  # what decides the questions and the weights
    sources = [Path(sys.modules[name].__file__).read_bytes() for name in used]
    stamp = hashlib.sha256(b"".join([*sources, f"{seed} {torch.__version__}".encode()])).hexdigest()
    if folder.exists():
        if not (folder / "stamp").is_file():
            raise data.InputError(f"{folder}: exists and was not written by toy.py; name another folder or remove it")
        if (folder / "stamp").read_text() == stamp:
            return folder
    building = folder.with_name(f".{folder.name}.building")
    shutil.rmtree(building, ignore_errors=True)
    rows = write_world(building, seed)
    rng = np.random.default_rng([seed, len(SPLITS)])
    questions = {split: data.read_questions(building / f"{split}.jsonl") for split in ("train", "dev")}
    tokenizer = build_tokenizer([f"{data.conversation(question, with_audio=False)[0]['content'][0]['text']} "
                                 f"{demonstration(row, rng)}"
                                 for question, row in zip(questions["train"], rows["train"])])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        extractor = WhisperFeatureExtractor(feature_size=128, **IMAGES)
        policy = model.make_policy(build_model(tokenizer), tokenizer, extractor)
        prompts = {split: [policy.encode(q) for q in tqdm(questions[split], desc="toy: features", leave=False)]
                   for split in questions}
        train_ears(policy, prompts["train"], rows["train"], rng)
        teach(policy, prompts, rows, rng)
    policy.save(building / "model")
    (building / "stamp").write_text(stamp)
    shutil.rmtree(folder, ignore_errors=True)
    building.rename(folder)
    return folder


def caption_is_exact(completion, events):
    """Whether the first sentence names the sounds of the clip, all of them, in order. `events`: the jsonl row's."""
    named = [word for word in re.findall(r"\w+", completion.split(".")[0]) if word in SOUNDS]
    return named == [event["sound"] for event in events]


# ───────────────────────────────────────────── Sounds, clips and questions ────────────────────────────────────────────


def synthesize(sound, count, rng):
    """One sound, at a random pitch → float samples. `count` is the number of knocks."""
    seconds = 0.11 * count if sound == "knocks" else rng.uniform(0.26, 0.36)
    t = np.arange(int(seconds * data.SAMPLE_RATE)) / data.SAMPLE_RATE
    pitch = rng.uniform(0.9, 1.1)
    sine = lambda hertz: np.sin(2 * np.pi * np.cumsum(np.broadcast_to(hertz * pitch, t.shape)) / data.SAMPLE_RATE)
    noise, sweep = rng.standard_normal(len(t)), 750 - 350 * np.cos(2 * np.pi * t / seconds)
    wave = {"bell": lambda: (sine(880.0) + 0.7 * sine(2430.0) + 0.4 * sine(3700.0)) * np.exp(-7 * t),
            "whistle": lambda: sine(1900 + 60 * np.sin(2 * np.pi * 7 * t)),
            "siren": lambda: sine(sweep) + 0.3 * sine(2 * sweep),
            "hiss": lambda: np.diff(noise, append=0) * 0.6,
            "knocks": lambda: np.convolve(noise, np.ones(6) / 3, "same") * np.exp(-60 * (t % 0.11)),
            "hum": lambda: sine(120.0) + 0.6 * sine(240.0) + 0.3 * sine(360.0),
            "chirp": lambda: sine(2600 + 2600 * (t % 0.09) / 0.09),
            "buzz": lambda: np.sign(sine(210.0)) * 0.6,
            "drum": lambda: (sine(75.0) + 0.2 * noise * np.exp(-80 * t)) * np.exp(-9 * t) * 1.5}[sound]()
    fade = np.minimum(1, np.minimum(t, t[::-1]) / 0.004)
    return wave * fade * rng.uniform(0.12, 0.3)


def draw_events(rng):
    """Three or four different sounds in a row → [{"sound", "count"}]; the count is the number of knocks, else 1."""
    sounds = rng.choice(SOUNDS, size=rng.integers(3, 5), replace=False)
    return [{"sound": str(sound), "count": int(rng.integers(2, 5)) if sound == "knocks" else 1} for sound in sounds]


def render(events, rng):
    """Plays the events with short gaps → samples; writes "start" and "end", in seconds, into each event."""
    gap = lambda: np.zeros(int(rng.uniform(0.02, 0.06) * data.SAMPLE_RATE))
    pieces = [gap()]
    for event in events:
        start = sum(map(len, pieces))
        pieces += [synthesize(event["sound"], event["count"], rng), gap()]
        event["start"], event["end"] = (round(n / data.SAMPLE_RATE, 4) for n in (start, start + len(pieces[-2])))
    samples = np.concatenate(pieces)
    return samples + 0.003 * rng.standard_normal(len(samples))


def places(events):
    """The ordinal of each event: first, second, ..., last."""
    return (*PLACES[:len(events) - 1], "last")


def draw_question(domain, events, rng):
    """A question that the events answer → {"question", "choices", "answer", "about", "domain"}."""
    heard = [event["sound"] for event in events]
    if domain == "count":
        answer, choices = NUMBERS[events[heard.index("knocks")]["count"]], list(NUMBERS.values())
        return {"question": "How many knocks are there?", "choices": choices, "answer": answer,
                "about": "number of knocks", "domain": "count"}
    i = rng.integers(len(heard))
    place = places(events)[i]
    allowed = [sound for sound in SOUNDS if sound != heard[i]]
    choices = [heard[i], *rng.choice(allowed, size=3, replace=False)]
    return {"question": f"Which sound comes {place}?", "choices": [str(choice) for choice in rng.permutation(choices)],
            "answer": heard[i], "about": f"{place} sound", "domain": domain}


def preferred(choices):
    """The option that the language prior answers with."""
    return "three" if "three" in choices else min(choices, key=PREFERENCE.index)


def draw_row(name, split, rng):
    """One question → a row of the jsonl file. The prior is right with probability PRIOR_RIGHT."""
    prior_right, domain = rng.random() < PRIOR_RIGHT, str(rng.choice(list(DOMAINS), p=list(DOMAINS.values())))
    while True:
        events = draw_events(rng)
        if domain == "count" and all(event["sound"] != "knocks" for event in events):
            continue
        row = draw_question(domain, events, rng)
        if (preferred(row["choices"]) == row["answer"]) == prior_right:
            return {"id": name, "audio": f"wav/{split}/{name}.wav", **row, "events": events}


def write_world(folder, seed):
    """Writes the three jsonl files and their wav files → {split: rows}."""
    rows = {}
    for number, (split, size) in enumerate(SPLITS.items()):
        rng = np.random.default_rng([seed, number])
        (folder / "wav" / split).mkdir(parents=True)
        rows[split] = []
        for i in tqdm(range(size), desc=f"toy: {split} clips", leave=False):
            row = draw_row(f"{split}-{i}", split, rng)
            samples = render(row["events"], rng)
            soundfile.write(folder / row["audio"], samples.clip(-1, 1), data.SAMPLE_RATE, subtype="PCM_16")
            rows[split].append(row)
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[split]), encoding="utf-8")
    return rows


# ─────────────────────────────────────────────────── Demonstrations ───────────────────────────────────────────────────


def article(sound):
    """The sound as the thinking names it; numbers and knocks go without an article."""
    return f"a {sound}" if sound in SOUNDS and sound != "knocks" else sound


def demonstration(row, rng, listening=1.0, slip=0.0):
    """A completion for the row: caption, topic, filler, conclusion, answer. The defaults give a right and clean one."""
    heard = [str(rng.choice(SOUNDS)) if rng.random() < slip else event["sound"] for event in row["events"]]
    answer = row["answer"] if rng.random() < listening else preferred(row["choices"])
    caption = ", ".join(f"the {place} is {article(sound)}" for place, sound in zip(places(row["events"]), heard))
    return (f"<think> I hear: {caption}. This asks for the {row['about']}. {rng.choice(FILLERS)} "
            f"So the {row['about'].removesuffix(' sound')} is {article(answer)}.</think> {answer}")


# ──────────────────────────────────────────────────── The tiny model ──────────────────────────────────────────────────

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|audio_start|>", "<|audio_end|>", "<|audio_pad|>",
           "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
MARKERS = {"audio_token": "<|audio_pad|>", "audio_bos_token": "<|audio_start|>", "audio_eos_token": "<|audio_end|>",
           "image_token": "<|image_pad|>", "video_token": "<|video_pad|>", "vision_bos_token": "<|vision_start|>",
           "vision_eos_token": "<|vision_end|>"}
IMAGES = {"processor_class": "Qwen3OmniMoeProcessor", "image_processor_type": "Qwen2VLImageProcessor", "patch_size": 16,
          "merge_size": 2, "temporal_patch_size": 2}  # unused here; a vLLM server asks for them
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


def build_tokenizer(texts):
    """A byte-level BPE tokenizer in which each word of `texts` is one token, in the shape of the real model's."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated"),
                                                 pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    bpe.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=1000, min_frequency=2, show_progress=False,
                                                       initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    learnt = json.loads(bpe.to_str())["model"]
    tokenizer = Qwen2Tokenizer(vocab=learnt["vocab"], merges=[tuple(merge) for merge in learnt["merges"]],
                               eos_token="<|im_end|>", pad_token="<|endoftext|>", extra_special_tokens=list(SPECIAL),
                               padding_side="left", model_specific_special_tokens=MARKERS)
    tokenizer.add_tokens([AddedToken(tag, special=False) for tag in ("<think>", "</think>")])  # decoding keeps them
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def build_model(tokenizer):
    """The class of the 30B thinker, with random weights: 4 text layers, 1 audio layer, about 1.3 M parameters."""
    token = tokenizer.convert_tokens_to_ids
    config = Qwen3OmniMoeThinkerConfig(
        audio_config=dict(d_model=96, encoder_layers=1, encoder_attention_heads=4, encoder_ffn_dim=192,
                          num_mel_bins=128, downsample_hidden_size=16, output_dim=128, n_window=50, n_window_infer=800),
        vision_config=dict(depth=1, hidden_size=16, num_heads=1, intermediate_size=16, out_hidden_size=128,
                           num_position_embeddings=16, deepstack_visual_indexes=[0], image_size=64,
                           apply_vit_abs_pos_embed=True),
        text_config=dict(vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256, num_hidden_layers=4,
                         num_attention_heads=4, num_key_value_heads=2, head_dim=32, num_experts=4,
                         num_experts_per_tok=2, moe_intermediate_size=128, max_position_embeddings=1024,
                         initializer_range=0.05, tie_word_embeddings=False,
                         rope_parameters=dict(rope_type="default", rope_theta=10000.0, mrope_section=[8, 4, 4],
                                              mrope_interleaved=True)),
        audio_token_id=token("<|audio_pad|>"), audio_start_token_id=token("<|audio_start|>"),
        audio_end_token_id=token("<|audio_end|>"), image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"), vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"), initializer_range=0.05,
        eos_token_id=token("<|im_end|>"), pad_token_id=token("<|endoftext|>"))
    tiny = Qwen3OmniMoeThinkerForConditionalGeneration(config)
    for module in tiny.model.audio_tower.modules():  # 0.02 leaves the convolutions tiny beside the positions
        if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)):
            module.reset_parameters()
    tiny.generation_config.update(eos_token_id=token("<|im_end|>"), pad_token_id=token("<|endoftext|>"))
    return tiny


# ───────────────────────────────────────────────────── The warm start ─────────────────────────────────────────────────


def train_ears(policy, prompts, rows, rng):
    """Trains the audio tower to tell the sound under each of its tokens, with a head that is thrown away.

    Without it the demonstrations never teach the model to hear. (measured) The tower stays as it is from here on.
    """
    tower = policy.base.model.audio_tower
    head = torch.nn.Linear(tower.config.output_dim, len(SOUNDS) + 5)
    optimizer = torch.optim.AdamW([*tower.parameters(), *head.parameters()], lr=2e-3)
    labels = [sound_labels(row, prompt.ids.count(policy.audio_token_id)) for row, prompt in zip(rows, prompts)]
    for step in (bar := tqdm(range(EAR_STEPS), desc="toy: ears", leave=False)):
        optimizer.param_groups[0]["lr"] = 2e-3 * min(1, (step + 1) / 20, (EAR_STEPS - step) / EAR_STEPS * 2)
        chosen = rng.choice(len(rows), size=48, replace=False)
        audio = policy.collate([prompts[i] for i in chosen], [[]] * len(chosen)).audio
        logits = head(policy.base.get_audio_features(**audio).last_hidden_state)  # [tokens of all clips, classes]
        target = torch.cat([labels[i] for i in chosen])
        loss = F.cross_entropy(logits, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        bar.set_postfix(loss=f"{loss:.2f}", right=f"{(logits.argmax(1) == target).float().mean():.2f}")
    tower.requires_grad_(False)


def sound_labels(row, tokens):
    """The class of each audio token: 0 silence, else the sound, with its count, under the token's centre → [tokens]."""
    labels = torch.zeros(tokens, dtype=torch.long)
    for j in range(tokens):
        now = j // 13 + 0.08 * (j % 13) + 0.04
        for event in row["events"]:
            if event["start"] <= now < event["end"]:
                labels[j] = 1 + SOUNDS.index(event["sound"]) if event["count"] == 1 else len(SOUNDS) + event["count"]
    return labels


def teach(policy, prompts, rows, rng):
    """Teaches the decoder to answer from what it hears, then to prefer the prior.

    One rule: clean demonstrations until greedy accuracy on 128 dev questions reaches CLEAN_ENOUGH (looked at every 25
    steps from 150 on, MOST_CLEAN_STEPS at most), then IMPERFECT_STEPS of imperfect ones, learning rate falling to 0.
    """
    parameters = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.01)

    def step(rate, late_weight, conclusion_weight, **kind):
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * rate
        chosen = rng.choice(len(rows["train"]), size=48, replace=False)
        demonstrations = [demonstration(rows["train"][i], rng, **kind) for i in chosen]
        loss = completion_loss(policy, [prompts["train"][i] for i in chosen], demonstrations, late_weight,
                               conclusion_weight)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        return float(loss.detach())

    accuracy = 0.0
    for i in (bar := tqdm(range(MOST_CLEAN_STEPS), desc="toy: clean demonstrations", leave=False)):
        loss = step(min(1, (i + 1) / 20), 0.0, 8.0)
        if i >= 149 and i % 25 == 24:
            accuracy = greedy_accuracy(policy, prompts["dev"][:128])
            if accuracy >= CLEAN_ENOUGH:
                break
        bar.set_postfix(loss=f"{loss:.2f}", accuracy=f"{accuracy:.2f}")
    for i in (bar := tqdm(range(IMPERFECT_STEPS), desc="toy: imperfect demonstrations", leave=False)):
        loss = step(1 - i / IMPERFECT_STEPS, LATE_WEIGHT, 1.0, listening=LISTENING, slip=SLIP)
        bar.set_postfix(loss=f"{loss:.2f}")


def completion_loss(policy, prompts, demonstrations, late_weight, conclusion_weight):
    """Cross-entropy of the demonstrations, the concluding sound or number weighted by `conclusion_weight`, plus
    `late_weight` times what a_t has above LATE_MASS after the caption."""
    tokenizer = policy.tokenizer
    batch = policy.collate(prompts, [ids + [tokenizer.eos_token_id] for ids in tokenizer(demonstrations)["input_ids"]])
    layers = (policy.num_layers - 2, policy.num_layers - 1) if late_weight else ()
    now = policy(batch, 1.0, layers)
    mask, target = batch.completion_mask.float(), batch.input_ids[:, -batch.completion_mask.shape[1]:]

    def since(word):  # 1 from the first `word` of a completion on
        return (target == tokenizer.convert_tokens_to_ids(f"Ġ{word}")).cumsum(1).clamp(max=1) * mask

    content = tokenizer.convert_tokens_to_ids([f"Ġ{word}" for word in (*SOUNDS, *NUMBERS.values())])
    weight = mask + (conclusion_weight - 1) * since("So") * torch.isin(target, torch.tensor(content))
    loss = -(now.logp * weight).sum() / weight.sum()
    if late_weight:
        excess = (audio_attention_mass(now.head_mass) - LATE_MASS).relu()
        loss = loss + late_weight * (excess * since("This")).sum() / since("This").sum()
    return loss


def greedy_accuracy(policy, prompts):
    """Share of the prompts whose greedy completion ends in the answer."""
    completions = sample(policy, prompts, 1, temperature=0, max_new_tokens=MAX_NEW_TOKENS, seed=0)
    return float(np.mean([accuracy_reward(policy.text(c), p.question.answer, p.question.choices)
                          for c, p in zip(completions, prompts)]))
