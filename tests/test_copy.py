"""Every function can be copied: pasted with exactly what its docstring lists after "Needs".

The paste goes under `import torch` in an empty namespace. It must run there, and give what the
original gives.
"""

import ast
import dataclasses
import functools
import importlib
import inspect
import re
from pathlib import Path

import pytest
import torch

import attention
import mapo
import model
from mapo import MapoConfig

ROOT = Path(__file__).resolve().parents[1]


# ─────────────────────────────────────── inputs and calls ─────────────────────────────────────────

B, T, H, S, V, LAYERS = 4, 6, 3, 5, 7, 2
MASK = torch.arange(T) < torch.tensor([6, 4, 1, 0])[:, None]  # the last completion is empty


def random(*shape):
    """Numbers in [0, 1), the same for the same shape."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


LOGP = -3 * random(B, T)
OLD_LOGP, REF_LOGP, SAMPLER_LOGP = LOGP + 0.3, LOGP - random(B, T), LOGP - 0.2
DELTA_H, AUDIO_MASS, POS_GATE = 4 * random(B, T) - 2, random(B, T), random(B, T) < 0.7
ADVANTAGES = torch.tensor([-1.5, 0.5, 0.0, 1.0], dtype=torch.float64)
ACCURACY = torch.tensor([0.0, 1.0, 0.0, 1.0], dtype=torch.float64)
LOGITS, TOKEN_IDS = 5 * random(B, T, V), torch.arange(B * T).view(B, T) % V
CONFIG = MapoConfig(importance_clip=2.0, advantage_floor=0.1)  # no branch is left out


def call_mapo_loss(f):
    logp, audio_mass = LOGP.clone().requires_grad_(), AUDIO_MASS.clone().requires_grad_()
    out = f(logp=logp, old_logp=OLD_LOGP, ref_logp=REF_LOGP, advantages=ADVANTAGES, mask=MASK,
            config=CONFIG, delta_h=DELTA_H, audio_mass=audio_mass, pos_gate=POS_GATE,
            accuracy_reward=ACCURACY, sampler_logp=SAMPLER_LOGP)
    return out, torch.autograd.grad(out["loss"], (logp, audio_mass))


def call_config(cls):
    with pytest.raises(ValueError, match="^eta is -1: it must be"):
        cls(eta=-1)
    return dataclasses.asdict(cls(eta=0.3))


# (module, name, how to call it): every public name of mapo.py
MAPO = [
    (mapo, "group_advantages", lambda f: f(LOGP.flatten(), 4, 0.1)),
    (mapo, "token_logp", lambda f: f(LOGITS, TOKEN_IDS)),
    (mapo, "head_audio_mass", lambda f: f(random(B, H, T, S), random(B, S) < 0.5)),
    (mapo, "audio_attention_mass", lambda f: f(random(LAYERS, B, H, T))),
    (mapo, "token_entropy", lambda f: f(LOGITS)),
    (mapo, "differential_entropy", lambda f: f(AUDIO_MASS, LOGP)),
    (mapo, "length_temperature", lambda f: f(MASK, 1.0)),
    (mapo, "relevance_mask", lambda f: f(DELTA_H, MASK, 1.0, 5.0)),
    (mapo, "clipped_surrogate", lambda f: f(LOGP, OLD_LOGP, ADVANTAGES, 0.2)),
    (mapo, "importance_weight", lambda f: f(OLD_LOGP, SAMPLER_LOGP, 2.0)),
    (mapo, "sequence_mean", lambda f: f(ADVANTAGES, MASK)),
    (mapo, "policy_loss", lambda f: f(LOGP, AUDIO_MASS, MASK)),
    (mapo, "inverse_relevance_weight", lambda f: f(DELTA_H, POS_GATE, MASK, 1.0, 5.0)),
    (mapo, "temporal_weight", lambda f: f(MASK, 1.0)),
    (mapo, "failure_gate", lambda f: f(ACCURACY, 0.0, 0.1)),
    (mapo, "floored_advantages", lambda f: f(ADVANTAGES, ACCURACY, 0.0, 0.1)),
    (mapo, "attention_prefactor", lambda f: f(ACCURACY, ADVANTAGES, 3.0)),
    (mapo, "attention_penalty", lambda f: f(AUDIO_MASS, 0.1)),
    (mapo, "attention_loss", lambda f: f(
        AUDIO_MASS, DELTA_H, POS_GATE, ADVANTAGES, ACCURACY, MASK, tau_base=1.0, mask_clip=5.0,
        kappa=1.0, fail_threshold=0.0, fail_gate_floor=0.1, prefactor_clip=3.0, eps=0.1)),
    (mapo, "k3_kl", lambda f: f(LOGP, REF_LOGP)),
    (mapo, "kl_loss", lambda f: f(LOGP, REF_LOGP, MASK)),
    (mapo, "mapo_loss", call_mapo_loss),
    (mapo, "described", lambda f: {"default": f(1, "one").default, **f(1, "one").metadata}),
    (mapo, "MapoConfig", call_config),
]


def call_token_statistics(f):
    hidden = random(B * T, 8).requires_grad_()
    head = torch.nn.Linear(8, V, bias=False, dtype=torch.float64)
    head.weight.data = random(V, 8)
    logp, entropy = f(hidden, head, TOKEN_IDS.flatten(), 1.2)
    return logp, entropy, torch.autograd.grad(logp.sum(), (hidden, head.weight))


def call_audio_mass(f):
    query, key = random(B, 4, S, 8).requires_grad_(), random(B, 2, S, 8).requires_grad_()
    causal = torch.ones(S, S, dtype=torch.bool).tril()[None, None, -3:]  # the last 3 queries
    mass = f(query, key, random(B, S) < 0.5, causal, 0.3)
    return mass, torch.autograd.grad(mapo.audio_attention_mass(mass[None]).sum(), (query, key))


# (module, name, how to call it): what other modules offer to copy, with a "Needs" in its docstring
OTHERS = [
    (model, "token_statistics", call_token_statistics),
    (attention, "audio_mass", call_audio_mass),
    (attention, "AudioMass", lambda cls: call_audio_mass(cls.apply)),
]


# ───────────────────────────────────── reading "Needs" ────────────────────────────────────────────


@functools.cache
def definitions(module):
    """{name: source} of everything that a module defines at its top level."""
    text = inspect.getsource(module)
    lines, found = text.splitlines(), {}
    for node in ast.parse(text).body:
        names = [node.name] if isinstance(node, (ast.FunctionDef, ast.ClassDef)) else [
            target.id for target in getattr(node, "targets", []) if isinstance(target, ast.Name)]
        first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
        found |= dict.fromkeys(names, "\n".join(lines[first - 1:node.end_lineno]))
    return found


@functools.cache
def home(module, name):
    """The module of this repository that defines a name which `module` knows, or None."""
    if name in definitions(module):
        return module
    for node in ast.parse(inspect.getsource(module)).body:
        if isinstance(node, ast.ImportFrom) and (ROOT / f"{node.module}.py").exists():
            if name in [alias.name for alias in node.names]:
                return home(importlib.import_module(node.module), name)
    return None


def needs(module, name):
    """What a docstring lists after "Needs": import lines (in backquotes), and names."""
    doc = inspect.getdoc(getattr(module, name)) or ""
    listed = re.search(r"\bNeeds (.*?)\.(?=\s|$)", doc, re.S)  # up to the end of the sentence
    text = re.sub(r"\(of \w+\.py\)", "", listed[1]) if listed else ""
    imports = re.findall(r"`([^`]+)`", text)
    return imports, re.findall(r"(?!and\b)\b\w+", re.sub(r"`[^`]+`", "", text))


def used(module, name):
    """The names of this repository that a name uses, that these use in turn, and so on."""
    found, left = set(), [(module, name)]
    while left:
        where, name_here = left.pop()
        for node in ast.walk(ast.parse(definitions(where)[name_here])):
            there = home(where, node.id) if isinstance(node, ast.Name) else None
            if there and node.id not in found | {name}:
                found.add(node.id)
                left.append((there, node.id))
    return found


def pasted(module, name):
    """The name in a fresh namespace that holds torch and exactly what its docstring lists."""
    imports, names = needs(module, name)
    sources = [definitions(home(module, each))[each] for each in (*names, name)]
    namespace = {"__name__": "pasted"}
    text = "\n\n\n".join(["import torch", *imports, *sources])
    exec(compile(text, f"{name}, pasted", "exec"), namespace)
    return namespace[name]


# ─────────────────────────────────────────── the tests ────────────────────────────────────────────

every_name = pytest.mark.parametrize("module, name, call", [
    pytest.param(*entry, id=f"{entry[0].__name__}.{entry[1]}") for entry in MAPO + OTHERS])


@every_name
def test_a_paste_runs_and_gives_the_same(module, name, call):
    """Results, and gradients where the call takes them, are equal bit for bit."""
    original, copy = call(getattr(module, name)), call(pasted(module, name))
    if isinstance(original, dict) and not any(map(torch.is_tensor, original.values())):
        assert copy == original
    else:
        torch.testing.assert_close(copy, original, rtol=0, atol=0, equal_nan=True)


@every_name
def test_needs_lists_what_is_used(module, name, call):
    """The list holds every name that is used, directly or not, no other, and none twice."""
    _, names = needs(module, name)
    assert sorted(names) == sorted(used(module, name))


def test_every_public_name_of_mapo_is_copied():
    """A function added to mapo.py is added to the table above."""
    public = {name for name in definitions(mapo) if not name.startswith("_")}
    assert {name for _, name, _ in MAPO} == public


def test_mapo_imports_torch_and_dataclasses_alone():
    """mapo.py can be copied as a whole file."""
    imported = set()
    for node in ast.walk(ast.parse(inspect.getsource(mapo))):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module)
    assert imported == {"torch", "dataclasses"}


# group_advantages looks at the values of the rewards; a dataclass is not compiled
NOT_COMPILED = ("group_advantages", "described", "MapoConfig")


@pytest.mark.parametrize("name, call", [
    pytest.param(name, call, id=name) for _, name, call in MAPO if name not in NOT_COMPILED])
def test_compiles_as_one_graph(name, call):
    """torch.compile takes the function without a graph break, and its results do not change."""
    torch.compiler.reset()
    function = getattr(mapo, name)
    compiled = torch.compile(function, fullgraph=True, backend="eager")
    torch.testing.assert_close(call(compiled), call(function), rtol=0, atol=0)


def test_readme_snippet_runs(capsys):
    """The snippet of the README's section "Copy a loss" runs, and prints what the README says."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    section = re.search(r"^## Copy a loss\b.*?(?=^## )", readme, re.M | re.S)[0]
    snippet = re.search(r"^```python\n(.*?)^```", section, re.M | re.S)[1]
    exec(compile(snippet, "README.md, Copy a loss", "exec"), {"__name__": "snippet"})
    assert f"It prints `{capsys.readouterr().out.strip()}`" in section
