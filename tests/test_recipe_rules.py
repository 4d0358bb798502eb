"""The rules of the training sections name settings that exist, with the values that the trainer takes."""

from first_trl.recipe.keys import training_fields
from first_trl.recipe.rules import LIMITS, NOT_YOURS


def test_every_rule_is_about_a_setting_that_trl_or_first_trl_knows():
    known = set(training_fields("sft")) | set(training_fields("distill"))
    assert set(NOT_YOURS) <= known
    assert set(LIMITS) <= known


def test_the_choices_of_the_loss_are_those_of_the_trainer():
    from first_trl.constants import DIVERGENCES, TAILS

    assert LIMITS["divergence"]["choices"] == DIVERGENCES
    assert LIMITS["tail"]["choices"] == TAILS
