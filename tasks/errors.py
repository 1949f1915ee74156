"""The errors a person can act on, sorted by who is to blame.

Every message says what is wrong, where, and what to do next. The command line prints it as
`error: ...` and exits 1; anything that is not a `PipelineError` is a bug and keeps its traceback.
"""

import errno


class PipelineError(Exception):
    """Root of the errors that are reported without a traceback."""


class ConfigError(PipelineError):
    """The parameters, the command line or the data are wrong. Never retried."""


class ArtifactError(PipelineError):
    """A file or folder that a stage reads is missing, damaged or not what it claims. Never retried."""


class StageError(PipelineError):
    """The work itself failed (disk, memory, network, a native library). May be retried."""


class BrokenRuntimeError(StageError):
    """A native library crashed or computes wrongly on this machine. Not retried: it would do so again."""


class DiskFullError(StageError):
    """No room. Not retried: waiting makes none, and each attempt costs the work that led there."""


QUOTED = 200  # letters of what a file or another library said


def brief(said: object) -> str:
    """What a file or another library said, on one line and no longer than a person reads."""
    text = " ".join(str(said)[: 4 * QUOTED].split())
    return text if len(text) <= QUOTED else f"{text[: QUOTED - 3]}..."


DISK: dict[int | None, tuple[type[PipelineError], str]] = {
    errno.ENOSPC: (DiskFullError, "make room on that disk"),
    errno.EDQUOT: (DiskFullError, "make room within your quota"),
    errno.EROFS: (ConfigError, "work on a disk that is not read-only"),
    errno.EACCES: (ConfigError, "make it yours (`chown`), or work where you may"),
    errno.EPERM: (ConfigError, "make it yours (`chown`), or work where you may"),
}


def of_disk(error: OSError) -> PipelineError | None:
    """The error for a disk that does not give or take a file, whichever file is the first to meet it; None for others."""
    if error.errno not in DISK:
        return None
    family, advice = DISK[error.errno]
    return family(f"{error.filename or 'a file'} cannot be used ({error.strerror}): {advice}, then run it again")
