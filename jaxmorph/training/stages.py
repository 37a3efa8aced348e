"""The programs of a run's stages, compiled while the stage before them trains.

A stage needs other programs than the one before where its architecture or its batch differs. Its
step and evaluation, the morph that leads to it and the probe that compares the two are compiled in
one background thread as soon as the stage before is running, so that the change itself costs about
as much as a step.
"""

from __future__ import annotations

import contextlib
import os
import queue
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.stages import Compiled

from jaxmorph.config.run_shape import RunShape
from jaxmorph.config.settings import Settings
from jaxmorph.growth.plan import Plan
from jaxmorph.morphs import Report
from jaxmorph.step.programs import Programs, Shape, make_programs
from jaxmorph.step.sharding import batch_sharding, place_batch, replicated
from jaxmorph.step.state import TrainState, new_state
from jaxmorph.system.crash_points import crash_point
from jaxmorph.system.host_memory import available_memory
from jaxmorph.training import transitions

Key = tuple[str, int]  # "programs", "change" or "rehearsal", and the stage
_LOWEST_PRIORITY = 19
_PROBE_TOKENS = 256  # at most, per sequence
_AHEAD = 2  # stages compiled beforehand: two operations may fire one right after the other


@dataclass(frozen=True)
class Change:
    """The way to a stage by a morph, compiled.

    Args:
      morph: from the state before to (state, report, whether it is finite).
      function_delta: (old parameters and gates, new ones, probe tokens) -> see `transitions`.
      probe: shape of the probe tokens.
    """

    morph: Callable[[TrainState], tuple[TrainState, Report, jax.Array]]
    function_delta: Callable[..., jax.Array]
    probe: Shape


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
        self._lazy: dict[int, Programs] = {}
        self._futures: dict[Key, Future] = {}
        self._wanted: queue.SimpleQueue[Key | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def lazy(self, index: int) -> Programs:
        """Return the programs of stage `index`, not compiled yet; the same ones each time."""
        if index not in self._lazy:
            self._lazy[index] = self._traced(index)
        return self._lazy[index]

    def _traced(self, index: int) -> Programs:
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
        return init.lower().compile(_quick_compilation(self.mesh.devices.flat[0].platform))()

    def programs(self, index: int) -> Programs:
        """Return the step and the evaluation of stage `index`, compiled now unless they are already.

        Raises:
          Exception: what compiling them raised, such as a lack of memory.
        """
        self._futures.pop(("rehearsal", index), None)  # who asks wants to run them now
        return self._result(("programs", self._home(index)))

    def change(self, index: int) -> Change:
        """Return the morph that leads to stage `index`, compiled now unless it is already.

        Raises:
          Exception: see `programs`.
        """
        return self._result(("change", index))

    def prefetch_after(self, index: int) -> None:
        """Begin to compile the stages after `index`, in the background; forget those before it."""
        for gone in [key for key in self._futures if key[1] < self._home(index)]:
            del self._futures[gone]
        if self._settings.growth.precompile == "off":
            return
        later = [self._work_for(k) for k in range(index + 1, len(self._plan.stages))]
        for key in (key for work in [w for w in later if w][:_AHEAD] for key in work):
            if key not in self._futures:
                self._futures[key] = Future()
                self._wanted.put(key)
        if self._thread is None and not self._wanted.empty():
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
        if sys.platform == "linux":  # there, of this thread alone: steps come first
            with contextlib.suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LOWEST_PRIORITY)
        with jax.enable_x64(x64):
            while (key := self._wanted.get()) is not None:
                if (future := self._futures.get(key)) is not None:
                    self._fulfil(key, future)

    def _result(self, key: Key) -> Any:
        if key not in self._futures:
            self._futures[key] = Future()
            self._fulfil(key, self._futures[key])
        return self._futures[key].result()

    def _fulfil(self, key: Key, future: Future) -> None:
        kind, index = key
        work: dict[str, Callable[[int], Any]] = {
            "programs": self._compile_programs,
            "change": self._compile_change,
            "rehearsal": self._rehearse,
        }
        try:
            future.set_result(work[kind](index))
        except BaseException as error:
            future.set_exception(error)

    def _work_for(self, index: int) -> list[Key]:
        """Return what there is to do for the operation that leads to stage `index`."""
        entry = self._plan.stages[index].entry
        morph = entry is not None and entry.operation.kind == "morph"
        programs = self._home(index) == index
        keys = [("programs", index)] * programs + [("change", index)] * morph
        return [*keys, ("rehearsal", index)] if morph and self._can_rehearse() else keys

    def _home(self, index: int) -> int:
        """Return the first stage with the same programs as stage `index`."""
        stages = self._plan.stages
        return next((k for k in range(index, 0, -1) if stages[k].recompiles), 0)

    def _compile_programs(self, index: int) -> Programs:
        shape = self._plan.stages[index].shape
        batch = (shape.batch_size, shape.model.seq_len + 1)
        programs = self.lazy(index).compiled(batch, self._validation_shape(shape))
        crash_point("compiling")
        return programs

    def _compile_change(self, index: int) -> Change:
        entry = self._plan.stages[index].entry
        assert entry is not None
        old, new = (self._plan.stages[k].shape.model for k in (index - 1, index))
        before, after, everywhere = self.lazy(index - 1), self.lazy(index), replicated(self.mesh)

        def change(state: TrainState) -> tuple[TrainState, Report, jax.Array]:
            return transitions.morphed(entry, old, new, after.optimizer, state)

        morph = jax.jit(
            change,
            in_shardings=(before.state_shardings,),
            out_shardings=(after.state_shardings, None, everywhere),
        ).trace(before.abstract_state)
        _check_same(morph.out_info[0], after.abstract_state)
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
        return Change(
            morph.lower().compile(),
            delta.lower(*abstract, tokens).compile(),
            probe,
        )

    def _can_rehearse(self) -> bool:
        """Whether programs may run beside the step: on one CPU device, as others take turns."""
        devices = self.mesh.devices
        return devices.size == 1 and devices.flat[0].platform == "cpu"

    def _rehearse(self, index: int) -> None:
        """Run the morph to stage `index` and the programs there once, on zeros, if memory is plenty."""
        before, after = self.lazy(index - 1), self.lazy(index)
        programs, change = self.programs(index), self.change(index)
        shape, accumulate = self._plan.stages[index].shape, cast(Compiled, programs.accumulate)
        working = accumulate.memory_analysis()
        needed = _size((before.abstract_state, after.abstract_state, after.abstract_state.params))
        needed += 0 if working is None else working.temp_size_in_bytes
        if needed > (available_memory() or 0) // 2:
            return
        state = jax.tree.map(
            lambda leaf, where: jax.device_put(np.zeros(leaf.shape, leaf.dtype), where),
            before.abstract_state,
            before.state_shardings,
        )
        new, _, _ = change.morph(state)
        shapes = change.probe, (shape.batch_size, shape.model.seq_len + 1)
        probe, batch, validation = (
            place_batch(self.mesh, np.zeros(tokens, np.int32))
            for tokens in (*shapes, self._validation_shape(shape))
        )
        models = (state.params, state.gates), (new.params, new.gates)
        results: list[Any] = [change.function_delta(*models, probe)]
        if self._home(index) == index:  # else they are those of now, which have run
            results.append(programs.accumulate(new, programs.zero_sums(), batch, np.int32(0)))
            results.append(programs.evaluate(new.params, new.gates, validation))
        jax.block_until_ready(results)


def _size(abstract: Any) -> int:
    """Return the bytes of a pytree's arrays."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract))


def _check_same(got: Any, wanted: Any) -> None:
    """Check a morph's result against a new state of the architecture: structure, shapes, dtypes."""
    assert jax.tree.structure(got) == jax.tree.structure(wanted), "another structure"
    for (path, leaf), other in zip(
        jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(wanted), strict=True
    ):
        assert (leaf.shape, leaf.dtype) == (other.shape, other.dtype), (path, leaf, other)


def _quick_compilation(platform: str) -> dict[str, Any]:
    """Return XLA's options for a program that runs once: compiling it takes longer than running it.

    On CPU, without LLVM's optimisations and, in jaxlib 0.10, with the emitters that need least time,
    drawing the initial parameters compiles about eight times as fast.
    """
    if platform != "cpu":
        return {}
    options: dict[str, Any] = {"xla_backend_optimization_level": 0}
    if tuple(map(int, jax.__version__.split(".")[:2])) < (0, 11):  # later ones do not know it
        options["xla_cpu_use_fusion_emitters"] = False
    return options
