"""Reads a run's settings: YAML plus dotted overrides (`train.lr=1e-4`).

`load` turns every complaint into one `ConfigError` whose lines name the dotted path, the value, and the remedy.
YAML is read as YAML, except that 1e-4 is a number (version 1.1 takes it for text), that 1:30 and 010 are not (it takes
them for 90 and 8), and that a key given twice is an error.
"""

from __future__ import annotations

import difflib
import re
import typing
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from drift.config.schema import PATTERNS, Config, ConfigError
from drift.config.section import Section


def load(path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """Reads a YAML file, applies `a.b=value` overrides (values are YAML), and checks the whole.

    Raises ConfigError, one line a complaint; OSError if the file cannot be read.
    """
    raw = _read(path)
    for override in overrides:
        _apply(raw, override)
    return parse(raw)


def _read(path: str | Path) -> dict[str, Any]:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 ({error}); save it as that") from None
    raw = _parse(text, str(path))
    if raw is None:
        raw = {}
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: {raw!r} is not a mapping; write `name: …` and the sections, one a line")
    return raw


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting of a run, and where its value is from."""

    path: str  # dotted
    value: Any
    default: Any  # of its section alone; MISSING for one that has none
    origin: str  # file, command line, default, or other settings, which it follows from


MISSING = "(none)"


def explain(path: str | Path, overrides: Iterable[str] = ()) -> list[Setting]:
    """Every setting of a config in the schema's order, as `load` resolves it. Raises as `load` does."""
    overrides = list(overrides)
    config, raw, changed = load(path, overrides), _read(path), dict[str, Any]()
    for override in overrides:
        _apply(changed, override)

    def origin(keys: tuple[str, ...], value: Any, default: Any) -> str:
        for source, name in ((changed, "command line"), (raw, "file")):
            inside: Any = source
            for key in keys:
                inside = inside.get(key, MISSING) if isinstance(inside, dict) else MISSING
            if inside is not MISSING and inside == (list(value) if isinstance(value, tuple) else value):
                return name
        return "default" if value == default else "other settings"

    def walk(section: Section, keys: tuple[str, ...]) -> Iterator[Setting]:
        for key, field in type(section).model_fields.items():
            here, value = (*keys, key), getattr(section, key)
            if isinstance(value, Section):
                yield from walk(value, here)
                continue
            default = MISSING if field.is_required() else field.get_default(call_default_factory=True)
            shown = (
                [item.model_dump() if isinstance(item, Section) else item for item in value]
                if isinstance(value, list)
                else value
            )
            known = "file" if isinstance(value, list) and any(isinstance(item, Section) for item in value) else None
            yield Setting(".".join(here), shown, default, known or origin(here, value, default))

    return list(walk(config, ()))


def parse(raw: dict[str, Any]) -> Config:
    """Checks a plain mapping, as YAML gives it. Raises ConfigError."""
    complaints = [_unknown(path) for path in _unknown_paths(Config, raw, ())]
    if complaints:
        raise ConfigError("\n".join(complaints))
    try:
        return Config.model_validate(raw)
    except ValidationError as error:
        raise ConfigError("\n".join(map(_ill_typed, error.errors()))) from None


def dump(config: Config) -> str:
    """The YAML that `load` reads back as the same config."""
    return yaml.dump(config.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


# --- YAML ---


class _Loader(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if key_node.value in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"{key_node.value!r} is given twice", problem_mark=key_node.start_mark
                )
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)

    def _plain_number(self, node: yaml.ScalarNode) -> float:
        """Not what only YAML 1.1 takes for a number: 1:30 for 90, to the base of 60, and 010 for 8."""
        digits = node.value.lstrip("+-").replace("_", "")
        if ":" in digits or re.fullmatch(r"0[0-9]+", digits):
            raise yaml.MarkedYAMLError(
                problem=f"{node.value} is no decimal number; write it as one, or in quotes where it is text",
                problem_mark=node.start_mark,
            )
        integer = node.tag == "tag:yaml.org,2002:int"
        return self.construct_yaml_int(node) if integer else self.construct_yaml_float(node)


for _kind in ("int", "float"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_kind}", _Loader._plain_number)


class _Dumper(yaml.SafeDumper):
    pass


for _class in (_Loader, _Dumper):  # 1e-4, 1E5: numbers in YAML 1.2, text in 1.1
    _class.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
    )


