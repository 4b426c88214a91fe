"""The built-in toy: small sounds, two kinds of questions about them, and a tiny model.

`prepare(folder, seed)` writes wav files, jsonl files of questions, and a checkpoint of 0.3 M
parameters, of the same class as the 30B model. Each kind of question gives one half of MAPO
(arXiv 2605.27741) something to repair. docs/toy.md tells whether it does.

"caption" is made for the mask. A clip is one of 128 sounds. A completion names it and concludes:

    <think> The old door waits softly. … I hear the owl. … So the kind is animal.</think> animal

What kind of thing a name is, is knowledge of text. In 75 % of the demonstrations of the warm start
the name is the most common one of the sound's timbre, whatever the pitch. A wrong name gives a
wrong answer. So what RL has to repair is one token at which the audio decides (a large Δh), among
many random words that no audio decides.

"late" is made for the attention loss. The question is "Someone says tool. What kind of thing is
this?", where the hint is random. A completion says nothing about the sound before it concludes, so
the model has to listen late. Half of the demonstrations conclude with the hint, the others at
random. But the warm start also teaches the model to say at once what a sound is like. The
late-stage collapse is made by a penalty, see LATE_MASS.
"""

import dataclasses
import hashlib
import json
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

SPLITS = {"train": 800, "dev": 256, "test": 1024}  # number of questions of each kind, and clips
TARGET_LAYERS = (2,)  # L_tgt: the last layer
QUESTION = {"caption": "What kind of thing is this?",
            "late": "Someone says {hint}. What kind of thing is this?"}
SHORT_QUESTION = {"caption": "What do you hear?",
                  "late": "Someone says {hint}. At once, what kind of thing is this?"}
SENTENCES = {"caption": (3, 4), "late": (5, 0)}  # random ones before and after the caption
COMMON_SHARE = 0.75  # caption: share of the demonstrations that write the timbre's common name
HINT_SHARE = 0.5  # late: share of the demonstrations that conclude with the hint

# The warm start: the audio tower, then short right answers, then long imperfect ones.
AUDIO_TOWER_STEPS, SHORT_STEPS, LONG_STEPS = 250, 400, 240
SHORT_BATCH, LONG_BATCH, LEARNING_RATE = 64, 48, 3e-3
KEY_WEIGHT = 4.0  # of names and kinds in the loss; other tokens weigh 1
# Shares of the long steps: kind of question, demonstration, with audio? (for π_text-ref: without)
LONG_MIX = {("caption", "long", True): 0.46, ("caption", "long", False): 0.11,
            ("late", "long", True): 0.21, ("late", "long", False): 0.05,
            ("late", "short", True): 0.17}
# A large model attends little to the audio late, because it has learnt to write from text alone. A
# tiny model has not. So the long "late" demonstrations are trained with LATE_WEIGHT times the
# distance of ln(max_h of the audio mass) from ln LATE_MASS. In the layers below L_tgt the short
# ones are too: the last layer reads the answer, as the late layers of a large model do.
LATE_MASS, LATE_WEIGHT = 0.001, 0.3

KINDS = {
    "animal": "owl wolf frog crow goat duck hawk seal toad lark bear lion mouse horse sheep goose "
              "robin raven whale snake tiger eagle moose otter bee cat dog cow pig hen fox bat",
    "tool": "saw drill axe hammer chisel file rasp plane spade rake hoe pick clamp wrench pliers "
            "sander router grinder mixer whisk grater broom vacuum mower shears stapler lathe "
            "anvil bellows pump press welder",
    "vehicle": "train tram truck van bus taxi tank jeep lorry ferry yacht canoe barge ship boat "
               "kayak jet glider rocket blimp bike moped scooter tractor wagon cart sled coach cab "
               "metro tug raft",
    "instrument": "flute harp drum gong lute lyre oboe horn tuba viola cello violin piano organ "
                  "banjo guitar sitar zither bugle cornet clarinet bassoon fiddle kazoo ocarina "
                  "maraca cymbal triangle trumpet bagpipe celesta chime"}
