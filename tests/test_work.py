"""How much work is done, counted and not timed: blocks of logits, rows of attention weights, forwards of a step, rows
of a prefill, bytes alive. What the tables of bench/ rest on."""

from collections import Counter, defaultdict

import pytest
import tiny
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import model
import train
from model import AudioMass, token_statistics
from rollout import sample


class Work(TorchDispatchMode):
    """Counts operators by name and keeps the size of the largest float tensor that any of them made, and the sum."""

    def __init__(self):
        super().__init__()
        self.calls, self.largest, self.made = Counter(), 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.calls[function.overloadpacket.__name__] += 1
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point() and tensor._base is None:
                self.largest = max(self.largest, tensor.numel())
                self.made += tensor.numel()
        return result


# ───────────────────────────────────────────────── log-prob and entropy ───────────────────────────────────────────────


def statistics_work(rows, vocabulary, size=16, trains_head=True):
    head = torch.nn.Linear(size, vocabulary, bias=False).requires_grad_(trains_head)
    hidden, ids = torch.randn(rows, size, requires_grad=True), torch.randint(vocabulary, (rows,))
    with Work() as work:
        logp, _ = token_statistics(hidden, head, ids, 1.2)
        logp.sum().backward()
    return work


def test_no_logits_beyond_a_block(monkeypatch):
    """Forward and backward: nothing of [T, V], not for a moment; the largest is a block or the weight's gradient."""
    monkeypatch.setattr(model, "LOGIT_COLUMNS", 32)
    for rows, vocabulary in ((64, 1000), (128, 1000), (64, 2000)):
        assert statistics_work(rows, vocabulary, size=2).largest == max(32 * rows, 2 * vocabulary)


def test_logits_are_made_twice_and_products_are_four(monkeypatch):
    """Blocks of columns: each forms its logits once forward and once backward; a row of the weight's gradient is
    written once. A head that is not trained costs three products."""
    monkeypatch.setattr(model, "LOGIT_COLUMNS", 100)
    for trains_head, products in ((True, 4), (False, 3)):
        work = statistics_work(64, 1000, trains_head=trains_head)
        assert work.calls["mm"] == products * 10  # 10 blocks of 100 columns


def test_entropy_keeps_nothing():
    head, saved = torch.nn.Linear(8, 500, bias=False), []
    hidden, ids = torch.randn(70, 8, requires_grad=True), torch.randint(500, (70,))
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
        token_statistics(hidden, head, ids, 1.0)
    assert sorted(saved) == [70, 70, 70 * 8, 500 * 8]  # ids, log Z, states, weight


# ──────────────────────────────────────────────────────── the mass ────────────────────────────────────────────────────


def mass_work(keys, heads_with_gradient=1, rows=64):
    """Work of 8 heads over 2 key heads, forward and backward → both."""
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


def test_mass_is_linear_in_keys():
    """Twice the keys, twice the largest tensor: a block of rows of α; never [H, T, S]."""
    for part in (0, 1):
        short, long = mass_work(128)[part].largest, mass_work(256)[part].largest
        assert long == 2 * short
    assert mass_work(128)[0].largest == 8 * model.MASS_ROWS["cpu"] * 128


def test_backward_of_the_mass_makes_the_rows_that_have_a_gradient():
    """a_t is the maximum over heads: one head of 8 has a gradient, and the backward does an eighth of the rows (a
    quarter at the worst, when all maxima fall on one key head)."""
    _, one = mass_work(128, heads_with_gradient=1)
    _, four = mass_work(128, heads_with_gradient=4)
    assert four.calls["bmm"] == 4 * one.calls["bmm"] > 0
    assert mass_work(128, heads_with_gradient=8)[1].calls["bmm"] == four.calls["bmm"]  # two key heads side by side
    assert mass_work(128, heads_with_gradient=0)[1].calls["bmm"] <= one.calls["bmm"]


# ──────────────────────────────────────────────────── a step, a rollout ───────────────────────────────────────────────


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return tiny.write_world(tmp_path_factory.mktemp("world"), tiny.qwen3_omni(std=0.08))


@pytest.mark.parametrize("flags, frozen, masses", [
    (("--mask", "false", "--eta", "0"), 2, 0), (("--eta", "0"), 3, 0), ((), 3, 1)])
def test_forwards_of_a_step(world, tmp_path, monkeypatch, flags, frozen, masses):
    """GRPO: π_old and π_ref once, π_θ once a micro-batch. The mask adds the text-only pass of π_text-ref, the attention
    loss adds no forward: a mass for each of the two target layers."""
    config = train.read_config(tiny.arguments(world, tmp_path, *flags))
    questions, _, policy, reference = train.open_inputs(config)
    optimizer, _ = train.make_optimizer(policy, config)
    batch = next(train.generation_batches(policy, questions, config, None))
    train.score(batch, policy, config)
    count = Counter()
    forward, apply = model.Policy.forward, AudioMass.apply
    monkeypatch.setattr(model.Policy, "forward", lambda *args: count.update(forward=1) or forward(*args))
    monkeypatch.setattr(AudioMass, "apply", lambda *args: count.update(mass=1) or apply(*args))
    micro_batches = 2 * 3  # two optimizer steps of 8 completions, 3 a micro-batch
    train.freeze(batch, policy, reference, config, defaultdict(float))
    assert count == {"forward": frozen * micro_batches}
    count.clear()
    train.update(policy, optimizer, batch, range(8), config, measure=config.eta > 0)
    assert count["forward"] == 3 and count["mass"] == masses * 2 * 3


def test_a_prompt_is_prefilled_once(tmp_path):
    """G completions of a prompt: its tokens, and the encoder, run for one row; then a token a row and step."""
    policy, rows = tiny.qwen3_omni(std=0.08), []
    prompts = [policy.encode(q) for q in tiny.questions(tmp_path)[:2]]
    hook = policy.base.model.language_model.layers[0].register_forward_pre_hook(
        lambda layer, args, kwargs: rows.append(tuple((args[0] if args else kwargs["hidden_states"]).shape[:2])),
        with_kwargs=True)
    policy.eos_ids = []
    sample(policy, prompts, 5, temperature=1.0, max_new_tokens=4, seed=0)
    hook.remove()
    assert rows == [(2, max(len(p.ids) for p in prompts))] + [(10, 1)] * 3
