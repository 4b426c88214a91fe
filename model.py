"""The policy π_θ: an audio LLM of transformers, and what MAPO reads from its forward pass.

    policy = load_policy(folder)                             # checkpoint.py
    prompts = [policy.encode(question) for question in questions]
    batch = policy.collate(prompts, completions)             # token ids, one completion per prompt
    logp, entropy, head_mass = policy(batch, temperature, target_layers)
    text = policy.collate(prompts, completions, text_only=True)   # what π_text-ref sees: no audio

For the completion tokens y_1..y_T the forward gives log π(y_t), the entropy H(π(·|y_<t, x)) and,
for the layers of L_tgt, the audio mass m_t⁽ˡʰ⁾ of every head. Column t−1 of each is read at the
position that *predicts* y_t, whose input is y_{t−1}, or the last prompt token for y_1.
Log-probs and entropies belong to the distribution at the sampling temperature (ours: otherwise the
policy that is optimised would not be the one that is sampled).
mapo.py has the textbook form of these quantities. The forms here give the same numbers (tests check
it) without keeping anything of size [T, vocabulary] or [heads, T, keys]: logits exist a block of
columns at a time, and the backward computes them again. Attention keeps its fused kernel; the mass
is computed beside it, in the target layers only (attention.py).
"""

import dataclasses
import re
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from jinja2 import TemplateError
from torch.autograd.function import once_differentiable
from transformers.masking_utils import create_bidirectional_mask

from attention import at_least_float32, layer_masses
from data import InputError, Prompt, conversation, load_clip, log_mel
from families import family_of
from pos_gate import FORMAT_TAG

LOGIT_COLUMNS = 4096  # columns of logits that exist at a time: 16 MiB in fp32 for 1,024 tokens


class Statistics(NamedTuple):
    """What one forward says about B completions of at most T tokens. 0 off the completion mask."""

    logp: torch.Tensor  # [B, T] log π(y_t | y_<t, x), nats
    entropy: torch.Tensor  # [B, T] H(π(· | y_<t, x)), nats, detached
    head_mass: torch.Tensor | None  # [L, B, H, T] m_t⁽ˡʰ⁾; None when no layer was asked for


@dataclass(frozen=True)
class Batch:
    """B rows of left-padded prompt [P] + right-padded completion [T], and the audio features."""

    input_ids: torch.Tensor  # [B, P+T]
    attention_mask: torch.Tensor  # [B, P+T], 0 on padding on either side
    completion_mask: torch.Tensor  # [B, T] bool
    # Keyword arguments of the model's forward; or `embeddings`, [audio tokens, D], of the frozen
    # audio encoder; or empty, for text only.
    audio: dict[str, torch.Tensor]

    def to(self, device):
        return Batch(*(x.to(device) for x in (self.input_ids, self.attention_mask,
                                              self.completion_mask)),
                     {name: value.to(device) for name, value in self.audio.items()})


# ──────── the forward ────────


