"""`python -m diffmf_model`, and `torchrun -m diffmf_model` for training on several processes."""

import sys

from .cli import main

sys.exit(main())
