"""The grids that the frames of a DICOM series form, by where they lie and not by how their files are called.

The geometry is that of DICOM PS3.3 C.7.6.2 (Image Plane) and, for enhanced multi-frame objects, C.7.6.16 (functional
groups). What does not form one regular volume is mended on request or refused with the reason; nothing is stretched or
left out quietly. The page "DICOM geometry" of the documentation explains the rules.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np

from ..errors import ConfigError, GeometryError
from .dicom_header import Instance, Plane, place_of
from .dicom_volumes import Frame, Parted, part

# The number of an instance, and the number of a frame in it.
Slot = tuple[int, int]

TILT = ("correct", "keep", "refuse")
GAPS = ("refuse", "interpolate")

# Slices may lie this far (mm) off the line of the others before it counts as tilt.
_SIDEWAYS = 0.1
# Resampling never makes more than this many times the voxels that were stored.
_GROWTH = 4
# Values of ImageType that say that an image only shows where others lie.
_SCOUTS = frozenset({"LOCALIZER", "SCOUT", "SURVEY", "SURVIEW", "REF_SURVIEW", "TOPOGRAM"})


@dataclass(frozen=True, eq=False)
class Stack:
    """The frames of a series that may lie on one grid: of one size, spacing and orientation.

    Attributes:
        name: ``"axial"``, ``"sagittal 2"``, ``"localizer coronal"``, ``"without position"``; empty where a series has
            one stack only.
        slots: its frames.
        aside: why it is set apart from the image of the series (a localizer, a picture without position), or nothing.
    """

    name: str
    slots: tuple[Slot, ...]
    aside: str = ""


@dataclass(frozen=True, eq=False)
class Grid:
    """The regular grid that frames of a series form.

    Attributes:
        shape: columns, rows, slices.
        affine: 4 × 4, voxel index (column, row, slice) to RAS millimetres; slices ascend along the normal.
        volumes: by the name of each volume the frames of its stored slices, in the order of their position.
        has_geometry: False for a single picture without position.
        samples: 3 for color, else 1.
        copies: frames that are left out if their pixels equal those of the frame beside them.
        by_number: nothing but InstanceNumber tells the volumes apart.
        shifts: [stored slices, 2], where the first pixel of each stored slice comes to lie (column, row); None where
            all stay where they are.
        sources: for each slice of the grid the two stored slices between which it lies and the weight of the second;
            None where they are the stored slices.
        mended: what reading changes, one line each.
        notes: what else a careful reader should know, one line each.
    """

    shape: tuple[int, int, int]
    affine: np.ndarray
    volumes: dict[str, tuple[Slot, ...]]
    has_geometry: bool = True
    samples: int = 1
    copies: tuple[tuple[Slot, Slot], ...] = ()
    by_number: bool = False
    shifts: np.ndarray | None = None
    sources: tuple[tuple[int, int, float], ...] | None = None
    mended: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def order(self) -> tuple[Slot, ...]:
        """The frames of all volumes, one volume after the other."""
        return tuple(slot for slots in self.volumes.values() for slot in slots)


def assemble(instances: Sequence[Instance], *, tilt: str = "correct", gaps: str = "refuse", stack: str = "") -> Grid:
    """Find the one grid of a series from the positions of its frames.

    The slices are ordered along the normal of ImageOrientationPatient (row direction × column direction). File names
    and InstanceNumber play no part, unless nothing else tells volumes apart.

    Args:
        instances: the headers of the series.
        tilt: ``"correct"``, ``"keep"`` or ``"refuse"``, see `read_image`.
        gaps: ``"refuse"`` or ``"interpolate"``.
        stack: the name of the stack to take where the series has several.

    Raises:
        GeometryError: the frames do not form one grid; the message says why.
    """
    chosen, notes = choose(instances, stacks_of(instances), stack)
    grid = grid_of(instances, chosen, tilt=tilt, gaps=gaps)
    return replace(grid, mended=(*notes, *grid.mended))


def choose(instances: Sequence[Instance], stacks: Sequence[Stack], wanted: str = "") -> tuple[Stack, tuple[str, ...]]:
    """Return the stack that is the image of a series, and what is set apart from it.

    Raises:
        GeometryError: there are several.
    """
    left = [stack for stack in stacks if stack.name == wanted] if wanted else []
    left = left or [stack for stack in stacks if not stack.aside] or list(stacks)
    if len(left) > 1:
        listed = "; ".join(_described(instances, stack) for stack in left[:6])
        more = f"; and {len(left) - 6} more" if len(left) > 6 else ""
        raise GeometryError(
            f"{place_of(instances)}: {len(left)} stacks of different size, spacing or orientation in one series: "
            f"{listed}{more}; read_volumes reads each by its name"
        )
    counts = Counter[str]()
    for stack in stacks if not wanted else ():
        if stack is not left[0]:
            counts[stack.aside] += len(stack.slots)
    return left[0], tuple(f"{count} × {reason} set apart" for reason, count in counts.items())


def stacks_of(instances: Sequence[Instance]) -> list[Stack]:
    """Part the frames of a series by size, color, orientation, spacing, frame of reference and StackID.

    Raises:
        GeometryError: no frame at all, or an instance that cannot be read.
    """
    for item in instances:
        if item.problem:
            raise GeometryError(item.problem)
    found: dict[_Kind, list[Slot]] = {}
    for i, item in enumerate(instances):
        scout = not _SCOUTS.isdisjoint(item.tags.get("ImageType", "").upper().split("\\"))
        size = (item.rows, item.columns, item.samples, scout)
        before = kind = None
        for frame, plane in enumerate(item.planes):
            if kind is None or plane is not before:
                before, kind = plane, _Kind(size)
                if plane.position is not None:
                    where = (item.frame_of_reference_uid, str(dict(plane.traits).get("stack", "")))
                    kind = _Kind(size, where, plane.orientation, plane.spacing)
            found.setdefault(kind, []).append((i, frame))
    if not found:
        raise GeometryError(f"{place_of(instances)}: the image has no frame")
    # Headers differ in the last digits: each kind joins the commonest that it equals but for these.
    merged: dict[_Kind, list[Slot]] = {}
    for kind in sorted(found, key=lambda kind: (kind.where is None, -len(found[kind]), found[kind])):
        same = next((other for other in merged if kind.joins(other)), kind)
        merged.setdefault(same, []).extend(found[kind])
    stacks = []
    for kind, slots in merged.items():
        aside = "localizer" if kind.size[3] else "picture without position" if kind.where is None else ""
        stacks.append(Stack("", tuple(sorted(slots)), aside))
    return _named(instances, stacks) if len(stacks) > 1 else stacks


class _Kind(NamedTuple):
    """What the frames of one stack have in common; ``where`` is None for a frame without position."""

    size: tuple[int, int, int, bool]
    where: tuple[str, str] | None = None
    orientation: tuple[float, ...] | None = None
    spacing: tuple[float, ...] | None = None

    def joins(self, other: "_Kind") -> bool:
        """Whether frames of these kinds are of one stack. A frame without position belongs to those of its size."""
        if self.size != other.size or self.where is None:
            return self.size == other.size
        if self.where != other.where:
            return False
        if self.orientation is None or other.orientation is None or self.spacing is None or other.spacing is None:
            return True  # which is an error that names the frame
        turned = max(abs(a - b) for a, b in zip(self.orientation, other.orientation, strict=True))
        scaled = max(abs(a - b) for a, b in zip(self.spacing, other.spacing, strict=True))
        # Over a row of a thousand pixels this is a hundredth of a pixel.
        return turned <= 1e-3 and scaled <= 1e-5 * max(other.spacing)


def _named(instances: Sequence[Instance], stacks: list[Stack]) -> list[Stack]:
    words = []
    for stack in stacks:
        i, frame = stack.slots[0]
        plane = instances[i].planes[frame]
        word = "without position"
        if plane.position is not None and plane.orientation is not None:
            normal = np.abs(np.cross(plane.orientation[:3], plane.orientation[3:]))
            word = ("sagittal", "coronal", "axial")[int(normal.argmax())]
        words.append(f"localizer {word}" if stack.aside == "localizer" else word)

    def first_number(stack: Stack) -> tuple[float, Slot]:
        return min((_number(instances[i].planes[frame]), (i, frame)) for i, frame in stack.slots)

    order = sorted(range(len(stacks)), key=lambda k: first_number(stacks[k]))
    counts, seen = Counter(words), Counter[str]()
    named = []
    for k in order:
        seen[words[k]] += 1
        name = f"{words[k]} {seen[words[k]]}" if counts[words[k]] > 1 else words[k]
        named.append(replace(stacks[k], name=name))
    return named


def _number(plane: Plane) -> float:
    return float(dict(plane.traits).get("number", 0))


def _described(instances: Sequence[Instance], stack: Stack) -> str:
    item = instances[stack.slots[0][0]]
    return (
        f"{stack.name} ({len(stack.slots)} of {item.columns}×{item.rows} pixels, such as "
        f"{_name(instances, stack.slots[0])})"
    )


def _name(instances: Sequence[Instance], slot: Slot) -> str:
    i, frame = slot
    return instances[i].path.name + (f" frame {frame + 1}" if len(instances[i].planes) > 1 else "")


@dataclass(frozen=True, eq=False)
class _Arranged:
    """The frames of a stack in place: their volumes, and numbers for each frame."""

    where: str
    normal: np.ndarray
    row: np.ndarray
    column: np.ndarray
    spacing: np.ndarray
    thickness: float | None
    parted: Parted
    copies: list[tuple[Slot, Slot]]
    at: dict[Slot, np.ndarray] = field(repr=False)
    notes: tuple[str, ...] = ()


def grid_of(instances: Sequence[Instance], stack: Stack, *, tilt: str = "correct", gaps: str = "refuse") -> Grid:
    """Return the one grid of all volumes of a stack.

    Raises:
        GeometryError: frames that form no regular grid, or several.
    """
    grids = grids_of(instances, stack, tilt=tilt, gaps=gaps, whole=True)
    if len(grids) > 1:
        raise GeometryError(
            f"{place_of(instances)}: {len(grids)} images without position: {_name(instances, stack.slots[0])} has no "
            "usable ImagePositionPatient (0020,0032): its place is unknown; read_volumes reads each by itself"
        )
    return grids[0]


def grids_of(
    instances: Sequence[Instance], stack: Stack, *, tilt: str = "correct", gaps: str = "refuse", whole: bool = False
) -> list[Grid]:
    """Return the grids of a stack: one for all volumes that have all of its positions, one for each other volume.

    Args:
        instances: the headers of the series.
        stack: one of its stacks.
        tilt: see `read_image`.
        gaps: see `read_image`.
        whole: refuse a stack with a volume that does not have all positions.

    Raises:
        GeometryError: frames that form no regular grid.
    """
    for name, value, allowed in (("tilt", tilt, TILT), ("gaps", gaps, GAPS)):
        if value not in allowed:
            raise ConfigError(f"{name}: {value!r} found, expected one of {', '.join(allowed)}")
    slots = stack.slots
    if all(instances[i].planes[frame].position is None for i, frame in slots):
        return _placeless(instances, slots)
    found = _arrange(instances, slots)
    count = 1 + max(frame.position for frames in found.parted.volumes.values() for frame in frames)
    complete = {name: frames for name, frames in found.parted.volumes.items() if len(frames) == count}
    others = {name: frames for name, frames in found.parted.volumes.items() if len(frames) < count}
    if whole and others:
        listed = ", ".join(f"{name} has {len(frames)}" for name, frames in list(others.items())[:6])
        raise GeometryError(
            f"{found.where}: {len(others)} of {len(found.parted.volumes)} volumes lack some of the {count} positions "
            f"({listed}): find the missing files, or read each volume by itself with read_volumes"
        )
    groups = ([complete] if complete else []) + [{name: frames} for name, frames in others.items()]
    grids = []
    for group in groups:
        grid = _grid(instances, found, group, tilt=tilt, gaps=gaps)
        if len(groups) > 1 and not group.keys() & complete.keys():
            has = f"it has {len(next(iter(group.values())))} of the {count} positions of its series"
            grid = replace(grid, notes=(*grid.notes, has))
        grids.append(grid)
    return grids


def _placeless(instances: Sequence[Instance], slots: Sequence[Slot]) -> list[Grid]:
    """Return a grid without geometry: the frames of one film become volumes, several files stay apart."""
    first = instances[slots[0][0]]
    shape, samples = (first.columns, first.rows, 1), first.samples
    unplaced = (
        f"{place_of(instances)}: {_name(instances, slots[0])} has no usable ImagePositionPatient (0020,0032): its "
        "place is unknown"
    )
    if first.modality == "SM" and len(first.planes) > 1:
        raise GeometryError(f"{unplaced} (a whole-slide image, of tiles)")
    if len(slots) == 1:
        return [Grid(shape, np.eye(4), {"": tuple(slots)}, False, samples)]
    if len({i for i, _ in slots}) > 1:
        order = sorted(slots, key=lambda slot: (_number(instances[slot[0]].planes[slot[1]]), slot))
        return [Grid(shape, np.eye(4), {f"image {k}": (slot,)}, False, samples) for k, slot in enumerate(order, 1)]
    if first.modality in ("CT", "MR", "PT", "NM"):
        raise GeometryError(unplaced)
    return [Grid(shape, np.eye(4), {f"frame {k}": (slot,) for k, slot in enumerate(slots, 1)}, False, samples)]


def _arrange(instances: Sequence[Instance], slots: Sequence[Slot]) -> _Arranged:
    """Find the positions of the frames, the copies among them and their volumes."""
    where = place_of(instances)
    planes = [instances[i].planes[frame] for i, frame in slots]
    for slot, plane in zip(slots, planes, strict=True):
        for value, keyword in (
            (plane.position, "ImagePositionPatient (0020,0032)"),
            (plane.orientation, "ImageOrientationPatient (0020,0037)"),
            (plane.spacing, "PixelSpacing (0028,0030)"),
        ):
            if value is None:
                raise GeometryError(f"{where}: {_name(instances, slot)} has no usable {keyword}: its place is unknown")
    orientation = _commonest(np.array([plane.orientation for plane in planes], dtype=np.float64))
    spacing = _commonest(np.array([plane.spacing for plane in planes], dtype=np.float64))
    position = np.array([plane.position for plane in planes], dtype=np.float64)
    row, column = orientation[:3], orientation[3:]
    lengths = np.linalg.norm(row), np.linalg.norm(column)
    if max(abs(length - 1) for length in lengths) > 1e-2 or abs(float(row @ column)) > 1e-2:
        raise GeometryError(f"{where}: ImageOrientationPatient (0020,0037) is not two perpendicular unit vectors")
    if spacing.min() <= 0:
        raise GeometryError(f"{where}: PixelSpacing (0028,0030) is not positive")
    if len(planes) > 1 and len(set(map(id, planes))) == 1:
        raise GeometryError(
            f"{where}: {len(planes)} frames share one ImagePositionPatient (0020,0032): the place of each is unknown"
        )
    normal = np.cross(row, column)

    number, firsts = _positions(position @ normal)
    sideways = position - position[firsts[number]]
    sideways -= np.outer(sideways @ normal, normal)
    off = np.linalg.norm(sideways, axis=1)
    if off.max() > _SIDEWAYS:
        k = int(off.argmax())
        raise GeometryError(
            f"{where}: two slices side by side, {off[k]:.2f} mm apart in one plane "
            f"({_name(instances, slots[firsts[number[k]]])} and {_name(instances, slots[k])}): not one volume"
        )
    known: dict[tuple[str, int], tuple[int, Slot]] = {}
    copies: list[tuple[Slot, Slot]] = []
    frames = []
    for k, slot in enumerate(slots):
        uid = instances[slot[0]].sop_uid
        if uid and (uid, slot[1]) in known:
            place, first = known[uid, slot[1]]
            if place != number[k]:
                raise GeometryError(
                    f"{where}: {_name(instances, first)} and {_name(instances, slot)} have one SOPInstanceUID and "
                    "different positions: one of them was changed"
                )
            copies.append((slot, first))
            continue
        known[uid, slot[1]] = int(number[k]), slot
        frames.append(Frame(int(number[k]), dict(planes[k].traits), slot))
    parted = part(frames)
    notes = []
    if parted.by_number:
        notes.append("nothing but InstanceNumber (0020,0013) tells its volumes apart")
    if copies:
        notes.append(f"{len(copies)} {'copies' if len(copies) > 1 else 'copy'} of slices left out")
    for extra, first_there in parted.extra:
        keys = extra.traits.keys() | first_there.traits.keys()
        apart = sorted(
            key.replace("_", " ") for key in keys - {"number"} if extra.traits.get(key) != first_there.traits.get(key)
        )
        if apart:
            raise GeometryError(
                f"{where}: two slices at the same position ({_name(instances, first_there.slot)} and "
                f"{_name(instances, extra.slot)}) that differ in {', '.join(apart)}, but not all positions have as "
                "many slices: volumes cannot be told apart; find the missing files, or set the superfluous ones apart"
            )
    if parted.extra:
        here, there = (_name(instances, frame.slot) for frame in reversed(parted.extra[0]))
        notes.append(
            f"{len(parted.extra)} slice{'s' if len(parted.extra) > 1 else ''} at the same position as another "
            f"({here} and {there}): left out if the pixels are the same, else refused"
        )
        copies.extend((frame.slot, first.slot) for frame, first in parted.extra)
    at = {slot: position[k] for k, slot in enumerate(slots)}
    thickness = planes[int(firsts[0])].thickness
    return _Arranged(where, normal, row, column, spacing, thickness, parted, copies, at, tuple(notes))


def _positions(along: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Number the distinct positions along the normal; return the number of each frame, and the first frame of each."""
    ranks = np.argsort(along, kind="stable")
    gaps = np.diff(along[ranks])
    wide = gaps[gaps >= 1e-3]
    # Repetitions are written with other last digits, and some scanners move a little between them.
    tolerance = max(1e-3, 0.02 * float(np.median(wide))) if len(wide) else 1e-3
    number = np.empty(len(along), dtype=np.int64)
    number[ranks] = np.concatenate([[0], np.cumsum(gaps >= tolerance)])
    firsts = np.full(int(number.max()) + 1, len(along), dtype=np.int64)
    np.minimum.at(firsts, number, np.arange(len(along)))
    return number, firsts