class Policy(torch.nn.Module):
    """An audio LLM (a transformers model, or peft's wrapper), tokenizer and feature extractor."""

    def __init__(self, model, tokenizer, feature_extractor, folder=None, full_config=None,
                 saved_dtype=None):
        super().__init__()
        self.model, self.tokenizer, self.feature_extractor = model, tokenizer, feature_extractor
        self.folder = folder  # the checkpoint that it was loaded from
        self.full_config = full_config  # of the whole Omni model, if the folder holds one
        self.saved_dtype = saved_dtype or self.base.dtype  # of the folder; training may be wider
        self.fp32_head = True  # logits leave the head's product in fp32, see logit_block
        config = self.base.config
        self.family = family_of(config, folder or config.model_type)
        self.num_layers = config.get_text_config().num_hidden_layers
        self.audio_token_id = config.audio_token_id
        # Ids that represent features. If one were sampled, the next forward would look for audio
        # that does not exist.
        ids = {getattr(config, f"{kind}_token_id", None) for kind in ("audio", "image", "video")}
        self.placeholder_ids = sorted(ids - {None})
        self.eos_ids = _eos_ids(self.base, tokenizer)
        # Not the format tags, which the rewards read: some checkpoints flag them as special.
        self.hidden_ids = {i for i, token in tokenizer.added_tokens_decoder.items()
                           if token.special and not FORMAT_TAG.fullmatch(token.content)}

    @property
    def base(self):
        """The transformers model itself. LoRA layers, if there are any, are inside it."""
        return getattr(self.model, "get_base_model", lambda: self.model)()

    @property
    def device(self):
        return next(self.parameters()).device

    def forward(self, batch, temperature=1.0, target_layers=()):
        """Statistics of a Batch's completions. target_layers: L_tgt, 0-based; () skips the mass.

        Gradient flows through logp and head_mass. A layer returns its mass as an output, so
        non-reentrant activation checkpointing recomputes it like any other.
        """
        batch = batch.to(self.device)
        completion = batch.completion_mask.shape[1]  # T
        first = batch.input_ids.shape[1] - completion - 1  # the position that predicts y_1
        mass_arguments = {}  # they reach attention.attention_with_mass
        if target_layers:
            # S_audio is the placeholders alone, without the start and end markers.
            mass_arguments = {"output_attentions": True, "mass_layers": tuple(target_layers),
                              "mass_first_row": first,
                              "mass_keys": batch.input_ids == self.audio_token_id}
        output = self.base.model(
            **self.model_inputs(batch.input_ids, batch.audio), attention_mask=batch.attention_mask,
            position_ids=positions(batch.attention_mask), use_cache=False, **mass_arguments)
        hidden = output.last_hidden_state[:, first:-1]  # positions that predict y_1..y_T  [B, T, D]
        mask = batch.completion_mask
        targets = batch.input_ids[:, -completion:]  # [B, T]
        token_logp, token_entropy = token_statistics(  # both [tokens of all completions]
            hidden[mask], self.base.lm_head, targets[mask], temperature, self.fp32_head)
        logp = token_logp.new_zeros(mask.shape).masked_scatter(mask, token_logp)  # [B, T]
        entropy = token_entropy.new_zeros(mask.shape).masked_scatter(mask, token_entropy)
        if not target_layers:
            return Statistics(logp, entropy, None)
        masses = layer_masses(output.attentions, target_layers)  # [L, B, H, T+1]
        head_mass = masses[..., :completion]  # the last position, y_T, predicts nothing
        return Statistics(logp, entropy, head_mass.masked_fill(~mask[None, :, None], 0))

    def model_inputs(self, ids, audio):
        """Token ids [B, S] and Batch.audio → keyword arguments of the transformers model.

        Audio embeddings take the place of the placeholders' embeddings, in order.
        """
        if "embeddings" not in audio:
            return {"input_ids": ids, **audio}
        embeddings = self.base.get_input_embeddings()(ids)  # [B, S, D]
        is_audio = (ids == self.audio_token_id)[..., None]
        return {"inputs_embeds": embeddings.masked_scatter(is_audio,
                                                           audio["embeddings"].to(embeddings))}

    def logits(self, hidden):
        """The head's whole logits at temperature 1, for sampling: [N, D] → [N, V]."""
        return logit_block(hidden, self.base.lm_head.weight, 1.0, self.fp32_head)

    # ──────── from questions to tensors ────────

    def encode(self, question, instruction=""):
        """Question → Prompt: chat template, log-mel features, placeholders.

        The template renders one placeholder per clip, which is repeated for each audio token.
        Raises InputError when it renders another number of them, for a control token in the texts,
        and as data.load_clip does.
        """
        self.refuse_control_tokens(f"question {question.id}: ", question=question.question,
                                   choices="\n".join(question.choices))
        # It may name the format tags.
        self.refuse_control_tokens("", instruction=FORMAT_TAG.sub(" ", instruction))
        features, frames = zip(*(log_mel(self.load_clip(path), self.feature_extractor, self.family)
                                 for path in question.audio))
        rendered = self._render(question, instruction, with_audio=True)
        found = rendered.count(self.audio_token_id)
        if found != len(features):
            raise InputError(f"question {question.id}: the chat template renders {found} audio "
                             f"placeholders (id {self.audio_token_id}) for {len(features)} clips; "
                             "fix the template in the model folder, or audio_token_id in its "
                             "config.json")
        ids, count = [], iter(map(self.family.tokens, frames))
        for token in rendered:
            ids += [token] * (next(count) if token == self.audio_token_id else 1)
        text_ids = self._render(question, instruction, with_audio=False)
        return Prompt(question, ids, text_ids, features, frames, instruction)

    @torch.no_grad()
    def encode_audio(self, prompts):
        """Runs the audio encoder and its projection → the prompts with embeddings, on the CPU.

        The embeddings replace the features. They serve every forward as long as the encoder is
        frozen: each clip is then encoded once, for all completions, π_old, π_ref and the updates.
        """
        counts = [self.audio_tokens(prompt) for prompt in prompts]
        audio = {name: x.to(self.device) for name, x in self._pad_features(prompts).items()}
        made = audio_embeddings(self.base, self.family, audio).cpu()  # [audio tokens, D]
        if len(made) != sum(counts):
            raise InputError(f"questions {prompts[0].question.id} … {prompts[-1].question.id}: the "
                             f"audio encoder makes {len(made)} tokens, but the prompts have "
                             f"{sum(counts)} placeholders; check the clips")
        return [dataclasses.replace(prompt, features=(), embeddings=part.clone())
                for prompt, part in zip(prompts, made.split(counts), strict=True)]

    def audio_tokens(self, prompt):
        """How many placeholders the clips of a prompt need."""
        return sum(map(self.family.tokens, prompt.frames))

    def refuse_control_tokens(self, where, **fields):
        """Raises InputError, which begins with `where`, for a control token in a field's text.

        Chat templates do not escape the texts.
        """
        for name, text in fields.items():
            if found := self.control_tokens.search(text):
                raise InputError(f"{where}field {name!r} contains {found[0]}, a control token of "
                                 "the tokenizer; remove it")

    @cached_property
    def control_tokens(self):
        """A pattern of the special tokens, the placeholders, and added tokens such as <think>."""
        texts = {*filter(None, self.tokenizer.convert_ids_to_tokens(self.placeholder_ids)),
                 *(token.content for token in self.tokenizer.added_tokens_decoder.values()
                   if token.special or re.fullmatch("<.+>", token.content))}
        return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))))

    def _render(self, question, instruction, with_audio):
        messages = conversation(question, with_audio, instruction)
        try:
            return self.tokenizer.apply_chat_template(messages, add_generation_prompt=True,
                                                      tokenize=True, return_dict=False)
        except (AttributeError, TypeError, TemplateError) as error:
            raise InputError(f"{self.folder}: the chat template cannot render audio ({error}); "
                             "copy that of the original checkpoint") from error

    def load_clip(self, path):
        """Path → float32 [samples] at 16 kHz, exactly as the encoder hears it, here and in vLLM."""
        return load_clip(path, self.feature_extractor, self.family)

    def collate(self, prompts, completions, text_only=False):
        """Prompts and their completions' token ids (lists, one per prompt) → Batch.

        text_only: what π_text-ref sees. The prompt is rendered without audio, there are no
        features, and the completion ids are the same.
        Raises InputError when placeholders and features do not match (transformers would
        truncate the features silently), and ValueError when a completion holds a placeholder.
        """
        prompt_ids = [p.text_ids if text_only else p.ids for p in prompts]
        prompt_length = max(map(len, prompt_ids))  # P
        length = max(1, max(map(len, completions)))  # T
        ids = torch.zeros(len(prompts), prompt_length + length, dtype=torch.long)  # [B, P+T]
        attention_mask = torch.zeros_like(ids)
        for row, (prompt, completion) in enumerate(zip(prompt_ids, completions, strict=True)):
            start, end = prompt_length - len(prompt), prompt_length + len(completion)
            ids[row, start:end] = torch.tensor(prompt + list(completion))
            attention_mask[row, start:end] = 1
        audio = {} if text_only else self._audio(prompts, ids[:, :prompt_length])
        if (ids[:, prompt_length:] == self.audio_token_id).any():
            raise ValueError("a completion holds an audio placeholder; the sampler must ban "
                             "policy.placeholder_ids")
        return Batch(ids, attention_mask, attention_mask[:, prompt_length:].bool(), audio)

    def _audio(self, prompts, ids):
        """→ Batch.audio: the embeddings of encode_audio, or else padded features."""
        encoded = prompts[0].embeddings is not None
        made = ([len(p.embeddings) for p in prompts] if encoded
                else map(self.audio_tokens, prompts))
        expected, found = sum(made), int((ids == self.audio_token_id).sum())
        if found != expected:
            raise InputError(f"questions {prompts[0].question.id} … {prompts[-1].question.id}: "
                             f"the prompts hold {found} audio placeholders, the features make "
                             f"{expected} audio tokens; encode the questions with this policy")
        if encoded:
            return {"embeddings": torch.cat([p.embeddings for p in prompts])}
        return self._pad_features(prompts)

    def _pad_features(self, prompts):
        frames = [n for p in prompts for n in p.frames]
        clips = [clip for p in prompts for clip in p.features]
        longest = max(clip.shape[1] for clip in clips)  # F
        features = torch.stack([torch.nn.functional.pad(clip, (0, longest - clip.shape[1]))
                                for clip in clips])  # [clips, mel bins, F]
        dtype = next(self.base.model.audio_tower.parameters()).dtype
        audio = {"input_features": features.to(dtype)}  # some encoders do not do this themselves
        if self.family.mask is not None:
            mask = torch.arange(longest) < torch.tensor(frames)[:, None]  # [clips, F]
            audio[self.family.mask] = mask.long()
        return audio

    def decode(self, completion):
        """A rollout.Completion → its text, without special tokens other than format tags."""
        return self.tokenizer.decode([i for i in completion.token_ids if i not in self.hidden_ids])

    def call_gathered(self, function, *arguments):
        """function(*arguments) as part of this module's forward, as far as FSDP is concerned.

        FSDP gathers the sharded weights before a forward; sampling reads them outside of one.
        distributed.shard registers this method with register_fsdp_forward_method.
        """
        return function(*arguments)


