"""Which implementation serves each op here, and why."""

import importlib.metadata
import importlib.util
import json
import sys
from pathlib import Path

import torch

import electra_fast
from electra_fast.ops import Ops, _register


def info() -> dict:
    """Return the versions, the devices and, for each op, what serves it on the CPU and on CUDA."""
    return {
        "electra_fast": electra_fast.__version__,
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "triton": importlib.metadata.version("triton") if _register.HAS_TRITON else "not installed",
        "extension": _extension(),
        "gpu": _gpu(),
        "ops": {
            op: {device: _register.served_by(op, device) for device in ("CPU", "CUDA")} for op in Ops._fields
        },
    }


def _extension() -> str:
    file = Path(electra_fast.__file__).with_name("_left_out.json")  # by setup.py
    left_out = json.loads(file.read_text()) if file.exists() else {}
    if importlib.util.find_spec("electra_fast._C") is None:
        return f"not built: {left_out.get('all', 'not installed by pip from here')}"
    if ("embed_fwd", "CUDA") in _register.COMPILED:  # `linear` is not a kernel of ours there
        return "built for CPU and CUDA"
    why = (
        "this torch is built without CUDA" if torch.version.cuda is None else "nothing in csrc/cuda was built"
    )
    return f"built for CPU; not for CUDA: {left_out.get('CUDA', why)}"


def _gpu() -> str:
    if not torch.cuda.is_available():
        return "none visible to torch"
    name, capability = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
    if capability < _register.OLDEST_GPU:
        return f"{name} (sm_{capability[0]}{capability[1]}): too old, the kernels need sm_80"
    return f"{name} (sm_{capability[0]}{capability[1]})"


def report() -> str:
    """Return `info()` as the page that `python -m electra_fast info` prints."""
    facts = info()
    served = facts.pop("ops")
    lines = [f"{name:<13} {value}" for name, value in facts.items()]
    width = max(len(by["CPU"]) for by in served.values())
    lines += ["", f"{'op':<15} {'on the CPU':<{width}}  on CUDA"]
    lines += [f"{op:<15} {by['CPU']:<{width}}  {by['CUDA']}" for op, by in served.items()]
    return "\n".join(lines)
