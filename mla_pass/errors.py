"""The one exception this project raises for anything its user can put right."""


class MlaPassError(Exception):
    """Bad input or a missing piece, told in one sentence: what was found, what was expected, what to do.

    The command line prints the message and exits with 1; a library caller catches this class. Anything else that
    escapes is a bug in mla_pass.
    """


class BudgetTooSmall(MlaPassError):
    """A budget that holds no latent at all."""


class LossUnreachable(MlaPassError):
    """A largest loss that no cache keeps within, whatever its size."""


class Unsupported(MlaPassError):
    """Right in itself, but nothing that this machine's kernels compute: whoever has another way may take it."""
