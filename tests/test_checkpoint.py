"""checkpoint.py: load and check a model, save it, add LoRA, and states to resume from."""

import dataclasses
import json
import os
import shutil
from types import SimpleNamespace

import peft
import pytest
import safetensors.torch
import tiny
import torch
import torch.distributed.checkpoint as dcp
from test_model import LAYERS, error_of, roughen
from transformers import (Qwen2Config, Qwen2ForCausalLM, Qwen3OmniMoeConfig,
                          Qwen3OmniMoeForConditionalGeneration)

import checkpoint
import mapo
from data import InputError
from pos_gate import pos_gate
from run import check_policy

FAMILIES = ("qwen3_omni", "qwen2_5_omni", "qwen2_audio", "audioflamingo3", "voxtral", "glm_asr")
COMPLETIONS = [[5, 6, 7], [8], [9, 10]]  # of the three questions
ALONE = SimpleNamespace(  # a distributed.Team of one process
    leads=True, rank=0, size=1, mesh=None, group=None, gather=lambda value: [value],
    broadcast=lambda value: value)


def forward(policy, questions):
    prompts = [policy.encode(q) for q in questions]
    return policy(policy.collate(prompts, COMPLETIONS), 1.2, LAYERS)


def statistics(policy, questions):
    with torch.no_grad():
        return forward(policy, questions)


def loss_of(out):
    return out.logp.sum() + mapo.audio_attention_mass(out.head_mass).sum()


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def same_weights(network, other):
    one, two = network.state_dict(), other.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def tensors_of(folder):
    return safetensors.torch.load_file(folder / "model.safetensors")


def edit_json(path, edit):
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def train_adapters(policy):
    """Moves the adapters away from B = 0."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_" in name:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)


@pytest.fixture
def one_tiny(tmp_path):
    """A fresh Qwen3-Omni that a test may spoil, and its questions."""
    policy = tiny.qwen3_omni()
    roughen(policy.base)
    return policy, tiny.questions(tmp_path)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with a saved Qwen3-Omni thinker, the policy, its questions and their statistics."""
    folder = tmp_path_factory.mktemp("saved")
    policy = tiny.qwen3_omni(seed=3)
    roughen(policy.base)
    checkpoint.save_policy(policy, folder / "thinker")
    questions = tiny.questions(folder)
    return SimpleNamespace(folder=folder / "thinker", policy=policy, questions=questions,
                           statistics=statistics(policy, questions))


@pytest.fixture
def copied(saved, tmp_path):
    """A copy of that folder that a test may spoil."""
    return shutil.copytree(saved.folder, tmp_path / "copy")


# ──────── checking ────────


@pytest.mark.parametrize("layers, message", [
    ((0, 3), "3 is out of range; the model has layers 0 to 2"), ((-1,), "-1 is out of range"),
    ((), "at least one layer"), ((1, 1), "each only once")])
def test_target_layers_are_checked(one_tiny, layers, message):
    assert message in error_of(check_policy, *one_tiny, layers)


@pytest.mark.parametrize("kind", FAMILIES)
def test_every_family_passes_the_check(kind, tmp_path):
    """With a question about one clip, and with one about two."""
    policy = getattr(tiny, kind)()
    for question in tiny.questions(tmp_path):
        check_policy(policy, [question], (0, 2))


@pytest.mark.parametrize("field", ["question", "choices"])
@pytest.mark.parametrize("token", ["<|image_pad|>", "<|im_end|>", "<think>", "</think>"])
def test_a_control_token_in_a_question_is_refused(one_tiny, token, field):
    """In any question of the file, not only in the first one."""
    policy, (first, *others) = one_tiny
    text = f"What is {token}?"
    wrong = dataclasses.replace(others[0], where="rows.jsonl:7",
                                **{field: text if field == "question" else (text, "b")})
    message = error_of(check_policy, policy, [first, wrong], (0,))
    assert message.startswith(f"rows.jsonl:7: question q1: field '{field}' contains {token}, ")


