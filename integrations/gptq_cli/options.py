"""Options that several commands have."""

from __future__ import annotations

from typing import Annotated

import typer

Json = Annotated[
    str | None,
    typer.Option("--json", metavar="FILE", help="Write the result as JSON; - is stdout, and nothing else goes there."),
]
Device = Annotated[str, typer.Option(help="Where to run, e.g. cpu or cuda:0.")]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run the Python code that comes with the model. Never done unasked.")
]
Threads = Annotated[int | None, typer.Option("--threads", min=1, help="CPU threads. Default: torch's.")]
