"""The trainable view: which parameters, and which layers of stacked ones, a run trains.

Gradients, their accumulation, clipping and the optimizer's state cover only the view, so frozen
parameters cost nothing there. A view is nested dicts like the parameters, without frozen leaves, and
with only the trained layers of stacked ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxmorph.config.model_config import ModelConfig
from jaxmorph.config.run_shape import RunShape
from jaxmorph.model.architecture import gpt_signatures, lora_adapters
from jaxmorph.model.signatures import Signature

LAYER = "layer"  # the axis whose entries can be frozen one by one


@dataclass(frozen=True)
class Trainable:
    """The trained parameters of a model.

    Args:
      signatures: of every parameter of the model, by path.
      frozen: paths of parameters that are not trained at all.
      layers: the trained layers of stacked parameters; None: all.
    """

    signatures: Mapping[str, Signature]
    frozen: frozenset[str] = frozenset()
    layers: tuple[int, ...] | None = None

    @property
    def trained(self) -> dict[str, Signature]:
        """Return the signatures of the parameters in the view."""
        return {path: s for path, s in self.signatures.items() if path not in self.frozen}

    def view(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """Return the trained part of the parameters, or of a tree with the same structure."""
        return self._view(params, "")

    def merged(self, params: Mapping[str, Any], view: Mapping[str, Any]) -> dict[str, Any]:
        """Return the parameters with the trained part replaced by a view."""
        return self._merged(params, view, "")

    def sizes(self, sizes: Mapping[str, int]) -> dict[str, int]:
        """Return the sizes of the axes in the view, given those in the model."""
        layers = {} if self.layers is None else {LAYER: len(self.layers)}
        return {**sizes, **layers}

    def layers_of(self, array: Any) -> Any:
        """Return the trained layers of an array whose first axis is the layer."""
        return array if self.layers is None else array[list(self.layers), ...]

    def _view(self, node: Mapping[str, Any], path: str) -> dict[str, Any]:
        found = {}
        for name, child in node.items():
            place = f"{path}/{name}" if path else name
            if isinstance(child, Mapping):
                if part := self._view(child, place):
                    found[name] = part
            elif place not in self.frozen:
                partly = self._is_partly_trained(place)
                found[name] = child[list(self.layers or ()), ...] if partly else child
        return found

    def _merged(
        self, node: Mapping[str, Any], view: Mapping[str, Any], path: str
    ) -> dict[str, Any]:
        whole = {}
        for name, child in node.items():
            place = f"{path}/{name}" if path else name
            if isinstance(child, Mapping):
                whole[name] = self._merged(child, view.get(name, {}), place)
            elif place in self.frozen:
                whole[name] = child
            elif self._is_partly_trained(place):
                whole[name] = child.at[list(self.layers or ()), ...].set(view[name])
            else:
                whole[name] = view[name]
        return whole

    def _is_partly_trained(self, path: str) -> bool:
        return self.layers is not None and self.signatures[path].stacked[:1] == (LAYER,)


def frozen_parameters(config: ModelConfig) -> frozenset[str]:
    """Return the paths of untrained parameters: the adapted ones if their base is frozen."""
    return frozenset(lora_adapters(config) if config.lora_base == "frozen" else ())


def trainable_of(shape: RunShape) -> Trainable:
    """Return what a run of this shape trains."""
    n_layers, frozen = shape.model.n_layers, set(shape.frozen_layers)
    layers = tuple(layer for layer in range(n_layers) if layer not in frozen) if frozen else None
    return Trainable(gpt_signatures(shape.model), frozen_parameters(shape.model), layers)
