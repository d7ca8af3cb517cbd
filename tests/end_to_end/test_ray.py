"""Workers that Ray starts share responses and KV as others do.

vLLM's CPU platform has no Ray resource. A platform plugin, as vendors of other hardware write them, gives it one here.
Ray is told of two such devices.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.servers import MODELS, Server, free_port, introduce
from tests.end_to_end.test_topologies import SMALL, Topology, as_features, check

pytestmark = [pytest.mark.vllm, pytest.mark.topology, pytest.mark.timeout(1800)]

TWO_WORKERS = ("--tensor-parallel-size", "2")
UNBOUND = SMALL | {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}  # a machine may have fewer cores than there are workers
RAY = Topology("Ray, 2 workers", ("--distributed-executor-backend", "ray", *TWO_WORKERS))
PLUGIN = """
from vllm.platforms.cpu import CpuPlatform

def platform():
    return "cpu_with_ray.CpuWithRay"

class CpuWithRay(CpuPlatform):
    ray_device_key = "GPU"
"""


@pytest.fixture
def ray_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment of processes that use a Ray of two devices on loopback, which has no HYPERSPACE_* variable."""
    plugin, directory = tmp_path_factory.mktemp("plugin"), tmp_path_factory.mktemp("ray")
    (plugin / "cpu_with_ray.py").write_text(PLUGIN)
    metadata = plugin / "cpu_with_ray-1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: cpu-with-ray\nVersion: 1\n")
    (metadata / "entry_points.txt").write_text("[vllm.platform_plugins]\ncpu_with_ray = cpu_with_ray:platform\n")
    port = free_port()
    environment = {
        "PYTHONPATH": str(plugin),
        "RAY_ADDRESS": f"127.0.0.1:{port}",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # what makes Ray stay on loopback
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",
        "VLLM_HOST_IP": "127.0.0.1",
    }
    ray, inherited = str(Path(sys.executable).parent / "ray"), os.environ | environment
    options = (
        "--num-gpus", "2", "--num-cpus", "4", "--object-store-memory", str(200 << 20),
        "--include-dashboard", "false", "--temp-dir", str(directory),
    )  # fmt: skip
    start = (ray, "start", "--head", "--node-ip-address", "127.0.0.1", "--port", str(port), *options)
    head = subprocess.Popen((*start, "--block"), env=inherited, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    yield environment
    head.terminate()
    head.wait(60)


@pytest.mark.parametrize("topology", as_features([RAY]))
def test_workers_that_ray_starts_share_what_others_computed(
    topology: Topology, ray_cluster: dict[str, str], tmp_path: Path
) -> None:
    directories = (tmp_path / "producer", tmp_path / "consumer")
    for directory in directories:
        directory.mkdir(mode=0o700)
    ours, others = introduce(directories, [free_port(), free_port()])
    with Server("producer", MODELS["tiny"], directories[0], arguments=TWO_WORKERS, environment=UNBOUND | ours) as first:
        check(topology, first.ready(600), UNBOUND | others | ray_cluster, directories[1])
