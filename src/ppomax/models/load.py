"""Open and export Hugging Face models: causal LMs and scalar (reward, critic) models, with their tokenizers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging as transformers_logging

from ppomax.data.chat import prepare_tokenizer, render_dialogue
from ppomax.engine import world
from ppomax.engine.machine import limit_threads
from ppomax.errors import first_line
from ppomax.models.attention import attention_for, without_plans
from ppomax.models.embedded import embedded_directory
from ppomax.models.lora import ADAPTER, has_adapters, merged_state, save_adapter
from ppomax.types import Dialogue, Message, SetupError

# What reading a directory of somebody else's may raise.
UNREADABLE = (
    OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError, SafetensorError, StrictDataclassError,
)  # fmt: skip


@dataclass(frozen=True)
class Compute:
    """Where and in which precision models compute."""

    device: torch.device
    dtype: torch.dtype


def resolve_compute(device: str, dtype: str) -> Compute:
    """Turn `auto` into what this machine does best; refuse a device that is not there.

    From here on torch has no more threads than a container lets run at once.
    """
    limit_threads()
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise SetupError(f"device '{device}' cannot be used: {first_line(error)}") from None
    where = torch.device(device)
    if dtype == "auto":
        dtype = "bfloat16" if bfloat16_is_fast(where) else "float32"
    return Compute(where, getattr(torch, dtype))


def bfloat16_is_fast(device: torch.device) -> bool:
    """Whether matrix products in bfloat16 run in hardware."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()) and _cpu_has_bf16_instructions()
    return False


def _cpu_has_bf16_instructions() -> bool:
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags or " bf16" in flags


def model_directory(name: str) -> str:
    """A local path or hub name for `name`; an embedded name becomes its directory, a missing path is an error."""
    embedded = embedded_directory(name)
    if embedded is not None:
        return str(embedded)
    path = Path(name)
    if path.is_dir():
        if not (path / "config.json").exists():
            raise SetupError(f"{name}: found a directory without config.json, expected a Hugging Face model")
        return name
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise SetupError(
            f"{name}: no such directory. Expected a Hugging Face model directory, a hub name (owner/name), "
            "smollm2-135m, or tiny"
        )
    if Path(name.split("/")[0]).is_dir():
        raise SetupError(f"{name}: no such directory (there is a directory {name.split('/')[0]}/ but not this in it)")
    return name


