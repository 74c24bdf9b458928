"""The rules that keep notebooks and modules one thing (CONTRIBUTING.md).

Each rule is a function from a repository folder to a list of complaints, so that it can be held against this repository,
which must give none, and against a small one with a planted fault, which must give that one.
"""
import ast
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LIB = "unify_rl"
BY_HAND = ("__init__.py", "__main__.py", "_modidx.py", "compat_site/sitecustomize.py")    # modules that no notebook exports
UNSAFE_MODULES = {"pickle", "cPickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"}
MAX_BYTES = 200 * 1024
THEORY = 90                             # notebooks from this number on export nothing


# ---- reading a repository ----

def notebooks(root):
    "The lessons, in the order of the ladder."
    return sorted((root / "nbs").glob("*.ipynb"))


def all_notebooks(root): return notebooks(root) + sorted((root / "tutorials").glob("*.ipynb"))


def cells(path, kind="code"):
    return [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if kind in (None, cell["cell_type"])]


def parsed(path): return ast.parse(path.read_text(encoding="utf-8"))


def source(cell): return "".join(cell["source"])


def directive(path, name):
    "The argument of every `#| name argument` line in the notebook's code cells."
    return [m[1].strip() for cell in cells(path) for m in re.finditer(rf"^#\|\s*{name}\b(.*)$", source(cell), re.M)]


def number(path):
    m = re.match(r"\d+", path.name)
    return int(m[0]) if m else -1


def exports(root):
    "Dotted module -> the notebooks that export it."
    found = {}
    for path in notebooks(root):
        for name in directive(path, "default_exp"): found.setdefault(f"{LIB}.{name}", []).append(path)
    return found


def module_file(root, module): return root.joinpath(*module.split(".")).with_suffix(".py")


def modules(root): return sorted((root / LIB).rglob("*.py"))


def by_hand(root, path):
    "Is this module one of the few that no notebook exports? Any package may have an `__init__.py`."
    relative = path.relative_to(root / LIB).as_posix()
    return relative in BY_HAND or path.name == "__init__.py"


def plain(text):
    "A cell's Python without Jupyter's magics."
    return "\n".join(re.sub(r"^(\s*)[%!].*", r"\1pass", line) for line in text.splitlines())


