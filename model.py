"""The policy π_θ: an audio LLM of transformers, and the three things that MAPO reads off its forward pass.

    policy = load_policy(folder)
    prompts = [policy.encode(question) for question in questions]
    batch = policy.collate(prompts, completions)              # token ids, one completion a prompt
    logp, entropy, head_mass = policy(batch, temperature, target_layers)
    text = policy.collate(prompts, completions, text_only=True)   # the view of π_text-ref: no audio

For completion tokens y_1..y_T the forward gives log π(y_t), the entropy H(π(·|y_<t, x)) and, for the layers of L_tgt,
the audio attention mass m_t⁽ˡʰ⁾ of every head. Column t−1 is read at the row that *predicts* y_t (whose input is
y_{t−1}, or the last prompt token for y_1). Log-probs and entropies are of the distribution at the sampling temperature.

Nothing of size [T, vocabulary] or [heads, T, keys] is kept: logits are formed some columns at a time and again
in the backward pass, and attention keeps its fused kernel, with the mass computed beside it in the target layers alone.
"""

import copy
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch.distributed.tensor import DTensor
from transformers import (AttentionInterface, AttentionMaskInterface, AutoConfig, AutoModelForMultimodalLM,
                          AutoTokenizer, GenerationConfig, Qwen2_5OmniForConditionalGeneration,
                          Qwen3OmniMoeForConditionalGeneration, WhisperFeatureExtractor)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from data import SAMPLE_RATE, InputError, Question, conversation, load_audio

LOGIT_COLUMNS = 4096  # columns of logits alive at a time: 16 MiB in fp32 for 1024 tokens
# Query rows of attention weights alive at a time: few for a processor's cache; on a GPU a block costs a dozen kernel
# launches, whatever its size (0.2 GiB at 8 × 32 heads × 1,790 keys; computed, not measured).
MASS_ROWS = {"cpu": 8, "cuda": 128}


class Statistics(NamedTuple):
    """What one forward says about B completions of at most T tokens. Columns off the completion mask hold 0."""

    logp: torch.Tensor  # [B, T] log π(y_t | y_<t, x), nats
    entropy: torch.Tensor  # [B, T] H(π(· | y_<t, x)), nats, detached
    head_mass: torch.Tensor | None  # [L, B, H, T] m_t⁽ˡʰ⁾, or None when no layer was asked for


@dataclass(frozen=True)
class Prompt:
    """An encoded question. `ids` holds one placeholder per audio token; `text_ids` is the prompt without audio."""

    question: Question
    ids: list[int]
    text_ids: list[int]
    features: tuple[torch.Tensor, ...]  # log-mel, one [mel bins, F] a clip
    frames: tuple[int, ...]  # how many of the F frames of each clip are audio; the rest is padding
    instruction: str = ""


@dataclass(frozen=True)
class Batch:
    """B rows of left-padded prompt [P] + right-padded completion [T], and the audio features of the model's forward."""

    input_ids: torch.Tensor  # [B, P+T]
    attention_mask: torch.Tensor  # [B, P+T], 0 on padding of either side
    completion_mask: torch.Tensor  # [B, T] bool
    audio: dict[str, torch.Tensor]  # keyword arguments of the model's forward; empty in the text-only view

    def to(self, device):
        audio = {name: value.to(device) for name, value in self.audio.items()}
        return Batch(*(x.to(device) for x in (self.input_ids, self.attention_mask, self.completion_mask)), audio)


# ─────────────────────────────────────────────────────── the forward ──────────────────────────────────────────────────