def positions(attention_mask):
    """Position of every token, [B, S]: padding on the left does not count.

    With audio and text only, all three components of Qwen's M-RoPE equal this one, so it serves
    every model class.
    """
    return (attention_mask.cumsum(dim=1) - 1).clamp(min=0)


def audio_embeddings(model, family, audio):
    """What the decoder reads at the placeholders → [audio tokens of all clips, D].

    audio: input_features [clips, mel bins, F], and the mask [clips, F] under the family's name.
    """
    if family.embeddings is not None:
        return model.get_audio_features(**audio)[family.embeddings]
    # Qwen2-Audio has no such method; its forward does this.
    input_features, frame_mask = audio["input_features"], audio[family.mask]
    tower, projector = model.model.audio_tower, model.model.multi_modal_projector
    frames, tokens = tower._get_feat_extract_output_lengths(frame_mask.sum(-1))
    longest = (input_features.shape[-1] - 2) // 2 + 1  # frames after the convolutions
    inside = torch.arange(longest, device=frames.device) < frames[:, None]  # [clips, frames]
    mask = create_bidirectional_mask(config=tower.config, attention_mask=inside.long(),
                                     inputs_embeds=input_features.new_zeros(*inside.shape, 1))
    made = projector(tower(input_features, attention_mask=mask).last_hidden_state)
    return made[torch.arange(made.shape[1], device=made.device) < tokens[:, None]]


