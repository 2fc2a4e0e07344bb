"""python -m xkv.lmcache ARGUMENTS: `lmcache ARGUMENTS`, which then knows the serde "xkv"."""
from __future__ import annotations

import sys

from lmcache.cli.main import main

from . import serde  # noqa: F401

if __name__ == "__main__":
    sys.argv[0] = "lmcache"
    sys.exit(main())