def imported(tree, module):
    "Yield (dotted name, names taken from it) for every import of this package in `tree`, at any depth."
    for node in ast.walk(tree):
        if isinstance(node, ast.Import): yield from ((alias.name, []) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = module.split(".")[:-node.level] if node.level else []
            yield ".".join(base + ([node.module] if node.module else [])), [alias.name for alias in node.names]
        elif isinstance(node, ast.Call) and re.search(r"\b(import_module|__import__)$", ast.unparse(node.func)):
            if node.args and isinstance(node.args[0], ast.Constant): yield str(node.args[0].value), []


def targets(tree, module, known):
    "The modules of this package that `tree` imports; names that no notebook exports come back as they are written."
    for name, taken in imported(tree, module):
        if name.split(".")[0] != LIB: continue
        if name in known: yield name
        elif taken: yield from (f"{name}.{one}" for one in taken)
        elif name != LIB: yield name


# ---- the rules ----

def names_and_numbers(root):
    "A lesson is called NN_area.module.ipynb after the module it exports, and no two share a number."
    seen = {}
    for path in notebooks(root):
        m = re.fullmatch(r"(\d\d)_([a-z0-9_.]+)\.ipynb", path.name)
        if not m:
            yield f"{path.name}: not of the form NN_area.module.ipynb"
            continue
        if m[1] in seen: yield f"{path.name}: number {m[1]} is taken by {seen[m[1]]}"
        seen[m[1]] = path.name
        for name in directive(path, "default_exp"):
            if name != m[2]: yield f"{path.name}: exports {name}, so it should be called {m[1]}_{name}.ipynb"


def one_notebook_one_module(root):
    "`default_exp` is unique, there is at most one in a notebook, and no cell exports elsewhere."
    for module, paths in exports(root).items():
        if len(paths) > 1: yield f"{module} is exported by {', '.join(path.name for path in paths)}"
    for path in notebooks(root):
        if len(directive(path, "default_exp")) > 1: yield f"{path.name}: more than one default_exp"
        for other in filter(None, directive(path, "export[is]?")): yield f"{path.name}: a cell exports to {other}"


def theory_exports_nothing(root):
    "Notebooks from 90 on are read, not imported: they name no module and export no cell."
    for path in notebooks(root):
        if number(path) < THEORY: continue
        found = {"says #| default_exp": directive(path, "default_exp"), "says #| export": directive(path, "export[is]?"),
                 "calls nbdev_export": any("nbdev_export" in source(cell) for cell in cells(path))}
        for what in found:
            if found[what]: yield f"{path.name}: a theory notebook must export nothing, but it {what}"


def nobody_imports_theory(root):
    "No module and no other notebook, tutorials included, imports from a theory notebook."
    names = {f"{LIB}.{path.stem.split('_', 1)[-1]}" for path in notebooks(root) if number(path) >= THEORY}
    trees = [(path, parsed(path), ".".join(path.relative_to(root).with_suffix("").parts)) for path in modules(root)]
    trees += [(path, ast.parse(plain(source(cell))), LIB) for path in all_notebooks(root) for cell in cells(path)]
    for path, tree, module in trees:
        for name, taken in imported(tree, module):
            for one in sorted(names & {name, *(f"{name}.{t}" for t in taken)}): yield f"{path.relative_to(root)}: imports {one}, a theory notebook"


def imports_go_down(root):
    "Modules and lessons import only from lower-numbered notebooks; a lesson may also import what it exports."
    known = {module: number(paths[0]) for module, paths in exports(root).items()}
    for path in notebooks(root):
        own = [f"{LIB}.{name}" for name in directive(path, "default_exp")]
        trees = [(parsed(file), False) for file in (module_file(root, module) for module in own) if file.exists()]
        trees += [(ast.parse(plain(source(cell))), True) for cell in cells(path)]
        complaints = set()
        for tree, lesson in trees:
            for target in targets(tree, own[0] if own else LIB, known):
                if target == f"{LIB}.__version__" or (lesson and target in own): continue
                if target not in known: complaints.add(f"{path.name}: imports {target}, which no notebook exports")
                elif known[target] >= number(path):
                    complaints.add(f"{path.name}: imports {target}, which is exported by number {known[target]:02}")
        yield from sorted(complaints)


def no_orphans(root):
    "Every module comes from a notebook, and every notebook's module is there."
    wanted = {module_file(root, module) for module in exports(root)}
    for path in modules(root):
        if path not in wanted and not by_hand(root, path): yield f"{path.relative_to(root)}: no notebook exports it"
    for path in sorted(wanted):
        if not path.exists(): yield f"{path.relative_to(root)}: not exported yet"


def ids(root):
    "Every cell has an id of its own."
    for path in all_notebooks(root):
        found = [cell.get("id") for cell in cells(path, None)]
        if not all(found): yield f"{path.name}: a cell without an id"
        for one in sorted({i for i in found if i and found.count(i) > 1}): yield f"{path.name}: id {one} occurs more than once"


def small(root):
    "A notebook stays under 200 KB, outputs and all."
    for path in all_notebooks(root):
        if path.stat().st_size > MAX_BYTES: yield f"{path.name}: {path.stat().st_size // 1024} KB"


def headings(root):
    "A heading is a row of hashes and a text: '# # Title' shows a hash to the reader."
    for path in all_notebooks(root):
        for cell in cells(path, "markdown"):
            for line in source(cell).splitlines():
                if re.match(r"#+ +#", line): yield f"{path.name}: heading {line[:40]!r}"


def no_errors_stored(root):
    "No notebook shows a traceback that nobody expected, nor a library's warning with a path of the machine."
    for path in all_notebooks(root):
        for cell in cells(path):
            if any(out["output_type"] == "error" for out in cell["outputs"]):
                yield f"{path.name}: cell {cell.get('id')} ended in an error"
            if any(out.get("name") == "stderr" for out in cell["outputs"]): yield f"{path.name}: cell {cell.get('id')} shows a warning"


def no_star_imports(root):
    "Exported code names what it imports."
    for path in modules(root):
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.ImportFrom) and node.names[0].name == "*":
                yield f"{path.relative_to(root)}:{node.lineno}: import *"


