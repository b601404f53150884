"""The output folder of a training: its names, whether it can be used, what its training is."""

import dataclasses
import os
from pathlib import Path

from .config import RunConfig
from .config_file import ConfigError, differences, fingerprint, load_config
from .parts import Parts
from .teacher_cache import hash_weights

CONFIG, LOG, RESULTS, ERRORS = "config.yaml", "log.jsonl", "results.json", "errors.json"
BASELINE = "baseline.json"
STUDENT, BEST_STUDENT = "student", "student-best"
CHECKPOINTS, TRACKED = "checkpoints", "tracked"

# Settings that say how a training is watched and kept, not what it computes.
_WATCHING = ("log_every", "checkpoint_every", "keep", "trackers")


def check_output(config: RunConfig) -> None:
    """Check that the output folder can be written, and holds this training or none.

    Raises:
        ConfigError: it holds another (the message says what differs), or cannot be written.
    """
    known, kept = config.output / CONFIG, config.output / CHECKPOINTS
    # One that failed before its first checkpoint has nothing to lose, and may have been corrected.
    is_bound = (config.output / RESULTS).is_file() or any(kept.glob("step-*"))
    if known.is_file() and is_bound:
        before = load_config(known)
        changed = differences(_computed(config), _computed(before))
        if changed:
            raise ConfigError(
                f"output must be a new folder, or hold a training of the same settings: got "
                f"{config.output}, where these differ: {'; '.join(changed)}; change them back to "
                "go on, or choose another output."
            )
    check_writable("output", config.output)


def check_writable(name: str, folder: Path) -> None:
    """Check that a folder, which is made if need be, can be written.

    Raises:
        ConfigError: it cannot; the message has the `name` of its setting.
    """
    probe = folder / f".probe-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_text("", encoding="utf-8")
        probe.unlink()
    except OSError as error:
        raise ConfigError(
            f"{name} must be a folder that can be written: got {folder} ({error.strerror}); "
            "choose another."
        ) from None


def identity(config: RunConfig, parts: Parts) -> dict[str, str]:
    """What makes two trainings the same, a hash of each part: settings, data and weights.

    Weights as they were read: what a student draws or computes may depend on the machine.
    """
    found = {"settings": fingerprint(_computed(config)), "data": parts.prepared.fingerprint}
    if parts.teacher_hash is not None:
        found["weights of the teacher"] = parts.teacher_hash
    if config.student.path is not None:
        found["weights in student.path"] = hash_weights(parts.student.base_model)
    return found


def _computed(config: RunConfig) -> RunConfig:
    """The settings without those that only watch and keep, and without the folder."""
    defaults = type(config.train)()
    watching = {name: getattr(defaults, name) for name in _WATCHING}
    train_config = dataclasses.replace(config.train, **watching)
    return dataclasses.replace(config, train=train_config, output=Path("."))
