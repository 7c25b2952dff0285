"""Lets torchvision be imported in the environment of this interpreter, where torch is a build for CPUs. `make install` runs it.

The usual torchvision is built against the torch with CUDA. Beside the one without, its library of operators cannot be loaded, and
`import torchvision` stops at the first operator it describes. Processors of images call none of them. So this writes a module
that declares them, without an implementation, just before torchvision is imported, and a .pth file that installs it in every
process of this environment, Ray's workers included. Where torchvision can be imported without, it writes nothing.
"""

import subprocess
import sys
import sysconfig
from pathlib import Path

MODULE = "_declare_torchvision_operators"
SOURCE = '''"""Declares the operators of torchvision before it is imported; written by {script}."""

import importlib.abc
import sys

OPERATORS = (
    "nms", "qnms", "roi_align", "_roi_align_backward", "ps_roi_align", "_ps_roi_align_backward", "roi_pool",
    "_roi_pool_backward", "ps_roi_pool", "_ps_roi_pool_backward", "deform_conv2d", "_deform_conv2d_backward",
)


class BeforeTorchvision(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            self.library = torch.library.Library("torchvision", "DEF")
            for operator in OPERATORS:
                self.library.define(operator + "(Tensor x) -> Tensor")
            sys.modules[__name__].finder = self  # the operators last as long as the library
        return None


sys.meta_path.insert(0, BeforeTorchvision())
'''


def main() -> None:
    """Writes the two files if torchvision lacks its operators, and raises SystemExit if it cannot be imported even then."""
    packages = Path(sysconfig.get_path("purelib"))
    module, start = packages / f"{MODULE}.py", packages / f"{MODULE}.pth"
    module.unlink(missing_ok=True)
    start.unlink(missing_ok=True)
    problem = why_not("import torchvision")
    if "operator torchvision::" in problem and why_not("import torch; assert not torch.backends.cuda.is_built()") == "":
        module.write_text(SOURCE.format(script=Path(__file__).name), encoding="utf-8")
        start.write_text(f"import {MODULE}\n", encoding="utf-8")
        problem = why_not("import torchvision, torchvision.transforms.v2")
    if problem:
        raise SystemExit(f"torchvision cannot be imported: {problem}")


def why_not(code: str) -> str:
    """Runs code in a new process of this interpreter. Returns the last line of its error, or "" if it has none."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    return "" if done.returncode == 0 else (done.stderr.strip().splitlines() or ["no message"])[-1]


if __name__ == "__main__":
    main()
