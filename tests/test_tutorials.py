"""Every notebook of tutorials/ runs from top to bottom in a fresh kernel, as Run All does in JupyterLab."""
from pathlib import Path

import pytest

TUTORIALS = Path(__file__).parents[1] / "tutorials"


@pytest.mark.parametrize("notebook", sorted(TUTORIALS.glob("*.ipynb")), ids=lambda path: path.stem)
def test_tutorial_runs(notebook):
    import nbformat
    from nbclient import NotebookClient
    here = {"metadata": {"path": str(TUTORIALS)}}
    NotebookClient(nbformat.read(notebook, 4), timeout=300, kernel_name="python3", resources=here).execute()
