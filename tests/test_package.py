"""What `import unify_rl` promises: quick, light, and the few names at the top."""
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HEAVY = {"torch", "numpy", "transformers", "accelerate", "matplotlib", "pandas", "rich", "torchvision", "fastcore"}


def python(*args):
    done = subprocess.run([sys.executable, *args], cwd=ROOT / "tests", capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def test_import_is_quick_and_light():
    done = python("-X", "importtime", "-c", "import unify_rl, sys; print(*sys.modules)")
    spent = {name.strip(): int(us) for us, name in re.findall(r"import time: +\d+ \| +(\d+) \|( *\S+)$", done.stderr, re.M)}
    assert spent["unify_rl"] < 1_000_000, f"{spent['unify_rl']} us"
    assert not HEAVY & set(done.stdout.split())


def test_version_is_the_same_everywhere():
    import unify_rl
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert metadata.version("unify_rl") == unify_rl.__version__
    assert re.search(r"^version: (.+)$", citation, re.M)[1] == unify_rl.__version__
    assert f"## [{unify_rl.__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_unknown_names_are_attribute_errors():
    import unify_rl
    with pytest.raises(AttributeError, match="has no attribute 'trian'"): unify_rl.trian
    assert {"train", "Run", "load_policy", "__version__"} <= set(dir(unify_rl))


def test_names_at_the_top_stay_callable_whatever_was_imported():
    "A subpackage of the same name takes a top-level name's place as soon as something imports it."
    python("-c", """
import importlib, pkgutil, unify_rl
for module in pkgutil.walk_packages(unify_rl.__path__, "unify_rl."):
    if not any(n in module.name for n in ("compat_site", "__main__")): importlib.import_module(module.name)
for name in ("train", "Run", "load_policy"): assert callable(getattr(unify_rl, name)), name
""")


def test_the_train_package_is_also_the_verb():
    "`unify_rl.train(...)` is `unify_rl.run.train(...)`, and `unify_rl.train.loop` is still a module."
    python("-c", """
import sys, types
run = sys.modules["unify_rl.run"] = types.ModuleType("unify_rl.run")
run.train = lambda *args, **kwargs: (args, kwargs)
import unify_rl
assert unify_rl.train("grpo", steps=20) == (("grpo",), {"steps": 20})
assert unify_rl.train.__path__
""")
