"""`python -m shardkit.cli`, for a checkout that is not installed."""

import sys

from ._main import main

sys.exit(main())
