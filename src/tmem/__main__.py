"""Lets ``python -m tmem`` stand for the command ``tmem``."""

from tmem.cli.main import main

main()
