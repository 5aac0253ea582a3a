# make setup                    install into .venv; all others do this first
# make pipeline [DATA=folder]   train, evaluate and infer
# make test                     the tests, a quarter of an hour on two cores
# make test-all                 also the long ones, half an hour
# make test-fast                those that need no fit and no server, under a minute
# make sample                   draw the synthetic images in data/
# make lint                     style and types of the code
# make requirements             pin what the requirements*.in need, with hashes
# make server                   a tracking server for a team, with PostgreSQL and passwords
# make server-migrate           copy the sqlite store into that server
# make backup TO=folder         copy everything that cannot be made again, while it runs
# make restore FROM=folder      put a backup into a new clone
# make bench                    the figures of the documentation, about two hours

PYTHON := .venv/bin/python
ARGS := $(if $(DATA),--data "$(DATA)")

compile = UV_CUSTOM_COMPILE_COMMAND="make requirements, from $(1).in" .cache/uv/bin/uv pip compile \
	--quiet --universal --python-version 3.10 --generate-hashes --no-emit-index-url $(UPGRADE) \
	$(1).in --output-file $(1).txt

.PHONY: setup pipeline test test-all test-fast sample lint requirements bench \
	server server-migrate backup restore

setup: .venv/.installed

pipeline: .venv/.installed
ifeq ($(DATA)$(DATA_PATH),)
	@$(PYTHON) data/sample.py --if-empty
endif
	$(PYTHON) src/train.py $(ARGS)
	$(PYTHON) src/evaluation.py $(ARGS)
	$(PYTHON) src/inference.py $(ARGS)

test: .venv/.installed
	$(PYTHON) -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not long"

test-all: .venv/.installed
	$(PYTHON) -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-fast: .venv/.installed
	$(PYTHON) -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slow"

sample: .venv/.installed
	$(PYTHON) data/sample.py

server: .venv/.server
	@$(PYTHON) src/server.py

server-migrate: .venv/.server
	@$(PYTHON) src/server.py --migrate

backup: .venv/.installed
	@$(PYTHON) src/backup.py --to "$(TO)"

restore: $(if $(wildcard $(FROM)/server),.venv/.server,.venv/.installed)
	@$(PYTHON) src/backup.py --restore "$(FROM)"

lint: .venv/.installed
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

# Versions that are pinned stay, unless an .in file asks for others; UPGRADE=--upgrade takes the
# newest. For all systems and Pythons at once, which pip cannot do.
requirements: .cache/uv/bin/uv
	$(call compile,requirements)
	$(call compile,requirements-line) --constraint requirements.txt
	$(call compile,requirements-tests) --constraint requirements.txt
	$(call compile,requirements-server) --constraint requirements.txt
	$(call compile,requirements-ray) --constraint requirements.txt

bench: .venv/.installed
	$(PYTHON) tests/benchmarks/photographs.py
	$(PYTHON) tests/benchmarks/tracking_cost.py
	$(PYTHON) tests/benchmarks/evaluation_cost.py
	$(PYTHON) tests/benchmarks/inference_speed.py
	$(PYTHON) tests/benchmarks/api_under_attack.py
	$(PYTHON) tests/benchmarks/line_load.py
	$(PYTHON) tests/benchmarks/growth.py --images 1000 10000
	$(PYTHON) tests/benchmarks/many_versions.py
	$(PYTHON) tests/benchmarks/generalisation.py
	$(PYTHON) tests/benchmarks/other_parts.py

.cache/uv/bin/uv:
	python3 -m venv .cache/uv
	.cache/uv/bin/pip install --quiet --disable-pip-version-check uv==0.13.9

.venv/.installed: requirements.txt .ci/setup
	@sh .ci/setup

.venv/.server: .venv/.installed requirements-server.txt
	@$(PYTHON) -m pip install --quiet --disable-pip-version-check -r requirements-server.txt
	@touch $@
