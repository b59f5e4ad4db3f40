"""`python -m drift` is `drift`, such as for `torchrun --nproc-per-node 2 -m drift run CONFIG`."""

import sys

from drift.cli import main

sys.exit(main())
