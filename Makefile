# Every target sets up what it needs first (deploy/setup.sh); that costs minutes once.

.PHONY: demo test test-peft test-vllm test-extras test-lowest test-fleet lint format setup

demo: setup
	.venv/bin/python -m demo

test: setup
	.venv/bin/python -m pytest -n 3 --dist loadgroup --no-loadscope-reorder

# PEFT's own tests, on our method.
test-peft: setup
	.venv/bin/python -m tests.peft_suite.run

# vLLM's own tests, with our plugin and on our server: half an hour on two cores that do other work too.
test-vllm: setup
	.venv/bin/python -m tests.vllm_suite.run

# Training with packages that the locks do not have.
test-extras: .extras
	DS_BUILD_OPS=0 .extras/bin/python -m pip install --quiet "deepspeed==0.19.8" "lm_eval[hf,api]==0.4.13" \
		"mlflow==3.17.2" "wandb==0.31.0"
	DS_ACCELERATOR=$$(.venv/bin/python -c "import torch; print('cuda' if torch.cuda.is_available() else 'cpu')") \
		PYTHONPATH=$(CURDIR) .extras/bin/python -m pytest $(addprefix tests/train/test_, deepspeed.py lm_eval.py \
		report_to.py)

# Training with the lowest versions that pyproject.toml allows, over what else the lock has.
test-lowest: .lowest
	.lowest/bin/python -m pip install --quiet $$(.venv/bin/python deploy/lowest.py)
	PYTHONPATH=$(CURDIR) .lowest/bin/python -m pytest $(addprefix tests/train/test_, architectures.py bad_input.py \
		beyond_sft.py cli.py data.py endings.py layer.py packing.py peft.py report.py resume.py tools.py \
		whole_modules.py)

# Environments over that of the lock, which they leave as it is.
.extras .lowest: setup
	.venv/bin/python -m venv $@
	.venv/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" \
		>"$$($@/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/lock.pth"

# What needs more than the locks have: Ray; PostgreSQL, HAProxy and vllm-router, for three replicas under
# load while one is stopped, one is killed, one joins and the database restarts.
test-fleet: setup
	.venv/bin/python -m pip install --quiet "ray[serve]==2.60.0" jsonref
	.venv/bin/python -m pytest -m fleet
	.venv/bin/python -m venv .cache/vllm-router # it has other versions of what we have
	.cache/vllm-router/bin/python -m pip install --quiet vllm-router==0.1.17
	.venv/bin/python benchmarks/fleet.py --vllm-router .cache/vllm-router/bin/vllm-router \
		--out benchmarks/results/fleet.json

lint: setup
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

format: setup
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

setup:
	@deploy/setup.sh
