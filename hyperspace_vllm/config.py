"""Every setting, its default, its meaning and where it may come from. The only reader of the environment.

Later sources win: the TOML file (HYPERSPACE_CONFIG, else <data_dir>/hyperspace.toml if it is there), HYPERSPACE_<NAME>
variables, then vLLM's kv_connector_extra_config. An unknown name in a file or in vLLM's options is an error: a node
with a misspelt `peers` would otherwise run without peers. An unknown variable only causes a warning, because other
programs set some too: Kubernetes passes a Service called `hyperspace` to every pod as HYPERSPACE_PORT and the like.
"""

import difflib
import logging
import os
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Annotated, Literal, TypeVar, get_args, get_origin, get_type_hints

import msgspec
from msgspec import Meta

from .core.records.endpoint import PeerAddress
from .core.records.limits import GiB, KiB, MiB
from .setting_forms import (
    PATH_EXPECTED,
    acronym,
    host_port,
    host_port_or_empty,
    host_port_or_port,
    peer,
    peer_id,
    redis_url,
    short_path,
)

logger = logging.getLogger(__name__)

T = TypeVar("T")
ENVIRONMENT_PREFIX = "HYPERSPACE_"
_UNITS = {"": 1, "kib": KiB, "mib": MiB, "gib": GiB, "tib": 1024 * GiB}
_FILE_VARIABLE = "HYPERSPACE_CONFIG"
_ENVIRONMENT = "the environment"
# `NAME=value` as Kubernetes writes it for a Service called `hyperspace` or `hyperspace-…`.
_OF_KUBERNETES = re.compile(
    r"HYPERSPACE(_\w+)?_(SERVICE_HOST=.*|SERVICE_PORT(_\w+)?=\d+|PORT(_\d+_[A-Z]+)?=\w+://.*"
    r"|PORT_\d+_[A-Z]+_(PROTO|PORT|ADDR)=.*)"
)
_REDIS_URLS = ("registry", "shared_responses")

# What environment variables, paths and messages can carry: no zero, and no half of a character, as of a path that is
# not UTF-8. An item is also what a variable that lists values separated by commas can carry.
_CHARACTER = r"[^\0\ud800-\udfff]"
_END_OF_ITEM = r"[^\0\ud800-\udfff,\s]"
_TEXT = Annotated[str, Meta(pattern=rf"\A{_CHARACTER}*\Z")]
_ITEM = Annotated[str, Meta(pattern=rf"\A{_END_OF_ITEM}([^\0\ud800-\udfff,]*{_END_OF_ITEM})?\Z")]
_CONSTRAINED: dict[object, object] = {
    str: _TEXT,
    Path: _TEXT,
    tuple[str, ...]: tuple[_ITEM, ...],
    int: Annotated[int, Meta(ge=0, le=1 << 62)],
}

CHOOSE_DATA_DIR = "set HYPERSPACE_DATA_DIR to a directory that this user can write"


class ConfigError(ValueError):
    """A setting is unknown or wrong; the message names it, where it came from and what would be right."""


def default_data_dir(environ: Mapping[str, str]) -> Path:
    """$XDG_DATA_HOME/hyperspace, else ~/.local/share/hyperspace; `ConfigError` where there is no home directory."""
    if base := environ.get("XDG_DATA_HOME", ""):
        return Path(base).absolute() / "hyperspace"
    try:
        return Path.home() / ".local" / "share" / "hyperspace"
    except RuntimeError:  # no HOME, and a uid without an entry in the user database
        raise ConfigError(f"data_dir: user {os.geteuid()} has no home directory; {CHOOSE_DATA_DIR}") from None


def _setting(default: T, doc: str, instead: Callable[[str], str | None] = lambda text: None) -> T:
    """`instead` is what is expected where a text, or an item of a list, has the type but not the form; else None."""
    declared: T = field(default=default, metadata={"doc": doc, "instead": instead})
    return declared