def load_tokenizer(name: str, template: str | None = None, *, otherwise: str | None = None) -> Any:
    """The tokenizer of a model directory or hub name, ready for dialogues (`data.chat.prepare_tokenizer`).

    template: instead of its own chat template; otherwise: where it has none.
    """
    where = model_directory(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(where, trust_remote_code=False)
    except UNREADABLE as error:
        raise SetupError(
            f"{name}: no tokenizer could be loaded ({first_line(error)}). Expected tokenizer.json beside config.json"
        ) from None
    # Without files, some versions of transformers make one with nothing in it, or with special tokens alone.
    if not tokenizer.get_vocab().keys() - set(tokenizer.all_special_tokens):
        raise SetupError(f"{name}: no tokenizer could be loaded (no words). Expected tokenizer.json beside config.json")
    if tokenizer.eos_token_id is None:
        raise SetupError(f"{name}: the tokenizer has no eos token; expected tokenizer files with an eos token")
    return prepare_tokenizer(tokenizer, template if tokenizer.chat_template else template or otherwise)


def load_config(name: str) -> dict[str, Any]:
    """What config.json says of a model."""
    try:
        return AutoConfig.from_pretrained(model_directory(name), trust_remote_code=False).to_dict()
    except UNREADABLE as error:
        raise SetupError(f"{name}: config.json cannot be read: {first_line(error)}") from None


def load_causal_lm(name: str, compute: Compute) -> nn.Module:
    """A causal LM in evaluation mode (dropout off), frozen or trained by whoever wraps it."""
    model, absent = _load(AutoModelForCausalLM, name, compute)
    _expect_all(name, absent)
    return model


def load_scalar_lm(name: str, compute: Compute, *, fresh_head_seed: int | None = None) -> nn.Module:
    """A sequence classifier with one label, its head trained unless `fresh_head_seed` starts a new one."""
    model, absent = _load(AutoModelForSequenceClassification, name, compute, num_labels=1)
    head = scalar_head(model)
    untrained = {key: why for key, why in absent.items() if key.startswith("score.")}
    _expect_all(name, {key: why for key, why in absent.items() if key not in untrained})
    if fresh_head_seed is None:
        for key, why in untrained.items():
            raise SetupError(
                f"{name}: found no trained score head ({key} {why}), expected a reward model. "
                "Train one with `ppomax reward`"
            )
        return model
    width = head.weight.shape[1]
    start = torch.randn(head.weight.shape, generator=torch.Generator().manual_seed(fresh_head_seed))
    with torch.no_grad():
        head.weight.copy_(start / (width + 1) ** 0.5)
    return model


def decoder_stack(model: nn.Module) -> Any:
    """Embeddings and decoder layers: what gives the last hidden states."""
    base = getattr(model, str(model.base_model_prefix), None)
    if base is None:
        raise SetupError(
            f"{type(model).__name__} has no `{model.base_model_prefix}`; this architecture is not supported"
        )
    return base


def tied(model: Any) -> bool:
    """Whether the unembedding is the embedding, whatever the configuration says: a checkpoint may hold two."""
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight


def scalar_head(model: nn.Module) -> nn.Linear:
    """The linear layer that reads one scalar from a hidden state."""
    head = getattr(model, "score", None)
    if not isinstance(head, nn.Linear):
        raise SetupError(f"{type(model).__name__} has no linear `score` head; this architecture is not supported")
    return head


def export(model: nn.Module, tokenizer: Any, folder: Path) -> None:
    """Write model and tokenizer in the Hugging Face layout, safetensors only; adapters are merged.

    Where processes share the model, all of them call this, and the first one writes.
    """
    state = whole_state(model)
    if not world.is_first():
        return
    if has_adapters(model):
        save_adapter(model, state, folder / ADAPTER)
        state = dict(merged_state(model, state))
    precision = model.config.dtype  # type: ignore[union-attr]
    model.save_pretrained(folder, state_dict=state, safe_serialization=True)  # type: ignore[operator]
    if world.size() > 1:  # transformers writes the precision of the shards
        model.config.dtype = precision  # type: ignore[union-attr]
        model.config.save_pretrained(folder)  # type: ignore[operator, union-attr]
    tokenizer.save_pretrained(folder)


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    """The model's tensors by name. Sharded ones are gathered in the first process's memory, in the precision that the
    model computes in; other processes get an empty dict."""
    named = model.state_dict(keep_vars=True)
    if not any(isinstance(tensor, DTensor) for tensor in named.values()):
        return {name: tensor.detach() for name, tensor in named.items()}
    gathered: dict[int, Tensor] = {}  # tied weights are one tensor, and stay one
    for tensor in named.values():
        if id(tensor) not in gathered:
            full = tensor.detach()
            full = full.full_tensor() if isinstance(full, DTensor) else full
            full = full.to("cpu", model.config.dtype if full.is_floating_point() else None)  # type: ignore[union-attr]
            gathered[id(tensor)] = full if world.is_first() else full.new_empty(0)
    return {name: gathered[id(tensor)] for name, tensor in named.items()} if world.is_first() else {}


def export_scalar(model: nn.Module, tokenizer: Any, folder: Path) -> None:
    """Export a reward model or critic so that plain transformers reads the score at the last counted token.

    transformers pools at the rightmost id that is not `pad_token_id`: the pad must be an id that cannot end a turn,
    and the template must end at the turn's eos.
    """
    pad = pad_that_ends_no_turn(tokenizer, model.get_input_embeddings().num_embeddings)  # type: ignore[operator]
    config: Any = model.config
    before = config.pad_token_id, tokenizer.pad_token, tokenizer.chat_template
    try:
        config.pad_token_id = pad
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad)
        tokenizer.chat_template = ending_at_eos(tokenizer)
        export(model, tokenizer, folder)
    finally:
        config.pad_token_id, tokenizer.pad_token, tokenizer.chat_template = before


def pad_that_ends_no_turn(tokenizer: Any, vocabulary: int) -> int:
    """A special id other than the eos, preferring the tokenizer's own pad, then its unknown token.

    vocabulary: the model's embeddings; a pad beyond them (added to the tokenizer alone) could not be loaded again.
    """
    eos = tokenizer.eos_token_id
    preferred = (tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.bos_token_id, *tokenizer.all_special_ids)
    for candidate in preferred:
        if candidate is not None and candidate != eos and candidate < vocabulary:
            return int(candidate)
    # The last ones are the rarest in text; to transformers a pad is a special token wherever its letters stand.
    return next(i for i in range(min(vocabulary, len(tokenizer)) - 1, -1, -1) if i != eos)


