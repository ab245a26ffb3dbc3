"""`data_prep build`: the options of a recipe on the command line, and what a build did in words."""

from collections import Counter
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_prep.build import build_dataset
from data_prep.recipes import recipe_class
from data_prep.recipes.base import Recipe

if TYPE_CHECKING:
    import click


def recipe_command(name: str, cls: "type[click.Command]") -> "click.Command":
    """The subcommand of a recipe: the options that all recipes have, and those that it declares.

    Args:
        name: of the recipe.
        cls: class of the command.
    """
    import click

    recipe = recipe_class(name)
    path = click.Path(path_type=Path)
    file = click.Path(dir_okay=False, path_type=Path)

    def run(**given: Any) -> None:
        chosen = {option.name: given.pop(option.name) for option in fields(recipe.Options)}
        _run(recipe(recipe.Options(**chosen)), **given)

    own = [
        click.Option(
            [option.metadata["flag"], option.name],
            **_help(option.metadata["help"], option.default),
            **option.metadata["click"],
        )
        for option in fields(recipe.Options)
    ]
    common = [
        click.Option(["--jobs"], type=click.IntRange(1), help="Cases at once.  [default: a process per core]"),
        click.Option(
            ["--ray"],
            metavar="ADDRESS",
            help="Make the cases on a Ray cluster instead: auto, HOST:PORT, ray://HOST:PORT, or local.",
        ),
        click.Option(["--key"], type=file, help="Key file of another dataset: same patients, same pseudonyms."),
        _identifiers(recipe),
        click.Option(
            ["--clinical"], type=file, multiple=True, help="CSV file with a row per patient; repeat for more."
        ),
        click.Option(["--id-column"], default="patient_id", help="Its column with the patient's identifier."),
        click.Option(["--stratum-column"], help="Its column to stratify splits by."),
        click.Option(["--report/--no-report"], default=True, help="Write report.html."),
    ]
    return cls(
        name,
        params=[click.Argument(["source"], type=path), click.Argument(["out"], type=path), *own, *common],
        callback=run,
        help=f"{recipe.summary}\n\nBuilds the dataset OUT from what lies in SOURCE. Run it again to go on after an "
        "interruption, or after the source changed. The names of the numbered sources stand in OUT.key, which tells "
        "who the patients are: keep it apart.",
        short_help=recipe.summary,
    )


def _identifiers(recipe: type[Recipe]) -> "click.Option":
    """Public identifiers are kept and can be hidden; others are hidden and can be kept."""
    import click

    if recipe.public:
        return click.Option(
            ["--keep-identifiers/--pseudonyms"], default=True, help="Name cases as the public source does, or hide it."
        )
    return click.Option(["--keep-identifiers"], is_flag=True, help="Name cases as the source does (public data only).")


def _help(text: str, default: Any) -> dict[str, Any]:
    return {"help": text, "default": default, "show_default": default not in (None, (), False)}


def _run(recipe: Recipe, source: Path, out: Path, **given: Any) -> None:
    """Build for the command line: progress and problems on stderr, what was done on stdout."""
    import click
    from rich.console import Console

    if given["jobs"] is not None and given["ray"] is not None:
        raise click.UsageError("--jobs and --ray exclude each other")
    try:
        result = build_dataset(recipe, source, out, console=Console(stderr=True), **given)
    except KeyboardInterrupt:
        click.echo("interrupted; run the same command again to go on", err=True)
        raise SystemExit(130) from None
    for problem in result.unpaired:
        click.echo(f"unpaired: {problem.case}: {problem.what}", err=True)
    for problem in result.failed:
        click.echo(f"failed: {problem.case}: {problem.what}", err=True)
        context = click.get_current_context(silent=True)
        if problem.trace and context is not None and context.meta.get("debug"):
            click.echo(problem.trace, err=True)
    numbered = [problem for problem in (*result.unpaired, *result.failed) if problem.sources]
    if numbered and not given["keep_identifiers"]:
        click.echo(f"note: the names of the numbered sources stand in {out.name}.key", err=True)
    for note in result.notes:
        click.echo(f"note: {note}", err=True)
    counts = Counter(built=len(result.built), unchanged=len(result.kept), removed=len(result.removed))
    counts += Counter(failed=len(result.failed), unpaired=len(result.unpaired))
    click.echo(f"{out}: {', '.join(f'{n} {what}' for what, n in counts.items())}")
    if result.failed:
        raise SystemExit(1)
