"""Measures this machine beside the peers: what ``tmem bench`` runs, and scripts/bench builds upon.

Layers within: `results` and `rounds` (numbers, pure) <- `grounds`, `fio`, `machine` (what a measurement
stands on) <- a module a part (`nbd`, `swap`, `density`) with the peers that only it has <- `running` (plans,
refuses, runs) <- `report`. What a part makes it takes down, also when it is interrupted; a peer that
is missing or fails is named, and never ends a run. Only `tmem.cli.bench` and the scripts import from here.
"""
