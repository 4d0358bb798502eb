"""What a plan reads of the world: tokenizers, configurations and splits, each once, and what is wrong with them.

Whatever is on this machine and cannot be read is a problem of the recipe; whatever is on the Hub and out of reach is
said to be unknown, with the reason. Nothing raises for either.
"""

import json
from pathlib import Path
from typing import Any

from ..cache.format import tokenizer_fingerprint
from ..data.choices import choice_token_ids
from ..data.loading import check_disjoint
from ..evaluation import test_task
from .rows import Split, read_split


class Sources:
    """The tokenizers, configurations and splits of a recipe.

    `problems` and `unknown` hold sentences; `splits` has train, transfer, validation and test.NAME, those there are.
    """

    def __init__(self, recipe):
        self.recipe = recipe
        self.problems: list[str] = []
        self.unknown: list[str] = []
        self._configs: dict[tuple, Any] = {}
        self.tokenizer = self._tokenizers()
        self.splits = self._read_splits()
        self._check_rows()
        self._check_models()

    def models(self) -> dict[str, tuple[str | None, str | None]]:
        """Whose -> (folder or Hub id of the model, its revision)."""
        recipe = self.recipe
        given = recipe.cache.teacher, recipe.cache.teacher_revision
        base = recipe.sft.get("model_name_or_path"), recipe.sft.get("model_revision")
        student = recipe.distill.get("model_name_or_path"), recipe.distill.get("model_revision")
        return {"teacher": given if given[0] else base, "student": student}

    def config(self, path: str, revision: str | None = None):
        """The configuration of a model, or of the base of an adapter; None where it cannot be read."""
        from transformers import AutoConfig

        adapter = Path(path) / "adapter_config.json"
        if adapter.is_file():
            path, revision = json.loads(adapter.read_text(encoding="utf-8"))["base_model_name_or_path"], None
        if (path, revision) not in self._configs:
            self._configs[path, revision] = self._fetch("configuration", AutoConfig, path, revision)
        return self._configs[path, revision]

    def _fetch(self, what: str, auto_class, path: str, revision: str | None):
        try:
            return auto_class.from_pretrained(path, revision=revision)
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split()).partition(" Check ")[0][:300]
            if Path(path).exists():
                self.problems.append(f"{path}: its {what} cannot be read: {reason}")
            else:
                self.unknown.append(f"the {what} of {path}: {reason}")
            return None

    def _tokenizers(self):
        """The teacher's tokenizer, or the student's where the teacher's is not at hand."""
        from transformers import AutoTokenizer

        found = {
            whose: self._fetch("tokenizer", AutoTokenizer, *model)
            for whose, model in self.models().items()
            if model[0]
        }
        teacher, student = found.get("teacher"), found.get("student")
        if student and teacher and tokenizer_fingerprint(student) != tokenizer_fingerprint(teacher):
            self.problems.append(
                "distill.model_name_or_path: the student's tokenizer is not the teacher's; take models that share one"
            )
        return teacher or student

    def _read_splits(self) -> dict[str, Split]:
        recipe, data = self.recipe, self.recipe.datasets
        wanted = {role: (getattr(data, role), recipe.task) for role in ("train", "transfer", "validation")}
        wanted |= {f"test.{name}": (config, test_task(recipe.task, config.task)) for name, config in data.test.items()}
        splits = {
            name: read_split(config, name, task, self.tokenizer)
            for name, (config, task) in wanted.items()
            if config is not None
        }
        for split in splits.values():
            self.problems += split.problems
            self.unknown += split.unknown
        return splits

    def _check_rows(self) -> None:
        """What the later stages would refuse: answers of several tokens, and test rows that were learnt."""
        recipe = self.recipe
        if recipe.task.choices and self.tokenizer is not None and recipe.task.prompt is not None:
            try:
                choice_token_ids(recipe.task, self.tokenizer)
            except ValueError as error:
                self.problems.append(str(error))
        if recipe.evaluate.allow_overlap:
            return
        from datasets import Dataset

        tokenised = {
            name.removeprefix("test."): Dataset.from_list(split.examples)
            for name, split in self.splits.items()
            if split.known
        }
        for found in check_disjoint(tokenised):
            if found.second in recipe.datasets.test and found.first not in recipe.datasets.test:
                self.problems.append(
                    f"datasets.test.{found.second}: {found.count} of its prompts are in datasets.{found.first}; "
                    "remove them, or set evaluate.allow_overlap: true if that is meant"
                )

    def _check_models(self) -> None:
        longest = max((int(split.tokens.max()) for split in self.splits.values() if split.known), default=0)
        for whose, (path, revision) in self.models().items():
            config = self.config(path, revision) if path else None
            if config is None:
                continue
            text = config.get_text_config()
            limit = getattr(text, "max_position_embeddings", None)
            if limit is not None and longest > limit:
                self.problems.append(
                    f"task.max_length: a row has {longest} tokens, and the {whose} was made for {limit}; lower it"
                )
            if self.tokenizer is not None and len(self.tokenizer) > text.vocab_size:
                self.problems.append(
                    f"the {whose} has {text.vocab_size} tokens and the tokenizer {len(self.tokenizer)}; take a "
                    "tokenizer that belongs to it"
                )
