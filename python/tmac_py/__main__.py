"""``python -m tmac_py`` is ``tmac``."""

import sys

from tmac_py.cli.main import main

sys.exit(main())
