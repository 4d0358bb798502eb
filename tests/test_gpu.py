"""What only a GPU can show: `pytest -m gpu`, or `make gpu`. With FIRST_TRL_REHEARSE=1 the same tests run on a CPU."""

import os

import pytest
import torch

from first_trl.head import partition_log_probs
from first_trl.losses import partition_divergence
from tests.test_trainer import cache_of, random_examples, trainer_for
from tests.tiny import build_model, build_tokenizer

REHEARSED = os.environ.get("FIRST_TRL_REHEARSE") == "1"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE == "cpu" and not REHEARSED, reason="needs a GPU, or FIRST_TRL_REHEARSE=1"),
]


def exact_log_probs(hidden_ND, weight_VD, ids_NK):
    """The partition's log-probabilities by a full softmax in float64, tail last."""
    log_probs_NV = (hidden_ND.double() @ weight_VD.double().T).log_softmax(dim=1)
    kept_NV = torch.zeros_like(log_probs_NV, dtype=torch.bool).scatter(1, ids_NK, True)
    tail_N1 = log_probs_NV.masked_fill(kept_NV, -torch.inf).logsumexp(dim=1, keepdim=True)
    return torch.cat([log_probs_NV.gather(1, ids_NK), tail_N1], dim=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 64, 1003, 5), (5000, 64, 20_011, 5), (33, 1024, 151_936, 5)])
def test_the_head_and_its_gradient_agree_with_float64(dtype, shape):
    if REHEARSED and shape[0] * shape[2] > 10**7:
        pytest.skip("this size is for a GPU")
    num, hidden_size, vocab_size, top_k = shape
    generator = torch.Generator().manual_seed(0)
    hidden_ND = torch.randn(num, hidden_size, generator=generator).to(DEVICE, dtype).requires_grad_()
    weight_VD = (torch.randn(vocab_size, hidden_size, generator=generator) * 0.1).to(DEVICE, dtype)
    ids_NK = torch.stack([torch.randperm(vocab_size, generator=generator)[:top_k] for _ in range(num)]).to(DEVICE)
    teacher_NK1 = torch.randn(num, top_k + 1, generator=generator).to(DEVICE).log_softmax(dim=1)

    ours_NK1 = partition_log_probs(hidden_ND, weight_VD, ids_NK)
    partition_divergence(ours_NK1, teacher_NK1).sum().backward()
    reference_ND = hidden_ND.detach().double().requires_grad_()
    exact_NK1 = exact_log_probs(reference_ND, weight_VD, ids_NK)
    (teacher_NK1.double().exp() * (teacher_NK1.double() - exact_NK1)).sum().backward()

    tolerance = 1e-3 if dtype == torch.float32 else 2e-2
    assert (ours_NK1 - exact_NK1).abs().max() < tolerance
    error = (hidden_ND.grad.double() - reference_ND.grad).norm() / reference_ND.grad.norm()
    assert error < tolerance


@pytest.mark.parametrize("quantised", [False, True], ids=["dense", "nf4"])
def test_a_student_that_is_the_teacher_has_no_loss_and_trains(quantised, tmp_path):
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    tokenizer = build_tokenizer()
    wide = {"hidden_size": 128, "intermediate_size": 256}  # what the 4-bit kernels take in blocks
    build_model(len(tokenizer), seed=0, **wide).save_pretrained(tmp_path / "base")
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "base",
        dtype=dtype,
        quantization_config=config if quantised else None,
        device_map={"": DEVICE if DEVICE == "cpu" else 0},
    )
    from peft import LoraConfig

    dataset = cache_of(model, random_examples(16, len(tokenizer)))
    trainer = trainer_for(
        model,
        dataset,
        tokenizer,
        tmp_path / "out",
        peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
        max_steps=3,
        per_device_train_batch_size=4,
        save_strategy="no",
        use_cpu=DEVICE == "cpu",
    )
    assert abs(trainer.evaluate()["eval_kl"]) < (1e-2 if dtype == torch.bfloat16 else 1e-3)
    trainer.train()
    assert all(torch.isfinite(value).all() for value in trainer.model.parameters() if value.requires_grad)


@pytest.mark.skipif(DEVICE == "cpu", reason="memory of the device is what is measured")
def test_no_tensor_of_the_vocabulary_is_built_on_the_device():
    num, hidden_size, vocab_size = 8192, 256, 151_936
    hidden_ND = torch.randn(num, hidden_size, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    weight_VD = torch.randn(vocab_size, hidden_size, device=DEVICE, dtype=torch.bfloat16)
    ids_NK = torch.arange(5, device=DEVICE).expand(num, -1)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    partition_log_probs(hidden_ND, weight_VD, ids_NK).sum().backward()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - held
    assert peak < num * vocab_size * 2 / 2, f"{peak / 2**20:.0f} MiB above what was held"
