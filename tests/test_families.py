"""families.py: each family through the same code, against eager attention and its own processor.

The reference is that of test_model.py: the same transformers model in float64 with whole attention
weights, one question alone, nothing padded. Features come from the family's own processor, where
one can be built without a download; Voxtral's token ids were once compared with mistral-common.
"""

import copy
import dataclasses
import json
from functools import partial
from types import SimpleNamespace

import pytest
import soundfile
import test_model as plain
import tiny
import torch
from test_model import LAYERS, difference, error_of, roughen
from transformers import (AttentionInterface, AudioFlamingo3Processor, Gemma3nConfig,
                          GlmAsrProcessor, GraniteSpeechConfig, Phi4MultimodalConfig,
                          Qwen2_5_VLConfig, Qwen2AudioProcessor, Qwen2Config, Qwen3VLConfig,
                          VoxtralProcessor)

import attention
import checkpoint
import diagnostics
import distributed
import mapo
from config import TrainConfig
from data import clip_tokens
from families import FAMILIES, family_of
from model import positions
from plan import sizes_of
from rollout import Sampling, sample
from run import check_policy, set_trainable

KINDS = {"qwen3_omni": partial(tiny.qwen3_omni, experts="eager"),
         "qwen2_5_omni": tiny.qwen2_5_omni, "qwen2_audio": tiny.qwen2_audio,
         "audioflamingo3": tiny.audioflamingo3, "voxtral": tiny.voxtral, "glm_asr": tiny.glm_asr}
NEW = ("audioflamingo3", "voxtral", "glm_asr")
COMPLETIONS = [[5, 17, 300, 33, 320], [70, 320], [90, 91, 92, 320]]  # of the three questions
SECONDS = ((1.2,), (2.345, 0.4), (0.5,))


# ──────── the reference ────────


def text_of(kind, question, tokens=()):
    """What the chat template of a new family should render, with `tokens` placeholders per clip."""
    options = "".join(f"\n{letter}. {choice}" for letter, choice in zip("ABC", question.choices))
    text = f"{question.question}\nChoose one of these options:{options}"
    if kind == "audioflamingo3":
        sounds = "".join("<sound>" * n for n in tokens)
        return ("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
                f"{sounds}{text}<|im_end|>\n<|im_start|>assistant\n")
    if kind == "voxtral":
        return "<s>[INST]" + "".join("[BEGIN_AUDIO]" + "[AUDIO]" * n for n in tokens) + \
            f"{text}[/INST]"
    clips = "".join("<|begin_of_audio|>" + "<|pad|>" * n + "<|end_of_audio|>\n" for n in tokens)
    return f"<|user|>\n{clips}{text}<|assistant|>\n"


def processed(kind, policy, text, path):
    """What the family's processor makes of a text with one placeholder, and of a clip → dict."""
    clip = soundfile.read(path, dtype="float32")[0]
    extractor, tokenizer = policy.feature_extractor, policy.tokenizer
    if kind == "voxtral":  # its text goes through mistral-common
        made = VoxtralProcessor._retrieve_input_features(
            SimpleNamespace(feature_extractor=extractor), [clip], **VoxtralProcessor.audio_kwargs)
        ids = tokenizer(text.replace("[AUDIO]", "[AUDIO]" * 375))["input_ids"]
        return {"input_ids": torch.tensor([ids]), "input_features": made}
    if kind == "qwen2_audio":
        processor = Qwen2AudioProcessor(extractor, tokenizer, audio_token="<|audio_pad|>",
                                        audio_bos_token="<|audio_start|>",
                                        audio_eos_token="<|audio_end|>")
        return processor(text=[text], audio=[clip], sampling_rate=16000, return_tensors="pt")
    processor = {"audioflamingo3": AudioFlamingo3Processor, "glm_asr": GlmAsrProcessor}[kind]
    return processor(extractor, tokenizer)(text=[text], audio=[clip])


def inputs_alone(kind, policy, question):
    """→ (prompt ids, the forward's audio arguments), without policy.encode."""
    if kind not in NEW:
        return plain.inputs_alone(kind, policy, question)
    made = [processed(kind, policy, text_of(kind, question, [1]), path) for path in question.audio]
    tokens = [int((m["input_ids"] == policy.audio_token_id).sum()) for m in made]
    names = [name for name in made[0] if "features" in name]
    audio = {name: torch.cat([m[name] for m in made]) for name in names}
    audio["input_features"] = audio["input_features"].double()
    return policy.tokenizer(text_of(kind, question, tokens))["input_ids"], audio


