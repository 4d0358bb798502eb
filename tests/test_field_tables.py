"""What is read from the source of TRL must be what TRL has; the first test to fail when TRL moves."""

import dataclasses
import importlib
import subprocess
import sys

import pytest

from first_trl.recipe.field_tables import CLASSES, known_fields


@pytest.mark.parametrize("name", CLASSES)
def test_the_fields_read_from_source_are_those_of_the_class(name):
    module = "first_trl.first_config" if name == "FIRSTConfig" else "trl"
    real = {field.name for field in dataclasses.fields(getattr(importlib.import_module(module), name)) if field.init}
    read = set(known_fields(name))
    assert len(read) > 15
    assert read == real


def test_types_are_the_annotations_of_the_class():
    from trl import ModelConfig

    real = {field.name: field.type for field in dataclasses.fields(ModelConfig)}
    for name, spec in known_fields("ModelConfig").items():
        written = real[name] if isinstance(real[name], str) else getattr(real[name], "__name__", str(real[name]))
        assert spec.annotation in (written, str(real[name]))


def test_choices_are_those_of_the_enums_and_of_the_metadata():
    from transformers.trainer_utils import IntervalStrategy, SchedulerType
    from transformers.training_args import OptimizerNames

    specs = known_fields("SFTConfig")
    for key, enum in (("eval_strategy", IntervalStrategy), ("lr_scheduler_type", SchedulerType)):
        assert set(specs[key].choices) == {member.value for member in enum}
    assert set(specs["optim"].choices) == {member.value for member in OptimizerNames}
    assert known_fields("ModelConfig")["bnb_4bit_quant_type"].choices == ("fp4", "nf4")


def test_a_subclass_overrides_what_it_inherits():
    assert known_fields("SFTConfig")["bf16"].annotation == "bool | None"  # TrainingArguments says bool
    assert {"divergence", "tail", "learning_rate"} <= set(known_fields("FIRSTConfig"))


def test_a_class_that_moved_is_an_error(monkeypatch):
    monkeypatch.setitem(CLASSES, "Moved", (("trl", "trainer/sft_config.py", "NoSuchConfig"),))
    with pytest.raises(RuntimeError, match="no longer defines NoSuchConfig"):
        known_fields("Moved")
    monkeypatch.setitem(CLASSES, "Orphan", (CLASSES["ModelConfig"][0], CLASSES["SFTConfig"][2]))
    with pytest.raises(RuntimeError, match="no longer derives from ModelConfig"):
        known_fields("Orphan")


def test_nothing_heavy_is_imported():
    code = (
        "import sys; from first_trl.recipe.field_tables import CLASSES, known_fields;"
        "[known_fields(c) for c in CLASSES];"
        "print([m for m in ('torch', 'transformers', 'trl') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
