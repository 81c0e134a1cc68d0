"""Small models of several families, made in code, with weights large enough that mistakes show in the numbers."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BloomConfig,
    FalconConfig,
    Gemma2Config,
    Gemma3Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    OpenAIGPTConfig,
    OPTConfig,
    PhiConfig,
    PhimoeConfig,
    Qwen2Config,
    Starcoder2Config,
)

from ppomax.models.load import Compute, export, export_scalar, load_causal_lm, load_scalar_lm, load_tokenizer
from ppomax.models.players import Policy, Scalar
from ppomax.types import TokenBatch, token_batch

FLOAT32 = Compute(torch.device("cpu"), torch.float32)
BFLOAT16 = Compute(torch.device("cpu"), torch.bfloat16)
VOCABULARY, EOS = 259, 2
SPREAD = 0.2

_DECODER = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "bos_token_id": 1,
    "eos_token_id": EOS, "pad_token_id": EOS,
}  # fmt: skip
_GEMMA = {**_DECODER, "head_dim": 8, "query_pre_attn_scalar": 8}
CONFIGS: dict[str, Any] = {
    "llama": lambda: LlamaConfig(**_DECODER, tie_word_embeddings=True),
    "llama-untied": lambda: LlamaConfig(**_DECODER, tie_word_embeddings=False),
    "qwen2": lambda: Qwen2Config(**_DECODER, tie_word_embeddings=True),
    # The uppermost layer of three has a window, shorter than the sequences of the tests.
    "qwen2-window": lambda: Qwen2Config(
        **_DECODER, use_sliding_window=True, sliding_window=12, max_window_layers=2, tie_word_embeddings=True
    ),
    "mistral": lambda: MistralConfig(**_DECODER, sliding_window=6, head_dim=8),
    "gpt2": lambda: GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=3, n_head=4, n_positions=256, bos_token_id=1, eos_token_id=EOS,
        resid_pdrop=0.3, embd_pdrop=0.3, attn_pdrop=0.3,
    ),
    "gpt-neox": lambda: GPTNeoXConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48,
        max_position_embeddings=256, bos_token_id=1, eos_token_id=EOS, hidden_dropout=0.3, attention_dropout=0.3,
        pad_token_id=None,
    ),
    # An unembedding with a bias.
    "phi": lambda: PhiConfig(**_DECODER),
    "gemma2": lambda: Gemma2Config(**_GEMMA, sliding_window=64),
    "gemma2-logit-cap": lambda: Gemma2Config(**_GEMMA, sliding_window=64, attn_logit_softcapping=None),
    "gemma3": lambda: Gemma3TextConfig(**_GEMMA, sliding_window=64, layer_types=["full_attention"] * 3),
}  # fmt: skip

_SMALL = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 3, "eos_token_id": EOS, "pad_token_id": EOS}
_IMAGES = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
# Families that the planner does not know. Whatever is random in training has another name in each of the first ones.
OTHERS: dict[str, Any] = {
    "starcoder2": lambda: Starcoder2Config(
        **_DECODER, residual_dropout=0.3, embedding_dropout=0.3, attention_dropout=0.3
    ),
    "opt": lambda: OPTConfig(
        **_SMALL, ffn_dim=48, num_attention_heads=4, word_embed_proj_dim=32, max_position_embeddings=256, dropout=0.3,
        layerdrop=0.3,
    ),
    "phimoe": lambda: PhimoeConfig(
        **_DECODER, num_local_experts=4, num_experts_per_tok=2, router_jitter_noise=0.3, input_jitter_noise=0.3
    ),
    "bloom": lambda: BloomConfig(**_SMALL, n_head=4, hidden_dropout=0.3, attention_dropout=0.3),
    # Chooses its attention by a name that is not ours.
    "falcon": lambda: FalconConfig(**_SMALL, num_attention_heads=4, alibi=True, hidden_dropout=0.3),
    # A model for text and images, with windows in its text part.
    "gemma3-images": lambda: Gemma3Config(
        text_config={
            **_GEMMA, "sliding_window": 6, "layer_types": ["sliding_attention", "sliding_attention", "full_attention"]
        },
        vision_config=_IMAGES, image_token_index=258, boi_token_index=257, eoi_token_index=256, mm_tokens_per_image=4,
    ),
    "granite": lambda: GraniteConfig(**_DECODER, logits_scaling=1.005),
    "mamba": lambda: MambaConfig(**_SMALL, state_size=8, use_mambapy=False),
    "openai-gpt": lambda: OpenAIGPTConfig(vocab_size=VOCABULARY, n_embd=32, n_layer=3, n_head=4, n_positions=256),
    "bert": lambda: BertConfig(**_SMALL, intermediate_size=48, num_attention_heads=4),
}  # fmt: skip


def make_model(name: str) -> nn.Module:
    """A causal LM with seeded weights; the caller's random state stays as it is."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config({**CONFIGS, **OTHERS}[name]())
    enliven(model)
    return model.eval()