@pytest.fixture(scope="module", params=list(KINDS))
def family(request, tmp_path_factory):
    """A tiny model in float32, its float64 copy with plain attention, three questions."""
    kind, folder = request.param, tmp_path_factory.mktemp("clips")
    policy = KINDS[kind]()
    roughen(policy.base)
    questions = tiny.questions(folder, seconds=SECONDS)
    return SimpleNamespace(kind=kind, policy=policy, questions=questions, folder=folder,
                           reference=plain.with_plain_attention(policy).double(),
                           prompts=[policy.encode(q) for q in questions])


# ──────── the same code ────────


def test_prompts_and_features_equal_the_processors(family):
    """Token ids and log-mel features, bit for bit. The processor pads to the same window."""
    policy, kind = family.policy, family.kind
    check_policy(policy, family.questions, LAYERS)
    for question, prompt in zip(family.questions, family.prompts):
        ids, audio = inputs_alone(kind, policy, question)
        assert prompt.ids == ids
        batch = policy.collate([prompt], [[]]).audio
        assert batch.keys() == audio.keys()
        assert all(torch.equal(batch[name].double(), audio[name].double()) for name in audio)
    if kind not in ("qwen3_omni", "qwen2_5_omni"):  # whose processors need torchvision
        question, prompt = family.questions[2], family.prompts[2]
        text = text_of(kind, question, [1]) if kind in NEW else plain.prompt_text(question, [1])
        made = processed(kind, policy, text, question.audio[0])
        assert made["input_ids"][0].tolist() == prompt.ids


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_statistics_equal_eager_attention(family, dtype):
    """A left-padded batch of three prompts, one of them about two clips; prints the differences."""
    policy = family.policy if dtype == torch.float32 else copy.deepcopy(family.policy).double()
    batch = policy.collate(family.prompts, COMPLETIONS)
    assert (batch.attention_mask[:, 0] == 0).any()
    ran = []
    hooks = [layer.self_attn.register_forward_hook(lambda module, *_: ran.append(module.layer_idx))
             for layer in policy.base.model.language_model.layers]
    with torch.no_grad():
        out = policy(batch, 1.2, LAYERS)
        largest = {"log-prob": 0.0, "entropy": 0.0, "mass": 0.0}
        for row, (question, completion) in enumerate(zip(family.questions, COMPLETIONS)):
            ids, audio = inputs_alone(family.kind, policy, question)
            wanted = plain.alone(family.reference, ids, audio, completion, 1.2, LAYERS,
                                 policy.audio_token_id)
            n = len(completion)
            found = out.logp[row, :n], out.entropy[row, :n], out.head_mass[:, row, :, :n]
            for name, one, other in zip(largest, found, wanted):
                largest[name] = max(largest[name], float((one - other).abs().max()))
            assert 1e-3 < wanted[2].mean() < 0.999
    [hook.remove() for hook in hooks]
    print(f"{family.kind}, {dtype}: " + ", ".join(f"{n} {x:.0e}" for n, x in largest.items()))
    assert all(x < (1e-11 if dtype == torch.float64 else 1e-3) for x in largest.values()), largest
    assert ran == [0, 1, 2]


def test_embeddings_equal_the_features(family):
    """Each clip encoded once gives what the full forward gives."""
    policy = copy.deepcopy(family.policy).double()
    rows = [0, 1, 1, 2]
    encoded = policy.encode_audio(family.prompts)
    completions = [COMPLETIONS[row] for row in rows]
    with torch.no_grad():
        one, other = (policy(policy.collate([prompts[row] for row in rows], completions), 1.2,
                             LAYERS) for prompts in (family.prompts, encoded))
    for found, wanted in zip(other, one, strict=True):
        assert difference(found, wanted) < 1e-12


