"""Recipes that a user wrote: a YAML file, or a class in a Python file."""

import copyreg
import dataclasses
import functools
import hashlib
import inspect
import re
import sys
import traceback
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.recipes.base import NoOptions, Recipe
from medseg.errors import ConfigError

YAML = (".yaml", ".yml")


@dataclass(frozen=True)
class RecipeFile:
    """A file with a recipe. It travels with its text, so a worker needs no file, and cannot meet a later version.

    Attributes:
        name: of the file, for messages.
        text: all that it holds.
        attribute: name of the class in a Python file; empty for the only one.
    """

    name: str
    text: str
    attribute: str = ""


def names_a_file(recipe: str) -> bool:
    """Whether a recipe is given by the path of its file: ``my.yaml``, ``my.py``, ``my.py:MyRecipe``.

    Example:
        >>> [names_a_file(recipe) for recipe in ("petct", "lesions.yaml", "../own.py:Lesions")]
        [False, True, True]
    """
    return recipe.endswith((*YAML, ".py")) or ".py:" in recipe


def read_recipe(recipe: str) -> type[Recipe]:
    """Make the class of a recipe from its file.

    Args:
        recipe: the path; of a Python file with several recipes, ``PATH:CLASS``. A Python file is run.

    Raises:
        ConfigError: the file is not there, or is no recipe.
    """
    path, attribute = Path(recipe), ""
    if path.suffix not in (*YAML, ".py"):
        name, _, attribute = recipe.rpartition(":")
        path = Path(name)
    try:
        text = path.read_text(encoding="utf-8-sig")  # Windows puts a mark before it
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such recipe file; give its path, or the name of a recipe of medseg") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not a text in UTF-8: expected a recipe as YAML or Python") from None
    return class_of(RecipeFile(path.name, text, attribute))


@functools.cache
def class_of(file: RecipeFile) -> type[Recipe]:
    """The class of a recipe whose file was read.

    Its instances can be pickled: they take the file's text along, and are made anew from it.
    """
    if file.name.endswith(YAML):
        from data_prep.recipes.described import described_recipe

        recipe: type[Recipe] = described_recipe(file.name, file.text)
    else:
        recipe = _class_in_module(file)
        recipe.file_sha256 = hashlib.sha256(file.text.encode()).hexdigest()
    _check(file.name, recipe)
    copyreg.pickle(recipe, functools.partial(_reduce, file))
    return recipe


def _reduce(file: RecipeFile, recipe: Recipe) -> tuple[Any, ...]:
    # The state comes last: it may hold objects of the file's own classes, which then are known.
    return _restore, (file,), vars(recipe)


def _restore(file: RecipeFile) -> Recipe:
    recipe = class_of(file)
    return recipe.__new__(recipe)


def _class_in_module(file: RecipeFile) -> type[Recipe]:
    """Run a Python file as a module of its own, and find the recipe in it."""
    module = types.ModuleType(f"recipe_{hashlib.sha256(file.text.encode()).hexdigest()[:16]}", f"Of {file.name}.")
    sys.modules[module.__name__] = module  # dataclasses and pickle look their module up
    try:
        exec(compile(file.text, file.name, "exec"), vars(module))
    except BaseException as error:
        del sys.modules[module.__name__]
        if not isinstance(error, Exception):
            raise
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file.name]
        line = error.lineno if isinstance(error, SyntaxError) else (lines or [0])[-1]
        raise ConfigError(f"{file.name}: line {line}: {type(error).__name__}: {error}") from error
    found = {
        name: value
        for name, value in vars(module).items()
        if inspect.isclass(value) and issubclass(value, Recipe) and value.__module__ == module.__name__
    }
    listed = ", ".join(found) or "none"
    if file.attribute:
        if file.attribute not in found:
            raise ConfigError(f"{file.name}: no recipe class {file.attribute!r} in it; its recipes: {listed}")
        return found[file.attribute]
    if len(found) != 1:
        raise ConfigError(
            f"{file.name}: {len(found)} recipe classes in it ({listed}): expected one; name it as {file.name}:CLASS"
        )
    return next(iter(found.values()))


def _check(file: str, recipe: type[Recipe]) -> None:
    """Refuse a class that the command line could not show, or that would fail at the first case."""
    from data_prep.recipes import RECIPES

    name = getattr(recipe, "name", None)
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z][\w-]{0,63}", name):
        raise ConfigError(f"{file}: name: {name!r} found; letters, digits, - and _ expected, a letter first")
    if name in RECIPES:
        raise ConfigError(f"{file}: name: {name!r} is the name of a recipe of medseg; choose another")
    missing = sorted(getattr(recipe, "__abstractmethods__", ()))
    if missing:
        raise ConfigError(f"{file}: {recipe.__name__} has no {', '.join(missing)}: expected select, plan and make")
    if not dataclasses.is_dataclass(recipe.Options) or not all(
        "flag" in option.metadata for option in dataclasses.fields(recipe.Options)
    ):
        raise ConfigError(f"{file}: {recipe.__name__}.Options: a dataclass expected, each field made by option(…)")
    if recipe.makes not in ("segmentation", "classification"):
        raise ConfigError(f"{file}: makes: {recipe.makes!r} found, segmentation or classification expected")
    if recipe.Options is not NoOptions and not recipe.Options.__dataclass_params__.frozen:  # type: ignore[attr-defined]
        raise ConfigError(f"{file}: {recipe.__name__}.Options: expected @dataclass(frozen=True)")
    if "summary" not in vars(recipe):
        recipe.summary = (inspect.getdoc(recipe) or f"The recipe of {file}.").splitlines()[0]
    if not hasattr(recipe, "needs"):
        recipe.needs = "what the recipe selects"
