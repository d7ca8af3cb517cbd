"""Where tests find files of the repository."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MODELS = ROOT / ".models"
TINY = MODELS / "tiny"
DATA = ROOT / "tests" / "data"
VECTORS = ROOT / "tests" / "vectors"
