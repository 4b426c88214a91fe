"""model.py against plain attention and whole logits, one completion at a time and without padding.

The reference is the same transformers model with an attention function that forms all of softmax(q·kᵀ/√d) in the
inputs' own precision under its own causal mask. It reads one question alone: a prompt string written out below,
features straight from the extractor, the model's own positions, no padding anywhere. (transformers' eager attention
will not do: its softmax is float32, and left-padded rows are NaN in float64.) It shares the model's layers with the
code under test.
"""

import copy
import dataclasses
import gc
import json
import os
import random
import shutil
import string
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import soundfile
import tiny
import torch
from transformers import (AttentionInterface, Qwen2Config, Qwen2ForCausalLM, Qwen3OmniMoeConfig,
                          Qwen3OmniMoeForConditionalGeneration)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import mapo
import model as module
from data import InputError, Question

BUILD = {"qwen3_omni": partial(tiny.qwen3_omni, experts="eager"), "qwen2_5_omni": tiny.qwen2_5_omni,
         "qwen2_audio": tiny.qwen2_audio}
LAYERS = (0, 2)  # L_tgt of most tests: not the last layers in a row, so that a mix-up of layers shows
CLOSE = 1e-12  # largest difference over the largest value, float64

# ───────────────────────────────────────────────────── the reference ──────────────────────────────────────────────────


def plain_attention(module, query, key, value, attention_mask, **kwargs):
    """softmax(q·kᵀ/√d + causal)·v with every weight formed and returned; made for rows without padding."""
    repeats, length = query.shape[1] // key.shape[1], query.shape[2]
    key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
    weights = (scores + torch.full((length, length), float("-inf")).triu(1)).softmax(dim=-1)
    return (weights @ value).transpose(1, 2).contiguous(), weights


AttentionInterface.register("plain", plain_attention)


def with_plain_attention(policy):
    """A copy of the policy's transformers model whose decoder has plain_attention."""
    model = copy.deepcopy(policy.base)
    model.set_attn_implementation({"text_config": "plain"})
    assert policy.base.config.get_text_config()._attn_implementation == "audio_mass"
    return model


