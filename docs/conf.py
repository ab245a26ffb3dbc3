"""Sphinx configuration: MyST pages, reference from docstrings, help texts from the commands themselves."""

import importlib
from typing import Any

import click
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective

from medseg.version import __version__

project = "medseg"
author = "The medseg authors"
copyright = author
version = release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.doctest", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build"]
default_role = "literal"  # docstrings write `name` for code

html_theme = "furo"
html_title = f"medseg {release}"
html_copy_source = False

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
add_module_names = False
maximum_signature_line_length = 88
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_custom_sections = [("Shape", "returns_style"), ("Source", "notes_style")]

# Docstrings are doctested by pytest, which gives them their module's names; here only the pages are.
doctest_test_doctest_blocks = ""
doctest_global_setup = """
import os, tempfile
_folder = tempfile.TemporaryDirectory()
_before = os.getcwd()
os.chdir(_folder.name)
"""
doctest_global_cleanup = """
os.chdir(_before)
_folder.cleanup()
"""

ROOMS = ("io", "transforms", "networks", "losses", "metrics", "data", "engines", "inference", "experiments", "report")


class CommandHelp(SphinxDirective):
    """The help text of a command, as it is: ``data_prep build petct``."""

    required_arguments = 1
    final_argument_whitespace = True

    def run(self) -> list[nodes.Node]:
        """Return the help as a literal block."""
        program, *words = self.arguments[0].split()
        command: Any = importlib.import_module(f"{program}.cli").main
        context = click.Context(command, info_name=program, terminal_width=92)
        for word in words:
            command = command.get_command(context, word)
            context = click.Context(command, info_name=word, parent=context, terminal_width=92)
        return [nodes.literal_block(text=command.get_help(context), language="text")]


def name_undocumented(app: Sphinx, env: BuildEnvironment) -> None:
    """Warn of every public name that no reference page has."""
    documented = {name for name, *_ in env.domains["py"].get_objects()}
    for room in ROOMS:
        for name in importlib.import_module(f"medseg.{room}").__all__:
            if f"medseg.{room}.{name}" not in documented:
                logging.getLogger(__name__).warning("medseg.%s.%s is public and in no reference page", room, name)


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the directive and the check."""
    app.add_directive("command-help", CommandHelp)
    app.connect("env-check-consistency", name_undocumented)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
