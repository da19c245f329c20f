# make demo: the whole story on this machine; make test: every check; make test-engines: real engines, installed into
# .engines when they are missing (5.4 GB). All make .venv first where it is missing or old.
.PHONY: demo test test-engines venv

demo: venv
	@.venv/bin/kairos demo --out demo-out

test:
	@.ci/run

test-engines: venv
	@.venv/bin/pytest -rs -m engine tests/engine

venv: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	@.ci/venv