def ending_at_eos(tokenizer: Any) -> str | None:
    """The tokenizer's chat template, changed if need be so that an answer ends at its eos: nothing after it."""
    template = tokenizer.chat_template
    if not template:
        return template
    turns = [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Hello."}]
    if tokenizer.apply_chat_template(turns, tokenize=False).endswith(tokenizer.eos_token):
        return template
    return (
        "{% set rendered %}" + template + "{% endset %}"
        "{{ rendered.rpartition(eos_token)[0] + eos_token "
        "if messages[-1]['role'] == 'assistant' and not add_generation_prompt else rendered }}"
    )


def same_vocabulary(a: Any, b: Any) -> bool:
    """Whether two tokenizers give every token the same id, so that ids can be passed from one model to the other."""
    return a.get_vocab() == b.get_vocab()


def reads_alike(a: Any, b: Any) -> bool:
    """Whether two tokenizers give the same dialogue the same ids: vocabulary, chat template, end of a turn."""
    turns = (Message(role="user", content=" Hello, you? "), Message(role="assistant", content="Yes.\n"))
    system = Message(role="system", content="Be brief.")
    probes = [Dialogue(turns * 2, key=""), Dialogue((system, *turns), key="")]

    def ids(tokenizer: Any, probe: Dialogue) -> list[int] | None:
        try:
            return render_dialogue(tokenizer, probe, max_length=1_000_000)[0]
        except SetupError:  # some templates refuse a system message
            return None

    return same_vocabulary(a, b) and all(ids(a, probe) == ids(b, probe) for probe in probes)


def context_length(model: nn.Module) -> int | None:
    """The longest sequence that the model's positions allow, if it says.

    Where a longer row turns the positions of all rows beside it another way (longrope), the longest that does not.
    """
    config: Any = model.config
    rope = getattr(config, "rope_parameters", None) or {}
    before = rope.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None)
    longest = getattr(config, "max_position_embeddings", None)
    return before if before is not None and rope.get("rope_type") == "longrope" else longest


def _load(auto: Any, name: str, compute: Compute, **options: Any) -> tuple[Any, dict[str, str]]:
    """A model, and which of its tensors the files do not hold, with why."""
    where = model_directory(name)
    without_plans(compute.device)
    transformers_logging.disable_progress_bar()
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        AutoConfig.from_pretrained(where, trust_remote_code=False)
        model, loading = _open(auto, where, compute, attention_for(compute.device), **options)
        model = _text_part(auto, model)
    except UNREADABLE as error:
        raise SetupError(f"{name}: cannot be loaded as {auto.__name__}: {first_line(error)}") from None
    finally:
        transformers_logging.set_verbosity(verbosity)
    # The pad id is often the eos: an embedding's padding row would get no gradient where it is read.
    model.get_input_embeddings().padding_idx = None
    model.eval().to(compute.device)
    absent = dict.fromkeys(sorted(loading["missing_keys"]), "is missing")
    for key, found, expected in sorted(loading["mismatched_keys"]):
        absent[key] = f"has shape {list(found)}, not {list(expected)}"
    return model, absent


def _open(auto: Any, where: str, compute: Compute, attention: str | None, **options: Any) -> tuple[Any, dict[str, Any]]:
    try:
        # fork_rng: transformers draws absent tensors from the caller's global random state.
        with torch.random.fork_rng(devices=[]):
            return auto.from_pretrained(
                where, dtype=compute.dtype, attn_implementation=attention, use_safetensors=True,
                trust_remote_code=False, output_loading_info=True, ignore_mismatched_sizes=True, **options,
            )  # fmt: skip
    except KeyError as error:  # some architectures have classes of attention by name, and none by ours
        if attention is None or error.args != (attention,):
            raise
    return _open(auto, where, compute, None, **options)


def _text_part(auto: Any, model: Any) -> Any:
    """The decoder of a model that reads images too, as the model for text alone that transformers has beside it."""
    config = model.config.get_text_config()
    if config is model.config:
        return model
    config.num_labels = model.config.num_labels
    with torch.device("meta"):
        alone = auto.from_config(config, attn_implementation=config._attn_implementation)
    if type(decoder_stack(alone)) is not type(model.get_decoder()):
        raise ValueError(f"found {type(model).__name__}, whose decoder for text is not that of {type(alone).__name__}")
    setattr(alone, alone.base_model_prefix, model.get_decoder())
    if model.get_output_embeddings() is not None:
        alone.set_output_embeddings(model.get_output_embeddings())
    if hasattr(model, "score"):
        alone.score = model.score
    if any(tensor.is_meta for tensor in (*alone.parameters(), *alone.buffers())):
        raise ValueError(f"found {type(model).__name__}, which has no part for each of {type(alone).__name__}")
    alone.name_or_path, alone.generation_config = model.name_or_path, getattr(model, "generation_config", None)
    return alone


def _expect_all(name: str, absent: dict[str, str]) -> None:
    for key, why in absent.items():
        raise SetupError(
            f"{name}: found incomplete weights ({key} {why}; {len(absent)} such in all), expected every tensor of the "
            "architecture that config.json names"
        )
