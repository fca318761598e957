# make demo  train on letters and render them, in minutes, without a GPU
# make test  the test suite      make lint  format and lint      make bench  measure the rendering engine (an hour)
# make gpu   test and measure the kernels on this machine's GPU, in nine minutes or less
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint bench gpu clean

# The environment is made again whenever the pinned list changes.
.venv/ready: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit("CREPS needs Python 3.10 or newer; set PYTHON=/path/to/python3.10+" if sys.version_info < (3, 10) else 0)'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

# Trains on letters, for 360 seconds at most where there is timeout (coreutils), then renders with the last snapshot and
# with a network from models/.
PROCESSES = $$($(BIN)/python -c 'import torch; print(min(torch.cuda.device_count() or 2, 2))')
LIMIT = $(if $(shell command -v timeout 2>/dev/null),timeout --foreground --preserve-status 360)
LETTERS = $$(ls out/demo/00000-demo-letters/network-snapshot-*.safetensors | tail -n 1)
demo: .venv/ready
	rm -rf out/demo
	$(BIN)/python dataset_tool.py --source=letters --dest=out/demo/letters.zip --resolution=32x32
	$(LIMIT) $(BIN)/python train.py --outdir=out/demo --cfg=demo --cond --data=out/demo/letters.zip --gpus=$(PROCESSES) \
		--workers=1 || test $$? = 143
	$(BIN)/python generate.py --network=$(LETTERS) --seeds=0-25 --size=128x128 --columns=9 --grid=out/demo/alphabet.png
	$(BIN)/python generate.py --network=$(LETTERS) --seeds=0-4 --class=C,R,E,P,S --size=819x819 --columns=5 \
		--grid=out/demo/word.png
	$(BIN)/python -m docs.figures --network=emoji-people --seed=24 --trunc=0.8 --out=out/demo/scales.png
	$(BIN)/python generate.py --network=emoji-people --trunc=0.8 --seeds=24 --size=4096x4096 --grid=out/demo/poster.png
	$(BIN)/python generate.py --network=emoji-people --trunc=0.8 --seeds=24-25 --size=256x256 --zoom=1:8:1 --w-frames=30 \
		--video=out/demo/zoom.mp4
	@echo "Look at out/demo: alphabet.png, word.png, scales.png, poster.png and zoom.mp4"

# Two processes of one thread each are faster than one of two.
test: .venv/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

lint: .venv/ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

bench: .venv/ready
	$(BIN)/python -m benchmarks.rendering

# Uses $(PYTHON) with its own torch, and no network. The measurements are made even if tests fail.
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
