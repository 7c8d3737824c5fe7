"""A process that has imported everything and forks one training command per request.

Starting Python and torch costs more than the trainings of these tests. A request is a line of
JSON on stdin; the answers are `{"pid": …}` at once and `{"status": …}` when the child has ended,
on the standard output that the server was started with. Keys of a request:

arguments   of `python -m dlmone_fast.train`
log         file that gets the child's standard output and error, appended
folder      working folder of the child
fault       arguments of faults.c's `faults_arm`, if it is preloaded
file_size   limit on a file's size in bytes
ordinary    true: no right to write where the permissions of files forbid it
prepare     [module, function, arguments…] to call in the child first
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import resource
import signal
import sys
from pathlib import Path
from typing import Any

import torch

import dlmone_fast.train
from dlmone_fast.cli import run_command

# CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH and CAP_FOWNER: what lets root ignore permissions.
_OF_ROOT = 1 << 1 | 1 << 2 | 1 << 3
_CAPABILITY_VERSION = 0x20080522
_FAILED_TO_START = 99


def _import_the_rest() -> None:
    # The first optimiser imports half of torch.
    import dlmone_fast.training  # noqa: F401
    from dlmone_fast.comparison import measure

    # How long one call takes is not what these trainings are for.
    measure._LATENCY_RUNS = 2
    torch.set_num_threads(1)
    torch.optim.AdamW([torch.zeros(1, requires_grad=True)])


class _Header(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _Sets(ctypes.Structure):
    _fields_ = tuple((f"{name}{i}", ctypes.c_uint32) for i in (0, 1) for name in "epi")


def _become_ordinary() -> None:
    """Give up root's right to ignore permissions; what root owns stays readable."""
    if os.geteuid() != 0:
        return
    libc = ctypes.CDLL(None, use_errno=True)
    header, sets = _Header(_CAPABILITY_VERSION, 0), _Sets()
    if libc.capget(ctypes.byref(header), ctypes.byref(sets)):
        raise OSError(ctypes.get_errno(), "capget")
    sets.e0 &= ~_OF_ROOT
    sets.p0 &= ~_OF_ROOT
    if libc.capset(ctypes.byref(header), ctypes.byref(sets)):
        raise OSError(ctypes.get_errno(), "capset")


def _prepare(request: dict[str, Any]) -> None:
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.chdir(request["folder"])
    # A shell starts what runs in its background with SIGINT ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if limit := request.get("file_size"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    if request.get("ordinary"):
        _become_ordinary()
    if prepare := request.get("prepare"):
        module, function, *arguments = prepare
        getattr(importlib.import_module(module), function)(*arguments)
    if fault := request.get("fault"):
        below, action, nth, error, trace = fault
        faults = ctypes.CDLL(os.environ["LD_PRELOAD"])
        trace_to = os.open(trace, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        faults.faults_arm(os.fsencode(below), action, nth, error, trace_to)


def _child(request: dict[str, Any]) -> None:
    code = _FAILED_TO_START
    try:
        _prepare(request)
        sys.argv = ["dlmone_fast.train", *request["arguments"]]
        code = 1
        run_command(dlmone_fast.train.main)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        # As the interpreter ends.
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _serve() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    _import_the_rest()
    print(json.dumps({"package": str(Path(dlmone_fast.__file__).parent)}), file=answers)
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            answers.close()
            _child(json.loads(line))
        print(json.dumps({"pid": child}), file=answers)
        _, status = os.waitpid(child, 0)
        print(json.dumps({"status": os.waitstatus_to_exitcode(status)}), file=answers)


if __name__ == "__main__":
    _serve()
