"""Miniature models of many families, built from config with random weights: no downloads.

Tests get them by the fixture `miniature` (see conftest.py), which loads this file when first used.
"""

from collections.abc import Callable
from typing import ClassVar

import torch
import transformers as hf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers.modeling_outputs import CausalLMOutput

from fedpeat.models import LoadedModel, register_model_class

VOCABULARY = ["<unk>", "<s>", "</s>", "\n", *(chr(code) for code in range(32, 127))]
VOCAB_SIZE = len(VOCABULARY)
_TOKENS = {"vocab_size": VOCAB_SIZE, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
_LLAMA_SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


class OddConfig(hf.PreTrainedConfig):
    model_type = "odd"
    attribute_map: ClassVar[dict[str, str]] = {
        "num_hidden_layers": "rung_total",
        "num_attention_heads": "heads",
        "hidden_size": "width",
    }
    width: int = 32
    rung_total: int = 4
    heads: int = 2
    vocab_size: int = VOCAB_SIZE
    tie_word_embeddings: bool = True


class OddRung(nn.Module):
    """A block with its place under a name of its own, and a reach that follows from where it was made."""

    def __init__(self, config: OddConfig, place: int) -> None:
        super().__init__()
        self.place = place
        self.reach = 3 if place % 2 else 64
        self.heads = config.heads
        self.mix = nn.Linear(config.width, 3 * config.width)
        self.back = nn.Sequential(nn.Linear(config.width, config.width), nn.GELU())
        self.slope = nn.Buffer(torch.full((1,), 0.1 * (place + 1)), persistent=False)

    def forward(self, stream, cache):
        rows, length, width = stream.shape
        parts = self.mix(stream).view(rows, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        query, key, value = parts
        if cache is not None:
            key, value = cache.update(key, value, self.place)
        seen = torch.arange(key.shape[2])
        ahead = seen[None, :] - (key.shape[2] - length + torch.arange(length))[:, None]
        mask = (ahead <= 0) & (ahead > -self.reach)
        attended = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return stream + self.slope * self.back(attended.transpose(1, 2).reshape(rows, length, width))


class OddTower(nn.Module):
    def __init__(self, config: OddConfig) -> None:
        super().__init__()
        self.n_rungs = config.rung_total
        self.rungs = nn.Sequential(*(OddRung(config, place) for place in range(config.rung_total)))
        self.gains = nn.ParameterList([nn.Parameter(torch.ones(config.width)) for _ in range(config.rung_total)])
        self.experts = nn.ModuleList([nn.Linear(config.width, config.width) for _ in range(9)])

    def forward(self, stream, cache):
        for rung, gain in zip(self.rungs, self.gains, strict=True):
            stream = rung(stream, cache) * gain
        return stream + self.experts[0](stream)


@register_model_class
class OddForCausalLM(hf.PreTrainedModel, hf.GenerationMixin):
    """A model class that nobody has heard of."""

    config_class = OddConfig
    base_model_prefix = "tower"
    _tied_weights_keys: ClassVar[dict[str, str]] = {"speak.weight": "hear.weight"}

    def __init__(self, config: OddConfig) -> None:
        super().__init__(config)
        self.hear = nn.Embedding(config.vocab_size, config.width)
        self.tower = OddTower(config)
        self.speak = nn.Linear(config.width, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.hear

    def forward(self, input_ids=None, past_key_values=None, use_cache=None, labels=None, **_):
        cache = past_key_values
        if use_cache and cache is None:
            cache = hf.DynamicCache(config=self.config)
        logits = self.speak(self.tower(self.hear(input_ids), cache))
        loss = None if labels is None else self.loss_function(logits, labels, vocab_size=self.config.vocab_size)
        output = CausalLMOutput(loss=loss, logits=logits)
        output["past_key_values"] = cache
        return output


def _gpt2(blocks: int, **config) -> nn.Module:
    shape = {"n_embd": 32, "n_head": 4, "n_positions": 64, "scale_attn_by_inverse_layer_idx": True}
    return hf.GPT2LMHeadModel(hf.GPT2Config(n_layer=blocks, **_TOKENS, **{**shape, **config}))


def _opt(blocks: int, **config) -> nn.Module:
    shape = {"hidden_size": 32, "ffn_dim": 48, "num_attention_heads": 4, "word_embed_proj_dim": 32}
    settings = {**shape, "max_position_embeddings": 64, **_TOKENS, **config}
    return hf.OPTForCausalLM(hf.OPTConfig(num_hidden_layers=blocks, **settings))


def _bloom(blocks: int, **config) -> nn.Module:
    return hf.BloomForCausalLM(hf.BloomConfig(n_layer=blocks, **{"hidden_size": 32, "n_head": 4, **_TOKENS, **config}))


def _gpt_neox(blocks: int, **config) -> nn.Module:
    shape = {key: value for key, value in _LLAMA_SHAPE.items() if key != "num_key_value_heads"}
    return hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(num_hidden_layers=blocks, **{**shape, **_TOKENS, **config}))


def _falcon(blocks: int, **config) -> nn.Module:
    shape = {"hidden_size": 32, "num_attention_heads": 4, "max_position_embeddings": 64}
    return hf.FalconForCausalLM(hf.FalconConfig(num_hidden_layers=blocks, **{**shape, **_TOKENS, **config}))


def _llama_like(kind: str, config_kind: str = "", **settings) -> Callable[..., nn.Module]:
    def make(blocks: int, **config) -> nn.Module:
        config_class, model_class = getattr(hf, f"{config_kind or kind}Config"), getattr(hf, f"{kind}ForCausalLM")
        wanted = {**_LLAMA_SHAPE, **settings, **_TOKENS, **config}
        return model_class(config_class(num_hidden_layers=blocks, **wanted))

    return make


def _odd(blocks: int, **config) -> nn.Module:
    return OddForCausalLM(OddConfig(rung_total=blocks, bos_token_id=1, eos_token_id=2, pad_token_id=2, **config))


_GEMMA_SHAPE = {"head_dim": 8, "sliding_window": 6, "query_pre_attn_scalar": 8}
FAMILIES: dict[str, Callable[..., nn.Module]] = {
    "gpt2": _gpt2,
    "opt": _opt,
    "bloom": _bloom,
    "llama": _llama_like("Llama"),
    "mistral": _llama_like("Mistral", head_dim=8, sliding_window=6),
    "qwen3": _llama_like("Qwen3", head_dim=8, use_sliding_window=True, sliding_window=6, max_window_layers=2),
    "gemma2": _llama_like("Gemma2", **_GEMMA_SHAPE),
    # Families that nothing in the package names.
    "gpt_neox": _gpt_neox,
    "falcon": _falcon,
    "phi": _llama_like("Phi"),
    "qwen2": _llama_like("Qwen2"),
    "gemma3": _llama_like("Gemma3", "Gemma3Text", **_GEMMA_SHAPE, sliding_window_pattern=3),
    "mixtral": _llama_like("Mixtral", num_local_experts=4, num_experts_per_tok=2),
    "odd": _odd,
}


def character_tokenizer() -> hf.PreTrainedTokenizerFast:
    """One token a printable ASCII character or line end; text comes back as it was."""
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(VOCABULARY)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>"}
    return hf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=64, **names)


def make_miniature(
    family: str, *, blocks: int = 4, dtype: str = "float32", attention: str | None = None, seed: int = 0, **config
) -> LoadedModel:
    """Return a random model of a family, all of whose tensors differ: norms and biases are not left at 1 and 0."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = FAMILIES[family](blocks, **config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    if attention is not None:
        model.set_attn_implementation(attention)
    model.to(getattr(torch, dtype)).requires_grad_(False).eval()
    model.config.dtype = getattr(torch, dtype)
    return LoadedModel(model, character_tokenizer(), family)
