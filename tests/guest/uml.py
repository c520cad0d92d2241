"""A guest on user-mode-linux: one CPU, the host's own root read-only, no image and no emulation.

It boots in two seconds and is good for provoking what a single CPU makes worse; that nothing happens on it
proves nothing. No network: everything runs inside. ``guest-tool`` and ``tmem`` are on PATH.
"""

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Self

from . import image
from .cache import GuestError
from .machine import Machine

_KERNEL = "linux.uml"
_MODULES = Path("/usr/lib/uml/modules")
_INIT = Path(__file__).with_name("uml-init.sh")


class UmlGuest(Machine):
    """A guest on user-mode-linux; of its `Options` only memory and parameters count. Needs root.

    Its /run, /var/tmp and /dev/shm are its own and empty, everything else is the host's and cannot be
    written.
    """

    def launch(self) -> Self:
        """Start the kernel, which is a program here."""
        if shutil.which(_KERNEL) is None:
            raise GuestError(f"{_KERNEL} is missing: apt-get install user-mode-linux")
        ours, theirs = socket.socketpair()
        modules = next(_MODULES.iterdir())
        argv = [
            *("setpriv", "--pdeathsig", "KILL", _KERNEL, "umid=guest"),
            f"uml_dir={self.directory}",
            *(f"mem={self.options.memory_mib}M", "root=/dev/root", "rootfstype=hostfs", "ro"),
            *("quiet", "panic=-1"),
            *("con=null", "con0=null,fd:1", f"ssl0=fd:{theirs.fileno()}", f"init={_INIT}"),
            *(f"guest.name={self.name}", f"guest.tool={image.tool()}", f"guest.modules={modules}"),
            *(f"guest.path={Path(sys.executable).parent}", *self.options.parameters.split()),
        ]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=(theirs.fileno(),),
                env={**os.environ, "TMPDIR": "/dev/shm"},
                start_new_session=True,
            )
        theirs.close()
        self.channel.use(ours)
        return self
