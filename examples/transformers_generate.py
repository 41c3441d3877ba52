"""Give a model of transformers MLR attention and generate.

The compressed cache and a standard one write the same text.

python examples/transformers_generate.py                          a tiny Llama with random weights
python examples/transformers_generate.py --model path/to/model    your model, from its folder
"""

from __future__ import annotations

import argparse

import torch
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from structattn import Hierarchy
from structattn.integrations.transformers import make_cache, measure_order, set_hierarchy


def tiny() -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=256,
        initializer_range=0.1,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a folder that from_pretrained reads")
    parser.add_argument("--tokens", type=int, default=300, help="how many to write")
    options = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(options.model) if options.model else tiny()
    model.eval()

    width = getattr(model.config, "head_dim", None) or model.config.hidden_size // model.config.num_attention_heads
    hierarchy = Hierarchy.dyadic([width // 4] * 4, context_length=256)
    text = torch.randint(model.config.vocab_size, (2, 256))  # put real text here: the order is measured on it
    set_hierarchy(model, hierarchy, order=measure_order(model, text))

    prompt, written = text[:1, :40], []
    caches = {"level by level": make_cache(model), "standard": DynamicCache()}
    for cache in caches.values():
        written.append(
            model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                cache=cache,  # past_key_values before transformers 5.24
                max_new_tokens=options.tokens,
                do_sample=False,
            )
        )
    standard = sum(layer.keys.numel() for layer in caches["standard"].layers)
    print(f"hierarchy {hierarchy}: the same tokens from both caches: {torch.equal(*written)}")
    print(f"key numbers after {written[0].shape[1]} tokens: {caches['level by level'].key_numbers:,} of {standard:,}")


if __name__ == "__main__":
    main()
