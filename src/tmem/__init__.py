"""Transcendent memory in Linux userspace.

`tmem.backends` is the pool manager (a shared segment with a native store), `tmem.nbd` puts a swap device in
front of a persistent pool, `tmem.fs` a read cache in front of a directory, `tmem.cli` is the command line.
"""

__version__ = "0.1.0"
