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