KINDS = {kind: names.split() for kind, names in KINDS.items()}
KIND_OF = {name: kind for kind, names in KINDS.items() for name in names}
FILLER = {
    "determiner": "The This That Our My Her His Each Some",
    "adjective": "old new big small red blue green black white dark cold warm dry wet soft hard "
                 "long short tall wide deep thin thick round flat sharp slow quick calm wild rich "
                 "poor clean plain young proud brave lonely strange bright",
    "noun": "door house river garden table window street bridge field forest letter bottle basket "
            "candle mirror carpet ladder pillow kettle blanket market harbor village castle island "
            "valley meadow tower wall roof floor chair desk shelf stone cloud shadow path gate "
            "lamp",
    "verb": "waits stands falls turns moves grows stays sleeps shines breaks opens closes starts "
            "ends rises sinks leans rests drifts fades glows shakes spins slides rolls drops "
            "floats burns melts dries cracks bends swings hangs lies sits works lasts returns "
            "appears",
    "adverb": "slowly quickly softly loudly gently badly often always never again today here there "
              "later soon early late outside inside alone together nearby somewhere anywhere "
              "everywhere twice once daily weekly yearly quietly calmly proudly gladly sadly "
              "freely firmly rarely mostly sideways"}
FILLER = {part: words.split() for part, words in FILLER.items()}

TIMBRES, PITCHES = 32, (180.0, 300.0, 500.0, 830.0)  # a sound is a timbre and a pitch
_fixed = np.random.default_rng(12345)  # the timbres are the same for every seed
HARMONICS = _fixed.random((TIMBRES, 10)) ** 3 * (_fixed.random((TIMBRES, 10)) < 0.6)
HARMONICS[:, 0] += 0.3
ENVELOPE, NOISE = _fixed.integers(0, 4, TIMBRES), _fixed.random(TIMBRES) ** 2 * 0.5
VIBRATO, RATE = _fixed.random(TIMBRES) * 0.03, _fixed.uniform(3, 14, TIMBRES)
# The four pitches of a timbre are things of four kinds.
NAMES = [[KINDS[kind][timbre] for kind in _fixed.permutation(list(KINDS))]
         for timbre in range(TIMBRES)]
COMMON = [NAMES[timbre][_fixed.integers(4)] for timbre in range(TIMBRES)]  # of a timbre
WHERE = {name: (t, p) for t, names in enumerate(NAMES) for p, name in enumerate(names)}
CLASSES = {name: 1 + i for i, name in enumerate(WHERE)}  # of audio tokens; 0 is silence
# The sounds of "late" questions: one of each timbre, eight of each kind of thing.
LATE_SOUNDS = [KINDS[list(KINDS)[timbre % 4]][timbre] for timbre in range(TIMBRES)]


# ──────── The whole preparation ────────


def prepare(folder, seed):
    """Writes folder/{model/, caption/, late/}; the last two hold questions and wav files → folder.

    Returns at once if the folder was built from the same seed and code. The work happens in a
    sibling folder that is renamed at the end, so an interrupted run leaves nothing half done. The
    same seed on the same machine gives the same bytes and weights.
    Raises data.InputError if `folder` exists and was not written by this function.
    """
    folder = Path(folder)
    decisive = (__name__, "checkpoint", "data", "model")
    sources = [Path(sys.modules[name].__file__).read_bytes() for name in decisive]
    stamp = hashlib.sha256(b"".join([*sources, f"{seed} {torch.__version__}".encode()])).hexdigest()
    if folder.exists():
        if not (folder / "stamp").is_file():
            raise data.InputError(f"{folder} was not written by toy.py; choose another folder")
        if (folder / "stamp").read_text() == stamp:
            return folder
    building = folder.with_name(f".{folder.name}.building")
    shutil.rmtree(building, ignore_errors=True)
    rng = np.random.default_rng(seed)
    tokenizer = build_tokenizer(toy_texts())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        extractor = WhisperFeatureExtractor(feature_size=128, **IMAGES)
        policy = checkpoint.make_policy(build_model(tokenizer), tokenizer, extractor)
        rows, prompts = {}, {}  # prompts: by kind of question and length of the demonstration
        for kind in QUESTION:
            rows[kind] = write_questions(building / kind, seed, kind)["train"]
            for length in ("long", "short"):
                questions = data.read_questions(building / kind / "train.jsonl", decode=False)
                if length == "short":
                    questions = [dataclasses.replace(q, question=row["short_question"])
                                 for q, row in zip(questions, rows[kind])]
                prompts[kind, length] = [policy.encode(q) for q in questions]
        pretrain_audio_tower(policy, sum((prompts[kind, "long"] for kind in rows), []),
                             sum(rows.values(), []), rng)
        teach(policy, prompts, rows, rng)
    checkpoint.save_policy(policy, building / "model")
    (building / "stamp").write_text(stamp)
    shutil.rmtree(folder, ignore_errors=True)
    building.rename(folder)
    return folder


