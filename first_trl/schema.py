"""What a recipe may hold, for editors and readers: its JSON schema and its table of settings; and a recipe resolved.

first-trl show RECIPE [--key value ...]     the recipe as it runs: `extends`, variables, overrides and defaults in
first-trl schema > recipes/schema.json      what editors complete and check recipes with
first-trl schema --markdown                 every setting as a table, the second half of docs/recipes.md
"""

import argparse
import json
import sys
from typing import Any

from .recipe import Recipe, RecipeError, described, load_recipe
from .settings import RESERVED_KEYS, DatasetConfig, Section, first_only_keys, training_model

_VARIABLE = {"type": "string", "pattern": r"^\$\{.+\}$"}


def show_main(argv: list[str]) -> int:
    """`first-trl show RECIPE`; returns the exit status."""
    parser = argparse.ArgumentParser(prog="first-trl show", description="Print a recipe as it runs.")
    parser.add_argument("recipe", help="the experiment's YAML file; settings may follow as --key value")
    options, overrides = parser.parse_known_args(argv)
    try:
        print(load_recipe(options.recipe, overrides).to_yaml(), end="")
    except RecipeError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def schema_main(argv: list[str]) -> int:
    """`first-trl schema`; returns the exit status."""
    parser = argparse.ArgumentParser(prog="first-trl schema", description="Print what a recipe may hold.")
    parser.add_argument("--markdown", action="store_true", help="as tables for people, not as a JSON schema")
    print(settings_tables() if parser.parse_args(argv).markdown else json.dumps(recipe_schema(), indent=1))
    return 0


def recipe_schema() -> dict[str, Any]:
    """The JSON schema of a recipe, with the help of every setting, TRL's included."""
    schema = Recipe.model_json_schema()
    properties = schema["properties"]
    own = training_model("distill").model_json_schema()["properties"]
    own = {key: item for key, item in own.items() if key not in RESERVED_KEYS and key != "hub_token"}
    same = {key: {"$ref": f"#/properties/distill/properties/{key}"} for key in own}
    trainer = {"enum": ["first", "sft"], "default": "first", "description": "Knowledge matching, or labels."}
    properties["distill"] |= {"properties": own, "additionalProperties": False}
    properties["sft"] |= {
        "properties": {key: item for key, item in same.items() if key not in first_only_keys()},
        "additionalProperties": False,
    }
    arm = {"type": "object", "properties": {"trainer": trainer, **same}, "additionalProperties": False}
    properties["arms"]["additionalProperties"] = arm
    extends = {"type": "string", "description": "Another recipe, relative to this one, whose settings these change."}
    schema["properties"] = {"extends": extends, **properties}
    del schema["required"]  # the recipe that is extended may have it
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
    pages = [_table("The top of a recipe", "", Recipe, [key for key in Recipe.model_fields if key in _TOP])]
    for key in ("task", "datasets", "cache", "calibrate", "evaluate", "push"):
        model = Recipe.model_fields[key].annotation
        assert isinstance(model, type) and issubclass(model, Section)
        pages.append(_table(f"`{key}`", model.__doc__ or "", model))
    text = "Settings of one split: `train`, `validation`, `transfer`, or a name under `test`."
    pages.insert(3, _table("`datasets`: one split", text, DatasetConfig))
    model, own = training_model("distill"), first_only_keys()
    text = "Settings of the loss, beside those of TRL in the next table. An arm may have all of them, and `trainer`:\n"
    text += "`first` (knowledge matching, the default) or `sft` (trained on labels)."
    pages.append(_table("`distill` and `arms`", text, model, [key for key in model.model_fields if key in own]))
    keys = [key for key in model.model_fields if key not in own and key not in RESERVED_KEYS and key != "hub_token"]
    text = "Fields of TRL's `SFTConfig` and `ModelConfig`, with TRL's help."
    pages.append(_table("`sft`, `distill` and `arms`: TRL's settings", text, model, keys))
    return "\n".join(pages)


_TOP = ("name", "output_dir", "seed", "seeds", "arms")


def _table(title: str, text: str, model: type[Section], keys: list[str] | None = None) -> str:
    lines = [f"### {title}", "", *(line.strip() for line in text.strip().splitlines()), ""]
    lines += ["| setting | default | |", "|---|---|---|"]
    for key in keys or model.model_fields:
        field = model.model_fields[key]
        unset = field.default_factory or field.default is None
        default = "required" if field.is_required() else "" if unset else f"`{json.dumps(field.default)}`"
        wanted = described(field.annotation)
        choices = f" {wanted.capitalize()}." if wanted.startswith("one of") and len(wanted) < 100 else ""
        text = (field.description or "").replace("|", "\\|") + choices
        lines.append(f"| `{key}` | {default} | {text} |")
    return "\n".join([*lines, ""])
