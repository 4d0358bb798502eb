"""Settings refuse what they cannot mean, name the value and say what to write instead."""

import dataclasses

import pytest

from first_trl.calibration import METHODS
from first_trl.config import (
    RECALIBRATION_METHODS,
    CacheConfig,
    CalibrateConfig,
    DatasetConfig,
    EvaluateConfig,
    PushConfig,
    TaskConfig,
)
from first_trl.field_types import MisfitError, SettingsError, fit_value, union_members

CLASSES = (TaskConfig, DatasetConfig, CacheConfig, CalibrateConfig, EvaluateConfig, PushConfig)


@pytest.mark.parametrize("cls", CLASSES)
def test_every_setting_has_a_help_and_a_type_that_is_checked(cls):
    for field in dataclasses.fields(cls):
        assert field.metadata["help"].endswith("."), field.name
        bases = {member.partition("[")[0] for member in union_members(field.type)}
        assert bases <= {"str", "int", "float", "bool", "list", "dict", "None"}, field.name


def test_every_family_of_a_recipe_exists_in_the_calibration():
    assert set(RECALIBRATION_METHODS) <= set(METHODS)


@pytest.mark.parametrize(
    ("value", "annotation", "fitted"),
    [
        (3, "int", 3),
        (3, "float", 3),
        ("1e-4", "float", 1e-4),
        ("-.5", "float | None", -0.5),
        (None, "float | None", None),
        (True, "bool | None", True),
        ("all-linear", "list[str] | None", ["all-linear"]),
        (["a", "b"], "None | str | list[str]", ["a", "b"]),
        ("a", "None | str | list[str]", "a"),
        ({"a": [1]}, "dict[str, Any] | str | None", {"a": [1]}),
        (False, "str | None | Literal[False]", False),
        ({"dp": 1}, "ParallelismConfig | None", {"dp": 1}),
    ],
)
def test_values_that_fit(value, annotation, fitted):
    result = fit_value(value, annotation)
    assert result == fitted and type(result) is type(fitted)


@pytest.mark.parametrize(
    ("value", "annotation", "limits", "words"),
    [
        (True, "int", {}, "a whole number, not a boolean"),
        (False, "float", {}, "a number, not a boolean"),
        (7.5, "int", {}, "a whole number, not a number with decimals"),
        ([7], "int", {}, "write 7 without the brackets"),
        ("7", "int", {}, "without quotes"),
        ("fast", "float", {}, "a number, not text"),
        ("nan", "float", {}, "a number, not text"),
        (float("inf"), "float", {}, "infinite"),
        (False, "SaveStrategy | str", {"choices": ("no", "steps")}, "one of no, steps, not a boolean; YAML reads"),
        (True, "list[str]", {}, "YAML reads an unquoted yes, no"),
        ([True, False], "list[str] | None", {}, "YAML reads an unquoted yes, no"),
        (5, "str", {}, "put it in quotes"),
        (1, "bool", {}, "true or false, not a whole number"),
        ("true", "bool", {}, "write true or false, without quotes"),
        (None, "int", {}, "not nothing"),
        ("a", "dict | None", {}, "a mapping, not text"),
        ({"a": 1}, "list[str] | None", {}, "a list of texts, not a mapping"),
        ("adam", "str", {"choices": ("sgd", "lion")}, "choose one of sgd, lion"),
        (0, "int", {"minimum": 1}, "write 1 or more"),
        (2.0, "float", {"maximum": 1}, "write 1 or less"),
        (0, "float", {"above": 0}, "write more than 0"),
        (1, "float", {"below": 1}, "less than 1"),
    ],
)
def test_values_that_do_not_fit_are_told_why(value, annotation, limits, words):
    with pytest.raises(MisfitError) as error:
        fit_value(value, annotation, **limits)
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: CacheConfig(top_k=True), "CacheConfig.top_k = True: it needs a whole number"),
        (lambda: CacheConfig(dtype="bfloat16"), "one of float16, float32"),
        (lambda: CacheConfig(teacher_revision="v1"), "there is no cache.teacher"),
        (
            lambda: CalibrateConfig(criterion="brier"),
            "CalibrateConfig.criterion = 'brier': it is not a value",
        ),
        (lambda: CalibrateConfig(num_bins=0), "1 or more"),
        (lambda: TaskConfig(prompt="{text}"), "it comes without completion"),
        (lambda: TaskConfig(prompt="{text.__class__}", completion="x"), "{text.__class__} is not allowed"),
        (lambda: TaskConfig(prompt="{text", completion="x"), "cannot be read"),
        (lambda: TaskConfig(prompt="{text!r}", completion="x"), "has a format or a conversion"),
        (lambda: TaskConfig(prompt="{text}", completion="  "), "it is empty"),
        (lambda: TaskConfig(prompt="a", completion="b", chat_template_kwargs={}), "not go through the chat template"),
        (lambda: TaskConfig(prompt="a", completion="{b}{c}", choices=["x", "y"]), "exactly one column, not 2"),
        (lambda: TaskConfig(prompt="a", completion="b", choices=["x", "y"]), "exactly one column, not 0"),
        (lambda: TaskConfig(choices=["x", "x"]), "at least two different answers"),
        (lambda: TaskConfig(choices=["x"]), "at least two different answers"),
        (lambda: DatasetConfig(path="p", columns={"a": 1}), "something other than texts"),
        (lambda: DatasetConfig(path="p", columns={"a": "x", "b": "x"}), "two names read one column"),
        (lambda: DatasetConfig(path="p", max_rows=0), "1 or more"),
        (lambda: PushConfig(hub_model_id="student"), "write owner/name"),
        (lambda: PushConfig(hub_model_id="../../x"), "write owner/name"),
    ],
)
def test_settings_that_make_no_sense_are_refused(make, words):
    with pytest.raises(SettingsError) as error:
        make()
    assert words in str(error.value)


def test_all_problems_of_a_settings_object_come_at_once():
    with pytest.raises(SettingsError) as error:
        CacheConfig(top_k=[7], dtype="float64", load_in_4bit="yes")
    assert [problem.key for problem in error.value.problems] == ["top_k", "dtype", "load_in_4bit"]


def test_defaults_are_the_papers():
    assert CacheConfig().top_k == 5
    assert (CalibrateConfig().criterion, CalibrateConfig().num_bins) == ("ece", 10)
