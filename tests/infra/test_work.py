"""How much work is done, counted rather than timed: blocks of logits, rows of attention weights,
saved tensors, forwards of a step, rows of a prefill. The tables of bench/ rest on these counts."""

from collections import Counter

import pytest
import tiny
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import attention
import model
import train
from attention import AudioMass
from config import read_config
from distributed import Team
from model import token_statistics
from rollout import Sampling, encode_prompts, sample
from run import Run, make_optimizer, open_inputs


class Work(TorchDispatchMode):
    """Counts operators by name, and keeps the size of the largest float tensor they make."""

    def __init__(self):
        super().__init__()
        self.calls, self.largest = Counter(), 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.calls[function.overloadpacket.__name__] += 1
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            floats = isinstance(tensor, torch.Tensor) and tensor.is_floating_point()
            if floats and tensor._base is None:
                self.largest = max(self.largest, tensor.numel())
        return result


# ──────── log-prob and entropy ────────


def statistics_work(rows, vocabulary, size=16, trains_head=True):
    head = torch.nn.Linear(size, vocabulary, bias=False).requires_grad_(trains_head)
    hidden = torch.randn(rows, size, requires_grad=True)
    ids = torch.randint(vocabulary, (rows,))
    with Work() as work:
        logp, _ = token_statistics(hidden, head, ids, 1.2)
        logp.sum().backward()
    return work


def test_no_logits_beyond_a_block(monkeypatch):
    """Forward and backward never make [T, V]: the largest tensor is a block or the weight's
    gradient."""
    monkeypatch.setattr(model, "LOGIT_COLUMNS", 32)
    for rows, vocabulary in ((64, 1000), (128, 1000), (64, 2000)):
        largest = statistics_work(rows, vocabulary, size=2).largest
        assert largest == max(32 * rows, 2 * vocabulary)


@pytest.mark.parametrize("trains_head, products", [(True, 4), (False, 3)])
def test_matrix_products_per_block(monkeypatch, trains_head, products):
    """Each block makes its logits once forward and once backward, the gradient of the states, and
    that of the weight if the head is trained."""
    monkeypatch.setattr(model, "LOGIT_COLUMNS", 100)
    work = statistics_work(64, 1000, trains_head=trains_head)
    assert work.calls["mm"] == products * 10  # 10 blocks of 100 columns


def test_entropy_saves_nothing():
    head, saved = torch.nn.Linear(8, 500, bias=False), []
    hidden, ids = torch.randn(70, 8, requires_grad=True), torch.randint(500, (70,))
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x,
                                                  lambda x: x):
        token_statistics(hidden, head, ids, 1.0)
    assert sorted(saved) == [70, 70, 70 * 8, 500 * 8]  # ids, log Z, states, weight


# ──────── the mass ────────


def mass_work(keys, heads_with_gradient=1, rows=64):
    """Work of 8 heads over 2 key heads → forward, backward"""
    query = torch.randn(1, 8, rows, 4, requires_grad=True)
    key = torch.randn(1, 2, keys, 4, requires_grad=True)
    audio = torch.zeros(1, keys, dtype=torch.bool)
    audio[:, :5] = True
    allowed = torch.ones(keys, keys, dtype=torch.bool).tril()[None, None, keys - rows:]
    upstream = torch.zeros(1, 8, rows)
    upstream[:, :heads_with_gradient] = 1
    with Work() as forward:
        mass = AudioMass.apply(query, key, audio, allowed, 0.5)
    with Work() as backward:
        mass.backward(upstream)
    return forward, backward


def test_mass_is_linear_in_the_keys():
    """With twice the keys, the largest tensor doubles: a block of rows of α, never [H, T, S]."""
    (short_forward, short_backward), (long_forward, long_backward) = mass_work(128), mass_work(256)
    assert long_forward.largest == 2 * short_forward.largest
    assert long_backward.largest == 2 * short_backward.largest
    assert short_forward.largest == 8 * attention.mass_rows(torch.device("cpu")) * 128


def test_backward_of_the_mass_skips_rows_without_gradient():
    """a_t is the maximum over heads. When only one head of 8 has a gradient, the backward makes an
    eighth of the rows (a quarter at worst, if all maxima fall on one key head)."""
    products = {heads: mass_work(128, heads_with_gradient=heads)[1].calls["bmm"]
                for heads in (0, 1, 4, 8)}
    assert products[4] == 4 * products[1] > 0
    assert products[8] == products[4]  # the two key heads share a product
    assert products[0] <= products[1]


# ──────── a step, a rollout ────────


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return tiny.write_world(tmp_path_factory.mktemp("world"), tiny.qwen3_omni(std=0.08))


def open_run(world, folder, *flags):
    config = read_config(tiny.arguments(world, folder, *flags))
    questions, _, policy, reference = open_inputs(config, Team())
    optimizer, schedule = make_optimizer(policy, config)
    return Run(config, Team(), policy, reference, questions, [], optimizer, schedule)


