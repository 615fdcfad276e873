"""`python -m mla_pass` is the `mla-pass` command."""

from mla_pass.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
