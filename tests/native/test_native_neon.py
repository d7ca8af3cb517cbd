"""The NEON kernels, cross-compiled and run in an emulator: they have not been run on 64-bit ARM hardware yet."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import ROOT

TOOLS = ("aarch64-linux-gnu-g++", "qemu-aarch64")


@pytest.mark.io
@pytest.mark.skipif(
    any(shutil.which(tool) is None for tool in TOOLS), reason="apt-get install g++-aarch64-linux-gnu qemu-user"
)
def test_the_neon_kernels_pass_the_native_selftest_under_qemu(tmp_path):
    cmake = shutil.which("cmake", path=str(Path(sys.executable).parent)) or shutil.which("cmake")
    assert cmake
    toolchain = ROOT / "csrc" / "cmake" / "aarch64.cmake"
    configure = [cmake, "-S", str(ROOT / "csrc"), "-B", str(tmp_path), f"-DCMAKE_TOOLCHAIN_FILE={toolchain}"]
    subprocess.run([*configure, "-DCMAKE_BUILD_TYPE=Release"], check=True, capture_output=True)
    build = [cmake, "--build", str(tmp_path), "--target", "run_selftest", "--parallel", "2"]
    said = subprocess.run(build, check=True, capture_output=True, text=True).stdout
    assert "neon: ok" in said
    assert "chosen: neon" in said
