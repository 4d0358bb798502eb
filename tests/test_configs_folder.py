"""Every launch file is read by accelerate's own parser, and says what its name promises."""

from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from trl import get_quantization_config

from first_trl.first_config import FIRSTConfig
from first_trl.training import launched_sharded, missing_quant_storage, training_arguments

FOLDER = Path(__file__).parent.parent / "configs"
# name -> (kind, machines, processes)
EXPECTED = {
    "cpu": ("NO", 1, 1),
    "single_gpu": ("NO", 1, 1),
    "multi_gpu": ("MULTI_GPU", 1, 8),
    "fsdp2": ("FSDP", 1, 8),
    "zero2": ("DEEPSPEED", 1, 8),
    "zero3": ("DEEPSPEED", 1, 8),
    "multi_node": ("MULTI_GPU", 2, 16),
}


def launch_arguments(name):
    words = ["--config_file", str(FOLDER / f"{name}.yaml"), "-m", "first_trl.stages.sft", "recipe.yaml"]
    arguments, _, precision_from_file = _validate_launch_command(launch_command_parser().parse_args(words))
    assert arguments.mixed_precision == "no" and precision_from_file  # precision is the recipe's alone
    return arguments


@pytest.mark.parametrize("name", EXPECTED)
def test_accelerate_reads_the_file_and_means_the_same(name):
    assert sorted(path.stem for path in FOLDER.iterdir()) == sorted(EXPECTED)
    kind, machines, processes = EXPECTED[name]
    assert load_config_from_file(str(FOLDER / f"{name}.yaml")).distributed_type.value == kind
    arguments = launch_arguments(name)
    assert (arguments.num_machines, arguments.num_processes) == (machines, processes)
    assert arguments.use_cpu is (name == "cpu")
    assert arguments.use_fsdp is (kind == "FSDP")
    assert arguments.use_deepspeed is (kind == "DEEPSPEED")
    assert arguments.multi_gpu is (kind == "MULTI_GPU")
    assert f"configs/{name}.yaml" in (FOLDER / f"{name}.yaml").read_text().partition("compute_environment")[0]


def test_sharding_is_of_the_version_and_stage_that_the_name_says():
    assert load_config_from_file(str(FOLDER / "fsdp2.yaml")).fsdp_config["fsdp_version"] == 2
    for stage in (2, 3):
        assert load_config_from_file(str(FOLDER / f"zero{stage}.yaml")).deepspeed_config["zero_stage"] == stage


@pytest.mark.parametrize("name", ["fsdp2", "zero3"])
@pytest.mark.parametrize(("storage", "said"), [(None, "it is missing"), ("uint8", "it is uint8")])
def test_four_bit_weights_are_refused_by_a_sharded_launch_unless_stored_as_the_others(
    name, storage, said, tmp_path, monkeypatch
):
    section = {"model_name_or_path": "m", "dtype": "bfloat16", "load_in_4bit": True, "use_cpu": True}
    wrong = section if storage is None else {**section, "bnb_4bit_quant_storage": storage}
    training_arguments(wrong, FIRSTConfig, tmp_path, 0)
    for key, value in sharded_variables(name).items():
        monkeypatch.setenv(key, value)
    with pytest.raises(ValueError, match=f"{said}, .*write bnb_4bit_quant_storage: bfloat16"):
        training_arguments(wrong, FIRSTConfig, tmp_path, 0)
    right = {**section, "bnb_4bit_quant_storage": "bfloat16"}
    assert launched_sharded() and missing_quant_storage(right) is None
    monkeypatch.undo()  # TrainingArguments asks for deepspeed itself
    model_args = training_arguments(right, FIRSTConfig, tmp_path, 0)[1]
    assert str(get_quantization_config(model_args).bnb_4bit_quant_storage) == "torch.bfloat16"


def sharded_variables(name: str) -> dict[str, str]:
    """What `accelerate launch` with this file tells its processes about sharding."""
    arguments = launch_arguments(name)
    if arguments.use_deepspeed:
        arguments.deepspeed_fields_from_accelerate_config = []  # which `accelerate launch` adds by itself
        environment = prepare_deepspeed_cmd_env(arguments)[1]
    else:
        environment = prepare_multi_gpu_env(arguments)
    names = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_DEEPSPEED_ZERO_STAGE")
    return {key: environment[key] for key in names if key in environment}