def _grid(
    instances: Sequence[Instance], found: _Arranged, volumes: dict[str, list[Frame]], *, tilt: str, gaps: str
) -> Grid:
    slots = {name: tuple(frame.slot for frame in frames) for name, frames in volumes.items()}
    first = next(iter(slots.values()))
    item = instances[first[0][0]]
    position = np.array([found.at[slot] for slot in first])
    along = position @ found.normal
    count = len(first)
    mended: list[str] = []
    shifts = sources = None
    columns, rows = item.columns, item.rows
    corner, across = position[0], found.normal
    step = found.thickness or 1.0
    if count > 1:
        names = [_name(instances, slot) for slot in first]
        step, sources, told = _steps(found.where, along, names, gaps)
        mended += told
        lean = _lean(found.where, position, along, found.normal)
        if lean is not None:
            angle = np.degrees(np.arctan(np.linalg.norm(lean)))
            if tilt == "refuse":
                raise GeometryError(
                    f"{found.where}: gantry tilt of {angle:.1f} degrees (the slices shift sideways by "
                    f"{np.linalg.norm(lean) * (along[-1] - along[0]):.1f} mm from first to last): not a rectangular "
                    'volume; read it with tilt="correct" or tilt="keep"'
                )
            if tilt == "keep":
                across = found.normal + lean
                mended.append(f"gantry tilt of {angle:.1f} degrees kept: the affine is sheared")
            else:
                moved = np.outer(along - along[0], lean) @ np.stack([found.row, found.column], axis=1)
                moved /= found.spacing[::-1]
                # Whole pixels, so that the first slice stays as it is.
                low, high = np.floor(moved.min(axis=0) + 1e-6), np.ceil(moved.max(axis=0) - 1e-6)
                shifts = moved - low
                columns, rows = int(columns + (high - low)[0]), int(rows + (high - low)[1])
                if columns * rows > _GROWTH * item.columns * item.rows:
                    raise GeometryError(
                        f"{found.where}: the slices shift sideways by {angle:.1f} degrees: an upright grid would have "
                        f'{columns}×{rows} pixels for {item.columns}×{item.rows}; read it with tilt="keep"'
                    )
                corner = corner + low[0] * found.spacing[1] * found.row + low[1] * found.spacing[0] * found.column
                mended.append(f"gantry tilt of {angle:.1f} degrees corrected: resampled to an upright grid")
    lps = np.eye(4)
    lps[:3, 0] = found.row * found.spacing[1]
    lps[:3, 1] = found.column * found.spacing[0]
    lps[:3, 2] = across * step
    lps[:3, 3] = corner
    kept = {slot for volume in slots.values() for slot in volume}
    return Grid(
        shape=(columns, rows, len(sources) if sources is not None else count),
        affine=np.diag([-1.0, -1.0, 1.0, 1.0]) @ lps,
        volumes=slots,
        samples=item.samples,
        copies=tuple((copy, original) for copy, original in found.copies if original in kept),
        by_number=found.parted.by_number,
        shifts=shifts,
        sources=sources,
        mended=tuple(mended),
        notes=found.notes,
    )


