"""Run the command as `python -m data_prep`."""

from data_prep.cli import main

main()
