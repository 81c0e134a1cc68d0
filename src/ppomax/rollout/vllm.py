"""The vLLM sampler: an engine in this process, which is given the policy's weights anew before every sampling.

It starts on the policy's config.json with random weights, so that everything that it ever computes with came from the
trainer; `check` then compares its log-probs with the trainer's. vLLM is imported when an engine is started.
"""

from __future__ import annotations

import gc
import importlib
import os
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ppomax.engine import world
from ppomax.models.load import Compute, model_directory
from ppomax.models.lora import has_adapters, merged_state
from ppomax.models.players import Policy, at_responses
from ppomax.monitor.clock import Clock
from ppomax.rollout.sampler import Distribution, Sampled
from ppomax.types import SetupError, token_batch

# Read by vLLM when it is imported or started. In process, or there would be no model to write weights into.
FORCED = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
DEFAULTS = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1"}
# With a given cache size vLLM only compares this share with the memory that is free at its start.
MEMORY_SHARE = 0.02
# Sequences take whole blocks of at most so many tokens.
BLOCK = 128
CHECKED_PROMPTS, CHECKED_TOKENS = 4, 16
# Nats per token. Bfloat16 differs by hundredths; weights that did not arrive, or another temperature, by far more.
LARGEST_GAP = 0.3


class VLLM:
    """An engine for one architecture, until `close`. vLLM keeps state per process: one at a time.

    directory: model directory or hub name whose config.json says what the policy is. longest: prompt + response in
    tokens. max_rows: sequences side by side; the cache of keys and values is made for that many. eager: no compiled
    graphs; None: on processors, where compiling takes minutes.
    """

    running: ClassVar[bool] = False

    def __init__(
        self, directory: str, policy: Policy, compute: Compute, *, longest: int, max_rows: int,
        eager: bool | None = None,
    ) -> None:  # fmt: skip
        self.device, self.longest = compute.device, longest
        self.vllm = vllm_for(compute)
        options: dict[str, Any] = {
            "model": model_directory(directory), "load_format": "dummy", "dtype": str(compute.dtype)[6:],
            "max_model_len": longest, "max_num_seqs": max_rows, "skip_tokenizer_init": True,
            "generation_config": "vllm",  # the model's own would bring a temperature, top-p and more eos ids
            "logprobs_mode": "processed_logprobs",  # of the distribution that was sampled from
            "kv_cache_memory_bytes": (max_rows + 1) * _cache_bytes(policy.model.config, compute.dtype, longest),
            "gpu_memory_utilization": MEMORY_SHARE, "enable_sleep_mode": self.sleeps,
            "enforce_eager": compute.device.type == "cpu" if eager is None else eager,
        }  # fmt: skip
        if world.size() > 1:  # one engine for each process, beside the process group that is there
            options["distributed_executor_backend"] = "external_launcher"
        if VLLM.running:
            raise RuntimeError("another vLLM engine runs in this process; close it first")
        self._alone = not torch.distributed.is_initialized()
        VLLM.running = True
        try:
            with _global_generators_kept():
                self.llm = self.vllm.LLM(**options)
        except Exception as error:  # whatever vLLM says about an architecture, a size or a machine
            self._disconnect()
            raise self._refusal(policy, error) from error
        self._rest()

    @property
    def name(self) -> str:
        """What it is, for the plan."""
        return f"vLLM {self.vllm.__version__}"

    @property
    def sleeps(self) -> bool:
        """Whether weights and cache leave the memory between samplings; vLLM has no such thing on processors."""
        return self.device.type == "cuda"

    def close(self) -> None:
        """Give everything back; the object cannot be used afterwards."""
        if not hasattr(self, "llm"):
            return
        client = self.llm.llm_engine.engine_core
        if self._alone:
            client.shutdown()
        else:  # the same without its last step, which would end the run's process group, now or when it is collected
            client._finalizer.detach()
            client.engine_core.model_executor.shutdown()
            gc.unfreeze()
        del self.llm, client
        self._disconnect()

    def sample(
        self, policy: Policy, prompts: Sequence[Sequence[int]], seeds: Sequence[int], *, limit: int,
        distribution: Distribution, eos_ids: Sequence[int], clock: Clock | None = None,
    ) -> list[Sampled]:  # fmt: skip
        """One response of at most `limit` tokens per entry of `prompts` (token ids), from the weights of `policy` now.

        seeds: one per response, each below 2**63. Log-probs are of the distribution that was sampled from, temperature
        included. clock: told what the hand-over of the weights and the sampling took.
        """
        settings = [
            self.vllm.SamplingParams(
                temperature=distribution.temperature, top_p=distribution.top_p or 1.0, top_k=distribution.top_k or 0,
                repetition_penalty=distribution.repetition_penalty or 1.0, max_tokens=limit, seed=seed, logprobs=0,
                detokenize=False, ignore_eos=True, stop_token_ids=list(eos_ids),
            )
            for seed in seeds
        ]  # fmt: skip
        requests = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        clock = clock or Clock()
        with _global_generators_kept():
            with clock("generate/weights"):
                self.load(policy)
            with clock("generate/decode"):
                outputs = self.llm.generate(requests, settings, use_tqdm=False)
            self._rest()
        return [_sampled(output.outputs[0], set(eos_ids)) for output in outputs]

    def check(self, policy: Policy, prompts: Sequence[Sequence[int]], temperature: float) -> float:
        """Mean distance of its log-probs from the policy's own on a few short samples; too large is a SetupError."""
        prompts = prompts[:CHECKED_PROMPTS]
        limit = min(CHECKED_TOKENS, self.longest - max(map(len, prompts)))
        distribution = Distribution(temperature)
        try:
            sampled = self.sample(
                policy, prompts, range(len(prompts)), limit=limit, distribution=distribution, eos_ids=[]
            )
        except Exception as error:  # without compiled graphs, its first pass through the model is here
            raise self._refusal(policy, error) from error
        batch = token_batch(prompts, [s.ids for s in sampled], device=str(self.device))
        with torch.no_grad():
            own_BR = at_responses(policy(batch, temperature=temperature).logprobs_BT, batch).cpu()
        gap = float((own_BR - torch.tensor([s.logprobs for s in sampled])).abs().mean())
        if not gap <= LARGEST_GAP:
            raise SetupError(
                f"sampling.engine: {self.name} and the trainer differ by {gap:.2f} nats a token in the log-probs of "
                f"the same ids, expected at most {LARGEST_GAP}: it does not compute {type(policy.model).__name__} as "
                "the trainer does. Use --sampling.engine native"
            )
        return gap

    def _refusal(self, policy: Policy, error: Exception) -> SetupError:
        return SetupError(
            f"sampling.engine: {self.name} does not run {type(policy.model).__name__} here: {_last_line(error)}. Use "
            "--sampling.engine native"
        )

    def load(self, policy: Policy) -> None:
        """Write the policy's weights over the engine's, and forget what was computed with the old ones."""
        if self.sleeps:
            self.llm.wake_up(tags=["weights"])
        with policy.decoding(), torch.no_grad():
            self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": _weights(policy)})
        if self.sleeps:
            self.llm.wake_up(tags=["kv_cache"])
        if not self.llm.reset_prefix_cache():
            raise RuntimeError(
                "vLLM kept keys and values of older weights: a request of an earlier sampling still runs"
            )

    def _rest(self) -> None:
        if self.sleeps:
            self.llm.sleep(level=2)

    def _disconnect(self) -> None:
        """End what vLLM connected. A process group that was there before it belongs to the run."""
        state: Any = importlib.import_module("vllm.distributed.parallel_state")
        state.destroy_model_parallel()
        if self._alone:
            state.destroy_distributed_environment()
        elif state._WORLD is not None:
            state._WORLD.destroy()
            state._WORLD = None
        gc.collect()
        VLLM.running = False


