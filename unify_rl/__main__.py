"`python -m unify_rl` is the command `unify_rl`; torchrun starts its processes so."
import sys

from .cli import main

sys.exit(main())
