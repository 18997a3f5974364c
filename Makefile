# `make run` shows what is wrong with the TCP connections of this machine, `make test` tests on all kernels.
# What is missing is set up first: packages through apt, Python's in .venv. Details go to .cache/log.

PYTHON ?= python3
BIN := .venv/bin
LOG := .cache/log
WITH_BIN := PATH="$(CURDIR)/$(BIN):$$PATH"

# Debian's and Ubuntu's names. The C library and Python's headers are asked for by file: a python3 of one's own has them.
BUILD_PACKAGES := clang llvm libbpf-dev libelf-dev zlib1g-dev pkg-config gcc libc6-dev
TEST_PACKAGES := qemu-system-x86 busybox-static kmod zstd lz4 file iproute2 nftables groff-base libcap2-bin socat debian-archive-keyring \
	$(shell grep -qs '^ID=ubuntu$$' /etc/os-release && echo linux-tools-generic || echo bpftool)

SUDO := $(shell test "$$(id -u)" = 0 || echo sudo)
C_FILES = $(shell find src tests bench docs -name '*.[ch]')
# The directory too: a probe has come or gone.
MESON_FILES := meson.build src/tcpscope/bpf $(shell find src -name meson.build)

.NOTPARALLEL:
.DELETE_ON_ERROR:

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 22

run: install ## diagnose this machine's connections (through sudo when you are not root)
	@$(if $(SUDO),$(BIN)/python -c 'import tcpscope.cli' &&) exec $(SUDO) $(BIN)/tcpscope diagnose $(ARGS)

test: setup-test lint ## everything: lint, all tests here, those of the kernel on every kernel
	@$(BIN)/python -m tests.kernels all $(if $(TESTS),-- $(TESTS))

test-host: setup-test ## all tests on this kernel; TESTS="tests/tools/test_states.py -k foo" chooses
	@$(BIN)/python -m tests.kernels host $(if $(TESTS),-- $(TESTS))

test-unit: setup-test ## the tests that need no kernel and no privilege; as root, they run without any
	@$(if $(SUDO),,setpriv --bounding-set=-all --inh-caps=-all --no-new-privs) \
	$(BIN)/python -m pytest -m 'not kernel and not root' $(TESTS)

test-kernel: setup-test ## the tests of the kernel on another one: KERNEL=6.1 TESTS="..."
	@$(if $(KERNEL),,echo 'KERNEL= is missing, such as: make test-kernel KERNEL=6.1' >&2; exit 2;) \
	$(BIN)/python -m tests.kernels run --kernel $(KERNEL) $(if $(TESTS),-- $(TESTS))

test-summary: setup-test ## the results of test-host and of each test-kernel, put together as by test
	@$(BIN)/python -m tests.kernels summary

lint: setup-dev ## ruff, clang-format and mypy
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check --quiet . || { echo "'make format' formats the Python files" >&2; exit 1; }
	@$(BIN)/clang-format --dry-run --Werror $(C_FILES)
	@$(BIN)/mypy --strict src/tcpscope

format: setup-dev ## format all Python and C files
	@$(BIN)/ruff format --quiet .
	@$(BIN)/clang-format -i $(C_FILES)

wheel: setup-wheel ## a wheel for other machines, in dist/
	@rm -rf dist .cache/wheel
	$(call step,wheel,building the wheel,$(WITH_BIN) $(BIN)/python -m build --wheel --no-isolation --outdir .cache/wheel)
	$(call step,auditwheel,packing its libraries,$(WITH_BIN) $(BIN)/auditwheel repair --wheel-dir dist .cache/wheel/*.whl)
	@ls -l dist/*.whl

bench: setup-test ## side by side with the peers
	@$(BIN)/python -m bench $(ARGS)

clean: ## remove what was built; the kernels in ~/.cache/tcpscope stay
	rm -rf build dist .cache .venv/.done-install

# -- set-up ------------------------------------------------------------------------------------------------------------

# $(call step,name,what it does,command): one line with the time it took; the whole output when it fails.
define step
@mkdir -p $(LOG); printf '%s ... ' '$(2)'; start=$$(date +%s); \
if { $(3); } >$(LOG)/$(1) 2>&1 </dev/null; then echo "$$(( $$(date +%s) - start )) s"; \
else status=$$?; echo 'failed'; cat $(LOG)/$(1) >&2; exit $$status; fi
endef

# $(call packages,names): install those that are missing. Elsewhere than on Debian's family they are the user's affair.
define packages
@if command -v dpkg-query >/dev/null; then \
	missing=; for package in $(1); do \
		dpkg-query -W -f='$${db:Status-Status}' $$package 2>/dev/null | grep -qx installed || missing="$$missing $$package"; \
	done; \
	if [ -n "$$missing" ]; then \
		if [ -n '$(SUDO)' ] && ! command -v sudo >/dev/null; then \
			echo "These packages are missing, and there is no sudo to install them:$$missing" >&2; exit 1; fi; \
		echo "installing$$missing"; mkdir -p $(LOG); start=$$(date +%s); \
		{ $(SUDO) apt-get update && $(SUDO) env DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
			-o DPkg::Lock::Timeout=120 $$missing; } \
			>$(LOG)/apt 2>&1 || { status=$$?; cat $(LOG)/apt >&2; exit $$status; }; \
		echo "installed in $$(( $$(date +%s) - start )) s"; \
	fi; \
fi
endef

packages-build:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "tcpscope needs Python 3.11 or newer, not %s; PYTHON= names another one" % sys.version.split()[0])'
	$(call packages,$(BUILD_PACKAGES) \
		$$($(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || echo python3-venv) \
		$$(test -e "$$($(PYTHON) -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h" || echo python3-dev))

packages-test:
	$(call packages,$(TEST_PACKAGES))

.venv/pyvenv.cfg: | packages-build
	$(call step,venv,making .venv,$(PYTHON) -m venv .venv)

.venv/.done-build: pyproject.toml .venv/pyvenv.cfg
	$(call step,build-tools,installing the build tools,\
	$(BIN)/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["build-system"]["requires"], sep="\n")' \
		>.cache/build-requirements && $(BIN)/pip install --upgrade 'pip>=25.1' -r .cache/build-requirements)
	@touch $@

.venv/.done-install: .venv/.done-build $(MESON_FILES)
	$(call step,install,building and installing tcpscope,$(WITH_BIN) $(BIN)/pip install --no-build-isolation --editable .)
	@touch $@

.venv/.done-dev: pyproject.toml .venv/.done-install
	$(call step,dev,installing the development tools,$(BIN)/pip install --group dev)
	@touch $@

.venv/.done-wheel: pyproject.toml .venv/.done-build
	$(call step,wheel-tools,installing the tools for wheels,$(BIN)/pip install --group wheel)
	@touch $@

install: packages-build .venv/.done-install ## set up what `make run` needs
setup-dev: install .venv/.done-dev
setup-test: setup-dev packages-test
setup-wheel: install .venv/.done-wheel

.PHONY: help run test test-host test-unit test-kernel test-summary lint format wheel bench clean
.PHONY: packages-build packages-test install setup-dev setup-test setup-wheel
