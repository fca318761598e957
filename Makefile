# make demo  the whole job on photographs that come with scikit-image, in minutes, without a GPU
# make test  the test suite      make lint  format and lint      make bench  measure the rendering engine (an hour)
# make gpu   test and measure the kernels on this machine's GPU, in at most nine minutes
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint bench gpu clean

# The environment is made once and again whenever the pinned list changes.
.venv/ready: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit("CREPS needs Python 3.10 or newer; set PYTHON=/path/to/python3.10+" if sys.version_info < (3, 10) else 0)'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

# About eight minutes on two cores: photographs → archive → training → pictures at three sizes.
demo: .venv/ready
	rm -rf out/demo
	$(BIN)/python dataset_tool.py --source=skimage-photos --dest=out/demo/photos.zip --resolution=64x64 \
		--transform=random-crops --crops=300
	$(BIN)/python train.py --outdir=out/demo --cfg=demo --data=out/demo/photos.zip --mirror
	cp out/demo/00000-demo-photos/reals.png out/demo/00000-demo-photos/fakes*.png out/demo
	$(BIN)/python -m docs.figures --network=$$(ls out/demo/00000-demo-photos/network-snapshot-*.safetensors | tail -n 1) \
		--seed=0 --out=out/demo/scales.png
	@echo "Look at out/demo: reals.png, fakes*.png and scales.png"

test: .venv/ready
	$(BIN)/python -m pytest

lint: .venv/ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

bench: .venv/ready
	$(BIN)/python -m benchmarks.rendering

# With the Python that is given, whatever its torch, and without a network. The measurements follow failing tests too.
gpu:
	$(PYTHON) -m torch_utils.doctor
	@$(PYTHON) -c 'import torch, sys; torch.cuda.is_available() or sys.exit("make gpu needs a CUDA device; the page above says why there is none")'
	timeout 140 $(PYTHON) -m pytest tests/gpu --confcutdir=tests/gpu -p no:cacheprovider -rs || bad=1; \
	timeout 120 $(PYTHON) -m benchmarks.ops --device=cuda --no-compile --minutes=1.5 || bad=1; \
	timeout 70 $(PYTHON) -m benchmarks.rendering --device=cuda --sizes=512,1024 --rounds=11 || bad=1; \
	timeout 180 $(PYTHON) -m benchmarks.training --sizes=256,512 --batch=8 --turns=1 --rounds=3 || bad=1; \
	test -z "$$bad"

clean:
	rm -rf .venv out
