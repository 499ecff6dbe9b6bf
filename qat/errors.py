"""The ends of a run that are not a result and not a bug."""


class UserError(Exception):
    """A setting, file or machine the user can mend: one line naming it as typed, exit code 2."""

    exit_code = 2


class TrainingError(Exception):
    """Training went wrong by itself (it diverged): one line naming step or tensor, exit code 1."""

    exit_code = 1


class PreemptedError(Exception):
    """Asked to stop by SIGTERM: the checkpoint is written, another process may go on from it."""

    exit_code = 143  # 128 + SIGTERM, as shells say it
