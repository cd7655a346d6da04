"""`python -m lightcache_fx`: the command line."""

from lightcache_fx.cli import main

main()