def test_a_placeholder_that_the_tokenizer_does_not_have(one_tiny):
    """The config of a whole Omni model also names tokens of pictures."""
    policy, questions = one_tiny
    policy.placeholder_ids = [*policy.placeholder_ids, len(policy.tokenizer) + 7]
    check_policy(policy, questions, (0,))


def test_texts_that_only_look_like_control_tokens_are_fine(one_tiny):
    policy, (first, *_) = one_tiny
    harmless = dataclasses.replace(first, question="Is 1 < 2 > 0, <b>think</b> or im_end?")
    check_policy(policy, [harmless], (0,))


def test_clips_that_do_not_fit_the_model_are_listed(tmp_path):
    """With file and line, from the lengths that read_questions found: no clip is decoded again."""
    policy = tiny.qwen2_audio()
    good, *_ = tiny.questions(tmp_path)
    wrong = [dataclasses.replace(good, id=f"w{line}", where=f"a.jsonl:{line}", samples=(samples,))
             for line, samples in ((3, 960), (4, 961), (5, 480_000), (6, 480_001))]
    with pytest.raises(InputError) as error:
        check_policy(policy, [good, *wrong], (0,))
    too_short, too_long = str(error.value).split("\n")
    assert too_short.startswith(f"a.jsonl:3: question w3: {good.audio[0]}: 0.060 s is too short")
    assert too_long.startswith(f"a.jsonl:6: question w6: {good.audio[0]}: 30.0 s, but this Qwen2-A")


def test_clips_that_fill_the_models_context_are_refused(one_tiny):
    """13 tokens per second: two clips that fit alone may be too long together."""
    policy, (question, *_) = one_tiny
    policy.base.config.get_text_config().max_position_embeddings = 2080
    fits = dataclasses.replace(question, audio=question.audio * 2, samples=(1_000_000, 1_000_000))
    check_policy(policy, [question, fits], (0,))
    long = dataclasses.replace(fits, where="rows.jsonl:2", samples=(1_280_000, 1_280_000))
    message = error_of(check_policy, policy, [question, fits, long], (0,))
    assert message.startswith("rows.jsonl:2: question q0: its clips make 2080 tokens, but the "
                              "model takes 2080 (max_position_embeddings)")


@pytest.mark.parametrize("window, parts", [
    (20, ["no tokens (index out of range"]),  # the encoder itself fails
    (100, ["33 tokens", "46 placeholders"])])
def test_an_encoder_with_another_window_is_refused(one_tiny, tmp_path, window, parts):
    """It makes another number of audio tokens than the prompt has placeholders."""
    policy, _ = one_tiny
    question = tiny.questions(tmp_path, seconds=((0.3, 2.5),), seed=9)[0]
    policy.base.model.audio_tower.n_window = window
    message = error_of(check_policy, policy, [question], (0,))
    assert all(part in message for part in ["question q0", "n_window", *parts])


# ──────── loading ────────


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_saved_policy_loads_as_the_same_policy(kind, tmp_path):
    """Class, prompts, ids of placeholders and of EOS, and statistics bit for bit."""
    policy = getattr(tiny, kind)(seed=2)
    roughen(policy.base)
    checkpoint.save_policy(policy, tmp_path / "model")
    loaded = checkpoint.load_policy(tmp_path / "model")
    assert type(loaded.base) is type(policy.base) and not loaded.base.training
    assert loaded.placeholder_ids == policy.placeholder_ids
    assert loaded.audio_token_id == policy.audio_token_id
    assert loaded.eos_ids == policy.eos_ids == [policy.tokenizer.eos_token_id]
    questions = tiny.questions(tmp_path)
    assert [loaded.encode(q).ids for q in questions] == [policy.encode(q).ids for q in questions]
    assert same(statistics(loaded, questions), statistics(policy, questions))


