"""What was found about one architecture, and how a step's outcome is noted."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from taid_ray.errors import ConfigError, ModelError

REMEDY = re.compile(r"\b(choose|download|give|install|leave|lower|name|run|save|set)\b", re.IGNORECASE)
LONGEST = 600


@dataclass
class Report:
    """What taid-ray makes of one architecture."""

    name: str
    accepted: bool = False
    packing: bool = False
    split: bool = False
    cuts: list[list[int]] = field(default_factory=list)
    """Choices of layers with which student.init: cut works."""
    refusals: dict[str, str] = field(default_factory=dict)
    """The message, by what was refused."""
    wrong: list[str] = field(default_factory=list)
    """What must not be: a crash, a message without a remedy, a result that is not exact."""

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Notes what a step raises: as a refusal if the package means it, as something wrong otherwise."""
        try:
            yield
        except (ConfigError, ModelError) as error:
            message = str(error)
            self.refusals[name] = message
            if "\n" in message or len(message) > LONGEST or not REMEDY.search(message):
                self.wrong.append(f"{name}: a message without a remedy, or not one sentence: {message}")
        except Exception as error:
            self.wrong.append(f"{name}: {type(error).__name__}: {' '.join(str(error).split())[:300]}")

    def expect(self, name: str, value: float, limit: float) -> None:
        """Notes a value above its limit, or NaN, as something wrong."""
        if not value <= limit:
            self.wrong.append(f"{name}: {value:.1e}, at most {limit:.0e} is right")