@dataclass(frozen=True)
class Config:
    """The effective settings of one process; `SETTINGS` documents each."""

    data_dir: Path = field(
        default_factory=lambda: default_data_dir(os.environ),
        metadata={
            "doc": "Key, stores, socket and lock of one node; mode 0700. One node per directory.",
            "instead": short_path,
        },
    )
    listen: str = _setting("127.0.0.1:0", "host:port that other nodes fetch from (port 0: any free one).", host_port)
    peers: tuple[str, ...] = _setting(
        (), "Nodes to fetch from and to trust, each `<peer id>@host:port`; in variables separated by commas.", peer
    )
    network: str = _setting("default", "Name of the network; nodes of different networks share nothing.")
    bootstrap: tuple[str, ...] = _setting(
        (),
        "Nodes to join the network through, each `<peer id>@host:port` of its `p2p_listen`; trusted as members.",
        peer,
    )
    p2p_listen: str = _setting(
        "127.0.0.1:0",
        "host:port of discovery, gossip and responses between nodes (libp2p); empty: off.",
        host_port_or_empty,
    )
    advertise: str = _setting("", "Host that other nodes reach this one at; empty: the hosts of the listeners.")
    network_key_file: str = _setting(
        "", "This user's file (mode 0600) with the private network's key, 64 hex digits: its holders are members."
    )
    mdns: bool = _setting(False, "Find nodes of the local network by multicast DNS.")
    trust: Literal["members", "reputation", "allowlist"] = _setting(
        "members",
        "Signers whose proofs and manifests count: members; for responses also peers that earned trust; or `allowed`.",
    )
    allowed: tuple[str, ...] = _setting((), "Peer ids that are trusted by name.", peer_id)
    share: Literal["private", "network", "public"] = _setting(
        "network",
        "How far responses may travel: not at all, to members, or to every peer "
        '(then with `trust = "reputation"` KV too).',
    )
    registry: str = _setting("", "`redis://…` of a fleet that has one: replaces the nodes' own registry.", redis_url)
    shared_responses: str = _setting(
        "",
        "`redis://…` of a fleet that has one: responses lie there too, sealed, and are looked for there first.",
        redis_url,
    )
    network_deadline_ms: Annotated[int, Meta(ge=0, le=60_000)] = _setting(
        300, "Longest wait of a request for a response of another node, ms."
    )
    arena_bytes: Annotated[int, Meta(ge=MiB, le=1 << 62)] = _setting(
        0,
        "Shared memory for KV rows, 0: four of the model's longest prompts, at most an eighth of the memory. At most "
        "half of what is free in /dev/shm is taken.",
    )
    disk_bytes: int = _setting(20 * GiB, "Quota of the chunk store on disk.")
    response_bytes: int = _setting(GiB, "Quota of the response store on disk.")
    response_ttl_s: Annotated[int, Meta(ge=0, le=86400)] = _setting(
        86400, "Seconds a stored response may be served, at most the day for which its proof holds."
    )
    response_cache: bool = _setting(True, "Answer repeated requests from stored responses (L1).")
    sampled: Literal["cache", "bypass"] = _setting(
        "cache", "Requests that sample (a temperature other than 0, no seed): answer them from the cache too, or never?"
    )
    semantic: Literal["off", "strict", "balanced"] = _setting(
        "off", "May a stored answer serve other wordings of its question? `strict` errs least, `balanced` serves more."
    )
    semantic_model: str = _setting(
        "all-MiniLM-L6-v2", "What compares questions: the built-in model, or any that sentence-transformers loads."
    )
    # Of none wrong in match_error.WINDOW no less than 0.0038 is sure.
    max_error: Annotated[float, Meta(ge=0.004, le=1)] = _setting(
        1.0,
        "Share of semantic hits that may be wrong, from 0.004: until that is sure, matches are computed; 1: no bound.",
    )
    acronyms: tuple[str, ...] = _setting(
        (),
        "More acronyms with one reading each, written out where a question is about one alone: `K8s=Kubernetes`.",
        acronym,
    )
    kv_cache: bool = _setting(True, "Load and store KV of prompt prefixes (L2).")
    fetch: Literal["auto", "always", "never"] = _setting(
        "auto", "Fetch KV from peers: `auto` when it beats prefilling, `always` and `never` for tests."
    )
    encode_device: Literal["auto", "cuda", "cpu"] = _setting(
        "auto",
        "Our CUDA kernels for an engine's rows: used where they were built and there is a GPU (`auto`), demanded "
        "(`cuda`), or left to torch and the CPU (`cpu`).",
    )
    lookup_deadline_ms: Annotated[int, Meta(ge=0, le=600_000)] = _setting(
        10_000, "Longest wait of a request for its prefix, ms."
    )
    tenants: Literal["private", "shared"] = _setting(
        "private", "With several API keys: does each key have a cache of its own, or do all share one?"
    )
    nice: Annotated[int, Meta(ge=0, le=19)] = _setting(
        10, "Niceness (0-19) of what no request waits for: encoding and committing."
    )
    log_level: Literal["debug", "info", "warning", "error"] = _setting(
        "info", "What the node logs; but for `debug` at most 6 lines a minute of a kind."
    )
    metrics_listen: str = _setting(
        "",
        "host:port of the node's own Prometheus endpoint; empty: none; a bare port: on loopback.",
        host_port_or_port,
    )

    def __post_init__(self) -> None:
        for setting in SETTINGS:
            setting.check(getattr(self, setting.name), "Config(...)")

    @property
    def socket_path(self) -> Path:
        """The node's ipc:// socket."""
        return self.data_dir / "node.sock"

    @property
    def peer_addresses(self) -> tuple[PeerAddress, ...]:
        """`peers`, parsed."""
        return tuple(map(PeerAddress.of_setting, self.peers))

    @property
    def bootstrap_addresses(self) -> tuple[PeerAddress, ...]:
        """`bootstrap`, parsed."""
        return tuple(map(PeerAddress.of_setting, self.bootstrap))

    @property
    def acronym_table(self) -> dict[str, str]:
        """`acronyms`, by what is written in capitals."""
        pairs = (each.split("=", 1) for each in self.acronyms)
        return {short.strip(): words.strip() for short, words in pairs}

    def as_environ(self) -> dict[str, str]:
        """HYPERSPACE_* variables that make another process load exactly this configuration."""
        return {s.variable: s.text_of(getattr(self, s.name)) for s in SETTINGS}


