"""What a recipe may hold, for editors and readers: its JSON schema and its table of settings; and a recipe resolved.

first-trl show RECIPE [--key value ...]     the recipe as it runs: `extends`, variables, overrides and defaults in
first-trl show RECIPE --row 0               a row as the models see it, with what is learned marked
first-trl schema > recipes/schema.json      what editors complete and check recipes with
first-trl schema --markdown                 every setting as a table, the second half of docs/recipes.md
"""

import argparse
import json
import sys
from collections.abc import Iterable
from typing import Any, Literal, get_args, get_origin

from .errors import FirstTrlError
from .recipe import Recipe, file_model, load_recipe, section_of
from .settings import DatasetConfig, Section, WriteAnswers, training_model

_VARIABLE = {"type": "string", "pattern": r"^\$\{.+\}$"}


def show_main(argv: list[str]) -> int:
    """`first-trl show RECIPE`; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="first-trl show", description="Print a recipe as it runs, or one of its rows."
    )
    parser.add_argument("recipe", help="the experiment's YAML file; settings may follow as --key value")
    parser.add_argument("--row", type=int, help="print this row as the models see it, with what is learned marked")
    parser.add_argument(
        "--split", default="train", help="the row's split: train (default), validation, transfer, or a test set"
    )
    options, overrides = parser.parse_known_args(argv)
    try:
        recipe = load_recipe(options.recipe, overrides)
        print(recipe.to_yaml() if options.row is None else shown_row(recipe, options.split, options.row), end="")
    except FirstTrlError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def shown_row(recipe: Recipe, split: str, number: int) -> str:
    """A row of a split as the teacher sees it, with what is learned marked.

    Raises:
        FirstTrlError: there is no such split or row, or the row cannot be used.
    """
    from .data.choices import has_answer, marked_text, room_to_write, with_answer
    from .data.encoding import encode_prompt
    from .data.loading import load_split
    from .evaluation import test_task
    from .modeling import load_tokenizer

    data, tests = recipe.datasets, recipe.datasets.test
    splits = {name: getattr(data, name) for name in ("train", "validation", "transfer")} | tests
    if (config := splits.get(split)) is None:
        known = ", ".join(name for name, source in splits.items() if source is not None)
        raise FirstTrlError(f"--split {split}: this recipe has no such split; choose among {known}")
    rows = load_split(config, "test" if split in tests else "validation" if split == "validation" else "train")
    if not 0 <= number < len(rows):
        raise FirstTrlError(f"--row {number}: datasets.{split} has {len(rows)} rows; give 0 to {len(rows) - 1}")
    row, task = rows[number], test_task(recipe.task, config.task)
    if task.choices and split == "transfer" and not has_answer(task, row):
        row = with_answer(row, task, task.choices[0])
    path, revision = recipe.cache.teacher, recipe.cache.teacher_revision
    if path is None:
        path, revision = recipe.sft["model_name_or_path"], recipe.sft.get("model_revision")
    tokenizer, write = load_tokenizer(path, revision), recipe.cache.write_answers
    if split == "transfer" and write:
        ids = encode_prompt(room_to_write(task, write), tokenizer, row)
        text = f"{len(ids)} tokens, and the teacher writes up to {write.max_new_tokens} more ⟦⟧\n\n"
        text += f"{tokenizer.decode(ids)}⟦...⟧"
    else:
        text = marked_text(task, tokenizer, row)
    return f"datasets.{split}, row {number}: {text}\n"


def schema_main(argv: list[str]) -> int:
    """`first-trl schema`; returns the exit status."""
    parser = argparse.ArgumentParser(prog="first-trl schema", description="Print what a recipe may hold.")
    parser.add_argument("--markdown", action="store_true", help="as tables for people, not as a JSON schema")
    print(settings_tables() if parser.parse_args(argv).markdown else json.dumps(recipe_schema(), indent=1))
    return 0


def recipe_schema() -> dict[str, Any]:
    """The JSON schema of a recipe, with the help of every setting, TRL's included."""
    schema = file_model().model_json_schema()
    extends = {"type": "string", "description": "Another recipe, relative to this one, whose settings these change."}
    schema["properties"] = {"extends": extends, **schema["properties"]}
    del schema["required"]  # the recipe that is extended may have it
    for section in ("SftSettings", "ArmsSettings"):  # each setting of TRL is written out once
        own = schema["$defs"][section]["properties"]
        for key in own.keys() & schema["$defs"]["DistillSettings"]["properties"].keys():
            own[key] = {"$ref": f"#/$defs/DistillSettings/properties/{key}"}
    return {"$schema": "http://json-schema.org/draft-07/schema#", **_open_to_variables(schema)}


def _open_to_variables(schema: Any) -> Any:
    """Numbers and booleans may be written as `${NAME:-default}` too; titles only repeat the names."""
    if isinstance(schema, list):
        return [_open_to_variables(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    kept = {key: _open_to_variables(item) for key, item in schema.items() if key != "title" or isinstance(item, dict)}
    if kept.get("type") in ("integer", "number", "boolean"):
        outside = {key: kept.pop(key) for key in ("description", "default") if key in kept}
        return {"anyOf": [kept, _VARIABLE], **outside}
    return kept


def settings_tables() -> str:
    """Every setting of a recipe as Markdown: a table for each section."""
    recipe, trl = file_model(), training_model("sft")
    tables = [_table("The top of a recipe", "", recipe, ("name", "output_dir", "seed", "seeds", "arms"))]
    for name, field in recipe.model_fields.items():
        section = section_of(field.annotation)
        if section is None or name == "sft":
            continue
        own = [key for key in section.model_fields if name != "distill" or key not in trl.model_fields]
        tables.append(_table(f"`{name}`", field.description or section.__doc__ or "", section, own))
        if name == "datasets":
            about = "`train`, `validation`, `transfer`, or a name under `test`."
            tables.append(_table("`datasets`: one split", about, DatasetConfig, DatasetConfig.model_fields))
        if name == "cache":
            about = WriteAnswers.__doc__ or ""
            tables.append(_table("`cache.write_answers`", about, WriteAnswers, WriteAnswers.model_fields))
    about = "Fields of TRL's `SFTConfig` and `ModelConfig`, with TRL's help. An arm may have them, those of the loss\n"
    about += "(but `closing`), and `trainer`: `first` (knowledge matching, the default) or `sft` (trained on labels)."
    tables.append(_table("`sft`, `distill` and `arms`: TRL's settings", about, trl, trl.model_fields))
    return "\n".join(tables)


def _table(title: str, text: str, model: type[Section], keys: Iterable[str]) -> str:
    lines = [f"### {title}", "", *(line.strip() for line in text.strip().splitlines()), ""]
    lines += ["| setting | default | |", "|---|---|---|"]
    for key in keys:
        field = model.model_fields[key]
        unset = field.default_factory or field.default is None
        default = "required" if field.is_required() else "" if unset else f"`{json.dumps(field.default)}`"
        values = [str(v) for v in get_args(field.annotation) if v] if get_origin(field.annotation) is Literal else []
        choices = f" One of {', '.join(values)}." if 0 < len(values) < 12 else ""
        text = (field.description or "").replace("|", "\\|") + choices
        lines.append(f"| `{key}` | {default} | {text} |")
    return "\n".join([*lines, ""])
