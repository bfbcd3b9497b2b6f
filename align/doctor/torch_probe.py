"""Torch's own report of itself and of the cards, read in a separate process."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

PATIENCE = 180.0
"""Seconds that the process may take; the first import from a network disk takes minutes."""

CODE = """
import json, os, sys
found = {"cards": []}
def put(name, read):
    try:
        found[name] = read()
    except Exception as error:
        found.setdefault("errors", {})[name] = f"{type(error).__name__}: {error}".splitlines()[0][:300]
try:
    import torch
except BaseException as error:
    print(json.dumps({"error": f"{type(error).__name__}: {error}".splitlines()[0][:300]}))
    sys.exit()
import torch.distributed as dist
put("version", lambda: str(torch.__version__))
put("cuda", lambda: torch.version.cuda)
put("hip", lambda: torch.version.hip)
put("threads", torch.get_num_threads)
put("mps", torch.backends.mps.is_available)
put("available", lambda: torch.cuda.is_available() or (torch.version.cuda and torch.cuda.init()) or False)
def card(index):
    part = torch.cuda.get_device_properties(index)
    free, total = torch.cuda.mem_get_info(index)
    x = torch.ones(64, 64, device=f"cuda:{index}", requires_grad=True)
    (x @ x).sum().backward()
    return {"name": part.name, "capability": [part.major, part.minor], "free": free, "total": total,
            "right": float(x.grad.sum()) == 2 * 64**3, "bfloat16": torch.cuda.is_bf16_supported()}
for index in range(torch.cuda.device_count() if found.get("available") else 0):
    put(f"card {index}", lambda: found["cards"].append(card(index)))
def reduce(backend, device):
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    x = torch.ones(3, device=device)
    dist.all_reduce(x)
    dist.destroy_process_group()
    return float(x.sum()) == 3
if dist.is_available() and dist.is_gloo_available():
    put("gloo", lambda: reduce("gloo", "cpu"))
if found["cards"] and dist.is_nccl_available():
    put("nccl", lambda: reduce("nccl", "cuda:0"))
print(json.dumps(found))
"""


def read(code: str = CODE, patience: float = PATIENCE) -> dict[str, Any]:
    """Plain values: version, cuda, hip, threads, cards, gloo, nccl, errors; ``error`` alone where torch fails.

    Args:
        code: the program, whose last line of output is JSON.
        patience: seconds until it is ended.
    """
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, errors="replace", timeout=patience
        )
    except subprocess.TimeoutExpired:
        return {"error": f"importing torch took more than {patience:g} s"}
    except OSError as error:
        return {"error": f"Python cannot be started: {error.strerror}"}
    try:
        found = json.loads(done.stdout.splitlines()[-1])
        return dict(found)
    except (IndexError, ValueError, TypeError):
        last = (done.stderr.strip().splitlines() or ["nothing was printed"])[-1]
        return {"error": f"the process that imports torch ended with code {done.returncode}: {last:.300}"}
