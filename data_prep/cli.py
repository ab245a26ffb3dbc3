"""The `data_prep` command: thin, no logic; heavy imports stay inside the functions."""

import click


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="medseg")
def main() -> None:
    """Turn a heap of clinical images into a checked dataset."""
