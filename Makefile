# Two commands from a fresh clone: `make demo` and `make test`. Both install what is missing.

.DEFAULT_GOAL := help
.PHONY: help demo test setup lint format bench clean distclean

help:
	@echo 'make demo     train a small MoE transformer over 4 processes (about 2 minutes)'
	@echo 'make test     everything: lint, types, C++ tests plain and under sanitizers, Python tests, a wheel'
	@echo '              (ONLY="mypy pytest" picks stages; ARGS="-k name" goes to pytest)'
	@echo 'make setup    install what is missing and build the extension into .venv'
	@echo 'make lint     ruff, mypy, clang-format, clang-tidy'
	@echo 'make format   apply ruff and clang-format'
	@echo 'make bench    run the benchmarks'
	@echo 'make clean    remove what was built; make distclean: and the virtual environments'
	@echo 'Variables: PYTHON=python3, JOBS=cores, ARGS= for the demo, pytest or the benchmarks'

demo test setup lint format bench:
	@scripts/dev.sh $@ $(ARGS)

clean:
	rm -rf build dist demo_out .mypy_cache .ruff_cache .pytest_cache .hypothesis .venv/.extension .venv-newest/.package

distclean: clean
	rm -rf .venv .venv-newest
