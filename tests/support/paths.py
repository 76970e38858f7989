"""Where things lie: the repository, recorded outputs, small data sets."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden"
FILES = ROOT / "tests" / "files"
FASHION = FILES / "fashion_mnist"
RECIPES = ROOT / "recipes"
