"""Programs of the repository outside the package, loaded as modules."""

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "docs" / "results"


def load_script(path: str) -> Any:
    """The module of a file, named by its path in the repository."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def results_scripts(*names: str) -> list[Any]:
    """Scripts of docs/results, which import each other by name."""
    if str(RESULTS) not in sys.path:
        sys.path.append(str(RESULTS))
    return [importlib.import_module(name) for name in names]
