"""What tells the volumes of one series apart: echoes, b-values, times, magnitude and phase; and what each is called."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Frame:
    """A frame of a stack.

    Attributes:
        position: the running number of its position.
        traits: what its header says of it beside its place.
        slot: the number of its instance, and its own number in that instance.
    """

    position: int
    traits: dict[str, Any]
    slot: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Parted:
    """The frames of a stack, by volume.

    Attributes:
        volumes: the frames of each volume by its name, at most one per position; a single volume has an empty name.
        extra: frames at a position that is taken, each with the frame that has it: copies, or a contradiction.
        by_number: whether nothing but InstanceNumber tells some of the volumes apart.
    """

    volumes: dict[str, list[Frame]]
    extra: tuple[tuple[Frame, Frame], ...] = ()
    by_number: bool = False


# What is tried, in this order, and whether the rank among the frames at one position counts in place of the value.
# What says what an image is comes before what says when it was taken; InstanceNumber says least.
_TRAITS: tuple[tuple[str, bool], ...] = (
    *((name, False) for name in ("b", "direction", "kind", "echo_time", "echo", "inversion_time", "flip_angle")),
    *((name, False) for name in ("contrast", "time", "frame_time", "trigger")),
    ("trigger", True),
    ("time of acquisition", False),
    ("time of acquisition", True),
    ("acquisition", False),
    *((f"index {axis}", False) for axis in range(1, 9)),
    ("number", True),
)

_KINDS = {
    "magnitude image": ("M", "MAGNITUDE"),
    "phase image": ("P", "PHASE", "PHASE MAP"),
    "real image": ("R", "REAL"),
    "imaginary image": ("I", "IMAGINARY"),
    "water image": ("W", "WATER"),
    "fat image": ("F", "FAT"),
    "in-phase image": ("IP", "IN_PHASE", "IN PHASE"),
    "opposed-phase image": ("OP", "OPP_PHASE", "OUT_PHASE", "OPP PHASE", "OUT PHASE"),
}
_KIND_OF = {value: name for name, values in _KINDS.items() for value in values}


@dataclass(frozen=True, slots=True)
class _Group:
    order: tuple[Any, ...]
    words: tuple[str, ...]
    frames: list[Frame]


def part(frames: Sequence[Frame]) -> Parted:
    """Part the frames of a stack into volumes.

    A trait tells volumes apart where it differs at one and the same position, and where some position has a frame of
    each of its values: the acquisition time of a CT differs from slice to slice and tells nothing. Of times that do,
    the rank at each position counts, where all positions have the same number of frames.

    Example:
        >>> frames = [Frame(z, {"echo_time": te}, (10 * e + z, 0)) for e, te in enumerate((2.5, 4.9)) for z in range(3)]
        >>> {name: [frame.slot[0] for frame in volume] for name, volume in part(frames).volumes.items()}
        {'echo 1 (TE 2.5 ms)': [0, 1, 2], 'echo 2 (TE 4.9 ms)': [10, 11, 12]}
    """
    groups = [_Group((), (), list(frames))]
    by_number = False
    for name, ranked in _TRAITS:
        before = len(groups)
        groups = [smaller for group in groups for smaller in _split(group, name, ranked)]
        by_number = name == "number" and len(groups) > before
    volumes: dict[str, list[Frame]] = {}
    extra: list[tuple[Frame, Frame]] = []
    for group in sorted(groups, key=lambda group: group.order):
        first: dict[int, Frame] = {}
        for frame in sorted(group.frames, key=_by_number):
            if frame.position in first:
                extra.append((frame, first[frame.position]))
            else:
                first[frame.position] = frame
        name = ", ".join(group.words).replace(";", ",")
        while name in volumes:
            name += " (another)"
        volumes[name] = [first[position] for position in sorted(first)]
    return Parted(volumes, tuple(extra), by_number)


def _split(group: _Group, name: str, ranked: bool) -> list[_Group]:
    """Split a group by a trait, if that tells volumes apart."""
    at: dict[int, list[Frame]] = defaultdict(list)
    for frame in group.frames:
        at[frame.position].append(frame)
    most = max(len(here) for here in at.values())
    if most == 1:
        return [group]
    parts: dict[Any, list[Frame]] = defaultdict(list)
    if ranked:
        for here in at.values():
            values: list[Any] = [_by_number(frame) if name == "number" else frame.traits.get(name) for frame in here]
            if len(here) != most or None in values or len(set(values)) < most:
                return [group]
            ordered = sorted(zip(values, here, strict=True), key=lambda pair: pair[0])
            for rank, (_, frame) in enumerate(ordered, start=1):
                parts[rank].append(frame)
    else:
        for frame in group.frames:
            parts[frame.traits.get(name)].append(frame)
        seen_together = max(len({frame.traits.get(name) for frame in here}) for here in at.values())
        if len(parts) == 1 or seen_together < len(parts):
            return [group]
    distinct = sorted(parts, key=lambda value: _order(name, value, parts[value]))
    words = _words(name, ranked, distinct, parts)
    return [
        _Group((*group.order, rank), (*group.words, word), parts[value])
        for rank, (value, word) in enumerate(zip(distinct, words, strict=True))
    ]


def _by_number(frame: Frame) -> tuple[Any, ...]:
    return (frame.traits.get("number", 0), *frame.slot)


def _order(name: str, value: Any, frames: list[Frame]) -> tuple[Any, ...]:
    """Return what the values of a trait are sorted by."""
    if name == "direction":
        return (value is not None, min(map(_by_number, frames)))
    if name == "kind":
        return (not {"M", "MAGNITUDE"} & set(str(value).split("\\")), str(value))
    return (value is not None, 0 if value is None else value)


def _words(name: str, ranked: bool, values: list[Any], parts: dict[Any, list[Frame]]) -> list[str]:
    """Return what the name of a volume says of a trait, for each of its values."""
    if name == "kind":
        return _kinds([str(value or "") for value in values])
    words = []
    for rank, value in enumerate(values, start=1):
        if value is None:
            kinds = {str(frame.traits.get("kind", "")) for frame in parts[None]}
            others = {str(f.traits.get("kind", "")) for other in values if other is not None for f in parts[other]}
            alone = len(kinds) == 1 and not kinds & others and name == "b"
            words.append(_kinds([kinds.pop(), *sorted(others)])[0] if alone else f"without {name.replace('_', ' ')}")
        elif name == "b":
            words.append(f"b={value:g}")
        elif name == "direction":
            words.append(f"direction {rank - (values[0] is None)}")
        elif name == "echo_time":
            words.append(f"echo {rank - (values[0] is None)} (TE {value:g} ms)")
        elif name == "inversion_time":
            words.append(f"TI {value:g} ms")
        elif name == "flip_angle":
            words.append(f"flip angle {value:g}°")
        elif name == "contrast":
            words.append(str(value).lower())
        elif name == "trigger":
            words.append(f"trigger {rank}" if ranked else f"trigger {rank} ({value:g} ms)")
        elif name in ("time of acquisition", "frame_time"):
            words.append(f"time {rank}")
        elif name == "number":
            words.append(f"volume {rank}")
        elif name.startswith("index"):
            words.append(f"{name}: {value}")
        else:  # echo, time, acquisition
            words.append(f"{name} {value}")
    return words


def _kinds(kinds: list[str]) -> list[str]:
    """Return a word for each ImageType, from the values that the others do not have."""
    values = [dict.fromkeys(kind.split("\\")) for kind in kinds]
    common = set.intersection(*(set(these) for these in values))
    words = [
        " ".join(dict.fromkeys(_KIND_OF.get(value, value) for value in these if value and value not in common))
        for these in values
    ]
    words = [word or "plain image" for word in words]
    return words if len(set(words)) == len(words) else [kind.replace("\\", " ") for kind in kinds]
