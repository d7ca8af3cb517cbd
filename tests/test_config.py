import os
import re
from pathlib import Path
from typing import get_args

import pytest

from hyperspace_vllm.cli import main
from hyperspace_vllm.config import SETTINGS, Config, ConfigError, load_config, load_config_with_origins
from hyperspace_vllm.core.records.ids import peer_id
from hyperspace_vllm.core.records.limits import GiB, MiB
from hyperspace_vllm.core.response.similar.match_error import WINDOW, wilson
from tests.support.paths import ROOT

PEER = f"{peer_id(bytes(32))}@10.0.0.1:4000"


def environ(tmp_path: Path, **variables: str) -> dict[str, str]:
    return {"XDG_DATA_HOME": str(tmp_path), **variables}


def test_defaults_follow_xdg(tmp_path: Path) -> None:
    assert load_config(environ(tmp_path)) == Config(data_dir=tmp_path / "hyperspace")


def test_variables_override_the_file_and_the_engine_overrides_both(tmp_path: Path) -> None:
    home = tmp_path / "hyperspace"
    home.mkdir()
    (home / "hyperspace.toml").write_text('network = "file"\nnice = 3\narena_bytes = "64 MiB"\n')
    variables = environ(tmp_path, HYPERSPACE_NICE="4", HYPERSPACE_FETCH="never")
    config, origins = load_config_with_origins(variables, {"hyperspace": {"fetch": "always"}})
    assert (config.network, config.nice, config.arena_bytes, config.fetch) == ("file", 4, 64 * MiB, "always")
    assert origins["network"] == str(home / "hyperspace.toml")
    assert (origins["nice"], origins["fetch"]) == ("the environment", "kv_connector_extra_config")
    assert origins["listen"] == "default"


def test_extra_config_may_hold_the_settings_at_its_top_level(tmp_path: Path) -> None:
    assert load_config(environ(tmp_path), {"nice": 7}).nice == 7


def test_a_named_file_is_read_and_may_choose_the_data_directory(tmp_path: Path) -> None:
    file = tmp_path / "elsewhere.toml"
    file.write_text(f'data_dir = "{tmp_path}/d"\npeers = ["{PEER}"]\n')
    config = load_config(environ(tmp_path, HYPERSPACE_CONFIG=str(file)))
    assert (config.data_dir, config.peers) == (tmp_path / "d", (PEER,))


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("arena_bytes", "2GiB", 2 * GiB),
        ("arena_bytes", "1048576", MiB),
        ("kv_cache", "false", False),
        ("kv_cache", "1", True),
        ("peers", f"{PEER}, {PEER}", (PEER, PEER)),
        ("peers", "", ()),
        ("metrics_listen", "9100", "9100"),
        ("metrics_listen", "[::1]:9100", "[::1]:9100"),
        ("registry", "redis://h:6379/0", "redis://h:6379/0"),
        ("shared_responses", "rediss://user:word@[::1]/1", "rediss://user:word@[::1]/1"),
        ("shared_responses", "unix:///run/redis.sock", "unix:///run/redis.sock"),
        ("shared_responses", "unix://:word@/run/redis.sock?db=1", "unix://:word@/run/redis.sock?db=1"),
        ("shared_responses", "rediss://h/1?ssl_ca_certs=/ca.pem", "rediss://h/1?ssl_ca_certs=/ca.pem"),
        ("shared_responses", "redis://h/", "redis://h/"),
        ("max_error", "0.004", 0.004),
        ("max_error", 1, 1.0),
    ],
)
def test_variables_are_read_as_their_settings_type(tmp_path: Path, name: str, text: str, value: object) -> None:
    assert getattr(load_config(environ(tmp_path, **{f"HYPERSPACE_{name.upper()}": text})), name) == value


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("response_ttl_s", "86401"),
        ("nice", "20"),
        ("nice", "-1"),
        ("nice", "3KiB"),
        ("nice", True),
        ("arena_bytes", "lots"),
        ("arena_bytes", 1.5),
        ("arena_bytes", "1023KiB"),
        ("kv_cache", "perhaps"),
        ("kv_cache", 1),
        ("mdns", 0),
        ("fetch", "sometimes"),
        ("fetch", "\ud800"),
        ("nice", 10**30),
        ("network", ["default"]),
        ("acronyms", ["K8s="]),
        ("allowed", ["nobody"]),
        ("listen", "4000"),
        ("listen", "host:70000"),
        ("peers", "12D3KooW@host:1"),
        ("peers", PEER.partition("@")[0]),
        ("peers", [1]),
        ("network", 3),
        ("metrics_listen", "99999"),
        ("registry", "host:6379"),
        ("shared_responses", "http://host:6379"),
        ("shared_responses", "redis://"),
        ("shared_responses", "redis://host:port"),
        ("shared_responses", "unix://"),
        ("shared_responses", "redis://h/abc"),
        ("shared_responses", "redis://h?foo=1"),
        ("shared_responses", "redis://h?ssl_ca_certs=/ca.pem"),
        ("shared_responses", "redis://h?db=one"),
        ("shared_responses", "redis://h?db"),
        ("shared_responses", "redis://h, redis://i"),
        ("shared_responses", "redis://h,i"),
        ("registry", "redis://h/0#1"),
        ("registry", "unix://run/redis.sock"),
        ("max_error", "0.0039"),
        ("max_error", 1.5),
        ("max_error", "nan"),
        ("data_dir", "/" + "d" * 200),
        ("data_dir", os.fsdecode(b"/caf\xe9")),
        ("data_dir", "/zero\0byte"),
        ("network", "zero\0byte"),
        ("network", "\ud800"),
        ("acronyms", ["K8s=Kubernetes, in full"]),
        ("peers", [""]),
    ],
)
def test_wrong_values_are_refused_by_setting_and_origin(tmp_path: Path, name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"^{name} = .*\(from kv_connector_extra_config\): expected "):
        load_config(environ(tmp_path), {name: value})


