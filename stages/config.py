"""The one door for settings: YAML in, frozen dataclasses out, everything checked once.

Every section belongs to the stage it configures and is declared beside it. Below the door nobody reads YAML, the
environment or globals.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import json
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError

from stages.ablation import AblationConfig, Trial
from stages.base import setting
from stages.clip import ClipConfig
from stages.curate import CurateConfig
from stages.download import DownloadConfig
from stages.embed import EmbedConfig
from stages.errors import ConfigError, StorageError
from stages.evaluate import EvaluateConfig
from stages.executor import ClusterConfig
from stages.filter_rules import FilterConfig
from stages.gate import PromotionGateConfig
from stages.generate import GenerateConfig
from stages.generator_config import DecoderTraining, PriorTraining, UpsamplerTraining
from stages.ledger import LedgerConfig
from stages.machines import AwsConfig, KubernetesConfig
from stages.orchestration import PrefectConfig
from stages.pca import PcaConfig
from stages.redaction import refuse_secrets
from stages.source import SourceConfig
from stages.storage import is_local

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Config:
    """The whole pipeline: where it keeps its results, and one section per stage."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    root: str = setting(help="the store: a local folder or s3://bucket/prefix", affects="nothing")
    seed: int = setting(0, "seed of everything random")
    cluster: ClusterConfig = setting(factory=ClusterConfig, help="where the work runs", affects="nothing")
    prefect: PrefectConfig = setting(factory=PrefectConfig, help="tries, schedules, deployments", affects="nothing")
    kubernetes: KubernetesConfig = setting(factory=KubernetesConfig, help="for `unclip render`", affects="nothing")
    aws: AwsConfig = setting(factory=AwsConfig, help="for `unclip render`", affects="nothing")
    source: SourceConfig = setting(help="where the image-caption pairs come from")
    download: DownloadConfig = setting(factory=DownloadConfig, help="fetching the images")
    filter: FilterConfig = setting(factory=FilterConfig, help="rules on images and captions, duplicates")
    clip: ClipConfig = setting(help="the frozen CLIP: pretrained or trained here")
    embed: EmbedConfig = setting(factory=EmbedConfig, help="CLIP embeddings of images and captions")
    curate: CurateConfig = setting(factory=CurateConfig, help="the final selection")
    ledger: LedgerConfig = setting(factory=LedgerConfig, help="the fate of every row, as Parquet")
    pca: PcaConfig = setting(factory=PcaConfig, help="principal axes of the image embeddings")
    prior: PriorTraining = setting(help="caption -> image embedding")
    decoder: DecoderTraining = setting(help="image embedding and caption -> image")
    upsampler_256: UpsamplerTraining = setting(help="the first upsampler")
    upsampler_1024: UpsamplerTraining = setting(help="the second upsampler")
    generate: GenerateConfig = setting(factory=GenerateConfig, help="sampling")
    evaluate: EvaluateConfig = setting(factory=EvaluateConfig, help="metrics and the gate")
    gate: PromotionGateConfig = setting(factory=PromotionGateConfig, help="for `unclip promote`", affects="nothing")

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed: {self.seed} is not between 0 and 2**63 - 1")


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a config file, apply ``a.b=value`` overrides and check everything.

    Args:
        path: a YAML file; its ``extends:`` names another file (relative to it) that it changes.
        overrides: ``dotted.key=value`` with the value in YAML, from ``-s``.

    Raises:
        ConfigError: names the dotted path, the value and the remedy of every mistake.
    """
    return check_config(overridden(_read_yaml(Path(path)), overrides), place=str(path))


def overridden(values: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Return plain values with ``a.b=value`` overrides applied.

    Raises:
        ConfigError: if an override is not of that form.
    """
    changed = copy.deepcopy(dict(values))
    for override in overrides:
        _apply(changed, override)
    return changed


def check_config(values: Mapping[str, Any], *, place: str = "config") -> Config:
    """Check plain values against the schema.

    Raises:
        ConfigError: lists every mistake.
    """
    config: Config = _checked(Config, values, place)
    try:
        config = dataclasses.replace(config, root=_settled_root(config.root))
    except (ValueError, StorageError) as error:
        raise ConfigError(f"{place}: root: {error}") from None
    try:
        refuse_secrets(to_values(config))
    except ConfigError as error:
        raise ConfigError(f"{place}: {error}") from None
    return config


