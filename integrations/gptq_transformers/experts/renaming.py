"""Names of experts that transformers 5 does not know, as one of the conversions of its loader."""

from __future__ import annotations

from collections.abc import Mapping

from transformers.core_model_loading import WeightRenaming

from gptq_backend.format import renamed


class ExpertRenaming(WeightRenaming):
    """All of an :func:`expert_renaming` in one step: transformers tries its own, each a regular expression, one after
    the other on every name, and replaces no more than one number.
    """

    def __init__(self, renaming: Mapping[str, str]) -> None:
        super().__init__("(?!)", "(?!)")  # patterns, which nothing asks for
        self.renaming = renaming

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        """The name in the model, and what was replaced, if anything."""
        name = renamed(source_key, self.renaming)
        if name == source_key:
            return name, None
        self._was_used = True
        return name, source_key

    def reverse_transform(self) -> ExpertRenaming:
        """For ``save_pretrained``."""
        return ExpertRenaming({wanted: own for own, wanted in self.renaming.items()})