class Policy(torch.nn.Module):
    """An audio LLM with its tokenizer and feature extractor. `model` is the transformers model, or peft's wrapper."""

    def __init__(self, model, tokenizer, feature_extractor, folder=None, full_config=None, saved_dtype=None):
        super().__init__()
        self.model, self.tokenizer, self.feature_extractor = model, tokenizer, feature_extractor
        self.folder = folder  # the checkpoint that it was loaded from
        self.full_config = full_config  # of the whole Omni model, when that is what the folder holds
        self.saved_dtype = saved_dtype or self.base.dtype  # of the folder; training may be in a wider one
        config = self.base.config
        self.audio_token_id = config.audio_token_id
        # Ids that stand for features. A sampled one would ask the next forward for audio that does not exist.
        names = ("audio_token_id", "image_token_id", "video_token_id")
        self.placeholder_ids = sorted({getattr(config, n) for n in names if getattr(config, n, None) is not None})
        self.eos_ids = _eos_ids(self.base, tokenizer)

    @property
    def base(self):
        """The transformers model itself; LoRA layers, when there are any, sit inside it."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    @property
    def device(self):
        return next(self.parameters()).device

    @property
    def num_layers(self):
        return self.base.config.get_text_config().num_hidden_layers

    def forward(self, batch, temperature=1.0, target_layers=()):
        """Statistics of a Batch's completions (see the class). target_layers: L_tgt, 0-based; () leaves the mass out.

        Gradient flows through logp and head_mass. Right for non-reentrant checkpointing: the masses travel as outputs
        of the layers, so recomputation makes them again and no state lies outside the graph.
        """
        batch = batch.to(self.device)
        completion = batch.completion_mask.shape[1]  # T
        first = batch.input_ids.shape[1] - completion - 1  # the row that predicts y_1
        mass = {}
        if target_layers:
            mass = {"output_attentions": True, "mass_layers": tuple(target_layers), "mass_first_row": first,
                    "mass_keys": batch.input_ids == self.audio_token_id}  # S_audio: placeholders alone, no markers
        output = self.base.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False,
                                 position_ids=positions(batch.attention_mask), **batch.audio, **mass)
        hidden = output.last_hidden_state[:, first:-1]  # rows that predict y_1..y_T  [B, T, D]
        mask = batch.completion_mask
        targets = batch.input_ids[:, -completion:]
        token_logp, token_entropy = token_statistics(hidden[mask], self.base.lm_head, targets[mask], temperature)
        logp = token_logp.new_zeros(mask.shape).masked_scatter(mask, token_logp)  # [B, T]
        entropy = token_entropy.new_zeros(mask.shape).masked_scatter(mask, token_entropy)
        if not target_layers:
            return Statistics(logp, entropy, None)
        # `attentions` holds the mass that our attention function put in the place of the weights, one a target layer.
        head_mass = torch.stack(output.attentions)[..., :completion]  # [L, B, H, T]
        return Statistics(logp, entropy, head_mass.masked_fill(~mask[None, :, None], 0))

    # ── from questions to tensors ──

    def encode(self, question, instruction=""):
        """Question → Prompt: chat template, log-mel features, placeholders repeated to the number of audio tokens.

        Raises InputError when the template does not render one placeholder a clip, or a clip cannot be read.
        """
        features, frames = zip(*(self._log_mel(self.clip(path), path) for path in question.audio))
        rendered = self._render(question, instruction, with_audio=True)
        if rendered.count(self.audio_token_id) != len(features):
            raise InputError(f"question {question.id}: the chat template renders {rendered.count(self.audio_token_id)} "
                             f"audio placeholders (id {self.audio_token_id}) for {len(features)} clips; mend the "
                             "template in the model folder, or audio_token_id in its config.json")
        counts = [audio_token_count(n, self.base.config) for n in frames]
        # Qwen2-Audio's forward takes a single placeholder for one that nobody has expanded yet.
        if min(counts) < (2 if self.base.config.model_type == "qwen2_audio" else 1):
            raise InputError(f"question {question.id}: a clip of {min(frames)} frames of 10 ms is too short for this "
                             "encoder; pad it with silence or remove the question")
        counts = iter(counts)
        ids = [i for token in rendered for i in [token] * (next(counts) if token == self.audio_token_id else 1)]
        return Prompt(question, ids, self._render(question, instruction, with_audio=False), features, frames,
                      instruction)

    def _render(self, question, instruction, with_audio):
        messages = conversation(question, with_audio, instruction)
        return self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True,
                                                  return_dict=False)

    def clip(self, path):
        """Path → float32 [samples] at 16 kHz, as the encoder hears it, here and in a server: with silence at its end.

        Qwen3-Omni: up to 1 s, for its encoder pads chunks of 1 s to the longest chunk of the batch, and a shorter clip
        would depend on its neighbours; and up to a whole frame of 10 ms, as vLLM does for every clip. Elsewhere up to
        what the centred STFT needs, which reflects half a window at the edges.
        """
        samples, extractor, least = load_audio(path), self.feature_extractor, self.feature_extractor.n_fft // 2 + 1
        if self.base.config.model_type.startswith("qwen3_omni_moe"):
            frames = -(-len(samples) // extractor.hop_length)  # ⌈N / 160⌉
            least = max(SAMPLE_RATE, frames * extractor.hop_length)
        return np.pad(samples, (0, max(0, least - len(samples))))

    def _log_mel(self, samples, path):
        """Samples → (log-mel [mel bins, F], frames). 16 kHz, 10 ms hop: 100 frames a second. One clip at a time, so
        that the features of a clip do not depend on its neighbours in a batch."""
        extractor = self.feature_extractor
        fixed = self.base.config.model_type == "qwen2_audio"  # its encoder takes windows of 30 s, no other length
        if fixed and len(samples) > extractor.n_samples:
            raise InputError(f"{path}: {len(samples) / SAMPLE_RATE:.1f} s, and Qwen2-Audio takes at most "
                             f"{extractor.n_samples / SAMPLE_RATE:.0f} s; cut the clip")
        output = extractor(samples, sampling_rate=SAMPLE_RATE, padding="max_length" if fixed else True,
                           truncation=False, return_attention_mask=True, return_tensors="pt")
        return output["input_features"][0], int(output["attention_mask"].sum())

    def collate(self, prompts, completions, text_only=False):
        """Prompts and their completions' token ids (lists, one completion a prompt) → Batch.

        text_only: the view of π_text-ref: the prompt rendered without audio, no features, the same completion ids.
        Raises InputError when the placeholders do not match the features, which transformers would cut silently.
        """
        prompt_ids = [p.text_ids if text_only else p.ids for p in prompts]
        prompt_length, length = max(map(len, prompt_ids)), max(1, max(map(len, completions)))  # P, T
        ids = torch.zeros(len(prompts), prompt_length + length, dtype=torch.long)
        attention_mask = torch.zeros_like(ids)
        for row, (prompt, completion) in enumerate(zip(prompt_ids, completions, strict=True)):
            start, end = prompt_length - len(prompt), prompt_length + len(completion)
            ids[row, start:end] = torch.tensor(prompt + list(completion))
            attention_mask[row, start:end] = 1
        audio = {} if text_only else self._pad_features(prompts, ids[:, :prompt_length])
        if (ids[:, prompt_length:] == self.audio_token_id).any():
            raise ValueError("a completion holds an audio placeholder; the sampler must ban policy.placeholder_ids")
        return Batch(ids, attention_mask, attention_mask[:, prompt_length:].bool(), audio)

    def _pad_features(self, prompts, ids):
        expected = sum(audio_token_count(n, self.base.config) for p in prompts for n in p.frames)
        found = int((ids == self.audio_token_id).sum())
        if found != expected:
            raise InputError(f"questions {prompts[0].question.id} … {prompts[-1].question.id}: {found} audio "
                             f"placeholders in the prompts, {expected} audio tokens in the features; "
                             "encode them with this policy")
        clips, frames = [f for p in prompts for f in p.features], torch.tensor([n for p in prompts for n in p.frames])
        longest = max(clip.shape[1] for clip in clips)  # F
        features = torch.stack([torch.nn.functional.pad(c, (0, longest - c.shape[1]))
                                for c in clips])  # [clips, mel, F]
        return {"input_features": features, "feature_attention_mask": (torch.arange(longest) < frames[:, None]).long()}

    def text(self, completion):
        """A rollout.Completion → its text, without special tokens."""
        return self.tokenizer.decode(completion.token_ids, skip_special_tokens=True)

    def run(self, function, *arguments):
        """function(*arguments), inside this module's forward as FSDP sees it: what is sharded is gathered for it."""
        return function(*arguments)

    def weights(self):
        """name → tensor of the transformers model, on the CPU; under LoRA W + (α/r)·B·A, and no adapters.

        Of a sharded policy every rank calls it, a tensor is gathered at a time, and rank 0 alone gets them.
        """
        keeps, whole = not dist.is_initialized() or dist.get_rank() == 0, {}
        for name, tensor in self.base.state_dict().items():
            tensor = (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).cpu()
            if keeps:
                whole[name] = tensor
        merged = {}
        for name, tensor in whole.items():
            module_name, _, leaf = name.partition(".base_layer.")
            if leaf == "weight":
                b, a = (whole[f"{module_name}.lora_{x}.default.weight"] for x in "BA")
                tensor = tensor + b @ a * self.base.get_submodule(module_name).scaling["default"]
            if ".lora_" not in name:
                merged[name.replace(".base_layer.", ".")] = tensor.to(self.saved_dtype)
        return merged

    def save_adapter(self, folder):
        """Writes the LoRA adapter alone, as peft reads it. Every rank of a team calls it, rank 0 writes."""
        keeps, state = not dist.is_initialized() or dist.get_rank() == 0, {}
        for name, tensor in self.model.state_dict().items():
            if ".lora_" in name:
                tensor = (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).cpu()
                if keeps:
                    state[name] = tensor
        if keeps:
            self.model.save_pretrained(folder, state_dict=state)

    def save(self, folder):
        """Writes a checkpoint folder in the original layout, LoRA merged: load_policy, transformers and vLLM read it.

        An Omni thinker is written as the whole Omni model without its talker: keys `thinker.*`, audio output off.
        Tokenizer, chat template and processor files are those of the folder that the policy was loaded from.
        """
        folder, weights, whole = Path(folder), self.weights(), WHOLE_MODEL.get(self.base.config.model_type)
        if not weights:  # another rank than 0
            return
        config = copy.deepcopy(self.base.config)
        config.dtype = self.saved_dtype
        if whole is not None:
            thinker, config = config, copy.deepcopy(self.full_config) or whole.config_class()
            config.thinker_config, config.enable_audio_output, config.dtype = thinker, False, self.saved_dtype
            weights = {f"thinker.{name}": tensor for name, tensor in weights.items()}
        with torch.device("meta"):
            shell = (whole or type(self.base))(config)  # names and configuration alone
        shell.generation_config = self.base.generation_config
        shell.save_pretrained(folder, state_dict=weights)
        if self.folder is None:
            self.tokenizer.save_pretrained(folder)
            self.feature_extractor.save_pretrained(folder)
            return
        ours = ("config.json", "generation_config.json", "model.safetensors.index.json")
        for file in self.folder.iterdir():
            if file.suffix in (".json", ".jinja", ".txt") and file.name not in ours:
                shutil.copyfile(file, folder / file.name)