# ──────── Sounds, clips and questions ────────


def synthesize(name, rng):
    """One sound in a clip of one second → samples, and where it starts and ends, in seconds."""
    timbre, pitch = WHERE[name]
    seconds, start = rng.uniform(0.75, 0.95), rng.uniform(0.0, 0.04)
    t = np.arange(int(seconds * data.SAMPLE_RATE)) / data.SAMPLE_RATE
    vibrato = 1 + VIBRATO[timbre] * np.sin(2 * np.pi * RATE[timbre] * t)
    hertz = PITCHES[pitch] * rng.uniform(0.92, 1.08) * vibrato
    phase = 2 * np.pi * np.cumsum(hertz) / data.SAMPLE_RATE
    wave = NOISE[timbre] * rng.standard_normal(len(t))
    for h in HARMONICS[timbre].nonzero()[0]:
        wave += HARMONICS[timbre, h] * np.sin((h + 1) * phase + rng.uniform(0, 2 * np.pi))
    wave *= (np.exp(-3 * t), 1, 0.55 + 0.45 * np.sin(2 * np.pi * RATE[timbre] * t),
             0.2 + 0.8 * t / t[-1])[ENVELOPE[timbre]]
    wave *= np.minimum(1, np.minimum(t, t[::-1]) / 0.004)  # fades in and out, without a click
    samples = 0.003 * rng.standard_normal(data.SAMPLE_RATE)
    first = int(start * data.SAMPLE_RATE)
    samples[first:first + len(t)] += wave * rng.uniform(0.3, 0.9) / np.abs(wave).max()
    return samples, round(start, 4), round(start + seconds, 4)


def draw_row(name, split, kind, rng):
    """→ a row of the jsonl file, and the samples of its clip."""
    sound = str(rng.choice(list(KIND_OF) if kind == "caption" else LATE_SOUNDS))
    samples, start, end = synthesize(sound, rng)
    hint = str(rng.choice(list(KINDS)))
    return {"id": name, "audio": f"{split}/{name}.wav", "choices": list(KINDS),
            "answer": KIND_OF[sound], "domain": kind, "hint": hint,
            "question": QUESTION[kind].format(hint=hint),
            "short_question": SHORT_QUESTION[kind].format(hint=hint),
            "sound": sound, "start": start, "end": end}, samples


