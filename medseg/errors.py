"""The errors that medseg raises on purpose.

Every message is one line that says which file or key, what was found, what was expected, and what to do.
The commands print that line and exit with status 1; a traceback is shown only with ``--debug``.
"""


class MedsegError(Exception):
    """Base of all errors that medseg raises on purpose."""


class ReadError(MedsegError):
    """A file cannot be read as what it claims to be."""


class MissingTagError(ReadError):
    """A DICOM attribute that the result depends on is absent or unusable."""


class GeometryError(MedsegError):
    """Positions, orientations, spacings or grids that do not fit together."""


class DatasetError(MedsegError):
    """A dataset folder that is incomplete or contradicts itself."""


class LeakageError(DatasetError):
    """A patient who would be in more than one part of a split."""


class ConfigError(MedsegError):
    """A configuration key or value that nothing answers to."""


class CheckpointError(MedsegError):
    """A file that is not the checkpoint it was taken for."""


class TrainingError(MedsegError):
    """A training that cannot go on, such as one whose loss is no longer a number."""


def own_error(error: BaseException | None) -> MedsegError | None:
    """Return medseg's own error among the causes of `error`, or None.

    MONAI wraps whatever goes wrong while it evaluates a config into errors that name the expression, not the cause.

    Example:
        >>> own_error(ValueError("not ours")) is None
        True
    """
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, MedsegError):
            return error
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return None