@pytest.mark.parametrize("flags, frozen, masses", [
    (("--mask", "false", "--eta", "0"), 2, 0), (("--eta", "0"), 3, 0), ((), 3, 1)],
    ids=["GRPO", "mask", "MAPO"])
def test_forwards_of_a_step(world, tmp_path, monkeypatch, flags, frozen, masses):
    """GRPO: π_old and π_ref once, and π_θ once per micro-batch.

    The mask adds the text-only pass of π_text-ref. The attention loss adds no forward, but a mass
    for each of the two target layers.
    """
    run = open_run(world, tmp_path, *flags)
    batch = train.sample_batch(0, run)
    train.score(batch, train.ask_checker(batch, run), run)
    count = Counter()
    forward, apply = model.Policy.forward, AudioMass.apply
    monkeypatch.setattr(model.Policy, "forward",
                        lambda *args: count.update(forward=1) or forward(*args))
    monkeypatch.setattr(AudioMass, "apply", lambda *args: count.update(mass=1) or apply(*args))
    micro_batches = 2 * 3  # two optimizer steps of 8 completions, 3 per micro-batch
    train.reference_passes(batch, run)
    assert count == {"forward": frozen * micro_batches}
    count.clear()
    train.update(batch, range(8), 2, run)  # step 2: with η 0 it measures no mass
    assert count["forward"] == 3 and count["mass"] == masses * 2 * 3


@pytest.mark.parametrize("flags, frozen", [
    ((), True), (("--lora_rank", 2, "--freeze_audio_tower", "false"), True),
    (("--freeze_audio_tower", "false"), False)], ids=["frozen", "LoRA", "trained"])
def test_clips_encoded_in_an_iteration(world, tmp_path, monkeypatch, flags, frozen):
    """A frozen audio encoder runs once per clip: sampling, π_old, π_ref and the update of 8 of the
    16 completions share its embeddings. No gradient reaches it, with checkpointing on.

    A trained one runs in each forward, and a second time in the backward of the update.
    """
    run = open_run(world, tmp_path, "--gradient_checkpointing", "true", *flags)
    encoded, gradients = [], []
    part = run.policy.base.model.audio_tower.layers[0].fc1  # inside of what is recomputed
    part.register_forward_hook(lambda *_: gradients.append(torch.is_grad_enabled()))
    embed = model.audio_embeddings
    monkeypatch.setattr(model, "audio_embeddings", lambda base, family, audio: encoded.append(
        len(audio["input_features"])) or embed(base, family, audio))
    batch = train.sample_batch(0, run)
    verdicts = train.ask_checker(batch, run)
    train.reference_passes(batch, run)
    train.score(batch, verdicts, run)
    assert len({prompt.question.id for prompt in batch.prompts}) == 4 and len(batch.prompts) == 16
    train.update(batch, range(8), 1, run)
    if frozen:
        assert encoded == [4] and gradients == [False]
    else:  # 3 micro-batches, each forward and again in the backward
        assert not encoded and sum(gradients) == 2 * 3


def test_each_rank_encodes_a_part_of_the_prompts(world, tmp_path, monkeypatch):
    """Of 4 questions on 3 ranks, each rank encodes two (one of them twice, so that all run the same
    forwards), and all get the prompts of one process, in order."""
    run = open_run(world, tmp_path)
    questions = train.draw(run.questions, 0, run.config)
    alone, encoded = encode_prompts(questions, run), Counter()
    encode = model.Policy.encode
    monkeypatch.setattr(model.Policy, "encode", lambda *args: encoded.update(
        {args[1].id: 1}) or encode(*args))
    for rank in range(3):
        run.team = Team(rank=rank, size=3)
        everyone = lambda own: [dict(enumerate(alone)), own]
        monkeypatch.setattr(Team, "gather", lambda team, own: everyone(own))
        prompts = encode_prompts(questions, run)
        assert [p.question for p in prompts] == questions
        for prompt, wanted in zip(prompts, alone):
            assert prompt.ids == wanted.ids and not prompt.features
            torch.testing.assert_close(prompt.embeddings, wanted.embeddings, atol=1e-5, rtol=1e-5)
    assert sorted(encoded.values()) == [1, 1, 1, 3]  # two fillers, both of the last question


def test_a_prompt_is_prefilled_once(tmp_path):
    """For G completions, a prompt's tokens and the encoder run once; then one token per row."""
    policy, rows = tiny.qwen3_omni(std=0.08), []
    prompts = [policy.encode(q) for q in tiny.questions(tmp_path)[:2]]
    hook = policy.base.model.language_model.layers[0].register_forward_pre_hook(
        lambda layer, args, kwargs: rows.append(
            tuple((args[0] if args else kwargs["hidden_states"]).shape[:2])),
        with_kwargs=True)
    policy.eos_ids = []
    sample(policy, prompts, 5, Sampling(temperature=1.0, max_new_tokens=4), seed=0)
    hook.remove()
    assert rows == [(2, max(len(p.ids) for p in prompts))] + [(10, 1)] * 3
