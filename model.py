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
is computed beside it, in the target layers only.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jinja2 import TemplateError
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from data import InputError, Prompt, audio_token_count, conversation, load_clip, log_mel
from mapo import head_audio_mass
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
    audio: dict[str, torch.Tensor]  # keyword arguments of the model's forward; empty for text only

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
        config = self.base.config
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
        mass_arguments = {}  # they reach attention_with_mass, below
        if target_layers:
            # S_audio is the placeholders alone, without the start and end markers.
            mass_arguments = {"output_attentions": True, "mass_layers": tuple(target_layers),
                              "mass_first_row": first,
                              "mass_keys": batch.input_ids == self.audio_token_id}
        output = self.base.model(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False,
            position_ids=positions(batch.attention_mask), **batch.audio, **mass_arguments)
        hidden = output.last_hidden_state[:, first:-1]  # positions that predict y_1..y_T  [B, T, D]
        mask = batch.completion_mask
        targets = batch.input_ids[:, -completion:]  # [B, T]
        token_logp, token_entropy = token_statistics(  # both [tokens of all completions]
            hidden[mask], self.base.lm_head, targets[mask], temperature)
        logp = token_logp.new_zeros(mask.shape).masked_scatter(mask, token_logp)  # [B, T]
        entropy = token_entropy.new_zeros(mask.shape).masked_scatter(mask, token_entropy)
        if not target_layers:
            return Statistics(logp, entropy, None)
        # Our attention function returns masses in place of attention weights, and None elsewhere,
        # which transformers drops. The last position, whose input is y_T, predicts nothing.
        head_mass = torch.stack(output.attentions)[..., :completion]  # [L, B, H, T]
        return Statistics(logp, entropy, head_mass.masked_fill(~mask[None, :, None], 0))

    # ──────── from questions to tensors ────────

    def encode(self, question, instruction=""):
        """Question → Prompt: chat template, log-mel features, placeholders.

        The template renders one placeholder per clip, which is repeated for each audio token.
        Raises InputError when it renders another number of them, and as data.load_clip does.
        """
        model_type = self.base.config.model_type
        features, frames = zip(*(log_mel(self.load_clip(path), self.feature_extractor, model_type)
                                 for path in question.audio))
        rendered = self._render(question, instruction, with_audio=True)
        found = rendered.count(self.audio_token_id)
        if found != len(features):
            raise InputError(f"question {question.id}: the chat template renders {found} audio "
                             f"placeholders (id {self.audio_token_id}) for {len(features)} clips; "
                             "fix the template in the model folder, or audio_token_id in its "
                             "config.json")
        ids, count = [], iter([audio_token_count(n, model_type) for n in frames])
        for token in rendered:
            ids += [token] * (next(count) if token == self.audio_token_id else 1)
        text_ids = self._render(question, instruction, with_audio=False)
        return Prompt(question, ids, text_ids, features, frames, instruction)

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
        return load_clip(path, self.feature_extractor, self.base.config.model_type)

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
        audio = {} if text_only else self._pad_features(prompts, ids[:, :prompt_length])
        if (ids[:, prompt_length:] == self.audio_token_id).any():
            raise ValueError("a completion holds an audio placeholder; the sampler must ban "
                             "policy.placeholder_ids")
        return Batch(ids, attention_mask, attention_mask[:, prompt_length:].bool(), audio)

    def _pad_features(self, prompts, ids):
        frames = [n for p in prompts for n in p.frames]
        expected = sum(audio_token_count(n, self.base.config.model_type) for n in frames)
        found = int((ids == self.audio_token_id).sum())
        if found != expected:
            raise InputError(f"questions {prompts[0].question.id} … {prompts[-1].question.id}: "
                             f"the prompts hold {found} audio placeholders, the features make "
                             f"{expected} audio tokens; encode the questions with this policy")
        clips = [clip for p in prompts for clip in p.features]
        longest = max(clip.shape[1] for clip in clips)  # F
        features = torch.stack([torch.nn.functional.pad(clip, (0, longest - clip.shape[1]))
                                for clip in clips])  # [clips, mel bins, F]
        mask = (torch.arange(longest) < torch.tensor(frames)[:, None]).long()  # [clips, F]
        return {"input_features": features, "feature_attention_mask": mask}

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


def _eos_ids(model, tokenizer):
    """Ids that end a completion: those of generation_config.json, and the tokenizer's own."""
    config = model.generation_config
    ids = config.eos_token_id if config is not None else None
    ids = [] if ids is None else [ids] if isinstance(ids, int) else list(ids)
    return sorted({*ids, tokenizer.eos_token_id} - {None})


# ──────── log-prob and entropy without [T, V] ────────


