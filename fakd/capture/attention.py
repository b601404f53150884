"""Queries and keys out of a model, as its own attention function receives them.

The models of transformers ask `AttentionInterface.get_interface` for their attention function at
every call. While a context is open, that method answers with the same function behind a recorder.
A function registered under a name of our own would not do: by the name in its config a model also
chooses its masks, its kernels and its code paths, and "eager" stands for another function in every
model.
"""

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..architectures import find_blocks
from .masks import Pattern, read_pattern
from .recorder import Recorder, check_layers, is_trained, refuse_hidden_gradients

# Options of attention functions that change the scores or the softmax, and what they are.
_UNSUPPORTED = {
    "position_bias": "a relative position bias",
    "s_aux": "attention sinks",
    "sinks": "attention sinks",
    "indices": "a choice of keys for every query",
    "block_indices": "a choice of keys for every query",
    "cache": "a paged cache",
    "cu_seq_lens_q": "packed documents",
    "cu_seq_lens_k": "packed documents",
}


@dataclass(frozen=True)
class AttentionInputs:
    """What one attention layer computes its probabilities from.

    scores = softcap(scale * query.key), softmax over the keys j that count, with j <= i (where
    causal) and |i - j| < window. What `fakd_kernels.attention_kl` takes.
    """

    query: Tensor  # [B, H, T, K], after rotary embedding and norms
    key: Tensor  # [B, Hkv, T, K], likewise; Hkv divides H
    value: Tensor | None  # [B, Hkv, T, Kv]; None unless asked for
    scale: float
    softcap: float | None
    is_causal: bool
    window: int | None  # None also where it hides nothing
    mask: Tensor | None  # [B, T] bool, the tokens that count; None: all do


@contextmanager
def capture_attention(
    model: nn.Module, layers: Iterable[int], *, path: str | None = None, values: bool = False
) -> Iterator[dict[int, AttentionInputs]]:
    """Keep the queries and keys of chosen layers of each forward pass of `model`.

    What these maps are made from, without switching SDPA or flash attention off:

        maps = model(**batch, output_attentions=True).attentions  # "eager" attention only

    Scale, softcap, causality, window and padding are read from the call of the attention function,
    which then runs unchanged. Dropout of attention weights is no part of what is kept.

    Args:
        model: a transformers encoder or decoder that uses the attention interface, with or without
            a head.
        layers: the attention of block k is layer k, from 1 to the number of blocks: the numbers of
            hidden states.
        path: where the list of blocks is, if it cannot be found (see `find_blocks`).
        values: keep the values too.

    Yields:
        A dict from layer to `AttentionInputs`, whose tensors have their gradient history. Empty
        before the first forward pass, emptied when the next one begins; it stays readable after
        the context.

    Raises:
        ValueError: a layer that the model lacks; blocks that cannot be found.
        RuntimeError: in forward, where a chosen layer did not run, or ran without the attention
            interface, twice, against other tokens (cross attention, a filled cache), with a mask or
            bias that is not padding, causality and a window, or hidden from its gradients by
            reentrant gradient checkpointing; and where the model is compiled.

    Works under gradient checkpointing (what backward recomputes is not captured), autocast and
    data parallelism, with contexts nested, and on several models at once. Not for several threads.
    """
    blocks = find_blocks(model, path)
    recorder = _Attention(blocks, check_layers(model, layers, 1, len(blocks)), values)
    with recorder as captured, _intercepted(recorder):
        yield captured


