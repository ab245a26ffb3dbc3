"""One thing that the check of a dataset found."""

from dataclasses import dataclass

ERROR = "error"
WARNING = "warning"


@dataclass(frozen=True, order=True)
class Problem:
    """Something wrong with a dataset, or odd enough to look at.

    Attributes:
        case: the case, or the file where it is not one case's.
        what: what was found, and what was expected.
        advice: what to do.
        topic: what it is about, in a word: ``files``, ``grid``, ``values``, ``label``, ``class``, ``HU``, ``SUV``,
            ``alignment``, ``position``, ``outlier``, ``duplicate``, ``split``, ``balance`` or ``slices``.
        severity: ``error``: a training with it is spoiled; ``warning``: a person should look at it, and may find it
            right.
    """

    case: str
    what: str
    advice: str
    topic: str
    severity: str = ERROR

    def __str__(self) -> str:
        return f"{self.case}: {self.what}; {self.advice}"
