"""The ends of a run that are not a result and not a bug."""

import errno
from signal import Signals

NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # says a file system that knows no flock


def of_system(error: OSError) -> str:
    """What the disk or the system did not do, in a line: the file, if it was named, and why."""
    name = f"{error.filename}: " if error.filename else ""
    return f"{name}{error.strerror or error}"


class UserError(Exception):
    """A setting, file or machine the user can mend: one line naming it as typed, exit code 2."""

    exit_code = 2


class TrainingError(Exception):
    """Training went wrong by itself (it diverged): one line naming step or tensor, exit code 1."""

    exit_code = 1


class PreemptedError(BaseException):
    """Asked to stop by a signal; another process may go on. Like KeyboardInterrupt no Exception, so
    that nobody on the way takes it for a failure of his own and starts the next thing."""

    def __init__(self, signum: int, when: str = "") -> None:
        super().__init__(f"stopped {when}" if when else f"stopped by {Signals(signum).name}")
        self.exit_code = 128 + signum  # as shells say it