@pytest.mark.parametrize("layout", ["full", "thinker"])
def test_a_whole_omni_checkpoint_loads_as_its_thinker(saved, tmp_path, layout):
    """As does the checkpoint of a thinker alone, both as transformers itself writes them."""
    config = Qwen3OmniMoeConfig(thinker_config=saved.policy.base.config.to_dict(),
                                enable_audio_output=False)
    full = Qwen3OmniMoeForConditionalGeneration(config)
    full.thinker.load_state_dict(saved.policy.base.state_dict())
    (full if layout == "full" else full.thinker).save_pretrained(tmp_path)
    saved.policy.tokenizer.save_pretrained(tmp_path)
    saved.policy.feature_extractor.save_pretrained(tmp_path)
    prefixed = [name.startswith("thinker.") for name in tensors_of(tmp_path)]
    assert all(prefixed) if layout == "full" else not any(prefixed)
    loaded = checkpoint.load_policy(tmp_path)
    assert type(loaded.base) is type(saved.policy.base)
    assert same_weights(loaded.base, saved.policy.base)
    assert same(statistics(loaded, saved.questions), saved.statistics)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_load_in_the_given_dtype(saved, dtype):
    """The dtype of the folder is remembered, so that saving does not change it."""
    policy = checkpoint.load_policy(saved.folder, dtype)
    assert {p.dtype for p in policy.parameters()} == {dtype}
    assert policy.saved_dtype == torch.float32


def test_a_meta_policy_has_shapes_without_weights(saved, copied):
    """The folder need not hold the weights."""
    os.remove(copied / "model.safetensors")
    policy = checkpoint.load_policy(copied, meta=True)
    assert {p.device.type for p in policy.parameters()} == {"meta"}
    assert policy.eos_ids == saved.policy.eos_ids
    shapes = {name: tensor.shape for name, tensor in saved.policy.base.state_dict().items()}
    assert {name: t.shape for name, t in policy.base.state_dict().items()} == shapes


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json",
                                  "tokenizer_config.json"])
def test_a_missing_file_is_named(copied, name):
    os.remove(copied / name)
    message = error_of(checkpoint.load_policy, copied)
    assert str(copied) in message and f"no {name}" in message


def test_a_missing_folder_is_named(tmp_path):
    assert f"{tmp_path}/nowhere: no config.json" in error_of(checkpoint.load_policy,
                                                             tmp_path / "nowhere")


def test_missing_tensors_are_an_error(copied):
    """transformers would fill them with random numbers."""
    tensors = tensors_of(copied)
    for name in ("thinker.model.layers.1.self_attn.q_proj.weight", "thinker.lm_head.weight"):
        del tensors[name]
    safetensors.torch.save_file(tensors, copied / "model.safetensors", metadata={"format": "pt"})
    message = error_of(checkpoint.load_policy, copied)
    assert "lack 2 tensors" in message and "lm_head.weight" in message and str(copied) in message


@pytest.mark.parametrize("damage", ["cut", "shape"])
def test_broken_weights_are_an_error_of_one_line(copied, damage):
    file = copied / "model.safetensors"
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:1000])
    else:
        tensors = tensors_of(copied)
        tensors["thinker.lm_head.weight"] = torch.zeros(7, 5)
        safetensors.torch.save_file(tensors, file, metadata={"format": "pt"})
    message = error_of(checkpoint.load_policy, copied)
    assert f"{copied}: cannot be loaded" in message


def test_a_text_model_is_refused(saved, tmp_path):
    config = Qwen2Config(vocab_size=332, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                         num_attention_heads=2, num_key_value_heads=1)
    Qwen2ForCausalLM(config).save_pretrained(tmp_path)
    saved.policy.tokenizer.save_pretrained(tmp_path)
    saved.policy.feature_extractor.save_pretrained(tmp_path)
    message = error_of(checkpoint.load_policy, tmp_path)
    assert f"{tmp_path}/config.json: qwen2 is a text-only model" in message


