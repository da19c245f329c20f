# make demo: the whole story on this machine; make test: every check. Both make .venv first where it is missing or old.
.PHONY: demo test venv

demo: venv
	@.venv/bin/kairos demo --out demo-out

test:
	@.ci/run

venv: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	@.ci/venv