@dataclass(frozen=True)
class Setting:
    """One row of the settings table."""

    name: str
    type: object  # with msgspec's constraints
    kind: object  # without: Path, str, int, float, bool, tuple[str, ...] or Literal[...]
    default: object
    doc: str
    instead: Callable[[str], str | None]

    @property
    def variable(self) -> str:
        """Name of its environment variable."""
        return ENVIRONMENT_PREFIX + self.name.upper()

    def text_of(self, value: object) -> str:
        """`value` as its environment variable holds it."""
        if isinstance(value, tuple):
            return ",".join(value)
        return str(value).lower() if isinstance(value, bool) else str(value)

    def shown(self, text: str) -> str:
        """A value's text (or repr) as people may see it: without a URL's user and password, whatever they contain."""
        if self.name not in _REDIS_URLS:
            return text
        return re.sub(r"^(['\"]?)(\w+://)?.*@", r"\1\2***@", text, flags=re.DOTALL)

    def parse(self, value: object, origin: str) -> object:
        """`value`, as a TOML file, a variable or JSON hold it, as the setting's own type; or `ConfigError`."""
        if self.kind is Path and isinstance(value, str | Path) and str(value):
            try:
                return Path(value).expanduser().absolute()
            except RuntimeError as error:  # ~nobody
                raise ConfigError(f"{self.name} = {str(value)!r} (from {origin}): {error}") from error
        if self.kind is bool and isinstance(value, str):
            words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
            return words.get(value.strip().lower(), value)
        if self.kind is int and isinstance(value, str):
            return self._number(value, origin)
        if self.kind is float:
            return _fraction(value)
        if get_origin(self.kind) is tuple and isinstance(value, str):
            return tuple(part.strip() for part in value.split(",") if part.strip())
        if get_origin(self.kind) is tuple and isinstance(value, list):
            return tuple(value)
        return value

    def _number(self, text: str, origin: str) -> int:
        units = "|".join(_UNITS) if self.name.endswith("_bytes") else ""
        match = re.fullmatch(rf"\s*(\d{{1,18}})\s*({units})\s*", text, re.IGNORECASE)
        if not match:
            expected = "such as 1073741824 or 1GiB" if units else "a whole number"
            raise ConfigError(f"{self.name} = {text!r} (from {origin}): expected {expected}")
        return int(match[1]) * _UNITS[match[2].lower()]

    def check(self, value: object, origin: str) -> None:
        """Raise `ConfigError` unless `value` has the right type and lies within its bounds."""
        if (expected := self._expected_instead(value)) is not None:
            raise ConfigError(f"{self.name} = {self.shown(repr(value))} (from {origin}): expected {expected}")

    def _expected_instead(self, value: object) -> str | None:
        """What should be there; None if `value` may be."""
        if not self._has_type(value):
            return self._expected
        texts = value if isinstance(value, tuple) else (str(value),) if isinstance(value, str | Path) else ()
        return next(filter(None, map(self.instead, texts)), None)

    def _has_type(self, value: object) -> bool:
        if isinstance(value, Path) != (self.kind is Path):
            return False
        if self.kind is int and type(value) is int and value == self.default:
            return True  # of some, 0 stands for what is chosen later
        plain = str(value) if isinstance(value, Path) else value
        try:
            return type(msgspec.convert(plain, self.type)) is type(plain)  # not a list for a tuple, nor 1 for 1.0
        except (msgspec.ValidationError, UnicodeEncodeError):
            return False

    @property
    def _expected(self) -> str:
        if get_origin(self.kind) is Literal:
            return "one of " + ", ".join(get_args(self.kind))
        if self.kind in (int, float):
            (meta,) = get_args(self.type)[1:]
            return f"a {'whole ' if self.kind is int else ''}number from {meta.ge} to {meta.le}"
        if get_origin(self.kind) is tuple:
            return "a list of strings without commas"
        return "true or false" if self.kind is bool else PATH_EXPECTED if self.kind is Path else "a string"


