"""`python -m jaxsys`: the `jaxsys` command."""

from jaxsys.cli import main

raise SystemExit(main())