@pytest.mark.parametrize("mode", ["frozen tower", "full", "LoRA"])
def test_gradients(family, mode):
    """Finite, equal with and without checkpointing, and none in what is frozen."""
    policy = copy.deepcopy(family.policy).double()
    config = TrainConfig(freeze_audio_tower=mode == "frozen tower", lora_alpha=4,
                         lora_rank=2 * (mode == "LoRA"), gradient_checkpointing=True)
    torch.manual_seed(0)
    set_trainable(policy, config).train()
    trained = {name for name, p in policy.named_parameters() if p.requires_grad}
    tower = {name for name, _ in policy.named_parameters() if "audio_tower" in name}
    assert tower and bool(trained & tower) == (mode == "full")
    prompts = family.prompts if mode == "full" else policy.encode_audio(family.prompts)
    policy.train()

    def gradients():
        out = policy(policy.collate(prompts, COMPLETIONS), 1.2, LAYERS)
        (out.logp.sum() + mapo.audio_attention_mass(out.head_mass).sum()).backward()
        found = {name: p.grad for name, p in policy.named_parameters() if p.grad is not None}
        policy.zero_grad()
        return found

    found = gradients()
    assert found.keys() <= trained and all(g.isfinite().all() for g in found.values())
    assert all(any(name.endswith(part) for name in found) for part in
               (["lora_A.default.weight"] if mode == "LoRA" else ["q_proj.weight", "norm.weight"]))
    policy.base.activation_checkpointing_disable()
    for name, wanted in gradients().items():
        assert difference(found[name], wanted) < 1e-9, name


def test_lora_adapts_the_decoder_alone(family):
    """q, k, v and o of its three layers at least; nothing in the audio tower or projector."""
    policy = checkpoint.add_lora(copy.deepcopy(family.policy), 2, 4)
    names = [name for name, _ in policy.base.named_modules() if name.endswith("lora_A")]
    assert all(name.startswith("model.language_model.") for name in names)
    assert len([name for name in names if "self_attn" in name]) == 4 * 3


def test_samples(family):
    """The sampler's log-probs are those of the forward; no placeholder is sampled."""
    policy = family.policy
    sampling = Sampling(temperature=1.2, max_new_tokens=8)
    completions = sample(policy, family.prompts, 2, sampling, seed=0)
    prompts = [prompt for prompt in family.prompts for _ in range(2)]
    ids = [c.token_ids for c in completions]
    assert not {policy.audio_token_id} & set(sum(ids, []))
    batch = policy.collate(prompts, ids)
    with torch.no_grad():
        logp = policy(batch, 1.2).logp
        logits = policy.base(**policy.model_inputs(batch.input_ids, batch.audio),
                             attention_mask=batch.attention_mask, use_cache=False,
                             position_ids=positions(batch.attention_mask)).logits / 1.2
    # The forward leaves the placeholders' probability in, the sampler does not.
    allowed = 1 - logits.softmax(-1)[..., policy.placeholder_ids].sum(-1)  # [B, P+T]
    allowed = allowed[:, -logp.shape[1] - 1:-1]  # where y_1..y_T are predicted  [B, T]
    for row, completion in enumerate(completions):
        n = len(completion.logps)
        expected = (logp - allowed.log())[row, :n]
        assert torch.allclose(torch.tensor(completion.logps), expected, atol=1e-3)


