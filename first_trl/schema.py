"""What a recipe may hold: its JSON schema and its table of settings; and a recipe resolved, or one of its rows.

first-trl show RECIPE [--key value ...]     the recipe as it runs: `extends`, variables, overrides and defaults in
first-trl show RECIPE --row 0               a row as the models see it, with what is learned marked
first-trl schema > recipes/schema.json      what editors complete and check recipes with
first-trl schema --markdown                 every setting as a table, the second half of docs/recipes.md
"""

import argparse
import inspect
import json
import sys
from typing import Any, Literal, get_args, get_origin

from .errors import FirstTrlError
from .recipe import RUN_SETTINGS, Recipe, file_model, load_recipe
from .settings import DatasetConfig, Section, WriteAnswers, training_model

NESTED: dict[str, list[tuple[Any, str]]] = {
    "datasets": [(DatasetConfig, "datasets.<split>")],
    "cache": [(WriteAnswers, "cache.write_answers")],
}
_VARIABLE = {"type": "string", "pattern": r"^\$\{.+\}$"}


def show_main(argv: list[str]) -> int:
    """`first-trl show RECIPE`; returns the exit status."""
    parser = argparse.ArgumentParser(prog="first-trl show", description="Print a recipe as it runs, or one row.")
    parser.add_argument("recipe", help="the experiment's YAML file; settings may follow as --key value")
    parser.add_argument("--row", type=int, help="print this row as the models see it, with what is learned marked")
    parser.add_argument("--split", default="train", help="the row's: train, validation, transfer or a test set")
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
    from .evaluation import task_of_set
    from .modeling import load_tokenizer

    data, tests = recipe.datasets, recipe.datasets.test
    splits = {name: getattr(data, name) for name in ("train", "validation", "transfer")} | tests
    if (config := splits.get(split)) is None:
        known = ", ".join(name for name, source in splits.items() if source is not None)
        raise FirstTrlError(f"--split {split}: this recipe has no such split; choose among {known}")
    rows = load_split(config, "test" if split in tests else "validation" if split == "validation" else "train")
    if not 0 <= number < len(rows):
        raise FirstTrlError(f"--row {number}: datasets.{split} has {len(rows)} rows; give 0 to {len(rows) - 1}")
    row, task = rows[number], task_of_set(recipe.task, config.task)
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
    top, trl, distill = file_model().model_fields, training_model("sft").model_fields, training_model("distill")
    own = {key: field for key, field in distill.model_fields.items() if key not in trl}
    about = "Fields of TRL's `SFTConfig` and `ModelConfig`, with TRL's help. An arm may have them, those of the loss\n"
    about += (
        "(but `closing` and `rounds`), and `trainer`: `first` (knowledge matching, the default) or `sft` (labels)."
    )
    tables = [_table("The top of a recipe", "", {key: top[key] for key in ("name", *RUN_SETTINGS, "arms")})]
    for section, field in Recipe.model_fields.items():
        own_and_nested: list[tuple[Any, str]] = [(field.annotation, section), *NESTED.get(section, ())]
        for model, name in own_and_nested:
            if isinstance(model, type) and issubclass(model, Section):
                tables.append(_table(f"`{name}`", inspect.getdoc(model) or "", model.model_fields))
    tables.append(_table("`distill`", "The students' training.", own))
    tables.append(_table("`sft`, `distill` and `arms`: TRL's settings", about, trl))
    return "\n".join(tables)


def _table(title: str, about: str, fields: dict[str, Any]) -> str:
    lines = [f"### {title}", "", *([about, ""] if about else []), "| setting | default | |", "|---|---|---|"]
    for key, field in fields.items():
        unset = field.default_factory or field.default is None
        default = "required" if field.is_required() else "" if unset else f"`{json.dumps(field.default)}`"
        values = [str(value) for value in get_args(field.annotation) if value]
        few = get_origin(field.annotation) is Literal and len(values) < 12
        help = (field.description or "").replace("|", "\\|") + (f" One of {', '.join(values)}." if few else "")
        lines.append(f"| `{key}` | {default} | {help} |")
    return "\n".join([*lines, ""])
