"""Recipes: what a dataset is made of.

A recipe says what it selects from a source, what it makes of one case, and what it looked at in vain. Everything else
(running in parallel, going on after an interruption, pseudonyms, writing) is :mod:`data_prep.build`'s.
"""

import difflib
import importlib
from typing import TYPE_CHECKING

from data_prep.recipes.from_file import names_a_file, read_recipe
from medseg.errors import ConfigError

if TYPE_CHECKING:
    from data_prep.recipes.base import Recipe

#: Name of a recipe -> its module and class. The command line, its help and the errors all read this table.
RECIPES = {
    "folder": "data_prep.recipes.folder:FolderRecipe",
    "petct": "data_prep.recipes.petct:PetCtRecipe",
    "decathlon": "data_prep.recipes.decathlon:DecathlonRecipe",
    "drive": "data_prep.recipes.drive:DriveRecipe",
    "knee": "data_prep.recipes.knee:KneeRecipe",
    "kits19": "data_prep.recipes.kits19:Kits19Recipe",
    "prostatex": "data_prep.recipes.prostatex:ProstateXRecipe",
    "lungx": "data_prep.recipes.lungx:LungXRecipe",
    "brain_mri": "data_prep.recipes.brain_mri:BrainMriRecipe",
}


def recipe_class(name: str) -> "type[Recipe]":
    """Find a recipe by its name, or read it from a user's file.

    Args:
        name: a name of :data:`RECIPES`, or a path: ``my.yaml``, ``my.py`` or ``my.py:MyRecipe``.

    Raises:
        ConfigError: there is no such recipe; the message has the nearest names. Or the file is no recipe.

    Example:
        >>> recipe_class("petct").name
        'petct'
        >>> recipe_class("pet-ct")
        Traceback (most recent call last):
        medseg.errors.ConfigError: recipe: 'pet-ct' given, one of folder, petct, ... (nearest: petct)
    """
    if names_a_file(name):
        return read_recipe(name)
    if name not in RECIPES:
        near = difflib.get_close_matches(name, RECIPES, n=1)
        hint = f" (nearest: {near[0]})" if near else ""
        raise ConfigError(
            f"recipe: {name!r} given, one of {', '.join(RECIPES)} or the path of a .yaml or .py file expected{hint}"
        )
    module, attribute = RECIPES[name].split(":")
    found: type[Recipe] = getattr(importlib.import_module(module), attribute)
    return found
