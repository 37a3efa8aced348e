"""The programs of a run's stages, compiled while the stage before them trains.

A stage needs other programs than the one before where its architecture or its batch differs. Its
step and evaluation, the morph that leads to it and the probe that compares the two are compiled in
one background thread as soon as the stage before is running, so that the change itself costs about
as much as a step.
"""

from __future__ import annotations

import contextlib
import functools
import os
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxmorph import transitions
from jaxmorph.config import Settings
from jaxmorph.faults import crash_point
from jaxmorph.plan import Plan
from jaxmorph.programs import Programs, Shape, make_programs
from jaxmorph.run_shape import RunShape
from jaxmorph.sharding import batch_sharding, replicated
from jaxmorph.state import TrainState, new_state

_LOWEST_PRIORITY = 19
_PROBE_TOKENS = 256  # at most, per sequence
_AHEAD = 2  # stages compiled beforehand: two operations may fire one right after the other


@dataclass(frozen=True)
class Compiled:
    """What a stage runs, ready to run.

    Args:
      programs: its step and evaluation.
      morph: from the state before to (state, report, whether it is finite); None where the
        architecture stays.
      function_delta: (old parameters and gates, new ones, probe tokens) -> see `transitions`.
      probe: shape of the probe tokens.
      seconds: it took to compile.
    """

    programs: Programs
    morph: Callable[[Any], Any] | None
    function_delta: Callable[..., jax.Array] | None
    probe: Shape
    seconds: float


class StageCompiler:
    """Compiles the programs of a plan's stages, each once, ahead of time where it can.

    Args:
      plan: the run's stages.
      settings: of the run.
      mesh: where arrays lie.
      total_steps: steps of the run.
      validation_shape: (B, T + 1) of the validation batches of a stage.
    """

    def __init__(
        self,
        plan: Plan,
        settings: Settings,
        mesh: Mesh,
        total_steps: int,
        validation_shape: Callable[[RunShape], Shape],
    ):
        self._plan, self._settings, self.mesh = plan, settings, mesh
        self._total, self._validation_shape = total_steps, validation_shape
        self._futures: dict[int, Future[Compiled]] = {}
        self._wanted: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        on_cpu = mesh.devices.flat[0].platform == "cpu"
        # Of what runs once, compiling takes longer than running: on CPU, LLVM need not try hard.
        self._once = {"xla_backend_optimization_level": 0} if on_cpu else {}

    def lazy(self, index: int) -> Programs:
        """Return the programs of stage `index`, not compiled yet."""
        shape = self._plan.stages[index].shape
        return make_programs(
            shape.model,
            self._settings.optimizer,
            self.mesh,
            lambda optimizer: new_state(
                shape.model,
                self._settings,
                optimizer,
                warmup_steps=shape.warmup_steps,
                total_steps=self._total,
            ),
        )

    def initial_state(self) -> TrainState:
        """Return the state before the first step."""
        init: Any = self.lazy(0).init
        return init.lower().compile(self._once)()

    def get(self, index: int) -> Compiled:
        """Return what stage `index` runs, compiled now unless it is or is about to be.

        Raises:
          Exception: what compiling it raised, such as a lack of memory.
        """
        home = self._home(index)
        if home not in self._futures:
            self._futures[home] = future = Future()
            _fulfil(future, lambda: self._compile(home))
        return self._futures[home].result()

    def is_ready(self, index: int) -> bool:
        """Say whether `get` will return at once."""
        future = self._futures.get(self._home(index))
        return future is not None and future.done()

    def prefetch_after(self, index: int) -> None:
        """Begin to compile the stages after `index`, in the background; forget those before it."""
        home = self._home(index)
        for gone in [known for known in self._futures if known < home]:
            del self._futures[gone]
        if self._settings.growth.precompile == "off":
            return
        later = [k for k in range(index + 1, len(self._plan.stages)) if self._home(k) == k]
        for wanted in later[:_AHEAD]:
            if wanted not in self._futures:
                self._futures[wanted] = Future()
                self._wanted.put(wanted)
        if self._thread is None and later:
            x64 = jax.config.read("jax_enable_x64")
            self._thread = threading.Thread(target=self._work, args=(x64,), daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Wait for the compilation under way: a process must not end in the middle of one."""
        with contextlib.suppress(queue.Empty):
            while True:
                self._wanted.get_nowait()
        self._wanted.put(None)
        if self._thread is not None:
            self._thread.join()

    def _work(self, x64: bool) -> None:
        """Compile what is wanted; x64 is a thread's own setting in JAX."""
        with contextlib.suppress(OSError):  # on Linux, of this thread alone: steps come first
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LOWEST_PRIORITY)
        with jax.enable_x64(x64):
            while (index := self._wanted.get()) is not None:
                if (future := self._futures.get(index)) is not None:
                    _fulfil(future, functools.partial(self._compile, index))

    def _home(self, index: int) -> int:
        """Return the first stage with the same programs as stage `index`."""
        stages = self._plan.stages
        return next((k for k in range(index, 0, -1) if stages[k].recompiles), 0)

    def _compile(self, index: int) -> Compiled:
        start, shape = time.monotonic(), self._plan.stages[index].shape
        seq_len, lazy = shape.model.seq_len, self.lazy(index)
        programs = lazy.compiled((shape.batch_size, seq_len + 1), self._validation_shape(shape))
        crash_point("compiling")
        morph, delta, probe = self._change(index, lazy)
        return Compiled(programs, morph, delta, probe, time.monotonic() - start)

    def _change(self, index: int, after: Programs) -> tuple[Any, Any, Shape]:
        """Return the compiled morph to stage `index` and its probe; None where there is none."""
        entry = self._plan.stages[index].entry
        if entry is None or entry.operation.kind != "morph":
            return None, None, ()
        old, new = (self._plan.stages[k].shape.model for k in (index - 1, index))
        before, everywhere = self.lazy(index - 1), replicated(self.mesh)

        def change(state: Any) -> Any:
            return transitions.morphed(entry, old, new, after.optimizer, state)

        _check_same(jax.eval_shape(change, before.abstract_state)[0], after.abstract_state)
        morph = jax.jit(
            change,
            in_shardings=(before.state_shardings,),
            out_shardings=(after.state_shardings, None, everywhere),
        )
        rows = self.mesh.shape["data"] * self.mesh.shape["fsdp"]
        probe = (rows, min(old.seq_len, new.seq_len, _PROBE_TOKENS))
        models = [(p.state_shardings.params, p.state_shardings.gates) for p in (before, after)]
        delta = jax.jit(
            lambda *arguments: transitions.function_delta(old, new, *arguments),
            in_shardings=(*models, batch_sharding(self.mesh)),
            out_shardings=everywhere,
        )
        abstract = [(p.abstract_state.params, p.abstract_state.gates) for p in (before, after)]
        tokens = jax.ShapeDtypeStruct(probe, jnp.int32)
        lowered = morph.lower(before.abstract_state), delta.lower(*abstract, tokens)
        return *(one.compile(self._once) for one in lowered), probe


def _check_same(got: Any, wanted: Any) -> None:
    """Check a morph's result against a new state of the architecture: structure, shapes, dtypes."""
    assert jax.tree.structure(got) == jax.tree.structure(wanted), "another structure"
    for (path, leaf), other in zip(
        jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(wanted), strict=True
    ):
        assert (leaf.shape, leaf.dtype) == (other.shape, other.dtype), (path, leaf, other)


def _fulfil(future: Future, work: Callable[[], Any]) -> None:
    try:
        future.set_result(work())
    except BaseException as error:
        future.set_exception(error)
