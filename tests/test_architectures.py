"""Architectures of transformers, each by a tiny configuration.

Its head is the model's, an adapter comes back as it was, and answers of several tokens are scored as one pass over
prompt and answer would score them. The slow suite looks at every causal type that can be built.
"""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText

from first_trl.errors import FirstTrlError
from first_trl.head import top_k_log_probs
from first_trl.modeling import (
    backbone_hidden_states,
    check_head,
    innermost,
    keep_to_text,
    language_model_head,
    load_model,
    settle_names,
)
from first_trl.scoring import sequence_log_probs

VOCABULARY = 101
TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
}
# What configurations call their sizes; each takes those that it knows.
SIZES = TEXT | {
    **{"bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 64, "sliding_window": 16, "state_size": 8},
    **{"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "n_inner": 48, "d_model": 32, "d_ff": 48},
    **{"num_layers": 2, "num_heads": 4, "ffn_dim": 48, "decoder_layers": 2, "decoder_attention_heads": 4},
    **{"decoder_ffn_dim": 48, "word_embed_proj_dim": 32, "ffn_hidden_size": 48, "embedding_size": 32},
    **{"num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2},
    **{"moe_intermediate_size": 16},
}
LATENT = {
    **{"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8},
    **{"num_key_value_heads": 4, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1},
}
LINEAR = {"layer_types": ["linear_attention", "full_attention"]}
DELTA = {f"linear_{name}": 2 if "num" in name else 8 for name in ("num_key_heads", "num_value_heads", "key_head_dim")}
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
PATCHES = {**VISION, "image_size": 28, "patch_size": 14}
QWEN_VISION = {**VISION, "depth": 1, "num_heads": 2, "out_hidden_size": 32}
# Built as Llama is, each with names of its own; looked at by the slow suite.
LIKE_LLAMA = (
    *("mistral", "qwen2", "qwen3", "phi", "phi3", "gpt_neox", "falcon", "starcoder2", "olmo2", "olmo3", "smollm3"),
    *("exaone4", "xglm", "gemma", "glm4", "stablelm", "seed_oss", "ernie4_5", "hunyuan_v1_dense", "nemotron"),
    *("apertus", "helium", "mixtral", "olmoe", "granitemoe", "falcon_mamba", "lfm2"),
)
# Architecture -> what it needs beyond its sizes.
ARCHITECTURES: dict[str, dict] = {
    **{name: {} for name in ("llama", "gpt2", "opt", "bloom", "qwen3_moe", "gpt_oss", "openai-gpt", "bart", "rwkv")},
    "mamba": {},
    "cohere": {"logit_scale": 0.5},
    "cohere2": {"logit_scale": 0.5},
    "granite": {"logits_scaling": 4.0},
    "gemma2": {"final_logit_softcapping": 2.0},
    "gemma3_text": {"final_logit_softcapping": 2.0},
    "mpt": {"logit_scale": 0.125},
    "xlstm": {"num_heads": 4, "output_logit_soft_cap": 2.0},
    "recurrent_gemma": {
        **{"lru_width": 32, "block_types": ["recurrent", "attention"], "attention_window_size": 16},
        **{"logits_soft_cap": 2.0},
    },
    "gptj": {"rotary_dim": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "deepseek_v3": LATENT,
    "minicpm3": LATENT,
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "jamba": {
        **{"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
        **{"mamba_dt_rank": 4},
    },
    "granitemoehybrid": {"mamba_n_heads": 8, "layer_types": ["mamba", "attention"]},
    "falcon_h1": {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8},
    "qwen3_next": LINEAR | DELTA,
    "qwen3_5": {"text_config": TEXT | LINEAR | DELTA, "vision_config": QWEN_VISION},
    "llama4": {"text_config": TEXT | {"intermediate_size_mlp": 48, "num_local_experts": 2}, "vision_config": VISION},
    "mllama": {"text_config": TEXT | {"cross_attention_layers": []}, "vision_config": VISION | {"attention_heads": 2}},
    "gemma3": {"text_config": TEXT, "vision_config": PATCHES, "mm_tokens_per_image": 4},
    # No text model of their own: the whole one is loaded, and nothing is trained but its text model.
    "qwen3_vl": {
        "text_config": TEXT | {"rope_scaling": {"rope_type": "default", "mrope_section": [1, 1, 2]}},
        "vision_config": QWEN_VISION | {"deepstack_visual_indexes": [0]},
    },
    "qwen2_5_vl": {
        "text_config": TEXT | {"rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}},
        "vision_config": QWEN_VISION,
    },
    "mistral3": {
        "text_config": {"model_type": "mistral", **TEXT},
        "vision_config": {"model_type": "pixtral", **PATCHES},
    },
    "llava": {
        "text_config": {"model_type": "llama", **TEXT},
        "vision_config": {"model_type": "clip_vision_model", **PATCHES},
    },
}
# PEFT refuses all linear layers of a Mamba, and a router that is one
TARGETS = {name: ["in_proj"] for name in ("mamba", "falcon_mamba", "mamba2", "falcon_h1")} | {"llama4": ["q_proj"]}


def tiny_model(kind: str):
    """A model of random weights, large enough that its distributions are not flat."""
    known = CONFIG_MAPPING[kind]()
    sizes = {name: size for name, size in SIZES.items() if name in known.to_dict() or name in known.attribute_map}
    config = CONFIG_MAPPING[kind](**{**sizes, **(ARCHITECTURES | DECODERS).get(kind, {})})
    torch.manual_seed(0)
    has_text_model = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
    model = (AutoModelForCausalLM if has_text_model else AutoModelForImageTextToText).from_config(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight *= 4
    return model


def adapted(model, targets="all-linear"):
    """The model with an adapter on its linear layers that does something."""
    adapter = LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM")
    keep_to_text(adapter, model)
    model = get_peft_model(model, adapter)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, 0.2)
    return model.eval()


TOKENS = torch.tensor([[11, 45, 3, 90, 17, 23, 60], [5, 88, 31, 12, 0, 0, 0]])
MASK = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])


@torch.no_grad()
def logits(model, tokens=TOKENS, mask=MASK):
    return innermost(model)(input_ids=tokens, attention_mask=mask, use_cache=False).logits


@pytest.mark.parametrize("kind", [*ARCHITECTURES, *(pytest.param(k, marks=pytest.mark.slow) for k in LIKE_LLAMA)])
def test_the_head_is_the_models_and_an_adapter_comes_back_through_our_own_road(kind, tmp_path):
    tiny_model(kind).save_pretrained(tmp_path / "base")
    base = load_model(tmp_path / "base")  # which compares the head with the model's logits
    log_probs_NV = logits(base)[MASK.bool()].log_softmax(-1)
    with torch.no_grad():
        hidden_ND = backbone_hidden_states(base, input_ids=TOKENS, attention_mask=MASK)[MASK.bool()]
    head = language_model_head(base)
    ids_NK, log_probs_NK1 = top_k_log_probs(hidden_ND, head.weight, 5, *head[1:])
    assert (log_probs_NV.gather(1, ids_NK) - log_probs_NK1[:, :-1]).abs().max() < 2e-5
    assert log_probs_NV.std() > 0.1, "flat distributions would agree whatever the head does"

    student = adapted(base, TARGETS.get(kind, "all-linear"))
    student.save_pretrained(tmp_path / "student")
    trained = logits(student)
    back = load_model(tmp_path / "student")
    assert torch.allclose(logits(back)[MASK.bool()], trained[MASK.bool()], atol=1e-5)
    assert (log_probs_NV - trained[MASK.bool()].log_softmax(-1)).abs().max() > 1e-3, "the adapter must change answers"
    assert not [
        name for name, _ in back.named_parameters() if "lora" in name and ("vision" in name or "visual" in name)
    ]

    prompts, answers = [[11, 45, 3], [5, 88, 31, 12, 9]], [[20], [21, 30], [21, 31, 40]]
    found_NC = sequence_log_probs(back, prompts, answers, tokens_per_batch=64)
    for prompt, found_C in zip(prompts, found_NC, strict=True):
        for answer, found in zip(answers, found_C, strict=True):
            whole = torch.tensor([prompt + answer])
            log_probs_TV = logits(back, whole, torch.ones_like(whole))[0, len(prompt) - 1 : -1].log_softmax(-1)
            assert found == pytest.approx(float(log_probs_TV.gather(1, whole[0, len(prompt) :, None]).sum()), abs=1e-4)


REFUSED = {
    "modernbert-decoder": "ModernBertDecoderForCausalLM .* by the model, .* by its head",
    "roberta": "RobertaForCausalLM",
    "rembert": "RemBertForCausalLM has no backbone and head of the usual kind",
    "xlnet": "XLNetLMHeadModel is no causal model",
}
DECODERS = {kind: {"is_decoder": True} for kind in ("roberta", "rembert")}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_head_that_is_computed_otherwise_is_refused_by_name(kind, tmp_path):
    tiny_model(kind).save_pretrained(tmp_path)
    with pytest.raises(FirstTrlError, match=REFUSED[kind]):
        load_model(tmp_path)


@pytest.mark.slow
def test_every_causal_type_of_transformers_is_either_right_or_refused(tmp_path, capsys):
    """Prints which are refused, or cannot be built by shrinking a default configuration."""
    found = {}
    for config_class in MODEL_FOR_CAUSAL_LM_MAPPING:
        kind = config_class.model_type
        try:
            with torch.device("meta"):
                size = sum(weight.numel() for weight in tiny_model(kind).parameters())
            model = tiny_model(kind) if size < 3e7 else None
        except Exception as error:  # a default that does not go with the others: not ours to judge
            found[kind] = f"not built: {type(error).__name__}"
            continue
        if model is None:
            found[kind] = f"not built: {size / 1e6:,.0f} million parameters"
            continue
        try:
            settle_names(model)
            check_head(model)
            found[kind] = "right"
        except FirstTrlError as error:
            found[kind] = f"refused: {error}"
        except Exception as error:
            found[kind] = f"does not run so small: {type(error).__name__}"
    with capsys.disabled():
        print()
        for kind, verdict in sorted(found.items(), key=lambda item: item[1]):
            print(f"{kind}: {verdict[:150]}")
    right = [kind for kind, verdict in found.items() if verdict == "right"]
    assert len(found) > 180 and len(right) >= 120 and set(right).isdisjoint(REFUSED)
