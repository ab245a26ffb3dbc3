"""What both commands share: bad input ends in one line on stderr and status 1, bad usage in status 2."""

import errno
from typing import Any

import click

from medseg.errors import own_error


def _remember_debug(ctx: click.Context, parameter: click.Parameter, value: bool) -> None:
    if value:
        ctx.meta["debug"] = True


def _debug_option() -> click.Option:
    return click.Option(
        ["--debug"],
        is_flag=True,
        expose_value=False,
        callback=_remember_debug,
        help="Show the traceback of an error.",
    )


class Command(click.Command):
    """A command that takes ``--debug``."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params.append(_debug_option())


class Group(click.Group):
    """A group whose commands end bad input with one line on stderr and status 1 (bad usage: 2, as click does)."""

    command_class = Command

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params.append(_debug_option())

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command, and turn an error that was foreseen into its one line."""
        try:
            return super().invoke(ctx)
        except click.exceptions.Exit:
            raise
        except Exception as error:
            ours = own_error(error)
            if ctx.meta.get("debug"):
                raise
            if ours is not None:
                message = str(ours)
            elif isinstance(error, OSError) and error.errno != errno.EPIPE:
                message = f"{error.filename}: {error.strerror}" if error.filename else str(error)
            else:
                raise
        # file names and DICOM text may hold control characters, which a terminal would obey
        printable = "".join(character if character.isprintable() else " " for character in message)
        click.echo(f"error: {' '.join(printable.split())}", err=True)
        ctx.exit(1)


Group.group_class = Group
