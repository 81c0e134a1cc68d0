"""One schema per stage. A field's description is its `--help`; `None` means off; unknown keys are errors."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator


class Schema(BaseModel):
    """A frozen configuration that refuses unknown keys and numbers that are none.

    One string will do where several are taken, and a leading ~ is the home directory, as in a shell. A group of
    settings is laid over the field's own default, as flags and files do it: what it does not say stays.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _as_written(cls, value: Any, info: ValidationInfo) -> Any:
        field = cls.model_fields[info.field_name or ""]
        annotation = field.annotation
        if type(None) in get_args(annotation) and _says_off(value, annotation):
            return None
        if isinstance(field.default, Schema) and isinstance(value, Schema | dict):
            return laid_over(field.default, value)
        if isinstance(value, str) and get_origin(annotation) is tuple:
            value = (value,)
        if isinstance(value, list | tuple):
            return tuple(_at_home(item) for item in value)
        return _at_home(value)


def laid_over(default: Schema, given: Schema | dict[str, Any]) -> dict[str, Any]:
    """`default` with what was said in the place of what it says: settings are laid over settings, any other value, a
    mapping of sources too, takes the place of what was there."""
    values: dict[str, Any] = {name: getattr(default, name) for name in type(default).model_fields}
    said = {name: getattr(given, name) for name in given.model_fields_set} if isinstance(given, Schema) else given
    for name, value in said.items():
        below = values.get(name)
        if isinstance(below, Schema) and isinstance(value, Schema | dict):
            value = laid_over(below, value)
        values[name] = value
    return values


def _says_off(value: Any, annotation: Any) -> bool:
    """`None`, as flags and messages write it and YAML does not, and YAML's `off` where a number or a name may stand."""
    return value == "None" or (value is False and bool not in get_args(annotation))


def _at_home(value: Any) -> Any:
    """~/ is what a shell leaves as it is after `--run-dir=`, and what YAML and Python never look at."""
    if isinstance(value, Path):
        return value.expanduser() if value.parts[:1] == ("~",) else value
    return os.path.expanduser(value) if isinstance(value, str) and value.startswith("~/") else value


def _possible_size(size: int | float | dict[str, int]) -> int | float | dict[str, int]:
    smallest = min(size.values(), default=0) if isinstance(size, dict) else size
    if smallest < 0:
        raise ValueError("expected 0 or more")
    if isinstance(size, float) and size >= 1:
        raise ValueError("expected a share below 1; a number of prompts is a whole number")
    return size


Decay = Annotated[float, Field(ge=0, lt=1)]
Size = Annotated[int | float | dict[str, int], AfterValidator(_possible_size)]
_SIZE = "A share of the prompts, a number of prompts, or a number for each source (helpful 700 harmless 300); 0: none."


class ModelConfig(Schema):
    """How the models compute."""

    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto",
        description="Compute precision; auto = bfloat16 where it is fast. Master weights are always float32.",
    )
    device: str = Field(default="auto", description="auto, cpu, cuda, cuda:0, mps.")
    train_layers: int | None = Field(
        default=None,
        ge=0,
        description="Train only the uppermost N decoder layers and the final norm. The layers below and the"
        " embeddings stay frozen, shared by all players and computed once for them. None: train everything; 0 (reward"
        " model only): the score head alone.",
    )
    lora_rank: int | None = Field(
        default=None,
        ge=1,
        description="Train low-rank adapters in the decoder layers (the uppermost train_layers, if given) instead of"
        " their weights; merged in final/, alone in final/adapter. None: off.",
    )
    lora_alpha: float = Field(default=16, gt=0, description="Adapters count alpha / rank times.")
    gradient_checkpointing: bool = Field(
        default=False, description="Recompute activations in the backward pass: less memory, a third more compute."
    )
    compiled: bool = Field(
        default=False,
        description="Compile the layers of what is trained (torch.compile), on one GPU; processors gain nothing.",
    )
    tokens_per_microbatch: int = Field(
        default=4096,
        ge=16,
        description="Tokens of one pass, padding included where rows are padded. Bounds memory, not the result.",
    )
    shard: Literal["none", "zero2", "zero3"] = Field(
        default="zero3",
        description="With several processes: what a pass gathered goes back after the forward pass (zero3, less memory)"
        " or after the backward pass (zero2, less traffic; the reference and the reward model stay whole). none: each"
        " has all weights and moments, only gradients travel (fastest, for models that fit).",
    )
    offload: bool = Field(
        default=False, description="With several processes on GPUs: shards, gradients and moments in the host's memory."
    )
    wait_minutes: float = Field(
        default=30, gt=0, description="With several processes: how long one waits for another before it gives up."
    )
    chat_template: str | None = Field(
        default=None,
        description="chatml, role-tags, or a Jinja file. What trains takes it instead of the tokenizer's own "
        "template; chat, evaluate and rank, where there is none.",
    )