def _fraction(value: object) -> object:
    """`value` as a float, if it is a number or the text of one."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return value
    try:
        return float(value)
    except (ValueError, OverflowError):
        return value


def _declared_settings() -> tuple[Setting, ...]:
    kinds, types = get_type_hints(Config), get_type_hints(Config, include_extras=True)
    return tuple(
        Setting(
            name=f.name,
            type=_CONSTRAINED.get(types[f.name], types[f.name]),
            kind=kinds[f.name],
            default=None if f.name == "data_dir" else f.default,
            doc=f.metadata["doc"],
            instead=f.metadata["instead"],
        )
        for f in fields(Config)
    )


SETTINGS: tuple[Setting, ...] = _declared_settings()
_BY_NAME = {setting.name: setting for setting in SETTINGS}


@dataclass(frozen=True)
class _Layer:
    origin: str
    values: Mapping[str, object]


def load_config(environ: Mapping[str, str] = os.environ, extra: Mapping[str, object] | None = None) -> Config:
    """The effective configuration; `extra` is vLLM's kv_connector_extra_config (or its "hyperspace" entry)."""
    return load_config_with_origins(environ, extra)[0]


def load_config_with_origins(
    environ: Mapping[str, str] = os.environ,
    extra: Mapping[str, object] | None = None,
    extra_origin: str = "kv_connector_extra_config",
) -> tuple[Config, dict[str, str]]:
    """The effective configuration, and for every setting where its value came from."""
    outer = [_environment_layer(environ), _extra_layer(extra or {}, extra_origin)]
    values: dict[str, object] = {}
    origins = dict.fromkeys(_BY_NAME, "default")
    for layer in [*_file_layers(environ, outer), *outer]:
        for name in layer.values:
            if name not in _BY_NAME:
                raise ConfigError(_unknown(name, layer.origin))
            values[name] = _checked(_BY_NAME[name], layer)
            origins[name] = layer.origin
    if "data_dir" not in values:
        values["data_dir"] = default_data_dir(environ)
    return Config(**values), origins  # type: ignore[arg-type]  # every value was checked against its type


