"""Put this folder on PYTHONPATH and every Python process starts with `import unify_rl` (see nbs/09_compat.ipynb)."""
import unify_rl
