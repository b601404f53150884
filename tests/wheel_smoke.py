"""Exercises an installed wheel with Python and torch alone: python tests/wheel_smoke.py.

Every op on the C++ engine: value and gradients against the reference engine in float64 on the same
rounded inputs. No test of pytest: it runs where nothing but the wheel is installed.
"""

import sys
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import fakd_kernels as fk

# Of the norm of a result: far above rounding, far below anything that a broken build computes.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
WIDTHS = 48, 96  # of student and teacher; 70 tokens and 131 entries fill no vector
TOKENS, VOCABULARY = 70, 131

Case = tuple[Callable[..., Tensor], list[Tensor], int]


def cases() -> Iterator[tuple[str, Case]]:
    """Name -> (loss of tensors and an engine, tensors, how many of them take gradients)."""
    generator = torch.Generator().manual_seed(0)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    student, teacher = (draw(TOKENS, width) for width in WIDTHS)
    projection = draw(WIDTHS[1], WIDTHS[0]) / WIDTHS[0] ** 0.5
    heads = [draw(VOCABULARY, width) / width**0.5 for width in WIDTHS]

    def features(x, w, t, engine):
        return fk.feature_alignment(x, t, w, engine=engine).loss

    yield "feature_alignment, projected", (features, [student, projection, teacher], 2)

    def plain(x, t, engine):
        return fk.feature_alignment(x, t, euclidean="distance", engine=engine).loss

    yield "feature_alignment", (plain, [draw(TOKENS, 96), teacher], 1)

    def attention(*tensors, engine):
        return fk.attention_kl(*tensors, causal=True, engine=engine).loss

    sides = [draw(2, heads, TOKENS, 16) for heads in (4, 2, 4, 4)]
    yield "attention_kl", (attention, sides, 2)

    def maps(s, t, engine):
        return fk.attention_map_kl(s, t, inputs="scores", engine=engine).loss

    yield "attention_map_kl", (maps, [draw(2, 4, TOKENS, TOKENS) for _ in range(2)], 1)

    def outputs(h, w, th, tw, engine):
        labels = torch.arange(TOKENS)
        return fk.linear_kl(h, w, th, tw, labels=labels, ce_weight=0.5, engine=engine).loss

    yield "linear_kl", (outputs, [student, heads[0], teacher, heads[1]], 2)

    def logits(s, t, engine):
        return fk.logit_kl(s, t, temperature=2.0, engine=engine).loss

    yield "logit_kl", (logits, [draw(TOKENS, VOCABULARY) for _ in range(2)], 1)

    kept = draw(TOKENS, VOCABULARY).log_softmax(-1).topk(8)

    def top(h, w, engine):
        return fk.topk_kl(h, w, kept.indices, kept.values, ghost=True, engine=engine).loss

    yield "topk_kl", (top, [student, heads[0]], 2)


def value_and_gradients(case: Case, dtype: torch.dtype, engine: str) -> list[Tensor]:
    """In float64 of what the inputs are in dtype, where the reference engine is asked."""
    loss_of, tensors, differentiated = case
    tensors = [tensor.to(dtype) for tensor in tensors]
    if engine == "reference":
        tensors = [tensor.double() for tensor in tensors]
    leaves = [tensor.requires_grad_() for tensor in tensors[:differentiated]]
    loss = loss_of(*tensors, engine=engine)
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def check(name: str, case: Case, dtype: torch.dtype, engine: str) -> None:
    got = value_and_gradients(case, dtype, engine)
    truth = value_and_gradients(case, dtype, "reference")
    for index, (value, exact) in enumerate(zip(got, truth, strict=True)):
        error = float((value.double() - exact).norm() / exact.norm())
        if not error <= TOLERANCE[dtype]:
            raise SystemExit(f"{name}, {dtype}, {engine}, result {index}: error {error:.1e}")


def check_compiled() -> None:
    """Schema, fake and autograd formula serve torch.compile; this backend needs no compiler."""
    name, (loss_of, tensors, _) = next(cases())
    compiled = torch.compile(loss_of, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*tensors, engine="cpu"), loss_of(*tensors, engine="cpu"))
    sys.stdout.write(f"{name}: compiled\n")


def main() -> None:
    sys.stdout.write(f"torch {torch.__version__}, fakd_kernels of {fk.__path__[0]}\n")
    sys.stdout.write(f"{fk.engines()!r}\n")
    if not (status := fk.engines()["cpu"]).is_usable:
        raise SystemExit(f"the wheel must bring the C++ engine: {status.reason}")
    for name, case in cases():
        for dtype in TOLERANCE:
            check(name, case, dtype, "cpu")
        sys.stdout.write(f"{name}: cpu as reference\n")
    check_compiled()


if __name__ == "__main__":
    main()
