"""Run the command `structattn` by `python -m structattn`."""

import sys

from structattn.cli import main

sys.exit(main())