def unsafe(node):
    "What is wrong with this call or import, if anything: data must never become code."
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
        return next((f"imports {name}" for name in names if name.split(".")[0] in UNSAFE_MODULES), None)
    if not isinstance(node, ast.Call): return None
    name, given = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
    if name in ("eval", "exec"): return name
    if name == "torch.load" and given.get("weights_only") != "True": return "torch.load without weights_only=True"
    if re.fullmatch(r"yaml\.(load|load_all|full_load|unsafe_load)", name): return f"{name} instead of yaml.safe_load"
    return next((f"{key}=True" for key in ("trust_remote_code", "allow_pickle") if given.get(key) == "True"), None)


def data_is_not_code(root):
    "No pickle, no eval, nothing from a checkpoint or a hub is run."
    for path in modules(root):
        for node in ast.walk(parsed(path)):
            if what := unsafe(node): yield f"{path.relative_to(root)}:{node.lineno}: {what}"


def in_sync(root):
    "Exporting the notebooks again gives the committed modules, byte for byte."
    import tempfile
    with tempfile.TemporaryDirectory() as folder:
        fresh = Path(folder) / "repo"
        export(root, fresh)
        for path in modules(fresh):
            if path.name == "__init__.py": continue
            ours = root / path.relative_to(fresh)
            if ours.exists() and ours.read_bytes() != path.read_bytes():
                yield f"{path.relative_to(fresh)}: differs from its notebook's export"


