"""The configuration: ``/etc/tmem.toml``, and drop-ins ``/etc/tmem.d/*.toml``, which change it key by key.

What a command line or an environment variable says counts more. `keys` has the table of all keys, `reading`
finds and checks the files, `example` writes the commented example. Only values of commands and settings of
clients stand here; what lives in the segment (pools, modes, authorisations) does not. Threading: plain
functions and frozen values.
"""
