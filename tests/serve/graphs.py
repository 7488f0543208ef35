"""A program: vLLM's second model runner and our kernels on a CPU, replayed as CUDA graphs are.

    torchrun --nproc-per-node 2 -m tests.serve.graphs MODEL '{"first": FOLDER, ...}' OUTPUT

is two processes of tensor parallelism. Each writes to a file in OUTPUT, named by its rank, as JSON,
the greedy tokens of each job eager and replayed, the adapters that it copied into slots, the order
of a batch's tokens and slots, what the report says of experts, which layers launch kernels for
"second" alone, what a worker says of the adapter "large", for which there is no memory, and of one
to be pinned, and what the check of graph_check.py finds: without graphs, with such as leave
adapters out because they were captured before slots could have any, with such in one process alone,
with right ones, and where the kernels of one process are wrong.

`Graphs` stands for CUDA graphs as far as our op goes: of each layer, padded size and case that vLLM
would capture it records the operations that run then, with vLLM's own adapters without weights, and
later runs these on the same tensors, without any of our Python. Adapters' weights come as late as
they may.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from guilomo_serve.ops import kernels
from guilomo_serve.ops.memory import AdapterMemoryError
from tests.ops.late_copies import LateCopies

PROMPTS = ("ab", "hello", "x")
TOKENS = 2
SIZES = (2, 8)


class _Recorder(TorchDispatchMode):
    """Keeps what runs under it as calls that do it again, on the same tensors.

    With each its kernel, None for an operation of torch.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Callable[[], Any]]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("a GPU would be waited for while a graph is captured")
        result = func(*args, **(kwargs or {}))
        self.calls.append((None, partial(_again, func, args, kwargs or {}, result)))
        return result

    def __enter__(self):
        self._run = kernels.Launch.run

        def run(launch: kernels.Launch) -> None:
            with _disable_current_modes():  # what the interpreter does is not recorded
                self._run(launch)
            self.calls.append((launch.kernel, partial(self._run, launch)))

        kernels.Launch.run = run
        return super().__enter__()

    def __exit__(self, *exception):
        kernels.Launch.run = self._run
        return super().__exit__(*exception)