@torch.no_grad()
def enliven(model: nn.Module, seed: int = 1) -> None:
    """Replace all weights: matrices and biases by normal numbers, norms' gains by numbers about 1."""
    draw = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=draw) * SPREAD
        gain = name.endswith("weight") and ("norm" in name or "ln_" in name)
        parameter.copy_((1.0 if gain else 0.0) + noise)


def save_model(name: str, folder: Path) -> str:
    """The directory of a causal LM of this family, with the tokenizer of `tiny`."""
    export(make_model(name), load_tokenizer("tiny"), folder)
    return str(folder)


def saved_once(folder: Callable[[str], Path]) -> Callable[[str], str]:
    """`save_model` for each family that is asked for, once; folder: makes one by name."""
    return cache(lambda name: save_model(name, folder(name)))


def save_reward_model(name: str, folder: Path) -> str:
    """The directory of a reward model on the same trunk, as it is exported; its head counts as trained."""
    save_model(name, folder)
    model = load_scalar_lm(str(folder), FLOAT32, fresh_head_seed=5)
    (folder / "model.safetensors").unlink()
    export_scalar(model, load_tokenizer("tiny"), folder)
    return str(folder)


def policy(folder: str, compute: Compute = FLOAT32, **options: Any) -> Policy:
    """A policy on the model of a directory; frozen and whole unless told otherwise."""
    return Policy(load_causal_lm(folder, compute), **{"train_layers": None, "trained": False, **options})


def scalar(folder: str, compute: Compute = FLOAT32, **options: Any) -> Scalar:
    """A scalar player on the reward model of a directory, or on a causal LM with a fresh head."""
    fresh = None if "score.weight" in _keys(folder) else 3
    return Scalar(
        load_scalar_lm(folder, compute, fresh_head_seed=fresh), **{"train_layers": None, "trained": False, **options}
    )


def ragged(rows: int = 5, seed: int = 0, low: int = 3) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts of 2-9 and responses of 1-12 ids."""
    draw = torch.Generator().manual_seed(seed)

    def ids(shortest: int, longest: int) -> list[int]:
        length = int(torch.randint(shortest, longest + 1, (1,), generator=draw))
        return torch.randint(low, VOCABULARY, (length,), generator=draw).tolist()

    return [ids(2, 9) for _ in range(rows)], [ids(1, 12) for _ in range(rows)]


def batch_of(rows: int = 5, seed: int = 0) -> TokenBatch:
    """`ragged` as one batch."""
    return token_batch(*ragged(rows, seed))


def reloaded(auto: Any, folder: str | Path) -> Any:
    """The model as plain transformers opens it."""
    return auto.from_pretrained(folder, dtype=torch.float32).eval()


def plain_scores(folder: str | Path, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """[B] what `AutoModelForSequenceClassification` says about padded ids."""
    model = reloaded(AutoModelForSequenceClassification, folder)
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask).logits[:, 0]


def _keys(folder: str) -> set[str]:
    from safetensors import safe_open

    with safe_open(Path(folder) / "model.safetensors", framework="pt") as file:
        return set(file.keys())