def audio_tokens(kind, frames):
    """Audio tokens of one clip, by walking through the encoder's layers."""
    def strided(n):  # convolution, kernel 3, stride 2, padding 1
        return (n - 1) // 2 + 1
    if kind == "qwen3_omni":  # three of them, on chunks of a second
        chunks = [100] * (frames // 100) + [frames % 100] * (frames % 100 > 0)
        return sum(strided(strided(strided(n))) for n in chunks)
    return strided(frames) // 2  # one, then pairs are averaged


def frame_count(kind, samples):
    """10 ms each; a frame begun counts where the clip is padded to 30 s, as in the family's processor."""
    return -(-len(samples) // 160) if kind == "qwen2_audio" else len(samples) // 160


def prompt_text(question, tokens=(), instruction=""):
    """The prompt that TEMPLATE and conversation() should come to, written out; `tokens` audio tokens in each clip."""
    clips = "".join("<|audio_start|>" + "<|audio_pad|>" * n + "<|audio_end|>" for n in tokens)
    options = "".join(f"\n{letter}. {choice}" for letter, choice in zip(string.ascii_uppercase, question.choices))
    return (f"<|im_start|>user\n{clips}{question.question}\nChoose one of these options:{options}{instruction}"
            "<|im_end|>\n<|im_start|>assistant\n")


def samples_of(kind, path):
    """The clip as its encoder gets it: Qwen3-Omni's with silence up to one second, and to a whole frame of 10 ms."""
    clip = soundfile.read(path, dtype="float32")[0]
    wanted = max(16000, (len(clip) + 159) // 160 * 160) if kind == "qwen3_omni" else len(clip)
    return np.concatenate([clip, np.zeros(wanted - len(clip), np.float32)])


def inputs_alone(kind, policy, question, with_audio=True):
    """(prompt ids, keyword arguments of the audio) of one question, from the files and the extractor."""
    if not with_audio:
        return policy.tokenizer(prompt_text(question))["input_ids"], {}
    clips = [samples_of(kind, path) for path in question.audio]
    frames = [frame_count(kind, clip) for clip in clips]
    padding = "max_length" if kind == "qwen2_audio" else "longest"
    features = [torch.from_numpy(policy.feature_extractor(clip, sampling_rate=16000, padding=padding, truncation=False,
                                                          return_tensors="np")["input_features"][0]) for clip in clips]
    longest = max(f.shape[1] for f in features)
    padded = torch.zeros(len(clips), 128, longest)
    mask = torch.zeros(len(clips), longest, dtype=torch.long)
    for i, (f, n) in enumerate(zip(features, frames)):
        padded[i, :, :f.shape[1]], mask[i, :n] = f, 1
    ids = policy.tokenizer(prompt_text(question, [audio_tokens(kind, n) for n in frames]))["input_ids"]
    return ids, {"input_features": padded, "feature_attention_mask": mask}


def alone(model, ids, audio, completion, temperature=1.0, layers=(), audio_id=None):
    """(log-probs [T], entropies [T], audio mass [L, H, T]) of a completion after a prompt, everything formed whole."""
    row = torch.tensor([ids + completion])
    output = model(input_ids=row, attention_mask=torch.ones_like(row), use_cache=False, output_attentions=bool(layers),
                   **audio)
    predicting = range(len(ids) - 1, len(ids) + len(completion) - 1)
    log_probs = (output.logits[0, predicting] / temperature).log_softmax(dim=-1)
    logp = torch.stack([log_probs[t, token] for t, token in enumerate(completion)])
    entropy = -(log_probs.exp() * log_probs).sum(dim=-1)
    keys = [j for j, token in enumerate(ids) if token == audio_id]
    mass = [output.attentions[layer][0, :, predicting][:, :, keys].sum(dim=-1) for layer in layers]
    return logp, entropy, torch.stack(mass) if layers else None


def difference(actual, expected):
    """Largest difference, relative to the largest expected value."""
    assert actual.shape == expected.shape
    actual, expected = actual.detach(), expected.detach()
    return float((actual - expected).abs().max() / expected.abs().max().clamp(min=1e-300))


def roughen(model, seed=0):
    """Biases and norms start at 0 and 1, where much goes unseen: moves them away."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)


@pytest.fixture(scope="module", params=list(BUILD))
def family(request, tmp_path_factory):
    """A tiny model in float64, its copy with plain attention, and three questions; the second has two clips."""
    return make_family(request.param, tmp_path_factory.mktemp("clips"))


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory):
    return make_family("qwen3_omni", tmp_path_factory.mktemp("clips"))


def make_family(kind, folder):
    policy = BUILD[kind](dtype=torch.float64)
    roughen(policy.base)
    # A clip of a second or more in each: see test_a_question_does_not_depend_on_its_batch.
    questions = tiny.questions(folder, seconds=((1.2,), (1.0, 0.4), (1.55,)))
    return SimpleNamespace(kind=kind, policy=policy, plain=with_plain_attention(policy), questions=questions,
                           prompts=[policy.encode(q) for q in questions],
                           audio_id=policy.tokenizer.convert_tokens_to_ids("<|audio_pad|>"))


@pytest.fixture
def one_tiny(tmp_path):
    """A fresh tiny Qwen3-Omni in float32 that a test may spoil, and its questions."""
    policy = tiny.qwen3_omni()
    roughen(policy.base)
    return policy, tiny.questions(tmp_path)


def error_of(call, *args, **kwargs):
    """The message of the InputError that `call` raises; it has to be one line."""
    with pytest.raises(InputError) as error:
        call(*args, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


def gradients(model, value, keep_graph=False):
    """Gradient of `value` by parameter name; zeros where there is none."""
    names, parameters = zip(*((name, p) for name, p in model.named_parameters() if p.requires_grad))
    found = torch.autograd.grad(value, parameters, allow_unused=True, retain_graph=keep_graph)
    return {name: torch.zeros_like(p) if g is None else g for name, p, g in zip(names, parameters, found)}


# ────────────────────────────────────────── log-prob, entropy and audio mass ──────────────────────────────────────────

# rows: (question, length of the completion). "padded" has padding on both sides, "one" and "even" have none: mask None.
ROWS = {"padded": [(0, 5), (1, 2), (2, 7)], "one": [(1, 6)], "even": [(2, 4), (2, 4)]}


def completions_for(rows, seed=0):
    rng = random.Random(seed)
    return [[rng.randrange(320) for _ in range(length - 1)] + [320] for _, length in rows]  # 320 is <|im_end|>


@pytest.mark.parametrize("rows, temperature, checkpointing, chunks", [
    ("padded", 1.2, False, None), ("padded", 1.0, True, (83, 3)), ("one", 1.0, True, None),
    ("one", 1.2, False, (50, 4)),
    ("even", 1.2, False, (1, 1))])
def test_values_and_gradients_equal_plain_attention(family, rows, temperature, checkpointing, chunks, monkeypatch):
    """Columns of every row, and the gradients of all parameters from log π and (through its max) from a_t."""
    rows = ROWS[rows]
    completions = completions_for(rows)
    weights = torch.randn(2, len(rows), 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    if chunks:
        monkeypatch.setattr(module, "LOGIT_COLUMNS", chunks[0])
        monkeypatch.setitem(module.MASS_ROWS, "cpu", chunks[1])

    total = [0, 0]
    expected = []
    for row, ((q, length), completion) in enumerate(zip(rows, completions)):
        ids, audio = inputs_alone(family.kind, family.policy, family.questions[q])
        logp, entropy, mass = alone(family.plain, ids, audio, completion, temperature, LAYERS, family.audio_id)
        expected.append((logp, entropy, mass))
        a = mass.max(dim=1).values.mean(dim=0)
        total[0] = total[0] + (weights[0, row, :length] * logp).sum()
        total[1] = total[1] + (weights[1, row, :length] * a).sum()
    total = [gradients(family.plain, value, keep_graph=True) for value in total]

    policy, runs = family.policy, []
    batch = policy.collate([family.prompts[q] for q, _ in rows], completions)
    assert bool(batch.attention_mask.all()) == (len({length for _, length in rows}) == len({q for q, _ in rows}) == 1)
    hooks = [layer.self_attn.register_forward_hook(lambda *_: runs.append(1))
             for layer in policy.base.model.language_model.layers]
    try:
        if checkpointing:
            policy.model.activation_checkpointing_enable({"use_reentrant": False})
            policy.train()
        out = policy(batch, temperature, LAYERS)
        a = mapo.audio_attention_mass(out.head_mass)
        width = batch.completion_mask.shape[1]
        loss = [(weights[0, :, :width] * out.logp).sum(), (weights[1, :, :width] * a).sum()]
        found = [gradients(policy.base, value, keep_graph=True) for value in loss]
    finally:
        policy.model.gradient_checkpointing_disable()
        policy.eval()
        [hook.remove() for hook in hooks]
    # Layers run again in both backward passes; the mass of layer 2 needs no more of its layer than the attention.
    assert len(runs) == (9 if checkpointing else 3)

    assert not out.entropy.requires_grad and out.head_mass.shape == (2, len(rows), 4, width)
    for row, (logp, entropy, mass) in enumerate(expected):
        n = len(logp)
        assert difference(out.logp[row, :n], logp) < CLOSE
        assert difference(out.entropy[row, :n], entropy) < CLOSE
        assert difference(out.head_mass[:, row, :, :n], mass) < CLOSE
        assert not out.logp[row, n:].any() and not out.entropy[row, n:].any() and not out.head_mass[:, row, :, n:].any()
    assert out.head_mass.min() >= 0 and out.head_mass.max() <= 1
    for actual, wanted in zip(found, total):
        scale = max(float(g.abs().max()) for g in wanted.values())
        assert scale > 1e-3
        for name in wanted:
            assert (actual[name] - wanted[name]).abs().max() < CLOSE * scale, name


def test_without_target_layers_the_rest_is_the_same(family):
    """The mass is an extra: logp and entropy do not move without it; any subset of layers gives the same masses."""
    batch = family.policy.collate(family.prompts, completions_for(ROWS["padded"]))
    with torch.no_grad():
        plain, both, turned = (family.policy(batch, 1.2, layers) for layers in ((), (0, 1, 2), (2,)))
    assert plain.head_mass is None
    assert torch.equal(plain.logp, both.logp) and torch.equal(plain.entropy, both.entropy)
    assert torch.equal(both.head_mass[2:], turned.head_mass)


def test_text_only_view(family):
    """π_text-ref reads the prompt rendered without audio; no placeholder and no marker stands in it."""
    policy, rows = family.policy, ROWS["padded"]
    completions = completions_for(rows)
    batch = policy.collate([family.prompts[q] for q, _ in rows], completions, text_only=True)
    assert batch.audio == {}
    audio_ids = policy.tokenizer.convert_tokens_to_ids(["<|audio_start|>", "<|audio_pad|>", "<|audio_end|>"])
    assert not set(audio_ids) & set(batch.input_ids.flatten().tolist())
    with torch.no_grad():
        out = policy(batch, 1.2)
        for row, (q, length) in enumerate(rows):
            ids, audio = inputs_alone(family.kind, policy, family.questions[q], with_audio=False)
            assert family.prompts[q].text_ids == ids
            logp, entropy, _ = alone(family.plain, ids, audio, completions[row], 1.2)
            assert difference(out.logp[row, :length], logp) < CLOSE
            assert difference(out.entropy[row, :length], entropy) < CLOSE
    view = policy.collate([family.prompts[q] for q, _ in rows], completions)
    assert torch.equal(view.completion_mask, batch.completion_mask)  # the same completion columns in both views
    assert torch.equal(view.input_ids[:, -7:], batch.input_ids[:, -7:])


def test_an_empty_completion_among_others(family):
    """A row without a token is all padding and leaves the others alone; all rows empty gives one column of padding."""
    prompts, policy = family.prompts[:2], family.policy
    with torch.no_grad():
        out = policy(policy.collate(prompts, [[], [5, 6]]), 1.0, LAYERS)
        kept = policy(policy.collate(prompts[1:], [[5, 6]]), 1.0, LAYERS)
        none = policy(policy.collate(prompts, [[], []]), 1.0, LAYERS)
    assert not out.logp[0].any() and not out.head_mass[:, 0].any()
    assert difference(out.logp[1], kept.logp[0]) < CLOSE
    assert difference(out.head_mass[:, 1], kept.head_mass[:, 0]) < CLOSE
    assert none.logp.shape == (2, 1) and not none.logp.any() and not none.head_mass.any()


def test_left_padding_of_any_length(qwen3):
    """The padding's token id and its amount change nothing: a prompt beside one 9 times as long."""
    policy = qwen3.policy
    prompt = qwen3.prompts[0]
    long = dataclasses.replace(prompt, ids=prompt.ids[:-1] + [7] * 500 + prompt.ids[-1:])
    with torch.no_grad():
        batch = policy.collate([prompt, long], [[5, 6, 7], [8]])
        shifted = module.Batch(torch.where(batch.attention_mask == 0, 99, batch.input_ids), batch.attention_mask,
                               batch.completion_mask, batch.audio)
        apart, beside, other = (policy(b, 1.0, LAYERS) for b in (policy.collate([prompt], [[5, 6, 7]]), batch, shifted))
    assert difference(beside.logp[:1], apart.logp) < CLOSE
    assert difference(beside.head_mass[:, :1], apart.head_mass) < CLOSE
    assert torch.equal(other.logp, beside.logp) and torch.equal(other.head_mass, beside.head_mass)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.2])
def test_token_statistics(temperature, monkeypatch):
    """The function alone, in blocks of 4 columns of 11, with its gradients to states and lm_head."""
    monkeypatch.setattr(module, "LOGIT_COLUMNS", 4)
    generator = torch.Generator().manual_seed(0)
    head = torch.nn.Linear(6, 11, bias=False, dtype=torch.float64)
    hidden = 3 * torch.randn(10, 6, dtype=torch.float64, generator=generator)
    ids = torch.randint(11, (10,), generator=generator)
    weights = torch.randn(10, dtype=torch.float64, generator=generator)
    results = []
    for whole in (False, True):
        h = hidden.clone().requires_grad_()
        if whole:
            log_probs = (head(h) / temperature).log_softmax(-1)
            logp, entropy = log_probs[range(10), ids], -(log_probs.exp() * log_probs).sum(-1)
        else:
            logp, entropy = module.token_statistics(h, head, ids, temperature)
        results.append((logp, entropy, *torch.autograd.grad((weights * logp).sum(), [h, head.weight])))
    for actual, expected in zip(*results):
        assert difference(actual, expected) < 1e-14


def test_entropy_and_logp_of_a_certain_token():
    """Logits a thousand apart: entropy 0 and log-prob 0, no NaN; a uniform head: log V."""
    head = torch.nn.Linear(2, 5, bias=False)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[1000.0, 0], [0, 0], [0, 0], [0, 0], [0, 0]]))
    logp, entropy = module.token_statistics(torch.tensor([[1.0, 0], [0, 1]]), head, torch.tensor([0, 3]), 1.0)
    assert logp.tolist() == pytest.approx([0, -np.log(5)]) and entropy.tolist() == pytest.approx([0, np.log(5)])