def export(root, to):
    "Export the notebooks of `root` in a new folder that has nothing else."
    shutil.copytree(root / "nbs", to / "nbs", ignore=shutil.ignore_patterns(".*"))
    shutil.copy(root / "pyproject.toml", to)
    (to / LIB).mkdir()
    shutil.copy(root / LIB / "__init__.py", to / LIB)
    command = [sys.executable, "-c", "from nbdev.doclinks import nbdev_export; nbdev_export()"]
    done = subprocess.run(command, cwd=to, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def exercises(root):
    "Every lesson ends with two or three exercises, each with a check in a code cell `exercise-N`."
    for path in notebooks(root):
        asked = [source(c).split("## Exercises")[-1] for c in cells(path, "markdown") if "## Exercises" in source(c)]
        numbers = re.findall(r"^(\d)\. ", asked[-1], re.M) if asked else []
        if numbers not in (["1", "2"], ["1", "2", "3"]): yield f"{path.name}: it should end with two or three exercises, numbered from 1; found {numbers}"
        checks = {c.get("id"): source(c) for c in cells(path) if str(c.get("id")).startswith("exercise-")}
        for n in numbers:
            if not re.search(r"assert |test_\w+\(", checks.pop(f"exercise-{n}", "")): yield f"{path.name}: exercise {n} has no check"
        for i in checks: yield f"{path.name}: {i} belongs to no exercise"


RULES = [exercises, names_and_numbers, one_notebook_one_module, theory_exports_nothing, nobody_imports_theory, imports_go_down, no_orphans, ids, small,
         headings, no_errors_stored, no_star_imports, data_is_not_code, in_sync]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_this_repository_keeps(rule):
    assert list(rule(ROOT)) == []


# ---- every rule can fail ----

def notebook(path, *sources, **first):
    "Write a notebook whose code cells are `sources`; `first` overrides fields of the first one."
    blank = dict(cell_type="code", metadata={}, execution_count=None, outputs=[])
    made = [dict(blank, id=f"c{i}", source=text) for i, text in enumerate(sources)]
    made[0].update(first)
    made.append(dict(cell_type="markdown", metadata={}, id="exercises", source="## Exercises\n\n1. Add.\n2. Subtract.\n"))
    made += [dict(blank, id=f"exercise-{n}", source="assert 1 + 1 == 2") for n in (1, 2)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(dict(cells=made, metadata={}, nbformat=4, nbformat_minor=5)), encoding="utf-8")


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    "A sound repository of two lessons, a theory notebook and a tutorial."
    root = tmp_path_factory.mktemp("sound") / "source"
    notebook(root / "nbs" / "00_core.ipynb", "#| default_exp core", "#| export\ndef one(): return 1")
    notebook(root / "nbs" / "02_area.two.ipynb", "#| default_exp area.two",
             "#| export\ndef two():\n    from unify_rl.core import one\n    return one() + 1",
             "from unify_rl.area.two import two\n%timeit two()")
    notebook(root / "nbs" / "90_theory.ipynb", "from unify_rl.area.two import two")
    notebook(root / "tutorials" / "tour.ipynb", "import unify_rl")
    (root / LIB).mkdir()
    (root / LIB / "__init__.py").write_text('__version__ = "1.0"\n')
    shutil.copy(ROOT / "pyproject.toml", root)
    done = root.with_name("done")
    export(root, done)
    shutil.copytree(root / "tutorials", done / "tutorials")
    return done


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_a_sound_repository_passes(rule, sound): assert list(rule(sound)) == []


def lesson(name, *sources, **first): return lambda root: notebook(root / "nbs" / name, *sources, **first)


def module(name, text): return lambda root: (root / LIB / name).write_text(text, encoding="utf-8")


def core(text): return module("core.py", text)


def reworded(name, cell, text):
    "Another text for one cell of a lesson."
    def plant(root):
        path = root / "nbs" / name
        made = json.loads(path.read_text(encoding="utf-8"))
        for c in made["cells"]:
            if c["id"] == cell: c["source"] = text
        path.write_text(json.dumps(made), encoding="utf-8")
    return plant


FAULTS = [
    (exercises, reworded("02_area.two.ipynb", "exercises", "## Exercises\n\n1. Add.\n"), "two or three exercises, numbered from 1; found ['1']"),
    (exercises, reworded("02_area.two.ipynb", "exercises", "## The end"), "two or three exercises, numbered from 1; found []"),
    (exercises, reworded("90_theory.ipynb", "exercise-2", "1 + 1"), "90_theory.ipynb: exercise 2 has no check"),
    (exercises, reworded("90_theory.ipynb", "exercises", "## Exercises\n\n1. Add.\n2. Subtract.\n3. Think.\n"), "90_theory.ipynb: exercise 3 has no check"),
    (names_and_numbers, lesson("intro.ipynb", "1"), "intro.ipynb: not of the form"),
    (names_and_numbers, lesson("02_other.ipynb", "#| default_exp other"), "number 02 is taken by 02_area.two.ipynb"),
    (names_and_numbers, lesson("03_new.ipynb", "#| default_exp old"), "should be called 03_old.ipynb"),
    (one_notebook_one_module, lesson("03_core.ipynb", "#| default_exp core"), "core is exported by 00_core.ipynb, 03_core.ipynb"),
    (one_notebook_one_module, lesson("03_a.ipynb", "#| default_exp a", "#| default_exp b"), "more than one default_exp"),
    (one_notebook_one_module, lesson("03_a.ipynb", "#| default_exp a", "#| export core\nx = 1"), "a cell exports to core"),
    (theory_exports_nothing, lesson("91_theory.new.ipynb", "#| default_exp theory.new"), "91_theory.new.ipynb: a theory notebook must export nothing, but it says #| default_exp"),
    (theory_exports_nothing, lesson("91_theory.new.ipynb", "#| export\nx = 1"), "but it says #| export"),
    (theory_exports_nothing, lesson("91_theory.new.ipynb", "#| exporti\nx = 1"), "but it says #| export"),
    (theory_exports_nothing, lesson("91_theory.new.ipynb", "import nbdev; nbdev.nbdev_export()"), "but it calls nbdev_export"),
    (nobody_imports_theory, core("from unify_rl import theory"), "unify_rl/core.py: imports unify_rl.theory, a theory notebook"),
    (nobody_imports_theory, core("def f():\n    from .theory import x"), "unify_rl/core.py: imports unify_rl.theory, a theory notebook"),
    (nobody_imports_theory, lesson("02_area.two.ipynb", "import unify_rl.theory"), "nbs/02_area.two.ipynb: imports unify_rl.theory"),
    (nobody_imports_theory, lambda root: notebook(root / "tutorials" / "tour.ipynb", "from unify_rl.theory import x"), "tutorials/tour.ipynb: imports unify_rl.theory"),
    (imports_go_down, core("from unify_rl.area.two import two"), "imports unify_rl.area.two, which is exported by number 02"),
    (imports_go_down, core("def f():\n    import unify_rl.area.two as t\n"), "00_core.ipynb: imports unify_rl.area.two"),
    (imports_go_down, core("from unify_rl.area import two"), "00_core.ipynb: imports unify_rl.area.two"),
    (imports_go_down, core("from .area import two"), "00_core.ipynb: imports unify_rl.area.two"),
    (imports_go_down, core("m = importlib.import_module('unify_rl.area.two')"), "00_core.ipynb: imports unify_rl.area.two"),
    (imports_go_down, core("from unify_rl import load_policy"), "imports unify_rl.load_policy, which no notebook exports"),
    (imports_go_down, lesson("01_early.ipynb", "from unify_rl.area.two import two"), "01_early.ipynb: imports unify_rl.area.two"),
    (no_orphans, module("left_over.py", ""), "unify_rl/left_over.py: no notebook exports it"),
    (no_orphans, lesson("03_new.ipynb", "#| default_exp new", "#| export\nx = 1"), "unify_rl/new.py: not exported yet"),
    (ids, lesson("90_theory.ipynb", "1", id=None), "90_theory.ipynb: a cell without an id"),
    (ids, lesson("90_theory.ipynb", "1", "2", id="c1"), "id c1 occurs more than once"),
    (small, lesson("90_theory.ipynb", "#" * MAX_BYTES), "90_theory.ipynb: 200 KB"),
    (headings, lesson("90_theory.ipynb", "# # Title", cell_type="markdown"), "90_theory.ipynb: heading '# # Title'"),
    (no_errors_stored, lesson("90_theory.ipynb", "1/0", outputs=[dict(output_type="error")]), "cell c0 ended in an error"),
    (no_errors_stored, lesson("90_theory.ipynb", "warn()", outputs=[dict(output_type="stream", name="stderr", text="/a/b.py:3: FutureWarning")]), "cell c0 shows a warning"),
    (no_star_imports, core("from math import *"), "unify_rl/core.py:1: import *"),
    (data_is_not_code, core("import pickle"), "imports pickle"),
    (data_is_not_code, core("def f():\n    from pickle import loads"), "unify_rl/core.py:2: imports pickle"),
    (data_is_not_code, core("x = eval('1')"), "eval"),
    (data_is_not_code, core("exec('1')"), "exec"),
    (data_is_not_code, core("m = Auto.from_pretrained('x', trust_remote_code=True)"), "trust_remote_code=True"),
    (data_is_not_code, core("w = torch.load('x')"), "torch.load without weights_only=True"),
    (data_is_not_code, core("c = yaml.load('x', Loader)"), "yaml.load instead of yaml.safe_load"),
    (data_is_not_code, core("a = np.load('x', allow_pickle=True)"), "allow_pickle=True"),
    (in_sync, lambda root: (root / LIB / "core.py").open("a").write("# by hand\n"), "unify_rl/core.py: differs"),
    (in_sync, lambda root: (root / LIB / "_modidx.py").write_text("d = {}\n"), "unify_rl/_modidx.py: differs"),
]


@pytest.mark.parametrize("rule, plant, complaint", FAULTS, ids=[f"{rule.__name__}-{i}" for i, (rule, _, _) in enumerate(FAULTS)])
def test_a_planted_fault_is_found(rule, plant, complaint, sound, tmp_path):
    root = shutil.copytree(sound, tmp_path / "repo")
    plant(root)
    found = list(rule(root))
    assert any(complaint in one for one in found), found


SAFE = ["model.eval()", "torch.compile(model)", "torch.load('x', weights_only=True)", "yaml.safe_load('x')",
        "Auto.from_pretrained('x', trust_remote_code=allowed)"]


@pytest.mark.parametrize("text", SAFE)
def test_safe_code_is_left_alone(text, sound, tmp_path):
    root = shutil.copytree(sound, tmp_path / "repo")
    core(text)(root)
    assert list(data_is_not_code(root)) == []
