"""What a YAML file may say of a recipe, and one line for whatever it may not."""

import dataclasses
import difflib
import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, NoReturn

import yaml

from medseg.errors import ConfigError
from medseg.io.text import one_line

#: How a channel is brought to another: ``header`` trusts the coordinates of both and only resamples.
METHODS = ("rigid", "affine", "bspline", "header")
#: The field that names the class of a case.
CLASS = "class"
KEYS = {
    "name": "a word",
    "summary": "a sentence",
    "public": "true or false",
    "cases": "a folder such as {patient}/{visit}",
    "channels": "a file per channel, such as {FLAIR: flair.nii.gz}",
    "label": "file and names, or masks",
    "classes": "a list of classes, or names, file, column and by",
    "register": "{to: CHANNEL, CHANNEL: rigid}",
    "spacing": "three numbers in mm",
    "transforms": "a list of MONAI's dictionary transforms, each with _target_",
}


class Pattern:
    """A path below SOURCE with fields in braces, and ``*``, ``?`` and ``**/`` as a shell has them.

    Args:
        text: as the user wrote it; it ends with ``/`` where a folder (a DICOM series) is meant.

    Raises:
        ValueError: something in braces is no field.

    Example:
        >>> Pattern("{patient}/{visit}/t1_*.nii.gz").read("P7/second/t1_v2.nii.gz")
        {'patient': 'P7', 'visit': 'second'}
        >>> Pattern("{patient}_{visit}.nii").read("a_b_c.nii")  # a and b_c, or a_b and c?
        {}
        >>> Pattern("T1_*_{patient}.nii").read("T1_a_b_7.nii")
        {}
        >>> Pattern("{patient}.nii").read("other.txt") is None
        True
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self.fields: list[str] = []
        ways = ["", ""]  # each field and each wildcard as long as it can be, or as short
        for token in re.findall(r"\{[^{}]*\}|\*\*/|[*?{}]|[^*?{}]+", text):
            if token[0] in "{}":
                name = token[1:-1]
                if not re.fullmatch("[a-z][a-z0-9_]*", name):
                    raise ValueError(f"{token} is no field; a word in small letters expected, such as {{patient}}")
                again = name in self.fields
                pieces = [f"(?P={name})"] * 2 if again else [f"(?P<{name}>[^/]+)", f"(?P<{name}>[^/]+?)"]
                self.fields.append(name)
            else:
                wild = {"**/": ["(?:.*/)?", "(?:.*?/)??"], "*": ["[^/]*", "[^/]*?"], "?": ["[^/]"] * 2}
                pieces = wild.get(token, [re.escape(token)] * 2)
            ways = [way + piece for way, piece in zip(ways, pieces, strict=True)]
        self._ways = [re.compile(way) for way in ways]

    def read(self, path: str) -> dict[str, str] | None:
        """The fields of a path; none where it can be read in several ways, None where it does not fit."""
        long, short = (way.fullmatch(path) for way in self._ways)
        if long is None or short is None:
            return None
        return long.groupdict() if long.groupdict() == short.groupdict() else {}


@dataclass(frozen=True)
class Classes:
    """The classes of a classification, and where that of a case stands: in its path, or in a CSV file."""

    #: Values in the source by class.
    names: dict[str, tuple[str, ...]]
    file: str = ""
    column: str = ""
    #: Column of the CSV file by field of the path.
    by: dict[str, str] = dataclasses.field(default_factory=dict)

    def of_value(self, value: str) -> str | None:
        """The class that a value stands for."""
        return next((name for name, values in self.names.items() if value.strip() in values), None)


@dataclass(frozen=True)
class Description:
    """What a YAML file says, once it is certain that it makes sense."""

    name: str
    summary: str
    public: bool
    #: Pattern by the names of the channels that such a file holds.
    channels: dict[tuple[str, ...], Pattern]
    #: Patterns by class, of which each is united; the pattern of a label map under the empty name.
    masks: dict[str, list[Pattern]]
    #: Values of the label map by name.
    values: dict[str, tuple[int, ...]]
    #: The channel that label or masks were drawn on.
    drawn_on: str
    classes: Classes | None
    #: The channel that others are brought to, and how each is.
    register_to: str
    register: dict[str, str]
    spacing: tuple[float, float, float] | None
    transforms: list[dict[str, Any]]
    #: Hash of all that the file says, whatever its layout and comments.
    sha256: str

    @property
    def channel_names(self) -> tuple[str, ...]:
        """All channels, in order."""
        return tuple(name for names in self.channels for name in names)

    @property
    def fields(self) -> list[str]:
        """The fields that make a case."""
        return list(dict.fromkeys(next(iter(self.channels.values())).fields))

    @property
    def patterns(self) -> list[tuple[str, Pattern]]:
        """Every pattern with the key that messages call it by."""
        keys = [(f"channels.{', '.join(names)}", pattern) for names, pattern in self.channels.items()]
        return keys + [(key, pattern) for _, key, pattern in self.mask_patterns]

    @property
    def mask_patterns(self) -> list[tuple[str, str, Pattern]]:
        """Class, key and pattern of each mask."""
        return [
            (name, f"label.masks.{name}{f'.{n}' if len(patterns) > 1 else ''}" if name else "label.file", pattern)
            for name, patterns in self.masks.items()
            for n, pattern in enumerate(patterns, 1)
        ]


def read_description(file: str, text: str) -> Description:
    """Parse a YAML file and check every key of it.

    Args:
        file: its name, for messages.
        text: its content.

    Raises:
        ConfigError: the first thing in it that is wrong: its key, what was found, what was expected, the nearest key.

    Example:
        >>> text = "{name: vessels, channels: {R: '{patient}.png'}, label: {masks: {vessel: '{patient}_mask.png'}}}"
        >>> read_description("eye.yaml", text).channel_names
        ('R',)
        >>> read_description("eye.yaml", text.replace("masks", "mask"))
        Traceback (most recent call last):
        medseg.errors.ConfigError: eye.yaml: label.mask: unknown key, expected file, names, masks, on (nearest: masks)
    """
    return _Reader(file).read(text)


class _Reader:
    """One method per key; each returns what it found or fails with one line."""

    def __init__(self, file: str) -> None:
        self.file = file

    def read(self, text: str) -> Description:
        try:
            content = yaml.load(text, Loader=_Loader)
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            line = f"line {mark.line + 1}: " if mark is not None else ""
            problem = getattr(error, "problem", None) or one_line(error)
            raise ConfigError(f"{self.file}: {line}no YAML: {problem}") from None
        except (ValueError, RecursionError) as error:  # `!!int word`, a thousand brackets
            raise ConfigError(f"{self.file}: no YAML: {one_line(error)}") from None
        content = self.mapping("", content, KEYS, required=("name", "channels"))
        for key in ("name", "summary"):
            self.text(key, content.get(key, ""))
        public = content.get("public", False)
        if not isinstance(public, bool):
            self.fail("public", public, "true or false")
        folder = self.text("cases", content.get("cases", ""))
        channels = self.channels(content["channels"], folder)
        names = [name for group in channels for name in group]
        if ("label" in content) == ("classes" in content):
            self.refuse("label", "label and classes" if "label" in content else "nothing", "either label or classes")
        to, register = self.register(content.get("register", {}), names)
        masks, values, drawn_on = self.label(content.get("label"), folder, names, to or names[0])
        described = Description(
            name=content["name"],
            summary=content.get("summary") or f"The recipe of {self.file}.",
            public=public,
            channels=channels,
            masks=masks,
            values=values,
            drawn_on=drawn_on,
            classes=self.classes(content["classes"]) if "classes" in content else None,
            register_to=to,
            register=register,
            spacing=self.spacing(content.get("spacing")),
            transforms=self.transforms(content.get("transforms", []), [*names, *(["label"] if masks else [])]),
            sha256=hashlib.sha256(json.dumps(content, default=str).encode()).hexdigest(),
        )
        self.fields(described)
        return described

    def channels(self, value: Any, folder: str) -> dict[tuple[str, ...], Pattern]:
        found: dict[tuple[str, ...], Pattern] = {}
        for key, path in self.mapping("channels", value).items():
            names = tuple(name.strip() for name in key.split(","))
            for name in names:
                if name == "label" or not re.fullmatch(r"\w[\w .-]*", name):
                    self.fail("channels", name, "names of letters, digits, _, - and . (not label)")
                if any(name in other for other in found) or names.count(name) > 1:
                    self.refuse("channels", f"{name} twice", "each channel once")
            found[names] = self.pattern(f"channels.{key}", path, folder)
        if not found:
            self.fail("channels", value, KEYS["channels"])
        return found

    def label(
        self, value: Any, folder: str, channels: list[str], first: str
    ) -> tuple[dict[str, list[Pattern]], dict[str, tuple[int, ...]], str]:
        if value is None:
            return {}, {}, first
        value = self.mapping("label", value, ("file", "names", "masks", "on"))
        drawn_on = self.one_of("label.on", value.get("on", first), channels)
        if ("masks" in value) == ("file" in value) or ("file" in value) != ("names" in value):
            self.refuse("label", f"the keys {', '.join(value)}", "file and names, or masks")
        if "file" in value:
            given = self.mapping("label.names", value["names"])
            values = {name: self.whole_numbers(f"label.names.{name}", numbers) for name, numbers in given.items()}
            values.pop("background", None)
            every = [number for numbers in values.values() for number in numbers]
            if not values or len(set(every)) < len(every) or 0 in every:
                self.fail("label.names", given, "each value once, such as {lesion: 1}; 0 is the background")
            return {"": [self.pattern("label.file", value["file"], folder)]}, values, drawn_on
        masks = {}
        for name, paths in self.mapping("label.masks", value["masks"]).items():
            several = paths if isinstance(paths, list) else [paths]
            masks[name] = [self.pattern(f"label.masks.{name}", path, folder) for path in several]
        if not masks or not all(masks.values()) or "background" in masks or "" in masks:
            self.fail("label.masks", value["masks"], "a path or a list of paths per class, such as {lesion: mask.png}")
        return masks, {}, drawn_on

    def classes(self, value: Any) -> Classes:
        if isinstance(value, list):
            value = {"names": value}
        value = self.mapping("classes", value, ("names", "file", "column", "by"), required=("names",))
        names = value["names"]
        if isinstance(names, list):
            names = {self.text("classes.names", name): name for name in names}
        found = {
            name: tuple(str(v).strip() for v in (values if isinstance(values, list) else [values]))
            for name, values in self.mapping("classes.names", names).items()
        }
        every = [text for values in found.values() for text in values]
        if len(found) < 2 or len(set(every)) < len(every):
            self.fail("classes.names", value["names"], "two classes or more, each value once")
        if ("file" in value) != ("column" in value) or ("by" in value and "file" not in value):
            self.refuse("classes", f"the keys {', '.join(value)}", "file and column (and by) together, or names only")
        file = self.text("classes.file", value.get("file", ""))
        if PurePosixPath(file).is_absolute() or ".." in PurePosixPath(file).parts:
            self.fail("classes.file", file, "a path below SOURCE")
        by = {f: self.text(f"classes.by.{f}", c) for f, c in self.mapping("classes.by", value.get("by", {})).items()}
        return Classes(found, file, self.text("classes.column", value.get("column", "")), by)

    def register(self, value: Any, channels: list[str]) -> tuple[str, dict[str, str]]:
        if not value:
            return "", {}
        value = self.mapping("register", value, ["to", *channels], required=("to",))
        to = self.one_of("register.to", value.pop("to"), channels)
        if to in value or not value:
            self.fail("register", {"to": to, **value}, "other channels than that of to, as in {to: FLAIR, T1: rigid}")
        return to, {name: self.one_of(f"register.{name}", method, METHODS) for name, method in value.items()}

    def spacing(self, value: Any) -> tuple[float, float, float] | None:
        if value is None:
            return None
        if not isinstance(value, list) or len(value) != 3 or not all(_is_number(step) and step > 0 for step in value):
            self.fail("spacing", value, "three positive numbers in mm, such as [1, 1, 1]")
        x, y, z = map(float, value)
        return x, y, z

    def transforms(self, value: Any, keys: list[str]) -> list[dict[str, Any]]:
        if not isinstance(value, list):
            self.fail("transforms", value, KEYS["transforms"])
        for number, transform in enumerate(value):
            key = f"transforms.{number}"
            transform = self.mapping(key, transform, required=("_target_", "keys"))
            self.text(f"{key}._target_", transform["_target_"])
            given = transform["keys"] if isinstance(transform["keys"], list) else [transform["keys"]]
            for name in given:
                self.one_of(f"{key}.keys", name, keys)
        return value

    def fields(self, described: Description) -> None:
        """Every path must have the same fields: those tell which files belong together."""
        first, *_ = described.patterns
        expected = set(described.fields)
        for key, pattern in described.patterns:
            if set(pattern.fields) != expected:
                braces = " and ".join(f"{{{field}}}" for field in pattern.fields) or "no field"
                self.refuse(key, braces, f"the fields of {first[0]} ({_braces(expected)}), perhaps by cases")
        if "patient" not in expected:
            self.refuse(first[0], _braces(expected) or "no field", "{patient} in the path of every file")
        classes = described.classes
        if classes is not None and bool(classes.file) == (CLASS in expected):
            both = "file and {class}" if classes.file else "neither of both"
            self.refuse("classes", both, "either classes.file or {class} in paths")
        if classes is None and CLASS in expected:
            self.refuse("label", "{class} in the paths", "classes, for a dataset of pictures with a class each")
        for field in classes.by if classes is not None else ():
            self.one_of("classes.by", field, sorted(expected))

    # What several keys need

    def pattern(self, key: str, value: Any, folder: str) -> Pattern:
        text = self.text(key, value)
        if not text or PurePosixPath(text).is_absolute() or ".." in PurePosixPath(f"{folder}/{text}").parts:
            self.fail(key, value, "a path below SOURCE")
        try:
            return Pattern(f"{folder.rstrip('/')}/{text}" if folder else text)
        except ValueError as error:
            raise ConfigError(f"{self.file}: {key}: {error}") from None

    def mapping(
        self, key: str, value: Any, allowed: Iterable[str] | None = None, required: Iterable[str] = ()
    ) -> dict[str, Any]:
        if not isinstance(value, dict):
            self.fail(key or "the file", value, KEYS.get(key) or "keys and values")
        for name in value:
            if not isinstance(name, str):
                self.fail(key or "the file", name, "words as keys; put it in quotes")
            if allowed is not None and name not in allowed:
                path = f"{key}.{name}".lstrip(".")
                raise ConfigError(
                    f"{self.file}: {path}: unknown key, expected {', '.join(allowed)}{_nearest(name, allowed)}"
                )
        for name in required:
            if name not in value:
                raise ConfigError(
                    f"{self.file}: {f'{key}.{name}'.lstrip('.')}: missing, expected {KEYS.get(name, 'it')}"
                )
        return dict(value)

    def text(self, key: str, value: Any) -> str:
        if not isinstance(value, str):
            self.fail(key, value, "a text; put it in quotes" if value is not None else KEYS.get(key, "a text"))
        return value

    def whole_numbers(self, key: str, value: Any) -> tuple[int, ...]:
        numbers = value if isinstance(value, list) else [value]
        if not numbers or not all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in numbers):
            self.fail(key, value, "a value of the label map, or a list of values")
        return tuple(numbers)

    def one_of(self, key: str, value: Any, allowed: Iterable[str]) -> str:
        if value not in allowed:
            hint = _nearest(value, allowed) if isinstance(value, str) else ""
            self.fail(key, value, f"one of {', '.join(allowed)}{hint}")
        return str(value)

    def fail(self, key: str, found: Any, expected: str) -> NoReturn:
        self.refuse(key, "nothing" if found is None else repr(found)[:200], expected)

    def refuse(self, key: str, found: str, expected: str) -> NoReturn:
        raise ConfigError(f"{self.file}: {key}: found {found}, expected {expected}")


class _Loader(yaml.SafeLoader):
    """YAML without its traps: ``no`` is a word and 2020-01-01 a text, and a key may not come twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a word expected as key", key_node.start_mark)
            key = key_node.value
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} comes twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":bool", ":timestamp"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile("true|false"), ["t", "f"])


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _nearest(word: str, allowed: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, list(allowed), n=1, cutoff=0.5)
    return f" (nearest: {near[0]})" if near else ""


def _braces(fields: Iterable[str]) -> str:
    return ", ".join(f"{{{field}}}" for field in sorted(fields))
