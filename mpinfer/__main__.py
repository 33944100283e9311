"""`python -m mpinfer`."""

import sys

from mpinfer.cli import main

sys.exit(main())