def test_the_chat_template_may_be_in_a_json_file(copied, saved):
    """Older checkpoints keep it in chat_template.json. Without either file it is an error."""
    template = (copied / "chat_template.jinja").read_text()
    os.remove(copied / "chat_template.jinja")
    assert "no chat template" in error_of(checkpoint.load_policy, copied)
    (copied / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    assert same(statistics(checkpoint.load_policy(copied), saved.questions), saved.statistics)


@pytest.mark.parametrize("own", ["none", "text alone"])
def test_the_template_of_the_processor_wins(copied, saved, own):
    """Over one in tokenizer_config.json that cannot render audio, as in AutoProcessor and vLLM."""
    template = (copied / "chat_template.jinja").read_text()
    os.remove(copied / "chat_template.jinja")
    if own != "none":
        text_alone = "{{ '<|im_start|>' + messages[0].content }}"
        edit_json(copied / "tokenizer_config.json",
                  lambda config: config.update(chat_template=text_alone))
        policy = checkpoint.load_policy(copied)
        assert "cannot render audio" in error_of(policy.encode, saved.questions[0])
    (copied / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    assert same(statistics(checkpoint.load_policy(copied), saved.questions), saved.statistics)


@pytest.mark.parametrize("content, part", [
    ("{", "chat_template.json: not valid json"), ("[]", "chat_template.json: a list"),
    ("{}", "no chat template"), ('{"chat_template": 3}', "no chat template")])
def test_a_broken_chat_template_file_is_one_line(copied, content, part):
    (copied / "chat_template.json").write_text(content)
    assert part in error_of(checkpoint.load_policy, copied)


def test_think_tags_that_are_flagged_special_stay_in_the_text(copied, saved):
    """Some checkpoints flag them so. The rewards would find no thinking in any completion."""
    def edit(config, tokens):
        for token in tokens(config):
            if "think>" in token["content"]:
                token["special"] = True

    edit_json(copied / "tokenizer.json", lambda config: edit(config, lambda c: c["added_tokens"]))
    edit_json(copied / "tokenizer_config.json", lambda config: edit(
        config, lambda c: c.get("added_tokens_decoder", {}).values()))
    policy = checkpoint.load_policy(copied)
    ids = policy.tokenizer("<think>A bell.</think> a bell<|im_end|>")["input_ids"]
    assert policy.tokenizer.decode(ids, skip_special_tokens=True) == "A bell. a bell"  # the trap
    text = policy.decode(SimpleNamespace(token_ids=ids))
    assert text == "<think>A bell.</think> a bell"
    assert pos_gate(ids, policy.tokenizer) == pos_gate(ids, saved.policy.tokenizer)


def test_dropout_is_off_whatever_the_config_says(copied, saved):
    """Train mode gives the statistics of the saved policy, too."""
    def edit(config):
        thinker = config["thinker_config"]
        thinker["text_config"]["attention_dropout"] = 0.4
        thinker["audio_config"] |= {"dropout": 0.4, "attention_dropout": 0.4,
                                    "activation_dropout": 0.4}

    edit_json(copied / "config.json", edit)
    policy = checkpoint.load_policy(copied).train()
    assert same(statistics(policy, saved.questions), saved.statistics)


@pytest.mark.parametrize("configured, more", [(None, []), (7, [7]), ([7, "own"], [7])])
def test_eos_ids_are_those_of_the_generation_config_and_the_tokenizer(saved, copied, configured,
                                                                      more):
    """generation_config.json may hold none, one, or a list."""
    own = saved.policy.tokenizer.eos_token_id
    if isinstance(configured, list):
        configured = [own if value == "own" else value for value in configured]
    (copied / "generation_config.json").write_text(
        json.dumps({"eos_token_id": configured} if configured else {}))
    assert checkpoint.load_policy(copied).eos_ids == sorted([*more, own])


# ──────── saving ────────


@pytest.fixture
def saved_again(saved, tmp_path):
    """A folder with more in it than we know of, and the folder that its policy is saved to."""
    original = shutil.copytree(saved.folder, tmp_path / "original")
    edit_json(original / "config.json",
              lambda config: config.update(system_token_id=17, enable_audio_output=True))
    (original / "vocab.txt").write_text("a file of the processor")
    checkpoint.save_policy(checkpoint.load_policy(original), tmp_path / "again")
    return original, tmp_path / "again"


def test_saving_keeps_names_and_values_of_tensors(saved_again):
    """They are those of the whole Omni model, with one tensor per expert."""
    before, after = map(tensors_of, saved_again)
    assert before.keys() == after.keys()
    assert any("thinker.model.layers.0.mlp.experts.3." in name for name in after)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_saving_keeps_the_config_except_for_the_talker(saved_again):
    config = json.loads((saved_again[1] / "config.json").read_text())
    assert config["system_token_id"] == 17 and config["enable_audio_output"] is False
    assert config["architectures"] == ["Qwen3OmniMoeForConditionalGeneration"]


def test_saving_copies_the_files_of_tokenizer_and_processor(saved_again):
    original, again = saved_again
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
                 "preprocessor_config.json", "vocab.txt"):
        assert (again / name).read_bytes() == (original / name).read_bytes()


def test_transformers_loads_what_is_saved(saved, saved_again):
    whole = Qwen3OmniMoeForConditionalGeneration.from_pretrained(saved_again[1],
                                                                 enable_audio_output=False)
    assert same_weights(whole.thinker, saved.policy.base)


@pytest.mark.parametrize("kind", FAMILIES)
def test_saving_returns_to_the_dtype_of_the_folder(kind, tmp_path):
    """Training may be wider than the checkpoint: a bf16 folder stays bf16."""
    policy = getattr(tiny, kind)()
    policy.saved_dtype = torch.bfloat16
    checkpoint.save_policy(policy, tmp_path)
    assert {t.dtype for t in tensors_of(tmp_path).values()} == {torch.bfloat16}
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    assert checkpoint.load_policy(tmp_path).saved_dtype == torch.bfloat16
    assert policy.base.dtype == torch.float32


def test_a_checkpoint_replaces_an_older_one(saved, tmp_path):
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "old").touch()
    (tmp_path / ".checkpoint.writing").mkdir()  # left by an interrupted run
    (tmp_path / ".checkpoint.writing" / "old").touch()
    checkpoint.save_checkpoint(saved.policy, tmp_path / "checkpoint", ALONE)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]
    assert not (tmp_path / "checkpoint" / "old").exists()
    loaded = checkpoint.load_policy(tmp_path / "checkpoint")
    assert same_weights(loaded.base, saved.policy.base)


