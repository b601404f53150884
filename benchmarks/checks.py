"""No number on red: what is timed is checked first, by the accuracy rule of the tests."""

import contextlib
import importlib

import torch

from tests.support.accuracy import assert_accurate

from .device import is_cuda, synchronize
from .harness import DTYPES, engines_here, make_step, rivals_of, shape_of
from .processes import in_fresh_process, in_words

Verdicts = dict[str, str]  # engine that serves a case -> what is wrong with it, empty if nothing
UNCOMPILED = ("eager", "limit")


def check(module: str, contender: str, shape_name: str, dtype: str) -> None:
    """Raise unless value and gradients are right."""
    bench = importlib.import_module(module)
    if hasattr(bench, "check"):
        return bench.check(contender, shape_name, dtype)
    shape = shape_of(bench, shape_name)
    shape = bench.smaller(shape) if hasattr(bench, "smaller") else shape
    got = make_step(bench, contender, shape, dtype)()
    eager = make_step(bench, "eager", shape, dtype)()
    truth = make_step(bench, "eager", shape, dtype, is_double=True)()
    for index, values in enumerate(zip(got, truth, eager, strict=True)):
        assert_accurate(f"result {index}", *values, torch.float32 if index == 0 else DTYPES[dtype])


def verdicts_of(module: str, shape_name: str, dtype: str) -> Verdicts:
    """Of every engine that serves a case; on a CPU the first that is wrong raises."""
    bench = importlib.import_module(module)
    engines = engines_here(bench.OP)
    if hasattr(bench, "make_step"):  # whose engines are chosen freely
        engines = engines[:1]
    verdicts = {}
    for engine in engines:
        try:
            in_fresh_process(check, module, engine, shape_name, dtype)
        except Exception as error:
            if "must be able to serve" in str(error):  # what a forced engine says
                continue
            if not is_cuda() or isinstance(error, torch.OutOfMemoryError):
                raise
            verdicts[engine] = in_words(error)
        else:
            verdicts[engine] = ""
    return verdicts


def prepare(module: str, shape_name: str, dtype: str) -> Verdicts | None:
    """Beside other processes: check a case and compile what it needs; None if it must run alone."""
    try:
        synchronize()  # raises if an earlier case left this process in an error
        verdicts = verdicts_of(module, shape_name, dtype)
    except RuntimeError:  # the share of memory was too small, else
        return None
    compile_contenders(module, shape_name, dtype)
    return verdicts


def compile_contenders(module: str, shape, dtype: str) -> None:
    """One step of every contender that compiles, for the caches on disk."""
    bench = importlib.import_module(module)
    names = [*engines_here(bench.OP), *rivals_of(bench, shape_of(bench, shape))]
    for name in names:
        if name not in UNCOMPILED:
            # What fails here is tried again alone, and told then.
            with contextlib.suppress(Exception):
                in_fresh_process(_run_once, module, name, shape, dtype)


def _run_once(module: str, *case) -> None:
    make_step(importlib.import_module(module), *case)()
    synchronize()
