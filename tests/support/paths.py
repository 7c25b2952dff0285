"""Where the tests find the repository, what ships with it, and what only developers have."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "taid_ray"
BUNDLE = PACKAGE / "quickstart"
"""The bundled teacher, `stories260k`, and the bundled stories."""
CONFIGS = PACKAGE / "configs"
GOLDEN_FILE = ROOT / "tests" / "golden" / "taid_reference.json"
"""Inputs and outputs of the reference implementation."""
MORE_LOSSES_FILE = ROOT / "tests" / "golden" / "more_losses.json"
"""Inputs and outputs of the published code of the other losses."""
CURVES_FILE = GOLDEN_FILE.with_name("simulate.json")
"""The seed's curves of t at fixed values of the sigmoid."""
SHARED = ROOT.parent / "shared" / "data"
"""Larger models, texts and tokenizers. Only developers have them; tests that need them skip without."""