# ──────── LoRA ────────


@pytest.mark.parametrize("kind", FAMILIES)
def test_lora_adapts_the_linear_layers_of_the_decoder(kind):
    """And only those. Only the adapters are trainable."""
    policy = getattr(tiny, kind)(seed=5)
    linears = {name for name, layer in policy.base.named_modules()
               if isinstance(layer, torch.nn.Linear) and ".language_model." in name}
    assert checkpoint.add_lora(policy, rank=2, alpha=8) is policy
    suffix = ".lora_A.default"
    adapted = {name.removesuffix(suffix) for name, _ in policy.base.named_modules()
               if name.endswith(suffix)}
    layers, per_layer = 3, 4 if kind == "qwen3_omni" else 7  # q, k, v, o, and a dense MLP's three
    assert adapted == linears and len(linears) == layers * per_layer
    trainable = [name for name, p in policy.named_parameters() if p.requires_grad]
    assert all("lora_" in name for name in trainable) and len(trainable) == 2 * len(linears)


@pytest.mark.parametrize("kind", FAMILIES)
def test_new_and_disabled_adapters_change_nothing(kind, tmp_path):
    """New ones have B = 0. Statistics are equal bit for bit."""
    policy, questions = getattr(tiny, kind)(seed=5), tiny.questions(tmp_path)
    roughen(policy.base)
    before = statistics(policy, questions)
    checkpoint.add_lora(policy, rank=2, alpha=8)
    assert same(statistics(policy, questions), before)
    train_adapters(policy)
    assert not same(statistics(policy, questions), before)
    with policy.model.disable_adapter():
        assert same(statistics(policy, questions), before)


