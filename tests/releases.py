"""Runs the end-to-end tests with other releases of vLLM, each in its own environment, and says how each went.

`make test-vllm` makes the environments (deploy/setup/releases.py). The tests are those that bear a feature's name.
"""

import subprocess
import sys
import time

from tests.support.paths import ROOT

TESTS = "feature and not topology"
BY_SOURCE = "tests/vllm_adapter/test_newest_vllm.py"  # says nothing of the installed release


def main(arguments: list[str]) -> int:
    """Releases, then arguments of pytest; 0 if every release passed, with a summary on stdout."""
    releases = [each for each in arguments if each[:1].isdigit()]
    rest = [each for each in arguments if each not in releases]
    lines, failed = [], False
    for release in releases:
        python = ROOT / ".venvs" / f"vllm-{release}" / "bin" / "python"
        print(f"\n=== vLLM {release}", flush=True)
        start = time.monotonic()
        command = [str(python), "-m", "pytest", "-m", TESTS, "--ignore", BY_SOURCE, *rest]
        code = subprocess.run(command, cwd=ROOT).returncode
        lines.append(f"  vLLM {release}: {'passed' if code == 0 else 'FAILED'} in {time.monotonic() - start:.0f} s")
        failed |= code != 0
    print("\nEnd to end:", *lines, sep="\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
