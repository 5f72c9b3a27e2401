"""Several processes that quantize one model together; one process is a team of one."""

from .process_team import joined, launched
from .team import Team

__all__ = ["Team", "joined", "launched"]