def _parse(text: str, source: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except (
        yaml.YAMLError,
        ValueError,
        TypeError,
        AttributeError,
        RecursionError,
    ) as error:  # the last four of odd keys
        raise ConfigError(f"{source}: not valid YAML: {' '.join(str(error).split())}") from None


def _apply(raw: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise ConfigError(f"override {override!r} should read section.key=value, such as train.lr=1e-4")
    section = raw
    for depth, key in enumerate(keys[:-1], 1):
        if section.get(key) is None:
            section[key] = {}
        section = section[key]
        if not isinstance(section, dict):
            raise ConfigError(f"override {override!r}: {'.'.join(keys[:depth])} is {section!r}, which has no keys")
    section[keys[-1]] = _parse(text, f"override {override!r}")


# --- complaints ---


def _section_of(annotation: Any) -> type[Section] | None:
    for part in (annotation, *typing.get_args(annotation)):
        if isinstance(part, type) and issubclass(part, Section):
            return part
    return None


def _unknown_paths(model: type[Section], raw: Any, prefix: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """Paths in `raw` that the model has no field for, down to the keys under an unknown section."""
    if not isinstance(raw, dict):
        return
    for key, value in raw.items():
        path = (*prefix, str(key))
        field = model.model_fields.get(key) if isinstance(key, str) else None
        if field is None:
            yield from ((*path, str(below)) for below in value) if isinstance(value, dict) and value else (path,)
        elif section := _section_of(field.annotation):
            yield from _unknown_paths(section, value, path)


def _known_paths(model: type[Section], prefix: str = "") -> Iterator[str]:
    for key, field in model.model_fields.items():
        yield prefix + key
        if section := _section_of(field.annotation):
            yield from _known_paths(section, f"{prefix}{key}.")


def _unknown(path: tuple[str, ...]) -> str:
    """Names what is spelt much alike at the same depth, else the same key elsewhere, else all that the section knows."""
    dotted, known = ".".join(path), list(_known_paths(Config))
    near = difflib.get_close_matches(dotted, [other for other in known if other.count(".") == len(path) - 1], 1, 0.8)
    near = near or [other for other in known if other.split(".")[-1] == path[-1]]
    if near:
        return f"{dotted}: no such setting; did you mean {' or '.join(near)}?"
    prefix = dotted.removesuffix(path[-1])
    keys = [other for other in known if other.startswith(prefix) and "." not in other.removeprefix(prefix)]
    if not keys:  # an unknown section
        return f"{dotted}: no such setting; did you mean {difflib.get_close_matches(dotted, known, 1, 0.0)[0]}?"
    there = ", ".join(key.removeprefix(prefix) for key in keys)
    return f"{dotted}: no such setting; {prefix.removesuffix('.') or 'the file'} knows {there}"


def _ill_typed(error: Any) -> str:
    path = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in error["loc"]).lstrip(".")
    where = f"{path}: " if path else ""
    match error["type"]:
        case "missing":
            return f"{where}is missing; add it to the file, or give {path}=…"
        case "value_error":
            return f"{where}{error['ctx']['error']}"
        case "string_pattern_mismatch":
            return f"{where}{error['input']!r} should {PATTERNS[error['ctx']['pattern']]}"
        case "model_type" | "model_attributes_type":
            return f"{where}{error['input']!r} should be a mapping of keys to values, or left out"
        case "too_short":
            return f"{where}{error['input']!r} should have at least {error['ctx']['min_length']} item"
        case _:
            or_null = " or null" if _nullable(error["loc"]) else ""
            return f"{where}{error['input']!r} {error['msg'].removeprefix('Input ')}{or_null}"


def _nullable(loc: tuple[str | int, ...]) -> bool:
    annotation: Any = Config
    for key in loc:
        section = _section_of(annotation)
        if section is None or key not in section.model_fields:
            return False
        annotation = section.model_fields[str(key)].annotation
    return type(None) in typing.get_args(annotation)