def _settled_root(root: str) -> str:
    """Return a root that means one store to every command; ``~`` is the user's home.

    Raises:
        ValueError: if it means none, such as ``s3://$BUCKET`` with an empty variable.
        StorageError: if its scheme is unknown.
    """
    if not root:
        raise ValueError("'' is empty; write a folder or s3://bucket/prefix")
    if re.match(r"[a-z][a-z0-9]*:/(?!/)", root):
        raise ValueError(f"'{root}' is neither a folder nor an address; write {root.replace(':/', '://', 1)}")
    if not is_local(root):
        if not root.partition("://")[2].partition("/")[0]:
            raise ValueError(f"'{root}' names no bucket; write s3://bucket/prefix")
        return root
    try:
        return str(Path(root).expanduser()) if root.startswith("~") else root
    except RuntimeError as error:
        raise ValueError(f"'{root}': {error}; write the folder out") from None


def load_ablation(path: str | Path, overrides: Sequence[str] = ()) -> tuple[AblationConfig, list[Trial]]:
    """Read a file of variants and write out its trials.

    Args:
        path: a YAML file; see ``stages/ablation.py``.
        overrides: ``dotted.key=value`` for the base config of every trial, from ``-s``.

    Raises:
        ConfigError: names the dotted path, the value and the remedy of every mistake, also those of the variants.
    """
    path = Path(path)
    ablation: AblationConfig = _checked(AblationConfig, _read_yaml(path), str(path))
    base = path.parent / ablation.base
    trials = []
    for scale in (None, *(ablation.guidance.scales if ablation.guidance else ())):
        for variant, changes in ablation.variants.items():
            if scale is not None and ablation.guidance is not None and variant not in ablation.guidance.variants:
                continue
            sweep: Mapping[str, Any] = {}
            if scale is not None and ablation.guidance is not None:
                sweep = {**ablation.guidance.set, "generate.decoder.guidance_scale": float(scale)}
            for seed in ablation.seeds:
                # Image i has the seed of the stage plus i: far apart, so that no two trials share images.
                seeds = {"prior.seed": seed, "decoder.seed": seed, "generate.seed": seed * 1_000_000}
                values = {**ablation.set, **changes, **sweep, **seeds}
                lines = (*(f"{key}={json.dumps(value)}" for key, value in values.items()), *overrides)
                trials.append(Trial(variant=variant, seed=seed, guidance_scale=scale, overrides=lines))
    for trial in trials:
        try:
            load_config(base, trial.overrides)
        except ConfigError as error:
            raise ConfigError(f"{path}: variants.{trial.variant}: {error}") from None
    return ablation, trials


def _checked(kind: type[Any], values: Mapping[str, Any], place: str) -> Any:
    """Check plain values against a dataclass and build it."""
    try:
        # Strict JSON mode: no `true` for 1, no "3" for 3; lists become tuples and integers may stand for floats.
        text = json.dumps(values, allow_nan=False)
        return TypeAdapter(kind).validate_json(text, strict=True)
    except ValidationError as error:
        lines = _explain(error, values, kind)
        raise ConfigError(
            f"{place}: " + "\n".join(lines) if len(lines) == 1 else "\n  ".join([f"{place}:", *lines])
        ) from None
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{place}: {error}; only plain YAML values are allowed") from None


def json_schema(kind: type[Any] = Config, *, definitions: str = "#/$defs/") -> dict[str, Any]:
    """Describe a config class as JSON schema, as strict about unknown keys as the door is.

    Args:
        kind: the class.
        definitions: where references point to.
    """
    schema = TypeAdapter(kind).json_schema(ref_template=definitions + "{model}")
    for section in (schema, *schema.get("$defs", {}).values()):
        if "properties" in section:
            section["additionalProperties"] = False
    return schema


def to_values(config: Any) -> dict[str, Any]:
    """Turn a config back into plain values, every default written out."""
    return dict(json.loads(json.dumps(dataclasses.asdict(config))))


def to_yaml(config: Config) -> str:
    """Write a config as YAML, every default written out."""
    return dump_yaml(to_values(config))


