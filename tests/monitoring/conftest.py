"""Makes the histories and the tools importable: with importlib mode pytest puts no test folder on the path."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
for folder in (Path(__file__).parent, ROOT / "tools/monitoring", ROOT / "tests/pipeline"):
    sys.path.insert(0, str(folder))
