"""model.py against plain attention and whole logits, one completion at a time, without padding.

The reference is the same transformers model with another attention function. That function forms
all of softmax(q·kᵀ/√d) in float64 under a causal mask of its own. It reads one question alone: the
prompt is a string written out below, the features come straight from the extractor, the positions
are the model's own, and nothing is padded. (The eager attention of transformers does not serve: its
softmax is float32, and left-padded rows are NaN in float64.) The reference shares the layers of the
model with the code under test.
"""

import copy
import dataclasses
import gc
import random
import string
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import tiny
import torch
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import attention
import mapo
import model
from data import InputError, Question, clip_tokens

BUILD = {"qwen3_omni": partial(tiny.qwen3_omni, experts="eager"),
         "qwen2_5_omni": tiny.qwen2_5_omni, "qwen2_audio": tiny.qwen2_audio}
LAYERS = (0, 2)  # L_tgt of most tests; with a gap, so that swapped layers show
CLOSE = 1e-12  # largest difference over the largest value, float64

# ──────── the reference ────────


def plain_attention(module, query, key, value, attention_mask, **kwargs):
    """softmax(q·kᵀ/√d + causal mask)·v, with all weights returned; for rows without padding."""
    repeats, length = query.shape[1] // key.shape[1], query.shape[2]
    key, value = (x.repeat_interleave(repeats, dim=1) for x in (key, value))
    scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
    causal = torch.full((length, length), float("-inf")).triu(1)
    weights = (scores + causal).softmax(dim=-1)
    return (weights @ value).transpose(1, 2).contiguous(), weights


AttentionInterface.register("plain", plain_attention)


def with_plain_attention(policy):
    """A copy of the policy's transformers model whose decoder uses plain_attention."""
    network = copy.deepcopy(policy.base)
    network.set_attn_implementation({"text_config": "plain"})
    assert policy.base.config.get_text_config()._attn_implementation == "audio_mass"
    return network


