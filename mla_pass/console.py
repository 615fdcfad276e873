"""What the commands have in common: how a run that ends early is told, and with which exit code."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from mla_pass.errors import MlaPassError


def told(program: str, work: Callable[[], int]) -> int:
    """The exit code of `work`: 1 for a MlaPassError, told in one sentence on stderr; 130 for an interruption."""
    try:
        code = work()
        sys.stdout.flush()
    except MlaPassError as error:
        print(f"{program}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader, say `head`, has seen enough; keep the interpreter's own last flush quiet
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return code
