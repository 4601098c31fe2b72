"""Makes and checks the documentation site; `make docs` runs :mod:`website.build`."""
