# make setup   makes .venv and installs everything (network needed once)
# make train   sample data, training, evaluation and a picture, in minutes on a CPU
# make test    the whole suite
# make lint    linter and formatter, changing nothing
# make gpu     tests and benchmark of a GPU, offline, into output/gpu; see .ci/gpu for its variables
# make packages   a folder for `make gpu PACKAGES=...` on a machine that has torch and no network
#
# All but `gpu` start with `setup`. All can be interrupted at any point and run again.
# Where .venv is not made yet, PYTHON chooses: make setup PYTHON=/path/to/python3.11

PIP := .venv/bin/python -m pip --disable-pip-version-check
VERSION := -c 'import ensurepip, sys; print("%d.%d" % sys.version_info[:2])'
PURELIB = $$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')

# pip writes INSTALLER last: without it, pip was interrupted and would take the package as complete.
DROP_HALF_INSTALLED = rm -rf $$(find .venv -name '*.dist-info' \
	! -exec test -e '{}/INSTALLER' ';' -print -prune)

.PHONY: setup train test lint gpu packages

setup: .venv/.requirements .venv/.detectron2 .venv/.package

train: setup
	.venv/bin/retina-focal quick-start trees

# A process a core with one thread each: the tensors are too small to share.
test: setup
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest --numprocesses auto --dist loadfile

lint: setup
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

# Variables of the command line, such as DEVICE=cpu, reach it through the environment.
gpu:
	@.ci/gpu

# What is pure Python, and what is compiled for the Python of that machine. torch, torchvision, numpy,
# OpenCV, Pillow, matplotlib and PyYAML are left to it.
PACKAGES ?= output/packages
PACKAGES_PYTHON ?= 3.12
PURE := antlr4-python3-runtime|cloudpickle|execnet|fvcore|hydra-core|iniconfig|iopath|omegaconf
PURE := $(PURE)|packaging|pluggy|portalocker|pygments|pytest|pytest-xdist|setuptools
PURE := $(PURE)|sortedcontainers|tabulate|termcolor|tqdm|typing-extensions|yacs
COMPILED := hypothesis|pycocotools
PINNED = awk '/^[a-z]/ { keep = $$1 ~ /^($(1))==/ } keep' requirements.txt

packages: setup
	@rm -rf $(PACKAGES)
	@mkdir -p $(PACKAGES)
	$(call PINNED,$(PURE)) >$(PACKAGES)/pure.txt
	$(call PINNED,$(COMPILED)) >$(PACKAGES)/compiled.txt
	$(PIP) install --quiet --target $(PACKAGES) --no-deps --no-compile --require-hashes \
		--no-build-isolation --use-pep517 --requirement $(PACKAGES)/pure.txt
	$(PIP) install --quiet --target $(PACKAGES) --no-deps --no-compile --require-hashes \
		--python-version $(PACKAGES_PYTHON) --implementation cp --only-binary=:all: \
		--platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 \
		--platform manylinux2014_x86_64 --requirement $(PACKAGES)/compiled.txt
	cp -r $(PURELIB)/detectron2 $(PURELIB)/sal_detectron2-*.dist-info $(PACKAGES)
	find $(PACKAGES) -name __pycache__ -prune -exec rm -r {} +
	@du -sh $(PACKAGES)

# A name on the PATH need not run, and a Python need not have what makes an environment.
.venv/bin/python:
	@found=; \
	for python in $(or $(PYTHON),python3 python3.12 python3.11 python3.10); do \
		version=$$("$$python" $(VERSION) 2>/dev/null) || version="does not run or lacks ensurepip"; \
		case $$version in \
			3.10 | 3.11 | 3.12) exec "$$python" -m venv --clear --without-pip .venv ;; \
		esac; \
		found="$$found  $$python: $$version\n"; \
	done; \
	printf '%b' "found\n$${found}expected Python 3.10, 3.11 or 3.12; type\n" \
		"  make setup PYTHON=/path/to/python3.11\n" >&2; \
	exit 1

# Not left to `venv`, which would not complete a pip whose installation was interrupted.
.venv/bin/pip: | .venv/bin/python
	@version=$$(.venv/bin/python $(VERSION)); \
	case $$version in \
		3.10 | 3.11 | 3.12) ;; \
		*) printf '%b' "found Python $$version in .venv, expected 3.10, 3.11 or 3.12; type\n" \
			"  rm -r .venv && make setup PYTHON=/path/to/python3.11\n" >&2; exit 1 ;; \
	esac
	@$(DROP_HALF_INSTALLED)
	.venv/bin/python -m ensurepip --upgrade --default-pip

# Every file is checked by its hash, also setuptools, which builds what has no wheel and which pip would
# otherwise fetch unchecked: so it comes first.
.venv/.requirements: requirements.txt requirements-opencv-headless.txt | .venv/bin/pip
	@$(DROP_HALF_INSTALLED)
	@# The two opencv packages write the same folder cv2: one at a time.
	@! $(PIP) show --quiet opencv-python-headless 2>/dev/null || \
		$(PIP) uninstall --yes opencv-python-headless
	sed -n '/^setuptools==/,/[^\]$$/p' $< >.venv/setuptools.txt
	$(PIP) install --require-hashes --requirement .venv/setuptools.txt
	$(PIP) install --require-hashes --no-build-isolation --use-pep517 --requirement $<
	@.venv/bin/python -c 'import cv2' || { $(PIP) uninstall --yes opencv-python && \
		$(PIP) install --no-deps --require-hashes --requirement $(word 2,$^); }
	@touch $@

# detectron2's one wheel is tagged CPython 3.10; the Python in it runs on all. Left out are the
# compiled _C, which RetinaNet does not use, and a stray top-level package `tools`. It is unpacked in
# a folder of its own, since a move can't be interrupted half way. A user's own build is kept.
.venv/.detectron2: requirements-detectron2.txt | .venv/.requirements
	@rm -rf .venv/detectron2
	@if .venv/bin/python -c 'import detectron2' 2>/dev/null && \
		! $(PIP) show --quiet sal-detectron2 2>/dev/null; then \
		echo 'using the detectron2 that is installed'; \
	else \
		set -ex; \
		$(PIP) install --no-deps --target .venv/detectron2 --python-version 3.10 \
			--implementation cp --abi none --only-binary=:all: --require-hashes --requirement $<; \
		rm -rf $(PURELIB)/detectron2 $(PURELIB)/sal_detectron2-*.dist-info; \
		rm -r .venv/detectron2/detectron2/_C*.so; \
		mv .venv/detectron2/sal_detectron2-*.dist-info $(PURELIB); \
		mv .venv/detectron2/detectron2 $(PURELIB); \
		rm -r .venv/detectron2; \
	fi
	@touch $@

.venv/.package: setup.py pyproject.toml | .venv/.detectron2
	@$(DROP_HALF_INSTALLED)
	$(PIP) install --no-deps --no-build-isolation --editable .
	@touch $@
