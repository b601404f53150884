"""Hidden states out of a model: chosen layers only, and no hook left behind."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from ..architectures import find_blocks
from .recorder import Recorder, check_layers, is_trained, refuse_hidden_gradients


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
    nested, and on several models at once. Compiled models compile in the first of equal contexts
    only. Hooks are not seen by what `torch.compile` has compiled outside of a context, in the same
    grad mode: run the model inside alone, or outside under `torch.no_grad()`.
    """
    blocks = find_blocks(model, path)
    with _HiddenStates(blocks, check_layers(model, layers, 0, len(blocks))) as states:
        yield states


class _HiddenStates(Recorder):
    """Hooks on the blocks beside the chosen layers."""

    def __enter__(self) -> dict[int, Tensor]:
        modules = self._blocks.modules
        # A block that runs several times gets one hook, which counts its calls.
        entered = dict.fromkeys(modules[layer] for layer in self._layers if layer < len(modules))
        for module in entered:
            self._register(module.register_forward_pre_hook, self._enter, with_kwargs=True)
        if len(modules) in self._layers:
            self._register(modules[-1].register_forward_hook, self._leave)
        return super().__enter__()

    def _enter(self, block, args, kwargs) -> None:
        if not self._is_recording:
            return
        layer = self._place(block)
        if layer in self._layers:
            self.captured[layer] = _tensor(block, args or kwargs.get("hidden_states"))

    def _leave(self, block, _args, output) -> None:
        if self._is_recording:
            self.captured[len(self._blocks)] = _tensor(block, output)

    def _check(self) -> None:
        super()._check()
        if not self._wants_gradients:
            return
        for layer, state in self.captured.items():
            if (
                layer > 0
                and not state.requires_grad
                and is_trained(self._blocks.modules[layer - 1])
            ):
                refuse_hidden_gradients(layer)


def _tensor(block: nn.Module, value: object) -> Tensor:
    """The hidden state in what a block takes or returns: itself, or the first of several."""
    first = value[0] if isinstance(value, (tuple, list)) and value else value
    if not isinstance(first, Tensor):
        raise RuntimeError(
            f"{type(block).__name__} must pass its hidden state on as a tensor, or first in a "
            f"tuple: got {type(first).__name__}; pass the path of the list of blocks."
        )
    return first
