"""Settings in files: a `RunConfig` from YAML and overrides, and back."""

import dataclasses
import difflib
import hashlib
import json
import re
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError

from .config import RunConfig

T = TypeVar("T")
# "name=value", the value as YAML; or a name and a value that is taken as it stands.
Override = str | tuple[str, Any]


class ConfigError(ValueError):
    """Settings that cannot be; the message says which, and what to do."""


def load_config(path: Path | None, overrides: Sequence[Override] = ()) -> RunConfig:
    """Read settings from a YAML file, then change some of them.

    Args:
        path: has the fields of `RunConfig`, nested; None starts from nothing.
        overrides: see `Override`, the names dotted ("train.learning_rate=1e-3"); they win over
            the file, the last over those before.

    Raises:
        ConfigError: no such file, no YAML, an unknown name (with the nearest right one), a value
            of another type, or values that do not go together.
    """
    return config_from(read_settings(path, overrides))


def config_from(settings: Mapping[str, Any]) -> RunConfig:
    """Settings as nested mappings, checked."""
    return settings_from(settings, RunConfig)


def settings_from(settings: Mapping[str, Any], kind: type[T]) -> T:
    """Settings as nested mappings, checked, as a dataclass of this kind."""
    _check_names(settings, kind, "")
    try:
        return TypeAdapter(kind).validate_python(_frozen(settings))
    except ValidationError as error:
        raise ConfigError("\n".join(_sentence(each) for each in error.errors())) from None


def read_settings(path: Path | None, overrides: Sequence[Override] = ()) -> dict[str, Any]:
    """What a file says, with what overrides change; as for `load_config`, unchecked."""
    settings = {} if path is None else _read(path)
    for override in overrides:
        name, value = _assignment(override) if isinstance(override, str) else override
        _put(settings, name.split("."), value)
    return settings


def merge(settings: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Nested settings, some of them changed."""
    merged = dict(settings)
    for name, value in changes.items():
        before = merged.get(name)
        is_nested = isinstance(value, Mapping) and isinstance(before, Mapping)
        merged[name] = merge(before, value) if is_nested else value
    return merged


def to_yaml(config: RunConfig) -> str:
    """All settings, defaults included; `load_config` reads it back."""
    plain = json.loads(json.dumps(dataclasses.asdict(config), default=str))
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)


def differences(config: RunConfig, other: RunConfig) -> list[str]:
    """Each setting that differs, as "name: this, was other"."""
    ours, theirs = _flat(dataclasses.asdict(config)), _flat(dataclasses.asdict(other))
    return [
        f"{name}: {ours.get(name)}, was {theirs.get(name)}"
        for name in ours | theirs
        if ours.get(name) != theirs.get(name)
    ]


def fingerprint(config: RunConfig) -> str:
    """A hash of all settings."""
    return hashlib.sha256(to_yaml(config).encode()).hexdigest()[:16]


def _read(path: Path) -> dict:
    if not path.is_file():
        raise ConfigError(f"config must be a file that exists: got {path}; check the path.")
    settings = _parse(path.read_text(encoding="utf-8"), path.name)
    if not isinstance(settings, dict):
        raise ConfigError(
            f"{path.name} must hold names with values: got {type(settings).__name__}; write, for "
            "example, `task: classification`."
        )
    return settings


def _assignment(override: str) -> tuple[str, Any]:
    name, equals, value = override.partition("=")
    if not equals or not name:
        raise ConfigError(
            f"a setting must be written name=value: got {override!r}; write, for example, "
            "train.learning_rate=1e-3."
        )
    return name, _parse(value, name)


def _parse(text: str, name: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        where = getattr(error, "problem_mark", None)
        line = f", line {where.line + 1}" if where is not None else ""
        problem = getattr(error, "problem", None) or error
        raise ConfigError(f"{name} must be YAML: got {problem}{line}; correct it.") from None


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads 1e-3 as a text; people mean the number."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"),
    list("-+0123456789"),
)


def _put(settings: dict, path: list[str], value: Any) -> None:
    for part in path[:-1]:
        inner = settings.get(part)
        if not isinstance(inner, dict):
            inner = settings[part] = {}
        settings = inner
    settings[path[-1]] = value


def _check_names(settings: Mapping[str, Any], kind: type, prefix: str) -> None:
    fields = typing.get_type_hints(kind)
    for name, value in settings.items():
        if name not in fields:
            near = difflib.get_close_matches(str(name), fields, n=1, cutoff=0.5)
            remedy = f"did you mean {prefix}{near[0]}?" if near else f"known: {', '.join(fields)}."
            raise ConfigError(f"settings must be known: got {prefix}{name}; {remedy}")
        section = _section(fields[name])
        if section is not None and isinstance(value, Mapping):
            _check_names(value, section, f"{prefix}{name}.")


def _frozen(value: Any) -> Any:
    """Lists as tuples, so that equal settings are equal."""
    if isinstance(value, Mapping):
        return {name: _frozen(part) for name, part in value.items()}
    return tuple(map(_frozen, value)) if isinstance(value, (list, tuple)) else value


def _section(hint: Any) -> type | None:
    """The dataclass that a field holds, if it holds one."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return next((o for o in options if dataclasses.is_dataclass(o)), None)


def _sentence(error: Mapping[str, Any]) -> str:
    # The checks of the dataclasses themselves speak our language already.
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])
    name = ".".join(str(part) for part in error["loc"]) or "settings"
    if error["type"] == "missing":
        return f"{name} must be given: got nothing; add it."
    received = error.get("input")
    return f"{name}: {error['msg'].lower()}: got {received!r}; change it."


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = [*value] if isinstance(value, tuple) else value
    return flat