# The checkpoints on the hub hold the whole Omni model; their thinker is what we train.
WHOLE_MODEL = {"qwen3_omni_moe_thinker": Qwen3OmniMoeForConditionalGeneration,
               "qwen2_5_omni_thinker": Qwen2_5OmniForConditionalGeneration}


def positions(attention_mask):
    """Position of every token, [B, S]: padding on the left does not count. With audio and text alone all three
    components of Qwen's M-RoPE are this one, so that it serves every model class."""
    return (attention_mask.cumsum(dim=1) - 1).clamp(min=0)


def audio_token_count(frames, config):
    """Audio tokens that the encoder makes of `frames` mel frames (10 ms each). Facts of the model classes.

    Qwen3-Omni: three strided convolutions on chunks of 100 frames, 13 tokens a whole chunk, ⌈⌈⌈r/2⌉/2⌉/2⌉ for a rest r.
    Qwen2-Audio, Qwen2.5-Omni: a strided convolution and a pooling by two on the whole clip.
    Raises InputError for another family, whose rule has to be added here.
    """
    if config.model_type.startswith("qwen3_omni_moe"):
        whole, rest = divmod(frames, 100)
        return 13 * whole + -(-rest // 8)  # ⌈⌈⌈r/2⌉/2⌉/2⌉ = ⌈r/8⌉
    if config.model_type in ("qwen2_audio", "qwen2_5_omni_thinker"):
        return ((frames - 1) // 2 + 1 - 2) // 2 + 1
    raise InputError(f"config.json: the number of audio tokens of a {config.model_type} is not known; supported are "
                     "Qwen3-Omni, Qwen2.5-Omni and Qwen2-Audio")


# ───────────────────────────────────────── log-prob and entropy without [T, V] ────────────────────────────────────────


def token_statistics(hidden, lm_head, token_ids, temperature):
    """log softmax(z/temperature)[y] and H(softmax(z/temperature)), z = lm_head(hidden), for N rows.

    hidden [N, D], lm_head a Linear without bias, token_ids [N] → logp [N] (with gradient), entropy [N] (without), both
    nats, fp32 (fp64 for fp64 models).
    """
    return TokenStatistics.apply(hidden, lm_head.weight, token_ids, temperature)


class TokenStatistics(torch.autograd.Function):
    """token_statistics on weight [V, D], one block of columns of the logits z [N, V] at a time.

    The backward makes each block again and turns it into the gradient in place: ∂logp_t/∂z_{t,v} = 𝟙[v = y_t] − π_t(v).
    Blocks are of columns, not of rows, so that each row of the weight's gradient is one product, written once: a sum
    over blocks of rows would rewrite all V·D of it each time, and in bf16 round it each time.
    """

    @staticmethod
    def forward(ctx, hidden, weight, token_ids, temperature):
        dtype = _at_least_float32(hidden[:0]).dtype
        largest = hidden.new_full((len(hidden),), float("-inf"), dtype=dtype)  # max z over the columns seen so far  [N]
        total, weighted, chosen = hidden.new_zeros(3, len(hidden), dtype=dtype)  # Σ e^(z − max), Σ e^(z − max)·z, z_y
        for columns in _column_slices(weight):
            z = TokenStatistics.logits(hidden, weight[columns], temperature)
            before, largest = largest, torch.maximum(largest, z.amax(dim=-1))
            here, column = _place(token_ids, columns)
            chosen = torch.where(here, z.gather(-1, column[:, None])[:, 0], chosen)
            exp, rescale = (z - largest[:, None]).exp_(), (before - largest).exp()
            total = total * rescale + exp.sum(dim=-1)
            weighted = weighted * rescale + exp.mul_(z).sum(dim=-1)
        log_z = largest + total.log()
        ctx.save_for_backward(hidden, weight, token_ids, log_z)
        ctx.temperature = temperature
        entropy = log_z - weighted / total  # H = log Z − E[z]
        ctx.mark_non_differentiable(entropy)
        return chosen - largest - total.log(), entropy

    @staticmethod
    def backward(ctx, grad, _):
        hidden, weight, token_ids, log_z = ctx.saved_tensors
        grad_hidden = torch.zeros_like(_at_least_float32(hidden)) if ctx.needs_input_grad[0] else None
        grad_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        scale = (grad / ctx.temperature)[:, None]
        for columns in _column_slices(weight):
            z = TokenStatistics.logits(hidden, weight[columns], ctx.temperature)
            dz = z.sub_(log_z[:, None]).exp_().mul_(-scale)  # −g π(v)
            here, column = _place(token_ids, columns)
            dz.scatter_add_(-1, column[:, None], scale * here[:, None])  # + g where v is the token
            dz = dz.to(weight.dtype)
            if grad_hidden is not None:
                grad_hidden += dz @ weight[columns]
            if grad_weight is not None:
                torch.mm(dz.T, hidden, out=grad_weight[columns])
        return None if grad_hidden is None else grad_hidden.to(hidden.dtype), grad_weight, None, None

    @staticmethod
    def logits(hidden, weight, temperature):
        return _at_least_float32(torch.nn.functional.linear(hidden, weight)).div_(temperature)  # [N, columns]


def _column_slices(weight):
    return [slice(start, start + LOGIT_COLUMNS) for start in range(0, len(weight), LOGIT_COLUMNS)]


def _place(token_ids, columns):
    """Is each token in this block of columns [N], and where in it (0 when it is not)."""
    here = (token_ids >= columns.start) & (token_ids < columns.stop)
    return here, torch.where(here, token_ids - columns.start, 0)


def _at_least_float32(x):
    return x if x.dtype == torch.float64 else x.float()


# ───────────────────────────────────────────────── audio attention mass ───────────────────────────────────────────────


def attention_with_mass(module, query, key, value, attention_mask, mass_layers=(), mass_first_row=0, mass_keys=None,
                        output_attentions=None, **kwargs):
    """transformers' fused attention and, in the layers of L_tgt, the audio mass where the weights would be returned.

    query [B, H, S, d], key and value [B, Hkv, S, d] after RoPE and normalisation. The mass_* arguments travel through
    the model's forward; without them this is the fused attention alone. Returns (output, mass [B, H, rows] or None).
    """
    output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    if mass_keys is None or module.layer_idx not in mass_layers:
        return output, None
    if attention_mask is None:  # nothing padded: the kernel was told "causal", and nobody built the mask
        total = key.shape[2]
        attention_mask = torch.ones(total, total, dtype=torch.bool, device=key.device).tril()[None, None]
    allowed = attention_mask[:, :, mass_first_row:]  # causal, own sample's keys only  [B or 1, 1, rows, S]
    return output, AudioMass.apply(query, key, mass_keys, allowed, kwargs["scaling"])


class AudioMass(torch.autograd.Function):
    """m_{t} = Σ_{j ∈ S_audio} α_{t,j} of every head, with α = softmax(q·k/√d) over the allowed keys.  (Sec. 3.2)

    query [B, H, S, d], of which the last T rows count, key [B, Hkv, S, d], audio [B, S] bool, allowed [B, 1, T, S] bool
    → [B, H, T]. (The whole query: the gradient of a slice would be padded to a second tensor of its size.) Products and
    softmax in fp32 (fp64 for fp64 inputs): with bf16 products the mass is off by 2e-2. MASS_ROWS rows of α exist at a
    time. The backward is Eq. 15, ∂m_t/∂z_{t,i} = α_{t,i}·(𝟙[i ∈ S_audio] − m_t), with α made again, then the chain rule
    of z = q·k/√d. a_t is the maximum over heads (Eq. 13): one head of a token gets a gradient, and the backward makes
    α of that one alone.
    """

    @staticmethod
    def forward(ctx, query, key, audio, allowed, scaling):
        last_rows = query[:, :, -allowed.shape[2]:]
        mass = query.new_empty(last_rows.shape[:3], dtype=_at_least_float32(query[:0]).dtype)  # [B, H, T]
        at_once = MASS_ROWS[query.device.type]
        for start in range(0, allowed.shape[2], at_once):
            rows = slice(start, start + at_once)
            alpha, _, _ = AudioMass.weights(last_rows[:, :, rows], key, allowed[:, :, rows], scaling)
            mass[:, :, rows] = torch.einsum("bgrts,bs->bgrt", alpha, audio.to(alpha.dtype)).flatten(1, 2)
        ctx.save_for_backward(query, key, audio, allowed)
        ctx.scaling, ctx.mass = scaling, mass.detach()
        return mass

    @staticmethod
    def backward(ctx, grad):
        query, key, audio, allowed = ctx.saved_tensors
        groups, length = key.shape[1], allowed.shape[2]
        allowed = allowed[:, 0].expand(len(query), -1, -1)  # [B, T, S]
        # The rows (head, t) of each key head, those with a gradient first
        has_grad = (grad != 0).unflatten(1, (groups, -1)).flatten(2)  # [B, Hkv, H/Hkv·T]
        wanted = has_grad.byte().argsort(dim=-1, descending=True)[..., :has_grad.sum(dim=-1).max()]
        sample = torch.arange(len(query), device=query.device)[:, None, None]
        first_head = torch.arange(0, query.shape[1], query.shape[1] // groups, device=query.device)[:, None]
        grad_query, grad_key = torch.zeros_like(query), torch.zeros_like(_at_least_float32(key))
        last_rows, grad_last_rows = query[:, :, -length:], grad_query[:, :, -length:]
        for rows in wanted.split(MASS_ROWS[query.device.type], dim=-1):
            at = (sample, first_head + rows // length, rows % length)  # of each row: b, h and t  [B, Hkv, rows]
            alpha, q, k = AudioMass.weights(last_rows[at], key, allowed[sample, rows % length], ctx.scaling)
            m, g = (x[at][:, :, None, :, None] for x in (ctx.mass, grad))
            dz = g * alpha * (audio[:, None, None, None].to(alpha.dtype) - m) * ctx.scaling  # Eq. 15
            grad_last_rows[at] = torch.einsum("bgrts,bgsd->bgrtd", dz, k).flatten(1, 2).to(query.dtype)
            grad_key += torch.einsum("bgrts,bgrtd->bgsd", dz, q)
        return grad_query, grad_key.to(key.dtype), None, None, None

    @staticmethod
    def weights(query, key, allowed, scaling):
        """α [B, Hkv, H/Hkv, rows, S], and q, k in the product's precision. Heads h·r … h·r + r − 1 share key head h."""
        q = _at_least_float32(query).unflatten(1, (key.shape[1], -1))  # [B, Hkv, H/Hkv, rows, d]
        k = _at_least_float32(key)
        z = torch.einsum("bgrtd,bgsd->bgrts", q * scaling, k)
        return z.masked_fill_(~allowed.unsqueeze(2), float("-inf")).softmax(dim=-1), q, k


# Both registrations are needed: without the mask function transformers passes no mask and padding is attended to.
AttentionInterface.register("audio_mass", attention_with_mass)
AttentionMaskInterface.register("audio_mass", sdpa_mask)


# ──────────────────────────────────────────────────────── loading ─────────────────────────────────────────────────────


def load_policy(folder, dtype=torch.float32, meta=False):
    """A checkpoint folder → Policy. A full Omni checkpoint (`thinker_config`, keys `thinker.*`) gives its thinker. With
    `meta` it stands on the meta device: shapes, no weights.

    Reads config.json, the safetensors, tokenizer, chat template and preprocessor_config.json; no network. Dropout is
    set to 0 everywhere: old_logp, the update's logp and the sampler must be the same distribution.
    Raises InputError naming the folder or file when a part is missing or broken, when the config has no audio_token_id,
    or when the weights do not cover the model.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder}: no config.json there; give the folder of a transformers checkpoint")
    for names in (("preprocessor_config.json",), ("tokenizer_config.json",), ("tokenizer.json", "vocab.json")):
        if not any((folder / name).is_file() for name in names):
            raise InputError(f"{folder}: no {' or '.join(names)} there; copy it from the original checkpoint")
    try:
        return _load(folder, dtype, meta)
    except InputError:
        raise
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:  # what transformers raises on a broken folder
        if isinstance(error, RuntimeError) and "ignore_mismatched_sizes" not in str(error):  # out of memory, our bug
            raise
        raise InputError(f"{folder}: cannot be loaded ({' '.join(str(error).split())[:300]}); the folder must hold a "
                         "whole transformers checkpoint") from error


def _load(folder, dtype, meta):
    full_config = AutoConfig.from_pretrained(folder, local_files_only=True)
    config = getattr(full_config, "thinker_config", full_config)
    if getattr(config, "audio_token_id", None) is None:
        raise InputError(f"{folder}/config.json: no audio_token_id ({config.model_type}); an audio language model "
                         "is needed")
    for part in (config, config.get_text_config(), getattr(config, "audio_config", config)):
        for name in ("dropout", "attention_dropout", "activation_dropout", "encoder_layerdrop"):
            if hasattr(part, name):
                setattr(part, name, 0.0)
    saved_dtype = getattr(full_config, "dtype", None) or getattr(config, "dtype", None) or torch.float32
    if meta:
        with torch.device("meta"):
            model, info = AutoModelForMultimodalLM.from_config(config, dtype=dtype), {"missing_keys": []}
        if (folder / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    else:
        model, info = AutoModelForMultimodalLM.from_pretrained(folder, config=config, dtype=dtype,
                                                               local_files_only=True, output_loading_info=True)
    if info["missing_keys"]:
        raise InputError(f"{folder}: the weights lack {len(info['missing_keys'])} tensors, the first "
                         f"{sorted(info['missing_keys'])[0]}; the checkpoint is incomplete")
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    if tokenizer.chat_template is None:  # older checkpoints keep it in a file of the processor
        if not (folder / "chat_template.json").is_file():
            raise InputError(f"{folder}: no chat template (chat_template.jinja or .json); copy it from the original")
        tokenizer.chat_template = json.loads((folder / "chat_template.json").read_text())["chat_template"]
    return make_policy(model, tokenizer, WhisperFeatureExtractor.from_pretrained(folder, local_files_only=True), folder,
                       full_config if config is not full_config else None, saved_dtype)


def make_policy(model, tokenizer, feature_extractor, folder=None, full_config=None, saved_dtype=None):
    """Policy around a transformers model, our attention function in its text decoder (the encoder keeps its own)."""
    model.set_attn_implementation({"text_config": "audio_mass"})
    return Policy(model, tokenizer, feature_extractor, folder, full_config, saved_dtype).eval()


def check_policy(policy, questions, target_layers):
    """At the door of a run: L_tgt exists, no question spells a placeholder, and for the first question the encoder
    makes as many audio tokens as the prompt has placeholders. Raises InputError."""
    placeholders = policy.tokenizer.convert_ids_to_tokens(policy.placeholder_ids)
    for q in questions:
        for placeholder in placeholders:
            if any(placeholder in text for text in (q.question, *q.choices)):
                raise InputError(f"question {q.id}: its text holds {placeholder}, which stands for audio; remove it")
    question = questions[0]
    for layer in target_layers:
        if not 0 <= layer < policy.num_layers:
            raise InputError(f"target_layers: {layer} is out of range; the model has layers 0 to "
                             f"{policy.num_layers - 1}")
    if not target_layers or len(set(target_layers)) < len(target_layers):
        raise InputError(f"target_layers: {list(target_layers)}; give at least one layer, each once")
    prompt = policy.encode(question)
    batch = policy.collate([prompt], [[]]).to(policy.device)
    wanted, reason = sum(audio_token_count(n, policy.base.config) for n in prompt.frames), ""
    try:
        with torch.no_grad():
            if hasattr(policy.base, "get_audio_features"):
                made = policy.base.get_audio_features(**batch.audio).last_hidden_state.shape[-2]
            else:  # Qwen2-Audio; its forward compares the counts itself
                policy(batch)
                made = wanted
    except torch.OutOfMemoryError:
        raise
    except (IndexError, RuntimeError, ValueError) as error:  # what the encoders raise when windows and lengths disagree
        made, reason = "no", f" ({' '.join(str(error).split())[:200]})"
    if made != wanted:
        raise InputError(f"question {question.id}: the audio encoder makes {made} tokens{reason}, the prompt holds "
                         f"{wanted} placeholders; check n_window and the feature extractor's hop length in the "
                         "model folder")


def add_lora(policy, rank, alpha):
    """LoRA adapters (peft) on the linear layers of the text decoder: attention, and the MLP where it is dense.

    Every other parameter is frozen. Module names are given in full: peft rewrites patterns to bare suffixes, which
    would adapt the audio encoder as well. The 30B's experts are fused tensors without adapters. (ours: the paper does
    not say which layers)
    """
    from peft import LoraConfig, get_peft_model  # slow to import, and only LoRA runs need it

    decoder = set(policy.base.model.language_model.modules())
    names = [name for name, module in policy.base.named_modules()
             if isinstance(module, torch.nn.Linear) and module in decoder]
    lora = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules=names)
    policy.model = get_peft_model(policy.base, lora)
    return policy


def _eos_ids(model, tokenizer):
    """Ids that end a completion: those of generation_config.json, and the tokenizer's own."""
    ids = model.generation_config.eos_token_id if model.generation_config is not None else None
    ids = [] if ids is None else [ids] if isinstance(ids, int) else list(ids)
    return sorted({*ids, tokenizer.eos_token_id} - {None})
