"""A teacher cache as a data set repository of the Hub: its card, and its upload.

The folder is uploaded as it is, its manifest and shards unchanged, so that whoever downloads it can check it. Reading
one back is `first_trl.open_cache("owner/name")`.
"""

import json
from pathlib import Path

import yaml

from ..hub.upload import push_folder
from ..redaction import refuse_leaks
from .format import MANIFEST
from .reader import TeacherCache

_CARD = """\
---
{metadata}---

# Teacher cache: {title}

What a teacher says at every supervised position of {rows:,} examples: the log-probabilities of
{kept} tokens, and of all others together. A student is distilled from it without the
teacher; it fits every student with the teacher's tokenizer.

```python
from first_trl import FIRSTTrainer, open_cache

cache = open_cache("{repo_id}")  # every byte is checked against manifest.json
trainer = FIRSTTrainer(model="a-student", train_dataset=cache)
```

| | |
|---|---|
{facts}

| column | type | meaning |
|---|---|---|
| `input_ids` | list of int32 | the tokens that the teacher saw |
| `labels` | list of int32 | -100 outside the loss, else the token itself |
| `teacher_ids` | list of {top_k} int32 | per supervised position, most probable first |
| `teacher_log_probs` | list of {top_k} {dtype} | natural, over the whole vocabulary, at temperature 1 |
| `teacher_tail_log_prob` | list of float32 | of all other tokens together |
| `row_key` | string | SHA-256 of `input_ids` and `labels` |

The texts behind the tokens keep the licence of the data they were taken from. Made with
first-trl for FIRST ([arXiv:2408.12168](https://arxiv.org/abs/2408.12168)).
"""


def build_card(cache: TeacherCache, repo_id: str) -> str:
    """The README.md of a cache's repository."""
    manifest, totals, teacher = cache.manifest, cache.manifest["totals"], cache.manifest["teacher"]
    data, task = manifest["dataset"], manifest["task"]
    metadata = {
        "pretty_name": f"Teacher cache of {teacher['id']}",
        "tags": ["first-trl", "distillation", "teacher-cache"],
        "task_categories": ["text-generation"],
        "configs": [{"config_name": "default", "data_files": "train-*.parquet"}],
    }
    facts = {
        "teacher": _named(teacher, "id", "revision", "commit", "dtype", "quantization", "base"),
        "teacher's weights": f"SHA-256 `{teacher['weights_sha256']}`" if teacher["weights_sha256"] else "on the Hub",
        "rows from": _named(data, "path", "name", "files", "split", "revision"),
        "prompt": _code(task.get("prompt")),
        "completion": _code(task.get("completion")),
        "supervised positions": f"{totals['supervised_positions']:,}",
        "teacher's mass on the kept tokens": f"{totals['teacher_mass_mean']:.4f} on average, "
        f"{totals['teacher_mass_p10']:.4f} or less at a tenth of the positions",
        "tokenizer": f"SHA-256 `{manifest['tokenizer_sha256']}` of its token to id mapping",
        "manifest": f"SHA-256 `{manifest['manifest_sha256']}`",
    }
    return _CARD.format(
        metadata=yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True),
        title=_plain(str(teacher["id"])),
        rows=totals["rows"],
        top_k=manifest["top_k"],
        kept=f"{manifest['top_k']} answers'"
        if manifest.get("support") == "choices"
        else f"its {manifest['top_k']} likeliest",
        dtype=manifest["dtype"],
        repo_id=repo_id,
        facts="\n".join(f"| {name} | {value} |" for name, value in facts.items()),
    )


def _named(section: dict, *names: str) -> str:
    return ", ".join(f"{name} {_code(section[name])}" for name in names if section.get(name))


def _code(value) -> str:
    """A value as one cell of a table, whatever is in it."""
    if value is None:
        return "none"
    text = json.dumps(value, ensure_ascii=False) if not isinstance(value, str) else value
    return f"`` {_plain(text)} ``" if "`" in text else f"`{_plain(text)}`"


def _plain(text: str) -> str:
    return text.replace("\n", "\\n").replace("|", "\\|")


def push_cache(
    cache: TeacherCache, repo_id: str, *, private: bool = False, revision: str | None = None, create_pr: bool = False
) -> str:
    """Write the card of a cache beside its shards and upload the folder; returns the address of the commit.

    Raises:
        ValueError: the card or the manifest would publish a token or a path of this machine.
        first_trl.hub.upload.PushError: the Hub refused or could not be reached.
    """
    card = build_card(cache, repo_id)
    refuse_leaks("the card", card)
    refuse_leaks(MANIFEST, (Path(cache.path) / MANIFEST).read_text(encoding="utf-8"))
    (cache.path / "README.md").write_text(card, encoding="utf-8")
    return push_folder(
        cache.path,
        repo_id,
        private=private,
        revision=revision,
        create_pr=create_pr,
        commit_message="Upload a teacher cache and its card",
        repo_type="dataset",
    )