def token_statistics(hidden, lm_head, token_ids, temperature):
    """log softmax(z)[y] and H(softmax(z)) with z = lm_head(hidden) / temperature, for N rows.

    Equals mapo.token_logp(z, token_ids) and mapo.token_entropy(z) without keeping z [N, V].
    hidden [N, D], lm_head a Linear without bias, token_ids [N] → logp [N] (with gradient) and
    entropy [N] (detached), both in nats and fp32 (fp64 for fp64 models).
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
    return TokenStatistics.apply(hidden.to(weight.dtype), weight, token_ids, temperature)


class TokenStatistics(torch.autograd.Function):
    """token_statistics on weight [V, D], a block of columns of the logits z [N, V] at a time.

    The backward computes each block again and turns it into the gradient in place:
    ∂logp_t/∂z_{t,v} = 𝟙[v = y_t] − π_t(v). There is no second derivative.
    With blocks of columns, each row of the weight's gradient is one product, written once. Blocks
    of rows would rewrite, and in bf16 round, all V·D numbers for each block.
    """

    @staticmethod
    def forward(ctx, hidden, weight, token_ids, temperature):
        dtype = at_least_float32(hidden[:0]).dtype
        largest = hidden.new_full((len(hidden),), float("-inf"), dtype=dtype)  # max z so far  [N]
        # Σ e^(z − max), Σ e^(z − max)·z, z_y  [N] each
        total, weighted, chosen = hidden.new_zeros(3, len(hidden), dtype=dtype)
        for start in range(0, len(weight), LOGIT_COLUMNS):
            z = logit_block(hidden, weight[start:start + LOGIT_COLUMNS], temperature)
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
        ctx.temperature = temperature
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
                z = logit_block(hidden, weight[columns], ctx.temperature)
                dz = z.sub_(log_z[:, None]).exp_().mul_(-scale)  # −g·π(v)  [N, columns]
                column = token_ids - start
                here = ((column >= 0) & (column < dz.shape[1]))[:, None]
                dz.scatter_add_(-1, column[:, None].where(here, 0), scale * here)  # + g where v = y
                dz = dz.to(weight.dtype)
                if wants_hidden:
                    grad_hidden += dz @ weight[columns]
                if wants_weight:
                    torch.mm(dz.T, hidden, out=grad_weight[columns])
        return grad_hidden.to(hidden.dtype) if wants_hidden else None, grad_weight, None, None


def logit_block(hidden, weight, temperature):
    """z = hidden · weightᵀ / temperature, [N, D] and [columns, D] → [N, columns], at least fp32.

    Autocast does not change the precision of the product.  Needs at_least_float32.
    """
    with torch.autocast(hidden.device.type, enabled=False):
        return at_least_float32(torch.nn.functional.linear(hidden, weight)).div_(temperature)


def at_least_float32(x):
    return x if x.dtype == torch.float64 else x.float()


# ──────── audio attention mass ────────


def audio_mass(query, key, is_audio, allowed, scaling):
    """m_t = Σ_{j ∈ S_audio} α_{t,j} of every head, α = softmax(q·k·scaling).  (Sec. 3.2)

    This is the plain form: autograd differentiates it, and it keeps α [B, H, T, S]. AudioMass gives
    the same values and the same gradient without keeping α.
    query [B, H, S, d], whose last T rows count; key [B, Hkv, S, d]; is_audio [B, S] bool;
    allowed [B or 1, 1, T, S] bool: causal, and keys of the same sample → [B, H, T].
    Needs attention_weights, at_least_float32, head_audio_mass (of mapo.py).
    """
    rows = query[:, :, -allowed.shape[2]:]  # [B, H, T, d]
    alpha, _, _ = attention_weights(rows, key, allowed, scaling)  # [B, Hkv, H/Hkv, T, S]
    return head_audio_mass(alpha.flatten(1, 2), is_audio)


def attention_weights(query, key, allowed, scaling):
    """α = softmax(q·k·scaling) over the allowed keys → α, and q and k as they were multiplied.

    query [B, H, rows, d], key [B, Hkv, S, d], allowed [B or 1, 1 or Hkv, rows, S] → α
    [B, Hkv, H/Hkv, rows, S]. Each key head serves the next H/Hkv query heads. Products and softmax
    are in fp32 (fp64 for fp64 inputs), also under autocast.
    Needs at_least_float32.
    """
    q, k = at_least_float32(query), at_least_float32(key)
    q = q.unflatten(1, (key.shape[1], -1))  # [B, Hkv, H/Hkv, rows, d]
    with torch.autocast(query.device.type, enabled=False):
        z = torch.einsum("bgrtd,bgsd->bgrts", q * scaling, k)
    return z.masked_fill_(~allowed.unsqueeze(2), float("-inf")).softmax(dim=-1), q, k


class AudioMass(torch.autograd.Function):
    """audio_mass(query, key, is_audio, allowed, scaling) with a block of rows of α at a time.

    The arguments are those of audio_mass. Pass the whole query: the gradient of a slice would be a
    second tensor of the same size. The backward is Eq. 15, ∂m_t/∂z_{t,i} =
    α_{t,i}·(𝟙[i ∈ S_audio] − m_t), with α computed again, then the chain rule of z = q·k·scaling.
    a_t takes the maximum over heads (Eq. 13), so in each layer only one head per token has a
    gradient; the backward computes α for that head alone. There is no second derivative.
    Needs attention_weights, at_least_float32, mass_rows,
    `from torch.autograd.function import once_differentiable`.
    """

    @staticmethod
    def forward(ctx, query, key, is_audio, allowed, scaling):
        last_rows = query[:, :, -allowed.shape[2]:]  # [B, H, T, d]
        dtype = at_least_float32(query[:0]).dtype
        mass = query.new_empty(last_rows.shape[:3], dtype=dtype)  # [B, H, T]
        step = mass_rows(query.device)
        with torch.autocast(query.device.type, enabled=False):
            for start in range(0, allowed.shape[2], step):
                rows = slice(start, start + step)
                alpha, _, _ = attention_weights(last_rows[:, :, rows], key, allowed[:, :, rows],
                                                scaling)
                mass[:, :, rows] = torch.einsum(  # Σ_{j ∈ S_audio} α_{t,j}
                    "bgrts,bs->bgrt", alpha, is_audio.to(alpha.dtype)).flatten(1, 2)
        ctx.save_for_backward(query, key, is_audio, allowed)
        ctx.scaling, ctx.mass = scaling, mass.detach()
        return mass

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        query, key, is_audio, allowed = ctx.saved_tensors
        groups, length = key.shape[1], allowed.shape[2]
        allowed = allowed[:, 0].expand(len(query), -1, -1)  # [B, T, S]
        # The rows (head, t) of each key head, those with a gradient first.
        has_grad = (grad != 0).unflatten(1, (groups, -1)).flatten(2)  # [B, Hkv, H/Hkv·T]
        most = has_grad.sum(dim=-1).max()
        wanted = has_grad.byte().argsort(dim=-1, descending=True)[..., :most]
        sample = torch.arange(len(query), device=query.device)[:, None, None]
        heads_per_key = query.shape[1] // groups
        first_head = torch.arange(0, query.shape[1], heads_per_key, device=query.device)[:, None]
        grad_query, grad_key = torch.zeros_like(query), torch.zeros_like(at_least_float32(key))
        last_rows, grad_last_rows = query[:, :, -length:], grad_query[:, :, -length:]
        with torch.autocast(query.device.type, enabled=False):
            for rows in wanted.split(mass_rows(query.device), dim=-1):
                # b, h and t of each row  [B, Hkv, rows]
                at = (sample, first_head + rows // length, rows % length)
                alpha, q, k = attention_weights(last_rows[at], key,
                                                allowed[sample, rows % length], ctx.scaling)
                m, g = (x[at][:, :, None, :, None] for x in (ctx.mass, grad))
                audio = is_audio[:, None, None, None].to(alpha.dtype)  # 𝟙[i ∈ S_audio]
                dz = g * alpha * (audio - m) * ctx.scaling  # Eq. 15
                grad_last_rows[at] = torch.einsum(
                    "bgrts,bgsd->bgrtd", dz, k).flatten(1, 2).to(query.dtype)
                grad_key += torch.einsum("bgrts,bgrtd->bgsd", dz, q)
        return grad_query, grad_key.to(key.dtype), None, None, None


def mass_rows(device):
    """Query rows of attention weights that exist at a time.

    Few on a CPU, to stay in its cache; many on a GPU, where every block costs a dozen launches.
    """
    return 8 if device.type == "cpu" else 128


def attention_with_mass(module, query, key, value, attention_mask, mass_layers=(),
                        mass_first_row=0, mass_keys=None, output_attentions=None, **kwargs):
    """transformers' fused attention; in the layers of L_tgt also the audio mass.

    query [B, H, S, d], key and value [B, Hkv, S, d], after RoPE and normalisation. The signature is
    the one transformers calls; the mass_* arguments travel through the model's forward. Without
    them this is the fused attention alone. Returns (output, mass [B, H, rows] or None).
    """
    output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    if mass_keys is None or module.layer_idx not in mass_layers:
        return output, None
    allowed = allowed_keys(attention_mask, key, mass_first_row)
    return output, AudioMass.apply(query, key, mass_keys, allowed, kwargs["scaling"])


def allowed_keys(attention_mask, key, first_row):
    """Which keys each query row from `first_row` on may see → bool [B or 1, 1, rows, S].

    transformers passes no mask when nothing is padded: its kernel is then told "causal".
    """
    if attention_mask is None:
        total = key.shape[2]  # S
        causal = torch.ones(total, total, dtype=torch.bool, device=key.device).tril()
        attention_mask = causal[None, None]
    return attention_mask[:, :, first_row:]


# checkpoint.make_policy selects it. Without the mask function transformers would pass no mask.
AttentionInterface.register("audio_mass", attention_with_mass)
AttentionMaskInterface.register("audio_mass", sdpa_mask)