def audio_tokens(kind, frames):
    """The number of audio tokens of one clip, layer by layer through the encoder."""
    def strided(n):  # a convolution with kernel 3, stride 2, padding 1
        return (n - 1) // 2 + 1
    if kind == "qwen3_omni":  # three of them, on chunks of a second
        chunks = [100] * (frames // 100) + [frames % 100] * (frames % 100 > 0)
        return sum(strided(strided(strided(n))) for n in chunks)
    return strided(frames) // 2  # one, then pairs are averaged


def frame_count(kind, samples):
    """Frames of 10 ms. Qwen2-Audio pads clips to 30 s, and counts a frame that has only begun."""
    return -(-len(samples) // 160) if kind == "qwen2_audio" else len(samples) // 160


def prompt_text(question, tokens=(), instruction=""):
    """What the chat template should render, written out, with `tokens` placeholders per clip."""
    clips = "".join("<|audio_start|>" + "<|audio_pad|>" * n + "<|audio_end|>" for n in tokens)
    options = "".join(f"\n{letter}. {choice}"
                      for letter, choice in zip(string.ascii_uppercase, question.choices))
    return (f"<|im_start|>user\n{clips}{question.question}\nChoose one of these options:{options}"
            f"{instruction}<|im_end|>\n<|im_start|>assistant\n")


def samples_of(kind, path):
    """The clip as its encoder hears it: Qwen3-Omni's padded to a second, and to whole frames."""
    clip = soundfile.read(path, dtype="float32")[0]
    length = max(16000, (len(clip) + 159) // 160 * 160) if kind == "qwen3_omni" else len(clip)
    return np.concatenate([clip, np.zeros(length - len(clip), np.float32)])


def inputs_alone(kind, policy, question, with_audio=True):
    """→ (prompt ids, the forward's audio arguments) of one question, without policy.encode."""
    if not with_audio:
        return policy.tokenizer(prompt_text(question))["input_ids"], {}
    clips = [samples_of(kind, path) for path in question.audio]
    frames = [frame_count(kind, clip) for clip in clips]
    padding = "max_length" if kind == "qwen2_audio" else "longest"
    features = [torch.from_numpy(policy.feature_extractor(
        clip, sampling_rate=16000, padding=padding, truncation=False,
        return_tensors="np")["input_features"][0]) for clip in clips]  # [mel bins, F] each
    longest = max(f.shape[1] for f in features)
    padded = torch.zeros(len(clips), len(features[0]), longest)
    mask = torch.zeros(len(clips), longest, dtype=torch.long)
    for i, (f, n) in enumerate(zip(features, frames)):
        padded[i, :, :f.shape[1]], mask[i, :n] = f, 1
    text = prompt_text(question, [audio_tokens(kind, n) for n in frames])
    return policy.tokenizer(text)["input_ids"], {"input_features": padded,
                                                 "feature_attention_mask": mask}


def alone(network, ids, audio, completion, temperature=1.0, layers=(), audio_id=None):
    """→ (log π [T], entropies [T], masses [L, H, T]) of one completion, from whole tensors."""
    row = torch.tensor([ids + completion])
    output = network(input_ids=row, attention_mask=torch.ones_like(row), use_cache=False,
                     output_attentions=bool(layers), **audio)
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


def gradients(network, value):
    """Gradient of `value` by parameter name; zeros where there is none."""
    named = {name: p for name, p in network.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(value, list(named.values()), allow_unused=True, retain_graph=True)
    return {name: torch.zeros_like(p) if g is None else g
            for (name, p), g in zip(named.items(), found)}


# ──────── models and questions ────────


def roughen(network, seed=0):
    """Moves biases away from 0 and norms away from 1, where mistakes would not show."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.dim() == 1:
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)


def make_family(kind, folder):
    """A tiny model in float64, its copy with plain attention, three questions.

    The second question has two clips.
    """
    policy = BUILD[kind](dtype=torch.float64)
    roughen(policy.base)
    questions = tiny.questions(folder, seconds=((1.2,), (1.0, 0.4), (1.55,)))
    return SimpleNamespace(kind=kind, policy=policy, plain=with_plain_attention(policy),
                           questions=questions, prompts=[policy.encode(q) for q in questions],
                           audio_id=policy.tokenizer.convert_tokens_to_ids("<|audio_pad|>"))


@pytest.fixture(scope="module", params=list(BUILD))
def family(request, tmp_path_factory):
    return make_family(request.param, tmp_path_factory.mktemp("clips"))


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory):
    return make_family("qwen3_omni", tmp_path_factory.mktemp("clips"))


@pytest.fixture
def one_tiny(tmp_path):
    """A fresh Qwen3-Omni in float32 that a test may spoil, and its questions."""
    policy = tiny.qwen3_omni()
    roughen(policy.base)
    return policy, tiny.questions(tmp_path)


def error_of(call, *args, **kwargs):
    """The message of the InputError that `call` raises. It must be one line."""
    with pytest.raises(InputError) as error:
        call(*args, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


# Rows of a batch: (index of the question, length of the completion). Only "padded" needs padding,
# and it needs it on both sides. transformers passes no attention mask for the other two.
ROWS = {"padded": [(0, 5), (1, 2), (2, 7)], "one": [(1, 6)], "even": [(2, 4), (2, 4)]}


def completions_for(policy, rows, seed=0):
    """A random completion of each row's length; the last token ends it."""
    rng = random.Random(seed)
    return [[rng.randrange(200) for _ in range(length - 1)] + policy.eos_ids for _, length in rows]


def batch_for(family, rows, text_only=False):
    prompts = [family.prompts[q] for q, _ in rows]
    return family.policy.collate(prompts, completions_for(family.policy, rows), text_only)


# ──────── the forward against plain attention ────────


@dataclasses.dataclass(frozen=True)
class Case:
    rows: str  # a key of ROWS
    temperature: float
    checkpointing: bool = False
    columns: int = model.LOGIT_COLUMNS  # of logits at a time
    mass_rows: int = 8  # of attention weights at a time


CASES = {"padded": Case("padded", 1.2),
         "padded, checkpointing, blocks": Case("padded", 1.0, True, 83, 3),
         "one row, checkpointing, blocks": Case("one", 1.2, True, 50, 4),
         "equal rows, smallest blocks": Case("even", 1.2, False, 1, 1)}


@pytest.fixture(scope="module", params=list(CASES))
def compared(request, family):
    """One case's Statistics and gradients, from the policy and from the reference.

    The gradients are those of Σ w·log π and of Σ w·a_t with random weights w.
    """
    case = CASES[request.param]
    rows, policy = ROWS[case.rows], family.policy
    batch = batch_for(family, rows)
    width = batch.completion_mask.shape[1]  # T
    generator = torch.Generator().manual_seed(1)
    w_logp, w_mass = torch.randn(2, len(rows), width, dtype=torch.float64, generator=generator)

    expected, total_logp, total_mass = [], 0, 0
    for row, ((q, length), completion) in enumerate(zip(rows, completions_for(policy, rows))):
        ids, audio = inputs_alone(family.kind, policy, family.questions[q])
        logp, entropy, mass = alone(family.plain, ids, audio, completion, case.temperature, LAYERS,
                                    family.audio_id)
        expected.append(model.Statistics(logp.detach(), entropy.detach(), mass.detach()))
        a = mass.max(dim=1).values.mean(dim=0)  # a_t  [T]
        total_logp = total_logp + (w_logp[row, :length] * logp).sum()
        total_mass = total_mass + (w_mass[row, :length] * a).sum()
    wanted = {"log-prob": gradients(family.plain, total_logp),
              "audio mass": gradients(family.plain, total_mass)}

    layer_runs = []
    hooks = [layer.self_attn.register_forward_hook(lambda *_: layer_runs.append(1))
             for layer in policy.base.model.language_model.layers]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "LOGIT_COLUMNS", case.columns)
        patch.setattr(attention, "mass_rows", lambda device: case.mass_rows)
        try:
            if case.checkpointing:
                policy.model.activation_checkpointing_enable({"use_reentrant": False})
                policy.train()
            out = policy(batch, case.temperature, LAYERS)
            a = mapo.audio_attention_mass(out.head_mass)
            found = {"log-prob": gradients(policy.base, (w_logp * out.logp).sum()),
                     "audio mass": gradients(policy.base, (w_mass * a).sum())}
        finally:
            policy.model.activation_checkpointing_disable()
            policy.eval()
            [hook.remove() for hook in hooks]
    return SimpleNamespace(case=case, batch=batch, out=out, expected=expected, found=found,
                           wanted=wanted, layer_runs=len(layer_runs))


def test_log_probs_equal_plain_attention(compared):
    for row, expected in enumerate(compared.expected):
        assert difference(compared.out.logp[row, :len(expected.logp)], expected.logp) < CLOSE


def test_entropies_equal_plain_attention(compared):
    for row, expected in enumerate(compared.expected):
        length = len(expected.entropy)
        assert difference(compared.out.entropy[row, :length], expected.entropy) < CLOSE


def test_masses_equal_plain_attention(compared):
    for row, expected in enumerate(compared.expected):
        length = len(expected.logp)
        found = compared.out.head_mass[:, row, :, :length]  # [L, H, T]
        assert difference(found, expected.head_mass) < CLOSE


@pytest.mark.parametrize("quantity", ["log-prob", "audio mass"])
def test_gradients_equal_plain_attention(compared, quantity):
    """The gradient of every parameter. That of the mass passes through the maximum over heads."""
    wanted, found = compared.wanted[quantity], compared.found[quantity]
    scale = max(float(g.abs().max()) for g in wanted.values())
    assert scale > 1e-3
    for name in wanted:
        assert (found[name] - wanted[name]).abs().max() < CLOSE * scale, name


def test_statistics_are_zero_off_the_completion(compared):
    out, mask = compared.out, compared.batch.completion_mask
    assert not out.logp[~mask].any() and not out.entropy[~mask].any()
    assert not out.head_mass.movedim(2, 3)[:, ~mask].any()


def test_checkpointing_runs_each_layer_once_more_per_backward(compared):
    """The mass is an output of its layer, and is recomputed with it: 3 layers, two backwards."""
    assert compared.layer_runs == (3 * 3 if compared.case.checkpointing else 3)


@pytest.mark.parametrize("rows", list(ROWS))
def test_shapes_and_gradient_flags(family, rows):
    """Gradient flows through log-probs and masses, not through entropies."""
    batch = batch_for(family, ROWS[rows])
    out = family.policy(batch, 1.2, LAYERS)
    assert bool(batch.attention_mask.all()) == (rows != "padded")  # else a case tests too little
    longest = max(length for _, length in ROWS[rows])
    assert out.logp.shape == out.entropy.shape == (len(ROWS[rows]), longest)
    assert out.head_mass.shape == (len(LAYERS), len(ROWS[rows]), 4, longest)
    assert out.head_mass.min() >= 0 and out.head_mass.max() <= 1
    assert out.logp.requires_grad and out.head_mass.requires_grad and not out.entropy.requires_grad


def test_target_layers_do_not_change_the_rest(family):
    """Log-probs and entropies are the same without the mass; each layer's mass is its own."""
    batch = batch_for(family, ROWS["padded"])
    with torch.no_grad():
        without, all_layers, last = (family.policy(batch, 1.2, layers)
                                     for layers in ((), (0, 1, 2), (2,)))
    assert without.head_mass is None
    assert torch.equal(without.logp, all_layers.logp)
    assert torch.equal(without.entropy, all_layers.entropy)
    assert torch.equal(all_layers.head_mass[2:], last.head_mass)


def test_no_graph_without_gradient(family):
    with torch.no_grad():
        out = family.policy(batch_for(family, ROWS["one"]), 1.2, LAYERS)
    assert not out.logp.requires_grad and not out.head_mass.requires_grad


# ──────── what the policy is given ────────


def test_text_only_prompt_has_no_audio(family):
    """π_text-ref sees neither placeholders nor their markers, and the same completion columns."""
    policy, rows = family.policy, ROWS["padded"]
    with_audio, text = batch_for(family, rows), batch_for(family, rows, text_only=True)
    assert text.audio == {}
    audio_ids = policy.tokenizer.convert_tokens_to_ids(
        ["<|audio_start|>", "<|audio_pad|>", "<|audio_end|>"])
    assert not set(audio_ids) & set(text.input_ids.flatten().tolist())
    width = text.completion_mask.shape[1]
    assert torch.equal(with_audio.completion_mask, text.completion_mask)
    assert torch.equal(with_audio.input_ids[:, -width:], text.input_ids[:, -width:])


def test_text_only_statistics_equal_plain_attention(family):
    policy, rows = family.policy, ROWS["padded"]
    with torch.no_grad():
        out = policy(batch_for(family, rows, text_only=True), 1.2)
        for row, ((q, length), completion) in enumerate(zip(rows, completions_for(policy, rows))):
            ids, audio = inputs_alone(family.kind, policy, family.questions[q], with_audio=False)
            assert family.prompts[q].text_ids == ids
            logp, entropy, _ = alone(family.plain, ids, audio, completion, 1.2)
            assert difference(out.logp[row, :length], logp) < CLOSE
            assert difference(out.entropy[row, :length], entropy) < CLOSE


def test_an_empty_completion_does_not_change_the_others(family):
    prompts, policy = family.prompts[:2], family.policy
    with torch.no_grad():
        both = policy(policy.collate(prompts, [[], [5, 6]]), 1.0, LAYERS)
        full = policy(policy.collate(prompts[1:], [[5, 6]]), 1.0, LAYERS)
    assert not both.logp[0].any() and not both.head_mass[:, 0].any()
    assert difference(both.logp[1:], full.logp) < CLOSE
    assert difference(both.head_mass[:, 1:], full.head_mass) < CLOSE


def test_empty_completions_alone_give_one_column_of_zeros(family):
    prompts, policy = family.prompts[:2], family.policy
    with torch.no_grad():
        out = policy(policy.collate(prompts, [[], []]), 1.0, LAYERS)
    assert out.logp.shape == (2, 1) and not out.logp.any() and not out.head_mass.any()


def test_left_padding_changes_nothing(qwen3):
    """Neither its amount (the second prompt is 9 times as long) nor the id of its tokens."""
    policy, prompt = qwen3.policy, qwen3.prompts[0]
    long = dataclasses.replace(prompt, ids=prompt.ids[:-1] + [7] * 500 + prompt.ids[-1:])
    unpadded = policy.collate([prompt], [[5, 6, 7]])
    padded = policy.collate([prompt, long], [[5, 6, 7], [8]])
    other_id = dataclasses.replace(padded, input_ids=torch.where(
        padded.attention_mask == 0, 99, padded.input_ids))
    with torch.no_grad():
        unpadded, padded, other_id = (policy(batch, 1.0, LAYERS)
                                      for batch in (unpadded, padded, other_id))
    assert difference(padded.logp[:1], unpadded.logp) < CLOSE
    assert difference(padded.head_mass[:, :1], unpadded.head_mass) < CLOSE
    assert torch.equal(other_id.logp, padded.logp)
    assert torch.equal(other_id.head_mass, padded.head_mass)


class FillsWithMinus65504(torch.autograd.Function):
    """Attention in fp32 as cuDNN's kernel for Hopper GPUs computes it (pytorch#196678).

    Masked scores are filled with −65504. The backward multiplies exp(z) with exp(−logsumexp), which
    is 0 · ∞ = NaN where all keys are masked.
    """

    @staticmethod
    def forward(ctx, query, key, value, mask, scale):
        z = (query @ key.mT * scale).masked_fill(~mask, -65504)
        log_z = z.logsumexp(-1, keepdim=True)
        ctx.save_for_backward(query, key, value, z, log_z)
        ctx.scale = scale
        return (z - log_z).exp() @ value

    @staticmethod
    def backward(ctx, grad):
        query, key, value, z, log_z = ctx.saved_tensors
        alpha = z.exp() * (-log_z).exp()
        dalpha = grad @ value.mT
        dz = alpha * (dalpha - (alpha * dalpha).sum(-1, keepdim=True)) * ctx.scale
        return dz @ key, dz.mT @ query, alpha.mT @ grad, None, None


@pytest.mark.parametrize("kind", list(BUILD))
def test_a_kernel_that_fills_masked_scores(kind, tmp_path, monkeypatch):
    """Rows of left padding: finite outputs and gradients, equal to those of torch's own kernel."""
    policy = BUILD[kind]()
    prompts = [policy.encode(q) for q in tiny.questions(tmp_path)]
    batch = policy.collate(prompts, [[5, 6, 7], [8], [9, 10]])
    assert (batch.attention_mask[:, 0] == 0).any()

    def results():
        out = policy(batch, 1.0, LAYERS)
        return out, gradients(policy.base, out.logp.sum() + out.head_mass.sum())

    def kernel(query, key, value, attn_mask=None, dropout_p=0.0, scale=None, is_causal=False,
               enable_gqa=False):
        if attn_mask is None:  # the encoders
            return original(query, key, value, scale=scale, is_causal=is_causal)
        groups = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
        seen.append(attn_mask.any(-1).all().item())
        return FillsWithMinus65504.apply(query, key, value, attn_mask, scale)

    wanted, wanted_gradients = results()
    seen, original = [], torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", kernel)
    found, found_gradients = results()
    torch.testing.assert_close(found.logp, wanted.logp, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.head_mass, wanted.head_mass, atol=1e-5, rtol=1e-4)
    largest = max(g.abs().max() for g in wanted_gradients.values())
    for name, gradient in wanted_gradients.items():
        assert (found_gradients[name] - gradient).abs().max() < 1e-3 * largest, name  # no NaN
    assert len(seen) >= 3 and all(seen)  # no row without a key, in decoder and encoder


def test_cudnn_attention_is_off(one_tiny):
    assert not torch.backends.cuda.cudnn_sdp_enabled()


def test_audio_embeddings_equal_features(family):
    """Audio that is encoded once gives the statistics and gradients of features in the batch."""
    policy = family.policy
    encoded = dict(enumerate(policy.encode_audio(list(family.prompts))))
    assert all(not prompt.features for prompt in encoded.values())
    rows = ROWS["padded"]
    one, other = (policy.collate([prompts[q] for q, _ in rows], completions_for(policy, rows))
                  for prompts in (family.prompts, encoded))
    assert list(other.audio) == ["embeddings"]
    first, second = policy(one, 1.2, LAYERS), policy(other, 1.2, LAYERS)
    for found, wanted in zip(second, first, strict=True):
        assert difference(found, wanted) < CLOSE
    decoder = policy.base.model.language_model
    found, wanted = (gradients(decoder, x.logp.sum() + x.head_mass.sum()) for x in (second, first))
    for name in wanted:
        assert difference(found[name], wanted[name]) < 1e-9, name


def test_positions():
    """Padding on the left does not count; padding on the right does no harm."""
    mask = torch.tensor([[0, 0, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]])
    assert model.positions(mask).tolist() == [[0, 0, 0, 1, 2, 2], [0, 1, 2, 3, 4, 5]]


def test_positions_equal_the_models_own(family):
    """Left to find the positions itself (M-RoPE, if it has it), transformers finds the same."""
    batch, inner = batch_for(family, ROWS["padded"]), family.policy.base.model
    inputs = dict(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False,
                  **batch.audio)
    with torch.no_grad():
        own = inner(**inputs).last_hidden_state
        ours = inner(position_ids=model.positions(batch.attention_mask), **inputs).last_hidden_state
    kept = batch.attention_mask.bool()
    # Qwen2-Audio counts left padding. RoPE depends on distances alone, but its angles are float32.
    tolerance = 1e-5 if family.kind == "qwen2_audio" else CLOSE
    assert difference(ours[kept], own[kept]) < tolerance


# ──────── audio tokens and features ────────


def test_audio_token_count_equals_the_encoders(family):
    """Frame by frame. Qwen2-Audio's encoder computes its lengths itself."""
    policy, tower = family.policy, family.policy.base.model.audio_tower
    count = policy.family.tokens
    if family.kind == "qwen2_audio":
        frames = range(1, 3001)
        made = tower._get_feat_extract_output_lengths(torch.tensor(frames))[1].tolist()
        assert [count(n) for n in frames] == made
        return
    with torch.no_grad():
        for n in range(1, 451):
            lengths = {"feature_lens": torch.tensor([n])}
            if family.kind == "qwen2_5_omni":
                lengths["aftercnn_lens"] = torch.tensor([(n + 1) // 2])
            made = tower(torch.zeros(128, n, dtype=torch.float64), **lengths)
            assert count(n) == len(made.last_hidden_state), n


@pytest.mark.parametrize("kind", ["qwen3_omni", "qwen2_5_omni"])
def test_audio_token_counts_add_up_over_clips(kind):
    policy = BUILD[kind]()
    frames = [7, 100, 101, 199, 200, 201, 450, 3000]
    mask = torch.arange(max(frames)) < torch.tensor(frames)[:, None]
    with torch.no_grad():
        features = torch.zeros(len(frames), 128, max(frames))
        made = policy.base.get_audio_features(features, mask.long())
    count = sum(map(policy.family.tokens, frames))
    assert count == len(made.last_hidden_state)


@pytest.mark.parametrize("seconds", [0.1, 0.999, 1.0, 1.001, 3.7])
def test_encode_makes_one_placeholder_per_audio_token(family, tmp_path, seconds):
    policy = family.policy
    question = tiny.questions(tmp_path, seconds=((seconds,),))[0]
    prompt = policy.encode(question)
    placeholders = prompt.ids.count(family.audio_id)
    frames = frame_count(family.kind, samples_of(family.kind, question.audio[0]))
    assert prompt.frames == (frames,)
    assert placeholders == audio_tokens(family.kind, frames) > 0
    assert policy.tokenizer.decode(prompt.ids) == prompt_text(question, [placeholders])
    batch = policy.collate([prompt], [[5, 6]])
    with torch.no_grad():
        if family.kind == "qwen2_audio":  # its forward compares the numbers itself
            policy.base(input_ids=batch.input_ids, attention_mask=batch.attention_mask,
                        **batch.audio)
        else:
            made = policy.base.get_audio_features(**batch.audio).last_hidden_state
            assert made.shape[-2] == placeholders


def test_a_clip_shorter_than_one_token_is_an_error(family, tmp_path):
    """Qwen3-Omni's clips are padded to a second, so none is too short."""
    question = tiny.questions(tmp_path, seconds=((0.01,),))[0]
    if family.kind == "qwen3_omni":
        assert family.policy.encode(question).ids.count(family.audio_id) == 13
    else:
        message = error_of(family.policy.encode, question)
        assert message.startswith(f"{question.audio[0]}: 0.010 s is too short")


@pytest.mark.parametrize("samples", [1, 159, 480, 961, 1120, 1121, 15999, 16001, 16160, 20001])
def test_clip_tokens_are_those_of_the_encoded_clip(family, tmp_path, samples):
    """They are computed from the length alone, and refuse the same lengths."""
    policy, clip = family.policy, tmp_path / "clip.wav"
    soundfile.write(clip, np.zeros(samples), 16000)
    arguments = samples, policy.feature_extractor, policy.family, clip
    question = Question("x", (clip,), "Which?", ("one", "two"), "two")
    try:
        prompt = policy.encode(question)
    except InputError as error:
        assert str(error) == error_of(clip_tokens, *arguments) and "too short" in str(error)
    else:
        assert clip_tokens(*arguments) == prompt.ids.count(family.audio_id)


def test_instruction_ends_the_prompt(family):
    """After the options, with audio and without."""
    question, instruction = family.questions[1], "Think first."
    prompt = family.policy.encode(question, instruction)
    tokens = [audio_tokens(family.kind, n) for n in prompt.frames]
    decode = family.policy.tokenizer.decode
    assert decode(prompt.ids) == prompt_text(question, tokens, f"\n{instruction}")
    assert decode(prompt.text_ids) == prompt_text(question, (), f"\n{instruction}")


def test_features_equal_the_extractors(family):
    """Clip by clip, whatever other clips the question has."""
    for question, prompt in zip(family.questions, family.prompts):
        _, audio = inputs_alone(family.kind, family.policy, question)
        for i, (features, frames) in enumerate(zip(prompt.features, prompt.frames)):
            assert frames == int(audio["feature_attention_mask"][i].sum())
            assert torch.equal(features[:, :frames], audio["input_features"][i, :, :frames])


def test_prompt_keeps_its_question(tmp_path):
    policy = tiny.qwen3_omni()
    clips = tiny.questions(tmp_path)[1].audio
    question = Question("x", clips, "Which?", ("one", "two"), "two")
    prompt = policy.encode(question)
    assert prompt.question is question
    assert [f.shape[1] for f in prompt.features] == list(prompt.frames) == [130, 100]


def test_a_short_clip_does_not_depend_on_its_batch(family, tmp_path):
    """The same statistics alone and beside longer clips.

    Qwen3-Omni's encoder pads chunks to the longest of the batch, and its convolutions turn that
    padding into something that is not zero. Therefore encode pads these clips to one second.
    """
    policy, completions = family.policy, [[5, 6, 7], [8, 9], [10, 11, 12]]
    questions = tiny.questions(tmp_path, seconds=((0.3,), (1.2,), (0.62,)), seed=4)
    prompts = [policy.encode(q) for q in questions]
    with torch.no_grad():
        together = policy(policy.collate(prompts, completions), 1.0, LAYERS)
        for row, (prompt, completion) in enumerate(zip(prompts, completions)):
            apart, n = policy(policy.collate([prompt], [completion]), 1.0, LAYERS), len(completion)
            assert difference(together.logp[row, :n], apart.logp[0]) < CLOSE
            assert difference(together.head_mass[:, row, :, :n], apart.head_mass[:, 0]) < CLOSE


@pytest.mark.parametrize("samples, padded", [
    (4000, 16000), (15999, 16000), (16000, 16000), (16001, 16160), (20000, 20000)])
def test_load_clip_adds_silence_for_qwen3_omni(family, tmp_path, samples, padded):
    """Up to a second, and to whole frames of 160 samples. Other models' clips are not padded."""
    wave = np.random.default_rng(samples).uniform(-0.5, 0.5, samples).astype(np.float32)
    soundfile.write(tmp_path / "clip.wav", wave, 16000, subtype="FLOAT")
    clip = family.policy.load_clip(tmp_path / "clip.wav")
    assert len(clip) == (padded if family.kind == "qwen3_omni" else samples)
    assert np.array_equal(clip[:samples], wave) and not clip[samples:].any()


def test_qwen2_audio_takes_at_most_30_seconds(tmp_path):
    """A longer clip is an error that names it; transformers would cut it without a word."""
    policy = tiny.qwen2_audio()
    too_long, longest = tiny.questions(tmp_path, seconds=((30.1,), (30.0,)))
    assert f"{too_long.audio[0]}: 30.1 s" in error_of(policy.encode, too_long)
    assert policy.encode(longest).ids.count(policy.audio_token_id) == 750


@pytest.mark.parametrize("rendered, question, message", [
    (2, 1, "question q1: the chat template renders 4 audio placeholders"),
    (0, 0, "question q0: the chat template renders 0 audio placeholders")])
def test_encode_needs_one_placeholder_per_clip(one_tiny, rendered, question, message):
    policy, questions = one_tiny
    policy.tokenizer.chat_template = policy.tokenizer.chat_template.replace(
        "<|audio_pad|>", "<|audio_pad|>" * rendered)
    error = error_of(policy.encode, questions[question])
    assert message in error and f"for {len(questions[question].audio)} clips" in error


def test_encoded_audio_must_fill_the_placeholders(one_tiny, monkeypatch):
    policy, questions = one_tiny
    prompts = [policy.encode(q) for q in questions[:2]]
    embed = model.audio_embeddings
    monkeypatch.setattr(model, "audio_embeddings", lambda *args, **more: embed(*args, **more)[1:])
    tokens = sum(p.ids.count(policy.audio_token_id) for p in prompts)
    message = error_of(policy.encode_audio, prompts)
    assert f"questions q0 … q1: the audio encoder makes {tokens - 1} tokens" in message
    assert f"{tokens} placeholders" in message


@pytest.mark.parametrize("change", [+1, -1])
def test_collate_compares_placeholders_with_features(one_tiny, change):
    """One placeholder too many or too few: transformers would cut the features without a word."""
    policy, questions = one_tiny
    right, prompt = policy.encode(questions[0]), policy.encode(questions[2])
    at = prompt.ids.index(policy.audio_token_id)
    placeholder = [policy.audio_token_id] * (change > 0)
    wrong = dataclasses.replace(
        prompt, ids=prompt.ids[:at] + placeholder + prompt.ids[at + (change < 0):])
    message = error_of(policy.collate, [right, wrong], [[5], [6]])
    tokens = sum(p.ids.count(policy.audio_token_id) for p in (right, prompt))
    assert "questions q0 … q2" in message
    assert f"{tokens + change} audio placeholders" in message
    assert f"{tokens} audio tokens" in message


@pytest.mark.parametrize("text_only", [False, True])
def test_collate_refuses_a_placeholder_in_a_completion(one_tiny, text_only):
    """The next forward would look for its feature. The fault is the program's, not the user's."""
    policy, questions = one_tiny
    prompt = policy.encode(questions[0])
    with pytest.raises(ValueError, match="placeholder") as error:
        policy.collate([prompt], [[5, policy.audio_token_id]], text_only=text_only)
    assert not isinstance(error.value, InputError)


def test_collate_needs_one_completion_per_prompt(one_tiny):
    policy, questions = one_tiny
    prompt = policy.encode(questions[0])
    with pytest.raises(ValueError, match="zip"):
        policy.collate([prompt, prompt], [[5]])


def test_decode_leaves_out_special_tokens(one_tiny):
    policy, _ = one_tiny
    ids = policy.tokenizer("<think>A bell.</think> a bell<|im_end|>")["input_ids"]
    completion = SimpleNamespace(token_ids=ids)
    assert policy.decode(completion) == "<think>A bell.</think> a bell"


def test_decode_leaves_out_ids_of_a_padded_vocabulary(one_tiny):
    """A model may have more logits than its tokenizer has tokens."""
    policy, _ = one_tiny
    ids = policy.tokenizer("a bell")["input_ids"]
    completion = SimpleNamespace(token_ids=[ids[0], len(policy.tokenizer), *ids[1:], 10**6])
    assert policy.decode(completion) == "a bell"


@pytest.mark.parametrize("template", [
    "{{ '<|im_start|>' + messages[0].content }}", "{{ messages[0].content.text.strip() }}",
    "{% for %}", "{{ raise_exception('text only') }}"])
def test_a_template_for_text_alone_is_one_line(one_tiny, template):
    """jinja and the template itself raise many kinds of errors."""
    policy, questions = one_tiny
    policy.tokenizer.chat_template = template
    assert "the chat template cannot render audio" in error_of(policy.encode, questions[0])


# ──────── log-prob and entropy without [T, V] ────────


def head_inputs(dtype=torch.float64, rows=10, width=6, vocabulary=11):
    """→ (hidden states [rows, width], an lm_head, token ids [rows]), random."""
    generator = torch.Generator().manual_seed(0)
    head = torch.nn.Linear(width, vocabulary, bias=False, dtype=dtype)
    with torch.no_grad():
        head.weight.copy_(torch.randn(vocabulary, width, generator=generator))
    hidden = 3 * torch.randn(rows, width, dtype=dtype, generator=generator)
    return hidden.requires_grad_(), head, torch.randint(vocabulary, (rows,), generator=generator)


@pytest.mark.parametrize("columns", [1, 4, 11, 4096])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.2])
def test_token_statistics_equal_the_equations(temperature, columns, monkeypatch):
    """Values and gradients of mapo.token_logp and mapo.token_entropy on whole logits."""
    monkeypatch.setattr(model, "LOGIT_COLUMNS", columns)
    hidden, head, ids = head_inputs()
    weights = torch.randn(len(ids), dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    logp, entropy = model.token_statistics(hidden, head, ids, temperature)
    logits = head(hidden) / temperature
    wanted_logp, wanted_entropy = mapo.token_logp(logits, ids), mapo.token_entropy(logits)
    assert difference(logp, wanted_logp) < CLOSE
    assert difference(entropy, wanted_entropy) < CLOSE and not entropy.requires_grad
    found, wanted = (torch.autograd.grad((weights * x).sum(), [hidden, head.weight])
                     for x in (logp, wanted_logp))
    for actual, expected in zip(found, wanted):
        assert difference(actual, expected) < CLOSE


def test_token_statistics_equal_finite_differences(monkeypatch):
    monkeypatch.setattr(model, "LOGIT_COLUMNS", 4)
    hidden, head, ids = head_inputs()
    assert torch.autograd.gradcheck(
        lambda h, weight: model.TokenStatistics.apply(h, weight, ids, 1.2)[0],
        (hidden, head.weight))


@pytest.mark.parametrize("frozen", ["hidden", "head"])
def test_token_statistics_with_one_frozen_input(frozen):
    """As under LoRA, where lm_head is frozen: the other gradient is the same."""
    hidden, head, ids = head_inputs()
    inputs = {"hidden": hidden, "head": head.weight}
    both = dict(zip(inputs, torch.autograd.grad(
        model.token_statistics(hidden, head, ids, 1.2)[0].sum(), list(inputs.values()))))
    inputs.pop(frozen).requires_grad_(False)
    (name, trained), = inputs.items()
    model.token_statistics(hidden, head, ids, 1.2)[0].sum().backward()
    assert torch.equal(trained.grad, both[name])


def test_statistics_of_a_certain_and_of_a_uniform_distribution():
    """Logits a thousand apart give log-prob 0 and entropy 0, no NaN; equal ones −ln V and ln V."""
    head = torch.nn.Linear(2, 5, bias=False)
    with torch.no_grad():
        head.weight.zero_()[0, 0] = 1000
    certain, uniform = [1.0, 0.0], [0.0, 1.0]
    logp, entropy = model.token_statistics(torch.tensor([certain, uniform]), head,
                                           torch.tensor([0, 3]), 1.0)
    assert logp.tolist() == pytest.approx([0, -np.log(5)])
    assert entropy.tolist() == pytest.approx([0, np.log(5)])


def in_and_out_of_autocast(call, inputs):
    """→ two lists: results of call() and gradients of the first one, without autocast and with.

    The backward, too, runs inside the autocast block.
    """
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            outputs = call()
            loss = (outputs[0] * torch.linspace(1, 2, outputs[0].numel()).view_as(outputs[0])).sum()
            results.append([*outputs, *torch.autograd.grad(loss, inputs)])
    return results


def test_autocast_does_not_change_token_statistics():
    hidden, head, ids = head_inputs(torch.float32)
    plain, autocast = in_and_out_of_autocast(
        lambda: model.token_statistics(hidden, head, ids, 1.2), [hidden, head.weight])
    for expected, actual in zip(plain, autocast, strict=True):
        assert actual.dtype == torch.float32 and difference(actual, expected) < 1e-6


def test_hidden_states_are_converted_to_the_dtype_of_the_head():
    """Under autocast they can be bf16 beside an fp32 head; their gradient is bf16 again."""
    hidden, head, ids = head_inputs(torch.float32)
    rounded = hidden.detach().bfloat16().requires_grad_()
    logp, entropy = model.token_statistics(rounded, head, ids, 1.2)
    wanted = model.token_statistics(rounded.detach().float(), head, ids, 1.2)
    assert torch.equal(logp, wanted[0]) and torch.equal(entropy, wanted[1])
    logp.sum().backward()
    assert rounded.grad.dtype == torch.bfloat16 and rounded.grad.any()


@pytest.mark.parametrize("frozen_head", [False, True])
def test_token_statistics_have_no_second_derivative(frozen_head):
    """An error, because the backward's own derivative would be wrong."""
    hidden, head, ids = head_inputs()
    inputs = [hidden] if frozen_head else [hidden, head.weight]
    head.requires_grad_(not frozen_head)
    logp, _ = model.token_statistics(hidden, head, ids, 1.2)
    first = torch.autograd.grad(logp.square().sum(), inputs, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        first[0].square().sum().backward()


def test_token_statistics_refuse_a_head_with_a_bias():
    hidden, _, ids = head_inputs()
    with pytest.raises(ValueError, match="lm_head has a bias"):
        model.token_statistics(hidden, torch.nn.Linear(6, 11, dtype=torch.float64), ids, 1.0)


@pytest.mark.parametrize("wrong", [-100, -1, 11])
def test_token_statistics_refuse_an_id_outside_the_vocabulary(wrong):
    hidden, head, ids = head_inputs()
    ids[3] = wrong
    with pytest.raises(ValueError, match="token_ids must be from 0 to 10"):
        model.token_statistics(hidden, head, ids, 1.0)


def head_error(rows, of):
    """Standard deviation of log-prob errors against float64, on bf16 states and weights."""
    torch.manual_seed(0)
    hidden = torch.randn(rows, 256).bfloat16()
    head = torch.nn.Linear(256, 2000, bias=False, dtype=torch.bfloat16)
    torch.nn.init.normal_(head.weight, std=0.15)
    ids = torch.randint(2000, (rows,))
    exact = (hidden.double() @ head.weight.double().T / 1.2).log_softmax(-1)
    exact = exact.gather(1, ids[:, None])[:, 0]
    return (of(hidden, head, ids) - exact).std().item()


def test_fp32_head_on_bf16_states():
    """With it, a log-prob is as exact as fp32 can be. Without it the logits are rounded to bf16.

    The second is what a forward in bf16 and a softmax in fp32 gives, as in TRL.
    """
    error = {on: head_error(400, lambda hidden, head, ids: model.token_statistics(
        hidden, head, ids, 1.2, fp32_head=on)[0].detach()) for on in (True, False)}
    usual = head_error(400, lambda hidden, head, ids: (head(hidden).float() / 1.2).log_softmax(-1)
                       .gather(1, ids[:, None])[:, 0].detach())
    print(f"log-prob error, std in nats: fp32 head {error[True]:.1e}, bf16 head "
          f"{error[False]:.1e}, logits in bf16 {usual:.1e}")
    assert error[True] < 5e-6 and error[False] > 3e-3
    assert error[False] == pytest.approx(usual, rel=0.05)


def test_the_sampler_uses_the_same_head():
    policy = tiny.qwen3_omni(dtype=torch.bfloat16, experts="eager")
    hidden = torch.randn(5, 32).bfloat16()
    exact = hidden.double() @ policy.base.lm_head.weight.double().T
    error = {}
    for policy.fp32_head in (True, False):
        error[policy.fp32_head] = (policy.logits(hidden) - exact).abs().max().item()
    assert error[True] < 1e-5 and error[False] > 1e-3


# ──────── audio attention mass ────────

SCALING = 0.37


def attention_inputs(dtype=torch.float64, keys=9, rows=5):
    """→ (q [2, 6, keys, 4], k [2, 2, keys, 4], is_audio, allowed), random.

    Three query heads share a key head. The last `rows` rows count. The second sample has two keys
    of padding on the left.
    """
    generator = torch.Generator().manual_seed(0)
    query = 2 * torch.randn(2, 6, keys, 4, dtype=torch.float64, generator=generator)
    key = 2 * torch.randn(2, 2, keys, 4, dtype=torch.float64, generator=generator)
    is_audio = torch.zeros(2, keys, dtype=torch.bool)
    is_audio[0, 1:4] = is_audio[1, 3:5] = True
    causal = torch.ones(keys, keys, dtype=torch.bool).tril()[keys - rows:]
    allowed = causal.repeat(2, 1, 1, 1)  # [2, 1, rows, keys]
    allowed[1, :, :, :2] = False
    return (query.to(dtype).requires_grad_(), key.to(dtype).requires_grad_(), is_audio, allowed)


def mass_by_loops(query, key, is_audio, allowed, scaling):
    """Σ_{j ∈ S_audio} exp z_j / Σ_j exp z_j, one sample, head and row at a time."""
    rows = query[:, :, -allowed.shape[2]:]
    heads_per_key = query.shape[1] // key.shape[1]
    mass = torch.zeros(rows.shape[:3], dtype=query.dtype)
    for b, h, t in np.ndindex(*mass.shape):
        weights = {}
        for j in range(key.shape[2]):
            if allowed[b, 0, t, j]:
                weights[j] = (rows[b, h, t] @ key[b, h // heads_per_key, j] * scaling).exp()
        on_audio = sum(weight for j, weight in weights.items() if is_audio[b, j])
        mass[b, h, t] = on_audio / sum(weights.values())
    return mass


def test_plain_audio_mass_equals_loops():
    """Values and gradients of the plain form, which the other tests take as their reference."""
    query, key, *rest = attention_inputs()
    found, wanted = (mass(query, key, *rest, SCALING)
                     for mass in (attention.audio_mass, mass_by_loops))
    assert difference(found, wanted) < CLOSE
    weights = torch.linspace(-1, 1, found.numel(), dtype=torch.float64).view_as(found)
    for actual, expected in zip(*(torch.autograd.grad((weights * mass).sum(), [query, key])
                                  for mass in (found, wanted))):
        assert difference(actual, expected) < CLOSE


@pytest.mark.parametrize("rows", [1, 5, 7])  # of 9; padding has none
@pytest.mark.parametrize("rows_at_once", [1, 2, 128])
def test_audio_mass_equals_its_plain_form(rows_at_once, rows, monkeypatch):
    """Values, and the gradients of a loss on all heads and of one on the largest head (Eq. 13)."""
    monkeypatch.setattr(attention, "mass_rows", lambda device: rows_at_once)
    query, key, *rest = attention_inputs(rows=rows)
    found, wanted = (mass(query, key, *rest, SCALING)
                     for mass in (attention.AudioMass.apply, attention.audio_mass))
    assert difference(found, wanted) < CLOSE
    weights = torch.linspace(-1, 1, found.numel(), dtype=torch.float64).view_as(found)
    for loss in (lambda mass: (weights * mass).sum(),
                 lambda mass: mapo.attention_penalty(mass.max(dim=1).values, 0.1).sum()):
        for actual, expected in zip(*(
                torch.autograd.grad(loss(mass), [query, key], retain_graph=True)
                for mass in (found, wanted))):
            assert difference(actual, expected) < CLOSE


def test_audio_mass_with_one_mask_for_all_samples():
    """allowed is [1, 1, T, S] when nothing is padded."""
    query, key, is_audio, allowed = attention_inputs()
    one, repeated = allowed[:1], allowed[:1].expand(2, -1, -1, -1)
    results = []
    for mask in (one, repeated):
        mass = attention.AudioMass.apply(query, key, is_audio, mask, SCALING)
        results.append((mass, *torch.autograd.grad(mass.square().sum(), [query, key])))
    for actual, expected in zip(*results):
        assert torch.equal(actual, expected)


def test_audio_mass_equals_finite_differences(monkeypatch):
    monkeypatch.setattr(attention, "mass_rows", lambda device: 2)
    query, key, *rest = attention_inputs()
    assert torch.autograd.gradcheck(lambda q, k: attention.AudioMass.apply(q, k, *rest, SCALING),
                                    (query, key))


def test_gradient_of_the_mass_in_closed_form():
    """Eq. 15 with one-dimensional keys: z_i = k_i·q, so ∂m/∂k_i = α_i·(𝟙[i ∈ S_audio] − m)·q."""
    q = 0.7
    k = torch.tensor([0.3, -1.0, 2.0, 0.5, -0.2, 1.1], dtype=torch.float64)
    is_audio = torch.tensor([False, True, True, False, False, True])
    key = k.clone().view(1, 1, 6, 1).requires_grad_()
    query = torch.full((1, 1, 1, 1), q, dtype=torch.float64)
    allowed = torch.ones(1, 1, 1, 6, dtype=torch.bool)
    attention.AudioMass.apply(query, key, is_audio[None], allowed, 1.0).sum().backward()
    alpha = (k * q).softmax(dim=0)
    m = alpha[is_audio].sum()
    expected = alpha * (is_audio.double() - m) * q
    assert torch.allclose(key.grad.flatten(), expected, atol=1e-15)


def test_mass_is_1_on_audio_alone_and_0_without_audio():
    query, key, is_audio, allowed = attention_inputs(torch.float32)
    everything = attention.AudioMass.apply(query, key, torch.ones_like(is_audio), allowed, 0.5)
    nothing = attention.AudioMass.apply(query, key, torch.zeros_like(is_audio), allowed, 0.5)
    assert torch.allclose(everything, torch.ones_like(everything)) and not nothing.any()


def test_mass_stays_in_range_where_logits_are_large():
    query, key, *rest = attention_inputs(torch.float32)
    mass = attention.AudioMass.apply(query * 1000, key * 1000, *rest, 0.5)
    assert mass.isfinite().all() and mass.min() >= 0 and mass.max() <= 1


def test_bfloat16_inputs_give_a_float32_mass():
    """A product in bf16 would be off by 1e-2. Gradients have the dtype of the inputs."""
    query, key, is_audio, allowed = attention_inputs(torch.bfloat16, keys=90, rows=40)
    mass = attention.AudioMass.apply(query, key, is_audio, allowed, 0.5)
    exact = attention.audio_mass(query.double(), key.double(), is_audio, allowed, 0.5)
    assert mass.dtype == torch.float32 and (mass - exact).abs().max() < 1e-5
    grads = torch.autograd.grad(mass.sum(), [query, key])
    assert all(g.dtype == torch.bfloat16 and g.any() for g in grads)


def test_autocast_does_not_change_the_mass():
    query, key, *rest = attention_inputs(torch.float32)
    plain, autocast = in_and_out_of_autocast(
        lambda: [attention.AudioMass.apply(query, key, *rest, SCALING)], [query, key])
    for expected, actual in zip(plain, autocast, strict=True):
        assert actual.dtype == torch.float32 and difference(actual, expected) < 1e-6


def test_autocast_does_not_change_the_plain_mass():
    """Its backward is autograd's own, so only the value is certain."""
    inputs = attention_inputs(torch.float32)
    plain = attention.audio_mass(*inputs, SCALING)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(attention.audio_mass(*inputs, SCALING), plain)


def test_audio_mass_has_no_second_derivative():
    """An error, because the backward's own derivative would be wrong. The plain form has one."""
    query, key, *rest = attention_inputs()
    for form, fails in ((attention.audio_mass, False), (attention.AudioMass.apply, True)):
        mass = form(query, key, *rest, SCALING)
        first, _ = torch.autograd.grad(mass.square().sum(), [query, key], create_graph=True)
        if fails:
            with pytest.raises(RuntimeError, match="differentiate twice"):
                first.square().sum().backward()
        else:
            first.square().sum().backward()


@pytest.mark.parametrize("device", ["cpu", "cuda", "meta", "mps", "xpu"])
def test_every_device_has_a_block_size(device):
    assert attention.mass_rows(torch.device(device)) > 0


def test_bfloat16_model(one_tiny):
    """In a bf16 model the mass is the float64 mass of the q and k that its layers made."""
    policy, questions = one_tiny
    policy.base.to(torch.bfloat16)
    seen, original = {}, ALL_ATTENTION_FUNCTIONS["audio_mass"]

    def spy(layer, query, key, value, attention_mask, **kwargs):
        seen[layer.layer_idx] = (query.detach().double(), key.detach().double(), kwargs["scaling"])
        return original(layer, query, key, value, attention_mask, **kwargs)

    batch = policy.collate([policy.encode(q) for q in questions[:2]], [[4, 5, 6, 7], [9, 10]])
    try:
        AttentionInterface.register("audio_mass", spy)
        out = policy(batch, 1.0, LAYERS)
    finally:
        AttentionInterface.register("audio_mass", original)
    assert out.logp.dtype == out.entropy.dtype == out.head_mass.dtype == torch.float32
    total, width = batch.input_ids.shape[1], batch.completion_mask.shape[1]
    first = total - width - 1  # the row that predicts y_1
    causal = torch.ones(total, total, dtype=torch.bool).tril()
    allowed = (causal & batch.attention_mask.bool()[:, None, None])[:, :, first:]
    is_audio = batch.input_ids == policy.audio_token_id
    for mass, layer in zip(out.head_mass, LAYERS, strict=True):
        q, k, scaling = seen[layer]
        exact = attention.audio_mass(q, k, is_audio, allowed, scaling)[..., :width]
        exact = exact * batch.completion_mask[:, None]
        assert (mass - exact).abs().max() < 1e-5


def test_only_the_largest_head_gets_gradient(qwen3):
    """Eq. 13, for one token and one layer: q_proj of that head, k_proj of its key head."""
    policy = qwen3.policy
    config = policy.base.config.get_text_config()
    heads, key_heads = config.num_attention_heads, config.num_key_value_heads
    out = policy(policy.collate(qwen3.prompts[:1], [[5]]), 1.0, (2,))
    best = int(out.head_mass.flatten().argmax())
    grads = gradients(policy.base, mapo.audio_attention_mass(out.head_mass).sum())
    prefix = "model.language_model.layers.2.self_attn."
    touched = {name: grads[f"{prefix}{name}_proj.weight"].unflatten(0, (n, -1)).any(-1).any(-1)
               for name, n in (("q", heads), ("k", key_heads))}
    assert touched["q"].nonzero().flatten().tolist() == [best]
    assert touched["k"].nonzero().flatten().tolist() == [best * key_heads // heads]


def test_gradient_of_the_mass_enters_at_q_and_k_of_the_target_layer(qwen3):
    """It does not reach that layer's v, output and MLP, or anything above, but all layers below."""
    policy = qwen3.policy
    out = policy(batch_for(qwen3, ROWS["padded"]), 1.0, (1,))
    grads = gradients(policy.base, mapo.audio_attention_mass(out.head_mass).sum())
    touched = {name for name, g in grads.items() if g.any()}
    layer = "model.language_model.layers."
    above = [name for name in grads
             if name.startswith(("lm_head", "model.language_model.norm", f"{layer}2."))]
    assert above and not touched & set(above)
    own = {name.removeprefix(f"{layer}1.") for name in touched if name.startswith(f"{layer}1.")}
    assert own == {"input_layernorm.weight", "self_attn.q_proj.weight", "self_attn.k_proj.weight",
                   "self_attn.q_norm.weight", "self_attn.k_norm.weight"}
    assert f"{layer}0.self_attn.v_proj.weight" in touched
    assert "model.audio_tower.proj2.weight" in touched


@pytest.fixture
def layer():
    """attention_with_mass as layer 3 calls it, without padding, and its q, k, v and audio keys."""
    query, key, is_audio, _ = attention_inputs()
    value = torch.randn(key.shape, dtype=key.dtype, generator=torch.Generator().manual_seed(1))
    value.requires_grad_()
    layer = SimpleNamespace(layer_idx=3, num_key_value_groups=3, training=False, is_causal=True)
    call = partial(attention.attention_with_mass, layer, query, key, value, None, scaling=SCALING)
    return call, query, key, value, is_audio


def test_attention_output_is_the_fused_kernels(layer):
    """With and without the mass, which exists in the target layers alone."""
    call, *_, is_audio = layer
    asked = {"mass_first_row": 4, "mass_keys": is_audio}
    plain, nothing = call()
    other_layer, absent = call(mass_layers=(2,), **asked)
    output, mass = call(mass_layers=(1, 3), **asked)
    assert nothing is absent is None and mass is not None
    assert torch.equal(plain, output) and torch.equal(plain, other_layer)


def test_attention_returns_the_mass_of_the_rows_from_mass_first_row_on(layer):
    """Its gradient reaches those rows of q, and k, but neither earlier rows nor v."""
    call, query, key, value, is_audio = layer
    first, total = 4, key.shape[2]
    _, mass = call(mass_layers=(1, 3), mass_first_row=first, mass_keys=is_audio)
    causal = torch.ones(total, total, dtype=torch.bool).tril()[None, None, first:]
    expected = attention.audio_mass(query, key, is_audio, causal, SCALING)
    assert difference(mass, expected) < CLOSE
    q, k, v = torch.autograd.grad(mass.sum(), [query, key, value], allow_unused=True)
    assert v is None and k.any() and not q[:, :, :first].any() and q[:, :, first:].any()


# ──────── memory ────────


@pytest.fixture
def observed_forward(one_tiny, monkeypatch):
    """One forward and backward in small blocks, and all tensors seen on the way."""
    policy, questions = one_tiny
    columns, rows, length = 17, 4, 30
    monkeypatch.setattr(model, "LOGIT_COLUMNS", columns)
    monkeypatch.setattr(attention, "mass_rows", lambda device: rows)
    batch = policy.collate([policy.encode(q) for q in questions[:2]],
                           [[5] * length, [6] * (length - 3)])
    kept, logit_blocks, alpha_blocks = [], [], []

    def recorded(function, record):
        def call(first, second, *rest):
            record(first, second)
            return function(first, second, *rest)
        return call

    monkeypatch.setattr(model, "logit_block", recorded(
        model.logit_block, lambda hidden, weight: logit_blocks.append((len(hidden), len(weight)))))
    monkeypatch.setattr(attention, "attention_weights", recorded(
        attention.attention_weights, lambda query, key: alpha_blocks.append(query.shape[2])))

    def keep(tensor):
        kept.append((tensor.shape, tensor.dtype))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = policy(batch, 1.2, LAYERS)
    # What Python still holds, such as the attributes of a ctx, besides what autograd saved.
    kept += [(o.shape, o.dtype) for o in gc.get_objects() if type(o) is torch.Tensor]
    (out.logp.sum() + out.head_mass.sum()).backward()
    assert len(kept) > 50
    return SimpleNamespace(policy=policy, batch=batch, columns=columns, rows=rows, kept=kept,
                           logit_blocks=logit_blocks, alpha_blocks=alpha_blocks)


def test_the_forward_keeps_no_logits(observed_forward):
    """Of what has a row per completion token, only the hidden states outlive the forward."""
    seen, head = observed_forward, observed_forward.policy.base.lm_head
    tokens, width = int(seen.batch.completion_mask.sum()), head.weight.shape[1]
    per_token = {shape[1] for shape, _ in seen.kept if len(shape) == 2 and shape[0] == tokens}
    assert per_token == {width}
    assert {rows for rows, _ in seen.logit_blocks} == {tokens}
    assert max(columns for _, columns in seen.logit_blocks) == seen.columns
    passes = 2  # the forward, and the backward that computes the logits again
    assert sum(columns for _, columns in seen.logit_blocks) == passes * len(head.weight)


def test_the_forward_keeps_no_attention_weights(observed_forward):
    """Of what has a column per key, only masks outlive the forward: they have a single head."""
    seen = observed_forward
    keys = seen.batch.input_ids.shape[1]
    config = seen.policy.base.config.get_text_config()
    assert keys not in (config.hidden_size, config.head_dim, config.moe_intermediate_size)
    for shape, dtype in seen.kept:
        if len(shape) > 3 and shape[-1] == keys and dtype.is_floating_point:
            assert shape[1] == 1, shape
    assert max(seen.alpha_blocks) == seen.rows