class _Attention(Recorder):
    """Hooks on the chosen blocks: they say whose turn it is when attention is called."""

    def __init__(self, blocks, layers, values: bool) -> None:
        super().__init__(blocks, layers)
        self._keeps_values = values
        chosen = dict.fromkeys(blocks.modules[layer - 1] for layer in sorted(layers))
        self._block_of = {module: block for block in chosen for module in block.modules()}
        self._layer_of: dict[nn.Module, int] = {}  # of the blocks that have begun
        self._patterns: list[tuple[tuple, Pattern]] = []

    def __enter__(self) -> dict[int, AttentionInputs]:
        for block in dict.fromkeys(self._block_of.values()):
            self._register(block.register_forward_pre_hook, self._enter)
        return super().__enter__()

    def _begin(self, owner, args) -> None:
        if torch.compiler.is_compiling():
            _refuse_compilation()
        super()._begin(owner, args)
        self._layer_of.clear()

    def _end(self, owner, args, output) -> None:
        self._patterns.clear()
        super()._end(owner, args, output)

    def _enter(self, block, _args) -> None:
        if self._is_recording:
            self._layer_of[block] = self._place(block) + 1

    def _check(self) -> None:
        silent = sorted(self._layers & set(self._layer_of.values()) - self.captured.keys())
        if silent:
            block = self._blocks.modules[silent[0] - 1]
            raise RuntimeError(
                f"{type(block).__name__} must compute attention through the attention interface of "
                f"transformers: got no call of it in layers {silent}; use a model that does (its "
                "file names ALL_ATTENTION_FUNCTIONS), run it uncompiled, leave these layers out of "
                "the map (attention_mapping of a Distiller), or align hidden states instead."
            )
        super()._check()

    def record(
        self, implementation, module, query, key, value, attention_mask=None, **options
    ) -> None:
        """Keep what an attention function is given, if it belongs to a chosen layer."""
        block = self._block_of.get(module)
        if block is None:
            return
        if torch.compiler.is_compiling():
            _refuse_compilation()
        layer = self._layer_of.get(block)
        if not self._is_recording or layer not in self._layers:
            return
        _check_call(layer, implementation, module, query, key, options)
        if layer in self.captured:
            raise RuntimeError(
                f"layer {layer} must compute attention once in a forward pass: got a second call, "
                f"by {type(module).__name__}; leave that layer out of the map (cross attention and "
                "blocks of several attentions cannot be aligned)."
            )
        if self._wants_gradients and not torch.is_grad_enabled() and is_trained(module):
            refuse_hidden_gradients(layer)
        pattern = self._pattern(implementation, module, query, attention_mask, options)
        scale, softcap = options.get("scaling"), options.get("softcap")
        self.captured[layer] = AttentionInputs(
            query,
            key,
            value if self._keeps_values else None,
            query.shape[-1] ** -0.5 if scale is None else float(scale),
            None if softcap is None else float(softcap),
            pattern.is_causal,
            pattern.window,
            pattern.mask,
        )

    def _pattern(self, implementation, module, query, attention_mask, options) -> Pattern:
        is_causal = options.get("is_causal")
        if is_causal is None:
            is_causal = getattr(module, "is_causal", True)
        call = (implementation, bool(is_causal), options.get("sliding_window"))
        # Most layers share one mask, and reading it once gives them one [B, T] tensor.
        for (mask, *known), pattern in self._patterns:
            if mask is attention_mask and tuple(known) == call:
                return pattern
        pattern = read_pattern(
            implementation,
            attention_mask,
            batch=query.shape[0],
            tokens=query.shape[2],
            is_causal=call[1],
            window=call[2],
        )
        self._patterns.append(((attention_mask, *call), pattern))
        return pattern


def _check_call(layer: int, implementation, module, query, key, options) -> None:
    if getattr(module, "is_cross_attention", False) or query.shape[2] != key.shape[2]:
        raise RuntimeError(
            f"layer {layer} must attend from its tokens to the same tokens: got "
            f"{query.shape[2]} queries and {key.shape[2]} keys of {type(module).__name__}; run the "
            "model without a filled cache (use_cache=False), and leave cross attention out of the "
            "map."
        )
    for name, meaning in _UNSUPPORTED.items():
        if options.get(name) is not None:
            raise RuntimeError(
                f"layer {layer} must have attention that follows from queries, keys and padding: "
                f"got {meaning} ({name}) in {type(module).__name__}; leave that out, or align "
                "hidden states instead."
            )
    if implementation == "sdpa" and options.get("softcap") is not None:
        raise RuntimeError(
            f"layer {layer} must apply its softcap: got 'sdpa' attention, which has none; load "
            f"{type(module).__name__} with attn_implementation='eager' or flash attention."
        )
    if isinstance(options.get("scaling"), Tensor):
        raise RuntimeError(
            f"layer {layer} must scale its scores by a number: got a tensor in "
            f"{type(module).__name__}; align hidden states instead."
        )
    # Flash attention cuts a batch of one row where positions restart.
    position_ids = options.get("position_ids")
    is_one_row = query.shape[0] == 1 and position_ids is not None
    if is_one_row and "flash" in str(implementation) and (position_ids.diff() < 0).any():
        raise RuntimeError(
            f"layer {layer} must have one document in each row: got position_ids that restart; "
            "unpack the batch."
        )


_recorders: list[_Attention] = []
_originals: list[Callable] = []


@contextmanager
def _intercepted(recorder: _Attention) -> Iterator[None]:
    # Here, because the losses need torch alone.
    from transformers import AttentionInterface

    if not _recorders:
        _originals.append(AttentionInterface.get_interface)
        AttentionInterface.get_interface = _get_interface
    _recorders.append(recorder)
    try:
        yield
    finally:
        _recorders.remove(recorder)
        if not _recorders:
            AttentionInterface.get_interface = _originals.pop()


def _get_interface(interface, name: str | None, default: Callable) -> Callable:
    """In place of `AttentionInterface.get_interface`: the same function, behind the recorders."""
    function = _originals[0](interface, name, default)
    return functools.partial(_record_and_call, name, function)


def _record_and_call(name: str | None, function: Callable, module: nn.Module, *args, **kwargs):
    for recorder in _recorders:
        recorder.record(name, module, *args, **kwargs)
    return function(module, *args, **kwargs)


@torch.compiler.disable(reason="capture_attention must see the model run uncompiled")
def _refuse_compilation() -> None:
    raise RuntimeError(
        "capture_attention must see the model run uncompiled: got a call inside torch.compile; "
        "call the module that was compiled (its _orig_mod) inside the context; give a Distiller of "
        "attention uncompiled models, and leave it uncompiled too."
    )
