"""Run every notebook of nbs/ and tutorials/ in a fresh process each, several at a time; say how long it took and which were slowest.

    python tests/run_notebooks.py                          # all of them, two at a time
    python tests/run_notebooks.py nbs/00_core.ipynb        # some
    python tests/run_notebooks.py --jobs 4 --flags slow    # with the cells that are marked `#| slow`

A notebook of nbs/ runs as `nbdev-test` runs it: export directives, skipped cells and all. One of tutorials/ runs as Run All does in JupyterLab,
in its own folder and with a kernel of its own. Nothing is written back. Exits with 1 if one failed, after all have run.
"""
import argparse
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[1]
SLOWEST = 5
TUTORIAL = """
import sys, nbformat
from pathlib import Path
from nbclient import NotebookClient
path = Path(sys.argv[1])
NotebookClient(nbformat.read(path, 4), timeout=None, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}}).execute()
"""


def notebooks(root: Path = ROOT) -> list[Path]:
    "All of them, lessons first."
    return [path for folder in ("nbs", "tutorials") for path in sorted((root / folder).glob("*.ipynb"))]


def command(path: Path, flags: str) -> list[str]:
    "What runs one notebook in a process of its own."
    if path.parent.name == "tutorials": return [sys.executable, "-c", TUTORIAL, str(path)]
    return [str(Path(sys.executable).with_name("nbdev-test")), str(path), "--do-print", *(["--flags", flags] if flags else [])]      # the script: called otherwise it runs all


def run(path: Path, flags: str = "", timeout: float = 600) -> tuple[float, str]:
    "Seconds, and what was said if it failed ('' if it did not)."
    start = time.monotonic()
    env = os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"), "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))}
    try: done = subprocess.run(command(path, flags), cwd=path.parent.parent, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=timeout)
    except subprocess.TimeoutExpired as e: return time.monotonic() - start, f"not done after {timeout:.0f} s\n{(e.stdout or b'')[-2000:]!r}"
    return time.monotonic() - start, "" if done.returncode == 0 else done.stdout[-6000:] or f"exit status {done.returncode}"


def report(spent: dict, failed: dict, wall: float) -> str:
    "Total, the slowest, and what failed."
    slow = sorted(spent, key=spent.get, reverse=True)[:SLOWEST]
    lines = [f"{len(spent)} notebooks, {wall:.0f} s ({sum(spent.values()):.0f} s added up). The slowest {len(slow)}:"]
    lines += [f"  {spent[path]:6.1f} s  {path}" for path in slow]
    return "\n".join(lines + [f"FAILED: {path}" for path in failed])


def main(arguments: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("notebooks", nargs="*", type=Path, help="some of them; none: all")
    p.add_argument("--jobs", type=int, default=2, help="at a time")
    p.add_argument("--flags", default="", help="run cells with this flag too, e.g. slow")
    p.add_argument("--timeout", type=float, default=600, help="seconds for one notebook")
    a = p.parse_args(arguments)
    paths, start, spent, failed = [path.resolve() for path in a.notebooks] or notebooks(), time.monotonic(), {}, {}
    def one(path):
        name = f"{path.parent.name}/{path.name}"
        spent[name], said = run(path, a.flags, a.timeout)
        print(f"{'FAILED' if said else 'ok':6} {spent[name]:6.1f} s  {name}", flush=True)
        if said: failed[name] = said; print(said, flush=True)
    with ThreadPoolExecutor(a.jobs) as pool: list(pool.map(one, paths))
    print(report(spent, failed, time.monotonic() - start))
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
