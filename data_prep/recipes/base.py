"""What every recipe is: a selection of cases, a way to make one, and the options that a user may set."""

import dataclasses
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from medseg.errors import ConfigError

if TYPE_CHECKING:
    from monai.data import MetaTensor


@dataclass(frozen=True)
class Case:
    """One case to be made.

    Attributes:
        name: what the source calls it. It becomes the case's name, as a pseudonym unless identifiers are kept; a
            patient with one case has the patient's identifier here too.
        patient: the patient's identifier.
        sources: every file that the result depends on, by its part (``CT``, ``label``, …), in the order that matters.
        problem: why it cannot be made, where that is known already.
        detail: what else :meth:`Recipe.make` needs (it must survive pickling).
    """

    name: str
    patient: str
    sources: Mapping[str, tuple[Path, ...]]
    problem: str = ""
    detail: Any = None

    @property
    def files(self) -> list[Path]:
        """All files of the case."""
        return [file for files in self.sources.values() for file in files]


@dataclass(frozen=True)
class Unpaired:
    """Files that look like part of a case and found no partner."""

    files: tuple[Path, ...]
    why: str


@dataclass(frozen=True)
class Selection:
    """What a recipe found in a source: the cases, what was left over, and what a person should know of it."""

    cases: list[Case]
    unpaired: list[Unpaired] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Plan:
    """What all cases of one build have in common.

    Attributes:
        channel_names: in nnU-Net's words (``CT``).
        labels: of a segmentation, value by name; background is 0, the others are 1 to n-1.
        remapped: value in the source (as text) to value in the dataset, where labels were renumbered.
        classes: of a classification, value by name, 0 to n-1; there are then no labels.
    """

    channel_names: tuple[str, ...]
    labels: dict[str, int] = field(default_factory=dict)
    remapped: dict[str, int] = field(default_factory=dict)
    classes: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Sample:
    """One case as made.

    Attributes:
        image: [channel, x, y, z], float32, RAS mm affine; a picture is one slice, x × y × 1.
        label: of a segmentation, [1, x, y, z] on the same grid.
        columns: what cases.csv shall say of it besides shape, spacing, volumes and hashes. ``lesion`` and ``position``
            stand in the lists of dataset.json too.
        target: of a classification, a name of the plan's classes.
        attachments: further files of the case by name (``T1_to_FLAIR.tfm``, ``position.png``); they become
            ``attachments/CASE_name``, and report.html shows those that are PNG pictures.
    """

    image: "MetaTensor"
    label: "MetaTensor | None" = None
    columns: dict[str, str] = field(default_factory=dict)
    target: str | None = None
    attachments: dict[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True)
class Origin:
    """Where a public dataset comes from.

    Attributes:
        address: its web page.
        license: as its publisher states it.
        citation: the paper to cite.
        by_hand: how to get it, where `data_prep fetch` cannot.
    """

    address: str
    license: str
    citation: str = ""
    by_hand: str = ""


@dataclass(frozen=True)
class NoOptions:
    """Options of a recipe that has none of its own."""


class Recipe(ABC):
    """How a source becomes a dataset.

    A recipe is a short class: its ``Options`` (a frozen dataclass whose fields are made with :func:`option`, and which
    the command line shows as they are), :meth:`select`, :meth:`make`, and, where the cases must be looked at together
    before one can be made, :meth:`survey` and :meth:`plan`.

    Args:
        options: an instance of ``Options``.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    #: What a source must hold at least, for the message that it does not.
    needs: ClassVar[str]
    #: ``segmentation`` or ``classification``.
    makes: ClassVar[str] = "segmentation"
    Options: ClassVar[type] = NoOptions
    #: Whether the source is public and its identifiers are: then cases and patients keep them. The names, folders and
    #: headers of any other source may tell who the patient is, and are never shown.
    public: ClassVar[bool] = False
    #: Where the source of a public recipe comes from.
    origin: ClassVar[Origin | None] = None
    #: Of a recipe that a user wrote: the hash of its file's content.
    file_sha256: ClassVar[str] = ""

    def __init__(self, options: Any = None) -> None:
        self.options: Any = self.Options() if options is None else options
        #: How many files :meth:`select` may look at at once, and what it may tell how many it has seen.
        self.jobs = 1
        self.progress: Callable[[int], None] | None = None

    def describe(self) -> dict[str, Any]:
        """What the manifest records of the recipe: its options, and the hash of the file that a user wrote."""
        return dataclasses.asdict(self.options) | ({"file_sha256": self.file_sha256} if self.file_sha256 else {})

    @abstractmethod
    def select(self, source: Path) -> Selection:
        """Find the cases in a source.

        Raises:
            DatasetError: the source is not what the recipe reads.
        """

    def survey(self, case: Case) -> Any:
        """Look at one case before any is made; what is returned must be JSON."""
        return None

    @abstractmethod
    def plan(self, surveys: Mapping[str, Any]) -> Plan:
        """Settle what all cases have in common, given what :meth:`survey` said of each (by name)."""

    @abstractmethod
    def make(self, case: Case, plan: Plan) -> Sample:
        """Make one case.

        Raises:
            MedsegError: it cannot be made; the message becomes the case's line among the failures.
        """

    def audit(self, columns: Mapping[str, Mapping[str, str]]) -> list[str]:
        """What a person should know of the finished dataset, given the row of cases.csv of each case."""
        return []

    def identifiers(self, case: Case) -> set[str]:
        """Words of the source that tell who the patient is; they are masked in every message."""
        return {case.patient, case.name}


def option(flag: str, default: Any, help_text: str, **click_arguments: Any) -> Any:
    """Declare a field of a recipe's options, and with it the option of the command line.

    Args:
        flag: as a user types it (``--roi``).
        default: the value when it is not given.
        help_text: one sentence for ``--help``.
        click_arguments: what ``click.option`` needs besides (``multiple=True``, ``nargs=3``, ``type=…``).
    """
    return field(default=default, metadata={"flag": flag, "help": help_text, "click": click_arguments})


def check_pattern(flag: str, pattern: str) -> None:
    """Refuse what is no regular expression with a group.

    Raises:
        ConfigError: the pattern cannot be read, or has no group; the message names ``flag``.

    Example:
        >>> check_pattern("--patient-pattern", "p[0-9]+")
        Traceback (most recent call last):
        medseg.errors.ConfigError: --patient-pattern: 'p[0-9]+' has no group, e.g. '(.+)_scan'
    """
    try:
        groups = re.compile(pattern).groups
    except re.error as error:
        raise ConfigError(f"{flag}: {pattern!r} is no pattern ({error})") from None
    if groups < 1:
        raise ConfigError(f"{flag}: {pattern!r} has no group, e.g. '(.+)_scan'")
