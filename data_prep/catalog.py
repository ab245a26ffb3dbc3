"""`data_prep recipes`: every recipe of medseg, what it makes, and where its source comes from."""

import json
from typing import Any

from data_prep.fetch import SOURCES
from data_prep.recipes import RECIPES, recipe_class


def catalog() -> list[dict[str, Any]]:
    """What the classes of the recipes say of themselves, and whether :mod:`data_prep.fetch` knows their source.

    Example:
        >>> [(row["name"], row["makes"], row["license"], row["fetch"]) for row in catalog()][2]
        ('decathlon', 'segmentation', 'CC BY-SA 4.0', True)
    """
    rows = []
    for name in RECIPES:
        recipe = recipe_class(name)
        origin = recipe.origin
        rows.append(
            {
                "name": name,
                "makes": recipe.makes,
                "summary": recipe.summary,
                "public": recipe.public,
                "address": origin.address if origin else "",
                "license": origin.license if origin else "",
                "citation": origin.citation if origin else "",
                "fetch": name in SOURCES,
                "by_hand": origin.by_hand if origin and name not in SOURCES else "",
            }
        )
    return rows


def show_recipes(as_json: bool) -> None:
    """Print the recipes as a table or as JSON."""
    import click
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    rows = catalog()
    if as_json:
        click.echo(json.dumps(rows, indent=1, ensure_ascii=False))
        return
    table = Table(show_lines=True)
    for column in ("recipe", "makes", "fetch"):
        table.add_column(column, no_wrap=True)
    table.add_column("what, and where from (license)", overflow="fold")
    for row in rows:
        fetch = "yes" if row["fetch"] else "by hand" if row["address"] else ""
        origin = f"\n{row['address']} ({row['license']})" if row["address"] else ""
        table.add_row(row["name"], row["makes"], fetch, escape(f"{row['summary']}{origin}"))
    Console().print(table)
