"""The torchvision cure (nbs/09_compat.ipynb), each time in a fresh process: on the real package and on fakes of both kinds."""
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
REGISTER = """
import torch
from . import extension
for name in ("nms", "qnms"): torch.library.register_fake(f"torchvision::{name}", lambda dets, scores, iou_threshold: dets)
"""
BROKEN = "import torch\n"
HEALTHY = """
import torch
library = torch.library.Library("torchvision", "DEF")
for name in ("nms", "qnms"): library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
library.impl("nms", lambda dets, scores, iou_threshold: scores.argsort(descending=True), "CPU")
"""
HEALTHY_WITHOUT_QNMS = HEALTHY.replace('("nms", "qnms")', '("nms",)')


def python(code, path=(), *args):
    "Run `code` in a fresh interpreter with the folders `path` in front of the installed packages."
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path)), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *(args or ("-c", code))]
    return subprocess.run(command, env=env, cwd=ROOT / "tests", capture_output=True, text=True, timeout=300)


def ok(done):
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip()


def fake(folder, extension, register=REGISTER):
    "A torchvision that is nothing but the steps of its import that matter here."
    package = folder / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text("from . import extension\nfrom . import registrations\n")
    (package / "extension.py").write_text(extension)
    (package / "registrations.py").write_text(register)
    return folder


@pytest.fixture(scope="module")
def torchvision_is_broken():
    "Does the installed torchvision fail to import here when left alone?"
    done = python("import torchvision")
    if done.returncode and "torchvision::nms does not exist" not in done.stderr:
        pytest.fail(f"torchvision fails for another reason:\n{done.stderr[-2000:]}")
    return done.returncode != 0


def test_the_installed_stack_works(torchvision_is_broken):
    done = python("""
import unify_rl, sys
assert "torch" not in sys.modules and "torchvision" not in sys.modules
import torchvision
from torchvision.transforms import v2
import numpy as np, open_clip, timm, torch, transformers
picture = np.zeros((20, 30, 3), np.uint8)
assert v2.functional.resize(torch.zeros(3, 8, 8), [4, 4]).shape == (3, 4, 4)
for name in ("SiglipImageProcessor", "CLIPImageProcessor", "JanusImageProcessor"):
    pixels = getattr(transformers, name)()(picture, return_tensors="pt")["pixel_values"]
    assert pixels.shape[:2] == (1, 3) and pixels.isfinite().all(), name
preprocess = open_clip.image_transform(16, is_train=False)
assert callable(preprocess) and timm.create_model("vit_tiny_patch16_224", img_size=32).num_classes == 1000
print(hasattr(torchvision.extension, "declared_by_unify_rl"))
""")
    assert ok(done) == str(torchvision_is_broken)   # declared where it is broken, untouched where it is healthy


def test_without_the_cure_it_fails_and_after_a_failure_it_can_be_cured(torchvision_is_broken):
    if not torchvision_is_broken: pytest.skip("this torchvision matches this torch: nothing to cure")
    done = python("""
try: import torchvision
except RuntimeError as e: print("failed:", e)
import unify_rl
import torchvision
from torchvision.transforms import v2
try: torchvision.ops.nms(*map(__import__("torch").zeros, [(1, 4), (1,)]), 0.5)
except RuntimeError as e: print("honest:", e)
""")
    failed, honest = ok(done).splitlines()
    assert failed == "failed: operator torchvision::nms does not exist" and "Couldn't load custom C++ ops" in honest


def test_the_broken_fake_fails_as_the_real_one_does(tmp_path):
    assert "operator torchvision::nms does not exist" in python("import torchvision", [fake(tmp_path, BROKEN)]).stderr


@pytest.mark.parametrize("before", ["import unify_rl", "import unify_rl, importlib; importlib.reload(unify_rl.compat).install()"])
def test_a_broken_build_is_cured(tmp_path, before):
    path = [fake(tmp_path, BROKEN)]
    code = f"{before}; import gc, torchvision, torch; gc.collect(); print(torch.ops.torchvision.nms, torch.ops.torchvision.qnms)"
    assert ok(python(code, path)) == "torchvision.nms torchvision.qnms"


@pytest.mark.parametrize("extension", [HEALTHY, HEALTHY_WITHOUT_QNMS])
def test_a_healthy_build_is_left_alone(tmp_path, extension):
    "Its own `define` would fail if ours came first; its own kernel must be the one that answers; nothing is added."
    path = [fake(tmp_path, extension, register="")]
    done = python("""
import unify_rl, torchvision, torch
assert torchvision.__file__.startswith(__import__("os").environ["PYTHONPATH"])
print(torch.ops.torchvision.nms(torch.zeros(2, 4), torch.tensor([1., 2.]), 0.5).tolist())
print(hasattr(torchvision.extension, "declared_by_unify_rl"), hasattr(torch.ops.torchvision, "qnms"))
""", path)
    assert ok(done) == f"[1, 0]\nFalse {extension == HEALTHY}"


def test_an_error_inside_torchvision_is_passed_on(tmp_path):
    "A mismatch that torchvision itself reports (two CUDA versions) must reach the user as it is."
    path = [fake(tmp_path, "raise RuntimeError('compiled with different CUDA major versions')")]
    done = python("import unify_rl, torchvision", path)
    assert done.returncode == 1 and done.stderr.strip().endswith("RuntimeError: compiled with different CUDA major versions")


def test_a_missing_torchvision_is_a_plain_import_error(tmp_path):
    code = "import sys, unify_rl; sys.path = [p for p in sys.path if 'site-packages' not in p]; import torchvision.extension"
    assert "No module named 'torchvision'" in python(code).stderr


def test_bare_launchers_are_cured_by_the_site_folder():
    site = ROOT / "unify_rl" / "compat_site"
    assert "usage" in ok(python("", [site], "-m", "accelerate.commands.accelerate_cli", "launch", "--help"))
