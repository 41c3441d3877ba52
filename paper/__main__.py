"""Run a study of the paper: `python -m paper width`, in a checkout."""

import sys

from paper.cli import main

sys.exit(main())