def dump_yaml(*documents: Any) -> str:
    """Write plain values as YAML, several as documents of one file."""
    texts = [str(yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True)) for value in documents]
    return "---\n".join(texts)


def load_file(kind: type[T], path: str | Path) -> T:
    """Read a YAML file that holds one dataclass, such as the price table.

    Raises:
        ConfigError: names the dotted path, the value and the remedy of every mistake.
    """
    checked: T = _checked(kind, _read_yaml(Path(path)), str(path))
    return checked


@dataclass(frozen=True)
class SettingInfo:
    """One settable key, for the reference and for suggestions."""

    path: str
    type_name: str
    default: Any
    help: str


def settings(kind: type[Any] = Config, prefix: str = "") -> Iterator[SettingInfo]:
    """List every settable key below a config class, with its type, default and help."""
    hints = typing.get_type_hints(kind)
    for f in dataclasses.fields(kind):
        path = f"{prefix}{f.name}"
        default = f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
        yield SettingInfo(path, _type_name(hints[f.name]), default, f.metadata.get("help", ""))
        for nested in dataclasses_in(hints[f.name]):
            yield from settings(nested, f"{path}.")


class _Dumper(yaml.SafeDumper):
    """YAML in which a text of several lines is a block, and equal values are written out instead of referred to."""

    def ignore_aliases(self, data: Any) -> bool:
        """Refer to nothing."""
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _represent_text)


# ---- reading ------------------------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """YAML in which ``1e-4`` is a number (YAML 1.1 demands a dot and a sign) and a key may not be given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Build a mapping; refuse a repeated key, which plain YAML silently resolves to the last."""
        seen: set[str] = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(
                    None, None, "a key is a list or a mapping; is this an unfilled template?", key_node.start_mark
                )
            if key_node.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key '{key_node.value}' is given twice", key_node.start_mark
                )
            seen.add(key_node.value)
        return dict(super().construct_mapping(node, deep))


# A date is a text, as JSON has it.
_Loader.add_constructor("tag:yaml.org,2002:timestamp", lambda loader, node: str(node.value))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
)


def _read_yaml(path: Path, chain: tuple[Path, ...] = ()) -> dict[str, Any]:
    if path.resolve() in chain:
        raise ConfigError(f"{path}: extends: the files extend each other in a circle; break it")
    try:
        values = yaml.load(path.read_text(), _Loader) or {}
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot read the config file ({error.strerror}); name an existing YAML file"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: holds {type(values).__name__}, not sections; see configs/ for examples")
    parent = values.pop("extends", None)
    if parent is None:
        return values
    if not isinstance(parent, str):
        raise ConfigError(f"{path}: extends: {parent!r} is not a file name")
    return _merged(_read_yaml(path.parent / parent, (*chain, path.resolve())), values)