@pytest.mark.parametrize("kind", FAMILIES)
def test_every_adapter_gets_gradient(kind, tmp_path):
    policy = getattr(tiny, kind)(seed=5)
    roughen(policy.base)
    checkpoint.add_lora(policy, rank=2, alpha=8)
    train_adapters(policy)
    loss_of(forward(policy, tiny.questions(tmp_path))).backward()
    with_gradient = {n for n, p in policy.named_parameters() if p.grad is not None and p.grad.any()}
    assert with_gradient == {n for n, p in policy.named_parameters() if "lora_" in n}


def test_lora_under_checkpointing_gets_the_same_gradient(one_tiny):
    """Frozen embeddings below the adapters do not cut it when layers are recomputed."""
    policy, questions = one_tiny
    checkpoint.add_lora(policy, rank=2, alpha=8)
    train_adapters(policy)
    adapters = [p for p in policy.parameters() if p.requires_grad]
    plain = torch.autograd.grad(loss_of(forward(policy, questions)), adapters)
    policy.model.activation_checkpointing_enable({"use_reentrant": False})
    policy.train()
    recomputed = torch.autograd.grad(loss_of(forward(policy, questions)), adapters)
    assert all(g.any() for g in plain)
    for one, other in zip(plain, recomputed, strict=True):
        assert torch.allclose(one, other, atol=1e-5)


@pytest.fixture
def adapted(saved, tmp_path):
    """A policy with trained adapters, saved as checkpoint/ and adapter/ in tmp_path."""
    policy = checkpoint.add_lora(checkpoint.load_policy(saved.folder), rank=2, alpha=8)
    train_adapters(policy)
    checkpoint.save_checkpoint(policy, tmp_path / "checkpoint", ALONE)
    return policy, tmp_path


def test_a_checkpoint_holds_merged_weights(adapted, saved):
    """W + (α/r)·B·A where there is an adapter, W elsewhere, under the names of the base model."""
    policy, folder = adapted
    before, after = tensors_of(saved.folder), tensors_of(folder / "checkpoint")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    name = "model.language_model.layers.1.self_attn.k_proj"
    layer = policy.base.get_submodule(name)
    update = 8 / 2 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    saved_name = "thinker.model.layers.1.self_attn.k_proj.weight"
    assert torch.allclose(after[saved_name] - before[saved_name], update, atol=1e-6)
    assert len(changed) == 3 * 4 and all(".self_attn." in name for name in changed)


def test_a_merged_checkpoint_computes_what_the_adapters_did(adapted, saved):
    policy, folder = adapted
    merged = checkpoint.load_policy(folder / "checkpoint")
    for one, other in zip(statistics(merged, saved.questions),
                          statistics(policy, saved.questions), strict=True):
        assert torch.allclose(one, other, atol=1e-4)


def test_peft_loads_the_saved_adapter(adapted, saved):
    """As its card says: on the whole model, whose class the folder names, and on the thinker."""
    policy, folder = adapted
    whole = Qwen3OmniMoeForConditionalGeneration.from_pretrained(saved.folder)
    automatic = peft.AutoPeftModel.from_pretrained(folder / "adapter").get_base_model()
    thinkers = [peft.PeftModel.from_pretrained(whole, folder / "adapter").get_base_model().thinker,
                automatic.thinker,
                peft.PeftModel.from_pretrained(
                    checkpoint.load_policy(saved.folder).base, folder / "adapter",
                    key_mapping={r"^thinker\.": ""}).get_base_model()]
    for thinker in thinkers:
        loaded = checkpoint.make_policy(thinker, policy.tokenizer, policy.feature_extractor)
        assert same(statistics(loaded, saved.questions), statistics(policy, saved.questions))
    names = safetensors.torch.load_file(folder / "adapter" / "adapter_model.safetensors")
    assert all(".lora_" in name and ".model.thinker.model." in name for name in names)
    card = (folder / "adapter" / "README.md").read_text()
    assert r'key_mapping={r"^thinker\.": ""}' in card
    assert "Qwen3OmniMoeForConditionalGeneration.from_pretrained(MODEL)" in card


