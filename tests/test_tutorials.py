"""The rules of tutorials/: each runs from top to bottom in a fresh kernel, as Run All does in JupyterLab; uses the package and nothing beside it; says how to make
it longer; ends with exercises that are checked. And the index knows every notebook. Each rule is a function that gives complaints, so that it can be seen failing."""
import ast
import json
import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import run_notebooks

ROOT = Path(__file__).parents[1]
TUTORIALS = ROOT / "tutorials"
READ_RESULTS = {"lvrpo": "miniatures", "corl": "miniatures", "pairuni": "miniatures"}      # show stored results, with the script that made them
LIBRARIES = {"IPython", "PIL", "fastcore", "matplotlib", "numpy", "pandas", "pyarrow", "torch", "transformers", "unify_rl"}


def cells(path, kind): return ["".join(c["source"]) for c in json.loads(path.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == kind]


def lessons(root): return [p for p in sorted((root / "tutorials").glob("*.ipynb")) if p.stem not in {*READ_RESULTS, "index"}]


def imports(path):
    "The top-level modules that a notebook imports."
    for node in ast.walk(ast.parse("\n".join(cells(path, "code")))):
        if isinstance(node, ast.Import): yield from (a.name.split(".")[0] for a in node.names)
        elif isinstance(node, ast.ImportFrom): yield node.module.split(".")[0]


def only_the_package(root):
    "The package, what it depends on, and the standard library; no module beside the notebook."
    for path in sorted((root / "tutorials").glob("*.ipynb")):
        for name in sorted(set(imports(path)) - LIBRARIES - sys.stdlib_module_names - {READ_RESULTS.get(path.stem)}): yield f"{path.name}: imports {name}"


def a_switch(root):
    "`FULL = False` at the top, with what it changes and how long that takes, and it is used."
    for path in lessons(root):
        first, *rest = cells(path, "code")
        if not re.match(r"FULL = False +# True: .*about \d+ minutes", first): yield f"{path.name}: its first cell is no switch FULL that says what it costs"
        if not re.search(r"\bif FULL else\b", "\n".join([first, *rest])): yield f"{path.name}: FULL changes nothing"


def exercises(root):
    "Two or three of them, numbered, each with a cell that asserts."
    for path in lessons(root):
        told = [c for c in cells(path, "markdown") if re.search(r"^## Exercises$", c, re.M)]
        asked = re.findall(r"^\d\. ", told[0], re.M) if told else []
        raw = json.loads(path.read_text(encoding="utf-8"))["cells"]
        checks = [c for c in raw if str(c.get("id")).startswith("exercise-")]
        if len(asked) not in (2, 3): yield f"{path.name}: {len(asked)} exercises"
        if len(checks) != len(asked): yield f"{path.name}: {len(asked)} exercises, but {len(checks)} cells exercise-N"
        for c in checks:
            if not re.search(r"\b(assert|test_(eq|close|fail))\b", "".join(c["source"])): yield f"{path.name}: {c['id']} checks nothing"


def indexed(root):
    "The index names every notebook of both folders, and nothing else."
    named = set(re.findall(r"^((?:nbs|tutorials)/\S+\.ipynb) *\|", "\n".join(cells(root / "tutorials" / "index.ipynb", "code")), re.M))
    there = {p.relative_to(root).as_posix() for p in run_notebooks.notebooks(root)} - {"tutorials/index.ipynb"}
    yield from (f"index.ipynb: lacks {name}" for name in sorted(there - named))
    yield from (f"index.ipynb: names {name}, which is not there" for name in sorted(named - there))


RULES = [only_the_package, a_switch, exercises, indexed]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_tutorials_keep(rule): assert list(rule(ROOT)) == []


GOOD = [("code", "settings", "FULL = False        # True: more steps: about 5 minutes\nSTEPS = 9 if FULL else 1"), ("code", "imports", "import json\nimport unify_rl"),
        ("markdown", "exercises", "## Exercises\n\n1. One.\n2. Two."), ("code", "exercise-1", "assert STEPS"), ("code", "exercise-2", "assert True")]


def written(root, name, made):
    "A notebook with these cells, under an index that names it."
    blank = lambda kind, i, text: dict(cell_type=kind, id=i, metadata={}, source=text) | (dict(outputs=[], execution_count=None) if kind == "code" else {})
    for folder, stem, its in (("tutorials", name, made), ("tutorials", "index", [("code", "table", f'PATH = """\ntutorials/{name}.ipynb | 1 | 1 | x\n"""')])):
        (root / folder).mkdir(parents=True, exist_ok=True)
        kernel = dict(kernelspec=dict(name="python3", display_name="python3", language="python"))
        (root / folder / f"{stem}.ipynb").write_text(json.dumps(dict(cells=[blank(*c) for c in its], metadata=kernel, nbformat=4, nbformat_minor=5)))
    return root


def changed(cell, text): return [(kind, i, text if i == cell else source) for kind, i, source in GOOD]


def test_a_sound_tutorial_passes(tmp_path):
    assert [c for rule in RULES for c in rule(written(tmp_path, "tour", GOOD))] == []


FAULTS = [
    (only_the_package, changed("imports", "from miniatures import table"), "imports miniatures"),
    (only_the_package, changed("imports", "def f():\n    import datasets"), "imports datasets"),
    (a_switch, GOOD[1:], "no switch FULL"),
    (a_switch, changed("settings", "FULL = False        # True: about 5 minutes\nSTEPS = 1"), "FULL changes nothing"),
    (exercises, GOOD[:2], "0 exercises"),
    (exercises, GOOD[:-1], "2 exercises, but 1 cells"),
    (exercises, changed("exercise-2", "print(2)"), "exercise-2 checks nothing"),
    (indexed, None, "lacks tutorials/tour.ipynb"),
]


@pytest.mark.parametrize("rule, made, complaint", FAULTS, ids=[f"{rule.__name__}-{i}" for i, (rule, _, _) in enumerate(FAULTS)])
def test_a_planted_fault_is_found(rule, made, complaint, tmp_path):
    written(tmp_path, "tour", made or GOOD)
    if made is None: written(tmp_path, "other", GOOD)
    found = list(rule(tmp_path))
    assert any(complaint in one for one in found), found


# ---- running them ----

def test_a_notebook_that_fails_is_named_and_ends_the_run_with_1(tmp_path, capsys):
    written(tmp_path, "good", GOOD)
    written(tmp_path, "bad", [("code", "boom", "assert 1 == 2, 'one is not two'")])
    status = run_notebooks.main([str(tmp_path / "tutorials" / f"{name}.ipynb") for name in ("good", "bad")])
    said = capsys.readouterr().out
    assert status == 1 and "one is not two" in said and "2 notebooks" in said
    assert re.search(r"ok .* tutorials/good.ipynb", said) and "FAILED: tutorials/bad.ipynb" in said


def test_all_notebooks_of_both_folders_are_run():
    found = {p.relative_to(ROOT).as_posix() for p in run_notebooks.notebooks()}
    assert {"nbs/00_core.ipynb", "tutorials/index.ipynb", "tutorials/corl.ipynb"} <= found
    assert len(found) == len([*(ROOT / "nbs").glob("*.ipynb"), *TUTORIALS.glob("*.ipynb")])


def test_the_report_has_the_total_and_the_slowest_five():
    said = run_notebooks.report({f"nbs/{i}.ipynb": float(i) for i in range(7)}, {"nbs/3.ipynb": "why"}, wall=12.0).splitlines()
    assert said[0] == "7 notebooks, 12 s (21 s added up). The slowest 5:"
    assert [line.split()[-1] for line in said[1:6]] == [f"nbs/{i}.ipynb" for i in (6, 5, 4, 3, 2)] and said[6:] == ["FAILED: nbs/3.ipynb"]