def _weights(policy: Policy) -> Iterator[tuple[str, Tensor]]:
    """The policy's parameters under the names of its Hugging Face files, adapters merged."""
    named = {name: p.detach() for name, p in policy.model.named_parameters(remove_duplicate=False)}
    return merged_state(policy.model, named) if has_adapters(policy.model) else iter(named.items())


def _sampled(completion: Any, eos: set[int]) -> Sampled:
    ids = [int(token) for token in completion.token_ids]
    logprobs = [float(at[token].logprob) for token, at in zip(ids, completion.logprobs, strict=True)]
    return Sampled(ids, logprobs, ids[-1] not in eos)


def vllm_for(compute: Compute) -> Any:
    """The module vllm, for the device that the models are on; without it a SetupError."""
    device = compute.device
    if device.type not in ("cuda", "cpu"):
        raise SetupError(f"sampling.engine: found vllm with device {device}, expected cpu or cuda")
    if device.index and world.size() == 1:
        raise SetupError(
            f"sampling.engine: found vllm with device {device}, but vLLM takes the first GPU that it sees. Set "
            f"CUDA_VISIBLE_DEVICES={device.index} and --compute.device cuda"
        )
    os.environ.update(FORCED)
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    try:
        vllm = importlib.import_module("vllm")
        built_for = importlib.import_module("vllm.platforms").current_platform.device_type
    except ImportError as error:
        raise SetupError(
            f"sampling.engine: found vllm, which cannot be imported here ({_last_line(error)}). With an NVIDIA GPU: "
            "pip install 'vllm>=0.32'; on a processor: docs/vllm.md; or use --sampling.engine native"
        ) from None
    if built_for != device.type:
        raise SetupError(
            f"sampling.engine: found a vLLM for {built_for or 'no device'}, expected one for {device.type}, where the "
            "models are; docs/vllm.md says which package that is"
        )
    return vllm


def _cache_bytes(config: Any, dtype: torch.dtype, longest: int) -> int:
    """Keys and values of one sequence of `longest` tokens, in whole blocks."""
    heads = config.num_attention_heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    return 2 * config.num_hidden_layers * groups * width * dtype.itemsize * BLOCK * -(-longest // BLOCK)


@contextmanager
def _global_generators_kept() -> Iterator[None]:
    """vLLM seeds the process's generators when it starts, and draws from them."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def _last_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[-1].strip() if lines else type(error).__name__
