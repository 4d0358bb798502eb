"""A tokenizer and a model small enough to build anew in every test."""

WORDS = "the a film book is was good bad fine great dull slow funny sad long short plot cast . , : ? Review Sentiment"


def build_tokenizer():
    """Whitespace words; `<eos>` = 0, `<pad>` = 1, `<unk>` = 2."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["<eos>", "<pad>", "<unk>", *WORDS.split()])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>")


def byte_level_tokenizer(bos=False, eos=False, chat_template=None):
    """A byte-level BPE with merges such as ` good`, as GPT-2, Llama 3 and Qwen have; optionally with what it adds."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    corpus = [
        "Review: a good film\nSentiment: good",
        "a bad film bad",
        "not a good film , not at all bad",
        "good",
        "bad",
    ]
    special = ["<s>", "</s>", "<pad>", "<|user|>", "<|assistant|>", "<|system|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        corpus * 4,
        trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    if bos or eos:
        single = ("<s> " if bos else "") + "$A" + (" </s>" if eos else "")
        ids = [("<s>", 0), ("</s>", 1)]
        backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=ids)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    tokenizer.chat_template = chat_template
    return tokenizer


def build_model(vocab_size: int = 27, seed: int = 0, **config):
    """A two-layer Llama with random weights, large enough that its distributions are not flat."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    settings = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "tie_word_embeddings": True,
        "eos_token_id": 0,
        "pad_token_id": 1,
        "bos_token_id": None,
        "initializer_range": 0.3,
    }
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocab_size, **{**settings, **config}))