def test_peft_loads_the_adapter_of_a_model_without_a_thinker(tmp_path):
    policy, questions = tiny.qwen2_audio(seed=5), tiny.questions(tmp_path)
    checkpoint.save_policy(policy, tmp_path / "model")
    policy = checkpoint.add_lora(checkpoint.load_policy(tmp_path / "model"), rank=2, alpha=8)
    train_adapters(policy)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "old").touch()
    checkpoint.save_checkpoint(policy, tmp_path / "checkpoint", ALONE)
    assert not (tmp_path / "adapter" / "old").exists()
    model = peft.AutoPeftModel.from_pretrained(tmp_path / "adapter").get_base_model()
    loaded = checkpoint.make_policy(model, policy.tokenizer, policy.feature_extractor)
    assert same(statistics(loaded, questions), statistics(policy, questions))
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert "Qwen2AudioForConditionalGeneration" in card and "thinker" not in card


# ──────── states to resume from ────────


def test_the_newest_whole_state_is_found(tmp_path):
    """By number, not by name; other names and a state that is still being written do not count."""
    assert checkpoint.newest_state(tmp_path / "state", ALONE) is None
    for name in ("step-9", "step-10", ".step-11.writing", "step-12-hf", "step-", "step-x"):
        write_state(tmp_path / "state" / name)
    assert checkpoint.newest_state(tmp_path / "state", ALONE) == tmp_path / "state" / "step-10"


def write_state(folder):
    """The files of a state, with other contents."""
    folder.mkdir(parents=True)
    with checkpoint._without_warning():
        dcp.save({"w": torch.arange(1000.0)}, checkpoint_id=folder, no_dist=True)
    for name in ("run.pt", "rng-0.pt"):
        torch.save(torch.zeros(9), folder / name)


@pytest.mark.parametrize("file", ["run.pt", "rng-0.pt", ".metadata", "__0_0.distcp"])
@pytest.mark.parametrize("damage", ["missing", "cut", "empty"])
def test_a_state_that_is_not_whole_is_skipped(tmp_path, capsys, file, damage):
    for name in ("step-3", "step-4"):
        write_state(tmp_path / name)
    assert checkpoint.newest_state(tmp_path, ALONE) == tmp_path / "step-4"
    assert capsys.readouterr().err == ""
    path = tmp_path / "step-4" / file
    content = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes(content[:len(content) // 2 if damage == "cut" else 0])
    assert checkpoint.newest_state(tmp_path, ALONE) == tmp_path / "step-3"
    warning = f"warning: {tmp_path / 'step-4'} is not whole and was skipped\n"
    assert capsys.readouterr().err == warning


def test_only_states_are_removed(tmp_path):
    for name in ("state/step-3", "state/step-4-hf", "only/step-1", "only/.step-2.writing"):
        write_state(tmp_path / name)
    for name in ("state", "only"):
        checkpoint.remove_numbered(tmp_path / name, "step")
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["step-4-hf"]
    assert not (tmp_path / "only").exists()
    checkpoint.remove_numbered(tmp_path / "nothing", "step")


@pytest.mark.parametrize("content", [b"", b"\x80\x04]", b"cos\nno_such_name\n.", b"\x00" * 99])
def test_a_state_with_broken_metadata_is_not_whole(tmp_path, content):
    (tmp_path / ".metadata").write_bytes(content)
    assert not checkpoint.is_whole(tmp_path)
