"""A stand-in for ``alignflow``, for sweeps: it writes run folders as training does, in no time, and fails on demand.

``python swept.py train CONFIG KEY=VALUE ... name=... out=... [--resume]``. Every start is a line of ``calls.txt`` in
the working folder. A seed's behaviour is the word in the file ``seed-N``: ``fail`` ends with an error, ``half`` stops
after half of the steps as a killed run does, ``wait`` stops there and waits for a signal.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path


def main(words: list[str]) -> int:
    values = dict(word.split("=", 1) for word in words if "=" in word)
    out, seed, steps = Path(json.loads(values["out"])), values.get("seed", "0"), int(values.get("train.steps", "4"))
    with Path("calls.txt").open("a") as calls:
        calls.write(f"{values['name']}{' --resume' if '--resume' in words else ''}\n")
    told = Path(f"seed-{seed}")
    how = told.read_text() if told.exists() else ""
    if how == "fail":
        print("error: the judge is not there\n  start it", file=sys.stderr)
        return 3
    done = steps // 2 if how else steps
    out.mkdir(parents=True, exist_ok=True)
    rewards = "{gold: {kind: shapes}}"
    settings = f"recipe: {{kind: {Path(words[1]).stem}}}\nreward: {{kind: shapes}}\n"
    settings += f"evaluate: {{gold: gold, rewards: {rewards}}}\nprompts: {{heldout: a}}\nseed: {seed}\n"
    (out / "config.yaml").write_text(settings)
    rows = [{"event": "train", "step": step, "seconds": 1.0 * step, "reward": 0.1} for step in range(1, done + 1)]
    scores = {0: 0.2, done: 0.2 + 0.1 * int(seed)}
    rows += [{"event": "eval", "step": step, "scores": {"gold": gold}, "prompts": 8} for step, gold in scores.items()]
    (out / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if how == "half":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "wait":
        signal.signal(signal.SIGINT, lambda *_: os._exit(130))
        Path("waiting.new").write_text(str(os.getpid()))
        Path("waiting.new").rename("waiting")
        time.sleep(60)
    (out / "summary.json").write_text(json.dumps({"name": values["name"], "status": "finished", "steps": done}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