def _checked(setting: Setting, layer: _Layer) -> object:
    value = setting.parse(layer.values[setting.name], layer.origin)
    setting.check(value, layer.origin)
    return value


def _environment_layer(environ: Mapping[str, str]) -> _Layer:
    found = {}
    for variable, value in environ.items():
        name = variable.removeprefix(ENVIRONMENT_PREFIX).lower()
        if not variable.startswith(ENVIRONMENT_PREFIX) or variable == _FILE_VARIABLE:
            continue
        if name in _BY_NAME:
            found[name] = value
        elif not _OF_KUBERNETES.fullmatch(f"{variable}={value}"):
            _warn_once(f"ignored: {_unknown(name, _ENVIRONMENT)}")
    return _Layer(_ENVIRONMENT, found)


@cache
def _warn_once(complaint: str) -> None:
    logger.warning("hyperspace: %s", complaint)


def _extra_layer(extra: Mapping[str, object], origin: str) -> _Layer:
    nested = extra.get("hyperspace", extra)
    if not isinstance(nested, Mapping):
        raise ConfigError(f"hyperspace = {nested!r} (from {origin}): expected an object of settings")
    return _Layer(origin, nested)


def _file_layers(environ: Mapping[str, str], outer: list[_Layer]) -> Iterator[_Layer]:
    named = environ.get(_FILE_VARIABLE, "")
    path = _named_file(named) if named else _data_dir(environ, outer) / "hyperspace.toml"
    try:
        values = tomllib.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        if named:
            raise ConfigError(f"{_FILE_VARIABLE} = {named!r}: no such file") from None
        return
    except (OSError, ValueError, RecursionError) as error:  # a number of 5,000 digits is a plain ValueError
        advice = f"; {CHOOSE_DATA_DIR}" if isinstance(error, OSError) and not named else ""
        raise ConfigError(f"{path}: {getattr(error, 'strerror', None) or error}{advice}") from error
    if not named and "data_dir" in values:
        raise ConfigError(f"data_dir (from {path}): a file inside the data directory can't move it")
    yield _Layer(str(path), values)


def _named_file(text: str) -> Path:
    try:
        return Path(text).expanduser()
    except RuntimeError as error:  # ~nobody
        raise ConfigError(f"{_FILE_VARIABLE} = {text!r}: {error}") from error


def _data_dir(environ: Mapping[str, str], outer: list[_Layer]) -> Path:
    """The data directory, if no file chooses it."""
    for layer in reversed(outer):
        if "data_dir" in layer.values:
            chosen = _checked(_BY_NAME["data_dir"], layer)
            assert isinstance(chosen, Path)
            return chosen
    return default_data_dir(environ)


def _unknown(name: str, origin: str) -> str:
    def spell(known: str) -> str:
        return ENVIRONMENT_PREFIX + known.upper() if origin == _ENVIRONMENT else known

    near = difflib.get_close_matches(name, _BY_NAME, n=1, cutoff=0.5)
    hint = f"did you mean {spell(near[0])}?" if near else "`hyperspace config` lists them all"
    return f"{spell(name)} (from {origin}): no such setting; {hint}"