class OptimConfig(Schema):
    """AdamW and its schedule."""

    lr: float = Field(default=1e-5, gt=0, description="Peak learning rate.")
    warmup: float = Field(
        default=0.1, ge=0, le=1, description="Share of the steps over which the rate rises linearly from 0."
    )
    schedule: Literal["cosine", "linear", "constant"] = Field(default="cosine", description="Shape after the warm-up.")
    floor: float = Field(
        default=0.1, ge=0, le=1, description="Share of the peak at which the schedule ends, flat from there."
    )
    weight_decay: float = Field(
        default=0.0,
        ge=0,
        description="Decoupled decay of matrices; never on biases, norms, embeddings and scalar heads.",
    )
    betas: tuple[Decay, Decay] = Field(default=(0.9, 0.95), description="AdamW's moment decay rates.")
    eps: float = Field(default=1e-8, gt=0, description="AdamW's denominator offset.")
    max_grad_norm: float | None = Field(default=1.0, gt=0, description="Global gradient-norm clip; None: no clipping.")


class SaveConfig(Schema):
    """What is written and when."""

    every: int = Field(default=50, ge=1, description="Checkpoint every N steps (PPO: iterations), and at the end.")
    keep: int = Field(default=2, ge=1, description="Newest verified checkpoints that stay.")
    keep_best: str | None = Field(
        default=None,
        description="Save whenever this metric (gold_mean) is higher than ever, or with a minus before it"
        " (-heldout_loss) lower, and keep that checkpoint beside the newest. None: off.",
    )
    grace: float | None = Field(
        default=None,
        gt=0,
        description="Seconds that SIGTERM leaves for finishing the step (PPO: the iteration) and saving; after them the"
        " run stops where it is and goes on from its last checkpoint. None: finish, however long it takes.",
    )
    background: bool = Field(
        default=False,
        description="Write checkpoints while training goes on, from a copy of their tensors in memory; the last one,"
        " and that of an interruption, are waited for.",
    )


class SFTConfig(Schema):
    """Supervised fine-tuning on dialogues: cross-entropy on the assistant's tokens."""

    run_dir: Path = Field(default=Path("runs/sft"), description="Where everything of this run is written.")
    model: str = Field(default="smollm2-135m", description="Hugging Face directory or hub name, smollm2-135m, or tiny.")
    data: tuple[str, ...] = Field(
        default=(), description="Dialogues: JSONL(.gz), Parquet or hub names; FILE#source=NAME tags."
    )
    heldout: Size = Field(default=0.05, description=f"Dialogues, by prompt, that are kept for evaluation. {_SIZE}")
    epochs: float = Field(default=2, gt=0, description="Passes over the training rows.")
    batch_size: int = Field(default=16, ge=1, description="Dialogues per optimiser step.")
    max_length: int = Field(
        default=1024, ge=8, description="Longest dialogue in tokens; longer ones are cut and counted."
    )
    eval_every: int = Field(default=20, ge=1, description="Held-out loss every N steps.")
    seed: int = Field(default=0, ge=0, lt=2**63, description="Keys the data order.")
    compute: ModelConfig = ModelConfig()
    optim: OptimConfig = OptimConfig(lr=9.5e-6)
    save: SaveConfig = SaveConfig(every=100)


