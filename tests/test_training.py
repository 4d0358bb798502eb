"""What both trainings share: their arguments, the checkpoint to resume from, and the model that is kept."""

from types import SimpleNamespace

import pytest
from trl import SFTConfig

from first_trl.checkpoints import LIST, ListFiles, last_whole_checkpoint
from first_trl.errors import FirstTrlError
from first_trl.files import write_atomically
from first_trl.recipe import load_recipe, teacher_section
from first_trl.training import label_trainer, load_arguments, model_arguments, save_whole, training_arguments
from tests.cache_recipe import write_recipe
from tests.tiny import build_model


def checkpoint(folder, step, **files):
    """A checkpoint as the trainer writes it, with the list of its files."""
    for name, content in {"optimizer.pt": "o", "trainer_state.json": "{}", **files}.items():
        write_atomically(folder / f"checkpoint-{step}" / name, content)
    state = SimpleNamespace(global_step=step, is_world_process_zero=True)
    ListFiles().on_save(SimpleNamespace(output_dir=folder), state, None)
    return folder / f"checkpoint-{step}"


def test_a_checkpoint_is_resumed_from_where_every_file_is_as_it_was_written(tmp_path, capsys):
    assert last_whole_checkpoint(tmp_path / "nothing") is None
    for step in (8, 9, 10, 11):
        checkpoint(tmp_path, step)
    (tmp_path / "checkpoint-11" / LIST).unlink()  # a crash before all was written
    (tmp_path / "checkpoint-10" / "trainer_state.json").write_text("")
    (tmp_path / "checkpoint-9" / "optimizer.pt").unlink()
    assert last_whole_checkpoint(tmp_path) == str(tmp_path / "checkpoint-8")
    said = capsys.readouterr().err
    for words in ("11 cannot", "not written to its end", "10 cannot", "trainer_state.json", "optimizer.pt is missing"):
        assert words in said


def test_a_checkpoint_without_the_state_of_its_optimizer_is_not_resumed_from_in_silence(tmp_path, capsys):
    checkpoint(tmp_path, 1).joinpath("optimizer.pt").unlink()
    ListFiles().on_save(
        SimpleNamespace(output_dir=tmp_path), SimpleNamespace(global_step=1, is_world_process_zero=True), None
    )
    assert last_whole_checkpoint(tmp_path) is None and "no state of the optimizer" in capsys.readouterr().err


def test_an_adapter_names_the_revision_of_its_base(monkeypatch, tmp_path):
    loaded = []
    monkeypatch.setattr("first_trl.training.load_model", lambda *path, **how: loaded.append(how) or build_model())

    def adapter(**settings):
        section = {"model_name_or_path": "me/base", "use_peft": True, "use_cpu": True, **settings}
        return model_arguments(*training_arguments(section, SFTConfig, tmp_path, 0))["peft_config"]

    assert adapter(model_revision="v3").revision == "v3" and loaded[-1]["revision"] == "v3"
    assert adapter().revision is None
    assert {str(how["device"]) for how in loaded} == {"cpu"}  # never spread over the devices of the machine


def test_models_are_loaded_at_the_revision_of_the_recipe(tmp_path):
    assert load_arguments({"model_revision": "v3"})["revision"] == "v3" and load_arguments({})["revision"] == "main"
    recipe = load_recipe(write_recipe(tmp_path), ["--cache.teacher", "me/teacher", "--cache.teacher_revision", "v2"])
    assert load_arguments(teacher_section(recipe))["revision"] == "v2"


def test_the_teacher_runs_as_it_was_trained_unless_cache_says_otherwise():
    four_bit = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "use_bnb_nested_quant": True, "dtype": "bfloat16"}
    unset = {"teacher_revision": None, "teacher_dtype": None, "attn_implementation": None, "backend": "hf"}

    def quantization(load_in_4bit):
        cache = SimpleNamespace(**unset, load_in_4bit=load_in_4bit)
        return load_arguments(teacher_section(SimpleNamespace(cache=cache, sft=four_bit)))["quantization_config"]

    inherited = quantization(None)
    assert inherited.load_in_4bit and inherited.bnb_4bit_quant_type == "nf4" and inherited.bnb_4bit_use_double_quant
    assert quantization(True) is not None and quantization(False) is None


@pytest.mark.parametrize(("settings", "length"), [({}, None), ({"padding_free": True}, None), ({"packing": True}, 60)])
def test_labels_are_trained_on_with_every_layout_that_the_cache_is(settings, length, tmp_path):
    recipe = load_recipe(write_recipe(tmp_path, rows=8))
    assert label_trainer(recipe, recipe.distill | settings, tmp_path / "out", 0).args.max_length == length


def test_a_student_on_labels_with_a_trained_head_and_4_bit_weights_takes_a_step(tmp_path):
    recipe = load_recipe(write_recipe(tmp_path, rows=8))
    adapter = {"use_peft": True, "lora_target_modules": ["q_proj", "v_proj"], "lora_modules_to_save": ["lm_head"]}
    trainer = label_trainer(recipe, recipe.distill | adapter | {"load_in_4bit": True}, tmp_path / "out", 0)
    trainer.train()
    assert 0 < trainer.state.log_history[-1]["train_loss"] < 20


def test_a_model_that_was_not_written_is_an_error_and_not_a_finished_training(tmp_path):
    trainer = SimpleNamespace(
        is_fsdp_enabled=False,
        save_model=lambda folder: None,
        accelerator=SimpleNamespace(wait_for_everyone=lambda: None),
        is_world_process_zero=lambda: True,
    )
    with pytest.raises(FirstTrlError, match="has no weights; its checkpoints are kept"):
        save_whole(trainer, tmp_path)
    (tmp_path / "adapter_model.safetensors").touch()
    save_whole(trainer, tmp_path)
