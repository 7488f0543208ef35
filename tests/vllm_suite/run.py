"""`make test-vllm`: vLLM's own tests of LoRA and of its HTTP server, with guilomo.

They are in the source package of the version that guilomo works with, which is fetched once into
.cache/, as is what they import beside vLLM. Models that they name on the Hub are small local ones
here: a cache of the Hub is laid out in which SmolLM2 has the names of all bases, and random plain
LoRAs have those of adapters.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

from tests.serve.helpers import random_lora

HERE = Path(__file__).parent
REPOSITORY = HERE.parent.parent
CACHE = REPOSITORY / ".cache" / "vllm-suite"
BASE = REPOSITORY / ".cache" / "smollm2-135m-instruct"
VERSION = "0.32.0"
COMMIT = 40 * "0"
QWEN = "Qwen/Qwen3-0.6B"
SMOLLM = "HuggingFaceTB/SmolLM2-135M-Instruct"
ZEPHYR = "HuggingFaceH4/zephyr-7b-beta"
BASES = (
    *(QWEN, SMOLLM, ZEPHYR, "facebook/opt-125m", "openai-community/gpt2"),
    *("hmellor/tiny-random-LlamaForCausalLM", "zai-org/chatglm3-6b"),
)
GOES_ON = "facebook/opt-125m"  # its tests want answers of some length, and SmolLM2 may end at once
ENDS = ('"eos_token": "<|im_end|>"', '"eos_token": "<|endoftext|>"')
ADAPTERS = {  # and the base that each is for
    "charent/self_cognition_Alice": QWEN,
    "Jackmin108/Qwen3-0.6B-Meow-LoRA": QWEN,
    "Jackmin108/Qwen3-0.6B-Woof-LoRA": QWEN,
    "jekunz/smollm-135m-lora-fineweb-faroese": SMOLLM,
    "typeof/zephyr-7b-beta-lora": ZEPHYR,
    "jeeejeee/llama32-3b-text2sql-spider": "meta-llama/Llama-3.2-3B-Instruct",
    "jeeejeee/chatglm3-text2sql-spider": "zai-org/chatglm3-6b",
}
# Those that need neither a GPU's kernels, nor adapters that were trained for bases of billions of
# parameters, nor the Hub itself (test_hf_hub_resolver.py).
SUITES = (
    "lora/test_peft_helper.py",
    "lora/test_resolver.py",
    "lora/test_lora_weights.py",
    "lora/test_utils.py",
    "lora/test_lora_utils.py",
    "lora/test_layers_utils.py",
    "lora/test_lora_huggingface.py",
    "lora/test_lora_manager.py",
    "lora/test_lora_functions.py",
    "lora/test_add_lora.py",
    "lora/test_worker.py",
    "plugins_tests/lora_resolvers/test_filesystem_resolver.py",
    "v1/core/test_prefix_caching.py",
    "v1/core/test_kv_cache_utils.py",
    "entrypoints/openai/completion/test_lora_resolvers.py",
    "entrypoints/serve/lora",
    "entrypoints/serve/sagemaker/test_sagemaker_lora_adapters.py",
    "entrypoints/openai/models/test_models.py",
    "entrypoints/openai/completion/test_completion.py",
    "entrypoints/openai/chat_completion/test_chat.py",
    "entrypoints/serve/tokenize/test_tokenization.py",
)


def source() -> Path:
    """The folder of vLLM's tests, without its own package beside them."""
    pip = [sys.executable, "-m", "pip"]
    tools, archive = CACHE / "tools", CACHE / f"vllm-{VERSION}.tar.gz"
    if not archive.is_file():
        install = [*pip, "install", "--quiet", "--target"]
        subprocess.run([*install, tools, "setuptools-rust", "setuptools-scm"], check=True)
        wanted = ["--no-deps", "pytest-asyncio", "tblib"]
        subprocess.run([*install, CACHE / "imported", *wanted], check=True)
        fetch = ["download", "--no-deps", "--no-binary", ":all:", "--no-build-isolation"]
        # Its version has the device's name in it, unless it is told.
        environment = {
            **os.environ,
            **{"PYTHONPATH": str(tools), "VLLM_TARGET_DEVICE": "empty"},
            **{"VLLM_VERSION_OVERRIDE": VERSION},
        }
        command = [*pip, *fetch, "--dest", CACHE, f"vllm=={VERSION}"]
        subprocess.run(command, env=environment, check=True)
    folder = CACHE / f"vllm-{VERSION}"
    if not folder.is_dir():
        with tarfile.open(archive) as packed:
            members = [m for m in packed if m.name.startswith(f"vllm-{VERSION}/tests/")]
            packed.extractall(CACHE, members, filter="data")
    return folder


def hub() -> Path:
    """A cache of the Hub that has what the tests ask for."""
    for seed, name in enumerate((*BASES, *ADAPTERS)):
        place = CACHE / "hub" / f"models--{name.replace('/', '--')}"
        files = place / "snapshots" / COMMIT
        (place / "refs").mkdir(parents=True, exist_ok=True)
        (place / "refs" / "main").write_text(COMMIT)
        if name in ADAPTERS:
            if not files.is_dir():
                # Quiet, as tests want answers that go on: the base's end seldom.
                random_lora(BASE, files, seed, std=0.001, lora_alpha=32)
            config = files / "adapter_config.json"
            about = json.loads(config.read_text())
            config.write_text(json.dumps(about | {"base_model_name_or_path": ADAPTERS[name]}))
            continue
        shutil.rmtree(files, ignore_errors=True)  # its links are those of another working tree
        files.mkdir(parents=True)
        for file in BASE.iterdir():
            if name == GOES_ON and file.name.endswith("config.json"):
                text = file.read_text().replace('"eos_token_id": 2', '"eos_token_id": 0')
                (files / file.name).write_text(text.replace(*ENDS))
            else:
                (files / file.name).symlink_to(file)
    return CACHE / "hub"


def main() -> int:
    folder = source()
    paths = [REPOSITORY, HERE, *filter(None, [os.environ.get("PYTHONPATH")]), CACHE / "imported"]
    environment = {
        **os.environ,
        **{"PYTHONPATH": os.pathsep.join(map(str, paths)), "HF_HUB_CACHE": str(hub())},
        **{"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"},
    }
    options = [
        *("-p", "guilomo_servers", "-p", "no:cacheprovider", "-p", "no:schemathesis"),
        *("-p", "no:hypothesispytest"),
        *("-p", "pytest_asyncio", "--import-mode", "importlib", "--rootdir", "."),
        *("-c", os.devnull, "-W", "ignore", "-q", "-r", "fE"),
    ]
    suites = sys.argv[1:] or [f"tests/{suite}" for suite in SUITES]
    command = [sys.executable, "-m", "pytest", *options, *suites]
    return subprocess.run(command, cwd=folder, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
