"""The `hyperspace` command: run a node, show it, name it, and say what is configured."""

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import cache_command
from .client import NodeClient
from .config import SETTINGS, Config, ConfigError, load_config_with_origins
from .core.local.session_messages import GetStatus, Status
from .core.records.errors import for_terminal

_CONNECT_S = 5.0
_ANSWER_S = 5.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the process's exit status."""
    options = _parser().parse_args(arguments)
    given = {"data_dir": options.data_dir} if getattr(options, "data_dir", None) else {}
    try:
        config, origins = load_config_with_origins(os.environ, given, "the command line")
        status: int = options.run(config, options, origins)
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains again when it exits
        print("hyperspace: incomplete: the program that reads this output has ended", file=sys.stderr)
        return 1
    except (ConfigError, OSError) as error:
        print(f"hyperspace: {error}", file=sys.stderr)
        return 1
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="hyperspace", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: object, text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text)
        added.add_argument("--data-dir", type=Path, metavar="D", help="the node's data directory")
        added.set_defaults(run=run)
        return added

    node = command("node", _node, "Run a node in the foreground.")
    node.add_argument("--embedded", action="store_true", help="as vLLM starts it: ends when no server uses it")
    command("id", _id, "Print this node's peer id, creating its key on first use.")
    status = command("status", _status, "Show the running node, its peers, store and hit rates.")
    status.add_argument("--json", action="store_true", help="print one JSON object")
    cache_command.add_arguments(command("cache", _cache, "Look into the response cache, or delete from it."))
    command("config", _config, "Print the effective settings and where each came from.")
    sim = command("sim", _sim, "Simulate a network of nodes on a virtual clock; the same seed, the same run.")
    sim.add_argument("--scenario", default="all", metavar="S", help="one by name, or all")
    sim.add_argument("--nodes", type=_positive, default=20, metavar="N", help="how many (20)")
    sim.add_argument("--seed", type=int, default=1, metavar="N", help="the first seed (1)")
    sim.add_argument("--seeds", type=_positive, default=1, metavar="K", help="how many seeds, one after another (1)")
    sim.add_argument("--workers", type=_positive, default=os.cpu_count(), metavar="W", help="processes (every core)")
    sim.add_argument("--output", type=Path, metavar="F", help="write the runs to a JSON file as they come in")
    sim.add_argument("--json", action="store_true", help="print one JSON object a run")
    sim.add_argument("--no-kv", action="store_true", help="without prefixes: responses and the network alone")
    return parser


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{number}: expected 1 or more")
    return number


def _node(config: Config, options: argparse.Namespace, origins: dict[str, str]) -> int:
    from .daemon.stopping import Stopping

    stopping = Stopping()
    # vLLM sets it with several API servers; a node that inherits it would write its metrics among theirs.
    for variable in ("PROMETHEUS_MULTIPROC_DIR", "prometheus_multiproc_dir"):
        os.environ.pop(variable, None)
    try:
        from .daemon.node.main import run_node
    except ImportError as error:
        print(f"hyperspace: no node: {error}; pip install hyperspace-vllm[node]", file=sys.stderr)
        return 1
    return run_node(config, options.embedded, stopping)


def _id(config: Config, options: argparse.Namespace, origins: dict[str, str]) -> int:
    from .daemon.identity import Identity, IdentityError

    try:
        print(Identity.load(config.data_dir).peer_id)
    except IdentityError as error:
        print(f"hyperspace: {error}", file=sys.stderr)
        return 1
    return 0


def _cache(config: Config, options: argparse.Namespace, origins: dict[str, str]) -> int:
    return cache_command.cache(config, options)


def _config(config: Config, options: argparse.Namespace, origins: dict[str, str]) -> int:
    for setting in SETTINGS:
        value = setting.shown(setting.text_of(getattr(config, setting.name)))
        print(f"{setting.name} = {value or '(none)'}  # {origins[setting.name]}")
    return 0


def _sim(config: Config, options: argparse.Namespace, origins: dict[str, str]) -> int:
    from .sim.command import simulate

    return simulate(options)


def _status(config: Config, options: argparse.Namespace, origins: dict[str, str]) -> int:
    answer = _ask_status(config)
    if answer is None:
        print(
            f"hyperspace: no node answers in {config.data_dir}. `vllm serve MODEL --kv-connector hyperspace` starts "
            f"one, and so does `hyperspace node --data-dir {config.data_dir}`; {config.data_dir / 'node.log'} says "
            "why an embedded one stopped.",
            file=sys.stderr,
        )
        return 1
    if options.json:
        print(for_terminal(answer.decode()))
    else:
        _print_status(json.loads(answer))
    return 0