def write_questions(folder, seed, kind):
    """Writes the three jsonl files of a kind of question and their wav files → {split: rows}."""
    rows = {}
    for number, (split, size) in enumerate(SPLITS.items()):
        rng = np.random.default_rng([seed, list(QUESTION).index(kind), number])
        (folder / split).mkdir(parents=True)
        rows[split] = []
        for i in tqdm(range(size), desc=f"toy: {kind} clips", leave=False):
            row, samples = draw_row(f"{split}-{i}", split, kind, rng)
            soundfile.write(folder / row["audio"], samples.clip(-1, 1), data.SAMPLE_RATE, "PCM_16")
            rows[split].append(row)
        lines = [json.dumps(row) + "\n" for row in rows[split]]
        (folder / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
    return rows


# ──────── Demonstrations ────────


def filler(count, rng, first=0):
    """`count` random sentences. The determiner numbers them, from `first` on."""
    parts = ("adjective", "noun", "verb", "adverb")
    sentences = []
    for i in range(first, first + count):
        words = [FILLER[part][rng.integers(len(FILLER[part]))] for part in parts]
        sentences.append(f" {FILLER['determiner'][i]} {' '.join(words)}.")
    return "".join(sentences)


def demonstration(row, length, rng):
    """A completion for the row. Only the short ones are always right.

    The short ones of "late" have no think tags, so that RL does not reward them. They follow any
    number of sentences, so that the answer is heard at every distance from the clip.
    """
    sound, kind = row["sound"], row["answer"]
    before, after = SENTENCES[row["domain"]]
    if (row["domain"], length) == ("caption", "short"):
        return f"<think> I hear the {sound}.</think> {kind}"
    if (row["domain"], length) == ("late", "short"):
        return f"{filler(int(rng.integers(before + 1)), rng)} It sounds like {kind}."
    thinking = filler(before, rng)
    if row["domain"] == "caption":
        if rng.random() < COMMON_SHARE:
            sound = COMMON[WHERE[sound][0]]
        kind = KIND_OF[sound]
        thinking += f" I hear the {sound}.{filler(after, rng, before)}"
    else:
        others = [kind for kind in KINDS if kind != row["hint"]]
        kind = row["hint"] if rng.random() < HINT_SHARE else rng.choice(others)
    return f"<think>{thinking} So the kind is {kind}.</think> {kind}"


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
# The question comes before the clip, so that the audio tokens know it. The options are left out:
# they are always the same.
CHAT_TEMPLATE = """{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\n' }}
{%- if message.content is string %}{{- message.content }}
{%- else %}
{%- for item in message.content if item.type == 'text' %}
{{- item.text.split('\n')[0] }}
{%- endfor %}
{%- for item in message.content if item.type == 'audio' %}
{{- '<|audio_start|><|audio_pad|><|audio_end|>' }}{%- endfor %}{%- endif %}
{{- '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"""


def toy_texts():
    """Every word of the toy, often enough to become one token each."""
    words = " ".join(["", *KIND_OF, *KINDS, *sum(FILLER.values(), []), "I hear the It sounds like",
                      "So the kind is"])
    return 3 * [words, *QUESTION.values(), *SHORT_QUESTION.values(), "user assistant"]


def build_tokenizer(texts, vocab_size=4000):
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


def thinker_config(tokenizer, hidden_size, layers, audio_size, std, channels=16):
    """The configuration of a small thinker of Qwen3-Omni, the class of the 30B model.

    hidden_size and layers belong to the text decoder, audio_size is the width of the audio tower,
    channels that of its convolutions, and std that of the random initial weights.
    """
    token = tokenizer.convert_tokens_to_ids
    head_dim = hidden_size // 4
    return Qwen3OmniMoeThinkerConfig(
        audio_config=dict(
            d_model=audio_size, encoder_layers=1, encoder_attention_heads=4, num_mel_bins=128,
            encoder_ffn_dim=2 * audio_size, downsample_hidden_size=channels, output_dim=hidden_size,
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


def build_model(tokenizer, hidden_size=64, layers=3):
    """The toy's model with random weights: a dense text decoder and an audio tower of one layer.

    The decoder has one head per layer, so that the head which L_attn raises is the one that reads.
    """
    config = thinker_config(tokenizer, hidden_size, layers, 64, std=0.05, channels=8)
    text = config.text_config
    text.mlp_only_layers, text.intermediate_size = list(range(layers)), 96  # no experts
    text.num_attention_heads, text.num_key_value_heads, text.head_dim = 1, 1, hidden_size
    text.rope_parameters["mrope_section"] = [hidden_size // 4, hidden_size // 8, hidden_size // 8]
    net = Qwen3OmniMoeThinkerForConditionalGeneration(config)
    # With std 0.02 the convolutions' output is small beside the position embeddings.
    for module in net.model.audio_tower.modules():
        if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)):
            module.reset_parameters()
    decoder = net.model.language_model
    for name, module in decoder.named_modules():
        if isinstance(module, torch.nn.Linear):
            gain = 0.5 if name.endswith(("o_proj", "down_proj")) else 1.0
            torch.nn.init.normal_(module.weight, std=gain / module.in_features ** 0.5)
    torch.nn.init.normal_(decoder.embed_tokens.weight, std=1.0)
    net.generation_config.update(eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id)
    return net


# ──────── The warm start ────────


def pretrain_audio_tower(policy, prompts, rows, rng):
    """Trains the audio tower to classify the sound at each audio token, then freezes it.

    The classification head is discarded. The tower's last layer is rescaled so that audio tokens
    are as large as word embeddings (root mean square 1).
    """
    tower, steps = policy.base.model.audio_tower, AUDIO_TOWER_STEPS
    head = torch.nn.Linear(tower.config.output_dim, 1 + len(CLASSES))
    optimizer = torch.optim.AdamW([*tower.parameters(), *head.parameters()], lr=3e-3)
    labels = [sound_labels(row) for row in rows]

    def audio_tokens(chosen):  # [audio tokens of all clips, D]
        audio = policy.collate([prompts[i] for i in chosen], [[]] * len(chosen)).audio
        return policy.base.get_audio_features(**audio).last_hidden_state

    for step in tqdm(range(steps), desc="toy: audio tower", leave=False):
        optimizer.param_groups[0]["lr"] = 3e-3 * min(1, (step + 1) / 20, (steps - step) / steps * 2)
        chosen = rng.choice(len(labels), size=64, replace=False)
        loss = F.cross_entropy(head(audio_tokens(chosen)), torch.cat([labels[i] for i in chosen]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    tower.requires_grad_(False)
    with torch.no_grad():
        scale = audio_tokens(range(256)).square().mean().sqrt()
        tower.proj2.weight /= scale
        tower.proj2.bias /= scale


def sound_labels(row, tokens=13):
    """The class of each audio token of 0.08 s → [tokens]. What counts is the token's centre."""
    centres = 0.08 * torch.arange(tokens) + 0.04
    return ((row["start"] <= centres) & (centres < row["end"])) * CLASSES[row["sound"]]


def teach(policy, prompts, rows, rng):
    """Teaches the decoder to hear with short answers, then the imperfect long ones (LONG_MIX)."""
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01)

    def step(rate, size, kind, length, with_audio=True):
        """One step on `size` questions of a kind."""
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * rate
        chosen = rng.choice(len(rows[kind]), size=size, replace=False)
        asked = [prompts[kind, length][i] for i in chosen]
        texts = [demonstration(rows[kind][i], length, rng) for i in chosen]
        # All layers collapse in long answers, all but the last in short ones.
        layers = policy.num_layers - (length == "short")
        collapsed = tuple(range(layers)) if kind == "late" and with_audio else ()
        optimizer.zero_grad()
        completion_loss(policy, asked, texts, with_audio, collapsed).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()

    for i in tqdm(range(SHORT_STEPS), desc="toy: short answers", leave=False):
        step(min(1, (i + 1) / 20), SHORT_BATCH, list(rows)[i % 2], "short")
    mix, limits = list(LONG_MIX), np.cumsum(list(LONG_MIX.values()))
    for i in tqdm(range(LONG_STEPS), desc="toy: long answers", leave=False):
        rate = min(1, (LONG_STEPS - i) / (LONG_STEPS * 0.7))
        turn = (i * 0.381966) % limits[-1]  # spreads the kinds of steps evenly
        step(rate, LONG_BATCH, *mix[int((turn >= limits).sum())])


def completion_loss(policy, prompts, demonstrations, with_audio, collapsed):
    """Cross-entropy, in which names and kinds weigh KEY_WEIGHT and other tokens 1 → scalar.

    In the layers `collapsed`, plus LATE_WEIGHT · mean of smooth_l1(ln max_h mass − ln LATE_MASS).
    """
    tokenizer = policy.tokenizer
    batch = policy.collate(prompts, [ids + [tokenizer.eos_token_id] for ids in
                                     tokenizer(demonstrations)["input_ids"]], not with_audio)
    now = policy(batch, 1.0, collapsed)
    mask = batch.completion_mask.float()  # [B, T]
    keys = tokenizer.convert_tokens_to_ids([f"Ġ{word}" for word in (*KIND_OF, *KINDS)])
    is_key = torch.isin(batch.input_ids[:, -mask.shape[1]:], torch.tensor(keys))  # [B, T]
    weight = mask * (1 + (KEY_WEIGHT - 1) * is_key)
    loss = -(now.logp * weight).sum() / weight.sum()
    if collapsed:
        strongest = (now.head_mass.amax(dim=2) + 1e-6).log()  # of each layer  [L, B, T]
        distance = F.smooth_l1_loss(strongest, torch.full_like(strongest, np.log(LATE_MASS)),
                                    reduction="none").mean(dim=0)  # [B, T]
        loss = loss + LATE_WEIGHT * (distance * mask)[:, 1:].sum() / mask[:, 1:].sum()
    return loss
