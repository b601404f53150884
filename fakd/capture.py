"""Hidden states out of a model: chosen layers only, and no hook left behind."""

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .architectures import Blocks, find_blocks


@contextmanager
def capture_hidden_states(
    model: nn.Module, layers: Iterable[int], *, path: str | None = None
) -> Iterator[dict[int, Tensor]]:
    """Keep the hidden states of chosen layers of each forward pass of `model`.

    Equivalent to, without storing the layers that nobody asked for:

        states = model(**batch, output_hidden_states=True).hidden_states

    Layer k is what enters block k + 1, so 0 is the embeddings; the last one is what leaves the
    last block. That is Hugging Face's `hidden_states[k]`, with one difference: decoders (and
    ModernBERT) apply a final norm, and Hugging Face returns its output as the last hidden state.
    Here the last one is the block's own output, before that norm, like all the others.

    Args:
        model: a Hugging Face encoder or decoder, with or without a head. Hooks sit only on the
            blocks beside the chosen layers.
        layers: from 0 (embeddings) to the number of blocks.
        path: where the list of blocks is, if it cannot be found (see `find_blocks`).

    Yields:
        A dict from layer to tensor [B, T, D], with its gradient history. Empty before the first
        forward pass, emptied when the next one begins; it stays readable after the context.

    Raises:
        ValueError: a layer that the model lacks; blocks that cannot be found.
        RuntimeError: in forward, where a chosen layer did not run (LayerDrop), or where reentrant
            gradient checkpointing has cut it off from its gradients.

    Works under gradient checkpointing (what backward recomputes is not captured), with contexts
    nested, and on several models at once. Hooks that are added after `torch.compile` has compiled
    a model are not seen by it: compile inside the context.
    """
    blocks = find_blocks(model, path)
    recorder = _Recorder(blocks, _check_layers(model, layers, len(blocks)))
    handles = []
    try:
        handles += recorder.register()
        yield recorder.states
    finally:
        for handle in handles:
            handle.remove()


class _Recorder:
    """The hooks of one context, and what they have seen."""

    def __init__(self, blocks: Blocks, layers: set[int]) -> None:
        self.states: dict[int, Tensor] = {}
        self._blocks = blocks
        self._layers = layers
        # Only a forward pass of the owner records: gradient checkpointing runs blocks once more in
        # backward, and those tensors belong to nobody.
        self._is_recording = False
        self._calls: Counter[nn.Module] = Counter()

    def register(self) -> list[torch.utils.hooks.RemovableHandle]:
        owner, modules = self._blocks.owner, self._blocks.modules
        # A block that runs several times gets one hook, which counts its calls.
        entered = dict.fromkeys(modules[layer] for layer in self._layers if layer < len(modules))
        handles = [
            owner.register_forward_pre_hook(self._begin),
            owner.register_forward_hook(self._end, always_call=True),
        ]
        handles += [
            module.register_forward_pre_hook(self._enter, with_kwargs=True) for module in entered
        ]
        if len(modules) in self._layers:
            handles.append(modules[-1].register_forward_hook(self._leave))
        return handles

    def _begin(self, _owner, _args) -> None:
        self.states.clear()
        self._calls.clear()
        self._is_recording = True

    def _enter(self, module, args, kwargs) -> None:
        if not self._is_recording:
            return
        places = [k for k, block in enumerate(self._blocks.modules) if block is module]
        layer = places[self._calls[module] % len(places)]
        self._calls[module] += 1
        if layer in self._layers:
            self.states[layer] = _tensor(module, args or kwargs.get("hidden_states"))

    def _leave(self, module, _args, output) -> None:
        if self._is_recording:
            self.states[len(self._blocks)] = _tensor(module, output)

    def _end(self, _owner, _args, output) -> None:
        self._is_recording = False
        # None: forward raised, and that error must not be hidden by one of ours.
        if output is None:
            return
        if missing := sorted(self._layers - self.states.keys()):
            raise RuntimeError(
                f"layers to capture must run in every forward pass: {missing} did not; switch "
                "LayerDrop off, or leave them out of the map."
            )
        if torch.is_grad_enabled():
            for layer, state in self.states.items():
                self._check_gradient(layer, state)

    def _check_gradient(self, layer: int, state: Tensor) -> None:
        if state.requires_grad or layer == 0:
            return
        if any(
            parameter.requires_grad for parameter in self._blocks.modules[layer - 1].parameters()
        ):
            raise RuntimeError(
                f"layer {layer} must be captured with its gradients: reentrant gradient "
                "checkpointing hides them; switch it to use_reentrant=False."
            )


def _tensor(module: nn.Module, value: object) -> Tensor:
    """The hidden state in what a block takes or returns: itself, or the first of several."""
    first = value[0] if isinstance(value, (tuple, list)) and value else value
    if not isinstance(first, Tensor):
        raise RuntimeError(
            f"{type(module).__name__} must pass its hidden state on as a tensor, or first in a "
            f"tuple: got {type(first).__name__}; pass the path of the list of blocks."
        )
    return first


def _check_layers(model: nn.Module, layers: Iterable[int], count: int) -> set[int]:
    layers = list(layers)
    if not layers:
        raise ValueError("layers must name at least one layer: got none; pass [1] for block 1.")
    for layer in layers:
        if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer <= count:
            raise ValueError(
                f"layers must be integers from 0 (embeddings) to {count}: got {layer!r}; "
                f"{type(model).__name__} has {count} blocks."
            )
    return set(layers)
