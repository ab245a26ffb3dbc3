"""DRIVE: color pictures of the retina with their vessels outlined."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_prep.recipes.base import Case, Origin, Plan, Recipe, Sample, Selection, Unpaired, option
from data_prep.recipes.checking import check_choice
from data_prep.recipes.reading import entries, read_channels, read_mask
from medseg.errors import DatasetError

if TYPE_CHECKING:
    from monai.data import MetaTensor

PARTS = ("training", "test")


@dataclass(frozen=True)
class DriveOptions:
    """Options of the recipe ``drive``."""

    observer: str = option(
        "--observer",
        "1",
        "Whose outlines the test part has: 1 (the reference), or 2 (the second observer). Training has one observer.",
        metavar="1|2",
    )
    fov: str = option(
        "--fov",
        "leave",
        "What becomes of the field of view: leave (a column tells its share), channel (a fourth channel FOV, 1 inside) "
        "or ignore (a label `ignore` outside, as nnU-Net v2 has it).",
        metavar="leave|channel|ignore",
    )

    def __post_init__(self) -> None:
        check_choice("--observer", self.observer, ("1", "2"))
        check_choice("--fov", self.fov, ("leave", "channel", "ignore"))


class DriveRecipe(Recipe):
    """The 40 pictures of DRIVE, X×Y×1 with the channels R, G and B, and one label, ``vessel``.

    The column ``official_part`` keeps the published parts (``data_prep split --column official_part``). Published
    figures count the pixels inside the field of view only: where pixels are counted, as in accuracy or ROC curves,
    build with ``--fov channel`` or ``--fov ignore`` and leave the others out.
    """

    name = "drive"
    summary = "DRIVE: vessels in 40 color pictures of the retina."
    needs = "training/ and test/, each with images/, mask/ and 1st_manual/"
    Options = DriveOptions
    public = True
    origin = Origin(
        "https://drive.grand-challenge.org",
        "free for research and education; no redistribution",
        "Staal et al., Ridge-based vessel segmentation in color images of the retina, IEEE TMI 23(4):501-509, 2004",
        by_hand="register at the address, download training.zip and test.zip, and unpack both into one folder",
    )

    def select(self, source: Path) -> Selection:
        """Put together picture, outlines and field of view by their number."""
        folders = [part for part in PARTS if (source / part / "images").is_dir()]
        if not folders:
            raise DatasetError(f"{source}: no training/images/ or test/images/ in it: expected {self.needs}")
        cases, unpaired, notes = [], [], []
        for part in folders:
            observer = "2nd_manual" if part == "test" and self.options.observer == "2" else "1st_manual"
            found = {kind: _by_number(source / part / kind) for kind in ("images", "mask", observer)}
            for number in sorted(set().union(*found.values())):
                sources = {kind: tuple(files[number]) for kind, files in found.items() if number in files}
                missing = [kind for kind in found if kind not in sources]
                files = tuple(file for group in sources.values() for file in group)
                if missing:
                    unpaired.append(Unpaired(files, f"nothing with its number in {part}/{missing[0]}/"))
                    continue
                twice = [kind for kind, group in sources.items() if len(group) > 1]
                problem = f"several files with its number in {part}/{twice[0]}/: keep one" if twice else ""
                name = f"{number}_{part}"
                cases.append(Case(name, name, sources, problem, part))
        if len(folders) == 1:
            notes.append(f"only the {folders[0]} part is here")
        return Selection(cases, unpaired, notes)

    def plan(self, surveys: Mapping[str, Any]) -> Plan:
        """Three colors and the vessels, and what ``--fov`` adds."""
        channels = ("R", "G", "B", "FOV") if self.options.fov == "channel" else ("R", "G", "B")
        labels = {"background": 0, "vessel": 1}
        return Plan(channels, labels | {"ignore": 2} if self.options.fov == "ignore" else labels)

    def make(self, case: Case, plan: Plan) -> Sample:
        """Read the three files; outlines and fields of view hold 0 and one other value (255, or 1)."""
        import torch
        from monai.data import MetaTensor

        observer = next(part for part in case.sources if part.endswith("_manual"))
        image = read_channels({"images": case.sources["images"]})
        if len(image) != 3:
            raise DatasetError(f"the picture has {len(image)} channel(s): expected red, green and blue")
        vessel = _inside(read_mask(case.sources[observer], image, "the manual segmentation"), "the manual segmentation")
        fov = _inside(read_mask(case.sources["mask"], image, "the field of view"), "the field of view")
        label = vessel.to(torch.uint8)
        if self.options.fov == "ignore":
            label[~fov] = plan.labels["ignore"]
        if self.options.fov == "channel":
            image = MetaTensor(torch.cat([image.as_tensor(), fov.float()]), affine=image.affine)
        columns = {
            "official_part": case.detail,
            "observer": observer[0],
            "fov_share": f"{float(fov.float().mean()):.6g}",
            "vessel_outside_fov": str(int((vessel & ~fov).sum())),
        }
        return Sample(image, MetaTensor(label, affine=image.affine), columns)

    def audit(self, columns: Mapping[str, Mapping[str, str]]) -> list[str]:
        """Tell how far outlines leave the field of view, and whose they are."""
        outside = {case: int(row["vessel_outside_fov"]) for case, row in columns.items()}
        notes = []
        if any(outside.values()):
            worst = max(outside, key=outside.__getitem__)
            lost = "they are ignored" if self.options.fov == "ignore" else "they are kept"
            notes.append(
                f"{sum(outside.values())} pixels of {sum(map(bool, outside.values()))} pictures are outlined as vessel "
                f"outside the field of view, most of them in {worst} ({outside[worst]}): {lost}"
            )
        if self.options.observer == "2":
            notes.append("the test part has the second observer's outlines, the training part the first's")
        return notes


def _by_number(folder: Path) -> dict[str, list[Path]]:
    """Files by the number that their names begin with (``21_training.tif``, ``21_manual1.gif``)."""
    found: dict[str, list[Path]] = {}
    for stem, files in (entries(folder) if folder.is_dir() else {}).items():
        found.setdefault(stem.partition("_")[0], []).extend(files)
    return found


def _inside(mask: "MetaTensor", what: str) -> Any:
    """[1, x, y, 1], where a mask of 0 and one other value is not 0."""
    values = mask.as_tensor().unique().tolist()
    if len(values) > 2 or (len(values) == 2 and values[0] != 0):
        raise DatasetError(f"{what} holds the values {values[:5]}: expected 0 and one other")
    return mask.as_tensor() > 0
