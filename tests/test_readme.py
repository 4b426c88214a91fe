"""The README and docs/ tell the truth: what they name exists, and no equation is missing."""

import ast
import dataclasses
import re
from functools import cache
from pathlib import Path

import pytest

from config import TrainConfig

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
MODULES = sorted(ROOT.glob("*.py"))
README = (ROOT / "README.md").read_text(encoding="utf-8")
MOST_LINES = 230  # of the README; the rest belongs in docs/


@cache
def parse(path):
    """The syntax tree of a Python file."""
    return ast.parse(path.read_text(encoding="utf-8"))


def names_in(path):
    """Functions and classes of a file, and methods as Class.method."""
    names = set()
    for node in parse(path).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{child.name}" for child in node.body
                      if isinstance(child, ast.FunctionDef)}
    return names


def table(text, *header):
    """The rows of the table that has this header, each a list of cells."""
    lines = [line.strip() for line in text.splitlines()]
    start = lines.index("| " + " | ".join(header) + " |") + 2  # the header and the ruler below it
    rows = []
    for line in lines[start:]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in re.split(r"(?<!\\)\|", line[1:-1])])
    return rows


def paper_map():
    """Rows of docs/paper_map.md: (paper, names of code, names of tests)."""
    text = (ROOT / "docs/paper_map.md").read_text(encoding="utf-8")
    return [(paper, re.findall(r"`(\w+\.[\w.]+)`", code), re.findall(r"`(\w+\.\w+)`", tests))
            for paper, code, tests in table(text, "paper", "code", "test")]


def code_blocks(text):
    """The insides of fenced blocks, with lines joined where a backslash ends them."""
    return [block.replace("\\\n", " ") for block in re.findall(r"```\w*\n(.*?)```", text, re.S)]


def test_every_name_in_the_map_exists():
    """Each function is in the module that the table names, and each test in its file."""
    for paper, code, tests in paper_map():
        assert code and tests, paper
        for name in code:
            module, _, rest = name.partition(".")
            assert rest in names_in(ROOT / f"{module}.py"), (paper, name)
        for name in tests:
            module, _, rest = name.partition(".")
            files = list((ROOT / "tests").rglob(f"{module}.py"))
            assert len(files) == 1 and rest in names_in(files[0]), (paper, name)


def test_no_equation_is_missing_from_the_map():
    """Eqs. 1 to 17, Algorithm 1, Appendices B and E, and every public function of mapo.py."""
    rows = paper_map()
    said = " ".join(paper for paper, *_ in rows)
    found = {int(number) for group in re.findall(r"Eqs?\. (\d+(?:, \d+)*)", said)
             for number in group.split(", ")}
    assert found | {7} == set(range(1, 18)) and "Eq. 7 repeats it" in said
    for part in ("Alg. 1, line 2", "Alg. 1, line 3", "Alg. 1, line 4", "Alg. 1, lines 5–12",
                 "Appendix B", "Appendix E", "Table 5"):
        assert part in said
    named = {name for _, code, _ in rows for name in code}
    helpers = {"described", "sequence_mean"}
    assert [name for name in names_in(ROOT / "mapo.py") - helpers
            if "." not in name and name[0] != "_" and f"mapo.{name}" not in named] == []


def test_the_reading_order_names_every_module_once():
    named = [name for module, _ in table(README, "module", "what it holds")
             for name in re.findall(r"`(\w+\.py)`", module)]
    assert sorted(named) == [path.name for path in MODULES]


def test_the_readme_is_short():
    assert len(README.splitlines()) <= MOST_LINES


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_paths_exist(page):
    """Relative links and pictures lead somewhere; so do the files that are named in backquotes."""
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#\s]+)\)", text):
        assert target.startswith("https://") or (page.parent / target).exists(), target
    for path in re.findall(r"`((?:recipes|tests|bench|docs)/[\w./]+|\w+\.py)`", text):
        assert (ROOT / path).exists(), path


def flags_of(script):
    """The flags that a script takes: the fields of its dataclass config, or add_argument calls."""
    fields = {field.name for field in dataclasses.fields(TrainConfig)}
    nodes = ast.walk(parse(ROOT / script))
    added = {node.value.removeprefix("--") for node in nodes
             if isinstance(node, ast.Constant) and str(node.value).startswith("--")}
    return {"train.py": fields, "plan.py": fields | added, "evaluate.py": added}[script]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_have_flags_that_exist(page):
    """Every flag behind train.py, evaluate.py or plan.py in a code block or in backquotes."""
    text = page.read_text(encoding="utf-8")
    commands = [line for block in code_blocks(text) for line in block.splitlines()]
    commands += re.findall(r"`([^`\n]+)`", text)
    for command in commands:
        found = re.search(r"\b(train|evaluate|plan)\.py\b(.*)", command)
        if found:
            arguments = re.sub(r'"[^"]*"', "", found[2]).split("#")[0]  # vLLM's flags are in quotes
            flags = set(re.findall(r"--([\w-]+)", arguments)) - {"help"}
            assert flags <= flags_of(f"{found[1]}.py"), command


def test_troubleshooting_quotes_the_errors_that_the_code_raises():
    """What is in backquotes under "you see" is part of a string in one of the modules."""
    strings = [node.value for path in MODULES for node in ast.walk(parse(path))
               if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    for seen, _ in table(README, "you see", "do"):
        for fragment in re.findall(r"`([^`]+)`", seen):
            assert any(fragment in string for string in strings), fragment