@pytest.mark.parametrize(
    ("name", "value"), [("peers", [PEER]), ("max_error", 1), ("data_dir", "/d"), ("network", Path("n"))]
)
def test_a_config_holds_only_values_of_its_types(tmp_path: Path, name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"^{name} = .*\(from Config\(\.\.\.\)\): expected "):
        Config(**{"data_dir": tmp_path, name: value})  # type: ignore[arg-type]


def test_the_least_max_error_is_one_that_can_be_shown(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^max_error = 0.001 .*: expected a number from 0.004 to 1$"):
        load_config(environ(tmp_path, HYPERSPACE_MAX_ERROR="0.001"))
    (bounds,) = (get_args(setting.type)[1] for setting in SETTINGS if setting.name == "max_error")
    least = bounds.ge
    assert least * 0.95 < wilson(0, WINDOW).high <= least


@pytest.mark.parametrize("name", ["registry", "shared_responses"])
@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("redis://:secret@h:x/0", "redis://***@h:x/0"),
        ("redis://user:se@cret/secret#@h", "redis://***@h"),
        ("redis://:secret@h, redis://:secret@i", "redis://***@i"),
        ("user:secret@h", "***@h"),
        (["redis://:secret@h"], "***@h"),
    ],
)
def test_no_error_shows_the_password_of_a_redis(tmp_path: Path, name: str, text: object, shown: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(environ(tmp_path), {name: text})
    assert shown in str(error.value)
    assert "secret" not in str(error.value)


def test_the_config_command_shows_no_password_and_a_node_process_gets_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    url = "rediss://user:secret@h:6379/1"
    monkeypatch.setenv("HYPERSPACE_REGISTRY", url)
    monkeypatch.setenv("HYPERSPACE_SHARED_RESPONSES", url)
    assert main(["config", "--data-dir", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert printed.count("rediss://***@h:6379/1") == 2
    assert "secret" not in printed
    assert Config(data_dir=tmp_path, registry=url).as_environ()["HYPERSPACE_REGISTRY"] == url


def test_an_unknown_name_is_refused_with_the_nearest_valid_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"kv_cach .*did you mean kv_cache"):
        load_config(environ(tmp_path), {"kv_cach": False})


def test_an_unknown_variable_is_only_warned_of_with_the_nearest_valid_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    variables = environ(tmp_path, HYPERSPACE_NICEST="3", HYPERSPACE_METRICS_PORT="9100", HYPERSPACE_NICE="4")
    assert load_config(variables).nice == 4
    assert load_config(variables).nice == 4
    # Clients that earlier tests of this process left behind may speak too.
    warnings = sorted(text for text in caplog.messages if "did you mean" in text)
    assert [re.sub(r".*(HYPERSPACE_\w+) \(.*did you mean (\w+)\?", r"\1 \2", text) for text in warnings] == [
        "HYPERSPACE_METRICS_PORT HYPERSPACE_METRICS_LISTEN",
        "HYPERSPACE_NICEST HYPERSPACE_NICE",
    ]


def variables_of_kubernetes(service: str) -> dict[str, str]:
    """What the kubelet puts into a pod for a Service with an unnamed port 7790 and one called `metrics`."""
    name = service.upper().replace("-", "_")
    return {
        f"{name}_SERVICE_HOST": "10.0.0.7",
        f"{name}_SERVICE_PORT": "7790",
        f"{name}_SERVICE_PORT_METRICS": "9100",
        f"{name}_PORT": "tcp://10.0.0.7:7790",
        f"{name}_PORT_7790_TCP": "tcp://10.0.0.7:7790",
        f"{name}_PORT_7790_TCP_PROTO": "tcp",
        f"{name}_PORT_7790_TCP_PORT": "7790",
        f"{name}_PORT_7790_TCP_ADDR": "10.0.0.7",
        f"{name}_PORT_53_UDP": "udp://[fd00::7]:53",
    }


@pytest.mark.parametrize("service", ["hyperspace", "hyperspace-gateway", "hyperspace-listen", "hyperspace-config"])
def test_what_kubernetes_says_of_a_service_is_no_setting(
    tmp_path: Path, service: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert load_config(environ(tmp_path, **variables_of_kubernetes(service))) == load_config(environ(tmp_path))
    assert caplog.records == []


def test_no_setting_has_a_variable_that_kubernetes_may_set() -> None:
    services = [f"hyperspace-{part}" for s in SETTINGS for part in (s.name.replace("_", "-"), s.name.split("_")[0])]
    set_by_kubernetes = {name for service in (*services, "hyperspace") for name in variables_of_kubernetes(service)}
    assert not set_by_kubernetes & {"HYPERSPACE_CONFIG", *(setting.variable for setting in SETTINGS)}
    ends = re.compile(r"_(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT(_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)?)$")
    assert [setting.variable for setting in SETTINGS if ends.search(setting.variable)] == []


def test_a_user_without_a_home_directory_is_told_to_choose_a_data_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("os.getuid", lambda: 12345)  # where Path.home() looks without HOME
    for variables in ({}, {"HYPERSPACE_DATA_DIR": "~/d"}, {"HYPERSPACE_CONFIG": "~/hyperspace.toml"}):
        with pytest.raises(ConfigError, match=r"home directory|HYPERSPACE_CONFIG"):
            load_config(variables)
    with pytest.raises(ConfigError, match="set HYPERSPACE_DATA_DIR to a directory"):
        Config()
    assert load_config({"HYPERSPACE_DATA_DIR": str(tmp_path)}).data_dir == tmp_path
    file = tmp_path / "elsewhere.toml"
    file.write_text(f'data_dir = "{tmp_path}/d"\n')
    assert load_config({"HYPERSPACE_CONFIG": str(file)}).data_dir == tmp_path / "d"


def test_a_data_directory_that_is_a_file_is_a_wrong_setting(tmp_path: Path) -> None:
    (tmp_path / "hyperspace").write_text("")
    with pytest.raises(ConfigError, match="Not a directory; set HYPERSPACE_DATA_DIR"):
        load_config(environ(tmp_path))


def test_a_missing_or_broken_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        load_config(environ(tmp_path, HYPERSPACE_CONFIG=str(tmp_path / "none.toml")))
    (tmp_path / "hyperspace").mkdir()
    (tmp_path / "hyperspace" / "hyperspace.toml").write_text("network = ")
    with pytest.raises(ConfigError, match=re.escape(str(tmp_path / "hyperspace" / "hyperspace.toml"))):
        load_config(environ(tmp_path))


def test_a_node_process_gets_exactly_its_starters_configuration(tmp_path: Path) -> None:
    config = Config(
        data_dir=tmp_path / "d",
        peers=(PEER, PEER),
        kv_cache=False,
        arena_bytes=5 * MiB,
        fetch="always",
        metrics_listen="127.0.0.1:0",
    )
    assert load_config(config.as_environ()) == config


def test_peers_are_named_with_names_and_with_addresses_of_either_kind(tmp_path: Path) -> None:
    peer = PEER.partition("@")[0]
    written = (PEER, f"{peer}@host.example:1", f"{peer}@[::1]:2", f"{peer}@::1:3")
    config = Config(data_dir=tmp_path, peers=written, bootstrap=written[:1])
    assert [str(each) for each in config.peer_addresses] == [*written[:3], f"{peer}@[::1]:3"]
    assert config.bootstrap_addresses == config.peer_addresses[:1]
    assert config.peers == written


def test_every_setting_is_documented() -> None:
    table = (ROOT / "docs" / "operations.md").read_text()
    for setting in SETTINGS:
        default = setting.text_of(setting.default) if setting.default is not None else ""
        row = rf"\| `{setting.name}` \| `{setting.variable}` \| [^|]*{re.escape(default)}[^|]* \| "
        assert re.search(row + re.escape(setting.doc.replace("|", "\\|")), table), f"{setting.name}: {row}"
