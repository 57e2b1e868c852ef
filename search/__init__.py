"""What knows about a run: command line, configuration, study, strategies, exports and reports."""

from importlib.util import find_spec
from pathlib import Path

_HERE = Path(__file__).resolve().parent.parent

for _name in ("methods", "profilers", "predictors", "spaces"):
    _spec = find_spec(_name)
    _origin = Path(_spec.origin).resolve().parent.parent if _spec and _spec.origin else None
    if _origin != _HERE:
        raise ImportError(
            f"isolatency: package {_name!r} resolves to {_origin}, not to {_HERE}; another distribution shadows it "
            f"(Hugging Face's `spaces` is one). Uninstall it or put {_HERE} first on PYTHONPATH."
        )