def _steps(
    where: str, along: np.ndarray, names: list[str], how: str
) -> tuple[float, tuple[tuple[int, int, float], ...] | None, list[str]]:
    """Return the distance between slices; where they are irregular refuse, or say between which each new one lies."""
    gaps = np.diff(along)
    typical = float(np.sort(gaps)[(len(gaps) - 1) // 2])
    step = float(along[-1] - along[0]) / len(gaps)
    # Positions are written with few decimals, hence the twentieth of a millimetre (and what floats add to it); thin
    # slices get a tighter one.
    tolerance = max(0.01 * typical, min(0.05, 0.25 * typical)) + 1e-6
    if np.abs(along - (along[0] + step * np.arange(len(along)))).max() <= tolerance:
        return step, None, []
    far = np.abs(gaps / typical - 1) > 0.1
    whole = np.abs(gaps / typical - np.rint(gaps / typical)) < 0.1
    if far.any() and whole[far].all() and (gaps[far] > typical).all() and far.sum() < len(gaps):
        missing = int((np.rint(gaps[far] / typical) - 1).sum())
        words = f"{missing} slice{'s' if missing > 1 else ''}"
        places = ", ".join(f"{along[i]:.2f} and {along[i + 1]:.2f} mm" for i in np.flatnonzero(far)[:3])
        if how == "refuse":
            raise GeometryError(
                f"{where}: {words} missing: a gap of {gaps[far][0]:.2f} mm where the others are {typical:.2f} mm, "
                f"between {places} along the normal ({names[int(np.flatnonzero(far)[0])]} and the next); find the "
                'missing files, or read it with gaps="interpolate"'
            )
        index = np.concatenate([[0], np.cumsum(np.rint(gaps / typical))]).astype(int)
        step = float(along[-1] - along[0]) / int(index[-1])
        if np.abs(along - (along[0] + step * index)).max() <= tolerance:
            _check_growth(where, int(index[-1]) + 1, len(along))
            sources = tuple(_between(index.astype(float), k) for k in range(int(index[-1]) + 1))
            made = [along[0] + step * k for k in range(len(sources)) if sources[k][2]]
            listed = ", ".join(f"{place:.2f}" for place in made[:20]) + (" …" if len(made) > 20 else "")
            return step, sources, [f"{words} missing, interpolated linearly at {listed} mm along the normal"]
    if how == "refuse":
        raise GeometryError(
            f"{where}: the gap between slices changes (from {gaps.min():.2f} to {gaps.max():.2f} mm, first at "
            f"{along[int(np.abs(gaps - gaps[0]).argmax())]:.2f} mm along the normal): not a regular volume; read it "
            'with gaps="interpolate"'
        )
    # The smallest gap that is no exception: a tenth of all gaps, and two at least, are as small.
    near = gaps[None, :] <= 1.1 * gaps[:, None]
    wanted = float(gaps[near.sum(axis=1) >= min(len(gaps), max(2, len(gaps) / 10))].min())
    count = round(float(along[-1] - along[0]) / wanted) + 1
    _check_growth(where, count, len(along))
    step = float(along[-1] - along[0]) / (count - 1)
    index = (along - along[0]) / step
    sources = tuple(_between(index, k) for k in range(count))
    told = f"gaps between slices from {gaps.min():.2f} to {gaps.max():.2f} mm: interpolated linearly to {step:.3f} mm"
    return step, sources, [told]


def _check_growth(where: str, count: int, stored: int) -> None:
    if count > _GROWTH * stored:
        raise GeometryError(
            f"{where}: {stored} slices would become {count} by interpolation: too few to make a volume of"
        )


def _between(index: np.ndarray, k: int) -> tuple[int, int, float]:
    """Return the stored slices on both sides of slice ``k``, and the weight of the second."""
    upper = int(np.searchsorted(index, k - 1e-6))
    upper = min(upper, len(index) - 1)
    if abs(index[upper] - k) <= 1e-6 or upper == 0:
        return upper, upper, 0.0
    lower = upper - 1
    return lower, upper, float((k - index[lower]) / (index[upper] - index[lower]))


def _lean(where: str, position: np.ndarray, along: np.ndarray, normal: np.ndarray) -> np.ndarray | None:
    """Return how many millimetres the slices shift sideways per millimetre along the normal, None where they do not."""
    sideways = position - position[0] - np.outer(along - along[0], normal)
    if np.linalg.norm(sideways, axis=1).max() <= _SIDEWAYS:
        return None
    lean = sideways[-1] / (along[-1] - along[0])
    if np.linalg.norm(sideways - np.outer(along - along[0], lean), axis=1).max() > _SIDEWAYS:
        raise GeometryError(f"{where}: the slices do not lie on one line: they shift sideways along the series")
    return np.asarray(lean)


def _commonest(rows: np.ndarray) -> np.ndarray:
    """Return the row that occurs most often, up to rounding."""
    unique, counts = np.unique(np.round(rows, 4), axis=0, return_counts=True)
    with np.errstate(all="ignore"):  # numbers of a damaged file may be too large to be rounded
        far = np.abs(rows - unique[counts.argmax()]).max(axis=1)
        near = rows[~(far > max(1e-4, far.min()))]
    return np.asarray(near[np.lexsort(near.T[::-1])[0]])
