"""What the captures share: they record during the model's forward pass, and check at its end."""

import heapq
import itertools
import threading
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ..architectures import Blocks

# Of hooks that are gone: a heap, so that equal contexts take equal ids. PyTorch's own stay below.
_free_ids: list[int] = []
_new_ids = itertools.count(1 << 62)
_lock = threading.Lock()


class Captured(dict):
    """From layer to what was captured of it; says why an entry is absent."""

    def __missing__(self, layer):
        raise KeyError(
            f"layer {layer} must be captured before it is read: got layers {sorted(self)}; name it "
            "and run the model inside the context (a model compiled before does not see it)."
        )


class Recorder:
    """The hooks of one context, and what they have seen: `captured`, from layer to value."""

    def __init__(self, blocks: Blocks, layers: set[int]) -> None:
        self.captured: dict[int, Any] = Captured()
        self._blocks = blocks
        self._layers = layers
        self._handles: list[RemovableHandle] = []
        # Only a forward pass of the owner records: gradient checkpointing runs blocks once more in
        # backward, and those tensors belong to nobody.
        self._is_recording = False
        self._wants_gradients = False
        self._calls: Counter[nn.Module] = Counter()

    def __enter__(self) -> dict[int, Any]:
        owner = self._blocks.owner
        self._register(owner.register_forward_pre_hook, self._begin)
        self._register(owner.register_forward_hook, self._end, always_call=True)
        return self.captured

    @torch.compiler.disable(reason="hooks come and go outside of graphs")
    def __exit__(self, *_) -> None:
        for handle in self._handles:
            handle.remove()
            with _lock:
                heapq.heappush(_free_ids, handle.id)

    @torch.compiler.disable(reason="hooks come and go outside of graphs")
    def _register(self, register: Callable, hook: Callable, **options) -> None:
        """Add a hook under the id of one that is gone.

        Compiled models guard on the ids of their hooks: PyTorch's own, ever new, would have them
        compiled again for every context, that is in every step.
        """
        handle = register(hook, **options)
        with _lock:
            place = heapq.heappop(_free_ids) if _free_ids else next(_new_ids)
        for reference in (handle.hooks_dict_ref, *handle.extra_dict_ref):
            hooks = reference()
            if handle.id in hooks:
                hooks[place] = hooks.pop(handle.id)
        handle.id = place
        self._handles.append(handle)

    def _begin(self, _owner, _args) -> None:
        self.captured.clear()
        self._calls.clear()
        self._is_recording = True
        self._wants_gradients = torch.is_grad_enabled()

    def _end(self, _owner, _args, output) -> None:
        self._is_recording = False
        # None: forward raised, and that error must not be hidden by one of ours.
        if output is not None:
            self._check()

    def _check(self) -> None:
        """Raise where the forward pass did not give what was asked for."""
        if missing := sorted(self._layers - self.captured.keys()):
            raise RuntimeError(
                f"layers to capture must run in every forward pass: {missing} did not; switch "
                "LayerDrop off, or leave them out of the map."
            )

    def _place(self, block: nn.Module) -> int:
        """Count a call of this block: its place, from 0, among all that run."""
        places = [k for k, module in enumerate(self._blocks.modules) if module is block]
        place = places[self._calls[block] % len(places)]
        self._calls[block] += 1
        return place


def check_layers(model: nn.Module, layers: Iterable[int], first: int, count: int) -> set[int]:
    """The layers as a set, each from `first` to `count`."""
    layers = list(layers)
    if not layers:
        raise ValueError("layers must name at least one layer: got none; pass [1] for block 1.")
    lowest = "1 (the embeddings, 0, have no attention)" if first else "0 (embeddings)"
    for layer in layers:
        if isinstance(layer, bool) or not isinstance(layer, int) or not first <= layer <= count:
            raise ValueError(
                f"layers must be integers from {lowest} to {count}: got {layer!r}; "
                f"{type(model).__name__} has {count} blocks."
            )
    return set(layers)


def refuse_hidden_gradients(layer: int) -> None:
    raise RuntimeError(
        f"layer {layer} must be captured with its gradients: reentrant gradient checkpointing "
        "hides them; switch it to use_reentrant=False."
    )


def is_trained(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())
