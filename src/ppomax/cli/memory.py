"""Out of memory: in which phase, with how many tokens at hand, and what to lower. Read off the traceback."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any

from ppomax.config import Schema
from ppomax.errors import first_line

# The outermost of these modules on the way to the failure says what was going on.
PHASES = {
    "ppomax.rollout.sampler": "in generate",
    "ppomax.rollout.vllm": "in generate",
    "ppomax.stages.scoring": "in score",
    "ppomax.stages.buffer": "in score",
    "ppomax.stages.reward_scoring": "in score",
    "ppomax.stages.update": "in train",
    "ppomax.stages.sft": "in train",
    "ppomax.stages.reward": "in train",
}
# These say it wherever they stand: the others call them.
PARTS = {
    "ppomax.models.load": "while loading models",
    "ppomax.engine.checkpoint": "while saving",
    "ppomax.engine.background": "while saving",
    "ppomax.rewards.callables": "in a reward function",
}
# Functions of models/load.py that write a model, which is saving as well.
EXPORTS = ("export", "export_scalar", "whole_state")
_MICROBATCH = "compute.tokens_per_microbatch"
SETTINGS = {
    "in generate": ("sampling.max_rows", "sampling.max_new_tokens"),
    "in score": (_MICROBATCH,),
    "in train": (_MICROBATCH, "compute.train_layers"),
    "in a reward function": ("rollout_batch",),
    "while loading models": ("compute.dtype", "compute.train_layers"),
    "while saving": (),
    "": (_MICROBATCH, "sampling.max_rows", "rollout_batch"),
}


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the memory of the machine or of its GPU is used up."""
    # torch's allocator for the processor, and its C++ parts, raise a plain RuntimeError.
    said = str(error)
    exhausted = isinstance(error, RuntimeError) and ("can't allocate memory" in said or "bad_alloc" in said)
    torch = sys.modules.get("torch")
    on_gpu = torch is not None and isinstance(error, torch.OutOfMemoryError)
    return isinstance(error, MemoryError) or on_gpu or exhausted


def memory_message(error: BaseException, schema: type[Schema]) -> str:
    """One line: what was going on, the tokens at hand, and the flags of `schema` to lower."""
    frames = [*_frames(error.__traceback__)]
    phase = _phase(frames)
    tokens = _tokens(frames) if phase in PHASES.values() else None
    said = first_line(error)
    flags = [f"--{setting.replace('_', '-')}" for setting in SETTINGS[phase] if _has(schema, setting)]
    where = ", ".join(filter(None, (phase, tokens)))
    advice = f"Lower {', '.join(flags)}, or free some memory" if flags else "Free some memory and start again"
    return f"out of memory{' ' if where else ''}{where} ({said}). {advice}"


def _frames(trace: TracebackType | None) -> Iterator[FrameType]:
    while trace is not None:
        yield trace.tb_frame
        trace = trace.tb_next


def _phase(frames: list[FrameType]) -> str:
    modules = [frame.f_globals.get("__name__", "") for frame in frames]
    calls = zip(modules, (frame.f_code.co_name for frame in frames), strict=True)
    if any(name == "ppomax.models.load" and function in EXPORTS for name, function in calls):
        return "while saving"
    found = [PARTS[name] for name in modules if name in PARTS] + [PHASES[name] for name in modules if name in PHASES]
    return found[0] if found else ""


def _tokens(frames: list[FrameType]) -> str | None:
    """The batch that the innermost frame with one held: rows × width in tokens."""
    for frame in reversed(frames):
        for value in frame.f_locals.values():
            ids = getattr(getattr(value, "batch", value), "ids_BT", None)
            if ids is not None:
                return _size("a microbatch of", *ids.shape)
        mask = frame.f_locals.get("mask_BS")
        if mask is not None:
            return _size("side by side", *mask.shape)
    return None


def _size(what: str, rows: int, width: int) -> str:
    return f"{what} {rows} × {width} = {rows * width:,} tokens"


def _has(schema: type[Schema], setting: str) -> bool:
    group, _, key = setting.rpartition(".")
    owner: Any = schema.model_fields[group].annotation if group in schema.model_fields else None if group else schema
    return owner is not None and key in owner.model_fields
