# Each target sets up what it needs in .venv.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
BUILT := .venv/.operators

# The lowest instruction sets of PyTorch, oneDNN, MKL and NumPy's OpenBLAS, with which float32 results differ as they do
# between CPUs. MKL_CBWR is for AMD's CPUs, where MKL ignores MKL_ENABLE_INSTRUCTIONS.
# LIMIT: the project's own compiled operators choose by the CPU alone, and cannot be told to do without AVX2.
LOWEST := ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 MKL_ENABLE_INSTRUCTIONS=SSE4_2 MKL_CBWR=COMPATIBLE \
	OPENBLAS_CORETYPE=Nehalem
# The tests that compute with networks, operators, augmentations, metrics, projections and directions, and compare the
# results with stored ones or with those of another implementation: three minutes of one core. Left out for their time:
# whole programs (test_loop, test_training_runs, test_projector*, test_one_image, test_image_set, test_generate_runs,
# test_calc_metrics), several processes (test_distributed, test_interpolation, test_anatomy), and what is computed in
# float64 and integers (test_compiled_operators, test_kernels, data sets).
PORTABLE := parity networks layers upfirdn2d bias_act conv2d_resample compiled_numbers grid_sample \
	ops_training loss step state transfer snapshot augment pixels geometry \
	image_generator generate run_output video projection pivotal_tuning similarity \
	detectors evaluation image_sources metrics_against_torch_fidelity metrics_meaning \
	perceptual_path feature_tensors frechet inception_score kernel precision_recall density_coverage authenticity \
	diversity intervals interval_coverage interval_coverage_kernel interval_coverage_frechet scores assessment \
	comparison timm_encoder loop_validation aggregate server_optimizers shared_statistics \
	backbones classifier classification_scores lesion_augmentation near_duplicates \
	aligned_similarity nearest_training discriminator_scores \
	embedding_layouts embedding_neighbors embedding_mixture embedding_features embed \
	directions boundaries walks measurements neighborhoods

# Tests run in several processes, of one thread each: small tensors gain nothing from more.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses=4 --dist=worksteal

.PHONY: help setup demo test test-portable slow nightly soak bench lint clean

help:
	@echo "make setup   install what is needed into .venv, and compile the operators where there is a compiler"
	@echo "make demo    train on drawings of lesions and show what comes out, minutes on two cores"
	@echo "make test    run the tests, about ten minutes on two cores"
	@echo "make test-portable run those tests that compute as on a CPU without AVX, slow ones too"
	@echo "make slow    run the tests that take longer"
	@echo "make soak    kill a training run a hundred times, and compare its end with an unbroken one"
	@echo "make nightly run all tests, the soak and the demonstration with three seeds: hours"
	@echo "make bench   measure speeds"
	@echo "make lint    check the style"

setup: $(BUILT)

$(READY): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("Python %d.%d found; 3.11 or later is needed: make PYTHON=/path/to/python3.11" % sys.version_info[:2] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -e .[dev]
	touch $(READY)

$(BUILT): $(READY) $(wildcard torch_utils/ops/csrc/*)
	$(BIN)/python -m torch_utils.ops.build --optional
	touch $(BUILT)

demo: $(BUILT)
	$(BIN)/python -m scripts.demo $(ARGS)

test: $(BUILT)
	$(PYTEST) -m "not slow and not nightly" $(ARGS)

test-portable: $(BUILT)
	$(LOWEST) $(BIN)/python -c 'import sys, torch; level = torch.backends.cpu.get_cpu_capability(); sys.exit(None if level == "DEFAULT" else f"PyTorch computes with {level} in spite of ATEN_CPU_CAPABILITY=default")'
	$(LOWEST) $(PYTEST) $(foreach name,$(PORTABLE),$(or $(wildcard tests/*/test_$(name).py tests/*/*/test_$(name).py),$(error no test_$(name).py))) $(ARGS)

slow: $(BUILT)
	$(PYTEST) -m "slow and not nightly" $(ARGS)

soak: $(BUILT)
	$(BIN)/python -m tests.end_to_end.soak $(ARGS)

nightly: test test-portable slow lint soak
	$(PYTEST) -m nightly $(ARGS)
	for seed in 0 1 2; do $(BIN)/python -m scripts.demo --seed=$$seed --dest=demo/seed$$seed || exit 1; done

bench: $(BUILT)
	for subject in ops allocator dataset_tool metrics generate projector train embedding; do $(BIN)/python -m tests.bench.bench_$$subject || exit 1; done

lint: $(READY)
	$(BIN)/python -m ruff check .

clean:
	rm -rf .venv .pytest_cache .ruff_cache
