"""A GPU's server tries its adapters' path before it is ready, and leaves CUDA graphs if need be.

What a graph has recorded is replayed without our Python: one that was captured wrongly would leave
adapters out, or take another's weights, and no answer would say so. So after vLLM has captured its
graphs, each worker takes an adapter of random weights on every layer and

1. compares each layer's product with the formula in float64, outside of graphs. If that is wrong
   the server does not start: it has no right way to serve.
2. runs a short prompt and a token after it through vLLM's own steps, with graphs and without. The
   final hidden states have to agree, measured by what the adapter does to them. If they do not, all
   workers leave their graphs, the log says so, and the server serves eagerly.

The seam, for vLLM 0.32: `Worker.compile_or_warm_up_model` (vllm/v1/worker/gpu_worker.py), the last
thing that an engine calls before it serves; CPUs have another one. Of the second model runner
(vllm/v1/worker/gpu): steps are built as its own warm-up builds them (warmup.py), whose count of
blocks is used; `execute_model_state.hidden_states` is what a step leaves for the sampler; and the
`CudaGraphManager` takes no graph where `_graphs_captured` is false, as before its capture. If these
move, a server on a GPU ends at its start, with an error that names what is missing.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from vllm.config import CUDAGraphMode
from vllm.logger import init_logger

from guilomo_serve.adapter import AdapterError
from guilomo_serve.ops.layer import LayerWeights, SliceWeights
from guilomo_serve.ops.two_steps import packed_bytes
from guilomo_serve.runtime.loading import ModelPlan
from guilomo_serve.runtime.unsupported import UnsupportedError

logger = init_logger("vllm.guilomo")

# Graphs replay the kernels that run without them, so states should be equal to the last bit; a
# layer without its adapter changes them by more than this share of what all adapters do.
TOLERANCE = 0.02
NUMBER = 1  # of the adapter; nobody has loaded one yet
EXPERTS, TOP_K = 3, 2


def install() -> None:
    """Has each worker of a GPU check itself; calling it again changes nothing."""
    from vllm.v1.worker.gpu_worker import Worker

    warm_up = Worker.compile_or_warm_up_model
    if hasattr(warm_up, "checks"):
        return

    def warm_up_and_check(worker: Any) -> Any:
        times = warm_up(worker)
        if worker.vllm_config.lora_config is not None:
            check(worker)
        return times

    warm_up_and_check.checks = True  # type: ignore[attr-defined]
    setattr(Worker, "compile_or_warm_up_model", warm_up_and_check)  # noqa: B010


@torch.inference_mode()
def check(worker: Any) -> str | None:
    """Compares layers with the formula, and graphs with eager; see above.

    All workers of an engine have to call it, at the same time.

    Args:
        worker: vLLM's `Worker`, with a model and a KV cache.

    Returns:
        Why graphs are not used any more; None where they are right, or there are none.

    Raises:
        UnsupportedError: a layer's product is wrong outside of graphs too.
    """
    from vllm.lora.request import LoRARequest

    manager = worker.model_runner.lora_manager
    request = LoRARequest("guilomo-check", NUMBER, "/of/random/weights")
    manager.keep_weights(NUMBER, random_adapter(manager.plan))
    try:
        manager.add_adapter(request)
        # Before any worker takes a step, in which it would wait for one that has given up.
        if wrong := _of_any(_wrong_product(manager)):
            raise UnsupportedError(f"the check of the adapters' kernels at start: {wrong}")
        reason = _of_any(_differs(worker, request))
    finally:
        manager.remove_adapter(NUMBER)
    if reason:
        _leave_graphs(worker.model_runner)
        logger.warning("CUDA graphs are not used: %s. The server serves eagerly.", reason)
    return reason or None


def random_adapter(plan: ModelPlan) -> dict[str, LayerWeights]:
    """An adapter on every layer of this process; the processes of a model have parts of one.

    Its product is about as large as its input, so that a layer without it is seen.
    """
    return {
        name: LayerWeights.stack(
            [part.of(_random(f"{name} {i}", *part.shape)) for i, part in enumerate(layer.slices)],
            [part.width for part in layer.slices],
            TOP_K,
            plan.dtype,
        )
        for name, layer in plan.layers.items()
    }


def random_adapter_bytes(plan: ModelPlan) -> int:
    """Bytes that `random_adapter` takes of a GPU's memory for adapters."""
    return sum(
        packed_bytes(
            layer.slices[0].in_width,
            [(EXPERTS, EXPERTS, part.width) for part in layer.slices],
            plan.dtype,
        )
        for layer in plan.layers.values()
    )


