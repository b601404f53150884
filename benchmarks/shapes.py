"""Named shapes, from real pairs of teacher and student."""

from dataclasses import dataclass

from .harness import Goal


@dataclass(frozen=True)
class FeatureShape:
    """Layer pairs of `feature_alignment`: `pairs` times N rows of Ds and Dt columns."""

    pairs: int
    rows: int
    student_width: int
    teacher_width: int
    goals: tuple[Goal, ...] = ()

    @property
    def is_projected(self) -> bool:
        return self.student_width != self.teacher_width


@dataclass(frozen=True)
class AttentionShape:
    """Layer pairs of `attention_kl`: `pairs` times B texts of T tokens, H heads of width K."""

    pairs: int
    batch: int
    tokens: int
    heads: tuple[int, int]  # of the student and of the teacher
    widths: tuple[int, int]  # of a head, likewise
    is_causal: bool = False
    goals: tuple[Goal, ...] = ()

    @property
    def is_mean(self) -> bool:
        return self.heads[0] != self.heads[1]

    @property
    def gflop(self) -> float:
        """2 FLOPs of every product needed: the scores of both sides, dQ and dK."""
        keys = (self.tokens + 1) / 2 if self.is_causal else self.tokens
        columns = 3 * self.heads[0] * self.widths[0] + self.heads[1] * self.widths[1]
        return 2 * self.pairs * self.batch * self.tokens * keys * columns / 1e9


ATTENTION_SHAPES = {
    # MiniLM (12 heads of 32) under BERT-base (12 of 64).
    "B8 H12 T512, 32 and 64 wide": AttentionShape(
        1,
        8,
        512,
        (12, 12),
        (32, 64),
        goals=(
            Goal("eager", at_least=11),
            Goal("compiled", at_least=3.8),
            Goal("limit", at_most=1.6),
        ),
    ),
    # A small decoder under a large one.
    "B1 H8 T2048, 64 and 128 wide": AttentionShape(
        1,
        1,
        2048,
        (8, 8),
        (64, 128),
        goals=(
            Goal("eager", at_least=7),
            Goal("compiled", at_least=3.3),
            Goal("limit", at_most=1.4),
        ),
    ),
    "B1 H8 T2048, causal": AttentionShape(
        1,
        1,
        2048,
        (8, 8),
        (64, 128),
        is_causal=True,
        goals=(
            Goal("eager", at_least=10),
            Goal("compiled", at_least=5),
            Goal("not causal", at_most=0.75),
        ),
    ),
    # MiniLM under its own kind, six pairs of short texts.
    "6 x B32 H12 T128, 32 wide": AttentionShape(
        6,
        32,
        128,
        (12, 12),
        (32, 32),
        goals=(
            Goal("eager", at_least=5),
            Goal("compiled", at_least=2),
            Goal("limit", at_most=2.2),
        ),
    ),
    # Unequal head counts: maps are averaged over heads first.
    "B8 H6 and 12 T512, mean": AttentionShape(
        1,
        8,
        512,
        (6, 12),
        (32, 32),
        goals=(Goal("eager", at_least=5), Goal("compiled", at_least=2)),
    ),
}


@dataclass(frozen=True)
class OutputShape:
    """N tokens over a vocabulary of V; widths of hidden states, or None where logits are given."""

    tokens: int
    vocabulary: int
    widths: tuple[int, int] | None = None  # of the student and of the teacher
    goals: tuple[Goal, ...] = ()

    @property
    def gflop(self) -> float:
        """2 FLOPs of every product needed: logits of both sides, dH and dW."""
        if self.widths is None:
            return 0.0
        return 2 * self.tokens * self.vocabulary * (3 * self.widths[0] + self.widths[1]) / 1e9


LINEAR_SHAPES = {
    # A Llama-2 vocabulary under small decoders.
    "N1024 V32000, 512 and 1024 wide": OutputShape(
        1024,
        32000,
        (512, 1024),
        (
            Goal("eager", at_least=1.7),
            Goal("compiled", at_least=1.1),
            Goal("liger", at_least=1.2),
            Goal("limit", at_most=1.1),
        ),
    ),
    # Qwen's vocabulary.
    "N512 V151936, 256 and 512 wide": OutputShape(
        512,
        151936,
        (256, 512),
        (
            Goal("eager", at_least=2),
            Goal("compiled", at_least=1.1),
            Goal("liger", at_least=1.25),
            Goal("limit", at_most=1.15),
        ),
    ),
}

LOGIT_SHAPES = {
    "2048 x 32000": OutputShape(
        2048,
        32000,
        goals=(
            Goal("eager", at_least=5),
            Goal("compiled", at_least=2),
            Goal("limit", at_most=1.3),
        ),
    ),
    # The logits of a classifier: never slower.
    "4096 x 8": OutputShape(
        4096, 8, goals=(Goal("eager", at_least=1), Goal("compiled", at_least=1))
    ),
}


@dataclass(frozen=True)
class StepShape:
    """A student and its teacher, in this order, and a batch of B texts of T tokens."""

    batch: int
    tokens: int
    layers: tuple[int, int]
    widths: tuple[int, int]
    heads: tuple[int, int]
    intermediate: tuple[int, int]
    vocabulary: int
    key_heads: int | None = None  # of both, for decoders; None: encoders


STEP_SHAPES = {
    # TinyBERT's four layers under BERT-base, as a classifier.
    "BERT-base to 4 x 312, B8 T128": StepShape(
        8, 128, (4, 12), (312, 768), (12, 12), (1200, 3072), 30522
    ),
    # SmolLM2-135M to 8 of its blocks.
    "SmolLM2-135M to 8 blocks, B2 T512": StepShape(
        2, 512, (8, 30), (576, 576), (9, 9), (1536, 1536), 49152, key_heads=3
    ),
}

FEATURE_SHAPES = {
    # 12 layers of BERT-base against a copy of its width: 32 sequences of 128 tokens.
    "12 x 4096 x 768, no projection": FeatureShape(
        12,
        4096,
        768,
        768,
        (Goal("eager", at_least=15), Goal("compiled", at_least=3), Goal("limit", at_most=1.3)),
    ),
    # MiniLM (384) under BERT-base (768), 6 pairs.
    "6 x 4096, 384 to 768": FeatureShape(
        6,
        4096,
        384,
        768,
        (Goal("eager", at_least=1.8), Goal("compiled", at_least=1.15), Goal("limit", at_most=1.1)),
    ),
    # A narrow student under a BERT-large (1024), 6 pairs: the gram route.
    "6 x 4096, 256 to 1024": FeatureShape(
        6,
        4096,
        256,
        1024,
        (Goal("eager", at_least=2.5), Goal("compiled", at_least=1.45), Goal("limit", at_most=0.92)),
    ),
    # TinyBERT-4 (312) under BERT-base, short batches.
    "4 x 1024, 312 to 768": FeatureShape(4, 1024, 312, 768),
}
