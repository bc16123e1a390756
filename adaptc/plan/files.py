"""Plan files: one dict in YAML, JSON or TOML, read strictly and written atomically."""

from __future__ import annotations

import contextlib
import enum
import json
import os
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from adaptc.errors import CheckpointNotFoundError, ConfigError, PlanError, UnsupportedError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

SUFFIXES = (".yaml", ".yml", ".json", ".toml")
PEFT_CONFIG = "adapter_config.json"
# YAML 1.1 reads 1e-4 as text; everybody who writes it means the number, as in YAML 1.2.
_FLOAT = re.compile(r"^[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)[eE][-+]?[0-9]+$")


def read(path: Path) -> dict[str, Any]:
    """The mapping that a plan file holds.

    Raises:
        PlanError: no such file, another suffix, not legal in its format, or a key given twice.
    """
    parse = _format(path, {"yaml": _parse_yaml, "json": _parse_json, "toml": _parse_toml})
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise PlanError(f"no plan file {path}", do="give a path, or the plan itself") from error
    except UnicodeDecodeError as error:
        raise PlanError("not UTF-8 text", found=str(error)) from error
    data = parse(text)
    if not isinstance(data, dict):
        raise PlanError("not a mapping", expected="version, rules, passes", found=type(data).__name__)
    return data


def write(path: Path, data: Mapping[str, Any]) -> None:
    """Write ``data`` aside, then move it into place, so that no reader sees half a plan."""
    text = _format(path, {"yaml": _yaml_text, "json": _json_text, "toml": toml_text})(data)
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with aside.open("w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            aside.unlink()


def is_peft_config(source: object) -> bool:
    """Whether ``source`` is a PEFT config, or the path of one or of its folder."""
    if isinstance(source, str | os.PathLike):
        path = Path(source)
        return path.is_dir() or path.name == PEFT_CONFIG
    return hasattr(source, "peft_type") and not hasattr(source, "peft_kind")  # the latter: one of adaptc's methods


def read_peft_config(source: object) -> dict[str, Any]:
    """A PEFT config as a plain dict, from the object, a mapping, its file or its folder."""
    if isinstance(source, str | os.PathLike):
        path = Path(source)
        path = path / PEFT_CONFIG if path.is_dir() else path
        try:
            source = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise CheckpointNotFoundError(f"no {PEFT_CONFIG} at {path}") from error
        except ValueError as error:
            raise ConfigError(f"{path} is not JSON", found=str(error)) from error
    elif not isinstance(source, Mapping):
        to_dict = getattr(source, "to_dict", None)
        if to_dict is None:
            raise PlanError("this is not a PEFT config", found=repr(source))
        source = to_dict()
    if not isinstance(source, Mapping):
        raise ConfigError("a PEFT config that is not a mapping", found=type(source).__name__)
    return {key: _json_value(value) for key, value in source.items()}


def _json_value(value: object) -> Any:
    """What the value is after a trip through ``adapter_config.json``."""
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, set | frozenset):
        return sorted(value)
    if isinstance(value, Mapping):
        return {key: _json_value(item) for key, item in value.items()}
    return [_json_value(item) for item in value] if isinstance(value, list | tuple) else value


def _format(path: Path, table: Mapping[str, Callable[..., Any]]) -> Callable[..., Any]:
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        found = suffix or "no suffix"
        raise PlanError(f'"{path}" is not a plan file', expected=", ".join(SUFFIXES), found=found)
    return table["yaml" if suffix == ".yml" else suffix.removeprefix(".")]


def _parse_json(text: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_unique)
    except json.JSONDecodeError as error:
        raise PlanError("not JSON", found=str(error)) from error


def _parse_toml(text: str) -> Any:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise PlanError("not TOML", found=str(error)) from error


def _parse_yaml(text: str) -> Any:
    yaml = _yaml()

    class Loader(yaml.SafeLoader):  # type: ignore[misc, name-defined]
        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            _unique([(key.value, None) for key, _ in node.value if isinstance(key, yaml.ScalarNode)])
            return super().construct_mapping(node, deep)  # type: ignore[no-any-return]

    _add_float(Loader)
    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError as error:
        raise PlanError("not YAML", found=str(error)) from error


def _yaml_text(data: Mapping[str, Any]) -> str:
    yaml = _yaml()

    class Dumper(yaml.SafeDumper):  # type: ignore[misc, name-defined]
        """Quotes text that the loader would take for a number; never writes aliases."""

        def ignore_aliases(self, data: Any) -> bool:
            return True

    _add_float(Dumper)
    text: str = yaml.dump(dict(data), Dumper=Dumper, sort_keys=False, default_flow_style=None, width=110)
    return text


def _add_float(yaml_class: Any) -> None:
    first_characters = list("-+.0123456789")
    yaml_class.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, first_characters)


def _yaml() -> Any:
    try:
        import yaml
    except ImportError as error:
        do = "pip install pyyaml, or use JSON or TOML"
        raise UnsupportedError("YAML plans need PyYAML", do=do) from error
    return yaml


def _unique(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    data: dict[Any, Any] = {}
    for key, value in pairs:
        if key in data:
            raise PlanError(f'key "{key}" is given twice')
        data[key] = value
    return data


def _json_text(data: Mapping[str, Any]) -> str:
    return json.dumps(data, indent=2, allow_nan=False, ensure_ascii=False) + "\n"


def toml_text(data: Mapping[str, Any]) -> str:
    """A plan dict as TOML: the rules as an array of tables, everything inside them inline."""
    lines = [f"{_toml_key(k)} = {_toml_value(v)}" for k, v in data.items() if k not in ("rules", "passes")]
    tables = [("[[rules]]", rule) for rule in data["rules"]]
    if "passes" in data:
        tables.append(("[passes]", data["passes"]))
    for header, table in tables:
        lines += ["", header, *(f"{_toml_key(k)} = {_toml_value(v)}" for k, v in table.items())]
    return "\n".join(lines) + "\n"


def _toml_key(key: str) -> str:
    plain = key.isascii() and key.replace("_", "").replace("-", "").isalnum()
    return key if plain else _toml_value(key)


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, str):
        # JSON's escapes are TOML's, but for DEL, which JSON leaves bare.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, list | tuple):
        return f"[{', '.join(_toml_value(item) for item in value)}]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_toml_key(k)} = {_toml_value(v)}" for k, v in value.items()) + "}"
    raise PlanError(f"TOML cannot hold {value!r}", do="save as YAML or JSON")