def _random(name: str, rows: int, columns: int) -> SliceWeights:
    """A whole module's, the same in each process. Args: rows, columns: out and in of the module."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little", signed=True)
    generator = torch.Generator().manual_seed(seed)
    lora_a, router = torch.randn(2, EXPERTS, columns, generator=generator) / columns**0.5
    lora_b = torch.randn(rows, EXPERTS, generator=generator)
    return SliceWeights(lora_a, lora_b, router, (1,) * EXPERTS, (1.0,) * EXPERTS)


def _wrong_product(manager: Any) -> str:
    """Which layer's product is wrong in this worker; empty if none is."""
    try:
        manager.check_products(NUMBER)
    except AdapterError as e:
        return str(e)
    return ""


def _differs(worker: Any, request: Any) -> str:
    """Why graphs must not be used, as far as this worker sees; empty if it sees no reason."""
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner as SecondModelRunner

    runner = worker.model_runner
    if not isinstance(runner, SecondModelRunner):
        if runner.cudagraph_dispatcher.cudagraph_mode == CUDAGraphMode.NONE:
            return ""
        return "vLLM's first model runner has them, where they cannot be compared with eager steps"
    if not runner.cudagraph_manager._graphs_captured:
        return ""
    if runner.is_pooling_model:
        return "this base samples nothing, and its steps cannot be compared"
    with_graphs = _hidden_states(worker, request)
    runner.cudagraph_manager._graphs_captured = False
    try:
        eager, base = _hidden_states(worker, request), _hidden_states(worker, None)
    finally:
        runner.cudagraph_manager._graphs_captured = True
    for step, *states in zip(("prompt", "next token"), with_graphs, eager, base, strict=True):
        replayed, right, without = (state.double() for state in states)
        error, effect = (replayed - right).norm().item(), (right - without).norm().item()
        if not error <= TOLERANCE * effect:
            return (
                f"with them the last hidden states of a {step} differ from an eager step's by "
                f"{error:.3g}, where an adapter changes them by {effect:.3g}"
            )
    return ""


def _hidden_states(worker: Any, request: Any | None) -> list[torch.Tensor]:
    """[tokens, hidden size] of a prompt and of the token after it; empty but in the last stage.

    Args: request: `LoRARequest` of the adapter, None for the base.
    """
    from vllm import SamplingParams
    from vllm.v1.core.sched.output import CachedRequestData, NewRequestData, SchedulerOutput
    from vllm.v1.request import Request
    from vllm.v1.worker.gpu.warmup import _warmup_block_counter

    runner, name = worker.model_runner, "guilomo-check"
    # More tokens than a step of decoding has, with drafts or without: a prompt for vLLM too.
    prompt = list(range(runner.decode_query_len + 1))
    greedy = SamplingParams(temperature=0, max_tokens=2)
    blocks_of, first, blocks = _warmup_block_counter(runner), 1, []
    for group in runner.kv_cache_config.kv_cache_groups:
        count = blocks_of(len(prompt) + 1, group.kv_cache_spec)
        blocks.append(list(range(first, first + count)))
        first += count
    new = NewRequestData.from_request(
        Request(name, prompt, greedy, None, lora_request=request),
        block_ids=tuple(blocks),
        prefill_token_ids=prompt,
    )
    after = CachedRequestData.make_empty()
    after.req_ids, after.num_computed_tokens = [name], [len(prompt)]
    after.num_output_tokens, after.new_block_ids = [1], [None]

    states = []
    runner.kv_connector.set_disabled(True)
    try:
        for tokens, new_requests, cached in (
            (len(prompt), [new], CachedRequestData.make_empty()),
            (1, [], after),
        ):
            step = SchedulerOutput.make_empty()
            step.num_spec_tokens_to_schedule = runner.num_speculative_steps
            step.scheduled_new_reqs, step.scheduled_cached_reqs = new_requests, cached
            step.num_scheduled_tokens = {name: tokens}
            step.total_num_scheduled_tokens = tokens
            worker.execute_model(step)
            if runner.is_last_pp_rank:
                states.append(runner.execute_model_state.hidden_states[:tokens].clone())
            worker.sample_tokens(None)
        end = SchedulerOutput.make_empty()
        end.finished_req_ids = {name}
        worker.execute_model(end)
    finally:
        runner.kv_connector.set_disabled(False)
    return states


def _of_any(reason: str) -> str:
    """The first reason of all workers, which have to do the same."""
    from vllm.distributed import get_world_group

    group = get_world_group()
    reasons = [reason]
    if group.world_size > 1:
        reasons = [""] * group.world_size
        torch.distributed.all_gather_object(reasons, reason, group=group.cpu_group)
    return next(filter(None, reasons), "")


def _leave_graphs(runner: Any) -> None:
    if hasattr(runner, "cudagraph_manager"):
        runner.cudagraph_manager.release_graphs()
    else:  # the first model runner: its dispatcher gives no graph before it has keys
        runner.cudagraph_dispatcher.keys_initialized = False
