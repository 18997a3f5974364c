PYTHON := .venv/bin/python

test-kernel:
	@$(PYTHON) -m tests.kernels run --kernel $(KERNEL) $(if $(TESTS),-- $(TESTS))

test-host:
	@$(PYTHON) -m tests.kernels host $(if $(TESTS),-- $(TESTS))

test:
	@$(PYTHON) -m tests.kernels all

.PHONY: test test-host test-kernel
