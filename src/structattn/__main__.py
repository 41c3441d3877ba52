"""`python -m structattn` is the command `structattn`."""

import sys

from structattn.cli import main

sys.exit(main())