def _eos_ids(model, tokenizer):
    """Ids that end a completion: those of generation_config.json, and the tokenizer's own."""
    config = model.generation_config
    ids = config.eos_token_id if config is not None else None
    ids = [] if ids is None else [ids] if isinstance(ids, int) else list(ids)
    return sorted({*ids, tokenizer.eos_token_id} - {None})


# ──────── log-prob and entropy without [T, V] ────────


def token_statistics(hidden, lm_head, token_ids, temperature, fp32_head=True):
    """log softmax(z)[y] and H(softmax(z)) with z = lm_head(hidden) / temperature, for N rows.

    Equals mapo.token_logp(z, token_ids) and mapo.token_entropy(z) without keeping z [N, V].
    hidden [N, D], lm_head a Linear without bias, token_ids [N] → logp [N] (with gradient) and
    entropy [N] (detached), both in nats and fp32 (fp64 for fp64 models). For fp32_head see
    logit_block.
    Raises ValueError for a head with a bias and for a token id outside the vocabulary (as −100).
    Needs TokenStatistics, logit_block, at_least_float32, LOGIT_COLUMNS,
    `from torch.autograd.function import once_differentiable`.
    """
    if lm_head.bias is not None:
        raise ValueError("token_statistics: lm_head has a bias, which the logits would miss")
    weight = lm_head.weight  # [V, D]
    if ((token_ids < 0) | (token_ids >= len(weight))).any():
        raise ValueError(f"token_statistics: token_ids must be from 0 to {len(weight) - 1}; leave "
                         "out positions that are padding")
    return TokenStatistics.apply(hidden.to(weight.dtype), weight, token_ids, temperature, fp32_head)


