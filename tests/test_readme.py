"""The README's table of paper, code and test is true: what it names exists, and no equation is left out."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def table():
    """Rows (paper cell, code cell, names in it, test names) of the section "Paper ↔ code ↔ test"."""
    section = README.split("## Paper ↔ code ↔ test")[1].split("\n## ")[0]
    rows = [re.split(r"(?<!\\)\|", line.strip().strip("|")) for line in section.splitlines() if line.startswith("| ")]
    return [(cells[0].strip(), cells[1].strip(), re.findall(r"`(\w+\.[\w.]+)`", cells[1]),
             re.findall(r"`(\w+\.\w+)`", cells[2]))
            for cells in rows if cells[0].strip() != "paper"]


def names_in(path):
    """Functions and classes of a file, methods as Class.method."""
    names = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{child.name}" for child in node.body if isinstance(child, ast.FunctionDef)}
    return names


def test_every_name_exists():
    """Each function stands in the module that the table says, each test in its file."""
    rows = table()
    assert len(rows) > 30
    for paper, cell, code, tests in rows:
        for name in code:
            module, _, rest = name.partition(".")
            assert rest in names_in(ROOT / f"{module}.py"), (paper, name)
        for name in tests:
            module, _, rest = name.partition(".")
            assert rest in names_in(ROOT / "tests" / f"{module}.py"), (paper, name)
        assert (code and tests) or cell == "not built yet", paper


def test_every_equation_is_there():
    """Eqs. 1 to 17, the lines of Algorithm 1, Appendices B and E, and every function of mapo.py stand in the table."""
    rows = table()
    said = " ".join(paper for paper, *_ in rows)
    found = {int(n) for group in re.findall(r"Eqs?\. ([\d, ]+)", said) for n in re.findall(r"\d+", group)} | {
        int(n) for n in re.findall(r"Eq\. (\d+)", said)}
    assert found | {7} == set(range(1, 18))  # Eq. 7 repeats Eq. 5, said in its row
    assert "Eq. 7 repeats it" in said
    for part in ("Alg. 1, line 2", "Alg. 1, line 3", "Alg. 1, line 4", "Alg. 1, lines 5–12", "Appendix B", "Appendix E",
                 "Table 5"):
        assert part in said
    named = {name.removeprefix("mapo.") for _, _, code, _ in rows for name in code if name.startswith("mapo.")}
    public = {name for name in names_in(ROOT / "mapo.py") if "." not in name}
    assert public - {"_described", "sequence_mean"} <= named


def test_what_the_toy_shows_is_there():
    """The section on the toy holds a picture and a table of measured numbers."""
    section = README.split("## What the toy run shows")[1].split("\n## ")[0]
    assert "![" in section and re.search(r"\| 0 \| .*\d\.\d{3}", section) and "toy" in section


def test_the_files_and_recipes_that_it_names_exist():
    """Paths in backquotes, and pictures."""
    named = re.findall(r"`((?:recipes|tests|bench|docs)/[\w./]+)`", README)
    for path in named + re.findall(r"!\[[^]]*\]\(([^)]+)\)", README):
        assert (ROOT / path).exists(), path
