"""`python -m mla_retrofit.convert`: another name of the command `mla-retrofit`."""

import sys

from mla_retrofit.cli import main

if __name__ == "__main__":
    sys.exit(main())