class RewardConfig(Schema):
    """Reward model from preference pairs: ranking loss plus the paper's LM term."""

    run_dir: Path = Field(default=Path("runs/reward"), description="Where everything of this run is written.")
    model: str = Field(default="runs/sft/final", description="The causal LM whose trunk the reward model starts from.")
    data: tuple[str, ...] = Field(
        default=(), description="Pairs: JSONL(.gz), Parquet or hub names; FILE#source=NAME tags."
    )
    heldout: Size = Field(default=0.1, description=f"Pairs, by prompt, that are watched in training. {_SIZE}")
    heldout_data: tuple[str, ...] = Field(default=(), description="Held-out pairs of their own instead.")
    test: Size = Field(
        default=0,
        description="Pairs, by prompt, that are looked at once, at the end: the summary is then of them. Sizes as for"
        " heldout.",
    )
    epochs: float = Field(default=1, gt=0, description="Passes over the training pairs.")
    max_steps: int | None = Field(default=None, ge=1, description="Stop after N optimiser steps; None: by epochs.")
    tokens_per_batch: int = Field(
        default=4096, ge=16, description="Tokens per optimiser step: the paper's dynamic batch."
    )
    min_prompts: int = Field(default=4, ge=1, description="Fewest prompts per step; all pairs of a prompt go together.")
    max_prompts: int = Field(default=128, ge=1, description="Most prompts per step; each weighs the same.")
    max_length: int = Field(
        default=1024, ge=8, description="Longest prompt + response in tokens; old turns are dropped first."
    )
    ranking_weight: float = Field(default=1.0, gt=0, description="λ of eq. 2: weight of the ranking loss.")
    lm_weight: float | None = Field(
        default=1.0, gt=0, description="β_rm of eq. 2: weight of the LM loss on the preferred response; None: off."
    )
    margin: float | None = Field(
        default=None,
        gt=0,
        description="Margin of the ranking loss per point of score_chosen - score_rejected in the data; None: off.",
    )
    label_smoothing: float | None = Field(
        default=None, gt=0, lt=0.5, description="Share of the labels that are taken to be wrong; None: off."
    )
    compare: str | None = Field(
        default=None,
        description="Another reward model with the same tokenizer: how often the two agree on the held-out pairs.",
    )
    eval_every: int = Field(default=20, ge=1, description="Held-out accuracy every N steps.")
    seed: int = Field(default=0, ge=0, lt=2**63, description="Keys the head's start and the data order.")
    compute: ModelConfig = ModelConfig()
    optim: OptimConfig = OptimConfig(lr=5e-6)
    save: SaveConfig = SaveConfig(every=100)


class RankConfig(Schema):
    """A trained reward model on preference pairs that it has not learnt: accuracy per source, calibration, mistakes."""

    run_dir: Path = Field(default=Path("runs/rank"), description="Where summary, pairs and report are written.")
    reward: str = Field(default="runs/reward/final", description="The reward model.")
    data: tuple[str, ...] = Field(
        default=(), description="Pairs in any of the data formats; `source` or `subset` of a row names its group."
    )
    compare: str | None = Field(
        default=None, description="Another reward model with the same tokenizer: how often the two agree."
    )
    max_length: int = Field(
        default=1024, ge=8, description="Longest prompt + response in tokens; old turns are dropped first."
    )
    compute: ModelConfig = ModelConfig()


class SamplingConfig(Schema):
    """The distribution that responses are drawn from."""

    max_new_tokens: int = Field(default=64, ge=1, description="Length limit of a response; a longer one is truncated.")
    temperature: float = Field(
        default=1.0, gt=0, description="Divides the logits, in sampling and in all scoring but perplexity."
    )
    top_p: float | None = Field(default=None, gt=0, lt=1, description="Nucleus sampling (evaluation only).")
    top_k: int | None = Field(default=None, ge=1, description="Keep the k likeliest tokens (evaluation only).")
    repetition_penalty: float | None = Field(
        default=None, gt=0, description="Divides repeated tokens' logits (evaluation only)."
    )
    max_rows: int = Field(
        default=64, ge=1, description="Sequences decoded side by side. Bounds memory, not the result."
    )
    max_cache_tokens: int | None = Field(
        default=None,
        ge=1,
        description="Hold keys and values of at most so many tokens while decoding: fewer rows side by side where"
        " sequences are long. None: max_rows alone decides.",
    )
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = Field(
        default=(), description="A response also ends when its text contains one of these, which stays in it."
    )
    engine: Literal["native", "vllm"] = Field(
        default="native",
        description="Who samples: native, or vllm, an engine in this process that gets the policy's weights before each"
        " iteration (PPO only; docs/vllm.md).",
    )

    @property
    def warped(self) -> list[str]:
        """The settings, if any, that make it another distribution than softmax(logits / temperature)."""
        return [name for name in ("top_p", "top_k", "repetition_penalty") if getattr(self, name) is not None]