class TokenStatistics(torch.autograd.Function):
    """token_statistics on weight [V, D], a block of columns of the logits z [N, V] at a time.

    The backward computes each block again and turns it into the gradient in place:
    ∂logp_t/∂z_{t,v} = 𝟙[v = y_t] − π_t(v). There is no second derivative.
    With blocks of columns, each row of the weight's gradient is one product, written once. Blocks
    of rows would rewrite, and in bf16 round, all V·D numbers for each block.
    """

    @staticmethod
    def forward(ctx, hidden, weight, token_ids, temperature, fp32_head=True):
        dtype = at_least_float32(hidden[:0]).dtype
        largest = hidden.new_full((len(hidden),), float("-inf"), dtype=dtype)  # max z so far  [N]
        # Σ e^(z − max), Σ e^(z − max)·z, z_y  [N] each
        total, weighted, chosen = hidden.new_zeros(3, len(hidden), dtype=dtype)
        for start in range(0, len(weight), LOGIT_COLUMNS):
            z = logit_block(hidden, weight[start:start + LOGIT_COLUMNS], temperature, fp32_head)
            before, largest = largest, torch.maximum(largest, z.amax(dim=-1))  # z: [N, columns]
            column = token_ids - start  # of y in this block, if it is here
            here = (column >= 0) & (column < z.shape[1])
            z_y = z.gather(-1, column.where(here, 0)[:, None])[:, 0]
            chosen = torch.where(here, z_y, chosen)
            exp, rescale = (z - largest[:, None]).exp_(), (before - largest).exp()
            total = total * rescale + exp.sum(dim=-1)
            weighted = weighted * rescale + exp.mul_(z).sum(dim=-1)
        log_z = largest + total.log()  # ln Σ e^z
        ctx.save_for_backward(hidden, weight, token_ids, log_z)
        ctx.temperature, ctx.fp32_head = temperature, fp32_head
        entropy = log_z - weighted / total  # H = ln Σ e^z − E[z]
        ctx.mark_non_differentiable(entropy)
        return chosen - largest - total.log(), entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, _):
        hidden, weight, token_ids, log_z = ctx.saved_tensors
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.zeros_like(at_least_float32(hidden)) if wants_hidden else None
        grad_weight = torch.empty_like(weight) if wants_weight else None
        scale = (grad / ctx.temperature)[:, None]  # [N, 1]
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, len(weight), LOGIT_COLUMNS):
                columns = slice(start, start + LOGIT_COLUMNS)
                z = logit_block(hidden, weight[columns], ctx.temperature, ctx.fp32_head)
                dz = z.sub_(log_z[:, None]).exp_().mul_(-scale)  # −g·π(v)  [N, columns]
                column = token_ids - start
                here = ((column >= 0) & (column < dz.shape[1]))[:, None]
                dz.scatter_add_(-1, column[:, None].where(here, 0), scale * here)  # + g where v = y
                dz = dz.to(weight.dtype)
                if wants_hidden:
                    grad_hidden += dz @ weight[columns]
                if wants_weight:
                    torch.mm(dz.T, hidden, out=grad_weight[columns])
        grad_hidden = grad_hidden.to(hidden.dtype) if wants_hidden else None
        return grad_hidden, grad_weight, None, None, None


def logit_block(hidden, weight, temperature, fp32_head=True):
    """z = hidden · weightᵀ / temperature, [N, D] and [columns, D] → [N, columns], at least fp32.

    fp32_head: with bf16 inputs the product itself is in fp32. Without it the product is rounded to
    bf16, an error of 0.004 to 0.014 nats in a log-prob. Autocast does not change the precision.
    Needs at_least_float32.
    """
    with torch.autocast(hidden.device.type, enabled=False):
        if not fp32_head or hidden.dtype not in (torch.bfloat16, torch.float16):
            z = at_least_float32(torch.nn.functional.linear(hidden, weight))
        elif hidden.is_cuda:
            z = torch.mm(hidden, weight.T, out_dtype=torch.float32)
        else:  # CPUs have no out_dtype; products of bf16 numbers are exact in fp32
            z = torch.nn.functional.linear(hidden.float(), weight.float())
        return z.div_(temperature)
