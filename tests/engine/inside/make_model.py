"""A small Llama with random weights and a tokenizer of numbered words, for real engines on a CPU.

ENGINE_PYTHON tests/engine/inside/make_model.py FOLDER
"""

import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = 1024
"""Words `w0` ... `w1023`; a prompt is a list of their numbers."""


def main(folder: Path) -> None:
    """25 million parameters: on one core a prompt of 2,000 tokens takes about 0.4 s, a decode step 10 to 16 ms."""
    vocabulary = {f"w{n}": n for n in range(WORDS)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w1", pad_token="w2").save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=WORDS,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=8192,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=2,
        initializer_range=0.08,  # spreads the logits: the best token stays the best whatever it is batched with
    )
    LlamaForCausalLM(config).to(torch.float32).save_pretrained(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
