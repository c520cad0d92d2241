"""The metrics of mounts: ``tmem_mount_`` and what `MountStatistics` counts, labels ``client`` and ``mount``.

It stands here because the exporter is of the layer below mounts. A mount that does not answer has
``tmem_mount_up`` 0 and nothing else. It brings prometheus_client. For one thread.
"""

import os
from collections.abc import Iterator

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from tmem.backends.exposition import described, rows_of
from tmem.backends.paths import SegmentPaths
from tmem.fs import asking
from tmem.fs.statistics import MountStatistics

_LABELS = ["client", "mount"]


class MountCollector(Collector):
    """What prometheus_client asks for metrics of the segment's mounts."""

    def __init__(self, paths: SegmentPaths) -> None:
        self._paths, self._asker = paths, asking.Asker()

    def collect(self) -> Iterator[Metric]:
        """Return what every mount counts now; takes `asking.DEADLINE_S` at most."""
        mounts = asking.recorded(self._paths)
        answers = self._asker.ask(mount.mountpoint for mount in mounts)
        up = GaugeMetricFamily("tmem_mount_up", "Whether the mount's daemon answers.", labels=_LABELS)
        rows = []
        for mount in mounts:
            answer = answers[mount.mountpoint]
            labels = (mount.client, label(mount.mountpoint))
            up.add_metric(labels, answer is not None)
            if answer is not None:
                rows.append((labels, vars(answer)))
        yield up
        yield from rows_of("tmem_mount_", described(MountStatistics), _LABELS, rows)


def label(mountpoint: str) -> str:
    """Return a path as a label, which is UTF-8 whatever the path is."""
    return os.fsencode(mountpoint).decode(errors="backslashreplace")
