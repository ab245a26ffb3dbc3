"""A recipe of my own: a case per picture; the class is told by the brightest pixel."""

from dataclasses import dataclass

from data_prep.recipes.base import Case, Plan, Recipe, Sample, Selection, Unpaired, option
from medseg.errors import ConfigError


@dataclass(frozen=True)
class BrightestOptions:
    """What a user may choose on the command line."""

    above: float = option("--above", 200.0, "A picture is bright when a pixel is above this.", type=float)

    def __post_init__(self):
        if not 0 <= self.above <= 255:
            raise ConfigError(f"--above: {self.above:g} given, 0 to 255 expected")


class Brightest(Recipe):
    """Gray pictures, dark or bright."""

    name = "brightest"
    needs = "PNG pictures named PATIENT_NUMBER.png"
    makes = "classification"
    Options = BrightestOptions

    def select(self, source):
        """What is there. Reads no pixels."""
        cases, unpaired = [], []
        for path in sorted(source.glob("*.png")):
            patient, _, number = path.stem.partition("_")
            if number:
                cases.append(Case(path.stem, patient, {"picture": (path,)}))
            else:
                unpaired.append(Unpaired((path,), "no number in its name"))
        return Selection(cases, unpaired)

    def plan(self, surveys):
        """What all cases have in common."""
        return Plan(("gray",), classes={"dark": 0, "bright": 1})

    def make(self, case, plan):
        """One case, in a worker process. Heavy imports stay in here."""
        from data_prep.recipes.reading import read_channels

        image = read_channels(case.sources)  # [channel, x, y, 1]
        brightest = float(image.max())
        target = "bright" if brightest > self.options.above else "dark"
        return Sample(image, columns={"brightest": f"{brightest:g}"}, target=target)

    def audit(self, columns):
        """What a person should know of the finished dataset."""
        n_bright = sum(row["class"] == "bright" for row in columns.values())
        return [f"{n_bright} of {len(columns)} pictures are bright"]
