"""The command line; `tmem.cli.main` is the way in, every command stands in a module of its own."""
