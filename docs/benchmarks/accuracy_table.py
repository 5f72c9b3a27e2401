"""The table in accuracy.md, one row per file that accuracy.py wrote.

python docs/benchmarks/accuracy_table.py docs/benchmarks/accuracy/*.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def settings(run: dict[str, Any]) -> str:
    """``quality`` and what was asked for beside it; of a peer, which has its judgement in such a file too, its name."""
    if "peer" in run:
        return str(run["peer"])
    config = run["asked"]
    others = [f"`{key}={config[key]}`" for key in config if key not in ("bits", "group_size", "quality")]
    return ", ".join([f"`{config.get('quality', 'default')}`", *others])


def main() -> None:
    runs = [(Path(name).name, json.loads(Path(name).read_text())) for name in sys.argv[1:]]
    print("| model | bits | settings | set | mean KLD | 99th percentile | top-1 | perplexity | file |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name, run in sorted(runs, key=lambda item: (item[1]["model"], -item[1]["config"]["bits"], item[0])):
        found = run["evaluation"]
        cells = (
            run["model"],
            run["config"]["bits"],
            settings(run),
            run["set"],
            f"{found['kld']:.4f} ± {found['kld_stderr']:.4f}",
            f"{found['kld_p99']:.2f}",
            f"{found['top1_agreement']:.1%}",
            f"{found['perplexity']:.2f}",
            f"`{name}`",
        )
        print("| " + " | ".join(map(str, cells)) + " |")


if __name__ == "__main__":
    main()