class EvaluateConfig(Schema):
    """Held-out prompts, responses of two systems side by side, judged."""

    run_dir: Path = Field(default=Path("runs/evaluate"), description="Where everything of this run is written.")
    policy: str = Field(default="runs/ppo/final", description="The model to judge.")
    baseline: str = Field(
        default="runs/sft/final", description="The model that it is compared with, and the KL's reference."
    )
    prompts: tuple[str, ...] = Field(default=(), description="Held-out prompts in any of the data formats.")
    reward: str | None = Field(
        default="runs/reward/final", description="Reward model that scores both; None: judge only."
    )
    judge: tuple[str, ...] = Field(
        default=(),
        description="module:function that scores both, e.g. ppomax.rewards.judge:sentiment; the first one decides.",
    )
    judge_tie: float = Field(default=0.05, ge=0, description="Judge scores closer than this are a tie.")
    samples_per_prompt: int = Field(default=4, ge=1, description="Responses per prompt and system.")
    best_of: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        default=(), description="Also judge best-of-n of the baseline by the reward model."
    )
    max_prompts: int | None = Field(
        default=None, ge=1, description="Use the first N prompts of every source; None: all."
    )
    max_prompt_tokens: int = Field(
        default=512, ge=4, description="Old turns are dropped to fit; a prompt that can't is dropped."
    )
    sampling: SamplingConfig = SamplingConfig(temperature=0.8, top_p=0.9, repetition_penalty=1.1)
    seed: int = Field(default=0, ge=0, lt=2**63, description="Keys every sequence's random stream.")
    compute: ModelConfig = ModelConfig()


class ChatConfig(Schema):
    """Talk to a model."""

    model: str = Field(default="runs/quickstart/ppo/final", description="Directory or name of a causal LM.")
    against: str | None = Field(
        default=None, description="A second model that answers the same message, for comparison."
    )
    system: str | None = Field(default=None, description="A system message to start with.")
    message: str | None = Field(
        default=None, description="Answer this one message and exit, instead of an interactive chat."
    )
    sampling: SamplingConfig = SamplingConfig(temperature=0.8, max_new_tokens=128)
    seed: int = Field(default=0, ge=0, lt=2**63, description="Keys the random stream.")
    compute: ModelConfig = ModelConfig()


class ReportConfig(Schema):
    """Draw a run directory's report.html again."""

    run_dir: Path = Field(default=Path("runs/quickstart"), description="A run directory.")


class CheckpointConfig(Schema):
    """A run's checkpoints: list them, verify them, or export one as a Hugging Face model without resuming the run."""

    action: Literal["list", "verify", "export"] = Field(
        default="list",
        description="list: number, size, age and state of each; verify: exit code 1 if one is damaged; export: write a"
        " model from one.",
    )
    run_dir: Path = Field(default=Path("runs/ppo"), description="The run directory of sft, reward or ppo.")
    number: int | None = Field(
        default=None,
        ge=0,
        description="N of iteration-N or step-N; None: all of them, for export the newest intact one.",
    )
    model: Literal["final", "critic", "last"] = Field(
        default="final",
        description="export: what final/, critic/ or last/ (the policy beside its moving average) would have held.",
    )
    out: Path | None = Field(
        default=None, description="export: a new directory; None: exported/ in the run directory, by number and model."
    )
    dtype: Literal["auto", "float32", "bfloat16"] | None = Field(
        default=None, description="export: precision of the weights; None: as the run's settings say."
    )


class ReplayConfig(Schema):
    """Read the batch whose gradients were no numbers again: losses, norms, and where the first such number is."""

    run_dir: Path = Field(default=Path("runs/ppo"), description="The run that stopped; its batch is in nonfinite/.")
    device: str = Field(default="auto", description="auto, cpu, cuda, cuda:0, mps.")


class QuickstartConfig(Schema):
    """The whole pipeline on a real model, offline, in minutes."""

    run_dir: Path = Field(default=Path("runs/quickstart"), description="Where everything of this run is written.")
    model: str = Field(default="smollm2-135m", description="The model to align; tiny runs the pipeline in seconds.")
    seed: int = Field(default=0, ge=0, lt=2**63, description="Keys every random choice of all stages.")
    fresh: bool = Field(default=False, description="Start over instead of reusing what is there.")


class DoctorConfig(Schema):
    """What is installed, what the machine can do, what will be slow and why."""

    measure: bool = Field(
        default=False, description="Also measure, in seconds, how fast matrix products and memory copies are."
    )
    model: str | None = Field(
        default=None, description="Measure the products of this model's layers; None: those of smollm2-135m."
    )
