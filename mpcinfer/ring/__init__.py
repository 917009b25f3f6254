"""Arithmetic over Z_2^64 on tensors: no communication, no protocol, no I/O but numba's cache of compiled kernels."""

import importlib.util
import logging
import os
import tempfile
from pathlib import Path


def _let_kernels_be_cached() -> None:
    """numba refuses to import a cached kernel if it can write neither beside the source nor in the user's cache.

    A hardened service may have neither. Then a directory of this process alone is used, never a shared one: whoever
    can write there decides what code runs. Kernels are compiled at every start in that case.
    """
    if os.environ.get("NUMBA_CACHE_DIR") or importlib.util.find_spec("numba") is None:
        return
    beside = Path(__file__).parent
    user = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    while not user.exists() and user != user.parent:
        user = user.parent
    if not any(os.access(place, os.W_OK) for place in (beside, user)):
        os.environ["NUMBA_CACHE_DIR"] = tempfile.mkdtemp(prefix="mpcinfer-kernels-")
        logging.getLogger(__name__).warning(
            "compiled kernels cannot be kept, so starting takes longer; set NUMBA_CACHE_DIR to a directory of this user"
        )


_let_kernels_be_cached()
