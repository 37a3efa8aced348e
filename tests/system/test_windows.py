"""What Python lacks on Windows is needed by no import: every module can be imported without it."""

import subprocess
import sys

IMPORT_ALL = """
import importlib, os, pkgutil, signal, sys, warnings
for name in ("fcntl", "grp", "pty", "pwd", "resource", "syslog", "termios", "tty"):
    sys.modules[name] = None  # importing it raises ImportError
del os.O_DIRECTORY, os.O_NONBLOCK, signal.SIGKILL, signal.SIGHUP, signal.SIGALRM
warnings.filterwarnings("ignore", "only soft file lock is available")  # filelock's, rightly so here
import jaxmorph
for module in pkgutil.walk_packages(jaxmorph.__path__, "jaxmorph."):
    importlib.import_module(module.name)
    print(module.name)
"""


def test_every_module_can_be_imported_without_what_windows_lacks():
    end = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL], capture_output=True, text=True, timeout=60
    )
    assert end.returncode == 0, end.stderr
    assert {"jaxmorph.train", "jaxmorph.evaluate", "jaxmorph.plot"} <= set(end.stdout.split())