def _ask_status(config: Config) -> bytes | None:
    if not config.socket_path.exists():
        return None
    client = NodeClient(config, "cli", f"status-{os.getpid()}")
    try:
        if not client.wait_connected(_CONNECT_S) or not client.send(GetStatus()):
            return None
        deadline = time.monotonic() + _ANSWER_S
        while time.monotonic() < deadline:
            for message in client.receive():
                if isinstance(message, Status):
                    return message.json
            time.sleep(0.005)
        return None
    finally:
        client.close()


def _print_status(status: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    def row(name: str, value: str) -> None:
        """What peers, engines and Redis said is in it: no markup, and nothing that a terminal obeys."""
        table.add_row(Text(for_terminal(name)), Text(for_terminal(value)))

    table = Table(show_header=False, title=Text(for_terminal(f"hyperspace node {status['peer_id']}")))
    arena = status["arena"]
    used = arena["capacity_bytes"] - arena["free_bytes"]
    row("network", status["network"])
    row("KV endpoint", status["endpoint"] or "none")
    for name, value in _network_rows(status):
        row(name, value)
    row("data directory", status["data_dir"])
    row("running", f"pid {status['pid']}, {status['uptime_s']:.0f} s, version {status['version']}")
    row("engine processes", str(status["engine_leases"]))
    for model in status["identifying"]:
        share = f"{_size(model['done_bytes'])} of {_size(model['total_bytes'])} read"
        row("identifying", f"{model['title']}: {share}; L1 and L2 come on then")
    peers = [
        f"{peer['peer_id']} at {peer['endpoint']}, {'connected' if peer['connected'] else 'not connected'}"
        for peer in status["peers"]
    ]
    row("KV peers", "\n".join(peers) or "none")
    row("arena", f"{_size(used)} of {_size(arena['capacity_bytes'])}, {arena['rows']} rows")
    for name, value in (status["shared_responses"] or {}).items():
        row(f"responses in Redis: {name}", f"{value}")
    for name, value in (status["responses"] or {}).items():
        row(f"responses: {name}", f"{value}")
    for layer, (hits, total) in _hit_rates(status["metrics"]).items():
        row(f"{layer} hits", f"{hits:.0f} of {total:.0f} ({hits / total:.0%})")
    for sample in status["metrics"]:
        if sample["value"] and sample["name"] in _SHOWN:
            labels = " ".join(sample["labels"].values())
            row(f"{_SHOWN[sample['name']]} {labels}", f"{sample['value']:,.0f}")
    Console().print(table)


def _network_rows(status: dict[str, Any]) -> list[tuple[str, str]]:
    p2p = status["p2p"]
    if p2p is None:
        return [("joined", "no: p2p_listen is empty")]
    if "address" not in p2p:
        return [("joined", p2p["state"])]
    doubt = ("its engine", "disagrees with most others: convicts no peer; check model, dtype and hardware")
    return [
        *([doubt] if p2p["doubts_own_engine"] else []),
        ("others join through", f"{status['peer_id']}@{p2p['address']}"),
        ("joined", f"{len(p2p['connected'])} nodes connected, {p2p['known_peers']} known"),
        ("others' responses", f"{p2p['hints']} hinted by gossip, {p2p['registry_entries']} in the registry"),
    ]


_SHOWN = {
    "hyperspace_bytes_total": "bytes",
    "hyperspace_store_bytes": "bytes in",
    "hyperspace_failures_total": "failures:",
    "hyperspace_staged_dropped_total": "rows dropped:",
    "hyperspace_quarantined_bytes": "bytes quarantined",
}


def _hit_rates(metrics: list[dict[str, Any]]) -> dict[str, tuple[float, float]]:
    """Hits and lookups by layer."""
    rates: dict[str, tuple[float, float]] = {}
    for sample in metrics:
        if sample["name"] == "hyperspace_lookups_total":
            hits, total = rates.get(sample["labels"]["layer"], (0.0, 0.0))
            hit = sample["value"] if sample["labels"]["result"] == "hit" else 0.0
            rates[sample["labels"]["layer"]] = (hits + hit, total + sample["value"])
    return {layer: rate for layer, rate in rates.items() if rate[1]}


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.4g} TiB"


if __name__ == "__main__":
    sys.exit(main())