def _again(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
    returns = func._schema.returns
    if any(value.alias_info for value in returns):
        if any(value.alias_info.is_write for value in returns if value.alias_info):
            func(*args, **kwargs)
        return  # a view of a tensor that keeps its place
    new = func(*args, **kwargs)
    if not returns:
        return
    pairs = [(result, new)] if len(returns) == 1 else zip(result, new, strict=True)
    for old, value in pairs:
        old.copy_(value)


class Graphs:
    """The op of all layers of a model runner, captured, and replayed in their place.

    Attributes:
        left_out: kernels that replays leave out.
    """

    def __init__(self, runner: Any) -> None:
        from vllm.v1.worker.gpu.lora_utils import create_lora_capture_hook

        self.replays = 0
        self.left_out: list[Any] = []
        self.runner, self.graphs = runner, {}
        self.manager = runner.cudagraph_manager
        hook = create_lora_capture_hook(runner.lora_config, runner)
        assert hook is not None
        self.layers = runner.lora_manager._adapter_manager._routed
        with torch.inference_mode(), runner.maybe_setup_dummy_loras(runner.lora_config):
            for size in SIZES:
                for case in runner.lora_capture_cases:
                    hook(case, min(size, runner.max_num_reqs), size)
                    for name, layer in self.layers.items():
                        x = torch.zeros(size, layer.input_size)
                        y = torch.zeros(size, sum(layer.output_slices))
                        with _Recorder() as recorder:
                            type(layer).add_routed_(layer, y, x)
                        self.graphs[name, size, case] = (x, y, recorder.calls)
        self.manager._graphs_captured = True
        for name, layer in self.layers.items():
            eager = type(layer).add_routed_.__get__(layer)
            layer.add_routed_ = lambda y, x, name=name, eager=eager: self._run(name, y, x, eager)

    def _run(self, name: str, y: torch.Tensor, x: torch.Tensor, eager: Any) -> None:
        if not self.manager._graphs_captured:  # what vLLM's dispatch asks
            eager(y, x)
            return
        tokens = len(x)
        size = next(size for size in SIZES if size >= tokens)
        active = len(set(self.layers[name].punica_wrapper.batch.slots))
        case = next(case for case in self.runner.lora_capture_cases if case >= active)
        static_x, static_y, calls = self.graphs[name, size, case]
        static_x.fill_(torch.nan)
        static_y.fill_(7)
        static_x[:tokens], static_y[:tokens] = x, y
        for kernel, call in calls:
            if kernel not in self.left_out:
                call()
        assert (static_y[tokens:] == 7).all(), "padded rows were written"
        y.copy_(static_y[:tokens])
        self.replays += 1


class GraphsWithoutAdapters(Graphs):
    """Captured as if no slot could have an adapter."""

    def __init__(self, runner: Any) -> None:
        layers = runner.lora_manager._adapter_manager._routed.values()
        for layer in layers:
            layer.filled = _AlwaysEmpty()
        super().__init__(runner)
        for layer in layers:
            layer.filled = set()


class _AlwaysEmpty(set[int]):
    def add(self, slot: int) -> None:
        pass


def _with_kernels() -> None:
    """Slots and batches as on a GPU."""
    from guilomo_serve.ops.layer import TokenBlocks
    from guilomo_serve.ops.triton_slots import TritonSlots
    from guilomo_serve.runtime import layers, model_manager

    layers.make_slots = TritonSlots
    init = model_manager.RoutedModelManager._init_punica_wrapper

    def with_blocks(self: Any, tokens: int, vllm_config: Any) -> None:
        init(self, tokens, vllm_config)
        blocks = TokenBlocks(tokens, self.lora_config.max_loras, self.device)
        self.punica_wrapper_mapping = {
            key: model_manager.TokenSlots(blocks, self.slot_of)
            for key in self.punica_wrapper_mapping
        }

    model_manager.RoutedModelManager._init_punica_wrapper = with_blocks


def _refusal(manager: Any, vllm_config: Any) -> str:
    """What a start with graphs says of a layer whose product is not in kernels."""
    from vllm.config import CUDAGraphMode

    from guilomo_serve.ops.layer import Slots
    from guilomo_serve.runtime.unsupported import UnsupportedError

    compilation = vllm_config.compilation_config
    without, compilation.cudagraph_mode = compilation.cudagraph_mode, CUDAGraphMode.FULL
    layer = next(iter(manager._routed.values()))
    kernels = layer.slots
    try:
        manager._check_graphs(vllm_config)  # all layers have kernels
        layer.slots = Slots(2)
        manager._check_graphs(vllm_config)
    except UnsupportedError as e:
        return str(e)
    finally:
        compilation.cudagraph_mode, layer.slots = without, kernels
    return ""


def _wrong_products(worker: Any, is_wrong: bool) -> str:
    """What the check says where the kernels of a layer add nothing. Args: is_wrong: here."""
    from guilomo_serve.runtime import graph_check
    from guilomo_serve.runtime.unsupported import UnsupportedError

    layers = worker.model_runner.lora_manager._adapter_manager._routed.values()
    slots = next(layer.slots for layer in layers if not layer.splits_inputs)
    if is_wrong:
        slots.apply_ = lambda y, x, batch: None
    try:
        graph_check.check(worker)
    except UnsupportedError as e:
        return str(e)
    finally:
        if is_wrong:
            del slots.apply_
    return ""


def _launching(manager: Any, adapter_id: int) -> list[str]:
    """The layers that launch anything for a batch of one adapter, outside of graphs."""
    (slots,) = manager.punica_wrapper_mapping.values()
    slots.update_metadata(SimpleNamespace(index_mapping=(adapter_id,)), [], 0, 0)
    found = []
    for name, layer in manager._routed.items():
        x, y = torch.zeros(1, layer.input_size), torch.zeros(1, sum(layer.output_slices))
        with _Recorder() as recorder:
            type(layer).add_routed_(layer, y, x)
        found += [name] if recorder.calls else []
    manager._slots_changed = True  # the next step writes its own batch
    return found


def _put(llm: Any, method: str, folder: str) -> Any:
    """What a worker answers to the front end (server/residency.py) of an adapter it reads so."""
    about = ("large", 200, folder)
    (answer,) = llm.collective_rpc(method, args=about)
    while answer is None:
        (answer,) = llm.collective_rpc("guilomo_has_read", args=about[1:2])
    llm.llm_engine.remove_lora(about[1])
    return answer


def main() -> None:
    model, adapters = sys.argv[1], json.loads(sys.argv[2])
    large = adapters.pop("large")
    rank = int(os.environ["RANK"])
    is_last = rank == 1
    _with_kernels()
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest
    from vllm.v1.executor.uniproc_executor import ExecutorWithExternalLauncher

    from guilomo_serve.runtime import graph_check, model_manager, worker_manager
    from guilomo_serve.server.inspection import memory_of

    # vLLM names memory that the processes share by this file, and by nothing else.
    store = Path(sys.argv[3]) / os.environ["TORCHELASTIC_RUN_ID"]
    ExecutorWithExternalLauncher._distributed_args = lambda _: (f"file://{store}", rank, rank)
    # Of a server that was not told how much: room for the two largest adapters and not for three,
    # of which a process has about half.
    room = sum(sorted(memory_of(Path(folder), itemsize=4) for folder in adapters.values())[1:])
    model_manager.default_memory = worker_manager.default_memory = lambda: int(0.6 * room)
    llm = LLM(
        model,
        **{"dtype": "float32", "enforce_eager": True, "seed": 0, "enable_prefix_caching": False},
        **{"enable_lora": True, "max_loras": 2, "max_lora_rank": 64, "max_model_len": 32},
        **{"max_num_seqs": 4, "max_num_batched_tokens": 8, "kv_cache_memory_bytes": 4 << 20},
        **{"tensor_parallel_size": 2, "distributed_executor_backend": "external_launcher"},
    )
    # Not the numbers of the adapters without weights with which vLLM captures.
    loras = {n: LoRARequest(n, i, path) for i, (n, path) in enumerate(adapters.items(), start=100)}
    greedy = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True)

    def tokens(*names: str) -> list[list[int]]:
        requests = [loras.get(name) for name in names]
        prompts = list(PROMPTS[: len(names)])
        answers = llm.generate(prompts, greedy, use_tqdm=False, lora_request=requests)
        return [list(answer.outputs[0].token_ids) for answer in answers]

    # Slots for all three adapters and memory for two: the last job swaps.
    jobs = [("first", "base", "plain"), ("second", "first")]
    worker = llm.llm_engine.model_executor.driver_worker.worker
    runner = worker.model_runner
    manager = runner.lora_manager._adapter_manager
    runner.lora_manager._samples = True  # as guilomo-serve has it
    runner.lora_manager._room = 2 * room  # the host's, which is for all
    memory = manager._slots._memory
    memory._beside = LateCopies()
    copied: list[int] = []
    fill = memory.fill
    memory.fill = lambda taken, data: (copied.append(data.data_ptr()), fill(taken, data))

    batches: list[tuple[list[int], list[int]]] = []
    update = model_manager.TokenSlots.update_metadata

    def updated(slots: Any, *mapping: Any) -> None:
        update(slots, *mapping)
        batches.append((slots.batch.order.tolist(), list(slots.batch.slots)))

    model_manager.TokenSlots.update_metadata = updated

    def run(job: tuple[str, ...]) -> tuple[list[list[int]], list[str]]:
        """The answers, and the adapters that were copied for them."""
        copied.clear()
        answers = tokens(*job)
        read = runner.lora_manager._read
        places = {
            read[r.lora_int_id].packed.data.data_ptr(): n
            for n, r in loras.items()
            if r.lora_int_id in read
        }
        return answers, [places[at] for at in copied]

    load = manager.expert_load
    load.clock = lambda: -math.inf  # no step is sampled
    found = {"none": graph_check.check(worker), "refused": _refusal(manager, runner.vllm_config)}
    wrong = GraphsWithoutAdapters(runner)
    found["wrong"] = graph_check.check(worker)
    wrong.replays = 0
    # In the processes adapters get other slots, as where a step brings several in.
    for name in ("plain", "first")[:: -1 if is_last else 1]:
        llm.llm_engine.add_lora(loras[name])
    batches.clear()
    eager, brought = zip(*map(run, jobs), strict=True)
    orders, in_slots = zip(*batches, strict=True)
    assert not wrong.replays, "graphs that were found wrong are used"
    try:
        llm.llm_engine.pin_lora(loras["first"].lora_int_id)
    except AdapterMemoryError as e:
        found["pinned"] = str(e)
    found["launching"] = _launching(manager, loras["second"].lora_int_id)
    full = [_put(llm, method, large) for method in ("guilomo_add", "guilomo_read")]
    found["of one"] = graph_check._of_any("a reason" if is_last else "")
    found["products"] = _wrong_products(worker, is_last)
    graphs = Graphs(runner)
    graphs.left_out = [kernels._expand] if is_last else []
    found["wrong in one"] = graph_check.check(worker)
    graphs.left_out, graphs.manager._graphs_captured = [], True
    found["right"] = graph_check.check(worker)
    load.clock = lambda: math.inf  # each is
    replayed, brought_again = zip(*map(run, jobs), strict=True)
    report = runner.lora_manager.report([loras["first"].lora_int_id], modules=True)
    result = {
        **{"runner": type(runner).__mro__[1].__module__, "replays": graphs.replays},
        **{"prompts": [llm.get_tokenizer()(p)["input_ids"] for p in PROMPTS]},
        **{
            "full": full,
            "jobs": jobs,
            "check": found,
            "eager": eager,
            "replayed": replayed,
            "brought": [brought, brought_again],
            "slots": [manager.lora_slots, len(manager.slot_of)],
            "report": report,
            "orders": orders,
            "in slots": in_slots,
        },
    }
    (Path(sys.argv[3]) / f"{rank}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