# ────────────────────────────────────────────────── the attention mass itself ─────────────────────────────────────────


def attention_inputs(dtype=torch.float64, keys=9, rows=5, seed=0):
    """Random q [2, 6, rows, 4], k [2, 2, keys, 4] (three heads share a key head), audio keys and a causal mask."""
    generator = torch.Generator().manual_seed(seed)
    query = (2 * torch.randn(2, 6, rows, 4, dtype=torch.float64, generator=generator)).to(dtype)
    key = (2 * torch.randn(2, 2, keys, 4, dtype=torch.float64, generator=generator)).to(dtype)
    audio = torch.zeros(2, keys, dtype=torch.bool)
    audio[0, 1:4] = audio[1, 3:5] = True
    allowed = torch.ones(keys, keys).tril().bool()[None, None, keys - rows:].repeat(2, 1, 1, 1)
    allowed[1, :, :, :2] = False  # padding on the left
    return query, key, audio, allowed


def whole_mass(query, key, audio, allowed, scaling):
    """Mass by loops over samples, heads and rows."""
    mass = torch.zeros(query.shape[:3], dtype=query.dtype)
    for b, h, t in np.ndindex(*mass.shape):
        z = key[b, h // (query.shape[1] // key.shape[1])] @ query[b, h, t] * scaling
        p = z[allowed[b, 0, t]].exp()
        mass[b, h, t] = p[audio[b][allowed[b, 0, t]]].sum() / p.sum()
    return mass


@pytest.mark.parametrize("rows_at_once", [2, 128])
def test_mass_equals_loops(rows_at_once, monkeypatch):
    """Values against loops, and the hand-written backward (Eq. 15) against finite differences."""
    monkeypatch.setitem(module.MASS_ROWS, "cpu", rows_at_once)
    query, key, audio, allowed = attention_inputs()
    mass = module.AudioMass.apply(query, key, audio, allowed, 0.37)
    assert difference(mass, whole_mass(query, key, audio, allowed, 0.37)) < 1e-14
    assert torch.autograd.gradcheck(lambda q, k: module.AudioMass.apply(q, k, audio, allowed, 0.37),
                                    (query.requires_grad_(), key.requires_grad_()))


def test_mass_is_one_with_audio_alone_and_zero_without():
    """All allowed keys audio: 1. None: 0. Never outside [0, 1], even where the logits are large."""
    query, key, audio, allowed = attention_inputs(torch.float32)
    every = module.AudioMass.apply(query, key, torch.ones_like(audio), allowed, 0.5)
    none = module.AudioMass.apply(query, key, torch.zeros_like(audio), allowed, 0.5)
    sharp = module.AudioMass.apply(query * 1000, key * 1000, audio, allowed, 0.5)
    assert torch.allclose(every, torch.ones_like(every)) and not none.any()
    assert sharp.isfinite().all() and sharp.min() >= 0 and sharp.max() <= 1


def test_closed_form_of_the_gradient():
    """Eq. 15 with one-dimensional keys, where the logit of key i is k_i·q: ∂m/∂k_i = α_i(1[i audio] − m)·q."""
    query = torch.tensor([[[[0.7]]]], dtype=torch.float64)
    key = torch.tensor([0.3, -1.0, 2.0, 0.5, -0.2, 1.1], dtype=torch.float64).reshape(1, 1, 6, 1).requires_grad_()
    audio = torch.tensor([[False, True, True, False, False, True]])
    mass = module.AudioMass.apply(query, key, audio, torch.ones(1, 1, 1, 6, dtype=torch.bool), 1.0)
    mass.backward(torch.ones_like(mass))
    alpha = (key.detach()[0, 0, :, 0] * 0.7).softmax(0)
    m = alpha[audio[0]].sum()
    assert torch.allclose(key.grad[0, 0, :, 0], torch.where(audio[0], alpha * (1 - m), -alpha * m) * 0.7, atol=1e-15)


def test_bfloat16_mass_has_float32_precision():
    """From bf16 q and k the mass is that of a float32 product (a bf16 product is off by 1e-2); gradients are bf16."""
    query, key, audio, allowed = attention_inputs(torch.bfloat16, keys=90, rows=40)
    mass = module.AudioMass.apply(query.requires_grad_(), key.requires_grad_(), audio, allowed, 0.5)
    exact = whole_mass(query.detach().double(), key.detach().double(), audio, allowed, 0.5)
    assert mass.dtype == torch.float32 and (mass.double() - exact).abs().max() < 1e-5
    rough = (query[:, :3] @ key[:, :1].transpose(-1, -2) * 0.5).masked_fill(~allowed, float("-inf")).softmax(-1)
    assert ((rough * audio[:, None, None]).sum(-1).double() - exact[:, :3]).abs().max() > 1e-3  # what the test can see
    grads = torch.autograd.grad(mass.sum(), [query, key])
    assert all(g.dtype == torch.bfloat16 and g.any() for g in grads)


def test_bfloat16_model(one_tiny):
    """In a bf16 model the masses are those of the float64 softmax over the very q and k that its layers made."""
    policy, questions = one_tiny
    policy.base.to(torch.bfloat16)
    seen = {}

    def spy(module_, query, key, value, attention_mask, **kwargs):
        if hasattr(module_, "layer_idx"):
            seen[module_.layer_idx] = (query.detach().double(), key.detach().double())
        return original(module_, query, key, value, attention_mask, **kwargs)

    original = ALL_ATTENTION_FUNCTIONS["audio_mass"]
    completions = [[4, 5, 6, 7], [9, 10]]
    batch = policy.collate([policy.encode(q) for q in questions[:2]], completions)
    try:
        AttentionInterface.register("audio_mass", spy)
        out = policy(batch, 1.0, LAYERS)
    finally:
        AttentionInterface.register("audio_mass", original)
    assert out.logp.dtype == out.entropy.dtype == out.head_mass.dtype == torch.float32
    keys = batch.input_ids.shape[1]
    allowed = torch.ones(keys, keys).tril().bool() & batch.attention_mask.bool()[:, None, None, :]
    for i, layer in enumerate(LAYERS):
        q, k = seen[layer]
        exact = whole_mass(q[:, :, -5:-1], k, batch.input_ids == policy.audio_token_id, allowed[:, :, -5:-1], 8 ** -0.5)
        exact *= batch.completion_mask[:, None]
        assert (out.head_mass[i].double() - exact).abs().max() < 1e-5


def test_only_the_argmax_head_gets_gradient(qwen3):
    """Eq. 13: with one token and one layer, q_proj gets gradient in one head's rows, k_proj in its key head's."""
    policy = qwen3.policy
    batch = policy.collate(qwen3.prompts[:1], [[5]])
    out = policy(batch, 1.0, (2,))
    best = int(out.head_mass[0, 0, :, 0].argmax())
    grads = gradients(policy.base, mapo.audio_attention_mass(out.head_mass).sum())
    attention = "model.language_model.layers.2.self_attn."
    heads = grads[attention + "q_proj.weight"].reshape(4, 8, -1).abs().amax(dim=(1, 2))
    key_heads = grads[attention + "k_proj.weight"].reshape(2, 8, -1).abs().amax(dim=(1, 2))
    assert [bool(g) for g in heads] == [h == best for h in range(4)]
    assert [bool(g) for g in key_heads] == [h == best // 2 for h in range(2)]


def test_mass_gradient_ends_at_q_and_k_of_the_target_layer(qwen3):
    """From layer 1's mass nothing flows into its v, its output, its MLP, or anything above; layers below get theirs."""
    policy = qwen3.policy
    out = policy(policy.collate(qwen3.prompts, completions_for(ROWS["padded"])), 1.0, (1,))
    grads = gradients(policy.base, mapo.audio_attention_mass(out.head_mass).sum())
    touched = {name for name, g in grads.items() if g.any()}
    layer = "model.language_model.layers."
    above = [n for n in grads if n.startswith(("lm_head", "model.language_model.norm", layer + "2."))]
    own = {n.removeprefix(layer + "1.") for n in touched if n.startswith(layer + "1.")}
    assert above and not touched & set(above)
    assert own == {"input_layernorm.weight", "self_attn.q_proj.weight", "self_attn.k_proj.weight",
                   "self_attn.q_norm.weight", "self_attn.k_norm.weight"}
    assert layer + "0.self_attn.v_proj.weight" in touched and "model.audio_tower.proj2.weight" in touched


def test_attention_function_alone():
    """Fused output untouched, mass None outside the target layers, no gradient to v, none to earlier rows of q."""
    query, key, audio, _ = attention_inputs(rows=9)
    value = torch.randn(2, 2, 9, 4, dtype=torch.float64)
    layer = SimpleNamespace(layer_idx=3, num_key_value_groups=3, training=False, is_causal=True)
    for tensor in (query, key, value):
        tensor.requires_grad_()
    attention = partial(module.attention_with_mass, layer, query, key, value, None, scaling=0.5)
    plain, nothing = attention()
    other, absent = attention(mass_layers=(2,), mass_first_row=4, mass_keys=audio)
    output, mass = attention(mass_layers=(1, 3), mass_first_row=4, mass_keys=audio)
    assert nothing is absent is None and torch.equal(plain, output) and torch.equal(plain, other)
    causal = torch.ones(9, 9).tril().bool()[None, None, 4:].repeat(2, 1, 1, 1)
    assert difference(mass, whole_mass(query.detach()[:, :, 4:], key.detach(), audio, causal, 0.5)) < 1e-14
    q, k, v = torch.autograd.grad(mass.sum(), [query, key, value], allow_unused=True)
    assert v is None and not q[:, :, :4].any() and q[:, :, 4:].any() and k.any()


# ─────────────────────────────────────────────────────── positions ────────────────────────────────────────────────────


def test_positions():
    """Left padding does not count, right padding does no harm."""
    mask = torch.tensor([[0, 0, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]])
    assert module.positions(mask).tolist() == [[0, 0, 0, 1, 2, 2], [0, 1, 2, 3, 4, 5]]


def test_positions_are_the_models_own(family):
    """transformers, left to find the positions by itself (M-RoPE where the class has it), makes the same states."""
    batch = family.policy.collate(family.prompts, completions_for(ROWS["padded"]))
    inner = family.policy.base.model
    with torch.no_grad():
        inputs = dict(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False, **batch.audio)
        own = inner(**inputs).last_hidden_state
        ours = inner(position_ids=module.positions(batch.attention_mask), **inputs).last_hidden_state
    kept = batch.attention_mask.bool()
    # Qwen2-Audio's own positions count left padding; RoPE sees distances alone, and its angles are float32.
    assert difference(ours[kept], own[kept]) < (1e-5 if family.kind == "qwen2_audio" else CLOSE)


# ───────────────────────────────────────────────── audio tokens, features ─────────────────────────────────────────────


def test_audio_token_count_is_what_the_encoder_makes(family):
    """For 1 to 450 frames; a sum over a batch of clips, too. Qwen2-Audio's encoder says its lengths itself."""
    policy, tower = family.policy, family.policy.base.model.audio_tower
    if family.kind == "qwen2_audio":
        frames = torch.arange(1, 3001)
        made = tower._get_feat_extract_output_lengths(frames)[1].tolist()
        assert [module.audio_token_count(n, policy.base.config) for n in range(1, 3001)] == made
        return
    with torch.no_grad():
        for n in range(1, 451):
            lengths = {"aftercnn_lens": torch.tensor([(n + 1) // 2])} if family.kind == "qwen2_5_omni" else {}
            made = tower(torch.zeros(128, n, dtype=torch.float64), feature_lens=torch.tensor([n]), **lengths)
            assert module.audio_token_count(n, policy.base.config) == len(made.last_hidden_state), n
    frames = [7, 100, 101, 199, 200, 201, 450, 3000]
    mask = torch.arange(3000) < torch.tensor(frames)[:, None]
    with torch.no_grad():
        made = policy.base.get_audio_features(torch.zeros(8, 128, 3000, dtype=torch.float64), mask.long())
    assert sum(module.audio_token_count(n, policy.base.config) for n in frames) == len(made.last_hidden_state)


@pytest.mark.parametrize("seconds", [0.01, 0.1, 0.999, 1.0, 1.001, 3.7])
def test_encode_makes_a_placeholder_for_every_feature(family, tmp_path, seconds):
    """Placeholders of the encoded prompt = rows that the encoder makes; a prompt that differs would be cut silently."""
    policy = family.policy
    question = tiny.questions(tmp_path, seconds=((seconds,),))[0]
    if family.kind != "qwen3_omni" and seconds == 0.01:  # shorter than a token of these encoders
        with pytest.raises(InputError, match="too short"):
            policy.encode(question)
        return
    prompt = policy.encode(question)
    batch = policy.collate([prompt], [[5, 6]])
    placeholders = prompt.ids.count(family.audio_id)
    assert prompt.frames == (frame_count(family.kind, samples_of(family.kind, question.audio[0])),)
    assert placeholders == audio_tokens(family.kind, prompt.frames[0]) > 0
    assert policy.tokenizer.decode(prompt.ids) == prompt_text(question, [placeholders])
    if family.kind == "qwen2_audio":  # its forward compares the numbers itself
        policy.base(input_ids=batch.input_ids, attention_mask=batch.attention_mask, **batch.audio)
    else:
        assert policy.base.get_audio_features(**batch.audio).last_hidden_state.shape[-2] == placeholders


def test_encode_with_an_instruction(family):
    """The instruction ends the user's turn in both views, after the options."""
    prompt = family.policy.encode(family.questions[1], "Think first.")
    tokens = [audio_tokens(family.kind, n) for n in prompt.frames]
    assert family.policy.tokenizer.decode(prompt.ids) == prompt_text(family.questions[1], tokens, "\nThink first.")
    assert family.policy.tokenizer.decode(prompt.text_ids) == prompt_text(family.questions[1], (), "\nThink first.")


def test_log_mel_is_the_extractors(family):
    """Features of every clip are those of the extractor on the file's samples, whatever else the question holds."""
    for question, prompt in zip(family.questions, family.prompts):
        _, audio = inputs_alone(family.kind, family.policy, question)
        for i, (features, frames) in enumerate(zip(prompt.features, prompt.frames)):
            assert torch.equal(features[:, :frames], audio["input_features"][i, :, :frames])
            assert frames == int(audio["feature_attention_mask"][i].sum())


def in_batch_and_alone(family, questions):
    """Largest difference of logp and of mass between the questions together and each alone."""
    policy, completions = family.policy, [[5, 6, 7], [8, 9], [10, 11, 12]]
    prompts = [policy.encode(q) for q in questions]
    worst = 0.0
    with torch.no_grad():
        together = policy(policy.collate(prompts, completions), 1.0, LAYERS)
        for row, (prompt, completion) in enumerate(zip(prompts, completions)):
            apart, n = policy(policy.collate([prompt], [completion]), 1.0, LAYERS), len(completion)
            worst = max(worst, difference(together.logp[row, :n], apart.logp[0]),
                        difference(together.head_mass[:, row, :, :n], apart.head_mass[:, 0]))
    return worst


def test_a_question_does_not_depend_on_its_batch(family):
    """Statistics of a question alone and beside others, with clips of a second and more."""
    assert in_batch_and_alone(family, family.questions) < CLOSE


def test_a_short_clip_does_not_depend_on_its_batch(family, tmp_path):
    """The same with clips under a second. Qwen3-Omni's encoder pads a chunk to the longest chunk of the batch, and its
    convolutions make something of the padding that is not zero: encode() pads such clips to one second."""
    assert in_batch_and_alone(family, tiny.questions(tmp_path, seconds=((0.3,), (1.2,), (0.62,)), seed=4)) < CLOSE


def test_qwen2_audio_takes_30_seconds_at_most(tmp_path):
    """Its encoder has windows of 30 s: a longer clip is an error that names it, where truncation would be silent."""
    policy = tiny.qwen2_audio()
    long, just = tiny.questions(tmp_path, seconds=((30.1,), (30.0,)))
    assert f"{long.audio[0]}: 30.1 s" in error_of(policy.encode, long)
    assert policy.encode(just).ids.count(policy.audio_token_id) == 750


# ──────────────────────────────────────────────── what is wrong at the door ───────────────────────────────────────────


def test_template_with_two_placeholders_a_clip(one_tiny):
    """A template that renders another number of placeholders than clips is refused at encoding."""
    policy, questions = one_tiny
    policy.tokenizer.chat_template = tiny.TEMPLATE.replace("<|audio_pad|>", "<|audio_pad|><|audio_pad|>")
    message = error_of(policy.encode, questions[1])
    assert "question q1" in message and "4 audio placeholders" in message and "2 clips" in message
    policy.tokenizer.chat_template = tiny.TEMPLATE.replace("<|audio_pad|>", "")
    assert "0 audio placeholders" in error_of(policy.encode, questions[0])


@pytest.mark.parametrize("change", [+1, -1])
def test_collate_counts_placeholders(one_tiny, change):
    """One placeholder too many or too few is an error in collate: transformers would cut the features silently."""
    policy, questions = one_tiny
    good, prompt = policy.encode(questions[0]), policy.encode(questions[2])
    at = prompt.ids.index(policy.audio_token_id)
    ids = prompt.ids[:at] + [policy.audio_token_id] * (change > 0) + prompt.ids[at + (change < 0):]
    wrong = dataclasses.replace(prompt, ids=ids)
    message = error_of(policy.collate, [good, wrong], [[5], [6]])
    assert "questions q0 … q2" in message
    assert f"{26 + change} audio placeholders" in message and "26 audio tokens" in message


def test_collate_refuses_a_placeholder_in_a_completion(one_tiny):
    """A sampled audio placeholder would ask the next forward for a feature: both views refuse it, a program's error."""
    policy, questions = one_tiny
    prompt = policy.encode(questions[0])
    for text_only in (False, True):
        with pytest.raises(ValueError, match="placeholder") as error:
            policy.collate([prompt], [[5, policy.audio_token_id]], text_only=text_only)
        assert not isinstance(error.value, InputError)
    with pytest.raises(ValueError):
        policy.collate([prompt, prompt], [[5]])  # a completion is missing


def test_check_policy_target_layers(one_tiny):
    """Layers exist, each once, at least one."""
    policy, questions = one_tiny
    for layers, part in (((0, 3), "3 is out of range; the model has layers 0 to 2"), ((-1,), "-1 is out of range"),
                         ((), "at least one"), ((1, 1), "each once")):
        assert part in error_of(module.check_policy, policy, questions, layers)


@pytest.mark.parametrize("kind", ["qwen3_omni", "qwen2_5_omni", "qwen2_audio"])
def test_check_policy_accepts_every_family(kind, tmp_path):
    """A sound model and question pass the door, one clip or two."""
    policy = getattr(tiny, kind)()
    for question in tiny.questions(tmp_path):
        module.check_policy(policy, [question], (0, 2))


def test_check_policy_counts_audio_tokens(one_tiny, tmp_path):
    """An encoder that makes another number of tokens than the formula (here: windows of 2 s) is refused."""
    policy, question = one_tiny[0], tiny.questions(tmp_path, seconds=((0.3, 2.5),), seed=9)[0]
    policy.base.model.audio_tower.n_window = 20
    assert "no tokens" in error_of(module.check_policy, policy, [question], (0,))
    policy.base.model.audio_tower.n_window = 100
    message = error_of(module.check_policy, policy, [question], (0,))
    assert all(part in message for part in ("question q0", "33 tokens", "46 placeholders", "n_window"))


# ──────────────────────────────────────────────────────── loading ─────────────────────────────────────────────────────


def statistics(policy, questions):
    with torch.no_grad():
        return policy(policy.collate([policy.encode(q) for q in questions], [[5, 6, 7], [8], [9, 10]]), 1.2, LAYERS)


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with a saved Qwen3-Omni thinker, the policy, its questions and their statistics."""
    folder = tmp_path_factory.mktemp("saved")
    policy = tiny.qwen3_omni(seed=3)
    roughen(policy.base)
    policy.save(folder / "thinker")
    questions = tiny.questions(folder)
    return SimpleNamespace(folder=folder / "thinker", policy=policy, questions=questions,
                           statistics=statistics(policy, questions))


@pytest.fixture
def copied(saved, tmp_path):
    return shutil.copytree(saved.folder, tmp_path / "copy")


@pytest.mark.parametrize("kind", list(BUILD))
def test_save_and_load(kind, tmp_path):
    """What is saved loads as the same policy: class, prompts, banned and final ids, and statistics bit for bit."""
    policy = getattr(tiny, kind)(seed=2)
    roughen(policy.base)
    policy.save(tmp_path / "model")
    loaded = module.load_policy(tmp_path / "model")
    assert type(loaded.base) is type(policy.base) and not loaded.base.training
    assert loaded.placeholder_ids == policy.placeholder_ids and loaded.audio_token_id == policy.audio_token_id
    assert loaded.eos_ids == policy.eos_ids == [320]
    questions = tiny.questions(tmp_path)
    assert [loaded.encode(q).ids for q in questions] == [policy.encode(q).ids for q in questions]
    assert same(statistics(loaded, questions), statistics(policy, questions))


def test_load_full_omni_checkpoint(saved, tmp_path):
    """A checkpoint of the whole Omni model, keys `thinker.*`, loads as its thinker; so does the thinker's own."""
    config = Qwen3OmniMoeConfig(thinker_config=saved.policy.base.config.to_dict(), enable_audio_output=False)
    full = Qwen3OmniMoeForConditionalGeneration(config)
    full.thinker.load_state_dict(saved.policy.base.state_dict())
    for layout, checkpoint, prefix in (("full", full, "thinker."), ("thinker", full.thinker, "")):
        checkpoint.save_pretrained(tmp_path / layout)
        with safetensors.safe_open(tmp_path / layout / "model.safetensors", "pt") as tensors:
            assert all(key.startswith(prefix) for key in tensors.keys())
        saved.policy.tokenizer.save_pretrained(tmp_path / layout)
        saved.policy.feature_extractor.save_pretrained(tmp_path / layout)
        loaded = module.load_policy(tmp_path / layout)
        assert type(loaded.base) is type(saved.policy.base)
        for (name, actual), expected in zip(loaded.base.state_dict().items(), saved.policy.base.state_dict().values()):
            assert torch.equal(actual, expected), name
        assert same(statistics(loaded, saved.questions), saved.statistics)


def test_save_keeps_the_layout_of_the_original(saved, tmp_path):
    """Saved again: tensor names and values are those of transformers' own whole model; the folder's other files, and
    what its config says beside the thinker, stay, but for the talker's switch."""
    original = shutil.copytree(saved.folder, tmp_path / "original")
    config = json.loads((original / "config.json").read_text())
    config |= {"system_token_id": 17, "enable_audio_output": True}
    (original / "config.json").write_text(json.dumps(config))
    (original / "vocab.txt").write_text("a file of the processor")
    module.load_policy(original).save(tmp_path / "again")
    with (safetensors.safe_open(original / "model.safetensors", "pt") as before,
          safetensors.safe_open(tmp_path / "again" / "model.safetensors", "pt") as after):
        assert set(before.keys()) == set(after.keys()) and any("thinker.model.layers.0.mlp.experts.3." in name
                                                               for name in after.keys())
        assert all(torch.equal(before.get_tensor(name), after.get_tensor(name)) for name in before.keys())
    again = json.loads((tmp_path / "again" / "config.json").read_text())
    assert again["system_token_id"] == 17 and again["enable_audio_output"] is False
    assert again["architectures"] == ["Qwen3OmniMoeForConditionalGeneration"]
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "preprocessor_config.json",
                 "vocab.txt"):
        assert (tmp_path / "again" / name).read_bytes() == (original / name).read_bytes()
    whole = Qwen3OmniMoeForConditionalGeneration.from_pretrained(tmp_path / "again", enable_audio_output=False)
    for (name, actual), expected in zip(whole.thinker.state_dict().items(), saved.policy.base.state_dict().values()):
        assert torch.equal(actual, expected), name


def test_clip_is_what_a_server_must_be_sent(family, tmp_path):
    """clip(): the file's samples, then silence: Qwen3-Omni's to a second and to a whole frame of 160 samples."""
    for samples in (4000, 15999, 16000, 16001, 20000):
        path = tmp_path / f"{samples}.wav"
        wave = np.random.default_rng(samples).uniform(-0.5, 0.5, samples).astype(np.float32)
        soundfile.write(path, wave, 16000, subtype="FLOAT")
        wanted = {4000: 16000, 15999: 16000, 16000: 16000, 16001: 16160, 20000: 20000}[samples]
        clip = family.policy.clip(path)
        assert len(clip) == (wanted if family.kind == "qwen3_omni" else samples)
        assert np.array_equal(clip[:samples], wave) and not clip[samples:].any()


def test_load_in_bfloat16(saved):
    """dtype is that of the loaded weights."""
    assert {p.dtype for p in module.load_policy(saved.folder, torch.bfloat16).parameters()} == {torch.bfloat16}


def test_load_says_what_is_missing(copied):
    """Errors name the folder and the file; nothing else of transformers' many words."""
    for name in ("config.json", "preprocessor_config.json", "tokenizer_config.json"):
        os.rename(copied / name, copied / "away")
        message = error_of(module.load_policy, copied)
        assert str(copied) in message and f"no {name}" in message
        os.rename(copied / "away", copied / name)
    assert "no config.json" in error_of(module.load_policy, copied / "nowhere")


def test_load_with_a_tensor_missing(copied):
    """Weights that do not cover the model are refused, not filled with random numbers."""
    tensors = safetensors.torch.load_file(copied / "model.safetensors")
    for name in ("thinker.model.layers.1.self_attn.q_proj.weight", "thinker.lm_head.weight"):
        del tensors[name]
    safetensors.torch.save_file(tensors, copied / "model.safetensors", metadata={"format": "pt"})
    message = error_of(module.load_policy, copied)
    assert "lack 2 tensors" in message and "lm_head.weight" in message and str(copied) in message


def test_load_a_text_model(saved, tmp_path):
    """A language model without audio is refused by name."""
    config = Qwen2Config(vocab_size=332, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                         num_attention_heads=2, num_key_value_heads=1)
    Qwen2ForCausalLM(config).save_pretrained(tmp_path)
    saved.policy.tokenizer.save_pretrained(tmp_path)
    saved.policy.feature_extractor.save_pretrained(tmp_path)
    message = error_of(module.load_policy, tmp_path)
    assert "no audio_token_id (qwen2)" in message and str(tmp_path / "config.json") in message


def test_chat_template_in_an_old_file(copied, saved):
    """Older checkpoints keep the template in chat_template.json; without either file it is an error."""
    template = (copied / "chat_template.jinja").read_text()
    os.remove(copied / "chat_template.jinja")
    assert "no chat template" in error_of(module.load_policy, copied)
    (copied / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    assert same(statistics(module.load_policy(copied), saved.questions), saved.statistics)


def test_dropout_is_off(copied, saved):
    """Whatever the config says: in train mode, too, the statistics are those of the saved policy."""
    config = json.loads((copied / "config.json").read_text())
    text, audio = config["thinker_config"]["text_config"], config["thinker_config"]["audio_config"]
    text["attention_dropout"] = audio["dropout"] = audio["attention_dropout"] = audio["activation_dropout"] = 0.4
    (copied / "config.json").write_text(json.dumps(config))
    assert same(statistics(module.load_policy(copied).train(), saved.questions), saved.statistics)


def test_eos_ids(saved, copied):
    """EOS ids of generation_config.json, one or a list, and the tokenizer's."""
    path = copied / "generation_config.json"
    for value, expected in ((None, [320]), (7, [7, 320]), ([7, 320], [7, 320])):
        path.write_text(json.dumps({"eos_token_id": value} if value else {}))
        assert module.load_policy(copied).eos_ids == expected


# ───────────────────────────────────────────────────────── LoRA ───────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", list(BUILD))
def test_lora(kind, tmp_path):
    """Fresh adapters (B = 0) and disabled ones equal the base bit for bit. Decoder linears alone have them; they alone
    learn."""
    policy = getattr(tiny, kind)(seed=5)
    roughen(policy.base)
    questions = tiny.questions(tmp_path)
    before = statistics(policy, questions)
    linears = {n for n, m in policy.base.named_modules() if isinstance(m, torch.nn.Linear) and ".language_model." in n}
    assert module.add_lora(policy, rank=2, alpha=8) is policy
    assert same(statistics(policy, questions), before)
    suffix = ".lora_A.default"
    adapted = {n.removesuffix(suffix) for n, _ in policy.base.named_modules() if n.endswith(suffix)}
    assert adapted == linears and len(linears) == 3 * (4 if kind == "qwen3_omni" else 7)
    adapters = {n: p for n, p in policy.named_parameters() if p.requires_grad}
    assert all("lora_" in n for n in adapters) and len(adapters) == 2 * len(linears)

    with torch.no_grad():
        for i, parameter in enumerate(adapters.values()):
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i))
    assert not same(statistics(policy, questions), before)
    with policy.model.disable_adapter():
        assert same(statistics(policy, questions), before)
    out = policy(policy.collate([policy.encode(q) for q in questions], [[5, 6, 7], [8], [9, 10]]), 1.2, LAYERS)
    (out.logp.sum() + mapo.audio_attention_mass(out.head_mass).sum()).backward()
    assert {n for n, p in policy.named_parameters() if p.grad is not None} == set(adapters)
    assert all(p.grad.any() for p in adapters.values())


def test_lora_under_checkpointing(one_tiny):
    """Frozen embeddings below the adapters do not cut the gradient when layers are recomputed."""
    policy, questions = one_tiny
    module.add_lora(policy, rank=2, alpha=8)
    grads = []
    for checkpointing in (False, True):
        if checkpointing:
            policy.model.activation_checkpointing_enable({"use_reentrant": False})
            policy.train()
        out = policy(policy.collate([policy.encode(questions[0])], [[5, 6, 7]]), 1.2, LAYERS)
        learnt = [p for p in policy.parameters() if p.requires_grad]
        grads.append(torch.autograd.grad(out.logp.sum() + mapo.audio_attention_mass(out.head_mass).sum(), learnt))
    assert any(g.any() for g in grads[0])
    for one, other in zip(*grads):
        assert torch.allclose(one, other, atol=1e-6)


# ───────────────────────────────────────────────────────── memory ─────────────────────────────────────────────────────


def test_nothing_of_T_by_V_or_heads_by_T_by_S_is_kept(one_tiny, monkeypatch):
    """What outlives the forward: no logits, no attention weights, not even a chunk of either."""
    policy, questions = one_tiny
    monkeypatch.setattr(module, "LOGIT_COLUMNS", 17)
    monkeypatch.setitem(module.MASS_ROWS, "cpu", 4)
    vocabulary, length = 332, 30
    batch = policy.collate([policy.encode(q) for q in questions[:2]], [[5] * length, [6] * (length - 3)])
    keys = batch.input_ids.shape[1]
    assert keys not in (32, 8, 16, vocabulary)  # the shapes of states, heads and experts are others
    shapes, logits, alphas = [], [], []

    def pack(tensor):
        shapes.append((tensor.shape, tensor.dtype))
        return tensor

    def counted(query, *rest):
        alphas.append(query.shape[2])
        return weights(query, *rest)

    weights = module.AudioMass.weights
    monkeypatch.setattr(module.AudioMass, "weights", staticmethod(counted))

    def block(hidden, weight, temperature):
        logits.append((len(hidden), len(weight)))
        return block_logits(hidden, weight, temperature)

    block_logits = module.TokenStatistics.logits
    monkeypatch.setattr(module.TokenStatistics, "logits", staticmethod(block))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = policy(batch, 1.2, LAYERS)
    # What Python still holds (a ctx, say), besides what autograd saved.
    shapes += [(o.shape, o.dtype) for o in gc.get_objects() if type(o) is torch.Tensor]
    (out.logp.sum() + out.head_mass.sum()).backward()
    assert len(shapes) > 50 and out.head_mass.shape[-1] == length
    for shape, dtype in shapes:
        if len(shape) == 2 and shape[0] == 2 * length - 3:  # rows of the completion tokens: states, no logits
            assert shape[1] == 32, shape
        if len(shape) > 3 and shape[-1] == keys and dtype.is_floating_point:  # [B, H, T, S]; a mask has one head
            assert shape[1] == 1, shape
    assert {rows for rows, _ in logits} == {2 * length - 3} and max(columns for _, columns in logits) == 17
    assert sum(columns for _, columns in logits) == 2 * vocabulary  # forward and backward
    assert max(alphas) == 4


def test_no_graph_without_gradient(one_tiny):
    """Under no_grad nothing is checkpointed or saved."""
    policy, questions = one_tiny
    with torch.no_grad():
        out = policy(policy.collate([policy.encode(questions[0])], [[5, 6]]), 1.2, LAYERS)
    assert not out.logp.requires_grad and not out.head_mass.requires_grad


def test_one_question_type_for_all(tmp_path):
    """Prompt keeps its question, features and frames as encode found them, for reports."""
    policy = tiny.qwen3_omni()
    question = Question("x", tiny.questions(tmp_path)[1].audio, "Which?", ("one", "two"), "two")
    prompt = policy.encode(question)
    assert prompt.question is question and len(prompt.features) == len(prompt.frames) == 2
    assert [f.shape for f in prompt.features] == [(128, 130), (128, 100)]  # silence up to a second
