"""Runs the mini recipe and writes its result to ``bench/results``: ``python -m bench.mini``."""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path

from bench.header import ROOT, header
from twins_fast.train import cli

COMMAND = ["train", "--recipe", "mini"]
RESULT = ROOT / "bench" / "results" / "mini.json"


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        run, started = Path(folder, "run"), time.monotonic()
        if cli.main([*COMMAND, "--run", str(run)]):
            raise SystemExit("the mini recipe failed")
        seconds = round(time.monotonic() - started, 1)
        results = [json.loads(path.read_text()) for path in (run / "result.json", *run.glob("*/result.json"))]
    record = {"header": header(), "command": " ".join(["twins-fast", *COMMAND]), "seconds": seconds, "results": results}
    RESULT.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