def test_a_saved_model_loads_as_the_same(family, tmp_path):
    """As do all probabilities of dropping something out, which become 0."""
    checkpoint.save_policy(family.policy, tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    config = json.loads(file.read_text())
    audio = config.get("thinker_config", config)["audio_config"]
    audio |= dict.fromkeys(audio.keys() & {"dropout", "layerdrop", "attention_dropout",
                                           "activation_dropout", "encoder_layerdrop"}, 0.5)
    file.write_text(json.dumps(config))
    loaded = checkpoint.load_policy(tmp_path / "model")
    assert loaded.family is family.policy.family and type(loaded.base) is type(family.policy.base)
    prompts = [loaded.encode(q) for q in family.questions]
    assert [p.ids for p in prompts] == [p.ids for p in family.prompts]
    with torch.no_grad():
        one, other = (policy.train()(policy.collate(prompts, COMPLETIONS), 1.2, LAYERS)
                      for policy in (family.policy, loaded))
    family.policy.eval()
    for found, wanted in zip(other, one, strict=True):
        assert torch.equal(found, wanted)
    meta = checkpoint.load_policy(tmp_path / "model", torch.bfloat16, meta=True)
    assert {p.dtype for p in meta.parameters()} == {torch.bfloat16}  # or FSDP could not gather it
    sizes = sizes_of(set_trainable(meta, TrainConfig()), TrainConfig(), 2, audio_seconds=10)
    assert sizes.audio == loaded.family.tokens(1000)


def test_a_trace(family):
    """Every token with its masses, and a score for each audio token."""
    policy = family.policy
    rows = diagnostics.trace(policy, policy, family.prompts, COMPLETIONS, 1.2, LAYERS)
    with torch.no_grad():
        out = policy(policy.collate(family.prompts, COMPLETIONS), 1.2, LAYERS)
    a = mapo.audio_attention_mass(out.head_mass)
    for row, (found, completion) in enumerate(zip(rows, COMPLETIONS)):
        assert found["audio_mass_max"] == a[row, :len(completion)].tolist()
        assert found["logp"] == out.logp[row, :len(completion)].tolist()
    scores = diagnostics.audio_token_scores(policy, family.prompts, COMPLETIONS, LAYERS)
    assert [len(s) for s in scores] == [policy.audio_tokens(p) for p in family.prompts]
    assert policy.base.config.get_text_config()._attn_implementation == "audio_mass"


def test_units(family):
    """Decoder layers, encoder layers, the rest of the encoder; the policy comes last."""
    body = family.policy.base.model
    units = distributed.units(family.policy)
    assert [*units[:3]] == [*body.language_model.layers]
    assert units[3:5] == [*body.audio_tower.layers, body.audio_tower]
    assert units[-1] is family.policy


def test_a_tied_head_is_sharded(tmp_path):
    """GLM-ASR's lm_head is its embeddings, also in a policy that is filled shard by shard."""
    policy = tiny.glm_asr()
    assert policy.base.lm_head.weight is policy.base.get_input_embeddings().weight
    checkpoint.save_policy(policy, tmp_path)
    meta = checkpoint.load_policy(tmp_path, meta=True)
    assert meta.base.lm_head.weight is meta.base.get_input_embeddings().weight
    batch = policy.collate([policy.encode(q) for q in tiny.questions(tmp_path)], COMPLETIONS)
    with distributed.team_of_one(torch.device("cpu"), "gloo") as team:
        sharded = distributed.fill(distributed.shard(meta, team), policy, team)
        assert torch.equal(sharded(batch).logp, policy(batch).logp)
        for each in (sharded, policy):
            each(batch).logp.sum().backward()
        found = dict(sharded.named_parameters())
        assert found.keys() == dict(policy.named_parameters()).keys()
        for name, p in policy.named_parameters():
            assert difference(found[name].grad.to_local(), p.grad) < 1e-4, name


# ──────── numbers of audio tokens ────────


@pytest.mark.parametrize("kind", ["audioflamingo3", "glm_asr", "qwen2_audio"])
def test_tokens_equal_the_processors(kind):
    policy = KINDS[kind]()
    frames = torch.arange(1, 3001)
    if kind == "qwen2_audio":
        wanted = policy.base.model.audio_tower._get_feat_extract_output_lengths(frames)[1]
    else:
        processor = {"audioflamingo3": AudioFlamingo3Processor, "glm_asr": GlmAsrProcessor}[kind]
        wanted = processor._get_audio_token_length(None, frames)
    assert [policy.family.tokens(n) for n in frames.tolist()] == wanted.tolist()


@pytest.mark.parametrize("key", FAMILIES)
def test_first_frames(key):
    """They start at 0 and rise by at most 8 frames, up to the end of the clip."""
    for frames in (9, 100, 101, 237, 1000, 2999, 3000):
        count = FAMILIES[key].tokens(frames)
        first = [FAMILIES[key].first_frame(j) for j in range(count)]
        assert first[0] == 0 and all(0 < b - a <= 8 for a, b in zip(first, first[1:]))
        window = 3000 if key == "voxtral" else frames
        assert first[-1] < window and window - first[-1] < 16


@pytest.mark.parametrize("kind", [k for k in KINDS if KINDS[k]().family.one_window])
def test_clips_beyond_the_window_are_listed(kind, tmp_path):
    """30 s fit; one sample more does not, although the processor would make two windows of it."""
    policy = KINDS[kind]()
    good, *_ = tiny.questions(tmp_path)
    fits, long, short = (dataclasses.replace(good, id=f"w{n}", where=f"a.jsonl:{n}", samples=(n,))
                         for n in (480_000, 480_001, 300))
    check_policy(policy, [good, fits], (0,))
    assert clip_tokens(480_000, policy.feature_extractor, policy.family, "x") in (375, 750)
    message = error_of(check_policy, policy, [good, fits, long], (0,))
    assert message == (f"a.jsonl:480001: question w480001: {good.audio[0]}: 30.0 s, but this "
                       f"{policy.family.name} takes at most 30 s, one window of its encoder; cut "
                       "the clip")
    if kind != "voxtral":  # which has 375 tokens for any clip
        assert "0.019 s is too short" in error_of(check_policy, policy, [good, short], (0,))


# ──────── what is refused ────────

REFUSED = {
    "gemma3n": (Gemma3nConfig, ["the head of gemma3n has a final_logit_softcapping of 30.0",
                                "TokenStatistics would have to apply it"]),
    "phi4": (Phi4MultimodalConfig, ["phi4_multimodal is not supported",
                                    "would silently keep sdpa"]),
    "granite": (GraniteSpeechConfig, ["granite_speech is not supported", "an entry in families.py",
                                      "Qwen2-Audio, AudioFlamingo3, Voxtral and GLM-ASR"]),
    "text": (Qwen2Config, ["qwen2 is a text-only model"]),
    "qwen2.5-vl": (Qwen2_5_VLConfig, ["qwen2_5_vl is a vision model", "mm_token_type_ids"]),
    "qwen3-vl": (Qwen3VLConfig, ["qwen3_vl is a vision model"])}


@pytest.mark.parametrize("name", REFUSED)
def test_other_models_are_refused_by_name(name, tmp_path):
    """From config.json alone, in one line that says what would be needed."""
    config, parts = REFUSED[name]
    config().save_pretrained(tmp_path)
    message = error_of(checkpoint.load_policy, tmp_path)
    assert message.startswith(f"{tmp_path}/config.json: ") and all(p in message for p in parts)


def test_a_softcap_in_a_known_family_is_refused():
    config = tiny.audioflamingo3().base.config
    config.text_config.final_logit_softcapping = 30.0
    assert "final_logit_softcapping of 30.0" in error_of(family_of, config, "x")


def test_a_config_without_audio_token_id_is_refused():
    config = tiny.voxtral().base.config
    config.audio_token_id = None
    assert error_of(family_of, config, "x").startswith("x: no audio_token_id")


def test_a_tekken_file_alone_is_refused(tmp_path):
    """Voxtral's hub folder holds no other tokenizer. The message says how to convert it."""
    checkpoint.save_policy(tiny.voxtral(), tmp_path)
    (tmp_path / "tokenizer.json").rename(tmp_path / "tekken.json")
    message = error_of(checkpoint.load_policy, tmp_path)
    assert "mistral-common" in message and "convert_tekken_tokenizer" in message


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("other", ["sdpa", "eager"])
def test_a_layer_that_leaves_our_attention_is_refused(kind, other, tmp_path):
    """Whichever layer it is: L_tgt need not contain it."""
    policy = KINDS[kind]()
    questions = tiny.questions(tmp_path)
    check_policy(policy, questions, (0,))
    layer = policy.base.model.language_model.layers[1].self_attn
    layer.config = copy.deepcopy(layer.config)
    layer.config._attn_implementation = other
    message = error_of(check_policy, policy, questions, (0,))
    assert "only 2 of 3 decoder layers went through attention.attention_with_mass" in message


@pytest.mark.parametrize("kind", KINDS)
def test_our_attention_serves_every_decoder_layer_and_no_encoder_layer(kind, tmp_path):
    policy, served = KINDS[kind](), []

    def counted(module, *args, **kwargs):
        served.append(module)
        return attention.attention_with_mass(module, *args, **kwargs)

    prompts = [policy.encode(q) for q in tiny.questions(tmp_path)]
    try:
        AttentionInterface.register("audio_mass", counted)
        policy(policy.collate(prompts, COMPLETIONS), 1.0, LAYERS)
    finally:
        AttentionInterface.register("audio_mass", attention.attention_with_mass)
    assert served == [layer.self_attn for layer in policy.base.model.language_model.layers]


@pytest.mark.parametrize("kind", KINDS)
def test_a_head_that_is_more_than_lm_head_is_refused(kind, tmp_path, monkeypatch):
    """A bias, and a softcap in the model's own forward, of which no config speaks."""
    policy = KINDS[kind]()
    questions = tiny.questions(tmp_path)
    forward = policy.base.forward

    def softcapped(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits = 30 * (output.logits / 30).tanh()
        return output

    with monkeypatch.context() as patch:
        patch.setattr(policy.base, "forward", softcapped)
        message = error_of(check_policy, policy, questions, (0,))
    assert "changes the logits after lm_head" in message
    weight = policy.base.lm_head.weight
    policy.base.lm_head = torch.nn.Linear(*reversed(weight.shape))
    policy.base.lm_head.weight = weight
    message = error_of(check_policy, policy, questions, (0,))
    assert message.startswith(f"{policy.base.config.model_type}: lm_head has a bias")
