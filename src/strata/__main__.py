"""`python -m strata`, and with it `torchrun ... -m strata train RECIPE`."""

from strata.cli.main import main

main()