def _merged(base: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Change a section; one that states another ``kind`` has other keys, so it takes the place of the old one."""
    if "kind" in changes and changes["kind"] != base.get("kind"):
        return dict(changes)
    merged = dict(base)
    for key, value in changes.items():
        if isinstance(value, Mapping) and isinstance(merged.get(key), dict):
            merged[key] = _merged(merged[key], value)
        else:
            merged[key] = value
    return merged


def _apply(values: dict[str, Any], override: str) -> None:
    path, separator, text = override.partition("=")
    if not separator or not path.strip():
        raise ConfigError(f"-s {override}: write dotted.key=value, for example -s decoder.learning_rate=1e-4")
    try:
        value = yaml.load(text, _Loader)
    except yaml.YAMLError:
        raise ConfigError(f"-s {override}: the value is not valid YAML; quote it") from None
    *parents, last = path.strip().split(".")
    for parent in parents:
        if not isinstance(values.setdefault(parent, {}), dict):
            raise ConfigError(f"-s {override}: '{parent}' is a single value, not a section")
        values = values[parent]
    values[last] = value


# ---- explaining ---------------------------------------------------------------------------------------------------


def _explain(error: ValidationError, values: Any, kind: type[Any]) -> list[str]:
    lines: list[str] = []
    for item in _of_chosen_members(error.errors(include_url=False)):
        path = _clean_path(item["loc"], values)
        dotted = ".".join(path)
        if item["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
            line = f"{dotted}: unknown key{_did_you_mean(path, kind)}"
        elif item["type"] in ("missing", "missing_argument", "missing_keyword_only_argument"):
            line = f"{dotted}: required, but not given"
        elif item["type"] == "value_error":  # from a __post_init__; its message begins with the setting's name
            line = ".".join([*path, str(item["ctx"]["error"])])
        else:
            shown = "" if isinstance(item["input"], dict) else f"{json.dumps(item['input'])}: "
            line = f"{dotted}: {shown}{item['msg'][:1].lower()}{item['msg'][1:]}"
            # A choice that is not offered may have its reason, and the help is where the reasons are.
            if item["type"] == "literal_error" and (said := _help_of(dotted, kind)):
                line += f" ({said})"
        if line not in lines:
            lines.append(line)
    return lines


def _of_chosen_members(items: Sequence[Any]) -> list[Any]:
    """Of a section that may be one of several classes, keep the errors of the class its ``kind`` names.

    Pydantic reports the errors of every class, with the class's name in the path.
    """
    unions: dict[tuple[int | str, ...], dict[str, list[Any]]] = {}
    kept: list[Any] = []
    for item in items:
        location = item["loc"]
        position = next((i for i, part in enumerate(location) if str(part)[:1].isupper()), None)
        if position is None:
            kept.append(item)
        else:
            members = unions.setdefault(location[:position], {})
            members.setdefault(str(location[position]), []).append(item)
    for members in unions.values():
        wrong_kinds = {
            name: next((i for i in errors if i["type"] == "literal_error" and i["loc"][-1] == "kind"), None)
            for name, errors in members.items()
        }
        chosen = [name for name, item in wrong_kinds.items() if item is None]
        if chosen:
            kept += [item for name in chosen for item in members[name]]
        else:
            refused = [item for item in wrong_kinds.values() if item is not None]
            known = " or ".join(item["ctx"]["expected"] for item in refused)
            kept.append({**refused[0], "msg": f"input should be {known}"})
    return kept


def _clean_path(location: Sequence[int | str], values: Any) -> list[str]:
    """Drop the class names that pydantic puts into the path of a union member; keep keys the user can write."""
    path: list[str] = []
    for position, part in enumerate(location):
        is_last = position == len(location) - 1
        if isinstance(values, Mapping) and part in values:
            values = values[part]
            path.append(str(part))
        elif isinstance(values, list) and isinstance(part, int):
            values = values[part] if part < len(values) else None
            path.append(str(part))
        elif is_last and str(part).isidentifier() and not str(part)[:1].isupper():
            path.append(str(part))
    return path


def _help_of(dotted: str, kind: type[Any]) -> str:
    """Return the help of a setting; empty where several classes of a union have one."""
    found = {info.help for info in settings(kind) if info.path == dotted}
    return found.pop() if len(found) == 1 else ""


def _did_you_mean(path: Sequence[str], kind: type[Any]) -> str:
    """Suggest the nearest key of the same section, else the same key in another section."""
    known = [info.path for info in settings(kind)]
    parent, key = ".".join(path[:-1]), path[-1]
    siblings = [name.rsplit(".", 1)[-1] for name in known if name.rpartition(".")[0] == parent]
    if key in siblings:  # of another class of the union
        return f"; it does not go with the `kind` of {parent}"
    close = difflib.get_close_matches(key, siblings, n=1)
    if close:
        return f"; did you mean '{'.'.join([*path[:-1], close[0]])}'?"
    elsewhere = [name for name in known if name.rsplit(".", 1)[-1] == key]
    if elsewhere:
        return f"; did you mean '{elsewhere[0]}'?"
    return f"; {parent or 'the top level'} knows: {', '.join(sorted(set(siblings)))}" if siblings else ""


def dataclasses_in(hint: Any) -> list[type[Any]]:
    """List the config classes that a type hint allows, in unions and tuples too."""
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return [hint]
    if typing.get_origin(hint) in (types.UnionType, typing.Union, typing.Annotated, tuple):
        return [nested for part in typing.get_args(hint) for nested in dataclasses_in(part)]
    return []


def _type_name(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint).replace("typing.", "")
