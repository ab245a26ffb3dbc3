"""Run the command as `python -m medseg`."""

from medseg.cli import main

main()
