"""`python -m turbos` is the `turbos` command."""

import sys

from turbos.cli.main import main

sys.exit(main())
